"""The faults on demand of a card whose frames pass a tap and no worker of pyvmm: by tc(8)."""

from __future__ import annotations

import threading

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.faulttc import shapes
from pyvmm.hostnet.traffic import WAYS, Tc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.faultopt import FaultRule
    from pyvmm.hostnet.netns import Namespace
    from pyvmm.hostnet.tap import Tap


class TapFaults:
    """Has the members of ``datapath.impair.ImpairPoint`` that a card uses. Any thread.

    :param tap: lent. :param namespace: of our own, with the tap in it, lent; or None.
    """

    #: tc takes no seed.
    seeded = False

    def __init__(self, tap: Tap, namespace: Namespace | None) -> None:
        self._tap, self._tc = tap, Tc(tap.name, namespace)
        self._lock = threading.Lock()
        self._rules: Sequence[FaultRule] = ()
        self._past: dict[str, int] = {}
        self._now: dict[str, dict[str, int]] = {}  # as looked at last

    @property
    def active(self) -> bool:
        """Whether there are rules."""
        return bool(self._rules)

    def set(self, rules: Sequence[FaultRule], seed: int = 0) -> None:
        """Have these rules, and no others, from now on. Frames that wait are thrown away.

        :raises UsageError: tc cannot do that, or the tap has a qdisc of somebody else's; nothing
            has changed. :raises HostError: there is no tc, or it refuses; then there are no rules.
        """
        wanted = shapes(rules, f"no such fault on tap {self._tap.name}", self._tap.mtu)
        with self._lock:
            if not wanted and not self._rules:
                return
            self._fold()
            old, self._rules = self._rules, ()
            try:
                self._tc.set(wanted)
            except UsageError:
                self._rules = old
                raise
            self._rules = list(rules)

    def counters(self) -> dict[str, int]:
        """What tc had counted at the last ``look``: ``rx_fault_loss`` and others. Never waits for
        another program.
        """
        with self._lock:
            return self._sum()

    def look(self) -> None:
        """Ask tc. Nothing if there are no rules. No vCPU's thread."""
        with self._lock:
            self._look()

    def report(self) -> dict[str, object]:
        """The rules in force, and how many frames waited at the last ``look``; for JSON."""
        with self._lock:
            return {
                "rules": [str(rule) for rule in self._rules],
                "seed": None,
                "waiting": {way: self._now.get(way, {}).get("waiting", 0) for way in WAYS},
            }

    def clear(self) -> None:
        """Nothing: the tap's queues go on, whoever serves the rings."""

    def close(self) -> None:
        """Take all away, before the tap is closed. What was counted stays. A second call does
        nothing.
        """
        with self._lock:
            if self._rules:
                self._fold()
                self._rules = ()
                try:
                    self._tc.set({})
                except PyvmmError:
                    pass  # the tap has gone, and its qdiscs with it

    # --- under the lock ---------------------------------------------------------------------------

    def _look(self) -> None:
        if self._rules:
            try:
                self._now = self._tc.look() or self._now
            except PyvmmError:
                pass  # the tap has gone: as counted last

    def _sum(self) -> dict[str, int]:
        total = dict(self._past)
        for way, counted in self._now.items():
            rule = next((r for r in self._rules if r.ways >> WAYS.index(way) & 1), None)
            if rule is None:
                continue
            seen = counted["sent"] + counted["dropped"] + counted["waiting"]
            for name, n in (
                ("frames", seen),
                (_lost(rule), counted["dropped"]),
                ("rate", counted["overlimits"]),
            ):
                key = f"{way}_fault_{name}"
                if n or name != "rate":
                    total[key] = total.get(key, 0) + n
        return total

    def _fold(self) -> None:
        """The rules are about to go."""
        self._look()
        past = self._sum()
        for way, counted in self._now.items():
            key = f"{way}_fault_cleared"
            past[key] = past.get(key, 0) + counted["waiting"]
        self._past, self._now = past, {}


def _lost(rule: FaultRule) -> str:
    """The counter for frames that tc has dropped: tc does not say why."""
    words = {word.partition("=")[0] for word in rule.words}
    waits = words & {"delay", "jitter", "rate", "reorder"}
    if "loss" in words:
        return "loss_or_full" if waits else "loss"
    return "full"
