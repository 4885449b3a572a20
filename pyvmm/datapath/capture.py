"""Where the captures of a card meet the workers of its emulated data paths."""

from __future__ import annotations

import threading

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class CaptureMember(Protocol):
        """What ``capture.session.Member`` is for a card. :ivar stuck: its rings must stay."""

        stuck: bool

        def ring(self, pair: int) -> Any:
            """The ring of a queue pair."""

    #: Gives the ring of a queue pair, ``struct pv_capture *``, lent until ``CapturePoint.remove``.
    Rings = Callable[[int], Any]


class CapturePoint:
    """The captures of a card, and its present workers. A data path comes and goes; a capture stays,
    and each worker fills the capture's ring of its queue pair. Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captures: list[Rings | None] = [None] * lib.PV_CAPTURES
        self._workers: dict[int, Any] = {}

    def add(self, rings: Rings) -> int:
        """Begin a capture; returns its number, for ``remove``.

        :raises HostError: too many captures are going on, or there is no memory for a ring.
        """
        with self._lock:
            place = next((n for n, one in enumerate(self._captures) if one is None), None)
            if place is None:
                raise HostError(
                    f"{lib.PV_CAPTURES} captures of this card are going on", "end one of them"
                )
            found = {pair: rings(pair) for pair in self._workers}
            self._captures[place] = rings
            for pair, worker in self._workers.items():
                lib.pv_net_worker_capture(worker, place, found[pair])
            return place

    def remove(self, place: int) -> bool:
        """End a capture; no worker uses its rings any more. False if one may, because its thread
        was stopped in the middle of a packet: then the rings must stay.
        """
        with self._lock:
            self._captures[place] = None
            gone = [
                lib.pv_net_worker_capture(worker, place, ffi.NULL)
                for worker in self._workers.values()
            ]
            return all(gone)

    def enter(self, pair: int, worker: Any) -> None:
        """A queue pair has a worker, ``struct pv_net_worker *``, lent until ``leave``.

        :raises HostError: there is no memory for a ring.
        """
        with self._lock:
            for place, rings in enumerate(self._captures):
                if rings is not None:
                    lib.pv_net_worker_capture(worker, place, rings(pair))
            self._workers[pair] = worker

    def leave(self, pair: int) -> None:
        """The worker of a queue pair has ended."""
        with self._lock:
            self._workers.pop(pair, None)


class PointCard:
    """A card that has nothing but a ``CapturePoint``; implements ``Captured`` (capture.session).

    :param words: what the file says of it.
    """

    def __init__(self, name: str, words: str, point: CapturePoint) -> None:
        self.name, self._words, self._point = name, words, point
        self._lock = threading.Lock()  # who detaches second waits until the rings are free
        self._places: dict[CaptureMember, int] = {}

    def facts(self) -> tuple[str, bytes]:
        """The words, and no MAC address."""
        return self._words, b""

    def attach(self, member: CaptureMember) -> None:
        """Give a capture packets, from now on.

        :raises HostError: as ``CapturePoint.add``.
        """
        with self._lock:
            self._places[member] = self._point.add(member.ring)

    def detach(self, member: CaptureMember) -> None:
        """End that. A second call does nothing."""
        with self._lock:
            place = self._places.pop(member, None)
            if place is not None and not self._point.remove(place):
                member.stuck = True
