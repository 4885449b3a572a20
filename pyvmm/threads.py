"""``Thread``, whose name the system shows; and how a thread reports a bug and goes on."""

from __future__ import annotations

import threading

from pyvmm._ext import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Thread(threading.Thread):
    """A thread that ``top -H`` shows by its own name, and that tools which pin threads can find.

    Python sets the system's name itself from 3.14 on. Before, a thread keeps the name of the thread
    that started it. The system keeps the first 15 bytes.

    :param failed: is told, in the thread, of the exception that ends it; the traceback goes where
        ``report_bug`` says. None: the exception only ends the thread.
    """

    def __init__(
        self, *args: Any, failed: Callable[[Exception], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._failed = failed

    def run(self) -> None:
        lib.pv_thread_name(self.name.encode())
        try:
            super().run()
        except Exception as e:
            if self._failed is None:
                raise
            report_bug(e)
            self._failed(e)


def report_bug(error: BaseException) -> None:
    """Report an error that should never happen, in a thread that has to go on all the same.

    The traceback goes to ``threading.excepthook``, as it does for a thread that ends with an
    error: to standard error, unless somebody has replaced the hook.
    """
    args = (type(error), error, error.__traceback__, threading.current_thread())
    threading.excepthook(threading.ExceptHookArgs(args))
