"""Multiboot kernels, 32-bit ELFs and flat binaries go to their places, and bad ones are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm import boot
from pyvmm.boot import params
from pyvmm.boot.multiboot import split_modules
from pyvmm.errors import ImageError, UsageError
from pyvmm.memory import GuestMemory
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import multiboot as mb
from pyvmm.spec import platform as pf
from tests.unit.test_boot import CODE, LINUX_NOTE, PVH_NOTE, make_elf, note, pages_written, save

MIB = 1 << 20
BASE = 0x10_0000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(16 * MIB)
    yield m
    m.close()


def header(flags: int, *addresses: int) -> bytes:
    head = struct.pack(mb.HEADER, mb.MAGIC, flags, -(mb.MAGIC + flags) & 0xFFFFFFFF)
    return head + (struct.pack(mb.ADDRESSES, *addresses) if addresses else b"")


def make_elf32(
    segments: list[tuple[int, bytes, int]],
    *,
    entry: int = BASE,
    notes: bytes = b"",
    vaddr_delta: int = 0,
) -> bytearray:
    """A 32-bit ELF with PT_LOADs of (paddr, data, memsz) and, if ``notes`` is given, a PT_NOTE."""
    phnum = len(segments) + bool(notes)
    offset = lb.EHDR32_SIZE + phnum * lb.PHDR32_SIZE
    table, body = b"", b""
    for paddr, data, memsz in segments:
        at = offset + len(body)
        table += struct.pack(
            lb.PHDR32, lb.PT_LOAD, at, paddr + vaddr_delta, paddr, len(data), memsz, 7, 0x1000
        )
        body += data
    if notes:
        table += struct.pack(
            lb.PHDR32, lb.PT_NOTE, offset + len(body), 0, 0, len(notes), len(notes), 4, 4
        )
        body += notes
    ident = lb.ELF_MAGIC + bytes([lb.ELFCLASS32, lb.ELFDATA2LSB, 1]) + bytes(9)
    fields = (ident, lb.ET_EXEC, lb.EM_386, 1, entry, lb.EHDR32_SIZE, 0, 0)
    sizes = (lb.EHDR32_SIZE, lb.PHDR32_SIZE, phnum, 0, 0, 0)
    return bytearray(struct.pack(lb.EHDR32, *fields, *sizes) + table + body)


def good_elf32(flags: int = 3) -> bytearray:
    return make_elf32(
        [(BASE, header(flags) + CODE, 0x3000), (BASE + 0x4000, b"data", 0x1000)], entry=BASE + 12
    )


def good_flat(**change: int) -> bytearray:
    """A flat binary whose header, at byte 16, has the load addresses."""
    f = {
        "flags": mb.AOUT_KLUDGE,
        "header": BASE + 16,
        "load": BASE,
        "end": 0,
        "bss": 0,
        "entry": BASE,
    } | change
    head = header(f["flags"], f["header"], f["load"], f["end"], f["bss"], f["entry"])
    return bytearray(b"\x90" * 16 + head + CODE)


class Info:
    """The boot information as a kernel reads it."""

    def __init__(self, memory: GuestMemory, state: boot.BootState) -> None:
        assert state.mode == "protected32"
        assert state.regs["rax"] == mb.BOOTLOADER_MAGIC
        self.memory = memory
        raw = struct.unpack(mb.INFO, memory.read(state.regs["rbx"], struct.calcsize(mb.INFO)))
        self.flags, self.mem_lower, self.mem_upper, _, cmdline, count, mods, size, at, *_, name = (
            raw
        )
        self.cmdline, self.loader = self.string(cmdline), self.string(name)
        self.modules = []
        for i in range(count):
            start, end, text, _ = struct.unpack(
                mb.MODULE, memory.read(mods + i * mb.MODULE_SIZE, mb.MODULE_SIZE)
            )
            self.modules.append((start, memory.read(start, end - start), self.string(text)))
        self.map = []
        end = at + size
        while at < end:
            length, *entry = struct.unpack(mb.MMAP_ENTRY, memory.read(at, mb.MMAP_ENTRY_SIZE))
            self.map.append(tuple(entry))
            at += length + 4
        assert at == end

    def string(self, at: int) -> str:
        return self.memory.read(at, 256).split(b"\0")[0].decode()


# --- what is loaded -------------------------------------------------------------------------------


def test_elf32(memory: GuestMemory, tmp_path: Path) -> None:
    state = boot.load(memory, save(tmp_path, good_elf32()), cmdline="a=1 b")
    info = Info(memory, state)
    assert (state.kind, state.entry) == ("multiboot ELF", BASE + 12)
    assert memory.read(BASE, 12 + len(CODE)) == header(3) + CODE
    assert memory.read(BASE + 0x4000, 6) == b"data\0\0"
    assert info.flags == 0x24D
    assert (info.cmdline, info.loader) == ("image a=1 b", "pyvmm")
    assert (info.mem_lower, info.mem_upper) == (639, 15 << 10)
    assert info.map == params.memory_map(memory)
    assert info.modules == []


def test_virtual_entry_of_an_elf32(memory: GuestMemory, tmp_path: Path) -> None:
    image = make_elf32(
        [(BASE, header(0) + CODE, 0x3000)], entry=0xC010_000C, vaddr_delta=0xC000_0000
    )
    assert boot.load(memory, save(tmp_path, image)).entry == BASE + 12


def test_modules(memory: GuestMemory, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "t,wo"
    one.write_bytes(b"1" * 5000)
    two.write_bytes(b"2")
    initrd = f"{one} x=1 y, {str(two).replace(',', ',,')}"
    info = Info(memory, boot.load(memory, save(tmp_path, good_elf32()), initrd=initrd))
    assert info.modules == [
        (BASE + 0x5000, b"1" * 5000, f"{one} x=1 y"),
        (BASE + 0x7000, b"2", str(two)),
    ]


def test_split_modules() -> None:
    assert split_modules("a b c,d") == [("a", "a b c"), ("d", "d")]
    assert split_modules("a,,b") == [("a,b", "a,b")]
    assert split_modules(" ,") == []


@pytest.mark.parametrize(("end", "bss"), [(0, 0), (BASE + 1000, 0), (BASE + 1000, BASE + 0x9000)])
def test_addresses_in_the_header(memory: GuestMemory, tmp_path: Path, end: int, bss: int) -> None:
    image = good_flat(end=end, bss=bss)
    state = boot.load(memory, save(tmp_path, image))
    assert (state.kind, state.entry) == ("multiboot by addresses", BASE)
    size = end - BASE if end else len(image)
    assert memory.read(BASE, size) == image[:size]
    assert memory.read(BASE + size, 64) == bytes(64)


def test_header_addresses_count_in_an_elf_as_well(memory: GuestMemory, tmp_path: Path) -> None:
    image = good_elf32()
    offset = lb.EHDR32_SIZE + 2 * lb.PHDR32_SIZE
    image[offset : offset + 32] = header(
        mb.AOUT_KLUDGE, BASE + 0x1000 + offset, BASE + 0x1000, 0, 0, BASE + 0x2000
    )
    state = boot.load(memory, save(tmp_path, image))
    assert state.kind == "multiboot by addresses"
    assert memory.read(BASE + 0x1000, 4) == lb.ELF_MAGIC


def test_what_auto_prefers(memory: GuestMemory, tmp_path: Path) -> None:
    code = header(0) + CODE
    pvh = note(lb.XEN_NOTE_NAME, lb.XEN_ELFNOTE_PHYS32_ENTRY, struct.pack("<I", BASE))

    def kind(image: bytearray, protocol: str = "auto") -> str:
        memory.zero()
        return boot.load(memory, save(tmp_path, image), protocol=protocol).kind

    assert kind(make_elf32([(BASE, code, 0x3000)], notes=pvh)) == "multiboot ELF"
    assert kind(make_elf32([(BASE, code, 0x3000)], notes=pvh), "pvh") == "ELF by PVH note"
    assert kind(make_elf32([(BASE, CODE, 0x3000)], notes=pvh)) == "ELF by PVH note"
    wide = make_elf([(BASE, code, 0x3000)], entry=BASE)
    assert kind(wide) == "multiboot ELF"
    assert kind(wide, "elf64") == "ELF by 64-bit entry"
    assert kind(make_elf([(BASE, code, 0x3000)], entry=BASE, notes=pvh)) == "ELF by PVH note"
    assert (
        kind(make_elf([(BASE, code, 0x3000)], entry=BASE, notes=pvh), "multiboot")
        == "multiboot ELF"
    )
    linux = make_elf([(BASE, code, 0x3000)], entry=BASE, notes=LINUX_NOTE)
    assert kind(linux) == "Linux ELF by 64-bit entry"


def test_is_linux_knows_test_kernels(tmp_path: Path) -> None:
    assert not boot.is_linux(save(tmp_path, good_elf32()))
    assert not boot.is_linux(save(tmp_path, good_flat()))


def test_header_at_the_end_of_the_search(memory: GuestMemory, tmp_path: Path) -> None:
    """The header must lie entirely in the first 8 KiB, on a multiple of 4. A magic number with a
    wrong checksum is no header.
    """
    decoy = header(5)[:8] + bytes(4)
    last = mb.SEARCH - mb.HEADER_SIZE - (lb.EHDR32_SIZE + lb.PHDR32_SIZE)
    for at, good in ((last, True), (last + 4, False), (last - 2, False)):
        code = bytearray(decoy.ljust(mb.SEARCH + 64, b"\x90"))
        code[at : at + mb.HEADER_SIZE] = header(0)
        path = save(tmp_path, make_elf32([(BASE, bytes(code), len(code))]))
        memory.zero()
        if good:
            assert boot.load(memory, path).kind == "multiboot ELF"
        else:
            with pytest.raises(ImageError, match="neither a multiboot header"):
                boot.load(memory, path)


# --- flat binaries --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "address"),
    [
        ("protected32", 0x10_0000),
        ("protected32", 0x3_0000),
        ("protected32", 0x7C00),
        ("long64", 0x20_0000),
        ("long64", 0x2_1000),
        ("real16", 0x7C00),
    ],
)
def test_flat(memory: GuestMemory, tmp_path: Path, mode: str, address: int) -> None:
    """Any file can be loaded as a flat binary, even an ELF."""
    image = good_elf32()
    state = boot.load(
        memory, save(tmp_path, image), cmdline="x", load_address=address, load_mode=mode
    )
    assert (state.mode, state.entry, state.regs["rip"]) == (mode, address, address)
    assert memory.read(address, len(image)) == image
    assert memory.read(pf.BOOT_CMDLINE, 2) == b"x\0"
    if mode == "protected32":
        assert state.regs["rbx"] == pf.PVH_START_INFO
    elif mode == "long64":
        assert (state.regs["rsi"], state.cr3) == (pf.BOOT_PARAMS, pf.BOOT_PAGE_TABLES)


@pytest.mark.parametrize(
    ("mode", "address"),
    [
        ("protected32", 0x6000),
        ("protected32", pf.BOOT_CMDLINE),
        ("protected32", pf.EBDA_BASE - 16),
        ("protected32", 0xF_0000),
        ("long64", 0x7C00),
        ("long64", 16 * MIB - 16),
        ("long64", 1 << 63),
        ("long64", 0x1_0000_0000),
        ("real16", 0x400),
        ("real16", 0x1_0000),
        ("real16", 0x10_0000),
    ],
)
def test_flat_at_a_bad_address(
    memory: GuestMemory, tmp_path: Path, mode: str, address: int
) -> None:
    with pytest.raises(ImageError, match=f"load address {address:#x}"):
        boot.load(memory, save(tmp_path, CODE), load_address=address, load_mode=mode)
    assert not pages_written(memory)


@pytest.mark.parametrize("mode", boot.FLAT_MODES)
def test_the_loader_leaves_low_rooms_alone(memory: GuestMemory, tmp_path: Path, mode: str) -> None:
    """Whatever else it writes: with the longest command line, and for multiboot with modules."""
    disk = str(tmp_path / "disk")
    Path(disk).write_bytes(b"disk")
    flat = (CODE, 0x7C00 if mode == "real16" else 0x10_0000, None if mode == "real16" else disk)
    others: dict[str, tuple[bytes, int | None, str | None]] = {
        "long64": (bytes(make_elf([(0x10_0000, CODE, 4096)], entry=0x10_0000)), None, disk),
        "protected32": (bytes(good_flat()), None, f"{disk},{disk}"),
    }
    for image, address, initrd in [flat, *([others[mode]] if mode in others else [])]:
        memory.zero()
        boot.load(
            memory,
            save(tmp_path, image),
            initrd=initrd,
            cmdline="x" * 2000,
            load_address=address,
            load_mode=mode,
        )
        for low, high in pf.LOW_ROOMS[mode]:
            data = bytearray(memory.read(low, high - low))
            if mode == "real16":  # the kernel itself
                data[0x7C00 - low : 0x7C00 - low + len(CODE)] = bytes(len(CODE))
            assert not any(data), f"{mode}: {low:#x}"


def test_a_low_multiboot_kernel(memory: GuestMemory, tmp_path: Path) -> None:
    """Its modules lie above 1 MiB; vectors and handlers of a BIOS are there."""
    disk = str(tmp_path / "disk")
    Path(disk).write_bytes(b"disk")
    image = good_flat(load=0x8000, header=0x8010, entry=0x8000)
    state = boot.load(memory, save(tmp_path, image), initrd=disk)
    assert (state.entry, state.bios) == (0x8000, True)
    assert memory.read(0x8000, 16) == b"\x90" * 16
    assert Info(memory, state).modules[0][:2] == (0x10_0000, b"disk")
    for vector, begin in ((8, b"\x1e\x50"), (0x10, b"\xcf"), (0x70, b"\x50\xb0\x20\xe6\xa0")):
        offset, segment = struct.unpack("<HH", memory.read(4 * vector, 4))
        assert memory.read(segment * 16 + offset, len(begin)) == begin


def test_flat_in_a_bad_mode(memory: GuestMemory, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown load mode 'real32'"):
        boot.load(memory, save(tmp_path, CODE), load_address=MIB, load_mode="real32")
    with pytest.raises(UsageError, match="no use for an initrd"):
        boot.load(memory, save(tmp_path, CODE), initrd="x", load_address=0x7C00, load_mode="real16")


# --- what is refused ------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], bytes | bytearray], str]] = {
    "video mode": (lambda: good_elf32(4), "flags 0x4, bit 2"),
    "unknown requirement": (lambda: good_elf32(0x100), "header flags 0x100"),
    "no addresses": (lambda: good_flat(flags=0), "without addresses"),
    "address fields cut": (lambda: good_flat()[: 16 + 20], "multiboot address fields"),
    "load_addr above header_addr": (lambda: good_flat(load=BASE + 17), "load_addr"),
    "starts before the file": (
        lambda: good_flat(load=BASE - 16, header=BASE + 16),
        "header_addr 0x100010",
    ),
    "load_end_addr below the header": (lambda: good_flat(end=BASE + 16), "load_end_addr 0x100010"),
    "load_end_addr beyond the file": (lambda: good_flat(end=BASE + 0x10000), "truncated"),
    "bss_end_addr": (lambda: good_flat(bss=BASE + 16), "bss_end_addr 0x100010"),
    "bss beyond RAM": (lambda: good_flat(bss=0xFFFF_FFFF), "outside guest memory"),
    "entry_addr": (lambda: good_flat(entry=BASE - 1), "entry_addr 0xfffff"),
    "on the boot information": (
        lambda: good_flat(load=0x5800, header=0x5810, entry=0x5800),
        "below 0x100000, only 0x1000..0x6000 and 0x7000..0x20000 and",
    ),
    "no header": (lambda: make_elf32([(BASE, CODE, 0x2000)]), "neither a multiboot header"),
    "e_entry": (lambda: make_elf32([(BASE, header(0) + CODE, 0x2000)], entry=5), "e_entry"),
    "cut": (lambda: good_elf32()[:2000], "truncated: segment 0"),
    "beyond 4 GiB": (
        lambda: make_elf([(BASE, header(0) + CODE, 1 << 33)], entry=BASE),
        "outside guest",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_kernel_is_refused(memory: GuestMemory, tmp_path: Path, name: str) -> None:
    make, text = BAD[name]
    with pytest.raises(ImageError) as e:
        boot.load(memory, save(tmp_path, make()))
    assert text in str(e.value) and "\n" not in str(e.value)
    assert not pages_written(memory)


def test_bad_module_is_refused(memory: GuestMemory, tmp_path: Path) -> None:
    kernel = save(tmp_path, good_elf32())
    big = tmp_path / "big"
    with big.open("wb") as f:
        f.truncate(16 * MIB)
    many = ",".join([kernel] * 200)
    for initrd, text in (
        (f"{kernel},/nonexistent x", "/nonexistent"),
        (str(big), "behind the kernel"),
        (many, "200 modules"),
    ):
        with pytest.raises(ImageError, match=text):
            boot.load(memory, kernel, initrd=initrd)
        assert not pages_written(memory)


@pytest.mark.parametrize(
    ("make", "protocol", "text"),
    [
        (good_elf32, "elf64", "32-bit ELF"),
        (good_elf32, "linux64", "32-bit ELF"),
        (good_elf32, "pvh", "nor a PVH note|32-bit"),
        (good_flat, "pvh", "is a multiboot kernel"),
        (good_flat, "bzimage", "is a multiboot kernel"),
        (
            lambda: make_elf([(0x10_0000, CODE, 4096)], entry=BASE, notes=b""),
            "multiboot",
            "no multiboot header",
        ),
        (
            lambda: make_elf([(0x100_0000, CODE, 4096)], notes=PVH_NOTE),
            "multiboot",
            "no multiboot header",
        ),
    ],
)
def test_protocol_mismatch(
    memory: GuestMemory, tmp_path: Path, make: Callable[[], bytearray], protocol: str, text: str
) -> None:
    with pytest.raises(ImageError, match=text):
        boot.load(memory, save(tmp_path, make()), protocol=protocol)
