"""A tap that shares an interface of the host's: a macvtap in bridge mode, for ``macvtap=IFACE``.

The macvtap is made in a network namespace of the card's own, on an interface of ours. So it goes
with its last descriptor, even after SIGKILL, as a tap does.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from fcntl import ioctl

from pyvmm._ext import lib
from pyvmm.errors import NetError, NetForbidden
from pyvmm.fd import Fd
from pyvmm.hostnet.rtnetlink import attribute, make_link
from pyvmm.hostnet.tap import IFNAMSIZ, Tap, settle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.datapath.base import RxFilter

ARPHRD_ETHER = 1
#: Numbers of interfaces are small: with one of these, the name of the device file is nobody else's.
FIRST_INDEX, LAST_INDEX = 1 << 24, 1 << 30


class Macvtap(Tap):
    """What of a tap a macvtap has otherwise. It passes the frames that have its own address, and
    all multicast; so it follows the guest's address, and other filters are left to the guest. Its
    carrier is that of the interface below.
    """

    mirrored = True

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Have the guest's own address.

        :raises HostError: another interface there has it.
        """
        address = struct.pack("16sH6s16x", b"", ARPHRD_ETHER, rx.mac)
        try:
            held = ioctl(self.fileno(), lib.SIOCGIFHWADDR, bytes(40))[18:24]
        except OSError:
            return  # ENOLINK: it has gone, with the interface below
        if held != rx.mac:
            self._set(lib.SIOCSIFHWADDR, address, f"the address {rx.mac.hex(':')}")

    def set_carrier(self, up: bool) -> None:
        """Nothing."""

    def offer_steering(self) -> None:
        """Nothing: the kernel chooses the queue by the flow."""


def make(sock: Fd, lower: int, name: str, namespace: int, **more: int | bytes | None) -> int:
    """Make a macvtap, which is up.

    :param sock: an rtnetlink socket of the namespace of ``lower``, an interface's number.
    :param name: of the macvtap. :param namespace: a descriptor of its network namespace.
    :param more: ``mac``, ``mtu`` in bytes and ``txqueuelen``; None leaves the kernel's choice.
    :returns: its number, which the device file is called after. :raises OSError: from the kernel.
    """
    index = secrets.randbelow(LAST_INDEX - FIRST_INDEX) + FIRST_INDEX
    mode = attribute(lib.IFLA_MACVLAN_MODE, struct.pack("=I", lib.MACVLAN_MODE_BRIDGE))
    info = attribute(lib.IFLA_INFO_KIND, b"macvtap") + attribute(lib.IFLA_INFO_DATA, mode)
    wanted = attribute(lib.IFLA_IFNAME, name.encode() + b"\0")
    wanted += attribute(lib.IFLA_LINK, struct.pack("=I", lower))
    wanted += attribute(lib.IFLA_NET_NS_FD, struct.pack("=I", namespace))
    wanted += attribute(lib.IFLA_LINKINFO, info)
    kinds = {"mac": lib.IFLA_ADDRESS, "mtu": lib.IFLA_MTU, "txqueuelen": lib.IFLA_TXQLEN}
    for key, value in more.items():
        if value is not None:
            raw = struct.pack("=I", value) if isinstance(value, int) else value
            wanted += attribute(kinds[key], raw)
    make_link(sock, index, lib.IFF_UP | lib.IFF_ALLMULTI, wanted)
    return index


def open_queue(name: str, index: int, *, multi: bool) -> Fd:
    """Open a queue of the macvtap ``name``, which has the number ``index``, in the thread that is
    in its namespace.

    :raises NetError: there is no device file of its.
    """
    path = f"/dev/tap{index}"
    try:
        fd = Fd(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as e:
        raise NetError(
            f"cannot open {path}, the macvtap's device file: {e.strerror}",
            "start pyvmm where /dev is the kernel's (devtmpfs), or use bridge=",
        ) from e
    try:
        flags = lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR
        flags |= lib.IFF_MULTI_QUEUE if multi else 0
        ioctl(fd.fileno(), lib.TUNSETIFF, struct.pack("16sH22x", b"", flags))
        found = ioctl(fd.fileno(), lib.TUNGETIFF, bytes(40))[:IFNAMSIZ].partition(b"\0")[0]
        if found != name.encode():
            raise NetError(f"{path} is of another interface", "start pyvmm again")
        settle(fd)
    except OSError as e:
        fd.close()
        raise NetError(f"cannot use {path}: {e.strerror}") from e
    except BaseException:
        fd.close()
        raise
    return fd


def explain(lower: str, e: OSError) -> NetError:
    """The error for a macvtap on ``lower`` that the kernel has refused to make."""
    what = f"macvtap={lower}"
    if e.errno in (errno.EPERM, errno.EACCES):
        return NetForbidden(f"may not make a {what}", "run as root (CAP_NET_ADMIN), or use a tap")
    if e.errno == errno.ENODEV:
        return NetError(f"{what}: there is no such interface", "name one of: ip -br link")
    if e.errno == errno.EOPNOTSUPP:
        return NetError(f"{what}: the kernel has no macvtap", "as root: modprobe macvtap")
    if e.errno == errno.EBUSY:
        return NetError(
            f"{what} is a port of a bridge, or its device is taken", "name the bridge: bridge="
        )
    if e.errno == errno.EADDRINUSE:
        return NetError(f"{what}: an interface there has that MAC address", "give another: mac=")
    if e.errno == errno.EINVAL:
        return NetError(
            f"{what}: the interface has a smaller MTU than mtu=, or is no Ethernet interface",
            "leave out mtu=, or name another interface",
        )
    return NetError(f"cannot make a {what}: {e.strerror}")
