"""The data path in the kernel: vhost-net moves packets between a tap and the rings, and this
process sleeps.

One vhost device a queue pair. A thread of ours waits for what should not happen: a ring that the
worker calls malformed, a tap that is deleted. It does not wake up for packets.
"""

from __future__ import annotations

import select
import threading
import time

from pyvmm.datapath.base import HandOverTimes, OnUplink, bug, by_pair, cpu_ns
from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.hostnet.rtnetlink import PacketCount, Reopener
from pyvmm.spec.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from pyvmm.spec.virtio_net import VIRTIO_NET_F_HASH_REPORT, VIRTIO_NET_F_MRG_RXBUF
from pyvmm.threads import Thread, aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import PathEvents, Vring
    from pyvmm.datapath.vhost_device import Vhost
    from pyvmm.hostnet.tap import Tap
    from pyvmm.memory import GuestMemory

#: What the kernel does on the rings, where it offers it. Offloads belong to the tap, the rest to
#: the device.
RING_FEATURES = (
    1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF
)

FIRST_64 = (1 << 64) - 1


class VhostNet(OnUplink):
    """Implements ``DataPath`` (datapath.base). ``start``, ``stop`` and ``close`` are called by one
    thread at a time.

    :param port: the tap, lent, one descriptor per queue pair.
    :param devices: one per queue pair,
        closed by ``close``.
    :param worker_cpu: pin worker k to CPU worker_cpu + k.
    :param poll_us: the kernel's worker looks for work this long, in microseconds, before it sleeps.
    """

    name = "vhost-net"
    restarts_for_offloads = False

    def __init__(
        self,
        port: Tap,
        devices: list[Vhost],
        *,
        worker_cpu: int | None = None,
        poll_us: int = 0,
    ) -> None:
        self.times = HandOverTimes()
        self._events: PathEvents | None = None
        self._port = port
        self._devices = devices
        self._poll_us = poll_us
        self._rings: list[Vring] = []
        self._memory: GuestMemory | None = None
        self._held: set[int] = set()
        self._begun: dict[int, int] = {}  # where the rings were when they got their tap
        self._lost = False  # no ring has a tap
        self._errors = [EventFd() for _ in range(2 * len(devices))]
        self._stop, self._relinked = EventFd(), EventFd()
        self._watcher: threading.Thread | None = None
        self._reopener = Reopener(port.name, port.reopen, self._link_back, self._failed)
        # The totals, and the rings' backends: a tap may vanish and return at any time.
        self._lock = threading.Lock()
        self._totals = {"link_losses": 0, "ring_faults": 0}
        port.link()  # now, while there is one
        self._packets = PacketCount(port.link)
        if worker_cpu is not None:
            for number, device in enumerate(devices):
                device.pin(worker_cpu + number)

    def features(self) -> int:
        """What kernel and tap can honour. The kernel hashes no frames for their headers, and we do
        not tell it of features beyond the first 64 (VHOST_SET_FEATURES_ARRAY, Linux 6.17).
        """
        port = self._port.features() & FIRST_64 & ~(1 << VIRTIO_NET_F_HASH_REPORT)
        return port | self._devices[0].features & RING_FEATURES

    # --- start and stop ---------------------------------------------------------------------------

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Nothing that takes long."""

    def problem(self) -> str:
        """None that ``start`` would not have raised."""
        return ""

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Hand the rings to the kernel.

        :raises HostError: it refuses.
        """
        assert not self._rings
        pairs = by_pair(rings)
        if max(pairs, default=0) >= len(self._devices):
            raise HostError(f"queue pair {max(pairs)} has no vhost device")
        self._events, self._memory = events, memory
        self._lost = False
        self._reopener.rearm()
        self.times.began = {}
        self._packets.start()
        try:
            for number, own in pairs.items():
                device = self._devices[number]
                device.set_features(acked)
                device.set_memory(memory)
                for ring in own:
                    self._errors[ring.index].drain()
                    self._rings.append(ring)
                    self._begun[ring.index] = ring.base
                    device.set_ring(ring.index % 2, ring, memory, self._errors[ring.index])
                    if self._poll_us:
                        device.set_poll(ring.index % 2, self._poll_us)
            with self._lock:
                self._set_backends()
            self._stop.drain()
            self._relinked.drain()
            self._watcher = Thread(
                target=self._watch,
                name=f"{self._port.name}-vhost",
                daemon=True,
                failed=self._failed,
            )
            self._watcher.start()
        except BaseException as e:
            if self._watcher is not None and self._watcher.ident is None:
                self._watcher = None
            try:
                self.stop()
            except HostError:
                pass  # rings that were never whole; what led here counts
            if isinstance(e, RuntimeError):
                raise HostError(
                    f"cannot start a network thread: {e}", "raise the limit of processes"
                ) from e
            raise

    def _set_backends(self) -> None:
        """Start all rings on the tap: from here on the worker serves what is pending, kicked or
        not.
        """
        for ring in self._rings:
            if ring.index in self._held:
                continue
            number, way = divmod(ring.index, 2)
            self._devices[number].set_backend(way, self._port.fds[number].fileno())
            self.times.began[ring.index] = time.monotonic_ns()

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Take the rings back: no backend first, which flushes the worker, then their positions, in
        the order of ``start``.

        :raises HostError: the kernel refuses; the rings have been let go of as far as possible.
        """
        self._reopener.stop()
        if self._watcher is not None:
            self._stop.signal()
            self._watcher.join()
            self._watcher = None
        rings, self._rings = self._rings, []
        bases: list[int] = []
        error: HostError | None = None
        for step in (self._halt, self._let_go):
            for ring in rings:
                try:
                    step(ring, bases)
                except HostError as e:
                    error = error or e
        self._held.clear()
        self._packets.stop()
        if error is not None:
            raise error
        return bases

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Take the tap from the transmit rings.

        :raises HostError: the kernel refuses.
        """
        with self._lock:
            for ring in self._rings:
                if ring.index % 2:
                    self._halt(ring, [])
                    self._held.add(ring.index)

    def _halt(self, ring: Vring, bases: list[int]) -> None:
        if ring.index in self._held:
            return
        self.times.asked[ring.index] = time.monotonic_ns()
        self._devices[ring.index // 2].set_backend(ring.index % 2, -1)

    def _let_go(self, ring: Vring, bases: list[int]) -> None:
        bases.append(self._position(ring))
        self._devices[ring.index // 2].clear_ring(ring.index % 2)

    def _position(self, ring: Vring) -> int:
        """Where a stopped ring goes on. The worker forgets frames that a deleted tap refuses: it
        has taken their chains and never returns them (vhost_tx_batch). Otherwise a stopped
        transmit ring has returned all that it has taken.

        Frames too long for a batch (vhost_net_build_xdp) it returns although the tap has refused
        them. Chains that it has forgotten before these are returned here.
        """
        number, way = divmod(ring.index, 2)
        base = self._devices[number].base(way)
        memory = self._memory
        if way == 0 or memory is None:
            return base
        used = ring.format.give_back(memory, ring, base)
        if not 0 < ring.format.held(memory, ring, base) <= ring.size:
            return base
        forgotten = forgotten_chains(memory, ring, self._begun[ring.index], base)
        if forgotten is None:
            return base
        if sorted(forgotten) == sorted(_heads(memory, ring, used, base)):
            return used  # they are sent
        for place, head in enumerate(forgotten, used):
            at = ring.used + 4 + 8 * (place % ring.size)
            memory.write(at, head.to_bytes(8, "little"))  # and a length of 0
        memory.write(ring.used + 2, base.to_bytes(2, "little"))
        ring.call.nudge()
        return base

    # --- what goes wrong --------------------------------------------------------------------------

    def _watch(self) -> None:
        """Sleep until the worker reports an error, or the tap is deleted."""
        link = self._port.link()
        poll = select.poll()
        errors = {self._errors[ring.index].fileno(): ring.index for ring in self._rings}
        for fd in (self._stop.fileno(), self._relinked.fileno(), *errors):
            poll.register(fd, select.POLLIN)
        # A link that is lost is looked at no more, because ``reopen`` closes it.
        if link.stats():
            poll.register(link, select.POLLIN)
        else:  # deleted while another data path had it
            self._link_lost()
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop.fileno():
                    return
                if fd in errors:
                    if self._tap_refused(errors[fd]):
                        continue
                    poll.unregister(fd)  # once: only a reset cures it
                    self._ring_fault(errors[fd])
                elif fd == self._relinked.fileno():
                    self._relinked.drain()
                    link = self._port.link()
                    poll.register(link, select.POLLIN)
                elif link.gone():
                    poll.unregister(fd)
                    self._link_lost()

    def _tap_refused(self, queue: int) -> bool:
        """Whether the error is none of the ring's: the worker reports frames, too, that a deleted
        tap has refused.
        """
        with self._lock:
            if not self._errors[queue].drain():
                return True  # ``_link_back`` has come first
            # Once it is lost, ``reopen`` may have the next tap's link here, before the rings do.
            return self._lost or not self._port.link().stats()

    def _ring_fault(self, queue: int) -> None:
        with self._lock:
            self._totals["ring_faults"] += 1
        if self._events is not None:
            self._events.fault(queue, f"queue {queue}: vhost-net calls the ring malformed")

    def _failed(self, error: Exception) -> None:
        """A thread of ours has ended with an exception."""
        if self._events is not None:
            self._events.fault(-1, bug(self.name, error))

    def _link_lost(self) -> None:
        """The tap's descriptors are dead: take them from the worker, which would go on to drop or
        forget frames. What the guest sends stays in the ring until the tap has come back.
        """
        with self._lock:
            self._totals["link_losses"] += 1
            self._lost = True
            try:
                self._halt_all()
            except HostError:
                pass  # ``_link_back`` tries again
        if self._events is not None:
            self._events.link(False)
        self._reopener.start()

    def _link_back(self) -> None:
        """The tap has been opened again: start the rings on it."""
        self._packets.start()
        with self._lock:
            try:
                self._let_go_of_tap()
                self._set_backends()
                self._lost = False
            except HostError as e:
                if self._events is not None:
                    self._events.fault(-1, str(e))
                return
        if self._events is not None:
            self._events.link(True)
        self._relinked.signal()  # last, so that the next loss is told after the return

    def _halt_all(self) -> None:
        for ring in self._rings:
            self._halt(ring, [])

    def _let_go_of_tap(self) -> None:
        """Halt the rings where they can go on; what the old tap has refused is no error."""
        self._halt_all()
        for ring in self._rings:
            if ring.index not in self._held:
                position = self._begun[ring.index] = self._position(ring)
                self._devices[ring.index // 2].set_base(ring.index % 2, position)
                self._errors[ring.index].drain()

    # --- the rest ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The tap's packets, bytes and drops while it ran (vhost counts nothing), and
        ``worker_cpu_ns``.
        """
        with self._lock:
            out = {**self._packets.read(), **self._totals}
        tids = [d.worker for d in self._devices if d.worker]
        out["worker_cpu_ns"] = aside(lambda: sum(map(cpu_ns, tids))) if tids else 0
        return out

    def workers(self) -> list[dict[str, object]]:
        """The kernel's threads, as far as they can be seen from here."""
        out: list[dict[str, object]] = []
        for device in self._devices:
            if device.worker is not None:
                cpu_s = cpu_ns(device.worker) / 1e9
                out.append({"name": device.worker_name, "tid": device.worker, "cpu_s": cpu_s})
        return out

    def report(self) -> dict[str, object]:
        """Nothing: there is no other process."""
        return {}

    def cut(self) -> None:
        """Nothing to cut: no other process is asked."""

    @property
    def _closed(self) -> bool:
        return self._stop.closed

    def close(self) -> None:
        """Stop, and release the devices. A second call does nothing."""
        if self._closed:
            return
        try:
            self.stop()
        finally:
            for fd in (*self._devices, *self._errors, self._stop, self._relinked):
                fd.close()


def _heads(memory: GuestMemory, ring: Vring, begin: int, end: int) -> list[int]:
    """The chains that the driver has made available at positions from ``begin`` to ``end``."""
    count = end - begin & 0xFFFF
    table = memory.read(ring.avail + 4, 2 * ring.size)
    places = ((begin + i) % ring.size for i in range(count))
    return [int.from_bytes(table[2 * at : 2 * at + 2], "little") for at in places]


def forgotten_chains(memory: GuestMemory, ring: Vring, begun: int, base: int) -> list[int] | None:
    """The chains of a stopped split ring that were taken and not returned, in order of taking; None
    if the ring does not tell any more.

    Those that were returned were returned in order. So look backwards for the latest place of each
    in the available ring; what is between these was forgotten.

    :param begun: the position at which nothing had been taken. :param base: where the ring stopped.
    """
    used = ring.format.give_back(memory, ring, base)
    missing = base - used & 0xFFFF
    returned = min(used - begun & 0xFFFF, ring.size)
    # The driver has overwritten older entries of the available ring.
    known = min(returned + missing, ring.size - ring.format.pending(memory, ring, base))
    if known < missing:
        return None
    table = memory.read(ring.used + 4, 8 * ring.size)
    found: list[int] = []
    for head in reversed(_heads(memory, ring, base - known & 0xFFFF, base)):
        at = 8 * ((used - 1) % ring.size)
        if returned and head == int.from_bytes(table[at : at + 4], "little"):
            returned, used = returned - 1, used - 1
            continue
        found.append(head)
        if len(found) == missing:
            break
    found.reverse()
    good = len(found) == missing == len(set(found)) and max(found) < ring.size
    return found if good else None
