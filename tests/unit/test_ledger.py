"""Every exit is accounted for: the ledger's lines sum up all exits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm._ext import lib
from pyvmm.bus import MMIO, PIO, Registers
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.exits.ledger import Ledger
from pyvmm.exits.phases import Phase
from pyvmm.exits.snapshot import Snapshot
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.pci import PciFunction
from pyvmm.spec import virtio_net
from pyvmm.virtio.net import NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.driver import Cable
from tests.pci_guest import Board

if TYPE_CHECKING:
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.kvm.vm import Vm


class Ports:
    def read(self, offset: Any, size: Any) -> Any:
        return 0

    def write(self, offset: Any, size: Any, value: Any) -> None:
        pass


def vcpu_of(board: Board) -> Vcpu:
    """The board's vCPU, as the reader of a ledger sees it."""
    vcpu = Vcpu.__new__(Vcpu)
    vcpu.c = board.vcpu
    return vcpu


@pytest.fixture
def board() -> Iterator[Any]:
    with Board() as b:
        b.bus.add(PIO, 0x3000, 8, "ports", Ports())
        b.bus.add(MMIO, 0xD0000000, 0x10000, "card", Ports())
        yield b


def ledger(board: Board, accesses: int) -> Ledger:
    board.vcpu.runs = accesses  # the KVM_RUN loop would count these, but does not run here
    return Ledger.of([vcpu_of(board)], board.bus)


def test_a_line_a_place_size_and_direction(board: Any) -> None:
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
    as_json: dict[str, Any] = book.as_dict()
    assert as_json["kvm_run_returns"] == 8
    assert sum(line["count"] for line in as_json["lines"]) == 8


def test_a_guest_that_exits_everywhere_is_still_counted(board: Any) -> None:
    """There are more addresses than lines. Exits without a line of their own share one line, and
    the sum is right.
    """
    rng = random.Random(1)
    n = 5 * lib.PV_LEDGER_SLOTS
    for _ in range(n):
        board.write(MMIO, 0xD0000000 + rng.randrange(0, 0x8000, 4), 4, 0)
    book = ledger(board, n)
    assert sum(line.count for line in book.lines) == n
    assert book.by_reason()["overflow"] > 0
    assert len(book.lines) <= lib.PV_LEDGER_SLOTS + 1
    assert board.vcpu.overflow == book.by_reason()["overflow"]


def test_vcpus_are_summed_by_device_also_after_a_move(board: Any) -> None:
    card = board.bus.region(MMIO, 0x100, "mover", Ports())
    card.map(0xD1000000)
    board.read(MMIO, 0xD1000000, 4)
    card.map(0xD2000000)
    board.read(MMIO, 0xD1000000, 4)
    board.read(MMIO, 0xD2000000, 4)
    card.unmap()
    board.vcpu.runs = 3
    vcpu = vcpu_of(board)
    book = Ledger.of([vcpu, vcpu], board.bus)
    assert book.total == 6
    assert book.by_device() == {"mover": 4, "nobody": 2}


def names(board: Board) -> dict[str, int]:
    board.vcpu.runs = 0
    return Ledger.of([vcpu_of(board)], board.bus).by_name()


def test_registers_of_the_configuration_space_by_name(board: Any) -> None:
    """An access to the data port is named after the register that the address port selects. If
    there is no function, all accesses share one line.
    """
    card = board.pci.add(PciFunction("card", 0x1234, 0x5678, 0x020000, pin=1))
    for at, size in ((0, 4), (2, 2), (0x10, 4), (0x12, 2), (0x3C, 1), (0x44, 4)):
        board.config_read(card, at, size)
    board.config_write(card, 4, 2, 2)
    for slot in (7, 8, 9):
        board.config_read(slot, 0)
    board.write(PIO, 0xCF8, 4, 0)  # not enabled
    board.read(PIO, 0xCFC, 4)
    board.read(MMIO, board.ecam(card, 0x06), 2)
    board.read(MMIO, board.ecam(20, 0), 4)
    found = names(board)
    found.pop("pci-config address")
    assert found == {
        "pci-config card vendor id": 1,
        "pci-config card device id": 1,
        "pci-config card BAR 0": 1,
        "pci-config card BAR 0+2": 1,
        "pci-config card interrupt line": 1,
        "pci-config card register 0x44": 1,
        "pci-config card command": 1,
        "pci-config no function": 4,
        "pci-ecam card status": 1,
        "pci-ecam no function": 1,
    }


def test_names_of_registers() -> None:
    table = Registers({0: ("RBR", "THR"), 1: "IER", 4: "", 8: "wide"})
    assert [table(at, write) for at, write in ((0, False), (0, True), (1, True), (3, False))] == [
        "RBR",
        "THR",
        "IER",
        "IER+2",
    ]
    assert table(5, False) == "" and table(11, False) == "wide+3"
    assert Registers({4: "x"})(0, False) == ""


def test_between_two_snapshots(board: Any) -> None:
    """The difference has only the exits in between, and no line that did not change."""
    vcpu = vcpu_of(board)
    board.read(PIO, 0x3000, 1)
    board.read(PIO, 0x3001, 1)
    before = [vcpu.snapshot()]
    board.read(PIO, 0x3000, 1)
    board.read(PIO, 0x3002, 1)
    after = [vcpu.snapshot()]
    between = Ledger(after, before, board.bus)
    assert {line.addr: line.count for line in between.lines} == {0x3000: 1, 0x3002: 1}
    assert between.total == 2
    assert Ledger(after, [], board.bus).total == 4
    assert Ledger(after, after, board.bus).lines == []


@pytest.mark.parametrize(("queues", "mq", "control"), [(1, False, 2), (4, False, 2), (4, True, 8)])
def test_kicks_of_the_control_queue_are_told_apart(queues: Any, mq: Any, control: Any) -> None:
    """5.1.2: the control queue's index depends on the negotiated features. The latest negotiation
    counts.
    """
    with Board() as board:
        device = NetDevice(
            "net0", board.memory, EmulatedNet(cable := Cable()), cable, bytes(6), pairs=queues
        )
        transport = VirtioPci(cast("Vm", board.vm), board.bus, device, 0x020000, notify="exit")
        slot = board.add(transport).slot
        bits = 1 << virtio_net.VIRTIO_NET_F_CTRL_VQ | (1 << virtio_net.VIRTIO_NET_F_MQ if mq else 0)
        board.config_write(slot, 4, 2, 2)
        base = board.config_read(slot, 0x10) & ~0xF
        for index in range(2 * queues + 1):
            board.write(MMIO, base + 0x3000 + 4 * index, 2, index)
        device.negotiated = bits
        found = names(board)
        assert found[f"net0 queue {control} notify (control)"] == 1
        assert sum("(control)" in name for name in found) == 1
        assert all(f"net0 queue {i} notify" in found for i in range(2 * queues + 1) if i != control)
        lines = Ledger.of([vcpu_of(board)], board.bus).lines
        assert sum(line.count for line in lines if line.role == "notify") == 2 * queues
        device.negotiated = 0
        assert not any("(control)" in name for name in names(board))


def test_phases_of_a_card_whose_data_path_was_replaced(board: Any) -> None:
    """Counters that a new data path starts again count from 0. Counters that the new data path
    lacks are left out.
    """
    vcpu = vcpu_of(board)
    vcpu.index, vcpu.stats = 0, None
    accounts = SimpleNamespace(bus=board.bus, phases={"vmm": 0})
    begin = Snapshot(
        "command",
        10,
        [vcpu],
        None,
        {},
        {"net0": {"rx_packets": 100, "rx_kicks": 9, "parked_ms": 5}},
    )
    end = Snapshot(
        "end", 20, [vcpu], None, {}, {"net0": {"rx_packets": 30, "tx_packets": 4, "parked_ms": 7}}
    )
    phase = Phase("command", cast("MachineAccounts", accounts), begin, end)
    assert phase.counters == {"net0": {"rx_packets": 30, "tx_packets": 4, "parked_ms": 2}}
    metrics = phase.metrics()
    assert metrics["packets"] == 34 and metrics["kicks"] is None and metrics["kvm_exits"] is None
