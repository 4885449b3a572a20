"""A card's thread: all its transitions, one after another.

Theory of operation. To start, stop, park or hand over a card's rings may need the answer of another
process, and takes as long as that process likes, up to a limit. So whoever wants such a transition
posts a job. vCPUs go on at once; the threads of the control side wait for the job's end, without
the machine's I/O lock. A job may take the I/O lock, for a moment and between conversations.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque

from pyvmm.errors import HostError
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

#: Seconds that a job may still take once all conversations have been cut: it needs none but those
#: that a busy machine takes to run its thread, which are more in the testbed. Then it is given up.
AFTER_CUT_S = 5.0 if "PYVMM_IN_TESTBED" not in os.environ else 20.0


class CardThread:
    """Runs jobs in the order in which they are posted; implements ``Jobs`` (virtio.device).

    :param name: of the card and of the thread.
    :raises HostError: there can be no more threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()  # guards what follows; held for a moment only
        self._jobs: deque[Callable[[], None]] = deque()
        self._ended = self._over = False
        self._cut_at: float | None = None
        self._thread = Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as e:
            raise HostError(
                f"cannot start the thread of {name}: {e}", "raise the limit of processes"
            ) from e

    def post(self, job: Callable[[], None]) -> bool:
        """Run ``job`` after all jobs that were posted before; it raises nothing. Any thread; never
        waits. After ``end`` nothing happens.

        :returns: whether the job will be run.
        """
        with self._changed:
            if self._ended:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    def call(self, job: Callable[[], T]) -> T:
        """Run ``job`` likewise, and wait for it. Not for a vCPU's thread, nor for one that holds
        the I/O lock, which the job may need.

        :returns: what the job returns. :raises BaseException: what it raises.
        :raises HostError: the thread has ended, or the job goes on although all conversations have
            been cut.
        """
        result: list[T] = []
        error: list[BaseException] = []
        done = False

        def run() -> None:
            nonlocal done
            try:
                result.append(job())
            except BaseException as e:
                error.append(e)
            with self._changed:
                done = True
                self._changed.notify_all()

        with self._changed:
            if self._ended:
                raise HostError(f"{self._name} is at its end")
            self._jobs.append(run)
            self._changed.notify_all()
            while not done:
                if self._given_up():
                    raise HostError(f"{self._name}: the data path does not let go")
                self._changed.wait(self._left())
        if error:
            raise error[0]
        return result[0]

    def _left(self) -> float | None:
        """Seconds for which jobs are still waited for; None: for ever."""
        if self._cut_at is None:
            return None
        return max(0.0, self._cut_at + AFTER_CUT_S - time.monotonic())

    def _given_up(self) -> bool:
        return self._left() == 0.0

    def cut(self) -> None:
        """All conversations have been cut: jobs end soon, or are not waited for. Any thread."""
        with self._changed:
            if self._cut_at is None:
                self._cut_at = time.monotonic()
                self._changed.notify_all()

    def end(self) -> bool:
        """Take no more jobs, and wait for those that were posted; whether all are done. A second
        call waits, too.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            while not self._over and not self._given_up():
                self._changed.wait(self._left())
        if self._over:
            self._thread.join()
        return self._over

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if not self._jobs:
                    self._over = True
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            job()
