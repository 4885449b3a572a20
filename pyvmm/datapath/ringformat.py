"""The two formats of a virtqueue, for whoever hands rings from one data path to another: split
(virtio 1.2, 2.7) and packed (2.8).

A *position* is the number with which a ring's next owner starts, in the form that vhost and
vhost-user use (cext/vring.h). A split ring's is the next available index; the used index is in the
ring. A packed ring does not hold either, so its position has both: the next available descriptor
in bits 0 to 14 with the wrap counter in bit 15, and the same for the used descriptors in the upper
16 bits.
"""

from __future__ import annotations

import struct

from pyvmm.spec.virtio import (
    PACKED_EVENT_ALIGN_SIZE,
    VIRTIO_F_RING_PACKED,
    VRING_AVAIL_ALIGN_SIZE,
    VRING_DESC_ALIGN_SIZE,
    VRING_DESC_F_NEXT,
    VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED,
    VRING_PACKED_EVENT_FLAG_DESC,
    VRING_PACKED_EVENT_FLAG_ENABLE,
    VRING_USED_ALIGN_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    from pyvmm.memory import GuestMemory

    class Placed(Protocol):
        """A virtqueue in guest memory.

        :ivar size: entries. :ivar desc, avail, used: guest-physical addresses of the descriptor,
            driver and device areas.
        """

        size: int
        desc: int
        avail: int
        used: int


class Area:
    """One of the three areas of a virtqueue.

    :ivar name: in the specification's words. :ivar length: in bytes. :ivar align: in bytes.
    """

    __slots__ = ("align", "length", "name")

    def __init__(self, name: str, length: int, align: int) -> None:
        self.name, self.length, self.align = name, length, align


class RingFormat:
    """What depends on the format of a ring. The format itself has no state.

    :ivar start: the position of a ring that was never used.
    """

    name: str
    start: int

    def areas(self, size: int) -> tuple[Area, Area, Area]:
        """The descriptor, driver and device areas of a ring of ``size`` entries."""
        raise NotImplementedError

    def allows(self, size: int) -> bool:
        """Whether a ring may have ``size`` entries."""
        raise NotImplementedError

    def whole(self, base: int) -> int:
        """A position as a peer has given it, in full."""
        return base

    def returned(self, memory: GuestMemory, ring: Placed) -> int | None:
        """The position of a ring of which nobody has any chain in hand, by what is in the ring;
        None if the ring does not tell.
        """
        raise NotImplementedError

    def from_notes(self, memory: GuestMemory, ring: Placed, old: int, new: int) -> int | None:
        """The same for a ring that does not tell, by a back-end's notes.

        :param old, new: where the used descriptors ended before the back-end's latest batch, and
            where with it. They may be any value.
        :returns: None if they make no sense.
        """
        raise NotImplementedError

    def undo(
        self,
        memory: GuestMemory,
        ring: Placed,
        begin: int,
        overwritten: Iterable[tuple[int, int, int, int]],
    ) -> None:
        """Put back what a batch has overwritten that a back-end, now dead, has not published. Does
        nothing if the batch was published.

        :param begin: where the batch begins, as ``old`` of ``from_notes``. :param overwritten: of
            each of its chains, in order: the slots, and the first descriptor's length, buffer id
            and flags. All may be any values.
        """
        raise NotImplementedError

    def held(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """How many entries have been taken and not returned by an owner that stopped at ``base``.

        :returns: more than ``ring.size`` if ``base`` cannot be right.
        """
        raise NotImplementedError

    def give_back(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """The position behind the last chain that was returned, so that what was taken is taken
        again.
        """
        raise NotImplementedError

    def pending(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """How many chains the driver has made available from ``base`` on.

        :returns: more than ``ring.size`` if ``base`` or the ring cannot be right.
        """
        raise NotImplementedError

    def offers(self, memory: GuestMemory, ring: Placed) -> bytes:
        """Bytes that change when the driver makes a chain available, and only then."""
        raise NotImplementedError

    def returns(self, memory: GuestMemory, ring: Placed) -> bytes:
        """Bytes that change when the device returns a chain."""
        raise NotImplementedError

    def ask_for_kicks(
        self, memory: GuestMemory, ring: Placed, base: int, *, event_idx: bool
    ) -> None:
        """Have the driver kick at its next chain, on behalf of a device that is at ``base``."""
        raise NotImplementedError

    def words(self, base: int) -> str:
        """A position for people."""
        raise NotImplementedError


class SplitFormat(RingFormat):
    """Descriptor table, available ring and used ring (2.7)."""

    name = "split"
    start = 0

    def areas(self, size: int) -> tuple[Area, Area, Area]:
        """2.7: the event index of EVENT_IDX is part of either ring."""
        return (
            Area("descriptor table", 16 * size, VRING_DESC_ALIGN_SIZE),
            Area("available ring", 6 + 2 * size, VRING_AVAIL_ALIGN_SIZE),
            Area("used ring", 6 + 8 * size, VRING_USED_ALIGN_SIZE),
        )

    def allows(self, size: int) -> bool:
        """A power of two (2.7)."""
        return size > 0 and not size & (size - 1)

    def returned(self, memory: GuestMemory, ring: Placed) -> int | None:
        """The used index."""
        return _index(memory, ring.used)

    def from_notes(self, memory: GuestMemory, ring: Placed, old: int, new: int) -> int | None:
        """Not needed."""
        return self.returned(memory, ring)

    def undo(
        self,
        memory: GuestMemory,
        ring: Placed,
        begin: int,
        overwritten: Iterable[tuple[int, int, int, int]],
    ) -> None:
        """Not needed: a used element that was not published is nothing to the next owner."""

    def held(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """By the used index."""
        return base - _index(memory, ring.used) & 0xFFFF if base <= 0xFFFF else ring.size + 1

    def give_back(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """The used index."""
        return _index(memory, ring.used)

    def pending(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """By the available index."""
        return _index(memory, ring.avail) - base & 0xFFFF

    def offers(self, memory: GuestMemory, ring: Placed) -> bytes:
        """The available index."""
        return memory.read(ring.avail + 2, 2)

    def returns(self, memory: GuestMemory, ring: Placed) -> bytes:
        """The used index."""
        return memory.read(ring.used + 2, 2)

    def ask_for_kicks(
        self, memory: GuestMemory, ring: Placed, base: int, *, event_idx: bool
    ) -> None:
        """2.7.8 and 2.7.10."""
        memory.write(ring.used, bytes(2))
        if event_idx:
            memory.write(ring.used + 4 + 8 * ring.size, base.to_bytes(2, "little"))

    def words(self, base: int) -> str:
        """The index."""
        return str(base)


class PackedFormat(RingFormat):
    """Descriptor ring and two event suppression areas (2.8)."""

    name = "packed"
    start = 0x8000_8000

    def areas(self, size: int) -> tuple[Area, Area, Area]:
        """2.8.10.1."""
        return (
            Area("descriptor ring", 16 * size, VRING_DESC_ALIGN_SIZE),
            Area("driver event suppression area", 4, PACKED_EVENT_ALIGN_SIZE),
            Area("device event suppression area", 4, PACKED_EVENT_ALIGN_SIZE),
        )

    def allows(self, size: int) -> bool:
        """Any (2.8.10.1)."""
        return size > 0

    def whole(self, base: int) -> int:
        """DPDK gives the lower half alone: whatever was taken is returned."""
        return base if base > 0xFFFF else base | base << 16

    def returned(self, memory: GuestMemory, ring: Placed) -> int | None:
        """The ring does not tell: a used descriptor says nothing of those behind it that belong to
        the same chain.
        """
        return None

    def from_notes(self, memory: GuestMemory, ring: Placed, old: int, new: int) -> int | None:
        """The flags of the batch's first descriptor tell whether the batch was published
        (vhost-user, "Inflight I/O tracking").
        """
        at = _place(old, ring.size)
        if at is None or _place(new, ring.size) is None:
            return None
        if old != new:
            flags = memory.read(ring.desc + 16 * (old & 0x7FFF) + 14, 2)
            if not available(int.from_bytes(flags, "little"), wrap=at < ring.size):
                old = new
        return old | old << 16

    def undo(
        self,
        memory: GuestMemory,
        ring: Placed,
        begin: int,
        overwritten: Iterable[tuple[int, int, int, int]],
    ) -> None:
        """A used descriptor takes the place of the available one. The next owner would take it for
        the end of what is available, and the driver would wait for it for ever.
        """
        at = _place(begin, ring.size)
        if at is None:
            return
        flags = memory.read(ring.desc + 16 * (begin & 0x7FFF) + 14, 2)
        if not available(int.from_bytes(flags, "little"), wrap=at < ring.size):
            return
        for slots, *fields in overwritten:
            half = struct.pack("<IHH", *fields)
            memory.write(ring.desc + 16 * (at % ring.size) + 8, half)
            at += slots

    def held(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """By the two halves of the position; in descriptors."""
        taken, used = _place(base, ring.size), _place(base >> 16, ring.size)
        if taken is None or used is None:
            return ring.size + 1
        return (taken - used) % (2 * ring.size)

    def give_back(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """The upper half of the position for both."""
        return base >> 16 | base & 0xFFFF0000

    def pending(self, memory: GuestMemory, ring: Placed, base: int) -> int:
        """Looks at the descriptors from ``base`` on until one is not available."""
        at = _place(base, ring.size)
        if at is None:
            return 0
        table = memory.read(ring.desc, 16 * ring.size)
        chains = 0
        for _ in range(ring.size):
            (flags,) = struct.unpack_from("<H", table, 16 * (at % ring.size) + 14)
            if not available(flags, wrap=at < ring.size):
                break
            chains += not flags & VRING_DESC_F_NEXT
            at = (at + 1) % (2 * ring.size)
        return chains

    def offers(self, memory: GuestMemory, ring: Placed) -> bytes:
        """The AVAIL bits, which a device leaves as they are (2.8.1)."""
        flags = memory.read(ring.desc, 16 * ring.size)[14::16]
        return bytes(byte & 1 << VRING_PACKED_DESC_F_AVAIL for byte in flags)

    def returns(self, memory: GuestMemory, ring: Placed) -> bytes:
        """The descriptor ring."""
        return memory.read(ring.desc, 16 * ring.size)

    def ask_for_kicks(
        self, memory: GuestMemory, ring: Placed, base: int, *, event_idx: bool
    ) -> None:
        """2.8.10: the place first, then the flags that refer to it."""
        if event_idx:
            memory.write(ring.used, (base & 0xFFFF).to_bytes(2, "little"))
        flags = VRING_PACKED_EVENT_FLAG_DESC if event_idx else VRING_PACKED_EVENT_FLAG_ENABLE
        memory.write(ring.used + 2, flags.to_bytes(2, "little"))

    def words(self, base: int) -> str:
        """Index and wrap counter of the next available descriptor."""
        return f"{base & 0x7FFF}, wrap counter {base >> 15 & 1}"


SPLIT, PACKED = SplitFormat(), PackedFormat()


def ring_format(acked: int) -> RingFormat:
    """The format that a driver with the features ``acked`` (a mask) uses."""
    return PACKED if acked >> VIRTIO_F_RING_PACKED & 1 else SPLIT


def available(flags: int, *, wrap: bool) -> bool:
    """Whether a descriptor of a packed ring is available in a lap with this wrap counter
    (2.8.1).
    """
    avail = bool(flags >> VRING_PACKED_DESC_F_AVAIL & 1)
    used = bool(flags >> VRING_PACKED_DESC_F_USED & 1)
    return avail == wrap and used != wrap


def _index(memory: GuestMemory, area: int) -> int:
    """The index of an available or used ring (2.7.6, 2.7.8)."""
    return int.from_bytes(memory.read(area + 2, 2), "little")


def _place(half: int, size: int) -> int | None:
    """Where half a position is in two laps of the ring, that with the wrap counter at 1 first;
    None if it is nowhere.
    """
    index, wrap = half & 0x7FFF, half >> 15 & 1
    if index >= size:
        return None
    return index if wrap else index + size
