"""A signal's exception that the interpreter swallows is raised again.

A handler runs between any two steps of the main thread. If that is inside a finalizer or the
callback of a weak reference, the interpreter prints the handler's exception and goes on: each
``import`` has such a callback, and a Ctrl-C would be lost.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType
else:
    import _signal as signal  # without enumerations, which take long to make

#: Seconds until the exception is raised again. Should a finalizer run then, the exception is
#: swallowed and raised once more.
AGAIN_SECONDS = 0.02


def raise_again() -> None:
    """From now on an exception such as KeyboardInterrupt, which is no ``Exception``, is raised
    again in the main thread if it is swallowed there. Everything else is reported as before. Takes
    SIGALRM for itself.
    """
    before = sys.unraisablehook
    lost: list[BaseException] = []

    def on_swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if error is None or isinstance(error, (Exception, GeneratorExit, SystemExit)):
            before(unraisable)
            return
        lost.append(error)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)

    def on_alarm(number: int, frame: FrameType | None) -> None:
        while frame is not None:  # an exception in the hook is really lost: wait for the next tick
            if frame.f_code is on_swallowed.__code__:
                return
            frame = frame.f_back
        signal.setitimer(signal.ITIMER_REAL, 0)
        if lost:
            error = lost.pop()
            lost.clear()
            raise error.with_traceback(None)

    signal.signal(signal.SIGALRM, on_alarm)
    sys.unraisablehook = on_swallowed
