"""Our own vhost-user back-end as a child process on a tap of ours: for ``vhost-user`` without
``socket=``.

The child has the tap's own descriptors, so that frames enter and leave at the same place whichever
data path runs: whatever waits in the tap waits for all of them. It lives as long as the card,
serves one session after another, and ends when its control socket does, also when this process is
killed.
"""

from __future__ import annotations

import _socket
import select
import sys
import threading

from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.fd import Fd
from pyvmm.hostnet.rights import recv_fds, send_fds
from pyvmm.vhostuser.wire import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

    from pyvmm.hostnet.tap import Tap

#: Seconds for an interpreter to start, and for a child to take a session.
START_S, TAKE_S = 30.0, 2.0


class BackendProcess:
    """The child, made when it is first needed and again after its death.

    :param tap: lent to the child; offloads, filters and queues are set on this side.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._control: _socket.socket | None = None
        self._fds: list[Fd] = []
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id, None where there is none now."""
        return self._child.pid if self._child is not None else None

    def dial(self) -> Channel:
        """A new session with it. Any thread.

        :raises VhostUserError: it does not start.
        """
        try:
            ours, theirs = _socket.socketpair(
                _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
            )
        except OSError as e:
            raise VhostUserError(
                f"no session with our own back-end: {e.strerror}", "ulimit -n"
            ) from e
        try:
            with self._lock:
                # A tap that was deleted and came back has other descriptors. A child may have died,
                # or hang, unnoticed.
                if self._fds is not self._tap.fds or not self._hand(theirs):
                    self._end()
                    self._start()
                    if not self._hand(theirs):
                        raise VhostUserError("our own back-end takes no session")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Channel(ours)

    def _hand(self, session: _socket.socket) -> bool:
        """Give the child a session; whether it has taken it."""
        if self._control is None:
            return False
        try:
            send_fds(self._control, b"\0", [session.fileno()])
        except OSError:
            return False
        return self._heard(TAKE_S)

    def _heard(self, seconds: float) -> bool:
        """Wait for the child's word."""
        assert self._control is not None
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        try:
            return bool(poll.poll(seconds * 1000) and self._control.recv(1))
        except OSError:
            return False

    def _start(self) -> None:
        import subprocess

        if self._closed:
            raise VhostUserError("our own back-end has been closed")
        tap, fds = self._tap, self._tap.fds
        try:
            ours, theirs = _socket.socketpair(
                _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC
            )
        except OSError as e:
            raise VhostUserError(f"cannot start our own back-end: {e.strerror}") from e
        lent = [theirs.fileno(), *(fd.fileno() for fd in fds)]
        words = [str(lent[0]), tap.name, str(tap.mtu), str(tap.features()), *map(str, lent[1:])]
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "pyvmm.backend.process", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=lent,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as e:
            ours.close()
            raise VhostUserError(f"cannot start our own back-end: {e.strerror}") from e
        finally:
            theirs.close()
        self._control, self._fds = ours, fds
        if not self._heard(START_S):
            self._end()
            raise VhostUserError("our own back-end does not start")

    def _end(self) -> None:
        """End the child, which holds nothing that is worth an orderly end."""
        control, self._control = self._control, None
        child, self._child = self._child, None
        if control is not None:
            control.close()
        if child is not None:
            child.kill()
            child.wait()

    def close(self) -> None:
        """End the child. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._end()


def _take(control: _socket.socket) -> Channel | None:
    """The child's side: the next session, None at the end."""
    data, fds = recv_fds(control, 1, 1)
    return Channel(_socket.socket(fileno=fds[0])) if data else None


def serve(control_fd: int, name: str, mtu: int, features: int, fds: list[int]) -> None:
    """What the child does: serve on the tap of descriptors ``fds`` until the control socket is
    closed.
    """
    from pyvmm.backend.net import NetService
    from pyvmm.backend.ports import LentTap
    from pyvmm.backend.server import Backend

    control = _socket.socket(fileno=control_fd)
    port = LentTap(name, [Fd(fd) for fd in fds], mtu, features)
    with Backend(NetService(port)) as backend:
        control.send(b"\0")
        while True:
            channel = _take(control)
            if channel is None:
                return
            control.send(b"\0")
            try:
                backend.serve(channel)
            except PyvmmError:
                pass  # the front-end has seen its end of it


if __name__ == "__main__":
    serve(
        int(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
        [int(a) for a in sys.argv[5:]],
    )
