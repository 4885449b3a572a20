"""The faults on demand of a card whose frames pass a tap and no worker of pyvmm: by tc(8)."""

from __future__ import annotations

import threading
import time

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.faulttc import shapes
from pyvmm.hostnet.traffic import WAYS, Tc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.faultopt import FaultRule
    from pyvmm.hostnet.netns import Namespace
    from pyvmm.hostnet.tap import Tap
    from pyvmm.kvm.recorder import Scope


#: Looks that follow one another faster, in ns, share a step of the trace: the recorder's list is
#: bounded, and somebody may ask for the counters all the time.
APART_NS = 1_000_000_000


class TapFaults:
    """Has the members of ``datapath.impair.ImpairPoint`` that a card uses. Any thread.

    :param tap: lent. :param namespace: of our own, with the tap in it, lent; or None.
    :param recorder: gets, per way, what tc has counted between two looks, and what a change of
        rules has thrown away; lent. For tc tells neither which frames these were nor when.
    """

    #: tc takes no seed.
    seeded = False

    def __init__(
        self, tap: Tap, namespace: Namespace | None, recorder: Scope | None = None
    ) -> None:
        self._tap, self._tc = tap, Tc(tap.name, namespace)
        self._recorder = recorder
        self._recorded = 0  # when the counters in force began, or were recorded last; ns
        self._known: dict[str, int] = {}  # as recorded last
        self._talk = threading.Lock()  # held while tc runs; guards changes of:
        self._state = _State((), {}, {})
        self._there = False  # whether qdiscs of ours may be at the tap

    @property
    def active(self) -> bool:
        """Whether there are rules."""
        return bool(self._state.rules)

    def set(self, rules: Sequence[FaultRule], seed: int = 0) -> None:
        """Have these rules, and no others, from now on. Frames that wait are thrown away.

        :raises UsageError: tc cannot do that, or the tap has a qdisc of somebody else's; nothing
            has changed. :raises HostError: there is no tc, or it refuses; then there are no rules.
        """
        wanted = shapes(rules, f"no such fault on tap {self._tap.name}", self._tap.mtu)
        with self._talk:
            if not wanted and not self._there:
                return
            self._look()
            was, self._there = self._there, True
            try:
                self._tc.set(wanted)
            except UsageError:
                self._there = was
                raise
            except BaseException:
                self._fold(())
                raise
            self._there = bool(wanted)
            self._fold(tuple(rules))

    def counters(self) -> dict[str, int]:
        """What tc had counted at the last ``look``: ``rx_fault_loss`` and others. Never waits for
        another program.
        """
        return self._state.sum()

    def look(self) -> None:
        """Ask tc. Nothing if there are no rules. No vCPU's thread."""
        with self._talk:
            self._look()

    def report(self) -> dict[str, object]:
        """The rules in force, and how many frames waited at the last ``look``; for JSON. Never
        waits.
        """
        state = self._state
        return {
            "rules": [str(rule) for rule in state.rules],
            "seed": None,
            "waiting": {way: state.now.get(way, {}).get("waiting", 0) for way in WAYS},
        }

    def clear(self) -> None:
        """Nothing: the tap's queues go on, whoever serves the rings."""

    def close(self) -> None:
        """Take all away, before the tap is closed. What was counted stays. A second call does
        nothing.
        """
        with self._talk:
            if self._there:
                self._look()
                self._there = False
                self._fold(())
                try:
                    self._tc.set({})
                except PyvmmError:
                    pass  # the tap has gone, and its qdiscs with it

    def _look(self) -> None:
        """As ``look``; with ``_talk``."""
        state = self._state
        if state.rules:
            try:
                now = self._tc.look()
            except PyvmmError:
                return  # the tap has gone: as counted last
            self._state = state.looked(now or state.now)
            if time.monotonic_ns() - self._recorded >= APART_NS:
                self._record(state.rules)

    def _fold(self, rules: tuple[FaultRule, ...]) -> None:
        """Have other rules, after a look; with ``_talk``."""
        before, self._state = self._state.rules, self._state.folded(rules)
        self._record(before)

    def _record(self, rules: tuple[FaultRule, ...]) -> None:
        """What was counted since the last record, for the trace. :param rules: in force then."""
        begin, self._recorded = self._recorded, time.monotonic_ns()
        before, self._known = self._known, self._state.sum()
        if self._recorder is None:
            return
        for way in WAYS:
            front = f"{way}_fault_"
            since = {
                name.removeprefix(front): n - before.get(name, 0)
                for name, n in self._known.items()
                if name.startswith(front) and n != before.get(name, 0)
            }
            if since:
                words = [str(r) for r in rules if r.ways >> WAYS.index(way) & 1]
                args: dict[str, object] = {"way": way, **since, "rules": " ".join(words)}
                self._recorder.step("faults by tc", begin, args, end=self._recorded)


class _State:
    """What others may see at any time: replaced as a whole, and never changed.

    :param past: counters of former rules. :param now: of these, by way, as looked at last.
    """

    __slots__ = ("now", "past", "rules")

    def __init__(
        self, rules: tuple[FaultRule, ...], past: dict[str, int], now: dict[str, dict[str, int]]
    ) -> None:
        self.rules, self.past, self.now = rules, past, now

    def looked(self, now: dict[str, dict[str, int]]) -> _State:
        """With newer counters of the same rules. The kernel throws away what waits, and counts
        nothing, if the tap has fewer queues than before: those frames have been seen all the same.
        """
        past = dict(self.past)
        for way, counted in now.items():
            gone = _seen(self.now.get(way, {})) - _seen(counted)
            if gone > 0:
                for name in ("frames", "cleared"):
                    key = f"{way}_fault_{name}"
                    past[key] = past.get(key, 0) + gone
        return _State(self.rules, past, now)

    def sum(self) -> dict[str, int]:
        """The counters."""
        total = dict(self.past)
        for way, counted in self.now.items():
            rule = next((r for r in self.rules if r.ways >> WAYS.index(way) & 1), None)
            if rule is None:
                continue
            for name, n in (
                ("frames", _seen(counted)),
                (_lost(rule), counted["dropped"]),
                ("rate", counted["overlimits"]),
            ):
                key = f"{way}_fault_{name}"
                if n or name != "rate":
                    total[key] = total.get(key, 0) + n
        return total

    def folded(self, rules: tuple[FaultRule, ...]) -> _State:
        """With other rules, and what was counted up to now as the past."""
        past = self.sum()
        for way, counted in self.now.items():
            key = f"{way}_fault_cleared"
            past[key] = past.get(key, 0) + counted["waiting"]
        return _State(rules, past, {})


def _seen(counted: dict[str, int]) -> int:
    """Frames that have come to a queue, of what tc counts there."""
    return sum(counted.get(name, 0) for name in ("sent", "dropped", "waiting"))


def _lost(rule: FaultRule) -> str:
    """The counter for frames that tc has dropped: tc does not say why."""
    words = {word.partition("=")[0] for word in rule.words}
    waits = words & {"delay", "jitter", "rate", "reorder"}
    if "loss" in words:
        return "loss_or_full" if waits else "loss"
    return "full"
