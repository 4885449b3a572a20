"""The hash of a frame's flow, in C and in the kernel's program, beside a third one written out; and
frames that the kernel steers by it.
"""

from __future__ import annotations

import ctypes
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import Hashing, Steering
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.steering import may_steer, steering_program
from pyvmm.spec import virtio_net as vn
from pyvmm.spec.virtio_net import RSS_HASH_TYPES as HASH_TYPES
from tests.driver import wait_for

#: The key and the results with which drivers and devices are checked: Microsoft's "Verifying the
#: RSS hash calculation".
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
KNOWN = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x82989176, 0xAFC7327F),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0F0C461C, 0xDDE51BBF),
    (
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
        44251,
        "fe80::200:f8ff:fe21:67cf",
        38024,
        0x4B61E985,
        0x02D1FEEF,
    ),
]
TCP, UDP, FRAGMENT = 6, 17, 44
EVERY = Hashing(HASH_TYPES, KEY)


def toeplitz(key: bytes, data: bytes) -> int:
    """Bit by bit, as the definition has it."""
    bits, out = int.from_bytes(key.ljust(len(data) + 4, b"\0"), "big"), 0
    size = 8 * max(len(key), len(data) + 4)
    for i in range(8 * len(data)):
        if data[i // 8] & 0x80 >> i % 8:
            out ^= bits >> size - 32 - i & 0xFFFFFFFF
    return out


def ip(
    src: str, dst: str, kind: int, payload: bytes, extra: bytes = b"", fragment: int = 0
) -> bytes:
    """An Ethernet frame; ``extra`` are IPv4 options, or IPv6 extension headers beginning with their
    kind.
    """
    if ":" in src:
        a, b = (socket.inet_pton(socket.AF_INET6, x) for x in (src, dst))
        first, extensions = (extra[0], extra[1:]) if extra else (kind, b"")
        head = struct.pack(">IHBB", 6 << 28, len(payload), first, 64) + a + b + extensions
        ethertype = b"\x86\xdd"
    else:
        a, b = (socket.inet_pton(socket.AF_INET, x) for x in (src, dst))
        length = 5 + len(extra) // 4
        head = (
            struct.pack(">BBHHHBBH", 0x40 | length, 0, 0, 1, fragment, 64, kind, 0) + a + b + extra
        )
        ethertype = b"\x08\x00"
    return b"\x52\x54\0\0\0\x01\x52\x54\0\0\0\x02" + ethertype + head + payload


def hashed(hashing: Hashing, frame: bytes) -> tuple[int, int]:
    """What the worker puts into a header."""
    state, report = ffi.new("struct pv_flow_hash *"), ffi.new("uint16_t *")
    lib.pv_flow_hash_init(state, hashing.types, hashing.key, len(hashing.key))
    own = ffi.new("uint8_t[]", frame)  # so that a sanitizer sees where the frame ends
    return lib.pv_flow_hash(state, own, len(frame), report), report[0]


class Kernel:
    """The kernel's program, run on frames (BPF_PROG_TEST_RUN)."""

    LOAD, RUN, SCHED_CLS = 5, 10, 3

    def __init__(self, steering: Steering) -> None:
        # As a classifier the program sees the Ethernet header, as it does in a tap.
        code = steering_program(steering)
        code_at = ctypes.create_string_buffer(code, len(code))
        license_at = ctypes.create_string_buffer(b"Dual MIT/GPL")
        self.log = ctypes.create_string_buffer(1 << 16)
        attr = struct.pack(
            "=IIQQIIQ",
            self.SCHED_CLS,
            len(code) // 8,
            ctypes.addressof(code_at),
            ctypes.addressof(license_at),
            4,  # of the log, the statistics alone
            len(self.log),
            ctypes.addressof(self.log),
        )
        self.fd = self._bpf(self.LOAD, ctypes.create_string_buffer(attr.ljust(120, b"\0"), 120))

    def _bpf(self, command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        ret = int(libc.syscall(321, command, attr, len(attr)))
        if ret < 0:
            raise OSError(ctypes.get_errno(), self.log.value.decode()[-500:])
        return ret

    def queue(self, frame: bytes) -> int:
        data = ctypes.create_string_buffer(frame, len(frame))
        attr = ctypes.create_string_buffer(
            struct.pack("=IIIIQ", self.fd, 0, len(frame), 0, ctypes.addressof(data)).ljust(
                120, b"\0"
            ),
            120,
        )
        self._bpf(self.RUN, attr)
        return int(struct.unpack_from("=I", attr.raw, 4)[0])

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self.fd)


programs = pytest.mark.skipif(not may_steer(), reason="this user may not load eBPF programs")


@pytest.mark.parametrize(("src", "sport", "dst", "dport", "alone", "ports"), KNOWN)
def test_the_hashes_that_everybody_knows(
    src: str, sport: int, dst: str, dport: int, alone: int, ports: int
) -> None:
    payload = struct.pack(">HH", sport, dport) + bytes(20)
    v6 = 3 if ":" in src else 0
    assert hashed(EVERY, ip(src, dst, TCP, payload)) == (
        ports,
        vn.VIRTIO_NET_HASH_REPORT_TCPv4 + v6,
    )
    assert hashed(EVERY, ip(src, dst, UDP, payload)) == (
        ports,
        vn.VIRTIO_NET_HASH_REPORT_UDPv4 + v6,
    )
    assert hashed(EVERY, ip(src, dst, 1, payload)) == (alone, vn.VIRTIO_NET_HASH_REPORT_IPv4 + v6)
    some = Hashing(vn.VIRTIO_NET_RSS_HASH_TYPE_TCPv4 | vn.VIRTIO_NET_RSS_HASH_TYPE_TCPv6, KEY)
    assert hashed(some, ip(src, dst, UDP, payload)) == (0, vn.VIRTIO_NET_HASH_REPORT_NONE)
    assert hashed(some, ip(src, dst, TCP, payload))[0] == ports


def flows(rng: random.Random) -> Iterator[bytes]:
    """Frames of all kinds, most of them cut off somewhere."""
    for _ in range(600):
        v6 = rng.random() < 0.6
        kind = rng.choice((TCP, UDP, UDP, 1, 58, FRAGMENT))
        src, dst = (
            socket.inet_ntop(
                *(
                    (socket.AF_INET6, rng.randbytes(16))
                    if v6
                    else (socket.AF_INET, rng.randbytes(4))
                )
            )
            for _ in (0, 1)
        )
        if v6:
            extra, after = b"", kind
            for _ in range(rng.choice((0, 0, 1, 2, 4, 5, 6))):
                size = rng.choice((0, 0, 1, 3, 30))
                extra = bytes([after, size]) + rng.randbytes(8 * size + 6) + extra
                after = rng.choice((0, 43, 60))
            extra = bytes([after]) + extra if extra else b""
            fragment = 0
        else:
            extra = rng.randbytes(4 * rng.choice((0, 0, 1, 10)))
            fragment = rng.choice((0, 0, 0, 0x4000, 0x2000, 0x0001))
        frame = ip(src, dst, kind, rng.randbytes(rng.choice((4, 8, 40))), extra, fragment)
        for _ in range(rng.choice((0, 0, 0, 1, 2, 3))):
            tag = rng.choice((b"\x81\x00", b"\x88\xa8"))
            frame = frame[:12] + tag + rng.randbytes(2) + frame[12:]
        if not v6 and rng.random() < 0.1:
            at = 14 if frame[12:14] == b"\x08\x00" else 0
            frame = frame[:at] + bytes([0x40 | rng.randrange(5)]) + frame[at + 1 :] if at else frame
        # The kernel does not run a program on less than what an IP packet must have.
        least = {b"\x08\x00": 34, b"\x86\xdd": 54}.get(frame[12:14], 14)
        yield frame if rng.random() < 0.5 else frame[: rng.randrange(least, len(frame) + 1)]


@pytest.mark.parametrize(
    "types",
    [
        0,
        HASH_TYPES,
        *(1 << bit for bit in range(6)),
        vn.VIRTIO_NET_RSS_HASH_TYPE_IPv4 | vn.VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
        HASH_TYPES & ~vn.VIRTIO_NET_RSS_HASH_TYPE_IPv6 & ~vn.VIRTIO_NET_RSS_HASH_TYPE_TCPv4,
    ],
)
@programs
def test_kernel_and_worker_agree(types: int) -> None:
    """A driver that sees the hash knows why the frame is in this queue."""
    rng = random.Random(types)
    table = [rng.randrange(64) for _ in range(128)]
    steering = Steering(Hashing(types, rng.randbytes(40)), table, 99)
    kinds = set()
    with Kernel(steering) as kernel:
        for frame in flows(rng):
            value, report = hashed(steering.hashing, frame)
            kinds.add(report)
            want = table[value % 128] if report else 99
            assert kernel.queue(frame) == want, frame.hex()
    assert len(kinds) == 1 + types.bit_count()


@pytest.mark.parametrize("length", [0, 1, 16, 39])
def test_a_short_key_ends_in_zeros(length: int) -> None:
    data = struct.pack(">IIHH", 0xC0A80001, 0xC0A80002, 1234, 80)
    frame = ip("192.168.0.1", "192.168.0.2", TCP, data[8:])
    assert hashed(Hashing(HASH_TYPES, KEY[:length]), frame)[0] == toeplitz(KEY[:length], data)


@programs
@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_tables_of_any_size(size: int) -> None:
    rng = random.Random(size)
    steering = Steering(EVERY, [rng.randrange(256) for _ in range(size)], 0)
    with Kernel(steering) as kernel:
        for port in range(40):
            frame = ip("10.0.0.1", "10.0.0.2", UDP, struct.pack(">HHHH", port, 9, 8, 0))
            assert kernel.queue(frame) == steering.table[hashed(EVERY, frame)[0] % size]


@programs
def test_a_tap_steers() -> None:
    """Real frames of the host, each in the queue of its hash."""
    with Namespace(address="192.168.93.1/24", queues=4) as ns:
        tap = ns.tap
        assert not tap.features() >> vn.VIRTIO_NET_F_RSS & 1
        tap.offer_steering()
        assert tap.features() >> vn.VIRTIO_NET_F_RSS & 1
        ns.run(
            ["ip", "neigh", "add", "192.168.93.2", "lladdr", "52:54:00:00:00:01", "dev", tap.name],
            check=True,
        )
        steering = Steering(EVERY, [3, 1, 2, 2], 0)
        tap.set_steering(steering)
        seen: dict[int, int] = {}

        def arrived() -> bool:
            for queue, fd in enumerate(tap.fds):
                try:
                    frame = os.read(fd.fileno(), 4096)[12:]
                except BlockingIOError:
                    continue
                if frame[23:24] == bytes([UDP]) and frame[12:14] == b"\x08\x00":
                    value, _ = hashed(EVERY, frame)
                    assert steering.table[value % len(steering.table)] == queue
                    seen[struct.unpack_from(">H", frame, 36)[0]] = queue
            return len(seen) == 40

        with ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            for port in range(4000, 4040):
                s.sendto(b"x", ("192.168.93.2", port))
            assert wait_for(arrived)
            assert set(seen.values()) == {1, 2, 3}
            # All of one queue, then the kernel's choice again: a table that nobody needs is gone.
            tap.set_steering(Steering(Hashing(0, b""), [1], 2))
            steering = Steering(EVERY, [2], 2)
            seen.clear()
            for port in range(4000, 4040):
                s.sendto(b"x", ("192.168.93.2", port))
            assert wait_for(arrived)
            tap.set_steering(None)
