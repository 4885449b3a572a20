"""Our own vhost-user back-end as a child process on a tap of ours: for ``vhost-user`` without
``socket=``.

The child has the tap's own descriptors, so that frames enter and leave at the same place whichever
data path runs: a frame that waits in the tap waits for all of them. The child lives as long as the
card, and serves one session after another. It ends when its control socket does, also if this
process is killed.

The control socket carries one datagram per word. We send each session's socket. The child answers
``READY`` when it can be given the first session, and whenever it has taken one; in between it sends
its log, one line per datagram. The lines about a session come before the next ``READY``. Faults on
demand have a socket of their own (``backend.faults``).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import PyvmmError, ThreadStopped, VhostUserError
from pyvmm.fd import Fd
from pyvmm.hostnet.rights import recv_fds, send_fds
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Channel, Stopped, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.backend.faults import BackendFaults
    from pyvmm.helper import Child
    from pyvmm.hostnet.tap import Tap

#: In place of a socket's path.
NAME = "pyvmm's own back-end"
#: Seconds for an interpreter to start, and for a child to take a session.
START_S, TAKE_S = 30.0, 2.0
READY = b"\0"
#: Seconds for a child that has closed its control socket to be gone.
DEATH_S = 5.0
#: Bytes of a line of the child's log, and lines that are kept for ``complaints``.
LINE_MAX, LINES_MAX = 1024, 32


class BackendProcess:
    """The child. It is made when it is first needed, and again after its death.

    :param tap: lent to the child; offloads, filters and queues are set on this side.
    :param faults: the card's faults on demand in the child, lent; None: there never are any.
    :ivar poll_us: a worker looks for work this long, in microseconds, before it sleeps.
    """

    def __init__(self, tap: Tap, poll_us: int = 0, faults: BackendFaults | None = None) -> None:
        self._tap, self.poll_us, self._faults = tap, poll_us, faults
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._control: socket.socket | None = None
        self._fds: list[Fd] = []
        self._lines: deque[str] = deque(maxlen=LINES_MAX)
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id; None if there is no child now."""
        return self._child.pid if self._child is not None else None

    def complaints(self) -> list[str]:
        """The lines that the child has logged after the last call, at most ``LINES_MAX``. The last
        says how the child ended, if it did. Any thread.

        It never waits: while another thread is in ``dial``, lines may be left to the next call.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()
        lines = []
        while self._lines:
            lines.append(f"our own back-end: {self._lines.popleft()}")
        return lines

    def _drain(self) -> None:
        """Note all lines that the child has sent so far."""
        while self._control is not None and self._hear(0):
            pass

    def connector(self) -> OwnConnector:
        """Makes sessions with the child, for one data path."""
        return OwnConnector(self)

    def dial(self, end: int = -1) -> Channel:
        """A new session with the child. Any thread.

        :param end: a descriptor that ends the wait for the child when it becomes readable.
        :raises VhostUserError: the child does not start. :raises Stopped: because of ``end``.
        """
        try:
            ours, theirs = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
            )
        except OSError as e:
            raise VhostUserError(
                f"no session with our own back-end: {e.strerror}", "ulimit -n"
            ) from e
        try:
            with self._lock:
                # A tap that was deleted and came back has other descriptors. A child may have died,
                # or hang, unnoticed.
                if self._fds is not self._tap.fds or not self._hand(theirs, end):
                    self._end()
                    self._start(end)
                    if not self._hand(theirs, end):
                        raise VhostUserError("our own back-end takes no session")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Channel(ours)

    def _hand(self, session: socket.socket, end: int) -> bool:
        """Give the child a session; whether it has taken it."""
        if self._control is None:
            return False
        try:
            send_fds(self._control, b"\0", [session.fileno()])
        except OSError:
            return False
        return self._heard(TAKE_S, end)

    def _heard(self, seconds: float, end: int) -> bool:
        """Wait for the child's READY; whether it has come. :raises Stopped: because of ``end``; the
        child is ended, too, because its READY may come yet.
        """
        until = time.monotonic() + seconds
        while True:
            word = self._hear(max(0.0, until - time.monotonic()), end)
            if word == READY:
                return True
            if not word:
                if end in readable([end], 0):
                    self._end()
                    raise Stopped("waiting for our own back-end: stopped")
                return False

    def _hear(self, seconds: float, end: int = -1) -> bytes:
        """The child's next word; empty if none comes in time, or before ``end``, or if the child is
        gone. A line of its log is noted, too.
        """
        assert self._control is not None
        control = self._control.fileno()
        try:
            word = (
                self._control.recv(LINE_MAX)
                if control in readable([control, end], seconds)
                else b""
            )
        except OSError:
            return b""
        if word and word != READY:
            self._lines.append(word.decode(errors="replace"))
        return word

    def _start(self, end: int) -> None:
        if self._closed:
            raise VhostUserError("our own back-end has been closed")
        tap, fds = self._tap, self._tap.fds
        try:
            ours, theirs = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
            )
        except OSError as e:
            raise VhostUserError(f"cannot start our own back-end: {e.strerror}") from e
        try:
            asks, answers = socket.socketpair(
                socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC
            )
        except OSError as e:
            ours.close()
            theirs.close()
            raise VhostUserError(f"cannot start our own back-end: {e.strerror}") from e
        lent = [theirs.fileno(), answers.fileno(), *(fd.fileno() for fd in fds)]
        facts = (tap.mtu, tap.features(), self.poll_us)
        words = [*map(str, lent[:2]), tap.name, *map(str, facts), *map(str, lent[2:])]
        try:
            self._child = helper.start_module(helper.BACKEND, words, lent)
        except OSError as e:
            ours.close()
            asks.close()
            raise VhostUserError(f"cannot start our own back-end: {e.strerror}") from e
        finally:
            theirs.close()
            answers.close()
        self._control, self._fds = ours, fds
        try:
            if not self._heard(START_S, end):
                raise VhostUserError("our own back-end does not start")
            if self._faults is not None:
                self._faults.attach(asks)
        except PyvmmError:
            asks.close()
            self._end()
            raise
        if self._faults is None:
            asks.close()

    def _end(self) -> None:
        """End the child, which holds nothing that is worth an orderly end."""
        import subprocess

        child, self._child = self._child, None
        if self._faults is not None:
            self._faults.detach()
        if child is not None:
            # A process that dies closes its sockets first, and can be waited for a moment later.
            dying = self._control is not None and hung_up(self._control)
            with suppress(subprocess.TimeoutExpired):
                child.wait(DEATH_S if dying else 0)
            if child.returncode is not None:
                self._lines.append(end_of(child.returncode))
            helper.kill(child)
            child.wait()
        self._drain()
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def close(self) -> None:
        """End the child. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._end()


class OwnConnector(Connector):
    """Makes sessions with the child of a ``BackendProcess``, which is lent. The child has its own
    time limits: an interpreter may take long to start.
    """

    def __init__(self, process: BackendProcess) -> None:
        super().__init__(NAME)
        self._process = process

    def connect(self, seconds: float | None, end: int) -> Channel:
        """Have the child take a session; start it before if need be."""
        return self._process.dial(end)

    def complaints(self) -> list[str]:
        """The lines that the child has logged after the last call."""
        return self._process.complaints()


def _take(control: socket.socket) -> Channel | None:
    """The child's side: the next session, None at the end."""
    data, fds = recv_fds(control, 1, 1)
    return Channel(socket.socket(fileno=fds[0])) if data else None


def hung_up(s: socket.socket) -> bool:
    """Whether the other end has gone, whatever can still be read."""
    poll = select.poll()
    poll.register(s.fileno(), 0)  # POLLHUP comes unasked
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def end_of(status: int) -> str:
    """How a child ended, in words."""
    if status == -signal.SIGSYS:
        return "it was killed (SIGSYS): it asked for a system call that it may not have"
    if status < 0:
        return f"it was killed ({signal.Signals(-status).name})"
    return f"ended with status {status}"


def follow(parent: int) -> bool:
    """In a process that ``parent`` has just forked: have the kernel kill this process when the
    parent ends. False if the parent has ended already, or the kernel refuses.
    """
    return not lib.pv_follow_parent(parent)


def tell_errors(log: Callable[[str], None]) -> None:
    """Log what ends a thread, in place of Python's own words, for which it would open the
    sources.
    """

    def tell(kind: type[BaseException], error: BaseException | None, frames: Any) -> None:
        log(f"{kind.__name__}: {error}")
        while frames is not None:
            code = frames.tb_frame.f_code
            log(f"  at {code.co_filename}:{frames.tb_lineno}, {code.co_qualname}")
            frames = frames.tb_next

    sys.excepthook = tell
    threading.excepthook = lambda args: tell(*args[:3])


def confine(log: Callable[[str], None], ioctls: Sequence[int] = ()) -> None:
    """Leave this process what it needs to serve on the descriptors that it has or is given: no
    file, no socket of its own, no program, no capability. Everything that it will run has been
    imported.

    :param ioctls: requests that it makes of its devices.
    """
    tell_errors(log)
    done = lib.pv_confine_process(list(ioctls), len(ioctls))
    if done < 0:
        log(f"it cannot be confined: {os.strerror(-done)}")


def serve(
    control_fd: int,
    name: str,
    mtu: int,
    features: int,
    poll_us: int,
    fds: list[int],
    prepare: Callable[[Callable[[str], None]], None] | None = None,
    faults_fd: int = -1,
) -> None:
    """The child's main function: serve on the tap of descriptors ``fds`` until the control socket
    is closed.

    :param poll_us: see ``BackendProcess``.
    :param prepare: called, with the log, when everything has been imported and made, and before
        there is another thread.
    :param faults_fd: of the socket of ``backend.faults``; -1: there are no faults on demand.
    """
    from pyvmm.backend.faults import answer
    from pyvmm.backend.net import NetService
    from pyvmm.backend.ports import LentTap
    from pyvmm.backend.server import Backend
    from pyvmm.datapath.impair import ImpairPoint

    control = socket.socket(fileno=control_fd)

    def log(line: str) -> None:
        try:
            control.send(line.encode()[:LINE_MAX], socket.MSG_DONTWAIT)
        except OSError:
            pass  # the parent has not taken a socketful of lines: it may do without another

    port = LentTap(name, [Fd(fd) for fd in fds], mtu, features)

    def stopped(problem: str) -> None:
        log(problem)
        os._exit(ThreadStopped.exit_code)  # at once: who knows what else is not ours any more

    impair = ImpairPoint()
    service = NetService(port, poll_us=poll_us, stopped=stopped, impair=impair)
    with Backend(service, log=log) as backend:
        if prepare is not None:
            prepare(log)
        if faults_fd >= 0:
            # Not before: capabilities and Landlock are of the thread that gives them up.
            asked = socket.socket(fileno=faults_fd)
            threading.Thread(
                target=answer, args=(asked, impair), name="faults", daemon=True
            ).start()
        control.send(READY)
        while True:
            channel = _take(control)
            if channel is None:
                return
            control.send(READY)
            try:
                backend.serve(channel)
            except PyvmmError as e:
                log(f"session ended: {e}")
            except BaseException as e:
                log(f"it dies of {type(e).__name__}: {e}")
                raise


if __name__ == "__main__":
    serve(
        int(sys.argv[1]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
        int(sys.argv[6]),
        [int(a) for a in sys.argv[7:]],
        confine,
        int(sys.argv[2]),
    )
