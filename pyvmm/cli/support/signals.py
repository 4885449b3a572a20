"""SIGINT, SIGTERM and SIGHUP end a command in order: it closes what it has, and its status is 128 +
the number of the signal.
"""

from __future__ import annotations

import os
import signal
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


NAG_SECONDS = 0.05


class Terminated(BaseException):
    """One of the signals came; carries its number."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Nagger:
    """Makes sure that a signal is taken soon. The interpreter looks for a signal and then waits for
    a lock; a signal between the two wakes nobody, and would wait for as long as the main thread
    does. But the C handler writes a byte to a pipe: this thread reads it, and interrupts the wait
    by SIGURG, whose own handler does nothing, until the signal has been taken.

    :param taken: set by the signal's handler.
    """

    def __init__(self, taken: threading.Event) -> None:
        self.taken = taken
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._urgent = signal.signal(signal.SIGURG, lambda number, frame: None)
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while (told := os.read(self._read, 1)) and told[0] not in ENDING:
            pass
        while told and not self.taken.wait(NAG_SECONDS):
            signal.pthread_kill(main, signal.SIGURG)

    def close(self) -> None:
        self.taken.set()
        signal.set_wakeup_fd(self._fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        signal.signal(signal.SIGURG, self._urgent)


def orderly(body: Callable[[], int]) -> int:
    """Run ``body``, in which a signal raises Terminated; its status, or 128 + the number."""

    taken = threading.Event()
    nagger = None

    def on_signal(number: int, frame: object) -> None:
        for other in ENDING:  # a second signal must not break off the cleaning up
            signal.signal(other, signal.SIG_IGN)
        taken.set()
        raise Terminated(number)

    before = {}
    try:  # twice, since a signal may come while the handlers are being put in or taken away
        try:
            for number in ENDING:
                before[number] = signal.signal(number, on_signal)
            nagger = _Nagger(taken)
            return body()
        finally:
            if nagger is not None:
                nagger.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    except Terminated as e:
        return 128 + e.number
