"""vhost-user messages on their socket: framing, bounds, descriptors and time-outs, for front-end,
back-end and probe alike.

The peer (back-end or front-end) is not trusted. A message arrives whole within a deadline, or the
connection ends. A message has at most ``PAYLOAD_MAX`` bytes and ``FDS_MAX`` descriptors. The
receiver of a message owns its descriptors, and no error leaves a descriptor open.
"""

from __future__ import annotations

import _socket  # see ``hostnet.rights``
import errno
import os
import select
import struct
import threading
import time

from pyvmm import helper
from pyvmm.errors import HostError, UsageError, VhostUserError
from pyvmm.hostnet import sockets
from pyvmm.hostnet.rights import RightsLost, close_all, recv_fds, send_fds
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.vhost_user import (
    HEADER,
    HEADER_SIZE,
    MEM_HEADER,
    MEM_REGION,
    VHOST_USER_NEED_REPLY,
    VHOST_USER_REPLY,
    VHOST_USER_VERSION,
    VHOST_USER_VERSION_MASK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

#: More bytes than any message has: a memory table of 64 regions needs less.
PAYLOAD_MAX = 4096
#: As many descriptors as a memory table may bring (VHOST_MEMORY_BASELINE_NREGIONS).
FDS_MAX = 8
#: Seconds between attempts to connect to a socket whose queue of connections is full.
FULL_RETRY_S = 0.01
#: Seconds that the rest of a message may take once it has begun.
MESSAGE_S = 5.0
#: Connections that may wait until a listener accepts them.
BACKLOG = 16
#: Virtio feature bits with a meaning for vhost-user alone, and their names.
OWN_FEATURES = {
    spec.VHOST_F_LOG_ALL: "LOG_ALL",
    spec.VHOST_USER_F_PROTOCOL_FEATURES: "PROTOCOL_FEATURES",
}
FLAGS_KNOWN = VHOST_USER_VERSION_MASK | VHOST_USER_REPLY | VHOST_USER_NEED_REPLY


class Closed(VhostUserError):
    """The peer has closed the connection, between two messages."""


class ProtocolError(VhostUserError):
    """The peer has broken the protocol: the connection is over."""


class TimedOut(VhostUserError):
    """The peer has not answered or taken a message in time: the connection is over."""


class Stranger(VhostUserError):
    """The process at the other end belongs to another user."""


class Stopped(VhostUserError):
    """Another thread has ended the wait for the peer."""


def readable(fds: Iterable[int], seconds: float | None) -> set[int]:
    """Wait until one of ``fds`` has something to read, or has an end or an error to report.

    :param fds: descriptors; negative ones are left out. :param seconds: None: forever.
    :returns: the descriptors that are readable; none after ``seconds``.
    """
    poll = select.poll()
    for fd in fds:
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}


def request_name(request: int, *, backend: bool = False) -> str:
    """``GET_FEATURES``, or the number of an unknown request. :param backend: the request is one of
    the back-end's own.
    """
    for name, value in vars(spec).items():
        if value != request or not name.startswith("VHOST_USER_") or name.startswith(NOT_REQUESTS):
            continue
        if name.startswith("VHOST_USER_BACKEND_") == backend:
            return name.removeprefix("VHOST_USER_").removeprefix("BACKEND_")
    return f"request {request}"


NOT_REQUESTS = (
    "VHOST_USER_MAX_",
    "VHOST_USER_PROTOCOL_F_",
    "VHOST_USER_F_",
    "VHOST_USER_VERSION",
    "VHOST_USER_REPLY",
    "VHOST_USER_NEED_REPLY",
    "VHOST_USER_VRING_IDX",
    "VHOST_USER_VRING_NOFD",
)


def protocol_names(bits: int) -> list[str]:
    """Protocol features by name, lowest bit first."""
    prefix = "VHOST_USER_PROTOCOL_F_"
    table = {
        value: name.removeprefix(prefix)
        for name, value in vars(spec).items()
        if name.startswith(prefix)
    }
    return [table.get(i, f"bit-{i}") for i in range(bits.bit_length()) if bits >> i & 1]


class Message:
    """One message; owns its descriptors until ``take_fds``.

    :ivar flags: version, REPLY and NEED_REPLY. :ivar payload: its bytes.
    """

    __slots__ = ("fds", "flags", "payload", "request")

    def __init__(
        self, request: int, flags: int, payload: bytes, fds: list[int] | None = None
    ) -> None:
        self.request, self.flags, self.payload = request, flags, payload
        self.fds = fds or []

    @property
    def name(self) -> str:
        """The name of the message's request."""
        return request_name(self.request)

    @property
    def need_reply(self) -> bool:
        """Whether the sender waits for an answer."""
        return bool(self.flags & VHOST_USER_NEED_REPLY)

    def take_fds(self, low: int, high: int) -> list[int]:
        """The descriptors, which become the caller's. :raises ProtocolError: there are fewer than
        ``low`` or more than ``high``.
        """
        if not low <= len(self.fds) <= high:
            raise ProtocolError(f"{self.name} with {len(self.fds)} descriptors")
        fds, self.fds = self.fds, []
        return fds

    def unpack(self, *layouts: str) -> tuple[int, ...]:
        """The payload as integers, by the first of the layouts that has its length.

        :raises ProtocolError: none has.
        """
        for layout in layouts:
            if len(self.payload) == struct.calcsize(layout):
                return struct.unpack(layout, self.payload)
        lengths = " or ".join(str(struct.calcsize(layout)) for layout in layouts)
        raise ProtocolError(f"{self.name} with {len(self.payload)} bytes, not {lengths}")

    def inflight(self) -> tuple[int, ...]:
        """The payload of GET_INFLIGHT_FD, its answer, or SET_INFLIGHT_FD: size and offset of the
        mapping in bytes, queues, entries per queue. :raises ProtocolError: it is none.
        """
        return self.unpack(spec.INFLIGHT, spec.INFLIGHT_UNPADDED)

    @property
    def u64(self) -> int:
        """The payload as one number. :raises ProtocolError: it is not 8 bytes long."""
        return self.unpack("<Q")[0]

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        fds, self.fds = self.fds, []
        close_all(fds)

    def __repr__(self) -> str:
        return f"{self.name}(flags={self.flags:#x}, {self.payload.hex()}, fds={self.fds})"


class Region:
    """One region of a memory table: its guest-physical and its front-end address, and its place in
    its file.
    """

    __slots__ = ("gpa", "offset", "size", "user")

    def __init__(self, gpa: int, size: int, user: int, offset: int) -> None:
        self.gpa, self.size, self.user, self.offset = gpa, size, user, offset

    def pack(self) -> bytes:
        """The region as messages carry it."""
        return struct.pack(MEM_REGION, self.gpa, self.size, self.user, self.offset)


def pack_regions(regions: Sequence[Region]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return struct.pack(MEM_HEADER, len(regions), 0) + b"".join(r.pack() for r in regions)


def unpack_regions(payload: bytes) -> list[Region]:
    """The regions of SET_MEM_TABLE; front-ends may pad the table to 8 regions. :raises
    ProtocolError: the lengths do not fit.
    """
    head, each = struct.calcsize(MEM_HEADER), struct.calcsize(MEM_REGION)
    count = struct.unpack_from(MEM_HEADER, payload)[0] if len(payload) >= head else 0
    if (
        not 0 < count <= spec.VHOST_MEMORY_BASELINE_NREGIONS
        or len(payload) < head + count * each
        or (len(payload) - head) % each
    ):
        raise ProtocolError(f"SET_MEM_TABLE with {len(payload)} bytes for {count} regions")
    return [Region(*struct.unpack_from(MEM_REGION, payload, head + i * each)) for i in range(count)]


class Channel:
    """A connected stream socket that carries messages. One thread at a time sends or receives; any
    thread may call ``stop``.

    :param sock: owned from here on.
    :ivar recorder: gets every message for a trace: a ``kvm.recorder.Scope``, or None.
    """

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._open = True
        self._stopped = False
        # Held for one system call at most: ``stop`` must not reach a descriptor number that
        # ``close`` has released and another thread has got.
        self._ending = threading.Lock()
        self.recorder: Any = None
        sock.setblocking(False)

    def fileno(self) -> int:
        """The socket's descriptor, for poll(2)."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return not self._open

    def _check_stopped(self, what: str) -> None:
        if self._stopped:
            raise Stopped(f"{what}: stopped")

    def _wait(self, event: int, deadline: float | None, what: str) -> None:
        poll = select.poll()
        poll.register(self._sock.fileno(), event)
        while True:
            self._check_stopped(what)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimedOut(f"{what}: no answer in time", "look whether the other side hangs")
            if poll.poll(None if left is None else left * 1000 + 1):
                return

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Send one message; the descriptors stay the caller's.

        :param timeout: seconds for the whole message. :raises VhostUserError: the peer is gone, or
            too slow.
        """
        begin = time.monotonic_ns() if self.recorder is not None else 0
        data = struct.pack(HEADER, request, flags | VHOST_USER_VERSION, len(payload)) + payload
        deadline = None if timeout is None else time.monotonic() + timeout
        lent = fds
        while data:
            try:
                sent = send_fds(self._sock, data, lent, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, "vhost-user socket is full")
                continue
            except (BrokenPipeError, ConnectionError) as e:
                self._check_stopped("vhost-user message")
                raise Closed(f"vhost-user peer is gone: {e.strerror}") from e
            except OSError as e:
                raise HostError(f"cannot send on the vhost-user socket: {e.strerror}") from e
            data, lent = data[sent:], ()
        if begin:
            self._record("send", request, flags, payload, len(fds), begin)

    def send_bytes(self, data: bytes) -> None:
        """Send bytes that are no message, to see what the peer makes of them.

        :raises VhostUserError: the peer is gone, or does not take all of them at once.
        """
        try:
            sent = self._sock.send(data, _socket.MSG_NOSIGNAL)
        except OSError as e:
            raise Closed(f"vhost-user peer is gone: {e.strerror}") from e
        if sent != len(data):
            raise TimedOut("vhost-user socket is full")

    def _record(
        self, way: str, request: int, flags: int, payload: bytes, fds: int, begin: int
    ) -> None:
        args = {"request": request, "flags": flags, "payload": payload, "descriptors": fds}
        self.recorder.step(f"vhost-user {way}", begin, args)

    def _receive(self, want: int, fds: list[int], deadline: float | None) -> bytes:
        """Read up to ``want`` bytes; empty at the end of the stream. Received descriptors are added
        to ``fds``.
        """
        while True:
            try:
                data, got = recv_fds(self._sock, want, FDS_MAX)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, "vhost-user message")
                continue
            except ConnectionError as e:
                raise Closed(f"vhost-user peer is gone: {e.strerror}") from e
            except RightsLost as e:
                raise ProtocolError(f"vhost-user: {e.cause}", e.hint) from e
            fds += got
            if len(fds) > FDS_MAX:
                raise ProtocolError(f"vhost-user message with more than {FDS_MAX} descriptors")
            if not data:
                # We may have ended the connection ourselves.
                self._check_stopped("vhost-user message")
            return data

    def receive(self, timeout: float | None = None) -> Message:
        """Wait for the next message, and read all of it.

        :param timeout: seconds for the whole message; None: as long as the peer likes until a
            message begins, and ``MESSAGE_S`` for the rest of it.
        :raises Closed: the stream ended between two messages.
        :raises ProtocolError: the stream ended in a message, or the bytes are no message.
        :raises TimedOut: the message did not come in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        fds: list[int] = []
        try:
            head = b""
            while len(head) < HEADER_SIZE:
                part = self._receive(HEADER_SIZE - len(head), fds, deadline)
                if not part:
                    if head or fds:
                        raise ProtocolError("vhost-user message is cut off in its header")
                    raise Closed("vhost-user peer has closed the connection")
                head += part
                if deadline is None:
                    deadline = time.monotonic() + MESSAGE_S
            request, flags, size = struct.unpack(HEADER, head)
            if flags & VHOST_USER_VERSION_MASK != VHOST_USER_VERSION or flags & ~FLAGS_KNOWN:
                raise ProtocolError(f"vhost-user message with flags {flags:#x}")
            if size > PAYLOAD_MAX:
                raise ProtocolError(f"vhost-user message of {size} bytes")
            before = len(fds)
            payload = b""
            while len(payload) < size:
                part = self._receive(size - len(payload), fds, deadline)
                if not part:
                    raise ProtocolError(
                        f"{request_name(request)} is cut off after {len(payload)} bytes"
                    )
                payload += part
            if len(fds) != before:
                raise ProtocolError(f"{request_name(request)} with descriptors in its payload")
            if self.recorder is not None:
                self._record("receive", request, flags, payload, len(fds), time.monotonic_ns())
            return Message(request, flags, payload, fds)
        except BaseException:
            close_all(fds)
            raise

    def reply(
        self, message: Message, payload: bytes, fds: Sequence[int] = (), timeout: float = 5.0
    ) -> None:
        """Answer a request."""
        self.send(message.request, payload, fds, flags=VHOST_USER_REPLY, timeout=timeout)

    def request(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, timeout: float
    ) -> None:
        """Send a request that has no answer."""
        self.send(request, payload, fds, timeout=timeout)

    def ask(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        timeout: float,
    ) -> Message:
        """Send a request and take its answer.

        :raises ProtocolError: the answer belongs to another request, or is no answer by its flags.
        """
        flags = VHOST_USER_NEED_REPLY if need_reply else 0
        deadline = time.monotonic() + timeout
        self.send(request, payload, fds, flags=flags, timeout=timeout)
        try:
            answer = self.receive(max(0.0, deadline - time.monotonic()))
        except VhostUserError as e:
            raise type(e)(f"{request_name(request)}: {e.cause}", e.hint) from e
        if answer.request != request or not answer.flags & VHOST_USER_REPLY:
            answer.close()
            raise ProtocolError(f"{request_name(request)} was answered by {answer.name}")
        return answer

    def stop(self) -> None:
        """End the connection: a thread that waits for the peer, now or later, gets ``Stopped``. Any
        thread; never waits.
        """
        with self._ending:
            self._stopped = True
            try:
                self._sock.shutdown(_socket.SHUT_RDWR)
            except OSError:
                pass  # not connected any more, or closed

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        with self._ending:
            self._open = False
            self._sock.close()


def _address(path: str) -> str:
    if not path or "\0" in path or len(os.fsencode(path)) > sockets.PATH_MAX:
        raise VhostUserError(
            f"{path!r} is no path for a socket",
            f"name a path of at most {sockets.PATH_MAX} bytes (sun_path)",
        )
    return path


def check_peer(sock: _socket.socket, path: str, peer: int | None) -> None:
    """Whoever is at the other end gets all of the guest's memory, or makes us map theirs.

    :param peer: a user id that may be there, beside root and our own.
    :raises Stranger: it is another user's process (SO_PEERCRED of unix(7)).
    """
    raw = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i"))
    uid = struct.unpack("iII", raw)[1]
    if uid not in (0, os.geteuid(), peer):
        raise Stranger(
            f"the process at {path} belongs to the user with id {uid}",
            f"if that user is to be trusted: peer={uid}",
        )


def connect(path: str, timeout: float = 5.0, end: int = -1, *, peer: int | None = None) -> Channel:
    """Connect to a listening socket.
    :param timeout: seconds to wait if the socket's queue of connections is full. A blocking
        connect(2) would wait forever if the listener hangs.
    :param end: a descriptor that ends this wait when it becomes readable.
    :param peer: see ``check_peer``.
    :raises VhostUserError: no process listens there. :raises Stranger: see ``check_peer``.
    :raises TimedOut: a process listens there but accepts no connection.
    :raises Stopped: ``end`` became readable.
    """
    until = time.monotonic() + timeout
    _address(path)
    while (sock := _connected(path)) is None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimedOut(
                f"cannot connect to {path}: nobody accepts connections",
                "look whether the other side hangs",
            )
        if readable([end], min(FULL_RETRY_S, left)):
            raise Stopped(f"connecting to {path}: stopped")
    try:
        check_peer(sock, path, peer)
    except BaseException:
        sock.close()
        raise
    return Channel(sock)


def _connected(path: str) -> _socket.socket | None:
    """Try to connect; None if the queue of connections is full (EAGAIN of connect(2))."""
    try:
        sock = _socket.socket(fileno=helper.do("connect", path)[1][0])
        sock.setblocking(False)  # as it is; the object does not know
        return sock
    except BlockingIOError:
        return None
    except UsageError as e:  # of the sandbox
        raise VhostUserError(e.cause, e.hint) from e
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            raise VhostUserError(f"cannot make a socket: {e.strerror}", "ulimit -n") from e
        hint = "start the other side first" if e.errno else ""
        if hint and "PYVMM_IN_TESTBED" in os.environ:
            # A socket does not reach from one kernel into another, though its file is seen.
            hint += ", in the testbed as well: pyvmm testbed -- sh -c 'BACKEND & pyvmm run ...'"
        if isinstance(e, PermissionError):
            hint = "its owner or directory keeps this user out"
        raise VhostUserError(f"cannot connect to {path}: {e.strerror}", hint) from e


class Listener:
    """A listening socket in the file system; ``close`` removes it.

    Only our own user may connect, whatever the umask is; anybody may if ``peer`` is given, and
    ``accept`` tells who it is.

    :param peer: see ``check_peer``.
    """

    def __init__(self, path: str, *, peer: int | None = None) -> None:
        """:raises VhostUserError: the path is in use, or no socket can be made there. A socket on
        which no process listens is replaced.
        """
        self.path, self._peer = _address(path), peer
        try:
            anybody = "anybody" if peer is not None else ""
            made, fds = helper.do("listen", path, anybody, str(BACKLOG))
        except OSError as e:
            hint = "stop the program that listens there, or name another path"
            raise VhostUserError(f"cannot listen on {path}: {e.strerror}", hint) from e
        self._sock = _socket.socket(fileno=fds[0])
        self._sock.setblocking(False)
        self._identity = int(made[0]), int(made[1])

    def fileno(self) -> int:
        """The socket's descriptor, for poll(2)."""
        return self._sock.fileno()

    def accept(self) -> Channel | None:
        """The next connection; None if there is none yet. :raises Stranger: see ``check_peer``; the
        connection is closed.
        """
        try:
            sock = _socket.socket(fileno=self._sock._accept()[0])  # type: ignore[attr-defined]
        except OSError:
            return None  # there is none, or it has gone again
        try:
            check_peer(sock, self.path, self._peer)
        except BaseException:
            sock.close()
            raise
        return Channel(sock)

    def close(self) -> None:
        """Stop listening; remove the socket, unless somebody has replaced it."""
        self._sock.close()
        sockets.remove(self.path, self._identity)
