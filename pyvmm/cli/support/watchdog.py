"""The bound on a bounded run that holds whatever goes wrong in pyvmm itself."""

from __future__ import annotations

import os
import sys
import threading

from pyvmm.errors import GuestTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.support.verdicts import Extras


class LastResort:
    """Ends the process when a time-out is over by ``GRACE`` and nothing else has: a fault of ours,
    or of the host's, must not hang whoever waits. What is left is what the kernel cleans up.

    :param seconds: the time-out, from now. :ivar extras: what wants to know the verdict, once there
        is such.
    """

    GRACE = (
        1.5 if "PYVMM_IN_TESTBED" not in os.environ else 20.0
    )  # seconds; emulated, order takes its time

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.extras: Extras | None = None
        self._terminal: object = None
        if os.isatty(0):
            import termios

            self._terminal = termios.tcgetattr(0)
        self.arm()

    def arm(self) -> None:
        """The time begins now."""
        self._timer = threading.Timer(
            min(self._seconds + self.GRACE, threading.TIMEOUT_MAX), self._end
        )
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        # In a thread, and not waited for long: this is the end, whatever has gone wrong.
        telling = threading.Thread(target=self._tell, daemon=True)
        telling.start()
        telling.join(0.3)
        os._exit(GuestTimeout.exit_code)

    def _tell(self) -> None:
        if self._terminal is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self._terminal)  # type: ignore[arg-type]
        text = f"the run did not end in time: {self._seconds:g} s are over, and it could not be ended in order"
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)
        if self.extras is not None:
            from pyvmm.testing.verdict import Verdict

            self.extras.finish(Verdict("timeout", text), None)

    def close(self) -> None:
        """All is well."""
        self._timer.cancel()
        self._timer.join(1)
