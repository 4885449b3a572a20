"""What a traced machine did, with times: rings in C for vCPUs and workers, and a bounded list of
control-plane steps.

Nothing here runs for an exit or a packet: C writes the rings (cext/trace.h), and ``exits.trace``
makes a file of it all when the machine has ended. Memory is bounded: what is older than the latest
``RING`` events of a track, or ``STEPS`` steps, is dropped and counted.
"""

from __future__ import annotations

import time
from collections import deque

from pyvmm._ext import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Events a ring (56 bytes each), and steps, by default.
RING, STEPS = 1 << 15, 1 << 14

EXIT, KICK, BATCH = lib.PV_TRACE_EXIT, lib.PV_TRACE_KICK, lib.PV_TRACE_BATCH


class Event:
    """One event of a ring: ``struct pv_trace_event``, times in ns."""

    __slots__ = (
        "addr",
        "count",
        "dur",
        "kind",
        "reason",
        "reg",
        "region",
        "size",
        "ts",
        "value",
        "write",
    )

    def __init__(self, c: Any) -> None:
        self.ts, self.dur, self.addr, self.value = c.ts, c.dur, c.addr, c.value
        self.reason, self.region, self.reg, self.count = c.reason, c.region, c.reg, c.count
        self.kind, self.size, self.write = c.kind, c.size, bool(c.write)


class Recorder:
    """Owns the rings; whoever writes to one has stopped when it is closed.

    :param ring: events a ring, rounded up to a power of two. :raises MemoryError: from ``ring``.
    """

    def __init__(self, ring: int = RING) -> None:
        self._size = 1 << max(ring - 1, 1).bit_length()
        self._rings: dict[tuple[str, str], Any] = {}
        self._steps: deque[tuple[str, str, int, int, dict[str, object]]] = deque(maxlen=STEPS)
        self._taken = 0

    def ring(self, group: str, name: str) -> Any:
        """``struct pv_trace *`` of a track, lent; the same one for the same track, whose writers
        come one after another.
        """
        found = self._rings.get((group, name))
        if found is None:
            found = lib.pv_trace_new(self._size)
            if found == ffi.NULL:
                raise MemoryError("no memory for a trace ring")
            self._rings[group, name] = found
        return found

    def scope(self, group: str) -> Scope:
        """The same for one card's tracks."""
        return Scope(self, group)

    def step(self, group: str, name: str, begin: int, end: int, args: dict[str, object]) -> None:
        """A control-plane step, any thread. :param begin, end: CLOCK_MONOTONIC, ns."""
        self._steps.append((group, name, begin, end, args))
        self._taken += 1

    def steps(self) -> tuple[list[tuple[str, str, int, int, dict[str, object]]], int]:
        """(group, name, begin, end, arguments) in the order of their ends, and how many older ones
        are lost.
        """
        steps = list(self._steps)
        return steps, max(self._taken - len(steps), 0)

    def tracks(self) -> list[tuple[str, str]]:
        """Group and name of each ring."""
        return list(self._rings)

    def events(self, group: str, name: str) -> tuple[list[Event], int]:
        """The events of a ring, oldest first, and how many older ones are lost. Also while its
        writer runs.
        """
        t = self._rings[group, name]
        size = t.mask + 1
        end = int(t.next)
        begin = max(end - size, 0)
        events = [Event(t.event[i & t.mask]) for i in range(begin, end)]
        lost = max(int(t.next) - size, 0)  # what has been overwritten while we read
        if lost > begin:
            events, begin = events[lost - begin + 1 :], lost + 1
        return events, begin

    def close(self) -> None:
        """Free the rings; a second call does nothing."""
        rings, self._rings = self._rings, {}
        for ring in rings.values():
            lib.pv_trace_free(ring)


class Scope:
    """A recorder as one card's parts see it."""

    __slots__ = ("_group", "_recorder")

    def __init__(self, recorder: Recorder, group: str) -> None:
        self._recorder, self._group = recorder, group

    def ring(self, name: str) -> Any:
        """See ``Recorder.ring``."""
        return self._recorder.ring(self._group, name)

    def step(self, name: str, begin: int, args: dict[str, object]) -> None:
        """A step that ends now. :param begin: CLOCK_MONOTONIC, ns."""
        self._recorder.step(self._group, name, begin, time.monotonic_ns(), args)
