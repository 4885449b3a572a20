"""Guests on taps and sockets that another program hands over, on a bridge, and on macvtaps, in a
network namespace of the test's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyvmm._ext import lib
from tests.boot.guest import Run, pings

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Opens a tap as a manager of machines does, and hands it over in the place of FD.
HAND_OVER = f"""
import fcntl, os, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
flags = {lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR}
fcntl.ioctl(fd, {lib.TUNSETIFF}, struct.pack("16sH22x", b"given0", flags))
os.system("ip addr add 10.9.0.1/24 dev given0; ip link set given0 up")
os.set_inheritable(fd, True)
os.execvp(sys.argv[1], [word.replace("FD", str(fd)) for word in sys.argv[1:]])
"""
#: Hands over a stream socket, at whose other end a host answers: for all addresses, to ARP and to
#: pings. The kernel at the other ends of the card's macvtaps is at 10.8.0.1.
SOCKET = """
import os, socket, struct, sys
os.system("modprobe macvtap; ip link add low0 mtu 1480 type veth peer name far0 mtu 1480; "
          "ip addr add 10.8.0.1/24 dev far0; ip link set low0 up; ip link set far0 up")
ours, theirs = socket.socketpair()
if os.fork():
    ours.close()
    theirs.set_inheritable(True)
    os.execvp(sys.argv[1], [word.replace("FD", str(theirs.fileno())) for word in sys.argv[1:]])
theirs.close()
MAC = bytes.fromhex("525400aabbcc")
while head := ours.recv(4, socket.MSG_WAITALL):
    f = ours.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL)
    if f[12:14] == b"\\x08\\x06" and f[20:22] == b"\\0\\1":
        answer = f[6:12] + MAC + f[12:21] + b"\\2" + MAC + f[38:42] + f[22:32]
    elif f[12:14] == b"\\x08\\0" and f[23] == 1 and f[34] == 8:
        total = int.from_bytes(f[36:38], "big") + 0x800  # of type 0 in the place of 8
        total = (total & 0xFFFF) + (total >> 16)
        echo = b"\\0\\0" + total.to_bytes(2, "big") + f[38:]
        answer = f[6:12] + MAC + f[12:26] + f[30:34] + f[26:30] + echo
    else:
        continue
    ours.sendall(struct.pack("!I", len(answer)) + answer)
"""
BRIDGE = """
ip link add br0 type bridge; ip addr add 10.9.0.1/24 dev br0; ip link set br0 up
"$@"; status=$?
ip -o link show master br0 >&2
exit $status"""
PING = ["--", "sh", "-c", pings("10.9.0.1")]


@pytest.mark.parametrize("mode", ["emulated", "vhost-net"])
def test_a_tap_that_is_handed_over(host: Host, mode: str) -> None:
    net = f"{mode},fd=FD,guest=10.9.0.2/24,switchable=emulated+vhost-net"
    wrapper = ["unshare", "--net", "python3", "-c", HAND_OVER]
    with Run(host, "--net", net, *PING, wrapper=wrapper) as run:
        assert run.wait() == 0, repr(run)
    assert run.out.count("1 packets received") == 3
    assert run.report["nets"][0]["tap"] == "given0"


def test_a_guest_on_a_bridge(host: Host) -> None:
    net = "vhost-net,bridge=br0,guest=10.9.0.2/24"
    wrapper = ["unshare", "--net", "sh", "-c", BRIDGE, "sh"]
    with Run(host, "--net", net, *PING, wrapper=wrapper) as run:
        assert run.wait() == 0, repr(run)
    assert run.out.count("1 packets received") == 3
    assert run.report["nets"][0]["tap"].startswith("pv") and "master br0" not in run.err


def test_a_socket_and_macvtaps(host: Host) -> None:
    """A card on a socket, and one of each data path on one interface of the host's."""
    nets = [
        "emulated,fd=FD,guest=10.9.0.2/24",
        "vhost-net,macvtap=low0,guest=10.8.0.2/24,mac=52:54:00:00:08:02,queues=2",
        "emulated,macvtap=low0,guest=10.8.0.3/24",
    ]
    ways = [("10.9.0.1", ""), ("10.8.0.1", "-I eth1"), ("10.8.0.1", "-I eth2")]
    script = (
        " && ".join(pings(address, options=options) for address, options in ways) + ";"
        " cat /sys/class/net/eth1/mtu; cat /sys/class/net/eth1/address"
    )
    options = [word for net in nets for word in ("--net", net)]
    wrapper = ["unshare", "--net", "python3", "-c", SOCKET]
    with Run(host, *options, "--cpus", "2", "--", "sh", "-c", script, wrapper=wrapper) as run:
        assert run.wait() == 0, repr(run)
    assert run.out.count("1 packets received") == 9 and "1480\n52:54:00:00:08:02\n" in run.out
    there, lent, own = run.report["nets"]
    assert there["socket"]["dropped"] == 0 and there["tap"] == ""
    for card in (lent, own):
        assert card["counters"]["tx_packets"] >= 4 and card["counters"]["rx_packets"] >= 4, card
