"""The client's side of one command in L1: its streams, terminal, signals and exit status."""

from __future__ import annotations

import os
import select
import socket
import time

from pyvmm.errors import TestbedError
from pyvmm.host.attended import Output
from pyvmm.testbed import protocol as p

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class TestbedTimeout(TestbedError):
    """A command did not end in time and was killed."""

    exit_code = 124


class Result:
    """The result of a command.

    :ivar status: as a shell gives it: the exit status, or 128 + n if signal n killed the command.
    :ivar stdout: its output; ``stderr`` likewise.
    """

    def __init__(self, status: int, stdout: bytes, stderr: bytes) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    @property
    def out(self) -> str:
        """stdout as text."""
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        """stderr as text."""
        return self.stderr.decode(errors="replace")

    def __repr__(self) -> str:
        return f"Result({self.status}, {self.stdout!r}, {self.stderr!r})"


#: The most bytes of a stream that are collected.
OUTPUT_MAX = 1 << 30


class Session:
    """One command, which ``wait`` runs to its end.

    :param sock: the connection to the supervisor; lent.
    :param cwd: the command's working directory in L1.
    :param stdin: a descriptor (lent), bytes, or None for /dev/null.
    :param stdout: a descriptor (lent), or None to collect the stream in ``output``; ``stderr``
        likewise.
    :param terminal: a terminal of the client (lent). The command then gets a terminal of its own,
        and keys go to the command uninterpreted. The caller makes the client's terminal raw and
        restores it.
    """

    def __init__(
        self,
        sock: socket.socket,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdin: int | bytes | None,
        stdout: int | None,
        stderr: int | None,
        terminal: int | None = None,
    ) -> None:
        self.sock = sock
        self.terminal = terminal
        self.framer = p.Framer()
        self.out = bytearray()
        self.credit = p.IN_WINDOW
        self.owed = 0
        self.status: int | None = None
        self.output = {p.STDOUT: bytearray(), p.STDERR: bytearray()}
        self.sinks: dict[int, Output | None] = {p.STDOUT: None, p.STDERR: None}
        tty = []
        for stream, fd in ((p.STDOUT, stdout), (p.STDERR, stderr)):
            if fd is not None:
                self.sinks[stream] = Output(fd)
                if terminal is not None and os.isatty(fd):
                    tty.append(stream)
        if terminal is not None:
            tty.append(p.STDIN)
            shown = [
                fd
                for stream, fd in ((p.STDOUT, stdout), (p.STDERR, stderr))
                if stream in tty and fd is not None
            ]
            self.sinks[p.TTY] = Output(shown[0] if shown else terminal)
        self.stdin = stdin if isinstance(stdin, int) else None
        self.given = bytearray(stdin) if isinstance(stdin, bytes) else bytearray()
        self.stdin_open = stdin is not None
        size = (
            os.get_terminal_size(terminal) if terminal is not None else os.terminal_size((80, 24))
        )
        mask = os.umask(0o022)
        os.umask(mask)
        spec = {
            "argv": [os.fsencode(a) for a in argv],
            "env": {os.fsencode(k): os.fsencode(v) for k, v in env.items()},
            "cwd": os.fsencode(cwd),
            "umask": mask,
            "tty": tty,
            "stdin": stdin is not None,
            "window": (size.lines, size.columns),
        }
        import marshal

        self.send(p.OPEN, marshal.dumps(spec, 2))

    def send(self, kind: int, payload: bytes = b"", stream: int = 0) -> None:
        """Queue a frame for sending."""
        self.out += p.frame(kind, 0, payload, stream)

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        self.send(p.SIGNAL, b"%d" % number)

    def resized(self) -> None:
        """Give the command's terminal the size of the client's terminal."""
        if self.terminal is not None:
            size = os.get_terminal_size(self.terminal)
            self.send(p.WINDOW, b"%d %d" % (size.lines, size.columns))

    def wait(
        self,
        timeout: float | None = None,
        *,
        wakeup: int = -1,
        woken: Callable[[], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> int:
        """Carry the streams until the command ends.

        :param timeout: seconds from this call on, after which the call fails.
        :param wakeup: a descriptor (lent); ``woken`` is called whenever it is readable.
        :param progress: called with each progress note of the supervisor.
        :returns: the status as a shell gives it: the command's exit status, or 128 + n if signal n
            killed it.
        :raises TestbedTimeout: the time is over. The command is killed when the caller closes the
            connection.
        :raises TestbedError: the testbed has ended, or refused the command.
        """
        deadline = time.monotonic() + timeout if timeout is not None else None
        failed = ""
        while True:
            if self.status is not None and not any(s and s.data for s in self.sinks.values()):
                return (
                    os.waitstatus_to_exitcode(self.status)
                    if self.status & 0x7F == 0
                    else 128 + (self.status & 0x7F)
                )
            if failed:
                raise TestbedError(failed)
            self._fill()
            poll = select.poll()
            if self.status is None:
                poll.register(self.sock, select.POLLIN | (select.POLLOUT if self.out else 0))
            if self.stdin is not None and self.credit > 0:
                poll.register(self.stdin, select.POLLIN)
            if wakeup >= 0:
                poll.register(wakeup, select.POLLIN)
            by_fd: dict[int, list[int]] = {}
            for stream, sink in self.sinks.items():
                if sink and sink.data:
                    by_fd.setdefault(sink.fd, []).append(stream)
            for fd in by_fd:
                if fd != self.stdin:
                    poll.register(fd, select.POLLOUT)
                else:
                    poll.register(fd, select.POLLOUT | select.POLLIN)
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            events = poll.poll(left)
            if not events and deadline is not None and time.monotonic() >= deadline:
                raise TestbedTimeout(
                    f"the command did not end within {timeout:g} s", "give it more --timeout"
                )
            for fd, event in events:
                if fd == wakeup and woken:
                    woken()
                elif fd == self.sock.fileno():
                    failed = self._socket(event, progress)
                else:
                    for stream in by_fd.get(fd, ()):
                        if event & ~select.POLLIN:
                            self._drain(stream)
                    if fd == self.stdin and event & ~select.POLLOUT:
                        self._input()

    def _fill(self) -> None:
        """Make frames of the given input as far as the credit allows, and return credit for the
        output that was passed on.
        """
        while self.given and self.credit > 0:
            n = min(len(self.given), self.credit, p.CHUNK)
            self.send(p.DATA, bytes(self.given[:n]), p.STDIN)
            del self.given[:n]
            self.credit -= n
        if self.stdin_open and self.stdin is None and not self.given:
            self.stdin_open = False
            self.send(p.EOF, b"", p.STDIN)
        if self.owed >= p.OUT_WINDOW // 8:
            self.send(p.CREDIT, b"%d" % self.owed)
            self.owed = 0

    def _input(self) -> None:
        assert self.stdin is not None
        try:
            data = os.read(self.stdin, min(self.credit, p.CHUNK))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.credit -= len(data)
            self.send(p.DATA, data, p.STDIN)
        else:
            self.stdin = None  # _fill sends EOF

    def _drain(self, stream: int) -> None:
        sink = self.sinks[stream]
        assert sink
        try:
            self.owed += sink.write()
        except OSError:
            # Nobody reads the stream any more. Tell the command: it then gets SIGPIPE or EPIPE, as
            # it would without the testbed.
            self.owed += len(sink.data)
            sink.data.clear()
            self.sinks[stream] = None
            self.output.pop(stream, None)
            self.send(p.EOF, b"", stream)

    def _socket(self, event: int, progress: Callable[[str], None] | None) -> str:
        """Send and receive; returns why the testbed ended, or an empty string if it has not."""
        lost = "the testbed ended"
        if event & select.POLLOUT:
            try:
                n = self.sock.send(memoryview(self.out)[: 1 << 16], socket.MSG_DONTWAIT)
                del self.out[:n]
            except BlockingIOError:
                pass
            except OSError:
                pass  # the connection is closed, but there may still be data to read
        if not event & ~select.POLLOUT:
            return ""
        try:
            data = self.sock.recv(1 << 18)
        except OSError:
            return lost
        if not data:
            return lost
        try:
            return self._take(self.framer.feed(data), progress)
        except ValueError as e:
            return f"the testbed broke the protocol: {e}"

    def _take(
        self,
        frames: list[tuple[int, int, int, bytes]],
        progress: Callable[[str], None] | None,
    ) -> str:
        """Take frames; returns why the command ended without a status, or an empty string.

        :raises ValueError: a frame makes no sense.
        """
        for kind, _channel, stream, payload in frames:
            if kind == p.DATA:
                sink = self.sinks.get(stream)
                if sink:
                    sink.data += payload
                    if sum(len(s.data) for s in self.sinks.values() if s) > p.OUT_WINDOW:
                        raise ValueError("more output than it has credit for")
                else:
                    self.owed += len(payload)
                    if stream in self.output:
                        self.output[stream] += payload
                        if len(self.output[stream]) > OUTPUT_MAX:
                            return f"the command wrote more than {OUTPUT_MAX >> 20} MiB"
            elif kind == p.CREDIT:
                self.credit = min(self.credit + p.number(payload), p.IN_WINDOW)
            elif kind == p.EXIT:
                self.status = p.number(payload)
            elif kind == p.NOTE and progress:
                progress(payload.decode(errors="replace"))
            elif kind == p.ERROR:
                return payload.decode(errors="replace")
        return ""
