"""Loading kernels: everything goes to its place in memory, and bad files are refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import assembly, boot
from pyvmm.assembly import Description
from pyvmm.boot import params
from pyvmm.errors import ImageError, UsageError
from pyvmm.memory import GuestMemory
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(64 * MIB)
    yield m
    m.close()


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack(lb.NHDR, len(name), len(desc), kind) + pad(name) + pad(desc)


PVH_NOTE = note(lb.XEN_NOTE_NAME, lb.XEN_ELFNOTE_PHYS32_ENTRY, struct.pack("<I", 0x100_0010))
LINUX_NOTE = note(lb.XEN_NOTE_NAME, lb.XEN_ELFNOTE_GUEST_OS, b"linux\0")


def make_elf(
    segments: list[tuple[int, bytes, int]],
    *,
    entry: int = 0x100_0000,
    notes: bytes | bytearray = b"",
    vaddr_delta: int = 0,
    **header: int,
) -> bytearray:
    """An ELF with PT_LOADs of (paddr, data, memsz) and, if ``notes`` is given, a PT_NOTE."""
    phnum = len(segments) + bool(notes)
    offset = lb.EHDR_SIZE + phnum * lb.PHDR_SIZE
    table, body = b"", b""
    for paddr, data, memsz in segments:
        at = offset + len(body)
        table += struct.pack(
            lb.PHDR, lb.PT_LOAD, 7, at, paddr + vaddr_delta, paddr, len(data), memsz, 0x1000
        )
        body += data
    if notes:
        table += struct.pack(
            lb.PHDR, lb.PT_NOTE, 4, offset + len(body), 0, 0, len(notes), len(notes), 4
        )
        body += notes
    f = {
        "type": lb.ET_EXEC,
        "machine": lb.EM_X86_64,
        "phnum": phnum,
        "phoff": lb.EHDR_SIZE,
    } | header
    ident = (
        lb.ELF_MAGIC
        + bytes([f.get("class", lb.ELFCLASS64), f.get("data", lb.ELFDATA2LSB), 1])
        + bytes(9)
    )
    return bytearray(
        struct.pack(
            lb.EHDR,
            ident,
            f["type"],
            f["machine"],
            1,
            entry,
            f["phoff"],
            0,
            0,
            lb.EHDR_SIZE,
            f.get("phentsize", lb.PHDR_SIZE),
            f["phnum"],
            0,
            0,
            0,
        )
        + table
        + body
    )


CODE = bytes(range(256)) * 16


def make_bzimage(**fields: int) -> bytearray:
    """A bzImage of four setup sectors with CODE as its protected-mode part."""
    f = {
        "boot_flag": lb.BOOT_FLAG,
        "version": 0x20F,
        "loadflags": lb.LOADED_HIGH,
        "xloadflags": lb.XLF_KERNEL_64,
        "pref_address": 0x100_0000,
        "init_size": 0x40_0000,
        "alignment": 0x20_0000,
        "cmdline_size": 2047,
        "initrd_addr_max": 0x7FFF_FFFF,
        "syssize": len(CODE) // 16,
        "header_end": 0x66,
        "setup_sects": 0,
    } | fields
    image = bytearray(5 * lb.SECTOR)
    image[lb.HDR_SETUP_SECTS] = f["setup_sects"]
    struct.pack_into("<I", image, lb.HDR_SYSSIZE, f["syssize"])
    struct.pack_into("<H", image, lb.HDR_BOOT_FLAG, f["boot_flag"])
    image[lb.HDR_JUMP + 1] = f["header_end"]
    struct.pack_into("<4sH", image, lb.HDR_MAGIC, lb.SETUP_MAGIC, f["version"])
    image[lb.HDR_LOADFLAGS] = f["loadflags"]
    struct.pack_into("<I", image, lb.HDR_INITRD_ADDR_MAX, f["initrd_addr_max"])
    struct.pack_into("<I", image, lb.HDR_KERNEL_ALIGNMENT, f["alignment"])
    struct.pack_into("<H", image, lb.HDR_XLOADFLAGS, f["xloadflags"])
    struct.pack_into("<I", image, lb.HDR_CMDLINE_SIZE, f["cmdline_size"])
    struct.pack_into("<Q", image, lb.HDR_PREF_ADDRESS, f["pref_address"])
    struct.pack_into("<I", image, lb.HDR_INIT_SIZE, f["init_size"])
    return image + CODE


def good_elf() -> bytearray:
    return make_elf(
        [(0x100_0000, CODE, 0x2000), (0x101_0000, b"data", 0x1000)], notes=LINUX_NOTE + PVH_NOTE
    )


def save(tmp_path: Path, data: bytes | bytearray) -> str:
    path = tmp_path / "image"
    path.write_bytes(data)
    return str(path)


def u32(memory: GuestMemory, gpa: int) -> int:
    return int(struct.unpack("<I", memory.read(gpa, 4))[0])


def pages_written(memory: GuestMemory) -> int:
    """Not 0 if any page has been written: a memfd has no blocks before its pages are touched."""
    return os.fstat(memory.fd.fileno()).st_blocks


# --- what is loaded -------------------------------------------------------------------------------


def test_bzimage_is_loaded_at_its_preferred_address(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"I" * 5000)
    kernel = save(tmp_path, make_bzimage())
    state = boot.load(memory, kernel, initrd=str(initrd), cmdline="a=b", rsdp=0xE0000)
    assert (state.mode, state.kind, state.entry) == (
        "long64",
        "bzImage by 64-bit entry",
        0x100_0200,
    )
    assert state.regs["rip"] == 0x100_0200
    assert state.regs["rsi"] == pf.BOOT_PARAMS
    assert state.cr3 == pf.BOOT_PAGE_TABLES
    assert memory.read(0x100_0000, len(CODE)) == CODE
    assert memory.read(pf.BOOT_CMDLINE, 4) == b"a=b\0"
    zero_page = memory.read(pf.BOOT_PARAMS, lb.BP_SIZE)
    assert zero_page[lb.HDR_MAGIC : lb.HDR_MAGIC + 4] == lb.SETUP_MAGIC
    assert zero_page[lb.HDR_TYPE_OF_LOADER] == 0xFF
    assert u32(memory, pf.BOOT_PARAMS + lb.HDR_CMD_LINE_PTR) == pf.BOOT_CMDLINE
    assert u32(memory, pf.BOOT_PARAMS + lb.BP_ACPI_RSDP_ADDR) == 0xE0000
    disk = u32(memory, pf.BOOT_PARAMS + lb.HDR_RAMDISK_IMAGE)
    assert disk == 62 * MIB + 2 * MIB - 8192
    assert u32(memory, pf.BOOT_PARAMS + lb.HDR_RAMDISK_SIZE) == 5000
    assert memory.read(disk, 5000) == b"I" * 5000


def test_trailing_signature_is_not_loaded_past_init_size(
    memory: GuestMemory, tmp_path: Path
) -> None:
    data = make_bzimage(init_size=len(CODE)) + b"S" * 4096
    boot.load(memory, save(tmp_path, data))
    assert memory.read(0x100_0000 + len(CODE), 4096) == bytes(4096)


def test_elf_is_entered_by_its_pvh_note(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"I" * 100)
    state = boot.load(
        memory, save(tmp_path, good_elf()), initrd=str(initrd), cmdline="x", rsdp=0xE0000
    )
    assert (state.mode, state.kind, state.entry) == (
        "protected32",
        "Linux ELF by PVH note",
        0x100_0010,
    )
    assert state.regs["rbx"] == pf.PVH_START_INFO
    assert memory.read(0x100_0000, len(CODE)) == CODE
    assert memory.read(0x101_0000, 4) == b"data"
    info = struct.unpack(lb.HVM_START_INFO, memory.read(pf.PVH_START_INFO, 56))
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, reserved = info
    assert (magic, version, flags, modules, reserved) == (0x336EC578, 1, 0, 1, 0)
    assert (cmdline, rsdp) == (pf.BOOT_CMDLINE, 0xE0000)
    paddr, size, _, _ = struct.unpack(lb.HVM_MODLIST_ENTRY, memory.read(modlist, 32))
    assert memory.read(paddr, size) == b"I" * 100
    table = [
        struct.unpack(lb.HVM_MEMMAP_ENTRY, memory.read(memmap + 24 * i, 24))[:3]
        for i in range(entries)
    ]
    assert table == params.memory_map(memory)


def pvh_note(owner: bytes, value: bytes) -> bytes:
    return note(owner, lb.XEN_ELFNOTE_PHYS32_ENTRY, value)


@pytest.mark.parametrize("owner", [b"Xen\0", b"Loader\0", b""])
@pytest.mark.parametrize("size", [4, 8])
def test_pvh_notes_of_any_owner(
    memory: GuestMemory, tmp_path: Path, owner: bytes, size: int
) -> None:
    path = tmp_path / "kernel"
    notes = pvh_note(owner, 0x100_0010.to_bytes(size, "little"))
    path.write_bytes(make_elf([(0x100_0000, CODE, 4096)], notes=notes))
    assert boot.load(memory, str(path)).entry == 0x100_0010


@pytest.mark.parametrize("value", [b"", b"abc", bytes(4), (0x100_1000).to_bytes(8, "little")])
def test_notes_of_others_that_are_no_entry(
    memory: GuestMemory, tmp_path: Path, value: bytes
) -> None:
    """Another owner's type 18 may mean anything; and Xen's goes first."""
    path = tmp_path / "kernel"
    path.write_bytes(make_elf([(0x100_0000, CODE, 4096)], notes=pvh_note(b"GNU\0", value)))
    assert boot.load(memory, str(path)).mode == "long64"
    xen, other = pvh_note(b"Xen\0", b"\x20\0\0\1"), pvh_note(b"GNU\0", b"\x10\0\0\1")
    for notes in (xen + other, other + xen):
        memory.zero()
        path.write_bytes(make_elf([(0x100_0000, CODE, 4096)], notes=notes))
        assert boot.load(memory, str(path)).entry == 0x100_0020


@pytest.mark.parametrize("protocol", ["linux64", "elf64"])
def test_elf_is_entered_at_e_entry(memory: GuestMemory, tmp_path: Path, protocol: str) -> None:
    state = boot.load(memory, save(tmp_path, good_elf()), protocol=protocol)
    assert (state.mode, state.entry, state.regs["rsi"]) == ("long64", 0x100_0000, pf.BOOT_PARAMS)
    assert memory.read(pf.BOOT_PARAMS + lb.HDR_MAGIC, 4) == lb.SETUP_MAGIC


def test_virtual_entry_is_translated(memory: GuestMemory, tmp_path: Path) -> None:
    delta = 0xFFFF_FFFF_8000_0000
    data = make_elf([(0x100_0000, CODE, len(CODE))], entry=delta + 0x100_0040, vaddr_delta=delta)
    assert boot.load(memory, save(tmp_path, data)).entry == 0x100_0040


def test_page_tables_map_four_gib(memory: GuestMemory, tmp_path: Path) -> None:
    state = boot.load(memory, save(tmp_path, make_bzimage()))

    def entry(table: int, index: int) -> int:
        return int(struct.unpack("<Q", memory.read(table + 8 * index, 8))[0])

    for address in (0, 0x100_0200, 0xC000_0000, 0xFEE0_0000, 0xFFFF_FFFF):
        pdpt = entry(state.cr3, 0)
        directory = entry(pdpt & ~0xFFF, address >> 30)
        page = entry(directory & ~0xFFF, address >> 21 & 511)
        assert pdpt & directory & page & 3 == 3
        assert page & 0x80
        assert page & ~0x1FFFFF == address & ~0x1FFFFF
    assert entry(state.cr3, 1) == 0
    assert pf.BOOT_PAGE_TABLES + 6 * 4096 <= pf.BOOT_CMDLINE


def test_memory_map_is_sorted_and_covers_ram() -> None:
    with_hole = GuestMemory(pf.RAM_LOW_MAX + 16 * MIB)
    try:
        table = params.memory_map(with_hole)
    finally:
        with_hole.close()
    ends = [a + size for a, size, _ in table]
    assert all(end <= a for end, (a, _, _) in zip(ends, table[1:], strict=False))
    ram = [(a, size) for a, size, kind in table if kind == lb.E820_RAM]
    assert ram == [
        (0, pf.EBDA_BASE),
        (MIB, pf.RAM_LOW_MAX - MIB),
        (pf.RAM_HIGH_BASE, 16 * MIB),
    ]
    assert (pf.PCI_ECAM_BASE, pf.PCI_ECAM_SIZE, lb.E820_RESERVED) in table


def test_initrd_respects_the_highest_address(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"I" * 4096)
    kernel = save(tmp_path, make_bzimage(initrd_addr_max=0x1FF_FFFF))
    boot.load(memory, kernel, initrd=str(initrd))
    assert u32(memory, pf.BOOT_PARAMS + lb.HDR_RAMDISK_IMAGE) == 0x1FF_F000


def test_is_linux(tmp_path: Path) -> None:
    assert boot.is_linux(save(tmp_path, make_bzimage()))
    assert boot.is_linux(save(tmp_path, good_elf()))
    # A kernel without Xen support has only Linux' own note.
    own = note(b"Linux\0", 0x100, b"\0")
    assert boot.is_linux(save(tmp_path, make_elf([(0x100_0000, CODE, 4096)], notes=own + PVH_NOTE)))
    assert not boot.is_linux(save(tmp_path, make_elf([(0x100_0000, CODE, 4096)], notes=PVH_NOTE)))
    for data in (b"x", cut(good_elf(), 80), cut(make_bzimage(), 6000)):
        with pytest.raises(ImageError):
            boot.is_linux(save(tmp_path, data))


# --- what is refused ------------------------------------------------------------------------------


def cut(data: bytearray, length: int) -> bytearray:
    return data[:length]


def patched(data: bytearray, offset: int, value: bytes) -> bytearray:
    data[offset : offset + len(value)] = value
    return data


PH = lb.EHDR_SIZE  # the first program header
#: The header's field ``class``, whose name is a keyword in Python.
ELF32: dict[str, Any] = {"class": 1}
BAD_KERNELS: dict[str, tuple[Callable[[], bytes | bytearray], str]] = {
    "empty": (lambda: b"", "is empty"),
    "tiny": (lambda: b"x", "neither a bzImage nor an ELF"),
    "text": (lambda: b"#!/bin/sh\n" * 200, "neither a bzImage nor an ELF"),
    "elf header cut": (lambda: cut(good_elf(), 40), "truncated: the ELF header"),
    "program headers cut": (lambda: cut(good_elf(), 80), "truncated: the program header table"),
    "segment cut": (
        lambda: cut(make_elf([(0x100_0000, CODE, 4096)]), 2000),
        "truncated: segment 0",
    ),
    "notes cut": (lambda: cut(good_elf(), len(good_elf()) - 8), "truncated: note segment 2"),
    "elf32": (
        lambda: make_elf([(0x100_0000, CODE, 4096)], **ELF32),
        "another machine (e_machine 62, a 32-bit x86 is 3)",
    ),
    "big endian": (lambda: make_elf([(0x100_0000, CODE, 4096)], data=2), "not a little-endian"),
    "arm": (lambda: make_elf([(0x100_0000, CODE, 4096)], machine=183), "another machine"),
    "object file": (lambda: make_elf([(0x100_0000, CODE, 4096)], type=1), "e_type 1"),
    "no program headers": (lambda: make_elf([(0x100_0000, CODE, 4096)], phnum=0), "e_phnum"),
    "65535 program headers": (
        lambda: make_elf([(0x100_0000, CODE, 4096)], phnum=0xFFFF),
        "e_phnum",
    ),
    "e_phentsize": (lambda: make_elf([(0x100_0000, CODE, 4096)], phentsize=32), "e_phentsize 32"),
    "e_phoff beyond": (lambda: make_elf([(0x100_0000, CODE, 4096)], phoff=1 << 62), "e_phoff"),
    "nothing to load": (lambda: make_elf([], notes=PVH_NOTE), "no loadable segment"),
    "filesz over memsz": (
        lambda: make_elf([(0x100_0000, CODE, 100)]),
        "p_filesz 0x1000 exceeds p_memsz 0x64",
    ),
    "overlap": (
        lambda: make_elf([(0x100_0000, CODE, 0x8000), (0x100_7000, CODE, 0x1000)]),
        "segments 0 and 1 overlap",
    ),
    "wraps around": (
        lambda: make_elf([(0x100_0000, CODE, 4096), ((1 << 64) - 4096, CODE, 4096)]),
        "outside guest memory",
    ),
    "huge segment": (lambda: make_elf([(0x100_0000, CODE, 1 << 62)]), "outside guest memory"),
    "beyond RAM": (lambda: make_elf([(0x400_0000, CODE, 4096)], entry=0x400_0000), "at least 65M"),
    "in the PCI hole": (
        lambda: make_elf([(0xD000_0000, CODE, 4096)], entry=0xD000_0000),
        "outside guest",
    ),
    "on the zero page": (
        lambda: make_elf([(0x7000, CODE, 4096)], entry=0x7000),
        "below 0x100000, only 0x21000..0x9fc00 are free",
    ),
    "on the PVH start info": (
        lambda: make_elf(
            [(0x100_0000, CODE, 4096), (0x6000, CODE, 4096)], entry=0x6000, notes=PVH_NOTE
        ),
        "below 0x100000, only 0x1000..0x6000 and",
    ),
    "entry outside": (lambda: make_elf([(0x100_0000, CODE, 4096)], entry=0x123), "e_entry"),
    "PVH entry outside": (
        lambda: make_elf([(0x110_0000, CODE, 4096)], entry=0x110_0000, notes=PVH_NOTE),
        "PVH entry 0x1000010 is outside",
    ),
    "note overruns": (
        lambda: make_elf(
            [(0x100_0000, CODE, 4096)], notes=patched(bytearray(PVH_NOTE), 4, b"\xff\xff")
        ),
        "overruns its segment",
    ),
    "PVH note of 2 bytes": (
        lambda: make_elf(
            [(0x100_0000, CODE, 4096)],
            notes=note(lb.XEN_NOTE_NAME, lb.XEN_ELFNOTE_PHYS32_ENTRY, b"ab"),
        ),
        "2-byte entry point",
    ),
    "user program": (
        lambda: patched(make_elf([(0x100_0000, CODE, 4096)]), PH, struct.pack("<I", lb.PT_INTERP)),
        "user-space program",
    ),
    "bzImage cut in the header": (
        lambda: cut(make_bzimage(), 0x240),
        "truncated: the setup header",
    ),
    "bzImage cut in the setup": (lambda: cut(make_bzimage(), 1500), "setup_sects, syssize"),
    "bzImage cut in the code": (lambda: cut(make_bzimage(), 6000), "setup_sects, syssize"),
    "setup_sects huge": (lambda: make_bzimage(setup_sects=255), "setup_sects, syssize"),
    "boot_flag": (lambda: make_bzimage(boot_flag=0), "boot_flag"),
    "old protocol": (lambda: make_bzimage(version=0x206), "boot protocol 2.06"),
    "zImage": (lambda: make_bzimage(loadflags=0), "zImage"),
    "32-bit kernel": (lambda: make_bzimage(xloadflags=0), "XLF_KERNEL_64"),
    "short header": (lambda: make_bzimage(header_end=0x10), "setup header that ends"),
    "long header": (lambda: make_bzimage(header_end=0xFF), "setup header that ends"),
    "alignment zero": (lambda: make_bzimage(alignment=0), "kernel_alignment"),
    "pref_address unaligned": (lambda: make_bzimage(pref_address=0x100_1000), "pref_address"),
    "pref_address low": (lambda: make_bzimage(pref_address=0), "below 0x100000 is no place"),
    "pref_address wild": (
        lambda: make_bzimage(pref_address=(1 << 64) - (1 << 21)),
        "outside guest memory",
    ),
    "init_size small": (lambda: make_bzimage(init_size=16), "init_size"),
    "init_size huge": (lambda: make_bzimage(init_size=0xFFFF_FFFF), "outside guest memory"),
}


@pytest.mark.parametrize("name", BAD_KERNELS)
def test_bad_kernel_is_refused(memory: GuestMemory, tmp_path: Path, name: str) -> None:
    make, text = BAD_KERNELS[name]
    path = save(tmp_path, make())
    with pytest.raises(ImageError) as caught:
        boot.load(memory, path)
    message = str(caught.value)
    assert text in message
    assert path in message
    assert caught.value.hint
    assert "\n" not in message
    assert pages_written(memory) == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: p / "none", "No such file"),
        (lambda p: p, "is a directory"),
        (lambda p: Path("/dev/null"), "not a regular file"),
        (lambda p: p / "nul\0byte", "embedded null (byte|character)"),
    ],
)
@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_missing_file_is_refused(
    memory: GuestMemory, tmp_path: Path, make: Callable[[Path], Path], text: str, what: str
) -> None:
    kernel = save(tmp_path, make_bzimage())
    files: dict[str, Any] = {"kernel": kernel, what: str(make(tmp_path))}
    with pytest.raises(ImageError, match=text) as caught:
        boot.load(memory, **files)
    assert str(caught.value).startswith(what)
    assert caught.value.exit_code == 105


def test_fifo_does_not_block(memory: GuestMemory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="not a regular file"):
        boot.load(memory, str(tmp_path / "fifo"))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "is empty"), (44 * MIB + 1, "bytes does not fit"), (65 * MIB, "bytes does not fit")],
)
def test_bad_initrd_is_refused(memory: GuestMemory, tmp_path: Path, size: int, text: str) -> None:
    initrd = tmp_path / "initrd"
    initrd.touch()
    os.truncate(initrd, size)
    kernel = save(tmp_path, make_bzimage())  # ends at 20 MiB
    with pytest.raises(ImageError, match=text):
        boot.load(memory, kernel, initrd=str(initrd))
    assert pages_written(memory) == 0


def test_initrd_that_just_fits(memory: GuestMemory, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.touch()
    os.truncate(initrd, 44 * MIB)
    boot.load(memory, save(tmp_path, make_bzimage()), initrd=str(initrd))
    assert u32(memory, pf.BOOT_PARAMS + lb.HDR_RAMDISK_IMAGE) == 20 * MIB


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a" * 2048, "2048 characters, but this kernel takes only 2047"),
        ("a\nb", r"'\\n' at position 1"),
        ("a\0b", r"position 1"),
        ("gr\u00fc\u00df", "position 2"),
    ],
)
@pytest.mark.parametrize("make", [make_bzimage, good_elf])
def test_bad_command_line_is_refused(
    memory: GuestMemory, tmp_path: Path, make: Callable[[], bytearray], line: str, text: str
) -> None:
    with pytest.raises(ImageError, match=text):
        boot.load(memory, save(tmp_path, make()), cmdline=line)


def test_reset_vector_writes_the_reset_register(memory: GuestMemory, tmp_path: Path) -> None:
    boot.load(memory, save(tmp_path, make_bzimage()))
    code = memory.read(0xFFFF0, 16)
    port, value = struct.unpack("<xHxB", code[:5])
    assert (port, value) == (pf.PORT_ACPI_RESET, pf.ACPI_RESET_VALUE)
    assert code[5:9] == b"\xee\xf4\xeb\xfd"  # out dx, al; hlt; jmp $-1


def test_longest_command_line(memory: GuestMemory, tmp_path: Path) -> None:
    boot.load(memory, save(tmp_path, make_bzimage()), cmdline="a" * 2047)
    assert memory.read(pf.BOOT_CMDLINE, 2048) == b"a" * 2047 + b"\0"


@pytest.mark.parametrize(
    ("make", "protocol", "text"),
    [
        (make_bzimage, "pvh", "is a bzImage"),
        (make_bzimage, "elf64", "is a bzImage"),
        (good_elf, "bzimage", "is an ELF"),
        (lambda: make_elf([(0x100_0000, CODE, 4096)]), "pvh", "no PVH note"),
    ],
)
def test_protocol_mismatch(
    memory: GuestMemory, tmp_path: Path, make: Callable[[], bytearray], protocol: str, text: str
) -> None:
    with pytest.raises(ImageError, match=text):
        boot.load(memory, save(tmp_path, make()), protocol=protocol)


def test_unknown_protocol(memory: GuestMemory) -> None:
    with pytest.raises(UsageError, match="multiboot9"):
        boot.load(memory, "x", protocol="multiboot9")


def test_one_mebibyte_is_too_small(tmp_path: Path) -> None:
    small = GuestMemory(MIB)
    try:
        with pytest.raises(ImageError, match="raise --memory to at least 20M"):
            boot.load(small, save(tmp_path, make_bzimage()))
    finally:
        small.close()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: make_bzimage(pref_address=pf.RAM_HIGH_BASE),
            "pref_address 0x100000000 is above 4 GiB",
        ),
        (
            lambda: make_elf([(pf.RAM_HIGH_BASE, CODE, 4096)], entry=pf.RAM_HIGH_BASE),
            "entry point 0x100000000 is above 4 GiB",
        ),
    ],
)
def test_kernel_above_the_page_tables(
    tmp_path: Path, make: Callable[[], bytearray], text: str
) -> None:
    large = GuestMemory(pf.RAM_LOW_MAX + 64 * MIB)
    try:
        with pytest.raises(ImageError, match=text):
            boot.load(large, save(tmp_path, make()))
    finally:
        large.close()


def test_no_descriptor_leaks(memory: GuestMemory, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    boot.load(memory, save(tmp_path, make_bzimage()))
    for make, _ in BAD_KERNELS.values():
        with pytest.raises(ImageError):
            boot.load(memory, save(tmp_path, make()))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("append", "cmdline"),
    [
        ("", "console=ttyS0 panic=-1 earlyprintk=ttyS0,115200"),
        ("quiet x=1", "console=ttyS0 panic=-1 quiet x=1 earlyprintk=ttyS0,115200"),
        ("quiet -- single", "console=ttyS0 panic=-1 quiet earlyprintk=ttyS0,115200 -- single"),
        ("-- single", "console=ttyS0 panic=-1 earlyprintk=ttyS0,115200 -- single"),
    ],
)
def test_the_early_console_comes_after_quiet_and_before_what_is_for_init(
    append: str, cmdline: str
) -> None:
    assert assembly.cmdline(Description("vmlinux", append=append), []) == cmdline
