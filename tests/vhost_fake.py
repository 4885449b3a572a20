"""vhost-net without its kernel module: a device that has workers of the emulated path move the
packets, one for each ring that gets a backend.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from pyvmm.datapath.emulated import RING_FEATURES, EmulatedNet
from pyvmm.datapath.vhost_net import VhostNet
from pyvmm.errors import HostError, RingFault
from pyvmm.fd import EventFd, Fd
from pyvmm.hostnet.rtnetlink import STATS
from tests.driver import Cable, bits

if TYPE_CHECKING:
    from pyvmm.datapath.base import Vring
    from pyvmm.datapath.vhost_device import Vhost
    from pyvmm.hostnet.tap import Tap


class StillLink:
    """A link to which nothing happens."""

    def __init__(self) -> None:
        self._event = EventFd()

    def fileno(self) -> int:
        return self._event.fileno()

    def stats(self) -> dict[str, int]:
        return dict.fromkeys(STATS, 0)

    def gone(self) -> bool:
        return False

    def close(self) -> None:
        self._event.close()


class LinkedCable(Cable):
    """A cable with what vhost-net and a vhost-user back-end want of a tap."""

    def __init__(self) -> None:
        super().__init__()
        self._link = StillLink()

    def link(self) -> StillLink:
        return self._link

    def reopen(self) -> bool:
        return False

    def accept_mtu(self, mtu: int) -> bool:
        return True

    def close(self) -> None:
        super().close()
        self._link.close()


class OneFd(Cable):
    """The port of a ring's worker."""

    def __init__(self, fd: int) -> None:
        self.fds = [Fd(os.dup(fd))]
        self.mtu = 1500

    def close(self) -> None:
        for fd in self.fds:
            fd.close()


class FakeRing:
    """A ring of the device, as the ioctls have set it up."""

    def __init__(self) -> None:
        self.vring: Vring | None = None
        self.err: EventFd | None = None
        self.path: EmulatedNet | None = None
        self.port: OneFd | None = None
        self.position = 0

    def fault(self, queue: int, problem: str) -> None:
        if self.err is not None:
            self.err.signal()

    def link(self, up: bool) -> None:
        pass


class FakeVhost:
    """Stands in for ``pyvmm.datapath.vhost_device.Vhost``.

    :ivar refuse: names of methods that fail as an ioctl would. :ivar broken: of those that raise
        what they should never raise.
    """

    worker, worker_name = None, ""
    features = sum(1 << bit for bit in RING_FEATURES) | bits("VIRTIO_F_VERSION_1")

    def __init__(self) -> None:
        self._rings = [FakeRing(), FakeRing()]
        self._acked = 0
        self._memory: Any = None
        self.refuse: set[str] = set()
        self.broken: set[str] = set()

    def _check(self, name: str) -> None:
        if name in self.refuse:
            raise HostError(f"{name} failed: Bad address")
        if name in self.broken:
            raise ZeroDivisionError(name)

    def set_features(self, acked: int) -> None:
        self._check("set_features")
        self._acked = acked

    def set_memory(self, memory: Any) -> None:
        self._check("set_memory")
        self._memory = memory

    def set_ring(self, ring: int, vring: Vring, memory: Any, err: EventFd) -> None:
        self._check("set_ring")
        own = self._rings[ring]
        own.vring, own.err, own.position = vring, err, vring.base

    def set_poll(self, ring: int, usecs: int) -> None:
        self._check("set_poll")

    def clear_ring(self, ring: int) -> None:
        self._rings[ring].vring = self._rings[ring].err = None

    def set_backend(self, ring: int, fd: int) -> None:
        own = self._rings[ring]
        if own.path is not None and own.port is not None:
            own.position = own.path.stop()[0]
            own.path.close()
            own.port.close()
            own.path = None
        if fd < 0:
            return
        self._check("set_backend")
        assert own.vring is not None
        own.port = OneFd(fd)
        path = EmulatedNet(own.port)
        try:
            path.start(self._acked, self._memory, [own.vring.at(own.position)], own)
        except RingFault as e:
            path.close()
            own.port.close()
            raise HostError("VHOST_NET_SET_BACKEND failed: Bad address") from e
        own.path = path

    def base(self, ring: int) -> int:
        self._check("base")
        return self._rings[ring].position

    def close(self) -> None:
        for ring in (0, 1):
            self.set_backend(ring, -1)


def fake_vhost_net(port: LinkedCable) -> tuple[VhostNet, FakeVhost]:
    """The data path on ``port``, and its device."""
    device = FakeVhost()
    return VhostNet(cast("Tap", port), [cast("Vhost", device)]), device
