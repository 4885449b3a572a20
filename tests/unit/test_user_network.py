"""A card's way out by libslirp, without a guest: this side speaks the frames of one."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.card.uplink import Uplink
from pyvmm.errors import NetError, NetForbidden, UsageError
from pyvmm.hostnet.frames import HEADER
from pyvmm.hostnet.slirp import Forward, UserStack, name_server
from pyvmm.netopt import Net
from tests.driver import wait_for
from tests.inject import EXECVE, PTRACE, inject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAC, GATEWAY_MAC = b"\x52\x54\0\0\0\1", b"\x52\x55\x0a\0\2\2"
HOST, GUEST, DNS = "10.0.2.2", "10.0.2.15", "10.0.2.3"
FIN, SYN, PSH, ACK = 1, 2, 8, 16


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Card:
    """The guest's side of a stack."""

    def __init__(self, **more: object) -> None:
        self.stack = UserStack(
            f"{HOST}/24",
            f"{GUEST}/24",
            1500,
            **{"loopback": True, **more},  # type: ignore[arg-type]
        )
        try:
            self.stack.need()
        except NetError:
            self.stack.close()
            raise
        self.fd = self.stack.fds[0].fileno()
        self.own, self.gateway, self.identity = GUEST, GATEWAY_MAC, 0

    def send(self, frame: bytes) -> None:
        """What comes meanwhile is lost if the stack takes no frame before its own are taken."""
        while True:
            try:
                os.write(self.fd, HEADER + frame)
            except BlockingIOError:
                select.select([self.fd], [self.fd], [], 60)
                with suppress(BlockingIOError):
                    os.read(self.fd, 70000)
            else:
                return

    def receive(self, wanted: Callable[[bytes], bool], seconds: float = 60) -> bytes:
        """The next frame that is wanted; requests for the guest's MAC address are answered."""
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], "nothing came"
            frame = os.read(self.fd, 70000)
            assert frame[:12] == bytes(12), "a header that is not empty"
            frame = frame[12:]
            if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1":
                self.send(self.arp(2, frame[28:32]))
            elif wanted(frame):
                return frame

    def arp(self, operation: int, target: bytes) -> bytes:
        to = b"\xff" * 6 if operation == 1 else self.gateway
        head = to + MAC + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x800, 6, 4, operation)
        return head + MAC + socket.inet_aton(self.own) + to + target

    def ip(self, protocol: int, payload: bytes, target: str = HOST) -> None:
        ends = socket.inet_aton(self.own) + socket.inet_aton(target)
        self.identity += 1
        head = struct.pack(
            "!BBHHHBBH", 0x45, 0, 20 + len(payload), self.identity, 0, 64, protocol, 0
        )
        head = head[:10] + struct.pack("!H", checksum(head + ends)) + ends
        self.send(self.gateway + MAC + b"\x08\0" + head + payload)

    def tcp(self, port: int, own: int, flags: int, seq: int, ack: int, data: bytes = b"") -> None:
        segment = struct.pack("!HHIIBBHHH", own, port, seq, ack, 0x50, flags, 65535, 0, 0) + data
        ends = socket.inet_aton(self.own) + socket.inet_aton(HOST)
        total = checksum(ends + struct.pack("!HH", 6, len(segment)) + segment)
        self.ip(6, segment[:16] + struct.pack("!H", total) + segment[18:])

    def ping(self) -> None:
        """The gateway answers."""
        echo = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"ping"
        self.ip(1, echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:])
        answer = self.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 1)
        assert answer[34] == 0 and answer[42:46] == b"ping"

    def udp(self, port: int, own: int, data: bytes, target: str = HOST) -> None:
        self.ip(17, struct.pack("!HHHH", own, port, 8 + len(data), 0) + data, target)


def segment(frame: bytes) -> tuple[int, int, int, int, int, bytes]:
    """Source and destination port, sequence and acknowledgement number, flags, data."""
    total = int.from_bytes(frame[16:18], "big")
    ip = frame[14 : 14 + total]
    source, target, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", ip, 20)
    return source, target, seq, ack, flags, ip[20 + (offset >> 4) * 4 :]


def is_tcp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\0" and frame[23] == 6


@pytest.fixture
def card() -> Iterator[Card]:
    one = Card()
    yield one
    one.stack.close()


def test_the_gateway_is_there(card: Card) -> None:
    card.send(card.arp(1, socket.inet_aton(HOST)))
    answer = card.receive(lambda frame: frame[12:14] == b"\x08\x06")
    assert answer[22:32] == GATEWAY_MAC + socket.inet_aton(HOST)
    card.ping()


def test_dhcp_gives_the_guests_address(card: Card) -> None:
    ask = struct.pack("!BBBBIHH", 1, 1, 6, 0, 7, 0, 0) + bytes(16) + MAC.ljust(16, b"\0")
    ask += bytes(192) + b"\x63\x82\x53\x63\x35\x01\x01\xff"
    data = struct.pack("!HHHH", 68, 67, 8 + len(ask), 0) + ask
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 20 + len(data), 1, 0, 64, 17, 0, 0, 0xFFFFFFFF)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    card.send(b"\xff" * 6 + MAC + b"\x08\0" + head + data)
    offer = card.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[34:36] == b"\0\x43")
    assert offer[42 + 16 : 42 + 20] == socket.inet_aton(GUEST)
    assert b"\x06\x04" + socket.inet_aton(name_server(f"{HOST}/24")) in offer
    assert name_server(f"{HOST}/24") == DNS


def talk(side: Card | Routed, server: socket.socket) -> None:
    """A TCP connection from the guest to ``server``, with data both ways."""
    port = server.getsockname()[1]
    side.tcp(port, 1000, SYN, 99, 0)
    _, _, seq, ack, flags, _ = segment(side.receive(is_tcp))
    assert (flags, ack) == (SYN | ACK, 100)
    side.tcp(port, 1000, ACK, 100, seq + 1)
    side.tcp(port, 1000, PSH | ACK, 100, seq + 1, b"from the guest")
    peer, _ = server.accept()
    with peer:
        assert peer.recv(100) == b"from the guest"
        peer.sendall(b"from the host")
        answer = segment(side.receive(lambda f: is_tcp(f) and bool(segment(f)[5])))
        assert answer[5] == b"from the host"


def test_tcp_to_the_hosts_loopback(card: Card) -> None:
    """A whole connection: data both ways, then the end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        talk(card, server)
        assert segment(card.receive(lambda f: is_tcp(f) and bool(segment(f)[4] & FIN)))


def test_udp_and_silence_without_loopback(card: Card) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(60)
        port = server.getsockname()[1]
        card.udp(port, 2000, b"question")
        data, peer = server.recvfrom(100)
        server.sendto(b"answer", peer)
        answer = card.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 17)
        assert (data, answer[42:48]) == (b"question", b"answer")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        other = Card(loopback=False)
        other.tcp(listening.getsockname()[1], 1000, SYN, 99, 0)
        answer = other.receive(lambda frame: frame[12:14] == b"\x08\0" and frame[23] == 1)
        assert answer[34] == 3, "no ICMP destination unreachable"
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()
        other.stack.close()


def test_a_port_of_the_host_leads_into_the_guest() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        with pytest.raises(
            NetError, match=f"cannot listen at 127.0.0.1 port {port}: Address alrea"
        ):
            Card(forwards=[Forward(f"{port}-22")])
    card = Card(forwards=[Forward(f"{port}-22")])
    with socket.create_connection(("127.0.0.1", port), 60):
        source, target, seq, _, flags, _ = segment(card.receive(is_tcp))
        assert (target, flags) == (22, SYN)
        card.tcp(source, 22, SYN | ACK, 5, seq + 1)
        assert segment(card.receive(is_tcp))[3] == 6
    card.stack.close()


def test_frames_that_mean_nothing(card: Card) -> None:
    """Neither too short nor too long a frame, nor many of them, disturb the stack."""
    for frame in (b"", b"\0", bytes(14), bytes(65000), MAC * 300):
        card.send(frame)
    with pytest.raises(OSError, match="too long"):
        card.send(bytes(1 << 23))
    for number in range(3000):
        card.tcp(number + 1, number + 1, SYN, 1, 0)
    card.send(card.arp(1, socket.inet_aton(HOST)))
    card.receive(lambda frame: frame[12:14] == b"\x08\x06")


def test_the_child_ends_with_its_card() -> None:
    card = Card()
    pid = card.stack.pid
    assert pid is not None
    card.stack.close()
    card.stack.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    card = Card()
    assert card.stack.pid is not None
    os.kill(card.stack.pid, signal.SIGKILL)
    assert select.select([card.fd], [], [], 60)[0] and os.read(card.fd, 100) == b""
    assert card.stack.gone() == "the user network was killed (SIGKILL)"
    card.stack.close()


def test_the_wait_for_the_child_can_be_cut() -> None:
    """By the end of the machine, from another thread, while the child is still starting."""
    while True:
        stack = UserStack(f"{HOST}/24", f"{GUEST}/24", 1500, loopback=True)
        assert stack.pid is not None
        os.kill(stack.pid, signal.SIGSTOP)
        assert os.waitid(os.P_PID, stack.pid, os.WSTOPPED) is not None
        if not select.select([stack.fds[0]], [], [], 0)[0]:
            break
        os.kill(stack.pid, signal.SIGKILL)  # the child was quicker
        stack.close()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stack.need)
        stack.cut()
        with pytest.raises(NetError, match="does not start"):
            waiting.result(20)
    assert not stack.gone(), "our own end is no fault"
    os.kill(stack.pid, signal.SIGKILL)
    stack.close()


def survives(text: str, tmp_path: Path) -> bool:
    """Whether a stack survives a query for a name with this /etc/resolv.conf."""
    file = tmp_path / "resolv.conf"
    file.write_text(text)
    code = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from tests.unit.test_user_network import Card, HOST
import socket
card = Card()
card.udp(53, 4000, bytes.fromhex("0007010000010000000000000161000001" "0001"), "10.0.2.3")
card.send(card.arp(1, socket.inet_aton(HOST)))
card.receive(lambda frame: frame[12:14] == bytes((8, 6)))
card.stack.close()
"""
    mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    run = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, str(file), sys.executable, "-c", code],
        capture_output=True,
    )
    return run.returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file")
@pytest.mark.parametrize("server", ["fe80::1%lo", "127.0.0.53", "::1", ""])
def test_any_name_server_of_the_host(tmp_path: Path, server: str) -> None:
    assert survives(f"nameserver {server}\n" if server else "", tmp_path)


@pytest.mark.parametrize("call", [EXECVE, PTRACE])
def test_the_child_is_confined(call: int) -> None:
    """Somebody who controls the child gets no Unix socket, no file and no program."""
    card = Card()
    pid = card.stack.pid
    assert pid is not None
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^Seccomp_filters:\t1$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
    assert wait_for(lambda: inject(pid, call))
    assert select.select([card.fd], [], [], 60)[0] and os.read(card.fd, 100) == b""
    card.stack.close()


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("open('/etc/resolv.conf').read()", 0),
        ("socket.socket()", 0),
        ("open('/etc/hostname')", "PermissionError"),
        ("os.mkdir('/tmp/x')", -signal.SIGSYS),
        ("socket.socket(socket.AF_UNIX)", "OSError"),
        ("socket.socket(socket.AF_INET6)", "OSError"),
        ("os.fork()", -signal.SIGSYS),
    ],
)
def test_what_the_child_may_do(deed: str, how: int | str) -> None:
    code = "import os, socket; from pyvmm._ext import lib\n"
    code += "done = lib.pv_confine_network(b'/etc/resolv.conf')\n"
    code += "assert done & lib.PV_CONFINED_CALLS\n"
    code += "if not done & lib.PV_CONFINED_FILES: os._exit(77)\n"
    code += f"try: {deed}\nexcept Exception as e: os.write(1, type(e).__name__.encode())\n"
    run = subprocess.run([sys.executable, "-c", code + "os._exit(0)"], capture_output=True)
    if run.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert run.returncode == (how if isinstance(how, int) else 0), run
    assert run.stdout.decode() == ("" if isinstance(how, int) else how), run


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("8022-22", "tcp:127.0.0.1:8022-:22"),
        ("udp:53-53", "udp:127.0.0.1:53-:53"),
        ("tcp:0.0.0.0:80-10.0.2.15:8080", "tcp:0.0.0.0:80-10.0.2.15:8080"),
        ("tcp::8022-:22", "tcp:127.0.0.1:8022-:22"),  # as QEMU has it
    ],
)
def test_ports_as_users_write_them(text: str, means: str) -> None:
    assert str(Forward(text)) == means
    assert [str(f) for f in Net.parse(f"user,hostfwd={text}+{text}").forwards] == [means, means]


BAD = {
    "user,hostfwd=22": "write it as",
    "user,hostfwd=0-22": "write it as",
    "user,hostfwd=65536-22": "write it as",
    "user,hostfwd=sctp:1-2": "write it as",
    "user,hostfwd=tcp:here:1-2": "write it as",
    "user,hostfwd=1-\u0662": "write it as",
    "user,hostfwd=1-2+": "write it as",
    "user,loopback=maybe": "loopback=on or loopback=off",
    "user,tap=t": "with a tap, use --net emulated",
    "user,queues=2": "one queue pair",
    "user,host=10.1.1.1/24": "give both",
    "user,host=10.1.1.1/24,guest=10.1.2.5/24": "two addresses of one network",
    "user,host=10.1.1.1/24,guest=10.1.1.2/24": "serves names",
    "user,host=10.1.1.0/24,guest=10.1.1.9/24": "two addresses of one network",
    "user,host=10.1.1.254/24,guest=10.1.1.9/24": "two addresses of one network",
    "user,host=10.1.1.1/24,guest=10.1.1.255/24": "two addresses of one network",
    "user,host=255.255.255.255/24,guest=255.255.255.1/24": "two addresses of one network",
    "user,host=10.1.1.1/32,guest=10.1.1.1/32": "two addresses of one network",
    "user,switchable=emulated": "mode user has no tap",
    "emulated,hostfwd=1-2": "add internet=on, or use user",
    "vhost-net,loopback=off": "add internet=on, or use user",
    "emulated,internet=yes": "internet=on or internet=off",
    "user,internet=on": "unknown key",
    "none,internet=on": "unknown key",
    "emulated,internet=on,tap=t": "leave out tap=",
    "emulated,internet=on,bridge=b": "leave out bridge=",
    "emulated,internet=on,macvtap=m": "leave out macvtap=",
    "emulated,internet=on,fd=7": "leave out fd=",
    "vhost-user,internet=on,socket=s": "without a tap",
    "vhost-vdpa,internet=on,device=d": "without a tap",
    "emulated,internet=on,host=10.0.0.1/16": "choose another network",
    "emulated,internet=on,guest=10.0.2.9/24": "choose another network",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_options(text: str) -> None:
    with pytest.raises(UsageError) as e:
        Net.parse(text)
    assert BAD[text] in str(e.value), str(e.value)


def test_no_switch_to_or_from_it() -> None:
    for card, to in (("user", "emulated"), ("emulated", "user")):
        with pytest.raises(UsageError, match="cannot be switched"):
            Net.parse(card).switched(to)


# --- internet=on ----------------------------------------------------------------------------------

TAP_HOST, TAP_GUEST = "192.168.100.1", "192.168.100.2"


class Routed(Card):
    """The guest's side of a tap whose namespace is a router to a stack."""

    def __init__(self, text: str = "emulated,internet=on") -> None:
        try:
            self.uplink = Uplink(Net.parse(text), f"{TAP_HOST}/24", f"{TAP_GUEST}/24")
        except NetForbidden as e:
            pytest.skip(str(e))
        tap = self.uplink.tap
        assert tap is not None and self.uplink.namespace is not None
        self.ended: list[str] = []
        self.fd, self.own, self.identity = tap.fileno(), TAP_GUEST, 0
        try:
            self.uplink.open(Net("emulated"), MAC).path.close()
            self.uplink.watch(self.ended.append)
            self.gateway = b"\xff" * 6
            self.send(self.arp(1, socket.inet_aton(TAP_HOST)))
            frame = self.receive(lambda f: f[12:14] == b"\x08\x06" and f[20:22] == b"\0\2")
            self.gateway = frame[22:28]
        except BaseException:
            self.uplink.close()
            raise

    @property
    def pid(self) -> int:
        assert self.uplink._way_out is not None and self.uplink._way_out.pid is not None
        return self.uplink._way_out.pid

    def interfaces(self) -> list[str]:
        told = self.uplink.namespace.run(["ip", "-br", "link"], capture_output=True, text=True)
        return [line.split()[0] for line in told.stdout.splitlines()]


@pytest.fixture
def routed() -> Iterator[Routed]:
    one = Routed()
    yield one
    one.uplink.close()


def test_packets_of_a_tap_leave_by_the_stack(routed: Routed) -> None:
    """TCP with data both ways, UDP; the stack knows where the guest is before it has asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        talk(routed, server)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("127.0.0.1", 0))
        datagrams.settimeout(60)
        routed.udp(datagrams.getsockname()[1], 2000, b"question")
        data, peer_at = datagrams.recvfrom(100)
        datagrams.sendto(b"answer", peer_at)
        answer_frame = routed.receive(lambda f: f[12:14] == b"\x08\0" and f[23] == 17)
        assert (data, answer_frame[42:48]) == (b"question", b"answer")


def test_a_port_of_the_host_leads_behind_the_router() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    routed = Routed(f"emulated,internet=on,hostfwd={port}-22")
    try:
        with socket.create_connection(("127.0.0.1", port), 60):
            frame = routed.receive(is_tcp)
            assert socket.inet_ntoa(frame[30:34]) == TAP_GUEST
            assert segment(frame)[1] == 22 and segment(frame)[4] == SYN
    finally:
        routed.uplink.close()


def test_a_way_out_that_dies_is_told(routed: Routed) -> None:
    """Its interface goes with it, so that the router tells the guest; the tap stays."""
    assert {"tap0", "internet"} <= set(routed.interfaces())
    os.kill(routed.pid, signal.SIGKILL)
    told = "the user network was killed (SIGKILL)"
    assert wait_for(lambda: routed.ended == [told])
    assert routed.uplink.ended == told
    assert routed.uplink.report() == {"internet": {"ended": told}}
    assert wait_for(lambda: "internet" not in routed.interfaces())
    routed.tcp(80, 1000, SYN, 99, 0)
    answer = routed.receive(lambda f: f[12:14] == b"\x08\0" and f[23] == 1)
    assert answer[34:36] == b"\3\0", "no ICMP network unreachable"


def test_the_end_of_a_card_is_no_news(routed: Routed) -> None:
    pid = routed.pid
    routed.uplink.close()
    routed.uplink.close()
    assert not routed.ended and not routed.uplink.ended
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_way_out_whose_interface_is_removed(routed: Routed) -> None:
    """By somebody in the namespace: the process ends instead of waiting for ever."""
    routed.uplink.namespace.run(["ip", "link", "del", "internet"], check=True)
    assert wait_for(lambda: routed.ended == ["the user network has ended"])
