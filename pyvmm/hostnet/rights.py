"""Descriptors over Unix sockets: SCM_RIGHTS of unix(7), for whoever sends or receives them."""

from __future__ import annotations

# The module socket takes longer to load than this one and all that it serves at a start.
import _socket
import os
import struct

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

#: The kernel takes at most so many descriptors per message (SCM_MAX_FD in include/net/scm.h).
FDS_MAX = 253
FD_SIZE = struct.calcsize("i")
RIGHTS = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)


class RightsLost(HostError):
    """A message was cut off: it had more bytes or descriptors than the receiver allows, or this
    process may not open so many descriptors.

    :ivar data: the bytes that were received.
    """

    def __init__(self, cause: str, hint: str = "", *, data: bytes) -> None:
        super().__init__(cause, hint)
        self.data = data


def send_fds(sock: _socket.socket, data: bytes, fds: Sequence[int] = (), flags: int = 0) -> int:
    """Send ``data``, and with its first byte ``fds``. The descriptors stay the caller's.

    :param flags: MSG_* of sendmsg(2).
    :returns: how many bytes were sent; the descriptors are sent if that is at least 1.
    :raises OSError: from sendmsg(2).
    """
    control = [(*RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    return sock.sendmsg([data], control, flags)


def recv_fds(sock: _socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Receive up to ``size`` bytes and up to ``most`` descriptors.

    The descriptors are close-on-exec from the first moment and belong to the caller. An error
    leaves none of them open.

    :returns: bytes and descriptors; no bytes at the end of a stream.
    :raises RightsLost: the message was cut off.
    :raises OSError: from recvmsg(2).
    """
    data, control, flags, _ = sock.recvmsg(
        size, _socket.CMSG_SPACE(FD_SIZE * most), _socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, payload in control:
        if (level, kind) == RIGHTS:
            # The kernel may cut a control message off in the middle of a descriptor's number.
            whole = payload[: len(payload) - len(payload) % FD_SIZE]
            fds += struct.unpack(f"{len(whole) // FD_SIZE}i", whole)
    # CMSG_SPACE rounds up to 8 bytes, so that there may be room for most + 1.
    if len(fds) > most or flags & (_socket.MSG_CTRUNC | _socket.MSG_TRUNC):
        close_all(fds)
        if flags & _socket.MSG_TRUNC:
            raise RightsLost(f"a message of more than {size} bytes was cut off", data=data)
        raise RightsLost(
            f"a message with more than {most} descriptors, or more than this process may open",
            "raise the limit: ulimit -n",
            data=data,
        )
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
