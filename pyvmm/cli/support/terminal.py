"""The user's terminal as the guest's console. It is raw while a guest runs, and every way out
restores it.
"""

from __future__ import annotations

import os
import sys
import threading

from pyvmm.fd import is_null

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.machine import Machine

CTRL_A = 0x01
PENDING_MAX = 1 << 16  # the most bytes that were typed and that the guest has not read


class Terminal:
    """Sends stdin to the machine's console; Ctrl-A x ends the machine.

    ``close`` undoes what ``open`` has done up to then. Call it in a ``finally`` that is entered
    before ``open``, so that no signal can leave a raw terminal behind.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._saved: Any = None
        self._escaped = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._pump, name="stdin", daemon=True)

    def open(self) -> None:
        """Make a terminal raw and start reading, unless nothing can come."""
        if os.isatty(0):
            import termios
            import tty

            print("pyvmm: this is the guest's console; Ctrl-A x ends the machine", file=sys.stderr)
            self._saved = termios.tcgetattr(0)
            tty.setraw(0)
        if not is_null(0):
            self._thread.start()

    @property
    def raw(self) -> bool:
        """Whether stdin is a terminal, which is raw until ``close``."""
        return self._saved is not None

    def close(self) -> None:
        """Stop reading and restore the terminal. A second call does nothing."""
        if self._stop < 0:
            return
        try:
            if self._thread.ident is not None:
                os.eventfd_write(self._stop, 1)
                self._thread.join()
        finally:
            if self._saved is not None:
                import termios

                try:
                    termios.tcsetattr(0, termios.TCSANOW, self._saved)
                except termios.error:
                    pass  # the terminal has been hung up
            stop, self._stop = self._stop, -1
            os.close(stop)

    def _pump(self) -> None:
        import select

        pending = bytearray()
        while True:
            # A terminal is always read, because Ctrl-A x may come. A file or pipe is read on when
            # the guest has read everything so far.
            reading = self._saved is not None or not pending
            sources = [0, self._stop] if reading else [self._stop]
            ready, _, _ = select.select(sources, [], [], 0.01 if pending else None)
            if self._stop in ready:
                return
            if 0 in ready:
                try:
                    data = os.read(0, 1024)
                except OSError:
                    data = b""
                if not data or not self._typed(data, pending):
                    return
            del pending[: self._machine.console.feed(bytes(pending))]

    def _typed(self, data: bytes, pending: bytearray) -> bool:
        """Add the guest's bytes to ``pending``; False as soon as the user wants to leave."""
        for byte in data:
            if self._escaped and byte in b"xX":
                self._machine.stop()
                return False
            if byte == CTRL_A and not self._escaped and self._saved is not None:
                self._escaped = True
                continue
            self._escaped = False
            if len(pending) < PENDING_MAX:
                pending.append(byte)
            else:  # more is lost, and said as every terminal says it
                os.write(1, b"\a")
        return True
