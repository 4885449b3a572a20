"""Every message of vhost-user once as bytes, written out by hand from QEMU's
docs/interop/vhost-user.rst and from what peers send, so that no constant of ours is on both sides
of a comparison.

Numbers are little-endian. A header is: request, flags (1: the version, 4: reply, 8: a reply is
needed), size of the payload.
"""

from __future__ import annotations

import array
import os
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import loop_port
from pyvmm.backend.server import Backend
from pyvmm.conformance.probe import Probe
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.fd import memfd
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import NOT_REQUESTS
from tests.driver import Events, Ring, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = 60.0


def u16(value: int) -> bytes:
    return value.to_bytes(2, "little")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def state(index: int, num: int) -> bytes:
    """A vring state description."""
    return u32(index) + u32(num)


def head(request: int, flags: int, payload: bytes) -> bytes:
    return u32(request) + u32(flags) + u32(len(payload)) + payload


class Line:
    """One end of a connection, that knows no more of the protocol than where a message ends."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    def say(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], rights) == len(data)

    def hear(self) -> tuple[bytes, list[int]]:
        """One message, header included, and its descriptors; nothing at the end."""
        data, fds = b"", array.array("i")
        while len(data) < 12 or len(data) < 12 + int.from_bytes(data[8:12], "little"):
            want = (
                12 - len(data)
                if len(data) < 12
                else 12 - len(data) + int.from_bytes(data[8:12], "little")
            )
            part, control, *_ = self.sock.recvmsg(want, 256)
            for _, _, rights in control:
                fds.frombytes(rights)
            if not part:
                return b"", []
            data += part
        return data, fds.tolist()


# --- our back-end ---------------------------------------------------------------------------------

#: VERSION_1 is bit 32, PROTOCOL_FEATURES bit 30, MRG_RXBUF bit 15.
CHOSEN = 1 << 32 | 1 << 30 | 1 << 15
MEMORY = 1 << 20
USER = 0x7F0000000000  # where the front-end has its memory mapped
#: Of protocol features: MQ, LOG_SHMFD, RARP, REPLY_ACK, MTU, INFLIGHT_SHMFD, RESET_DEVICE,
#: CONFIGURE_MEM_SLOTS, STATUS.
PROTOCOL = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16
LOG_ALL = 1 << 26
#: 16 bytes per queue and 16 per entry, in multiples of 64: two queues of 256 entries.
INFLIGHT = 2 * (64 + 16 * 256)

REGION = u64(0) + u64(MEMORY) + u64(USER) + u64(0)  # guest address, size, user address, offset
DONE, REFUSED = u64(0), u64(1)

#: request, payload, its descriptors (m: memory, e: eventfd), payload of the answer and descriptors.
BACK_END: list[tuple[int, bytes, str, bytes, int]] = [
    (1, b"", "", b"", 0),  # GET_FEATURES: see below
    (3, b"", "", DONE, 0),  # SET_OWNER
    (2, u64(CHOSEN), "", DONE, 0),  # SET_FEATURES
    (17, b"", "", u64(1), 0),  # GET_QUEUE_NUM: one pair
    (36, b"", "", u64(64), 0),  # GET_MAX_MEM_SLOTS
    (20, u64(1500), "", DONE, 0),  # NET_SET_MTU
    (5, u32(1) + u32(0) + REGION, "m", DONE, 0),  # SET_MEM_TABLE: count, padding, regions
    (38, u64(0) + REGION, "", DONE, 0),  # REM_MEM_REG: padding, region
    (37, u64(0) + REGION, "m", DONE, 0),  # ADD_MEM_REG
    # GET_INFLIGHT_FD: mmap size, mmap offset, queues, queue size; sizeof() of C gives 24
    (
        31,
        u64(0) + u64(0) + u16(2) + u16(256) + u32(0),
        "",
        u64(INFLIGHT) + u64(0) + u16(2) + u16(256) + u32(0),
        1,
    ),
    # as the specification's text counts: 20
    (
        31,
        u64(0) + u64(0) + u16(2) + u16(256),
        "",
        u64(INFLIGHT) + u64(0) + u16(2) + u16(256),
        1,
    ),
    (32, u64(INFLIGHT) + u64(0) + u16(2) + u16(256) + u32(0), "m", DONE, 0),  # SET_INFLIGHT_FD
    (32, u64(INFLIGHT) + u64(0) + u16(2) + u16(256), "m", DONE, 0),
    (8, state(1, 256), "", DONE, 0),  # SET_VRING_NUM
    (10, state(1, 0), "", DONE, 0),  # SET_VRING_BASE
    # SET_VRING_ADDR: index, flags, descriptor table, used ring, available ring, log
    (
        9,
        u32(1) + u32(0) + u64(USER + 0x1000) + u64(USER + 0x3000) + u64(USER + 0x2000) + u64(0),
        "",
        DONE,
        0,
    ),
    (14, u64(1), "e", DONE, 0),  # SET_VRING_ERR
    (13, u64(1 | 1 << 8), "", DONE, 0),  # SET_VRING_CALL: bit 8 says that there is no descriptor
    (13, u64(1), "e", DONE, 0),
    (12, u64(1), "e", DONE, 0),  # SET_VRING_KICK
    (18, state(1, 1), "", DONE, 0),  # SET_VRING_ENABLE
    (39, u64(15), "", DONE, 0),  # SET_STATUS: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK
    (40, b"", "", u64(15), 0),  # GET_STATUS
    (19, bytes.fromhex("5254001234560000"), "", DONE, 0),  # SEND_RARP: a MAC address in 8 bytes
    # Migration, in QEMU's order: SET_LOG_BASE (size, offset; here for 1 MiB), features, addresses
    # with VHOST_VRING_F_LOG and the guest address of the used ring.
    (6, u64(32) + u64(8), "m", DONE, 0),
    (7, b"", "e", DONE, 0),  # SET_LOG_FD
    (2, u64(CHOSEN | LOG_ALL), "", DONE, 0),
    (
        9,
        u32(1)
        + u32(1)
        + u64(USER + 0x1000)
        + u64(USER + 0x3000)
        + u64(USER + 0x2000)
        + u64(0x3000),
        "",
        DONE,
        0,
    ),
    (18, state(1, 0), "", DONE, 0),  # SET_VRING_ENABLE: no
    (10, state(1, 7), "", DONE, 0),  # SET_VRING_BASE
    (39, u64(0), "", DONE, 0),  # SET_STATUS: reset; QEMU asks for positions only then
    (11, state(1, 0), "", state(1, 7), 0),  # GET_VRING_BASE
    (4, b"", "", DONE, 0),  # RESET_OWNER
    (34, b"", "", DONE, 0),  # RESET_DEVICE
    # What we do not offer, is refused in an orderly way.
    (21, b"", "e", REFUSED, 0),  # SET_BACKEND_REQ_FD
    (22, u64(0) + u64(4096) + u64(USER) + bytes([3, 2]) + bytes(6), "", REFUSED, 0),  # IOTLB_MSG
    (23, state(0, 0), "", REFUSED, 0),  # SET_VRING_ENDIAN
    (24, u32(0) + u32(8) + u32(0) + bytes(8), "", REFUSED, 0),  # GET_CONFIG: offset, size, flags
    (25, u32(0) + u32(8) + u32(0) + bytes(8), "", REFUSED, 0),  # SET_CONFIG
    (26, bytes(64), "", REFUSED, 0),  # CREATE_CRYPTO_SESSION
    (27, u64(0), "", REFUSED, 0),  # CLOSE_CRYPTO_SESSION
    (28, b"", "", REFUSED, 0),  # POSTCOPY_ADVISE
    (29, b"", "", REFUSED, 0),  # POSTCOPY_LISTEN
    (30, b"", "", REFUSED, 0),  # POSTCOPY_END
    (33, b"", "e", REFUSED, 0),  # GPU_SET_SOCKET
    (35, state(0, 0), "", REFUSED, 0),  # VRING_KICK
    (41, bytes(16), "", REFUSED, 0),  # GET_SHARED_OBJECT: a UUID
    (42, u32(0) + u32(0), "e", REFUSED, 0),  # SET_DEVICE_STATE_FD: direction, phase
    (43, b"", "", REFUSED, 0),  # CHECK_DEVICE_STATE
    (44, b"", "", REFUSED, 0),  # GET_SHMEM_CONFIG
]
#: Those are sent first, without NEED_REPLY: REPLY_ACK is not agreed on yet.
FIRST = {15, 16}


def requests(backend: bool) -> set[int]:
    """All requests that the constants know."""
    return {
        value
        for name, value in vars(spec).items()
        if name.startswith("VHOST_USER_")
        and not name.startswith(NOT_REQUESTS)
        and name.startswith("VHOST_USER_BACKEND_") == backend
    }


@contextmanager
def our_backend(path: str) -> Iterator[Line]:
    with Backend(NetService(loop_port(1))) as backend:
        thread = threading.Thread(target=backend.run, args=(path,))
        thread.start()
        sock = socket.socket(socket.AF_UNIX)
        try:
            assert wait_for(lambda: not sock.connect_ex(path), PATIENCE)
            yield Line(sock)
        finally:
            sock.close()
            backend.stop()
            thread.join(PATIENCE)


def test_no_message_is_missing() -> None:
    assert {row[0] for row in BACK_END} | FIRST == requests(backend=False)
    assert {row[0] for row in OF_BACK_ENDS} == requests(backend=True)


def test_our_back_end_answers_in_these_bytes(tmp_path: Path) -> None:
    event = os.eventfd(0, os.EFD_NONBLOCK)
    with memfd("test", MEMORY) as memory, our_backend(str(tmp_path / "s")) as line:
        line.say(u32(15) + u32(1) + u32(0))  # GET_PROTOCOL_FEATURES
        assert line.hear() == (u32(15) + u32(5) + u32(8) + u64(PROTOCOL), [])
        line.say(u32(16) + u32(1) + u32(8) + u64(PROTOCOL))  # SET_PROTOCOL_FEATURES
        for request, payload, lent, answer, count in BACK_END:
            fds = [memory.fileno() if kind == "m" else event for kind in lent]
            line.say(head(request, 9, payload), fds)
            heard, got = line.hear()
            try:
                if request == 1:
                    offered = int.from_bytes(heard[12:], "little")
                    assert heard[:12] == u32(1) + u32(5) + u32(8) and offered & CHOSEN == CHOSEN
                else:
                    assert heard == head(request, 5, answer), (request, heard.hex(" "))
                assert len(got) == count, request
            finally:
                for fd in got:
                    os.close(fd)
    os.close(event)


def addresses(flags: int, log: int) -> bytes:
    """SET_VRING_ADDR of ring 1."""
    ring = u64(USER + 0x1000) + u64(USER + 0x3000) + u64(USER + 0x2000)
    return u32(1) + u32(flags) + ring + u64(log)


#: request, payload, descriptors (m: memory of 1 MiB, s: memory that can be made shorter and not be
#: sealed, f: a file on a disk, e: eventfd), whether it is refused.
HOSTILE_LOGS: list[tuple[int, bytes, str, bool]] = [
    (6, u64(4096), "m", True),  # too short
    (6, u64(4096) + u64(0) + u64(0), "m", True),  # too long
    (6, u64(4096) + u64(0), "", True),
    (6, u64(4096) + u64(0), "mm", True),
    (6, u64(0) + u64(0), "m", True),
    (6, u64(MEMORY + 1) + u64(0), "m", True),  # the file is shorter
    (6, u64(4096) + u64(MEMORY), "m", True),
    (6, u64(4096) + u64((1 << 64) - 4096), "m", True),  # the sum overflows
    (6, u64((1 << 64) - 1) + u64(0), "m", True),
    (6, u64((1 << 64) - 1) + u64((1 << 64) - 1), "m", True),
    (6, u64(4096) + u64(0), "e", True),
    (6, u64(4096) + u64(0), "s", True),
    (6, u64(4096) + u64(0), "f", True),
    (6, u64(1) + u64(MEMORY - 1), "m", False),
    (7, b"", "", True),
    (7, b"", "ee", True),
    (7, b"", "m", True),
    (9, addresses(2, 0), "", True),  # an unknown flag
    (9, addresses(3, 0), "", True),
    (9, addresses(1, (1 << 64) - 1), "", False),  # such pages are counted, and not marked
]


def test_hostile_logs(tmp_path: Path) -> None:
    """They are refused one by one, and the session goes on; without LOG_SHMFD all are."""
    event, short = os.eventfd(0, os.EFD_NONBLOCK), os.memfd_create("short")
    os.ftruncate(short, MEMORY)
    disk = os.open(Path(__file__), os.O_RDONLY)
    for protocol in (PROTOCOL, PROTOCOL & ~2):
        with memfd("test", MEMORY) as memory, our_backend(str(tmp_path / "s")) as line:
            lent = {"m": memory.fileno(), "s": short, "f": disk, "e": event}
            line.say(u32(16) + u32(1) + u32(8) + u64(protocol))  # SET_PROTOCOL_FEATURES
            for request, payload, kinds, refused in HOSTILE_LOGS:
                line.say(head(request, 9, payload), [lent[kind] for kind in kinds])
                answer = REFUSED if refused or protocol != PROTOCOL else DONE
                assert line.hear() == (head(request, 5, answer), []), (request, payload.hex(" "))
            if protocol == PROTOCOL:  # QEMU wants an answer that it has not asked for
                line.say(head(6, 1, u64(4096) + u64(0)), [memory.fileno()])
                assert line.hear() == (head(6, 5, DONE), [])
            line.say(head(17, 1, b""))  # GET_QUEUE_NUM
            assert line.hear() == (head(17, 5, u64(1)), [])
    for fd in (event, short, disk):
        os.close(fd)


# --- our front-end --------------------------------------------------------------------------------


class Peer:
    """A back-end of bytes.

    :ivar said: the messages of the front-end. :ivar channel: that of SET_BACKEND_REQ_FD, if any.
    """

    def __init__(self, path: str, protocol: int, padded: bool) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(8)
        self.said: list[bytes] = []
        self.channel: Line | None = None
        tail = u32(0) if padded else b""
        self.answers = {
            1: u64(1 << 32 | 1 << 30 | 1 << 15),
            15: u64(protocol),
            17: u64(1),
            36: u64(8),
            31: u64(8192) + u64(0) + u16(2) + u16(64) + tail,
            40: u64(15),
        }
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        sock, _ = self._listener.accept()
        line = Line(sock)
        while True:
            data, fds = line.hear()
            if not data:
                break
            self.said.append(data)
            request, flags = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
            if request == 21:
                self.channel = Line(socket.socket(fileno=fds.pop()))
            if request == 31:
                file = os.memfd_create("inflight")
                os.ftruncate(file, 8192)
                line.say(head(31, 5, self.answers[31]), [file])
                os.close(file)
            elif request == 11:
                line.say(head(11, 5, data[12:]))
            elif request in self.answers:
                line.say(head(request, 5, self.answers[request]))
            elif flags & 8:
                line.say(head(request, 5, u64(0)))
            for fd in fds:
                os.close(fd)
        sock.close()

    def close(self) -> None:
        self.thread.join(PATIENCE)
        self._listener.close()
        if self.channel is not None:
            self.channel.sock.close()


#: Requests of back-ends and our front-end's answer.
OF_BACK_ENDS = [
    (1, u64(0) + u64(4096) + u64(USER) + bytes([3, 1]) + bytes(6), REFUSED),  # IOTLB_MSG
    (2, b"", DONE),  # CONFIG_CHANGE_MSG
    (3, u64(0) + u64(4096) + u64(0), REFUSED),  # VRING_HOST_NOTIFIER_MSG: area description
    (4, state(0, 0), REFUSED),  # VRING_CALL
    (5, state(0, 0), REFUSED),  # VRING_ERR
    (6, bytes(16), REFUSED),  # SHARED_OBJECT_ADD: a UUID
    (7, bytes(16), REFUSED),  # SHARED_OBJECT_REMOVE
    (8, bytes(16), REFUSED),  # SHARED_OBJECT_LOOKUP
    # SHMEM_MAP, SHMEM_UNMAP: shared memory id, padding, offsets in the file and the region, length,
    # flags
    (9, bytes(8) + u64(0) + u64(0) + u64(4096) + u64(1), REFUSED),
    (10, bytes(8) + u64(0) + u64(0) + u64(4096) + u64(0), REFUSED),
]


def say_all(path: str, protocol: int, padded: bool) -> tuple[list[bytes], GuestMemory, Ring]:
    """A start, an announcement and a stop of a card with one transmit ring; what was said."""
    peer = Peer(path, protocol, padded)
    memory, net = (
        GuestMemory(MEMORY),
        VhostUserNet(Connector(path), mtu=1500, mac=bytes.fromhex("525400123456")),
    )
    ring = Ring(memory, 64, 0x10000, index=1)
    net.connect(PATIENCE)
    net.start(1 << 32 | 1 << 3, memory, [ring.vring()], Events())  # VERSION_1, MTU
    assert net.send_rarp(bytes.fromhex("525400123456"))
    if peer.channel is not None:
        for request, payload, answer in OF_BACK_ENDS:
            peer.channel.say(head(request, 9, payload))
            assert peer.channel.hear() == (head(request, 5, answer), [])
    assert net.stop() == [0]
    assert not net.problems
    net.close()
    peer.close()
    return peer.said, memory, ring


@pytest.mark.parametrize("padded", [True, False], ids=["24", "20"])
def test_our_front_end_says_these_bytes(tmp_path: Path, padded: bool) -> None:
    """All protocol features that it knows: MQ, RARP, REPLY_ACK, MTU, BACKEND_REQ, INFLIGHT_SHMFD,
    RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
    """
    protocol = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 16
    said, memory, ring = say_all(str(tmp_path / "s"), protocol, padded)
    user = memory.regions[0].host
    ask = [u32(1) + u32(1) + u32(0)]
    assert said == [
        *ask,  # GET_FEATURES
        head(15, 1, b""),  # GET_PROTOCOL_FEATURES
        head(16, 1, u64(protocol)),  # SET_PROTOCOL_FEATURES
        head(17, 1, b""),  # GET_QUEUE_NUM
        head(36, 1, b""),  # GET_MAX_MEM_SLOTS
        head(21, 9, b""),  # SET_BACKEND_REQ_FD
        head(3, 1, b""),  # SET_OWNER
        *ask,
        head(20, 9, u64(1500)),  # NET_SET_MTU
        head(31, 1, u64(0) + u64(0) + u16(2) + u16(64) + u32(0)),  # GET_INFLIGHT_FD: 24 bytes
        head(32, 9, u64(8192) + u64(0) + u16(2) + u16(64) + u32(0)),  # SET_INFLIGHT_FD
        head(2, 1, u64(1 << 32 | 1 << 30)),  # SET_FEATURES
        head(37, 9, u64(0) + u64(0) + u64(MEMORY) + u64(user) + u64(0)),  # ADD_MEM_REG
        head(8, 1, state(1, 64)),  # SET_VRING_NUM
        head(10, 1, state(1, 0)),  # SET_VRING_BASE
        head(  # SET_VRING_ADDR
            9,
            1,
            u32(1)
            + u32(0)
            + u64(user + ring.desc)
            + u64(user + ring.used)
            + u64(user + ring.avail)
            + u64(0),
        ),
        head(14, 1, u64(1)),  # SET_VRING_ERR
        head(13, 1, u64(1)),  # SET_VRING_CALL
        head(12, 1, u64(1)),  # SET_VRING_KICK
        head(18, 9, state(1, 1)),  # SET_VRING_ENABLE
        head(39, 1, u64(15)),  # SET_STATUS
        *ask,
        head(19, 9, bytes.fromhex("5254001234560000")),  # SEND_RARP
        head(11, 1, state(1, 0)),  # GET_VRING_BASE
        head(39, 1, u64(0)),
        head(34, 1, b""),  # RESET_DEVICE
    ]
    ring.close()
    memory.close()


def test_our_front_end_to_an_old_back_end(tmp_path: Path) -> None:
    """MTU and RARP alone: the memory table instead of slots, and a question instead of
    acknowledgements.
    """
    said, memory, ring = say_all(str(tmp_path / "s"), 1 << 2 | 1 << 4, True)
    user = memory.regions[0].host
    region = u64(0) + u64(MEMORY) + u64(user) + u64(0)
    ask = u32(1) + u32(1) + u32(0)
    at = said.index(head(5, 1, u32(1) + u32(0) + region))  # SET_MEM_TABLE
    assert said[at + 1] == ask
    assert not any(data[4] & 8 for data in said)
    ring.close()
    memory.close()


@pytest.mark.parametrize("padded", [True, False], ids=["24", "20"])
def test_the_probe_takes_both_lengths(tmp_path: Path, padded: bool) -> None:
    path = str(tmp_path / "s")
    peer = Peer(path, 1 << 3 | 1 << 12, padded)
    with Probe(path, timeout=PATIENCE) as probe:
        probe.run()
    peer.close()
    assert {step.outcome for step in probe.steps} <= {"ok", "sent"}
    (sent,) = [data for data in peer.said if data[:4] == u32(31)]
    assert sent == head(31, 1, u64(0) + u64(0) + u16(2) + u16(256) + u32(0))
