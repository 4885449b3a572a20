"""Exits, KVM's statistics and packets of each phase of a run, so that boot does not blur the
workload.

The guest's init reports where a phase begins (guest/pyvmm_port.h). At that point the machine takes
a snapshot of its counters, in the vCPU's thread; everything else is computed when somebody asks for
it. The exit by which init reports a point belongs to the phase that ends there.
"""

from __future__ import annotations

from pyvmm.exits.accounts import PHASES
from pyvmm.exits.ledger import Ledger
from pyvmm.exits.snapshot import sums

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.exits.snapshot import Numbers, Snapshot

#: The name of the whole run.
ALL = "all"
#: KVM's name of a statistic -> ours. The values are summed over the vCPUs.
KVM_METRICS = {"exits": "kvm_exits", "halt_exits": "halt", "irq_injections": "irq_injections"}
#: Our name -> the data paths' counters that it sums up; None if one data path does not count them.
COUNTER_METRICS = {
    "kicks": ("rx_kicks", "tx_kicks"),
    "interrupts": ("rx_calls", "tx_calls"),
    "packets": ("rx_packets", "tx_packets"),
    "bytes": ("rx_bytes", "tx_bytes"),
}


class Phase:
    """What happened between two snapshots.

    :param begin: None for the start of the machine.
    :ivar begin, end: CLOCK_MONOTONIC, ns.
    :ivar kvm: the increase of each of KVM's cumulative statistics per group, without statistics
        that did not change; None if KVM has none. :ivar counters: the increase of each card's
        counters.
    """

    def __init__(
        self, name: str, accounts: MachineAccounts, begin: Snapshot | None, end: Snapshot
    ) -> None:
        self.name = name
        self.begin, self.end = begin.time if begin else accounts.phases["vmm"], end.time
        self.ledger = Ledger(end.ledgers, begin.ledgers if begin else [], accounts.bus)
        self.kvm: Numbers | None = None
        now = end.stats
        if now is not None:
            increase = sums(now, (begin.stats if begin else None) or {}, -1)
            self.kvm = {
                group: {name: n for name, n in v.items() if n} for group, v in increase.items()
            }
        before = begin.counters if begin else {}
        self.counters = {
            name: {
                key: _increase(before.get(name, {}).get(key, 0), value)
                for key, value in now.items()
            }
            for name, now in end.counters.items()
        }

    def metrics(self) -> dict[str, int | None]:
        """The figures that budgets limit, by name; None if nothing counts a figure
        (docs/budgets.md).
        """
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
            cards = self.counters.values()
            counted = self.counters and all(name in c for c in cards for name in names)
            out[ours] = sum(c[name] for c in cards for name in names) if counted else None
        return out

    def as_dict(self, accounts: MachineAccounts) -> dict[str, object]:
        """The phase for JSON (docs/report.md)."""
        start = accounts.phases["vmm"]
        return {
            "name": self.name,
            "from_s": round((self.begin - start) / 1e9, 6),
            "to_s": round((self.end - start) / 1e9, 6),
            "metrics": self.metrics(),
            "exits": self.ledger.as_dict(),
            "kvm": self.kvm,
            "nets": {
                card: {key: n for key, n in counters.items() if n}
                for card, counters in self.counters.items()
            },
        }


def _increase(before: int, now: int) -> int:
    """The increase of a counter. A counter that is smaller than before belongs to another data
    path, which has started at 0.
    """
    return now - before if now >= before else now


def phases_of(accounts: MachineAccounts) -> list[Phase]:
    """The phases so far, in order. The last one ends now, or with the machine."""
    return [Phase(name, accounts, begin, end) for name, begin, end in _spans(accounts)]


def phase(accounts: MachineAccounts, name: str) -> Phase | None:
    """The phase ``name``, or the whole run for ``all``; None if the guest did not reach it."""
    if name == ALL:
        return Phase(ALL, accounts, None, accounts.snapshot("end"))
    return next(
        (Phase(n, accounts, begin, end) for n, begin, end in _spans(accounts) if n == name), None
    )


def _spans(accounts: MachineAccounts) -> list[tuple[str, Snapshot | None, Snapshot]]:
    """Name, begin (None for the start of the machine) and end of each phase."""
    taken = list(accounts.snapshots)
    begins: list[Snapshot | None] = [None, *taken]
    ends = [*taken, accounts.snapshot("end")]
    names = [PHASES[begin.name if begin else "start"] for begin in begins]
    return list(zip(names, begins, ends, strict=True))
