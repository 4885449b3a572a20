"""Boot: load a kernel into guest memory and say how vCPU 0 starts.

The modules ``acpi`` and ``mptable`` make the firmware tables.
"""

from __future__ import annotations

from contextlib import ExitStack

from pyvmm.boot import params
from pyvmm.boot.image import ImageFile
from pyvmm.errors import UsageError
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, Protocol

    from pyvmm.boot.bzimage import BzImage
    from pyvmm.boot.elf import ElfKernel
    from pyvmm.memory import GuestMemory

    Mode = Literal["long64", "protected32", "real16"]

    class Archive(Protocol):
        """A cpio archive that Linux unpacks after the initrd.

        :ivar size: in bytes. :ivar unpacked: bytes of guest memory that its files take.
        """

        @property
        def size(self) -> int: ...

        @property
        def unpacked(self) -> int: ...

        def load(self, memory: GuestMemory, gpa: int) -> None: ...


__all__ = ["FLAT_MODES", "PROTOCOLS", "BootState", "is_linux", "load"]

#: How a kernel is entered. ``auto`` enters a bzImage by Linux' 64-bit boot protocol. It enters a
#: 64-bit ELF by its PVH note, else by its multiboot header, else at e_entry; a 32-bit ELF by its
#: multiboot header, else by its PVH note. ``linux64`` enters a bzImage or a 64-bit ELF at the
#: 64-bit entry. Each of the other protocols takes one format only.
ARCHIVE_ALIGN = 512  # bytes; archives of an initrd begin at its multiples
PROTOCOLS = ("auto", "linux64", "pvh", "elf64", "bzimage", "multiboot")
#: How a flat binary starts at its first byte: in PVH's entry state, in the state of Linux' 64-bit
#: entry, or in real mode with CS 0.
FLAT_MODES = ("protected32", "long64", "real16")

RFLAGS_FIXED = 0x2


class BootState:
    """How vCPU 0 starts.

    :ivar mode: ``long64`` (64-bit code, paging on with ``cr3``, CS 0x10, DS, ES and SS 0x18),
        ``protected32`` (flat 32-bit segments, paging off: the entry state of PVH and multiboot) or
        ``real16`` (all segments 0). Interrupts are off in every mode.
    :ivar regs: general registers by their names in struct kvm_regs; all others are 0.
    :ivar cr3: guest-physical address of the page tables; 0 unless the mode is ``long64``.
    :ivar gdt_base: guest-physical address of a table of four descriptors.
    :ivar kind: the format that was found and how it is entered, for people to read, such as
        ``bzImage by 64-bit entry``.
    :ivar entry: guest-physical address of the first instruction.
    :ivar segment: CS in real mode.
    :ivar bios: whether interrupt controllers, timer and vectors are as a PC's BIOS leaves them.
    """

    __slots__ = ("bios", "cr3", "entry", "gdt_base", "kind", "mode", "regs", "segment")

    def __init__(
        self,
        mode: Mode,
        kind: str,
        entry: int,
        regs: dict[str, int],
        cr3: int,
        *,
        bios: bool = False,
        segment: int = 0,
    ) -> None:
        self.mode, self.kind, self.entry, self.cr3 = mode, kind, entry, cr3
        self.bios, self.segment = bios, segment
        self.gdt_base = pf.BOOT_GDT
        self.regs = {"rip": entry, "rflags": RFLAGS_FIXED, **regs}

    def __repr__(self) -> str:
        return f"BootState({self.kind!r}, mode={self.mode!r}, entry={self.entry:#x})"


def load(
    memory: GuestMemory,
    kernel: str,
    *,
    initrd: str | Sequence[str] | None = None,
    cmdline: str = "",
    rsdp: int = 0,
    protocol: str = "auto",
    load_address: int | None = None,
    load_mode: str = "protected32",
    archive: Archive | None = None,
) -> BootState:
    """Put kernel, initrd, command line and boot parameters into ``memory``.

    Everything is checked before the first byte is written.

    :param memory: must read as zero (it is new, or ``zero`` has been called).
    :param kernel: the path of the kernel; ``initrd`` likewise, or several in order. Linux unpacks
        one archive after the other; for a multiboot kernel they are modules.
    :param rsdp: guest-physical address of the ACPI root pointer (``acpi.build``); 0 for none.
    :param protocol: one of PROTOCOLS.
    :param load_address: load the file as a flat binary at this guest-physical address, whatever its
        format.
    :param load_mode: one of FLAT_MODES: how a flat binary starts.
    :param archive: what Linux unpacks after the initrd: files of the user's, and a command that is
        too long for the command line.
    :raises ImageError: a file cannot be used; the error names the file, the field and the remedy.
    :raises UsageError: the protocol or the mode is unknown, or the kernel takes no archive.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(
            f"unknown boot protocol {protocol!r}", f"use one of {', '.join(PROTOCOLS)}"
        )
    disks = [] if initrd is None else [initrd] if isinstance(initrd, str) else list(initrd)
    with ImageFile(kernel, "kernel") as image:
        found = "flat" if load_address is not None else _format(image)
        if archive is not None and found not in ("elf", "bzimage"):
            raise _no_archive("flat binary" if found == "flat" else "multiboot kernel")
        if load_address is not None:
            return _load_flat(memory, image, disks, cmdline, rsdp, load_address, load_mode)
        if found == "multiboot" and protocol in ("auto", "multiboot"):
            return _load_multiboot(memory, image, None, disks, cmdline)
        if found == "elf":
            if protocol == "bzimage":
                raise image.bad("is an ELF, not a bzImage", "use protocol auto")
            return _load_elf(memory, image, disks, cmdline, rsdp, protocol, archive)
        if found == "multiboot" or protocol not in ("auto", "linux64", "bzimage"):
            name = "bzImage" if found == "bzimage" else "multiboot kernel"
            raise image.bad(
                f"is a {name}, which protocol {protocol} cannot enter", "use protocol auto"
            )
        return _load_bzimage(memory, image, disks, cmdline, rsdp, archive)


def _no_archive(kind: str) -> UsageError:
    return UsageError(
        f"a {kind} unpacks no archive: it takes neither --add nor --modules nor a long COMMAND",
        "leave them out, or boot Linux",
    )


def is_linux(kernel: str) -> bool:
    """Whether the file is a Linux kernel: a bzImage, or an ELF whose notes say that it is Linux.

    :raises ImageError: the file is damaged or no kernel, so that ``load`` would refuse it as well.
    """
    with ImageFile(kernel, "kernel") as image:
        found = _format(image)
        if found == "elf":
            from pyvmm.boot import elf

            return elf.parse(image).linux
        if found == "bzimage":
            from pyvmm.boot.bzimage import BzImage

            BzImage(image)
        return found == "bzimage"


def _format(image: ImageFile) -> str:
    """The file's format: ``elf``, ``bzimage``, or ``multiboot`` for a file that is neither but has
    a multiboot header with load addresses.

    :raises ImageError: the file has no known format.
    """
    if image.size >= 4 and image.read(0, 4, "the ELF magic") == lb.ELF_MAGIC:
        return "elf"
    magic_end = lb.HDR_MAGIC + len(lb.SETUP_MAGIC)
    if (
        image.size >= magic_end
        and image.read(lb.HDR_MAGIC, 4, "the setup header") == lb.SETUP_MAGIC
    ):
        return "bzimage"
    from pyvmm.boot import multiboot
    from pyvmm.spec.multiboot import AOUT_KLUDGE

    header = multiboot.find(image)
    if header is None:
        raise image.bad(
            "is neither a bzImage nor an ELF: no 'HdrS' at 0x202, no ELF magic at 0,"
            " no multiboot header"
        )
    if not header.flags & AOUT_KLUDGE:
        raise image.bad(
            f"has a multiboot header without addresses (flags {header.flags:#x}, bit 16 clear)"
            " and is not an ELF"
        )
    return "multiboot"


def _load_bzimage(
    memory: GuestMemory,
    image: ImageFile,
    disks: list[str],
    cmdline: str,
    rsdp: int,
    archive: Archive | None,
) -> BootState:
    from pyvmm.boot.bzimage import BzImage

    bz: BzImage = BzImage(image)
    end = bz.address + bz.init_size
    _check_range(memory, image, "the kernel (pref_address, init_size)", bz.address, end)
    if end > memory.low_size:
        raise image.bad(f"pref_address {bz.address:#x} is above 4 GiB")
    line = params.check_cmdline(cmdline, bz.cmdline_max)
    disk = _load_initrd(memory, disks, end, bz.initrd_max, archive)
    image.load(memory, bz.address, bz.offset, bz.length, "the kernel code")
    params.write_common(memory, line)
    return _enter_linux64(memory, "bzImage", bz.header, bz.address + lb.ENTRY_64, rsdp, disk)


def _load_elf(
    memory: GuestMemory,
    image: ImageFile,
    disks: list[str],
    cmdline: str,
    rsdp: int,
    protocol: str,
    archive: Archive | None,
) -> BootState:
    from pyvmm.boot import elf

    kernel: ElfKernel = elf.parse(image)
    # Multiboot 1 has no 64-bit entry, so a 64-bit ELF that also has a PVH note is entered by the
    # note.
    asked = protocol == "multiboot"
    if asked or (
        protocol == "auto" and not kernel.linux and (kernel.bits == 32 or kernel.pvh_entry is None)
    ):
        from pyvmm.boot import multiboot

        if multiboot.find(image) is not None:
            if archive is not None:
                raise _no_archive("multiboot kernel")
            return _load_multiboot(memory, image, kernel, disks, cmdline)
        if asked:
            raise image.bad("has no multiboot header in its first 8 KiB", "use protocol auto")
    if kernel.bits == 32 and (kernel.pvh_entry is None or protocol not in ("auto", "pvh")):
        raise image.bad(
            "is a 32-bit ELF (EI_CLASS 1) with neither a multiboot header in its first 8 KiB"
            " nor a PVH note"
            if kernel.pvh_entry is None
            else f"is a 32-bit ELF (EI_CLASS 1), which protocol {protocol} cannot enter"
        )
    if protocol == "pvh" and kernel.pvh_entry is None:
        raise image.bad(
            "has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)",
            "use protocol auto, or build with CONFIG_PVH",
        )
    by_note = kernel.pvh_entry if protocol in ("auto", "pvh") else None
    rooms = pf.LOW_ROOMS["long64" if by_note is None else "protected32"]
    for s in kernel.segments:
        _check_range(memory, image, f"segment {s.index} (p_paddr, p_memsz)", s.paddr, s.end, rooms)
    low = [s for s in kernel.segments if s.end <= memory.low_size]
    entry = kernel.entry if by_note is None else by_note
    if not any(s.paddr <= entry < s.end for s in low):
        raise image.bad(f"entry point {entry:#x} is above 4 GiB")
    line = params.check_cmdline(
        cmdline, lb.COMMAND_LINE_SIZE - 1 if kernel.linux else pf.BOOT_CMDLINE_MAX - 1
    )
    disk = _load_initrd(
        memory, disks, max(low[-1].end, pf.KERNEL_BASE), memory.low_size - 1, archive
    )
    for s in kernel.segments:
        image.load(memory, s.paddr, s.offset, s.filesz, f"segment {s.index}")
    params.write_common(memory, line)
    name = "Linux ELF" if kernel.linux else "ELF"
    if by_note is None:
        return _enter_linux64(memory, name, params.synthetic_header(), entry, rsdp, disk)
    return _enter_pvh(memory, f"{name} by PVH note", entry, rsdp, disk)


def _load_multiboot(
    memory: GuestMemory,
    image: ImageFile,
    kernel: ElfKernel | None,
    disks: list[str],
    cmdline: str,
) -> BootState:
    """Load a kernel that has a multiboot header.

    The modules that ``disks`` name (``multiboot.split_modules``) go behind the kernel; each
    starts on a page boundary.

    :param kernel: the parsed ELF; None if the file is no ELF and only the header says what to load.
    """
    from pyvmm.boot import multiboot
    from pyvmm.spec import multiboot as mb

    header = multiboot.find(image)
    assert header is not None
    kind = "multiboot ELF"
    if kernel is None or header.flags & mb.AOUT_KLUDGE:
        kernel, kind = multiboot.by_addresses(image, header), "multiboot by addresses"
    rooms = pf.LOW_ROOMS["protected32"]
    for s in kernel.segments:
        _check_range(memory, image, f"segment {s.index} (p_paddr, p_memsz)", s.paddr, s.end, rooms)
    if kernel.segments[-1].end > memory.low_size:
        raise image.bad(
            f"segment {kernel.segments[-1].index} ends above 4 GiB, but multiboot 1 has 32-bit"
            " addresses only"
        )
    name = multiboot.name_of(image.path)
    line = params.check_cmdline(f"{name} {cmdline}".rstrip(), pf.BOOT_CMDLINE_MAX - 1)
    with ExitStack() as stack:
        modules: list[tuple[int, int, bytes]] = []
        files: list[ImageFile] = []
        end = max(kernel.segments[-1].end, pf.KERNEL_BASE)
        for path, text in multiboot.split_modules(",".join(disks)) if disks else []:
            module = stack.enter_context(ImageFile(path, "initrd"))
            start = -(-end // params.PAGE) * params.PAGE
            end = start + module.size
            if end > memory.low_size:
                raise module.bad(
                    f"of {module.size} bytes does not fit:"
                    f" {max(memory.low_size - start, 0)} bytes are free behind the kernel",
                    "raise --memory or use a smaller module",
                )
            modules.append((start, end, params.check_cmdline(text, params.PAGE)))
            files.append(module)
        at, information = multiboot.information(memory, pf.BOOT_CMDLINE, modules)
        for s in kernel.segments:
            image.load(memory, s.paddr, s.offset, s.filesz, f"segment {s.index}")
        for (start, _, _), module in zip(modules, files, strict=True):
            module.load(memory, start, 0, module.size, "the module")
    params.write_common(memory, line)
    params.write_gdt(memory)
    params.write_bios(memory)
    memory.write(at, information)
    regs = {"rax": mb.BOOTLOADER_MAGIC, "rbx": at}
    return BootState("protected32", kind, kernel.entry, regs, 0, bios=True)


def _load_flat(
    memory: GuestMemory,
    image: ImageFile,
    disks: list[str],
    cmdline: str,
    rsdp: int,
    address: int,
    mode: str,
) -> BootState:
    """Load the whole file at ``address`` and enter it at its first byte."""
    if mode not in FLAT_MODES:
        raise UsageError(f"unknown load mode {mode!r}", f"use one of {', '.join(FLAT_MODES)}")
    end = address + image.size
    rooms = list(pf.LOW_ROOMS[mode])
    if mode == "real16":
        fits = address < 0x10000  # CS is 0
    else:
        rooms.append((pf.KERNEL_BASE, memory.low_size))
        fits = True
    if not fits or not any(a <= address and end <= b for a, b in rooms):
        where = " or ".join(f"{a:#x}..{b:#x}" for a, b in rooms)
        raise image.bad(
            f"at load address {address:#x} takes {address:#x}..{end:#x},"
            f" but a flat binary in mode {mode} may use only {where}",
            "use an address below 0x10000"
            if mode == "real16"
            else "use another --load-address, or raise --memory",
        )
    if mode == "real16" and disks:
        raise UsageError(
            "a flat binary in mode real16 has no use for an initrd", "leave --initrd out"
        )
    line = params.check_cmdline(cmdline, pf.BOOT_CMDLINE_MAX - 1)
    disk = _load_initrd(memory, disks, max(end, pf.KERNEL_BASE), memory.low_size - 1)
    image.load(memory, address, 0, image.size, "the binary")
    params.write_common(memory, line)
    if mode == "long64":
        return _enter_linux64(memory, "flat binary", params.synthetic_header(), address, rsdp, disk)
    if mode == "protected32":
        return _enter_pvh(memory, "flat binary in 32-bit mode", address, rsdp, disk)
    params.write_bios(memory)
    regs = {"rsp": address & ~15}
    return BootState("real16", "flat binary in real mode", address, regs, 0, bios=True)


def _enter_pvh(
    memory: GuestMemory, kind: str, entry: int, rsdp: int, disk: tuple[int, int]
) -> BootState:
    params.write_start_info(memory, rsdp, disk)
    params.write_gdt(memory)
    return BootState("protected32", kind, entry, {"rbx": pf.PVH_START_INFO}, 0)


def _enter_linux64(
    memory: GuestMemory, name: str, header: bytes, entry: int, rsdp: int, disk: tuple[int, int]
) -> BootState:
    params.write_zero_page(memory, header, rsdp, disk)
    params.write_gdt(memory)
    params.write_page_tables(memory)
    # The stack grows down from the page tables to the end of the zero page.
    regs = {"rsi": pf.BOOT_PARAMS, "rsp": pf.BOOT_PAGE_TABLES}
    return BootState("long64", f"{name} by 64-bit entry", entry, regs, pf.BOOT_PAGE_TABLES)


def _check_range(
    memory: GuestMemory,
    image: ImageFile,
    field: str,
    start: int,
    end: int,
    rooms: tuple[tuple[int, int], ...] = (),
) -> None:
    """Raise ImageError unless [start, end) is RAM at or above 1 MiB, or in one of the ``rooms``
    below: the other memory there belongs to the loader and the firmware tables.
    """
    if start < pf.KERNEL_BASE:
        if any(low <= start and end <= high for low, high in rooms):
            return
        free = " and ".join(f"{low:#x}..{high:#x}" for low, high in rooms)
        raise image.bad(
            f"{field} takes {start:#x}..{end:#x}; below {pf.KERNEL_BASE:#x}"
            + (f", only {free} are free" if free else " is no place for this kernel")
        )
    if any(r.gpa <= start and end <= r.gpa + r.size for r in memory.regions):
        return
    fits = end <= pf.RAM_LOW_MAX
    raise image.bad(
        f"{field} takes {start:#x}..{end:#x}, outside guest memory of {memory.size >> 20} MiB",
        f"raise --memory to at least {-(-end >> 20)}M" if fits else "",
    )


def _load_initrd(
    memory: GuestMemory,
    paths: list[str],
    bottom: int,
    highest: int,
    archive: Archive | None = None,
) -> tuple[int, int]:
    """Load the initrds, and behind them ``archive``, between ``bottom`` and ``highest``
    (``params.place_initrd``); returns their address and their size in bytes, or (0, 0) if there is
    none.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(ImageFile(path, "initrd")) for path in paths]
        # Linux looks for the next archive at multiples of four bytes (init/initramfs.c).
        offsets: list[int] = []
        total = 0
        for file in files:
            offsets.append(-(-total // ARCHIVE_ALIGN) * ARCHIVE_ALIGN)
            total = offsets[-1] + file.size
        behind = -(-total // ARCHIVE_ALIGN) * ARCHIVE_ALIGN
        if archive is not None:
            packed = behind + archive.size
            params.check_room(memory, bottom, packed, total + archive.unpacked)
            total = packed
        if not total:
            return 0, 0
        address = params.place_initrd(total, memory, bottom, highest)
        for offset, file in zip(offsets, files, strict=True):
            file.load(memory, address + offset, 0, file.size, "the archive")
        if archive is not None:
            archive.load(memory, address + behind)
        return address, total
