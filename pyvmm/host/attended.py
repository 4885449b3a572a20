"""The user's side of a command that runs elsewhere: its output, the signals for it, and the
terminal, which is raw meanwhile. The testbed and ``pyvmm exec`` carry the streams, each in its own
way.
"""

from __future__ import annotations

import os
import select
import signal
import stat
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    Progress = Callable[[str], None]

    class Attended(Protocol):
        """A command elsewhere. ``testbed.session.Session`` describes the members."""

        terminal: int | None

        def signal(self, number: int) -> None: ...
        def resized(self) -> None: ...
        def wait(
            self,
            timeout: float | None,
            *,
            wakeup: int,
            woken: Callable[[], None],
            progress: Progress | None,
        ) -> int: ...


#: Signals that the client passes on to the command.
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Output:
    """A descriptor of the client that gets one of the command's streams. Writes never block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data = bytearray()
        # A regular file never blocks and cannot be polled. A pipe has room for PIPE_BUF bytes as
        # soon as poll says that it is writable.
        self.step = 1 << 20 if stat.S_ISREG(os.fstat(fd).st_mode) else select.PIPE_BUF

    def write(self) -> int:
        """Write one step of the pending data; returns the number of bytes written.

        :raises OSError: the reader has gone.
        """
        try:
            n = os.write(self.fd, self.data[: self.step])
        except BlockingIOError:
            return 0
        del self.data[:n]
        return n


def attend(session: Attended, timeout: float | None, progress: Progress | None = None) -> int:
    """``session.wait`` for a command line: forward signals to the command, and keep the client's
    terminal raw until the command ends.

    A second SIGINT, SIGTERM, SIGHUP or SIGQUIT kills the command. So does a SIGKILL of the client.
    A signal that this process ignores (``nohup``) stays ignored.
    """
    import termios
    import tty

    r, w = os.pipe()
    os.set_blocking(r, False)
    os.set_blocking(w, False)
    before: dict[int, Any] = {}
    old_wakeup = signal.set_wakeup_fd(w, warn_on_full_buffer=False)
    asked = 0

    def woken() -> None:
        nonlocal asked
        for number in os.read(r, 4096):
            if number == signal.SIGWINCH:
                with suppress(OSError):  # the terminal has been hung up
                    session.resized()
            elif number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                asked += 1
                session.signal(number if asked < 2 else signal.SIGKILL)
            elif number in FORWARDED:
                session.signal(number)

    modes = None
    try:
        for which in (*FORWARDED, signal.SIGWINCH):
            if signal.getsignal(which) is not signal.SIG_IGN:
                before[which] = signal.signal(which, lambda number, at: None)
        if session.terminal is not None:
            with suppress(termios.error):  # the terminal has been hung up
                modes = termios.tcgetattr(session.terminal)
                tty.setraw(session.terminal, termios.TCSADRAIN)
        return session.wait(timeout, wakeup=r, woken=woken, progress=progress)
    finally:
        if modes is not None and session.terminal is not None:
            with suppress(termios.error):
                termios.tcsetattr(session.terminal, termios.TCSADRAIN, modes)
        signal.set_wakeup_fd(old_wakeup)
        for old, handler in before.items():
            signal.signal(old, handler)
        os.close(r)
        os.close(w)
