"""Kernel image formats and boot protocols: ELF, the Linux/x86 boot protocol and PVH. Constants
only.

Sources: Documentation/arch/x86/boot.rst and arch/x86/include/uapi/asm/bootparam.h (Linux),
include/uapi/linux/elf.h, xen/include/public/arch-x86/hvm/start_info.h and public/elfnote.h (Xen).
"""

# --- ELF (elf.h) ----------------------------------------------------------------------------------
ELF_MAGIC = b"\x7fELF"
EHDR = "<16sHHIQQQIHHHHHH"  # e_ident .. e_shstrndx
EHDR_SIZE = 64
PHDR = "<IIQQQQQQ"  # p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
PHDR_SIZE = 56
EHDR32 = "<16sHHIIIIIHHHHHH"
EHDR32_SIZE = 52
PHDR32 = "<IIIIIIII"  # p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_flags, p_align
PHDR32_SIZE = 32
NHDR = "<III"  # n_namesz, n_descsz, n_type
NHDR_SIZE = 12
EI_NIDENT = 16
EI_CLASS = 4
EI_DATA = 5
ELFCLASS32 = 1
ELFCLASS64 = 2
ELFDATA2LSB = 1
ET_EXEC = 2
ET_DYN = 3
EM_386 = 3
EM_X86_64 = 62
PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4

# --- ELF notes that identify the kernel (include/linux/elfnote.h) and its entry (public/elfnote.h)
LINUX_NOTE_NAME = b"Linux\0"  # build salt and LTO, since 4.19
XEN_NOTE_NAME = b"Xen\0"
XEN_ELFNOTE_GUEST_OS = 6
XEN_ELFNOTE_PHYS32_ENTRY = 18

# --- PVH (public/arch-x86/hvm/start_info.h) -------------------------------------------------------
XEN_HVM_START_MAGIC_VALUE = 0x336EC578
HVM_START_INFO = (
    "<IIIIQQQQII"  # magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, entries, 0
)
HVM_MODLIST_ENTRY = "<QQQQ"  # paddr, size, cmdline_paddr, reserved
HVM_MEMMAP_ENTRY = "<QQII"  # addr, size, type, reserved

# --- Linux setup header (boot.rst, "The Real-Mode Kernel Header") ---------------------------------
# These are offsets in the file and in the zero page.
HDR_SETUP_SECTS = 0x1F1
HDR_SYSSIZE = 0x1F4  # size of the protected-mode code in 16-byte units
HDR_BOOT_FLAG = 0x1FE
HDR_JUMP = 0x200  # the header ends at 0x202 plus the value of the byte at 0x201
HDR_MAGIC = 0x202
HDR_VERSION = 0x206
HDR_TYPE_OF_LOADER = 0x210
HDR_LOADFLAGS = 0x211
HDR_RAMDISK_IMAGE = 0x218
HDR_RAMDISK_SIZE = 0x21C
HDR_CMD_LINE_PTR = 0x228
HDR_INITRD_ADDR_MAX = 0x22C
HDR_KERNEL_ALIGNMENT = 0x230
HDR_XLOADFLAGS = 0x236
HDR_CMDLINE_SIZE = 0x238
HDR_PREF_ADDRESS = 0x258
HDR_INIT_SIZE = 0x260
HDR_END_2_12 = 0x268  # a header of protocol 2.12 ends after handover_offset
HDR_END_MAX = 0x290  # the zero page has room for the header up to here

BOOT_FLAG = 0xAA55
SETUP_MAGIC = b"HdrS"
VERSION_2_12 = 0x020C  # the first version with xloadflags
LOADED_HIGH = 1 << 0  # loadflags
XLF_KERNEL_64 = 1 << 0  # xloadflags
LOADER_UNDEFINED = 0xFF
SECTOR = 512
ENTRY_64 = 0x200  # from the start of the protected-mode code
COMMAND_LINE_SIZE = 2048  # asm/setup.h, NUL included; for a vmlinux, which has no setup header

# --- the zero page (struct boot_params) -----------------------------------------------------------
BP_SIZE = 0x1000
BP_ACPI_RSDP_ADDR = 0x070
BP_E820_ENTRIES = 0x1E8
BP_E820_TABLE = 0x2D0
BP_E820_MAX = 128
E820_ENTRY = "<QQI"
E820_RAM = 1
E820_RESERVED = 2

# --- BIOS data area: by these words kernels find firmware tables without EFI ----------------------
BDA_EBDA_SEGMENT = 0x40E
BDA_BASE_MEMORY_KIB = 0x413
RESET_VECTOR = 0xF_FFF0  # F000:FFF0, the target of a jump to the BIOS
