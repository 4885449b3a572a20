"""The server of the control socket: one thread for up to ``CLIENTS`` clients.

Theory of operation: the thread sleeps in poll(2) on the listener, an eventfd and the clients. It
runs one command after the other, so commands need no locks against each other. A command that may
wait for a card, and so for another process, gets a thread of its own: only its client waits for the
answer. The server reads no more commands from a client whose answers pile up. Any thread may emit
events: they are queued with their time and written by the server's thread, so a vCPU never waits
for a client. The queue is bounded and drops its oldest event. A client that does not read loses its
connection when ``OUTPUT_MAX`` bytes wait for it; it never delays other clients.

The module knows the protocol and no command. JSON and the commands are imported when the first
client comes, so that ``pyvmm run`` starts without them.
"""

from __future__ import annotations

import select
import threading
import time
from _socket import MSG_NOSIGNAL  # see ``hostnet.rights``
from collections import deque

from pyvmm.control.registry import Claim
from pyvmm.errors import PyvmmError
from pyvmm.fd import EventFd
from pyvmm.threads import Thread, report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from socket import socket
    from typing import Any

    from pyvmm.control.framer import Framer

CLIENTS = 32
TAKEN_MAX = 96  # connections that commands have taken over
OUTPUT_MAX = 8 << 20  # bytes that may wait for a client
HIGH_WATER = 64 << 10  # if more bytes wait for a client, its commands wait, too
READ_SIZE = 64 << 10
EVENTS_MAX = 1024
BURST = 16  # commands of one client before the other clients have their turn
LINGER = 0.5  # seconds for clients to take the last events
#: Seconds for the streams of commands and captures. Their threads give up a slow client after 2 s.
TAKEN_LINGER = 2.5
NO_DESCRIPTORS = 1.0  # seconds without accepting if there is no descriptor for a client

#: JSON type -> (Python type, its name in messages).
TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "string"),
    "int": (int, "integer"),
    "bool": (bool, "boolean"),
    "list": (list, "array"),
    "dict": (dict, "object"),
}


def version(own: str) -> dict[str, object]:
    """VersionInfo, with our own version in the place of QEMU's."""
    major, minor, micro = (int(part) for part in own.split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"pyvmm-{own}"}


class QmpError(Exception):
    """An error that a command answers instead of a result. :ivar kind: QEMU's error class."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class Command:
    """One command: ``run(machine, arguments)`` gives the result.

    :param arguments: name -> type, of ``TYPES``, with ``?`` appended if it may be left out.
    :param help: one line for people.
    """

    __slots__ = ("arguments", "help", "run")

    def __init__(
        self, run: Callable[[Any, dict[str, Any]], Any], help: str, **arguments: str
    ) -> None:
        self.run, self.help = run, help
        self.arguments = {name.replace("_", "-"): kind for name, kind in arguments.items()}

    def check(self, given: dict[str, Any]) -> None:
        """:raises QmpError: an argument is missing, unknown or of another type, in QEMU's words."""
        for name, kind in self.arguments.items():
            if name not in given:
                if not kind.endswith("?"):
                    raise QmpError(f"Parameter '{name}' is missing")
                continue
            want, word = TYPES[kind.rstrip("?")]
            if type(given[name]) is not want:  # so that True is no integer
                raise QmpError(f"Invalid parameter type for '{name}', expected: {word}")
        for name in given:
            if name not in self.arguments:
                raise QmpError(f"Parameter '{name}' is unexpected")


class WaitingCommand(Command):
    """A command that may wait for another process. It may run while others do."""


class TakingCommand(Command):
    """A command whose ``run`` gives a function that takes the connection over, once the answer, an
    empty object, has been sent. The function runs in a thread of its own; it closes the socket.
    """


class Client:
    """A connection. :ivar taker: takes the connection over when ``out`` is empty.
    :ivar out: bytes to be sent. :ivar pending: commands that have not run yet; None stands for text
        that is not JSON. :ivar busy: a command of the client runs in a thread.
    """

    __slots__ = (
        "busy",
        "ended",
        "framer",
        "mask",
        "negotiated",
        "out",
        "pending",
        "sock",
        "taker",
    )

    def __init__(self, sock: socket, framer: Framer) -> None:
        self.sock, self.framer = sock, framer
        self.out = bytearray()
        self.pending: deque[bytes | None] = deque()
        self.negotiated = self.busy = False
        self.ended = False  # it sends no more, or may not: it is dropped after its last answer
        self.mask = 0
        self.taker: Callable[[socket], None] | None = None


class Server:
    """Serves the socket of ``claim``, and closes it.

    :param commands: gives the commands by name; called when the first client comes.
    :param machine: the commands' first argument. :param greeting: the member ``QMP`` of the
        greeting.
    """

    def __init__(
        self,
        claim: Claim,
        commands: Callable[[], Mapping[str, Command]],
        machine: object,
        greeting: dict[str, object],
    ) -> None:
        self._claim, self._machine, self._greeting = claim, machine, greeting
        self._book = commands
        self._commands: Mapping[str, Command] = {}
        self._clients: dict[int, Client] = {}
        self._events: deque[tuple[int, str, dict[str, object] | None]] = deque(maxlen=EVENTS_MAX)
        self._lost = 0  # events that were dropped, and that clients have not been told of
        self._late: deque[tuple[Client, dict[str, object]]] = deque()  # answers of waiting commands
        self._mutex = threading.Lock()
        self._wake = EventFd()
        self._taken: list[Thread] = []  # they carry connections that have been taken over
        self._open = True
        self._poll = select.poll()
        self._accept_at = 0.0  # monotonic time from which connections are accepted
        assert claim.listener is not None
        self._listener = claim.listener
        self._poll.register(self._wake.fileno(), select.POLLIN)
        self._poll.register(self._listener.fileno(), select.POLLIN)
        self._thread = Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    @property
    def path(self) -> str:
        """The socket's path."""
        return self._claim.path

    def emit(self, event: str, data: dict[str, object] | None = None) -> None:
        """Queue an event for every client that has negotiated. Any thread; never waits."""
        with self._mutex:
            if self._open:
                self._lost += len(self._events) == EVENTS_MAX
                self._events.append((time.time_ns(), event, data))
                self._wake.signal()

    def close(self) -> None:
        """Send what is queued, for at most ``LINGER`` seconds; end the thread; wait for connections
        that have been taken over, ``TAKEN_LINGER`` seconds; remove the socket. A second call does
        nothing.
        """
        with self._mutex:
            if not self._open:
                return
            self._open = False
            self._wake.signal()
        self._thread.join()
        until = time.monotonic() + TAKEN_LINGER
        for thread in self._taken:
            thread.join(max(0.0, until - time.monotonic()))
        self._wake.close()
        self._claim.close()

    # --- the thread -------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._open:
                self._round(self._wait())
            self._send_events()
            until = time.monotonic() + LINGER
            while any(c.out for c in self._clients.values()) and time.monotonic() < until:
                for client in list(self._clients.values()):
                    self._write(client)
                    self._watch(client)
                self._poll.poll(20)
        finally:
            for client in list(self._clients.values()):
                self._drop(client)

    def _wait(self) -> list[tuple[int, int]]:
        """What poll(2) reports; it returns at once if commands are left from the last round."""
        timeout = -1.0
        if self._accept_at:
            timeout = max(self._accept_at - time.monotonic(), 0) * 1000 + 1
            if timeout == 1:
                self._accept_at = 0.0
                self._poll.modify(self._listener.fileno(), select.POLLIN)
        if any(
            c.pending and not c.busy and len(c.out) < HIGH_WATER for c in self._clients.values()
        ):
            timeout = 0
        return self._poll.poll(timeout)

    def _round(self, ready: list[tuple[int, int]]) -> None:
        for fd, mask in ready:
            if fd == self._wake.fileno():
                self._wake.drain()
            elif fd in self._clients:
                client = self._clients[fd]
                if mask & (select.POLLERR | select.POLLNVAL) or (
                    mask & select.POLLHUP and not mask & select.POLLIN
                ):
                    self._drop(client)
                elif mask & select.POLLIN:
                    self._read(client)
        if any(fd == self._listener.fileno() for fd, _ in ready):
            # Last: a new client may get the descriptor number of one that has just been dropped.
            self._accept()
        self._send_events()
        while self._late:
            client, answer = self._late.popleft()
            client.busy = False
            self._answer(client, answer)
        for client in list(self._clients.values()):
            self._work(client)
            self._write(client)
            self._watch(client)

    def _watch(self, client: Client) -> None:
        """Tell poll(2) what matters now; drop a client that is done."""
        if client.sock.fileno() < 0:
            return
        if client.taker is not None and not client.out:
            self._hand_over(client, client.taker)
            return
        if client.ended and not client.out and not client.pending and not client.busy:
            self._drop(client)
            return
        mask = select.POLLOUT if client.out else 0
        reading = not client.ended and client.taker is None
        if reading and not client.pending and len(client.out) < HIGH_WATER:
            mask |= select.POLLIN
        if mask != client.mask:
            client.mask = mask
            self._poll.modify(client.sock.fileno(), mask)

    def _accept(self) -> None:
        import json  # noqa: F401 - here at the latest: once, not in the middle of the first command
        from socket import socket

        from pyvmm.control.framer import Framer

        self._command("")
        try:
            sock = socket(fileno=self._listener._accept()[0])  # type: ignore[attr-defined]
        except BlockingIOError:
            return
        except OSError:  # usually no descriptor is left: poll would report the client for ever
            self._accept_at = time.monotonic() + NO_DESCRIPTORS
            self._poll.modify(self._listener.fileno(), 0)
            return
        sock.setblocking(False)
        client, fd = Client(sock, Framer()), sock.fileno()
        self._clients[fd] = client
        self._poll.register(fd, 0)
        if len(self._clients) > CLIENTS:
            client.ended = True
            self._send(client, _error(QmpError(f"{CLIENTS} clients are connected already")))
        else:
            self._send(client, {"QMP": self._greeting})

    def _command(self, name: str) -> Command | None:
        self._commands = self._commands or self._book()
        return self._commands.get(name)

    def _hand_over(self, client: Client, taker: Callable[[socket], None]) -> None:
        """Give the connection away: from now on it has nothing to do with the protocol."""
        self._poll.unregister(client.sock.fileno())
        del self._clients[client.sock.fileno()]
        thread = Thread(target=lambda: taker(client.sock), name="exec", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there can be no more threads
            client.sock.close()
            return
        self._taken.append(thread)

    def _drop(self, client: Client) -> None:
        fd = client.sock.fileno()
        if fd < 0:
            return
        self._poll.unregister(fd)
        del self._clients[fd]
        client.sock.close()
        client.pending.clear()
        client.out.clear()

    # --- bytes ------------------------------------------------------------------------------------

    def _read(self, client: Client) -> None:
        from pyvmm.control.framer import TooMuch

        try:
            data = client.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if not data:
            client.ended = True
            return
        try:
            client.pending.extend(client.framer.feed(data))
        except TooMuch as e:
            client.ended = True
            self._send(client, _error(QmpError(f"JSON parse error, {e}; the connection is closed")))

    def _write(self, client: Client) -> None:
        if not client.out:
            return
        try:
            sent = client.sock.send(client.out[: 1 << 18], MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        del client.out[:sent]

    def _send(self, client: Client, message: dict[str, object]) -> None:
        import json

        if client.sock.fileno() < 0:
            return
        client.out += json.dumps(message).encode() + b"\r\n"
        if len(client.out) > OUTPUT_MAX:
            self._drop(client)

    def _send_events(self) -> None:
        with self._mutex:
            lost, self._lost = self._lost, 0
        if lost:  # they were the oldest
            self._send_event(time.time_ns(), "X_PYVMM_EVENTS_LOST", {"count": lost})
        while self._events:
            try:
                event = self._events.popleft()
            except IndexError:
                return
            self._send_event(*event)

    def _send_event(self, at: int, event: str, data: dict[str, object] | None) -> None:
        message: dict[str, object] = {"event": event}
        if data is not None:
            message["data"] = data
        message["timestamp"] = {"seconds": at // 10**9, "microseconds": at // 1000 % 10**6}
        for client in list(self._clients.values()):
            if client.negotiated and client.taker is None:
                self._send(client, message)

    # --- commands ---------------------------------------------------------------------------------

    def _work(self, client: Client) -> None:
        for _ in range(BURST):
            if client.busy or client.taker or not client.pending or len(client.out) >= HIGH_WATER:
                return
            text = client.pending.popleft()
            ident: dict[str, object] = {}
            answer = _attempt(self._execute, client, text, ident)
            if not client.busy:
                self._answer(client, {**answer, **ident})

    def _answer(self, client: Client, answer: dict[str, object]) -> None:
        self._send_events()  # a command's events come before its answer, as in QEMU
        self._send(client, answer)

    def _execute(self, client: Client, text: bytes | None, ident: dict[str, object]) -> object:
        request = _parse(text)
        if not isinstance(request, dict):
            raise QmpError("QMP input must be a JSON object")
        if "id" in request:
            ident["id"] = request["id"]
        for key in request:
            if key not in ("execute", "arguments", "id"):
                raise QmpError(f"QMP input member '{key}' is unexpected")
        if "execute" not in request:
            raise QmpError("QMP input lacks member 'execute'")
        name, arguments = request["execute"], request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if not client.negotiated:
            if name != "qmp_capabilities":
                raise QmpError(
                    "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
                )
            _CAPABILITIES.check(arguments)
            for wanted in arguments.get("enable", []):
                raise QmpError(f"Capability '{wanted}' is not available")
            client.negotiated = True
            return {}
        if name == "qmp_capabilities":
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        command = self._command(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        command.check(arguments)

        def run() -> object:
            return command.run(self._machine, arguments)

        if isinstance(command, TakingCommand):
            self._taken = [thread for thread in self._taken if thread.is_alive()]
            if len(self._taken) >= TAKEN_MAX:
                raise QmpError(f"{TAKEN_MAX} connections are taken over by commands already")
            client.taker = command.run(self._machine, arguments)
            return {}
        if isinstance(command, WaitingCommand) and self._run_apart(client, run, ident):
            return None
        return run()

    def _run_apart(
        self, client: Client, run: Callable[[], object], ident: dict[str, object]
    ) -> bool:
        """Run a command in a thread of its own; False if there can be no more threads."""

        def wait() -> None:
            answer = {**_attempt(run), **ident}
            with self._mutex:
                self._late.append((client, answer))
                if self._open:
                    self._wake.signal()

        client.busy = True
        try:
            Thread(target=wait, name="control-wait", daemon=True).start()
        except RuntimeError:
            client.busy = False
        return client.busy


_CAPABILITIES = Command(lambda machine, given: {}, "leave negotiation mode", enable="list?")


def _attempt(run: Callable[..., object], *args: object) -> dict[str, object]:
    """The answer of a command, whatever happens in it."""
    try:
        return {"return": run(*args)}
    except QmpError as e:
        return _error(e)
    except PyvmmError as e:
        return _error(QmpError(str(e)))
    except Exception as e:  # a bug in a command must not end the control thread
        report_bug(e)
        return _error(QmpError(f"pyvmm failed: {type(e).__name__}: {e}"))


def _error(e: QmpError) -> dict[str, object]:
    return {"error": {"class": e.kind, "desc": str(e)}}


def _parse(text: bytes | None) -> object:
    """Parse ``text`` as strict JSON in UTF-8.

    :raises QmpError: it is not JSON.
    """
    import json

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number")

    def number(word: str) -> float:
        value = float(word)
        return value if abs(value) < float("inf") else refuse(word)

    if text is None:
        raise QmpError("JSON parse error, expecting value")
    try:
        return json.loads(text.decode(), parse_constant=refuse, parse_float=number)
    except ValueError as e:  # also for bad UTF-8 and for integers of thousands of digits
        raise QmpError(f"JSON parse error, {e}") from e
