"""Multiboot 1 (The Multiboot Specification, version 0.6.96). Constants only."""

# --- the kernel's header (3.1) --------------------------------------------------------------------
MAGIC = 0x1BADB002
SEARCH = 8192  # the header lies whole in the first so many bytes of the file
ALIGN = 4
HEADER = "<III"  # magic, flags, checksum: their sum is 0 modulo 2^32
HEADER_SIZE = 12
ADDRESSES = (
    "<IIIII"  # header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr, behind the checksum
)
ADDRESSES_SIZE = 20

PAGE_ALIGN = 1 << 0  # modules on page boundaries
MEMORY_INFO = 1 << 1  # mem_lower, mem_upper and, where it can be had, the memory map
VIDEO_MODE = 1 << 2
REQUIREMENTS = 0xFFFF  # what a loader that does not know it must refuse; the rest is optional
AOUT_KLUDGE = 1 << 16  # the address fields count, even in an ELF

# --- machine state (3.2) --------------------------------------------------------------------------
BOOTLOADER_MAGIC = 0x2BADB002  # in EAX; EBX has the information's address

# --- boot information (3.3) -----------------------------------------------------------------------
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODS = 1 << 3
INFO_MEM_MAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9
# flags, mem_lower, mem_upper (KiB), boot_device, cmdline, mods_count, mods_addr, syms, mmap_length,
# mmap_addr, drives_length, drives_addr, config_table, boot_loader_name
INFO = "<7I16x6I"
INFO_SIZE = 120  # with the fields for APM, VBE and frame buffer, which are not offered
MODULE = "<IIII"  # mod_start, mod_end, string, 0
MODULE_SIZE = 16
MMAP_ENTRY = "<IQQI"  # size of what follows, base_addr, length, type
MMAP_ENTRY_SIZE = 24
