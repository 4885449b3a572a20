"""Snapshots of a split virtqueue, taken from outside while driver and device use it (virtio 1.2,
2.7).

Everything is read once into a copy, and decided on the copy; every walk is bounded by the size of
the queue. Nothing is locked. The indices are read in an order that keeps them consistent for a
well-behaved driver: used before available. Whatever a hostile driver writes is shown as it is, with
the problem that it has.
"""

from __future__ import annotations

import struct

from pyvmm.spec.virtio import (
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.device import Queue

CHAIN_MAX = 64  # descriptors of a chain that are shown


class RingSnapshot:
    """What was in the rings of ``queue`` at one moment.

    :param acked: the negotiated features.
    :param chains: how many chains to follow at most, of those that the device has, and of those
        that it has returned last.
    :raises IndexError: a ring is not in RAM (the device refuses such a queue).
    """

    def __init__(self, memory: GuestMemory, queue: Queue, acked: int, *, chains: int = 16) -> None:
        self._memory = memory
        size = self.size = queue.size
        self.event_idx = bool(acked >> VIRTIO_RING_F_EVENT_IDX & 1)
        self._indirect = bool(acked >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        self.problems: list[str] = []
        used = memory.read(queue.used, 6 + 8 * size)
        avail = memory.read(queue.avail, 6 + 2 * size)
        self._table = memory.read(queue.desc, 16 * size)
        self.used_flags, self.used_idx = struct.unpack_from("<HH", used)
        self.avail_flags, self.avail_idx = struct.unpack_from("<HH", avail)
        (self.used_event,) = struct.unpack_from("<H", avail, 4 + 2 * size)
        (self.avail_event,) = struct.unpack_from("<H", used, 4 + 8 * size)
        #: Chains that the driver has published and the device has not returned.
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
        if not self._indirect:
            return "an indirect descriptor that was not negotiated"
        addr, length = struct.unpack_from("<QI", self._table, 16 * at)
        if not length or length % 16:
            return f"an indirect table of {length} bytes"
        count = min(length // 16, CHAIN_MAX)
        try:
            table = self._memory.read(addr, 16 * count)
        except IndexError:
            return f"an indirect table at {addr:#x}, outside RAM"
        seen = set()
        n = 0
        while len(out) < CHAIN_MAX:
            if n >= length // 16:
                return f"descriptor {n} in an indirect table of {length // 16}"
            if n in seen:
                return f"descriptor {n} of the indirect table again: a loop"
            if n >= count:
                return ""
            seen.add(n)
            out.append({**self._descriptor(table, n), "indirect": True})
            flags, following = struct.unpack_from("<HH", table, 16 * n + 12)
            if not flags & VRING_DESC_F_NEXT:
                return ""
            n = following
        return ""

    def _descriptor(self, table: bytes, n: int) -> dict[str, object]:
        addr, length, flags, following = struct.unpack_from("<QIHH", table, 16 * n)
        words = [
            word
            for bit, word in (
                (VRING_DESC_F_NEXT, "next"),
                (VRING_DESC_F_WRITE, "write"),
                (VRING_DESC_F_INDIRECT, "indirect"),
            )
            if flags & bit
        ]
        entry: dict[str, object] = {"index": n, "addr": addr, "len": length, "flags": words}
        if flags & VRING_DESC_F_NEXT:
            entry["next"] = following
        if flags & ~(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT):
            entry["reserved-flags"] = flags & ~(
                VRING_DESC_F_NEXT | VRING_DESC_F_WRITE | VRING_DESC_F_INDIRECT
            )
        return entry

    def as_dict(self) -> dict[str, object]:
        """For JSON (docs/control.md, x-pyvmm-rings)."""
        return {
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
