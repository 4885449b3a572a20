"""What a vhost-user back-end for network cards adds to :mod:`pyvmm.backend.frontend`: queue pairs,
offloads, the MTU and announcements. The C worker of the emulated data path moves the packets.
"""

from __future__ import annotations

import os

from pyvmm.datapath.base import by_pair, header_size
from pyvmm.datapath.cable import CableEnd
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.hostnet.frames import rarp
from pyvmm.spec import vhost_user as spec
from pyvmm.spec import virtio_net
from pyvmm.spec.ethernet import ETH_MAX_MTU, ETH_MIN_MTU
from pyvmm.spec.vhost_user import (
    VHOST_F_LOG_ALL,
    VHOST_USER_PROTOCOL_F_LOG_SHMFD,
    VHOST_USER_PROTOCOL_F_MTU,
    VHOST_USER_PROTOCOL_F_RARP,
)
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1
from pyvmm.spec.virtio_net import VIRTIO_NET_HDR_V1_SIZE
from pyvmm.vhostuser.wire import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Protocol

    from pyvmm.backend.frontend import Frontend, Handler
    from pyvmm.datapath.base import Frames, PathEvents, Vring
    from pyvmm.datapath.capture import CapturePoint
    from pyvmm.datapath.impair import ImpairPoint
    from pyvmm.vhostuser.wire import Message

    class Port(Frames, Protocol):
        """Where a back-end's packets enter and leave: a tap, or one of ``pyvmm.backend.ports``."""

        def accept_mtu(self, mtu: int) -> bool:
            """Whether frames of this MTU pass."""

        @property
        def headers(self) -> tuple[int, ...]:
            """The sizes of virtio-net headers that ``set_header`` takes, in bytes."""

        def set_header(self, size: int) -> None:
            """Have a header of so many bytes before each frame."""

        def set_queues(self, count: int) -> None:
            """Have frames spread over the first ``count`` queue pairs only."""

        def set_offloads(self, acked: int) -> None:
            """Let frames come that the GUEST_* bits of ``acked`` allow."""

        def close(self) -> None:
            """Release the descriptors."""


#: Features that the front-end serves, but may offer its guest only if the back-end offers them,
#: too.
FRONT_END_FEATURES = (
    virtio_net.VIRTIO_NET_F_CTRL_VQ,
    virtio_net.VIRTIO_NET_F_CTRL_RX,
    virtio_net.VIRTIO_NET_F_MQ,
    virtio_net.VIRTIO_NET_F_MTU,
    virtio_net.VIRTIO_NET_F_GUEST_ANNOUNCE,
)
OWN_FEATURES = 1 << VIRTIO_F_VERSION_1 | sum(1 << bit for bit in FRONT_END_FEATURES)


#: Features of the worker for which a front-end would have to pass on a driver's command: the
#: protocol has no message for them. Nor has it for features beyond the first 64.
NOT_OURS = ~((1 << 64) - 1) | sum(
    1 << bit
    for bit in (
        virtio_net.VIRTIO_NET_F_NOTF_COAL,
        virtio_net.VIRTIO_NET_F_VQ_NOTF_COAL,
        virtio_net.VIRTIO_NET_F_HASH_REPORT,
        virtio_net.VIRTIO_NET_F_DEVICE_STATS,
    )
)


class NetService:
    """Implements ``Service`` (backend.frontend) for a network card.

    :param port: where packets enter and leave, with one descriptor per queue pair; owned from here
        on.
    :param poll_us: a worker looks for work for this long, in microseconds, before it sleeps.
    :param worker_cpu: pin the worker of queue pair k to CPU ``worker_cpu`` + k.
    :param stopped: see ``EmulatedNet``. :param captures: of the workers, lent.
    :param impair: the faults on demand of the workers, lent.
    """

    in_order = True
    protocol_features = (
        1 << VHOST_USER_PROTOCOL_F_MTU
        | 1 << VHOST_USER_PROTOCOL_F_RARP
        | 1 << VHOST_USER_PROTOCOL_F_LOG_SHMFD
    )

    def __init__(
        self,
        port: Port,
        *,
        poll_us: int = 0,
        worker_cpu: int | None = None,
        stopped: Callable[[str], object] | None = None,
        captures: CapturePoint | None = None,
        impair: ImpairPoint | None = None,
    ) -> None:
        self.name: str = port.name
        self.queue_num = len(port.fds)
        self.rings = 2 * self.queue_num
        self.requests: Mapping[int, Handler] = {
            spec.VHOST_USER_SEND_RARP: self._send_rarp,
            spec.VHOST_USER_NET_SET_MTU: self._set_mtu,
        }
        self._port = port
        self._header = VIRTIO_NET_HDR_V1_SIZE
        self._path = EmulatedNet(
            port,
            poll_us=poll_us,
            worker_cpu=worker_cpu,
            stopped=stopped,
            captures=captures,
            impair=impair,
        )
        self._impair = impair

    def features(self) -> int:
        """The features of the worker and of the port, those that front-ends serve, and the log of
        a migration.
        """
        return self._path.features() & ~NOT_OURS | OWN_FEATURES | 1 << VHOST_F_LOG_ALL

    def ring_features(self) -> int:
        """The features of the worker and of the port that need no control queue."""
        return self._path.features() & ~NOT_OURS & ~(1 << virtio_net.VIRTIO_NET_F_RSS)

    def check_features(self, acked: int) -> None:
        """:raises ProtocolError: they mean a header that the port cannot have."""
        if header_size(acked) not in self._port.headers:
            raise ProtocolError(
                f"SET_FEATURES without VERSION_1 and MRG_RXBUF: {self._port.name} cannot have the"
                " short header of legacy drivers"
            )

    def start(self, acked: int, memory: Any, rings: Sequence[Vring], events: PathEvents) -> None:
        """Start one worker per queue pair.

        :raises PyvmmError: a ring is malformed, or the host has no descriptors, memory or threads.
        """
        self._header = header_size(acked)
        self._port.set_header(self._header)
        self._port.set_queues(len(by_pair(rings)))
        self._port.set_offloads(acked)
        self._path.start(acked, memory, rings, events)

    def stop(self) -> list[int]:
        """Stop the workers; returns each ring's position."""
        return self._path.stop()

    def counters(self) -> dict[str, int]:
        """Those of the emulated data path, and of its faults on demand."""
        faults = self._impair.counters() if self._impair is not None else {}
        return {**self._path.counters(), **faults}

    def close(self) -> None:
        """Stop the workers and close the port."""
        self._path.close()
        self._port.close()

    def _send_rarp(self, frontend: Frontend, m: Message) -> None:
        if len(m.payload) != 8:
            raise ProtocolError(f"SEND_RARP with {len(m.payload)} bytes")
        frontend.park()  # a worker counts on being the only sender
        fd, announcement = self._port.fds[0], rarp(m.payload[:6])
        try:
            if isinstance(fd, CableEnd):
                fd.send(announcement)
            else:
                os.write(fd.fileno(), bytes(self._header) + announcement)
        except OSError as e:
            frontend.log(f"no RARP: {e.strerror}")

    def _set_mtu(self, frontend: Frontend, m: Message) -> None:
        mtu = m.u64
        if not ETH_MIN_MTU <= mtu <= ETH_MAX_MTU:
            raise ProtocolError(f"an MTU of {mtu}")
        if not self._port.accept_mtu(mtu):
            raise ProtocolError(f"an MTU of {mtu}, but {self._port.name} has {self._port.mtu}")
