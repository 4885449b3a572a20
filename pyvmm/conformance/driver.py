"""A virtio-net driver without a guest: plays the driver's side of split virtqueues in a
GuestMemory.

It checks back-ends, ours in the tests and others by ``pyvmm vhost-user check``. It can do all that
a driver may do (indirect tables, EVENT_IDX, suppression both ways). The raw accessors can also do
what a driver must not do.
"""

from __future__ import annotations

import struct
import threading
import time

from pyvmm.datapath.base import Vring
from pyvmm.fd import EventFd
from pyvmm.spec.virtio import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.memory import GuestMemory

_lock = threading.Lock()


def fence() -> None:
    """A full memory barrier (an uncontended lock is an atomic read-modify-write)."""
    with _lock:
        pass


def wait_for(condition: Callable[[], object], timeout: float = 10.0) -> bool:
    """Poll until ``condition()`` holds; False on time-out."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def align(x: int, to: int) -> int:
    """``x`` rounded up to a multiple of ``to``."""
    return -(-x // to) * to


class Ring:
    """One split virtqueue, as its driver sees it.

    :param base: guest-physical address of the first of the three areas; ``end`` is the address
        behind the last.
    :param start: value of both indices at the start.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        base: int,
        *,
        index: int = 0,
        start: int = 0,
        event_idx: bool = False,
    ) -> None:
        self.memory, self.size, self.index, self.start, self.event_idx = (
            memory,
            size,
            index,
            start,
            event_idx,
        )
        self.desc = align(base, 16)
        self.avail = self.desc + 16 * size
        self.used = align(self.avail + 6 + 2 * size, 4)
        self.end = self.used + 6 + 8 * size
        memory.write(self.desc, bytes(self.end - self.desc))
        self._desc = memory.view(self.desc, 16 * size)
        self._avail = memory.view(self.avail, 6 + 2 * size).cast("H")
        self._used = memory.view(self.used, 6 + 8 * size).cast("H")
        self._elems = memory.view(self.used + 4, 8 * size).cast("I")
        self.avail_idx = self.published = self.last_used = start
        self._avail[1] = self._used[1] = start
        # A device at rest at this position asks for a kick at the next chain (2.7.10).
        self._used[2 + 4 * size] = start
        self.free = list(range(size - 1, -1, -1))
        self.chains: dict[int, list[int]] = {}
        self._shapes: dict[int, str] = {}  # by head
        self.kick_fd, self.call_fd = EventFd(), EventFd()
        self.kicks = 0
        if event_idx:
            self.enable_interrupts()

    def vring(self, base: int | None = None) -> Vring:
        """The ring, as a data path takes it."""
        return Vring(
            self.index,
            self.size,
            self.desc,
            self.avail,
            self.used,
            self.start if base is None else base,
            self.kick_fd,
            self.call_fd,
        )

    # --- a well-behaved driver --------------------------------------------------------------------
    def add(self, segments: list[tuple[int, int, bool]], *, indirect: int | None = None) -> int:
        """Queue a chain of (gpa, length, device writes it); returns its head. ``publish`` makes it
        available.

        :param indirect: guest-physical address for an indirect table; None for no such table.
        """
        if indirect is not None:
            table = b""
            for i, (gpa, length, write) in enumerate(segments):
                flags = (VRING_DESC_F_WRITE if write else 0) | (
                    VRING_DESC_F_NEXT if i < len(segments) - 1 else 0
                )
                table += struct.pack("<QIHH", gpa, length, flags, i + 1)
            self.memory.write(indirect, table)
            head = self.free.pop()
            self.set_desc(head, indirect, len(table), VRING_DESC_F_INDIRECT, 0)
            self.chains[head] = [head]
        else:
            ids = [self.free.pop() for _ in segments]
            for i, (gpa, length, write) in enumerate(segments):
                last = i == len(ids) - 1
                flags = (VRING_DESC_F_WRITE if write else 0) | (0 if last else VRING_DESC_F_NEXT)
                self.set_desc(ids[i], gpa, length, flags, 0 if last else ids[i + 1])
            head = ids[0]
            self.chains[head] = ids
        self._shapes[head] = "indirect " * (indirect is not None) + "+".join(
            f"{length}{'w' if write else 'r'}" for _, length, write in segments
        )
        self.set_avail(self.avail_idx, head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        return head

    def publish(self, *, kick: bool = True) -> bool:
        """Make all queued chains available, and kick if the device asks for it; returns whether it
        was kicked.
        """
        old, self.published = self.published, self.avail_idx
        self._avail[1] = self.avail_idx
        fence()
        if self.event_idx:
            new, event = self.avail_idx, self._used[2 + 4 * self.size]
            needed = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            needed = not self._used[0] & VRING_USED_F_NO_NOTIFY
        if kick and needed:
            self.kick()
        return kick and needed

    def kick(self) -> None:
        self.kicks += 1
        self.kick_fd.nudge()  # the back-end shares it

    def take_used(self) -> list[tuple[int, int]]:
        """The (head, written length) pairs that the device has returned since the last call."""
        out = []
        idx = self.used_idx
        fence()
        while self.last_used != idx:
            i = self.last_used % self.size
            head, length = self._elems[2 * i], self._elems[2 * i + 1]
            self.free += reversed(self.chains.pop(head))
            out.append((head, length))
            self.last_used = (self.last_used + 1) & 0xFFFF
        return out

    def describe(self) -> str:
        """What is in the ring: for whoever has to find out why it is not served."""
        available = self._avail[1]
        text = f"ring {self.index} of {self.size}: available {available}, used {self.used_idx}"
        if self.event_idx:
            text += f", avail_event {self._used[2 + 4 * self.size]}"
            text += f", used_event {self._avail[2 + self.size]}"
        else:
            text += f", used flags {self._used[0]}, available flags {self._avail[0]}"
        text += f", {self.kicks} kicks"
        if 0 < available - self.used_idx & 0xFFFF <= self.size:
            head = self._avail[2 + self.used_idx % self.size]
            text += f"; next head {head}: {self._shapes.get(head, 'no chain of ours')}"
        return text

    @property
    def used_idx(self) -> int:
        return self._used[1]

    @property
    def outstanding(self) -> int:
        """Chains that the device has not returned."""
        return (self.published - self.used_idx) & 0xFFFF

    def enable_interrupts(self) -> bool:
        """Ask for an interrupt at the next used entry; whether there are entries already."""
        if self.event_idx:
            self._avail[2 + self.size] = self.last_used
        else:
            self._avail[0] = 0
        fence()
        return self.used_idx != self.last_used

    def disable_interrupts(self) -> None:
        if not self.event_idx:
            self._avail[0] = VRING_AVAIL_F_NO_INTERRUPT
        else:
            self._avail[2 + self.size] = (self.last_used - 1) & 0xFFFF

    # --- raw access -------------------------------------------------------------------------------
    def set_desc(self, i: int, gpa: int, length: int, flags: int, following: int) -> None:
        struct.pack_into("<QIHH", self._desc, 16 * i, gpa, length, flags, following)

    def set_avail(self, position: int, head: int) -> None:
        self._avail[2 + position % self.size] = head

    def set_avail_idx(self, idx: int) -> None:
        self._avail[1] = idx & 0xFFFF

    def close(self) -> None:
        for view in (self._desc, self._avail, self._used, self._elems):
            view.release()
        self.kick_fd.close()
        self.call_fd.close()


class NetDriver:
    """The driver of one receive and one transmit ring: posts buffers, sends and receives packets
    with their headers.

    :param base: guest-physical start of all memory that the driver uses.
    :param rx_buffers: receive chains to post; :param rx_size: bytes of each.
    """

    def __init__(
        self,
        memory: GuestMemory,
        *,
        base: int = 0x10000,
        size: int = 256,
        start: int = 0,
        event_idx: bool = True,
        indirect: bool = False,
        mrg_rxbuf: bool = True,
        rx_buffers: int | None = None,
        rx_size: int = 2048,
        pair: int = 0,
    ) -> None:
        self.pair = pair
        self.memory, self.indirect, self.mrg_rxbuf, self.rx_size = (
            memory,
            indirect,
            mrg_rxbuf,
            rx_size,
        )
        kw: dict[str, Any] = {"start": start, "event_idx": event_idx}
        self.rx = Ring(memory, size, base, index=2 * pair, **kw)
        self.tx = Ring(memory, size, align(self.rx.end, 4096), index=2 * pair + 1, **kw)
        at = align(self.tx.end, 4096)
        count = size if rx_buffers is None else rx_buffers
        self._rx_free = [at + i * rx_size for i in reversed(range(count))]
        self._rx_busy: dict[int, int] = {}
        self._tx_at = self._tx_start = at + count * rx_size
        self.end = memory.low_size
        self.received: list[bytes] = []

    @property
    def rings(self) -> list[Ring]:
        return [self.rx, self.tx]

    def fill(self, count: int | None = None, *, kick: bool = True) -> int:
        """Post receive buffers: ``count``, or all that are free; returns how many were posted."""
        n = 0
        while self._rx_free and self.rx.free and (count is None or n < count):
            gpa = self._rx_free.pop()
            self._rx_busy[self.rx.add([(gpa, self.rx_size, True)])] = gpa
            n += 1
        if n:
            self.rx.publish(kick=kick)
        return n

    def _alloc(self, length: int) -> int:
        """Take transmit memory in a circle: a frame must have been sent before its memory is used
        again.
        """
        if self._tx_at + length > self.end:
            self._tx_at = self._tx_start
        gpa, self._tx_at = self._tx_at, self._tx_at + length
        return gpa

    def queue(
        self, frame: bytes, *, header: bytes = bytes(12), split: list[int] | None = None
    ) -> int:
        """Queue one frame; ``split`` gives the lengths of all segments but the last. Returns the
        head.
        """
        data = header + frame
        gpa = self._alloc(len(data))
        self.memory.write(gpa, data)
        segments, at = [], 0
        for n in [*(split or []), None]:
            length = len(data) - at if n is None else n
            segments.append((gpa + at, length, False))
            at += length
        table = self._alloc(align(16 * len(segments) + 16, 16)) if self.indirect else None
        return self.tx.add(segments, indirect=table)

    def send(self, *frames: bytes, kick: bool = True) -> None:
        """Queue each frame behind an empty header, and make all of them available at once."""
        self.tx.take_used()
        for frame in frames:
            self.queue(frame)
        self.tx.publish(kick=kick)

    def poll(self, *, refill: bool = True) -> list[bytes]:
        """The packets that have arrived, each with its header; merged buffers are joined."""
        packets = []
        used = self.rx.take_used()
        while used:
            head, length = used.pop(0)
            gpa = self._rx_busy.pop(head)
            data = self.memory.read(gpa, length)
            self._rx_free.append(gpa)
            for _ in range(struct.unpack_from("<H", data, 10)[0] - 1):
                head, length = used.pop(0)
                gpa = self._rx_busy.pop(head)
                data += self.memory.read(gpa, length)
                self._rx_free.append(gpa)
            packets.append(data)
        if refill and packets:
            self.fill()
        self.received += packets
        return packets

    def wait_packets(self, count: int, timeout: float = 10.0) -> list[bytes]:
        """Poll until ``count`` packets have arrived; returns all packets that arrived meanwhile."""
        wait_for(lambda: self.poll() is not None and len(self.received) >= count, timeout)
        return self.received

    def close(self) -> None:
        self.rx.close()
        self.tx.close()
