"""The disk from which Bochs' BIOS boots L1: the loader (boot.S), a kernel with a PVH note, and an
initramfs of several archives.

Kernel and archives lie on the disk as they will lie in memory, each part from a sector on, so that
the loader unpacks nothing.
"""

from __future__ import annotations

import os
import struct
import subprocess

from pyvmm.errors import TestbedError
from pyvmm.host.paths import cache_dir
from pyvmm.programs import which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SECTOR = 512
#: The geometry that Bochs is told: sectors per cylinder.
CYLINDER = 16 * 63 * SECTOR  # bytes
LOADER = 16 * SECTOR  # bytes
#: Where boot.S has its tables, in bytes from its start.
MODULE, ENTRY, PIECES, CMDLINE = 0x800, 0x820, 0x840, 0x900
PIECES_MAX, CMDLINE_MAX = 15, 0x6FF
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/interface/elfnote.h
ALIGN = 2 << 20  # bytes, of the initramfs in memory


def loader() -> bytes:
    """boot.S as a program of ``LOADER`` bytes. It is assembled at first use.

    :raises TestbedError: gcc or ld is missing, or does not take it.
    """
    import hashlib

    source = f"{os.path.dirname(os.path.abspath(__file__))}/boot.S"
    with open(source, "rb") as f:
        target = f"{cache_dir()}/boot-{hashlib.sha256(f.read()).hexdigest()[:12]}.bin"
    if not os.path.exists(target):
        work = f"{target}.{os.getpid()}"
        try:
            for name, *words in (
                ("gcc", "-c", "-m32", "-o", f"{work}.o", source),
                ("ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary",
                 "-o", work, f"{work}.o"),
            ):  # fmt: skip
                tool = which(name)
                if tool is None:
                    raise TestbedError(f"{name} is missing", "install gcc")
                done = subprocess.run([tool, *words], capture_output=True, text=True)
                if done.returncode:
                    raise TestbedError(f"{name} cannot make the boot sectors: {done.stderr}")
            os.rename(work, target)
        finally:
            for path in (work, f"{work}.o"):
                if os.path.exists(path):
                    os.unlink(path)
    with open(target, "rb") as f:
        return f.read()


def write(
    out: str, boot: bytes, vmlinux: bytes, archives: Sequence[str], cmdline: str, memory: int
) -> int:
    """Write the disk to the new file ``out``.

    :param boot: the loader. :param vmlinux: an ELF file of 64 bits.
    :param archives: paths of cpio archives, whose sizes are multiples of 512 bytes.
    :param memory: bytes of L1's memory.
    :returns: the number of cylinders.
    :raises TestbedError: the kernel has no PVH note, or all of it does not fit.
    """
    segments, entry, end = _kernel(vmlinux)
    start = -(-end // ALIGN) * ALIGN
    size = sum(os.path.getsize(path) for path in archives)
    # The kernel copies the files out of the archives before it frees them.
    if start + 2 * size + (128 << 20) > memory:
        raise TestbedError(
            f"L1 has {memory >> 20} MiB, too few for the {size >> 20} MiB that travel in",
            "use a larger --memory, or let less travel",
        )
    text = cmdline.encode()
    if len(text) > CMDLINE_MAX or len(segments) >= PIECES_MAX or len(boot) != LOADER:
        raise TestbedError("the boot sectors are too small for this kernel and its options")
    head = bytearray(boot)
    sector, table = LOADER // SECTOR, b""
    for address, data in segments:
        sectors = -(-len(data) // SECTOR)
        table += struct.pack("<3I", sector, sectors, address)
        sector += sectors
    table += struct.pack("<3I", sector, size // SECTOR, start)
    head[MODULE : MODULE + 16] = struct.pack("<2Q", start, size)
    head[ENTRY : ENTRY + 4] = struct.pack("<I", entry)
    head[PIECES : PIECES + len(table)] = table
    head[CMDLINE : CMDLINE + len(text)] = text
    with open(out, "xb") as f:
        f.write(head)
        for _, data in segments:
            f.write(data)
            f.write(bytes(-len(data) % SECTOR))
        for path in archives:
            with open(path, "rb") as archive:
                while piece := archive.read(4 << 20):
                    f.write(piece)
        cylinders = -(-f.tell() // CYLINDER)
        f.truncate(cylinders * CYLINDER)
    return cylinders


def _kernel(elf: bytes) -> tuple[list[tuple[int, bytes]], int, int]:
    """The segments of a kernel, each as (physical address, content), its entry point by the PVH
    note, and the end of the last segment in memory.
    """
    offset, size, count = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<2H", elf, 54)
    segments: list[tuple[int, bytes]] = []
    entry = end = 0
    for at in range(offset, offset + size * count, size):
        kind, _, where, _, address, length, room, _ = struct.unpack_from("<2I6Q", elf, at)
        part = elf[where : where + length]
        if kind == PT_LOAD:
            end = max(end, address + room)
            if length:
                segments.append((address, part))
        elif kind == PT_NOTE:
            entry = _pvh_entry(part) or entry
    if not entry:
        raise TestbedError("the kernel has no PVH note", "use a Debian cloud kernel")
    return segments, entry, end


def _pvh_entry(notes: bytes) -> int:
    """The entry point that a segment of notes names; 0 if it names none."""
    at = 0
    while at + 12 <= len(notes):
        named, length, kind = struct.unpack_from("<3I", notes, at)
        name = notes[at + 12 : at + 12 + named]
        at += 12 + -(-named // 4) * 4
        if name == b"Xen\0" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
            return int.from_bytes(notes[at : at + length], "little")
        at += -(-length // 4) * 4
    return 0
