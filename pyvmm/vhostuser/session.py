"""A front-end's session with a vhost-user back-end: one connection and its messages.

A :class:`Session` knows the messages and their order, for any kind of virtio device. The code that
uses it knows the device: which features it needs, and where its rings are.

Messages are sent in a ``conversation``, which takes a bounded time however the back-end behaves: a
step, such as a question with its answer, may last no longer than the rest of that time. A
conversation that fails ends the session, because nobody knows what the back-end has understood; a
mere refusal does not. ``cut`` ends the session from any other thread, at once.
"""

from __future__ import annotations

import _socket  # see ``hostnet.rights``
import os
import struct
import time
from contextlib import contextmanager

from pyvmm.errors import VhostUserError
from pyvmm.fd import Fd
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio
from pyvmm.spec.vhost_user import (
    VHOST_USER_F_PROTOCOL_FEATURES,
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
    VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    VHOST_USER_PROTOCOL_F_STATUS,
    VRING_STATE,
)
from pyvmm.vhostuser.wire import (
    Channel,
    Closed,
    ProtocolError,
    Region,
    TimedOut,
    pack_regions,
    readable,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, Protocol

    from pyvmm.datapath.ringformat import RingFormat
    from pyvmm.fd import EventFd
    from pyvmm.memory import GuestMemory
    from pyvmm.vhostuser.wire import Message

    class Virtqueue(Protocol):
        """A virtqueue that back-ends are to serve; ``datapath.base.Vring`` is one.

        :ivar size: entries. :ivar desc, avail, used: guest-physical addresses.
        :ivar base: position to start at (``datapath.ringformat``). :ivar kick, call: lent.
        """

        index: int
        size: int
        base: int
        desc: int
        avail: int
        used: int
        kick: EventFd
        call: EventFd
        format: RingFormat


#: Protocol features that a session can use for any kind of device.
PROTOCOL_FEATURES = sum(
    1 << bit
    for bit in (
        VHOST_USER_PROTOCOL_F_MQ,
        VHOST_USER_PROTOCOL_F_REPLY_ACK,
        VHOST_USER_PROTOCOL_F_BACKEND_REQ,
        VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
        VHOST_USER_PROTOCOL_F_RESET_DEVICE,
        VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
        VHOST_USER_PROTOCOL_F_STATUS,
    )
)
#: The device status of a device whose driver is ready (virtio 1.2, 2.1).
RUNNING = (
    virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE
    | virtio.VIRTIO_CONFIG_S_DRIVER
    | virtio.VIRTIO_CONFIG_S_FEATURES_OK
    | virtio.VIRTIO_CONFIG_S_DRIVER_OK
)
#: Requests of back-ends that are acknowledged; all others are refused.
BACKEND_REQUESTS = (spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG,)
#: Seconds for the rest of a message that the back-end has begun, and for our acknowledgement.
REQUEST_S = 0.1


class Refused(VhostUserError):
    """The back-end refuses a request. The session goes on."""


class InflightFile:
    """The file in which a back-end notes the chains that it has taken from the rings. The front-end
    keeps it for the back-end's successor.

    :param fd: owned from here on. :param description: the payload of SET_INFLIGHT_FD.
    """

    def __init__(self, fd: Fd, description: bytes) -> None:
        self.fd, self.description = fd, description

    def places(self, index: int, size: int) -> tuple[int, int] | None:
        """Where the used descriptors of a packed ring ended before the latest batch, and where
        with it (QueueRegionPacked): index, and wrap counter in bit 15.

        :param index, size: of the ring. :returns: None if there are no notes of it. Nothing that
            is read is to be trusted.
        """
        head = self._read(index, 0, spec.INFLIGHT_PACKED_HEAD_SIZE)
        if head is None:
            return None
        _, version, entries, _, _, *parts = struct.unpack_from(spec.INFLIGHT_PACKED_HEAD, head)
        if version != spec.INFLIGHT_VERSION or entries != size:
            return None
        used, old, wrap, old_wrap = parts
        return old & 0x7FFF | (old_wrap & 1) << 15, used & 0x7FFF | (wrap & 1) << 15

    def overwritten(self, index: int, size: int) -> tuple[int, list[tuple[int, int, int, int]]]:
        """What a batch of our back-end's that may not have been published has overwritten in a
        packed ring of which there are ``places``; nothing, if another back-end has kept the notes.

        :returns: where the batch begins, as ``places``; and of each chain of the batch its slots,
            and its first descriptor's length, buffer id and flags. Nothing that is read is to be
            trusted.
        """
        head = self._read(index, 0, spec.INFLIGHT_PACKED_HEAD_SIZE)
        count, begin = struct.unpack_from(spec.INFLIGHT_PACKED_SAVED, head) if head else (0, 0)
        entry = struct.calcsize(spec.INFLIGHT_PACKED_DESC)
        length = entry * min(count, size)
        saved = self._read(index, spec.INFLIGHT_PACKED_HEAD_SIZE, length) or b""
        out = []
        for one in struct.iter_unpack(spec.INFLIGHT_PACKED_DESC, saved):
            _, _, _, slots, _, ident, flags, written, _ = one
            out.append((slots, written, ident, flags))
        return begin, out

    def _read(self, index: int, at: int, length: int) -> bytes | None:
        """Bytes of the notes of a ring; None if they are not there."""
        size, offset, queues, _ = struct.unpack(spec.INFLIGHT, self.description)
        path = f"/proc/self/fd/{self.fd.fileno()}"
        try:
            # No other file is read: it could keep us waiting.
            if index >= queues or not os.readlink(path).startswith("/memfd:"):  # noqa: PTH115
                return None
            data = os.pread(self.fd.fileno(), length, offset + index * (size // queues) + at)
        except (OSError, OverflowError):
            return None
        return data if len(data) == length else None

    def close(self) -> None:
        """Close the file, and with it the notes."""
        self.fd.close()


class Session:
    """One connection to a back-end. One thread at a time uses it; any thread may call ``cut``.

    :param channel: owned from here on. :param name: what messages call the back-end.
    :ivar features: virtio features that the back-end offers, as a mask.
    :ivar protocol: protocol features in use, as a mask.
    :ivar queue_num: the answer to GET_QUEUE_NUM: rings, or queue pairs of a network card; None if
        the back-end does not say.
    :ivar slots: how many memory regions the back-end takes.
    :ivar requests: carries the back-end's own requests; None if there is no such channel.
    :ivar sharing: indices of the rings that the back-end has been given.
    :ivar prepared: what the code that uses the session has agreed on with the back-end; the session
        does not read it.
    """

    def __init__(self, channel: Channel, name: str) -> None:
        self.channel, self.name = channel, name
        self.features = self.protocol = 0
        self.queue_num: int | None = None
        self.slots = spec.VHOST_MEMORY_BASELINE_NREGIONS
        self.requests: Channel | None = None
        self.sharing: set[int] = set()
        self.prepared: Any = None
        self._memory_sent = False
        self._deadline: float | None = None

    # --- talking ----------------------------------------------------------------------------------

    @contextmanager
    def conversation(self, seconds: float) -> Iterator[None]:
        """Talk for at most ``seconds``; the steps below run in such a context.

        An exception that leaves the context ends the session, unless it is ``Refused``.
        """
        self._deadline = time.monotonic() + seconds
        try:
            yield
        except Refused:
            raise
        except BaseException:
            self.cut()
            raise
        finally:
            self._deadline = None

    def _left(self) -> float:
        """The seconds that are left of the conversation."""
        assert self._deadline is not None, "no conversation"
        return max(0.0, self._deadline - time.monotonic())

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """A step: send a question and take the answer, which the caller closes."""
        return self.channel.ask(request, payload, fds, timeout=self._left())

    def number(self, request: int) -> int:
        """A step: send a question whose answer is a 64-bit number."""
        answer = self.ask(request)
        try:
            return answer.u64
        finally:
            answer.close()

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A step: send a message that is not acknowledged."""
        self.channel.request(request, payload, fds, timeout=self._left())

    def order(self, request: int, what: str, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A step: send a message that must have taken effect before we go on.

        A back-end without REPLY_ACK can refuse it only by ending the session.

        :param what: names the request in messages. :raises Refused: the back-end refuses it.
        """
        if not self.has(VHOST_USER_PROTOCOL_F_REPLY_ACK):
            self.tell(request, payload, fds)
            self.settle()
            return
        answer = self.channel.ask(request, payload, fds, need_reply=True, timeout=self._left())
        try:
            if answer.u64:
                raise Refused(f"the back-end at {self.name} refuses {what}")
        finally:
            answer.close()

    def settle(self) -> None:
        """A step: wait until the back-end has taken all messages so far. It answers in order, so
        any question serves.
        """
        self.number(spec.VHOST_USER_GET_FEATURES)

    def has(self, bit: int) -> bool:
        """Whether a protocol feature is in use."""
        return bool(self.protocol >> bit & 1)

    def offers(self, bit: int) -> bool:
        """Whether the back-end offers a virtio feature."""
        return bool(self.features >> bit & 1)

    def cut(self) -> None:
        """End the session at once, with any conversation of another thread. Any thread; takes no
        lock that a conversation holds. The descriptors stay open until ``close``.
        """
        self.channel.stop()

    def close(self) -> None:
        """Disconnect, and release all descriptors. A second call does nothing."""
        self.channel.close()
        self.close_requests()

    # --- what is agreed on ------------------------------------------------------------------------

    def negotiate(self, wanted: int) -> None:
        """Find out what the back-end can do, and become its owner.

        :param wanted: mask of the protocol features to use if the back-end has them.
        """
        try:
            self.features = self.number(spec.VHOST_USER_GET_FEATURES)
        except Closed as e:
            raise Closed(
                f"the back-end at {self.name} has closed the connection at once",
                "look whether it serves another front-end",
            ) from e
        if self.offers(VHOST_USER_F_PROTOCOL_FEATURES):
            self.protocol = wanted & self.number(spec.VHOST_USER_GET_PROTOCOL_FEATURES)
            bits = struct.pack("<Q", self.protocol)
            self.tell(spec.VHOST_USER_SET_PROTOCOL_FEATURES, bits)
        if self.has(VHOST_USER_PROTOCOL_F_MQ):
            self.queue_num = self.number(spec.VHOST_USER_GET_QUEUE_NUM)
        if self.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            self.slots = self.number(spec.VHOST_USER_GET_MAX_MEM_SLOTS)
        if self.has(VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            self._open_requests()
        self.tell(spec.VHOST_USER_SET_OWNER)
        self.features &= self.number(spec.VHOST_USER_GET_FEATURES)

    def choose_features(self, features: int) -> None:
        """SET_FEATURES. :param features: those that driver and back-end have agreed on."""
        if self.offers(VHOST_USER_F_PROTOCOL_FEATURES):
            # Without this bit rings would start enabled.
            features |= 1 << VHOST_USER_F_PROTOCOL_FEATURES
        self.tell(spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", features))

    def share_memory(self, memory: GuestMemory) -> None:
        """Have the back-end map guest memory, once per session.

        :raises Refused: the back-end does not map it.
        """
        regions = [Region(r.gpa, r.size, r.host, r.offset) for r in memory.regions]
        fd = memory.fd.fileno()
        if not self.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            table = pack_regions(regions)
            self.order(spec.VHOST_USER_SET_MEM_TABLE, "our memory", table, [fd] * len(regions))
        elif not self._memory_sent:
            for region in regions:
                payload = bytes(8) + region.pack()
                self.order(spec.VHOST_USER_ADD_MEM_REG, "our memory", payload, [fd])
        self._memory_sent = True

    def share_inflight(
        self, file: InflightFile | None, queues: int, size: int
    ) -> InflightFile | None:
        """Give the back-end its predecessor's in-flight file, or have it make one.

        :param file: the predecessor's, or None. :param queues: rings of at most ``size`` entries.
        :returns: the file in use from now on; None if the back-end keeps none. A new file belongs
            to the caller.
        :raises Refused: the back-end does not take the file.
        """
        if not self.has(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            return None
        new = None
        if file is None:
            file = new = self._new_inflight(queues, size)
        if file is None:
            return None
        try:
            what, fd = "its in-flight region", file.fd.fileno()
            self.order(spec.VHOST_USER_SET_INFLIGHT_FD, what, file.description, [fd])
        except BaseException:
            if new is not None:
                new.close()
            raise
        return file

    def _new_inflight(self, queues: int, size: int) -> InflightFile | None:
        request = struct.pack(spec.INFLIGHT, 0, 0, queues, size)
        answer = self.ask(spec.VHOST_USER_GET_INFLIGHT_FD, request)
        try:
            description = answer.inflight()
            if not description[0] or not answer.fds:
                return None
            (fd,) = answer.take_fds(1, 1)
            return InflightFile(Fd(fd), struct.pack(spec.INFLIGHT, *description))
        finally:
            answer.close()

    # --- the device's configuration (protocol feature CONFIG) -------------------------------------

    def get_config(self, size: int) -> bytes:
        """The first ``size`` bytes of the device-specific configuration, at most
        VHOST_USER_MAX_CONFIG_SIZE.

        :raises Refused: the back-end has no configuration of this size.
        :raises ProtocolError: the answer is not what was asked for.
        """
        ask = struct.pack(spec.CONFIG, 0, size, 0)
        answer = self.ask(spec.VHOST_USER_GET_CONFIG, ask + bytes(size))
        try:
            payload = answer.payload
        finally:
            answer.close()
        head = struct.calcsize(spec.CONFIG)
        if not payload:  # as the specification has it, "error"
            raise Refused(f"the back-end at {self.name} has no configuration of {size} bytes")
        told = struct.unpack_from(spec.CONFIG, payload)[:2] if len(payload) >= head else None
        if told == (0, 0) and size:  # libvhost-user's way
            raise Refused(f"the back-end at {self.name} has no configuration of {size} bytes")
        if told != (0, size) or len(payload) != head + size:
            raise ProtocolError(
                f"GET_CONFIG of {size} bytes was answered with {max(0, len(payload) - head)} bytes"
                f" that are said to be {told[1] if told else 'nothing'}"
            )
        return payload[head:]

    def set_config(self, offset: int, data: bytes) -> None:
        """Write to the device-specific configuration, as the driver has done.

        :raises Refused: the back-end does not take it.
        """
        payload = struct.pack(spec.CONFIG, offset, len(data), 0) + data
        self.order(spec.VHOST_USER_SET_CONFIG, "a write to the configuration", payload)

    # --- rings ------------------------------------------------------------------------------------

    def share_ring(self, ring: Virtqueue, base: int, memory: GuestMemory, err: EventFd) -> None:
        """Tell the back-end everything about one ring, which is not enabled yet. After a stop the
        back-end needs all of it again.

        :param base: the position to start at. :param err: the back-end signals it if the ring is
            malformed; lent.
        """
        i, size = ring.index, ring.size
        state = struct.pack(VRING_STATE, i, size)
        self.tell(spec.VHOST_USER_SET_VRING_NUM, state)
        # BASE goes before ADDR: some back-ends compare it with the used index there.
        self.tell(spec.VHOST_USER_SET_VRING_BASE, struct.pack(VRING_STATE, i, base))
        self.place_ring(ring, memory)
        self.sharing.add(i)
        # KICK comes last: some back-ends serve the ring from then on, enabled or not, and those of
        # QEMU 7.2 give up the connection if they have nothing to call by then.
        for request, event in (
            (spec.VHOST_USER_SET_VRING_ERR, err),
            (spec.VHOST_USER_SET_VRING_CALL, ring.call),
            (spec.VHOST_USER_SET_VRING_KICK, ring.kick),
        ):
            self.tell(request, struct.pack("<Q", i), [event.fileno()])

    def place_ring(self, ring: Virtqueue, memory: GuestMemory, *, log: int | None = None) -> None:
        """Tell the back-end where a ring is.

        :param log: the guest-physical address under which the back-end marks writes to the used
            ring in the log of a migration; None: it does not.
        """
        desc, avail, used = ring.format.areas(ring.size)
        parts = (ring.desc, desc), (ring.used, used), (ring.avail, avail)
        try:
            addresses = [memory.host_address(gpa, area.length) for gpa, area in parts]
        except IndexError as e:
            raise VhostUserError(f"ring {ring.index}: {e}") from e
        flags = 0 if log is None else 1 << spec.VHOST_VRING_F_LOG
        payload = struct.pack(spec.VRING_ADDR, ring.index, flags, *addresses, log or 0)
        self.tell(spec.VHOST_USER_SET_VRING_ADDR, payload)

    def enable_rings(self, indices: Iterable[int]) -> None:
        """Let the back-end serve these rings. When this returns, the back-end has taken all
        messages so far.

        :raises Refused: the back-end does not serve them.
        """
        if self.offers(VHOST_USER_F_PROTOCOL_FEATURES):  # else the rings are enabled already
            for i in indices:
                state = struct.pack(VRING_STATE, i, 1)
                self.order(spec.VHOST_USER_SET_VRING_ENABLE, f"ring {i}", state)
        if self.has(VHOST_USER_PROTOCOL_F_STATUS):
            self.tell(spec.VHOST_USER_SET_STATUS, struct.pack("<Q", RUNNING))
        self.settle()

    def stop_ring(self, index: int) -> int:
        """Take a ring back. :returns: the position that the back-end reports; it may be wrong."""
        state = struct.pack(VRING_STATE, index, 0)
        answer = self.ask(spec.VHOST_USER_GET_VRING_BASE, state)
        try:
            other, base = answer.unpack(VRING_STATE)
        finally:
            answer.close()
        if other != index:
            raise ProtocolError(f"GET_VRING_BASE of ring {index} was answered for ring {other}")
        self.sharing.discard(index)
        return base

    def reset(self) -> None:
        """Tell the back-end that the device is at rest, if its protocol has a message for this."""
        if self.has(VHOST_USER_PROTOCOL_F_STATUS):
            self.tell(spec.VHOST_USER_SET_STATUS, bytes(8))
        if self.has(VHOST_USER_PROTOCOL_F_RESET_DEVICE):
            self.tell(spec.VHOST_USER_RESET_DEVICE)

    # --- what the back-end says unasked -----------------------------------------------------------

    def check_silence(self) -> None:
        """Read what has come outside of a conversation, when the back-end should be silent.

        :raises VhostUserError: the connection has ended, or the back-end sends unasked.
        """
        if not readable([self.channel.fileno()], 0):
            return  # it was an answer, and another thread has taken it
        try:
            message = self.channel.receive(0)
        except TimedOut as e:
            raise ProtocolError("the back-end says half a message unasked") from e
        message.close()
        raise ProtocolError(f"the back-end says {message.name} unasked")

    def _open_requests(self) -> None:
        kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
        try:
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, kind)
        except OSError as e:
            raise VhostUserError(f"no channel for {self.name}: {e.strerror}", "ulimit -n") from e
        self.requests = Channel(ours)
        try:
            fds = [theirs.fileno()]
            self.order(spec.VHOST_USER_SET_BACKEND_REQ_FD, "a channel", fds=fds)
        finally:
            theirs.close()

    def serve_request(self) -> int:
        """Answer a request of the back-end; returns which it was.

        :raises VhostUserError: its channel has ended.
        """
        requests = self.requests
        assert requests is not None
        message = requests.receive(REQUEST_S)
        try:
            if message.need_reply:
                refused = message.request not in BACKEND_REQUESTS
                requests.reply(message, struct.pack("<Q", refused), timeout=REQUEST_S)
            return message.request
        finally:
            message.close()

    def close_requests(self) -> None:
        """Take no more requests from the back-end; the session itself goes on."""
        requests, self.requests = self.requests, None
        if requests is not None:
            requests.close()
