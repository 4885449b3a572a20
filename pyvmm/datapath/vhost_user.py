"""The vhost-user data path: another process moves the packets.

The conversation with that process, and what happens when the process goes and comes back, is the
same for every kind of device: ``pyvmm.vhostuser`` has it. This module adds the network card's part:
which features the back-end honours, queue pairs, the MTU, and telling the network where the card
is.
"""

from __future__ import annotations

import struct

from pyvmm.datapath.base import HandOverTimes, OnUplink
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.hostnet.rtnetlink import PacketCount
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio, virtio_net
from pyvmm.spec.vhost_user import (
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_RARP,
)
from pyvmm.spec.virtio_net import VIRTIO_NET_F_MTU
from pyvmm.vhostuser.device import VhostUserDevice
from pyvmm.vhostuser.session import PROTOCOL_FEATURES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.hostnet.rtnetlink import Link
    from pyvmm.memory import GuestMemory
    from pyvmm.vhostuser.connect import Connector
    from pyvmm.vhostuser.device import FaultEvents
    from pyvmm.vhostuser.session import Session, Virtqueue

#: Features that are the back-end's to honour; the rest (MAC, STATUS, CTRL_*, MQ) are the device's.
DATA_FEATURES = (
    virtio.VIRTIO_RING_F_INDIRECT_DESC,
    virtio.VIRTIO_RING_F_EVENT_IDX,
    virtio.VIRTIO_F_VERSION_1,
    virtio.VIRTIO_F_RING_PACKED,
    virtio.VIRTIO_F_IN_ORDER,
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
    virtio_net.VIRTIO_NET_F_GUEST_USO4,
    virtio_net.VIRTIO_NET_F_GUEST_USO6,
    virtio_net.VIRTIO_NET_F_HOST_USO,
    virtio_net.VIRTIO_NET_F_RSS,
)
DATA_MASK = sum(1 << bit for bit in DATA_FEATURES)
#: Protocol features of network cards.
NET_PROTOCOL_FEATURES = 1 << VHOST_USER_PROTOCOL_F_RARP | 1 << VHOST_USER_PROTOCOL_F_MTU
#: feature -> one of these is required for it (virtio 1.2, 5.1.3.1). Some back-ends offer the
#: feature without.
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
    (virtio_net.VIRTIO_NET_F_GUEST_USO4, (virtio_net.VIRTIO_NET_F_GUEST_CSUM,)),
    (virtio_net.VIRTIO_NET_F_GUEST_USO6, (virtio_net.VIRTIO_NET_F_GUEST_CSUM,)),
    (virtio_net.VIRTIO_NET_F_HOST_USO, (virtio_net.VIRTIO_NET_F_CSUM,)),
    (
        virtio_net.VIRTIO_NET_F_GUEST_ECN,
        (virtio_net.VIRTIO_NET_F_GUEST_TSO4, virtio_net.VIRTIO_NET_F_GUEST_TSO6),
    ),
)


class VhostUserNet(OnUplink, VhostUserDevice):
    """Implements ``DataPath`` (datapath.base). ``connect`` comes before everything else.

    :param connector: makes connections to the back-end; owned from here on.
    :param queues: pairs that the back-end must have. :param mtu: bytes that it must agree to, or
        None.
    :param mac: of the card, 6 bytes, for announcing it after a reconnect, or None.
    :param timeout: seconds for a whole conversation, such as a start or a stop of the rings.
    :param recorder: a ``kvm.recorder.Scope`` for every message, or None.
    :param link: gives the link of the tap that the back-end has from us, whose packets are counted
        there; None if the back-end's host side is its own.
    """

    name = "vhost-user"
    restarts_for_offloads = True  # the back-end learns of them by SET_FEATURES
    times: HandOverTimes
    data_features = DATA_MASK
    protocol_features = PROTOCOL_FEATURES | NET_PROTOCOL_FEATURES

    def __init__(
        self,
        connector: Connector,
        *,
        queues: int = 1,
        mtu: int | None = None,
        mac: bytes | None = None,
        timeout: float = 5.0,
        recorder: Any = None,
        link: Callable[[], Link] | None = None,
    ) -> None:
        self.queues, self.mtu, self.mac = queues, mtu, mac
        self._announcements = 0
        self._packets: PacketCount | None = None
        if link is not None:
            link()  # now, while there is one
            self._packets = PacketCount(link)
        super().__init__(connector, 2 * queues, HandOverTimes(), timeout=timeout, recorder=recorder)

    # --- VhostUserDevice --------------------------------------------------------------------------

    def check_offer(self, s: Session) -> None:
        """:raises VhostUserError: it has too few queue pairs, or takes no MTU."""
        # GET_QUEUE_NUM: the specification says queues, but every implementation for network cards
        # means pairs.
        pairs = 1 if s.queue_num is None else s.queue_num
        where = f"the back-end at {s.name}"
        if pairs < self.queues:
            raise VhostUserError(
                f"{where} has {pairs} queue pairs, not {self.queues}", "use fewer queues="
            )
        if self.mtu is not None and not s.has(VHOST_USER_PROTOCOL_F_MTU):
            raise VhostUserError(f"{where} does not take an MTU", "leave mtu= away")

    def introduce(self, s: Session, acked: int) -> None:
        """Agree on the MTU, if the driver knows of one."""
        if self.mtu is not None and acked >> VIRTIO_NET_F_MTU & 1:
            what, payload = f"an MTU of {self.mtu}", struct.pack("<Q", self.mtu)
            s.order(spec.VHOST_USER_NET_SET_MTU, what, payload)

    def resumed(self, s: Session) -> None:
        """Have the back-end tell the network where the card is now."""
        if self.mac is not None and s.has(VHOST_USER_PROTOCOL_F_RARP):
            s.tell(spec.VHOST_USER_SEND_RARP, self.mac + bytes(2))
            self._announcements += 1

    def repeats(self, ring: Virtqueue) -> bool:
        """Transmits may be repeated; a receive buffer that is filled again does no harm."""
        return bool(ring.index % 2)

    def feature_names(self, features: int) -> str:
        """As in the specification."""
        from pyvmm.virtio.features import names

        return " ".join(names(features))

    # --- DataPath ---------------------------------------------------------------------------------

    def features(self) -> int:
        """The features of a data path that the back-end offers. The protocol has no message for
        steering, so that the tap has to be ours.
        """
        features = consistent(super().features())
        return features & ~(1 << virtio_net.VIRTIO_NET_F_RSS if self._packets is None else 0)

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Virtqueue],
        events: FaultEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Have the back-end serve the rings. If it is gone or fails, the rings are parked until
        there is one that serves them.
        """
        if rings and self._packets is not None:
            self._packets.start()
        super().start(acked, memory, rings, events, patience=patience)

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Take the rings back. A back-end that does not give them is cut off; then the used indices
        are the positions.
        """
        bases = super().stop(patience=patience)
        if bases and self._packets is not None:
            self._packets.stop()
        return bases

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Take back the transmit rings. (DPDK stops receiving, too.)

        :raises PyvmmError: the back-end does not give them.
        """
        self.stop_rings(range(1, 2 * self.queues, 2), patience=patience)

    def send_rarp(self, mac: bytes) -> bool:
        """Ask the back-end to tell its network where ``mac`` is (SEND_RARP); whether it does."""

        sent = False

        def ask(s: Session) -> None:
            nonlocal sent
            if s.has(VHOST_USER_PROTOCOL_F_RARP):
                s.order(spec.VHOST_USER_SEND_RARP, "an announcement", mac + bytes(2))
                sent = True

        try:
            self.converse(ask)
        except PyvmmError:
            return False
        self._announcements += sent
        return sent

    def workers(self) -> list[dict[str, object]]:
        """None: the threads are in the other process."""
        return []

    def counters(self) -> dict[str, int]:
        """Connections, losses and their cost; also the packets, if the tap is ours."""
        out = self._packets.read() if self._packets is not None else {}
        out |= super().counters()
        out["tx_possible_repeats"] = out.pop("possible_repeats")
        out["announcements"] = self._announcements
        return out


def consistent(features: int) -> int:
    """``features`` without those that lack a feature which they require."""
    for bit, needs in REQUIRES:
        if not any(features >> need & 1 for need in needs):
            features &= ~(1 << bit)
    return features
