"""The guest port: our init reports the points of the run, hands over output and names pages
(``guest/pyvmm_port.h`` has the protocol).
"""

from __future__ import annotations

import threading

from pyvmm.bus import PIO, Bus
from pyvmm.spec.platform import (
    GONE_STDERR,
    GONE_STDOUT,
    GUEST_AGENT,
    GUEST_ANSWERS,
    GUEST_CHANNEL,
    GUEST_COMMAND,
    GUEST_INIT,
    GUEST_NET_UP,
    GUEST_NO_SHARE,
    GUEST_PAGE,
    GUEST_POWEROFF,
    GUEST_SHARES,
    GUEST_STATUS,
    GUEST_WRITE,
    PORT_GUEST_CONTROL,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.console import Stream
    from pyvmm.devices.guest_channel import Channel
    from pyvmm.memory import GuestMemory

MAGIC = 0x4D4D5650  # "PVMM", little-endian
WRITE_MAX = 4096  # bytes of one GUEST_WRITE

#: Opcode -> the name of the point in the run that the guest has reached (docs/report.md).
PHASES = {
    GUEST_INIT: "init",
    GUEST_NET_UP: "net_up",
    GUEST_SHARES: "shares",
    GUEST_COMMAND: "command",
    GUEST_STATUS: "command_end",
    GUEST_AGENT: "agent",
    GUEST_POWEROFF: "poweroff",
}


class GuestPage:
    """The page of guest memory that init has named for data that do not fit into a register.

    The guest may name any address. A page outside of RAM can be neither read nor written.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._address = 0  # guest-physical; 0: init has named no page

    def name(self, frame: int) -> None:
        """Set the page, by its page frame number; 0 means that there is no page any more."""
        self._address = frame << 12

    def read(self, length: int) -> bytes | None:
        """The first ``length`` bytes, at most 4096; None if they are not in RAM."""
        try:
            return self._memory.read(self._address, length)
        except IndexError:
            return None

    def store(self, data: bytes) -> bool:
        """Write ``data``, at most 4096 bytes, to the start of the page; returns whether this was
        possible.
        """
        try:
            if self._address:
                self._memory.write(self._address, data)
        except IndexError:
            return False
        return bool(self._address)


class GuestPort:
    """The control register of the guest port: 32-bit writes of opcode << 24 | value.

    vCPU threads call ``read`` and ``write`` with the I/O lock held, and the callbacks run in them.

    :param stdout, stderr: take the output of the guest's command.
    :param reached: called with a name of ``PHASES`` each time the guest reports this point.
    :param ended: called with the exit status of the guest's command, 0 to 255.
    :param no_share: called with a share's number and an errno if the guest cannot mount the share.
    :param channel: is told of its pages; None if the machine has no channel.
    :ivar answers: whether the guest has named a page, so that it is told if nobody reads its output
        any more.
    """

    def __init__(
        self,
        bus: Bus,
        page: GuestPage,
        stdout: Stream,
        stderr: Stream,
        *,
        reached: Callable[[str], None],
        ended: Callable[[int], None],
        no_share: Callable[[int, int], None],
        channel: Channel | None = None,
    ) -> None:
        self._page, self._stdout, self._stderr = page, stdout, stderr
        self._reached, self._ended, self._channel = reached, ended, channel
        self._no_share = no_share
        self.answers = False
        #: Thread -> the output that it writes to its stream once it has released the lock.
        self._writes: dict[int, tuple[Stream, bytes]] = {}
        bus.add(PIO, PORT_GUEST_CONTROL, 4, "guest-control", self)

    def read(self, offset: int, size: int) -> int:
        """``PVMM``, by which init sees that the port exists."""
        return MAGIC >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """An opcode with its value; accesses of other widths are ignored."""
        if offset == 0 and size == 4:
            self._take(value >> 24, value & 0xFFFFFF)

    def _take(self, opcode: int, value: int) -> None:
        if opcode in PHASES:
            self._reached(PHASES[opcode])
        if opcode == GUEST_STATUS:
            self._ended(value & 0xFF)
        elif opcode == GUEST_NO_SHARE:
            self._no_share(value >> 16, value & 0xFFFF)
        elif opcode == GUEST_PAGE:
            self._page.name(value)
            self.answers = self._page.store(GUEST_ANSWERS.to_bytes(4, "little"))
        elif opcode == GUEST_WRITE:
            data = self._page.read(min(value & 0xFFFF, WRITE_MAX))
            if data is not None:
                self._output(data, error=bool(value >> 16 & 1))
        elif self._channel is not None and opcode == GUEST_CHANNEL:
            self._channel.name(value)
        elif self._channel is not None and opcode in (GUEST_COMMAND, GUEST_AGENT):
            self._channel.started_without()

    def _output(self, data: bytes, *, error: bool) -> None:
        stream = self._stderr if error else self._stdout
        self._writes[threading.get_ident()] = stream, data

    def flush(self) -> None:
        """Pass on what the calling vCPU thread has just written, and tell the guest whose reader
        has gone. This waits if nobody reads the stream, so the thread must not hold the lock.
        """
        if self._writes:
            write = self._writes.pop(threading.get_ident(), None)
            if write is not None:
                write[0].put(write[1])
                gone = GONE_STDOUT if self._stdout.reader_gone else 0
                gone |= GONE_STDERR if self._stderr.reader_gone else 0
                self._page.store(gone.to_bytes(4, "little"))
