"""What a data path is: the one interface behind which emulation, vhost-net, vhost-user and
vhost-vdpa are alike.

A data path borrows everything: the transport owns the kick and call eventfds, the machine owns
guest memory, and ring positions come in at ``start`` and go back at ``stop``. That is why it can be
replaced under a running guest.
"""

from __future__ import annotations

from pyvmm.datapath.ringformat import SPLIT
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_HDR_SIZE,
    VIRTIO_NET_HDR_V1_HASH_SIZE,
    VIRTIO_NET_HDR_V1_HASH_TUNNEL_SIZE,
    VIRTIO_NET_HDR_V1_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from pyvmm.datapath.ringformat import RingFormat
    from pyvmm.fd import EventFd, Fd
    from pyvmm.hostnet.rtnetlink import Link
    from pyvmm.memory import GuestMemory
else:
    Protocol = object  # `typing` costs as much as all else that a run imports


#: Features with which a header says where the headers inside of a UDP tunnel are.
TUNNELS = 1 << VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO | 1 << VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO


class Hashing:
    """What flows are told apart by (virtio 1.3, 5.1.6.4.3); immutable.

    :ivar types: VIRTIO_NET_RSS_HASH_TYPE_* bits. :ivar key: of the Toeplitz hash, up to 40 bytes.
    """

    __slots__ = ("key", "types")

    def __init__(self, types: int, key: bytes) -> None:
        self.types, self.key = types, key


class Steering:
    """Which queue pair a frame for the guest goes to (virtio 1.3, 5.1.6.5.7); immutable.

    :ivar hashing: what makes the hash of a frame. :ivar table: queue pairs by the low bits of the
        hash; its length is a power of two, up to 128. :ivar unclassified: the queue pair of frames
        without a hash.
    """

    __slots__ = ("hashing", "table", "unclassified")

    def __init__(self, hashing: Hashing, table: Sequence[int], unclassified: int) -> None:
        self.hashing, self.table, self.unclassified = hashing, table, unclassified


class Vring:
    """One virtqueue as handed to a data path; immutable by convention.

    :ivar index: queue number in the device (net: 2k receive, 2k + 1 transmit).
    :ivar size: entries, up to 32768; of a split ring, a power of two (virtio 1.2, 2.7, 2.8).
    :ivar desc, avail, used: guest-physical addresses of the descriptor, driver and device areas.
    :ivar base: the position to start at (``datapath.ringformat``).
    :ivar format: split or packed.
    :ivar kick: guest to device, lent. :ivar call: device to guest, lent; if that is
        a ``kvm.inject.Injection``, the emulated path raises the interrupt by an ioctl.
    :ivar coalesce: (packets, microseconds) for which the driver lets its interrupt wait
        (5.1.6.5.7); no microseconds: it does not wait.
    :ivar hashing: of the frames of a receive queue, for their headers; None: their hash is 0.
    :ivar inflight: cdata ``uint8_t *`` of a vhost-user in-flight region for the emulated path, or
        None.
    :ivar log: where the emulated path marks the pages that it writes, or None.
    """

    __slots__ = (
        "avail",
        "base",
        "call",
        "coalesce",
        "desc",
        "format",
        "hashing",
        "index",
        "inflight",
        "kick",
        "log",
        "size",
        "used",
    )

    def __init__(
        self,
        index: int,
        size: int,
        desc: int,
        avail: int,
        used: int,
        base: int,
        kick: EventFd,
        call: EventFd,
        form: RingFormat = SPLIT,
    ) -> None:
        self.index, self.size, self.base, self.format = index, size, base, form
        self.desc, self.avail, self.used = desc, avail, used
        self.kick, self.call = kick, call
        self.coalesce = (0, 0)
        self.hashing: Hashing | None = None
        self.inflight: Any = None
        self.log: RingLog | None = None

    def at(self, base: int) -> Vring:
        """The same ring at another position."""
        place = self.index, self.size, self.desc, self.avail, self.used
        ring = Vring(*place, base, self.kick, self.call, self.format)
        ring.coalesce, ring.hashing = self.coalesce, self.hashing
        return ring


class RingLog:
    """The bitmap in which a data path marks the pages of guest memory that it writes while the
    guest migrates (``cext/dirty_log.h``). All rings of a device have the same.

    :ivar bits: cdata ``uint8_t *``, shared with an untrusted process. :ivar size: its bytes.
    :ivar used: the address that the used ring is marked under; None: it is not marked.
    :ivar call: an eventfd, lent, to signal when something was marked; None: nobody wants to know.
    """

    __slots__ = ("bits", "call", "size", "used")

    def __init__(self, bits: Any, size: int, used: int | None, call: Fd | None) -> None:
        self.bits, self.size, self.used, self.call = bits, size, used, call


class HandOverTimes:
    """When rings changed hands: per queue index, CLOCK_MONOTONIC in nanoseconds.

    :ivar asked: just before the data path was asked to let go of the ring.
    :ivar began: when the path served the ring; may come a moment after ``start`` has returned.
    """

    __slots__ = ("asked", "began")

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}
        self.began: dict[int, int] = {}


def header_size(acked: int) -> int:
    """Bytes of the header before each frame, by the negotiated features (virtio 1.3, 5.1.6)."""
    if acked & TUNNELS:
        return VIRTIO_NET_HDR_V1_HASH_TUNNEL_SIZE
    if acked >> VIRTIO_NET_F_HASH_REPORT & 1:
        return VIRTIO_NET_HDR_V1_HASH_SIZE
    if not acked & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF):
        return VIRTIO_NET_HDR_SIZE
    return VIRTIO_NET_HDR_V1_SIZE


def by_pair(rings: Sequence[Vring]) -> dict[int, list[Vring]]:
    """The rings of each queue pair, in order."""
    pairs: dict[int, list[Vring]] = {}
    for ring in rings:
        pairs.setdefault(ring.index // 2, []).append(ring)
    return pairs


def cpu_ns(tid: int | None) -> int:
    """CPU time that a thread of the system has used, in nanoseconds; 0 for one that has ended."""
    try:
        with open(f"/proc/{tid}/schedstat", encoding="ascii") as f:
            return int(f.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def bug(name: str, error: Exception) -> str:
    """A fault's words for an exception in a thread of the data path ``name``."""
    return f"{name}: {type(error).__name__}: {error}"


class RxFilter:
    """What the driver wants to receive (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2); after reset,
    everything.

    :ivar unicast, multicast: addresses beside the card's own, 6 bytes each. :ivar vlans: ids 0 to
        4095. :ivar filters_vlans: the driver names the VLANs that it wants (CTRL_VLAN).
    """

    __slots__ = ("filters_vlans", "flags", "mac", "multicast", "unicast", "vlans")

    #: VIRTIO_NET_CTRL_RX_* by command number. ``flags`` may also hold ``unicast-overflow`` and
    #: ``multicast-overflow``.
    FLAGS = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")

    def __init__(self, mac: bytes, *, filters_vlans: bool = False) -> None:
        self.mac = mac
        self.filters_vlans = filters_vlans
        self.flags = {"promisc"}
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.vlans: set[int] = set()

    @property
    def all_multicast(self) -> bool:
        """Whether every multicast frame is wanted, in the table or not."""
        return bool(self.flags & {"allmulti", "multicast-overflow"})

    def addresses(self) -> list[bytes] | None:
        """Destinations to let through, those of multicast last; None for all. For VLANs and *no*
        flags see ``hostnet.framefilter``; filtering is best effort (5.1.6.5.1.2).
        """
        if self.flags & {"promisc", "alluni", "unicast-overflow"}:
            return None
        return [self.mac, *self.unicast, b"\xff" * 6, *self.multicast]


class NetInterface(Protocol):
    """A network interface that may be deleted, and made again, while a data path uses it."""

    def link(self) -> Link:
        """The interface's counters and events; another object after ``reopen``."""

    def reopen(self) -> bool:
        """Open the interface again after it was deleted; whether that succeeded.

        :raises PyvmmError: the interface is there but cannot be had.
        """


class Frames(Protocol):
    """Where a worker of the emulated path reads and writes frames: a tap, or sockets or ends of
    cables (``datapath.cable``) in its place.

    Each descriptor keeps frame boundaries; each frame follows a virtio-net header. The header has
    12 bytes unless the driver has negotiated another (``header_size``). On a cable there is none.

    :ivar fds: one descriptor per queue pair, owned by the implementer and lent to the data path.
    :ivar mtu: bytes; decides how large a receive buffer must be.
    """

    name: str
    mtu: int

    @property
    def fds(self) -> list[Fd]:
        """See above."""

    @property
    def interface(self) -> NetInterface | None:
        """The network interface behind the descriptors; None for sockets, which never return."""

    def features(self) -> int:
        """The virtio-net offload features that the descriptors can honour, as a mask."""


class HostSide(Protocol):
    """What a network device programs on the host's side of its card (``card.uplink.Uplink``)."""

    def set_queues(self, count: int) -> None:
        """Have the host spread its frames over the first ``count`` queue pairs only.

        :raises PyvmmError: the host refuses.
        """

    def set_header(self, size: int) -> None:
        """Have the host put a header of so many bytes before each frame. No data path runs.

        :raises PyvmmError: the host refuses.
        """

    def set_offloads(self, acked: int) -> None:
        """Let the host send what the GUEST_* bits of ``acked`` allow; at any time.

        :raises PyvmmError: the host refuses.
        """

    def set_steering(self, steering: Steering | None) -> None:
        """Have the host choose the queue pair of each frame this way; None: its own.

        :raises PyvmmError: the host refuses.
        """

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Have the host drop frames that ``rx`` does not ask for; it may let more pass.

        :raises PyvmmError: the host refuses.
        """

    def set_carrier(self, up: bool) -> None:
        """Show the host a cable that is plugged in or not.

        :raises PyvmmError: the host refuses.
        """


class OnUplink:
    """What a data path has of ``DataPath`` if it leaves the host's side to the card, or to another
    process.
    """

    withholds = 0

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Not this path's business."""

    def doorbells(self) -> dict[int, int]:
        """There are none."""
        return {}

    def takers(self) -> dict[int, Any]:
        """Kicks come by the eventfds."""
        return {}

    def bound(self) -> str:
        """Nothing binds the rings."""
        return ""

    def ring_counters(self) -> dict[int, dict[str, int]]:
        """Nobody counts by ring."""
        return {}

    def positions(self) -> dict[int, int]:
        """Whoever serves the rings does not tell."""
        return {}


class PathEvents(Protocol):
    """Takes what a data path reports while it serves rings. Any thread; neither method waits."""

    def fault(self, queue: int, problem: str) -> None:
        """The path stopped serving a malformed ring, or cannot go on.

        :param queue: index of the virtqueue, or -1 for the whole device. :param problem: in words.
        """

    def link(self, up: bool) -> None:
        """The interface behind the path has been deleted (False) or is back (True)."""


class RingServer(Protocol):
    """Serves the rings of a device of any kind.

    ``start``, ``stop`` and ``close`` are called by one thread at a time; the other members by any
    thread. ``patience`` is the number of seconds that another process may take for its part, None
    for the path's own limit; a path that asks no other process does not use it.
    """

    name: str

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Take over the rings, lowest index first, all or nothing.

        :param acked: the negotiated feature bits. :param events: told of faults and of the link
            until ``stop`` returns.
        :raises PyvmmError: nothing was started and the rings are untouched.
        """

    def problem(self) -> str:
        """Why the rings of the latest ``start`` are not being served; empty if they are."""

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Finish what was taken from the rings; return each ring's position in ``start``'s order.

        No access to guest memory happens after it returns. A path that is not running returns [].

        :param finish: another data path goes on: what was read from the host's side goes to the
            guest, too, even if the guest has to add buffers first, for which it gets a fifth of a
            second.
        :raises PyvmmError: the path did not stop in order; it has let go of the rings all the same.
        """

    def counters(self) -> dict[str, int]:
        """Counts since creation, by name; a key ends in its unit unless the value is a count."""

    def report(self) -> dict[str, object]:
        """What is known of another process that serves the rings, for JSON; empty without one."""

    def cut(self) -> None:
        """End every conversation with another process at once, and allow no other: the machine
        ends. Takes no lock that a conversation holds.
        """

    def close(self) -> None:
        """Stop, and release everything that is not lent. A second call does nothing."""


class DataPath(RingServer, Protocol):
    """A way to move packets between the rings and the host's side of the card.

    ``prepare`` and ``stop_transmit`` are called by the thread that calls ``start`` and ``stop``.

    :ivar times: of the latest start and stop.
    :ivar restarts_for_offloads: whether other offloads than at ``start`` need a stop and a start;
        otherwise it suffices to program the host's side.
    :ivar withholds: feature bits of the card's own that the driver must not be offered, because
        frames enter and leave where the card cannot program them; 0 for most.
    """

    times: HandOverTimes
    restarts_for_offloads: bool
    withholds: int

    def features(self) -> int:
        """The virtio feature bits that this data path can honour."""

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Agree beforehand on what needs an answer, so that ``start`` is short.

        :param rings: like those that ``start`` will get; they are not touched yet.
        :raises PyvmmError: the path will not serve such rings.
        """

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Take over the rings of the queue pairs in use, pair 0 first, all or nothing.

        The caller has programmed queues and offloads of the host's side (``HostSide``) before.

        :param acked: the negotiated feature bits, of GUEST_* only those in force;
            CTRL_GUEST_OFFLOADS only if GUEST_CSUM may come into force later.
        :param events: told of faults and of the link until ``stop`` returns.
        :raises PyvmmError: nothing was started and the rings are untouched.
        """

    def set_rx_filter(self, rx: RxFilter) -> None:
        """What the driver wants to receive has changed; told before each ``start``, too. Best
        effort. Paths on the card's tap leave it to the tap.
        """

    def doorbells(self) -> dict[int, int]:
        """The notification pages of the rings that are being served: by virtqueue, our address of
        a page (4096 bytes) to which the guest may write its kicks in place of the eventfd. Valid
        until ``stop`` is called; empty for most paths.
        """

    def takers(self) -> dict[int, Any]:
        """What takes kicks in the thread of the vCPU that kicks, in the place of the eventfd: by
        virtqueue, ``struct pv_taker *``. Valid until ``stop`` is called; empty for most paths. A
        kick that comes by the eventfd counts all the same.
        """

    def bound(self) -> str:
        """Why no other data path can take over the rings that this one serves; empty if one
        can.
        """

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Take nothing more from the transmit rings, but go on receiving; ``stop`` comes next.

        :raises PyvmmError: the path cannot do so.
        """

    def counters(self) -> dict[str, int]:
        """Packets, bytes, kicks, calls and drops since creation; a key ends in its unit unless the
        value is a count.
        """

    def ring_counters(self) -> dict[int, dict[str, int]]:
        """What each virtqueue has done since the latest ``start``, by index; also after ``stop``,
        until the next ``start``. A path with VIRTIO_NET_F_DEVICE_STATS counts ``packets``,
        ``bytes``, ``kicks``, ``calls``, ``drop_*`` by reason, ``csum_*`` and ``gso_*`` (cext/
        net_worker.h); others return nothing.
        """

    def positions(self) -> dict[int, int]:
        """Where the path is in the rings that it serves (``datapath.ringformat``), by index of the
        virtqueue, to look at: it has moved on meanwhile. Empty if another process, the kernel or a
        device serves them, because these do not tell while they run.
        """

    def workers(self) -> list[dict[str, object]]:
        """The threads that move packets now: ``name``, ``tid``, and ``cpu_s``, seconds of CPU that
        the thread has used.
        """
