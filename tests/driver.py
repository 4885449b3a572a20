"""A mock virtio driver (pyvmm.conformance.driver) and a cable in place of a tap, for tests."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pyvmm.conformance import driver
from pyvmm.conformance.driver import NetDriver, PackedRing, Ring, align, fence
from pyvmm.datapath.base import RxFilter, Steering
from pyvmm.fd import Fd
from pyvmm.hostnet.tap import HEADERS
from pyvmm.spec import virtio, virtio_net

__all__ = [
    "Cable",
    "Events",
    "NetDriver",
    "PackedRing",
    "Ring",
    "align",
    "bits",
    "fence",
    "wait_for",
]

#: Seconds for what must come; a busy machine may stand still for some.
PATIENCE = 60.0


def wait_for(condition: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Poll until ``condition()`` holds; False on time-out."""
    return driver.wait_for(condition, timeout)


def bits(*names: str) -> int:
    """A feature mask from the constants' names."""
    both = {**vars(virtio), **vars(virtio_net)}
    return sum(1 << both[name] for name in names)


class Events:
    """What data paths report (``PathEvents``)."""

    def __init__(self) -> None:
        self.faults: list[tuple[int, str]] = []
        self.links: list[bool] = []

    def fault(self, queue: int, problem: str) -> None:
        self.faults.append((queue, problem))

    def link(self, up: bool) -> None:
        self.links.append(up)


class Cable:
    """A packet socket in place of a tap; ``far`` is the other end."""

    name = "cable"
    interface = None
    headers: tuple[int, ...] = HEADERS

    def __init__(self, mtu: int = 1500, buffer: int = 1 << 20) -> None:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for s in (near, self.far):
            s.setblocking(False)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.fds = [Fd(near.detach())]
        self.mtu = mtu

    def features(self) -> int:
        return 0

    def set_queues(self, count: int) -> None:
        pass

    def set_header(self, size: int) -> None:
        self.header = size

    def set_steering(self, steering: Steering | None) -> None:
        self.steering = steering

    def set_offloads(self, acked: int) -> None:
        pass

    def set_rx_filter(self, rx: RxFilter) -> None:
        self.rx = rx

    def set_carrier(self, up: bool) -> None:
        self.carrier = up

    def close(self) -> None:
        for fd in self.fds:
            fd.close()
        self.far.close()

    def receive(self, timeout: float = PATIENCE) -> bytes:
        self.far.settimeout(timeout)
        try:
            return self.far.recv(1 << 17)
        finally:
            self.far.setblocking(False)
