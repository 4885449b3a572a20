"""What a data path reports to the device whose rings it serves."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.datapath.base import PathEvents


class PathListener:
    """Passes on what a data path reports from one start until the stop after it. A report that
    comes later, from a thread that was slow, is of no interest any more.

    :param to: gets the reports. :param hold: keep the faults until ``release``: nobody knows yet
        whether this data path is the one to serve the rings.
    """

    def __init__(self, to: PathEvents, *, hold: bool = False) -> None:
        self._to = to
        self._lock = threading.Lock()
        self._held: list[tuple[int, str]] | None = [] if hold else None
        self._over = False

    def fault(self, queue: int, problem: str) -> None:
        """Passed on, or kept."""
        with self._lock:
            if self._over:
                return
            if self._held is not None:
                self._held.append((queue, problem))
                return
        self._to.fault(queue, problem)

    def link(self, up: bool) -> None:
        """Passed on."""
        if not self._over:
            self._to.link(up)

    def release(self) -> None:
        """Pass on the faults that were kept, and those that come."""
        with self._lock:
            held, self._held = self._held or [], None
        for queue, problem in held:
            self._to.fault(queue, problem)

    def end(self) -> None:
        """The data path has stopped."""
        with self._lock:
            self._over = True
