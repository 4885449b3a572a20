"""Multiboot 1 (The Multiboot Specification, version 0.6.96). Constants only."""

# --- the kernel's header (3.1) --------------------------------------------------------------------
MAGIC = 0x1BADB002
SEARCH = 8192  # the header lies entirely in so many bytes from the beginning of the file
ALIGN = 4
HEADER = "<III"  # magic, flags, checksum: their sum is 0 modulo 2^32
HEADER_SIZE = 12
# behind the checksum: header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr
ADDRESSES = "<IIIII"
ADDRESSES_SIZE = 20

PAGE_ALIGN = 1 << 0  # modules start on page boundaries
MEMORY_INFO = 1 << 1  # the kernel wants mem_lower, mem_upper and, if possible, the memory map
VIDEO_MODE = 1 << 2
REQUIREMENTS = 0xFFFF  # a loader must refuse bits of this mask that it does not know
AOUT_KLUDGE = 1 << 16  # the address fields are valid; they take precedence even in an ELF

# --- machine state (3.2) --------------------------------------------------------------------------
BOOTLOADER_MAGIC = 0x2BADB002  # in EAX; EBX holds the address of the boot information

# --- boot information (3.3) -----------------------------------------------------------------------
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODS = 1 << 3
INFO_MEM_MAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9
# flags, mem_lower, mem_upper (KiB), boot_device, cmdline, mods_count, mods_addr, syms, mmap_length,
# mmap_addr, drives_length, drives_addr, config_table, boot_loader_name
INFO = "<7I16x6I"
INFO_SIZE = 120  # includes the fields for APM, VBE and frame buffer, which we leave zero
MODULE = "<IIII"  # mod_start, mod_end, string, 0
MODULE_SIZE = 16
MMAP_ENTRY = "<IQQI"  # size of the rest of the entry, base_addr, length, type
MMAP_ENTRY_SIZE = 24
