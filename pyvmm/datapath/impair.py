"""Where the faults on demand of a card meet the workers of its emulated data paths."""

from __future__ import annotations

import os
import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.faultopt import FaultRule

WAYS = ("rx", "tx")
#: Words of rules and their members in ``struct pv_impair_rule``.
CHANCES = {
    "chance": "chance",
    "loss": "loss",
    "duplicate": "duplicate",
    "reorder": "reorder",
    "corrupt": "corrupt",
    "truncate": "truncate",
    "extra-irq": "extra_irq",
    "reorder-used": "reorder_used",
}
TIMES = {
    "from": "from_ns",
    "until": "until_ns",
    "delay": "delay_ns",
    "jitter": "jitter_ns",
    "hold-irq": "hold_irq_ns",
    "hold-kick": "hold_kick_ns",
}
NUMBERS = ("after", "count", "queue", "burst")
#: ``keep`` of frames that are cut at random.
AT_RANDOM = 2**64 - 1
DEEDS = {
    lib.PV_DEED_LOSS: "loss",
    lib.PV_DEED_DUPLICATE: "duplicate",
    lib.PV_DEED_REORDER: "reorder",
    lib.PV_DEED_CORRUPT: "corrupt",
    lib.PV_DEED_DELAY: "delay",
    lib.PV_DEED_RATE: "rate",
    lib.PV_DEED_FULL: "full",
    lib.PV_DEED_HOLD_IRQ: "hold-irq",
    lib.PV_DEED_EXTRA_IRQ: "extra-irq",
    lib.PV_DEED_HOLD_KICK: "hold-kick",
    lib.PV_DEED_TRUNCATE: "truncate",
    lib.PV_DEED_REORDER_USED: "reorder-used",
    lib.PV_DEED_LATE_USED: "late-used",
}


def deeds(bits: int) -> list[str]:
    """The words for PV_DEED_* bits."""
    return [word for bit, word in DEEDS.items() if bits & bit]


class ImpairPoint:
    """The faults on demand of a card, and its present workers. A data path comes and goes; rules,
    counts and frames that wait stay. Any thread. Without rules, and if there never were any, there
    is nothing that a worker could look at.

    :cvar seeded: whether a seed makes the same frames have the same deeds.
    """

    seeded = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: Sequence[FaultRule] = ()
        self._seed, self._begun = 0, 0
        self._lines: dict[int, Any] = {}  # struct pv_impair *, owned, of each queue pair
        self._forms: dict[int, object] = {}  # what the frames that wait there are like
        self._workers: dict[int, Any] = {}
        self._past: dict[str, int] = {}  # counted until ``close``

    @property
    def active(self) -> bool:
        """Whether there are rules."""
        return bool(self._rules)

    def set(self, rules: Sequence[FaultRule], seed: int) -> None:
        """Have these rules, and no others, from now on. Frames that wait still go in their time.

        :raises HostError: there is no memory; nothing has changed. Or a worker that was stopped in
            the middle of a frame does not let go of the old rules; the new ones are in force.
        """
        rules, begun = list(rules), time.monotonic_ns()
        with self._lock:
            fresh: dict[int, Any] = {}
            try:
                if rules:
                    for pair in self._workers.keys() - self._lines.keys():
                        fresh[pair] = self._new_line(pair)
                lines = self._lines | fresh
                for line in lines.values():
                    self._prepare(line, rules, seed, begun)
            except BaseException:
                for line in fresh.values():
                    lib.pv_impair_free(line)
                raise
            # Nothing fails from here on.
            self._rules, self._seed, self._begun, self._lines = rules, seed, begun, lines
            stuck = [pair for pair, line in lines.items() if lib.pv_impair_commit(line)]
            for pair, worker in self._workers.items():
                if pair in lines:
                    lib.pv_net_worker_impair(worker, lines[pair])
        if stuck:
            raise HostError(
                f"the rules are in force, but the worker of queue pair {stuck[0]} has stopped"
            )

    @staticmethod
    def _new_line(pair: int) -> Any:
        line = lib.pv_impair_new(pair)
        if not line:
            raise HostError("no memory for faults")
        return line

    @staticmethod
    def _prepare(line: Any, given: Sequence[FaultRule], seed: int, begun: int) -> None:
        rules = ffi.new("struct pv_impair_rule[]", max(1, len(given)))
        kept = []
        for rule, c in zip(given, rules, strict=False):
            c.ways, c.rate, c.frames = rule.ways, rule.rate, rule.frames
            for word, name in CHANCES.items():
                chance, member = rule.chance(word), getattr(c, name)
                member.odds, member.every = chance.odds, chance.every
            for word, name in TIMES.items():
                setattr(c, name, rule.times.get(word, 0))
            for word in NUMBERS:
                setattr(c, word, rule.numbers.get(word, 0))
            c.keep = rule.numbers.get("keep", AT_RANDOM)
            if rule.code:
                kept.append(ffi.from_buffer(rule.code))
                c.filter, c.filter_count = kept[-1], len(rule.code) // 8
        error = lib.pv_impair_prepare(line, rules, len(given), seed, begun)
        if error:
            raise HostError(f"no faults: {os.strerror(-error)}")

    def enter(self, pair: int, worker: Any, form: object) -> None:
        """A queue pair has a worker, ``struct pv_net_worker *``, lent until ``leave``; it does not
        run yet.

        :param form: what its frames are like: frames that have waited since a worker with others
            are thrown away.
        :raises HostError: there is no memory.
        """
        with self._lock:
            if self._rules and pair not in self._lines:
                new = self._new_line(pair)
                try:
                    self._prepare(new, self._rules, self._seed, self._begun)
                except BaseException:
                    lib.pv_impair_free(new)
                    raise
                lib.pv_impair_commit(new)  # no worker uses it yet
                self._lines[pair] = new
            line = self._lines.get(pair)
            if line is not None:
                if self._forms.get(pair, form) != form:
                    lib.pv_impair_clear(line)
                lib.pv_net_worker_impair(worker, line)
            self._forms[pair] = form
            self._workers[pair] = worker

    def leave(self, pair: int) -> None:
        """The worker of a queue pair has ended."""
        with self._lock:
            self._workers.pop(pair, None)

    def clear(self) -> None:
        """Throw away the frames that wait, of all queue pairs that have no worker at present, and
        count them (``*_fault_cleared``). Rules stay.
        """
        with self._lock:
            for pair in self._lines.keys() - self._workers.keys():
                lib.pv_impair_clear(self._lines[pair])

    def look(self) -> None:
        """Nothing: what these workers count is here."""

    def counters(self) -> dict[str, int]:
        """What was done so far, of all queue pairs: ``rx_fault_loss`` and others, as in ``struct
        pv_impair_counters``; empty if there never was a rule.
        """
        c = ffi.new("struct pv_impair_counters *")
        with self._lock:
            out = dict(self._past)
            for line in self._lines.values():
                for number, way in enumerate(WAYS):
                    lib.pv_impair_counters(line, number, c)
                    for name, _ in ffi.typeof("struct pv_impair_counters").fields:
                        key = f"{way}_fault_{name}"
                        out[key] = out.get(key, 0) + int(getattr(c, name))
        return out

    def report(self) -> dict[str, object]:
        """The rules in force, the seed, and how many frames wait; for JSON."""
        with self._lock:
            waiting = {
                way: sum(lib.pv_impair_waiting(line, number) for line in self._lines.values())
                for number, way in enumerate(WAYS)
            }
            return {
                "rules": [str(rule) for rule in self._rules],
                "seed": self._seed if self._rules else None,
                "waiting": waiting,
            }

    def close(self) -> None:
        """Release it; no worker uses it any more. What was counted stays. A second call does
        nothing.
        """
        self._past = self.counters()
        with self._lock:
            lines, self._lines = self._lines, {}
            self._rules = ()
            for line in lines.values():
                lib.pv_impair_free(line)
