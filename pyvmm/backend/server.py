"""A vhost-user back-end: serves the rings of another process's virtio device, for one front-end
after another.

A :class:`Backend` is given a service, which knows the kind of device: ``Backend(NetService(port))``
is a network card's back-end. Each connection is a :class:`pyvmm.backend.frontend.Frontend`.
"""

from __future__ import annotations

import threading
import time

from pyvmm.backend.frontend import COUNTERS, PROTOCOL_FEATURES, Frontend
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.fd import EventFd
from pyvmm.spec.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES
from pyvmm.vhostuser.wire import (
    Channel,
    Closed,
    Listener,
    Stopped,
    Stranger,
    connect,
    readable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backend.frontend import Service


class LineLimit:
    """Passes on lines of a log: of each kind a burst, then one per second. The others are counted,
    and the next line of the kind says how many there were: whoever can connect must not be able to
    fill a disk. A line's first word is its kind, so that a flood of refusals hides no connection.

    :param log: gets the lines. :param clock: seconds, for tests.
    """

    BURST = 30

    def __init__(
        self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._clock = log, clock
        self._lock = threading.Lock()
        # Per kind: how many lines may come now, at what time that was, and how many were left out.
        self._kinds: dict[str, tuple[float, float, int]] = {}

    def __call__(self, line: str) -> None:
        """Pass on the line, or count it. Any thread."""
        kind = line.partition(" ")[0]
        with self._lock:
            now = self._clock()
            room, at, left_out = self._kinds.get(kind, (self.BURST, now, 0))
            room = min(self.BURST, room + now - at)
            passes = room >= 1
            self._kinds[kind] = (room - 1, now, 0) if passes else (room, now, left_out + 1)
        if not passes:
            return
        if left_out:
            self._log(f"{left_out} lines like the next one left out")
        self._log(line)


class Backend:
    """A vhost-user back-end. ``serve`` and ``run`` are for one thread; ``stop`` and ``counters``
    for any.

    :param service: serves the rings; owned from here on.
    :param features, protocol_features: masks that limit the offer, for tests of front-ends.
    :param log: gets one line about each connection, refusal and fault; see ``LineLimit``.
    :param unsealed: take memory files that a front-end can make shorter, which would end this
        process.
    :ivar frontend: the front-end that is connected, or None.
    """

    def __init__(
        self,
        service: Service,
        *,
        features: int = -1,
        protocol_features: int = -1,
        log: Callable[[str], None] | None = None,
        unsealed: bool = False,
    ) -> None:
        self.service = service
        self.frontend: Frontend | None = None
        self._log = LineLimit(log or (lambda line: None))
        self._unsealed = unsealed
        self._features = service.features() & features | 1 << VHOST_USER_F_PROTOCOL_FEATURES
        generic = sum(1 << bit for bit in PROTOCOL_FEATURES)
        self._protocol_features = (generic | service.protocol_features) & protocol_features
        self._counts = dict.fromkeys(
            ("connections", "busy", "strangers", "sessions_broken", *COUNTERS), 0
        )
        self._quit = EventFd()

    def serve(self, channel: Channel, listener: Listener | None = None) -> None:
        """Serve one front-end until it leaves, or until ``stop``; closes the channel.

        :param listener: others that connect there meanwhile are sent away.
        :raises PyvmmError: it broke the protocol, or was refused something and had not asked to be
            told.
        """
        self._counts["connections"] += 1
        frontend = Frontend(
            channel,
            self.service,
            self._features,
            self._protocol_features,
            self._counts,
            self._log,
            unsealed=self._unsealed,
        )
        self.frontend = frontend  # before the question, so that ``stop`` misses neither
        try:
            if not self._quit_asked():
                if listener is None:
                    frontend.serve()
                else:
                    frontend.serve(listener.fileno(), lambda: self._send_away(listener))
        except Closed:
            pass
        except Stopped:
            if not self._quit_asked():
                raise
        except PyvmmError:
            self._counts["sessions_broken"] += 1
            raise
        finally:
            self.frontend = None
            frontend.close()

    def run(
        self,
        path: str,
        *,
        client: bool = False,
        peer: int | None = None,
        retry: float = 0.1,
        retry_max: float = 5.0,
    ) -> None:
        """Serve whoever comes to the socket, one after another, until ``stop``.

        :param peer: a user id that front-ends may have, beside root's and our own.
        :param client: the front-end listens and we connect, again and again, with pauses of
            ``retry`` to ``retry_max`` seconds.
        :raises VhostUserError: the path cannot be listened on.
        """
        listener = None if client else Listener(path, peer=peer)
        delay = retry
        try:
            while not self._quit_asked():
                if listener is None:
                    try:
                        channel = connect(path, end=self._quit.fileno(), peer=peer)
                    except VhostUserError as e:
                        if isinstance(e, Stranger):
                            self._stranger(e)
                        delay = min(2 * delay, retry_max)
                        self._sleep(delay)
                        continue
                    delay = retry
                else:
                    self._sleep(None, listener.fileno())
                    accepted = self._accept(listener)
                    if accepted is None:
                        continue
                    channel = accepted
                self._log("front-end connected")
                try:
                    self.serve(channel, listener)
                except PyvmmError as e:
                    self._log(f"session ended: {e}")
                else:
                    self._log("front-end disconnected")
                if listener is None:
                    self._sleep(retry)
        finally:
            if listener is not None:
                listener.close()

    def _accept(self, listener: Listener) -> Channel | None:
        """The next connection of a user that may connect; None if there is none."""
        try:
            return listener.accept()
        except Stranger as e:
            self._stranger(e)
            return None

    def _stranger(self, e: Stranger) -> None:
        self._counts["strangers"] += 1
        self._log(f"refused: {e}")

    def _send_away(self, listener: Listener) -> None:
        """Another front-end connects while one is served: it shall not wait for an answer."""
        channel = self._accept(listener)
        if channel is not None:
            self._counts["busy"] += 1  # first: who sees the end of the connection is counted
            channel.close()
            self._log("busy: another front-end is served, and a second one was sent away")

    def _sleep(self, seconds: float | None, fd: int = -1) -> None:
        """Wait for a descriptor, the time, or ``stop``."""
        readable([self._quit.fileno(), fd], seconds)

    def _quit_asked(self) -> bool:
        return bool(readable([self._quit.fileno()], 0))

    def stop(self) -> None:
        """Make ``run`` and ``serve`` return soon."""
        self._quit.signal()
        frontend = self.frontend
        if frontend is not None:
            frontend.channel.stop()

    def counters(self) -> dict[str, int]:
        """Connections, messages and refusals, and the counters of the service."""
        return {**self._counts, **self.service.counters()}

    def close(self) -> None:
        """Release everything; ``run`` has returned."""
        self._quit.close()
        self.service.close()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
