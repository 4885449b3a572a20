"""Records what a traced machine does, with times: event rings in C for vCPUs and workers, and a
list of control-plane steps.

This module runs neither per exit nor per packet: C writes the rings (cext/trace.h), and
``exits.trace`` makes a file of rings and steps when the machine has ended. Memory is bounded: a
ring keeps its latest ``RING`` events, the list its latest ``STEPS`` steps. Older ones are dropped
and counted.
"""

from __future__ import annotations

import time
from collections import deque

from pyvmm._ext import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: How many events a ring holds by default (56 bytes each), and how many steps the list holds.
RING, STEPS = 1 << 15, 1 << 14

EXIT, KICK, BATCH = lib.PV_TRACE_EXIT, lib.PV_TRACE_KICK, lib.PV_TRACE_BATCH
PACKET, SEGMENT, BYTES = lib.PV_TRACE_PACKET, lib.PV_TRACE_SEGMENT, lib.PV_TRACE_BYTES
FAULT = lib.PV_TRACE_FAULT
#: The place in the used ring of a packet that is not there yet.
LATER = lib.PV_TRACE_LATER


class Event:
    """One event of a ring: a copy of ``struct pv_trace_event`` (cext/trace.h). Times are in ns."""

    __slots__ = (
        "addr",
        "bytes",
        "count",
        "dur",
        "header",
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
        self.bytes = bytes(c.bytes)[: c.size] if c.kind == BYTES else b""
        self.header = int(c.write) if c.kind == BYTES else 0


class Recorder:
    """Owns the rings and the list of steps.

    :param ring: how many events a ring holds; rounded up to a power of two.
    """

    def __init__(self, ring: int = RING) -> None:
        self._size = 1 << max(ring - 1, 1).bit_length()
        self._rings: dict[tuple[str, str], Any] = {}
        self._steps: deque[tuple[str, str, int, int, dict[str, object]]] = deque(maxlen=STEPS)
        self._taken = 0

    def ring(self, group: str, name: str) -> Any:
        """The ring of a track, ``struct pv_trace *``; lent until ``close``.

        The same track gets the same ring again, so its writers must follow one another.

        :raises MemoryError: the host has no memory for a new ring.
        """
        found = self._rings.get((group, name))
        if found is None:
            found = lib.pv_trace_new(self._size)
            if found == ffi.NULL:
                raise MemoryError("no memory for a trace ring")
            self._rings[group, name] = found
        return found

    def scope(self, group: str) -> Scope:
        """The recorder for the tracks of one group, such as a network card."""
        return Scope(self, group)

    def step(self, group: str, name: str, begin: int, end: int, args: dict[str, object]) -> None:
        """Record a control-plane step. Any thread may call this.

        :param begin: when the step began: CLOCK_MONOTONIC in ns; ``end`` likewise.
        :param args: further values that the trace shows with the step.
        """
        self._steps.append((group, name, begin, end, args))
        self._taken += 1

    def steps(self) -> tuple[list[tuple[str, str, int, int, dict[str, object]]], int]:
        """The steps in the order in which they ended, each as (group, name, begin, end, arguments);
        and the number of older steps that were dropped.
        """
        steps = list(self._steps)
        return steps, max(self._taken - len(steps), 0)

    def tracks(self) -> list[tuple[str, str]]:
        """The group and the name of each ring."""
        return list(self._rings)

    def events(self, group: str, name: str) -> tuple[list[Event], int]:
        """The events of a ring, oldest first, and the number of older events that were dropped.
        The ring's writer may run meanwhile.
        """
        t = self._rings[group, name]
        size = t.mask + 1
        end = int(t.next)
        begin = max(end - size, 0)
        events = [Event(t.event[i & t.mask]) for i in range(begin, end)]
        lost = max(int(t.next) - size, 0)  # the writer may have overwritten events while we read
        if lost > begin:
            events, begin = events[lost - begin + 1 :], lost + 1
        return events, begin

    def close(self) -> None:
        """Free the rings once all their writers have stopped. A second call does nothing."""
        rings, self._rings = self._rings, {}
        for ring in rings.values():
            lib.pv_trace_free(ring)


class Scope:
    """The recorder as the parts of one group see it."""

    __slots__ = ("_group", "_recorder")

    def __init__(self, recorder: Recorder, group: str) -> None:
        self._recorder, self._group = recorder, group

    def ring(self, name: str) -> Any:
        """See ``Recorder.ring``."""
        return self._recorder.ring(self._group, name)

    def step(
        self, name: str, begin: int, args: dict[str, object], *, end: int | None = None
    ) -> None:
        """Record a step.

        :param begin: when it began: CLOCK_MONOTONIC in ns. :param end: when it ended (now).
        """
        end = time.monotonic_ns() if end is None else end
        self._recorder.step(self._group, name, begin, end, args)
