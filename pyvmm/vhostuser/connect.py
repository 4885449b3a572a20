"""Ways to get a connection to a back-end. Each attempt takes a bounded time, and another thread can
end it.
"""

from __future__ import annotations

import time

from pyvmm.vhostuser.wire import Channel, Listener, Stopped, Stranger, TimedOut, connect, readable

#: Seconds that a listening back-end may take to accept a connection, before the next attempt.
ATTEMPT_S = 1.0


class Connector:
    """Connects to a back-end that listens on a socket.

    :param name: the socket's path. :ivar name: what messages call the back-end.
    :param peer: a user id that the back-end may have, beside root's and our own.
    :ivar waits: whether ``connect`` waits until a back-end is there, so that the caller need not
        pause between attempts.
    """

    waits = False

    def __init__(self, name: str, peer: int | None = None) -> None:
        self.name, self.peer = name, peer

    def connect(self, seconds: float | None, end: int) -> Channel:
        """Try once to get a connection.

        :param seconds: to wait for a back-end that is not there or does not accept connections;
            None: as long as makes sense before another attempt.
        :param end: a descriptor that ends the attempt when it becomes readable.
        :raises VhostUserError: there is no connection. :raises Stopped: ``end`` became readable.
        """
        return connect(self.name, ATTEMPT_S if seconds is None else seconds, end, peer=self.peer)

    def complaints(self) -> list[str]:
        """What the back-end has reported since the last call about the end of earlier connections,
        by another way than a connection. Never waits; any thread.
        """
        return []

    def close(self) -> None:
        """Release what the connector holds. A second call does nothing."""


class ListeningConnector(Connector):
    """Listens on a socket for a back-end that connects.

    :raises VhostUserError: the path is taken or cannot be had.
    """

    waits = True

    def __init__(self, path: str, peer: int | None = None) -> None:
        super().__init__(path, peer)
        self._listener = Listener(path, peer=peer)
        self._strangers: list[str] = []

    def connect(self, seconds: float | None, end: int) -> Channel:
        """Wait for a connection."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = readable([self._listener.fileno(), end], left)
            if end in ready:
                raise Stopped(f"waiting for a back-end at {self.name}: stopped")
            if not ready:
                raise TimedOut(
                    f"no back-end has connected to {self.name} in {seconds:.3g} s",
                    "start it as a client, or leave server=on away",
                )
            try:
                channel = self._listener.accept()
            except Stranger as e:
                self._strangers = [str(e)]
                continue
            if channel is not None:
                return channel

    def complaints(self) -> list[str]:
        """The latest user whose connection was refused."""
        strangers, self._strangers = self._strangers, []
        return strangers

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
