"""The control socket of a running machine: QEMU's Machine Protocol (docs/control.md).

Most machines have no client. So there is a ``Door`` first: a thread that waits for the first client
and only then loads the server.
"""

from __future__ import annotations

import select
import threading

from pyvmm import __version__
from pyvmm.errors import HostError
from pyvmm.fd import Closing, EventFd
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.control.commands import Controlled
    from pyvmm.control.registry import Claim
    from pyvmm.control.server import Command, Server
    from pyvmm.outcome import Outcome

AGAIN_S = 1.0  # until a server is tried again for which there was no descriptor or no thread


class Door(Closing):
    """The control socket of ``machine``, served from the first client on.

    :param claim: the machine's name; the door closes it.
    :raises UsageError: no socket can be made at the claim's path.
    """

    def __init__(self, machine: Controlled, claim: Claim) -> None:
        claim.listen()
        self._machine, self._claim = machine, claim
        self._mutex = threading.Lock()  # guards the attributes below
        self._server: Server | None = None
        self._open = True
        self._wake = EventFd()
        self._thread = Thread(target=self._wait, name="control", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The machine's name."""
        return self._claim.name

    @property
    def path(self) -> str:
        """The socket's path."""
        return self._claim.path

    def files(self) -> list[str]:
        """The paths that ``close`` removes."""
        return self._claim.files()

    def emit(self, event: str, data: dict[str, object] | None = None) -> None:
        """Send an event to every client that has negotiated. Any thread; never waits for one."""
        with self._mutex:
            server = self._server
        if server is not None:
            server.emit(event, data)

    def ended(self, outcome: Outcome) -> None:
        """Tell the clients of the machine's end."""
        with self._mutex:
            if self._server is None:
                return
        from pyvmm.control.events import end_events

        for event, data in end_events(outcome):
            self.emit(event, data)

    def close(self) -> None:
        """Close the server, if there is one, as ``Server.close``; remove the socket. A second call
        does nothing.
        """
        with self._mutex:
            if not self._open:
                return
            self._open = False
        self._wake.signal()
        self._thread.join()
        self._wake.close()
        if self._server is not None:
            self._server.close()
        self._claim.close()

    def _wait(self) -> None:
        """The thread: wait for the first client, and make the server."""
        asleep, poll = select.poll(), select.poll()
        asleep.register(self._wake.fileno(), select.POLLIN)
        poll.register(self._wake.fileno(), select.POLLIN)
        assert self._claim.listener is not None
        poll.register(self._claim.listener.fileno(), select.POLLIN)
        while True:
            poll.poll()
            if not self._open:
                return
            try:
                self._serve()
                return
            except (OSError, RuntimeError, HostError):
                asleep.poll(AGAIN_S * 1000)

    def _serve(self) -> None:
        """:raises OSError, RuntimeError, HostError: the process has no descriptor or no thread."""
        from pyvmm.control.server import Server, version

        greeting: dict[str, object] = {"version": version(__version__), "capabilities": []}
        with self._mutex:  # no event is lost of which the first client could know
            self._server = Server(self._claim, _commands, self._machine, greeting)


def _commands() -> Mapping[str, Command]:
    from pyvmm.control.commands import COMMANDS

    return COMMANDS
