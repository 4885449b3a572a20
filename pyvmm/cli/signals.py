"""SIGINT, SIGTERM and SIGHUP end a command in order: what it has is closed, and its status is 128 + the signal's number."""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """One of the signals; carries its number."""

    def __init__(self, number: int) -> None:
        self.number = number


def orderly(body: Callable[[], int]) -> int:
    """Run ``body``, where a signal raises Terminated; returns its status, or 128 + number."""

    def on_signal(number: int, frame: object) -> None:
        for other in ENDING:  # once: a second one must not break off the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    before = {}
    try:  # two of them: a signal may also come while the handlers are put in or taken away
        try:
            for number in ENDING:
                before[number] = signal.signal(number, on_signal)
            return body()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except Terminated as e:
        return 128 + e.number
