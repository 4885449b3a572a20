"""The rings of a vhost-user device, which go from one back-end to the next."""

from __future__ import annotations

import time

from pyvmm.errors import VhostUserError
from pyvmm.fd import eventfds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any, Protocol

    from pyvmm.memory import GuestMemory
    from pyvmm.vhostuser.history import BackendHistory
    from pyvmm.vhostuser.session import InflightFile, Session, Virtqueue

    class Times(Protocol):
        """When rings changed hands, in monotonic nanoseconds per ring index.

        :ivar asked: just before the back-end was asked to give a ring back.
        :ivar began: when the back-end had been given a ring.
        """

        asked: dict[int, int]
        began: dict[int, int]


class RingSet:
    """The rings that a device has in use, and their state that survives a back-end. One thread at a
    time; the methods that take a session are called in a conversation.

    :param count: rings that the device can have. :param times: is told when rings change hands.
    :param history: is told about wrong positions of a back-end.
    :ivar rings: in use; empty while the device is at rest. :ivar acked: the driver's features.
    :ivar memory: holds the rings. :ivar inflight: the file of the back-ends so far, or None.
    :ivar errs: eventfds by ring index; a back-end signals that it has found the ring malformed.
    """

    def __init__(self, count: int, times: Times, history: BackendHistory) -> None:
        self.times = times
        self.acked = 0
        self.memory: Any = None
        self.rings: list[Virtqueue] = []
        self.inflight: InflightFile | None = None
        self._history = history
        self._stopped_at: dict[int, int] = {}  # positions of rings that ``stop_some`` stopped
        self._unserved: dict[int, int] = {}  # positions; empty while a back-end may have moved on
        self.errs = eventfds(count)

    def use(self, acked: int, memory: GuestMemory, rings: Sequence[Virtqueue]) -> None:
        """Use these rings from now on."""
        self.acked, self.memory, self.rings = acked, memory, list(rings)
        self._unserved = {ring.index: ring.base for ring in rings}
        self.times.began, self._stopped_at = {}, {}
        for err in self.errs:
            err.drain()

    def rest(self) -> None:
        """Use no ring any more."""
        self.rings = []
        self.forget_inflight()

    @property
    def size(self) -> int:
        """Entries of the largest ring."""
        return max(ring.size for ring in self.rings)

    def pending(self, ring: Virtqueue) -> int:
        """How many chains of a ring were made available and not returned; 0 for a ring that does
        not tell.
        """
        at = ring.format.returned(self.memory, ring)
        return ring.format.pending(self.memory, ring, at) if at is not None else 0

    def from_used(self) -> list[int]:
        """The positions behind the last chains that were returned, if a back-end cannot be asked.

        :raises VhostUserError: the rings do not tell, and the back-end has kept no notes.
        """
        return [self._from_used(ring) for ring in self.rings]

    def _from_used(self, ring: Virtqueue) -> int:
        at = ring.format.returned(self.memory, ring)
        if at is None:
            at = self._unserved.get(ring.index)
        if at is None and self.inflight is not None:
            places = self.inflight.places(ring.index, ring.size)
            if places is not None:
                at = ring.format.from_notes(self.memory, ring, *places)
        if at is None:
            raise VhostUserError(
                f"ring {ring.index} is packed, and the back-end, which has kept no notes, is gone:"
                " nobody knows how far it was",
                "the guest has to reset its card; a back-end with INFLIGHT_SHMFD keeps notes",
            )
        return at

    def undo(self) -> None:
        """Put back what a back-end that is gone has overwritten in the rings and not published. For
        a next owner who does not know the notes; a back-end that gets them does so itself, and
        knows better whether its predecessor has published the batch since.
        """
        if self.inflight is None or self._unserved:
            return
        for ring in self.rings:
            places = self.inflight.places(ring.index, ring.size)
            if places is None or ring.format.returned(self.memory, ring) is not None:
                continue
            begin, overwritten = self.inflight.overwritten(ring.index, ring.size)
            if begin == places[0]:  # else it is of an earlier batch
                ring.format.undo(self.memory, ring, begin, overwritten)

    # --- with a back-end --------------------------------------------------------------------------

    def share_inflight(self, s: Session, size: int) -> None:
        """Have the back-end note chains in the file of its predecessor, or in a new one."""
        file = s.share_inflight(self.inflight, len(self.errs), size)
        if file is not self.inflight:
            self.leave_inflight()
            self.inflight = file

    def leave_inflight(self) -> None:
        """Close the in-flight file, because the next back-end gets another one or none. What its
        notes tell is kept: that back-end may go before it has served anything.
        """
        if self.inflight is not None:
            positions = self.from_used()
            self.undo()
            indices = (ring.index for ring in self.rings)
            self._unserved = dict(zip(indices, positions, strict=True))
        self.forget_inflight()

    def forget_inflight(self) -> None:
        """Close the in-flight file, because its notes are of no use any more."""
        file, self.inflight = self.inflight, None
        if file is not None:
            file.close()

    def give(self, s: Session, bases: Sequence[int]) -> None:
        """Have the back-end serve the rings. :param bases: the positions."""
        for ring, base in zip(self.rings, bases, strict=True):
            s.share_ring(ring, base, self.memory, self.errs[ring.index])
        s.enable_rings(ring.index for ring in self.rings)
        now = time.monotonic_ns()
        for ring in self.rings:
            ring.kick.nudge()  # for chains that were made available before
            self.times.began[ring.index] = now
        self._unserved = {}

    def take(self, s: Session) -> list[int]:
        """Take all rings back; returns the positions."""
        held = self._stopped_at
        return [held[r.index] if r.index in held else self._take(s, r) for r in self.rings]

    def take_some(self, s: Session, indices: Iterable[int]) -> None:
        """Take some rings back; ``take`` comes next and returns their positions, too."""
        wanted = set(indices)
        for ring in self.rings:
            if ring.index in wanted:
                self._stopped_at[ring.index] = self._take(s, ring)

    def _take(self, s: Session, ring: Virtqueue) -> int:
        if ring.index not in s.sharing:
            return self._from_used(ring)
        self.times.asked[ring.index] = time.monotonic_ns()
        base = ring.format.whole(s.stop_ring(ring.index))
        place = self.memory, ring, base
        if max(ring.format.held(*place), ring.format.pending(*place)) > ring.size:
            self._history.count("bad_bases")
            return self._from_used(ring)
        return base

    def lost(self) -> None:
        """Forget the positions that the back-end has reported, because it is gone."""
        self._stopped_at = {}

    def close(self) -> None:
        """Release everything that is not lent."""
        self.forget_inflight()
        for err in self.errs:
            err.close()
