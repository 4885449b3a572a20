"""Ports for our vhost-user back-end other than a tap of its own: a loop, a sink, a cable to another
back-end, a Python function, and a tap that another process has opened.

Each port has what the emulated data path needs of a ``Port``. Loop and cable go through memory, a
burst of frames at a time (``datapath.cable``). The others have sockets that keep packet boundaries,
which costs a system call per packet at each end, with virtio-net headers of 12 bytes. None of these
has offloads, so the headers are empty.
"""

from __future__ import annotations

import os
import select
import socket
import threading

from pyvmm._ext import ffi, lib
from pyvmm.datapath.cable import cables
from pyvmm.errors import HostError
from pyvmm.fd import EventFd, Fd
from pyvmm.hostnet.frames import HEADER
from pyvmm.hostnet.tap import HEADERS
from pyvmm.spec.virtio_net import VIRTIO_NET_HDR_V1_SIZE
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Bytes that may wait in a socket.
BUFFER = 1 << 20
FRAME_MAX = 1 << 17


class SocketPort:
    """A port of sockets, or of ends of cables.

    :param fds: one per queue pair, owned from here on.
    """

    #: No network interface is behind the descriptors.
    interface = None
    #: Another header would be taken for a part of the frame at the other end.
    headers: tuple[int, ...] = (VIRTIO_NET_HDR_V1_SIZE,)

    def __init__(self, name: str, fds: Sequence[Fd]) -> None:
        self.name = name
        self.fds = list(fds)
        self.mtu = 1500

    def features(self) -> int:
        """0, because sockets and cables have no offloads."""
        return 0

    def accept_mtu(self, mtu: int) -> bool:
        """True, because frames of any size pass. The MTU only decides how many buffers a worker
        looks at ahead.
        """
        self.mtu = mtu
        return True

    def set_header(self, size: int) -> None:
        """Do nothing."""

    def set_queues(self, count: int) -> None:
        """Do nothing."""

    def set_offloads(self, acked: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        for fd in self.fds:
            fd.close()


class LentTap(SocketPort):
    """A tap that another process has opened. That process sets headers, queues, offloads and
    filters.

    :param fds: one per queue pair, owned from here on. :param features: what the tap can honour.
    """

    headers = HEADERS

    def __init__(self, name: str, fds: list[Fd], mtu: int, features: int) -> None:
        super().__init__(name, fds)
        self.mtu = mtu
        self._features = features

    def features(self) -> int:
        """The given features. A test of the tap would change it under the process that owns it."""
        return self._features

    def accept_mtu(self, mtu: int) -> bool:
        """Whether the tap's MTU is at least ``mtu``."""
        return mtu <= self.mtu


def _socket_pairs(count: int) -> list[socket.socket]:
    """``count`` pairs of connected sockets, non-blocking, with large buffers."""
    made: list[socket.socket] = []
    try:
        for _ in range(count):
            kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            made += socket.socketpair(socket.AF_UNIX, kind)
        for one in made:
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
    except OSError as e:
        for one in made:
            one.close()
        raise HostError(f"cannot make a socket: {e.strerror}", "raise the limit: ulimit -n") from e
    return made


class SinkPort(SocketPort):
    """Near ends of socket pairs. :param far: the others, which drop what comes; owned."""

    def __init__(self, name: str, fds: Sequence[Fd], far: Sequence[socket.socket]) -> None:
        super().__init__(name, fds)
        self._far = far

    def close(self) -> None:
        """Close both ends; a second call does nothing."""
        super().close()
        for s in self._far:
            s.close()


def loop_port(queues: int) -> SocketPort:
    """A port that sends every frame back on its queue pair. :raises HostError: no descriptors or
    memory.
    """
    return SocketPort("loop", [end for (end,) in cables(queues, 1)])


def sink_port(queues: int) -> SocketPort:
    """A port that takes every frame and sends none: socket pairs with a connection, so that nothing
    can be sent elsewhere by name. The kernel drops the frames, because the filter of the far end
    wants none of them.

    :raises HostError: no descriptors or memory.
    """
    sockets = _socket_pairs(queues)
    port = SinkPort("sink", [Fd(s.detach()) for s in sockets[::2]], sockets[1::2])
    for far in sockets[1::2]:
        error = lib.pv_capture_filter(far.fileno(), 0, ffi.NULL, 0)
        if error:
            port.close()
            raise HostError(f"cannot filter a socket: {os.strerror(-error)}")
    return port


def joined_ports(queues: int) -> tuple[SocketPort, SocketPort]:
    """Two ports: a frame sent into one leaves the other, on the same queue pair.

    :raises HostError: no descriptors or memory.
    """
    ends = cables(queues, 2)
    return SocketPort("left", [e[0] for e in ends]), SocketPort("right", [e[1] for e in ends])


class PythonPort(SocketPort):
    """Gives frames to a Python function, and takes frames by ``send``.

    :param receive: called with (frame without its header, queue pair) from the port's own thread;
        an exception ends that thread, and ``close`` raises it again.
    :ivar dropped: frames that ``send`` dropped because the socket was full.
    """

    def __init__(
        self, receive: Callable[[bytes, int], None], queues: int = 1, name: str = "python"
    ) -> None:
        sockets = _socket_pairs(queues)
        super().__init__(name, [Fd(s.detach()) for s in sockets[::2]])
        self._far = sockets[1::2]
        self._receive = receive
        self._stop = EventFd()
        self._error: BaseException | None = None
        self.dropped = 0
        self._thread = Thread(target=self._run, name=f"{name}-port", daemon=True)
        self._thread.start()

    def send(self, frame: bytes, pair: int = 0) -> bool:
        """Send a frame to the guest. Any thread.

        :returns: False if the socket is full and the frame was dropped.
        """
        try:
            self._far[pair].send(HEADER + frame)
        except OSError:
            self.dropped += 1
            return False
        return True

    def _run(self) -> None:
        try:
            poll = select.poll()
            poll.register(self._stop.fileno(), select.POLLIN)
            pairs = {s.fileno(): pair for pair, s in enumerate(self._far)}
            for fd in pairs:
                poll.register(fd, select.POLLIN)
            while True:
                for fd, _events in poll.poll():
                    if fd not in pairs:
                        return
                    for _ in range(64):  # after these, the other queue pairs have their turn
                        try:
                            data = os.read(fd, FRAME_MAX)
                        except BlockingIOError:
                            break
                        if not data:
                            return
                        self._receive(data[len(HEADER) :], pairs[fd])
        except BaseException as e:
            self._error = e

    def close(self) -> None:
        """End the thread and close the sockets; a second call does nothing.

        :raises BaseException: the exception of ``receive``.
        """
        if self._stop.closed:
            return
        self._stop.signal()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._stop.close()
        super().close()
        for s in self._far:
            s.close()
        if self._error is not None:
            raise self._error
