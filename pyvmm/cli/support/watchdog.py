"""The bound on a bounded run that holds whatever goes wrong in pyvmm itself."""

from __future__ import annotations

import os
import sys
import threading

from pyvmm.errors import GuestTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.support.verdicts import RunFiles


class Watchdog:
    """Ends the process if the run goes on for ``GRACE`` seconds after its time-out: a fault of
    ours, or of the host, must not hang whoever waits. The kernel cleans up then.

    :param seconds: the time-out, from now on.
    :ivar files: learn the verdict, if there are any.
    """

    #: Seconds. Under emulation an orderly end takes its time.
    GRACE = 1.5 if "PYVMM_IN_TESTBED" not in os.environ else 20.0

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.files: RunFiles | None = None
        self._terminal: object = None
        if os.isatty(0):
            import termios

            self._terminal = termios.tcgetattr(0)
        self.arm()

    def arm(self) -> None:
        """Let the time begin now."""
        self._timer = threading.Timer(
            min(self._seconds + self.GRACE, threading.TIMEOUT_MAX), self._end
        )
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        # Telling has a thread of its own, which gets little time: this is the end, whatever hangs.
        telling = threading.Thread(target=self._tell, daemon=True)
        telling.start()
        telling.join(0.3)
        os._exit(GuestTimeout.exit_code)

    def _tell(self) -> None:
        if self._terminal is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]
        text = (
            f"the run did not end in time: {self._seconds:g} s are over, and it could not be ended "
            "in order"
        )
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)
        if self.files is not None:
            from pyvmm.testing.verdict import Verdict

            self.files.finish(Verdict("timeout", text), None)

    def close(self) -> None:
        """Call it off: all is well."""
        self._timer.cancel()
        self._timer.join(1)
