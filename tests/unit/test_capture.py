"""Captures: the filter against libpcap's, rings and taps against tshark, losses, ends, files."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.capture import bpf, session
from pyvmm.capture.files import open_private
from pyvmm.capture.pcapng import Statistics, last_statistics
from pyvmm.capture.session import Capture, Member, Source
from pyvmm.card.capture import CardCaptures
from pyvmm.card.uplink import Route
from pyvmm.cli import capture as cli_capture
from pyvmm.control.captures import carry, follow
from pyvmm.control.commands import COMMANDS
from pyvmm.control.server import QmpError
from pyvmm.datapath.capture import CapturePoint, PointCard
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import ControlError, HostError, UsageError
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.packets import open_packets
from pyvmm.memory import GuestMemory
from pyvmm.netopt import Net
from pyvmm.programs import program
from tests.driver import Cable, Events, NetDriver, bits, wait_for

MAC = bytes.fromhex("520000000001")
ACKED = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_NET_F_GUEST_CSUM")
NEEDS_CSUM, TCPV4 = 1, 1
PATIENCE = 60.0  # seconds for a frame
SECONDS = 60  # for a program of the host


def checksum(data: bytes, start: int = 0) -> int:
    total: int = start + sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp(payload: bytes, *, partial: bool = False, port: int = 80, tag: bytes = b"") -> bytes:
    """A frame with TCP over IPv4; ``partial``: with the checksum of the pseudo header only."""
    length = 20 + len(payload)
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 7, 0, 64, 6, 0) + addresses
    ip = ip[:10] + struct.pack(">H", 0xFFFF ^ checksum(ip)) + ip[12:]
    pseudo = addresses + struct.pack(">BBH", 0, 6, length)
    segment = struct.pack(">HHIIBBHHH", 4000, port, 1, 0, 0x50, 0x18, 8192, 0, 0) + payload
    value = checksum(pseudo) if partial else 0xFFFF ^ checksum(pseudo + segment)
    segment = segment[:16] + struct.pack(">H", value) + segment[18:]
    return b"\x02" + bytes(5) + MAC + tag + b"\x08\x00" + ip + segment


class Card:
    """What a capture needs of a card, without a machine."""

    name = "net0"

    def __init__(self, point: CapturePoint) -> None:
        self._point = point
        self._place: int | None = None

    def facts(self) -> tuple[str, bytes]:
        return "on a mock driver", MAC

    def attach(self, member: Member) -> None:
        self._place = self._point.add(member.ring)

    def detach(self, member: Member) -> None:
        place, self._place = self._place, None
        if place is not None:
            assert self._point.remove(place)


class TapCard:
    """A card whose packets are captured at the tap of a namespace."""

    name = "net0"

    def __init__(self, ns: Namespace) -> None:
        self._ns = ns
        self._source: Source | None = None

    def facts(self) -> tuple[str, bytes]:
        return "at a tap", b""

    def attach(self, member: Member) -> None:
        fd = open_packets("tap0", self._ns)
        self._source = member.socket(fd, mirrored=self._ns.tap.mirrored)
        member.listen(self._source)

    def detach(self, member: Member) -> None:
        source, self._source = self._source, None
        if source is not None:
            member.retire(source)


class Rig:
    """A mock driver, a cable, and an emulated data path with a point for captures."""

    def __init__(self) -> None:
        self.memory, self.cable, self.point = GuestMemory(16 << 20), Cable(), CapturePoint()
        self.path = EmulatedNet(self.cable, captures=self.point)
        self.driver = NetDriver(self.memory, event_idx=False, indirect=False, mrg_rxbuf=True)
        self.driver.fill()

    def start(self) -> Self:
        rings = [r.vring(None) for r in self.driver.rings]
        self.path.start(ACKED, self.memory, rings, Events())
        return self

    def both_ways(self, *frames: bytes, header: bytes = bytes(12)) -> None:
        """Have the guest send each frame, and receive it."""
        before = len(self.driver.received)
        for count, frame in enumerate(frames, before + 1):
            self.driver.tx.take_used()
            self.driver.queue(frame, header=header)
            self.driver.tx.publish()
            assert self.cable.receive(PATIENCE) == header + frame
            self.cable.far.send(header + frame)
            assert len(self.driver.wait_packets(count)) == count

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *args: Any) -> None:
        self.path.close()
        self.cable.close()
        self.driver.close()
        self.memory.close()


def file_for(path: Path) -> int:
    return open_private(str(path))[0]


def fields(path: Path, *names: str, options: tuple[str, ...] = ()) -> list[list[str]]:
    """What tshark shows of each packet."""
    wanted = [word for name in names for word in ("-e", name)]
    command = [program("tshark"), "-n", "-r", str(path), "-T", "fields", *options, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    return [line.split("\t") for line in done.stdout.splitlines()]


def blocks(path: Path) -> list[tuple[int, bytes]]:
    data, out, at = path.read_bytes(), [], 0
    while at < len(data):
        kind, length = struct.unpack_from("=II", data, at)
        assert struct.unpack_from("=I", data, at + length - 4) == (length,)
        out.append((kind, data[at + 8 : at + length - 4]))
        at += length
    return out


# --- the filter -----------------------------------------------------------------------------------


EXPRESSIONS = (
    "tcp",
    "tcp port 80",
    "udp or arp",
    "host 10.0.0.2 and not port 22",
    "ip[8] > 32 and len > 60",
    "ether src 52:00:00:00:00:01",
    "vlan 5",
    "vlan 5 and tcp dst port 80",
    "tcp[tcpflags] & tcp-push != 0",
    "ip6 or (ip and (ip[2:2] - ((ip[0] & 0xf) << 2)) % 3 == 1)",
    "greater 1000",
)


def libpcap() -> tuple[Any, Any]:
    from cffi import FFI

    own: Any = FFI()
    own.cdef(
        bpf.DECLARATIONS
        + """
        struct pcap_pkthdr { long sec; long usec; unsigned int caplen; unsigned int len; };
        int pcap_offline_filter(const struct bpf_program *fp, const struct pcap_pkthdr *h,
                                const unsigned char *pkt);
        """
    )
    return own, own.dlopen(bpf.LIBRARY)


def some_frames() -> list[bytes]:
    made = [tcp(bytes(n)) for n in (0, 1, 100, 1300)]
    made += [tcp(b"x" * 40, port=port) for port in (22, 80, 443)]
    made += [tcp(b"x", tag=bytes.fromhex("81000005")), tcp(b"x", tag=bytes.fromhex("81000006"))]
    made += [b"\xff" * 6 + MAC + b"\x08\x06" + bytes(28), b"\xff" * 6 + MAC + b"\x86\xdd"]
    chance = random.Random(17)
    for _ in range(200):
        frame = bytearray(chance.choice(made))
        for _ in range(chance.randrange(4)):
            if frame:
                frame[chance.randrange(len(frame))] = chance.randrange(256)
        made.append(bytes(frame[: chance.randrange(len(frame) + 1)]))
    return made


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_filter_wants_what_libpcap_wants(expression: str) -> None:
    own, pcap = libpcap()
    code = bpf.compile_filter(expression, 4000)
    held = own.from_buffer(code)
    run = own.new("struct bpf_program *", {"bf_len": len(code) // 8, "bf_insns": held})
    verdicts = set()
    for frame in some_frames():
        head = own.new("struct pcap_pkthdr *", {"caplen": len(frame), "len": len(frame)})
        want = pcap.pcap_offline_filter(run, head, frame)
        assert lib.pv_filter_match(code, len(code) // 8, frame, len(frame)) == want
        verdicts.add(want)
    assert verdicts == {0, 4000}  # else the frames are no test of the expression


def row(code: int, jt: int = 0, jf: int = 0, k: int = 0) -> list[int]:
    return [code, jt, jf, k]


RET = row(0x06, k=1)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0x00)],  # no return at the end
        [row(0x05, k=1), RET],  # a jump to behind the end
        [row(0x05, k=0xFFFFFFFF), RET],
        [row(0x15, jt=1), RET],
        [row(0x15, jf=255), RET],
        [row(0x60, k=16), RET],  # outside of the memory
        [row(0x02, k=16), RET],
        [row(0x34, k=0), RET],  # a division by 0
        [row(0x94, k=0), RET],
        [row(0xB1), row(0x0F), RET],  # no such instruction
        [row(0x120), RET],
        [row(0x84 | 8), RET],
        [row(0x21), RET],
        [RET] * 4097,
    ],
)
def test_a_malformed_filter_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(UsageError):
        bpf.of_rows(rows)


@pytest.mark.parametrize("rows", [[[1, 2, 3]], ["x"], [None], [row(-1)], [row(6, k=1 << 32)]])
def test_rows_that_are_none_are_refused(rows: list[Any]) -> None:
    with pytest.raises(UsageError, match="four numbers"):
        bpf.of_rows(rows)


def test_rows_and_instructions_are_the_same() -> None:
    code = bpf.compile_filter("tcp port 80", 100)
    assert bpf.of_rows(json.loads(json.dumps(bpf.rows(code)))) == code


def test_what_is_no_expression_is_refused() -> None:
    with pytest.raises(UsageError, match="syntax error"):
        bpf.compile_filter("tcp porrt 80", 100)


def test_without_libpcap_a_filter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "LIBRARY", "libpcap.so.none")
    with pytest.raises(HostError, match="apt install libpcap"):
        bpf.compile_filter("tcp", 100)


def test_a_load_beyond_the_end_and_a_division_by_x_mean_no() -> None:
    for rows in ([row(0x20, k=100), RET], [row(0x30, k=0xFFFFFFFF), RET], [row(0x3C), RET]):
        code = bpf.of_rows(rows)
        assert lib.pv_filter_match(code, len(code) // 8, bytes(64), 64) == 0


# --- at the ring ----------------------------------------------------------------------------------


def test_tshark_reads_a_capture_at_the_ring(tmp_path: Path) -> None:
    """Number, direction, virtqueue, length, header; and the time is that of the hand-over."""
    file = tmp_path / "x.pcapng"
    sizes = [0, 1, 2, 3, 500, 1400]
    with Rig() as rig:
        with Capture([Card(rig.point)], file_for(file)) as capture:
            rig.both_ways(*[tcp(bytes(n)) for n in sizes])
            header = struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 54, 1000, 34, 16, 0)
            rig.both_ways(tcp(bytes(1400), partial=True), header=header)
        assert (capture.problem, capture.packets, capture.lost) == ("", 14, 0)
    names = ("frame.len", "frame.interface_name", "frame.packet_flags_direction", "frame.comment")
    got = fields(file, *names, "frame.interface_queue", "tcp.len")
    assert [line[0] for line in got] == [str(54 + n) for n in [*sizes, 1400] for _ in "oi"]
    assert all(line[1] == "net0" for line in got)
    assert [line[2] for line in got] == ["0x00000002", "0x00000001"] * 7
    assert [line[4] for line in got] == ["1", "0"] * 7
    words = "virtio_net_hdr flags=NEEDS_CSUM gso_type=TCPV4 hdr_len=54 gso_size=1000"
    words += " csum_start=34 csum_offset=16"
    assert [line[3] for line in got[-2:]] == [f"{words} num_buffers=0", f"{words} num_buffers=1"]
    assert not any(line[3] for line in got[:-2])
    times = [float(line[0]) for line in fields(file, "frame.time_epoch")]
    assert times == sorted(times)


def test_one_virtqueue_alone(tmp_path: Path) -> None:
    """What the others carry is neither seen nor counted."""
    for queue, lines in ((0, ["0"]), (1, ["1"])):
        file = tmp_path / f"{queue}.pcapng"
        with Rig() as rig:
            with Capture([Card(rig.point)], file_for(file), queue=queue) as capture:
                rig.both_ways(tcp(b"x"), tcp(b"y"))
            assert (capture.problem, capture.packets, capture.lost) == ("", 2, 0)
        assert [line[0] for line in fields(file, "frame.interface_queue")] == lines * 2


def test_checksums_are_not_flagged(tmp_path: Path) -> None:
    """What tshark does not check by itself are partial checksums, which the device or the host is
    to complete; all others are right.
    """
    file = tmp_path / "x.pcapng"
    header = struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 16, 0)
    with Rig() as rig, Capture([Card(rig.point)], file_for(file)):
        rig.both_ways(tcp(b"whole"))
        rig.both_ways(tcp(b"partial", partial=True), header=header)
    got = fields(file, "tcp.len", "_ws.expert.message")
    assert [line[0] for line in got] == ["5", "5", "7", "7"]
    assert not any("checksum" in line[1].replace("NEEDS_CSUM", "") for line in got)
    check = ("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE")
    got = fields(file, "ip.checksum.status", "tcp.checksum.status", "frame.comment", options=check)
    good = "1"
    assert all(line[0] == good for line in got)
    assert all(line[1] == good for line in got if "NEEDS_CSUM" not in line[2])


def test_a_capture_has_its_cards_and_its_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    code = bpf.compile_filter("tcp port 80", 100)
    with Rig() as rig:
        card = Card(rig.point)
        kept = {"snaplen": 100, "code": code, "expression": "tcp port 80"}
        with Capture([card], file_for(file), **kept) as capture:  # type: ignore[arg-type]
            rig.both_ways(tcp(bytes(1000)), tcp(b"x", port=443), tcp(b"y"))
        assert (capture.packets, capture.lost) == (4, 0)
    kinds = [kind for kind, _ in blocks(file)]
    assert kinds == [0x0A0D0D0A, 1, 6, 6, 6, 6, 5]
    assert b"tcp port 80" in blocks(file)[1][1]
    assert MAC in blocks(file)[1][1]
    got = fields(file, "frame.len", "frame.cap_len")
    assert got == [["1054", "100"]] * 2 + [["55", "55"]] * 2
    (counted,) = last_statistics(file.read_bytes())
    assert (counted.received, counted.accepted, counted.lost) == (6, 4, 0)


def test_captures_of_a_card_are_independent(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abcde"]
    with Rig() as rig:
        cards = [Card(rig.point) for _ in files]
        made = [
            Capture([card], file_for(file)) for card, file in zip(cards, files[:4], strict=False)
        ]
        with pytest.raises(HostError, match="4 captures"):
            Capture([cards[4]], file_for(files[4]))
        rig.both_ways(tcp(b"1"))
        made[0].close()
        rig.both_ways(tcp(b"22"))
        made[0] = Capture([cards[4]], file_for(files[4]))
        rig.both_ways(tcp(b"333"))
        for capture in made:
            capture.close()
            capture.close()
    lengths = [[line[0] for line in fields(file, "tcp.len")] for file in files]
    assert lengths == [["1"] * 2, *[["1", "1", "2", "2", "3", "3"]] * 3, ["3"] * 2]


def test_the_second_who_detaches_waits_for_the_first() -> None:
    """Else it frees rings that a worker still writes to."""
    point = CapturePoint()
    card = PointCard("net0", "", point)
    member: Any = type("M", (), {"stuck": False, "ring": lambda self, pair: ffi.NULL})()
    card.attach(member)
    order: list[str] = []

    def detach() -> None:
        card.detach(member)
        order.append("detached")

    with point._lock:  # the first is at work
        first = threading.Thread(target=detach)
        first.start()
        assert wait_for(lambda: card._places == {})
        second = threading.Thread(target=detach)
        second.start()
        second.join(0.2)
        order.append("removed")
    first.join()
    second.join()
    assert order == ["removed", "detached", "detached"]


def test_a_capture_outlives_the_workers(tmp_path: Path) -> None:
    """As after a reset of the device."""
    file = tmp_path / "x.pcapng"
    with Rig() as rig, Capture([Card(rig.point)], file_for(file)):
        rig.both_ways(tcp(b"before"))
        bases = rig.path.stop()
        rings = [r.vring(b) for r, b in zip(rig.driver.rings, bases, strict=True)]
        rig.path.start(ACKED, rig.memory, rings, Events())
        rig.both_ways(tcp(b"after"))
    assert [line[0] for line in fields(file, "tcp.len")] == ["6", "6", "5", "5"]


def test_losses_are_counted_and_written(tmp_path: Path) -> None:
    """A reader that takes nothing, then all: what came meanwhile is lost, and the file says so."""
    read, write = os.pipe2(os.O_CLOEXEC)
    frame = tcp(bytes(1400))
    data = bytearray()
    with Rig() as rig, Capture([Card(rig.point)], write) as capture:
        while not capture.lost:
            rig.both_ways(*[frame] * 50)
        rig.both_ways(frame)

        def take() -> None:
            while piece := os.read(read, 1 << 16):
                data.extend(piece)

        reader = threading.Thread(target=take)
        reader.start()
        assert wait_for(lambda: len(data) > 3 << 20)
        rig.both_ways(frame)
        capture.close()
        reader.join()
        assert not capture.problem
    os.close(read)
    file = tmp_path / "x.pcapng"
    file.write_bytes(data)
    (counted,) = last_statistics(bytes(data))
    assert counted.lost == capture.lost > 0
    assert counted.accepted == capture.packets
    assert len(fields(file, "frame.len")) == capture.packets - capture.lost
    # The packet after the gap says how many are missing before it.
    gaps = [body for kind, body in blocks(file) if kind == 6 and b"\4\0\x08\0" in body[1480:]]
    assert len(gaps) >= 1


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    """What comes beyond is lost and counted, and the end is written nevertheless."""
    file, limit = tmp_path / "x.pcapng", session.LIMIT_MIN
    frame = tcp(bytes(1400))
    with Rig() as rig, Capture([Card(rig.point)], file_for(file), limit=limit) as capture:
        while not capture.full:
            rig.both_ways(*[frame] * 100)
        before = capture.packets
        rig.both_ways(*[frame] * 10)
        assert wait_for(lambda: capture.lost >= 20)
    assert capture.packets >= before + 20
    assert "the limit of 2 MiB was reached: " in capture.problem
    assert f"{capture.lost} of {capture.packets} packets are lost" in capture.problem
    data = file.read_bytes()
    assert limit // 2 < len(data) <= limit
    (counted,) = last_statistics(data)
    assert (counted.accepted, counted.lost) == (capture.packets, capture.lost)
    assert counted.comment == "the limit of 2 MiB was reached"
    assert sum(kind == 6 for kind, _ in blocks(file)) == capture.packets - capture.lost
    with pytest.raises(UsageError, match="limit"):
        Capture([Card(rig.point)], file_for(file), limit=limit - 1)


def test_only_files_have_a_limit_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LIMIT", 1)
    read, write = os.pipe2(os.O_CLOEXEC)
    point = CapturePoint()
    with (
        Capture([Card(point)], file_for(tmp_path / "x")) as one,
        Capture([Card(point)], write) as two,
    ):
        assert one.full
        assert not two.full
    os.close(read)


def test_a_reader_that_goes_ends_the_capture() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    with Rig() as rig, Capture([Card(rig.point)], write) as capture:
        os.close(read)
        rig.both_ways(tcp(b"x"))
        assert wait_for(capture.over.drain)
        assert "Broken pipe" in capture.problem
        rig.both_ways(tcp(b"x"))  # nobody minds


def test_a_reader_that_hangs_does_not_hang_the_end() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    with Rig() as rig:
        capture = Capture([Card(rig.point)], write)
        rig.both_ways(*[tcp(bytes(1400))] * 100)
        capture.close()
        assert "too slow" in capture.problem
    os.close(read)


def test_a_reader_that_hangs_does_not_hang_the_end_of_the_cards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "LINGER_S", 0.2)
    read, write = os.pipe2(os.O_CLOEXEC)
    os.write(write, bytes(1 << 16))  # the pipe is full: the thread waits with the head of the file
    with Rig() as rig, closing(os.fdopen(read, "rb")):
        card = Switched(None, rig)
        with Capture([card], write) as capture:
            card.captures.close()
            assert wait_for(capture.over.drain)
            assert "too slow" in capture.problem


def test_captures_come_and_go_under_traffic(tmp_path: Path) -> None:
    """The worker writes to no ring that has been freed, and the traffic does not notice."""
    with Rig() as rig:
        stop = threading.Event()

        def come_and_go() -> None:
            while not stop.is_set():
                Capture([Card(rig.point)], os.open(os.devnull, os.O_WRONLY)).close()

        threads = [threading.Thread(target=come_and_go) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            rig.both_ways(*[tcp(bytes(900))] * 20)
        stop.set()
        for thread in threads:
            thread.join()


# --- at a tap -------------------------------------------------------------------------------------


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with closing(Namespace(address="10.0.0.2/24")) as made:
        yield made


def tap_sends(ns: Namespace, frame: bytes, header: bytes = bytes(12)) -> None:
    """As a guest's data path does."""
    os.write(ns.tap.fileno(), header + frame)


def sent(ns: Namespace, frame: bytes) -> None:
    """The host sends a frame to the guest."""
    with ns.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("tap0", 0))
        s.send(frame)


def test_tshark_reads_a_capture_at_a_tap(tmp_path: Path, ns: Namespace) -> None:
    file = tmp_path / "x.pcapng"
    ns.tap.set_header(12)
    with Capture([TapCard(ns)], file_for(file)) as capture:
        tap_sends(ns, tcp(b"out"))
        sent(ns, tcp(b"inward"))
        big = struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 54, 1000, 34, 16, 0)
        tap_sends(ns, tcp(bytes(3000), partial=True), big)
    assert (capture.problem, capture.lost) == ("", 0)
    names = ("tcp.len", "frame.packet_flags_direction", "frame.comment", "frame.len")
    got = [line for line in fields(file, *names) if line[0] in ("3", "6", "3000")]
    got[2][2] = got[2][2].replace("hdr_len=3054", "hdr_len=54")  # the kernel's own, a hint
    words = "virtio_net_hdr flags=NEEDS_CSUM gso_type=TCPV4 hdr_len=54 gso_size=1000"
    words += " csum_start=34 csum_offset=16"
    assert got == [
        ["3", "0x00000002", "", "57"],
        ["6", "0x00000001", "", "60"],
        ["3000", "0x00000002", words, "3054"],
    ]


#: In a network namespace of its own, which has both ends of a cable: a guest on a macvtap sends a
#: frame, and is sent one. The capture goes to the file of the first argument.
MACVTAP = """
import os, socket, subprocess, sys
sys.path.insert(0, os.getcwd())
from pathlib import Path
from pyvmm.capture.session import Capture
from pyvmm.errors import NetError
from pyvmm.hostnet.netns import Namespace
from tests.unit.test_capture import TapCard, file_for, tcp
make = "link add low0 type veth peer name far0", "link set low0 up", "link set far0 up"
for words in make:
    subprocess.run(["ip", *words.split()], check=True)
mac, far = bytes.fromhex("525400000802"), bytes.fromhex("020000000007")
try:
    ns = Namespace(lower="low0", mac=mac)
except NetError as e:
    sys.exit(f"no macvtap: {e}")
ns.tap.set_header(12)
with Capture([TapCard(ns)], file_for(Path(sys.argv[1]))):
    os.write(ns.tap.fileno(), bytes(12) + far + mac + tcp(b"out")[12:])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("far0", 0))
        s.send(mac + far + tcp(b"inward")[12:])
ns.close()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes interfaces")
def test_a_macvtap_sends_what_the_guest_sends(tmp_path: Path) -> None:
    """Unlike a tap, which receives it: the file has the guest's directions."""
    file = tmp_path / "x.pcapng"
    run = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", MACVTAP, file],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.stderr.startswith("no macvtap"):
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stderr
    got = [line for line in fields(file, "tcp.len", "frame.packet_flags_direction") if line[0]]
    assert got == [["3", "0x00000002"], ["6", "0x00000001"]]


@pytest.mark.parametrize(
    ("expression", "want"),
    [("tcp", ["1"]), ("vlan 5", ["2"]), ("vlan", ["2", "3"]), ("", ["1", "2", "3"])],
)
def test_a_filter_at_a_tap_sees_the_tag(
    tmp_path: Path, ns: Namespace, expression: str, want: list[str]
) -> None:
    """The kernel takes the tag off before it looks; the file has the frames as they were."""
    file = tmp_path / "x.pcapng"
    code = bpf.compile_filter(expression, 1000) if expression else b""
    ns.tap.set_header(12)
    with Capture([TapCard(ns)], file_for(file), snaplen=1000, code=code):
        tap_sends(ns, tcp(b"1"))
        tap_sends(ns, tcp(b"22", tag=bytes.fromhex("81000005")))
        tap_sends(ns, tcp(b"333", tag=bytes.fromhex("81000006")))
    got = [line for line in fields(file, "tcp.len", "frame.protocols") if "tcp" in line[1]]
    assert [line[0] for line in got] == want


def test_a_filter_that_the_kernel_refuses_is_told(
    tmp_path: Path, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket would be silent for ever: a card says so when it begins, and when it moves."""
    file = tmp_path / "x.pcapng"
    real = lib.pv_capture_filter
    faulty: Any = type("Lib", (), {"__getattr__": lambda self, name: getattr(lib, name)})()
    faulty.pv_capture_filter = lambda fd, n, *program: -errno.ENOMEM if n else real(fd, n, *program)
    monkeypatch.setattr(session, "lib", faulty)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Rig() as rig:
        card = Switched(ns, rig)
        vhost = card.route("vhost-net")
        with Capture([card], file_for(file)):
            card.go(vhost)
            with pytest.raises(HostError, match="cannot filter packets: Cannot allocate memory"):
                Capture([card], file_for(tmp_path / "y"))
    (counted,) = last_statistics(file.read_bytes())
    assert "nothing is captured: cannot filter packets: Cannot allocate" in counted.comment
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(
    int(Path("/proc/sys/net/core/optmem_max").read_text()) < 1 << 16,
    reason="the kernel has no room for so long a filter",
)
def test_the_longest_filter_runs_at_a_tap(tmp_path: Path, ns: Namespace) -> None:
    file = tmp_path / "x.pcapng"
    accept = bpf.ROW.pack(0x06, 0, 0, 1000)
    ns.tap.set_header(12)
    with Capture([TapCard(ns)], file_for(file), code=bpf.check(accept * lib.PV_FILTER_MAX)):
        tap_sends(ns, tcp(b"x"))
    assert ["1"] in fields(file, "tcp.len")
    for count in (lib.PV_FILTER_MAX + 1, 4097):
        with pytest.raises(UsageError, match=f"{count} instructions"):
            bpf.check(accept * count)


def test_a_tap_that_goes_leaves_a_quiet_capture(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    with closing(Namespace(address="10.0.0.2/24")) as ns:
        ns.tap.set_header(12)
        capture = Capture([TapCard(ns)], file_for(file))
        tap_sends(ns, tcp(b"x"))
    capture.close()
    assert ["1"] in fields(file, "tcp.len")


# --- a card that is switched ----------------------------------------------------------------------


class Named:
    """A data path that has no more than a name."""

    def __init__(self, name: str) -> None:
        self.name = name


class Switched:
    """The captures of a card with a tap, on an emulated path first."""

    def __init__(self, ns: Namespace | None, rig: Rig) -> None:
        uplink: Any = type("Uplink", (), {"captures": rig.point, "namespace": ns})()
        self._tap = ns.tap if ns is not None else None
        self.emulated = self.route("emulated")
        self.captures = CardCaptures("net0", uplink, self.emulated)
        self.name, self.attach, self.detach = "net0", self.captures.attach, self.captures.detach

    def facts(self) -> tuple[str, bytes]:
        return self.captures.where(), MAC

    def route(self, mode: str, *, tap: bool = True, **net: Any) -> Route:
        path: Any = Named(mode)
        return Route(path, Net(mode, **net), self._tap if tap else None, lambda mac: False)

    def go(self, *routes: Route) -> None:
        """Switch; several routes are those of a switch that is rolled back."""
        self.captures.prepare(routes[0])
        for route in routes:
            self.captures.moved(route)
        self.captures.settle()


def story(file: Path) -> list[str]:
    """The comments and the lengths of the packets that a test has sent, in their order. Comments
    may be at packets of the host's own.
    """
    out = []
    for length, comment in fields(file, "tcp.len", "frame.comment"):
        out += [comment] if comment else []
        out += [length] if length not in ("", "0") else []
    return out


def test_a_capture_follows_its_card(tmp_path: Path, ns: Namespace) -> None:
    """From the ring to the tap, to a place where there is nothing to see, and back."""
    file = tmp_path / "x.pcapng"
    ns.tap.set_header(12)
    with Rig() as rig:
        card = Switched(ns, rig)
        vhost = card.route("vhost-net")
        with Capture([card], file_for(file)) as capture:
            tap_sends(ns, tcp(bytes(9)))  # not at the tap: another's
            rig.both_ways(tcp(bytes(1)))
            card.go(vhost)
            tap_sends(ns, tcp(bytes(2)))
            card.go(card.route("emulated"), vhost)
            tap_sends(ns, tcp(bytes(3)))
            card.go(card.route("vhost-user", tap=False, socket="/run/s"))
            tap_sends(ns, tcp(bytes(9)))
            card.go(card.emulated)
            rig.both_ways(tcp(bytes(4)))
            card.go(vhost)
        assert (capture.problem, capture.lost) == ("", 0)
    now = "pyvmm: net0 is now on"
    tap, ring = "captured at tap tap0", "captured at its virtqueues"
    why = "nothing is captured: a back-end that is not pyvmm's moves its packets"
    assert "; ".join(story(file)) == "; ".join(
        [
            *("1", "1", f"{now} vhost-net, {tap}", "2"),
            *(f"{now} emulated, {ring}", f"{now} vhost-net, {tap}", "3"),
            *(f"{now} vhost-user, where {why}", f"{now} emulated, {ring}", "4", "4"),
        ]
    )
    (counted,) = last_statistics(file.read_bytes())
    assert counted.comment == f"{now} vhost-net, {tap}"


def test_the_last_packets_at_the_ring_are_written(
    tmp_path: Path, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is a socket, packets are too young to be written: here for ever."""
    monkeypatch.setattr(session, "HOLD_NS", 10**18)
    file = tmp_path / "x.pcapng"
    ns.tap.set_header(12)
    with Rig() as rig:
        card = Switched(ns, rig)
        with Capture([card], file_for(file)) as capture:
            card.go(card.route("vhost-net"))
            tap_sends(ns, tcp(bytes(2)))
            card.go(card.emulated)
            rig.both_ways(tcp(bytes(4)))
        assert (capture.problem, capture.lost) == ("", 0)
    assert [line for line in story(file) if line.isdigit()] == ["2", "4", "4"]
    (counted,) = last_statistics(file.read_bytes())
    assert counted.accepted == len([kind for kind, _ in blocks(file) if kind == 6])


@pytest.mark.parametrize(
    ("mode", "net", "why"),
    [
        ("vhost-user", {"socket": "/run/s"}, "not pyvmm's moves its packets; capture there, or"),
        ("vhost-vdpa", {"device": "/dev/vhost-vdpa-0"}, "in the device /dev/vhost-vdpa-0"),
    ],
)
def test_what_does_not_come_past_is_refused(
    tmp_path: Path, ns: Namespace, mode: str, net: dict[str, Any], why: str
) -> None:
    with Rig() as rig:
        card = Switched(ns, rig)
        card.go(card.route(mode, tap=False, **net))
        with pytest.raises(UsageError, match=f"cannot capture net0: .*{why}"):
            Capture([card], file_for(tmp_path / "x"))


def test_a_virtqueue_is_known_at_the_ring_only(tmp_path: Path, ns: Namespace) -> None:
    """After a switch to a tap, nothing is captured, and the file says why."""
    file = tmp_path / "x.pcapng"
    ns.tap.set_header(12)
    with Rig() as rig:
        card = Switched(ns, rig)
        with pytest.raises(UsageError, match="it has no virtqueue 2 for packets, but 0 to 1"):
            Capture([card], file_for(tmp_path / "y"), queue=2)
        with Capture([card], file_for(file), queue=1) as capture:
            rig.both_ways(tcp(bytes(1)))
            card.go(card.route("vhost-net"))
            tap_sends(ns, tcp(bytes(2)))
            with pytest.raises(UsageError, match="which virtqueue a packet is of; leave out the"):
                Capture([card], file_for(tmp_path / "z"), queue=1)
            card.go(card.emulated)
            rig.both_ways(tcp(bytes(3)))
        assert (capture.problem, capture.packets) == ("", 2)
    why = "where nothing is captured: nobody knows at tap tap0 which virtqueue a packet is of"
    now = "pyvmm: net0 is now on"
    away, back = f"{now} vhost-net, captured at tap tap0, {why}", f"{now} emulated, captured at its"
    assert story(file) == ["1", f"{away}; {back} virtqueues", "3"]


def test_the_last_card_ends_a_capture(tmp_path: Path, ns: Namespace) -> None:
    file = tmp_path / "x.pcapng"
    with Rig() as rig:
        card = Switched(ns, rig)
        with Capture([card], file_for(file)) as capture:
            rig.both_ways(tcp(b"x"))
            card.captures.close()
            card.captures.close()
            assert wait_for(capture.over.drain)
            with pytest.raises(UsageError, match="has been removed"):
                Capture([card], file_for(tmp_path / "y"))
    assert story(file) == ["1", "1"]


# --- by the control socket ------------------------------------------------------------------------


def test_a_connection_carries_a_capture(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ends = os.pipe()
    data = bytearray()
    with Rig() as rig, ours:
        machine = threading.Thread(target=carry, args=(theirs, [Card(rig.point)], 1000, b"", ""))
        client = threading.Thread(target=follow, args=(ours, b"", data.extend, ends[0]))
        machine.start()
        client.start()
        assert wait_for(lambda: len(data) > 0)
        rig.both_ways(*[tcp(bytes(n)) for n in range(100)])
        os.write(ends[1], b"x")
        client.join()
        machine.join()
    for fd in ends:
        os.close(fd)
    file.write_bytes(data)
    assert len(fields(file, "tcp.len")) == 200
    (counted,) = last_statistics(bytes(data))
    assert counted.accepted == 200


def test_a_capture_that_cannot_begin_says_why() -> None:
    class Refuses(Card):
        def attach(self, member: Member) -> None:
            raise UsageError("not this one", "take another")

    ours, theirs = socket.socketpair()
    with ours:
        carry(theirs, [Refuses(CapturePoint())], 1000, b"", "")
        with pytest.raises(ControlError, match="not this one; take another") as e:
            follow(ours, b"", lambda data: None, os.eventfd(0))
    assert e.value.exit_code == UsageError.exit_code


@pytest.mark.parametrize("expression", ["x" * 0xFFFF, "\udc80"])
def test_an_expression_that_no_file_can_have_is_refused(expression: str) -> None:
    machine: Any = type("Machine", (), {"nets": [Card(CapturePoint())]})()
    run = COMMANDS["x-pyvmm-capture"].run
    with pytest.raises(QmpError, match=r"'expression': the filter's expression (has|is no)"):
        run(machine, {"expression": expression})
    assert run(machine, {"expression": "x" * (0xFFFF - 1)})
    with pytest.raises(UsageError, match="expression"):
        bpf.compile_filter(expression, 1000)


def test_an_older_file_is_emptied_by_the_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "x.pcapng"
    file.write_bytes(b"older, and longer than what comes")

    class Machine:
        """Has the answer of a machine, and ends the stream."""

        def __init__(self, answer: bytes) -> None:
            self.answer = answer

        def take_over(self, name: str, **given: Any) -> tuple[socket.socket, bytes]:
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours, self.answer

    kept = {"snaplen": 100, "nic": 9, "queue": 1, "filter": "", "limit": None}
    args: Any = argparse.Namespace(file=str(file), **kept)
    refuses: Any = Machine(b"!\x02there is no card 9")
    with pytest.raises(ControlError, match="no card 9"):
        cli_capture._capture(refuses, args)
    assert file.read_bytes() == b"older, and longer than what comes"
    whole = Statistics(0, 7, 5, 2).pack(1, 2)
    begins: Any = Machine(whole)
    assert cli_capture._capture(begins, args) == 0
    assert file.read_bytes() == whole


# --- what the file says at the end, and the file --------------------------------------------------


def test_statistics_are_read_back() -> None:
    made = [Statistics(0, 7, 5, 2, "ends here"), Statistics(1, None, 1 << 40, 0)]
    data = b"before".ljust(40) + b"".join(one.pack(1, 2) for one in made)
    for got, want in zip(last_statistics(data), made, strict=True):
        assert all(getattr(got, name) == getattr(want, name) for name in Statistics.__slots__)


@pytest.mark.parametrize("data", [b"", bytes(4), bytes(100), b"\xff" * 100, struct.pack("=I", 32)])
def test_what_ends_otherwise_has_no_statistics(data: bytes) -> None:
    assert last_statistics(data) == []


def test_a_new_file_is_the_users_own(tmp_path: Path) -> None:
    fd, made = open_private(str(tmp_path / "x"))
    os.close(fd)
    assert made
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    (tmp_path / "x").write_bytes(b"old")
    os.close(open_private(str(tmp_path / "x"), keep=True)[0])
    assert (tmp_path / "x").read_bytes() == b"old"
    fd, made = open_private(str(tmp_path / "x"))
    os.close(fd)
    assert not made
    assert not (tmp_path / "x").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_what_another_user_has_put_there_is_refused(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(b"theirs")
    os.chown(other, 1234, 1234)
    own = tmp_path / "own"
    own.write_bytes(b"mine")
    link.symlink_to(own)
    os.lchown(link, 1234, 1234)
    for path in (other, link):
        with pytest.raises(PermissionError, match="another user"):
            open_private(str(path))
    assert (other.read_bytes(), own.read_bytes()) == (b"theirs", b"mine")
    os.lchown(link, 0, 0)
    os.close(open_private(str(link))[0])
    assert own.read_bytes() == b""


def test_a_snaplen_out_of_range_is_refused(tmp_path: Path) -> None:
    with Rig() as rig:
        for snaplen in (0, lib.PV_CAPTURE_SNAPLEN + 1):
            with pytest.raises(UsageError, match="snaplen"):
                Capture([Card(rig.point)], file_for(tmp_path / "x"), snaplen=snaplen)
    assert not lib.pv_capture_ring(0, 0, ffi.NULL, 0, -1)
