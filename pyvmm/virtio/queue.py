"""A virtqueue served from Python: for queues of a few commands (the control queue), and for
looking at rings.

Packet queues never come here: their workers use the same C code (cext/vring.c) without Python.
"""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.errors import RingFault
from pyvmm.spec.virtio import (
    VIRTIO_F_RING_PACKED,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.datapath.base import Vring
    from pyvmm.memory import GuestMemory


def ring_features(acked: int) -> dict[str, bool]:
    """What ``struct pv_vring_format`` says of negotiated features."""
    return {
        "packed": bool(acked >> VIRTIO_F_RING_PACKED & 1),
        "indirect": bool(acked >> VIRTIO_RING_F_INDIRECT_DESC & 1),
        "event_idx": bool(acked >> VIRTIO_RING_F_EVENT_IDX & 1),
    }


class Chain:
    """One descriptor chain taken from the queue.

    :ivar head: its identity for the driver: the first descriptor, or a packed ring's buffer id.
    :ivar slots: entries of the ring that it takes.
    :ivar request: a copy of the device-readable bytes.
    :ivar room: how many bytes the device may write.
    """

    __slots__ = ("_writable", "head", "request", "room", "slots")

    def __init__(
        self, head: int, slots: int, request: bytes, writable: list[tuple[Any, int]]
    ) -> None:
        self.head, self.slots, self.request, self._writable = head, slots, request, writable
        self.room = sum(size for _, size in writable)

    def reply_last(self, byte: int) -> None:
        """Store ``byte`` at the end of the device-writable part, if there is one."""
        for host, size in reversed(self._writable):
            if size:
                ffi.cast("uint8_t *", host)[size - 1] = byte
                return

    def reply(self, data: bytes) -> int:
        """Store ``data`` in the device-writable part, cut to what fits; returns the bytes
        written.
        """
        at = 0
        for host, size in self._writable:
            part = data[at : at + size]
            ffi.memmove(host, part, len(part))
            at += len(part)
        return at


class ServedQueue:
    """Device side of a virtqueue (virtio 1.2, 2.7 and 2.8); one thread at a time.

    :param acked: the negotiated features, which say what the ring looks like.
    :param limit: longest request taken, in bytes; more is a fault. None: requests may be as long as
        they like, because nobody looks at them, and ``Chain.request`` is empty.
    :raises RingFault: size, alignment or addresses are wrong; the ring is untouched.
    """

    def __init__(
        self, memory: GuestMemory, vring: Vring, acked: int, *, limit: int | None = 1 << 16
    ) -> None:
        self._memory = memory  # keeps what C points into
        self._limit = limit
        self._iov = ffi.new("struct iovec[]", lib.PV_CHAIN_MAX)
        self._chain = ffi.new("struct pv_chain *")
        self.c = ffi.new("struct pv_vring *")
        fault = lib.pv_vring_init(
            self.c,
            memory.c,
            vring.size,
            vring.desc,
            vring.avail,
            vring.used,
            vring.base,
            ring_features(acked),
        )
        self._check(fault)

    def _check(self, fault: int) -> None:
        if fault:
            raise RingFault(ffi.string(lib.pv_fault_text(fault)).decode())

    @property
    def base(self) -> int:
        """The position (``datapath.ringformat``)."""
        return int(lib.pv_vring_base(self.c))

    def pop(self) -> Chain | None:
        """The next chain, or None where the queue is empty.

        :raises RingFault: malformed, now and at every later call.
        """
        step = lib.pv_vring_pop(self.c, self._iov, lib.PV_CHAIN_MAX, self._chain)
        if step == lib.PV_DONE:
            return None
        c = self._chain
        limit = self._limit
        if step == lib.PV_MORE and limit is not None and c.out_len > limit:
            lib.pv_vring_unpop(self.c, c.slots)
            self.c.fault = lib.PV_FAULT_TOO_LONG
        self._check(self.c.fault)
        iov = self._iov
        wanted = c.out_num if limit is not None else 0
        request = b"".join(
            bytes(ffi.buffer(iov[i].iov_base, iov[i].iov_len)) for i in range(wanted)
        )
        writable = [
            (iov[i].iov_base, iov[i].iov_len) for i in range(c.out_num, c.out_num + c.in_num)
        ]
        return Chain(c.head, c.slots, request, writable)

    def push(self, chain: Chain, written: int) -> None:
        """Return a chain of which the device has written the first ``written`` bytes; ``flush``
        publishes it.
        """
        lib.pv_vring_push(self.c, chain.head, chain.slots, written)

    def flush(self) -> bool:
        """Publish what was pushed; returns whether the guest wants an interrupt for it."""
        return bool(lib.pv_vring_flush(self.c))

    def enable_notify(self) -> bool:
        """Ask for kicks; returns whether chains are available already."""
        return bool(lib.pv_vring_enable_notify(self.c))

    def disable_notify(self) -> None:
        """Tell the guest that kicks are not needed (a hint)."""
        lib.pv_vring_disable_notify(self.c)
