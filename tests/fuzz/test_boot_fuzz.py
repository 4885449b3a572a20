"""Mutated kernels: whatever a header says, the loader answers with ImageError or a state inside
guest RAM.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm import boot
from pyvmm.boot import params
from pyvmm.errors import ImageError
from pyvmm.memory import GuestMemory
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf
from tests.unit.test_boot import good_elf, make_bzimage
from tests.unit.test_multiboot import good_elf32, good_flat

MIB = 1 << 20
INTERESTING = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x10000,
    0x100000,
    1 << 31,
    (1 << 32) - 1,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
]

# (offset, width, value): small offsets hit the headers, where all the decisions are.
patches = st.lists(
    st.tuples(
        st.integers(0, 0x300),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.sampled_from(INTERESTING), st.integers(0, (1 << 64) - 1)),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(32 * MIB)
    yield m
    m.close()


class Recorder:
    """Guest memory that checks each write against RAM itself, and remembers the ranges."""

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.size, self.low_size, self.regions = memory.size, memory.low_size, memory.regions
        self.written: list[tuple[int, int]] = []

    def _note(self, gpa: int, length: int) -> None:
        assert any(r.gpa <= gpa and gpa + length <= r.gpa + r.size for r in self.regions)
        self.written.append((gpa, gpa + length))

    def write(self, gpa: int, data: bytes) -> None:
        self._note(gpa, len(data))
        self.memory.write(gpa, data)

    def read_file(self, gpa: int, fd: int, offset: int, length: int) -> int:
        self._note(gpa, length)
        return self.memory.read_file(gpa, fd, offset, length)


def check(memory: GuestMemory, image: bytes, initrd_size: int, cmdline: str, protocol: str) -> None:
    recorder = Recorder(memory)
    with tempfile.NamedTemporaryFile() as kernel, tempfile.NamedTemporaryFile() as initrd:
        kernel.write(image)
        kernel.flush()
        os.truncate(initrd.name, initrd_size)
        try:
            state = boot.load(
                recorder,  # type: ignore[arg-type]
                kernel.name,
                initrd=initrd.name if initrd_size else None,
                cmdline=cmdline,
                protocol=protocol,
            )
        except ImageError as e:
            assert "\n" not in str(e)
            assert not recorder.written, "something was written before the refusal"
            return
    rooms = pf.LOW_ROOMS[state.mode]
    if state.entry < pf.KERNEL_BASE:
        assert any(low <= state.entry < high for low, high in rooms)
    assert state.entry < memory.low_size
    line = memory.read(pf.BOOT_CMDLINE, pf.BOOT_CMDLINE_MAX).split(b"\0")[0].decode()
    if state.kind.startswith("multiboot"):
        assert line == f"{Path(kernel.name).name} {cmdline}".rstrip()
    else:
        assert line == cmdline
    ranges = sorted(recorder.written)
    for (_, end), (start, _) in pairwise(ranges):
        assert end <= start, "two loads overlap"
    # Below 1 MiB, the kernel lies in its rooms. All else are the loader's own areas: RAM that the
    # map gives away after boot, or the firmware's own.
    own = [
        (lb.BDA_EBDA_SEGMENT, lb.BDA_BASE_MEMORY_KIB + 2),
        (pf.BOOT_GDT, pf.BOOT_GDT + len(params.GDT)),
        (pf.PVH_START_INFO, pf.PVH_START_INFO + 0x1000),
        (pf.BOOT_PARAMS, pf.BOOT_PARAMS + lb.BP_SIZE),
        (pf.BOOT_PAGE_TABLES, pf.BOOT_PAGE_TABLES + 0x6000),
        (pf.BOOT_CMDLINE, pf.BOOT_CMDLINE + pf.BOOT_CMDLINE_MAX),
        (lb.RESET_VECTOR, pf.FIRMWARE_END),
        *rooms,
    ]
    if state.bios:
        own += [(0, 4 * 256), (pf.BIOS_CODE, pf.BIOS_CODE + 0x1000)]
    for start, end in ranges:
        assert start >= pf.KERNEL_BASE or any(a <= start and end <= b for a, b in own)


def mutate(image: bytearray, changes: list[tuple[int, int, int]], length: int) -> bytes:
    for offset, width, value in changes:
        if offset + width <= len(image):
            image[offset : offset + width] = (value & ((1 << 8 * width) - 1)).to_bytes(
                width, "little"
            )
    return bytes(image[:length])


fuzz = settings(
    max_examples=int(os.environ.get("PYVMM_FUZZ_EXAMPLES", "300")),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
lengths = st.one_of(st.just(1 << 30), st.integers(0, 9000))
initrds = st.sampled_from([0, 1, 4096, 20 * MIB, 33 * MIB])
lines = st.one_of(
    st.just("console=ttyS0"), st.text(max_size=20), st.integers(2000, 5000).map(lambda n: "a" * n)
)
protocols = st.sampled_from(boot.PROTOCOLS)


@fuzz
@given(patches, lengths, initrds, lines, protocols)
def test_mutated_elf(
    memory: GuestMemory,
    changes: list[tuple[int, int, int]],
    length: int,
    initrd: int,
    line: str,
    protocol: str,
) -> None:
    check(memory, mutate(good_elf(), changes, length), initrd, line, protocol)


@fuzz
@given(patches, lengths, initrds, lines, protocols)
def test_mutated_bzimage(
    memory: GuestMemory,
    changes: list[tuple[int, int, int]],
    length: int,
    initrd: int,
    line: str,
    protocol: str,
) -> None:
    check(memory, mutate(make_bzimage(), changes, length), initrd, line, protocol)


KERNELS: list[Callable[[], bytearray]] = [good_elf32, good_flat]


@fuzz
@given(patches, lengths, initrds, lines, protocols, st.sampled_from(KERNELS))
def test_mutated_multiboot(
    memory: GuestMemory,
    changes: list[tuple[int, int, int]],
    length: int,
    initrd: int,
    line: str,
    protocol: str,
    make: Callable[[], bytearray],
) -> None:
    check(memory, mutate(make(), changes, length), initrd, line, protocol)


@fuzz
@given(
    st.binary(max_size=2000), st.sampled_from([b"", lb.ELF_MAGIC, lb.ELF_MAGIC + b"\x02\x01\x01"])
)
def test_random_bytes(memory: GuestMemory, data: bytes, prefix: bytes) -> None:
    check(memory, prefix + data, 0, "", "auto")
