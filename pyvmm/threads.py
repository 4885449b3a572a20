"""``Thread``, whose name the system shows; how a thread reports a bug and goes on; and what threads
that may hardly do anything, those of vCPUs in a confined process, have another thread do for them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque

from pyvmm._ext import lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Value = TypeVar("Value")


class NoThread(RuntimeError):
    """The system, or a limit of this process's user or cgroup, has no room for one more thread."""


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

    def start(self) -> None:
        """As in the base class. :raises NoThread: there is no room for it."""
        try:
            aside(super().start)
        except RuntimeError as e:
            if self.ident is not None:  # it was started before
                raise
            raise NoThread(str(e)) from e

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
    aside(lambda: threading.excepthook(threading.ExceptHookArgs(args)))


# --- narrow threads -------------------------------------------------------------------------------

_here = threading.local()


class _Jobs:
    """A queue with one reader. A ``put`` may interrupt another ``put`` in the same thread, because
    the collector of garbage runs finalizers anywhere. ``queue.SimpleQueue`` allows that as well,
    but its library takes longer to load than this thread takes to start.
    """

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None] | None] = deque()
        self._none = threading.Lock()  # held while the reader has nothing to look for
        self._none.acquire()

    def put(self, job: Callable[[], None] | None) -> None:
        """Add a job. Never waits."""
        self._jobs.append(job)
        try:
            self._none.release()
        except RuntimeError:
            pass  # the reader is to look already, and finds this one, too

    def get(self) -> Callable[[], None] | None:
        """Wait for the next job, and take it."""
        while True:
            try:
                return self._jobs.popleft()
            except IndexError:
                self._none.acquire()


#: Jobs for the thread that works for narrow threads; None would end it.
_jobs: _Jobs | None = None


def prepare_narrow() -> None:
    """Start the thread that works for narrow threads, which is confined no further than this one. A
    second call does nothing.
    """
    global _jobs
    if _jobs is None:
        jobs = _Jobs()

        def work() -> None:
            while (job := jobs.get()) is not None:
                job()

        Thread(target=work, name="aside", daemon=True).start()
        _jobs = jobs
        _report_aside()


def _report_aside() -> None:
    """Have errors that nobody catches in a narrow thread reported by the other thread, because a
    traceback reads source files. The collector of garbage runs finalizers in any thread.
    """
    thread_hook, collector_hook = threading.excepthook, sys.unraisablehook

    def of_thread(args: threading.ExceptHookArgs) -> None:
        aside(lambda: thread_hook(args))

    def of_collector(args: sys.UnraisableHookArgs) -> None:
        if _jobs is None or not getattr(_here, "narrow", False):
            collector_hook(args)
        else:  # without waiting: this thread may be in the middle of a print, and have its lock
            _jobs.put(lambda: collector_hook(args))

    threading.excepthook, sys.unraisablehook = of_thread, of_collector


def narrow() -> None:
    """Make the calling thread narrow, for good, if its process is confined: it may make the system
    calls of a vCPU's thread only (cext/confine.c), and asks ``aside`` for others.

    :raises HostError: the kernel refuses.
    """
    done = lib.pv_confine_vcpu()
    if done < 0:
        raise HostError(f"a vCPU's thread cannot be confined: {os.strerror(-done)}")
    _here.narrow = done > 0


def aside(job: Callable[[], Value]) -> Value:
    """Do a job that takes files or threads, and no lock that the calling thread may hold: at once,
    or for a narrow thread in the thread that works for it. Returns its value, or raises its error.
    """
    if _jobs is None or not getattr(_here, "narrow", False):
        return job()
    values: list[Value] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            values.append(job())
        except BaseException as e:
            errors.append(e)
        finally:
            done.set()

    _jobs.put(work)
    done.wait()
    if errors:
        raise errors[0]
    return values[0]
