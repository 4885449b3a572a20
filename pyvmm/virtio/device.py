"""A virtio device's life, whatever its transport: status, features, queues (virtio 1.2, 2.1 to 2.7
and 3.1).

The guest is hostile: bits and registers change only where the specification lets the driver change
them; anything else is ignored and counted in ``refused``.
"""

from __future__ import annotations

import threading

from pyvmm.datapath.base import Vring
from pyvmm.errors import PyvmmError
from pyvmm.fd import EventFd, eventfds
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
    VRING_AVAIL_ALIGN_SIZE,
    VRING_DESC_ALIGN_SIZE,
    VRING_USED_ALIGN_SIZE,
)
from pyvmm.spec.virtio_pci import VIRTIO_MSI_NO_VECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.memory import GuestMemory

ACK, DRIVER = VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET, FAILED = VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_FAILED

#: status now -> the bits that the driver may add next, in this order only (3.1.1); 0 resets from
#: anywhere.
TRANSITIONS = {
    0: ACK,
    ACK: DRIVER,
    ACK | DRIVER: FEATURES_OK,
    ACK | DRIVER | FEATURES_OK: DRIVER_OK,
}
#: The status in which queue registers may be written.
CONFIGURING = ACK | DRIVER | FEATURES_OK


class Queue:
    """One virtqueue's registers, and its eventfds (owned by the device), which a data path borrows.

    :ivar max_size: entries, a power of two; ``size`` starts there.
    """

    __slots__ = (
        "avail",
        "call",
        "desc",
        "enabled",
        "index",
        "kick",
        "max_size",
        "size",
        "used",
        "vector",
    )

    def __init__(
        self, index: int, max_size: int, no_vector: int, kick: EventFd, call: EventFd
    ) -> None:
        self.index = index
        self.max_size = max_size
        self.kick, self.call = kick, call
        self.clear(no_vector)

    def clear(self, no_vector: int) -> None:
        """The registers after reset."""
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.enabled = False
        self.vector = no_vector

    def problem(self, memory: GuestMemory) -> str:
        """What is wrong with the driver's set-up; empty if nothing (2.7: sizes and alignments)."""
        if not self.size or self.size & (self.size - 1) or self.size > self.max_size:
            return f"queue {self.index}: size {self.size}"
        areas = (
            ("descriptor table", self.desc, 16 * self.size, VRING_DESC_ALIGN_SIZE),
            ("available ring", self.avail, 6 + 2 * self.size, VRING_AVAIL_ALIGN_SIZE),
            ("used ring", self.used, 6 + 8 * self.size, VRING_USED_ALIGN_SIZE),
        )
        for name, gpa, length, align in areas:
            if gpa % align:
                return f"queue {self.index}: {name} at {gpa:#x} is not aligned to {align}"
            if not any(r.gpa <= gpa and gpa + length <= r.gpa + r.size for r in memory.regions):
                return f"queue {self.index}: {name} at {gpa:#x} is outside RAM"
        return ""


class VirtioDevice:
    """Base of all virtio devices: the status machine, feature negotiation, queues.

    A subclass gives ``device_id`` and overrides ``offered``, ``config_space``, ``activate`` and
    ``deactivate``. A transport sets ``interrupt_config`` and ``on_active``. All methods but
    ``fault`` and ``config_changed`` are called under the machine's I/O lock.

    :ivar refused: writes of the driver that were ignored. :ivar faults: the first problems that
        only a reset cures.
    """

    device_id = 0
    #: For the ledger: offset in the device-specific configuration -> field.
    config_names: dict[int, str | tuple[str, str]] = {}
    no_vector = VIRTIO_MSI_NO_VECTOR

    def __init__(self, name: str, memory: GuestMemory, queue_sizes: list[int]) -> None:
        self.name = name
        self.memory = memory
        self.status = 0
        self.driver_features = 0
        self.generation = 0
        self._mutex = threading.Lock()  # status and generation against a data path's threads
        events = eventfds(2 * len(queue_sizes))
        self.queues = [
            Queue(i, size, self.no_vector, events[2 * i], events[2 * i + 1])
            for i, size in enumerate(queue_sizes)
        ]
        #: For traces: a ``kvm.recorder.Scope``, or None.
        self.recorder: Any = None
        self.refused = 0
        self.resets = 0
        self.faults: list[str] = []
        self.interrupt_config: Callable[[], None] = lambda: None
        self.on_active: Callable[[bool], None] = lambda active: None
        #: Told of each fault kept in ``faults``. Any thread; must not wait.
        self.on_problem: Callable[[str], None] = lambda problem: None

    # --- for subclasses ---------------------------------------------------------------------------

    def offered(self) -> int:
        """The feature bits on offer."""
        return 1 << VIRTIO_F_VERSION_1

    def activate(self, rings: list[Vring]) -> None:
        """DRIVER_OK: start moving data. PyvmmError here means NEEDS_RESET for the guest."""

    def deactivate(self) -> None:
        """Stop; no access to guest memory after it returns."""

    def config_space(self) -> bytes:
        """The device-specific configuration as it reads now."""
        return b""

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

    # --- status -----------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Between DRIVER_OK and reset."""
        return bool(self.status & DRIVER_OK)

    def set_status(self, value: int) -> None:
        """The driver writes the status register: one step forward, FAILED, or 0 to reset."""
        if value == 0:
            self.reset()
            return
        now = self.status & ~NEEDS_RESET
        new = value & ~now & ~NEEDS_RESET
        if now & ~value or new not in (0, FAILED, TRANSITIONS.get(now, 0)):
            self.refused += 1
            return
        if new == FEATURES_OK and not self._features_acceptable():
            return  # the driver reads the bit back and gives up (3.1.1 step 6)
        with self._mutex:
            self.status |= new
        if new == DRIVER_OK:
            self._start()

    def _features_acceptable(self) -> bool:
        acked = self.driver_features
        return not acked & ~self.offered() and bool(acked >> VIRTIO_F_VERSION_1 & 1)

    def _start(self) -> None:
        enabled = [q for q in self.queues if q.enabled]
        self.on_active(True)
        for q in enabled:
            problem = q.problem(self.memory)
            if problem:
                self.fault(q.index, problem)
                return
        rings = [
            Vring(q.index, q.size, q.desc, q.avail, q.used, 0, q.kick, q.call) for q in enabled
        ]
        try:
            self.activate(rings)
        except PyvmmError as e:
            self.fault(-1, str(e))

    def reset(self) -> None:
        """Back to the state after power-on; the backend is stopped before the status reads as 0."""
        was_active = self.active
        if was_active:
            self.deactivate()
            self.on_active(False)
        if self.status:
            self.resets += 1
        for q in self.queues:
            q.clear(self.no_vector)
            q.kick.drain()
            q.call.drain()
        self.driver_features = 0
        self.status = 0

    def fault(self, queue: int, problem: str) -> None:
        """Something that only a reset cures: tell the guest (2.1.2). Any thread; takes no lock."""
        if len(self.faults) < 16:  # bounded: the guest can repeat this as often as it likes
            self.faults.append(problem)
            self.on_problem(problem)
        with self._mutex:
            self.status |= NEEDS_RESET
        self.config_changed()

    def config_changed(self) -> None:
        """The configuration has changed: new generation, configuration interrupt (4.1.4.3.1). Any
        thread.
        """
        with self._mutex:
            self.generation = self.generation + 1 & 0xFF
        if self.active or self.status & NEEDS_RESET:
            self.interrupt_config()

    # --- features and queues ----------------------------------------------------------------------

    def set_features(self, shift: int, value: int) -> None:
        """The driver writes 32 feature bits at ``shift``; only between DRIVER and FEATURES_OK."""
        if self.status != ACK | DRIVER:
            self.refused += 1
            return
        self.driver_features = (self.driver_features & ~(0xFFFFFFFF << shift)) | value << shift

    def set_queue(self, index: int, field: str, value: int) -> None:
        """The driver writes a queue register; refused outside FEATURES_OK..DRIVER_OK
        (CVE-2026-5747) or once enabled.
        """
        if self.status != CONFIGURING or index >= len(self.queues) or self.queues[index].enabled:
            self.refused += 1
            return
        q = self.queues[index]
        if field == "enabled":
            if value == 1:
                q.enabled = True
            else:
                self.refused += 1  # only a reset disables a queue
            return
        if field == "size" and (not 0 < value <= q.max_size or value & (value - 1)):
            self.refused += 1
            return
        setattr(q, field, value)

    def close(self) -> None:
        """Stop and release the queues' eventfds."""
        if self.active:
            self.deactivate()
            self.on_active(False)
        self.status = 0
        for q in self.queues:
            q.kick.close()
            q.call.close()
