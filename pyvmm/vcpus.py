"""Runs the vCPUs: one thread each, from the start of the guest to its end.

Theory of operation: a thread enters the guest by ``Vcpu.run``, which answers in C whatever it can.
It returns when Python is needed: for a device in Python, for an end, or because the vCPU was
kicked. Python devices run under the machine's I/O lock. A condition guards the state of the threads
(run, pause or leave). No thread holds it for long, so ``halt`` does not wait for a device.
"""

from __future__ import annotations

import errno
import os
import threading
import time

from pyvmm.kvm.vcpu import (
    EXIT_FAIL_ENTRY,
    EXIT_SHUTDOWN,
    STOP_ASKED,
    STOP_ERROR,
    STOP_MMIO,
    STOP_OTHER,
    STOP_PIO,
    reasons,
)
from pyvmm.outcome import Outcome
from pyvmm.threads import Thread, aside, narrow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.bus import Bus
    from pyvmm.kvm.vcpu import Vcpu


EHWPOISON = 133  # asm-generic/errno.h; Python has no name for it
#: Seconds that a vCPU's thread may take to leave the guest before it is kicked again.
KICK_AGAIN_S = 0.2
#: Seconds after which a vCPU that a device holds (``Bus.hold``) looks whether it is to leave.
HELD_LOOK_S = 0.1
#: Seconds after which it is looked again whether a vCPU that was told to has left the guest, and
#: the most seconds for that.
INSIDE_LOOK_S, LEAVE_S = 0.01, 60.0


class VcpuThreads:
    """The threads of a machine's vCPUs. The vCPUs are lent, and stay open until ``run`` has
    returned for the last time.

    :param lock: the machine's I/O lock, held while a device in Python answers.
    :param flush: called by a vCPU's thread after such an answer, without the lock.
    :param over: called by a vCPU's thread with the end that it has met, once or more often.
    :ivar kicked: called by a vCPU's thread that was kicked out of the guest; may be None.
    :ivar failure: an error of pyvmm itself in a vCPU's thread; None if there was none.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        bus: Bus,
        lock: threading.RLock,
        *,
        flush: Callable[[], None],
        over: Callable[[Outcome], object],
    ) -> None:
        self._vcpus, self._bus, self._lock = vcpus, bus, lock
        self._flush, self._over = flush, over
        self.kicked: Callable[[Vcpu], None] | None = None
        self.failure: BaseException | None = None
        self._changed = threading.Condition()  # guards the attributes below
        self._started = self._running = self._ended = False
        self._halted = self._paused = False
        self._parked = 0
        self._left = 0  # threads that have left the guest for good
        self._lost: set[str] = set()  # names of threads that will never do anything again

    def run(self) -> None:
        """Run all vCPUs until ``halt``; returns at once if ``halt`` has been called before."""
        threads = [
            Thread(target=self._run, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self._vcpus
        ]
        with self._changed:
            self._started = self._running = True
            self._left = 0
        for thread in threads:
            thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._halted or self._left == len(threads))
        for thread in threads:
            thread.join(KICK_AGAIN_S)
            while thread.is_alive() and thread.name not in self._lost:
                # It may have been about to kick by an exit, and now wait for a back-end that keeps
                # the eventfd full (cext/event.h).
                self.kick()
                thread.join(KICK_AGAIN_S)
        with self._changed:
            self._running = False

    def halt(self) -> None:
        """Make all vCPUs leave the guest, and ``run`` return. Any thread; never waits."""
        with self._changed:
            self._halted = True
            self._kick()
            self._changed.notify_all()

    def lose(self, thread: str) -> None:
        """Wait no more for the thread of this name, if it is a vCPU's: it has been stopped."""
        self._lost.add(thread)

    def rearm(self) -> None:
        """Allow another ``run`` after a ``halt``."""
        with self._changed:
            self._halted = False

    def end(self) -> None:
        """Note that ``run`` will not be called again, so no thread has to wait for the vCPUs."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def kick(self) -> None:
        """Make all vCPUs leave the guest for a moment; each thread calls ``kicked``. Any thread;
        never waits.
        """
        with self._changed:
            self._kick()

    def _kick(self) -> None:
        if self._running:  # else there is no vCPU to kick, and a vCPU may have been closed
            for vcpu in self._vcpus:
                vcpu.kick()

    # --- pause ------------------------------------------------------------------------------------

    @property
    def paused(self) -> bool:
        """Whether the vCPUs are to stay out of the guest."""
        return self._paused

    @property
    def parked(self) -> int:
        """How many threads wait for ``resume``."""
        return self._parked

    def pause(self, patience: float) -> None:
        """Keep all vCPUs out of the guest; returns when no vCPU is in the guest. If the machine
        starts over, returns after that. Any thread but a vCPU's.

        :param patience: the most seconds to wait for a thread that is outside of the guest because
            nobody reads its output; it parks before it enters the guest again.
        """
        with self._changed:
            self._paused = True
            self._kick()
            if self._started:
                self._changed.wait_for(
                    lambda: self._ended or self._parked == len(self._vcpus), patience
                )
                # A busy host may keep a thread from leaving the guest for longer than that.
                until = time.monotonic() + LEAVE_S
                while not self._ended and any(vcpu.inside for vcpu in self._vcpus):
                    if time.monotonic() > until:
                        break
                    self._changed.wait(INSIDE_LOOK_S)

    def resume(self) -> None:
        """Let the vCPUs enter the guest again."""
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def _park(self, vcpu: Vcpu) -> None:
        """In a vCPU's thread: wait for ``resume`` or ``halt``."""
        with self._changed:
            self._parked += 1
            self._changed.notify_all()
            while self._paused and not self._halted:
                self._changed.wait()
            self._parked -= 1
        vcpu.rested()

    # --- the threads ------------------------------------------------------------------------------

    def _run(self, vcpu: Vcpu) -> None:
        run, c, dispatch, lock, flush = (
            vcpu.run,
            vcpu.c,
            self._bus.dispatch,
            self._lock,
            self._flush,
        )
        try:
            vcpu.thread_id = threading.get_native_id()
            vcpu.threads.add(vcpu.thread_id)
            narrow()
            while not self._halted:
                if self._paused:
                    self._park(vcpu)
                    continue
                stop = run()
                if stop in (STOP_PIO, STOP_MMIO):
                    with lock:
                        held = dispatch(c)
                    flush()
                    while held is not None and not self._halted and not held.wait(HELD_LOOK_S):
                        pass
                elif stop != STOP_ASKED:
                    self._over(abnormal(vcpu, stop))
                elif self.kicked is not None:
                    self.kicked(vcpu)
        except BaseException as e:
            self.failure = e
            self._over(Outcome("stopped", str(e)))
        finally:
            with self._changed:
                self._left += 1
                self._changed.notify_all()
        vcpu.settle()


def abnormal(vcpu: Vcpu, stop: int) -> Outcome:
    """The end that a return of ``Vcpu.run`` means that is neither an access nor a kick."""
    c, registers = vcpu.c, vcpu.registers()
    if stop == STOP_OTHER and c.reason == EXIT_SHUTDOWN:
        if vcpu.reset_by_kvm():
            detail = f"vCPU {vcpu.index}, whose registers KVM has reset, as it does on AMD"
            return Outcome("triple-fault", detail)
        return Outcome("triple-fault", f"vCPU {vcpu.index}", registers)
    if stop == STOP_ERROR:
        detail = f"vCPU {vcpu.index}: {os.strerror(c.error)}{_fault_place(c)}"
    else:
        name = reasons().get(c.reason, str(c.reason))
        info = " ".join(f"{c.info[i]:#x}" for i in range(c.info_count))
        detail = f"vCPU {vcpu.index}: exit {name}, detail {c.detail} {info}".rstrip()
        if c.reason == EXIT_FAIL_ENTRY and c.info_count:
            detail += f": {aside(lambda: _why_not_entered(c.info[0]))}"
    return Outcome("kvm-error", f"{detail}, rip {registers['rip']:#x}", registers)


def _why_not_entered(reason: int) -> str:
    """In words why the processor has refused the guest's state; loads a module."""
    from pyvmm.kvm.entry import entry_failure

    return entry_failure(reason)


def _fault_place(c: Any) -> str:
    """Where KVM could not get a page of guest memory for the guest's access."""
    if c.error not in (errno.EFAULT, EHWPOISON):
        return ""
    if c.info_count < 3:
        return " (the host cannot give a page of guest memory; KVM does not say which)"
    return f" (the host cannot give the page of guest memory at {c.info[1]:#x})"
