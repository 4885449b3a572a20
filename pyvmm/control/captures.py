"""``x-pyvmm-capture``: a connection becomes the pcapng stream of a capture (docs/capture.md).

Theory of operation: the machine writes the stream. The capture ends in order when the client sends
the end of its own direction (shutdown(2)); then the rest of the stream comes, and its end. If the
capture cannot begin, the machine sends ``FAILED``, an exit status and the words instead: a pcapng
stream begins with another byte.
"""

from __future__ import annotations

import os
import select
from socket import MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, socket

from pyvmm.capture.session import Capture
from pyvmm.errors import ControlError, PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyvmm.capture.session import Captured

FAILED = b"!"
READ_SIZE = 1 << 18


def carry(
    sock: socket,
    cards: Sequence[Captured],
    snaplen: int,
    code: bytes,
    expression: str,
    limit: int | None = None,
    queue: int | None = None,
) -> None:
    """Capture until the client ends it, or the machine does; closes the socket."""
    with sock:
        try:
            stream = os.dup(sock.fileno())
            capture = Capture(
                cards,
                stream,
                snaplen=snaplen,
                code=code,
                expression=expression,
                queue=queue,
                limit=limit,
            )
        except PyvmmError as e:
            _fail(sock, e.exit_code, str(e))
            return
        except OSError as e:
            _fail(sock, PyvmmError.exit_code, e.strerror or str(e))
            return
        with capture:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            poll.register(capture.over, select.POLLIN)
            poll.poll()


def _fail(sock: socket, status: int, text: str) -> None:
    try:
        sock.send(FAILED + bytes([status]) + text.encode(), MSG_DONTWAIT | MSG_NOSIGNAL)
    except OSError:
        pass  # the client has gone


def follow(sock: socket, early: bytes, put: Callable[[bytes], object], wakeup: int) -> None:
    """The client's side: pass the stream on, to its end.

    :param sock: lent. :param early: what has come on it already. :param put: called with each
        piece; its errors are raised unchanged.
    :param wakeup: a descriptor that is readable when the capture is to end.
    :raises ControlError: the capture cannot begin; ``exit_code`` says why.
    """
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    data, first = early, True
    while True:
        if data:
            if first and data[:1] == FAILED:
                _raise(sock, data)
            first = False
            put(data)
        ready = dict(poll.poll())
        if wakeup in ready:
            poll.unregister(wakeup)
            try:
                sock.shutdown(SHUT_WR)
            except OSError:
                pass  # the machine has gone
        data = b""
        if sock.fileno() in ready:
            try:
                data = sock.recv(READ_SIZE)
            except OSError:
                return
            if not data:
                return


def _raise(sock: socket, data: bytes) -> None:
    while more := sock.recv(READ_SIZE):
        data += more
    error = ControlError(data[2:].decode(errors="replace"))
    error.exit_code = data[1] if len(data) > 1 else error.exit_code
    raise error
