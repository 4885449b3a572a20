"""Our vhost-user back-end against a hostile front-end: messages in any order with any payload and
descriptors, memory that shrinks, eventfds that are full and make writers wait, rings of garbage.
A front-end may end its own session, and nothing else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import loop_port
from pyvmm.backend.server import Backend
from pyvmm.errors import PyvmmError
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Channel, Region, pack_regions
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1 << 20
USER = 0x10000
MESSAGES = 24


class Peer:
    """A front-end's descriptors; those that it has spoilt are made anew for the next input."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memory, SIZE)
        self.map = mmap.mmap(self.memory, SIZE)
        self.unsealable = os.memfd_create("unsealable", 0)
        os.ftruncate(self.unsealable, SIZE)
        self.notes = os.memfd_create("notes", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.notes, 1 << 16)
        self.pipe = os.pipe()
        self.events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.fds = [*self.events, self.memory, self.notes, self.unsealable, self.pipe[1]]

    def spoil(self, event: int) -> None:
        """As whoever shares an eventfd can: full, and a write to it waits."""
        os.set_blocking(event, False)
        try:
            os.eventfd_write(event, (1 << 64) - 2)
        except BlockingIOError:
            pass
        os.set_blocking(event, True)

    def mend(self) -> None:
        for event in self.events:
            os.set_blocking(event, False)
            try:
                os.eventfd_read(event)
            except BlockingIOError:
                pass
        if not fcntl.fcntl(self.unsealable, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            os.ftruncate(self.unsealable, SIZE)


def payload(d: Data, offered: int) -> bytes:
    kind, ring = d.below(11), d.below(5)
    if kind == 0:
        return d.some(70)
    if kind == 1:
        return struct.pack(spec.VRING_STATE, ring, 1 << d.below(17))
    if kind == 2:
        return struct.pack(spec.VRING_STATE, ring, d.value(4))
    if kind == 3:
        return struct.pack("<Q", ring | d.below(2) << 8)
    if kind == 4:
        return pack_regions([Region(0, SIZE, USER, 0)])
    if kind == 5:
        regions = [
            Region(d.value(8), d.value(8), d.value(8), d.value(8)) for _ in range(1 + d.below(3))
        ]
        return pack_regions(regions)
    if kind == 6:
        at = USER + 0x1000 + 0x4000 * ring
        return struct.pack(spec.VRING_ADDR, ring, 0, at, at + 0x2000, at + 0x1000, 0)
    if kind == 7:
        flags, parts = d.below(2), [d.value(8) for _ in range(4)]
        return struct.pack(spec.VRING_ADDR, ring, flags, *parts)
    if kind == 8:
        return struct.pack(spec.INFLIGHT, 1 << 14, 8 * d.below(9), ring, d.below(301))
    if kind == 9:
        return struct.pack("<Q", offered & d.value(8) if d.below(2) else offered)
    region = Region(0x100000 * ring, 0x4000, 0x200000 + 0x100000 * ring, 0x1000 * ring)
    return bytes(8) + region.pack()


def begin(d: Data, features: int, protocol: int) -> bytes:
    """What any front-end says first, so that more of what follows is understood."""
    out = b""
    for request, value in (
        (spec.VHOST_USER_SET_PROTOCOL_FEATURES, protocol),
        (spec.VHOST_USER_SET_FEATURES, features),
    ):
        out += struct.pack(spec.HEADER, request, 1, 8) + struct.pack("<Q", value)
    return out


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input: a whole connection."""
    backend, peer = Backend(NetService(loop_port(2))), Peer()
    features, protocol = backend._features, backend._protocol_features

    def say(d: Data, ours: socket.socket) -> None:
        request = d.below(47) if not d.one_in(16) else d.value(4)
        data = payload(d, features)
        flags = 1 | d.below(2) << 3 if not d.one_in(20) else d.value(4)
        size = len(data) if not d.one_in(20) else d.number(2)
        count = d.below(3) if not d.one_in(30) else d.below(12)
        fds = [d.of(peer.fds) for _ in range(count)]
        message = struct.pack(spec.HEADER, request, flags, size) + data
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
        cut = d.below(len(message)) + 1 if d.one_in(16) else len(message)
        ours.sendmsg([message[:cut]], rights if fds else [])
        if message[cut:]:
            ours.send(message[cut:])

    def one(data: bytes) -> None:
        d = Data(data)
        peer.map[0x1000:0x1040] = d.take(64).ljust(64, b"\0")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        try:
            if d.below(4):
                ours.send(begin(d, features, protocol))
            try:
                for _ in range(MESSAGES):
                    if not d.left:
                        break
                    trick = d.below(16)
                    if trick == 15:
                        peer.spoil(d.of(peer.events))
                    elif trick == 14:
                        os.ftruncate(peer.unsealable, 0)
                    else:
                        say(d, ours)
            except OSError:
                pass  # it takes no more
            ours.shutdown(socket.SHUT_WR)
            try:
                backend.serve(Channel(theirs))
            except PyvmmError as e:
                assert "\n" not in str(e)
        finally:
            ours.close()
            peer.mend()

    return one
