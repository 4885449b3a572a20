"""MSI-X: interrupts are delivered or stay pending, and go to the right vector when masks and
vectors change.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.bus import MMIO
from pyvmm.fd import EventFd
from pyvmm.pci.msix import Msix
from pyvmm.spec.pci import PCI_MSIX_FLAGS_ENABLE as ENABLE
from pyvmm.spec.pci import PCI_MSIX_FLAGS_MASKALL as MASKALL
from tests.pci_guest import Board, FakeVm

TABLE, PBA = 0xD0000000, 0xD0010000
COUNT = 3


class Rig:
    def __init__(self, board: Any, count: Any = COUNT) -> None:
        self.board, self.vm = board, board.vm
        self.msix = Msix(self.vm, count)
        board.bus.add(MMIO, TABLE, 16 * count, "table", self.msix.table)
        board.bus.add(MMIO, PBA, (count + 63) // 64 * 8, "pba", self.msix.pba)
        self.events = [EventFd() for _ in range(count)]

    def set(self, i: Any, word: Any, value: Any) -> None:
        self.board.write(MMIO, TABLE + 16 * i + 4 * word, 4, value)

    def get(self, i: Any, word: Any) -> Any:
        return self.board.read(MMIO, TABLE + 16 * i + 4 * word, 4)

    def open(self, i: Any, address: Any = 0xFEE00000, data: Any = None) -> None:
        self.set(i, 0, address & 0xFFFFFFFF)
        self.set(i, 1, address >> 32)
        self.set(i, 2, 0x40 + i if data is None else data)
        self.set(i, 3, 0)

    def pending(self) -> Any:
        return self.board.read(MMIO, PBA, 8)


@pytest.fixture
def rig() -> Iterator[Any]:
    with Board() as board:
        r = Rig(board)
        yield r
        for e in r.events:
            e.close()


def message(i: Any, address: Any = 0xFEE00000) -> Any:
    return (address, 0x40 + i)


def test_the_table_after_reset_is_masked_and_reads_back(rig: Any) -> None:
    for i in range(COUNT):
        assert [rig.get(i, w) for w in range(4)] == [0, 0, 0, 1]
        rig.set(i, 0, 0xFEE01003)
        rig.set(i, 1, 0x12345678)
        rig.set(i, 2, 0xDEADBEEF)
        rig.set(i, 3, 0xFFFFFFFE)
        assert [rig.get(i, w) for w in range(4)] == [0xFEE01000, 0x12345678, 0xDEADBEEF, 0]
    assert rig.board.read(MMIO, TABLE + 16, 8) == 0x12345678FEE01000
    rig.board.write(MMIO, TABLE + 24, 8, 0x1_00000077)
    assert rig.board.read(MMIO, TABLE + 24, 8) == 0x1_00000077


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, 2), (2, 2), (4, 8), (1, 4), (2, 4), (15, 1)]
)
def test_odd_accesses_to_the_table_do_nothing(rig: Any, offset: Any, size: Any) -> None:
    rig.open(0)
    before = [rig.get(0, w) for w in range(4)]
    rig.board.write(MMIO, TABLE + offset, size, -1)
    assert rig.board.read(MMIO, TABLE + offset, size) == 0
    assert [rig.get(0, w) for w in range(4)] == before


def test_an_open_vector_delivers_its_message(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    for i in range(COUNT):
        rig.msix.attach(i, rig.events[i])
        rig.open(i)
    rig.events[1].signal()
    assert rig.vm.delivered() == [message(1)]
    rig.events[0].signal()
    rig.events[2].signal()
    assert sorted(rig.vm.delivered()) == [message(0), message(2)]
    assert rig.pending() == 0


@pytest.mark.parametrize("how", ["vector", "function", "disabled", "no bus mastering"])
def test_what_is_masked_stays_pending_and_comes_on_unmasking(rig: Any, how: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(1, rig.events[1])
    rig.open(1)
    if how == "vector":
        rig.set(1, 3, 1)
    elif how == "no bus mastering":
        rig.msix.set_mastering(False)
    else:
        rig.msix.set_flags(ENABLE | MASKALL if how == "function" else 0)
    rig.events[1].signal()
    rig.events[1].signal()
    assert rig.vm.delivered() == [] and rig.pending() == 0b10
    if how == "vector":
        rig.set(1, 3, 0)
    else:
        rig.msix.set_flags(ENABLE)
        rig.msix.set_mastering(True)
    assert rig.vm.delivered() == [message(1)]
    assert rig.pending() == 0


def test_a_new_message_goes_with_what_is_pending(rig: Any) -> None:
    """The driver masks the vector, moves the interrupt to another CPU, and unmasks the vector, as
    Linux does to change an interrupt's affinity.
    """
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.open(0)
    rig.set(0, 3, 1)
    rig.events[0].signal()
    rig.set(0, 0, 0xFEE05000)
    rig.set(0, 2, 0x99)
    assert rig.vm.delivered() == []
    rig.set(0, 3, 0)
    assert rig.vm.delivered() == [(0xFEE05000, 0x99)]


def test_a_message_rewritten_while_open_takes_effect(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.open(0)
    rig.events[0].signal()
    rig.set(0, 2, 0x77)
    rig.events[0].signal()
    assert rig.vm.delivered() == [message(0), (0xFEE00000, 0x77)]


def test_sources_that_share_a_vector(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    for e in rig.events:
        rig.msix.attach(2, e)
    rig.open(2)
    for e in rig.events:
        e.signal()
    assert rig.vm.delivered() == [message(2)] * 3
    rig.set(2, 3, 1)
    rig.events[0].signal()
    assert rig.pending() == 0b100
    rig.msix.detach(2, rig.events[0])
    assert rig.pending() == 0  # the others have nothing
    rig.set(2, 3, 0)
    assert rig.vm.delivered() == []


def test_a_source_takes_what_is_pending_to_its_new_vector(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.events[0].signal()
    assert rig.pending() == 1
    rig.msix.detach(0, rig.events[0])
    assert rig.pending() == 0
    rig.msix.attach(1, rig.events[0])
    assert rig.pending() == 2
    rig.open(1)
    assert rig.vm.delivered() == [message(1)]


def test_reset_gives_everything_back(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    for i in range(COUNT):
        rig.msix.attach(i, rig.events[i])
        rig.open(i)
    assert len(rig.vm.gsis) == COUNT
    rig.msix.reset()
    assert not rig.vm.irqfds and not rig.vm.gsis and not rig.vm.routes
    assert not rig.msix.enabled
    assert [rig.get(0, w) for w in range(4)] == [0, 0, 0, 1]
    # The sources are still there: the driver resets those itself.
    rig.msix.set_flags(ENABLE)
    rig.open(0)
    rig.events[0].signal()
    assert rig.vm.delivered() == [message(0)]


@pytest.mark.parametrize("what", ["set_msi_route", "irqfd"])
def test_what_kvm_refuses_is_counted_and_stays_pending(rig: Any, what: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.vm.refuse = {what}
    rig.open(0)
    assert rig.msix.errors == 1
    rig.events[0].signal()
    assert rig.vm.delivered() == [] and rig.pending() == 1
    rig.vm.refuse = set()
    rig.set(0, 3, 1)
    rig.set(0, 3, 0)
    assert rig.msix.errors == 1 and rig.vm.delivered() == [message(0)]


def test_a_refusal_to_let_go_is_counted(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.open(0)
    rig.vm.refuse = {"irqfd-deassign"}
    rig.set(0, 3, 1)
    assert rig.msix.errors == 1


def test_a_refused_route_unwires_the_old_one(rig: Any) -> None:
    """An interrupt must not go to a destination at which the guest does not expect it any more."""
    rig.msix.set_flags(ENABLE)
    rig.msix.attach(0, rig.events[0])
    rig.open(0)
    rig.vm.refuse = {"set_msi_route"}
    rig.set(0, 2, 0x55)
    rig.events[0].signal()
    assert rig.vm.delivered() == [] and rig.pending() == 1


def test_pending_bits_of_many_vectors() -> None:
    with Board() as board:
        r = Rig(board, 130)
        for i in (0, 63, 64, 129):
            r.msix.attach(i, r.events[i])
            r.events[i].signal()
        assert [board.read(MMIO, PBA + 8 * i, 8) for i in range(3)] == [1 | 1 << 63, 1, 2]
        assert board.read(MMIO, PBA + 16, 1) == 2 and board.read(MMIO, PBA + 7, 1) == 0x80
        board.write(MMIO, PBA, 8, 0)
        assert board.read(MMIO, PBA, 8) == 1 | 1 << 63
        for e in r.events:
            e.close()


def test_pending_bits_with_more_than_1024_descriptors_open(rig: Any) -> None:
    """select() would raise, and an exception in a vCPU's thread ends the machine."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1200:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
    many = [EventFd() for _ in range(1100)]
    try:
        assert many[-1].fileno() > 1024
        rig.msix.attach(0, many[-1])
        many[-1].signal()
        assert rig.pending() == 1
    finally:
        for e in many:
            e.close()


def test_a_machine_without_a_single_vector_in_use(rig: Any) -> None:
    rig.msix.set_flags(ENABLE)
    rig.open(0)
    assert rig.pending() == 0 and rig.vm.delivered() == []
    assert isinstance(rig.vm, FakeVm) and not rig.vm.irqfds
