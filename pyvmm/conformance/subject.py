"""The back-end that is checked: how to get a session with it, and with its successor."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from pyvmm.errors import HostError, VhostUserError
from pyvmm.hostnet import sockets
from pyvmm.vhostuser.connect import Connector, ListeningConnector
from pyvmm.vhostuser.wire import Channel, Stopped, Stranger, readable

#: Seconds between two attempts to connect.
RETRY_S = 0.02
#: Seconds that a back-end which serves one session may take to end after it.
END_S = 1.0


class Gone(VhostUserError):
    """No back-end accepts a connection, or connects."""


class Subject(Connector):
    """Connects to the back-end, again and again for ``timeout`` seconds: it may need a moment after
    a session. As many front-ends as there are checks use it, so their ``close`` does nothing.

    :param path: of the socket. :param server: the back-end connects, and we listen.
    :param command: for the shell; starts the back-end, now and whenever it has ended. Empty: others
        start it. :param peer: see ``Connector``.
    :ivar sessions: how many connections were made. :ivar crashes: how the processes of ``command``
        have ended that were ended by a signal, in words.
    :raises VhostUserError: we cannot listen at the path.
    """

    waits = True

    def __init__(
        self,
        path: str,
        *,
        timeout: float,
        server: bool = False,
        command: str = "",
        peer: int | None = None,
    ) -> None:
        super().__init__(path, peer)
        self.timeout, self.server, self.command = timeout, server, command
        self.sessions = 0
        self.crashes: list[str] = []
        self._one_session = False
        self._process: subprocess.Popen[bytes] | None = None
        self._starter: threading.Thread | None = None
        self._error: OSError | None = None
        self._inner = (ListeningConnector if server else Connector)(path, peer)

    def connect(self, seconds: float | None, end: int) -> Channel:
        """A connection, within ``timeout`` seconds. :raises Gone: there is none."""
        until = time.monotonic() + self.timeout
        if self._one_session:
            self.wait_end(self.timeout)
        while True:
            self._start()
            left = max(0.0, until - time.monotonic())
            try:
                # In slices: a back-end that ends before it connects is started again.
                channel = self._inner.connect(min(left, END_S), end)
                self.sessions += 1
                return channel
            except (Stopped, Stranger):
                raise
            except VhostUserError as e:
                if left <= 0:
                    raise Gone(e.cause, e.hint) from e
            if readable([end], min(RETRY_S, left)):
                raise Stopped(f"connecting to {self.name}: stopped")

    def dial(self) -> Channel:
        """A connection for code that talks by itself. :raises Gone: there is none."""
        return self.connect(None, -1)

    def learn(self) -> None:
        """The first session has ended: find out whether the back-end ends with its session."""
        self._one_session = self.wait_end(END_S)

    def wait_end(self, seconds: float) -> bool:
        """Whether the process that we started has ended, at the latest after ``seconds``."""
        if self._process is None:
            return False
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._process = None
        number = -status if status < 0 else status - 128  # as the shell says it
        if number > 0:
            self.crashes.append(f"the back-end was ended by signal {number}")
        return True

    def settle(self) -> None:
        """An item is over: see whether the back-end has ended."""
        self.wait_end(END_S if self._one_session else 0)

    def _start(self) -> None:
        """Start the command, unless it runs."""
        if not self.command:
            return
        if self._process is not None and not self.wait_end(0):
            return
        if not self.server and sockets.is_abandoned(self.name):
            Path(self.name).unlink()  # the one before was killed; not every back-end replaces it
        self._error = None
        # A signal raises an exception in the main thread: there, it could come when the process
        # has been started and nobody knows of that yet.
        self._starter = threading.Thread(target=self._spawn)
        self._starter.start()
        self._starter.join()
        if self._error is not None:
            text = f"cannot start {self.command}: {self._error.strerror}"
            raise HostError(text) from self._error

    def _spawn(self) -> None:
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                stdin=subprocess.DEVNULL,
                stdout=2,  # ours is for the results
                start_new_session=True,
            )
        except OSError as e:
            self._error = e

    def close(self) -> None:
        """Nothing: see ``end``."""

    def end(self) -> None:
        """End the process that we started, and stop listening."""
        if self._starter is not None and self._starter.ident is not None:
            self._starter.join()
        process, self._process = self._process, None
        if process is not None:
            for how in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, how)  # the command's children, too
                except ProcessLookupError:
                    pass
                try:
                    process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self._inner.close()
