"""A machine's accounts without a machine: points, snapshots, and counters that cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm.boot import BootState
from pyvmm.bus import PIO
from pyvmm.errors import HostError
from pyvmm.exits.accounts import PHASES, MachineAccounts
from pyvmm.exits.budget import Budget
from pyvmm.exits.phases import phases_of
from pyvmm.exits.report import build
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.outcome import Outcome
from tests.pci_guest import Board

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm


class Card:
    """A card that counts, or cannot."""

    name, mode = "net0", "emulated"

    def __init__(self) -> None:
        self.packets = 0
        self.error: Exception | None = None

    def counters(self) -> dict[str, int]:
        if self.error is not None:
            raise self.error
        return {"rx_packets": self.packets, "tx_packets": 0}

    def report(self) -> dict[str, object]:
        return {"name": self.name}


class Rig:
    """One vCPU, one card, no statistics of KVM's."""

    def __init__(self, board: Board) -> None:
        self.board = board
        vcpu = Vcpu.__new__(Vcpu)
        vcpu.c, vcpu.index, vcpu.stats = board.vcpu, 0, None
        self.card = Card()
        self.accounts = MachineAccounts(
            SimpleNamespace(extension=lambda name: 0),  # type: ignore[arg-type]
            cast("Vm", board.vm),
            board.bus,
            [vcpu],
            [self.card],
            threading.RLock(),
            5,
        )

    def work(self, exits: int, packets: int) -> None:
        for _ in range(exits):
            self.board.read(PIO, 0x9999, 1)
        self.card.packets += packets

    def phases(self) -> dict[str, tuple[int, int]]:
        """Exits and packets of each phase."""
        return {
            phase.name: (phase.ledger.total, phase.metrics()["packets"] or 0)
            for phase in phases_of(self.accounts)
        }

    def report(self, outcome: Outcome | None = None) -> dict[str, Any]:
        return build(
            self.accounts,
            outcome,
            memory_bytes=1 << 20,
            cpu="host",
            boot=BootState("long64", "nothing", 0, {}, 0),
            cmdline="quiet",
            streams=(),
        )


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Board() as board:
        yield Rig(board)


def test_a_snapshot_at_each_point_that_begins_a_phase_and_at_no_other(rig: Rig) -> None:
    points = ("init", "net_up", "command", "command_end", "poweroff", "end")
    for n, point in enumerate(points):
        rig.work(1, n)
        rig.accounts.reach(point)
    taken = [snapshot.name for snapshot in rig.accounts.snapshots]
    assert taken == list(PHASES)[1:] == ["init", "command", "command_end"]
    assert list(rig.accounts.phases) == ["vmm", *points]
    assert rig.phases() == {"boot": (1, 0), "init": (2, 3), "command": (1, 3), "shutdown": (2, 9)}
    assert rig.accounts.notes == []


def test_only_the_first_time_counts(rig: Rig) -> None:
    rig.accounts.reach("init")
    first = rig.accounts.phases["init"]
    rig.accounts.reach("init")  # a reboot
    assert rig.accounts.phases["init"] == first and len(rig.accounts.snapshots) == 1


def test_a_removed_card_and_the_next_of_its_name_are_counted(rig: Rig) -> None:
    """The sums of a name never shrink, so that no phase loses packets."""
    rig.work(0, 5)
    rig.accounts.reach("init")
    rig.work(0, 3)
    rig.accounts.removed(rig.card)
    cards = rig.accounts.nets
    rig.accounts.nets = []
    assert rig.phases() == {"boot": (0, 5), "init": (0, 3)}
    rig.card.packets = 2
    rig.accounts.nets = cards
    assert rig.phases() == {"boot": (0, 5), "init": (0, 5)}


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), HostError("no counters")])
def test_a_snapshot_that_cannot_be_made_is_told(rig: Rig, error: Exception) -> None:
    rig.accounts.reach("init")
    rig.work(3, 7)
    rig.card.error = error
    rig.accounts.reach("command")
    rig.card.error = None
    rig.work(4, 9)
    rig.accounts.reach("command_end")
    assert rig.phases() == {"boot": (0, 0), "init": (7, 16), "shutdown": (0, 0)}
    assert "command" in rig.accounts.phases, "the time is known all the same"
    (note,) = rig.report()["notes"]
    why = "Too many open files" if isinstance(error, OSError) else "no counters"
    assert note == (
        f"the counters at command could not be read ({why}): what phase command counted is in the "
        "phase before it"
    )
    assert not Budget("command.packets>=0").check(rig.accounts).held, "that phase is not there"


def test_the_report_of_a_machine_that_runs_and_that_has_ended(rig: Rig) -> None:
    rig.work(2, 1)
    running = rig.report()
    assert running["outcome"] is None and running["notes"] == [] and running["cpus"] == 1
    outcome = Outcome("poweroff")
    outcome.status = 3
    rig.accounts.reach("end")
    ended = rig.report(outcome)
    assert ended["outcome"] == {"kind": "poweroff", "status": 3, "detail": ""}
    assert next(iter(ended["phases_s"])) == "vmm"
    assert ended["nets"] == [{"name": "net0"}]


def test_restarts_are_counted_and_what_was_counted_stays(rig: Rig) -> None:
    rig.work(2, 5)
    rig.accounts.restart()
    rig.work(1, 0)
    assert rig.accounts.reboots == 1 and rig.accounts.old_stats == []
    assert rig.phases() == {"boot": (3, 5)}
    assert rig.accounts.kvm_stats() is None and rig.accounts.kvm_stats_schemas() is None
