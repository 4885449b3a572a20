"""Finds a guest that hangs forever, soon and without mistaking an idle guest for one that hangs
(docs/verdicts.md says what a hang is).

Theory of operation: a thread looks at the machine every ``period``. As long as the guest leaves
KVM, or puts buffers into a ring, nothing more happens, so a guest that works is not disturbed.
Otherwise the vCPUs are called out of the guest for a moment, and the thread of each vCPU reports
whether the vCPU can take an interrupt. A vCPU that can is not stuck, because an idle guest waits
for an interrupt. The time of a stuck vCPU counts from the first look that found it stuck. If its
registers still change, only a tenth of the time counts: this may be long work with interrupts off,
such as a kernel's first second on a slow host.
"""

from __future__ import annotations

import threading
import time

from pyvmm.datapath.ringformat import ring_format
from pyvmm.kvm.vcpu import ALIVE, HALTED_OFF, NOT_STARTED, RUNS_OFF
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.card.card import Card
    from pyvmm.kvm.vcpu import State, Vcpu
    from pyvmm.memory import GuestMemory

LOOKS = 10  # at least so many looks find a vCPU stuck
PERIOD_MAX = 1.0  # seconds
AT_WORK = 10.0  # a vCPU whose registers change may be stuck so many times as long
PATIENCE = 2.0  # seconds for a vCPU to report its state; a later one is busy in a device


def stuck_too_long(
    since: list[float | None], states: list[State], linux: bool, now: float, limit: float
) -> bool:
    """Whether the guest hangs.

    :param since: for each vCPU, when it was first found stuck, in seconds; None if it is not stuck.
        :param states: ``Vcpu.state`` of each.
    :param linux: if the guest is Linux, one vCPU that runs with interrupts off is enough, because
        Linux never does so for long. Processors of another kernel may wait for work in this way, so
        all must be stuck. A halted vCPU may be waiting, in Linux, too.
    :param now, limit: in seconds.
    """
    started = [i for i, state in enumerate(states) if state != NOT_STARTED]
    long = [i for i in started if (s := since[i]) is not None and now - s >= limit]
    if linux and any(states[i] == RUNS_OFF for i in long):
        return True
    return bool(started) and long == started


class HangWatch:
    """Watches a guest, and calls ``found`` once, with one line of text, when the guest hangs.

    :param vcpus, cards, memory: of the machine, lent. :param kick: makes the vCPUs leave the guest
        for a moment; the thread of each vCPU then calls ``looked_at``.
    :param linux: whether the guest is Linux (``stuck_too_long``). :param limit: seconds without
        progress.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        cards: Sequence[Card],
        memory: GuestMemory,
        *,
        kick: Callable[[], None],
        linux: bool,
        limit: float,
        found: Callable[[str], object],
    ) -> None:
        self._vcpus, self._cards, self._memory = vcpus, cards, memory
        self._kick, self._linux, self._limit, self._found = kick, linux, limit, found
        self._period = min(limit / LOOKS, PERIOD_MAX)
        self._end = threading.Event()
        self._changed = threading.Condition()
        self._asked = False
        self._states: dict[int, State] = {}
        self._runs: dict[int, int] = {}
        self._registers: dict[int, list[int]] = {}
        self._moved: set[int] = set()  # vCPUs whose registers have changed after the last look
        self._thread = Thread(target=self._watch, name="hang-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching, at the latest when the machine ends. Any thread but a vCPU's; a second
        call does nothing.
        """
        self._end.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def looked_at(self, vcpu: Vcpu) -> None:
        """Note a vCPU's state; called by its thread, which has left the guest."""
        if not self._asked:
            return
        state, runs = vcpu.state(), vcpu.runs
        registers = [
            value for name, value in vcpu.registers().items() if name not in ("rip", "rflags")
        ]
        with self._changed:
            if registers != self._registers.get(vcpu.index):
                self._moved.add(vcpu.index)
            self._registers[vcpu.index] = registers
            self._states[vcpu.index], self._runs[vcpu.index] = state, runs
            self._changed.notify_all()

    def _watch(self) -> None:
        since: list[float | None] = [None] * len(self._vcpus)
        begun = [0.0] * len(self._vcpus)  # when the vCPU was first found stuck, moving or not
        # Time alone does not count: a host that has stood still has kept the guest from going on.
        looks = [0] * len(self._vcpus)
        rings: list[bytes] = []
        while not self._end.wait(self._period):
            before, rings = rings, self._rings()
            busy = rings != before or any(v.runs != self._runs.get(v.index) for v in self._vcpus)
            states = self._look()
            now = time.monotonic()
            for i, state in enumerate(states):
                stuck = state in (HALTED_OFF, RUNS_OFF) and not busy
                looks[i] = looks[i] + 1 if stuck else 0
                if not stuck:
                    since[i] = None
                elif since[i] is None:
                    since[i] = begun[i] = now
                elif i in self._moved:  # a tenth of the time counts
                    since[i] = now - (now - begun[i]) / AT_WORK
            if self._end.is_set():
                return
            long = [s if n >= LOOKS else None for s, n in zip(since, looks, strict=True)]
            if stuck_too_long(long, states, self._linux, now, self._limit):
                where = "; ".join(f"vCPU {i} {s}" for i, s in enumerate(states) if s != NOT_STARTED)
                self._found(f"no progress for {self._limit:g} s: {where}")
                return

    def _rings(self) -> list[bytes]:
        """What moves in each ring in use if a driver polls, even if its kicks cause no exits."""
        out = []
        for card in self._cards:
            form = ring_format(card.device.negotiated)
            for queue in card.device.queues:
                try:
                    out.append(form.offers(self._memory, queue) if queue.enabled else b"")
                except IndexError:
                    out.append(b"")
        return out

    def _look(self) -> list[State]:
        """The state of each vCPU. A vCPU that does not report is busy with a device."""
        with self._changed:
            self._states.clear()
            self._moved.clear()
            self._asked = True
        self._kick()
        until = time.monotonic() + PATIENCE
        with self._changed:
            while len(self._states) < len(self._vcpus) and not self._end.is_set():
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._asked = False
            return [self._states.get(i, ALIVE) for i in range(len(self._vcpus))]
