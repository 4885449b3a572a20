"""A virtio-net driver without a guest: plays the driver's side of virtqueues, split or packed, in
a GuestMemory.

It checks back-ends, ours in the tests and others by ``pyvmm vhost-user check``. It can do all that
a driver may do (indirect tables, EVENT_IDX, suppression both ways). The raw accessors can also do
what a driver must not do.
"""

from __future__ import annotations

import struct
import threading
import time

from pyvmm.datapath.base import Vring
from pyvmm.datapath.ringformat import PACKED, SPLIT
from pyvmm.fd import EventFd
from pyvmm.spec.virtio import (
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
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


def shape(segments: list[tuple[int, int, bool]], indirect: int | None) -> str:
    """A chain for people: lengths, and who writes them."""
    return "indirect " * (indirect is not None) + "+".join(
        f"{length}{'w' if write else 'r'}" for _, length, write in segments
    )


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
        self._shapes[head] = shape(segments, indirect)
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
    def position(self) -> int:
        """Where a device that has given everything back goes on (``datapath.ringformat``)."""
        return self.used_idx

    @property
    def returned(self) -> int:
        """How many chains the device has returned since the start, modulo 65536."""
        return self.used_idx - self.start & 0xFFFF

    @property
    def asked(self) -> bool:
        """Whether the device asks for a kick at the next chain that is published."""
        if self.event_idx:
            return self._used[2 + 4 * self.size] == self.published
        return not self._used[0] & VRING_USED_F_NO_NOTIFY

    @property
    def room(self) -> int:
        """How many more descriptors fit."""
        return len(self.free)

    def spoil(self, *, kick: bool = True) -> None:
        """Make a chain available that no device can serve: its head is outside of the table."""
        self.set_avail(self.published, 0xFFFF)
        self.set_avail_idx(self.published + 1)
        if kick:
            self.kick()

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


class PackedRing(Ring):
    """One packed virtqueue, as its driver sees it. It has no indices, and no available ring.

    Positions are counted in two laps of the ring, that with the wrap counter at 1 first.

    :param start: the position at the start (``datapath.ringformat``), with nothing in hand.
    :ivar chains: buffer id -> the descriptors that it takes, of all that were not taken back.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        base: int,
        *,
        index: int = 0,
        start: int = PACKED.start,
        event_idx: bool = False,
    ) -> None:
        self.memory, self.size, self.index, self.start = memory, size, index, start
        self.event_idx = event_idx
        self.desc = align(base, 16)
        self.avail = self.desc + 16 * size
        self.used = self.avail + 4
        self.end = self.used + 4
        memory.write(self.desc, bytes(self.end - self.desc))
        self._desc = memory.view(self.desc, 16 * size)
        self._words = memory.view(self.desc, 16 * size).cast("H")
        self._ours = memory.view(self.avail, 4).cast("H")  # the driver's event suppression
        self._theirs = memory.view(self.used, 4).cast("H")
        self._next = self._published = self._taken = self._inside(start)
        # A device at rest at this position asks for a kick at the next chain (2.8.10).
        self._theirs[0] = start & 0xFFFF
        self._theirs[1] = VRING_PACKED_EVENT_FLAG_DESC if event_idx else 0
        # Before the start the descriptors were used in the lap before.
        for at in range(self._next, self._next + size):
            self._words[8 * (at % size) + 7] = self._flags((at + size) % (2 * size), used=True)
        self._ids = list(range(size - 1, -1, -1))
        self._room, self._count = size, 0
        self.chains: dict[int, list[int]] = {}
        self._shapes: dict[int, str] = {}
        self._held: list[tuple[int, int]] = []  # first descriptors, and their flags
        self._order: list[int] = []  # ids of the published chains
        self.kick_fd, self.call_fd = EventFd(), EventFd()
        self.kicks = 0
        if event_idx:
            self.enable_interrupts()

    def _inside(self, place: int) -> int:
        return (place & 0x7FFF) + (0 if place >> 15 & 1 else self.size)

    def _outside(self, at: int) -> int:
        return at | 1 << 15 if at < self.size else at - self.size

    def _flags(self, at: int, *, used: bool = False) -> int:
        """The bits of a descriptor that is available in the lap of ``at``, or used."""
        wrap = at < self.size
        avail = wrap << VRING_PACKED_DESC_F_AVAIL
        return avail | (wrap if used else not wrap) << VRING_PACKED_DESC_F_USED

    def _forward(self, at: int, count: int) -> int:
        return (at + count) % (2 * self.size)

    def _is_used(self, at: int) -> bool:
        flags = self._words[8 * (at % self.size) + 7]
        both = 1 << VRING_PACKED_DESC_F_AVAIL | 1 << VRING_PACKED_DESC_F_USED
        return flags & both == self._flags(at, used=True)

    def vring(self, base: int | None = None) -> Vring:
        """The ring, as a data path takes it."""
        place = self.index, self.size, self.desc, self.avail, self.used
        base = self.start if base is None else base
        return Vring(*place, base, self.kick_fd, self.call_fd, PACKED)

    # --- a well-behaved driver --------------------------------------------------------------------
    def add(self, segments: list[tuple[int, int, bool]], *, indirect: int | None = None) -> int:
        """As ``Ring.add``; returns the buffer id."""
        ident = self._ids.pop()
        if indirect is None:
            entries = [(*s, 0) for s in segments]
        else:
            table = b"".join(
                struct.pack("<QIHH", gpa, length, 0, VRING_DESC_F_WRITE if write else 0)
                for gpa, length, write in segments
            )
            self.memory.write(indirect, table)
            entries = [(indirect, len(table), False, VRING_DESC_F_INDIRECT)]
        first = self._next
        for i, (gpa, length, write, flags) in enumerate(entries):
            flags |= self._flags(self._next) | (VRING_DESC_F_WRITE if write else 0)
            flags |= 0 if i == len(entries) - 1 else VRING_DESC_F_NEXT
            at = self._next % self.size
            struct.pack_into("<QIH", self._desc, 16 * at, gpa, length, ident)
            if i:
                self._words[8 * at + 7] = flags
            else:
                self._held.append((at, flags))
            self._next = self._forward(first, i + 1)
        self._room -= len(entries)
        self.chains[ident] = [(first + i) % self.size for i in range(len(entries))]
        self._order.append(ident)
        self._shapes[ident] = shape(segments, indirect)
        return ident

    def publish(self, *, kick: bool = True) -> bool:
        """As ``Ring.publish``. The first chain is made available last, so that all appear at
        once.
        """
        old, self._published = self._published, self._next
        for at, flags in reversed(self._held):
            fence()
            self._words[8 * at + 7] = flags
        self._held = []
        fence()
        place, flags = self._theirs[0], self._theirs[1] & 3
        needed = flags == VRING_PACKED_EVENT_FLAG_ENABLE
        if flags == VRING_PACKED_EVENT_FLAG_DESC:
            laps = 2 * self.size
            needed = (self._inside(place) - old) % laps < (self._next - old) % laps
        if kick and needed:
            self.kick()
        return kick and needed

    def take_used(self) -> list[tuple[int, int]]:
        """The (buffer id, written length) pairs that the device has returned since the last
        call. Without the WRITE flag the length is no length.
        """
        out = []
        while self.chains and self._is_used(self._taken):
            fence()
            at = self._taken % self.size
            _, length, ident, flags = struct.unpack_from("<QIHH", self._desc, 16 * at)
            slots = len(self.chains.pop(ident))
            self._order.remove(ident)
            self._ids.append(ident)
            self._room += slots
            self._taken = self._forward(self._taken, slots)
            self._count += 1
            out.append((ident, length if flags & VRING_DESC_F_WRITE else 0))
        return out

    def describe(self) -> str:
        """What is in the ring: for whoever has to find out why it is not served."""
        text = f"packed ring {self.index} of {self.size}: {self.outstanding} chains with the device"
        for side, at in (("driver next", self._next), ("device next", self._returned()[0])):
            text += f", {side} {PACKED.words(self._outside(at))}"
        for side, area in (("driver", self._ours), ("device", self._theirs)):
            text += f", {side} event {PACKED.words(area[0])} flags {area[1]}"
        text += f", {self.kicks} kicks"
        if self.outstanding:
            ident = self._order[-self.outstanding]
            text += f"; next buffer {ident}: {self._shapes[ident]}"
        return text

    def _returned(self) -> tuple[int, int]:
        """Where the used descriptors end, and how many chains are returned and not taken."""
        at, count = self._taken, 0
        while count < len(self._order) and self._is_used(at):
            (ident,) = struct.unpack_from("<H", self._desc, 16 * (at % self.size) + 12)
            at, count = self._forward(at, len(self.chains.get(ident, " "))), count + 1
        return at, count

    @property
    def returned(self) -> int:
        """How many chains the device has returned since the start, modulo 65536."""
        return self._count + self._returned()[1] & 0xFFFF

    @property
    def asked(self) -> bool:
        """Whether the device asks for a kick at the next chain that is published."""
        flags = self._theirs[1] & 3
        if flags == VRING_PACKED_EVENT_FLAG_DESC:
            return self._theirs[0] == self._outside(self._next)
        return flags == VRING_PACKED_EVENT_FLAG_ENABLE

    @property
    def room(self) -> int:
        """How many more descriptors fit."""
        return self._room

    @property
    def position(self) -> int:
        """Where a device that has given everything back goes on (``datapath.ringformat``)."""
        place = self._outside(self._returned()[0])
        return place | place << 16

    @property
    def outstanding(self) -> int:
        """Chains that the device has not returned."""
        return len(self._order) - self._returned()[1]

    def enable_interrupts(self) -> bool:
        """Ask for an interrupt at the next used descriptor; whether there are some already."""
        if self.event_idx:
            self._ours[0] = self._outside(self._taken)
            self._ours[1] = VRING_PACKED_EVENT_FLAG_DESC
        else:
            self._ours[1] = VRING_PACKED_EVENT_FLAG_ENABLE
        fence()
        return bool(self.chains) and self._is_used(self._taken)

    def disable_interrupts(self) -> None:
        self._ours[1] = VRING_PACKED_EVENT_FLAG_DISABLE

    # --- raw access -------------------------------------------------------------------------------
    def set_desc(self, i: int, gpa: int, length: int, flags: int, following: int) -> None:
        """As a split ring's; ``following`` is the buffer id."""
        struct.pack_into("<QIHH", self._desc, 16 * i, gpa, length, following, flags)

    def spoil(self, *, kick: bool = True) -> None:
        """Make a chain available that no device can serve: it is nowhere in memory."""
        at = self._next % self.size
        self.set_desc(at, 2**64 - 4096, 100, 0, 0)
        fence()
        self._words[8 * at + 7] = self._flags(self._next)
        if kick:
            self.kick()

    def close(self) -> None:
        for view in (self._desc, self._words, self._ours, self._theirs):
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
        start: int | None = None,
        packed: bool = False,
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
        kind: type[Ring] = PackedRing if packed else Ring
        if start is None:
            start = (PACKED if packed else SPLIT).start
        kw: dict[str, Any] = {"start": start, "event_idx": event_idx}
        self.rx = kind(memory, size, base, index=2 * pair, **kw)
        behind = align(self.rx.end, 4096)
        self.tx = kind(memory, size, behind, index=2 * pair + 1, **kw)
        at = align(self.tx.end, 4096)
        count = size if rx_buffers is None else rx_buffers
        self._rx_free = [at + i * rx_size for i in reversed(range(count))]
        self._rx_busy: dict[int, int] = {}
        self._tx_at = self._tx_start = at + count * rx_size
        self.end = memory.low_size
        self.received: list[bytes] = []
        self.filled: list[tuple[int, int]] = []  # buffers that ``poll`` has read: address, length

    @property
    def rings(self) -> list[Ring]:
        return [self.rx, self.tx]

    def fill(self, count: int | None = None, *, kick: bool = True) -> int:
        """Post receive buffers: ``count``, or all that are free; returns how many were posted."""
        n = 0
        while self._rx_free and self.rx.room and (count is None or n < count):
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
            data = self._take(*used.pop(0))
            for _ in range(struct.unpack_from("<H", data, 10)[0] - 1):
                data += self._take(*used.pop(0))
            packets.append(data)
        if refill and packets:
            self.fill()
        self.received += packets
        return packets

    def _take(self, head: int, length: int) -> bytes:
        """The bytes of a receive buffer, which is free again."""
        gpa = self._rx_busy.pop(head)
        self._rx_free.append(gpa)
        self.filled.append((gpa, length))
        return self.memory.read(gpa, length)

    def wait_packets(self, count: int, timeout: float = 60.0) -> list[bytes]:
        """Poll until ``count`` packets have arrived; returns all packets that arrived meanwhile."""
        wait_for(lambda: self.poll() is not None and len(self.received) >= count, timeout)
        return self.received

    def close(self) -> None:
        self.rx.close()
        self.tx.close()
