"""Taps that another program hands over (`fd=`), taps on bridges (`bridge=`), and what macvtaps
(`macvtap=`) say if they cannot be made, with the real kernel, in network namespaces of the tests'
own.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import closing, nullcontext
from fcntl import ioctl
from socket import AF_NETLINK, SOCK_RAW
from typing import TYPE_CHECKING

import pytest

from pyvmm._ext import lib
from pyvmm.card.uplink import Uplink
from pyvmm.datapath.base import RxFilter
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError, NetError, UsageError
from pyvmm.fd import Fd
from pyvmm.hostnet.macvtap import Macvtap, explain
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.rtnetlink import Link
from pyvmm.hostnet.tap import TUN, Tap
from pyvmm.memory import GuestMemory
from pyvmm.netopt import Net
from pyvmm.spec.virtio_net import VIRTIO_NET_F_GUEST_CSUM
from tests.driver import Events, NetDriver, wait_for
from tests.unit.test_tap import links, run_inside
from tests.unit.test_vhost_user import no_leak

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["no_leak"]  # a fixture

FULL = lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes interfaces")


# --- the keys -------------------------------------------------------------------------------------


def test_what_is_taken() -> None:
    net = Net.parse("emulated,fd=5")
    assert (net.fds, net.queues, net.has_tap, net.own_network) == ([5], 1, True, False)
    net = Net.parse("vhost-net,fd=5+7,switchable=emulated,guest=10.0.0.2/24")
    assert (net.fds, net.queues) == ([5, 7], 2)
    assert Net.parse("emulated,fd=5+7,queues=2").queues == 2 and Net(fd=9).fds == [9]
    net = Net.parse("vhost-user,bridge=br0,tap=tap1,queues=2")
    assert (net.bridge, net.tap, net.own_network) == ("br0", "tap1", False)
    assert Net.parse("emulated").own_network
    net = Net.parse("vhost-net,macvtap=eth0,queues=2,switchable=emulated")
    assert (net.macvtap, net.has_tap, net.own_network) == ("eth0", True, False)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("emulated,fd=", "fd="),
        ("emulated,fd=0", "use 3 to"),
        ("emulated,fd=2000000", "use 3 to"),
        ("emulated,fd=five", "use 3 to"),
        ("emulated,fd=5+5", "one descriptor per queue pair"),
        ("emulated,fd=5+6,queues=3", "one descriptor per queue pair"),
        ("emulated,fd=5,queues=2", "one descriptor per queue pair"),
        ("emulated,fd=5,tap=tap0", "leave out tap="),
        ("emulated,fd=5,bridge=br0", "leave out bridge="),
        ("emulated,fd=5,host=10.0.0.1/24", "leave out host="),
        ("vhost-user,fd=5", "unknown key 'fd'"),
        ("user,fd=5", "unknown key 'fd'"),
        ("emulated,fd=5,switchable=vhost-user", "an open tap is for emulated and vhost-net"),
        ("emulated,bridge=a/b", "no interface name"),
        ("emulated,macvtap=a/b", "no interface name"),
        ("emulated,macvtap=", "no interface name"),
        ("vhost-user,macvtap=eth0", "unknown key 'macvtap'"),
        ("emulated,macvtap=eth0,switchable=vhost-user", "a macvtap is for emulated and vhost-net"),
        ("emulated,macvtap=eth0,tap=tap0", "leave out tap="),
        ("emulated,macvtap=eth0,bridge=br0", "leave out bridge="),
        ("emulated,macvtap=eth0,host=10.0.0.1/24", "leave out host="),
        ("emulated,macvtap=eth0,fd=5", "leave out macvtap="),
        ("emulated,bridge=", "no interface name"),
        ("user,bridge=br0", "a card without a tap"),
        ("vhost-user,socket=/s,bridge=br0", "a card without a tap"),
        ("none,bridge=br0", "keys: none"),
        ("emulated,bridge=br0,host=10.0.0.1/24", "ip addr add 10.0.0.1/24 dev br0"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as e:
        Net.parse(text)
    assert problem in str(e.value) and "\n" not in str(e.value)


# --- open taps ------------------------------------------------------------------------------------


def opened(name: str, flags: int) -> int:
    """A descriptor of a tap, as another program opens it."""
    fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    ioctl(fd, lib.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    return fd


@pytest.fixture
def elsewhere() -> Iterator[Namespace]:
    """A network namespace with a tap, whose descriptors are handed over."""
    with Namespace(address="192.168.93.1/24", mtu=1400) as ns:
        yield ns


def test_a_tap_of_another_namespace_moves_packets(elsewhere: Namespace) -> None:
    number = elsewhere.tap.fileno()
    net = Net("emulated", fd=number, mtu=1400)
    with closing(Uplink(net, None)) as uplink, closing(GuestMemory(16 << 20)) as memory:
        tap = uplink.tap
        assert tap is not None and (tap.name, tap.mtu, tap.created) == ("tap0", 1400, False)
        assert tap.interface is None and tap.fileno() != number
        assert Net("emulated").own_network and uplink.namespace is None
        with pytest.raises(NetError, match="is in another network namespace; use --net emulated"):
            tap.link()  # which vhost-net needs
        route = uplink.open(net, bytes(6))
        assert isinstance(route.path, EmulatedNet) and route.tap is tap
        with closing(route.path), closing(NetDriver(memory)) as driver:
            route.path.start(1 << 32, memory, [r.vring() for r in driver.rings], Events())
            frame = bytes.fromhex("ffffffffffff525400123456") + b"\x08\x06" + bytes(46)
            driver.send(frame)
            link = elsewhere.tap.link()
            assert wait_for(lambda: link.stats()["rx_packets"] >= 1)
            route.path.stop()
    assert not elsewhere.tap.fds[0].closed  # the descriptor was lent


@needs_root
def test_a_tap_of_our_own_namespace_is_known(elsewhere: Namespace) -> None:
    """Its MTU counts, and it is watched; it stays as it is."""
    out = run_inside(
        elsewhere,
        f"""
        import struct; from fcntl import ioctl; from pyvmm._ext import lib
        fd = os.open("/dev/net/tun", os.O_RDWR)
        ioctl(fd, lib.TUNSETIFF, struct.pack("16sH22x", b"tap7", {FULL}))
        Interface("tap7").set_mtu(1300)
        tap = Tap.inherited([fd])
        print(tap.name, tap.mtu, tap.created, tap.interface is tap, tap.link().stats()["rx_bytes"])
        tap.close()
        print(Interface("tap7").exists(), os.get_blocking(fd))
        """,
    )
    assert out.splitlines() == ["tap7 1300 False True 0", "True False"]


@needs_root
def test_several_queues(elsewhere: Namespace) -> None:
    out = run_inside(
        elsewhere,
        f"""
        import struct; from fcntl import ioctl; from pyvmm._ext import lib
        def opened(name, flags):
            fd = os.open("/dev/net/tun", os.O_RDWR)
            ioctl(fd, lib.TUNSETIFF, struct.pack("16sH22x", name, flags))
            return fd
        many = {FULL} | lib.IFF_MULTI_QUEUE
        fds = [opened(b"tap7", many), opened(b"tap7", many), opened(b"tap8", many)]
        tap = Tap.inherited(fds[:2])
        print(len(tap.fds)); tap.set_queues(1); tap.set_queues(2); tap.close()
        single = opened(b"tap9", {FULL})
        for wrong in ([fds[0], fds[2]], [single, fds[0]]):
            try: Tap.inherited(wrong)
            except NetError as e: print(e)
        """,
    )
    lines = out.splitlines()
    assert lines[0] == "2" and len(lines) == 3
    assert "is not of tap tap7; give queues of one tap" in lines[1]
    assert "tap9, has one queue (no IFF_MULTI_QUEUE)" in lines[2]


@needs_root
def test_what_is_no_tap_or_not_usable(elsewhere: Namespace) -> None:
    out = run_inside(
        elsewhere,
        """
        import socket, struct; from fcntl import ioctl; from pyvmm._ext import lib
        def opened(name, flags):
            fd = os.open("/dev/net/tun", os.O_RDWR)
            if name: ioctl(fd, lib.TUNSETIFF, struct.pack("16sH22x", name, flags))
            return fd
        tap, no_pi = lib.IFF_TAP, lib.IFF_NO_PI
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in (1, 2, 5)]
        for fd in (opened(b"a", tap | no_pi),
                   opened(b"c", lib.IFF_TUN | no_pi | lib.IFF_VNET_HDR), opened(b"", 0),
                   *(pair[0].fileno() for pair in pairs), os.pipe()[0], os.open("/", 0), 999):
            try: Tap.inherited([fd])
            except NetError as e: print(e)
        """,
    )
    for line, words in zip(
        out.splitlines(),
        (
            "a, has no virtio-net headers (no IFF_VNET_HDR); open it with IFF_TAP",
            "c, is a tun and no tap",
            "is a tap whose interface is gone",
            "is a stream socket and no tap; open /dev/net/tun with",
            "is a datagram socket and no tap",
            "is a seqpacket socket and no tap",
            "is a pipe and no tap",
            "is no tap",
            "fd=999 is not open; open it in the program that starts pyvmm, inheritable",
        ),
        strict=True,
    ):
        assert words in line, line


def test_a_tap_that_is_deleted_meanwhile_is_one_line(elsewhere: Namespace) -> None:
    with closing(Tap.inherited([elsewhere.tap.fileno()])) as tap:
        elsewhere.run(["ip", "link", "del", "tap0"], check=True)
        assert wait_for(lambda: "tap0" not in links(elsewhere))
        tap.set_offloads(0)
        assert not tap.reopen()
    with pytest.raises(NetError, match="whose interface is gone"):
        Tap.inherited([elsewhere.tap.fileno()])


# --- bridges --------------------------------------------------------------------------------------


@needs_root
def test_a_tap_on_a_bridge(elsewhere: Namespace) -> None:
    elsewhere.run(["ip", "link", "add", "br0", "mtu", "1380", "type", "bridge"], check=True)
    before = links(elsewhere)
    out = run_inside(
        elsewhere,
        """
        from pyvmm.card.uplink import Uplink; from pyvmm.netopt import Net
        net = Net("emulated", bridge="br0")
        uplink, other = Uplink(net, None), Uplink(net, None)
        tap = uplink.tap
        print(sorted(os.listdir("/sys/class/net")) and tap.created, tap.mtu, Interface("br0").mtu)
        print(uplink.given(net), other.tap.name != tap.name)
        os.system(f"ip -o link show master br0 | wc -l")
        uplink.close(); other.close()
        user = Uplink(Net("emulated", bridge="br0", tap="tap9", mtu=9000), None)
        print(user.tap.name, user.tap.mtu)
        """,
    )
    assert out.splitlines() == ["True 1380 1380", "(None, 1380) True", "2", "tap9 9000"]
    assert wait_for(lambda: links(elsewhere) == before)


@needs_root
def test_a_tap_of_the_user_s_is_taken_out_again(elsewhere: Namespace) -> None:
    for command in (
        "ip link add br0 type bridge",
        "ip link add br1 type bridge",
        "ip tuntap add mine mode tap",
        "ip tuntap add theirs mode tap",
        "ip link set theirs master br1",
    ):
        elsewhere.run(command.split(), check=True)

    def ports(bridge: str) -> str:
        done = elsewhere.run(
            ["ip", "-o", "link", "show", "master", bridge], capture_output=True, text=True
        )
        return str(done.stdout)

    out = run_inside(
        elsewhere,
        """
        from pyvmm.hostnet.bridge import tap_of
        def use(bridge, name):
            try: return tap_of(bridge, name, mtu=None, queues=1, txqueuelen=100)
            except NetError as e: print(e)
        tap = use("br0", "mine")
        os.system("ip -o link show master br0 | grep -c mine")
        tap.close()
        use("br0", "theirs")
        use("br1", "theirs").close()
        use("nobr", None)
        use("lo", None)
        """,
    )
    lines = out.splitlines()
    assert lines[0] == "1" and "mine" not in ports("br0") and "theirs" in ports("br1")
    assert "tap theirs is a port of something else already; as root:" in lines[1]
    assert "there is no bridge nobr; as root: ip link add nobr type bridge" in lines[2]
    assert "into lo: it is no bridge; name a bridge" in lines[3]


@needs_root
def test_a_bridge_needs_privileges(elsewhere: Namespace) -> None:
    elsewhere.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)
    elsewhere.run(["ip", "tuntap", "add", "mine", "mode", "tap", "user", "65534"], check=True)
    source = """
        from pyvmm.hostnet.bridge import tap_of
        mine = Tap("mine")
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try: tap_of("br0", None, mtu=None, queues=1, txqueuelen=1000)
        except NetForbidden as e: print(e)
        try: mine.join("br0")
        except NetForbidden as e: print(e)
        """
    out = run_inside(elsewhere, source).splitlines()
    assert "may not make a tap for the bridge br0; run as root, or name a tap" in out[0]
    assert "may not put tap mine into the bridge br0; as root: ip link set mine master" in out[1]


# --- macvtaps, which boot/test_handed_tap makes ---------------------------------------------------


@needs_root
def test_no_macvtap(elsewhere: Namespace) -> None:
    source = """
        from pyvmm.card.uplink import Uplink; from pyvmm.netopt import Net
        def make(lower):
            net = Net("emulated", macvtap=lower)
            try: Uplink(net, None, mac=bytes((2, 0, 0, 0, 0, 1)))
            except NetError as e: print(type(e).__name__, e)
        make("noif0")
        make("lo")
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        make("tap0")
        """
    lines = run_inside(elsewhere, source).splitlines()
    assert lines[0].endswith("macvtap=noif0: there is no such interface; name one of: ip -br link")
    # A kernel without macvtap says so before it looks at the interface.
    assert "no Ethernet interface" in lines[1] or "the kernel has no macvtap" in lines[1]
    assert lines[2].startswith("NetForbidden may not make a macvtap=tap0; run as root")


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (errno.EBUSY, "is a port of a bridge"),
        (errno.EADDRINUSE, "an interface there has that MAC address"),
        (errno.EINVAL, "a smaller MTU than mtu="),
        (errno.ENOBUFS, "cannot make a macvtap=eth0: No buffer space available"),
    ],
)
def test_why_the_kernel_makes_no_macvtap(number: int, problem: str) -> None:
    error = explain("eth0", OSError(number, os.strerror(number)))
    assert problem in str(error) and "\n" not in str(error)


def test_the_counters_of_a_macvtap_are_turned_round(elsewhere: Namespace) -> None:
    """The kernel counts what the guest sends as transmitted: a tap's counters say the reverse."""
    frame = bytes(12) + b"\xff" * 6 + bytes(6) + b"\x08\x06" + bytes(46)
    os.write(elsewhere.tap.fileno(), frame)
    fds = [Fd(elsewhere.socket(AF_NETLINK, SOCK_RAW).detach()) for _ in range(2)]
    with closing(Link(elsewhere.tap.link().index, *fds, mirrored=True)) as link:
        plain, turned = elsewhere.tap.link().stats(), link.stats()
    assert plain["rx_packets"] == turned["tx_packets"] >= 1
    assert plain["tx_packets"] == turned["rx_packets"]


def test_a_macvtap_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings fail only if there is an interface that refuses them (drivers/net/tap.c)."""

    def refused(fd: int, request: int, arg: object = 0) -> bytes:
        if request == lib.TUNGETIFF and there:
            return bytes(40)
        number = errno.EINVAL if request == lib.TUNSETQUEUE else errno.ENOLINK
        raise OSError(number, os.strerror(number))

    for module in ("tap", "macvtap"):
        monkeypatch.setattr(f"pyvmm.hostnet.{module}.ioctl", refused)
    for there in (False, True):
        fds = [Fd(os.open(os.devnull, os.O_RDWR)) for _ in range(4)]
        link = Link(1, *fds[2:], mirrored=True)
        with closing(Macvtap.adopt("macvtap0", fds[:2], 1500, link)) as tap:
            with pytest.raises(HostError) if there else nullcontext():
                tap.set_offloads(1 << VIRTIO_NET_F_GUEST_CSUM)
            with pytest.raises(HostError) if there else nullcontext():
                tap.set_queues(1)
            tap.set_rx_filter(RxFilter(bytes(6)))
