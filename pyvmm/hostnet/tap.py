"""Tap interfaces through plain ioctls: opening, offloads, addresses.

Uses neither a netlink library nor a subprocess, because every run waits for this at its start.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import threading
from contextlib import suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl, ioctl
from socket import (
    AF_INET,
    AF_INET6,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    if_indextoname,
    socket,
)

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, NetError, NetForbidden, UsageError
from pyvmm.fd import Fd
from pyvmm.hostnet.addresses import parse_address
from pyvmm.hostnet.framefilter import frame_filter
from pyvmm.hostnet.rtnetlink import Link
from pyvmm.hostnet.steering import load_steering, may_steer
from pyvmm.spec.ethernet import ETH_DATA_LEN, ETH_MIN_MTU, TAP_MAX_MTU
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HASH_REPORT,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_RSS,
    VIRTIO_NET_HDR_SIZE,
    VIRTIO_NET_HDR_V1_HASH_SIZE,
    VIRTIO_NET_HDR_V1_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import RxFilter, Steering

    #: The descriptors, the MTU and the link of an open tap; no link if it is elsewhere.
    Adopted = tuple[list[Fd], int, Link | None]

TUN = "/dev/net/tun"
IFNAMSIZ = 16
INT_MAX = 0x7FFFFFFF
#: Sizes of virtio-net headers in bytes.
HEADERS = (VIRTIO_NET_HDR_SIZE, VIRTIO_NET_HDR_V1_SIZE, VIRTIO_NET_HDR_V1_HASH_SIZE)
#: Frames that may wait for the guest. The kernel's default for a tap, 500, drops some of a TCP
#: burst.
TXQUEUELEN = 1000
#: ``discard`` throws away at most so many frames: more than can wait in any queue.
DISCARD_MAX = 20000

#: GUEST_* feature bit -> the offload that the tap may then use towards us (TUNSETOFFLOAD).
OFFLOADS = {
    VIRTIO_NET_F_GUEST_CSUM: lib.TUN_F_CSUM,
    VIRTIO_NET_F_GUEST_TSO4: lib.TUN_F_TSO4,
    VIRTIO_NET_F_GUEST_TSO6: lib.TUN_F_TSO6,
    VIRTIO_NET_F_GUEST_ECN: lib.TUN_F_TSO_ECN,
    VIRTIO_NET_F_GUEST_UFO: lib.TUN_F_UFO,
    VIRTIO_NET_F_GUEST_USO4: lib.TUN_F_USO4,
    VIRTIO_NET_F_GUEST_USO6: lib.TUN_F_USO6,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO: lib.TUN_F_UDP_TUNNEL_GSO,
    VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM: lib.TUN_F_UDP_TUNNEL_GSO_CSUM,
}
USO = lib.TUN_F_USO4 | lib.TUN_F_USO6  # the kernel takes both or none
TUNNEL = lib.TUN_F_UDP_TUNNEL_GSO | lib.TUN_F_UDP_TUNNEL_GSO_CSUM
#: What any tap with IFF_VNET_HDR accepts from us: offloads, and headers with room for a hash.
HOST_FEATURES = (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HASH_REPORT,
)


def index_of(name: str, sock: socket) -> int:
    """The number of the interface ``name`` in the network namespace of ``sock``.

    :param sock: of any family; lent. :raises OSError: there is no such interface.
    """
    answer = ioctl(sock.fileno(), lib.SIOCGIFINDEX, struct.pack("16s24x", name.encode()))
    return int(struct.unpack_from("=i", answer, IFNAMSIZ)[0])


#: What a program of ours asks of an interface.
GETTERS = (
    lib.SIOCGIFINDEX,
    lib.SIOCGIFFLAGS,
    lib.SIOCGIFMTU,
    lib.SIOCGIFTXQLEN,
    lib.SIOCGIFADDR,
    lib.SIOCGIFNETMASK,
    lib.SIOCGIFHWADDR,
)
#: What it changes.
SETTERS = (lib.SIOCSIFMTU, lib.SIOCSIFTXQLEN, lib.SIOCSIFADDR, lib.SIOCSIFNETMASK)
#: What it does with the ports of a bridge.
PORTS = (lib.SIOCBRADDIF, lib.SIOCBRDELIF)


def interface_needs(words: list[str]) -> list[tuple[str, str]]:
    """The permissions of the helper that ``interface_request`` with these words needs: names of
    ``interface`` to ask; of ``tap`` to set up or down, and to be a port of a bridge; of ``setting``
    for the rest, which are what this process has set, or found, before it was confined.

    :raises HostError: no request of ours. :raises OSError: no interface has a port's number.
    """
    name, number, data = words
    request = int(number)
    if request in GETTERS:
        return [("interface", name)]
    if request == lib.SIOCSIFFLAGS:
        return [("tap", name)]
    if request in SETTERS:
        return [("setting", " ".join(words))]
    if request in PORTS:
        (port,) = struct.unpack_from("=i", bytes.fromhex(data))
        return [("interface", name), ("tap", if_indextoname(port))]
    raise HostError(f"no request of ours: {request:#x}")


def interface_request(words: list[str]) -> tuple[list[str], list[int]]:
    """Make a request that ``interface_needs`` knows; an operation of ``helper``. Of the flags, only
    IFF_UP changes.

    :param words: the interface's name, the request, and the union of ``struct ifreq`` in
        hexadecimal.
    :returns: the union. :raises OSError: from ioctl(2).
    """
    name, number, data = words
    request = int(number)
    if request not in (*GETTERS, *SETTERS, *PORTS, lib.SIOCSIFFLAGS):
        raise HostError(f"no request of ours: {request:#x}")
    union = bytes.fromhex(data)
    with socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0) as s:
        if request == lib.SIOCSIFFLAGS:
            old = ioctl(s.fileno(), lib.SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
            (now,), (new,) = (
                struct.unpack_from("=H", old, IFNAMSIZ),
                struct.unpack_from("=H", union),
            )
            union = struct.pack("=H", now & ~lib.IFF_UP | new & lib.IFF_UP)
        out = ioctl(s.fileno(), request, struct.pack("16s24s", name.encode(), union))
    return [out[IFNAMSIZ:].hex()], []


def open_named(words: list[str]) -> tuple[list[str], list[int]]:
    """Open one queue of a tap, which is made if there is none; an operation of ``helper``.

    :param words: the tap's name; a word that is empty unless the tap has several queues.
    :returns: the queue's descriptor. :raises NetError: ``TUN`` cannot be opened. :raises OSError:
        it can, but the kernel does not open the tap.
    """
    name, multi = words
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NetError(
            f"there is no {TUN}",
            "load the tun module, give the container that device "
            "(docker run --device /dev/net/tun), or do without: --net user",
        ) from None
    except PermissionError:
        raise NetForbidden(f"may not open {TUN}", f"as root: chmod 666 {TUN}") from None
    except OSError as e:
        raise NetError(f"cannot open {TUN}: {e.strerror}", "load the tun module") from e
    try:
        flags = lib.IFF_TAP | lib.IFF_NO_PI | lib.IFF_VNET_HDR
        flags |= lib.IFF_MULTI_QUEUE if multi else 0
        ioctl(fd, lib.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return [], [fd]


class Interface:
    """A network interface by name, in the calling thread's network namespace.

    Remembers each change; ``restore`` undoes them. A request that changes nothing needs no
    permission.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._undo: list[tuple[int, bytes]] = []
        self._settings: set[tuple[int, bytes]] = set()

    def _ioctl(self, request: int, data: bytes = b"") -> bytes:
        """Make the request with ``data`` as the union of ``struct ifreq``; returns the union."""
        (out,), _ = helper.do("interface", self.name, str(request), data.hex())
        return bytes.fromhex(out)

    def _change(self, put: int, old: bytes, new: bytes, what: str, command: str) -> None:
        if old[: len(new)] == new:
            return
        try:
            self._ioctl(put, new)
        except PermissionError as e:
            raise NetForbidden(
                f"may not set the {what} of {self.name}", f"as root: {command}"
            ) from e
        except OSError as e:
            raise NetError(f"cannot set the {what} of {self.name}: {e.strerror}") from e
        self._undo.append((put, old))
        self._settings |= {(put, old), (put, new)}

    def permit(self) -> None:
        """Allow the changes up to now again when this process is confined: to undo them, and for a
        card that takes the place of another one.
        """
        for put, data in self._settings:
            helper.permit("setting", f"{self.name} {put} {data.hex()}")

    def exists(self) -> bool:
        """Whether there is an interface of that name."""
        try:
            return self.index > 0
        except OSError:
            return False

    def up(self) -> None:
        """Bring the interface up."""
        old = self._ioctl(lib.SIOCGIFFLAGS)
        new = struct.pack("=H", struct.unpack_from("=H", old)[0] | lib.IFF_UP)
        self._change(lib.SIOCSIFFLAGS, old, new, "state", f"ip link set {self.name} up")

    def hardware_address(self) -> bytes:
        """The MAC address. :raises OSError: there is no such interface."""
        return self._ioctl(lib.SIOCGIFHWADDR)[2:8]

    @property
    def index(self) -> int:
        """The interface's number in the network namespace."""
        return int(struct.unpack_from("=i", self._ioctl(lib.SIOCGIFINDEX))[0])

    @property
    def mtu(self) -> int:
        """The MTU: the largest payload of a frame, in bytes."""
        return int(struct.unpack_from("=i", self._ioctl(lib.SIOCGIFMTU))[0])

    def set_mtu(self, mtu: int) -> None:
        """Change the MTU, in bytes: ETH_MIN_MTU to TAP_MAX_MTU."""
        old, command = self._ioctl(lib.SIOCGIFMTU), f"ip link set {self.name} mtu {mtu}"
        self._change(lib.SIOCSIFMTU, old, struct.pack("=i", mtu), f"MTU ({mtu})", command)

    def set_txqueuelen(self, frames: int) -> None:
        """Change how many frames may wait to be read."""
        old, command = (
            self._ioctl(lib.SIOCGIFTXQLEN),
            f"ip link set {self.name} txqueuelen {frames}",
        )
        self._change(lib.SIOCSIFTXQLEN, old, struct.pack("=i", frames), "queue length", command)

    def set_address(self, text: str) -> None:
        """Give the interface an address with prefix length. An IPv6 address is usable at once,
        because duplicate address detection is off.
        """
        family, packed, prefix = parse_address(text)
        command = f"ip addr add {text} dev {self.name}"
        if family == AF_INET:
            mask = (0xFFFFFFFF << 32 - prefix & 0xFFFFFFFF).to_bytes(4, "big")
            head = struct.pack("=HH", AF_INET, 0)
            try:
                old = [self._ioctl(get) for get in (lib.SIOCGIFADDR, lib.SIOCGIFNETMASK)]
            except OSError:  # EADDRNOTAVAIL: it has no address, and 0.0.0.0 takes ours away again
                old = [head.ljust(24, b"\0")] * 2
            if old[0][4:8] == packed and old[1][4:8] == mask:
                return
            self._change(lib.SIOCSIFADDR, b"", head + packed, f"address ({text})", command)
            self._change(lib.SIOCSIFNETMASK, b"", head + mask, f"netmask ({text})", command)
            self._undo[-2:] = [(lib.SIOCSIFADDR, old[0]), (lib.SIOCSIFNETMASK, old[1])]
            self._settings |= set(self._undo[-2:])
            return
        if helper.sealed():
            raise UsageError(
                f"{text}: a confined machine gives a tap no IPv6 address",
                f"as root: {command}; or start with --sandbox off",
            )
        try:
            with open(f"/proc/sys/net/ipv6/conf/{self.name}/accept_dad", "w") as f:
                f.write("0")
        except OSError:
            pass  # then the address becomes usable after a second
        s = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0)
        try:
            ioctl(s.fileno(), lib.SIOCSIFADDR, struct.pack("=16sIi", packed, prefix, self.index))
        except FileExistsError:
            pass
        except PermissionError as e:
            raise NetForbidden(
                f"may not set an address of {self.name}", f"as root: {command}"
            ) from e
        except OSError as e:
            raise NetError(f"cannot give {self.name} the address {text}: {e.strerror}") from e
        finally:
            s.close()

    def port(self, request: int, index: int) -> None:
        """Give this bridge a port, or take one away (SIOCBRADDIF, SIOCBRDELIF).

        :raises OSError: from ioctl(2).
        """
        self._ioctl(request, struct.pack("=i", index))

    def restore(self) -> None:
        """Undo the changes if the interface still exists. IPv6 addresses stay."""
        undo, self._undo = self._undo, []
        for put, old in undo:
            with suppress(OSError, UsageError):  # UsageError: the sandbox does not know the value
                self._ioctl(put, old)


#: A struct tun_filter without addresses: every frame passes.
NO_FILTER = bytes(4)


def settle(fd: Fd) -> None:
    """Have a tap use headers of 12 bytes and no offloads. :raises OSError: it refuses."""
    ioctl(fd.fileno(), lib.TUNSETVNETHDRSZ, struct.pack("=i", VIRTIO_NET_HDR_V1_SIZE))
    ioctl(fd.fileno(), lib.TUNSETSNDBUF, struct.pack("=i", INT_MAX))
    ioctl(fd.fileno(), lib.TUNSETOFFLOAD, 0)


def duplicate(number: int) -> Fd:
    """A descriptor of our own for what the descriptor ``number`` is.

    :raises NetError: it is not open, or it leads to pyvmm's helper.
    """
    if helper.is_channel(number):
        raise NetError(f"fd={number} is a descriptor of pyvmm's own", "name one of yours")
    try:
        return Fd(fcntl(number, F_DUPFD_CLOEXEC, 0))
    except OSError as e:
        raise NetError(
            f"fd={number} is not open", "open it in the program that starts pyvmm, inheritable"
        ) from e


def _tap_behind(fd: Fd, number: int, *, multi: bool) -> tuple[str, bytes]:
    """Name and MAC address of the tap that a descriptor is a queue of.

    :param number: what the user calls the descriptor. :raises NetError: it is no usable tap.
    """
    try:
        answer = ioctl(fd.fileno(), lib.TUNGETIFF, bytes(40))
        address = ioctl(fd.fileno(), lib.SIOCGIFHWADDR, bytes(40))[18:24]
    except OSError as e:
        what = "a tap whose interface is gone" if e.errno == errno.EBADFD else _kind(fd)
        raise NetError(
            f"fd={number} is {what}", "open /dev/net/tun with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
        ) from e
    name = answer[:IFNAMSIZ].partition(b"\0")[0].decode(errors="replace")
    # IFF_NO_PI is not there to be asked for: its bit here says that there is no filter.
    flags = struct.unpack_from("=H", answer, IFNAMSIZ)[0]
    for good, what in (
        (flags & lib.IFF_TAP, "is a tun and no tap: it has no Ethernet frames"),
        (flags & lib.IFF_VNET_HDR, "has no virtio-net headers (no IFF_VNET_HDR)"),
        (flags & lib.IFF_MULTI_QUEUE or not multi, "has one queue (no IFF_MULTI_QUEUE)"),
    ):
        if not good:
            raise NetError(
                f"fd={number}, {name}, {what}",
                "open it with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and, for several queue pairs, "
                "IFF_MULTI_QUEUE",
            )
    return name, address


def _kind(fd: Fd) -> str:
    """What a descriptor that is no tap is, in words."""
    mode = os.fstat(fd.fileno()).st_mode
    if stat.S_ISSOCK(mode):
        with socket(fileno=os.dup(fd.fileno())) as s:
            kind = {SOCK_STREAM: "stream", SOCK_DGRAM: "datagram", SOCK_SEQPACKET: "seqpacket"}
            return f"a {kind.get(s.type, 'strange')} socket and no tap"
    return "a pipe and no tap" if stat.S_ISFIFO(mode) else "no tap"


class _Wanted:
    """The settings that a tap was given, for a tap that replaces it."""

    __slots__ = ("carrier", "filter", "frames", "header", "offloads", "queues", "steering")

    def __init__(self, queues: int) -> None:
        self.queues = queues
        self.header = VIRTIO_NET_HDR_V1_SIZE
        self.offloads = 0
        self.steering: Steering | None = None
        self.filter = NO_FILTER
        self.frames = b""  # a program of ``framefilter``
        self.carrier = True


class Tap:
    """A tap interface with virtio-net headers, of 12 bytes at first; owns its descriptors.

    If the interface does not exist, it is made, and it vanishes with the last descriptor, even
    after SIGKILL. An interface that the user made stays, and ``close`` undoes our changes of it.

    :param name: of the interface; :param queues: descriptors, one per queue pair
        (IFF_MULTI_QUEUE if there are several).
    :param address, address6: of the host's end, with prefix length. :param mtu: bytes; the default
        leaves the MTU as it is.
    :param txqueuelen: frames that may wait, of a tap that this object makes; None leaves the
        kernel's choice.
    :param adopted: see ``adopt``.
    :ivar created: whether this object made the interface.
    :ivar mirrored: whether the interface sends what the guest sends, as a macvtap does; a tap
        receives it.
    :raises NetError: the tap is busy or not a tap, or the kernel has no tun driver.
    :raises NetForbidden: the tap belongs to another user, or this user may not make one.
    """

    headers: tuple[int, ...] = HEADERS
    mirrored = False

    def __init__(
        self,
        name: str,
        *,
        queues: int = 1,
        address: str | None = None,
        address6: str | None = None,
        mtu: int | None = None,
        txqueuelen: int | None = TXQUEUELEN,
        adopted: Adopted | None = None,
    ) -> None:
        if (
            not 0 < len(name) < IFNAMSIZ
            or name in (".", "..")
            or any(c in "/:%" or c <= " " for c in name)
        ):
            raise UsageError(f"{name!r} is no name for a tap", "use 1 to 15 letters and digits")
        if mtu is not None and not ETH_MIN_MTU <= mtu <= TAP_MAX_MTU:
            raise UsageError(f"an MTU of {mtu}", f"use {ETH_MIN_MTU} to {TAP_MAX_MTU}")
        self.name = name
        self.fds: list[Fd] = []
        self._lock = threading.RLock()  # what the card's thread does, against ``reopen``
        self._wanted = _Wanted(queues)
        self._program: object = None  # of the frame filter in force, as cdata
        self._link: Link | None = None
        self._adopted = adopted is not None
        self._elsewhere = False
        self._bridge = ""
        self._features: int | None = None
        self._steers = False
        self._interface = Interface(name)
        if adopted is not None:
            self.fds, self.mtu, self._link = adopted
            self._elsewhere = self._link is None
            self.created = True
            return
        self.created = not self._interface.exists()
        try:
            for _i in range(queues):
                self.fds.append(self._open(queues > 1))
            if mtu is not None:
                self._interface.set_mtu(mtu)
            if self.created and txqueuelen is not None:
                self._interface.set_txqueuelen(txqueuelen)
            for one in (address, address6):
                if one is not None:
                    self._interface.set_address(one)
            self._interface.up()
            self.mtu = self._interface.mtu
        except BaseException:
            self.close()
            raise

    @classmethod
    def adopt(cls, name: str, fds: list[Fd], mtu: int, link: Link) -> Tap:
        """Make the object of a tap that was opened elsewhere, in another namespace. It owns the
        descriptors and the link from here on.
        """
        return cls(name, queues=len(fds), adopted=(fds, mtu, link))

    @classmethod
    def inherited(cls, numbers: Sequence[int], *, mtu: int | None = None) -> Tap:
        """Make the object of a tap that whoever has started this process has opened, with the state
        and the addresses that it has.

        :param numbers: of its descriptors, one per queue pair, which stay as they are. Whoever else
            has them shares what is programmed there.
        :param mtu: in bytes, if the tap is in a namespace of which nothing is known: 1500.
        :raises NetError: one is no tap that can be used.
        """
        fds: list[Fd] = []
        try:
            for number in numbers:
                fds.append(duplicate(number))
            name, address = _tap_behind(fds[0], numbers[0], multi=len(fds) > 1)
            for fd, number in zip(fds[1:], numbers[1:], strict=True):
                if _tap_behind(fd, number, multi=True) != (name, address):
                    raise NetError(f"fd={number} is not of tap {name}", "give queues of one tap")
            for fd in fds:
                os.set_blocking(fd.fileno(), False)
                settle(fd)
            interface = Interface(name)
            link: Link | None = None
            try:
                if interface.hardware_address() == address:
                    link = Link(interface.index)
                    mtu = mtu or interface.mtu
            except OSError:
                pass  # its namespace is another one, and so would be an interface of its name
            tap = cls(name, queues=len(fds), adopted=(fds, mtu or ETH_DATA_LEN, link))
        except BaseException:
            for fd in fds:
                fd.close()
            raise
        tap.created = False
        return tap

    def permit(self) -> None:
        """Allow the helper what this tap, of our own network namespace, was given up to now."""
        self._interface.permit()

    def join(self, bridge: str) -> None:
        """Become a port of a bridge, until ``close``; nothing if the tap is one already.

        :raises NetError: this is no bridge, or the tap is a port of another one.
        :raises NetForbidden: this user may not do so.
        """
        try:
            Interface(bridge).port(lib.SIOCBRADDIF, self._interface.index)
        except PermissionError as e:
            raise NetForbidden(
                f"may not put tap {self.name} into the bridge {bridge}",
                f"as root: ip link set {self.name} master {bridge}; then leave out bridge=",
            ) from e
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise NetError(
                    f"cannot put tap {self.name} into {bridge}: "
                    + ("it is no bridge" if e.errno == errno.EOPNOTSUPP else str(e.strerror)),
                    "name a bridge: ip link show type bridge",
                ) from e
            if self.link().master() != Interface(bridge).index:
                raise NetError(
                    f"tap {self.name} is a port of something else already",
                    f"as root: ip link set {self.name} nomaster",
                ) from e
        else:
            self._bridge = bridge

    def _open(self, multi: bool) -> Fd:
        try:
            fd = Fd(helper.do("tap", self.name, "multi" if multi else "")[1][0])
        except OSError as e:
            raise self._explain(e) from e
        try:
            settle(fd)
        except OSError as e:
            fd.close()
            raise self._explain(e) from e
        return fd

    def _explain(self, e: OSError) -> NetError:
        name = self.name
        if e.errno == errno.EBUSY:
            return NetError(
                f"tap {name} is in use", "stop the program that has it open, or name another tap"
            )
        if e.errno in (errno.EPERM, errno.EACCES):
            made = f"ip tuntap add dev {name} mode tap user $USER && ip link set {name} up"
            if self.created:
                return NetForbidden(
                    f"there is no tap {name} and you may not make it", f"as root: {made}"
                )
            return NetForbidden(
                f"tap {name} is not yours", f"as root: ip link del {name} && {made}"
            )
        if e.errno == errno.EINVAL and not self.created:
            return NetError(f"{name} exists but is no tap of this kind", "name a single-queue tap")
        return NetError(f"cannot open tap {name}: {e.strerror}")

    def accept_mtu(self, mtu: int) -> bool:
        """Whether frames of this MTU, in bytes, pass."""
        return mtu <= self.mtu

    @property
    def interface(self) -> Tap | None:
        """The tap itself, because a tap can be deleted and made again; None if it is in another
        network namespace.
        """
        return None if self._elsewhere else self

    def fileno(self) -> int:
        """The descriptor of the first queue pair."""
        return self.fds[0].fileno()

    def features(self) -> int:
        """The virtio-net offload features that the tap can honour, as a mask."""
        if self._features is None:
            mask = sum(1 << bit for bit in HOST_FEATURES)
            flags = 0
            # One feature more each time: a kernel refuses a set with one unknown member.
            for flag in sorted({USO if flag & USO else flag for flag in OFFLOADS.values()}):
                try:
                    ioctl(self.fileno(), lib.TUNSETOFFLOAD, flags | flag)
                except OSError:
                    continue
                flags |= flag
            ioctl(self.fileno(), lib.TUNSETOFFLOAD, 0)
            mask |= sum(1 << bit for bit, flag in OFFLOADS.items() if flags & flag)
            if flags & USO:
                mask |= 1 << VIRTIO_NET_F_HOST_USO
            if flags & TUNNEL:
                mask |= 1 << VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO
                mask |= 1 << VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM
            self._features = mask
        return self._features | (1 << VIRTIO_NET_F_RSS if self._steers else 0)

    def offer_steering(self) -> None:
        """Have ``features`` name VIRTIO_NET_F_RSS from now on if the tap can be programmed so: a
        trial takes a millisecond. A tap of the user's is left alone, because the kernel lets the
        program outlive the process that has set the program.
        """
        self._steers = self.created and may_steer()

    def _set(self, request: int, arg: int | bytes, what: str, fd: Fd | None = None) -> None:
        try:
            ioctl((fd or self.fds[0]).fileno(), request, arg)
        except OSError as e:
            if self._deleted():
                return  # when the interface returns, it gets all these settings
            raise HostError(f"tap {self.name} refuses {what}: {e.strerror}") from e

    def _deleted(self) -> bool:
        """Whether the interface behind the descriptors has been deleted. Settings then fail with
        EBADFD, those of queues with EINVAL, and those of a macvtap with ENOLINK.
        """
        try:
            ioctl(self.fds[0].fileno(), lib.TUNGETIFF, bytes(40))
        except OSError:
            return True
        return False

    def set_header(self, size: int) -> None:
        """Have the host put a header of so many bytes before each frame, and expect one of us.

        :raises HostError: the tap refuses.
        """
        with self._lock:
            if size != self._wanted.header:
                self._wanted.header = size
                self._set(lib.TUNSETVNETHDRSZ, struct.pack("=i", size), f"headers of {size} bytes")

    def set_steering(self, steering: Steering | None) -> None:
        """Have the host choose the queue of each frame this way; None: as it likes.

        :raises HostError: the kernel or the tap refuses.
        """
        with self._lock:
            if steering is None is self._wanted.steering:
                return
            program = load_steering(steering) if steering is not None else None
            try:
                number = program.fileno() if program is not None else -1
                self._set(lib.TUNSETSTEERINGEBPF, struct.pack("=i", number), "steering")
            finally:
                if program is not None:
                    program.close()  # the tap keeps what it needs
            self._wanted.steering = steering

    def set_offloads(self, acked: int) -> None:
        """Let the host send what the GUEST_* bits of ``acked`` allow. Any thread, at any time.

        :raises HostError: the tap refuses.
        """
        flags = sum(flag for bit, flag in OFFLOADS.items() if acked >> bit & 1)
        # Complete what each feature requires (virtio 1.2, 5.1.3.1), so that no driver can make the
        # tap refuse.
        if not flags & lib.TUN_F_CSUM:
            flags = 0
        if not flags & (lib.TUN_F_TSO4 | lib.TUN_F_TSO6):
            flags &= ~lib.TUN_F_TSO_ECN
        if flags & USO != USO:
            flags &= ~USO
        plain = lib.TUN_F_TSO4 | lib.TUN_F_TSO6 | USO
        if not (flags & plain and flags & lib.TUN_F_UDP_TUNNEL_GSO):
            flags &= ~TUNNEL
        with self._lock:
            self._wanted.offloads = flags
            self._set(lib.TUNSETOFFLOAD, flags, f"offloads {flags:#x}")

    def set_queues(self, count: int) -> None:
        """Have the host spread its frames over the first ``count`` queues only.

        :raises HostError: the tap refuses.
        """
        with self._lock:
            program = self._wanted.frames if count > self._wanted.queues else b""
            if program:
                # Else the kernel gives the filter to a queue that comes back, and forgets the queue
                # (tun_attach).
                self._filter_frames(b"")
            for i, fd in enumerate(self.fds):
                if (i < count) != (i < self._wanted.queues):
                    flag = lib.IFF_ATTACH_QUEUE if i < count else lib.IFF_DETACH_QUEUE
                    self._set(lib.TUNSETQUEUE, struct.pack("16xH22x", flag), f"{count} queues", fd)
            self._wanted.queues = count
            if program:
                self._filter_frames(program)

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Have the host drop frames that the guest does not want: by destination (TUNSETTXFILTER);
        and by VLAN and kind if the tap is ours. The kernel lets a program for frames outlive the
        process that has set it, so that a tap of the user's would be spoilt by SIGKILL.

        :raises HostError: the tap refuses.
        """
        with self._lock:
            if self.created:
                self._filter_frames(frame_filter(rx))
            addresses = rx.addresses() or []
            flags = lib.TUN_FLT_ALLMULTI if rx.all_multicast and addresses else 0
            self._wanted.filter = struct.pack("=HH", flags, len(addresses)) + b"".join(addresses)
            self._set(lib.TUNSETTXFILTER, self._wanted.filter, "a filter")

    def _filter_frames(self, program: bytes) -> None:
        """Attach the program to all queues in use, in place of the one before; none if empty."""
        old, self._wanted.frames = self._wanted.frames, program
        if program:
            # The kernel looks at the program again when a queue is opened: keep it where it is.
            self._program = ffi.new("uint8_t[]", program)
            place = int(ffi.cast("uintptr_t", self._program))
            arg = struct.pack("=H6xQ", len(program) // 8, place)
            self._set(lib.TUNATTACHFILTER, arg, "a filter of frames")
        elif old:
            self._set(lib.TUNDETACHFILTER, bytes(16), "no filter of frames")

    def set_carrier(self, up: bool) -> None:
        """Show the host a link that is up or down.

        :raises HostError: the tap refuses (TUNSETCARRIER came with Linux 5.0).
        """
        with self._lock:
            self._wanted.carrier = up
            self._set(lib.TUNSETCARRIER, struct.pack("=i", up), "a carrier")

    def _restore(self) -> None:
        """Give a tap that was opened again the settings of the old one."""
        wanted, self._wanted = self._wanted, _Wanted(len(self.fds))
        self.set_header(wanted.header)
        self._set(lib.TUNSETOFFLOAD, wanted.offloads, "offloads")
        self.set_steering(wanted.steering)
        if wanted.filter != NO_FILTER:
            self._set(lib.TUNSETTXFILTER, wanted.filter, "a filter")
        if not wanted.carrier:
            self.set_carrier(False)
        if wanted.frames:
            self._filter_frames(wanted.frames)
        self.set_queues(wanted.queues)
        self._wanted = wanted

    def link(self) -> Link:
        """The interface's counters and events. ``reopen`` replaces this object. The tap owns it.

        :raises NetError: the interface was deleted before the first call.
        """
        if self._elsewhere:
            raise NetError(
                f"tap {self.name} is in another network namespace",
                "use --net emulated, or start pyvmm in that namespace",
            )
        if self._link is None:
            try:
                self._link = Link(self._interface.index)
            except OSError as e:
                raise NetError(f"tap {self.name} is gone: {e.strerror}", "make it again") from e
        return self._link

    def reopen(self) -> bool:
        """Open the interface again if it was deleted and the user has made it again. The new
        interface keeps its own address, MTU and queue length.

        :returns: whether it was opened.
        :raises NetError: the interface exists but cannot be opened.
        """
        if self._adopted or not self._interface.exists():
            return False
        self.created = False
        fds: list[Fd] = []
        try:
            for _old in self.fds:
                fds.append(self._open(len(self.fds) > 1))
        except NetError:
            for fd in fds:
                fd.close()
            raise
        # The old interface may have been about to vanish when we looked; then TUNSETIFF has made
        # one that belongs to nobody. Or the new one has been deleted again.
        interface, link = Interface(self.name), None
        try:
            request = ioctl(fds[0].fileno(), lib.TUNGETIFF, bytes(40))
            if struct.unpack_from("=H", request, 16)[0] & lib.IFF_PERSIST:
                link = Link(interface.index)
        except OSError:
            pass
        if link is None:
            for fd in fds:
                fd.close()
            return False
        with self._lock:
            old, self.fds = self.fds, fds
            for fd in old:
                fd.close()
            self._interface = interface
            old_link, self._link = self._link, link
            if old_link is not None:
                old_link.close()
            self._restore()
        return True

    def announce(self, mac: bytes) -> bool:
        """Send the frame that tells the network that ``mac`` is here; whether it was sent."""
        from pyvmm.hostnet.frames import rarp

        with self._lock:  # ``reopen`` closes the descriptor
            try:
                os.write(self.fileno(), bytes(self._wanted.header) + rarp(mac))
            except OSError:
                return False
        return True

    def waiting(self) -> bool:
        """Whether a frame waits in one of the queues."""
        with self._lock:
            poll = select.poll()
            for fd in self.fds:
                poll.register(fd.fileno(), select.POLLIN)
            return any(events & select.POLLIN for _, events in poll.poll(0))

    def discard(self) -> int:
        """Throw away the frames that wait, ``DISCARD_MAX`` at most.

        :returns: how many frames were thrown away.
        """
        count = 0
        with self._lock:
            for fd in self.fds:
                try:
                    while count < DISCARD_MAX:
                        # More than the header; the rest of the frame is lost with it.
                        os.read(fd.fileno(), 64)
                        count += 1
                except OSError:
                    continue  # no more frames wait, or the interface is gone
        return count

    def _unfilter(self) -> None:
        try:
            if self._wanted.filter != NO_FILTER:
                self._set(lib.TUNSETTXFILTER, NO_FILTER, "no filter")
            if not self._wanted.carrier:
                self.set_carrier(True)
        except HostError:
            pass

    def close(self) -> None:
        """Undo our changes of a tap that stays, and release the descriptors. A second call does
        nothing.
        """
        if not self.created and self.fds:
            self._unfilter()
            if self._bridge:
                with suppress(OSError):  # it has gone, or somebody has taken the tap out
                    Interface(self._bridge).port(lib.SIOCBRDELIF, self._interface.index)
            self._interface.restore()
        if self._link is not None:
            self._link.close()
        fds, self.fds = self.fds, []
        for fd in fds:
            fd.close()
