"""A client of ``x-pyvmm-exec``: a command in a machine's guest, with this process's streams and
terminal (docs/exec.md).
"""

from __future__ import annotations

import os
import select
import time
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket

from pyvmm.devices.guest_frames import (
    FRAME_MAX,
    TWO,
    BadFrame,
    Framer,
    frame,
    send_description,
)
from pyvmm.errors import CommandFailed, GuestTimeout, MachineMissing
from pyvmm.host.attended import Output
from pyvmm.spec.platform import (
    CHANNEL_WINDOW,
    FRAME_CREDIT,
    FRAME_ERROR,
    FRAME_EXIT,
    FRAME_FAILED,
    FRAME_INPUT,
    FRAME_OUTPUT,
    FRAME_SIGNAL,
    FRAME_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CTRL_A = 0x01
SIGKILL = 9
KILL_S = 5.0  # seconds
HUNG_UP = 129  # as a shell says that SIGHUP has ended a command


class Left(Exception):
    """The user has left the terminal by its key."""


class Attached:
    """A command that ``wait`` runs to its end.

    :param sock: the connection, after ``x-pyvmm-exec``; owned. :param early: what has come on it.
    :param description: of the command (``guest_frames.describe``).
    :param stdin: a descriptor (lent); None if the command reads nothing.
    :param terminal: this process's terminal (lent), if the command gets one: it follows the size,
        and Ctrl-A x leaves. The caller makes the terminal raw and restores it.
    """

    def __init__(
        self,
        sock: socket,
        early: bytes,
        description: bytes,
        *,
        stdin: int | None,
        terminal: int | None,
    ) -> None:
        self._sock, self.terminal, self._stdin = sock, terminal, stdin
        self._framer, self._out = Framer(), bytearray()
        self._sinks: dict[int, Output | None] = {FRAME_OUTPUT: Output(1), FRAME_ERROR: Output(2)}
        self._owed = dict.fromkeys(self._sinks, 0)
        self._credit = CHANNEL_WINDOW
        self._status: int | None = None
        self._failure: CommandFailed | None = None
        self._escaped = False
        #: Why output is lost; None if it is not, or only because its reader has gone.
        self.lost: OSError | None = None
        send_description(self._send, description)
        self._take(early)

    def _send(self, kind: int, payload: bytes = b"") -> None:
        self._out += frame(kind, payload)

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group. With SIGKILL, output that this process
        cannot get rid of is given up: the guest reports the end of a command behind its output.
        """
        self._send(FRAME_SIGNAL, number.to_bytes(4, "little"))
        if number == SIGKILL:
            for kind, sink in self._sinks.items():
                if sink is not None and sink.data:
                    self._forget(kind)

    def _forget(self, kind: int) -> None:
        """Take no more of a stream: the command then gets SIGPIPE."""
        self._sinks[kind] = None
        self._send(kind)

    def resized(self) -> None:
        """Give the command's terminal the size of this one."""
        if self.terminal is not None:
            size = os.get_terminal_size(self.terminal)
            self._send(FRAME_SIZE, TWO.pack(size.columns, size.lines))

    def wait(
        self,
        timeout: float | None = None,
        *,
        wakeup: int = -1,
        woken: Callable[[], None] | None = None,
        progress: object = None,
    ) -> int:
        """Carry the streams until the command ends; returns its status, as a shell gives it.

        :param timeout: seconds, after which the command is killed.
        :param wakeup: a descriptor (lent); ``woken`` is called whenever it is readable.
        :raises GuestTimeout: the time is over.
        :raises CommandFailed: the command could not start or end; the error's exit code says why.
        :raises Left: the user has left. The command is ended when the caller closes.
        """
        deadline = time.monotonic() + timeout if timeout is not None else None
        while True:
            pending = [s for s in self._sinks.values() if s is not None and s.data]
            if not pending:
                if self._status is not None:
                    return self._status
                if self._failure is not None:
                    raise self._failure
            left = None
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._kill()
                    raise GuestTimeout(
                        f"the command did not end within {timeout:g} s, and has been killed",
                        "give it more --timeout",
                    )
            self._round(left, wakeup, woken)

    def _round(self, left: float | None, wakeup: int, woken: Callable[[], None] | None) -> None:
        """Wait for something to happen, and do what it needs."""
        masks: dict[int, int] = {}
        if self._status is None and self._failure is None:
            masks[self._sock.fileno()] = select.POLLIN | (select.POLLOUT if self._out else 0)
        if self._stdin is not None and self._credit:
            masks[self._stdin] = select.POLLIN
        if wakeup >= 0:
            masks[wakeup] = select.POLLIN
        for sink in self._sinks.values():
            if sink is not None and sink.data:
                masks[sink.fd] = masks.get(sink.fd, 0) | select.POLLOUT
        poll = select.poll()
        for fd, mask in masks.items():
            poll.register(fd, mask)
        for fd, mask in poll.poll(None if left is None else left * 1000 + 1):
            if fd == wakeup:
                if woken is not None:
                    woken()
                continue
            if fd == self._sock.fileno():
                self._exchange(mask)
                continue
            for kind, sink in list(self._sinks.items()):
                if sink is not None and sink.fd == fd and sink.data and mask & ~select.POLLIN:
                    self._write(kind, sink)
            if fd == self._stdin and mask & ~select.POLLOUT:
                self._read(fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, min(self._credit, FRAME_MAX))
        except BlockingIOError:
            return
        except OSError:  # the terminal has been hung up
            data = b""
        if not data:
            self._stdin = None
        if data and self.terminal is not None:
            data = self._typed(data)
            if not data:
                return
        self._credit -= len(data)
        self._send(FRAME_INPUT, data)

    def _typed(self, data: bytes) -> bytes:
        """The bytes for the command.

        :raises Left: Ctrl-A x is among them.
        """
        out = bytearray()
        for byte in data:
            if self._escaped and byte in b"xX":
                raise Left
            if byte == CTRL_A and not self._escaped:
                self._escaped = True
                continue
            self._escaped = False
            out.append(byte)
        return bytes(out)

    def _write(self, kind: int, sink: Output) -> None:
        try:
            taken = sink.write()
        except OSError as e:
            if not isinstance(e, BrokenPipeError):
                self.lost = e
            self._forget(kind)
            return
        self._owed[kind] += taken
        if self._owed[kind] >= CHANNEL_WINDOW // 4:
            self._send(FRAME_CREDIT, TWO.pack(kind, self._owed[kind]))
            self._owed[kind] = 0

    def _exchange(self, mask: int) -> None:
        gone = MachineMissing("the machine has ended, or does not answer any more")
        try:
            if mask & select.POLLOUT:
                with memoryview(self._out)[: 1 << 17] as view:
                    sent = self._sock.send(view, MSG_DONTWAIT | MSG_NOSIGNAL)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # the other end has gone; what it has said comes first
        if not mask & ~select.POLLOUT:
            return
        try:
            data = self._sock.recv(1 << 18, MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            raise gone from None
        if not data:
            raise gone
        self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            frames = self._framer.feed(data)
        except BadFrame as e:
            raise MachineMissing(f"the machine does not speak the protocol: {e}") from e
        for kind, payload in frames:
            sink = self._sinks.get(kind)
            if sink is not None:
                sink.data += payload
            elif kind == FRAME_CREDIT and len(payload) == TWO.size:
                self._credit += TWO.unpack(payload)[1]
            elif kind == FRAME_EXIT:
                self._status = payload[0]
            elif kind == FRAME_FAILED:
                text = payload[4:].decode(errors="replace")
                self._failure = CommandFailed("".join(c if c.isprintable() else "?" for c in text))
                self._failure.exit_code = int.from_bytes(payload[:4], "little") & 0xFF

    def _kill(self) -> None:
        """Kill the command, and give the guest a moment to do so."""
        self._send(FRAME_SIGNAL, SIGKILL.to_bytes(4, "little"))
        self._stdin = None
        until = time.monotonic() + KILL_S
        while self._status is None and self._failure is None:
            left = until - time.monotonic()
            if left <= 0:
                return
            self._round(left, -1, None)

    def close(self) -> None:
        """End the connection, and with it the command if it still runs."""
        self._sock.close()
