"""The I/O spaces: the right device answers each access, in C or in Python."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.bus import MMIO, PIO
from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from tests.descriptors import thread_names
from tests.driver import wait_for
from tests.pci_guest import Board


class Recorder:
    """A handler that notes all accesses and answers reads with ``value``."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.seen: list[tuple[Any, ...]] = []

    def read(self, offset: Any, size: Any) -> Any:
        self.seen.append(("r", offset, size))
        return self.value

    def write(self, offset: Any, size: Any, value: Any) -> None:
        self.seen.append(("w", offset, size, value))


@pytest.fixture
def board() -> Iterator[Any]:
    with Board() as b:
        yield b


def test_nobody_reads_as_ones_and_swallows_writes(board: Any) -> None:
    for size in (1, 2, 4, 8):
        assert board.read(MMIO, 0xD0000000, size) == (1 << 8 * size) - 1
        board.write(MMIO, 0xD0000000, size, 5)
    assert board.access(PIO, 0x1234, 2, count=3) == b"\xff" * 6
    assert board.exits == 0


def test_handlers_get_offsets_and_little_endian_values(board: Any) -> None:
    h = Recorder(0x1122334455667788)
    board.bus.add(MMIO, 0xD0000000, 0x100, "h", h)
    assert board.read(MMIO, 0xD0000010, 8) == 0x1122334455667788
    assert board.read(MMIO, 0xD0000010, 2) == 0x7788
    board.write(MMIO, 0xD00000FC, 4, 0xA1B2C3D4)
    assert h.seen == [("r", 0x10, 8), ("r", 0x10, 2), ("w", 0xFC, 4, 0xA1B2C3D4)]


@pytest.mark.parametrize("value", [-1, 1 << 70, -(1 << 64)])
def test_a_handler_may_answer_with_any_integer(board: Any, value: Any) -> None:
    board.bus.add(MMIO, 0xD0000000, 8, "h", Recorder(value))
    assert board.read(MMIO, 0xD0000000, 4) == value & 0xFFFFFFFF


def test_an_access_must_lie_in_the_region_whole(board: Any) -> None:
    h = Recorder()
    board.bus.add(MMIO, 0xD0000002, 4, "h", h)
    assert board.read(MMIO, 0xD0000000, 4) == 0xFFFFFFFF
    assert board.read(MMIO, 0xD0000004, 4) == 0xFFFFFFFF
    assert board.read(MMIO, 0xD0000001, 2) == 0xFFFF
    assert not h.seen
    assert board.read(MMIO, 0xD0000002, 4) == 0
    assert board.read(MMIO, 0xD0000005, 1) == 0


def test_string_instructions_reach_a_handler_element_by_element(board: Any) -> None:
    h = Recorder(0x41)
    board.bus.add(PIO, 0x3000, 4, "h", h)
    assert board.access(PIO, 0x3000, 1, count=4) == b"AAAA"
    board.access(PIO, 0x3000, 2, b"\1\0\2\0\3\0", count=3)
    assert h.seen == [("r", 0, 1)] * 4 + [("w", 0, 2, n) for n in (1, 2, 3)]


def test_regions_do_not_overlap(board: Any) -> None:
    a = board.bus.add(MMIO, 0xD0001000, 0x1000, "a", Recorder())
    for base, length in ((0xD0001000, 1), (0xD0001FFF, 1), (0xD0000FFF, 2), (0xD0000000, 0x10000)):
        with pytest.raises(HostError, match="overlaps"):
            board.bus.add(MMIO, base, length, "b", Recorder())
    below = board.bus.add(MMIO, 0xD0000FFF, 1, "below", Recorder(1))
    above = board.bus.add(MMIO, 0xD0002000, 1, "above", Recorder(2))
    assert (board.read(MMIO, 0xD0000FFF, 1), board.read(MMIO, 0xD0002000, 1)) == (1, 2)
    assert board.bus.name(a.id) == "a" and board.bus.name(below.id) == "below" != board.bus.name(
        above.id
    )
    assert board.bus.name(0) == "" == board.bus.name(9999)


def test_a_region_may_end_at_the_end_of_the_space_but_not_wrap(board: Any) -> None:
    h = Recorder(7)
    board.bus.add(MMIO, (1 << 64) - 8, 8, "top", h)
    assert board.read(MMIO, (1 << 64) - 8, 8) == 7
    assert board.read(MMIO, (1 << 64) - 4, 8) == (1 << 64) - 1
    with pytest.raises(HostError):
        board.bus.add(MMIO, (1 << 64) - 0x100, 0x101, "wrap", h)


def test_moving_a_region(board: Any) -> None:
    h = Recorder(3)
    r = board.bus.region(MMIO, 0x10, "h", h)
    assert r.base is None and board.read(MMIO, 0xD0000000, 1) == 0xFF
    assert r.map(0xD0000000) and board.read(MMIO, 0xD0000000, 1) == 3
    assert r.map(0xD0000008)  # the new range overlaps the region's own old one
    assert board.read(MMIO, 0xD0000000, 1) == 0xFF and board.read(MMIO, 0xD0000017, 1) == 3
    board.bus.add(MMIO, 0xD0100000, 4, "other", Recorder())
    assert not r.map(0xD00FFFF8)
    assert r.base is None and board.read(MMIO, 0xD0000008, 1) == 0xFF
    r.unmap()
    r.unmap()


@pytest.mark.parametrize("to", [None, 0xD0000008, 0xCFFFFFF8, 0xD8000000])
def test_an_access_that_races_with_a_move_hits_nothing(board: Any, to: Any) -> None:
    """One vCPU has looked up the region in C when another vCPU moves the region."""
    h = Recorder(3)
    r = board.bus.region(MMIO, 0x10, "h", h)
    r.map(0xD0000000)
    c, area = board.vcpu, ffi.new("uint8_t[]", b"secret!!")
    for write in (False, True):
        c.addr, c.size, c.count, c.write, c.data = 0xD0000000, 8, 1, write, area
        assert not lib.pv_vcpu_access(c, MMIO)
        r.unmap() if to is None else r.map(to)
        board.bus.dispatch(c)
        r.map(0xD0000000)
    inside = to is not None and to <= 0xD0000000 <= to + 8
    assert h.seen == ([("r", 8, 8), ("w", 8, 8, 3)] if inside else [])
    if not inside:
        assert bytes(ffi.buffer(area, 8)) == b"\xff" * 8


def test_the_table_is_bounded(board: Any) -> None:
    made = []
    with pytest.raises(HostError, match="No space"):
        for i in range(lib.PV_BUS_REGIONS + 1):
            made.append(board.bus.add(MMIO, 0xC0000000 + i * 0x100, 1, f"r{i}", Recorder(i)))
    assert len(made) >= lib.PV_BUS_REGIONS - 2
    assert all(board.read(MMIO, r.base, 1) == i & 0xFF for i, r in enumerate(made))
    for r in made[::2]:
        r.unmap()
    assert [board.read(MMIO, 0xC0000000 + i * 0x100, 1) for i in range(4)] == [0xFF, 1, 0xFF, 3]


def test_absent_functions_are_answered_without_python(board: Any) -> None:
    for slot in range(1, 32):
        assert board.config_read(slot, 0) == 0xFFFFFFFF
    assert board.exits == 0
    assert board.config_read(0, 0) == 0x00081B36
    assert board.config_read(0, 2, 2) == 0x0008
    assert board.exits == 0  # plain bytes: likewise
    board.config_write(0, 4, 2, 0x0404)
    assert board.exits == 1
    assert board.config_read(0, 4, 2) == 0x0404
    assert board.exits == 1
    board.write(PIO, 0xCF8, 4, 0x80010000)  # bus 1
    assert board.read(PIO, 0xCFC, 4) == 0xFFFFFFFF
    board.write(PIO, 0xCF8, 4, 0x80000100)  # function 1
    assert board.read(PIO, 0xCFC, 4) == 0xFFFFFFFF
    board.write(PIO, 0xCF8, 4, 0)  # not enabled
    assert board.read(PIO, 0xCFC, 4) == 0xFFFFFFFF
    assert board.exits == 1


def test_the_address_latch_is_as_linux_probes_it(board: Any) -> None:
    """arch/x86/pci/direct.c, pci_check_type1."""
    board.write(PIO, 0xCFB, 1, 1)
    old = board.read(PIO, 0xCF8, 4)
    board.write(PIO, 0xCF8, 4, 0x80000000)
    assert board.read(PIO, 0xCF8, 4) == 0x80000000
    board.write(PIO, 0xCF8, 4, old)
    board.write(PIO, 0xCF8, 4, 0xFFFFFFFF)
    assert board.read(PIO, 0xCF8, 4) == 0x80FFFFFC  # reserved bits and the low two are 0
    for port, size in ((0xCF8, 1), (0xCF8, 2), (0xCFA, 2), (0xCFB, 1)):
        board.read(PIO, port, size)
        board.write(PIO, port, size, 0xFF)
    assert board.read(PIO, 0xCF8, 4) == 0x80FFFFFC


def test_the_reset_register(board: Any) -> None:
    assert board.read(PIO, 0xCF9, 1) == 0
    board.write(PIO, 0xCF9, 1, 2)
    assert board.resets == 0
    board.write(PIO, 0xCF9, 1, 6)
    assert board.resets == 1
    board.write(PIO, 0xCF9, 2, 0x0606)  # wide: not the register
    assert board.resets == 1


def test_notify_regions_count_kicks(board: Any) -> None:
    kicks = [EventFd(), EventFd()]
    n = ffi.new("struct pv_notify *")
    n.count, n.stride = 3, 4
    n.fd[0], n.fd[1], n.fd[2] = kicks[0].fileno(), kicks[1].fileno(), -1
    r = board.bus.add(MMIO, 0xD0000000, 16, "notify", kind=lib.PV_REGION_NOTIFY, opaque=n)
    for offset, size in ((0, 2), (0, 4), (0, 1), (4, 2)):
        board.write(MMIO, 0xD0000000 + offset, size, 0)
    assert [k.drain() for k in kicks] == [3, 1]
    for offset in (1, 2, 3, 5, 12):  # between queues, beyond the count
        board.write(MMIO, 0xD0000000 + offset, 2, 0)
    assert [k.drain() for k in kicks] == [0, 0]
    assert board.read(MMIO, 0xD0000000, 4) == 0
    assert board.exits == 0
    board.write(MMIO, 0xD0000008, 2, 0)  # a queue that Python serves
    assert board.exits == 1
    r.unmap()
    for k in kicks:
        k.close()


def test_streams_and_ignored_ports(board: Any) -> None:
    pipe = lib.pv_pipe_new(64)
    board.bus.add(PIO, 0x620, 2, "stream", kind=lib.PV_REGION_STREAM, opaque=pipe)
    board.bus.add(PIO, 0x80, 1, "post", kind=lib.PV_REGION_IGNORE)
    board.write(PIO, 0x620, 1, 0x41)
    board.access(PIO, 0x620, 1, b"hello", count=5)
    board.access(PIO, 0x620, 2, b"wide", count=2)
    assert board.read(PIO, 0x620, 1) == 0
    out = ffi.new("uint8_t[]", 64)
    assert bytes(ffi.buffer(out, lib.pv_pipe_read(pipe, out, 64, 0))) == b"Ahellowide"
    board.write(PIO, 0x80, 1, 0xAA)
    assert board.read(PIO, 0x80, 1) == 0
    assert board.exits == 0
    lib.pv_pipe_free(pipe)


def test_reading_the_isr_clears_it(board: Any) -> None:
    x = lib.pv_intx_new()
    board.bus.add(MMIO, 0xD0000000, 4, "isr", kind=lib.PV_REGION_ISR, opaque=x)
    assert not lib.pv_intx_peek(x)
    lib.pv_intx_raise(x, 1)
    lib.pv_intx_raise(x, 2)
    assert lib.pv_intx_peek(x)
    assert board.read(MMIO, 0xD0000001, 1) == 0  # beside it
    board.write(MMIO, 0xD0000000, 1, 0)
    assert board.read(MMIO, 0xD0000000, 4) == 3
    assert board.read(MMIO, 0xD0000000, 1) == 0 and not lib.pv_intx_peek(x)
    lib.pv_intx_raise(x, 2)
    lib.pv_intx_reset(x)
    assert board.read(MMIO, 0xD0000000, 1) == 0
    lib.pv_intx_free(x)


def test_a_thread_turns_eventfds_into_isr_bits(board: Any) -> None:
    """A thread of C's own, which Python does not know."""
    x = lib.pv_intx_new()
    with EventFd() as queue, EventFd() as config:
        fds, known = [queue.fileno(), config.fileno()], set(threading.enumerate())
        assert lib.pv_intx_start(x, b"net0 intx", fds * 66, [1] * 132, 132) == -errno.EINVAL
        lib.pv_intx_stop(x)  # there is none
        for _ in range(3):
            assert lib.pv_intx_start(x, b"net0 intx", fds, [1, 2], 2) == 0
            assert wait_for(lambda: "net0 intx" in thread_names())
            assert not set(threading.enumerate()) - known
            for event, bit in ((queue, 1), (config, 2)):
                event.signal()
                assert wait_for(lambda: lib.pv_intx_peek(x))
                assert lib.pv_intx_read(x) == bit
            lib.pv_intx_stop(x)
            queue.signal()
            assert not lib.pv_intx_peek(x) and queue.drain() == 1
    lib.pv_intx_free(x)
