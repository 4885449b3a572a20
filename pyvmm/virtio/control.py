"""The control virtqueue of a network card (virtio 1.2, 5.1.6.5).

Served in a job of the card (``virtio.device.Jobs``), since a command may have to wait for another
process. The vCPU that kicks goes on at once.
"""

from __future__ import annotations

import struct
import time

from pyvmm.datapath.base import Hashing, RxFilter, Steering
from pyvmm.errors import PyvmmError, RingFault
from pyvmm.spec.virtio_net import (
    RSS_HASH_TYPES,
    RSS_KEY_MAX,
    RSS_TABLE_MAX,
    VIRTIO_NET_CTRL_ANNOUNCE,
    VIRTIO_NET_CTRL_ANNOUNCE_ACK,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_HASH_CONFIG,
    VIRTIO_NET_CTRL_MQ_RSS_CONFIG,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_NOTF_COAL,
    VIRTIO_NET_CTRL_NOTF_COAL_RX_SET,
    VIRTIO_NET_CTRL_NOTF_COAL_TX_SET,
    VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET,
    VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLUNI,
    VIRTIO_NET_CTRL_STATS,
    VIRTIO_NET_CTRL_STATS_GET,
    VIRTIO_NET_CTRL_STATS_QUERY,
    VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_ERR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_DEVICE_STATS,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_NOTF_COAL,
    VIRTIO_NET_F_RSS,
    VIRTIO_NET_F_VQ_NOTF_COAL,
    VIRTIO_NET_OK,
)
from pyvmm.virtio.queue import ServedQueue
from pyvmm.virtio.statistics import supported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.datapath.base import Vring
    from pyvmm.kvm.recorder import Scope
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.statistics import Statistics
else:
    Protocol = object  # `typing` costs as much as all else that a run imports

#: Entries of each table kept; with more, everything of that kind is received.
MAC_TABLE = 64
#: Longest command: class, command and two full address tables as a driver may send them.
COMMAND_MAX = 2 + 2 * (4 + 6 * 4096)


class Controlled(Protocol):
    """What commands need of the device that they are for.

    :ivar rx: what the driver wants to receive. Other threads look at it, so its sets are replaced,
        never changed. :ivar commands: how many have been taken.
    :ivar statistics: what the driver is told of.
    """

    memory: GuestMemory
    recorder: Scope | None
    mac: bytes
    rx: RxFilter
    commands: int
    statistics: Statistics

    def fault(self, queue: int, problem: str) -> None:
        """A command has failed in a way that only a reset cures."""

    def rx_changed(self) -> None:
        """``rx`` is to be put into force."""

    def announced(self) -> bool:
        """The driver acknowledges an announcement; whether it had been asked for one."""

    def set_pairs(self, pairs: int) -> bool:
        """Use so many queue pairs; False if there are not as many.

        :raises PyvmmError: the data path does not start again.
        """

    def steer(self, pairs: int, steering: Steering) -> bool:
        """Use at least so many queue pairs, and choose the one of a frame by its hash; False if
        there are not as many.

        :raises PyvmmError: the host refuses, or the data path does not start again.
        """

    def set_hashing(self, hashing: Hashing) -> None:
        """Put the hash of each frame into its header.

        :raises PyvmmError: the data path does not start again.
        """

    def set_offloads(self, offloads: int) -> bool:
        """Have the host send what ``offloads`` allows; False if that was not negotiated.

        :raises PyvmmError: the host refuses.
        """

    def coalesce_way(self, way: int, packets: int, usecs: int) -> None:
        """Let interrupts of all receive (0) or transmit virtqueues (1) wait.

        :raises PyvmmError: the data path does not start again.
        """

    def coalesce_queue(self, index: int, packets: int, usecs: int) -> bool:
        """Let interrupts of one virtqueue wait; False if there is no such virtqueue.

        :raises PyvmmError: the data path does not start again.
        """

    def coalescing(self, index: int) -> tuple[int, int] | None:
        """Packets and microseconds of a virtqueue; None if there is no such virtqueue."""

    def records(self, wanted: list[tuple[int, int]]) -> bytes | None:
        """The statistics of virtqueues, each with a mask of types; None if there is no such
        virtqueue, or it has no such type.
        """


class Control:
    """Serves the control queue of ``device``. Guest memory is touched in ``serve`` only.

    :param acked: the negotiated features.
    :raises RingFault: the ring is malformed.
    """

    def __init__(self, device: Controlled, vring: Vring, acked: int) -> None:
        self._device = device
        self._call = vring.call
        self._acked = acked
        self._queue = ServedQueue(device.memory, vring, acked, limit=COMMAND_MAX)
        self._limit = vring.size

    def serve(self) -> bool:
        """Answer what is in the queue, at most as many commands as it has entries; whether there
        are more, for which the driver may not kick.

        :raises RingFault: the driver got the ring or a chain wrong.
        """
        queue = self._queue
        for _ in range(self._limit):
            chain = queue.pop()
            if chain is None:
                break
            if not chain.room:
                raise RingFault("a control command without room for the answer")
            begin = time.monotonic_ns()
            result = self._execute(chain.request)
            good = result is not None
            self._device.statistics.succeeded += good
            if self._device.recorder is not None:
                args: dict[str, object] = {"request": chain.request, "good": good}
                self._device.recorder.step("control command", begin, args)
            status = VIRTIO_NET_ERR if result is None else VIRTIO_NET_OK
            queue.push(chain, chain.reply(bytes([status]) + (result or b"")))
        if queue.flush():
            self._call.nudge()
        return queue.enable_notify()

    def _execute(self, request: bytes) -> bytes | None:
        """One command: what it returns; None if it was not understood or not done."""
        device = self._device
        device.commands += 1
        device.statistics.commands += 1
        if len(request) < 2:
            return None
        known = self._COMMANDS.get((request[0], request[1]))
        if known is None and request[0] == VIRTIO_NET_CTRL_RX and request[1] < len(RxFilter.FLAGS):
            extra = request[1] >= VIRTIO_NET_CTRL_RX_ALLUNI
            known = (
                VIRTIO_NET_F_CTRL_RX_EXTRA if extra else VIRTIO_NET_F_CTRL_RX,
                Control._rx_mode,
            )
        if known is None or not self._acked >> known[0] & 1:
            return None
        try:
            answer = known[1](self, request[1], request[2:])
        except (struct.error, IndexError):
            return None
        except PyvmmError as e:
            device.fault(-1, str(e))
            return None
        if isinstance(answer, bytes):
            return answer
        return b"" if answer else None

    def _rx_mode(self, command: int, data: bytes) -> bool:
        flag = RxFilter.FLAGS[command]
        if len(data) != 1 or data[0] > 1:
            return False
        rx = self._device.rx
        rx.flags = rx.flags | {flag} if data[0] else rx.flags - {flag}
        self._device.rx_changed()
        return True

    def _mac_table(self, command: int, data: bytes) -> bool:
        tables = []
        for _ in ("unicast", "multicast"):
            (count,) = struct.unpack_from("<I", data)
            end = 4 + 6 * count
            if end > len(data):
                return False
            tables.append([data[i : i + 6] for i in range(4, end, 6)])
            data = data[end:]
        unicast, multicast = tables
        if data or any(a[0] & 1 for a in unicast) or not all(a[0] & 1 for a in multicast):
            return False
        rx = self._device.rx
        rx.flags = rx.flags - {"unicast-overflow", "multicast-overflow"}
        if len(unicast) > MAC_TABLE:
            unicast, rx.flags = [], rx.flags | {"unicast-overflow"}
        if len(multicast) > MAC_TABLE:
            multicast, rx.flags = [], rx.flags | {"multicast-overflow"}
        rx.unicast, rx.multicast = unicast, multicast
        self._device.rx_changed()
        return True

    def _mac_address(self, command: int, data: bytes) -> bool:
        if len(data) != 6 or data[0] & 1 or not any(data):
            return False
        self._device.mac = self._device.rx.mac = data
        self._device.rx_changed()
        return True

    def _vlan(self, command: int, data: bytes) -> bool:
        (vlan,) = struct.unpack("<H", data)
        if vlan >= 4096:
            return False
        rx = self._device.rx
        add = command == VIRTIO_NET_CTRL_VLAN_ADD
        rx.vlans = rx.vlans | {vlan} if add else rx.vlans - {vlan}
        self._device.rx_changed()
        return True

    def _announced(self, command: int, data: bytes) -> bool:
        return self._device.announced()

    def _pairs(self, command: int, data: bytes) -> bool:
        (pairs,) = struct.unpack("<H", data)
        return self._device.set_pairs(pairs)

    def _rss(self, command: int, data: bytes) -> bool:
        """5.1.6.5.7.1: struct virtio_net_rss_config."""
        types, most, unclassified = struct.unpack_from("<IHH", data)
        if most & most + 1 or most >= RSS_TABLE_MAX:
            return False
        table = struct.unpack_from(f"<{most + 1}H", data, 8)
        (pairs,) = struct.unpack_from("<H", data, 10 + 2 * most)
        hashing = _hashing(types, data[12 + 2 * most :])
        if hashing is None or pairs == 0:
            return False
        return self._device.steer(pairs, Steering(hashing, table, unclassified))

    def _hash(self, command: int, data: bytes) -> bool:
        """5.1.6.5.6.4: struct virtio_net_hash_config."""
        (types,) = struct.unpack_from("<I8x", data)
        hashing = _hashing(types, data[12:])
        if hashing is not None:
            self._device.set_hashing(hashing)
        return hashing is not None

    def _offloads(self, command: int, data: bytes) -> bool:
        (offloads,) = struct.unpack("<Q", data)
        return self._device.set_offloads(offloads)

    def _coalesce_all(self, command: int, data: bytes) -> bool:
        """5.1.6.5.7: the virtqueues of one direction."""
        way = int(command == VIRTIO_NET_CTRL_NOTF_COAL_TX_SET)
        self._device.coalesce_way(way, *struct.unpack("<II", data))
        return True

    def _coalesce_one(self, command: int, data: bytes) -> bool:
        """5.1.6.5.7: one virtqueue."""
        return self._device.coalesce_queue(*struct.unpack("<H2xII", data))

    def _coalescing(self, command: int, data: bytes) -> bytes | bool:
        """5.1.6.5.7: what is in force; the driver sends a structure of which the queue counts."""
        queue, _, _ = struct.unpack("<H2xII", data)
        found = self._device.coalescing(queue)
        return struct.pack("<H2xII", queue, *found) if found is not None else False

    def _statistics_known(self, command: int, data: bytes) -> bytes | bool:
        """5.1.6.5.10.1: the types that there are."""
        return struct.pack("<Q", supported(self._acked)) if not data else False

    def _statistics(self, command: int, data: bytes) -> bytes | bool:
        """5.1.6.5.10.2: an array of struct virtio_net_ctrl_queue_stats; an error in one fails all.
        Too little room is no error: the driver's buffer "may be smaller", and is filled.
        """
        found = self._device.records(list(struct.iter_unpack("<H6xQ", data)))
        return found if found is not None else False

    #: (class, command) -> (feature that it needs, what does it); VIRTIO_NET_CTRL_RX is in
    #: ``_execute``.
    _COMMANDS: dict[tuple[int, int], tuple[int, Callable[[Control, int, bytes], bytes | bool]]] = {
        (VIRTIO_NET_CTRL_NOTF_COAL, VIRTIO_NET_CTRL_NOTF_COAL_TX_SET): (
            VIRTIO_NET_F_NOTF_COAL,
            _coalesce_all,
        ),
        (VIRTIO_NET_CTRL_NOTF_COAL, VIRTIO_NET_CTRL_NOTF_COAL_RX_SET): (
            VIRTIO_NET_F_NOTF_COAL,
            _coalesce_all,
        ),
        (VIRTIO_NET_CTRL_NOTF_COAL, VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET): (
            VIRTIO_NET_F_VQ_NOTF_COAL,
            _coalesce_one,
        ),
        (VIRTIO_NET_CTRL_NOTF_COAL, VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET): (
            VIRTIO_NET_F_VQ_NOTF_COAL,
            _coalescing,
        ),
        (VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_QUERY): (
            VIRTIO_NET_F_DEVICE_STATS,
            _statistics_known,
        ),
        (VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_GET): (
            VIRTIO_NET_F_DEVICE_STATS,
            _statistics,
        ),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET): (VIRTIO_NET_F_CTRL_RX, _mac_table),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET): (
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            _mac_address,
        ),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD): (VIRTIO_NET_F_CTRL_VLAN, _vlan),
        (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL): (VIRTIO_NET_F_CTRL_VLAN, _vlan),
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK): (
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            _announced,
        ),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET): (VIRTIO_NET_F_MQ, _pairs),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG): (VIRTIO_NET_F_RSS, _rss),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_HASH_CONFIG): (VIRTIO_NET_F_HASH_REPORT, _hash),
        (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET): (
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            _offloads,
        ),
    }


def _hashing(types: int, rest: bytes) -> Hashing | None:
    """What the types and the end of a command, the key and its length, mean; None if they may not
    be so.
    """
    if types & ~RSS_HASH_TYPES or rest[0] > RSS_KEY_MAX or len(rest) != 1 + rest[0]:
        return None
    return Hashing(types, rest[1:])
