"""A vhost-user back-end of a few lines that answers properly, or as badly as it is told to."""

from __future__ import annotations

import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

from pyvmm.errors import VhostUserError
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Channel, Listener, Message
from tests.driver import bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Answer = bytes | Callable[[Any, Message], object]

PATIENCE = 60.0
RINGS = bits(
    "VIRTIO_F_VERSION_1",
    "VIRTIO_RING_F_EVENT_IDX",
    "VIRTIO_RING_F_INDIRECT_DESC",
    "VIRTIO_NET_F_MRG_RXBUF",
)
REPLY_ACK = 1 << spec.VHOST_USER_PROTOCOL_F_REPLY_ACK


class Fake:
    """A back-end of a few lines that answers properly unless told otherwise.

    :ivar answers: request -> what to do instead: bytes to send raw, or a function of (socket,
        message).
    :ivar mute: says nothing. :ivar deaf: accepts no connection.
    """

    FEATURES = RINGS | 1 << spec.VHOST_USER_F_PROTOCOL_FEATURES

    def __init__(
        self,
        listener: Listener,
        protocol: int = REPLY_ACK,
        answers: dict[int, Answer] | None = None,
    ) -> None:
        self.listener, self.protocol, self.answers = listener, protocol, answers or {}
        self.mute = False
        self.deaf = False
        self.connections = 0
        self.seen: list[int] = []
        self.requests: list[int] = []
        self._socks: list[Channel] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            channel = None if self.deaf else self.listener.accept()
            if channel is None:
                self._stop.wait(0.002)
                continue
            self._socks.append(channel)
            self.connections += 1
            try:
                while True:
                    m = channel.receive()
                    self.seen.append(m.request)
                    if m.request == spec.VHOST_USER_SET_BACKEND_REQ_FD:
                        self.requests += m.take_fds(1, 1)
                    try:
                        if not self.mute:
                            self._answer(channel, m)
                    finally:
                        m.close()
            except (VhostUserError, OSError):
                channel.close()

    def _answer(self, channel: Channel, m: Message) -> None:
        u64 = {
            spec.VHOST_USER_GET_FEATURES: self.FEATURES,
            spec.VHOST_USER_GET_PROTOCOL_FEATURES: self.protocol,
            spec.VHOST_USER_GET_QUEUE_NUM: 1,
            spec.VHOST_USER_GET_MAX_MEM_SLOTS: 8,
        }
        other = self.answers.get(m.request)
        if callable(other):
            other(channel._sock, m)
        elif other is not None:
            channel._sock.sendall(other)
        elif m.request in u64:
            channel.reply(m, struct.pack("<Q", u64[m.request]))
        elif m.request == spec.VHOST_USER_GET_VRING_BASE:
            channel.reply(m, m.payload)
        elif m.need_reply:
            channel.reply(m, bytes(8))

    @property
    def idle(self) -> bool:
        """Whether the last connection has ended."""
        return bool(self._socks) and self._socks[-1].closed

    def drop(self) -> None:
        self._socks[-1].stop()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for channel in self._socks:
            channel.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        for channel in self._socks:
            channel.close()
        for fd in self.requests:
            os.close(fd)


def raw(request: int, payload: bytes = b"", flags: int = 5, size: int | None = None) -> bytes:
    """A message as bytes, an answer unless ``flags`` say otherwise."""
    return (
        struct.pack(spec.HEADER, request, flags, len(payload) if size is None else size) + payload
    )


def many_fds(count: int) -> Answer:
    """An answer with that many descriptors."""

    def send(sock: socket.socket, m: Message) -> None:
        fd = os.eventfd(0)
        try:
            rights = [
                (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{count}i", *[fd] * count))
            ]
            sock.sendmsg([raw(m.request, bytes(8))], rights)
        finally:
            os.close(fd)

    return send


#: Ways to answer GET_FEATURES.
HOSTILE: dict[str, Answer] = {
    "short": raw(spec.VHOST_USER_GET_FEATURES, bytes(4)),
    "long": raw(spec.VHOST_USER_GET_FEATURES, bytes(16)),
    "huge": raw(spec.VHOST_USER_GET_FEATURES, size=0xFFFFFFFF),
    "garbage": b"\xff" * 64,
    "other answer": raw(spec.VHOST_USER_GET_QUEUE_NUM, bytes(8)),
    "no answer": raw(spec.VHOST_USER_GET_FEATURES, bytes(8), flags=1),
    "253 descriptors": many_fds(253),
    "9 descriptors": many_fds(9),
    "no version 1": raw(spec.VHOST_USER_GET_FEATURES, bytes(8)),
    "hang up": lambda sock, m: sock.shutdown(socket.SHUT_RDWR),
}
