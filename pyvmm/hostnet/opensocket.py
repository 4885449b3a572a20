"""A card's port at an open socket of somebody else's (``fd=``): QEMU, passt, vde_plug, or a program
of the user's. The frames go by a thread in C (``cext/socket_port.c``).
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, NetError
from pyvmm.fd import Fd
from pyvmm.hostnet.frames import HEADER, rarp
from pyvmm.hostnet.tap import duplicate
from pyvmm.spec.ethernet import ETH_DATA_LEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Bytes that may wait in each direction of the pair between worker and thread.
BUFFER = 1 << 20


def is_socket(number: int) -> bool:
    """Whether the descriptor ``number`` is open and a socket."""
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False


class OpenSocket:
    """Implements ``Frames`` (datapath.base) with one queue pair. Frames wait in the sockets while
    no worker takes them.

    :param number: of the descriptor, which stays as it is, and open. A UNIX datagram or seqpacket
        socket has one frame per packet; of a stream socket, a length of 4 bytes in network byte
        order comes before each frame.
    :param mtu: bytes.
    :param stopped: told, in words, if the thread makes a system call that it may not make.
    :raises NetError: it is no socket of these, or not connected. :raises HostError: there are no
        descriptors.
    """

    #: No network interface is behind the sockets.
    interface = None

    def __init__(
        self, number: int, mtu: int | None, stopped: Callable[[str], object] | None = None
    ) -> None:
        self.name, self.mtu = f"fd{number}", mtu or ETH_DATA_LEN
        self._ends: list[Fd] = []
        self._number, self._stopped = number, stopped
        self._peer = self._inner = Fd(-1)
        self._port: Any = ffi.NULL
        self._cut = False
        #: What the thread has told last; it tells nothing after its end.
        self._told = ffi.new("struct pv_socket_report *")
        self._peer = duplicate(number)
        try:
            kind = _kind(self._peer.fileno(), number)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._ends, self._inner = [Fd(ours.detach())], Fd(theirs.detach())
            os.set_blocking(self._ends[0].fileno(), False)
            for fd in (*self._ends, self._inner):
                with suppress(OSError), socket.socket(fileno=os.dup(fd.fileno())) as end:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._config = ffi.new("struct pv_socket_config *")
            self._config.fd, self._config.type = self._peer.fileno(), kind
            self._config.inner = self._inner.fileno()
            self._config.name = f"{self.name}-port".encode()[:15]
        except OSError as e:
            self.close()
            raise HostError(
                f"cannot make a socket: {e.strerror}", "raise the limit: ulimit -n"
            ) from e
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> list[Fd]:
        """The worker's end of the pair. The thread begins with the first look, when a guest's
        driver begins: a process cannot be confined while a thread has a filter of its own.

        :raises HostError: there is no memory, or no thread.
        """
        if not self._port and not self._cut:
            error = ffi.new("int *")
            self._port = lib.pv_socket_port_new(self._config, error)
            if not self._port:
                raise HostError(f"cannot start a network thread: {os.strerror(error[0])}")
        return self._ends

    def features(self) -> int:
        """0, because sockets have no offloads."""
        return 0

    def need(self) -> None:
        """Nothing to wait for."""

    def cut(self) -> None:
        """Nothing waits for the peer. From now on its end is no news."""
        self._cut = True

    def gone(self) -> str:
        """Why no frame comes any more, in words; empty at our own end."""
        report = self._look()
        if self._cut or report.end in (lib.PV_SOCKET_SERVES, lib.PV_SOCKET_LEFT):
            return ""
        what = f"the socket fd={self._number}"
        if report.end == lib.PV_SOCKET_CLOSED:
            return f"{what} was closed by its other end"
        if report.end == lib.PV_SOCKET_LENGTH:
            return f"{what} has a frame of {report.value} bytes, which no frame has"
        if report.end == lib.PV_SOCKET_ERROR:
            return f"{what} fails: {os.strerror(report.value)}"
        name = lib.pv_call_name(report.value)
        call = f"{ffi.string(name).decode()}()" if name else f"system call {report.value}"
        problem = f"thread {self.name}-port asked for {call}, which it may not have"
        if self._stopped is not None:
            self._stopped(problem)
        return problem

    def announce(self, mac: bytes) -> bool:
        """Send the frame that tells the network that ``mac`` is here; whether it was sent."""
        try:
            os.write(self._ends[0].fileno(), HEADER + rarp(mac))
        except OSError:
            return False
        return True

    def report(self) -> dict[str, object]:
        """For JSON: the descriptor's number, and how many packets of either side were no frames."""
        return {"socket": {"fd": self._number, "dropped": int(self._look().dropped)}}

    def _look(self) -> Any:
        """A struct pv_socket_report; of the moment of ``close`` after that."""
        if self._port:
            lib.pv_socket_port_report(self._port, self._told)
        return self._told

    def close(self) -> None:
        """End the thread; the peer's socket stays open for whoever has opened it. A second call
        does nothing.
        """
        self._cut = True
        for fd in self._ends:
            fd.close()  # by which the thread ends
        self._look()
        port, self._port = self._port, ffi.NULL
        lib.pv_socket_port_free(port)
        self._inner.close()
        self._peer.close()


def _kind(fd: int, number: int) -> int:
    """The type of a connected socket.

    :param number: what the user calls it. :raises NetError: frames cannot go that way.
    """
    with socket.socket(fileno=os.dup(fd)) as s:
        kind, family = s.type, s.family
        packets = family == socket.AF_UNIX and kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
        if not packets and kind != socket.SOCK_STREAM:
            raise NetError(
                f"fd={number} is a socket that frames cannot be sent by",
                "give a UNIX socket, or a stream socket with a length before each frame",
            )
        try:
            s.getpeername()
        except OSError as e:
            raise NetError(
                f"fd={number} is a socket that is not connected",
                "connect it, or accept a connection, in the program that starts pyvmm",
            ) from e
        return int(kind)
