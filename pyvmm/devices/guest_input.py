"""The standard input of the guest's command: init fetches it by the guest port, as the command
reads it (``guest/pyvmm_port.h`` has the protocol).

Theory of operation: a read of PORT_GUEST_INPUT copies up to 4096 bytes to the page that init has
named. If there are none yet, BELL_INPUT on the second serial port tells init when there are; once
more each second until init comes, because a sleep of the machine loses what is in the port. A
thread reads ahead from the host's descriptor, at most ``AHEAD`` bytes, and only once the guest has
asked: what the command does not read stays there, but for what is on the way.
"""

from __future__ import annotations

import os
import select
import threading

from pyvmm.bus import PIO, Bus
from pyvmm.fd import Closing, eventfds
from pyvmm.spec.platform import BELL_INPUT, INPUT_ENDS, PORT_GUEST_INPUT
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
AHEAD = 1 << 16
RING_MS = 1000


class GuestInput(Closing):
    """The machine's end of the command's standard input.

    :param ring: writes a byte to the second serial port.
    :param store: writes bytes into the page that the guest has named; returns whether it could.
    :param source: a descriptor of the host to read from. It is lent: nobody else may close it
        before ``close``.
    :ivar error: why reading failed, at which the input ends; None if it did not fail.
    :ivar asked: whether the guest has asked for input. Init does so before the command can read.
    """

    def __init__(
        self,
        bus: Bus,
        ring: Callable[[bytes], object],
        store: Callable[[bytes], bool],
        source: int,
    ) -> None:
        self._bell, self._store, self._source = ring, store, source
        self.error: OSError | None = None
        self.asked = False
        bus.add(PIO, PORT_GUEST_INPUT, 4, "guest-input", self)
        self._lock = threading.Lock()
        self._ahead = bytearray()
        self._ended = False
        self._hungry = False  # the guest has found nothing, and waits for the bell
        self._rung = False  # the bell has rung since the guest came last
        self._wanted, self._stop = eventfds(2)
        self._thread = Thread(target=self._pump, name="input", daemon=True)
        self._thread.start()

    # --- the guest's side: vCPU threads, under the I/O lock ---------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The guest fetches input; returns the number of bytes in its page, 0 if it has to wait for
        the bell, or ``INPUT_ENDS``.
        """
        if offset or size != 4:
            return 0
        self.asked = True
        with self._lock:
            self._rung = False
            piece = bytes(self._ahead[:PAGE])
            if piece and not self._store(piece):
                return INPUT_ENDS
            del self._ahead[:PAGE]
            if not self._ended and len(self._ahead) < AHEAD // 2:
                self._wanted.nudge()
            if not piece and self._ended:
                return INPUT_ENDS
            self._hungry = not piece
        return len(piece)

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore the write: the register can only be read."""

    # --- the host's side --------------------------------------------------------------------------

    def reset(self) -> None:
        """The guest starts over: its next command goes on with what is left of the input."""
        with self._lock:
            self._hungry = self._rung = False

    def close(self) -> None:
        """Stop reading. A second call does nothing."""
        if self._thread.is_alive():
            self._stop.signal()
            self._thread.join()
        self._stop.close()
        self._wanted.close()

    def _pump(self) -> None:
        while not self._ended and self._ready(self._wanted.fileno()) and self._ready(self._source):
            self._wanted.drain()
            try:
                data = os.read(self._source, AHEAD // 2)
            except BlockingIOError:  # another reader of a pipe was quicker
                self._wanted.nudge()
                continue
            except OSError as e:
                self.error, data = e, b""
            with self._lock:
                self._ahead += data
                self._ended = not data
                hungry, self._hungry = self._hungry, False
            if hungry:
                self._ring()
        while self._rung and self._ready():
            pass

    def _ring(self) -> None:
        self._rung = True
        self._bell(bytes([BELL_INPUT]))

    def _ready(self, fd: int = -1) -> bool:
        """Wait until ``fd`` can be read, or once for ``RING_MS`` without one; returns False if
        ``close`` has been called. Rings again while the guest does not come.
        """
        poll = select.poll()
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        poll.register(self._stop.fileno(), select.POLLIN)
        while True:
            ready = poll.poll(RING_MS if self._rung else None)
            if ready:
                return all(one != self._stop.fileno() for one, _ in ready)
            if self._rung:
                self._ring()
            if fd < 0:
                return True
