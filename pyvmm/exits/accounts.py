"""The accounts of a machine: everything that it counts, and how far its guest has come.

Budgets, phases, reports, traces and the control socket read the accounts; the machine keeps them.
The methods here are quick, because the guest may wait for them. Sums, differences and names are
made later, when somebody asks for them (``exits.phases``, ``exits.report``).
"""

from __future__ import annotations

import time

from pyvmm.errors import PyvmmError
from pyvmm.exits.snapshot import Snapshot
from pyvmm.kvm.stats import Stats

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence
    from typing import Any, Protocol

    from pyvmm.bus import Bus
    from pyvmm.exits.ledger import Ledger
    from pyvmm.exits.snapshot import Numbers
    from pyvmm.kvm import Kvm
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.kvm.vm import Vm

    class Card(Protocol):
        """A network card, as the accounts see it."""

        @property
        def name(self) -> str:
            """The card's name: ``net0``, ``net1``, ..."""

        @property
        def mode(self) -> str:
            """The name of the data path that serves the card."""

        def counters(self) -> dict[str, int]:
            """The sums of the counters of all data paths that the card has had. Any thread."""

        def report(self) -> dict[str, object]:
            """The card's part of the report, for JSON (docs/report.md)."""

    class Device(Protocol):
        """A device that is no network card, as the accounts see it."""

        def report(self) -> dict[str, object]:
            """The device's part of the report, likewise."""


#: A point in the run that begins a phase -> the phase. The guest's init reports the points
#: (guest/pyvmm_port.h); the first point is the machine's start.
PHASES = {"start": "boot", "init": "init", "command": "command", "command_end": "shutdown"}
OLD_STATS = 16  # how many VMs before the present one keep their statistics


class MachineAccounts:
    """What a machine has counted. The accounts borrow all parts of the machine that they read.

    :param lock: the machine's I/O lock, held while counters are copied.
    :param began: when the machine's description was read; CLOCK_MONOTONIC, ns.
    :ivar phases: a point in the run -> when the guest first came there, likewise in ns.
    :ivar snapshots: all counters, once at each point that begins a phase, in order.
    :ivar notes: which counters could not be read, as sentences for people.
    :ivar reboots: how often the machine has started over.
    :ivar old_stats: KVM's statistics of the VMs before each restart, the latest ``OLD_STATS``.
    """

    def __init__(
        self,
        kvm: Kvm,
        vm: Vm,
        bus: Bus,
        vcpus: Sequence[Vcpu],
        nets: Sequence[Card],
        lock: threading.RLock,
        began: int,
        *,
        devices: Sequence[Device] = (),
    ) -> None:
        self._kvm, self._vm, self._lock = kvm, vm, lock
        self.bus, self.vcpus, self.nets, self.devices = bus, vcpus, nets, devices
        self.phases = {"vmm": began}
        self.snapshots: list[Snapshot] = []
        self.notes: list[str] = []
        self.reboots = 0
        self.old_stats: list[dict[str, Any]] = []
        self._stats: Stats | None = None  # the present VM's, opened by the first request
        self._past: Numbers = {}  # the sums of the VMs before a restart
        self._removed: Numbers = {}  # the counters of cards that have been removed, by name

    def reach(self, point: str) -> None:
        """Note that the guest has come to ``point``; only the first time counts."""
        if point in self.phases:
            return
        self.phases[point] = time.monotonic_ns()
        if point in PHASES:
            try:
                self.snapshots.append(self.snapshot(point))
            except (PyvmmError, OSError) as e:  # this is no reason to end the machine
                why = e.strerror if isinstance(e, OSError) else e
                self.notes.append(
                    f"the counters at {point} could not be read ({why}): what phase "
                    f"{PHASES[point]} counted is in the phase before it"
                )

    def snapshot(self, name: str) -> Snapshot:
        """Copy all counters now. Any thread.

        :raises PyvmmError, OSError: a counter cannot be read.
        """
        with self._lock:
            return Snapshot(
                name,
                self.phases.get(name) or time.monotonic_ns(),
                self.vcpus,
                self._vm_stats(),
                self._past,
                self._counters(),
            )

    def _counters(self) -> Numbers:
        """What each card has counted, and the cards of its name before it."""
        out = {name: dict(counters) for name, counters in self._removed.items()}
        for nic in self.nets:
            now = out.setdefault(nic.name, {})
            _add(now, nic.counters())
        return out

    def removed(self, nic: Card) -> None:
        """Keep what a card has counted, which is about to leave ``nets``. The caller holds the
        lock.
        """
        _add(self._removed.setdefault(nic.name, {}), nic.counters())

    def ledger(self) -> Ledger:
        """The exits up to now. Any thread."""
        from pyvmm.exits.ledger import Ledger

        return Ledger.of(self.vcpus, self.bus)

    def restart(self) -> None:
        """Keep what the VM has counted, because the machine starts over with a new VM."""
        self.reboots += 1
        self.renew("reboot")

    def renew(self, why: str) -> None:
        """Keep what the VM has counted, because a new VM takes its place."""
        stats = self.kvm_stats()
        if stats is not None:  # the list is bounded: a guest may reboot forever
            self.old_stats = [*self.old_stats[1 - OLD_STATS :], stats]
        self._past = self.snapshot(why).stats or {}
        self.close()

    def close(self) -> None:
        """Release the VM's statistics. A second call does nothing."""
        stats, self._stats = self._stats, None
        if stats is not None:
            stats.close()

    # --- KVM's own statistics ---------------------------------------------------------------------

    def kvm_stats(self) -> dict[str, Any] | None:
        """KVM's binary statistics of the VM (``vm``) and its vCPUs (``vcpus``); None if the kernel
        has no such statistics. Any thread.
        """
        if not self._has_stats():
            return None
        with self._lock, Stats(self._vm.fileno()) as vm:  # a restart replaces both
            return {
                "vm": vm.read(),
                "vcpus": [v.stats.read() for v in self.vcpus if v.stats is not None],
            }

    def kvm_stats_schemas(self) -> dict[str, list[dict[str, object]]] | None:
        """The meaning of each statistic, for ``vm`` and ``vcpu``, in QEMU's schema
        (``Stats.schema``). Any thread.
        """
        if not self._has_stats():
            return None
        with self._lock, Stats(self._vm.fileno()) as vm:
            vcpu = self.vcpus[0].stats
            return {"vm": vm.schema, "vcpu": vcpu.schema if vcpu is not None else []}

    def _has_stats(self) -> bool:
        return bool(self._kvm.extension("KVM_CAP_BINARY_STATS_FD"))

    def _vm_stats(self) -> Stats | None:
        """The VM's statistics, which stay open after the first call. The caller holds the lock."""
        if self._stats is None and self.vcpus[0].stats is not None:
            self._stats = Stats(self._vm.fileno())
        return self._stats


def _add(total: dict[str, int], counters: dict[str, int]) -> None:
    """Add counters to others of the same names."""
    for key, value in counters.items():
        total[key] = total.get(key, 0) + value
