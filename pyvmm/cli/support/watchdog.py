"""Bounds the time of a run, whatever goes wrong in pyvmm itself."""

from __future__ import annotations

import sys
import threading

from pyvmm.cli.support.lastwords import ORDERLY_SECONDS, LastWords
from pyvmm.errors import GuestTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.cli.support.verdicts import RunFiles


TELL_SECONDS = 2.0  # for writing the verdict's files
#: Seconds for finding and reporting the verdict. A good run must not fail on a host that is busy.
JUDGING_SECONDS = 12 * ORDERLY_SECONDS


class Watchdog:
    """Ends the process if the run does not end in order within ``ORDERLY_SECONDS`` of its time-out,
    or if the verdict takes ``JUDGING_SECONDS``. A fault of pyvmm or of the host must not hang the
    user's program. The kernel cleans up then.

    :param seconds: the time-out, counted from now.
    :ivar files: get the verdict; may be None.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._late = f"{seconds:g} s are over, and it could not be ended in order"
        self.files: RunFiles | None = None
        self._last_words = LastWords()
        self.arm()

    def arm(self) -> None:
        """Begin to count now."""
        self._start(self._seconds + ORDERLY_SECONDS)

    def judging(self) -> None:
        """The guest has ended in order. To find and report the verdict is our own work: it waits
        for nothing, but takes its time if the host is busy.
        """
        self.close()
        self._late = f"the guest has ended, and its verdict took more than {JUDGING_SECONDS:g} s"
        self._start(JUDGING_SECONDS)

    def _start(self, seconds: float) -> None:
        self._timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        self._last_words.end(GuestTimeout.exit_code, self._tell, TELL_SECONDS)

    def _tell(self) -> None:
        text = f"the run did not end in time: {self._late}"
        print(f"pyvmm: {text}", file=sys.stderr, flush=True)
        if self.files is not None:
            from pyvmm.testing.verdict import Verdict

            self.files.finish(Verdict("timeout", text), None)

    def close(self) -> None:
        """End the watch, because the run has ended."""
        self._timer.cancel()
        self._timer.join(1)
