"""The data that a loader hands to a kernel: the memory map, the zero page, the PVH start info, the
GDT and the page tables.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ImageError
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory

PAGE = 4096
PAGE_STRUCT = 64  # bytes for which Linux describes one page (struct page)
#: What a guest needs at least to do something, once its files are unpacked.
ROOM_TO_RUN = 16 << 20

# Segment descriptors: selector 0x10 is 64-bit code and 0x18 is data, as the 64-bit boot protocol
# demands. Both are flat, and their accessed bits are set.
GDT = struct.pack("<4Q", 0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)
PTE_TABLE = 0x03  # present, writable
PTE_LARGE = 0x83  # present, writable, PS (a 2 MiB page)

# The code at F000:FFF0, to which a kernel may jump to reboot (reboot=bios). The code is: mov dx,
# PORT_ACPI_RESET; mov al, ACPI_RESET_VALUE; out dx, al; hlt; jmp back to the hlt.
#: Interrupt handlers for real mode. The timer's counts in the BIOS data area at 0040:006C and calls
#: vector 0x1C, as on every PC since the first.
BIOS_HANDLERS = {
    "return": bytes.fromhex("cf"),
    "timer": bytes.fromhex(
        "1e 50 b8 40 00 8e d8 66 ff 06 6c 00"  # push ds, ax; inc dword [0x40:0x6c]
        " cd 1c b0 20 e6 20 58 1f cf"  # int 0x1c; out 0x20, 0x20; pop ax, ds; iret
    ),
    "master": bytes.fromhex("50 b0 20 e6 20 58 cf"),
    "slave": bytes.fromhex("50 b0 20 e6 a0 e6 20 58 cf"),
}
RESET_CODE = struct.pack(
    "<BHBBBBBb", 0xBA, pf.PORT_ACPI_RESET, 0xB0, pf.ACPI_RESET_VALUE, 0xEE, 0xF4, 0xEB, -3
)

# Offsets in the page at PVH_START_INFO.
PVH_MODLIST = 0x40
PVH_MEMMAP = 0x80


def memory_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """The e820 table: per entry its address, its size in bytes and its E820_* type. The entries
    ascend and do not overlap.

    PVH's memory map and multiboot's use the same numbers for RAM and reserved memory.
    """
    high = memory.regions[1:]
    return [
        (0, pf.EBDA_BASE, lb.E820_RAM),
        (pf.EBDA_BASE, 0xA_0000 - pf.EBDA_BASE, lb.E820_RESERVED),
        (pf.FIRMWARE_BASE, pf.FIRMWARE_END - pf.FIRMWARE_BASE, lb.E820_RESERVED),
        *(
            [(pf.KERNEL_BASE, memory.low_size - pf.KERNEL_BASE, lb.E820_RAM)]
            if memory.low_size > pf.KERNEL_BASE
            else []
        ),
        (pf.PCI_ECAM_BASE, pf.PCI_ECAM_SIZE, lb.E820_RESERVED),
        (pf.KVM_IDENTITY_MAP, 4 * PAGE, lb.E820_RESERVED),  # one page, then three of the TSS
        *((r.gpa, r.size, lb.E820_RAM) for r in high),
    ]


def check_cmdline(cmdline: str, limit: int) -> bytes:
    """Check the command line and return it as bytes, without the NUL.

    :param limit: the longest command line in characters that the kernel takes.
    :raises ImageError: the command line is too long or not printable ASCII.
    """
    for i, c in enumerate(cmdline):
        if not (" " <= c <= "~" or c == "\t"):
            raise ImageError(
                f"command line has {c!r} at position {i}", "use printable ASCII only, on one line"
            )
    limit = min(limit, pf.BOOT_CMDLINE_MAX - 1)
    if len(cmdline) > limit:
        raise ImageError(
            f"command line has {len(cmdline)} characters, but this kernel takes only {limit}",
            "shorten --append",
        )
    return cmdline.encode("ascii")


def place_initrd(size: int, memory: GuestMemory, bottom: int, highest: int) -> int:
    """Choose the initrd's guest-physical address: the highest page at which it fits.

    :param size: in bytes.
    :param bottom: the end of the kernel; the initrd starts at or above this address.
    :param highest: the highest address that the initrd may occupy.
    :raises ImageError: the initrd does not fit.
    """
    top = min(memory.low_size, highest + 1)
    address = (top - size) & ~(PAGE - 1)
    if address < bottom:
        room = max(top - bottom, 0)
        raise ImageError(
            f"the initrd of {size} bytes does not fit: {room} bytes are free between the kernel's"
            f" end {bottom:#x} and {top:#x}",
            "raise --memory or use a smaller initrd"
            if top == memory.low_size < pf.RAM_LOW_MAX
            else "use a smaller initrd: this kernel takes no larger one in any memory",
        )
    return address


def check_room(memory: GuestMemory, kernel_end: int, packed: int, unpacked: int) -> None:
    """Check that Linux can unpack an initrd. It would not fail, but leave out what does not fit.

    Linux keeps the archives until all are unpacked, to a tmpfs, which takes at most half of the
    memory that is free when it is mounted (init/do_mounts.c, mm/shmem.c).

    :param kernel_end: the end of the kernel in memory. :param packed: bytes of all archives.
    :param unpacked: bytes of memory that the files take.
    :raises ImageError: the guest's memory is too small; says what is needed.
    """
    need = (2 * unpacked + packed + kernel_end) * PAGE // (PAGE - PAGE_STRUCT) + ROOM_TO_RUN
    if need > memory.size:
        raise ImageError(
            f"the initrd with what is added to it has {packed >> 20} MiB, {unpacked >> 20} MiB"
            f" unpacked; Linux needs {need >> 20} MiB to unpack it, but the guest has"
            f" {memory.size >> 20} MiB",
            f"give it --memory {-(-need >> 20)}M, or add less",
        )


def write_common(memory: GuestMemory, cmdline: bytes) -> None:
    """Write the command line, the words of the BIOS data area by which kernels find the EBDA, and
    the real-mode reset vector.
    """
    memory.write(pf.BOOT_CMDLINE, cmdline + b"\0")
    memory.write(lb.BDA_EBDA_SEGMENT, struct.pack("<H", pf.EBDA_BASE >> 4))
    memory.write(lb.BDA_BASE_MEMORY_KIB, struct.pack("<H", pf.EBDA_BASE >> 10))
    memory.write(lb.RESET_VECTOR, RESET_CODE)


def write_bios(memory: GuestMemory) -> None:
    """Write the real-mode interrupt vectors, and handlers that acknowledge the interrupts of a PC.
    There are no BIOS calls: every other vector returns at once.
    """
    offsets = {}
    code = bytearray()
    for name, piece in BIOS_HANDLERS.items():
        offsets[name] = len(code)
        code += piece
    memory.write(pf.BIOS_CODE, code)
    names = ["return"] * 256
    names[8] = "timer"
    names[9:16] = ["master"] * 7
    names[0x70:0x78] = ["slave"] * 8
    base = pf.BIOS_CODE & 0xF_0000
    vectors = [(base >> 4) << 16 | pf.BIOS_CODE - base + offsets[name] for name in names]
    memory.write(0, struct.pack("<256I", *vectors))


def write_zero_page(memory: GuestMemory, header: bytes, rsdp: int, initrd: tuple[int, int]) -> None:
    """Write struct boot_params at BOOT_PARAMS.

    :param header: the setup header from 0x1f1 on; this function fills in the loader's fields.
    :param initrd: its address and its size in bytes; (0, 0) for none.
    """
    page = bytearray(lb.BP_SIZE)
    page[lb.HDR_SETUP_SECTS : lb.HDR_SETUP_SECTS + len(header)] = header
    page[lb.HDR_TYPE_OF_LOADER] = lb.LOADER_UNDEFINED
    struct.pack_into("<I", page, lb.HDR_CMD_LINE_PTR, pf.BOOT_CMDLINE)
    # The initrd is always below 4 GiB, so the upper halves in the ext_* fields stay zero.
    struct.pack_into("<II", page, lb.HDR_RAMDISK_IMAGE, *initrd)
    struct.pack_into("<Q", page, lb.BP_ACPI_RSDP_ADDR, rsdp)
    entries = memory_map(memory)
    page[lb.BP_E820_ENTRIES] = len(entries)
    page_map = b"".join(struct.pack(lb.E820_ENTRY, *e) for e in entries)
    page[lb.BP_E820_TABLE : lb.BP_E820_TABLE + len(page_map)] = page_map
    memory.write(pf.BOOT_PARAMS, page)


def synthetic_header() -> bytes:
    """Make a setup header for a vmlinux, which has none. The kernel reads only the fields that a
    loader writes.
    """
    header = bytearray(lb.HDR_END_2_12 - lb.HDR_SETUP_SECTS)

    def put(fmt: str, offset: int, *values: int | bytes) -> None:
        struct.pack_into(fmt, header, offset - lb.HDR_SETUP_SECTS, *values)

    put("<H", lb.HDR_BOOT_FLAG, lb.BOOT_FLAG)
    put("<4sH", lb.HDR_MAGIC, lb.SETUP_MAGIC, lb.VERSION_2_12)
    put("<B", lb.HDR_LOADFLAGS, lb.LOADED_HIGH)
    put("<I", lb.HDR_CMDLINE_SIZE, lb.COMMAND_LINE_SIZE - 1)
    return bytes(header)


def write_start_info(memory: GuestMemory, rsdp: int, initrd: tuple[int, int]) -> None:
    """Write struct hvm_start_info, version 1, with its module list and memory map, at
    PVH_START_INFO.

    :param initrd: its address and its size in bytes; (0, 0) for none.
    """
    base = pf.PVH_START_INFO
    entries = memory_map(memory)
    address, size = initrd
    modules = 1 if size else 0
    page = bytearray(PAGE)
    struct.pack_into(
        lb.HVM_START_INFO,
        page,
        0,
        lb.XEN_HVM_START_MAGIC_VALUE,
        1,
        0,
        modules,
        base + PVH_MODLIST if modules else 0,
        pf.BOOT_CMDLINE,
        rsdp,
        base + PVH_MEMMAP,
        len(entries),
        0,
    )
    struct.pack_into(lb.HVM_MODLIST_ENTRY, page, PVH_MODLIST, address, size, 0, 0)
    table = b"".join(struct.pack(lb.HVM_MEMMAP_ENTRY, *e, 0) for e in entries)
    page[PVH_MEMMAP : PVH_MEMMAP + len(table)] = table
    memory.write(base, page)


def write_gdt(memory: GuestMemory) -> None:
    """Write the boot GDT at BOOT_GDT."""
    memory.write(pf.BOOT_GDT, GDT)


def write_page_tables(memory: GuestMemory) -> None:
    """Write an identity map of the first 4 GiB at BOOT_PAGE_TABLES: PML4, PDPT and four page
    directories of 2 MiB pages.
    """
    base = pf.BOOT_PAGE_TABLES
    memory.write(base, struct.pack("<Q", base + PAGE | PTE_TABLE))
    memory.write(
        base + PAGE, struct.pack("<4Q", *(base + (2 + i) * PAGE | PTE_TABLE for i in range(4)))
    )
    memory.write(
        base + 2 * PAGE, struct.pack("<2048Q", *range(PTE_LARGE, (4 << 30) + PTE_LARGE, 2 << 20))
    )
