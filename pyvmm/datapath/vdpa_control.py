"""The control queue of a vDPA device, driven by us: the guest's driver talks to the card's own
control queue, and what it has set is told to the device here, once more at every start.

The ring and its buffers lie in memory of ours that the device sees at addresses of their own: in an
address space of their own if the device has one for its control queue, else where the guest has no
memory. What the device writes there is not trusted.
"""

from __future__ import annotations

import mmap
import struct
import time

from pyvmm._ext import ffi
from pyvmm.datapath.base import Vring
from pyvmm.errors import HostError, VdpaError
from pyvmm.fd import EventFd, memfd
from pyvmm.spec.virtio import VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_OK,
)
from pyvmm.vhostuser.wire import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pyvmm.datapath.base import RxFilter
    from pyvmm.datapath.vdpa_device import Mapping, Vdpa

#: Entries of the ring: a command takes two, and there is one at a time.
SIZE = 4
PAGE = 4096
DESC, AVAIL, USED, COMMAND, ANSWER = 0, 256, 512, PAGE, PAGE - 8
USED_EVENT = AVAIL + 4 + 2 * SIZE
#: Bytes of our memory: the ring's page, and the longest command.
MEMORY = 2 * PAGE
#: Seconds that a device has for one command.
ANSWER_S = 5.0
#: Commands of VIRTIO_NET_CTRL_RX by number, with the features that they need.
RX_FEATURES = [VIRTIO_NET_F_CTRL_RX] * 2 + [VIRTIO_NET_F_CTRL_RX_EXTRA] * 4


class ControlQueue:
    """The device's control queue. ``attach`` comes first in each start of the device.

    :param device: lent. :param taken: addresses at which the guest has memory.
    :raises HostError: no descriptors or memory.
    :raises VdpaError: the device has no address left for the queue.
    """

    def __init__(self, device: Vdpa, taken: Sequence[Mapping]) -> None:
        self._device = device
        self._taken = taken
        self._where: list[Mapping] = []
        self._space = 0
        self._kick, self._call = EventFd(), EventFd()
        self._file = memfd("pyvmm-vdpa-control", MEMORY)
        self._map = mmap.mmap(self._file.fileno(), MEMORY, flags=mmap.MAP_SHARED)
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        self._next = 0
        self._features = 0

    def attach(self, index: int, features: int) -> None:
        """Set up the queue as ring ``index`` of a device that is at FEATURES_OK.

        :raises PyvmmError: the device refuses.
        """
        self._features, self._next = features, 0
        self._map[:] = bytes(MEMORY)
        self._call.drain()
        self._kick.drain()
        self._space = self._device.space_of(index)
        at = free_address(self._device.iova, () if self._space else self._taken, MEMORY)
        host = int(ffi.cast("uintptr_t", self._buffer))
        self._unmap()
        mapping = (at, MEMORY, host)
        self._device.map([mapping], self._space)
        self._where = [mapping]
        ring = Vring(index, SIZE, at + DESC, at + AVAIL, at + USED, 0, self._kick, self._call)
        self._device.set_ring(index, ring)

    def set_pairs(self, pairs: int) -> None:
        """Have the device use so many queue pairs; it starts with one.

        :raises HostError: the device does not do as it is told.
        """
        data = struct.pack("<H", pairs)
        self.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, data)

    def set_filter(self, rx: RxFilter, vlans: set[int]) -> None:
        """Have the device receive what ``rx`` asks for.

        :param vlans: those that the device lets through now.
        :raises HostError: the device does not do as it is told.
        """
        for kind, command, data in commands(self._features, rx, vlans):
            self.command(kind, command, data)

    def command(self, kind: int, command: int, data: bytes) -> None:
        """One command (virtio 1.2, 5.1.6.5).

        :raises HostError: the device refuses it, or does not answer in time.
        """
        at = self._where[0][0]
        request = bytes((kind, command)) + data
        what = f"{self._device.name}: control command {kind}/{command}"
        if len(request) > MEMORY - COMMAND:
            raise HostError(f"{what} is too long")
        memory = self._map
        memory[COMMAND : COMMAND + len(request)] = request
        memory[ANSWER] = 0xFF
        memory[DESC : DESC + 32] = struct.pack(
            "<QIHHQIHH",
            *(at + COMMAND, len(request), VRING_DESC_F_NEXT, 1),
            *(at + ANSWER, 1, VRING_DESC_F_WRITE, 0),
        )
        self._next = self._next + 1 & 0xFFFF
        memory[AVAIL + 4 : AVAIL + 4 + 2 * SIZE] = bytes(2 * SIZE)  # each entry: chain 0
        # used_event, by which a device with EVENT_IDX knows that this answer is waited for
        memory[USED_EVENT : USED_EVENT + 2] = (self._next - 1 & 0xFFFF).to_bytes(2, "little")
        memory[AVAIL + 2 : AVAIL + 4] = self._next.to_bytes(2, "little")
        self._kick.nudge()
        until = time.monotonic() + ANSWER_S
        while int.from_bytes(memory[USED + 2 : USED + 4], "little") != self._next:
            left = until - time.monotonic()
            if left <= 0:
                raise HostError(f"{what}: no answer within {ANSWER_S:g} s")
            readable([self._call.fileno()], left)
            self._call.drain()
        if memory[ANSWER] != VIRTIO_NET_OK:
            raise HostError(f"{what}: the device refuses it")

    def detach(self, index: int) -> None:
        """After a reset of the device: take the queue's memory and eventfds back.

        :raises HostError: the kernel refuses.
        """
        self._device.clear_ring(index)
        self._unmap()

    def _unmap(self) -> None:
        where, self._where = self._where, []
        if where:
            self._device.unmap(where, self._space)

    def close(self) -> None:
        """Release memory and eventfds. The device is closed, or does not use the queue."""
        ffi.release(self._buffer)
        self._map.close()
        for fd in (self._file, self._kick, self._call):
            fd.close()


def free_address(span: tuple[int, int], taken: Sequence[Mapping], size: int) -> int:
    """An address from which on ``size`` bytes lie in ``span`` (first, last) and in none of
    ``taken``.

    :raises VdpaError: there is none.
    """
    first, last = span
    for start in (first, *(at + length for at, length, _ in taken)):
        at = -(-max(start, first, PAGE) // PAGE) * PAGE
        if at + size - 1 <= last and not any(at < a + n and a < at + size for a, n, _ in taken):
            return at
    raise VdpaError("the device has no address left for its control queue", "lower --memory")


def commands(features: int, rx: RxFilter, vlans: set[int]) -> Iterator[tuple[int, int, bytes]]:
    """The commands that put ``rx`` into force: class, command, data.

    :param features: of the device. :param vlans: those that it lets through now.
    """
    if features >> VIRTIO_NET_F_CTRL_MAC_ADDR & 1:
        yield VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, rx.mac
    if features >> VIRTIO_NET_F_CTRL_RX & 1:
        on = set(rx.flags)
        on |= {"alluni"} if "unicast-overflow" in on else set()
        if "alluni" in on and not features >> VIRTIO_NET_F_CTRL_RX_EXTRA & 1:
            on |= {"promisc"}
        on |= {"allmulti"} if "multicast-overflow" in on else set()
        for command, (flag, feature) in enumerate(zip(rx.FLAGS, RX_FEATURES, strict=True)):
            if features >> feature & 1:
                yield VIRTIO_NET_CTRL_RX, command, bytes([flag in on])
        tables = b"".join(
            struct.pack("<I", len(table)) + b"".join(table) for table in (rx.unicast, rx.multicast)
        )
        yield VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, tables
    if features >> VIRTIO_NET_F_CTRL_VLAN & 1:
        for vlan in sorted(rx.vlans - vlans):
            yield VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, struct.pack("<H", vlan)
        for vlan in sorted(vlans - rx.vlans):
            yield VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, struct.pack("<H", vlan)
