"""Receive-side scaling (virtio 1.3, 5.1.6.5.7) as an eBPF program for a tap (TUNSETSTEERINGEBPF):
the queue of a frame follows from the hash of its flow.

The kernel runs the program for each frame that the host sends to the tap, whatever data path takes
the frame from there. The hash is the one of ``cext/flow_hash.c``. The program has the key and the
table in its instructions, so it needs no map and no helper.
"""

from __future__ import annotations

import os
import struct

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError
from pyvmm.fd import Fd
from pyvmm.spec.virtio_net import (
    RSS_TABLE_MAX,
    VIRTIO_NET_RSS_HASH_TYPE_IPv4,
    VIRTIO_NET_RSS_HASH_TYPE_IPv6,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv4,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv6,
    VIRTIO_NET_RSS_HASH_TYPE_UDPv4,
    VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import Steering

#: linux/bpf.h: opcodes, 64 bits wide unless the name says 32.
MOV, MOV_VALUE, ADD, ADD_VALUE = 0xBF, 0xB7, 0x0F, 0x07
SHIFT_LEFT, SHIFT_RIGHT, AND_VALUE, XOR, MULTIPLY32 = 0x67, 0x77, 0x57, 0xAF, 0x24
JUMP, IF_EQUAL, IF_NOT, IF_GREATER, IF_LESS, IF_BITS = 0x05, 0x15, 0x55, 0x2D, 0xA5, 0x45
LOAD_BYTE, LOAD_WORD, STORE_BYTE, EXIT = 0x71, 0x61, 0x72, 0x95
#: Loads from the frame in network order, at the register's value and a number (BPF_IND).
FRAME_WORD, FRAME_HALF, FRAME_BYTE = 0x40, 0x48, 0x50
#: __sk_buff.len.
SKB_LEN = 0
#: Registers: a load's result; three for moments; the frame; the hash; where a header begins; how
#: many bytes of the frame may be looked at; the stack.
R0, R1, R2, R3, SKB, HASH, AT, END, STACK = 0, 1, 2, 3, 6, 7, 8, 9, 10

ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q, ETH_P_8021AD = 0x0800, 0x86DD, 0x8100, 0x88A8
IPPROTO_TCP, IPPROTO_UDP = 6, 17
#: IPv6 extension headers with a length: hop-by-hop options, routing, destination options.
EXTENSIONS = 0, 43, 60
#: Types of each version: addresses alone, with TCP's ports, with UDP's.
V4 = (
    VIRTIO_NET_RSS_HASH_TYPE_IPv4,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv4,
    VIRTIO_NET_RSS_HASH_TYPE_UDPv4,
)
V6 = (
    VIRTIO_NET_RSS_HASH_TYPE_IPv6,
    VIRTIO_NET_RSS_HASH_TYPE_TCPv6,
    VIRTIO_NET_RSS_HASH_TYPE_UDPv6,
)


class _Program:
    """Instructions under construction; jumps go forward to labels."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int, int]] = []
        self._jumps: list[tuple[int, str]] = []
        self._labels: dict[str, int] = {}

    def add(self, op: int, dst: int = 0, src: int = 0, off: int = 0, value: int = 0) -> None:
        """Append an instruction."""
        self._code.append((op, dst, src, off, value))

    def jump(self, label: str, op: int = JUMP, dst: int = 0, src: int = 0, value: int = 0) -> None:
        """Append a jump to a label."""
        self._jumps.append((len(self._code), label))
        self.add(op, dst, src, 0, value)

    def label(self, name: str) -> None:
        """Name the place of the next instruction."""
        self._labels[name] = len(self._code)

    def frame(self, op: int, offset: int) -> None:
        """Load into R0 from the frame, ``offset`` bytes behind AT. Spoils R1 to R5."""
        self.add(op, src=AT, value=offset)

    def pack(self) -> bytes:
        """An array of struct bpf_insn."""
        for at, label in self._jumps:
            op, dst, src, _, value = self._code[at]
            self._code[at] = op, dst, src, self._labels[label] - at - 1, value
        return b"".join(
            struct.pack("<BBhI", op, dst | src << 4, off, value & 0xFFFFFFFF)
            for op, dst, src, off, value in self._code
        )


def steering_program(steering: Steering) -> bytes:
    """An array of struct bpf_insn that returns the number of a queue."""
    hashing = steering.hashing
    return _program(hashing.types, hashing.key, steering.table, steering.unclassified)


def _program(types: int, key: bytes, table: Sequence[int], unclassified: int) -> bytes:
    p = _Program()
    key = key.ljust(lib.PV_FLOW_KEY_MAX, b"\0")
    for i, queue in enumerate(table):
        p.add(STORE_BYTE, STACK, off=i - RSS_TABLE_MAX, value=queue)
    p.add(MOV, SKB, R1)
    p.add(LOAD_WORD, END, SKB, SKB_LEN)
    p.jump("whole", IF_LESS, END, value=lib.PV_FLOW_HEAD_MAX)
    p.add(MOV_VALUE, END, value=lib.PV_FLOW_HEAD_MAX)
    p.label("whole")
    p.add(MOV_VALUE, HASH)
    p.add(MOV_VALUE, AT, value=12)
    p.jump("none", IF_LESS, END, value=14)
    for i in range(lib.PV_FLOW_TAGS_MAX):
        p.frame(FRAME_HALF, 0)
        p.jump(f"tag{i}", IF_EQUAL, R0, value=ETH_P_8021Q)
        p.jump("type", IF_NOT, R0, value=ETH_P_8021AD)
        p.label(f"tag{i}")
        p.add(ADD_VALUE, AT, value=4)
        _need(p, 2, "none")
    p.frame(FRAME_HALF, 0)
    p.label("type")
    p.add(ADD_VALUE, AT, value=2)
    for version, ethertype, own in (("v4", ETH_P_IP, V4), ("v6", ETH_P_IPV6, V6)):
        if types & sum(own):
            p.jump(version, IF_EQUAL, R0, value=ethertype)
    p.jump("none")
    # The verifier takes no instruction that cannot be reached.
    if types & sum(V4):
        _ipv4(p, types, key)
    if types & sum(V6):
        _ipv6(p, types, key)
    if types:
        p.label("table")
        p.add(AND_VALUE, HASH, value=len(table) - 1)
        p.add(MOV, R1, STACK)
        p.add(ADD, R1, HASH)
        p.add(LOAD_BYTE, R0, R1, -RSS_TABLE_MAX)
        p.add(EXIT)
    p.label("none")
    p.add(MOV_VALUE, R0, value=unclassified)
    p.add(EXIT)
    return p.pack()


def _need(p: _Program, count: int, otherwise: str) -> None:
    """Go on only if so many bytes are there behind AT."""
    p.add(MOV, R2, AT)
    p.add(ADD_VALUE, R2, value=count)
    p.jump(otherwise, IF_GREATER, R2, END)


def _ipv4(p: _Program, types: int, key: bytes) -> None:
    p.label("v4")
    _need(p, 20, "none")
    p.frame(FRAME_BYTE, 0)
    p.add(AND_VALUE, R0, value=15)
    p.add(SHIFT_LEFT, R0, value=2)
    p.jump("none", IF_LESS, R0, value=20)
    _hash(p, key, 12, 2, 0)
    p.frame(FRAME_HALF, 6)
    p.jump("v4-ip", IF_BITS, R0, value=0x3FFF)  # a fragment
    p.frame(FRAME_BYTE, 9)
    _kinds(p, "v4", types, V4)
    if types & (V4[1] | V4[2]):
        p.label("v4-ports")
        p.frame(FRAME_BYTE, 0)
        p.add(AND_VALUE, R0, value=15)
        p.add(SHIFT_LEFT, R0, value=2)
        p.add(ADD, AT, R0)
        _ports(p, "v4", key, 8)
    _alone(p, "v4", types, V4)


def _ipv6(p: _Program, types: int, key: bytes) -> None:
    p.label("v6")
    _need(p, 40, "none")
    _hash(p, key, 8, 8, 0)
    p.frame(FRAME_BYTE, 6)
    p.add(ADD_VALUE, AT, value=40)
    for i in range(lib.PV_FLOW_EXTENSIONS_MAX):
        for kind in EXTENSIONS:
            p.jump(f"skip{i}", IF_EQUAL, R0, value=kind)
        p.jump("v6-kind")
        p.label(f"skip{i}")
        _need(p, 2, "v6-ip")
        p.frame(FRAME_BYTE, 1)  # its length; then the next one's kind
        p.add(ADD_VALUE, R0, value=1)
        p.add(SHIFT_LEFT, R0, value=3)
        p.add(MOV, R3, AT)
        p.add(ADD, AT, R0)
        p.add(FRAME_BYTE, src=R3)
    p.label("v6-kind")
    _kinds(p, "v6", types, V6)
    if types & (V6[1] | V6[2]):
        p.label("v6-ports")
        _ports(p, "v6", key, 32)
    _alone(p, "v6", types, V6)


def _kinds(p: _Program, version: str, types: int, own: tuple[int, int, int]) -> None:
    """R0 is the kind of the transport header: to the ports, if they are to be hashed."""
    for kind, bit in ((IPPROTO_TCP, own[1]), (IPPROTO_UDP, own[2])):
        if types & bit:
            p.jump(f"{version}-ports", IF_EQUAL, R0, value=kind)
    p.jump(f"{version}-ip")


def _ports(p: _Program, version: str, key: bytes, position: int) -> None:
    """AT is at the transport header."""
    _need(p, 4, f"{version}-ip")
    _hash(p, key, 0, 1, position)
    p.jump("table")


def _alone(p: _Program, version: str, types: int, own: tuple[int, int, int]) -> None:
    """The hash is one of addresses alone."""
    p.label(f"{version}-ip")
    p.jump("table" if types & own[0] else "none")


def _hash(p: _Program, key: bytes, offset: int, words: int, position: int) -> None:
    """Add words of 32 bits of the frame to the hash; ``position`` bytes of input came before.

    Without jumps: each bit of the input is multiplied by its 32 bits of the key. If a signed shift
    spread the bit, the verifier of newer kernels would look at both values apart, and give up.
    """
    bits = int.from_bytes(key, "big")
    for word in range(words):
        p.frame(FRAME_WORD, offset + 4 * word)
        for bit in range(32):
            shift = 8 * len(key) - 32 - (8 * position + 32 * word + bit)
            p.add(MOV, R1, R0)
            p.add(SHIFT_RIGHT, R1, value=31 - bit)
            p.add(AND_VALUE, R1, value=1)
            p.add(MULTIPLY32, R1, value=bits >> shift)
            p.add(XOR, HASH, R1)


def load(code: bytes) -> Fd:
    """Give the kernel a program; the caller owns the descriptor.

    :raises HostError: the kernel refuses: the user may not load programs (CAP_BPF), or the kernel
        has no eBPF.
    """
    fd = lib.pv_bpf_load(ffi.from_buffer(code), len(code) // 8)
    if fd < 0:
        raise HostError(f"the kernel takes no program for steering: {os.strerror(-fd)}")
    return Fd(fd)


def load_described(words: list[str]) -> tuple[list[str], list[int]]:
    """As ``load``, of the program that these words describe; an operation of ``helper``.

    :param words: types, the key in hexadecimal, the queue for frames without a hash; then the
        table.
    :returns: the program's descriptor.
    """
    types, key, unclassified, *table = words
    queues = [int(queue) for queue in table]
    code = _program(int(types), bytes.fromhex(key), queues, int(unclassified))
    return [], [load(code).fileno()]


def load_steering(steering: Steering) -> Fd:
    """Give the kernel the program for this steering; the caller owns the descriptor.

    :raises HostError: as ``load``.
    """
    if not helper.sealed():
        return load(steering_program(steering))
    hashing = steering.hashing
    words = (hashing.types, hashing.key.hex(), steering.unclassified, *steering.table)
    return Fd(helper.do("steering", *map(str, words))[1][0])


def may_steer() -> bool:
    """Whether the kernel takes such programs of this process."""
    # Small, but with a read at a variable place of the stack, for which a user needs privileges.
    try:
        load(_program(VIRTIO_NET_RSS_HASH_TYPE_IPv4, b"", (0, 0), 0)).close()
    except HostError:
        return False
    return True
