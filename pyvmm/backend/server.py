"""A vhost-user back-end: serves the rings of another process's virtio device, for one front-end
after another.

A :class:`Backend` is given a service, which knows the kind of device: ``Backend(NetService(port))``
is a network card's back-end. Each connection is a :class:`pyvmm.backend.frontend.Frontend`.
"""

from __future__ import annotations

from pyvmm.backend.frontend import COUNTERS, PROTOCOL_FEATURES, Frontend
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.fd import EventFd
from pyvmm.spec.vhost_user import VHOST_USER_F_PROTOCOL_FEATURES
from pyvmm.vhostuser.wire import Channel, Closed, Listener, Stopped, connect, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backend.frontend import Service


class Backend:
    """A vhost-user back-end. ``serve`` and ``run`` are for one thread; ``stop`` and ``counters``
    for any.

    :param service: serves the rings; owned from here on.
    :param features, protocol_features: masks that limit the offer, for tests of front-ends.
    :param log: gets one line about each connection, refusal and fault.
    :ivar frontend: the front-end that is connected, or None.
    """

    def __init__(
        self,
        service: Service,
        *,
        features: int = -1,
        protocol_features: int = -1,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.service = service
        self.frontend: Frontend | None = None
        self._log = log or (lambda line: None)
        self._features = service.features() & features | 1 << VHOST_USER_F_PROTOCOL_FEATURES
        generic = sum(1 << bit for bit in PROTOCOL_FEATURES)
        self._protocol_features = (generic | service.protocol_features) & protocol_features
        self._counts = dict.fromkeys(("connections", "sessions_broken", *COUNTERS), 0)
        self._quit = EventFd()

    def serve(self, channel: Channel) -> None:
        """Serve one front-end until it leaves, or until ``stop``; closes the channel.

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
        )
        self.frontend = frontend  # before the question, so that ``stop`` misses neither
        try:
            if not self._quit_asked():
                frontend.serve()
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
        self, path: str, *, client: bool = False, retry: float = 0.1, retry_max: float = 5.0
    ) -> None:
        """Serve whoever comes to the socket, one after another, until ``stop``.

        :param client: the front-end listens and we connect, again and again, with pauses of
            ``retry`` to ``retry_max`` seconds.
        :raises VhostUserError: the path cannot be listened on.
        """
        listener = None if client else Listener(path)
        delay = retry
        try:
            while not self._quit_asked():
                if listener is None:
                    try:
                        channel = connect(path, end=self._quit.fileno())
                    except VhostUserError:
                        delay = min(2 * delay, retry_max)
                        self._sleep(delay)
                        continue
                    delay = retry
                else:
                    self._sleep(None, listener.fileno())
                    accepted = listener.accept()
                    if accepted is None:
                        continue
                    channel = accepted
                self._log("front-end connected")
                try:
                    self.serve(channel)
                except PyvmmError as e:
                    self._log(f"session ended: {e}")
                else:
                    self._log("front-end disconnected")
                if listener is None:
                    self._sleep(retry)
        finally:
            if listener is not None:
                listener.close()

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
