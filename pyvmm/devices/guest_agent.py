"""Commands in a running guest: requests to the agent in our init, and the answers
(``guest/pyvmm_port.h`` has the protocol).

Theory of operation: a request waits here as bytes until the guest fetches them, up to 4096 with one
exit, into the page that its init has named. A byte on the second serial port makes init look for
requests. The command's output comes as all output of our init does, by GUEST_WRITE, and
GUEST_RESULT ends it. One command runs at a time; other callers wait meanwhile.

The guest is not trusted: its output is bounded, an answer that nobody waits for is dropped, and no
call waits forever.
"""

from __future__ import annotations

import struct
import threading
import time

from pyvmm.bus import PIO, Bus
from pyvmm.devices.console import Console
from pyvmm.errors import CommandFailed, UsageError
from pyvmm.spec.platform import (
    IRQ_COM2,
    PORT_COM2,
    PORT_GUEST_REQUEST,
    REQUEST_ARGV_MAX,
    REQUEST_INPUT_MAX,
    REQUEST_KILL,
    REQUEST_LEAVE,
    REQUEST_RUN,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.kvm.vm import Vm

REQUEST = "<IIII"  # struct pyvmm_request: type, id, bytes of argv, bytes of input
PAGE = 4096
OUTPUT_MAX = 16 << 20  # bytes kept of each stream of one command
KILL_GRACE = 10.0  # seconds that the agent may take to kill a command
TAIL = 2000  # how many characters of output an error quotes


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


class Agent:
    """The machine's end of the channel to the agent.

    :param store: writes bytes into the page that the guest has named; returns whether it could.
    """

    def __init__(self, bus: Bus, vm: Vm, store: Callable[[bytes], bool]) -> None:
        self._store = store
        self.bell = Console("agent", vm, IRQ_COM2)
        self.bell.plug(bus, PORT_COM2, "serial1")
        bus.add(PIO, PORT_GUEST_REQUEST, 4, "guest-request", self)
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # one command at a time
        self._out = bytearray()  # what the guest has not fetched yet
        self._ready = False
        self._gone = ""  # why no request will be answered any more
        self._number = 0
        self._running: CommandResult | None = None

    # --- the guest's side: vCPU threads, under the I/O lock ---------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The guest fetches a part of the request; returns the number of bytes in its page."""
        if offset or size != 4:
            return 0
        with self._changed:
            piece = bytes(self._out[:PAGE])
            if not piece or not self._store(piece):
                return 0
            del self._out[:PAGE]
        return len(piece)

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore the write: the register can only be read."""

    def became_ready(self) -> None:
        """GUEST_AGENT: the guest takes commands from now on."""
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def output(self, data: bytes, *, error: bool) -> None:
        """GUEST_WRITE: output of the command that runs."""
        with self._changed:
            result = self._running
            if result is not None:
                kept = result.stderr if error else result.stdout
                room = max(OUTPUT_MAX - len(kept), 0)
                kept += data[:room]
                result.lost += max(len(data) - room, 0)

    def ended(self, value: int) -> None:
        """GUEST_RESULT: the command has ended."""
        with self._changed:
            result = self._running
            if (
                result is not None
                and result.status is None
                and value >> 8 & 0xFFFF == self._number & 0xFFFF
            ):
                result.status = value & 0xFF
                self._changed.notify_all()

    # --- the machine's side -----------------------------------------------------------------------

    def gone(self, why: str) -> None:
        """The guest has ended: wake the threads that wait for an answer."""
        with self._changed:
            self._gone = why
            self._changed.notify_all()

    def reset(self) -> None:
        """The guest starts over, so the command that ran in it is lost."""
        with self._changed:
            self._ready = False
            self._out.clear()
            if self._running is not None:
                self._running.status = -1
            self._changed.notify_all()
        self.bell.reset()

    def wait_ready(self, timeout: float) -> None:
        """Wait until the guest takes commands.

        :raises CommandFailed: the guest takes none within ``timeout`` seconds, or has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._gone, timeout)
            if self._gone:
                raise CommandFailed(f"no command can run in the guest: {self._gone}")
            if not self._ready:
                raise CommandFailed(
                    f"the guest takes no commands after {timeout:g} s",
                    "is it an image of pyvmm's? see its console",
                )

    def run(
        self,
        command: str | Sequence[str],
        *,
        input: bytes = b"",
        timeout: float = 60.0,
        ready_timeout: float = 120.0,
    ) -> CommandResult:
        """Run a command to its end. Any thread but a vCPU's.

        :param command: for ``sh -c``, or an argv. :param input: its standard input, at most 1 MiB.
        :param timeout: seconds; after them the command and its process group are killed.
        :returns: the result, with any exit status.
        :raises CommandFailed: the command did not end in time, or the guest ended before it.
        """
        argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
        raw = b"".join(arg.encode(errors="surrogateescape") + b"\0" for arg in argv)
        if not argv or len(raw) > REQUEST_ARGV_MAX or raw.count(b"\0") != len(argv):
            raise UsageError(
                f"a command of {len(argv)} words and {len(raw)} bytes",
                f"at most {REQUEST_ARGV_MAX} bytes",
            )
        if len(input) > REQUEST_INPUT_MAX:
            raise UsageError(f"an input of {len(input)} bytes", f"at most {REQUEST_INPUT_MAX}")
        with self._turn:
            self.wait_ready(ready_timeout)
            begin = time.monotonic()
            result = CommandResult(command if isinstance(command, str) else " ".join(argv))
            with self._changed:
                self._number += 1
                self._running = result
            try:
                self._send(REQUEST_RUN, raw, input)
                if not self._wait(result, timeout):
                    self._send(REQUEST_KILL)
                    if not self._wait(result, KILL_GRACE):
                        self.gone("it did not answer before")
                    raise CommandFailed(
                        f"{result.command!r} did not end in {timeout:g} s{result.said()}"
                    )
            finally:
                with self._changed:
                    self._running = None
            result.seconds = time.monotonic() - begin
        return result

    def leave(self) -> None:
        """Ask the guest to power off."""
        self._send(REQUEST_LEAVE)

    def _wait(self, result: CommandResult, timeout: float) -> bool:
        """Wait for the end of the command; returns whether it ended in time."""
        with self._changed:
            self._changed.wait_for(lambda: result.status is not None or self._gone, timeout)
            if result.status == -1 or (result.status is None and self._gone):
                why = self._gone or "the guest started over"
                raise CommandFailed(f"{result.command!r} did not end: {why}{result.said()}")
            return result.status is not None

    def _send(self, kind: int, argv: bytes = b"", data: bytes = b"") -> None:
        with self._changed:
            self._out += (
                struct.pack(REQUEST, kind, self._number & 0xFFFF, len(argv), len(data))
                + argv
                + data
            )
        self.bell.feed(b"!")
