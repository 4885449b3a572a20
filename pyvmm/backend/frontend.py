"""One front-end as the back-end serves it: the connection, the state that belongs to it, and the
answer to each message.

A :class:`Frontend` lives as long as its connection. Features, memory, rings and in-flight regions
that the front-end has told end with it. The :class:`Service` knows the kind of device: it says
which features there are, serves the rings, and answers the messages that only this kind has.

The messages of a front-end are checked like a guest's writes: a front-end may end its own session,
but nothing else.

The rings are parked (nobody serves them) before anything changes that the service uses. They are
served again, from where they were, when no message waits: a front-end sends a whole series of
messages at once, and the rings need not start in between.
"""

from __future__ import annotations

import os
import struct
import threading

from pyvmm.backend.memory import SLOTS_MAX, DirtyLog, FileMapping, InflightRegions, MemoryTable
from pyvmm.datapath.base import RingLog, Vring
from pyvmm.datapath.ringformat import PACKED, SPLIT, ring_format
from pyvmm.errors import HostError, VhostUserError
from pyvmm.fd import Fd, memfd, nudge
from pyvmm.hostnet.rights import close_all
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.vhost_user import (
    VHOST_F_LOG_ALL,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
    VHOST_USER_VRING_IDX_MASK,
    VHOST_USER_VRING_NOFD_MASK,
    VHOST_VRING_F_LOG,
    VRING_STATE,
)
from pyvmm.spec.virtio import VRING_SIZE_MAX
from pyvmm.vhostuser.wire import ProtocolError, Region, readable, unpack_regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Protocol

    from pyvmm.datapath.base import PathEvents
    from pyvmm.vhostuser.wire import Channel, Message

    #: Payload and descriptors of an answer. The descriptors are closed once they are sent.
    Answer = tuple[bytes, list[Fd]]
    Handler = Callable[["Frontend", Message], Answer | None]

    class Service(Protocol):
        """Serves the rings of one kind of virtio device, such as ``pyvmm.backend.net.NetService``.

        :ivar name: what the log calls the service's outside, such as a tap's name.
        :ivar rings: how many a front-end may set up.
        :ivar queue_num: answer to GET_QUEUE_NUM. Network cards count pairs, other devices rings.
        :ivar in_order: whether chains are returned in the order in which they were taken.
        :ivar protocol_features: mask of those that belong to this kind of device.
        :ivar requests: the messages that belong to this kind of device.
        """

        name: str
        rings: int
        queue_num: int
        in_order: bool
        protocol_features: int
        requests: Mapping[int, Handler]

        def features(self) -> int:
            """The virtio feature bits that can be offered."""

        def check_features(self, acked: int) -> None:
            """:raises ProtocolError: a front-end may not choose these."""

        def start(
            self, acked: int, memory: Any, rings: Sequence[Vring], events: PathEvents
        ) -> None:
            """Serve these rings, all or none. :raises PyvmmError: none is served."""

        def stop(self) -> list[int]:
            """After ``start``: stop serving; returns each ring's next available index, in the order
            of ``start``. Nothing touches the front-end's memory after it returns. If an exception
            came out of it, it is called again, and may return nothing.
            """

        def counters(self) -> dict[str, int]:
            """What was done so far. Any thread."""

        def close(self) -> None:
            """Release everything."""


PROTOCOL_FEATURES = (
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_STATUS,
)
#: The largest file of an in-flight region or a log, and the largest offset in it, in bytes.
FILE_MAX = 1 << 32
COUNTERS = ("messages", "refused", "faults", "bases_corrected")


class NoEventFd:
    """In place of an eventfd that the front-end does not want to be signalled."""

    def fileno(self) -> int:
        """-1, because there is no descriptor."""
        return -1


class FrontendRing:
    """What a front-end has told of one ring.

    :ivar addresses: of the descriptor table, the used ring and the available ring, as the
        front-end has them mapped.
    :ivar log: the guest-physical address under which writes to the used ring are marked in the log;
        None: they are not.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick: Fd | None = None
        self.call: Fd | None = None
        self.err: Fd | None = None
        self.enabled = False
        self._caught_up = False
        self.forget()

    def forget(self) -> None:
        """Forget all but whether the ring is enabled."""
        self.size = 0
        self.base: int | None = None  # the front-end has not said
        self.addresses: tuple[int, int, int] | None = None
        self.log: int | None = None
        for name in ("kick", "call", "err"):
            self.set_fd(name, None)

    def set_fd(self, name: str, fd: int | None) -> None:
        """Take over a descriptor in place of the old one."""
        old = getattr(self, name)
        setattr(self, name, None if fd is None else Fd(fd))
        if old is not None:
            old.close()

    def catch_up(self) -> None:
        """Interrupt the guest once per connection, before the ring is served. The back-end before
        us may have been killed when it had returned chains and not signalled yet. The guest waits
        for that interrupt, and no other may come, because no chain is left in the ring.
        """
        if self.call is not None and not self._caught_up:
            self._caught_up = True
            nudge(self.call.fileno())

    @property
    def ready(self) -> bool:
        """Whether the ring can be served."""
        return bool(self.enabled and self.size and self.addresses and self.kick)


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd. No other is taken from a front-end: a write could block the
    worker, or reach somebody else's file.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"  # noqa: PTH115
    except OSError:
        return False


class Frontend:
    """A connected front-end. ``serve`` and ``close`` are for one thread.

    :param channel: owned from here on. :param service: lent; it serves the rings.
    :param features, protocol_features: masks of the features that are offered.
    :param counts: the keys of :data:`COUNTERS` are counted up. :param log: gets one line about each
        refusal and fault.
    :param unsealed: take memory files that the front-end can make shorter, which would end this
        process.
    :ivar acked: features that the front-end has chosen; :ivar protocol: likewise protocol features.
    """

    def __init__(
        self,
        channel: Channel,
        service: Service,
        features: int,
        protocol_features: int,
        counts: dict[str, int],
        log: Callable[[str], None],
        *,
        unsealed: bool = False,
    ) -> None:
        self.channel, self.service = channel, service
        self.features, self.protocol_features = features, protocol_features
        self._counts, self.log = counts, log
        self.acked = self.protocol = self.status = 0
        self._unsealed = unsealed
        self.memory = MemoryTable(unsealed=unsealed)
        self.inflight: InflightRegions | None = None
        self.log_map: DirtyLog | None = None
        self._log_call: Fd | None = None
        self.rings = [FrontendRing(i) for i in range(service.rings)]
        self._served: list[FrontendRing] = []
        self._changed = True  # since the rings were last started
        self._mutex = threading.Lock()  # guards the rings' eventfds against the service's threads

    # --- PathEvents -------------------------------------------------------------------------------

    def fault(self, queue: int, problem: str) -> None:
        """A ring is malformed: tell the front-end by the ring's error eventfd. Any thread."""
        with self._mutex:
            self._counts["faults"] += 1
            err = self.rings[queue].err if queue >= 0 else None
            if err is not None:
                nudge(err.fileno())
        self.log(f"fault: {problem}")

    def link(self, up: bool) -> None:
        """The interface behind the service is gone or back. Any thread."""
        self.log(f"{self.service.name} is {'back' if up else 'gone'}")

    # --- rings ------------------------------------------------------------------------------------

    def park(self) -> None:
        """Stop serving the rings, so that anything may change. ``resume`` serves them from the
        same positions.
        """
        self._changed = True
        if self._served:
            # If an exception comes out of the service's stop, such as KeyboardInterrupt, ``close``
            # stops it again: nobody may use memory that is about to be unmapped.
            for ring, base in zip(self._served, self.service.stop(), strict=False):
                ring.base = base
            self._served = []

    def resume(self) -> None:
        """Serve the rings that are ready. Does nothing if nothing has changed."""
        if not self._changed:
            return
        self._changed = False
        ready = [ring for ring in self.rings if ring.ready and self.memory.regions]
        if self._must_log and ready and not self._can_log():
            ready = []
        vrings = [self._vring(ring) for ring in ready]
        for ring in ready:
            ring.catch_up()
        if vrings:
            self.service.start(self.acked, self.memory, vrings, self)
            self._served = ready

    def _vring(self, ring: FrontendRing) -> Vring:
        """The ring as a data path takes it."""
        assert ring.addresses is not None
        form = ring_format(self.acked)
        first, second, third = form.areas(ring.size)
        desc, used, avail = (
            self.memory.gpa(user, f"ring {ring.index}: {area.name}")
            for user, area in zip(ring.addresses, (first, third, second), strict=True)
        )
        ring.base = form.start if ring.base is None else form.whole(ring.base)
        if self.service.in_order and form is SPLIT:
            self._correct_base(ring, used)
        call: Any = ring.call or NoEventFd()
        kick: Any = ring.kick
        vring = Vring(ring.index, ring.size, desc, avail, used, ring.base, kick, call, form)
        if self.inflight is not None:
            packed = form is PACKED
            vring.inflight = self.inflight.region(ring.index, ring.size, packed=packed)
        if self._must_log and self.log_map is not None:
            dirty = self.log_map
            vring.log = RingLog(dirty.bits, dirty.size, ring.log, self._log_call)
        return vring

    @property
    def _must_log(self) -> bool:
        """Whether each page that is written has to be marked, because the guest migrates."""
        return bool(self.acked >> VHOST_F_LOG_ALL & 1)

    def _can_log(self) -> bool:
        """Whether there is a log. A front-end that starts the rings while its guest migrates gives
        us the log last (QEMU's vhost_dev_start); until then a write would be missed.
        """
        if self.log_map is None:
            self.log("migration: the rings wait for the log (SET_LOG_BASE)")
            return False
        if self.log_map.end < self.memory.end:
            self.log(
                f"migration: the log ends at {self.log_map.end:#x}, the memory at"
                f" {self.memory.end:#x}: pages in between are not marked"
            )
        return True

    def _correct_base(self, ring: FrontendRing, used: int) -> None:
        """Start at the used index of a split ring. If chains are finished in order, it alone is the
        position. (Only the in-flight notes tell that of a packed ring.)

        After a back-end has died, front-ends may say another one: DPDK's virtio-user always says 0.
        """
        idx = self.memory.read_u16(used + 2)
        if idx is not None and idx != ring.base:
            self._counts["bases_corrected"] += 1
            self.log(f"ring {ring.index} starts at its used index {idx}, not at {ring.base}")
            ring.base = idx

    def _reset(self) -> None:
        """Park the rings and forget them."""
        self.park()
        with self._mutex:
            for ring in self.rings:
                ring.forget()
                ring.enabled = False

    # --- the connection ---------------------------------------------------------------------------

    def serve(self, door: int = -1, knocked: Callable[[], None] | None = None) -> None:
        """Answer messages and serve rings until the connection ends.

        :param door: a descriptor to watch while the front-end says nothing.
        :param knocked: called when that is readable.
        :raises Closed: the front-end has left. :raises Stopped: ``channel.stop`` was called.
        :raises PyvmmError: it broke the protocol, or was refused something and had not asked to be
            told.
        """
        while True:
            if not readable([self.channel.fileno()], 0):  # no message waits
                self.resume()
            while self.channel.fileno() not in readable([self.channel.fileno(), door], None):
                assert knocked is not None
                knocked()
            message = self.channel.receive()
            try:
                self._handle(message)
            finally:
                message.close()

    def close(self) -> None:
        """Park the rings, and release all that came with the connection. A second call does
        nothing.
        """
        self._reset()
        self.memory.clear()
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None
        self._use_log(None)
        self._use_log_call(None)
        self.channel.close()

    def _handle(self, message: Message) -> None:
        self._counts["messages"] += 1
        handler = HANDLERS.get(message.request) or self.service.requests.get(message.request)
        try:
            if handler is None:
                raise ProtocolError(f"{message.name} is not supported")
            answer = handler(self, message)
        except VhostUserError as e:
            self._counts["refused"] += 1
            if not self._wants_acknowledgement(message):
                raise
            self.log(f"refused: {e.cause}")
            self.channel.reply(message, struct.pack("<Q", 1))
            return
        if answer is not None:
            payload, fds = answer
            try:
                self.channel.reply(message, payload, [fd.fileno() for fd in fds])
            finally:
                for fd in fds:
                    fd.close()
        elif self._wants_acknowledgement(message):
            # An acknowledgement says that the message has taken effect.
            if message.request == spec.VHOST_USER_SET_VRING_ENABLE:
                self.resume()
            self.channel.reply(message, bytes(8))

    def _wants_acknowledgement(self, message: Message) -> bool:
        return message.need_reply and bool(self.protocol >> VHOST_USER_PROTOCOL_F_REPLY_ACK & 1)

    # --- messages ---------------------------------------------------------------------------------

    def _get_features(self, m: Message) -> Answer:
        return struct.pack("<Q", self.features), []

    def _set_features(self, m: Message) -> None:
        bits = m.u64
        if bits & ~self.features:
            raise ProtocolError(
                f"SET_FEATURES with {bits & ~self.features:#x}, which is not offered"
            )
        self.service.check_features(bits)
        self.park()
        self.acked = bits
        if not bits >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for ring in self.rings:
                ring.enabled = True

    def _get_protocol_features(self, m: Message) -> Answer:
        return struct.pack("<Q", self.protocol_features), []

    def _set_protocol_features(self, m: Message) -> None:
        bits = m.u64
        if bits & ~self.protocol_features:
            raise ProtocolError(
                f"SET_PROTOCOL_FEATURES with {bits & ~self.protocol_features:#x}, not offered"
            )
        self.protocol = bits

    def _set_owner(self, m: Message) -> None:
        m.take_fds(0, 0)

    def _reset_owner(self, m: Message) -> None:
        self.park()
        for ring in self.rings:
            ring.enabled = False

    def _set_mem_table(self, m: Message) -> None:
        regions = unpack_regions(m.payload)
        fds = m.take_fds(0, len(m.fds))
        try:
            if len(fds) != len(regions):
                raise ProtocolError(
                    f"SET_MEM_TABLE of {len(regions)} regions with {len(fds)} descriptors"
                )
            self.park()
            self.memory.clear()
            try:
                for region, fd in zip(regions, fds, strict=True):
                    self.memory.add(region, fd)
            except VhostUserError:
                self.memory.clear()
                raise
        finally:
            close_all(fds)

    def _get_max_mem_slots(self, m: Message) -> Answer:
        return struct.pack("<Q", SLOTS_MAX), []

    def _add_mem_reg(self, m: Message) -> None:
        _, *fields = m.unpack(spec.MEM_SINGLE)
        (fd,) = m.take_fds(1, 1)
        with Fd(fd):
            self.park()
            self.memory.add(Region(*fields), fd)

    def _rem_mem_reg(self, m: Message) -> None:
        _, *fields = m.unpack(spec.MEM_SINGLE)
        close_all(m.take_fds(0, 1))  # some front-ends send one, and it is to be tolerated
        self.park()
        self.memory.remove(Region(*fields))

    def _ring(self, index: int, m: Message) -> FrontendRing:
        if index >= len(self.rings):
            raise ProtocolError(f"{m.name} for ring {index}, but there are {len(self.rings)}")
        return self.rings[index]

    def _set_vring_num(self, m: Message) -> None:
        index, num = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        if num > VRING_SIZE_MAX or not ring_format(self.acked).allows(num):
            raise ProtocolError(f"ring {index} of {num} entries")
        self.park()
        ring.size = num

    def _set_vring_addr(self, m: Message) -> None:
        index, flags, desc, used, avail, log = m.unpack(spec.VRING_ADDR)
        ring = self._ring(index, m)
        if flags & ~(1 << VHOST_VRING_F_LOG) or (flags and not self._logs):
            raise ProtocolError(f"ring {index} with flags {flags:#x}")
        if self.memory.regions:
            for user in (desc, used, avail):
                self.memory.gpa(user, f"ring {index}")
        self.park()
        ring.addresses = (desc, used, avail)
        ring.log = log if flags else None

    def _set_vring_base(self, m: Message) -> None:
        index, base = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        if base > 0xFFFF and ring_format(self.acked) is SPLIT:
            raise ProtocolError(f"ring {index} with base {base:#x}")
        self.park()
        ring.base = base

    def _get_vring_base(self, m: Message) -> Answer:
        index, _ = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        self.park()
        base = ring.base
        with self._mutex:
            ring.forget()
        ring.base = base
        said = ring_format(self.acked).start if base is None else base
        return struct.pack(VRING_STATE, index, said), []

    def _set_vring_fd(self, m: Message, name: str) -> None:
        value = m.u64
        ring = self._ring(value & VHOST_USER_VRING_IDX_MASK, m)
        none = bool(value & VHOST_USER_VRING_NOFD_MASK)
        fds = m.take_fds(0, 0) if none else m.take_fds(1, 1)
        try:
            if none and name == "kick":
                raise ProtocolError(
                    f"ring {ring.index} without a kick descriptor: polling is not supported"
                )
            if fds and not is_eventfd(fds[0]):
                raise ProtocolError(f"{m.name} with a descriptor that is no eventfd")
            self.park()
        except BaseException:
            close_all(fds)
            raise
        with self._mutex:
            ring.set_fd(name, fds[0] if fds else None)

    def _set_vring_kick(self, m: Message) -> None:
        self._set_vring_fd(m, "kick")

    def _set_vring_call(self, m: Message) -> None:
        self._set_vring_fd(m, "call")

    def _set_vring_err(self, m: Message) -> None:
        self._set_vring_fd(m, "err")

    def _set_vring_enable(self, m: Message) -> None:
        index, on = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        if ring.enabled != bool(on):
            self.park()
            ring.enabled = bool(on)

    def _get_queue_num(self, m: Message) -> Answer:
        return struct.pack("<Q", self.service.queue_num), []

    def _get_inflight_fd(self, m: Message) -> Answer:
        _, _, queues, queue_size = m.inflight()
        size = self._inflight_size(queues, queue_size)
        self.park()
        try:
            file = memfd("pyvmm-inflight", size)
        except OSError as e:
            raise HostError(f"cannot make an in-flight region: {e.strerror}") from e
        try:
            self._use_inflight(file.fileno(), size, 0, queues, queue_size)
        except BaseException:
            file.close()
            raise
        answer = struct.pack(spec.INFLIGHT, size, 0, queues, queue_size)
        return answer[: len(m.payload)], [file]  # whoever sends no padding expects none

    def _set_inflight_fd(self, m: Message) -> None:
        size, offset, queues, queue_size = m.inflight()
        (fd,) = m.take_fds(1, 1)
        with Fd(fd):
            if (
                size < self._inflight_size(queues, queue_size)
                or size > FILE_MAX
                or offset > FILE_MAX
                or offset % 8
            ):
                raise ProtocolError(
                    f"in-flight region of {size} bytes at {offset} for {queues} queues"
                )
            self.park()
            self._use_inflight(fd, size, offset, queues, queue_size)

    def _inflight_size(self, queues: int, queue_size: int) -> int:
        if not 0 < queues <= len(self.rings) or not 0 < queue_size <= VRING_SIZE_MAX:
            raise ProtocolError(f"in-flight regions for {queues} queues of {queue_size}")
        packed = ring_format(self.acked) is PACKED
        return queues * InflightRegions.stride(queue_size, packed=packed)

    def _use_inflight(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        mapping = FileMapping(fd, offset + size, unsealed=self._unsealed)
        if self.inflight is not None:
            self.inflight.close()
        self.inflight = InflightRegions(mapping, size, offset, queues, queue_size)

    @property
    def _logs(self) -> bool:
        """Whether the front-end may have us log, for which it needs a log that can be shared."""
        return bool(self.protocol >> VHOST_USER_PROTOCOL_F_LOG_SHMFD & 1)

    def _set_log_base(self, m: Message) -> Answer:
        size, offset = m.unpack(spec.LOG)
        if not self._logs:
            raise ProtocolError("SET_LOG_BASE without LOG_SHMFD")
        (fd,) = m.take_fds(1, 1)
        with Fd(fd):
            if not 0 < size <= FILE_MAX or offset > FILE_MAX:
                raise ProtocolError(f"a log of {size} bytes at {offset}")
            mapping = FileMapping(fd, offset + size, unsealed=self._unsealed)
        self.park()
        self._use_log(DirtyLog(mapping, size, offset))
        return bytes(8), []  # answered without NEED_REPLY, too

    def _set_log_fd(self, m: Message) -> None:
        (fd,) = m.take_fds(1, 1)
        call = Fd(fd)
        try:
            if not self._logs or not is_eventfd(fd):
                raise ProtocolError("SET_LOG_FD without LOG_SHMFD, or without an eventfd")
            self.park()
        except BaseException:
            call.close()
            raise
        self._use_log_call(call)

    def _use_log(self, log: DirtyLog | None) -> None:
        """Mark pages there from now on; the rings are parked."""
        old, self.log_map = self.log_map, log
        if old is not None:
            old.close()

    def _use_log_call(self, call: Fd | None) -> None:
        old, self._log_call = self._log_call, call
        if old is not None:
            old.close()

    def _set_status(self, m: Message) -> None:
        self.status = m.u64 & 0xFF
        if not self.status:
            self.park()
            # QEMU resets the status first and then asks for the positions, which it migrates.
            bases = [ring.base for ring in self.rings]
            self._reset()
            for ring, base in zip(self.rings, bases, strict=True):
                ring.base = base

    def _get_status(self, m: Message) -> Answer:
        return struct.pack("<Q", self.status), []

    def _reset_device(self, m: Message) -> None:
        self._reset()
        self.status = 0


HANDLERS: dict[int, Handler] = {
    spec.VHOST_USER_GET_FEATURES: Frontend._get_features,
    spec.VHOST_USER_SET_FEATURES: Frontend._set_features,
    spec.VHOST_USER_GET_PROTOCOL_FEATURES: Frontend._get_protocol_features,
    spec.VHOST_USER_SET_PROTOCOL_FEATURES: Frontend._set_protocol_features,
    spec.VHOST_USER_SET_OWNER: Frontend._set_owner,
    spec.VHOST_USER_RESET_OWNER: Frontend._reset_owner,
    spec.VHOST_USER_SET_MEM_TABLE: Frontend._set_mem_table,
    spec.VHOST_USER_GET_MAX_MEM_SLOTS: Frontend._get_max_mem_slots,
    spec.VHOST_USER_ADD_MEM_REG: Frontend._add_mem_reg,
    spec.VHOST_USER_REM_MEM_REG: Frontend._rem_mem_reg,
    spec.VHOST_USER_SET_VRING_NUM: Frontend._set_vring_num,
    spec.VHOST_USER_SET_VRING_ADDR: Frontend._set_vring_addr,
    spec.VHOST_USER_SET_VRING_BASE: Frontend._set_vring_base,
    spec.VHOST_USER_GET_VRING_BASE: Frontend._get_vring_base,
    spec.VHOST_USER_SET_VRING_KICK: Frontend._set_vring_kick,
    spec.VHOST_USER_SET_VRING_CALL: Frontend._set_vring_call,
    spec.VHOST_USER_SET_VRING_ERR: Frontend._set_vring_err,
    spec.VHOST_USER_SET_VRING_ENABLE: Frontend._set_vring_enable,
    spec.VHOST_USER_GET_QUEUE_NUM: Frontend._get_queue_num,
    spec.VHOST_USER_GET_INFLIGHT_FD: Frontend._get_inflight_fd,
    spec.VHOST_USER_SET_INFLIGHT_FD: Frontend._set_inflight_fd,
    spec.VHOST_USER_SET_LOG_BASE: Frontend._set_log_base,
    spec.VHOST_USER_SET_LOG_FD: Frontend._set_log_fd,
    spec.VHOST_USER_SET_STATUS: Frontend._set_status,
    spec.VHOST_USER_GET_STATUS: Frontend._get_status,
    spec.VHOST_USER_RESET_DEVICE: Frontend._reset_device,
}
