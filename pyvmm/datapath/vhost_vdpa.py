"""The vhost-vdpa data path: a vDPA device of the host serves the guest's rings itself, and neither
this process nor a thread of the kernel moves packets.

The device reads and writes guest memory at guest-physical addresses, takes kicks from the
ioeventfds and gives interrupts by the irqfds. Frames enter and leave at the device, not at a tap of
ours. What the driver commands by the control queue is kept by the card and told to the device at
each start, and a receive filter at each change (``datapath.vdpa_control``).
"""

from __future__ import annotations

import mmap
import select
import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import HandOverTimes, bug, by_pair
from pyvmm.datapath.vdpa_control import ControlQueue
from pyvmm.datapath.vhost_user import DATA_MASK, consistent
from pyvmm.errors import HostError, PyvmmError, UsageError, VdpaError
from pyvmm.fd import EventFd
from pyvmm.hostnet.rtnetlink import PacketCount
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
)
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_RSS,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.datapath.base import PathEvents, RxFilter, Vring
    from pyvmm.datapath.vdpa_device import Mapping, Vdpa
    from pyvmm.hostnet.rtnetlink import Link
    from pyvmm.memory import GuestMemory

if TYPE_CHECKING:
    from typing import Protocol

    class Mortal(Protocol):
        """The server of our own device (``backend.vduse_process.VduseProcess``)."""

        def fileno(self) -> int:
            """Readable once it has ended."""

        def obituary(self) -> str:
            """How it ended, in words; empty while it lives. Any thread."""


#: Features of the device that we accept for ourselves.
BASICS = sum(
    1 << bit
    for bit in (
        VIRTIO_F_VERSION_1,
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MTU,
    )
)
#: Features of a device's control queue that we use if it has them.
CONTROLS = sum(
    1 << bit
    for bit in (
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_RX_EXTRA,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
    )
)


class VhostVdpa:
    """Implements ``DataPath`` (datapath.base).

    :param device: owned from here on. :param queues: pairs that it must have.
    :param link: gives the link of the tap on which our own back-end serves the device, and whose
        packets are counted there. Such a device tells exact positions, and then touches nothing.
        None for all other devices.
    :param server: of such a device, which may end before its user does; lent.
    :param mac: of the card, 6 bytes. :param mtu: bytes, of the card, or None.
    :ivar withholds: see ``DataPath``.
    :raises VdpaError: the device has too few queue pairs, another MAC address that cannot be
        changed, or a smaller MTU. It is closed.
    """

    name = "vhost-vdpa"
    restarts_for_offloads = True  # the device learns of them by SET_FEATURES

    def __init__(
        self,
        device: Vdpa,
        *,
        queues: int = 1,
        mac: bytes | None = None,
        mtu: int | None = None,
        link: Callable[[], Link] | None = None,
        server: Mortal | None = None,
    ) -> None:
        self.times = HandOverTimes()
        self._device = device
        self._server = server
        self._packets: PacketCount | None = None
        if link is not None:
            link()  # now, while there is one
            self._packets = PacketCount(link)
        self._lock = threading.Lock()  # the control queue, the filter and the totals
        self._rx: RxFilter | None = None
        self._vlans: set[int] = set()  # that the device lets through
        self._control: ControlQueue | None = None
        self._control_index = -1  # while the device serves its control queue
        self._memory: GuestMemory | None = None  # mapped
        self._rings: list[Vring] = []
        self._doorbells: dict[int, mmap.mmap] = {}  # by ring, once they were needed
        self._events: PathEvents | None = None
        self._watcher: threading.Thread | None = None
        self._totals = {
            "filters": 0,
            "filter_errors": 0,
            "link_losses": 0,
            "tx_possible_repeats": 0,
        }
        self._stop, self._changed = EventFd(), EventFd()
        try:
            self.mac, self.mtu, self.pairs = facts(device)
            self._check(queues, mac, mtu)
        except BaseException:
            self.close()
            raise
        self.withholds = self._withheld()

    def _has(self, bit: int) -> bool:
        return bool(self._device.features >> bit & 1)

    def _check(self, queues: int, mac: bytes | None, mtu: int | None) -> None:
        name = self._device.name
        if not self._has(VIRTIO_F_VERSION_1):
            raise VdpaError(f"{name} is a legacy device (no VERSION_1)", "name another device=")
        if queues > self.pairs:
            raise VdpaError(f"{name} has {self.pairs} queue pairs, not {queues}", "lower queues=")
        if mac is not None and self.mac not in (None, mac) and not self._sets_mac():
            raise VdpaError(
                f"{name} has the MAC address {self.mac.hex(':') if self.mac else ''} and takes no"
                f" other, such as the card's {mac.hex(':')}",
                f"start the card with mac={self.mac.hex(':') if self.mac else ''}",
            )
        if mtu is not None and self.mtu is not None and mtu > self.mtu:
            raise VdpaError(f"{name} has an MTU of {self.mtu}, not {mtu}", "lower mtu=")

    def _sets_mac(self) -> bool:
        return self._has(VIRTIO_NET_F_CTRL_VQ) and self._has(VIRTIO_NET_F_CTRL_MAC_ADDR)

    def _withheld(self) -> int:
        """A device with a MAC address of its own filters by it, so the driver must not be told that
        it can choose what it does not get.
        """
        if self.mac is None:
            return 0
        out = 0 if self._sets_mac() else 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        if not (self._has(VIRTIO_NET_F_CTRL_VQ) and self._has(VIRTIO_NET_F_CTRL_RX)):
            out |= 1 << VIRTIO_NET_F_CTRL_RX | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        return out

    def features(self) -> int:
        """What the device can honour on the rings and in packets."""
        mask = DATA_MASK & ~(1 << VIRTIO_NET_F_RSS)  # no device hears of the driver's tables
        if not self._tells:  # then only a used index tells where a ring stopped
            mask &= ~(1 << VIRTIO_F_RING_PACKED)
        return consistent(self._device.features & mask)

    @property
    def _death(self) -> str:
        """How our own device lost its server, in words; empty if it has one."""
        how = self._server.obituary() if self._server is not None else ""
        return f"our own vDPA device has lost its server: {how}" if how else ""

    @property
    def _tells(self) -> bool:
        """Whether the device tells exact positions of its rings."""
        return self._device.suspends or self._packets is not None

    def takers(self) -> dict[int, Any]:
        """Kicks come by the eventfds, or the device has a page for them."""
        return {}

    def doorbells(self) -> dict[int, int]:
        """The device's own, if it has them."""
        out = {}
        for ring in self._rings:
            page = self._doorbells.get(ring.index) or self._device.doorbell(ring.index)
            if page is None:
                return {}
            self._doorbells[ring.index] = page
            with ffi.from_buffer(page) as buffer:
                out[ring.index] = int(ffi.cast("uintptr_t", buffer))
            # A kick to no purpose makes the page present. KVM could not fault it in for a guest
            # that reads, as we may only write there.
            ffi.cast("volatile uint16_t *", out[ring.index])[0] = ring.index
        return out

    def bound(self) -> str:
        """See ``DataPath``: without SUSPEND nobody knows which packets were sent."""
        if self._tells or not self._rings:
            return ""
        return (
            f"{self._device.name} cannot be suspended (no VHOST_BACKEND_F_SUSPEND), so nobody would"
            " know which packets it has sent"
        )

    # --- start ------------------------------------------------------------------------------------

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Map the guest's memory, which takes long if it has to be locked.

        :raises VdpaError: the device cannot use that memory, or has smaller rings.
        """
        if self._death:
            raise VdpaError(self._death, "switch the card to another data path")
        if not acked >> VIRTIO_F_VERSION_1 & 1:
            raise VdpaError(
                f"{self._device.name} takes no legacy driver, which accepts no VERSION_1",
                "use another data path",
            )
        for ring in rings:
            if ring.size > self._device.size_max:
                raise VdpaError(
                    f"{self._device.name} has rings of at most {self._device.size_max} entries, not"
                    f" {ring.size}",
                    f"queue-size={self._device.size_max}",
                )
        self._map(memory)

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
        """Have the device serve the rings.

        :raises PyvmmError: it refuses.
        """
        assert not self._rings
        self._events = events
        self.times.began = {}
        if not rings:
            return
        self.prepare(acked, memory, rings)
        if self._packets is not None:
            self._packets.start()
        try:
            with self._lock:
                self._start(acked, memory, rings)
            watcher = Thread(
                target=self._watch,
                name=f"{self._device.name}-vdpa",
                daemon=True,
                failed=self._failed,
            )
            watcher.start()
        except BaseException:
            self._rings = list(rings)
            try:
                self._let_go(keep=False)
            finally:
                self._rings = []
            raise
        self._rings, self._watcher = list(rings), watcher
        for ring in rings:  # for chains that were made available before
            ring.kick.nudge()

    def _start(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        device = self._device
        pairs = 1 + max(by_pair(rings))
        features = self._chosen(acked, pairs)
        device.negotiate(features)
        for ring in rings:
            device.set_ring(ring.index, ring)
        if features >> VIRTIO_NET_F_CTRL_VQ & 1:
            if self._control is None:
                self._control = ControlQueue(device, _mappings(memory))
            many = features >> VIRTIO_NET_F_MQ & 1
            self._control_index = 2 * self.pairs if many else 2
            self._control.attach(self._control_index, features)
            device.enable(self._control_index)
        device.call_for_config(self._changed)
        # A device that can, gets its filters before its first packet.
        late = device.has(lib.VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK)
        if not late:
            self._enable(rings)
        device.go()
        if self._control_index >= 0 and self._control is not None:
            if pairs > 1:
                self._control.set_pairs(pairs)
            self._vlans = set()
            self._filter()
        if late:
            self._enable(rings)

    def _chosen(self, acked: int, pairs: int) -> int:
        """The features to agree on with the device."""
        offered = self._device.features
        features = self.features() & acked | offered & BASICS
        if offered >> VIRTIO_NET_F_CTRL_VQ & 1:
            features |= offered & CONTROLS
            if pairs > 1:
                features |= offered & 1 << VIRTIO_NET_F_MQ
            if self._rx is not None and self._rx.filters_vlans:
                features |= offered & 1 << VIRTIO_NET_F_CTRL_VLAN
        return features

    def _enable(self, rings: Sequence[Vring]) -> None:
        for ring in rings:
            self._device.enable(ring.index)
            self.times.began[ring.index] = time.monotonic_ns()

    def _map(self, memory: GuestMemory) -> None:
        if self._memory is None:
            self._device.map(_mappings(memory))
            self._memory = memory

    def _unmap(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self._device.unmap(_mappings(memory))

    # --- stop -------------------------------------------------------------------------------------

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Take the rings back: suspend the device, ask for the positions, reset it. A device that
        cannot be suspended is reset only; then the used indices are the positions, and packets may
        be sent twice.

        :raises PyvmmError: the device does not stop in order; it has been reset all the same.
        """
        if self._watcher is not None:
            self._stop.signal()
            self._watcher.join()
            self._watcher = None
            self._stop.drain()
        rings, memory = self._rings, self._memory
        if not rings or memory is None:
            return []
        bases: list[int] = []
        dead = self._death
        try:
            now = time.monotonic_ns()
            self.times.asked = {ring.index: now for ring in rings}
            if self._device.suspends:
                self._device.suspend()
            if self._tells and not dead:
                bases = [self._device.base(ring.index) for ring in rings]
        finally:
            try:
                self._let_go(keep=finish)
            except HostError:
                if not dead:
                    raise
            finally:  # a device that has died refuses the reset, too
                self._rings = []
                if self._packets is not None:
                    self._packets.stop()
        return [
            self._position(ring, bases[i] if bases else None, memory, finish)
            for i, ring in enumerate(rings)
        ]

    def _position(self, ring: Vring, base: int | None, memory: GuestMemory, finish: bool) -> int:
        """Where ``ring`` goes on. Empty receive buffers may be given out again; of transmit chains
        the caller hears if another path is to go on.
        """
        form = ring.format
        if base is None:
            used = form.returned(memory, ring)
            if used is None:  # a packed ring, and our own device is dead
                raise VdpaError(
                    f"nobody knows where queue {ring.index} stopped", "reset the device"
                )
            self._totals["tx_possible_repeats"] += ring.index % 2
            return used
        if form.held(memory, ring, base) and not (finish and ring.index % 2):
            self._totals["tx_possible_repeats"] += ring.index % 2
            return form.give_back(memory, ring, base)
        return base

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """:raises UsageError: a device stops as a whole."""
        raise UsageError(f"{self._device.name} cannot stop to transmit alone")

    def _let_go(self, *, keep: bool) -> None:
        """Reset the device, and take back what it was lent.

        :param keep: leave the guest's memory mapped, which takes long to undo, until ``close``:
            another data path waits for the rings.
        """
        device = self._device
        with self._lock:
            try:
                device.set_status(0)
            finally:
                index, self._control_index = self._control_index, -1
                device.call_for_config(None)
                for ring in self._rings:
                    device.clear_ring(ring.index)
                if index >= 0 and self._control is not None:
                    self._control.detach(index)
                if not keep or not device.has(lib.VHOST_BACKEND_F_IOTLB_PERSIST):
                    self._unmap()

    # --- what the driver commands -----------------------------------------------------------------

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Tell the device, now and at each start, if it has a control queue."""
        with self._lock:
            self._rx = rx
            if self._control_index >= 0:
                self._filter()

    def _filter(self) -> None:
        """Best effort, as with a tap: a device that does not filter lets more pass."""
        if self._control is None or self._rx is None:
            return
        self._totals["filters"] += 1
        try:
            self._control.set_filter(self._rx, self._vlans)
        except PyvmmError:
            self._totals["filter_errors"] += 1
        self._vlans = self._rx.vlans

    # --- what the device tells --------------------------------------------------------------------

    def _watch(self) -> None:
        """Sleep until the device's configuration changes: its link, or that it asks for a reset."""
        poll = select.poll()
        for event in (self._stop, self._changed):
            poll.register(event.fileno(), select.POLLIN)
        server = self._server.fileno() if self._server is not None else -1
        if server >= 0:
            poll.register(server, select.POLLIN)
        up = True
        while True:
            up = self._look(up)
            found = [fd for fd, _ in poll.poll()]
            if self._stop.fileno() in found:
                return
            if server in found:
                poll.unregister(server)
                if self._events is not None:
                    self._events.fault(-1, self._death)
            self._changed.drain()

    def _look(self, was_up: bool) -> bool:
        events = self._events
        assert events is not None
        if self._device.status() & VIRTIO_CONFIG_S_NEEDS_RESET:
            events.fault(-1, f"{self._device.name} needs a reset")
        if not self._has(VIRTIO_NET_F_STATUS):
            return True
        status = int.from_bytes(self._device.config()[6:8], "little")
        up = bool(status & VIRTIO_NET_S_LINK_UP)
        if up != was_up:
            self._totals["link_losses"] += not up
            events.link(up)
        return up

    def _failed(self, error: Exception) -> None:
        if self._events is not None:
            self._events.fault(-1, bug(self.name, error))

    # --- the rest ---------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Receive filters that the device was told, and what may have gone wrong; also the packets,
        if the tap is ours. Others count only in the device (``vdpa dev vstats show``).
        """
        packets = self._packets.read() if self._packets is not None else {}
        return {**packets, **self._totals}

    def ring_counters(self) -> dict[int, dict[str, int]]:
        """None: the device counts."""
        return {}

    def positions(self) -> dict[int, int]:
        """The device does not tell while it runs."""
        return {}

    def workers(self) -> list[dict[str, object]]:
        """None: the device moves the packets."""
        return []

    def report(self) -> dict[str, object]:
        """The device."""
        from pyvmm.virtio.features import names

        device = self._device
        return {
            "device": device.name,
            "path": device.path,
            "features": names(device.features),
            "suspend": device.suspends,
            "queue_pairs": self.pairs,
            "queue_size_max": device.size_max,
            "iova": list(device.iova),
            "address_spaces": device.spaces,
            "notification_pages": len(self._doorbells),
        }

    def cut(self) -> None:
        """Nothing to cut: the kernel answers, and bounds what a device may take."""

    def close(self) -> None:
        """Stop, and release the device. A second call does nothing."""
        if self._stop.closed:
            return
        try:
            self.stop()
        finally:
            for page in self._doorbells.values():
                page.close()
            self._device.close()  # which takes the memory from it
            if self._control is not None:
                self._control.close()
            self._stop.close()
            self._changed.close()


def facts(device: Vdpa) -> tuple[bytes | None, int | None, int]:
    """The device's MAC address and MTU, None if it has none; and how many queue pairs it has."""
    config, features = device.config(), device.features
    mac = config[:6] if features >> VIRTIO_NET_F_MAC & 1 and any(config[:6]) else None
    mtu = int.from_bytes(config[10:12], "little") if features >> VIRTIO_NET_F_MTU & 1 else None
    if not features >> VIRTIO_NET_F_CTRL_VQ & 1:
        return mac, mtu, device.rings // 2  # as with VDUSE: each ring that is enabled is served
    pairs = int.from_bytes(config[8:10], "little") if features >> VIRTIO_NET_F_MQ & 1 else 1
    return mac, mtu, min(pairs, (device.rings - 1) // 2)


def _mappings(memory: GuestMemory) -> list[Mapping]:
    return [(r.gpa, r.size, r.host) for r in memory.regions]
