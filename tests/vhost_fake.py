"""vhost-net and vhost-vdpa without their kernel modules: devices that have workers of the emulated
path move the packets; of vhost-net, one for each ring that gets a backend.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, cast

from pyvmm._ext import lib
from pyvmm.datapath.emulated import RING_FEATURES, EmulatedNet
from pyvmm.datapath.vhost_net import VhostNet
from pyvmm.datapath.vhost_vdpa import VhostVdpa
from pyvmm.errors import HostError, RingFault
from pyvmm.fd import EventFd, Fd
from pyvmm.hostnet.rtnetlink import STATS
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET
from tests.driver import Cable, bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import Vring
    from pyvmm.datapath.vdpa_device import Mapping, Vdpa
    from pyvmm.datapath.vhost_device import Vhost
    from pyvmm.hostnet.tap import Tap
    from pyvmm.memory import GuestMemory


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
        self._mutex = threading.RLock()  # an ioctl at a time, as in the kernel
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
        with self._mutex:
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

    def set_base(self, ring: int, position: int) -> None:
        self._check("set_base")
        assert self._rings[ring].path is None
        self._rings[ring].position = position

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


class FakeVdpa:
    """Stands in for ``pyvmm.datapath.vdpa_device.Vdpa``: a network card of one queue pair that can
    be suspended, and has no control queue.
    """

    name, path = "fake0", "/dev/vhost-vdpa-99"
    features = FakeVhost.features
    backend = 1 << lib.VHOST_BACKEND_F_SUSPEND
    suspends = True
    size_max, rings, spaces = 1024, 2, 1
    iova = 0, (1 << 64) - 1

    def __init__(self, port: Cable, memory: GuestMemory) -> None:
        self._port, self._memory = port, memory
        self._status = self._acked = 0
        self._mapped: list[Mapping] = []
        self._set: dict[int, Vring] = {}
        self._enabled: set[int] = set()
        self._positions: dict[int, int] = {}
        self._changed: EventFd | None = None
        self._worker: EmulatedNet | None = None

    def has(self, bit: int) -> bool:
        return bool(self.backend >> bit & 1)

    def status(self) -> int:
        return self._status

    def set_status(self, status: int) -> None:
        self._status = status
        if not status:
            self.suspend()
            self._set, self._positions = {}, {}
            self._enabled.clear()

    def negotiate(self, features: int) -> None:
        self.set_status(0)
        if features & ~self.features:
            raise HostError(f"{self.name} does not take the features {features:#x}")
        self._acked = features

    def go(self) -> None:
        assert self._mapped and self._worker is None
        worker = EmulatedNet(self._port)
        rings = [self._set[index] for index in sorted(self._enabled)]
        before, self._status = self._status, VIRTIO_CONFIG_S_DRIVER_OK  # a fault may come at once
        try:
            worker.start(self._acked, self._memory, rings, self)
        except RingFault as e:
            self._status = before
            worker.close()
            raise HostError("VHOST_VDPA_SET_STATUS failed: Bad address") from e
        self._worker = worker

    def suspend(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            self._positions = dict(zip(sorted(self._enabled), worker.stop(), strict=True))
            worker.close()

    def fault(self, queue: int, problem: str) -> None:
        self._status |= VIRTIO_CONFIG_S_NEEDS_RESET
        if self._changed is not None:
            self._changed.signal()

    def link(self, up: bool) -> None:
        pass

    def config(self) -> bytes:
        return bytes(12)

    def call_for_config(self, event: EventFd | None) -> None:
        self._changed = event

    def set_ring(self, index: int, vring: Vring) -> None:
        self._set[index] = vring

    def enable(self, index: int) -> None:
        self._enabled.add(index)

    def clear_ring(self, index: int) -> None:
        assert self._worker is None

    def base(self, index: int) -> int:
        return self._positions[index]

    def doorbell(self, index: int) -> None:
        return None

    def map(self, mappings: Sequence[Mapping], space: int = 0) -> None:
        assert not self._mapped, "the kernel maps no address twice"
        self._mapped = list(mappings)

    def unmap(self, mappings: Sequence[Mapping], space: int = 0) -> None:
        assert self._mapped == list(mappings) and self._worker is None
        self._mapped = []

    def close(self) -> None:
        self.set_status(0)


def fake_vhost_vdpa(port: LinkedCable, memory: GuestMemory) -> VhostVdpa:
    """The data path to a device whose frames enter and leave at ``port``."""
    return VhostVdpa(cast("Vdpa", FakeVdpa(port, memory)))
