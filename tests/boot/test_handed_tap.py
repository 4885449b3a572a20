"""Guests on taps that another program hands over, and on a bridge, in a network namespace of the
test's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyvmm._ext import lib
from tests.boot.guest import Run

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
BRIDGE = """
ip link add br0 type bridge; ip addr add 10.9.0.1/24 dev br0; ip link set br0 up
"$@"; status=$?
ip -o link show master br0 >&2
exit $status"""
PING = ["--", "ping", "-c", "3", "-i", "0.3", "10.9.0.1"]


@pytest.mark.parametrize("mode", ["emulated", "vhost-net"])
def test_a_tap_that_is_handed_over(host: Host, mode: str) -> None:
    net = f"{mode},fd=FD,guest=10.9.0.2/24,switchable=emulated+vhost-net"
    wrapper = ["unshare", "--net", "python3", "-c", HAND_OVER]
    with Run(host, "--net", net, *PING, wrapper=wrapper) as run:
        assert run.wait() == 0, repr(run)
    assert "3 packets received" in run.out
    assert run.report["nets"][0]["tap"] == "given0"


def test_a_guest_on_a_bridge(host: Host) -> None:
    net = "vhost-net,bridge=br0,guest=10.9.0.2/24"
    wrapper = ["unshare", "--net", "sh", "-c", BRIDGE, "sh"]
    with Run(host, "--net", net, *PING, wrapper=wrapper) as run:
        assert run.wait() == 0, repr(run)
    assert "3 packets received" in run.out
    assert run.report["nets"][0]["tap"].startswith("pv") and "master br0" not in run.err
