"""Exits, KVM's statistics and packets of each phase of a run, so that boot does not blur the workload.

The guest's init marks the phases (guest/pyvmm_port.h); at each mark the machine copies its counters, in the vCPU's thread, and
everything else is done when somebody asks. A mark's own exit is the last of the phase that it ends.
"""

from __future__ import annotations

from pyvmm.exits.ledger import Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.kvm.stats import Stats
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.machine import Machine

    Numbers = dict[str, dict[str, int]]

#: mark (machine.PHASES) -> the phase that it begins
PHASES = {"start": "boot", "init": "init", "command": "command", "command_end": "shutdown"}
#: the whole run
ALL = "all"
#: KVM's name -> ours, summed over the vCPUs
KVM_METRICS = {"exits": "kvm_exits", "halt_exits": "halt", "irq_injections": "irq_injections"}
#: ours -> the data paths' counters that it sums up; None where one of them does not count
COUNTER_METRICS = {
    "kicks": ("rx_kicks", "tx_kicks"),
    "interrupts": ("rx_calls", "tx_calls"),
    "packets": ("rx_packets", "tx_packets"),
    "bytes": ("rx_bytes", "tx_bytes"),
}


class Mark:
    """All counters at a moment.

    :ivar time: CLOCK_MONOTONIC, ns. :ivar counters: of each card's data path.
    :param vm: the VM's statistics, None where KVM has none. :param past: what VMs before a reboot had counted.
    """

    __slots__ = ("_past", "_raw", "counters", "name", "snapshots", "time")

    def __init__(
        self,
        name: str,
        time: int,
        vcpus: Sequence[Vcpu],
        vm: Stats | None,
        past: Numbers,
        counters: list[dict[str, int]],
    ) -> None:
        self.name, self.time, self.counters = name, time, counters
        self.snapshots = [vcpu.snapshot() for vcpu in vcpus]
        self._past = past
        groups = {"vm": vm} | {f"vcpu{vcpu.index}": vcpu.stats for vcpu in vcpus}
        self._raw = {group: (stats, stats.raw()) for group, stats in groups.items() if stats is not None}

    @property
    def stats(self) -> Numbers | None:
        """KVM's statistics that only grow, by group: ``vm``, ``vcpu0``, ...; None where KVM has none."""
        now = {group: stats.growing(raw) for group, (stats, raw) in self._raw.items()}
        return _sums(now, self._past, 1) if now else None


class Phase:
    """What happened between two marks.

    :ivar begin, end: CLOCK_MONOTONIC, ns. :ivar kvm: increases of KVM's cumulative statistics, a group each, without those
        that stayed the same. :ivar counters: increases of each card's.
    """

    def __init__(self, name: str, machine: Machine, begin: Mark | None, end: Mark, start: int) -> None:
        self.name = name
        self.begin, self.end = begin.time if begin else start, end.time
        self.ledger = Ledger.between(begin.snapshots if begin else [], end.snapshots, machine.bus)
        self.kvm: Numbers | None = None
        now = end.stats
        if now is not None:
            increase = _sums(now, (begin.stats if begin else None) or {}, -1)
            self.kvm = {group: {name: n for name, n in v.items() if n} for group, v in increase.items()}
        self.counters = [
            {key: value - (begin.counters[i].get(key, 0) if begin else 0) for key, value in now.items()}
            for i, now in enumerate(end.counters)
        ]

    def metrics(self) -> dict[str, int | None]:
        """The figures that budgets are about, by name; None where nobody counts it (docs/budgets.md)."""
        lines = self.ledger.lines
        out: dict[str, int | None] = {"user_exits": self.ledger.total}
        out["pio"] = sum(line.count for line in lines if line.reason == "io")
        out["mmio"] = sum(line.count for line in lines if line.reason == "mmio")
        for role in ("notify", "control"):
            out[role] = sum(line.count for line in lines if line.role == role)
        vcpus = None if self.kvm is None else [v for group, v in self.kvm.items() if group != "vm"]
        for theirs, ours in KVM_METRICS.items():
            out[ours] = None if vcpus is None else sum(v.get(theirs, 0) for v in vcpus)
        for ours, names in COUNTER_METRICS.items():
            counted = self.counters and all(name in c for c in self.counters for name in names)
            out[ours] = sum(c[name] for c in self.counters for name in names) if counted else None
        return out

    def as_dict(self, machine: Machine) -> dict[str, object]:
        """For JSON (docs/report.md)."""
        start = machine.phases["vmm"]
        return {
            "name": self.name,
            "from_s": round((self.begin - start) / 1e9, 6),
            "to_s": round((self.end - start) / 1e9, 6),
            "metrics": self.metrics(),
            "exits": self.ledger.as_dict(),
            "kvm": self.kvm,
            "nets": {
                nic.name: {key: n for key, n in counters.items() if n}
                for nic, counters in zip(machine.nets, self.counters, strict=True)
            },
        }


def _sums(numbers: Numbers, others: Numbers, sign: int) -> Numbers:
    """``numbers`` plus or minus the ``others`` of the same names."""
    return {
        group: {name: n + sign * others.get(group, {}).get(name, 0) for name, n in values.items()}
        for group, values in numbers.items()
    }


def phases_of(machine: Machine) -> list[Phase]:
    """The phases so far, in order; the last one ends now, or with the machine."""
    start = machine.phases["vmm"]
    marks: list[Mark | None] = [None, *machine.marks]
    ends = [*machine.marks, machine.mark_now("end")]
    return [
        Phase(PHASES[begin.name if begin else "start"], machine, begin, end, start)
        for begin, end in zip(marks, ends, strict=True)
    ]


def phase(machine: Machine, name: str) -> Phase | None:
    """One phase, or ``all``; None where it was not reached."""
    if name == ALL:
        return Phase(ALL, machine, None, machine.mark_now("end"), machine.phases["vmm"])
    return next((p for p in phases_of(machine) if p.name == name), None)
