"""What a network card gives its captures: packets from the rings of its workers while its data path
is emulated, else from its tap, and a comment at each live switch.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from pyvmm.datapath.capture import CapturePoint
from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.capture.session import Member, Source
    from pyvmm.card.uplink import Route, Uplink


class _Joined:
    """A member of a capture. :ivar place: in the ``CapturePoint``.
    :ivar socket: at the tap; None while there is none. :ivar listens: it takes packets.
    """

    def __init__(self, member: Member, place: int) -> None:
        self.member, self.place = member, place
        self.socket: Source | None = None
        self.listens = False


def _why_not(route: Route, queue: int | None) -> str:
    """Why the card cannot be captured on this route; empty if it can.

    :param queue: the index of the only virtqueue that is wanted, or None.
    """
    if route.path.name == "emulated":
        most = 2 * route.net.queues
        if queue is not None and queue >= most:
            return f"it has no virtqueue {queue} for packets, but 0 to {most - 1}"
        return ""
    if route.tap is None and route.net.mode == "vhost-user":
        return "a back-end that is not pyvmm's moves its packets"
    if route.tap is None:
        return f"its packets enter and leave in the device {route.net.device}"
    if route.tap.interface is None:
        return f"tap {route.tap.name} is in another network namespace"
    if queue is not None:
        return f"nobody knows at tap {route.tap.name} which virtqueue a packet is of"
    return ""


def _hint(route: Route, queue: int | None) -> str:
    if queue is not None and (route.tap is not None or route.path.name == "emulated"):
        if route.path.name == "emulated":
            return "name another one"
        return "leave out the virtqueue, or switch to emulated"
    if route.tap is None and route.net.mode == "vhost-user":
        return (
            "capture there, or serve the card by pyvmm backend --socket S --connect S2 --pcap FILE"
            " (docs/capture.md)"
        )
    return "switch to emulated, or capture where the frames go"


class CardCaptures:
    """The captures of a card; implements most of ``Captured`` (capture.session).

    :param name: of the card. :param uplink: lent. :param route: in force at first.
    """

    def __init__(self, name: str, uplink: Uplink, route: Route) -> None:
        self._name, self._uplink, self._route = name, uplink, route
        self._lock = threading.Lock()  # what follows; taken before the captures' own locks
        self._joined: list[_Joined] = []
        self._closed = False

    @property
    def _point(self) -> CapturePoint:
        return self._uplink.captures

    def where(self) -> str:
        """The data path in force and where packets are captured, in words."""
        return _where(self._route)

    def attach(self, member: Member) -> None:
        """Begin to give a capture packets.

        :raises UsageError: the packets do not come past. :raises PyvmmError: there can be no ring
            or no socket.
        """
        with self._lock:
            gone, queue = self._closed, member.queue
            why = "the card has been removed" if gone else _why_not(self._route, queue)
            if why:
                raise UsageError(f"cannot capture {self._name}: {why}", _hint(self._route, queue))
            one = _Joined(member, self._point.add(member.ring))
            self._joined.append(one)
            try:
                self._open(one, self._route)
                self._listen(one)
            except BaseException:
                self._part(one)
                raise

    def detach(self, member: Member) -> None:
        """End that. A second call does nothing."""
        with self._lock:
            for one in [one for one in self._joined if one.member is member]:
                self._part(one)

    def _part(self, one: _Joined) -> None:
        self._joined.remove(one)
        self._silence(one)
        if not self._point.remove(one.place):
            one.member.stuck = True

    def _open(self, one: _Joined, route: Route) -> None:
        """Have a socket at the route's tap, if the route needs one. It takes no packets yet."""
        why = _why_not(route, one.member.queue)
        if one.socket is not None or route.path.name == "emulated" or why:
            return
        from pyvmm.hostnet.packets import open_packets

        assert route.tap is not None
        fd = open_packets(route.tap.name, self._uplink.namespace)
        one.socket = one.member.socket(fd, mirrored=route.tap.mirrored)

    def _listen(self, one: _Joined) -> None:
        if one.socket is not None and not one.listens:
            one.member.listen(one.socket)
            one.listens = True

    def _silence(self, one: _Joined) -> None:
        socket, one.socket, one.listens = one.socket, None, False
        if socket is not None:
            one.member.retire(socket)

    def prepare(self, route: Route) -> None:
        """Another route is about to be in force: make what takes time. If this fails, the switch
        goes on, and the file will say so.
        """
        with self._lock:
            for one in self._joined:
                with suppress(PyvmmError):
                    self._open(one, route)

    def _try_listen(self, one: _Joined, route: Route) -> str:
        """Returns why there are no packets."""
        try:
            self._open(one, route)  # anew only after a roll-back
            self._listen(one)
        except PyvmmError as e:
            self._silence(one)
            return str(e)
        return ""

    def moved(self, route: Route) -> None:
        """A route is in force from now on: a moment before its data path serves the rings."""
        with self._lock:
            old, self._route = self._route, route
            if old is route:
                return
            for one in self._joined:
                why = _why_not(route, one.member.queue)
                if route.path.name == "emulated" or why:
                    self._silence(one)
                else:
                    why = self._try_listen(one, route)
                lost = f", where nothing is captured: {why}" if why else ""
                one.member.note(f"pyvmm: {self._name} is now {_where(route)}{lost}")

    def settle(self) -> None:
        """The hand-over is over: give up sockets that were made in vain."""
        with self._lock:
            for one in self._joined:
                if not one.listens:
                    self._silence(one)

    def close(self) -> None:
        """The card goes: its captures go on without it. A second call does nothing."""
        with self._lock:
            self._closed = True
            members = [one.member for one in self._joined]
            for one in list(self._joined):
                self._part(one)
        for member in members:
            member.leave()


def _where(route: Route) -> str:
    name = route.path.name
    if name == "emulated":
        return f"on {route.net.mode}, captured at its virtqueues"
    if route.tap is None:
        return f"on {name}"
    return f"on {name}, captured at tap {route.tap.name}"
