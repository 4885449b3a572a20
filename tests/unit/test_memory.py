"""Guest memory has the right addresses, refuses bad ranges and goes away when it is closed."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.errors import MemoryShort, UsageError
from pyvmm.memory import SIZE_MAX, GuestMemory, parse_size
from pyvmm.spec.platform import RAM_HIGH_BASE, RAM_LOW_MAX
from tests.descriptors import open_fds

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(2 * MIB)
    yield m
    m.close()


def test_read_write_view(memory: GuestMemory) -> None:
    memory.write(0x1000, b"hello")
    assert memory.read(0x1000, 5) == b"hello" and memory.read(0x0FFF, 1) == b"\0"
    with memory.view(0x1000, 5) as v:
        v[0] = ord("j")
        memory.write(0x1004, b"y")
        assert bytes(v) == b"jelly"
    memory.write(2 * MIB - 1, b"\xff")
    assert memory.read(2 * MIB - 1, 1) == b"\xff"
    memory.write(0, b"")
    assert memory.read(2 * MIB, 0) == b""


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (2 * MIB, 1),
        (2 * MIB - 1, 2),
        (0, 2 * MIB + 1),
        (-1, 1),
        (-1, 2),
        (1 << 63, 1),
        ((1 << 64) - 1, 2),
        (RAM_HIGH_BASE, 1),
    ],
)
def test_outside_is_refused(memory: GuestMemory, gpa: int, length: int) -> None:
    with pytest.raises(IndexError):
        memory.read(gpa, length)
    with pytest.raises(IndexError):
        memory.view(gpa, length)
    with pytest.raises(IndexError):
        memory.write(gpa, bytes(length))


def test_a_negative_length_is_refused(memory: GuestMemory) -> None:
    with pytest.raises((IndexError, ValueError)):
        memory.read(0x1000, -1)


def test_the_pci_hole_splits_it() -> None:
    """This takes 5 GiB, but only touched pages cost memory."""
    m = GuestMemory(5 << 30)
    try:
        low, high = m.regions
        assert (low.gpa, low.size, low.offset) == (0, RAM_LOW_MAX, 0)
        assert (high.gpa, high.size, high.offset) == (
            RAM_HIGH_BASE,
            (5 << 30) - RAM_LOW_MAX,
            RAM_LOW_MAX,
        )
        assert high.host == low.host + RAM_LOW_MAX and m.low_size == RAM_LOW_MAX
        m.write(RAM_HIGH_BASE, b"high")
        assert os.pread(m.fd.fileno(), 4, RAM_LOW_MAX) == b"high"
        for gpa, length in (
            (RAM_LOW_MAX - 1, 2),
            (RAM_LOW_MAX, 1),
            (RAM_HIGH_BASE - 1, 2),
            (RAM_HIGH_BASE + high.size, 1),
        ):
            with pytest.raises(IndexError):
                m.read(gpa, length)
        assert (
            m.c.count == 2
            and m.c.region[1].gpa == RAM_HIGH_BASE
            and m.c.region[1].offset == RAM_LOW_MAX
        )
    finally:
        m.close()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1T", 1 << 40), ("16t", 16 << 40), ("4G", 4 << 30), ("2GiB", 2 << 30), ("65536K", 64 * MIB)],
)
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "size", [0, -1, 4096, MIB - 1, MIB + 1, MIB + 2048, SIZE_MAX + 4096, 1 << 63, 1 << 70]
)
def test_silly_sizes_are_usage_errors(size: int) -> None:
    with pytest.raises(UsageError, match="use 1M to 16T"):
        GuestMemory(size)


def test_huge_pages_want_their_multiple() -> None:
    with pytest.raises(UsageError, match="multiple of 2097152"):
        GuestMemory(MIB, huge=True)


def test_a_host_without_memory_is_told_from_usage() -> None:
    """A child process with a limit on its address space stands for such a host."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from pyvmm.memory import GuestMemory\n"
        "from pyvmm.errors import MemoryShort\n"
        "import os\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "try: GuestMemory(2 << 30)\n"
        "except MemoryShort as e: print(e)\n"
        "assert len(os.listdir('/proc/self/fd')) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2048 MiB" in done.stdout and "--memory" in done.stdout and not done.stderr


def test_no_huge_pages_is_told_plainly() -> None:
    if int(Path("/proc/sys/vm/nr_hugepages").read_text()):
        pytest.skip("this machine has huge pages")
    with pytest.raises(MemoryShort, match=r"vm.nr_hugepages=1$"):
        GuestMemory(2 * MIB, huge=True)


def test_no_descriptors_is_told_plainly() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(fd for fd, _ in open_fds())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used - 1, hard))
    spare = []
    try:
        while True:  # the gaps below the limit
            spare.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        with pytest.raises(MemoryShort, match="ulimit -n"):
            GuestMemory(MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)


def test_the_size_is_sealed(memory: GuestMemory) -> None:
    for size in (MIB, 4 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd.fileno(), size)


def test_read_file(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 64)
    with open(path, "rb") as f:
        assert memory.read_file(0x2000, f.fileno(), 16, 256) == 256
        assert memory.read(0x2000, 256) == (bytes(range(256)) * 2)[16:272]
        assert memory.read_file(0x2000, f.fileno(), 16384 - 10, 256) == 10
        with pytest.raises(IndexError):
            memory.read_file(2 * MIB - 100, f.fileno(), 0, 101)


def test_zero_drops_every_page(memory: GuestMemory) -> None:
    memory.write(0x1000, b"x" * 100_000)
    assert os.fstat(memory.fd.fileno()).st_blocks > 0
    memory.zero()
    assert os.fstat(memory.fd.fileno()).st_blocks == 0
    assert memory.read(0x1000, 100_000) == bytes(100_000)


def test_close_twice_and_with_views_out() -> None:
    m = GuestMemory(MIB)
    fd = m.fd.fileno()
    v = m.view(0, 16)
    m.close()
    m.close()
    assert m.c.count == 0 and m.fd.closed
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    v.release()


def test_nothing_is_left_of_many() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("pyvmm-ram")

    before, maps = open_fds(), mapped()
    for _ in range(20):
        GuestMemory(MIB).close()
    assert not open_fds() - before and mapped() == maps


def test_c_sees_the_same_memory(memory: GuestMemory) -> None:
    """C uses the same mapping: one page is written through the address in struct pv_memory."""
    region = memory.c.region[0]
    ffi.memmove(region.host + 0x3000, b"from C", 6)
    assert memory.read(0x3000, 6) == b"from C"
    assert int(ffi.cast("uintptr_t", region.host)) % mmap.PAGESIZE == 0
    assert len(memory.regions) <= lib.PV_MEM_REGIONS


def test_settled_pages_stay(memory: GuestMemory) -> None:
    """All pages are there at once, and a reset clears them without giving them back."""

    def blocks() -> int:
        return os.fstat(memory.fd.fileno()).st_blocks * 512

    memory.write(0x3000, b"old")
    assert blocks() < memory.size
    memory.settle()
    assert blocks() == memory.size and memory.read(0x3000, 3) == b"old"
    memory.zero()
    assert blocks() == memory.size and memory.read(0, memory.size) == bytes(memory.size)
    memory.settle()
