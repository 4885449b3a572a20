"""The virtio network device (virtio 1.2, 5.1): configuration space, features, queue pairs, link.

It does not know which data path moves its packets.
"""

from __future__ import annotations

import struct
import threading

from pyvmm.datapath.base import RxFilter, by_pair, header_size
from pyvmm.errors import PyvmmError, RingFault, UsageError
from pyvmm.spec.virtio import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_NOTIFICATION_DATA,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_NET,
)
from pyvmm.spec.virtio_net import (
    CONFIG_NAMES,
    RSS_HASH_TYPES,
    RSS_KEY_MAX,
    RSS_TABLE_MAX,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_HDRLEN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM_MAPPED,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_MAPPED,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_RSS,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.virtio.control import Control
from pyvmm.virtio.served import ServedDevice
from pyvmm.virtio.statistics import TYPES, Statistics, supported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from pyvmm.datapath.base import DataPath, Hashing, HostSide, Steering, Vring
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.device import Jobs
else:
    Protocol = object  # `typing` costs as much as all else that a run imports

PCI_CLASS_NETWORK_ETHERNET = 0x020000
#: Entries a queue, as QEMU's default, and of the control queue.
QUEUE_SIZE = 256
CONTROL_SIZE = 64
#: Mbit/s, as a tap says of itself.
SPEED = 10_000
FULL_DUPLEX = 1
#: An interrupt may wait for so many microseconds; a driver that asks for more gets this.
COALESCE_US_MAX = 1_000_000

#: Features that need nothing of the data path, and those among them that live on the control queue.
OWN = (
    VIRTIO_F_VERSION_1,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_NOTIFICATION_DATA,  # a kick's value may be anything: the address says which virtqueue
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_GUEST_HDRLEN,  # the tap keeps so many bytes in one piece; nothing relies on it
    VIRTIO_NET_F_CTRL_VQ,
)
CONTROLLED = (
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
)
#: Every data path honours it, so none is told. vhost-net would take the bit for another one of its
#: own, VHOST_NET_F_VIRTIO_NET_HDR (linux/vhost_types.h).
LEGACY_ONLY = 1 << VIRTIO_F_ANY_LAYOUT
#: Features that no data path is told of. ACCESS_PLATFORM would have vhost-net ask for translations
#: of addresses; there is no IOMMU, so that all addresses are those of guest memory.
OF_THE_CARD = LEGACY_ONLY | 1 << VIRTIO_F_ACCESS_PLATFORM
#: What VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET may switch (5.1.6.5.6).
GUEST_OFFLOADS = sum(
    1 << bit
    for bit in (
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_UFO,
        VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6,
        VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
        VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
    )
)
#: Bits of that command which stand for features beyond the first 64.
MAPPED_OFFLOADS = {
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_MAPPED: VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM_MAPPED: VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
}
#: Features that bring the last fields of the configuration space, and flows told apart.
HASHED = 1 << VIRTIO_NET_F_RSS | 1 << VIRTIO_NET_F_HASH_REPORT
#: Features of which each brings more than one queue pair.
MULTIQUEUE = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_RSS


class Observer(Protocol):
    """Is told by a network device. Any thread; must not wait."""

    def problem_found(self, problem: str) -> None:
        """Something that only a reset cures, in words."""

    def rx_changed(self) -> None:
        """The driver has changed its receive filter or the MAC address."""

    def driver_gone(self) -> None:
        """The driver resets the device, whose data path has stopped."""


class NetDevice(ServedDevice):
    """A network card: ``pairs`` queue pairs (2k receives, 2k + 1 transmits) and the control queue
    behind them.

    :param datapath: moves the packets; owned from here on.
    :param uplink: the host's side of the card, lent.
    :param mac: 6 bytes. :param mtu: bytes, offered to the guest, or None.
    :param pairs: 1 or more; more than one is offered as VIRTIO_NET_F_MQ.
    :param offer: mask of the feature bits that every data path which it may be switched to can
        honour.
    :param without: feature bits (a mask) not to offer although the data path could.
    :param speed: of the cable, in Mbit/s, as the driver is told.
    :param link: whether the cable is plugged in at the start.
    :param jobs, lock: see ``VirtioDevice``.
    :ivar datapath: in force. :ivar pairs: in use; the driver chooses.
    :ivar rx: what the driver wants to receive. :ivar commands: taken from the control queue.
    :ivar statistics: what the driver can ask for of it.

    What is said to the data path and to the uplink is said in jobs, so that rings, positions and
    ``datapath`` belong to the thread that runs jobs. Other threads may look at the attributes.
    """

    device_id = VIRTIO_ID_NET
    config_names = CONFIG_NAMES
    datapath: DataPath

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        datapath: DataPath,
        uplink: HostSide,
        mac: bytes,
        *,
        mtu: int | None = None,
        pairs: int = 1,
        queue_size: int = QUEUE_SIZE,
        offer: int = -1,
        without: int = 0,
        speed: int = SPEED,
        link: bool = True,
        jobs: Jobs | None = None,
        lock: threading.RLock | None = None,
    ) -> None:
        sizes = [queue_size] * (2 * pairs) + [CONTROL_SIZE]
        super().__init__(name, memory, sizes, datapath, jobs=jobs, lock=lock)
        self._uplink = uplink
        self._own_mac = self.mac = mac
        self.mtu = mtu
        self._speed = speed
        self.max_pairs = pairs
        self.pairs = 1
        self.rx = RxFilter(mac)
        self.commands = 0
        self.statistics = Statistics()
        self._plugged = link
        self._path_up = True
        self._announce = False
        self._control: Control | None = None
        self._control_asked = False  # a job to serve the control queue has been posted
        self._mac_asked = False  # a job to look at a MAC address that was written has been posted
        self._observer: Observer | None = None
        self._offloads = 0
        self._coalesce = [(0, 0), (0, 0)]  # packets and microseconds, receive and transmit
        self._hashing: Hashing | None = None
        own = self._offer(datapath.features() & offer, datapath.withholds)
        self._offered = self._most = own & ~without
        if not link:
            uplink.set_carrier(False)

    def observe(self, observer: Observer) -> None:
        """Tell ``observer`` of problems and receive filters from now on."""
        self._observer = observer

    def problem_found(self, problem: str) -> None:
        """Pass it on."""
        if self._observer is not None:
            self._observer.problem_found(problem)

    def _offer(self, path: int, withheld: int) -> int:
        """The device's own features and what the data path can honour.

        :param withheld: own features that the data path stands in the way of.
        """
        own = sum(1 << bit for bit in (*OWN, *CONTROLLED))
        if self.mtu is not None:
            own |= 1 << VIRTIO_NET_F_MTU
        if self.max_pairs > 1:
            own |= 1 << VIRTIO_NET_F_MQ
        if path & GUEST_OFFLOADS:
            own |= 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
        return own & ~withheld | path

    def offered(self) -> int:
        """Fixed from reset to reset: less than at creation where a data path that can do less has
        taken over.
        """
        return self._offered

    @property
    def rings(self) -> list[Vring]:
        """Those of the queue pairs in use, pair 0 first."""
        return [ring for index, ring in sorted(self._rings.items()) if index < 2 * self.pairs]

    @property
    def in_force(self) -> int:
        """The negotiated features as a data path gets them: of GUEST_* only those that the driver
        has left on; CTRL_GUEST_OFFLOADS if it may switch GUEST_CSUM on. Headers keep the size that
        was negotiated (5.1.6): if no other bit says so any more, HOST_UDP_TUNNEL_GSO does, which
        only lets the driver do more.
        """
        acked = self.driver_features & ~(GUEST_OFFLOADS | OF_THE_CARD) | self._offloads
        if header_size(acked) != header_size(self.driver_features):
            acked |= 1 << VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO
        if not self.driver_features >> VIRTIO_NET_F_GUEST_CSUM & 1:
            acked &= ~(1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
        return acked

    def config_space(self) -> bytes:
        """struct virtio_net_config as far as its features go (5.1.4)."""
        status = VIRTIO_NET_S_LINK_UP if self.link_up else 0
        status |= VIRTIO_NET_S_ANNOUNCE if self._announce else 0
        return b"".join(
            (
                self.mac,
                status.to_bytes(2, "little"),
                self.max_pairs.to_bytes(2, "little"),
                (self.mtu or 0).to_bytes(2, "little"),
                self._speed.to_bytes(4, "little"),
                bytes([FULL_DUPLEX]),
                struct.pack("<BHI", RSS_KEY_MAX, RSS_TABLE_MAX, RSS_HASH_TYPES)
                if self._offered & HASHED
                else b"",
            )
        )

    def legacy_config_written(self, offset: int, data: bytes) -> bool:
        """The MAC address, unless a command changes it (5.1.4.3). One job serves however many
        writes: drivers write byte by byte.
        """
        end = offset + len(data)
        if end > len(self.mac) or self.driver_features >> VIRTIO_NET_F_CTRL_MAC_ADDR & 1:
            return False
        self.mac = self.mac[:offset] + data + self.mac[end:]
        if self.active and not self._mac_asked:
            self._mac_asked = True
            self.post("MAC address", self._look_at_mac)
        return True

    def _look_at_mac(self) -> None:
        self._mac_asked = False  # before looking: a write from now on posts another job
        self.rx.mac = self.mac
        self.rx_changed()

    # --- link -------------------------------------------------------------------------------------

    @property
    def link_up(self) -> bool:
        """What the guest is told of the link."""
        return self._plugged and self._path_up

    def link(self, up: bool) -> None:
        """The interface behind the data path is gone, or back. Any thread."""
        if up != self._path_up:
            self._path_up = up
            self.config_changed()

    def set_link(self, up: bool) -> None:
        """In a job: plug or pull the cable. While it is pulled the rings are parked, and nothing
        moves.

        :raises PyvmmError: the data path does not start again; the driver has to reset the device.
        """
        if up == self._plugged:
            return
        self._plugged = up
        if not up:
            self.park()
        self._uplink.set_carrier(up)
        try:
            if up and self._driven:
                self.resume()
        except Exception as e:
            self.failed("link", e)
            raise
        self.config_changed()

    def announce(self) -> bool:
        """In a job: ask the guest to tell the network where it is (5.1.6.5.4.1); whether its driver
        can.
        """
        if not (self._control and self.driver_features >> VIRTIO_NET_F_GUEST_ANNOUNCE & 1):
            return False
        self._announce = True
        self.config_changed()
        return True

    def announced(self) -> bool:
        """The driver acknowledges; whether it had been asked."""
        asked, self._announce = self._announce, False
        return asked

    # --- queues -----------------------------------------------------------------------------------

    def _control_index(self) -> int:
        """5.1.2: behind the queue pairs that the driver knows of."""
        return 2 * self.max_pairs if self.driver_features & MULTIQUEUE else 2

    def queue_role(self, index: int) -> str:
        """``receive``, ``transmit`` or ``control``."""
        if index == self._control_index():
            return "control"
        return "transmit" if index & 1 else "receive"

    def kick_role(self, index: int) -> str:
        """By what was negotiated last. Kicks of the control queue are told apart: they are exits in
        every mode.
        """
        control = 2 * self.max_pairs if self.negotiated & MULTIQUEUE else 2
        has = self.negotiated >> VIRTIO_NET_F_CTRL_VQ & 1
        return "control" if has and index == control else "notify"

    def own_queues(self) -> frozenset[int]:
        """The control queue."""
        has = self.driver_features >> VIRTIO_NET_F_CTRL_VQ & 1
        return frozenset([self._control_index()] if has else [])

    def notified(self, index: int) -> None:
        """The control queue has been kicked. One job serves however many kicks: a driver may kick
        as often as it likes.
        """
        if self.active and not self._control_asked:
            self._control_asked = True
            self.post("control queue", self._serve_control)

    def _serve_control(self) -> None:
        self._control_asked = False  # before looking: a kick from now on is a reason to look again
        if self._control is None or self._held:
            return
        index = self._control_index()
        try:
            if self._control.serve():
                self.notified(index)
        except RingFault as e:
            self._control = None
            self.fault(index, f"control queue: {e}")

    def activate(self, rings: list[Vring]) -> None:
        """Hand the rings of the first pair to the data path; the driver asks for more by command
        (5.1.6.5.5).
        """
        acked = self.driver_features
        control = self._control_index()
        self._offloads = acked & GUEST_OFFLOADS
        self._coalesce = [(0, 0), (0, 0)]
        self._hashing = None
        self.statistics = Statistics()
        self.pairs = 1
        self.rx = RxFilter(self.mac, filters_vlans=bool(acked >> VIRTIO_NET_F_CTRL_VLAN & 1))
        self._uplink.set_rx_filter(self.rx)
        self._uplink.set_steering(None)
        if acked >> VIRTIO_NET_F_CTRL_VQ & 1:
            for ring in rings:
                if ring.index == control:
                    self._control = Control(self, ring, acked)
        super().activate([ring for ring in rings if ring.index < control])

    def stop_ring(self, index: int) -> None:
        """Take all rings from the data path, and give it the others back."""
        if index == self._control_index():
            self._control = None
            return
        super().stop_ring(index)

    def start_ring(self, ring: Vring) -> None:
        """Take all rings from the data path, and give it one more."""
        acked = self.driver_features
        if ring.index == self._control_index() and acked >> VIRTIO_NET_F_CTRL_VQ & 1:
            self._control = Control(self, ring, acked)
            self._serve_control()
            return
        ring.coalesce, ring.hashing = self._coalesce[ring.index % 2], self._hashing
        super().start_ring(ring)

    def deactivate(self) -> None:
        """Take the rings back, and forget what the driver had set."""
        try:
            super().deactivate()
        finally:
            self._control = None
            self._announce = False
            if self._observer is not None:
                self._observer.driver_gone()

    def resume(self, *, hold: bool = False, patience: float | None = None) -> None:
        """As ``ServedDevice.resume``, unless the cable is pulled."""
        if self._plugged:
            super().resume(hold=hold, patience=patience)

    def before_start(self, rings: Sequence[Vring], acked: int) -> None:
        """Program the host's side for the rings of the pairs in use."""
        self._uplink.set_queues(1 + max(by_pair(rings), default=0))
        self._uplink.set_header(header_size(acked))
        self._uplink.set_offloads(acked)
        self.datapath.set_rx_filter(self.rx)

    def gone_on(self) -> None:
        """The control queue may have been kicked meanwhile."""
        self._serve_control()

    def started(self) -> None:
        """A device of the host's may take the kicks itself, or the vCPUs' threads do."""
        self._map_doorbells(self.datapath.doorbells())
        with self._lock:
            self._transport.set_takers(self.datapath.takers())

    def before_stop(self) -> None:
        """Kicks gather in the eventfds from now on."""
        with self._lock:
            self._transport.set_takers({})
        self._map_doorbells({})

    def stopped(self) -> None:
        """What the virtqueues have counted stays."""
        self.statistics.add(self.datapath.ring_counters())

    def _map_doorbells(self, pages: dict[int, int]) -> None:
        with self._lock:
            self._transport.set_doorbells(pages)

    # --- another data path ------------------------------------------------------------------------

    def lacks(self, path: DataPath) -> int:
        """Feature bits that the driver uses, or may yet choose, and ``path`` cannot honour."""
        chosen = self.driver_features & ~LEGACY_ONLY if self.settled else self._offered
        can = self._offer(path.features(), path.withholds)
        return chosen & ~can if self.engaged else 0

    def check(self, path: DataPath) -> None:
        """:raises UsageError: ``path`` lacks features that are in use; it names them."""
        with self._lock:
            missing = self.lacks(path)
        if missing:
            from pyvmm.virtio.features import names

            raise UsageError(
                f"{self.name} cannot switch to {path.name}, which lacks features that the guest"
                f" uses: {' '.join(names(missing))}",
                f"name it at the start: --net ...,switchable={path.name}, or leave features out:"
                " without=",
            )

    def use(self, path: DataPath) -> None:
        """In a job: make ``path`` the data path; ``resume`` starts its rings. The caller owns the
        old one.

        :raises UsageError: the path lacks features that are in use; nothing has changed.
        """
        with self._lock:  # between the check and the new offer, the driver must not choose
            self.check(path)
            self.datapath = path
            if not self.engaged:
                self._reoffer()
        self.link(True)  # the path says so if its interface is gone

    def _reoffer(self) -> None:
        path = self.datapath
        self._offered = self._most & self._offer(path.features(), path.withholds)

    def _reset_done(self) -> None:
        """Offer what the present data path can; the MAC address is the card's own again."""
        super()._reset_done()
        self.mac = self._own_mac
        self._reoffer()

    # --- what the driver commands -----------------------------------------------------------------

    def set_pairs(self, pairs: int) -> bool:
        """Use the first ``pairs`` queue pairs, of which the host chooses one for each frame
        (5.1.6.5.6); False where there are not as many.

        :raises PyvmmError: the host's side refuses, or the data path does not start again.
        """
        return self._use_pairs(pairs, None)

    def _use_pairs(self, pairs: int, steering: Steering | None) -> bool:
        if not VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN <= pairs <= self.max_pairs:
            return False
        if any(2 * k + way not in self._rings for k in range(pairs) for way in (0, 1)):
            return False  # 5.1.6.5.5.1: the driver has not set them up
        self._uplink.set_steering(steering)
        if pairs != self.pairs:
            self.park()
            self.pairs = pairs
            self.resume()
        return True

    def steer(self, pairs: int, steering: Steering) -> bool:
        """Choose the queue pair of each frame by ``steering`` (5.1.6.5.7), and use as many as that
        needs, or ``pairs`` if these are more; False where there are not as many.

        :raises PyvmmError: as ``set_pairs``.
        """
        highest = max(*steering.table, steering.unclassified)
        if not self._use_pairs(max(pairs, 1 + highest), steering):
            return False
        self.set_hashing(steering.hashing)
        return True

    def set_hashing(self, hashing: Hashing) -> None:
        """Put this hash into the headers of frames, if the driver has negotiated such headers.

        :raises PyvmmError: the data path does not start again.
        """
        if not self.driver_features >> VIRTIO_NET_F_HASH_REPORT & 1:
            return
        self.park()
        self._hashing = hashing
        for ring in self._rings.values():
            ring.hashing = hashing
        self.resume()

    def set_offloads(self, offloads: int) -> bool:
        """Have the host send what ``offloads`` allows, GUEST_* bits as the command has them; False
        if that was not negotiated.

        :raises PyvmmError: the host's side refuses, or the data path does not start again.
        """
        for bit, feature in MAPPED_OFFLOADS.items():
            if offloads >> bit & 1:
                offloads += (1 << feature) - (1 << bit)
        if offloads & ~(self.driver_features & GUEST_OFFLOADS):
            return False
        changed, self._offloads = offloads != self._offloads, offloads
        if not self._serving or not self.datapath.restarts_for_offloads:
            self._uplink.set_offloads(self.in_force)
        elif changed:
            self.park()
            self.resume()
        return True

    def coalesce_way(self, way: int, packets: int, usecs: int) -> None:
        """Let interrupts of all receive (0) or transmit virtqueues (1) wait for so many packets, or
        for so many microseconds after the first; also those of virtqueues to come.

        :raises PyvmmError: the data path does not start again.
        """
        self._coalesce[way] = packets, min(usecs, COALESCE_US_MAX)
        self._coalesce_now({i: self._coalesce[way] for i in self._rings if i % 2 == way})

    def coalesce_queue(self, index: int, packets: int, usecs: int) -> bool:
        """The same for one virtqueue, until the virtqueue is reset; False if the driver has not set
        it up.

        :raises PyvmmError: the data path does not start again.
        """
        if index not in self._rings:
            return False
        self._coalesce_now({index: (packets, min(usecs, COALESCE_US_MAX))})
        return True

    def _coalesce_now(self, wanted: dict[int, tuple[int, int]]) -> None:
        if any(self._rings[index].coalesce != new for index, new in wanted.items()):
            self.park()  # which makes other rings of them
            for index, new in wanted.items():
                self._rings[index].coalesce = new
            self.resume()

    def coalescing(self, index: int) -> tuple[int, int] | None:
        """Packets and microseconds of a virtqueue; None if the driver has not set it up."""
        ring = self._rings.get(index)
        return ring.coalesce if ring is not None else None

    def records(self, wanted: list[tuple[int, int]]) -> bytes | None:
        """What the card has done on virtqueues, each with a mask of VIRTIO_NET_STATS_TYPE_* bits
        (virtio 1.4, 5.1.6.5.10); None if there is no such virtqueue, or it has no such type.
        """
        now = self.datapath.ring_counters() if self._serving else {}
        known, out = supported(self.driver_features), []
        for index, kinds in wanted:
            role = self.queue_role(index)
            if index > self._control_index() or kinds & ~(known & sum(TYPES[role])):
                return None
            out.append(self.statistics.records(index, role, kinds, now.get(index, {})))
        return b"".join(out)

    def rx_changed(self) -> None:
        """``rx`` has been changed by the driver."""
        self.datapath.set_rx_filter(self.rx)
        try:
            self._uplink.set_rx_filter(self.rx)
        except PyvmmError:
            pass  # best effort: without a filter the guest sees more than it asked for
        if self._observer is not None:
            self._observer.rx_changed()
