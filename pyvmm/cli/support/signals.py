"""SIGINT, SIGTERM and SIGHUP end a command in order: it closes what it has, and its status is 128 +
the number of the signal. A second signal ends the process at once, whatever hangs in it.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time

from pyvmm.cli.support.lastwords import ORDERLY_SECONDS, LastWords

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
else:
    import _signal as signal  # without enumerations, which take long to make

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NAG_SECONDS = 0.05
#: timeout(1) signals its child and then the child's process group; a terminal that closes and its
#: shell both send SIGHUP. Two signals within this many seconds may be one request, sent twice: then
#: the command gets ORDERLY_SECONDS to end in order.
TWICE_SECONDS = 0.25


class Terminated(BaseException):
    """One of the signals came; carries its number."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Watcher:
    """Makes sure that a signal is handled soon, and that a second one ends the process.

    The interpreter looks for a signal and then waits for a lock. A signal between the two wakes no
    thread, and would wait as long as the main thread does. And a main thread that hangs in its
    clean-up handles no second signal. But the C handler writes the signal's number to a pipe at
    once, whatever the main thread does, and this thread reads the pipe. It interrupts the main
    thread's wait by SIGURG, whose own handler does nothing, until the first signal is handled.

    :param taken: set by the handler of the first signal.
    """

    def __init__(self, taken: threading.Event) -> None:
        self._taken = taken
        self._last_words = LastWords()
        self._closed = False
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._urgent = signal.signal(signal.SIGURG, lambda number, frame: None)
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        first = 0.0  # when the first signal came; 0: no signal has come
        # When the second signal came, and when the time for an orderly end is over.
        again, until = 0, 0.0
        while True:
            wait = None
            if first and not self._taken.is_set():
                signal.pthread_kill(main, signal.SIGURG)
                wait = NAG_SECONDS
            if again:
                wait = min(wait or ORDERLY_SECONDS, until - time.monotonic())
            for number in self._told(poll, wait):
                now = time.monotonic()
                if not first:
                    first = now
                elif now - first >= TWICE_SECONDS:
                    self._end(number)
                else:
                    again, until = number, first + ORDERLY_SECONDS
            if self._closed:
                return
            if again and time.monotonic() >= until:
                self._end(again)

    def _told(self, poll: select.poll, wait: float | None) -> list[int]:
        """The numbers of the signals of ENDING that come within ``wait`` seconds."""
        end = None if wait is None else time.monotonic() + wait
        while True:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not poll.poll(None if left is None else left * 1000):
                return []
            told = os.read(self._read, 64)
            self._closed = not told
            numbers = [number for number in told if number in ENDING]
            if numbers or not told:
                return numbers  # else the byte was another signal's, such as our own SIGURG's

    def _end(self, number: int) -> None:
        text = "pyvmm: ended by a second signal, without cleaning up"
        self._last_words.end(128 + number, lambda: print(text, file=sys.stderr, flush=True))

    def close(self) -> None:
        self._taken.set()
        signal.set_wakeup_fd(self._fd)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        signal.signal(signal.SIGURG, self._urgent)


def orderly(body: Callable[[], int]) -> int:
    """Run ``body``, in which a signal raises Terminated; its status, or 128 + the signal."""

    taken = threading.Event()
    watcher = None
    came: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        taken.set()
        came.append(number)
        if len(came) == 1:  # a second signal does not interrupt the clean-up
            raise Terminated(number)

    before = {}
    try:  # twice, because a signal may come while the handlers are installed or removed
        try:
            for number in ENDING:
                before[number] = signal.signal(number, on_signal)
            watcher = _Watcher(taken)
            return body()
        finally:
            if watcher is not None:
                watcher.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    except Terminated as e:
        return 128 + e.number
