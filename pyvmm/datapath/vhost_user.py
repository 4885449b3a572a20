"""The vhost-user data path: another process moves the packets; this is the front-end's side of the
conversation with it.

Theory of operation. A session is one connection: ``_negotiate`` finds out what the back-end can do,
``_configure`` hands it memory and rings when the driver is ready. One lock is held for a
conversation, by a vCPU's thread (``start``, ``stop``) or by the watcher, each of bounded length.
The watcher thread notices the end of a connection, and makes the next one for as long as the data
path lives. Meanwhile the rings are parked: kicks gather in the eventfds, and the guest sees a
pause. A new session starts at used->idx of each ring: exact with an in-flight region, which we keep
for the back-end; without, transmits that were sent but not yet returned are sent again, and receive
loses what was in the back-end's hands.

The back-end is not trusted with the machine's life: it can corrupt the guest, whose memory it has,
but whatever it says or fails to say ends at most its connection.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time

from pyvmm.datapath.base import HandOverTimes
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.fd import EventFd, Fd, eventfds
from pyvmm.hostnet.rtnetlink import PacketCount
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio, virtio_net
from pyvmm.spec.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_RARP,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
    VRING_STATE,
)
from pyvmm.spec.virtio_net import VIRTIO_NET_F_MTU
from pyvmm.threads import Thread
from pyvmm.vhostuser.wire import (
    Channel,
    Closed,
    Listener,
    Message,
    ProtocolError,
    Region,
    TimedOut,
    connect,
    pack_regions,
    protocol_names,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.datapath.base import PathEvents, Vring
    from pyvmm.hostnet.rtnetlink import Link
    from pyvmm.memory import GuestMemory

PROTOCOL_FEATURES = (
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_RARP,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_STATUS,
)
#: Features that are the back-end's to honour; the rest (MAC, STATUS, CTRL_*, MQ) are the device's.
DATA_FEATURES = (
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio_net.VIRTIO_NET_F_CSUM,
    virtio_net.VIRTIO_NET_F_GUEST_CSUM,
    virtio_net.VIRTIO_NET_F_GUEST_TSO4,
    virtio_net.VIRTIO_NET_F_GUEST_TSO6,
    virtio_net.VIRTIO_NET_F_GUEST_ECN,
    virtio_net.VIRTIO_NET_F_GUEST_UFO,
    virtio_net.VIRTIO_NET_F_HOST_TSO4,
    virtio_net.VIRTIO_NET_F_HOST_TSO6,
    virtio_net.VIRTIO_NET_F_HOST_ECN,
    virtio_net.VIRTIO_NET_F_HOST_UFO,
    virtio_net.VIRTIO_NET_F_MRG_RXBUF,
)
DATA_MASK = sum(1 << bit for bit in DATA_FEATURES)
RUNNING = (
    virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | virtio.VIRTIO_CONFIG_S_DRIVER
    | virtio.VIRTIO_CONFIG_S_FEATURES_OK
    | virtio.VIRTIO_CONFIG_S_DRIVER_OK
)
#: feature -> one of these is required for it (virtio 1.2, 5.1.3.1). Some back-ends offer it
#: without.
REQUIRES = (
    (virtio_net.VIRTIO_NET_F_HOST_TSO4, (virtio_net.VIRTIO_NET_F_CSUM,)),
    (virtio_net.VIRTIO_NET_F_HOST_TSO6, (virtio_net.VIRTIO_NET_F_CSUM,)),
    (virtio_net.VIRTIO_NET_F_HOST_UFO, (virtio_net.VIRTIO_NET_F_CSUM,)),
    (
        virtio_net.VIRTIO_NET_F_HOST_ECN,
        (virtio_net.VIRTIO_NET_F_HOST_TSO4, virtio_net.VIRTIO_NET_F_HOST_TSO6),
    ),
    (virtio_net.VIRTIO_NET_F_GUEST_TSO4, (virtio_net.VIRTIO_NET_F_GUEST_CSUM,)),
    (virtio_net.VIRTIO_NET_F_GUEST_TSO6, (virtio_net.VIRTIO_NET_F_GUEST_CSUM,)),
    (virtio_net.VIRTIO_NET_F_GUEST_UFO, (virtio_net.VIRTIO_NET_F_GUEST_CSUM,)),
    (
        virtio_net.VIRTIO_NET_F_GUEST_ECN,
        (virtio_net.VIRTIO_NET_F_GUEST_TSO4, virtio_net.VIRTIO_NET_F_GUEST_TSO6),
    ),
)
#: Seconds between attempts to connect again: doubled each time, up to the second.
RETRY, RETRY_MAX = 0.01, 1.0
PROBLEMS_MAX = 32
COUNTERS = (
    "connections",
    "disconnections",
    "refusals",
    "timeouts",
    "tx_possible_repeats",
    "bad_bases",
    "ring_errors",
    "backend_requests",
    "announcements",
    "parked_ms",
)


class _Session:
    """One connection and what the back-end at its other end can do."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.features = 0
        self.protocol = 0
        self.memory_sent = False
        #: Features, memory and ring size that it has agreed to.
        self.prepared: tuple[int, object, int] | None = None
        self.requests: Channel | None = None

    def has(self, bit: int) -> bool:
        """Whether a protocol feature was negotiated."""
        return bool(self.protocol >> bit & 1)

    def close(self) -> None:
        self.channel.close()
        if self.requests is not None:
            self.requests.close()
            self.requests = None


class VhostUserNet:
    """Implements ``DataPath`` (datapath.base).

    :param path: of the socket. :param server: we listen and the back-end connects, else the other
        way round.
    :param queues: pairs that the back-end must have. :param mtu: bytes that it must agree to, or
        None.
    :param mac: of the card, 6 bytes, for announcing it after a reconnect; may be set later.
    :param timeout: seconds for a whole conversation, such as a start or a stop of the rings.
    :param wait: seconds for the first connection. :param recorder: a ``kvm.recorder.Scope`` for
        every message, or None.
    :param link: gives the link of the tap that the back-end has from us, whose packets are counted
        there; None if the back-end's host side is its own.
    :param dial: makes a connection in place of the socket at ``path``.
    :ivar problems: the last refusals and losses, in words.
    :raises VhostUserError: there is no back-end, or none that fits.
    """

    name = "vhost-user"
    restarts_for_offloads = True  # the back-end learns of them by SET_FEATURES

    def __init__(
        self,
        path: str,
        *,
        server: bool = False,
        queues: int = 1,
        mtu: int | None = None,
        mac: bytes | None = None,
        timeout: float = 5.0,
        wait: float = 10.0,
        recorder: Any = None,
        link: Callable[[], Link] | None = None,
        dial: Callable[[], Channel] | None = None,
    ) -> None:
        self._recorder = recorder
        self.times = HandOverTimes()
        self._packets: PacketCount | None = None
        if link is not None:
            link()  # now, while there is one
            self._packets = PacketCount(link)
        self._dial = dial or (lambda: connect(path))
        self._events: PathEvents | None = None
        self.path, self.queues, self.mtu, self.mac = path, queues, mtu, mac
        self.problems: list[str] = []
        self.timeout = timeout
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._talking: Channel | None = None  # of a conversation that a stop may cut short
        self._deadline = 0.0
        self._required = 0
        self._required_queues = queues
        self._acked = 0
        self._memory: Any = None
        self._rings: list[Vring] = []
        self._inflight: tuple[Fd, bytes] | None = None
        self._held: dict[int, int] = {}  # transmit rings that have been stopped, and where
        self._faulted: set[int] = set()
        self._lost_at = 0
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._closed = False
        self._stopping = threading.Event()
        self._cut = False
        events = eventfds(1 + 2 * queues)
        self._wake, self._errs = events[0], events[1:]
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        try:
            self._listener = Listener(path) if server else None
            self._session = self._first_session(wait)
        except BaseException:
            self.close()
            raise
        self._features = _consistent(self._session.features & DATA_MASK)
        self._thread = Thread(target=self._watch, name="vhost-user", daemon=True)
        self._thread.start()

    # --- talking ----------------------------------------------------------------------------------

    def _begin(self, channel: Channel, patience: float | None = None) -> None:
        """A conversation of at most ``patience`` seconds, by default ``timeout``."""
        self._talking = channel
        self._deadline = time.monotonic() + (self.timeout if patience is None else patience)
        if self._stopping.is_set() or self._cut:
            channel.stop()

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _ask(
        self, s: _Session, request: int, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> Message:
        return s.channel.ask(request, payload, fds, timeout=self._left())

    def _number(self, s: _Session, request: int) -> int:
        message = self._ask(s, request)
        try:
            return message.u64
        finally:
            message.close()

    def _tell(
        self, s: _Session, request: int, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """A request whose success does not matter yet."""
        s.channel.request(request, payload, fds, timeout=self._left())

    def _order(
        self, s: _Session, request: int, what: str, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """A request that must have succeeded before we go on. :raises VhostUserError: it was
        refused.
        """
        if not s.has(VHOST_USER_PROTOCOL_F_REPLY_ACK):
            self._tell(s, request, payload, fds)
            self._number(s, spec.VHOST_USER_GET_FEATURES)  # answered after what came before
            return
        answer = s.channel.ask(request, payload, fds, need_reply=True, timeout=self._left())
        try:
            if answer.u64:
                raise VhostUserError(f"the back-end at {self.path} refuses {what}")
        finally:
            answer.close()

    # --- sessions ---------------------------------------------------------------------------------

    def _first_session(self, wait: float) -> _Session:
        """Connect within ``wait`` seconds. A back-end that does not fit is an error at once."""
        until = time.monotonic() + wait
        delay = RETRY
        while True:
            channel, problem = None, None
            left = until - time.monotonic()
            if self._listener is not None:
                self._pause(max(0.0, left))
                channel = self._listener.accept()
                problem = VhostUserError(
                    f"no back-end has connected to {self.path} in {wait:g} s",
                    "start it as a client, or leave server=on away",
                )
            else:
                try:
                    channel = self._dial()
                except VhostUserError as e:
                    problem = e
            if channel is not None:
                return self._negotiate(channel)
            if left <= 0 and problem is not None:
                raise problem
            if self._listener is None:
                time.sleep(min(delay, max(0.0, left)))
                delay = min(2 * delay, 0.2)

    def _negotiate(self, channel: Channel) -> _Session:
        """Make a session of a connection. :raises VhostUserError: this back-end does not fit; the
        channel is closed.
        """
        s = _Session(channel)
        channel.recorder = self._recorder
        try:
            self._begin(channel)
            s.features = self._number(s, spec.VHOST_USER_GET_FEATURES)
            offered = 0
            if s.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
                offered = self._number(s, spec.VHOST_USER_GET_PROTOCOL_FEATURES)
                s.protocol = offered & sum(1 << bit for bit in PROTOCOL_FEATURES)
                self._tell(s, spec.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", s.protocol))
            queues = 1
            if s.has(VHOST_USER_PROTOCOL_F_MQ):
                # The specification says queues; every implementation for network cards means pairs.
                queues = self._number(s, spec.VHOST_USER_GET_QUEUE_NUM)
            slots = spec.VHOST_MEMORY_BASELINE_NREGIONS
            if s.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
                slots = self._number(s, spec.VHOST_USER_GET_MAX_MEM_SLOTS)
            self._check_offer(s, queues, slots)
            if s.has(VHOST_USER_PROTOCOL_F_BACKEND_REQ):
                self._open_requests(s)
            self._tell(s, spec.VHOST_USER_SET_OWNER)
            s.features &= self._number(s, spec.VHOST_USER_GET_FEATURES)
        except BaseException:
            s.close()
            raise
        finally:
            self._talking = None
        self._counts["connections"] += 1
        return s

    def _check_offer(self, s: _Session, queues: int, slots: int) -> None:
        from pyvmm.virtio.features import names

        where = f"the back-end at {self.path}"
        if not s.features >> virtio.VIRTIO_F_VERSION_1 & 1:
            raise VhostUserError(
                f"{where} does not offer VERSION_1", "use a back-end of virtio 1.0 or later"
            )
        missing = self._required & ~s.features
        if missing:
            raise VhostUserError(
                f"{where} lacks features that the guest uses: {' '.join(names(missing))}",
                "start it as it was before",
            )
        if queues < self.queues:
            raise VhostUserError(
                f"{where} has {queues} queue pairs, not {self.queues}", "use fewer queues="
            )
        if slots < 2:
            raise VhostUserError(f"{where} takes {slots} memory regions, and 2 are needed")
        if self.mtu is not None and not s.has(VHOST_USER_PROTOCOL_F_MTU):
            raise VhostUserError(f"{where} does not take an MTU", "leave mtu= away")

    def _open_requests(self, s: _Session) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        s.requests = Channel(ours)
        try:
            self._order(s, spec.VHOST_USER_SET_BACKEND_REQ_FD, "a channel", fds=[theirs.fileno()])
        finally:
            theirs.close()

    def _lost(self, reason: VhostUserError | str) -> None:
        """The session is over (lock held): park the rings and have the watcher look for another."""
        s, self._session = self._session, None
        if s is None:
            return
        s.close()
        self._held = {}
        self._counts["disconnections"] += 1
        self._counts["timeouts"] += isinstance(reason, TimedOut)
        self._problem(reason)
        self._park()
        self._wake.signal()

    def _park(self) -> None:
        if not self._rings:
            return
        self._lost_at = self._lost_at or time.monotonic_ns()
        if self._inflight is None:
            for ring in self._transmit_rings():
                self._counts["tx_possible_repeats"] += self._avail(ring) - self._used(ring) & 0xFFFF

    def _problem(self, reason: VhostUserError | str) -> None:
        if self.problems[-1:] != [
            str(reason)
        ]:  # a back-end that does not fit may come every second
            self.problems = [*self.problems[1 - PROBLEMS_MAX :], str(reason)]

    # --- rings ------------------------------------------------------------------------------------

    def _transmit_rings(self) -> list[Vring]:
        return [ring for ring in self._rings if ring.index % 2]

    def _avail(self, ring: Vring) -> int:
        return int.from_bytes(self._memory.read(ring.avail + 2, 2), "little")

    def _used(self, ring: Vring) -> int:
        return int.from_bytes(self._memory.read(ring.used + 2, 2), "little")

    def _host(self, gpa: int) -> int:
        """Our address of a guest-physical one, by which the back-end knows rings."""
        for r in self._memory.regions:
            if r.gpa <= gpa < r.gpa + r.size:
                return int(r.host) + gpa - int(r.gpa)
        raise VhostUserError(f"ring at {gpa:#x} is outside RAM")

    def _configure(self, s: _Session, bases: list[int]) -> None:
        """Hand memory and rings to the back-end and let it run. :raises VhostUserError: it will
        not, or cannot.
        """
        size = max(ring.size for ring in self._rings)
        if s.prepared != (self._acked, self._memory, size):
            if s.prepared is not None:
                self._forget_inflight()
            self._introduce(s, self._acked, self._memory, size)
        s.prepared = None
        for ring, base in zip(self._rings, bases, strict=True):
            self._share_ring(s, ring, base)
        if s.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for ring in self._rings:
                state = struct.pack(VRING_STATE, ring.index, 1)
                self._order(s, spec.VHOST_USER_SET_VRING_ENABLE, f"ring {ring.index}", state)
        if s.has(VHOST_USER_PROTOCOL_F_STATUS):
            self._tell(s, spec.VHOST_USER_SET_STATUS, struct.pack("<Q", RUNNING))
        self._number(s, spec.VHOST_USER_GET_FEATURES)  # all of it was taken
        now = time.monotonic_ns()
        for ring in self._rings:
            _signal(ring.kick)
            self.times.began[ring.index] = now

    def _introduce(self, s: _Session, acked: int, memory: GuestMemory, size: int) -> None:
        """MTU, in-flight region, features and memory: what may be said before there are rings (of
        at most ``size`` entries).
        """
        if self.mtu is not None and acked >> VIRTIO_NET_F_MTU & 1:
            self._order(
                s, spec.VHOST_USER_NET_SET_MTU, f"an MTU of {self.mtu}", struct.pack("<Q", self.mtu)
            )
        if s.has(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            self._share_inflight(s, size)
        elif self._inflight is not None:
            self._forget_inflight()  # of another back-end than this one
        features = acked & s.features & DATA_MASK
        if s.features >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            features |= 1 << VHOST_USER_F_PROTOCOL_FEATURES  # without it rings would start enabled
        self._tell(s, spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", features))
        self._share_memory(s, memory)

    def _share_inflight(self, s: _Session, size: int) -> None:
        """Give the back-end the in-flight region of its predecessor, or have it make one."""
        if self._inflight is None:
            request = struct.pack(spec.INFLIGHT, 0, 0, 2 * self.queues, size)
            answer = self._ask(s, spec.VHOST_USER_GET_INFLIGHT_FD, request)
            try:
                mapped, _, _, _ = answer.unpack(spec.INFLIGHT)
                fds = answer.take_fds(0, 1)
                if not fds:
                    return  # it tracks nothing
                self._inflight = (Fd(fds[0]), answer.payload)
                if not mapped:
                    self._forget_inflight()
                    return
            finally:
                answer.close()
        fd, description = self._inflight
        self._order(
            s, spec.VHOST_USER_SET_INFLIGHT_FD, "its in-flight region", description, [fd.fileno()]
        )

    def _forget_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight[0].close()
            self._inflight = None

    def _share_memory(self, s: _Session, memory: GuestMemory) -> None:
        regions = [Region(r.gpa, r.size, r.host, r.offset) for r in memory.regions]
        fd = memory.fd.fileno()
        if not s.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            table = pack_regions(regions)
            self._order(s, spec.VHOST_USER_SET_MEM_TABLE, "our memory", table, [fd] * len(regions))
        elif not s.memory_sent:
            for region in regions:
                payload = bytes(8) + region.pack()
                self._order(s, spec.VHOST_USER_ADD_MEM_REG, "our memory", payload, [fd])
        s.memory_sent = True

    def _share_ring(self, s: _Session, ring: Vring, base: int) -> None:
        """BASE goes before ADDR: some compare it with the used index there. After a stop all is to
        be said again.
        """
        i = ring.index
        self._tell(s, spec.VHOST_USER_SET_VRING_NUM, struct.pack(VRING_STATE, i, ring.size))
        self._tell(s, spec.VHOST_USER_SET_VRING_BASE, struct.pack(VRING_STATE, i, base))
        address = struct.pack(
            spec.VRING_ADDR,
            i,
            0,
            self._host(ring.desc),
            self._host(ring.used),
            self._host(ring.avail),
            0,
        )
        self._tell(s, spec.VHOST_USER_SET_VRING_ADDR, address)
        err = self._errs[i].fileno()
        for request, fd in (
            (spec.VHOST_USER_SET_VRING_ERR, err),
            (spec.VHOST_USER_SET_VRING_KICK, ring.kick.fileno()),
            (spec.VHOST_USER_SET_VRING_CALL, ring.call.fileno()),
        ):
            self._tell(s, request, struct.pack("<Q", i), [fd])

    # --- DataPath ---------------------------------------------------------------------------------

    def features(self) -> int:
        """What the back-end offers of what is a data path's."""
        return self._features

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """MTU, features, in-flight region and memory table, acknowledged.

        :raises VhostUserError: the back-end refuses, or is gone.
        """
        if not rings:
            return
        with self._lock:
            s = self._session
            if s is None:
                raise VhostUserError(f"the back-end at {self.path} is gone", "start it again")
            try:
                self._begin(s.channel)
                size = max(ring.size for ring in rings)
                self._introduce(s, acked, memory, size)
                self._number(s, spec.VHOST_USER_GET_FEATURES)
                s.prepared = acked, memory, size
            except VhostUserError as e:
                self._lost(e)
                raise
            finally:
                self._talking = None

    def problem(self) -> str:
        """Why no back-end serves the rings."""
        with self._lock:
            if not self._rings or self._session is not None:
                return ""
            return self.problems[-1] if self.problems else "no back-end"

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Have the back-end serve the rings. Where it is gone or fails, the rings are parked until
        there is one that does.
        """
        if not rings:  # the driver has enabled none
            return
        if self._packets is not None:
            self._packets.start()
        with self._lock:
            self.times.began, self._held = {}, {}
            self._acked, self._memory, self._rings = acked, memory, list(rings)
            self._events = events
            self._required = acked & self._features
            self._faulted = set()
            for err in self._errs:
                err.drain()
            s = self._session
            if s is None:
                self._park()
                return
            try:
                self._begin(s.channel, patience)
                self._configure(s, [ring.base for ring in rings])
            except PyvmmError as e:
                self._lost(str(e) if not isinstance(e, VhostUserError) else e)
            finally:
                self._talking = None
        self._wake.signal()

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Take the rings back. A back-end that does not give them is cut off, and the used indices
        are the positions.
        """
        self._stopping.set()
        talking = self._talking
        if talking is not None:
            talking.stop()  # the watcher is setting up what we are about to stop
        with self._lock:
            self._stopping.clear()
            rings = self._rings
            if not rings:
                return []
            bases: list[int] = []
            s, held = self._session, self._held
            if s is not None:
                try:
                    self._begin(s.channel, patience)
                    bases = [
                        held[r.index] if r.index in held else self._stop_ring(s, r) for r in rings
                    ]
                    if s.has(VHOST_USER_PROTOCOL_F_STATUS):
                        self._tell(s, spec.VHOST_USER_SET_STATUS, bytes(8))
                    if s.has(VHOST_USER_PROTOCOL_F_RESET_DEVICE):
                        self._tell(s, spec.VHOST_USER_RESET_DEVICE)
                except VhostUserError as e:
                    self._lost(e)
                finally:
                    self._talking = None
            bases += [self._used(ring) for ring in rings[len(bases) :]]
            self._rings = []
            self._events = None
            self._required = 0
            self._forget_inflight()
            self._unparked()
        if self._packets is not None:
            self._packets.stop()
        return bases

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Take back the transmit rings. (DPDK stops receiving, too.)

        :raises VhostUserError: it does not give them.
        """
        with self._lock:
            s = self._session
            if s is None:
                return
            try:
                self._begin(s.channel, patience)
                for ring in self._transmit_rings():
                    self._held[ring.index] = self._stop_ring(s, ring)
            except VhostUserError as e:
                self._lost(e)
                raise
            finally:
                self._talking = None

    def send_rarp(self, mac: bytes) -> bool:
        """Ask the back-end to tell its network where ``mac`` is (SEND_RARP); whether it does."""
        with self._lock:
            s = self._session
            if s is None or not s.has(VHOST_USER_PROTOCOL_F_RARP):
                return False
            try:
                self._begin(s.channel)
                self._order(s, spec.VHOST_USER_SEND_RARP, "an announcement", mac + bytes(2))
                self._counts["announcements"] += 1
            except VhostUserError as e:
                self._problem(e)
                return False
            finally:
                self._talking = None
        return True

    def _stop_ring(self, s: _Session, ring: Vring) -> int:
        self.times.asked[ring.index] = time.monotonic_ns()
        answer = self._ask(
            s, spec.VHOST_USER_GET_VRING_BASE, struct.pack(VRING_STATE, ring.index, 0)
        )
        try:
            index, base = answer.unpack(VRING_STATE)
        finally:
            answer.close()
        if index != ring.index:
            raise ProtocolError(
                f"GET_VRING_BASE of ring {ring.index} was answered for ring {index}"
            )
        used, avail = self._used(ring), self._avail(ring)
        if base > 0xFFFF or avail - base & 0xFFFF > ring.size or base - used & 0xFFFF > ring.size:
            self._counts["bad_bases"] += 1
            return used
        return base

    def workers(self) -> list[dict[str, object]]:
        """None here: they are in the other process."""
        return []

    def counters(self) -> dict[str, int]:
        """Connections, losses and what they cost. Packets are counted on our tap, else by the
        back-end.
        """
        packets = self._packets.read() if self._packets is not None else {}
        with self._lock:
            out = {**packets, **self._counts}
            if self._lost_at:
                out["parked_ms"] += (time.monotonic_ns() - self._lost_at) // 1000000
        return out

    def cut(self) -> None:
        """End the conversation that is under way, and allow no other. Any thread; takes no lock."""
        self._cut = True
        talking = self._talking
        if talking is not None:
            talking.stop()

    def close(self) -> None:
        """Stop, disconnect and release everything. A second call does nothing."""
        if self._closed:
            return
        self.stop()
        self._closed = True
        self._stopping.set()
        talking = self._talking
        if talking is not None:
            talking.stop()
        self._wake.signal()
        if self._thread is not None:
            self._thread.join()
        if self._session is not None:
            self._session.close()
        if self._listener is not None:
            self._listener.close()
        self._forget_inflight()
        for event in (self._wake, *self._errs):
            event.close()

    # --- the watcher ------------------------------------------------------------------------------

    def _watch(self) -> None:
        delay = RETRY
        while not self._closed:
            if self._session is None:
                if self._reconnect():
                    delay = RETRY
                else:
                    self._pause(None if self._listener is not None else delay)
                    delay = min(2 * delay, RETRY_MAX)
                continue
            self._listen()

    def _pause(self, seconds: float | None) -> None:
        """Wait for the time, for ``close``, or for somebody to connect."""
        poll = select.poll()
        poll.register(self._wake.fileno(), select.POLLIN)
        if self._listener is not None:
            poll.register(self._listener.fileno(), select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        self._wake.drain()

    def _listen(self) -> None:
        """Wait for something to happen on a connection that should be silent."""
        with self._lock:
            s = self._session
            if s is None:
                return
            poll = select.poll()
            requests = s.requests
            for fd in (self._wake, s.channel, requests, *self._errs):
                if fd is not None:
                    poll.register(fd.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._wake.fileno() in ready:
            self._wake.drain()
            return
        for ring, err in enumerate(self._errs):
            if err.fileno() in ready:
                err.drain()
                self._ring_error(ring)
        with self._lock:
            if self._session is not s:
                return
            if requests is not None and requests is s.requests and requests.fileno() in ready:
                self._serve_request(s, requests)
            if s.channel.fileno() in ready:
                self._check_silence(s)

    def _check_silence(self, s: _Session) -> None:
        """What made the channel readable may have been an answer that has been taken since (lock
        held).
        """
        poll = select.poll()
        poll.register(s.channel.fileno(), select.POLLIN)
        if not poll.poll(0):
            return
        try:
            message = s.channel.receive(0.1)
            message.close()
            self._lost(ProtocolError(f"the back-end says {message.name} unasked"))
        except VhostUserError as e:
            self._lost(e)

    def _serve_request(self, s: _Session, requests: Channel) -> None:
        """A request of the back-end's: acknowledged where we know it, else refused. A bad one ends
        that channel only.
        """
        known = (spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,)
        try:
            message = requests.receive(0.1)
            try:
                self._counts["backend_requests"] += 1
                if message.need_reply:
                    verdict = struct.pack("<Q", message.request not in known)
                    requests.reply(message, verdict, timeout=0.1)
            finally:
                message.close()
        except Closed:
            requests.close()
            s.requests = None
        except PyvmmError as e:
            self._problem(f"the back-end's own channel is closed: {e}")
            requests.close()
            s.requests = None

    def _ring_error(self, ring: int) -> None:
        """The back-end has found a ring malformed: what the emulated path does, too; once a
        start.
        """
        with self._lock:
            self._counts["ring_errors"] += 1
            events = self._events if ring not in self._faulted else None
            self._faulted.add(ring)
        if events is not None:
            events.fault(ring, f"queue {ring}: the vhost-user back-end has found it malformed")

    def _reconnect(self) -> bool:
        """Try once to have a session again and to resume in it."""
        try:
            if self._listener is not None:
                channel = self._listener.accept()
                if channel is None:
                    return False
            else:
                channel = self._dial()
        except PyvmmError:
            return False  # not there yet
        with self._lock:
            s = None
            try:
                s = self._negotiate(channel)
                if self._rings:
                    self._begin(s.channel)
                    self._configure(s, [self._used(ring) for ring in self._rings])
                    self._announce(s)
                    for ring in self._rings:
                        _signal(ring.call)  # what the old one returned without saying so
                self._session = s
                self._unparked()
                return True
            except PyvmmError as e:
                if s is not None:
                    s.close()
                self._counts["refusals"] += 1
                self._problem(f"not resumed: {e}")
                return False
            finally:
                self._talking = None

    def _announce(self, s: _Session) -> None:
        if self.mac is not None and s.has(VHOST_USER_PROTOCOL_F_RARP):
            self._tell(s, spec.VHOST_USER_SEND_RARP, self.mac + bytes(2))
            self._counts["announcements"] += 1

    def _unparked(self) -> None:
        if self._lost_at:
            self._counts["parked_ms"] += (time.monotonic_ns() - self._lost_at) // 1000000
            self._lost_at = 0

    @property
    def connected(self) -> bool:
        """Whether there is a session with the back-end."""
        return self._session is not None

    def report(self) -> dict[str, object]:
        """For the machine's report: who is at the other end, and what went wrong with it."""
        with self._lock:
            s = self._session
            return {
                "socket": self.path,
                "connected": s is not None,
                "protocol_features": protocol_names(s.protocol) if s else [],
                "inflight": self._inflight is not None,
                "problems": list(self.problems),
            }


def _consistent(features: int) -> int:
    """Without what lacks something that it requires."""
    for bit, needs in REQUIRES:
        if not any(features >> need & 1 for need in needs):
            features &= ~(1 << bit)
    return features


def _signal(event: EventFd) -> None:
    try:
        os.eventfd_write(event.fileno(), 1)
    except BlockingIOError:
        pass  # full of signals
