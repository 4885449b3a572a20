"""A client of the control socket, blocking and small::

    with connect("vm0") as c:
        c.command("query-status")["status"]
        c.command("set_link", name="net0", up=False)
        event = c.wait_event("RESET", timeout=10)

For more (asyncio, several connections at once) the PyPI library qemu.qmp works unchanged:
``QMPClient`` on ``find(name).path``.
"""

from __future__ import annotations

import json
import time
from collections import deque
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from pyvmm.control.registry import find
from pyvmm.errors import ControlError, MachineMissing
from pyvmm.fd import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

EVENTS_MAX = 1000
MESSAGE_MAX = 64 << 20


def connect(name: str, *, timeout: float = 30.0) -> Client:
    """Connect to the running machine ``name``, or to the socket ``name`` if the text has a slash
    and so is a path.

    :param timeout: seconds that each answer may take.
    :raises MachineMissing: there is no such machine, or it does not answer.
    """
    return Client(socket_of(name), timeout=timeout)


def socket_of(name: str) -> str:
    """The path of a machine's control socket; see ``connect``.

    :raises MachineMissing: there is no such machine.
    """
    return name if "/" in name else find(name).path


def dial(path: str, timeout: float | None = None) -> socket:
    """A connection on which nothing has been said yet; the caller's.

    :param timeout: seconds that each operation may take; None: no limit.
    :raises MachineMissing: nobody listens.
    """
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError as e:
        sock.close()
        raise MachineMissing(f"cannot connect to {path}: {e.strerror or e}", "see: pyvmm ps") from e
    return sock


class Client(Closing):
    """One connection, after the negotiation of capabilities; a context manager. One thread at a
    time.

    :param path: of the socket. :param sock: a connection to it, the client's from now on; without
        one, the client connects.
    :ivar greeting: the server's greeting. :ivar events: those that nobody has taken yet, oldest
        first, at most ``EVENTS_MAX``.
    """

    def __init__(self, path: str, *, timeout: float = 30.0, sock: socket | None = None) -> None:
        self._path, self._timeout = path, timeout
        self._buf = bytearray()
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MAX)
        self._sock = dial(path, timeout) if sock is None else sock
        try:
            first = self._receive(time.monotonic() + timeout)
            if "error" in first:
                raise ControlError(f"{path}: {first['error'].get('desc')}", "try again later")
            self.greeting: dict[str, Any] = first
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Run a command and wait for its answer; ``_`` in an argument's name stands for ``-``.

        :raises ControlError: the machine refuses the command. :raises MachineMissing: the machine
            has ended, or does not answer.
        """
        return self.execute(
            name, {key.replace("_", "-"): value for key, value in arguments.items()}
        )

    def execute(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Like ``command``, with the arguments' names as they are."""
        message = {"execute": name, **({"arguments": arguments} if arguments else {})}
        until = time.monotonic() + self._timeout
        try:
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError as e:
            raise MachineMissing(f"{self._path} is gone: {e.strerror or e}", "see: pyvmm ps") from e
        while True:
            answer = self._receive(until)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                error = answer["error"]
                desc = str(error.get("desc"))
                raise ControlError(f"{name}: {desc}", kind=str(error.get("class")), desc=desc)
            self.events.append(answer)

    def take_over(self, name: str, /, **arguments: Any) -> tuple[socket, bytes]:
        """Run a command after which the connection speaks another protocol.

        :returns: the socket, which is the caller's from now on, and what has come on it already.
        :raises PyvmmError: as ``command``; the connection stays as it was.
        """
        self.command(name, **arguments)
        sock, self._sock = self._sock, socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        return sock, bytes(self._buf)

    def wait_event(self, name: str, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the next event ``name``; events before it are dropped.

        :raises TimeoutError: the event did not come within ``timeout`` seconds. :raises
            MachineMissing: the connection has ended.
        """
        until = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            event = self.events.popleft() if self.events else self._receive(until, TimeoutError)
            if event.get("event") == name:
                return event

    def next_event(self, timeout: float = 1e6) -> dict[str, Any]:
        """Wait for the next event of any name; raises the errors of ``wait_event``."""
        if self.events:
            return self.events.popleft()
        return self._receive(time.monotonic() + timeout, TimeoutError)

    def _receive(self, until: float, late: type[Exception] = MachineMissing) -> dict[str, Any]:
        """The next message, which is one line."""
        while (end := self._buf.find(b"\n")) < 0:
            left = until - time.monotonic()
            try:
                self._sock.settimeout(max(left, 0.001))
                data = self._sock.recv(1 << 16)
            except (TimeoutError, BlockingIOError):
                raise late(f"{self._path} does not answer") from None
            except OSError as e:
                raise MachineMissing(f"{self._path} is gone: {e.strerror}") from e
            if not data or len(self._buf) > MESSAGE_MAX:
                raise MachineMissing(f"{self._path}: the connection has ended")
            self._buf += data
        line = bytes(self._buf[:end])
        del self._buf[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise MachineMissing(f"{self._path} does not speak QMP")
        return message

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        self._sock.close()
