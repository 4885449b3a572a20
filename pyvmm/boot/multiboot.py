"""Multiboot 1 kernels: find the header in the file, find out what it loads, and make the boot
information for the kernel.

Numbers in brackets are sections of The Multiboot Specification, version 0.6.96.
"""

from __future__ import annotations

import struct

from pyvmm.boot import params
from pyvmm.boot.elf import ElfKernel, Segment
from pyvmm.errors import ImageError
from pyvmm.spec import multiboot as mb
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.image import ImageFile
    from pyvmm.memory import GuestMemory

LOADER_NAME = b"pyvmm\0"


class Header:
    """A multiboot header whose checksum is right.

    :ivar at: its offset in the file.
    :ivar flags: the constants are in spec.multiboot.
    """

    __slots__ = ("at", "flags")

    def __init__(self, at: int, flags: int) -> None:
        self.at, self.flags = at, flags


def find(image: ImageFile) -> Header | None:
    """Find the file's header (3.1.1); None if it has none.

    :raises ImageError: the header requires a feature that this loader lacks.
    """
    head = image.read(0, min(image.size, mb.SEARCH), "the multiboot header")
    magic = struct.pack("<I", mb.MAGIC)
    at = head.find(magic)
    while at >= 0:
        if at % mb.ALIGN == 0 and at + mb.HEADER_SIZE <= len(head):
            _, flags, checksum = struct.unpack_from(mb.HEADER, head, at)
            if (mb.MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                return _checked(image, Header(at, flags))
        at = head.find(magic, at + 1)
    return None


def _checked(image: ImageFile, header: Header) -> Header:
    unknown = header.flags & mb.REQUIREMENTS & ~(mb.PAGE_ALIGN | mb.MEMORY_INFO)
    if unknown & mb.VIDEO_MODE:
        raise image.bad(
            f"asks for a video mode (multiboot header flags {header.flags:#x}, bit 2),"
            " but the machine has no display",
            "build it without bit 2",
        )
    if unknown:
        raise image.bad(
            f"asks for a feature that multiboot 1 does not define (header flags {header.flags:#x})",
            "build it without",
        )
    return header


def by_addresses(image: ImageFile, header: Header) -> ElfKernel:
    """What to load according to a header with the a.out kludge (3.1.3), as an ELF of one segment;
    load nothing.

    :raises ImageError: it names the header field at fault.
    """
    raw = image.read(header.at + mb.HEADER_SIZE, mb.ADDRESSES_SIZE, "the multiboot address fields")
    header_addr, load_addr, load_end, bss_end, entry = struct.unpack(mb.ADDRESSES, raw)
    offset = header.at - (header_addr - load_addr)
    if not load_addr <= header_addr or offset < 0:
        raise image.bad(
            f"multiboot load_addr {load_addr:#x} and header_addr {header_addr:#x} do not fit"
            f" a header at byte {header.at:#x}"
        )
    if load_end and load_end <= header_addr:
        raise image.bad(
            f"multiboot load_end_addr {load_end:#x} is not above header_addr {header_addr:#x}"
        )
    size = load_end - load_addr if load_end else image.size - offset
    if offset + size > image.size:
        raise image.truncated("the part up to load_end_addr", offset + size)
    if bss_end and bss_end < load_addr + size:
        raise image.bad(
            f"multiboot bss_end_addr {bss_end:#x} is below the end of the loaded part,"
            f" {load_addr + size:#x}"
        )
    end = bss_end or load_addr + size
    if not load_addr <= entry < end:
        raise image.bad(f"multiboot entry_addr {entry:#x} is outside {load_addr:#x}..{end:#x}")
    segment = Segment(0, offset, load_addr, load_addr, size, end - load_addr)
    return ElfKernel([segment], entry, None, False, 32)


def split_modules(text: str) -> list[tuple[str, str]]:
    """Split ``--initrd`` for a multiboot kernel: ``FILE [ARGUMENTS][,FILE ...]``. A doubled comma
    stands for a comma.

    :returns: per module its path and the string for the kernel, which is path and arguments.
    """
    parts = [p.replace("\0", ",").strip() for p in text.replace(",,", "\0").split(",")]
    return [(p.split(" ", 1)[0], p) for p in parts if p]


def name_of(path: str) -> str:
    """The first word of the kernel's command line: its file name, as other loaders pass it. Spaces
    and unprintable characters become ``_``.
    """
    name = path.rpartition("/")[2]
    return "".join(c if "!" <= c <= "~" else "_" for c in name)


def information(
    memory: GuestMemory, cmdline_at: int, modules: list[tuple[int, int, bytes]]
) -> tuple[int, bytes]:
    """Make the boot information (3.3), followed by everything that it points to.

    :param cmdline_at: the guest-physical address of the command line.
    :param modules: per module its guest-physical start and end, and its string.
    :returns: the guest-physical address (MULTIBOOT_INFO) and the bytes to write there.
    :raises ImageError: the modules' strings do not fit into one page.
    """
    base = pf.MULTIBOOT_INFO
    entries = b"".join(
        struct.pack(mb.MMAP_ENTRY, mb.MMAP_ENTRY_SIZE - 4, *e) for e in params.memory_map(memory)
    )
    mmap_at = base + mb.INFO_SIZE
    name_at = mmap_at + len(entries)
    mods_at = name_at + len(LOADER_NAME) + -len(LOADER_NAME) % 4
    string_at = mods_at + len(modules) * mb.MODULE_SIZE
    mods, strings = b"", b""
    for start, end, text in modules:
        mods += struct.pack(mb.MODULE, start, end, string_at + len(strings), 0)
        strings += text + b"\0"
    info = struct.pack(
        mb.INFO,
        mb.INFO_MEMORY
        | mb.INFO_CMDLINE
        | mb.INFO_MODS
        | mb.INFO_MEM_MAP
        | mb.INFO_BOOT_LOADER_NAME,
        pf.EBDA_BASE >> 10,
        max(memory.low_size - pf.KERNEL_BASE, 0) >> 10,
        0xFFFFFFFF,  # there is no boot device, so its flag is not set either
        cmdline_at,
        len(modules),
        mods_at if modules else 0,
        len(entries),
        mmap_at,
        0,
        0,
        0,
        name_at,
    )
    blob = (info.ljust(mb.INFO_SIZE, b"\0") + entries + LOADER_NAME).ljust(mods_at - base, b"\0")
    blob += mods + strings
    if len(blob) > params.PAGE:
        raise ImageError(
            f"the names and arguments of {len(modules)} modules take {len(blob)} bytes,"
            f" but only {params.PAGE} are available",
            "use fewer modules or shorter arguments in --initrd",
        )
    return base, blob
