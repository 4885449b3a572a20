"""What switches of the data path did, step by step, and what each mode has done for a card."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal

    from pyvmm.datapath.base import HandOverTimes
    from pyvmm.exits.ledger import Ledger

    SwitchOutcome = Literal["switched", "rolled-back", "fallback", "refused", "failed"]

#: Queue index modulo 2 -> the direction as the guest sees it.
WAYS = ("rx", "tx")


class Step:
    """One step; a context manager that notes how long it took, also if it fails.

    :ivar at_ns: when the step began, monotonic. :ivar ns: how long it took.
    """

    __slots__ = ("at_ns", "name", "ns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_ns = self.ns = 0

    def begin(self) -> Step:
        """The step begins now."""
        self.at_ns = time.monotonic_ns()
        return self

    def end(self) -> None:
        """The step is over. Any thread."""
        self.ns = time.monotonic_ns() - self.at_ns

    def __enter__(self) -> Step:
        return self.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class SwitchReport:
    """One switch of a card, or the attempt.

    :ivar nic: name of the card. :ivar source, target: modes, from and to. :ivar mode: the one in
        force after it.
    :ivar outcome: ``switched``; ``rolled-back``, the old path goes on; ``fallback``, neither could
        and emulation goes on; ``refused``, before anything was touched; ``failed``, nothing could
        be started and the guest has to reset the device.
    :ivar reason: why it is not ``switched``, in words. :ivar traceback: Python's, if the reason is
        a bug of pyvmm; else empty.
    :ivar gap_ns: ``rx`` and ``tx``: from just before the old path was asked to let go of a ring of
        that direction to the moment that the next path served it, the longest of the queue pairs.
        Empty where no ring was running.
    :ivar pending: queue index -> descriptor chains that were available and not taken when the ring
        changed hands.
    :ivar stale: frames found waiting at a tap that had not been the card's place, and thrown away.
    :ivar steps: in order. :ivar exits: returns of KVM_RUN ``before`` the switch and ``after`` it,
        all vCPUs.
    """

    def __init__(self, nic: str, source: str, target: str) -> None:
        self.nic, self.source, self.target = nic, source, target
        self.mode = source
        self.at_ns = time.monotonic_ns()
        self.outcome: SwitchOutcome = "refused"
        self.reason = self.traceback = ""
        self.gap_ns: dict[str, int] = {}
        self.pending: dict[int, int] = {}
        self.stale = 0
        self.steps: list[Step] = []
        self.exits: dict[str, int] = {}
        self._asked: dict[int, int] = {}

    def step(self, name: str) -> Step:
        """The next step, for ``with``."""
        self.steps.append(Step(name))
        return self.steps[-1]

    def parked(
        self, indices: list[int], since: int, asked: dict[int, int], pending: dict[int, int]
    ) -> None:
        """The old path has let go of virtqueues ``indices``.

        :param since: monotonic ns, before the old path was asked for any of them.
        :param asked: likewise per virtqueue. :param pending: see the attribute.
        """
        self._asked = {index: max(since, asked.get(index, 0)) for index in indices}
        self.pending = pending

    @property
    def rings(self) -> list[int]:
        """The queues that changed hands."""
        return sorted(self._asked)

    def wait_served(self, times: HandOverTimes, patience: float) -> None:
        """Note when the path in force began with the virtqueues: at most ``patience`` seconds from
        now, since a worker's thread may be yet to run.
        """
        until = time.monotonic() + patience
        while not set(self._asked) <= set(times.began) and time.monotonic() < until:
            time.sleep(0.0005)
        for index, asked in self._asked.items():
            if index in times.began:
                way = WAYS[index % 2]
                self.gap_ns[way] = max(self.gap_ns.get(way, 0), times.began[index] - asked)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "nic": self.nic,
            "from": self.source,
            "to": self.target,
            "mode": self.mode,
            "outcome": self.outcome,
            "reason": self.reason,
            "traceback": self.traceback,
            "at_ns": self.at_ns,
            "gap_ns": dict(self.gap_ns),
            "pending": {str(queue): count for queue, count in self.pending.items()},
            "stale": self.stale,
            "steps": [{"name": step.name, "ns": step.ns} for step in self.steps],
            "exits": dict(self.exits),
        }

    def __repr__(self) -> str:
        tail = f": {self.reason}" if self.reason else ""
        return f"SwitchReport({self.nic} {self.source} -> {self.target}, {self.outcome}{tail})"


class ModeTotals:
    """What one mode has done for a card so far, over all the times that it was in force.

    :ivar times: how often the mode has been in force. :ivar ns: for how long in all.
    :ivar exits: returns of KVM_RUN of the whole machine meanwhile; ``by_device`` per device.
    :ivar counters: of the mode's data paths, summed.
    """

    def __init__(self) -> None:
        self.times = 0
        self.ns = 0
        self.exits = 0
        self.by_device: dict[str, int] = {}
        self.counters: dict[str, int] = {}

    def add(self, ns: int, before: Ledger | None, after: Ledger) -> None:
        """The mode was in force once more, between two states of the ledger (None: the start)."""
        self.times += 1
        self.ns += ns
        self.exits += after.total - (before.total if before is not None else 0)
        old = before.by_device() if before is not None else {}
        for device, count in after.by_device().items():
            if count > old.get(device, 0):
                self.by_device[device] = self.by_device.get(device, 0) + count - old.get(device, 0)

    def count(self, counters: dict[str, int]) -> None:
        """Add the counters of a data path that is done."""
        for name, value in counters.items():
            self.counters[name] = self.counters.get(name, 0) + value

    def copy(self) -> ModeTotals:
        """A copy, to which the caller adds what is not over yet."""
        other = ModeTotals()
        other.times, other.ns, other.exits = self.times, self.ns, self.exits
        other.by_device, other.counters = dict(self.by_device), dict(self.counters)
        return other

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "times": self.times,
            "seconds": round(self.ns / 1e9, 6),
            "exits": {"kvm_run_returns": self.exits, "by_device": self.by_device},
            "counters": self.counters,
        }
