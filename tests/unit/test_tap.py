"""Taps and network namespaces, with the real kernel. All of it happens in namespaces of its own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import Hashing, RxFilter, Vring, header_size
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError, NetError, NetForbidden, UsageError
from pyvmm.hostnet import ALLOW_USER_NAMESPACES, netns, tap, userns
from pyvmm.hostnet.addresses import parse_address
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.tap import Interface, Tap
from pyvmm.memory import GuestMemory
from pyvmm.spec import virtio, virtio_net
from tests.descriptors import open_fds
from tests.driver import PATIENCE, Events, NetDriver, wait_for
from tests.strangers import BECOME, need_readable_checkout

ROOT = Path(__file__).resolve().parents[2]
#: linux/udp.h
UDP_SEGMENT = 103
USO = [
    virtio_net.VIRTIO_NET_F_GUEST_USO4,
    virtio_net.VIRTIO_NET_F_GUEST_USO6,
    virtio_net.VIRTIO_NET_F_HOST_USO,
]
TUNNELS = [
    virtio_net.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    virtio_net.VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
    virtio_net.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
    virtio_net.VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM,
]
GSO = [
    virtio_net.VIRTIO_NET_F_GUEST_CSUM,
    virtio_net.VIRTIO_NET_F_GUEST_TSO4,
    virtio_net.VIRTIO_NET_F_GUEST_TSO6,
    virtio_net.VIRTIO_NET_F_GUEST_ECN,
]


def mask(*bits: int) -> int:
    return sum(1 << b for b in bits)


@pytest.fixture
def tun_for_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A /dev/net/tun that ordinary users may open, also where this machine's is root's alone."""
    info = Path(tap.TUN).stat()
    if info.st_mode & 0o006 == 0o006 or os.getuid():
        yield
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        node = f"{directory}/tun"
        os.mknod(node, 0o666 | stat.S_IFCHR, info.st_rdev)
        Path(node).chmod(0o666)
        monkeypatch.setattr(tap, "TUN", node)
        yield


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(address="192.168.91.1/24", address6="fd00:91::1/64", mtu=1400) as ns:
        yield ns


def inside(ns: Namespace, source: str, **kw: Any) -> subprocess.Popen[str]:
    """Run Python source as root inside the namespace."""
    code = "import sys, os, time\nfrom pyvmm.hostnet.tap import Tap, Interface\n"
    code += "from pyvmm.errors import *\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    argv = [sys.executable, "-u", "-c", code + textwrap.dedent(source)]
    return ns.popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env, **kw)


def run_inside(ns: Namespace, source: str) -> str:
    p = inside(ns, source)
    out, _ = p.communicate(timeout=PATIENCE)
    assert p.returncode == 0
    return out.strip()


def links(ns: Namespace) -> set[str]:
    out = ns.run(["cat", "/proc/net/dev"], capture_output=True, text=True, check=True).stdout
    return {line.split(":")[0].strip() for line in out.splitlines() if ":" in line}


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", ".", "..", "a b", "tap%d", "a:b", "a\n"])
def test_names_that_no_interface_can_have(name: str) -> None:
    with pytest.raises(UsageError):
        Tap(name)


@pytest.mark.parametrize(
    "text",
    [
        *("", "192.168.1", "192.168.1.1/33", "fd00::/129", "1.2.3.4/x", "::g", "1.2.3.4/-1"),
        *(
            "1.2.3.4/",
            "1.2.3.4/ 8",
            "1.2.3.4/1_0",
            "1.2.3.4/\u0662",
            "1.2.3.04",
            "1.2.3.4\0",
            "\udcff",
        ),
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("10.0.0.1/8") == (socket.AF_INET, b"\n\0\0\1", 8)
    assert parse_address("10.0.0.1")[2] == 32
    assert parse_address("fd00::1/64") == (socket.AF_INET6, b"\xfd" + bytes(14) + b"\1", 64)


@pytest.mark.parametrize("mtu", [67, 65522])
def test_an_mtu_that_no_tap_can_have(mtu: int) -> None:
    with pytest.raises(UsageError):
        Tap("x", mtu=mtu)


def test_a_namespace_has_its_tap_up_and_addressed(namespace: Namespace) -> None:
    assert namespace.tap.mtu == 1400
    show = namespace.run(["ip", "addr", "show"], capture_output=True, text=True, check=True).stdout
    assert "inet 192.168.91.1/24" in show and "inet6 fd00:91::1/64" in show and "mtu 1400" in show
    assert "tentative" not in next(line for line in show.splitlines() if "fd00:91" in line)
    assert show.count("UP") >= 2  # lo, too
    with namespace.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.bind(("fd00:91::1", 0))


ROOM = """
from pyvmm.hostnet.netns import Namespace
with Namespace(txqueuelen=7777) as namespace:
    namespace.run(["ip", "link", "show", "tap0"], check=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("become", [[], BECOME], ids=["root", "nobody"])
def test_how_many_frames_may_wait(become: list[str]) -> None:
    """Whoever may make a namespace says it, also who is no root of the host's."""
    need_readable_checkout()
    argv = [*become, sys.executable, "-c", ROOM]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env={"HOME": "/"})
    assert " qlen 7777" in done.stdout, done


def test_making_a_namespace_changes_neither_ours_nor_that_of_other_threads() -> None:
    def mine(kind: str) -> Path:
        return Path(f"/proc/thread-self/ns/{kind}").readlink()

    before = mine("net"), mine("user")
    seen = []
    go, done = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        seen.append(mine("net"))
        done.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with Namespace() as ns:
        go.set()
        done.wait()
        thread.join()
        assert (mine("net"), mine("user")) == before
        assert seen == [before[0]]
        assert os.fstat(ns.net.fileno()).st_ino != Path("/proc/self/ns/net").stat().st_ino
        assert not Interface("tap0").exists()


def test_a_namespace_leaves_no_descriptor_thread_or_child() -> None:
    def children() -> str:
        return Path("/proc/thread-self/children").read_text()

    before = open_fds(), set(threading.enumerate()), children()
    for _ in range(3):
        with Namespace(address="10.0.0.1/24", queues=2) as ns:
            ns.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
        ns.close()
    assert not open_fds() - before[0]
    assert not set(threading.enumerate()) - before[1]
    assert children() == before[2]


def in_child(monkeypatch: pytest.MonkeyPatch, body: Callable[..., Any]) -> tuple[Any, ...]:
    """What ``_in_child`` raises, and the child's exit status."""
    statuses = []
    waitpid = os.waitpid

    def noted(pid: int, options: int) -> tuple[int, int]:
        statuses.append(waitpid(pid, options))
        return statuses[-1]

    monkeypatch.setattr(os, "waitpid", noted)
    with pytest.raises(Exception) as caught:
        netns._in_child(body)
    return caught.value, os.waitstatus_to_exitcode(statuses[0][1])


def test_a_bug_in_the_child_comes_home_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> Any:
        return len(5), []  # type: ignore[arg-type]

    error, status = in_child(monkeypatch, body)
    assert (type(error), status) == (RuntimeError, 1)
    assert "return len(5), []" in str(error) and "TypeError: object of type 'int'" in str(error)


def test_errors_of_the_child_come_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise PermissionError(errno.EPERM, "not for you")

    def busy() -> None:
        raise NetError("no tap", "make one")

    error, status = in_child(monkeypatch, refused)
    assert (type(error), error.strerror, status) == (PermissionError, "not for you", 0)
    monkeypatch.undo()
    error, status = in_child(monkeypatch, busy)
    assert (type(error), str(error), status) == (NetError, "no tap; make one", 0)


def test_a_child_that_cannot_answer_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error, status = in_child(monkeypatch, lambda: (["x" * (64 << 20)], []))
    assert (type(error), status) == (HostError, 1) and "status 1" in str(error)
    assert "Message too long" in capfd.readouterr().err
    monkeypatch.undo()
    error, status = in_child(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert (type(error), status) == (HostError, -9) and "status -9" in str(error)


def test_a_child_ends_with_the_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it waits for itself; and with the thread that waits."""

    def interrupted(*args: Any) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(helper, "recv_fds", interrupted)
        error, status = in_child(patch, signal.pause)
    assert (type(error), status) == (TimeoutError, -signal.SIGKILL)

    def body() -> Any:
        number = ctypes.c_int()
        ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
        return [str(number.value)], []

    assert netns._in_child(body) == ([str(int(signal.SIGKILL))], [])


@pytest.mark.skipif(os.geteuid() != 0, reason="another user makes it in a child")
def test_a_queue_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no lack of root, for which an ordinary user's namespace would be tried."""
    tries: list[int] = []

    def refuse(error: int) -> None:
        def refused(*args: Any) -> None:
            tries.append(os.getpid())
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(netns, "set_queue_length", refused)

    refuse(errno.ENOBUFS)
    with pytest.raises(NetError, match="no queue of 1000 packets: No buffer space available"):
        Namespace()
    refuse(errno.EPERM)
    with pytest.raises(NetForbidden, match="may not make a network namespace"):
        Namespace()
    assert tries == [os.getpid()] * 2, "the third was a child's"


def test_an_ordinary_user_gets_a_namespace(tun_for_all: Any) -> None:
    """In a child that gives up root, from a process with threads."""
    need_readable_checkout()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, daemon=True)
    thread.start()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                ctypes.CDLL(None).prctl(
                    4, 1, 0, 0, 0
                )  # PR_SET_DUMPABLE: lost with the change of user
            with Namespace(address="10.9.0.1/24", mtu=9000, queues=2) as ns:
                assert ns.user is not None and len(ns.tap.fds) == 2 and ns.tap.mtu == 9000
                with ns.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                    s.bind(("10.9.0.1", 0))
                show = ns.run(["ip", "addr"], capture_output=True, text=True).stdout
                assert "10.9.0.1/24" in show, show
                ns.tap.set_offloads(mask(*GSO))
            status = 0
        except BaseException as e:
            print(repr(e), file=sys.stderr)
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    thread.join()


def test_a_busy_tap_is_named(namespace: Namespace) -> None:
    out = run_inside(
        namespace,
        """
        try:
            Tap("tap0")
        except NetError as e:
            print(type(e).__name__, e)
        """,
    )
    assert out.startswith("NetError tap tap0 is in use; stop")


def test_what_is_no_tap_is_named(namespace: Namespace) -> None:
    out = run_inside(
        namespace,
        """
        try:
            Tap("lo")
        except NetError as e:
            print(type(e).__name__, e)
        """,
    )
    assert out.startswith("NetError lo exists but is no tap")


def test_a_tap_that_was_made_is_gone_even_after_sigkill(namespace: Namespace) -> None:
    p = inside(
        namespace,
        "tap = Tap('own0', address='10.1.1.1/24')\nprint(tap.created, flush=True)\ntime.sleep(60)",
    )
    assert p.stdin is not None and p.stdout is not None
    assert p.stdout.readline().strip() == "True"
    assert "own0" in links(namespace)
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    p.stdin.close()
    assert wait_for(lambda: "own0" not in links(namespace), PATIENCE)


def test_a_tap_of_the_users_is_left_as_it_was(namespace: Namespace) -> None:
    def show() -> list[str]:
        out = namespace.run(
            ["ip", "-4", "addr", "show", "mine0"], capture_output=True, text=True, check=True
        ).stdout
        return [
            re.sub(r"(qdisc|brd) \S+ ", "", line)
            for line in out.splitlines()
            if "valid_lft" not in line
        ]

    for address in ([], ["10.2.2.1/29"]):
        namespace.run(["ip", "tuntap", "add", "dev", "mine0", "mode", "tap"], check=True)
        for one in address:
            namespace.run(["ip", "addr", "add", one, "dev", "mine0"], check=True)
        before = show()
        out = run_inside(
            namespace,
            """
            tap = Tap("mine0", mtu=9000, address="10.3.3.1/25")
            print(tap.created, tap.mtu, "UP" in os.popen("ip -4 addr show mine0").read(),
                  "10.3.3.1/25" in os.popen("ip -4 addr show mine0").read())
            tap.close()
            """,
        )
        assert out == "False 9000 True True"
        assert show() == before
        namespace.run(["ip", "link", "del", "mine0"], check=True)


def test_a_multi_queue_tap_opened_as_single_is_explained(namespace: Namespace) -> None:
    namespace.run(["ip", "tuntap", "add", "dev", "many0", "mode", "tap", "multi_queue"], check=True)
    out = run_inside(
        namespace,
        """
        try:
            Tap("many0")
        except NetError as e:
            print(e)
        """,
    )
    assert "single-queue" in out


class Guest:
    """A mock guest on a tap, with the addresses and checksums to talk UDP."""

    MAC = bytes.fromhex("525400123456")
    IP, HOST = bytes([192, 168, 91, 2]), bytes([192, 168, 91, 1])

    def __init__(self, ns: Namespace, acked: int) -> None:
        self.memory = GuestMemory(8 << 20)
        self.acked = acked | mask(
            virtio.VIRTIO_F_VERSION_1,
            virtio.VIRTIO_RING_F_EVENT_IDX,
            virtio_net.VIRTIO_NET_F_MRG_RXBUF,
        )
        self.driver = NetDriver(self.memory)
        self.path = EmulatedNet(ns.tap)
        self.events = Events()
        self.links = self.events.links
        self.driver.fill()
        ns.tap.set_offloads(self.acked)
        self.start([r.vring() for r in self.driver.rings])
        ns.run(
            [
                "ip",
                "neigh",
                "replace",
                "192.168.91.2",
                "lladdr",
                "52:54:00:12:34:56",
                "dev",
                "tap0",
            ],
            check=True,
        )

    def start(self, rings: list[Vring]) -> None:
        self.path.start(self.acked, self.memory, rings, self.events)

    def udp_received(self, port: int, count: int = 1) -> list[bytes]:
        def find() -> list[bytes]:
            self.driver.poll()
            hits = [p for p in self.driver.received if p[24:26] == b"\x08\0" and p[35] == 17]
            return [p for p in hits if struct.unpack_from(">H", p, 48)[0] == port]

        assert wait_for(lambda: len(find()) >= count, PATIENCE)
        return find()

    def close(self) -> None:
        self.path.close()
        self.driver.close()
        self.memory.close()


@pytest.fixture
def guest(namespace: Namespace, request: pytest.FixtureRequest) -> Iterator[Guest]:
    g = Guest(namespace, getattr(request, "param", 0))
    yield g
    g.close()


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@pytest.mark.parametrize("guest", [0, mask(*GSO)], indirect=True)
def test_offloads_follow_the_negotiated_features(namespace: Namespace, guest: Guest) -> None:
    """With GUEST_CSUM the host leaves the checksum to us; without it, it does it all."""
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"hello", ("192.168.91.2", 4000))
        packet = guest.udp_received(4000)[0]
        offloaded = bool(guest.acked >> virtio_net.VIRTIO_NET_F_GUEST_CSUM & 1)
        assert bool(packet[0] & virtio_net.VIRTIO_NET_HDR_F_NEEDS_CSUM) == offloaded
        udp = packet[46:]
        pseudo = packet[38:46] + struct.pack(">BBH", 0, 17, len(udp))
        assert (checksum(pseudo + udp) == 0) != offloaded
        # And while running, as for VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET.
        namespace.tap.set_offloads(0)
        s.sendto(b"again", ("192.168.91.2", 4001))
        packet = guest.udp_received(4001)[0]
        assert not packet[0] & virtio_net.VIRTIO_NET_HDR_F_NEEDS_CSUM


def test_offloads_that_lack_what_they_require_are_not_asked_for(namespace: Namespace) -> None:
    for bits in ([virtio_net.VIRTIO_NET_F_GUEST_ECN], GSO[1:], [GSO[0], GSO[3]], GSO, []):
        namespace.tap.set_offloads(mask(*bits))


def test_the_tap_has_all_offloads(namespace: Namespace) -> None:
    features = namespace.tap.features()
    assert features >> virtio_net.VIRTIO_NET_F_CSUM & 1
    known = mask(*range(15), *USO, *TUNNELS, virtio_net.VIRTIO_NET_F_HASH_REPORT)
    assert not features & ~known
    assert not mask(*GSO) & ~features
    assert features & mask(*USO) in (0, mask(*USO))
    assert features & mask(*TUNNELS) in (0, mask(*TUNNELS))


def test_datagrams_in_segments(namespace: Namespace) -> None:
    """UDP_SEGMENT both ways: one frame with VIRTIO_NET_HDR_GSO_UDP_L4 for several datagrams."""
    if not namespace.tap.features() & mask(*USO):
        pytest.skip("this kernel's taps have no USO (Linux 6.2)")
    with contextlib.ExitStack() as stack:
        guest = Guest(namespace, mask(*GSO, *USO[:2]))
        stack.callback(guest.close)
        s = stack.enter_context(namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
        s.bind(("192.168.91.1", 5000))
        s.settimeout(PATIENCE)
        s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 700)
        data = os.urandom(7000)
        s.sendto(data, ("192.168.91.2", 4000))
        packet = guest.udp_received(4000)[0]
        assert packet[1] == virtio_net.VIRTIO_NET_HDR_GSO_UDP_L4
        assert struct.unpack_from("<H", packet, 4)[0] == 700
        assert packet[54:] == data
        # With one of the two features only, the host cuts: the kernel knows no such tap.
        namespace.tap.set_offloads(guest.acked & ~mask(virtio_net.VIRTIO_NET_F_GUEST_USO6))
        s.sendto(data, ("192.168.91.2", 4001))
        assert b"".join(p[54:] for p in guest.udp_received(4001, 10)) == data
        udp = struct.pack(">HHHH", 4000, 5000, 8 + len(data), 0)
        ip = (
            struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(data), 1, 0, 64, 17, 0)
            + Guest.IP
            + Guest.HOST
        )
        pseudo = ip[12:20] + struct.pack(">BBH", 0, 17, 8 + len(data))
        udp = udp[:6] + struct.pack(">H", ~checksum(pseudo) & 0xFFFF)
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        needs = virtio_net.VIRTIO_NET_HDR_F_NEEDS_CSUM
        gso = virtio_net.VIRTIO_NET_HDR_GSO_UDP_L4
        header = struct.pack("<BBHHHHH", needs, gso, 42, 700, 34, 6, 0)
        guest.driver.queue(
            mac_of(namespace) + Guest.MAC + b"\x08\0" + ip + udp + data, header=header
        )
        guest.driver.tx.publish()
        got = [s.recv(2000) for _ in range(10)]
        assert [len(d) for d in got] == [700] * 10 and b"".join(got) == data


def test_segments_in_a_tunnel(namespace: Namespace) -> None:
    """VXLAN both ways: one frame for several datagrams, with a header that tells where the inner
    headers are. A header whose offsets are nowhere is dropped.
    """
    tap = namespace.tap
    if not tap.features() & mask(*TUNNELS):
        pytest.skip("this kernel's taps have no segments in tunnels (Linux 6.17)")
    script = """
        ip link add vx0 address 02:00:00:00:09:01 type vxlan id 7 remote 192.168.91.2 \\
            dstport 4789 dev tap0 udpcsum
        ip addr add 10.9.0.1/24 dev vx0 && ip link set vx0 up
        ip neigh replace 10.9.0.2 lladdr 02:00:00:00:09:02 dev vx0"""
    namespace.run(["sh", "-ec", script], check=True)
    with contextlib.ExitStack() as stack:
        acked = mask(*GSO, *USO[:2], *TUNNELS)
        tap.set_header(header_size(acked))
        guest = Guest(namespace, acked)
        stack.callback(guest.close)
        s = stack.enter_context(namespace.socket(socket.AF_INET, socket.SOCK_DGRAM))
        s.bind(("10.9.0.1", 5000))
        s.settimeout(PATIENCE)
        s.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 700)
        data = os.urandom(7000)

        def tunnelled() -> list[bytes]:
            guest.driver.poll()
            return [p for p in guest.driver.received if data[-700:] in p]

        s.sendto(data, ("10.9.0.2", 4000))
        assert wait_for(lambda: len(tunnelled()) == 1)
        (packet,) = tunnelled()
        kind = virtio_net.VIRTIO_NET_HDR_GSO_UDP_L4 | virtio_net.VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4
        flags = virtio_net.VIRTIO_NET_HDR_F_NEEDS_CSUM | virtio_net.VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM
        assert packet[:2] == bytes([flags, kind]) and packet[4:6] == struct.pack("<H", 700)
        # 14 + 20 to the outer UDP header, 8 + 8 + 14 more to the inner IP header.
        assert packet[12:24] == bytes(8) + struct.pack("<HH", 34, 64) and packet[-7000:] == data
        # Without the offload, the host cuts, and there is no tunnel to point at.
        tap.set_offloads(guest.acked & ~mask(*TUNNELS[:2]))
        guest.driver.received.clear()
        s.sendto(data, ("10.9.0.2", 4000))
        assert wait_for(lambda: tunnelled() and len(guest.driver.received) >= 10)
        assert all(len(p) < 1500 and p[12:24] == bytes(12) for p in guest.driver.received)

        def datagram(source: bytes, target: bytes, ports: tuple[int, int], body: bytes) -> bytes:
            udp = struct.pack(">HHHH", *ports, 8 + len(body), 0)
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(body), 1, 0, 64, 17, 0)
            ip += source + target
            pseudo = ip[12:20] + struct.pack(">BBH", 0, 17, 8 + len(body))
            udp = udp[:6] + struct.pack(">H", ~checksum(pseudo) & 0xFFFF)
            return ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:] + udp + body

        inner = bytes.fromhex("020000000901 020000000902 0800")
        inner += datagram(bytes([10, 9, 0, 2]), bytes([10, 9, 0, 1]), (4000, 5000), data)
        vxlan = struct.pack(">II", 0x08000000, 7 << 8) + inner
        outer = mac_of(namespace) + Guest.MAC + b"\x08\0"
        outer += datagram(Guest.IP, Guest.HOST, (4789, 4789), vxlan)
        outer = outer[:40] + bytes(2) + outer[42:]  # no checksum outside
        needs, dropped = virtio_net.VIRTIO_NET_HDR_F_NEEDS_CSUM, [(34, 9000), (60000, 64), (64, 34)]
        for offsets in (*dropped, (0, 0), (34, 64)):
            header = struct.pack("<BBHHHHH", needs, kind, 92, 700, 84, 6, 0)
            guest.driver.queue(outer, header=header + bytes(8) + struct.pack("<HH", *offsets))
        guest.driver.tx.publish()
        got = [s.recv(2000) for _ in range(10)]
        assert [len(d) for d in got] == [700] * 10 and b"".join(got) == data
        assert wait_for(lambda: guest.path.counters()["tx_packets"] >= 1)
        assert guest.path.counters()["tx_drop_error"] == len(dropped) + 1


def test_a_hash_before_each_frame(namespace: Namespace) -> None:
    """Headers of 20 bytes, both ways, and the hash of what the host sends."""
    g = Guest(namespace, 0)
    g.path.stop()
    try:
        g.acked |= mask(virtio_net.VIRTIO_NET_F_HASH_REPORT)
        namespace.tap.set_header(header_size(g.acked))
        bases = [g.driver.rx.used_idx, g.driver.tx.used_idx]
        rings = [r.vring(b) for r, b in zip(g.driver.rings, bases, strict=True)]
        rings[0].hashing = Hashing(virtio_net.VIRTIO_NET_RSS_HASH_TYPE_UDPv4, bytes(range(40)))
        g.start(rings)
        with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind(("192.168.91.1", 5000))
            s.settimeout(PATIENCE)
            s.sendto(b"hello", ("192.168.91.2", 4000))

            def find() -> list[bytes]:
                g.driver.poll()
                return [p for p in g.driver.received if p.endswith(b"hello")]

            assert wait_for(lambda: len(find()) == 1)
            (packet,) = find()
            value, report, padding = struct.unpack_from("<IHH", packet, 12)
            assert (report, padding) == (virtio_net.VIRTIO_NET_HASH_REPORT_UDPv4, 0)
            state, kind = ffi.new("struct pv_flow_hash *"), ffi.new("uint16_t *")
            lib.pv_flow_hash_init(state, 1 << 2, bytes(range(40)), 40)
            frame = packet[20:]
            assert value == lib.pv_flow_hash(state, frame, len(frame), kind) != 0
            udp = struct.pack(">HHHH", 4000, 5000, 8 + 5, 0) + b"hello"
            ip = struct.pack(">BBHHHBBH", 0x45, 0, 33, 1, 0, 64, 17, 0) + Guest.IP + Guest.HOST
            ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
            good = mac_of(namespace) + Guest.MAC + b"\x08\0" + ip + udp
            g.driver.queue(good, header=bytes(20))
            g.driver.tx.publish()
            assert s.recvfrom(100) == (b"hello", ("192.168.91.2", 4000))
    finally:
        g.close()


def test_udp_to_the_host_and_what_the_tap_refuses(namespace: Namespace, guest: Guest) -> None:
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("192.168.91.1", 5000))
        s.settimeout(PATIENCE)
        mac = mac_of(namespace)
        udp = struct.pack(">HHHH", 4000, 5000, 8 + 5, 0) + b"hello"
        ip = (
            struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
            + Guest.IP
            + Guest.HOST
        )
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        good = mac + Guest.MAC + b"\x08\0" + ip + udp
        guest.driver.send(good)
        assert s.recvfrom(100) == (b"hello", ("192.168.91.2", 4000))
        # Too short for Ethernet, a checksum beyond the packet, an unknown gso_type: dropped,
        # counted, completed.
        bad_csum = struct.pack("<BBHHHHH", 1, 0, 0, 0, 60000, 0, 0)
        bad_gso = struct.pack("<BBHHHHH", 0, 0x77, 0, 100, 0, 0, 0)
        guest.driver.queue(b"short")
        guest.driver.queue(good, header=bad_csum)
        guest.driver.queue(good, header=bad_gso)
        guest.driver.queue(good)
        guest.driver.tx.publish()
        assert s.recvfrom(100)[0] == b"hello"
        assert wait_for(lambda: guest.driver.tx.outstanding == 0)
        assert guest.path.counters()["tx_drop_error"] == 3
        # An interface that is down: dropped, counted; it comes back.
        namespace.run(["ip", "link", "set", "tap0", "down"], check=True)
        guest.driver.send(good)
        assert wait_for(lambda: guest.driver.tx.outstanding == 0)
        assert guest.path.counters()["tx_drop_error"] == 4
        namespace.run(["ip", "link", "set", "tap0", "up"], check=True)
        guest.driver.send(good)
        assert s.recvfrom(100)[0] == b"hello"
        assert guest.links == []


def mac_of(ns: Namespace) -> bytes:
    out = ns.run(["ip", "link", "show", "tap0"], capture_output=True, text=True, check=True).stdout
    return bytes.fromhex(out.split("link/ether ")[1].split()[0].replace(":", ""))


def test_a_deleted_tap_is_link_down_without_a_busy_loop(namespace: Namespace, guest: Guest) -> None:
    namespace.run(["ip", "link", "del", "tap0"], check=True)
    assert wait_for(lambda: guest.links == [False], PATIENCE)
    guest.driver.send(bytes(60))
    assert wait_for(lambda: guest.driver.tx.outstanding == 0)
    before = guest.path.counters()["wakeups"]
    time.sleep(0.1)
    assert guest.path.counters()["wakeups"] - before <= 1
    assert guest.path.counters()["tx_drop_link"] == 1


def test_settings_of_a_deleted_tap() -> None:
    """None is refused, also of queues, for which the kernel says EINVAL."""
    with Namespace(queues=2) as namespace:
        namespace.run(["ip", "link", "del", "tap0"], check=True)
        tap = namespace.tap
        tap.set_queues(1)
        tap.set_queues(2)
        tap.set_header(10)
        tap.set_offloads(0)
        tap.set_rx_filter(RxFilter(bytes(6)))
        tap.set_carrier(False)
        assert not tap.announce(bytes(6)) and tap.discard() == 0


def test_a_tap_that_is_made_again_is_used_again(namespace: Namespace) -> None:
    """FAULTS 5, in a process inside, for a tap by name; also when the device is restarted
    meanwhile.
    """
    out = run_inside(
        namespace,
        """
        import subprocess
        from pyvmm.datapath.emulated import EmulatedNet
        from pyvmm.memory import GuestMemory
        from tests.driver import PATIENCE, Events, NetDriver, wait_for

        def ip(*args):
            subprocess.run(["ip", *args], check=True)

        def make():
            ip("tuntap", "add", "dev", "back0", "mode", "tap")
            ip("link", "set", "back0", "up")

        make()
        memory = GuestMemory(8 << 20)
        driver = NetDriver(memory)
        path = EmulatedNet(Tap("back0"))
        events = Events()
        links = events.links
        acked = 1 << 32 | 1 << 29 | 1 << 15
        path.start(acked, memory, [r.vring() for r in driver.rings], events)
        frame = b"\\xff" * 6 + b"\\x02" * 6 + b"\\x88\\xb5" + bytes(46)
        for round in range(2):
            driver.send(frame)
            assert wait_for(lambda: path.counters().get("tx_packets", 0) == round + 1)
            ip("link", "del", "back0")
            assert wait_for(lambda: links == [False, True] * round + [False]), links
            if round:
                bases = path.stop()
                rings = [r.vring(b) for r, b in zip(driver.rings, bases)]
                path.start(acked, memory, rings, events)
                assert wait_for(lambda: links[-2:] == [False, False])
            make()
            assert wait_for(lambda: links[-1])
        driver.send(frame)
        assert wait_for(lambda: path.counters()["tx_packets"] == 3)
        path.close()
        print(links, "back0" in open("/proc/net/dev").read())
        """,
    )
    assert out == "[False, True, False, False, True] True"


def test_a_queue_of_frames_before_start_is_delivered(namespace: Namespace) -> None:
    """The tap keeps frames while no data path runs: nothing is lost in a switch."""
    g = Guest(namespace, 0)
    g.path.stop()
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for i in range(200):
            s.sendto(bytes([i]), ("192.168.91.2", 6000))
    bases = [g.driver.rx.used_idx, g.driver.tx.used_idx]
    rings = [r.vring(b) for r, b in zip(g.driver.rings, bases, strict=True)]
    g.start(rings)
    assert [p[54:55] for p in g.udp_received(6000, 200)] == [bytes([i]) for i in range(200)]
    g.close()


def test_what_a_move_needs(namespace: Namespace) -> None:
    """Frames that wait are seen and thrown away; an announcement reaches the host's side."""
    tap = namespace.tap
    tap.discard()
    assert not tap.waiting()
    namespace.run(
        ["ip", "neigh", "replace", "192.168.91.2", "lladdr", "52:54:00:12:34:56", "dev", "tap0"],
        check=True,
    )
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _ in range(3):
            s.sendto(bytes(1000), ("192.168.91.2", 4000))
    assert tap.waiting()
    assert tap.discard() >= 3 and not tap.waiting()
    with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as s:
        s.bind(("tap0", 3))
        s.settimeout(PATIENCE)
        assert tap.announce(bytes.fromhex("525400123456"))
        while (data := s.recv(2000))[12:14] != b"\x80\x35":
            pass
        assert data[:12] == b"\xff" * 6 + bytes.fromhex("525400123456")


def test_two_queues_of_one_tap() -> None:
    with Namespace(queues=2, address="192.168.91.1/24") as ns:
        assert len({fd.fileno() for fd in ns.tap.fds}) == 2
        for fd in ns.tap.fds:
            with pytest.raises(BlockingIOError):
                while True:
                    os.read(fd.fileno(), 2048)


def test_forbidden_taps_name_the_remedy(tun_for_all: Any) -> None:
    """As a user without rights in the namespace: neither making one nor opening another's works."""
    if os.getuid():
        with pytest.raises(NetForbidden, match="ip tuntap add"):
            Tap("nope0")
        return
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                Tap("nope0")
            except NetForbidden as e:
                status = 0 if "ip tuntap add" in str(e) and e.exit_code == 107 else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_no_tun_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.hostnet.tap.TUN", "/dev/net/none")
    with pytest.raises(NetError, match="there is no /dev/net/none; load the tun module"):
        Tap("x0")


def test_no_namespaces_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """unshare refused: one line with the remedy."""

    def refuse(flags: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(userns, "unshare", refuse)
    monkeypatch.setattr(userns, "_filtered", lambda: False)
    with pytest.raises(NetForbidden, match="run as root, allow user namespaces") as caught:
        Namespace()
    assert ALLOW_USER_NAMESPACES in str(caught.value)
