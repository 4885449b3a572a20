"""A card's way out without privileges: libslirp in a child process, for ``--net user`` and
``internet=on``.

libslirp reads what the guest sends, so it has a process of its own. The card's worker and the child
share a pair of sockets that keep packet boundaries; the child's loop is ``cext/slirp.c``. The
child's first message says whether the stack is there. The child ends when the card's end of the
pair closes, also if this process is killed.

In the guest's network, the gateway (``host``) stands for the host itself, the address after it is a
name server that asks the host's, and DHCP gives away the guest's address.

A card with a tap of its own has its way out behind the tap (``WayOut``): the namespace is a router
between the tap and another one, whose frames the child has.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from fcntl import ioctl
from ipaddress import IPv4Interface

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.errors import NetError
from pyvmm.fd import Fd
from pyvmm.hostnet.frames import announcement
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pyvmm.helper import Child

#: Seconds for the child to start, and to end when its card has gone.
START_S, END_S = 30.0, 2.0
#: The child's first message if all is well; else the message is an error and its remedy, a line
#: each.
READY = b"\0"
LINE_MAX = 1024
#: Bytes that may wait in each direction.
BUFFER = 1 << 20
#: Connections that a guest may have at once.
SOCKETS_MAX = 4096
INSTALL = "as root: apt-get install libslirp0"
#: Behind a card's tap: the addresses of the gateway and of the namespace, as a guest of
#: ``--net user`` has them.
ROUTED = ("10.0.2.2/24", "10.0.2.15/24")


class Forward:
    """A port of the host that leads to one of the guest: ``[tcp:|udp:][ADDR:]PORT-[ADDR:]PORT``.

    :ivar udp: else TCP. :ivar host: the address to listen at, the host's loopback by default.
    :ivar guest: the address to connect to, empty for the guest's own.
    :raises ValueError: the text means nothing.
    """

    __slots__ = ("guest", "guest_port", "host", "host_port", "udp")

    def __init__(self, text: str) -> None:
        kind, colon, rest = text.partition(":")
        if not colon or kind not in ("tcp", "udp"):
            kind, rest = "tcp", text
        here, dash, there = rest.partition("-")
        if not dash:
            raise ValueError(text)
        self.udp = kind == "udp"
        self.host, self.host_port = _place(here)
        self.host = self.host or "127.0.0.1"
        self.guest, self.guest_port = _place(there)

    def __str__(self) -> str:
        kind = "udp" if self.udp else "tcp"
        return f"{kind}:{self.host}:{self.host_port}-{self.guest}:{self.guest_port}"


def _place(text: str) -> tuple[str, int]:
    """``[ADDR:]PORT``: the address, empty if there is none, and the port."""
    address, _, port = text.rpartition(":")
    if address:
        try:
            socket.inet_pton(socket.AF_INET, address)
        except OSError:
            raise ValueError(text) from None
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise ValueError(text)
    return address, int(port)


def name_server(host: str) -> str:
    """The address of the name server in the network of the gateway ``host``, which has a prefix
    length.
    """
    return str(IPv4Interface(host).ip + 1)


def fits(host: str, guest: str) -> bool:
    """Whether gateway, name server and guest are three hosts of one network."""
    gateway, own = IPv4Interface(host), IPv4Interface(guest)
    network, last = gateway.network, gateway.network.broadcast_address
    hosts = {gateway.ip, gateway.ip + 1, own.ip} if gateway.ip < last else set()
    return own.network == network and len(hosts - {network.network_address, last}) == 3


def meets(one: str, other: str) -> bool:
    """Whether the networks of two addresses with prefix lengths have addresses in common."""
    return IPv4Interface(one).network.overlaps(IPv4Interface(other).network)


class UserStack:
    """The child; implements ``Frames`` (datapath.base) with one queue pair.

    :param host, guest: the IPv4 addresses of the gateway and of the guest, with prefix length, of
        one network. :param mtu: bytes.
    :param loopback: whether the gateway's address also stands for the host's 127.0.0.1.
    :param tap: has the frames, and the sockets none; lent. The child has a descriptor of its own.
    :param behind: the address of a guest that is reached by the address ``guest``, which is a
        router's then.
    :ivar fds: the card's end of the sockets. ``need`` comes before their use.
    :raises NetError: the child cannot be started. :raises UsageError: the sandbox has no such one.
    """

    #: No network interface is behind the sockets.
    interface = None

    def __init__(
        self,
        host: str,
        guest: str,
        mtu: int,
        *,
        loopback: bool,
        forwards: Iterable[Forward] = (),
        tap: Fd | None = None,
        behind: str = "",
    ) -> None:
        self.name, self.mtu = "user", mtu
        self.fds: list[Fd] = []
        self._child: Child | None = None
        self._said: bytes | None = None
        self._cut = False
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                with suppress(OSError):  # the more, the longer a guest may send at once
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
                self.fds.append(Fd(ours.detach()))
                given = [theirs.fileno(), *([tap.fileno()] if tap is not None else [])]
                words = [str(given[0]), str(given[-1]) if tap is not None else "-1", host, guest]
                words += [behind, str(mtu), str(int(loopback)), *map(str, forwards)]
                self._child = helper.start_module(helper.USER_NETWORK, words, given, silent=True)
        except OSError as e:
            self.close()
            raise NetError(f"cannot start the user network: {e.strerror}") from e
        except BaseException:
            self.close()
            raise

    def need(self) -> None:
        """Wait until the stack is there; ``cut`` ends the wait.

        :raises NetError: there is no libslirp, or a port of the host cannot be had.
        """
        if self._said == READY:
            return
        fd = self.fds[0].fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            self._said = os.read(fd, LINE_MAX) if poll.poll(START_S * 1000) else b""
        except OSError:
            self._said = b""
        if self._said != READY:
            cause, _, remedy = self._said.decode(errors="replace").partition("\n")
            raise NetError(cause or "the user network does not start", remedy)
        os.set_blocking(fd, False)

    def cut(self) -> None:
        """End the wait of ``need``, and the stack. Any thread."""
        self._cut = True
        with suppress(OSError), socket.socket(fileno=os.dup(self.fds[0].fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def gone(self) -> str:
        """Why nothing comes from the stack any more, in words; empty at our own end."""
        import subprocess

        child = self._child
        if child is None or self._cut:
            return ""
        try:
            status = child.wait(END_S)
        except subprocess.TimeoutExpired:
            return "the user network has closed its socket"
        how = f"was killed ({signal.Signals(-status).name})" if status < 0 else "has ended"
        return f"the user network {how}"

    @property
    def pid(self) -> int | None:
        """The child's process id."""
        return self._child.pid if self._child is not None else None

    def features(self) -> int:
        """0, because sockets have no offloads."""
        return 0

    def announce(self, mac: bytes) -> bool:
        """False, because nobody wants to know where the guest is."""
        return False

    def report(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """End the child and all its connections. A second call does nothing."""
        import subprocess

        for fd in self.fds:
            fd.close()
        child, self._child = self._child, None
        if child is not None:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                helper.kill(child)
                child.wait()


class WayOut(UserStack):
    """The child behind the tap of a card, which has any data path.

    :param tap: the namespace's other tap, lent. :param guest: the guest's address, with prefix
        length. :param mtu, loopback, forwards: as of ``UserStack``.
    :ivar ended: why there is no way out any more, in words; empty while there is one.
    """

    def __init__(
        self, tap: Fd, guest: str, mtu: int, *, loopback: bool, forwards: Iterable[Forward]
    ) -> None:
        behind = guest.partition("/")[0]
        self.ended = ""
        self._watcher: threading.Thread | None = None
        super().__init__(*ROUTED, mtu, loopback=loopback, forwards=forwards, tap=tap, behind=behind)

    def watch(self, ended: Callable[[str], object]) -> None:
        """Wait for the child's end, in a thread. ``need`` comes before.

        :param ended: is told, in the thread, what ``ended`` says then; nothing at our own end.
        """

        def wait() -> None:
            poll = select.poll()
            poll.register(self.fds[0].fileno(), 0)  # POLLHUP
            poll.poll()
            self.ended = self.gone()
            if self.ended:
                ended(self.ended)

        self._watcher = Thread(target=wait, name="internet", daemon=True)
        self._watcher.start()

    def report(self) -> dict[str, object]:
        """For JSON: why there is no way out any more; null while there is one."""
        return {"internet": {"ended": self.ended or None}}

    def close(self) -> None:
        """As ``UserStack.close``."""
        if self._watcher is not None:
            self.cut()
            self._watcher.join()
            self._watcher = None
        super().close()


def serve(
    fd: int,
    tap: int,
    host: str,
    guest: str,
    behind: str,
    mtu: int,
    loopback: bool,
    texts: Sequence[str],
) -> None:
    """The child's main function: move packets until the card's end of ``fd`` closes."""
    import resource

    frames = socket.socket(fileno=fd)
    with suppress(OSError):
        frames.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < SOCKETS_MAX:
        most = SOCKETS_MAX if hard == resource.RLIM_INFINITY else min(hard, SOCKETS_MAX)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

    def number(address: str) -> int:
        return int.from_bytes(socket.inet_aton(address), sys.byteorder)

    gateway, own = IPv4Interface(host), str(IPv4Interface(guest).ip)
    why = ffi.new("char[256]")
    config = ffi.new(
        "struct pv_slirp_config *",
        {
            "fd": fd,
            "tap": tap,
            "network": number(str(gateway.network.network_address)),
            "netmask": number(str(gateway.netmask)),
            "host": number(str(gateway.ip)),
            "nameserver": number(name_server(host)),
            "guest": number(own),
            "mtu": mtu,
            "loopback": loopback,
        },
    )
    stack = lib.pv_slirp_new(config, why, len(why))
    if not stack:
        error = ffi.string(why).decode(errors="replace")
        frames.send(f"the user network: {error}\n{INSTALL}".encode()[:LINE_MAX])
        return
    if behind:
        mac = ioctl(tap, lib.SIOCGIFHWADDR, bytes(40))[18:24]
        told = announcement(mac, socket.inet_aton(behind))
        lib.pv_slirp_input(stack, told, len(told))
        own = behind
    for text in texts:
        forward = Forward(text)
        error = lib.pv_slirp_forward(
            stack,
            ffi.new(
                "struct pv_slirp_forward *",
                {
                    "udp": forward.udp,
                    "host": number(forward.host),
                    "host_port": forward.host_port,
                    "guest": number(forward.guest or own),
                    "guest_port": forward.guest_port,
                },
            ),
        )
        if error:
            frames.send(
                f"the user network cannot listen at {forward.host} port {forward.host_port}:"
                f" {os.strerror(-error)}\nchoose another port for hostfwd=".encode()
            )
            return
    done = lib.pv_confine_network(b"/etc/resolv.conf")
    if done < 0:
        frames.send(f"the user network cannot be confined: {os.strerror(-done)}\n".encode())
        return
    frames.send(READY)
    os._exit(-lib.pv_slirp_serve(stack))  # the interpreter's own end would need other calls


if __name__ == "__main__":
    a = sys.argv
    serve(int(a[1]), int(a[2]), a[3], a[4], a[5], int(a[6]), a[7] == "1", a[8:])
