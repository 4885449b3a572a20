"""Boot: load a kernel into guest memory and say how vCPU 0 starts; firmware tables are in ``acpi`` and ``mptable``."""

from __future__ import annotations

from pyvmm.boot import params
from pyvmm.boot.image import ImageFile
from pyvmm.errors import UsageError
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.bzimage import BzImage
    from pyvmm.boot.elf import ElfKernel
    from pyvmm.memory import GuestMemory

__all__ = ["PROTOCOLS", "BootState", "is_linux", "load"]

#: ``auto`` takes bzImage by the 64-bit protocol and ELF by its PVH note, or at e_entry where it has none; ``linux64`` takes both by
#: their 64-bit entry; the others take one format only.
PROTOCOLS = ("auto", "linux64", "pvh", "elf64", "bzimage")

RFLAGS_FIXED = 0x2


class BootState:
    """How vCPU 0 starts.

    :ivar mode: ``long64`` (paging on with ``cr3``, 64-bit, CS 0x10, DS, ES and SS 0x18) or ``protected32`` (flat 32-bit segments,
        paging off: the PVH entry state). Interrupts are off in both.
    :ivar regs: general registers by their names in struct kvm_regs; those not named are 0.
    :ivar cr3: guest-physical; 0 in protected32. :ivar gdt_base: guest-physical, four descriptors.
    :ivar kind: what was found, for people: ``bzImage``, ``Linux ELF``, ``ELF``, with how it is entered.
    :ivar entry: guest-physical address of the first instruction.
    """

    __slots__ = ("cr3", "entry", "gdt_base", "kind", "mode", "regs")

    def __init__(self, mode: str, kind: str, entry: int, regs: dict[str, int], cr3: int) -> None:
        self.mode, self.kind, self.entry, self.cr3 = mode, kind, entry, cr3
        self.gdt_base = pf.BOOT_GDT
        self.regs = {"rip": entry, "rflags": RFLAGS_FIXED, **regs}

    def __repr__(self) -> str:
        return f"BootState({self.kind!r}, mode={self.mode!r}, entry={self.entry:#x})"


def load(
    memory: GuestMemory,
    kernel: str,
    *,
    initrd: str | None = None,
    cmdline: str = "",
    rsdp: int = 0,
    protocol: str = "auto",
) -> BootState:
    """Put kernel, initrd, command line and boot parameters into ``memory``, which reads as zero (new, or after ``zero``).

    Everything is checked before the first byte is written.

    :param rsdp: guest-physical address of the ACPI root pointer (``acpi.build``); 0 for none.
    :param protocol: one of PROTOCOLS.
    :raises ImageError: naming file, field and remedy. :raises UsageError: unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown boot protocol {protocol!r}", f"use one of {', '.join(PROTOCOLS)}")
    with ImageFile(kernel, "kernel") as image:
        if _is_elf(image):
            if protocol == "bzimage":
                raise image.bad("is an ELF, not a bzImage", "use protocol auto")
            return _load_elf(memory, image, initrd, cmdline, rsdp, protocol)
        if protocol in ("pvh", "elf64"):
            raise image.bad(f"is a bzImage, which protocol {protocol} cannot enter", "use protocol auto")
        return _load_bzimage(memory, image, initrd, cmdline, rsdp)


def is_linux(kernel: str) -> bool:
    """Whether the file is a Linux kernel (a bzImage, or an ELF whose notes say so) rather than a bare-metal one.

    :raises ImageError: it is neither, or damaged: ``load`` would refuse it whatever the machine.
    """
    with ImageFile(kernel, "kernel") as image:
        if _is_elf(image):
            from pyvmm.boot import elf

            return elf.parse(image).linux
        from pyvmm.boot.bzimage import BzImage

        BzImage(image)
        return True


def _is_elf(image: ImageFile) -> bool:
    """True for an ELF, False for a bzImage; ImageError for anything else."""
    if image.size >= 4 and image.read(0, 4, "the ELF magic") == lb.ELF_MAGIC:
        return True
    magic_end = lb.HDR_MAGIC + len(lb.SETUP_MAGIC)
    if image.size < magic_end or image.read(lb.HDR_MAGIC, 4, "the setup header") != lb.SETUP_MAGIC:
        raise image.bad("is neither a bzImage nor an ELF: no 'HdrS' at 0x202, no ELF magic at 0")
    return False


def _load_bzimage(
    memory: GuestMemory, image: ImageFile, initrd: str | None, cmdline: str, rsdp: int
) -> BootState:
    from pyvmm.boot.bzimage import BzImage

    bz: BzImage = BzImage(image)
    end = bz.address + bz.init_size
    _check_range(memory, image, "the kernel (pref_address, init_size)", bz.address, end)
    if end > memory.low_size:
        raise image.bad(f"pref_address {bz.address:#x} is above 4 GiB")
    line = params.check_cmdline(cmdline, bz.cmdline_max)
    disk = _load_initrd(memory, initrd, end, bz.initrd_max)
    image.load(memory, bz.address, bz.offset, bz.length, "the kernel code")
    params.write_common(memory, line)
    return _enter_linux64(memory, "bzImage", bz.header, bz.address + lb.ENTRY_64, rsdp, disk)


def _load_elf(
    memory: GuestMemory, image: ImageFile, initrd: str | None, cmdline: str, rsdp: int, protocol: str
) -> BootState:
    from pyvmm.boot import elf

    kernel: ElfKernel = elf.parse(image)
    if protocol == "pvh" and kernel.pvh_entry is None:
        raise image.bad(
            "has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY)", "use protocol auto, or build with CONFIG_PVH"
        )
    for s in kernel.segments:
        _check_range(memory, image, f"segment {s.index} (p_paddr, p_memsz)", s.paddr, s.end)
    low = [s for s in kernel.segments if s.end <= memory.low_size]
    by_note = kernel.pvh_entry if protocol in ("auto", "pvh") else None
    entry = kernel.entry if by_note is None else by_note
    if not any(s.paddr <= entry < s.end for s in low):
        raise image.bad(f"entry point {entry:#x} is above 4 GiB")
    line = params.check_cmdline(
        cmdline, lb.COMMAND_LINE_SIZE - 1 if kernel.linux else pf.BOOT_CMDLINE_MAX - 1
    )
    disk = _load_initrd(memory, initrd, low[-1].end, memory.low_size - 1)
    for s in kernel.segments:
        image.load(memory, s.paddr, s.offset, s.filesz, f"segment {s.index}")
    params.write_common(memory, line)
    name = "Linux ELF" if kernel.linux else "ELF"
    if by_note is None:
        return _enter_linux64(memory, name, params.synthetic_header(), entry, rsdp, disk)
    params.write_start_info(memory, rsdp, disk)
    params.write_gdt(memory)
    return BootState("protected32", f"{name} by PVH note", entry, {"rbx": pf.PVH_START_INFO}, 0)


def _enter_linux64(
    memory: GuestMemory, name: str, header: bytes, entry: int, rsdp: int, disk: tuple[int, int]
) -> BootState:
    params.write_zero_page(memory, header, rsdp, disk)
    params.write_gdt(memory)
    params.write_page_tables(memory)
    regs = {"rsi": pf.BOOT_PARAMS, "rsp": pf.BOOT_PAGE_TABLES}  # the stack grows down to the zero page's end
    return BootState("long64", f"{name} by 64-bit entry", entry, regs, pf.BOOT_PAGE_TABLES)


def _check_range(memory: GuestMemory, image: ImageFile, field: str, start: int, end: int) -> None:
    """The range must be RAM at or above 1 MiB: what is below belongs to the loader and the firmware tables."""
    if start < pf.KERNEL_BASE:
        raise image.bad(f"{field} starts at {start:#x}, below {pf.KERNEL_BASE:#x}")
    if any(r.gpa <= start and end <= r.gpa + r.size for r in memory.regions):
        return
    fits = end <= pf.RAM_LOW_MAX
    raise image.bad(
        f"{field} takes {start:#x}..{end:#x}, outside guest memory of {memory.size >> 20} MiB",
        f"raise --memory to at least {-(-end >> 20)}M" if fits else "",
    )


def _load_initrd(memory: GuestMemory, path: str | None, bottom: int, highest: int) -> tuple[int, int]:
    """Load the initrd; returns its address and bytes, (0, 0) for none. Writes only above ``bottom``."""
    if path is None:
        return 0, 0
    with ImageFile(path, "initrd") as image:
        address = params.place_initrd(image, memory, bottom, highest)
        image.load(memory, address, 0, image.size, "the archive")
        return address, image.size
