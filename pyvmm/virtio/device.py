"""A virtio device's life, whatever its transport: status, features, queues (virtio 1.2, 2.1 to 2.7
and 3.1).

The guest is hostile: bits and registers change only where the specification lets the driver change
them; anything else is ignored, counted in ``refused`` and told in ``mistakes``. docs/drivers.md
says what is taken and why not more.

Theory of operation. Registers belong to vCPU threads, under the machine's I/O lock. What happens
between the device and whoever moves its data may take as long as another process likes, so it is
done in jobs, one after another, that no vCPU waits for (``Jobs``). DRIVER_OK reads back at once,
and the job that starts the device comes later; if it fails, the driver sees NEEDS_RESET. A write of
0 makes the device *stopping*: the status reads as before until the job that stops the device is
done, then 0, for which the driver polls (4.1.4.3.2).
"""

from __future__ import annotations

import threading
import time

from pyvmm.datapath.base import Vring
from pyvmm.datapath.ringformat import ring_format
from pyvmm.errors import PyvmmError
from pyvmm.fd import EventFd, eventfds
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
)
from pyvmm.spec.virtio_pci import (
    VIRTIO_MSI_NO_VECTOR,
    VIRTIO_PCI_QUEUE_ADDR_SHIFT,
    VIRTIO_PCI_VRING_ALIGN,
)
from pyvmm.threads import aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from pyvmm.datapath.ringformat import RingFormat
    from pyvmm.memory import GuestMemory
else:
    Protocol = object  # `typing` costs as much as all else that a run imports

ACK, DRIVER = VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET, FAILED = VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_FAILED

#: The driver's steps, in this order only (3.1.1); one write may take several.
STEPS = {ACK: "ACKNOWLEDGE", DRIVER: "DRIVER", FEATURES_OK: "FEATURES_OK", DRIVER_OK: "DRIVER_OK"}
#: The status in which queue registers may be written.
CONFIGURING = ACK | DRIVER | FEATURES_OK
#: Faults, tracebacks and mistakes kept: a guest can repeat each as often as it likes.
FAULTS_MAX, TRACEBACKS_MAX, MISTAKES_MAX = 16, 4, 16
#: ``Queue``'s attributes -> the registers' names in the specification (4.1.4.3).
QUEUE_REGISTERS = {
    "size": "queue_size",
    "enabled": "queue_enable",
    "desc": "queue_desc",
    "avail": "queue_driver",
    "used": "queue_device",
    "resetting": "queue_reset",
}
#: What is wrong with a write by a driver that uses both interfaces without a reset in between.
MIXED = "while the driver uses the {} interface"


class Queue:
    """One virtqueue's registers, and its eventfds (owned by the device), which a data path borrows.

    :ivar max_size: entries, a power of two; ``size`` starts there.
    :ivar desc, avail, used: guest-physical addresses of the descriptor, driver and device areas.
    :ivar resetting: the driver has asked for a reset of this virtqueue alone, which is not done.
    """

    __slots__ = (
        "avail",
        "call",
        "desc",
        "enabled",
        "index",
        "kick",
        "max_size",
        "resetting",
        "size",
        "used",
        "vector",
    )

    def __init__(self, index: int, max_size: int, kick: EventFd, call: EventFd) -> None:
        self.index = index
        self.max_size = max_size
        self.kick, self.call = kick, call
        self.clear()

    def clear(self) -> None:
        """The registers after reset."""
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.enabled = self.resetting = False
        self.vector = VIRTIO_MSI_NO_VECTOR

    def place(self, gpa: int) -> None:
        """Set the three areas as a legacy driver lays them out from ``gpa`` on (2.7.2)."""
        self.desc, self.avail = gpa, gpa + 16 * self.size
        end = self.avail + 6 + 2 * self.size
        self.used = end + -end % VIRTIO_PCI_VRING_ALIGN

    def problem(self, memory: GuestMemory, form: RingFormat) -> str:
        """What is wrong with the driver's set-up; empty if nothing (2.7, 2.8: sizes and
        alignments).
        """
        if not form.allows(self.size) or self.size > self.max_size:
            return f"queue {self.index}: size {self.size}"
        places = (self.desc, self.avail, self.used)
        for gpa, area in zip(places, form.areas(self.size), strict=True):
            what = f"queue {self.index}: {area.name} at {gpa:#x}"
            if gpa % area.align:
                return f"{what} is not aligned to {area.align}"
            end = gpa + area.length
            if not any(r.gpa <= gpa and end <= r.gpa + r.size for r in memory.regions):
                return f"{what} is outside RAM"
        return ""


class Jobs(Protocol):
    """Runs a device's transitions one after another."""

    def post(self, job: Callable[[], None]) -> bool:
        """Run ``job`` after all jobs that were posted before; whether that will happen. Any thread;
        never waits.
        """


class Inline:
    """Runs each job at once, in the thread that posts it: for a device whose transitions need
    nobody else.
    """

    def post(self, job: Callable[[], None]) -> bool:
        """Run it."""
        job()
        return True


class Transport(Protocol):
    """What a device needs of the bus that it is plugged into."""

    def set_active(self, active: bool) -> None:
        """The device has reached DRIVER_OK, or has stopped: take kicks from the guest, or no more.
        The I/O lock is held.
        """

    def device_reset(self) -> None:
        """The device is back in the state after power-on; the I/O lock is held."""

    def queue_reset(self, q: Queue) -> None:
        """A virtqueue is about to be cleared, and the device goes on; the I/O lock is held."""

    def set_doorbells(self, pages: dict[int, int]) -> None:
        """Map these pages (``DataPath.doorbells``) where the driver kicks, and no others: once this
        has returned, the guest reaches no page of before. The I/O lock is held.

        :raises HostError: KVM does not take back a page of before.
        """

    def set_takers(self, takers: dict[int, Any]) -> None:
        """Have kicks of these virtqueues taken in the thread of the vCPU that kicks
        (``DataPath.takers``), and no others: once this has returned, no vCPU is in a taker of
        before. The I/O lock is held.
        """

    def interrupt_config(self) -> None:
        """Tell the driver that the configuration has changed. Any thread."""


class Unplugged:
    """In place of a transport, for a device that is not plugged in."""

    def set_active(self, active: bool) -> None:
        """Nobody kicks."""

    def device_reset(self) -> None:
        """Nothing to do."""

    def queue_reset(self, q: Queue) -> None:
        """Nothing to do."""

    def set_doorbells(self, pages: dict[int, int]) -> None:
        """Nobody kicks."""

    def set_takers(self, takers: dict[int, Any]) -> None:
        """Nobody kicks."""

    def interrupt_config(self) -> None:
        """Nobody listens."""


class VirtioDevice:
    """Base of all virtio devices: the status machine, feature negotiation, queues.

    A subclass gives ``device_id`` and overrides ``offered``, ``config_space``, ``activate`` and
    ``deactivate``. All methods but ``fault`` and ``config_changed``, and those that are called in
    jobs, are called under the I/O lock.

    :param jobs: runs transitions; by default they happen in the thread that asks for them.
    :param lock: the machine's I/O lock; by default a lock of the device's own.
    :ivar legacy: the driver uses the transport's legacy interface; from its first write there until
        a reset. :ivar interface: ``legacy`` or ``modern``, of the latest DRIVER_OK; empty before.
    :ivar mastering: the bus lets the device access memory.
    :ivar stopping: the driver has written 0 to the status, and the device is still being stopped.
    :ivar negotiated: the features of the latest DRIVER_OK; a reset keeps them, for reports.
    :ivar refused: writes of the driver that were ignored.
    :ivar mistakes: the first of these, and what else the driver did wrong, in words with the clause
        of the specification.
    :ivar faults: the first problems that only a reset cures; :ivar faults_total: how many there
        were.
    :ivar tracebacks: Python's, of faults that are bugs of pyvmm.
    """

    device_id = 0
    #: For the ledger: offset in the device-specific configuration -> field.
    config_names: dict[int, str | tuple[str, str]] = {}

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        queue_sizes: list[int],
        *,
        jobs: Jobs | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        self.name = name
        self.memory = memory
        self.status = 0
        self.mastering = True
        self._mastering_asked = False  # a job that looks at ``mastering`` has been posted
        self.stopping = self.legacy = False
        self.interface = ""
        self.driver_features = self.negotiated = 0
        self.generation = 0
        self._jobs: Jobs = jobs if jobs is not None else Inline()
        self._lock = lock if lock is not None else threading.RLock()
        self._mutex = threading.Lock()  # status and generation against a data path's threads
        self._transport: Transport = Unplugged()
        self._words: Mapping[str, str] = {}
        events = eventfds(2 * len(queue_sizes))
        self.queues = [
            Queue(i, size, events[2 * i], events[2 * i + 1]) for i, size in enumerate(queue_sizes)
        ]
        #: For traces: a ``kvm.recorder.Scope``, or None.
        self.recorder: Any = None
        self.refused = 0
        self.mistakes: list[str] = []
        self.resets = 0
        self.faults: list[str] = []
        self.faults_total = 0
        self.tracebacks: list[str] = []
        self._abandoned = False

    def plug(self, transport: Transport, words: Mapping[str, str] | None = None) -> None:
        """The device is on a bus from now on.

        :param words: what this bus calls registers and clauses that have other names over PCI.
        """
        self._transport, self._words = transport, words or {}

    # --- for subclasses ---------------------------------------------------------------------------

    def offered(self) -> int:
        """The feature bits on offer."""
        return 1 << VIRTIO_F_VERSION_1

    def activate(self, rings: list[Vring]) -> None:
        """In a job after DRIVER_OK: start moving data.

        :raises PyvmmError: the device does not start, and the guest sees NEEDS_RESET.
        """

    def deactivate(self) -> None:
        """In a job after a reset was asked for: stop; no access to guest memory happens after it
        returns or raises.
        """

    def stop_ring(self, index: int) -> None:
        """In a job: let go of one virtqueue while the device goes on (2.6.1).

        :raises PyvmmError: the data path did not stop in order, or does not start again.
        """

    def start_ring(self, ring: Vring) -> None:
        """In a job: the driver has enabled a virtqueue again.

        :raises PyvmmError: as ``activate``.
        """

    def config_space(self) -> bytes:
        """The device-specific configuration as it reads now."""
        return b""

    def legacy_config_written(self, offset: int, data: bytes) -> bool:
        """A legacy driver writes to the device-specific configuration; whether it may."""
        return False

    def config_written(self, offset: int, data: bytes) -> bool:
        """A modern driver writes to the device-specific configuration; whether it may. Most devices
        have nothing to write there.
        """
        return False

    def own_queues(self) -> frozenset[int]:
        """Queues that the device serves itself, by ``notified``; asked at DRIVER_OK."""
        return frozenset()

    def kick_role(self, index: int) -> str:
        """``notify`` for a queue that a data path serves, ``control`` for one that the device
        serves itself; for the ledger.
        """
        return "notify"

    def queue_name(self, index: int) -> str:
        """What the ledger calls a kick of queue ``index``."""
        return f"queue {index} notify{' (control)' if self.kick_role(index) == 'control' else ''}"

    def notified(self, index: int) -> None:
        """One of ``own_queues`` has been kicked."""

    def mastering_changed(self) -> None:
        """In a job: ``mastering`` has changed. While it is False, the device leaves memory alone.

        :raises PyvmmError: as ``activate``.
        """

    def problem_found(self, problem: str) -> None:
        """A problem has been added to ``faults``. Any thread; must not wait."""

    # --- status -----------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """From DRIVER_OK until a reset is done."""
        return bool(self.status & DRIVER_OK)

    def set_status(self, value: int) -> None:
        """The driver writes the status register: steps forward, FAILED, or 0 to reset. The steps of
        one write are taken one after another, each with its conditions.
        """
        if value == 0:
            self.reset()
            return
        now, want = self.status & ~NEEDS_RESET, value & ~NEEDS_RESET
        wrong, clause = self._status_problem(now, want)
        if wrong:
            self.refuse("device_status", value, wrong, clause)
            return
        with self._mutex:
            self.status |= want & FAILED
        for step in STEPS:
            if want & step & ~now and not self._take_step(step, value):
                return

    def _status_problem(self, now: int, want: int) -> tuple[str, str]:
        """What is wrong with a write of the status, and the clause; empty if nothing is."""
        new = want & ~now
        if self.stopping:
            return "before a reset was complete, for which the driver reads until 0", "4.1.4.3.2"
        if self.legacy:
            return MIXED.format("legacy"), "4.1.4.10"
        if now & ~want:
            return f"which clears bits of {now:#x}", "2.1.1"
        if new and now & FAILED:
            return "after FAILED, which only a reset leads out of", "2.1.1"
        if want & ~(FAILED | sum(STEPS)):
            return "which has reserved bits", "2.1"
        if new in (0, FAILED):
            return "", ""
        if new & FAILED:
            return "which has FAILED together with steps that it has not taken", "2.1"
        missing = ""
        for step, name in STEPS.items():
            if missing and want & step:
                return f"without {missing}", "3.1.1"
            if not want & step:
                missing = missing or name
        return "", ""

    def _take_step(self, step: int, value: int) -> bool:
        """Take one step of the driver's; whether its conditions are met."""
        if step == FEATURES_OK:
            wrong, clause = self._features_problem()
            if wrong:  # the driver reads the bit back and gives up (3.1.1 step 6)
                self.refuse("device_status", value, wrong, clause)
                return False
        with self._mutex:
            self.status |= step
        if step == DRIVER_OK:
            self._begin()
        return True

    def _features_problem(self) -> tuple[str, str]:
        """What is wrong with the driver's features, and the clause; empty if nothing is."""
        acked = self.driver_features
        unknown = acked & ~self.offered()
        if unknown:
            return f"with features that were not offered: {unknown:#x}", "2.2.1"
        if not acked >> VIRTIO_F_VERSION_1 & 1:
            return "without having accepted VIRTIO_F_VERSION_1", "6.1"
        return "", ""

    def refuse(self, register: str, value: int, wrong: str, clause: str) -> None:
        """Ignore a write of the driver: count it and tell of it.

        :param register: its name in the specification of virtio over PCI. :param wrong: completes
            "driver wrote REGISTER = VALUE ...". :param clause: the section of the specification.
        """
        self.refused += 1
        register, clause = self._words.get(register, register), self._words.get(clause, clause)
        comma = "," if wrong.startswith(("which", "but")) else ""
        self.mistake(f"driver wrote {register} = {value:#x}{comma} {wrong} ({clause})")

    def mistake(self, text: str) -> None:
        """Tell of something that the driver does wrong."""
        if len(self.mistakes) >= MISTAKES_MAX:
            return
        self.mistakes.append(text)
        if self.recorder is not None:
            self.recorder.step("driver's mistake", time.monotonic_ns(), {"mistake": text})

    def _begin(self) -> None:
        """DRIVER_OK: start the device, unless the driver set up its queues wrongly."""
        self.negotiated = self.driver_features
        self.interface = "legacy" if self.legacy else "modern"
        self._transport.set_active(True)
        if not self.mastering:
            self.mistake(
                "driver set DRIVER_OK while bus mastering is off: until bit 2 of the PCI command"
                " register is set, no virtqueue is served (PCI 3.0, 6.2.2)"
            )
        rings = []
        for q in self.queues:
            if q.enabled:
                ring = self._vring(q)
                if ring is None:
                    return
                rings.append(ring)
        self.post("start", lambda: self.activate(rings))

    def _vring(self, q: Queue) -> Vring | None:
        """An enabled virtqueue at its start; None if the driver set it up wrongly, which is a
        fault.
        """
        form = ring_format(self.negotiated)
        problem = q.problem(self.memory, form)
        if problem:
            self.fault(q.index, problem)
            return None
        return Vring(q.index, q.size, q.desc, q.avail, q.used, form.start, q.kick, q.call, form)

    def reset(self) -> None:
        """Back to the state after power-on: at once if the device was not active; else the device
        is stopping, and a job makes it so.
        """
        if self.stopping:
            return
        if not self.active:
            self._reset_done()
            return
        self.stopping = True
        self.post("reset", self._stop)

    def set_mastering(self, on: bool) -> None:
        """The bus lets the device access memory, or no longer. One job serves however many changes:
        a driver may make as many as it likes.
        """
        if on == self.mastering:
            return
        self.mastering = on
        if not self._mastering_asked:
            self._mastering_asked = True
            self.post("bus mastering", self._look_at_mastering)

    def _look_at_mastering(self) -> None:
        self._mastering_asked = False  # before looking: a change from now on posts another job
        self.mastering_changed()

    def _stop(self) -> None:
        """The job of a reset: the data path has stopped before the status reads as 0."""
        try:
            self.deactivate()
        except Exception as e:  # the driver gets its reset whatever it is
            self._note("reset", e)
        with self._lock:
            self._reset_done()

    def _reset_done(self) -> None:
        if self.active:
            self._transport.set_active(False)
        if self.status:
            self.resets += 1
        for q in self.queues:
            q.clear()
            q.kick.drain()
            q.call.drain()
        self.driver_features = 0
        with self._mutex:
            self.status = 0
        self.stopping = self.legacy = False
        self._transport.device_reset()

    def post(self, what: str, job: Callable[[], None]) -> bool:
        """Post a job; whether it will be run. If anything goes wrong in it, the driver sees
        NEEDS_RESET.

        :param what: names the job, for faults that are bugs of pyvmm.
        """

        def attempt() -> None:
            try:
                job()
            except Exception as e:  # the thread that runs the jobs must live
                self.failed(what, e)

        return self._jobs.post(attempt)

    def fault(self, queue: int, problem: str) -> None:
        """Something that only a reset cures: tell the guest (2.1.2). Any thread; takes no lock that
        is held for long.
        """
        self._add_fault(problem)
        self._needs_reset()

    def failed(self, what: str, error: Exception) -> None:
        """An exception in what the device or its data path does, after which it may not work: a
        fault with a name. Any thread.

        :param what: was done, for faults that are bugs of pyvmm.
        """
        self._note(what, error)
        self._needs_reset()

    def _needs_reset(self) -> None:
        with self._mutex:
            self.status |= NEEDS_RESET
        self.config_changed()

    def _add_fault(self, problem: str) -> None:
        with self._mutex:
            self.faults_total += 1
        if len(self.faults) < FAULTS_MAX:
            self.faults.append(problem)
            self.problem_found(problem)

    def _note(self, what: str, error: Exception) -> None:
        """Keep an error in words; a bug of ours leaves its traceback, too."""
        if isinstance(error, PyvmmError):
            self._add_fault(str(error))
            return
        self._add_fault(f"{what}: {type(error).__name__}: {error}")
        if len(self.tracebacks) < TRACEBACKS_MAX:
            self.tracebacks.append(aside(lambda: _traceback(error)))  # it reads the sources

    def config_changed(self) -> None:
        """The configuration has changed: new generation, configuration interrupt (4.1.4.3.1). Any
        thread.
        """
        with self._mutex:
            self.generation = self.generation + 1 & 0xFF
        if self.active or self.status & NEEDS_RESET:
            self._transport.interrupt_config()

    def interrupt_in_vain(self) -> None:
        """Interrupt the driver for its configuration, which has not changed. Any thread."""
        if self.active:
            self._transport.interrupt_config()

    # --- features and queues ----------------------------------------------------------------------

    def set_features(self, shift: int, value: int) -> None:
        """The driver writes 32 feature bits at ``shift``; only between DRIVER and FEATURES_OK."""
        if self.legacy or self.status != ACK | DRIVER:
            self.refuse("driver_feature", value, *self._untimely(DRIVER, FEATURES_OK))
            return
        self.driver_features = (self.driver_features & ~(0xFFFFFFFF << shift)) | value << shift

    def set_queue(self, index: int, field: str, value: int) -> None:
        """The driver writes a queue register; refused outside FEATURES_OK..DRIVER_OK
        (CVE-2026-5747) or once enabled.
        """
        wrong, clause = self._queue_problem(index, field, value)
        if wrong:
            self.refuse(QUEUE_REGISTERS[field], value, wrong, clause)
        elif field == "enabled":
            self._enable(self.queues[index])
        elif field == "resetting":
            self._reset_queue(self.queues[index])
        else:
            setattr(self.queues[index], field, value)

    def _enable(self, q: Queue) -> None:
        """Before DRIVER_OK it is noted; after a reset of the virtqueue the device goes on with
        it.
        """
        q.enabled = True
        if self.active:
            ring = self._vring(q)
            if ring is not None:
                self.post(f"start of queue {q.index}", lambda: self.start_ring(ring))

    def _reset_queue(self, q: Queue) -> None:
        """Reset one virtqueue (2.6.1, 4.1.4.3.1): queue_reset reads 1 until it is done."""
        q.resetting = True

        def job() -> None:
            if not q.resetting:
                return  # the whole device was reset meanwhile
            try:
                self.stop_ring(q.index)
            finally:
                with self._lock:
                    self._clear(q)

        self.post(f"reset of queue {q.index}", job)

    def release_queue(self, index: int) -> bool:
        """The driver takes a virtqueue back, over MMIO without a feature (QueueReady, 4.2.2.1);
        whether there is anything to take back.
        """
        if self.stopping or index >= len(self.queues):
            return False
        q = self.queues[index]
        if not q.enabled or q.resetting:
            return False
        self._release(q)
        return True

    def _release(self, q: Queue) -> None:
        """Let go of an enabled virtqueue: at once, or by a job if the device uses it."""
        if self.active:
            self._reset_queue(q)
        else:
            self._clear(q)

    def _clear(self, q: Queue) -> None:
        """Let a virtqueue, which nobody serves, be as after power-on."""
        self._transport.queue_reset(q)
        q.clear()
        q.kick.drain()
        q.call.drain()

    def _queue_problem(self, index: int, field: str, value: int) -> tuple[str, str]:
        """What is wrong with the write of a queue register, and the clause; empty if nothing is."""
        alone = bool(self.driver_features >> VIRTIO_F_RING_RESET & 1)
        running = alone and self.status == CONFIGURING | DRIVER_OK and not self.stopping
        if field == "resetting" and not alone:
            return "without VIRTIO_F_RING_RESET", "4.1.4.3.2"
        if not running and (self.status != CONFIGURING or field == "resetting"):
            return self._untimely(DRIVER_OK if field == "resetting" else FEATURES_OK, DRIVER_OK)
        if index >= len(self.queues):
            return f"of queue {index}, which does not exist", "4.1.4.3"
        q = self.queues[index]
        if field == "resetting":
            if value != 1:
                return "which is not 1", "4.1.4.3.2"
            if q.resetting or not q.enabled:
                why = "being reset" if q.resetting else "not enabled"
                return f"of queue {index}, which is {why}", "4.1.4.3.2"
            return "", ""
        if q.enabled:
            return f"of queue {index}, which is enabled", "4.1.4.3.2"
        if field == "enabled" and value != 1:
            return "but only a reset disables a queue", "4.1.4.3.2"
        if field == "size" and not ring_format(self.driver_features).allows(value):
            return "which is no power of two" if value else "which is no size", "4.1.4.3.2"
        if field == "size" and value > q.max_size:
            return f"which is more than queue {index} has", "4.1.4.3"
        return "", ""

    def _untimely(self, after: int, before: int) -> tuple[str, str]:
        """Why a register that may be written between two steps may not be written now."""
        if self.stopping:
            return "before a reset was complete, for which the driver reads until 0", "4.1.4.3.2"
        if self.legacy:
            return MIXED.format("legacy"), "4.1.4.10"
        if self.status & (NEEDS_RESET | FAILED):
            return f"in status {self.status:#x}, which only a reset leads out of", "2.1"
        if not self.status & after:
            return f"before {STEPS[after]}", "3.1.1"
        return f"after {STEPS[before]}", "3.1.1"

    # --- the legacy interface (2.2.3, 3.1.2, 4.1.4.10) --------------------------------------------

    # Legacy drivers precede the specification: some set up their queues first, and some leave out
    # status bits. So there is no order of steps. The first write decides which interface the driver
    # uses until the next reset.

    @property
    def engaged(self) -> bool:
        """A driver may have looked at the offer since the latest reset."""
        return self.legacy or bool(self.status & DRIVER)

    @property
    def settled(self) -> bool:
        """The driver has chosen its features for good."""
        return bool(self.status & (DRIVER_OK if self.legacy else FEATURES_OK))

    def legacy_features(self) -> int:
        """The offer to a legacy driver: bits 0 to 31, ANY_LAYOUT among them because we never
        care.
        """
        return self.offered() & 0xFFFF_FFFF | 1 << VIRTIO_F_ANY_LAYOUT

    def _may_use_legacy(self, register: str, value: int) -> bool:
        """Whether a write to the legacy interface counts; such a write chooses it."""
        if self.stopping:
            self.refuse(register, value, "before a reset was complete", "4.1.4.3.2")
        elif self.status and not self.legacy:
            self.refuse(register, value, MIXED.format("modern"), "4.1.4.10")
        else:
            self.legacy = True
            return True
        return False

    def set_legacy_status(self, value: int) -> None:
        """A legacy driver writes the status: 0 to reset, else bits that are kept."""
        if value == 0:
            self.reset()
        elif self._may_use_legacy("device_status", value):
            new = value & (ACK | DRIVER | DRIVER_OK | FAILED)
            if self.active and not new & DRIVER_OK:
                self.refuse("device_status", value, "which clears DRIVER_OK", "2.1.1")
                return
            begins = new & DRIVER_OK and not self.active
            with self._mutex:
                self.status = self.status & NEEDS_RESET | new
            if begins:
                self._begin()

    def set_legacy_features(self, value: int) -> None:
        """A legacy driver writes its features, bits 0 to 31."""
        if not self._may_use_legacy("driver_feature", value):
            return
        if self.active:
            self.refuse("driver_feature", value, "after DRIVER_OK", "3.1.2")
            return
        unknown = value & ~self.legacy_features()
        if unknown:
            wrong = f"with features that were not offered: {unknown:#x}"
            self.refuse("driver_feature", value, wrong, "2.2.1")
        self.driver_features = value & ~unknown

    def legacy_queue(self, index: int) -> int:
        """The page number of a virtqueue; 0 if the driver has not set it up."""
        if not self.legacy or index >= len(self.queues) or not self.queues[index].enabled:
            return 0
        return self.queues[index].desc >> VIRTIO_PCI_QUEUE_ADDR_SHIFT

    def set_legacy_queue(self, index: int, page: int) -> None:
        """A legacy driver sets up a virtqueue at a page, or lets go of it with page 0."""
        if page == 0 and not self.legacy_queue(index):
            return  # drivers do so after a reset, too
        if not self._may_use_legacy("queue_address", page):
            return
        wrong = ""
        if index >= len(self.queues):
            wrong = f"of queue {index}, which does not exist"
        elif self.queues[index].resetting:
            wrong = f"of queue {index}, which is being reset"
        elif page and self.queues[index].enabled:
            wrong = f"of queue {index}, which is enabled"
        if wrong:
            self.refuse("queue_address", page, wrong, "4.1.5.1.3")
        elif page:
            self.queues[index].place(page << VIRTIO_PCI_QUEUE_ADDR_SHIFT)
            self._enable(self.queues[index])
        else:
            self._release(self.queues[index])

    def write_legacy_config(self, field: str, offset: int, data: bytes) -> None:
        """A legacy driver writes to the device-specific configuration.

        :param field: what it writes to, in the words of messages.
        """
        value = int.from_bytes(data, "little")
        if self._may_use_legacy(field, value) and not self.legacy_config_written(offset, data):
            self.refuse(field, value, "which is read-only", "5.1.4")

    # --- the end ----------------------------------------------------------------------------------

    def shut_down(self) -> None:
        """Stop, in this thread: no vCPU runs any more, and nobody runs jobs."""
        if self.active and not self._abandoned:
            self._stop()

    def abandon(self) -> None:
        """A job does not end: leave to the process's end what the job uses."""
        self._abandoned = True

    def close(self) -> None:
        """Shut down, and release the queues' eventfds. A second call does nothing."""
        self.shut_down()
        for q in self.queues:
            q.kick.close()
            q.call.close()


def _traceback(error: Exception) -> str:
    import traceback  # here: no machine should pay for it at its start

    return "".join(traceback.format_exception(error))
