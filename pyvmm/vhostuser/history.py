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

    :ivar problems: the last refusals and losses, in words.
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
        """Keep the latest problems. A problem that is the same as the last is kept once, because a
        back-end that does not fit may come every second.
        """
        with self._lock:
            for text in problems:
                if self.problems[-1:] != [text]:
                    self.problems = [*self.problems[1 - PROBLEMS_MAX :], text]

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
