"""Snapshots of a virtqueue, taken from outside while driver and device use it (virtio 1.2, 2.7 and
2.8).

Everything is read once into a copy, and decided on the copy; every walk is bounded by the size of
the queue. Nothing is locked. The indices are read in an order that keeps them consistent for a
well-behaved driver: used before available. Whatever a hostile driver writes is shown as it is, with
the problem that it has.
"""

from __future__ import annotations

import struct

from pyvmm.datapath.ringformat import PACKED, ring_format
from pyvmm.spec.virtio import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.device import Queue

CHAIN_MAX = 64  # descriptors of a chain that are shown
#: Flag of a descriptor -> word.
WORDS = {
    VRING_DESC_F_NEXT: "next",
    VRING_DESC_F_WRITE: "write",
    VRING_DESC_F_INDIRECT: "indirect",
}
AVAIL, USED = 1 << VRING_PACKED_DESC_F_AVAIL, 1 << VRING_PACKED_DESC_F_USED
#: Flags of an event suppression area.
EVENTS = {
    VRING_PACKED_EVENT_FLAG_ENABLE: "enable",
    VRING_PACKED_EVENT_FLAG_DISABLE: "disable",
    VRING_PACKED_EVENT_FLAG_DESC: "desc",
}


def ring_snapshot(
    memory: GuestMemory,
    queue: Queue,
    acked: int,
    *,
    chains: int = 16,
    position: Callable[[], int | None] = lambda: None,
) -> dict[str, object]:
    """What was in the rings of ``queue`` at one moment, for JSON (docs/control.md, x-pyvmm-rings).

    :param acked: the negotiated features.
    :param chains: how many chains to follow at most, of those that the device has, and of those
        that it has returned last.
    :param position: where the device is (``datapath.ringformat``), asked after the rings have been
        read, so that the device has taken at least what it had returned; None if nobody tells.
    :raises IndexError: a ring is not in RAM (the device refuses such a queue).
    """
    kind = PackedSnapshot if ring_format(acked) is PACKED else RingSnapshot
    look = kind(memory, queue, acked, chains=chains)
    at = position()
    taken = {"taken": None, "in-flight": None} if at is None else look.taken(at)
    return {**look.as_dict(), **taken}


class Snapshot:
    """What both formats have in common: descriptors. For the parameters see ``ring_snapshot``.

    :ivar outstanding: chains that the driver has published and the device has not returned.
    """

    def __init__(self, memory: GuestMemory, queue: Queue, acked: int) -> None:
        self._memory = memory
        self.size = queue.size
        self.event_idx = bool(acked >> VIRTIO_RING_F_EVENT_IDX & 1)
        self._indirect = bool(acked >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        self.problems: list[str] = []
        self.outstanding = 0

    def _read_table(self, at: int, length: int) -> tuple[bytes, str]:
        """As much of an indirect table as is shown; or what is wrong with the table."""
        if not self._indirect:
            return b"", "an indirect descriptor that was not negotiated"
        if not length or length % 16:
            return b"", f"an indirect table of {length} bytes"
        try:
            return self._memory.read(at, 16 * min(length // 16, CHAIN_MAX)), ""
        except IndexError:
            return b"", f"an indirect table at {at:#x}, outside RAM"

    def _entry(self, n: int, addr: int, length: int, flags: int, more: int) -> dict[str, object]:
        """A descriptor. :param more: flags beside the three of ``WORDS`` that are in order."""
        words = [word for bit, word in WORDS.items() if flags & bit]
        entry: dict[str, object] = {"index": n, "addr": addr, "len": length, "flags": words}
        reserved = flags & ~(sum(WORDS) | more)
        if reserved:
            entry["reserved-flags"] = reserved
        return entry


class RingSnapshot(Snapshot):
    """A split virtqueue."""

    def __init__(self, memory: GuestMemory, queue: Queue, acked: int, *, chains: int = 16) -> None:
        super().__init__(memory, queue, acked)
        size = self.size
        used = memory.read(queue.used, 6 + 8 * size)
        avail = memory.read(queue.avail, 6 + 2 * size)
        self._table = memory.read(queue.desc, 16 * size)
        self.used_flags, self.used_idx = struct.unpack_from("<HH", used)
        self.avail_flags, self.avail_idx = struct.unpack_from("<HH", avail)
        (self.used_event,) = struct.unpack_from("<H", avail, 4 + 2 * size)
        (self.avail_event,) = struct.unpack_from("<H", used, 4 + 8 * size)
        self.outstanding = (self.avail_idx - self.used_idx) & 0xFFFF
        if self.outstanding > size:
            self.problems.append(f"{self.outstanding} chains are outstanding in a queue of {size}")
        shown = min(self.outstanding, size, chains)
        self.available = []
        for n in range(shown):
            at = (self.used_idx + n) & 0xFFFF
            (head,) = struct.unpack_from("<H", avail, 4 + 2 * (at % size))
            self.available.append({"at": at, "head": head, **self._chain(head)})
        self.returned = []
        for n in range(min(chains, size), 0, -1):
            at = (self.used_idx - n) & 0xFFFF
            ident, length = struct.unpack_from("<II", used, 4 + 8 * (at % size))
            self.returned.append({"at": at, "id": ident, "len": length})
        self._owners(avail)

    def _owners(self, avail: bytes) -> None:
        """Find the descriptors that the device has: those of the outstanding chains, if it returns
        chains in order.
        """
        owned = bytearray(self.size)
        left = 4 * self.size  # steps in all: chains of a hostile driver may run into each other
        for n in range(min(self.outstanding, self.size)):
            (head,) = struct.unpack_from("<H", avail, 4 + 2 * ((self.used_idx + n) % self.size))
            while head < self.size and not owned[head] and left:
                left -= 1
                owned[head] = 1
                flags, following = struct.unpack_from("<HH", self._table, 16 * head + 12)
                if not flags & VRING_DESC_F_NEXT:
                    break
                head = following
        self.device_owned = [i for i, mine in enumerate(owned) if mine]

    def _chain(self, head: int) -> dict[str, object]:
        """The descriptors of a chain; those of an indirect table come after the descriptor that
        names it.
        """
        out: list[dict[str, object]] = []
        problem = ""
        seen = set()
        at = head
        while True:
            if at >= self.size:
                problem = f"descriptor {at} in a table of {self.size}"
            elif at in seen:
                problem = f"descriptor {at} again: a loop"
            if problem or len(out) >= CHAIN_MAX:
                break
            seen.add(at)
            entry = self._descriptor(self._table, at)
            out.append(entry)
            flags = struct.unpack_from("<H", self._table, 16 * at + 12)[0]
            if flags & VRING_DESC_F_INDIRECT:
                problem = self._indirect_table(at, out)
            if problem or not flags & VRING_DESC_F_NEXT:
                break
            (at,) = struct.unpack_from("<H", self._table, 16 * at + 14)
        return {"descriptors": out, **({"problem": problem} if problem else {})}

    def _indirect_table(self, at: int, out: list[dict[str, object]]) -> str:
        addr, length = struct.unpack_from("<QI", self._table, 16 * at)
        table, problem = self._read_table(addr, length)
        seen: set[int] = set()
        n = 0
        while not problem and len(out) < CHAIN_MAX:
            if n >= length // 16:
                return f"descriptor {n} in an indirect table of {length // 16}"
            if n in seen:
                return f"descriptor {n} of the indirect table again: a loop"
            if 16 * n >= len(table):
                return ""
            seen.add(n)
            out.append({**self._descriptor(table, n), "indirect": True})
            flags, following = struct.unpack_from("<HH", table, 16 * n + 12)
            if not flags & VRING_DESC_F_NEXT:
                return ""
            n = following
        return problem

    def _descriptor(self, table: bytes, n: int) -> dict[str, object]:
        addr, length, flags, following = struct.unpack_from("<QIHH", table, 16 * n)
        entry = self._entry(n, addr, length, flags, 0)
        if flags & VRING_DESC_F_NEXT:
            entry["next"] = following
        return entry

    def taken(self, position: int) -> dict[str, object]:
        """Which chains the device has taken and not returned, for JSON.

        :param position: of the device, of a moment after this snapshot; at most what the snapshot
            knows of is counted.
        """
        most = min(self.outstanding, self.size)
        many = min((position - self.used_idx) & 0xFFFF, most)
        return {"taken": (self.used_idx + many) & 0xFFFF, "in-flight": many}

    def as_dict(self) -> dict[str, object]:
        """For JSON (docs/control.md, x-pyvmm-rings)."""
        return {
            "format": "split",
            "size": self.size,
            "event-idx": self.event_idx,
            "avail": {
                "flags": self.avail_flags,
                "idx": self.avail_idx,
                "used-event": self.used_event,
            },
            "used": {
                "flags": self.used_flags,
                "idx": self.used_idx,
                "avail-event": self.avail_event,
            },
            "outstanding": self.outstanding,
            "device-owned": self.device_owned,
            "available": self.available,
            "returned": self.returned,
            "problems": self.problems,
        }


class PackedSnapshot(Snapshot):
    """A packed virtqueue. No place is in memory; both sides' follow from the descriptors' flags.

    The driver goes through the ring in order, so the AVAIL bit is the wrap counter of the lap in
    which a descriptor was written last, and the driver's place is where this bit changes. The
    device's place is behind the last used descriptor. How many descriptors a returned chain had is
    not in the ring; those that follow with the same buffer id are taken to be part of the chain, as
    drivers write them.
    """

    def __init__(self, memory: GuestMemory, queue: Queue, acked: int, *, chains: int = 16) -> None:
        super().__init__(memory, queue, acked)
        size = self.size
        self._ring = memory.read(queue.desc, 16 * size)
        self._driver = memory.read(queue.avail, 4)
        self._device = memory.read(queue.used, 4)
        self.next = self._driver_next()
        self.returned: list[dict[str, object]] = []
        self.used_next = self._device_next(chains)
        self.device_owned = []
        self.available: list[dict[str, object]] = []
        at = self.used_next
        while at != self.next:
            chain = self._chain(at)
            if len(self.available) < chains:
                self.available.append(chain)
            self.outstanding += 1
            for _ in range(chain.pop("slots")):
                if at != self.next:
                    self.device_owned.append(at % size)
                    at = (at + 1) % (2 * size)
        self.device_owned.sort()

    def _at(self, at: int) -> tuple[int, int, int, int]:
        """Address, length, buffer id and flags of a descriptor."""
        addr, length, ident, flags = struct.unpack_from("<QIHH", self._ring, 16 * (at % self.size))
        return addr, length, ident, flags

    def _driver_next(self) -> int:
        """In two laps, that with the wrap counter at 1 first, as all places here."""
        first = self._at(0)[3] & AVAIL
        for at in range(1, self.size):
            if self._at(at)[3] & AVAIL != first:
                return at if first else at + self.size
        return self.size if first else 0

    def _is(self, at: int, *, used: bool) -> bool:
        """Whether the flags say that the descriptor is used, or available, in the lap of ``at``."""
        wrap = at < self.size
        return self._at(at)[3] & (AVAIL | USED) == AVAIL * wrap | USED * (wrap == used)

    def _device_next(self, chains: int) -> int:
        """Find the used descriptors that were written last; returns the device's place."""
        laps, place = 2 * self.size, (self.next - self.size) % (2 * self.size)
        for n in range(1, self.size + 1):
            at = (self.next - n) % laps
            if not self._is(at, used=True):
                continue
            _, length, ident, flags = self._at(at)
            if not self.returned:
                place = (at + 1) % laps
                while place != self.next and self._is(place, used=False):
                    if self._at(place)[2] != ident:
                        break
                    place = (place + 1) % laps
            if len(self.returned) == chains:
                break
            length = length if flags & VRING_DESC_F_WRITE else 0
            self.returned.insert(0, {"at": at % self.size, "id": ident, "len": length})
        return place

    def _chain(self, at: int) -> dict[str, Any]:
        """The chain at a place; ``slots`` is how many descriptors of the ring it has."""
        out: list[dict[str, object]] = []
        chain: dict[str, Any] = {"at": at % self.size, "descriptors": out, "slots": 0}
        while chain["slots"] < self.size:
            addr, length, ident, flags = self._at(at)
            if len(out) < CHAIN_MAX:
                out.append(self._entry(at % self.size, addr, length, flags, AVAIL | USED))
            chain["slots"] += 1
            chain["id"] = ident
            if flags & VRING_DESC_F_INDIRECT:
                table, problem = self._read_table(addr, length)
                if problem:
                    chain["problem"] = problem
                for n in range(min(len(table) // 16, CHAIN_MAX - len(out))):
                    addr, length, _, flags_n = struct.unpack_from("<QIHH", table, 16 * n)
                    entry = self._entry(n, addr, length, flags_n & VRING_DESC_F_WRITE, 0)
                    out.append({**entry, "indirect": True})
            if not flags & VRING_DESC_F_NEXT:
                return chain
            at = (at + 1) % (2 * self.size)
        chain["problem"] = "the chain has no end"
        return chain

    def _state(self, n: int) -> str:
        """One letter per descriptor: see ``as_dict``."""
        wrap = bool(self._at(n)[3] & AVAIL)
        if n in self._owned:
            return "D" if wrap else "d"
        at = n if wrap else n + self.size
        if self._is(at, used=True):
            return "U" if wrap else "u"
        return "."

    def _event(self, area: bytes) -> dict[str, object]:
        place, flags = struct.unpack("<HH", area)
        return {
            "flags": EVENTS.get(flags & 3, "reserved"),
            "offset": place & 0x7FFF,
            "wrap": place >> 15,
        }

    def taken(self, position: int) -> dict[str, object]:
        """Which descriptors the device has taken and not returned; see ``RingSnapshot.taken``."""
        index, wrap = position & 0x7FFF, position >> 15 & 1
        at = index % self.size + (0 if wrap else self.size)
        many = min((at - self.used_next) % (2 * self.size), len(self.device_owned))
        at = (self.used_next + many) % (2 * self.size)
        return {
            "taken": {"next": at % self.size, "wrap": int(at < self.size)},
            "in-flight": many,
        }

    def as_dict(self) -> dict[str, object]:
        """For JSON (docs/control.md, x-pyvmm-rings). ``map`` has a letter per descriptor: D the
        device's, U used, and a point for those that were behind a used one in the same chain. The
        letter is small if the descriptor was written in a lap with the wrap counter at 0.
        """
        self._owned = set(self.device_owned)
        return {
            "format": "packed",
            "size": self.size,
            "event-idx": self.event_idx,
            "driver": {
                "next": self.next % self.size,
                "wrap": int(self.next < self.size),
                "event": self._event(self._driver),
            },
            "device": {
                "next": self.used_next % self.size,
                "wrap": int(self.used_next < self.size),
                "event": self._event(self._device),
            },
            "outstanding": self.outstanding,
            "device-owned": self.device_owned,
            "map": "".join(self._state(n) for n in range(self.size)),
            "available": self.available,
            "returned": self.returned,
            "problems": self.problems,
        }
