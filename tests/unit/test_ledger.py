"""Every exit is accounted for: what goes into the ledger comes out of it, summed."""

import random

import pytest

from pyvmm._ext import lib
from pyvmm.bus import MMIO, PIO
from pyvmm.exits.ledger import Ledger
from pyvmm.kvm.vcpu import Vcpu
from tests.pci_guest import Board


class Ports:
    def read(self, offset, size):
        return 0

    def write(self, offset, size, value):
        pass


def vcpu_of(board: Board) -> Vcpu:
    """The board's vCPU as the ledger's reader sees one."""
    vcpu = Vcpu.__new__(Vcpu)
    vcpu.c = board.vcpu
    return vcpu


@pytest.fixture
def board():
    with Board() as b:
        b.bus.add(PIO, 0x3000, 8, "ports", Ports())
        b.bus.add(MMIO, 0xD0000000, 0x10000, "card", Ports())
        yield b


def ledger(board: Board, accesses: int) -> Ledger:
    board.vcpu.runs = accesses  # counted by the KVM_RUN loop, which is not there
    return Ledger([vcpu_of(board)], board.bus)


def test_a_line_a_place_size_and_direction(board):
    for _ in range(3):
        board.read(PIO, 0x3000, 1)
    board.read(PIO, 0x3000, 2)
    board.write(PIO, 0x3000, 1, 0)
    board.write(MMIO, 0xD0000040, 4, 0)
    board.access(PIO, 0x3000, 1, b"12345", count=5)
    board.read(PIO, 0x9999, 1)
    book = ledger(board, 8)
    lines = {(x.reason, x.addr, x.size, x.write, x.device): (x.count, x.units) for x in book.lines}
    assert lines == {
        ("io", 0x3000, 1, False, "ports"): (3, 3),
        ("io", 0x3000, 2, False, "ports"): (1, 1),
        ("io", 0x3000, 1, True, "ports"): (2, 6),
        ("mmio", 0xD0000040, 4, True, "card"): (1, 1),
        ("io", 0x9999, 1, False, ""): (1, 1),
    }
    assert book.by_reason() == {"io": 7, "mmio": 1}
    assert book.by_device() == {"ports": 6, "card": 1, "nobody": 1}
    assert sum(line.count for line in book.lines) == book.total == 8
    assert book.lines[0].what == "pio read 0x3000/1 ports"
    as_json = book.as_dict()
    assert as_json["kvm_run_returns"] == 8
    assert sum(line["count"] for line in as_json["lines"]) == 8


def test_a_guest_that_exits_everywhere_is_still_counted(board):
    """More places than lines: what finds none is in one line of its own, and the sum is right."""
    rng = random.Random(1)
    n = 5 * lib.PV_LEDGER_SLOTS
    for _ in range(n):
        board.write(MMIO, 0xD0000000 + rng.randrange(0, 0x8000, 4), 4, 0)
    book = ledger(board, n)
    assert sum(line.count for line in book.lines) == n
    assert book.by_reason()["overflow"] > 0
    assert len(book.lines) <= lib.PV_LEDGER_SLOTS + 1
    assert board.vcpu.overflow == book.by_reason()["overflow"]


def test_vcpus_are_summed_by_device_also_after_a_move(board):
    card = board.bus.region(MMIO, 0x100, "mover", Ports())
    card.map(0xD1000000)
    board.read(MMIO, 0xD1000000, 4)
    card.map(0xD2000000)
    board.read(MMIO, 0xD1000000, 4)
    board.read(MMIO, 0xD2000000, 4)
    card.unmap()
    board.vcpu.runs = 3
    vcpu = vcpu_of(board)
    book = Ledger([vcpu, vcpu], board.bus)
    assert book.total == 6
    assert book.by_device() == {"mover": 4, "nobody": 2}
