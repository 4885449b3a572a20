"""Our vhost-user front-end against a hostile back-end, which answers anything: no answer may make
it raise what is no PyvmmError, wait for longer than its time, or lose a descriptor.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.vhost_user import (
    VHOST_USER_PROTOCOL_F_BACKEND_REQ,
    VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    VHOST_USER_PROTOCOL_F_MQ,
    VHOST_USER_PROTOCOL_F_REPLY_ACK,
)
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Channel
from tests.driver import Events, NetDriver, bits
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

ALL = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_RING_F_EVENT_IDX")
FEATURES = ALL | 1 << spec.VHOST_USER_F_PROTOCOL_FEATURES
MAC = bytes.fromhex("525400123456")
TIMEOUT = 0.03  # seconds of a conversation
DIALS = 3


class Liar(Connector):
    """Connects to a back-end that has given all its answers before it was asked."""

    def __init__(self, d: Data, protocol: int, memory: int) -> None:
        super().__init__("fuzz")
        self.d, self.protocol, self.memory = d, protocol, memory
        self.far: list[socket.socket] = []

    def connect(self, seconds: float | None, end: int) -> Channel:
        if len(self.far) == DIALS:
            raise VhostUserError("gone")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        far.setblocking(False)
        self.far.append(far)
        self.answers(far)
        if self.d.below(2):
            far.shutdown(socket.SHUT_WR)
        return Channel(near)

    def has(self, bit: int) -> bool:
        return bool(self.protocol >> bit & 1)

    def put(
        self, far: socket.socket, request: int, payload: bytes, flags: int = 5, fds: int = 0
    ) -> None:
        message = struct.pack(spec.HEADER, request, flags, len(payload)) + payload
        raw = struct.pack(f"{fds}i", *[self.memory] * fds)
        try:
            far.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, raw)] if fds else [])
        except OSError:
            pass

    def answer(self, far: socket.socket, request: int, payload: bytes, fds: int = 0) -> None:
        d = self.d
        kind = d.below(32)
        if kind == 31:
            self.put(far, d.below(47), payload)
        elif kind == 30:
            self.put(far, request, d.some(40))
        elif kind == 29:
            self.put(far, request, payload, d.value(4))
        elif kind == 28:
            self.put(far, request, payload, fds=1 + d.below(12))
        elif kind == 27:
            try:
                far.send(d.some(20))
            except OSError:
                pass
        else:
            self.put(far, request, payload, fds=fds)

    def number(self, far: socket.socket, request: int, value: int) -> None:
        self.answer(far, request, struct.pack("<Q", value & (1 << 64) - 1))

    def order(self, far: socket.socket, request: int) -> None:
        """What is asked for with an acknowledgement, or by a question after it."""
        if self.has(VHOST_USER_PROTOCOL_F_REPLY_ACK):
            self.number(far, request, self.d.one_in(8))
        else:
            self.number(far, spec.VHOST_USER_GET_FEATURES, FEATURES)

    def answers(self, far: socket.socket) -> None:
        d = self.d
        features = FEATURES if not d.one_in(8) else d.value(8)
        self.number(far, spec.VHOST_USER_GET_FEATURES, features)
        self.number(far, spec.VHOST_USER_GET_PROTOCOL_FEATURES, self.protocol)
        if self.has(VHOST_USER_PROTOCOL_F_MQ):
            self.number(far, spec.VHOST_USER_GET_QUEUE_NUM, 1 + d.below(3) - d.one_in(8))
        if self.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            slots = 8 if not d.one_in(8) else d.value(8)
            self.number(far, spec.VHOST_USER_GET_MAX_MEM_SLOTS, slots)
        if self.has(VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            self.order(far, spec.VHOST_USER_SET_BACKEND_REQ_FD)
        self.number(far, spec.VHOST_USER_GET_FEATURES, features)
        if self.has(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            notes = struct.pack(spec.INFLIGHT, d.value(8), d.value(8), 2, d.value(2))
            self.answer(far, spec.VHOST_USER_GET_INFLIGHT_FD, notes, fds=d.below(3))
            self.order(far, spec.VHOST_USER_SET_INFLIGHT_FD)
        if self.has(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS):
            self.order(far, spec.VHOST_USER_ADD_MEM_REG)
        else:
            self.order(far, spec.VHOST_USER_SET_MEM_TABLE)
        for _ in range(2):
            self.order(far, spec.VHOST_USER_SET_VRING_ENABLE)
        self.number(far, spec.VHOST_USER_GET_FEATURES, FEATURES)
        for ring in range(2):
            state = struct.pack(spec.VRING_STATE, ring, d.value(4))
            self.answer(far, spec.VHOST_USER_GET_VRING_BASE, state)


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input: a card's life with such a back-end."""
    memory = GuestMemory(4 << 20)
    driver = NetDriver(memory, size=64)
    notes = os.memfd_create("notes")
    os.ftruncate(notes, 1 << 16)

    def one(data: bytes) -> None:
        d = Data(data)
        liar = Liar(d, d.number(4) & 0x1FFFF, notes)
        net = VhostUserNet(liar, mac=MAC, timeout=TIMEOUT)
        try:
            net.connect(0.0)
            acked = ALL & net.features()
            for _ in range(d.below(4)):
                kind = d.below(5)
                rings = [r.vring(None) for r in driver.rings][: 2 if kind else 1]
                net.start(acked, memory, rings, Events())
                if kind == 1:
                    net.send_rarp(MAC)
                elif kind == 2:
                    net.drop()
                elif kind == 3:
                    net.stop_transmit()
                elif kind == 4:
                    net.cut()
                net.counters()
                net.problem()
                net.report()
                assert len(net.stop()) == (2 if kind else 1)
        except PyvmmError as e:
            assert "\n" not in str(e)
        finally:
            net.close()
            for far in liar.far:
                far.close()

    return one
