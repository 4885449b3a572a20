"""In the place of a file system whose back-end has gone: every request of the guest fails with EIO.

Without it the guest would wait for ever: Linux neither gives up a request that it has sent by
virtiofs, nor removes the device before the last request has been answered.
"""

from __future__ import annotations

import errno
import select
import struct

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

# linux/fuse.h: struct fuse_in_header (len, opcode, unique, and more), struct fuse_out_header
IN_HEAD, OUT_HEAD = "<IIQ", "<IiQ"
#: The longest request that Linux sends: 256 pages (FUSE_MAX_MAX_PAGES) and headers.
REQUEST_MAX = (1 << 20) + 4096


class DeadFs:
    """Implements ``RingServer`` (datapath.base)."""

    name = "none"

    def __init__(self) -> None:
        self._end = EventFd()
        self._thread: threading.Thread | None = None
        self._queues: list[tuple[Vring, ServedQueue]] = []
        self._refused = 0
        self._over = self._closed = False

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
                (ring, ServedQueue(memory, ring, acked, limit=REQUEST_MAX)) for ring in rings
            ]
        except RingFault as e:
            self._queues = []
            raise HostError(f"virtqueues of a file system: {e}") from e
        self._over = False
        self._thread = Thread(target=self._run, args=(events,), name="dead-fs", daemon=True)
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
            written = 0
            if chain.room and len(chain.request) >= struct.calcsize(IN_HEAD):
                unique = struct.unpack_from(IN_HEAD, chain.request)[2]
                size = struct.calcsize(OUT_HEAD)
                written = chain.reply(struct.pack(OUT_HEAD, size, -errno.EIO, unique))
            self._refused += 1
            queue.push(chain, written)
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
