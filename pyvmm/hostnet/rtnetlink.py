"""What the kernel reports about an interface by rtnetlink: its counters, and its deletion. Also
waits for the return of a deleted tap.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import threading
from socket import AF_INET, AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, inet_aton, socket

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import PyvmmError
from pyvmm.fd import Fd
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


#: struct nlmsghdr, struct ifinfomsg, struct rtattr, struct rtmsg.
HEADER, IFINFO, ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=HH")
ROUTE = struct.Struct("=8BI")
#: struct tcmsg, and a request about qdiscs (linux/rtnetlink.h, linux/pkt_sched.h).
QDISC, RTM_GETQDISC, TC_H_ROOT = struct.Struct("=BxHiIII"), 38, 0xFFFFFFFF
#: struct rtnl_link_stats64 begins with these counters; rx and tx are from the interface's side.
STATS = (
    "rx_packets",
    "tx_packets",
    "rx_bytes",
    "tx_bytes",
    "rx_errors",
    "tx_errors",
    "rx_dropped",
    "tx_dropped",
)
#: Counter -> the same from the other side.
SWAPPED = {name: f"{'t' if name[0] == 'r' else 'r'}{name[1:]}" for name in STATS}
#: Seconds between two looks whether a deleted tap is back.
REOPEN_SECONDS = 0.5


def route_socket(groups: int = 0) -> Fd:
    """An rtnetlink socket of the calling thread's network namespace. ``groups``: RTMGRP_* whose
    messages it receives.
    """
    with socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0) as s:
        s.bind((0, groups))
        return Fd(s.detach())


def route_sockets(words: list[str]) -> tuple[list[str], list[int]]:
    """The two sockets of a ``Link``: for queries, and for events; an operation of ``helper``."""
    query = route_socket()
    try:
        return [], [query.fileno(), route_socket(lib.RTMGRP_LINK).fileno()]
    except BaseException:
        query.close()
        raise


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the payload of each netlink message in ``data``."""
    while len(data) >= HEADER.size:
        length, kind, _flags, _seq, _pid = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            return
        yield kind, data[HEADER.size : length]
        data = data[length + 3 & ~3 :]


def attribute(kind: int, value: bytes) -> bytes:
    """A struct rtattr with its value and padding."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def make_link(sock: Fd, index: int, flags: int, attributes: bytes) -> None:
    """Make an interface (RTM_NEWLINK).

    :param sock: an rtnetlink socket. :param index: the number that the interface gets.
    :param flags: IFF_* to set. :param attributes: IFLA_*, as ``attribute`` makes them.
    :raises OSError: the kernel's answer.
    """
    body = IFINFO.pack(0, 0, index, flags, flags) + attributes
    _request(sock, lib.RTM_NEWLINK, lib.NLM_F_CREATE | lib.NLM_F_EXCL, body)


def forward_from(sock: Fd, index: int) -> None:
    """Have the kernel forward IPv4 packets that come in by an interface: what the sysctl
    ``net.ipv4.conf.NAME.forwarding`` does, which containers often may not write.

    :param sock: an rtnetlink socket. :param index: the interface's number.
    :raises OSError: the kernel's answer.
    """
    on = attribute(lib.IPV4_DEVCONF_FORWARDING, struct.pack("=I", 1))
    family = attribute(AF_INET, attribute(lib.IFLA_INET_CONF, on))
    body = IFINFO.pack(0, 0, index, 0, 0) + attribute(lib.IFLA_AF_SPEC, family)
    _request(sock, lib.RTM_SETLINK, 0, body)


def set_queue_length(sock: Fd, index: int, frames: int) -> None:
    """Change how many frames may wait for an interface. The ioctl for it (SIOCSIFTXQLEN) takes root
    of the host, this root of the namespace.

    :param sock: an rtnetlink socket. :param index: the number of the interface.
    :raises OSError: the kernel's answer.
    """
    wanted = attribute(lib.IFLA_TXQLEN, struct.pack("=I", frames))
    _request(sock, lib.RTM_SETLINK, 0, IFINFO.pack(0, 0, index, 0, 0) + wanted)


def route_default(sock: Fd, index: int, gateway: str) -> None:
    """Make an IPv4 default route.

    :param sock: an rtnetlink socket. :param index: the number of the interface.
    :raises OSError: the kernel's answer.
    """
    body = ROUTE.pack(
        *(AF_INET, 0, 0, 0),
        *(lib.RT_TABLE_MAIN, lib.RTPROT_BOOT, lib.RT_SCOPE_UNIVERSE, lib.RTN_UNICAST, 0),
    )
    body += attribute(lib.RTA_GATEWAY, inet_aton(gateway))
    body += attribute(lib.RTA_OIF, struct.pack("=I", index))
    _request(sock, lib.RTM_NEWROUTE, lib.NLM_F_CREATE, body)


def has_root_qdisc(index: int, major: int) -> bool:
    """Whether the root qdisc of an interface in the calling thread's network namespace has the
    handle ``major:``. Needs no permission.

    :param index: the interface's number. :raises OSError: there is no rtnetlink socket.
    """
    body = QDISC.pack(0, 0, index, major << 16, TC_H_ROOT, 0)
    with route_socket() as sock:
        try:
            _request(sock, RTM_GETQDISC, 0, body)
        except OSError as e:
            # Another root, or none, or a kernel without qdiscs.
            if e.errno in (errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP):
                return False
            raise
    return True


def _request(sock: Fd, kind: int, flags: int, body: bytes) -> None:
    """Have the kernel change something. :raises OSError: its answer."""
    flags |= lib.NLM_F_REQUEST | lib.NLM_F_ACK
    os.write(sock.fileno(), HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body)
    for kind, payload in _messages(os.read(sock.fileno(), 1 << 16)):
        number = -int.from_bytes(payload[:4], sys.byteorder, signed=True)
        if kind == lib.NLMSG_ERROR and number:
            raise OSError(number, os.strerror(number))


class Link:
    """One interface, by its index. Owns two sockets, which belong to the interface's network
    namespace.

    :param mirrored: the kernel counts from the other side, as it does for a macvtap: what the guest
        sends is transmitted, not received.
    """

    def __init__(
        self,
        index: int,
        query: Fd | None = None,
        events: Fd | None = None,
        *,
        mirrored: bool = False,
    ) -> None:
        self.index = index
        self._names = tuple(SWAPPED[name] for name in STATS) if mirrored else STATS
        if query is None or events is None:
            query, events = (Fd(fd) for fd in helper.do("route")[1])
        self._query, self._events = query, events
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor that is readable after something has happened to a link: ask ``gone``."""
        return self._events.fileno()

    def stats(self) -> dict[str, int]:
        """The counters of ``STATS``, from a tap's side; empty if the interface is gone. Any
        thread.
        """
        found = self._attributes().get(lib.IFLA_STATS64)
        if found is None:
            return {}
        return dict(zip(self._names, struct.unpack_from(f"={len(STATS)}Q", found), strict=True))

    def master(self) -> int:
        """The number of the interface, such as a bridge, that this one is a port of; 0 if there is
        none.
        """
        found = self._attributes().get(lib.IFLA_MASTER)
        return int.from_bytes(found[:4], sys.byteorder) if found else 0

    def _attributes(self) -> dict[int, bytes]:
        """What the kernel tells of the interface, by IFLA_*; empty if it is gone."""
        ask = IFINFO.pack(0, 0, self.index, 0, 0)
        ask = HEADER.pack(HEADER.size + len(ask), lib.RTM_GETLINK, lib.NLM_F_REQUEST, 1, 0) + ask
        with self._lock:
            if self._query.closed:
                return {}
            os.write(self._query.fileno(), ask)
            answer = os.read(self._query.fileno(), 1 << 16)
        for kind, payload in _messages(answer):
            if kind != lib.RTM_NEWLINK:
                continue
            at = IFINFO.size
            found = {}
            while at + ATTRIBUTE.size <= len(payload):
                length, what = ATTRIBUTE.unpack_from(payload, at)
                if length < ATTRIBUTE.size:
                    break
                found[what] = payload[at + ATTRIBUTE.size : at + length]
                at += length + 3 & ~3
            return found
        return {}

    def gone(self) -> bool:
        """Read one message about links; whether the interface has been deleted."""
        try:
            data = os.read(self._events.fileno(), 1 << 16)
        except OSError:  # ENOBUFS: some messages were lost
            return not self.stats()
        return any(
            kind == lib.RTM_DELLINK and IFINFO.unpack_from(payload)[2] == self.index
            for kind, payload in _messages(data)
        )

    def close(self) -> None:
        """Release the sockets."""
        with self._lock:
            self._query.close()
            self._events.close()


#: The tap's counters that count the guest's packets. The guest receives what the host transmits.
COUNTERS = {
    "rx_packets": "tx_packets",
    "rx_bytes": "tx_bytes",
    "rx_drop_tap": "tx_dropped",
    "tx_packets": "rx_packets",
    "tx_bytes": "rx_bytes",
    "tx_drop_tap": "rx_dropped",
}


class PacketCount:
    """Counts the guest's packets by the tap's counters while the data path has no counters of its
    own. Any thread.

    :param link: returns the tap's present link.
    """

    def __init__(self, link: Callable[[], Link]) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(COUNTERS, 0)
        self._seen: dict[str, int] = {}
        self._start: dict[str, int] | None = None
        self._counted: Link | None = None  # the link of ``_start``

    def start(self) -> None:
        """Begin to count; also on another link, after the tap was deleted and has returned."""
        with self._lock:
            self._fold()
            self._counted = self._link()
            self._start = self._counted.stats()

    def stop(self) -> None:
        """Stop counting."""
        with self._lock:
            self._look()
            self._fold()

    def read(self) -> dict[str, int]:
        """The guest's packets, bytes and drops, summed over all times between start and stop."""
        with self._lock:
            self._look()
            return {name: value + self._seen.get(name, 0) for name, value in self._totals.items()}

    def _look(self) -> None:
        if self._start is not None and self._counted is not None:
            now = self._counted.stats()  # none if it is gone, also if another is in its place
            if now:
                self._seen = {
                    name: now[key] - self._start.get(key, 0) for name, key in COUNTERS.items()
                }

    def _fold(self) -> None:
        for name, count in self._seen.items():
            self._totals[name] += count
        self._seen, self._start = {}, None


class Reopener:
    """Waits, in a thread of its own, for a deleted tap to come back.

    :param name: of the tap. :param reopen: opens the tap again; returns whether this was
        possible. None for sockets in place of a tap, which never come back.
    :param back: called in that thread after the tap has been opened again. :param failed: called
        with the exception that has ended the thread.
    """

    def __init__(
        self,
        name: str,
        reopen: Callable[[], bool] | None,
        back: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._name, self._reopen, self._back, self._failed = name, reopen, back, failed
        self._lock = threading.Lock()
        self._quit = threading.Event()
        self._thread: threading.Thread | None = None
        self._returning: threading.Thread | None = None  # in ``back``

    def start(self) -> None:
        """Begin to look for the tap; does nothing if the thread already runs. Any thread."""
        reopen = self._reopen
        if reopen is None:
            return
        with self._lock:
            if self._thread is None and not self._quit.is_set():
                self._thread = Thread(
                    target=self._run,
                    args=(reopen,),
                    name=f"{self._name}-watch",
                    daemon=True,
                    failed=self._failed,
                )
                self._thread.start()

    def _run(self, reopen: Callable[[], bool]) -> None:
        while not self._quit.wait(REOPEN_SECONDS):
            try:
                if not reopen():
                    continue
            except PyvmmError:
                continue  # the tap exists but cannot be opened: try again
            with self._lock:
                # From here on the new tap may be lost, too, and ``start`` look for the next.
                self._returning, self._thread = threading.current_thread(), None
            self._back()
            return

    def stop(self) -> None:
        """Stop looking, and wait for ``back``; ``start`` does nothing until ``rearm``."""
        self._quit.set()
        with self._lock:
            threads = {self._thread, self._returning}
        for thread in threads:
            if thread is not None:
                thread.join()
        with self._lock:
            self._thread = self._returning = None

    def rearm(self) -> None:
        """Allow ``start`` again."""
        self._quit.clear()
