"""A network namespace of pyvmm's own, with a tap in it: for a network card without ``tap=``.

Neither the namespace nor the tap has a name in the host or outlives its descriptors, so even
SIGKILL leaves nothing behind. The calling thread's namespaces never change: as root, a short-lived
thread enters the new namespaces; as another user, a short-lived child does, because a process with
threads cannot enter a user namespace.
"""

from __future__ import annotations

import errno
import os
import socket
import threading

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import NetError, NetForbidden
from pyvmm.fd import Closing, Fd
from pyvmm.hostnet import macvtap, userns
from pyvmm.hostnet.rtnetlink import (
    Link,
    forward_from,
    route_default,
    route_socket,
    set_queue_length,
)
from pyvmm.hostnet.tap import TXQUEUELEN, Interface, Tap, index_of
from pyvmm.programs import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from typing import Any

    #: A function that runs inside: returns a few words, and descriptors that the caller owns.
    Inside = Callable[[], tuple[list[str], list[int]]]

#: The name of the tap by which packets leave a namespace with a way out.
WAY_OUT = "internet"


def _in_thread(body: Inside) -> tuple[list[str], list[int]]:
    """Run ``body`` in a thread of its own, which may change its namespaces."""
    result: list[tuple[list[str], list[int]] | BaseException] = []

    def run() -> None:
        try:
            result.append(body())
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _in_child(body: Inside) -> tuple[list[str], list[int]]:
    """As ``helper.in_child``."""
    return helper.in_child(body, "the child that makes a network namespace")


#: The numbers of the network namespaces that this process has made.
_made: set[int] = set()


def ours(net: int) -> bool:
    """Whether this process has made the network namespace of a descriptor."""
    return os.fstat(net).st_ino in _made


def enter_and(body: Inside, net: int, user: int | None = None) -> tuple[list[str], list[int]]:
    """Run ``body`` in a network namespace, in a thread or a child.

    :param net, user: descriptors of the namespace and of its user namespace, lent.
    :raises OSError: from setns(2), or ``body`` raised this error.
    """

    def inside() -> tuple[list[str], list[int]]:
        if user is not None:
            userns.check(lib.setns(user, lib.CLONE_NEWUSER), "setns")
        userns.check(lib.setns(net, lib.CLONE_NEWNET), "setns")
        return body()

    return (_in_thread if user is None else _in_child)(inside)


def why_no_user_namespace() -> str:
    """Why this user may not be root in a user namespace; empty if the user may. A child tries."""

    def be_root() -> tuple[list[str], list[int]]:
        userns.become_root()
        return [], []

    try:
        _in_child(be_root)
    except OSError as e:
        return e.strerror or str(e)
    return ""


def make_inside(words: list[str]) -> tuple[list[str], list[int]]:
    """Make a network namespace with a tap; an operation of ``helper``.

    :param words: name, queues and queue length of the tap; its addresses and its MTU; the address
        and the gateway of a way out. All but the first three may be empty.
    :returns: ``root`` if the namespace has no user namespace of its own, the tap's MTU and index;
        descriptors of the namespace, of its user namespace if there is one, of two rtnetlink
        sockets, of the tap, of the way out if there is one.
    :raises NetForbidden: see ``Namespace``.
    :raises NetError: the tap cannot have a queue of this length.
    """
    name, queues, txqueuelen, address, address6, mtu, own, gateway = words

    def make() -> tuple[list[str], list[int]]:
        if not root:
            userns.become_root()
        userns.unshare(lib.CLONE_NEWNET)
        Interface("lo").up()
        tap = Tap(
            name,
            queues=int(queues),
            address=address or None,
            address6=address6 or None,
            mtu=int(mtu) if mtu else None,
            txqueuelen=None,
        )
        fds = [os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)]
        if not root:
            fds.append(os.open("/proc/thread-self/ns/user", os.O_RDONLY | os.O_CLOEXEC))
        sockets = [route_socket(), route_socket(lib.RTMGRP_LINK)]
        index = Interface(name).index
        try:
            set_queue_length(sockets[0], index, int(txqueuelen))
        except OSError as e:
            if e.errno == errno.EPERM:
                raise  # as of any other step
            raise NetError(f"{name}: no queue of {txqueuelen} packets: {e.strerror}") from e
        out = _make_way_out(sockets[0], tap, own, gateway) if own else []
        said = ["root" if root else "user", str(tap.mtu), str(index)]
        return said, fds + [fd.fileno() for fd in (*sockets, *tap.fds, *out)]

    for root in (True, False) if os.geteuid() == 0 else (False,):
        try:
            said, made = (_in_thread if root else _in_child)(make)
            _made.add(os.fstat(made[0]).st_ino)
            return said, made
        except OSError as e:
            if root:
                continue  # root without CAP_SYS_ADMIN: try it as an ordinary user
            raise NetForbidden(
                f"may not make a network namespace ({e.strerror})",
                f"run as root, allow user namespaces ({userns.remedy()}), or give tap=NAME, or do "
                "without: --net user",
            ) from e
    raise AssertionError


def _make_way_out(sock: Fd, tap: Tap, own: str, gateway: str) -> list[Fd]:
    """Have packets from ``tap`` leave the namespace by another tap, whose one descriptor is
    returned.

    :param sock: an rtnetlink socket of the namespace. :param own: the other tap's address, with
        prefix length. :param gateway: the default route.
    """
    out = Tap(WAY_OUT, address=own, mtu=tap.mtu)
    index = Interface(WAY_OUT).index
    for one in (Interface(tap.name).index, index):
        forward_from(sock, one)
    route_default(sock, index, gateway)
    return out.fds


def make_macvtap(words: list[str]) -> tuple[list[str], list[int]]:
    """Make a network namespace with a macvtap on an interface of ours; an operation of ``helper``.

    :param words: the interface; name, queues, queue length, MAC address in hexadecimal and MTU of
        the macvtap. The last two may be empty.
    :returns: as ``make_inside``. :raises NetError: it cannot be made. :raises NetForbidden: this
        user may not make it.
    """
    lower, name, queues, txqueuelen, mac, mtu = words

    def make() -> tuple[list[str], list[int]]:
        fds: list[Fd] = []
        try:
            fds.append(route_socket())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                below = index_of(lower, s)
            userns.unshare(lib.CLONE_NEWNET)
            fds.append(Fd(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)))
            index = macvtap.make(
                fds[0],
                below,
                name,
                fds[1].fileno(),
                mac=bytes.fromhex(mac) or None,
                mtu=int(mtu) if mtu else None,
                txqueuelen=int(txqueuelen),
            )
            fds.pop(0).close()
            Interface("lo").up()
            fds += [route_socket(), route_socket(lib.RTMGRP_LINK)]
            for _ in range(int(queues)):
                fds.append(macvtap.open_queue(name, index, multi=int(queues) > 1))
            said = ["root", str(Interface(name).mtu), str(index)]
        except BaseException:
            for fd in fds:
                fd.close()
            raise
        return said, [fd.fileno() for fd in fds]

    try:
        return _in_thread(make)
    except OSError as e:
        raise macvtap.explain(lower, e) from e


class Namespace(Closing):
    """A network namespace with one tap. Both belong to this object alone.

    It works as root, and as an ordinary user if the kernel allows user namespaces; with ``lower``
    as root only.

    :param address, address6: of the host's end of the tap, with prefix length. :param mtu: of the
        tap, in bytes.
    :param queues, txqueuelen: of the tap. :param name: of the tap inside the namespace.
    :param lower: makes the tap a macvtap on this interface, which is in our own namespace.
    :param mac: the macvtap's address.
    :param way_out: the address, with prefix length, of a second tap, to which the namespace is a
        router, and of its gateway. Not with ``lower``.
    :ivar way_out: the descriptor of the second tap, or None. The tap goes with its last descriptor.
    :ivar tap: the tap. It belongs to the namespace until somebody closes it; a second ``close``
        of it does no harm.
    :raises NetForbidden: this user is not root and may not make user namespaces.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        address6: str | None = None,
        mtu: int | None = None,
        queues: int = 1,
        name: str = "tap0",
        txqueuelen: int = TXQUEUELEN,
        lower: str = "",
        mac: bytes = b"",
        way_out: tuple[str, str] | None = None,
    ) -> None:
        if lower:
            about = (lower, name, queues, txqueuelen, mac.hex(), mtu or "")
            words, raw = helper.do("macvtap", *map(str, about))
        else:
            asked = (name, queues, txqueuelen, address or "", address6 or "", mtu or "")
            words, raw = helper.do("namespace", *map(str, asked), *(way_out or ("", "")))
        root = words[0] == "root"
        fds = [Fd(fd) for fd in raw]
        self.net = fds.pop(0)
        self.user = None if root else fds.pop(0)
        self.way_out = fds.pop() if way_out else None
        link = Link(int(words[2]), fds.pop(0), fds.pop(0), mirrored=bool(lower))
        kind = macvtap.Macvtap if lower else Tap
        self.tap = kind.adopt(name, fds, int(words[1]), link)
        number = str(os.fstat(self.net.fileno()).st_ino)
        helper.permit("packets", number)
        helper.permit("place", number)  # for tools

    def command(self, argv: Sequence[str] = ()) -> list[str]:
        """A command that runs ``argv`` inside. It works from any process of this user, for as long
        as this process lives.
        """
        me = f"/proc/{os.getpid()}/fd"
        user = [f"--user={me}/{self.user.fileno()}", "--preserve-credentials"] if self.user else []
        return [program("nsenter"), *user, f"--net={me}/{self.net.fileno()}", *argv]

    def popen(self, argv: Sequence[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` of a command that runs inside."""
        import subprocess

        return subprocess.Popen(self.command(argv), **kwargs)

    def run(self, argv: Sequence[str], **kwargs: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` of a command that runs inside."""
        import subprocess

        return subprocess.run(self.command(argv), **kwargs)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Make a socket inside; the calling process uses it from outside.

        :raises OSError: from socket(2).
        """

        def make() -> tuple[list[str], list[int]]:
            return [], [socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol).detach()]

        user = self.user.fileno() if self.user else None
        _words, fds = enter_and(make, self.net.fileno(), user)
        return socket.socket(family, kind, protocol, fileno=fds[0])

    def close(self) -> None:
        """Release the namespace. It vanishes when no other process is in it. A second call does
        nothing.
        """
        self.tap.close()
        if self.way_out is not None:
            self.way_out.close()
        self.net.close()
        if self.user:
            self.user.close()
