"""Commands in a running guest, from their description to their result."""

from __future__ import annotations

import select
import time

from pyvmm.devices.guest_frames import FRAME_MAX, TWO, describe, send_description
from pyvmm.errors import CommandFailed, UsageError
from pyvmm.spec.platform import (
    CHANNEL_WINDOW,
    FRAME_CREDIT,
    FRAME_ERROR,
    FRAME_EXIT,
    FRAME_FAILED,
    FRAME_INPUT,
    FRAME_OUTPUT,
    FRAME_SIGNAL,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyvmm.devices.guest_channel import Channel, Session

OUTPUT_MAX = 16 << 20  # bytes kept of each stream of one command
KILL_GRACE = 10.0  # seconds that init may take to kill a command
TAIL = 2000  # how many characters of output an error quotes
SIGKILL = 9


class CommandResult:
    """The result of a command in the guest.

    :ivar status: its exit status; 128 + N if signal N ended it, 127 if it was not found.
    :ivar stdout, stderr: its output as bytes, the first ``OUTPUT_MAX`` bytes; ``out`` and ``err``
        have the output as text.
    :ivar seconds: from the request to the answer. :ivar lost: bytes of output that were not kept.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.status: int | None = None
        self.stdout, self.stderr = bytearray(), bytearray()
        self.seconds = 0.0
        self.lost = 0

    @property
    def out(self) -> str:
        """Standard output as text."""
        return self.stdout.decode(errors="replace")

    @property
    def err(self) -> str:
        """Standard error as text."""
        return self.stderr.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """Whether the status is 0."""
        return self.status == 0

    def check(self, status: int = 0) -> CommandResult:
        """Return this object, if the command ended with ``status``.

        :raises CommandFailed: it ended with another status; the message quotes its output.
        """
        if self.status != status:
            raise CommandFailed(
                f"{self.command!r} ended with status {self.status}, not {status}{self.said()}"
            )
        return self

    def said(self) -> str:
        """The end of the output, for messages; empty if there was no output."""
        parts = [("stderr", self.err), ("stdout", self.out)]
        return "".join(f"\n{name}: {text[-TAIL:].rstrip()}" for name, text in parts if text)

    def __repr__(self) -> str:
        return (
            f"CommandResult({self.command!r}, status={self.status}, out={self.out[-200:]!r}, "
            f"err={self.err[-200:]!r})"
        )


def run(
    channel: Channel,
    command: str | Sequence[str],
    *,
    input: bytes = b"",
    timeout: float = 60.0,
    ready_timeout: float = 120.0,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> CommandResult:
    """Run a command to its end. Any thread but a vCPU's; several at once.

    :param command: for ``sh -c``, or an argv. :param input: its standard input.
    :param timeout: seconds; after them the command and its process group are killed.
    :param user, env, cwd: see ``describe``.
    :returns: the result, with any exit status.
    :raises CommandFailed: the command did not end in time, or the guest ended before it.
    """
    argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv:
        raise UsageError("a command without words", "name the program")
    description = describe(argv, input=bool(input), user=user, env=env, cwd=cwd)
    channel.wait_ready(ready_timeout)
    result = CommandResult(command if isinstance(command, str) else " ".join(argv))
    begin = time.monotonic()
    with channel.open() as session:
        send_description(session.send, description)
        run = _Run(session, result, input)
        if not run.wait(timeout):
            session.send(FRAME_SIGNAL, SIGKILL.to_bytes(4, "little"))
            run.wait(KILL_GRACE)
            raise CommandFailed(f"{result.command!r} did not end in {timeout:g} s{result.said()}")
    result.seconds = time.monotonic() - begin
    return result


class _Run:
    """The opener's end of a session whose output goes into a result."""

    def __init__(self, session: Session, result: CommandResult, input: bytes) -> None:
        self._session, self._result = session, result
        self._input, self._at, self._room = input, 0, CHANNEL_WINDOW
        self._owed = {FRAME_OUTPUT: 0, FRAME_ERROR: 0}  # bytes taken, for which no credit was given
        self._poll = select.poll()
        self._poll.register(session.fileno(), select.POLLIN)

    def wait(self, timeout: float) -> bool:
        """Carry the streams until the command has ended; returns whether it ended in time.

        :raises CommandFailed: it will not end.
        """
        until = time.monotonic() + timeout
        while self._result.status is None:
            self._feed()
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._poll.poll(left * 1000 + 1)
            for kind, payload in self._session.take():
                self._take(kind, payload)
        return True

    def _feed(self) -> None:
        while self._at < len(self._input) and self._room:
            piece = self._input[self._at : self._at + min(self._room, FRAME_MAX)]
            self._session.send(FRAME_INPUT, piece)
            self._at += len(piece)
            self._room -= len(piece)
            if self._at == len(self._input):
                self._session.send(FRAME_INPUT)

    def _take(self, kind: int, payload: bytes) -> None:
        result = self._result
        if kind == FRAME_EXIT:
            result.status = payload[0]
        elif kind == FRAME_FAILED:
            why = payload[4:].decode(errors="replace")
            raise CommandFailed(f"{result.command!r} did not end: {why}{result.said()}")
        elif kind == FRAME_CREDIT:
            self._room += TWO.unpack(payload)[1]
        else:
            kept = result.stdout if kind == FRAME_OUTPUT else result.stderr
            room = max(OUTPUT_MAX - len(kept), 0)
            kept += payload[:room]
            result.lost += max(len(payload) - room, 0)
            self._owed[kind] += len(payload)
            if self._owed[kind] >= CHANNEL_WINDOW // 4:
                self._session.send(FRAME_CREDIT, TWO.pack(kind, self._owed[kind]))
                self._owed[kind] = 0
