"""What a switch of the data path did, step by step."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Literal

    from pyvmm.datapath.base import Vring

    SwitchOutcome = Literal["switched", "rolled-back", "fallback", "refused", "failed"]

#: Queue index modulo 2 -> the direction as the guest sees it.
WAYS = ("rx", "tx")


class Step:
    """One step; a context manager that notes how long it took, also where it fails."""

    __slots__ = ("_start", "name", "ns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ns = 0

    def __enter__(self) -> Step:
        self._start = time.monotonic_ns()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ns = time.monotonic_ns() - self._start


class SwitchReport:
    """One switch of a card, or the attempt.

    :ivar nic: name of the card. :ivar source, target: modes, from and to. :ivar mode: the one in
        force after it.
    :ivar outcome: ``switched``; ``rolled-back``, the old path goes on; ``fallback``, neither could
        and emulation goes on; ``refused``, before anything was touched; ``failed``, nothing could
        be started and the guest has to reset the device.
    :ivar reason: why it is not ``switched``, in words.
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
        self.reason = ""
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
        self, rings: list[Vring], since: int, asked: dict[int, int], pending: dict[int, int]
    ) -> None:
        """The old path has let go of ``rings``. :param since: ns, before it was asked. :param
        asked: the same ring by ring.
        """
        self._asked = {ring.index: max(since, asked.get(ring.index, 0)) for ring in rings}
        self.pending = pending

    @property
    def rings(self) -> list[int]:
        """The queues that changed hands."""
        return sorted(self._asked)

    def served(self, began: dict[int, int]) -> None:
        """The path in force has begun with these rings at these times, in ns."""
        for index, asked in self._asked.items():
            if index in began:
                way = WAYS[index % 2]
                self.gap_ns[way] = max(self.gap_ns.get(way, 0), began[index] - asked)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "nic": self.nic,
            "from": self.source,
            "to": self.target,
            "mode": self.mode,
            "outcome": self.outcome,
            "reason": self.reason,
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
