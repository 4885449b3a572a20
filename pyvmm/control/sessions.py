"""The machine's side of ``x-pyvmm-exec``: a connection becomes the streams of one command in the
guest (docs/exec.md).

Theory of operation: the frames of the connection are those of the guest's channel. The session
checks each, and bounds what may be on the way in either direction, so this module only carries
them. If the client goes, the command is ended.
"""

from __future__ import annotations

import select
import time
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket

from pyvmm.devices.guest_frames import BadFrame, Framer, frame
from pyvmm.errors import PyvmmError, UsageError
from pyvmm.spec.platform import FRAME_FAILED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.devices.guest_channel import Channel

READY_S = 60  # seconds that the guest may take until it takes commands
READY_MAX = 3600
LINGER = 2.0  # seconds for a client to take the end of the output once the machine has ended
CHECK_MS = 1000
READ_SIZE = 1 << 17


def carry(sock: socket, channel: Channel, patience: float) -> None:
    """Carry one command's frames, and close the socket.

    :param patience: seconds until the guest must take commands.
    """
    with sock:
        try:
            channel.wait_ready(patience, lambda: _check(sock))
            _deliver(sock, channel, _carry(sock, channel))
        except BadFrame as e:
            _fail(sock, UsageError(f"the client broke the protocol: {e}"))
        except PyvmmError as e:
            _fail(sock, e)
        except OSError:
            pass  # the client has gone


def _fail(sock: socket, error: PyvmmError) -> None:
    payload = error.exit_code.to_bytes(4, "little") + str(error).encode(errors="replace")
    try:
        sock.send(frame(FRAME_FAILED, payload), MSG_DONTWAIT | MSG_NOSIGNAL)
    except OSError:
        pass


def _check(sock: socket) -> None:
    """:raises ConnectionResetError: the client has gone."""
    poll = select.poll()
    poll.register(sock, 0)
    if poll.poll(0):
        raise ConnectionResetError


def _carry(sock: socket, channel: Channel) -> bytearray:
    """Carry frames until the command has ended; returns what the client has not got yet."""
    framer, out = Framer(), bytearray()
    with channel.open() as session:
        while True:
            if not out or channel.ended:
                for kind, payload in session.take():
                    out += frame(kind, payload)
            if session.over:
                return out
            poll = select.poll()
            poll.register(sock, select.POLLIN | (select.POLLOUT if out else 0))
            if not out:
                poll.register(session.fileno(), select.POLLIN)
            ready = dict(poll.poll(CHECK_MS if out else None))
            mask = ready.get(sock.fileno(), 0)
            if mask & select.POLLOUT:
                del out[: sock.send(memoryview(out)[: 1 << 18], MSG_DONTWAIT | MSG_NOSIGNAL)]
            if mask & ~select.POLLOUT:
                data = sock.recv(READ_SIZE, MSG_DONTWAIT)
                if not data:
                    return bytearray()
                for kind, payload in framer.feed(data):
                    session.send(kind, payload)


def _deliver(sock: socket, channel: Channel, out: bytearray) -> None:
    """Send what is left to a client that may take its time as long as the machine runs."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    until = 0.0
    while out:
        ready = poll.poll(CHECK_MS)
        if channel.ended:
            until = until or time.monotonic() + LINGER
            if time.monotonic() > until:
                return
        if ready:
            del out[: sock.send(memoryview(out)[: 1 << 18], MSG_DONTWAIT | MSG_NOSIGNAL)]
