"""A vhost-user-net back-end of our own: the same C worker as the emulated data path, in another
process than the machine.

A :class:`Backend` has a port (a tap, see also vu_ports) and serves one front-end after another.
What a front-end sends is checked as a guest's doing is: it may end its session, but nothing else.
(One thing is beyond checking: a front-end that truncates its memory file under us; files that are
sealed against that are safe.)
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading

from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import Vring, by_pair
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError, PyvmmError, VhostUserError
from pyvmm.fd import EventFd, Fd, memfd
from pyvmm.hostnet.frames import HEADER as NET_HEADER
from pyvmm.hostnet.frames import rarp
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio_net
from pyvmm.spec.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_RARP,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
    VHOST_USER_VRING_IDX_MASK,
    VHOST_USER_VRING_NOFD_MASK,
    VRING_STATE,
)
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1
from pyvmm.vhostuser.wire import (
    Channel,
    Closed,
    Listener,
    Message,
    ProtocolError,
    Region,
    Stopped,
    connect,
    unpack_regions,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PROTOCOL_FEATURES = (
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_RARP,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_STATUS,
)
#: Features that the front-end serves, but offers only if the back-end does, too.
FRONT_END_FEATURES = (
    virtio_net.VIRTIO_NET_F_CTRL_VQ,
    virtio_net.VIRTIO_NET_F_CTRL_RX,
    virtio_net.VIRTIO_NET_F_MQ,
    virtio_net.VIRTIO_NET_F_MTU,
    virtio_net.VIRTIO_NET_F_GUEST_ANNOUNCE,
)
QUEUES_MAX = 32  # pairs: 64 rings
#: Total bytes that a front-end may have us map.
MEMORY_MAX = 1 << 46
#: Of in-flight regions, as other back-ends have it.
INFLIGHT_ALIGN = 64


class _NoFd:
    """In place of an eventfd that the front-end does not want to be signalled."""

    def fileno(self) -> int:
        return -1


class _Mapping:
    """A shared mapping of the first bytes of a file. :raises VhostUserError: the file is shorter,
    or cannot be mapped.
    """

    def __init__(self, fd: int, size: int) -> None:
        try:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as e:
            raise ProtocolError(f"cannot map {size} bytes of a memory file: {e}") from e
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        self.size = size
        self.host = int(ffi.cast("uintptr_t", self._buffer))

    def close(self) -> None:
        ffi.release(self._buffer)
        self._map.close()


class _Memory:
    """A front-end's memory table, mapped: stands in for ``GuestMemory`` before a data path
    (``c``).
    """

    def __init__(self) -> None:
        self.regions: list[tuple[Region, _Mapping]] = []
        self.c = ffi.new("struct pv_memory *")

    def add(self, region: Region, fd: int) -> None:
        """Map one more. :raises ProtocolError: empty, too large, overlapping another, or not in its
        file.
        """
        end = region.offset + region.size
        total = sum(r.size for r, _ in self.regions)
        if not region.size or end > MEMORY_MAX or total + region.size > MEMORY_MAX:
            raise ProtocolError(
                f"memory region of {region.size:#x} bytes at {region.offset:#x} of its file"
            )
        if region.gpa + region.size > 1 << 64 or region.user + region.size > 1 << 64:
            raise ProtocolError(f"memory region at {region.gpa:#x} wraps round")
        if len(self.regions) >= lib.PV_MEM_REGIONS:
            raise ProtocolError(f"more than {lib.PV_MEM_REGIONS} memory regions")
        for r, _ in self.regions:
            if region.gpa < r.gpa + r.size and r.gpa < region.gpa + region.size:
                raise ProtocolError(f"memory regions overlap at {region.gpa:#x}")
        self.regions.append((region, _Mapping(fd, end)))
        self._update()

    def remove(self, region: Region) -> None:
        """Unmap one, named by its addresses and size. :raises ProtocolError: there is none such."""
        for i, (r, mapping) in enumerate(self.regions):
            if (r.gpa, r.user, r.size) == (region.gpa, region.user, region.size):
                del self.regions[i]
                self._update()
                mapping.close()
                return
        raise ProtocolError(f"no memory region at {region.gpa:#x}")

    def _update(self) -> None:
        self.c.count = len(self.regions)
        for i, (r, mapping) in enumerate(self.regions):
            c = self.c.region[i]
            c.gpa, c.size, c.offset = r.gpa, r.size, r.offset
            c.host = ffi.cast("uint8_t *", mapping.host + r.offset)

    def gpa(self, user: int, what: str) -> int:
        """The guest-physical address of a front-end address; that all of a ring lies there is for
        the ring to check.
        """
        for r, _ in self.regions:
            if r.user <= user < r.user + r.size:
                return r.gpa + user - r.user
        raise ProtocolError(f"{what} at {user:#x} is in no memory region")

    def read_u16(self, gpa: int) -> int | None:
        """What stands there now; None where that is not memory."""
        for r, mapping in self.regions:
            if r.gpa <= gpa and gpa + 2 <= r.gpa + r.size and gpa % 2 == 0:
                return int(ffi.cast("uint16_t *", mapping.host + r.offset + gpa - r.gpa)[0])
        return None

    def clear(self) -> None:
        """Unmap everything."""
        regions, self.regions = self.regions, []
        self._update()
        for _, mapping in regions:
            mapping.close()


class _Inflight:
    """The in-flight regions of all queues: one file, shared with the front-end, which keeps it
    while we are gone.
    """

    def __init__(self, mapping: _Mapping, offset: int, queues: int, queue_size: int) -> None:
        self._mapping, self._offset, self.queues, self.queue_size = (
            mapping,
            offset,
            queues,
            queue_size,
        )

    @staticmethod
    def stride(queue_size: int) -> int:
        """Bytes from one queue's region to the next."""
        size = (
            struct.calcsize(spec.INFLIGHT_REGION) + struct.calcsize(spec.INFLIGHT_DESC) * queue_size
        )
        return -(-size // INFLIGHT_ALIGN) * INFLIGHT_ALIGN

    def region(self, ring: int, size: int) -> Any:
        """``uint8_t *`` of one ring's region; None where it has none."""
        if ring >= self.queues or size > self.queue_size:
            return None
        return ffi.cast(
            "uint8_t *", self._mapping.host + self._offset + ring * self.stride(self.queue_size)
        )

    def close(self) -> None:
        self._mapping.close()


class _Ring:
    """What a front-end has told of one ring."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.kick: Fd | None = None
        self.call: Fd | None = None
        self.err: Fd | None = None
        self.enabled = False
        self.forget()

    def forget(self) -> None:
        """Stop it: all but whether it is enabled."""
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        for name in ("kick", "call", "err"):
            self.set_fd(name, None)

    def set_fd(self, name: str, fd: int | None) -> None:
        """Take over a descriptor in place of the old one."""
        old = getattr(self, name)
        setattr(self, name, None if fd is None else Fd(fd))
        if old is not None:
            old.close()

    @property
    def ready(self) -> bool:
        """Whether it can be served."""
        return bool(self.enabled and self.size and self.addresses and self.kick)


def _is_eventfd(fd: int) -> bool:
    """Only these: writing to anything else could block the worker, or reach a file of someone
    else's.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"  # noqa: PTH115
    except OSError:
        return False


class Backend:
    """A vhost-user-net back-end. ``serve`` and ``run`` are for one thread; ``stop`` and
    ``counters`` for any.

    :param port: where packets go, with one descriptor a queue pair; closed by ``close``.
    :param poll_us: a worker looks for work this long, in microseconds, before it sleeps.
    :param features, protocol_features: masks of what to offer of what there is, for tests of
        front-ends.
    :param log: gets one line about each connection and each refusal.
    """

    def __init__(
        self,
        port: Any,
        *,
        poll_us: int = 0,
        features: int = -1,
        protocol_features: int = -1,
        log: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self.port = port
        self.path = EmulatedNet(port, poll_us=poll_us, **options)
        self._log = log or (lambda line: None)
        queues = len(port.fds)
        own = 1 << VIRTIO_F_VERSION_1 | sum(1 << bit for bit in FRONT_END_FEATURES)
        self.offered = (self.path.features() | own) & features | 1 << VHOST_USER_F_PROTOCOL_FEATURES
        self.protocol_offered = sum(1 << bit for bit in PROTOCOL_FEATURES) & protocol_features
        self._memory = _Memory()
        self._inflight: _Inflight | None = None
        self._rings = [_Ring(i) for i in range(2 * queues)]
        self._running: list[int] = []
        self._fresh = True
        self._mutex = threading.Lock()
        self._quit = EventFd()
        self._channel: Channel | None = None
        self._counts = {
            "connections": 0,
            "messages": 0,
            "refused": 0,
            "sessions_broken": 0,
            "faults": 0,
            "bases_corrected": 0,
        }
        self._forget_session()

    def _forget_session(self) -> None:
        self.acked = 0
        self.protocol = 0
        self.status = 0
        self._backend_req: Fd | None = None

    # --- events of the data path ------------------------------------------------------------------

    def fault(self, queue: int, problem: str) -> None:
        """Any worker's thread: tell the front-end by its error eventfd."""
        with self._mutex:
            self._counts["faults"] += 1
            err = self._rings[queue].err if queue >= 0 else None
            if err is not None:
                try:
                    os.eventfd_write(err.fileno(), 1)
                except OSError:
                    pass  # its counter is full: it has been told
        self._log(f"fault: {problem}")

    def link(self, up: bool) -> None:
        """Any worker's thread: the interface of our port is gone, or back."""
        self._log(f"{self.port.name} is {'back' if up else 'gone'}")

    # --- rings on and off -------------------------------------------------------------------------

    def _pause(self) -> None:
        """Stop the workers, so that anything may change; ``_resume`` goes on where they were."""
        running, self._running = self._running, []
        for index, base in zip(running, self.path.stop(), strict=True):
            self._rings[index].base = base
        self._fresh = True

    def _resume(self) -> None:
        """Serve the rings that are ready."""
        if not self._fresh:
            return
        self._fresh = False
        rings = []
        for ring in self._rings:
            if not ring.ready or not self._memory.regions:
                continue
            assert ring.addresses is not None
            desc, used, avail = (
                self._memory.gpa(user, f"ring {ring.index}: {what}")
                for user, what in zip(
                    ring.addresses, ("descriptor table", "used ring", "available ring"), strict=True
                )
            )
            self._correct_base(ring, used)
            call: Any = ring.call or _NoFd()
            kick: Any = ring.kick
            vring = Vring(ring.index, ring.size, desc, avail, used, ring.base, kick, call)
            if self._inflight is not None:
                vring.inflight = self._inflight.region(ring.index, ring.size)
            rings.append(vring)
        if rings:
            memory: Any = self._memory
            self.port.set_queues(len(by_pair(rings)))
            self.port.set_offloads(self.acked)
            self.path.start(self.acked, memory, rings, self)
            self._running = [ring.index for ring in rings]

    def _correct_base(self, ring: _Ring, used: int) -> None:
        """Chains are finished in order here, so that the used index alone says where to go on.

        Front-ends say something else after a back-end has died: DPDK's virtio-user always says 0.
        """
        idx = self._memory.read_u16(used + 2)
        if idx is not None and idx != ring.base:
            self._counts["bases_corrected"] += 1
            self._log(f"ring {ring.index} starts at its used index {idx}, not at {ring.base}")
            ring.base = idx

    def _stop_all(self) -> None:
        self._pause()
        with self._mutex:
            for ring in self._rings:
                ring.forget()
                ring.enabled = False

    # --- a session --------------------------------------------------------------------------------

    def serve(self, channel: Channel) -> None:
        """Serve one front-end until it leaves; closes the channel.

        :raises VhostUserError: it broke the protocol, or was refused something that it did not want
            to hear of.
        """
        self._counts["connections"] += 1
        self._channel = channel
        try:
            if self._quit_asked():
                raise Stopped("the back-end is stopped")
            while True:
                if self._fresh and not self._input(channel):
                    self._resume()
                message = channel.receive()
                try:
                    self._handle(channel, message)
                finally:
                    message.close()
        except Closed:
            pass
        except Stopped:
            if not self._quit_asked():
                raise
        except PyvmmError:
            self._counts["sessions_broken"] += 1
            raise
        finally:
            self._channel = None
            self._end_session()
            channel.close()

    def _end_session(self) -> None:
        self._stop_all()
        self._memory.clear()
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None
        if self._backend_req is not None:
            self._backend_req.close()
        self._forget_session()

    @staticmethod
    def _input(channel: Channel) -> bool:
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _quit_asked(self) -> bool:
        poll = select.poll()
        poll.register(self._quit.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _handle(self, channel: Channel, message: Message) -> None:
        self._counts["messages"] += 1
        handler = HANDLERS.get(message.request)
        try:
            if handler is None:
                raise ProtocolError(f"{message.name} is not supported")
            answer = handler(self, message)
        except VhostUserError as e:
            wants = message.need_reply and self.protocol >> VHOST_USER_PROTOCOL_F_REPLY_ACK & 1
            self._counts["refused"] += 1
            if not wants:
                raise
            self._log(f"refused: {e.cause}")
            channel.reply(message, struct.pack("<Q", 1))
            return
        if answer is not None:
            payload, fds = answer
            channel.reply(message, payload, fds)
        elif message.need_reply and self.protocol >> VHOST_USER_PROTOCOL_F_REPLY_ACK & 1:
            # An acknowledgement says that it is done, so it has to be.
            if self._fresh and message.request == spec.VHOST_USER_SET_VRING_ENABLE:
                self._resume()
            channel.reply(message, bytes(8))

    # --- requests: each returns (payload, descriptors) to answer with, or None --------------------

    def _get_features(self, m: Message) -> tuple[bytes, list[int]]:
        return struct.pack("<Q", self.offered), []

    def _set_features(self, m: Message) -> None:
        bits = m.u64
        if bits & ~self.offered:
            raise ProtocolError(
                f"SET_FEATURES with {bits & ~self.offered:#x}, which is not offered"
            )
        if not bits >> VIRTIO_F_VERSION_1 & 1 and not bits >> virtio_net.VIRTIO_NET_F_MRG_RXBUF & 1:
            raise ProtocolError(
                "SET_FEATURES without VERSION_1 and MRG_RXBUF: the short header is not supported"
            )
        self._pause()
        self.acked = bits
        if not bits >> VHOST_USER_F_PROTOCOL_FEATURES & 1:
            for ring in self._rings:
                ring.enabled = True

    def _get_protocol_features(self, m: Message) -> tuple[bytes, list[int]]:
        return struct.pack("<Q", self.protocol_offered), []

    def _set_protocol_features(self, m: Message) -> None:
        bits = m.u64
        if bits & ~self.protocol_offered:
            raise ProtocolError(
                f"SET_PROTOCOL_FEATURES with {bits & ~self.protocol_offered:#x}, not offered"
            )
        self.protocol = bits

    def _nothing(self, m: Message) -> None:
        m.take_fds(0, 0)

    def _reset_owner(self, m: Message) -> None:
        self._pause()
        for ring in self._rings:
            ring.enabled = False

    def _set_mem_table(self, m: Message) -> None:
        regions = unpack_regions(m.payload)
        fds = m.take_fds(0, len(m.fds))
        try:
            if len(fds) != len(regions):
                raise ProtocolError(
                    f"SET_MEM_TABLE of {len(regions)} regions with {len(fds)} descriptors"
                )
            self._pause()
            self._memory.clear()
            try:
                for region, fd in zip(regions, fds, strict=True):
                    self._memory.add(region, fd)
            except VhostUserError:
                self._memory.clear()
                raise
        finally:
            for fd in fds:
                os.close(fd)

    def _get_max_mem_slots(self, m: Message) -> tuple[bytes, list[int]]:
        return struct.pack("<Q", lib.PV_MEM_REGIONS), []

    def _add_mem_reg(self, m: Message) -> None:
        _, *fields = m.unpack(spec.MEM_SINGLE)
        (fd,) = m.take_fds(1, 1)
        with Fd(fd):
            self._pause()
            self._memory.add(Region(*fields), fd)

    def _rem_mem_reg(self, m: Message) -> None:
        _, *fields = m.unpack(spec.MEM_SINGLE)
        for fd in m.take_fds(0, 1):
            os.close(fd)
        self._pause()
        self._memory.remove(Region(*fields))

    def _ring(self, index: int, m: Message) -> _Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"{m.name} for ring {index}, but there are {len(self._rings)}")
        return self._rings[index]

    def _set_vring_num(self, m: Message) -> None:
        index, num = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        if not 0 < num <= lib.PV_VRING_SIZE_MAX or num & (num - 1):
            raise ProtocolError(f"ring {index} of {num} entries")
        self._pause()
        ring.size = num

    def _set_vring_addr(self, m: Message) -> None:
        index, flags, desc, used, avail, _log = m.unpack(spec.VRING_ADDR)
        ring = self._ring(index, m)
        if flags:
            raise ProtocolError(f"ring {index} with flags {flags:#x}: logging is not supported")
        if self._memory.regions:
            for user in (desc, used, avail):
                self._memory.gpa(user, f"ring {index}")
        self._pause()
        ring.addresses = (desc, used, avail)

    def _set_vring_base(self, m: Message) -> None:
        index, base = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        if base > 0xFFFF:
            raise ProtocolError(f"ring {index} with base {base:#x}")
        self._pause()
        ring.base = base

    def _get_vring_base(self, m: Message) -> tuple[bytes, list[int]]:
        index, _ = m.unpack(VRING_STATE)
        ring = self._ring(index, m)
        self._pause()
        base = ring.base
        with self._mutex:
            ring.forget()
        ring.base = base
        return struct.pack(VRING_STATE, index, base), []

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
            if fds and not _is_eventfd(fds[0]):
                raise ProtocolError(f"{m.name} with a descriptor that is no eventfd")
            self._pause()
        except BaseException:
            for fd in fds:
                os.close(fd)
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
            self._pause()
            ring.enabled = bool(on)

    def _get_queue_num(self, m: Message) -> tuple[bytes, list[int]]:
        return struct.pack("<Q", len(self.port.fds)), []

    def _send_rarp(self, m: Message) -> None:
        mac = m.payload[:6]
        if len(m.payload) != 8:
            raise ProtocolError(f"SEND_RARP with {len(m.payload)} bytes")
        self._pause()  # a worker counts on being the only one who sends
        try:
            os.write(self.port.fds[0].fileno(), NET_HEADER + rarp(mac))
        except OSError as e:
            self._log(f"no RARP: {e.strerror}")

    def _net_set_mtu(self, m: Message) -> None:
        mtu = m.u64
        if not 68 <= mtu <= 65535:
            raise ProtocolError(f"an MTU of {mtu}")
        accept = getattr(self.port, "accept_mtu", lambda n: n <= self.port.mtu)
        if not accept(mtu):
            raise ProtocolError(f"an MTU of {mtu}, but {self.port.name} has {self.port.mtu}")

    def _get_inflight_fd(self, m: Message) -> tuple[bytes, list[int]]:
        _, _, queues, queue_size = m.unpack(spec.INFLIGHT)
        size = self._inflight_size(queues, queue_size)
        self._pause()
        try:
            file = memfd("pyvmm-inflight", size)
        except OSError as e:
            raise HostError(f"cannot make an in-flight region: {e.strerror}") from e
        self._use_inflight(file.fileno(), size, 0, queues, queue_size)
        # The message closes it once it is sent.
        m.fds.append(os.dup(file.fileno()))
        file.close()
        return struct.pack(spec.INFLIGHT, size, 0, queues, queue_size), [m.fds[-1]]

    def _set_inflight_fd(self, m: Message) -> None:
        size, offset, queues, queue_size = m.unpack(spec.INFLIGHT)
        (fd,) = m.take_fds(1, 1)
        with Fd(fd):
            if (
                size < self._inflight_size(queues, queue_size)
                or size > 1 << 32
                or offset > 1 << 32
                or offset % 8
            ):
                raise ProtocolError(
                    f"in-flight region of {size} bytes at {offset} for {queues} queues"
                )
            self._pause()
            self._use_inflight(fd, size, offset, queues, queue_size)

    def _inflight_size(self, queues: int, queue_size: int) -> int:
        if not 0 < queues <= len(self._rings) or not 0 < queue_size <= lib.PV_VRING_SIZE_MAX:
            raise ProtocolError(f"in-flight regions for {queues} queues of {queue_size}")
        return queues * _Inflight.stride(queue_size)

    def _use_inflight(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> None:
        mapping = _Mapping(fd, offset + size)
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = _Inflight(mapping, offset, queues, queue_size)

    def _set_status(self, m: Message) -> None:
        self.status = m.u64 & 0xFF
        if not self.status:
            self._stop_all()

    def _get_status(self, m: Message) -> tuple[bytes, list[int]]:
        return struct.pack("<Q", self.status), []

    def _reset_device(self, m: Message) -> None:
        self._stop_all()
        self.status = 0

    # --- life -------------------------------------------------------------------------------------

    def run(
        self, path: str, *, client: bool = False, retry: float = 0.1, retry_max: float = 5.0
    ) -> None:
        """Serve whoever comes to the socket, one after another, until ``stop``.

        :param client: the front-end listens and we connect, again and again after ``retry`` to
            ``retry_max`` seconds.
        :raises VhostUserError: the path cannot be listened on.
        """
        listener = None if client else Listener(path)
        delay = retry
        try:
            while not self._quit_asked():
                if listener is None:
                    try:
                        channel = connect(path)
                    except VhostUserError:
                        delay = min(2 * delay, retry_max)
                        self._sleep(delay)
                        continue
                    delay = retry
                else:
                    self._sleep(None, listener.fileno())
                    accepted = listener.accept()
                    if accepted is None:
                        continue
                    channel = accepted
                self._log("front-end connected")
                try:
                    self.serve(channel)
                except PyvmmError as e:
                    self._log(f"session ended: {e}")
                else:
                    self._log("front-end disconnected")
                if listener is None:
                    self._sleep(retry)
        finally:
            if listener is not None:
                listener.close()

    def _sleep(self, seconds: float | None, fd: int = -1) -> None:
        """Wait for a descriptor, the time, or ``stop``."""
        poll = select.poll()
        poll.register(self._quit.fileno(), select.POLLIN)
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)

    def stop(self) -> None:
        """Make ``run`` and ``serve`` return soon."""
        self._quit.signal()
        channel = self._channel
        if channel is not None:
            channel.stop()

    def counters(self) -> dict[str, int]:
        """Connections, messages, refusals, and those of the data path."""
        return {**self._counts, **self.path.counters()}

    def close(self) -> None:
        """Release all; ``run`` has returned."""
        self._end_session()
        self._quit.close()
        self.path.close()
        self.port.close()

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


HANDLERS: dict[int, Callable[[Backend, Message], tuple[bytes, list[int]] | None]] = {
    spec.VHOST_USER_GET_FEATURES: Backend._get_features,
    spec.VHOST_USER_SET_FEATURES: Backend._set_features,
    spec.VHOST_USER_GET_PROTOCOL_FEATURES: Backend._get_protocol_features,
    spec.VHOST_USER_SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    spec.VHOST_USER_SET_OWNER: Backend._nothing,
    spec.VHOST_USER_RESET_OWNER: Backend._reset_owner,
    spec.VHOST_USER_SET_MEM_TABLE: Backend._set_mem_table,
    spec.VHOST_USER_GET_MAX_MEM_SLOTS: Backend._get_max_mem_slots,
    spec.VHOST_USER_ADD_MEM_REG: Backend._add_mem_reg,
    spec.VHOST_USER_REM_MEM_REG: Backend._rem_mem_reg,
    spec.VHOST_USER_SET_VRING_NUM: Backend._set_vring_num,
    spec.VHOST_USER_SET_VRING_ADDR: Backend._set_vring_addr,
    spec.VHOST_USER_SET_VRING_BASE: Backend._set_vring_base,
    spec.VHOST_USER_GET_VRING_BASE: Backend._get_vring_base,
    spec.VHOST_USER_SET_VRING_KICK: Backend._set_vring_kick,
    spec.VHOST_USER_SET_VRING_CALL: Backend._set_vring_call,
    spec.VHOST_USER_SET_VRING_ERR: Backend._set_vring_err,
    spec.VHOST_USER_SET_VRING_ENABLE: Backend._set_vring_enable,
    spec.VHOST_USER_GET_QUEUE_NUM: Backend._get_queue_num,
    spec.VHOST_USER_SEND_RARP: Backend._send_rarp,
    spec.VHOST_USER_NET_SET_MTU: Backend._net_set_mtu,
    spec.VHOST_USER_GET_INFLIGHT_FD: Backend._get_inflight_fd,
    spec.VHOST_USER_SET_INFLIGHT_FD: Backend._set_inflight_fd,
    spec.VHOST_USER_SET_STATUS: Backend._set_status,
    spec.VHOST_USER_GET_STATUS: Backend._get_status,
    spec.VHOST_USER_RESET_DEVICE: Backend._reset_device,
}
