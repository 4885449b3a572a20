"""Ending the process at once, whatever hangs in it."""

from __future__ import annotations

import os
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds within which a command that works ends in order, on a busy host, too. Under emulation it
#: takes longer.
ORDERLY_SECONDS = 5.0 if "PYVMM_IN_TESTBED" not in os.environ else 20.0


class LastWords:
    """Ends the process without waiting for any of its threads: no clean-up runs, and the kernel
    takes back what the process had. The user's terminal gets back the settings that
    it has when this object is made.
    """

    def __init__(self) -> None:
        self._terminal: object = None
        if os.isatty(0):
            import termios

            self._terminal = termios.tcgetattr(0)

    def end(self, status: int, tell: Callable[[], None], seconds: float = 0.3) -> None:
        """Put the terminal back, call ``tell``, and exit with ``status``. Any thread; does not
        return.

        :param seconds: the most that ``tell`` may take.
        """
        # A thread of its own makes the calls that may hang.
        telling = threading.Thread(target=self._tell, args=(tell,), daemon=True)
        telling.start()
        telling.join(seconds)
        os._exit(status)

    def _tell(self, tell: Callable[[], None]) -> None:
        if self._terminal is not None:
            import signal
            import termios

            # The terminal would stop a process in the background (termios(3)).
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
            termios.tcsetattr(0, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]
        tell()
