"""The ELF kernel reader for 64 and 32 bits: it finds what to load where, and where to enter.

It uses ``struct`` and not pyelftools because every start of a machine runs this code. Importing
pyelftools takes 40 to 75 ms natively and a second under emulation; importing this module takes less
than a millisecond.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from pyvmm.spec import linux_boot as lb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.image import ImageFile

PHNUM_MAX = 128  # kernels have 1 to 10 program headers; PN_XNUM (0xffff) is refused, too
NOTES_MAX = 1 << 20


class Segment:
    """One PT_LOAD program header: ``filesz`` bytes of the file at ``offset`` go to ``paddr``;
    zeroes follow them up to ``memsz`` bytes.
    """

    __slots__ = ("filesz", "index", "memsz", "offset", "paddr", "vaddr")

    def __init__(
        self, index: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int
    ) -> None:
        self.index, self.offset, self.vaddr, self.paddr = index, offset, vaddr, paddr
        self.filesz, self.memsz = filesz, memsz

    @property
    def end(self) -> int:
        """The first guest-physical address after the segment."""
        return self.paddr + self.memsz


class ElfKernel:
    """A validated ELF executable.

    :ivar segments: at least one, in ascending physical order; they do not overlap.
    :ivar entry: e_entry as a physical address, which is inside a segment.
    :ivar pvh_entry: the physical address of the 32-bit entry that the note
        XEN_ELFNOTE_PHYS32_ENTRY names; None if there is no such note.
    :ivar linux: whether the notes say that the kernel is Linux.
    :ivar bits: 64 or 32: the ELF class.
    """

    __slots__ = ("bits", "entry", "linux", "pvh_entry", "segments")

    def __init__(
        self, segments: list[Segment], entry: int, pvh_entry: int | None, linux: bool, bits: int
    ) -> None:
        self.segments, self.entry, self.pvh_entry, self.linux = segments, entry, pvh_entry, linux
        self.bits = bits


def parse(image: ImageFile) -> ElfKernel:
    """Read and check the headers and notes; load nothing.

    :raises ImageError: it names the header field at fault.
    """
    ident = image.read(0, lb.EI_NIDENT, "the ELF header")
    if ident[lb.EI_CLASS] not in (lb.ELFCLASS32, lb.ELFCLASS64):
        raise image.bad(f"is neither a 64-bit nor a 32-bit ELF (EI_CLASS {ident[lb.EI_CLASS]})")
    if ident[lb.EI_DATA] != lb.ELFDATA2LSB:
        raise image.bad(f"is not a little-endian ELF (EI_DATA {ident[lb.EI_DATA]})")
    wide = ident[lb.EI_CLASS] == lb.ELFCLASS64
    ehdr, ehdr_size = (lb.EHDR, lb.EHDR_SIZE) if wide else (lb.EHDR32, lb.EHDR32_SIZE)
    phdr_size = lb.PHDR_SIZE if wide else lb.PHDR32_SIZE
    head = image.read(0, ehdr_size, "the ELF header")
    _, e_type, machine, _, entry, phoff, _, _, ehsize, phentsize, phnum, _, _, _ = struct.unpack(
        ehdr, head
    )
    if machine != (lb.EM_X86_64 if wide else lb.EM_386):
        good = f"x86-64 is {lb.EM_X86_64}" if wide else f"a 32-bit x86 is {lb.EM_386}"
        raise image.bad(f"is an ELF of another machine (e_machine {machine}, {good})")
    if e_type not in (lb.ET_EXEC, lb.ET_DYN):
        raise image.bad(f"is not an executable ELF (e_type {e_type})")
    if ehsize < ehdr_size or phentsize != phdr_size:
        raise image.bad(f"has odd ELF header sizes (e_ehsize {ehsize}, e_phentsize {phentsize})")
    if not 0 < phnum <= PHNUM_MAX:
        raise image.bad(f"has {phnum} program headers (e_phnum), but needs 1 to {PHNUM_MAX}")
    table = image.read(phoff, phnum * phdr_size, "the program header table (e_phoff, e_phnum)")
    segments: list[Segment] = []
    all_notes: list[tuple[bytes, int]] = []
    pvh_entry: int | None = None
    linux = False
    for i, row in enumerate(struct.iter_unpack(lb.PHDR if wide else lb.PHDR32, table)):
        # p_flags is the second field in a 64-bit header and the seventh in a 32-bit header.
        p_type, offset, vaddr, paddr, filesz, memsz, align = row[:1] + (
            row[2:] if wide else (*row[1:6], row[7])
        )
        if p_type == lb.PT_INTERP:
            raise image.bad("is a user-space program, not a kernel (it has PT_INTERP)")
        if p_type == lb.PT_LOAD and memsz:
            if filesz > memsz:
                raise image.bad(f"segment {i}: p_filesz {filesz:#x} exceeds p_memsz {memsz:#x}")
            if offset + filesz > image.size:
                raise image.truncated(f"segment {i}", offset + filesz)
            segments.append(Segment(i, offset, vaddr, paddr, filesz, memsz))
        elif p_type == lb.PT_NOTE:
            if filesz > NOTES_MAX:
                raise image.bad(f"segment {i}: {filesz:#x} bytes of notes")
            notes = image.read(offset, filesz, f"note segment {i}")
            all_notes.append((notes, 8 if align == 8 else 4))
    if not segments:
        raise image.bad("has no loadable segment (PT_LOAD)")
    others: int | None = None
    for notes, pad in all_notes:
        entry_found, of_xen, is_linux = _read_notes(image, notes, pad, segments)
        if of_xen:
            pvh_entry = entry_found
        else:
            others = entry_found if entry_found is not None else others
        linux = linux or is_linux
    pvh_entry = pvh_entry if pvh_entry is not None else others
    segments.sort(key=lambda s: s.paddr)
    for a, b in pairwise(segments):
        if a.end > b.paddr:
            raise image.bad(
                f"segments {a.index} and {b.index} overlap: {a.paddr:#x}..{a.end:#x}"
                f" and {b.paddr:#x}..{b.end:#x}"
            )
    if pvh_entry is not None and not any(s.paddr <= pvh_entry < s.end for s in segments):
        raise image.bad(f"PVH entry {pvh_entry:#x} is outside every segment")
    return ElfKernel(
        segments, _physical(image, segments, entry), pvh_entry, linux, 64 if wide else 32
    )


def _physical(image: ImageFile, segments: list[Segment], entry: int) -> int:
    """e_entry as a physical address. Linux stores the physical address, other kernels the virtual
    one.
    """
    for s in segments:
        if s.paddr <= entry < s.end:
            return entry
    for s in segments:
        if s.vaddr <= entry < s.vaddr + s.memsz:
            return s.paddr + entry - s.vaddr
    raise image.bad(f"entry point {entry:#x} (e_entry) is outside every segment")


def _read_notes(
    image: ImageFile, notes: bytes, align: int, segments: list[Segment]
) -> tuple[int | None, bool, bool]:
    """The PVH entry point (None if there is none), whether its owner is Xen, and whether the notes
    say that this is Linux. Some kernels give the note another owner: then it counts if its value
    lies in a segment.
    """
    entry: int | None = None
    of_xen = linux = False
    at = 0
    while at + lb.NHDR_SIZE <= len(notes):
        namesz, descsz, n_type = struct.unpack_from(lb.NHDR, notes, at)
        name_at = at + lb.NHDR_SIZE
        desc_at = name_at + -(-namesz // align) * align
        if desc_at + descsz > len(notes):
            raise image.bad(
                f"note at {at:#x} overruns its segment (n_namesz {namesz}, n_descsz {descsz})"
            )
        name = notes[name_at : name_at + namesz]
        linux = linux or name == lb.LINUX_NOTE_NAME
        desc = notes[desc_at : desc_at + descsz]
        xen = name == lb.XEN_NOTE_NAME
        if n_type == lb.XEN_ELFNOTE_PHYS32_ENTRY and (xen or descsz in (4, 8)):
            if descsz not in (4, 8):
                raise image.bad(f"PVH note has a {descsz}-byte entry point, not 4 or 8")
            value = int.from_bytes(desc, "little")
            if xen or (not of_xen and any(s.paddr <= value < s.end for s in segments)):
                entry, of_xen = value, xen
        elif xen and n_type == lb.XEN_ELFNOTE_GUEST_OS:
            linux = linux or desc.rstrip(b"\0") == b"linux"
        at = desc_at + -(-descsz // align) * align
    return entry, of_xen, linux
