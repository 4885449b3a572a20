"""What a network card tells its driver of what it has done (VIRTIO_NET_F_DEVICE_STATS, virtio 1.4,
5.1.6.5.10): the counters of the virtqueues as records of the control queue.

The counting is the data path's. What a virtqueue has on the data path that runs is added to what it
had on those before, so that a live switch or a reset of the virtqueue loses nothing. The counters
begin with the driver: a reset of the device begins new ones.
"""

from __future__ import annotations

import struct

from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_STATS_TYPE_CVQ,
    VIRTIO_NET_STATS_TYPE_RX_BASIC,
    VIRTIO_NET_STATS_TYPE_RX_CSUM,
    VIRTIO_NET_STATS_TYPE_RX_GSO,
    VIRTIO_NET_STATS_TYPE_TX_BASIC,
    VIRTIO_NET_STATS_TYPE_TX_CSUM,
    VIRTIO_NET_STATS_TYPE_TX_GSO,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    #: Counter of a virtqueue -> its value.
    Counts = Mapping[str, int]

#: Type -> the counters of its structure, in order. "" is 0: frames with a wrong checksum are not
#: looked for, a malformed chain stops its virtqueue instead of being dropped, the card coalesces
#: no frames, and the host gets each frame whole. ``drops`` are all counters of that beginning.
FIELDS = {
    VIRTIO_NET_STATS_TYPE_CVQ: ("commands", "succeeded"),
    VIRTIO_NET_STATS_TYPE_RX_BASIC: ("kicks", "packets", "bytes", "calls", "drops", "drop_held"),
    VIRTIO_NET_STATS_TYPE_RX_CSUM: ("csum_valid", "csum_needed", "csum_none", ""),
    VIRTIO_NET_STATS_TYPE_RX_GSO: ("gso_packets", "gso_bytes", "", ""),
    VIRTIO_NET_STATS_TYPE_TX_BASIC: ("kicks", "packets", "bytes", "calls", "drops", ""),
    VIRTIO_NET_STATS_TYPE_TX_CSUM: ("csum_none", "csum_needed"),
    VIRTIO_NET_STATS_TYPE_TX_GSO: (
        "gso_packets",
        "gso_bytes",
        "",
        "",
        "gso_packets",
        "gso_bytes",
    ),
}
#: What a virtqueue does (``NetDevice.queue_role``) -> the types that it may have.
TYPES = {
    "receive": (
        VIRTIO_NET_STATS_TYPE_RX_BASIC,
        VIRTIO_NET_STATS_TYPE_RX_CSUM,
        VIRTIO_NET_STATS_TYPE_RX_GSO,
    ),
    "transmit": (
        VIRTIO_NET_STATS_TYPE_TX_BASIC,
        VIRTIO_NET_STATS_TYPE_TX_CSUM,
        VIRTIO_NET_STATS_TYPE_TX_GSO,
    ),
    "control": (VIRTIO_NET_STATS_TYPE_CVQ,),
}
#: Type -> features of which one has to be negotiated.
NEEDS = {
    VIRTIO_NET_STATS_TYPE_RX_CSUM: 1 << VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_STATS_TYPE_TX_CSUM: 1 << VIRTIO_NET_F_CSUM,
    VIRTIO_NET_STATS_TYPE_RX_GSO: 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_STATS_TYPE_TX_GSO: 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_USO,
}
HEADER = struct.Struct("<BxHxxH")  # struct virtio_net_stats_reply_hdr: type, vq_index, size
WRAP = (1 << 64) - 1


def supported(acked: int) -> int:
    """The types of which a driver with these features may ask. The others do not come up in the
    answer to a query: Linux asks for all that does.
    """
    return sum(kind for kind in FIELDS if kind not in NEEDS or acked & NEEDS[kind])


class Statistics:
    """The counters of a card since its driver was started.

    :ivar commands: that the control queue has got. :ivar succeeded: of those.
    """

    def __init__(self) -> None:
        self.commands = self.succeeded = 0
        self._rings: dict[int, dict[str, int]] = {}

    def add(self, counts: Mapping[int, Counts]) -> None:
        """Keep what a data path has counted, by virtqueue, from its start to its stop."""
        for index, new in counts.items():
            own = self._rings.setdefault(index, {})
            for name, n in new.items():
                own[name] = own.get(name, 0) + n

    def records(self, index: int, role: str, kinds: int, now: Counts) -> bytes:
        """The records of one virtqueue, lowest type first.

        :param kinds: a mask of types that the virtqueue can have. :param now: what the data path
            that runs has counted so far.
        """
        if role == "control":
            # This command is one of those that succeed.
            counts = {"commands": self.commands, "succeeded": self.succeeded + 1}
        else:
            old = self._rings.get(index, {})
            counts = {name: old.get(name, 0) + now.get(name, 0) for name in old.keys() | now.keys()}
            counts["drops"] = sum(n for name, n in counts.items() if name.startswith("drop_"))
        out = []
        for kind, fields in FIELDS.items():
            if kind & kinds:
                values = [counts.get(name, 0) & WRAP for name in fields]
                size = HEADER.size + 8 * len(values)
                out.append(HEADER.pack(kind.bit_length() - 1, index, size))
                out.append(struct.pack(f"<{len(values)}Q", *values))
        return b"".join(out)
