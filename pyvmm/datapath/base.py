"""What a data path is: the one interface behind which emulation, vhost-net and vhost-user are
alike.

A data path borrows everything: the transport owns the kick and call eventfds, the machine owns
guest memory, and ring positions come in at ``start`` and go back at ``stop``. That is why it can be
replaced under a running guest.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pyvmm.fd import EventFd
    from pyvmm.memory import GuestMemory

    #: Called from a data path's own thread: (queue index or -1 for the whole device, what is
    #: wrong).
    FaultHandler = Callable[[int, str], None]
else:
    Protocol = object  # `typing` costs as much as all else that a run imports


class Vring:
    """One virtqueue as handed to a data path; immutable by convention.

    :ivar index: queue number in the device (net: 2k receive, 2k + 1 transmit).
    :ivar size: entries, a power of two up to 32768 (virtio 1.2, 2.7).
    :ivar desc, avail, used: guest-physical addresses.
    :ivar base: next available index, 0..65535 (split ring).
    :ivar kick: guest to device, lent. :ivar call: device to guest, lent.
    :ivar inflight: cdata ``uint8_t *`` of a vhost-user in-flight region for the emulated path, or
        None.
    """

    __slots__ = ("avail", "base", "call", "desc", "index", "inflight", "kick", "size", "used")

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
    ) -> None:
        self.index, self.size, self.base = index, size, base
        self.desc, self.avail, self.used = desc, avail, used
        self.kick, self.call = kick, call
        self.inflight: Any = None

    def at(self, base: int) -> Vring:
        """The same ring at another position."""
        return Vring(
            self.index, self.size, self.desc, self.avail, self.used, base, self.kick, self.call
        )


class Marks:
    """When rings changed hands, in monotonic nanoseconds by queue index; for who measures a switch.

    :ivar asked: just before the data path was asked to let go of the ring.
    :ivar began: when it served the ring; may come a moment after ``start`` has returned.
    """

    __slots__ = ("asked", "began")

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}
        self.began: dict[int, int] = {}


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


class RxFilter:
    """What the driver wants to receive (virtio 1.2, 5.1.6.5.1 and 5.1.6.5.2); after reset,
    everything.

    :ivar unicast, multicast: addresses beside the card's own, 6 bytes each. :ivar vlans: ids 0 to
        4095.
    """

    __slots__ = ("flags", "mac", "multicast", "unicast", "vlans")

    #: VIRTIO_NET_CTRL_RX_* by command number. ``flags`` may also hold ``unicast-overflow`` and
    #: ``multicast-overflow``.
    FLAGS = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.flags = {"promisc"}
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.vlans: set[int] = set()

    @property
    def all_multicast(self) -> bool:
        """Whether every multicast frame is wanted, in the table or not."""
        return bool(self.flags & {"allmulti", "multicast-overflow"})

    def addresses(self) -> list[bytes] | None:
        """Destinations to let through, those of multicast last; None for all. VLANs and *no* flags
        are not applied: filtering is best effort (5.1.6.5.1.2)."""
        if self.flags & {"promisc", "alluni", "unicast-overflow"}:
            return None
        return [self.mac, *self.unicast, b"\xff" * 6, *self.multicast]


class Place(Protocol):
    """Where frames enter and leave, as far as a move away from it or to it goes."""

    def waiting(self) -> bool:
        """Whether a frame is there that nobody has taken."""

    def discard(self) -> int:
        """Throw away the frames that wait, while no data path runs; how many they were."""


class DataPath(Protocol):
    """A way to move packets between the rings and the outside."""

    name: str
    #: Set by the device before start(): a malformed ring or a dead backend is reported here, once.
    on_fault: FaultHandler | None
    #: Likewise: the outside is gone (False) or back (True).
    on_link: Callable[[bool], None] | None
    #: Seconds that another process has for a start or a stop; of no meaning where there is none.
    timeout: float
    #: Of the latest start and stop.
    marks: Marks

    @property
    def outside(self) -> Place | None:
        """Where frames enter and leave, lent to the data path: a tap of ours, or None where the
        other side has its own.
        """

    def features(self) -> int:
        """The virtio feature bits that this data path can honour."""

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Agree beforehand on what needs an answer, so that ``start`` is short. May take its time.

        :param rings: like those to come; they are not touched yet.

        :raises PyvmmError: it will not do.
        """

    def start(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Take over the rings of the queue pairs in use, pair 0 first, all or nothing.

        :param acked: the negotiated feature bits, of GUEST_* only those in force.
        :raises PyvmmError: nothing was started and the rings are untouched.
        """

    def problem(self) -> str:
        """Why the rings that it was given are not being served; empty where they are."""

    def stop(self, *, finish: bool = False) -> list[int]:
        """Quiesce: finish what was taken from the rings; return each ring's base, in the order of
        ``start``.

        :param finish: another data path goes on: what was read from the outside goes to the guest,
            too, even if that has to add buffers first, for which it gets a fifth of a second.

        No access to guest memory happens after it returns. Idempotent: without a running path it
        returns [].
        """

    def hold(self) -> None:
        """Take nothing more from the transmit rings, but go on receiving; ``stop`` comes next.

        :raises PyvmmError: that is not to be had.
        """

    def announce(self, mac: bytes) -> bool:
        """Have the network learn that ``mac`` is at this path's outside, rings or no rings; whether
        that can be done.
        """

    def set_offloads(self, acked: int) -> None:
        """Reprogram offloads from GUEST_* bits while running
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET).
        """

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Receive what ``rx`` asks for, or more; at any time between ``start`` and ``stop``, and
        before.
        """

    def set_carrier(self, up: bool) -> None:
        """Plug or pull the cable on the host's side, where that can be shown."""

    def counters(self) -> dict[str, int]:
        """Packets, bytes, kicks, calls and drops since creation; keys end in the unit where it is
        not a count.
        """

    def workers(self) -> list[dict[str, object]]:
        """The threads that move packets now: ``name``, ``tid``, and ``cpu_s``, seconds of CPU that
        it has used.
        """

    def close(self) -> None:
        """Release everything but the outside; stops first. A second call does nothing."""
