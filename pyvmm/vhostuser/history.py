"""The history of a device's back-ends: counters, problems, and how long the rings were parked."""

from __future__ import annotations

import threading
import time

PROBLEMS_MAX = 32
COUNTERS = (
    "connections",
    "disconnections",
    "refusals",
    "timeouts",
    "possible_repeats",
    "bad_bases",
    "ring_errors",
    "backend_requests",
    "parked_ms",
)


class BackendHistory:
    """Counters and problems of all of a device's back-ends so far. Any thread.

    :ivar problems: the last refusals and losses, in words, each once; the latest comes last.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._parked_at = 0

    def count(self, name: str, count: int = 1) -> None:
        """Add to one of :data:`COUNTERS`."""
        with self._lock:
            self._counts[name] += count

    def note(self, *problems: str) -> None:
        """Keep the latest problems. A text is kept once, at its latest place: a back-end that does
        not fit may come every second, with two texts in turn, and must not push out the others.
        """
        with self._lock:
            for text in problems:
                others = [problem for problem in self.problems if problem != text]
                self.problems = [*others[1 - PROBLEMS_MAX :], text]

    def parked(self) -> None:
        """Note that no back-end serves the rings, from now on or still."""
        with self._lock:
            self._parked_at = self._parked_at or time.monotonic_ns()

    def served(self) -> None:
        """Note that a back-end serves the rings, or that there are none to serve."""
        with self._lock:
            self._counts["parked_ms"] += self._since()
            self._parked_at = 0

    def _since(self) -> int:
        """Milliseconds for which the rings have been parked."""
        return (time.monotonic_ns() - self._parked_at) // 1000000 if self._parked_at else 0

    def counters(self) -> dict[str, int]:
        """All counters; ``parked_ms`` includes the present pause."""
        with self._lock:
            return {**self._counts, "parked_ms": self._counts["parked_ms"] + self._since()}
