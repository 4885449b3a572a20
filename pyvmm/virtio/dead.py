"""In the place of a device whose back-end has gone for good: every request of the guest fails.

Without it the guest would wait for ever: Linux neither gives up a request that it has sent to such
a device, nor removes the device before the last request has been answered.
"""

from __future__ import annotations

import select

from pyvmm.errors import HostError, RingFault
from pyvmm.fd import EventFd
from pyvmm.threads import Thread
from pyvmm.virtio.queue import ServedQueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from pyvmm.datapath.base import PathEvents, Vring
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.queue import Chain


class DeadDevice:
    """Implements ``RingServer`` (datapath.base). A subclass says how a request fails."""

    name = "none"
    #: What messages call the device.
    kind = "a device"
    #: Bytes of the longest request that Linux sends; None if ``refuse`` looks at none.
    request_max: int | None = None

    def __init__(self) -> None:
        self._end = EventFd()
        self._thread: threading.Thread | None = None
        self._queues: list[tuple[Vring, ServedQueue]] = []
        self._refused = 0
        self._over = self._closed = False

    def refuse(self, chain: Chain) -> int:
        """Answer a request; returns how many bytes have been written, from the first on."""
        raise NotImplementedError

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Answer what is in the rings, and what will come."""
        try:
            self._queues = [
                (ring, ServedQueue(memory, ring, acked, limit=self.request_max)) for ring in rings
            ]
        except RingFault as e:
            self._queues = []
            raise HostError(f"virtqueues of {self.kind}: {e}") from e
        self._over = False
        self._thread = Thread(target=self._run, args=(events,), name="dead-device", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as e:
            self._thread, self._queues = None, []
            raise HostError(f"cannot start a thread: {e}", "raise the limit of processes") from e

    def _run(self, events: PathEvents) -> None:
        poll = select.poll()
        poll.register(self._end.fileno(), select.POLLIN)
        for ring, _ in self._queues:
            poll.register(ring.kick.fileno(), select.POLLIN)
        sound = list(self._queues)
        while True:
            for ring, queue in list(sound):
                ring.kick.drain()
                try:
                    while self._serve(ring, queue):
                        pass
                except RingFault as e:
                    sound.remove((ring, queue))
                    poll.unregister(ring.kick.fileno())
                    events.fault(ring.index, f"queue {ring.index}: {e}")
            if any(fd == self._end.fileno() for fd, _ in poll.poll()):
                return

    def _serve(self, ring: Vring, queue: ServedQueue) -> bool:
        """Answer all requests that are there; whether more came meanwhile."""
        while (chain := queue.pop()) is not None:
            self._refused += 1
            queue.push(chain, self.refuse(chain))
            if queue.flush():
                ring.call.nudge()
            if self._over:
                return False
        return queue.enable_notify()

    def problem(self) -> str:
        """The rings are served, after a fashion."""
        return ""

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Let go of the rings."""
        if self._thread is None:
            return []
        self._over = True
        self._end.signal()
        self._thread.join()
        self._end.drain()
        self._thread = None
        bases = [queue.base for _, queue in self._queues]
        self._queues = []
        return bases

    def counters(self) -> dict[str, int]:
        """How many requests have been refused."""
        return {"refused_requests": self._refused}

    def report(self) -> dict[str, object]:
        """There is no other process."""
        return {}

    def cut(self) -> None:
        """There is no conversation."""

    def close(self) -> None:
        """Stop. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.stop()
            self._end.close()
