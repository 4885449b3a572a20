"""Runs jobs in processes of their own, several at a time, and takes from each what it sends, within
limits, whoever has the process by then.

Theory of operation. Another process, the starter, forks the processes of the jobs. It is forked
itself before this process has a thread, and never has one: so a job finds everything imported, and
no lock that nobody will release. The starter waits at a socket for jobs to start and processes to
kill, and tells which have ended. The process of a job has two descriptors of this one: a socket for
what it sends, and a pipe as its standard error.

A job may run a guest that takes the process over. Then what the process sends is the guest's: bytes
within a limit, which the caller has to judge. But what the process has sent before, stays as it
was, whether it has been read or not: nobody can open the other end of a socket by its name in
/proc, as that of a pipe. The time of a process is bounded, too, by a kill from here. It has no
descriptor of the starter's and of other jobs. It can make threads until the host has no room for
another process or thread: then the end of another job says so (``scarce``), and the caller may
start that job again when a process has ended.

The starter and the processes of jobs hide what they have from others of their user, as from each
other (``pv_be_seen``).

The kernel kills the processes when the starter ends. The starter ends with this process, whose end
of the socket it watches. What a job has started, such as a helper or a back-end, ends by itself
when it finds the job gone. The starter adopts it then, and at the end waits for it.
"""

from __future__ import annotations

import _socket
import errno
import gc
import os
import select
import sys
import time
from collections import deque
from contextlib import suppress

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import HostError
from pyvmm.fd import Closing, close_all_but
from pyvmm.hostnet.rights import RightsLost, close_all, recv_fds, send_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import NoReturn

    Send = Callable[[bytes], None]
    Body = Callable[[int, Send], None]
    Heard = Callable[[int, bytes], None]
else:
    import _signal as signal  # without enumerations, which take long to make

#: Bytes that are kept of what a process writes to its standard error.
SAID_MAX = 1 << 16
#: Bytes that are read at once; and that a pipe has at most, unless root has made it larger.
PIECE, PIPE_MAX = 1 << 16, 1 << 20
#: Seconds that a process has at least for its end once somebody reads what it sends again.
GRACE = 10.0
#: Seconds that what jobs have started has for its end, before it is killed.
PARTING = 20.0
#: What a system call answers if there may be room once another process has ended.
SCARCE = (
    *(errno.EAGAIN, errno.ENOMEM, errno.ENOBUFS),
    *(errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS),
)
#: Bytes of a message between this process and the starter.
MESSAGE_MAX = 64
#: poll(2) takes an int.
DAY_MS = 86_400_000.0


class Ended:
    """The end of a job's process.

    :ivar job: its number. :ivar data: what it has sent, as far as the limit.
    :ivar flood: whether it has sent more than the limit, and was killed for that.
    :ivar late: whether it was killed because its time was over.
    :ivar said: the end of what it has written to its standard error, at most SAID_MAX bytes.
    :ivar status: its exit status, or minus the number of the signal that has ended it.
    :ivar problem: why there was no process; empty if there was one.
    :ivar scarce: whether the job may do better once another process has ended: there was no room
        for a process, or the process says so, which is not to be trusted.
    :ivar seconds: from the start to the end.
    """

    def __init__(self, job: int) -> None:
        self.job, self.status, self.seconds = job, 0, 0.0
        self.data, self.said, self.problem = b"", b"", ""
        self.flood = self.late = self.scarce = False

    def fail(self, number: int) -> None:
        """There was no process, because of the error ``number`` of errno(3)."""
        self.problem = os.strerror(number)
        self.scarce = number in SCARCE
        if number == errno.EMFILE:
            self.problem += "; raise the limit: ulimit -n"


class Scarce(Exception):
    """Raised by a body, in the process of a job: the host has no room for what the job needs."""


class _Ear(Closing):
    """The end of a socket or a pipe at which a process is heard. Owns it.

    :ivar fd: -1 once the other end is closed. :ivar data: what has come, and is kept.
    """

    def __init__(self, fd: int, poll: select.poll) -> None:
        self.fd, self._poll = fd, poll
        self._heard = True
        self.data = bytearray()
        poll.register(fd, select.POLLIN)

    def read(self) -> bool:
        """Take what is there; returns whether there was anything."""
        try:
            piece = os.read(self.fd, PIECE)
        except BlockingIOError:
            return False  # nothing more by now
        self.data += piece
        if not piece:
            self.close()
        return bool(piece)

    def ignore(self) -> None:
        """Hear no more; but open, or the process may end of that by itself."""
        if self._heard:
            self._heard = False
            self._poll.unregister(self.fd)

    def close(self) -> None:
        """Release the end. A second call does nothing."""
        if self.fd >= 0:
            self.ignore()
            os.close(self.fd)
            self.fd = -1


class _Running:
    """A process as seen from here. Owns the ends of its socket and its pipe.

    :ivar until: when its time is over.
    """

    def __init__(self, job: int, out: _Ear, err: _Ear, seconds: float) -> None:
        self.end = Ended(job)
        self.out, self.err = out, err
        self.begin = time.monotonic()
        self.until = self.begin + seconds

    @property
    def killed(self) -> bool:
        return self.end.flood or self.end.late

    def close(self) -> None:
        self.out.close()
        self.err.close()


class Apart(Closing):
    """Runs jobs; ends all of them at ``close``.

    :param body: what the process of a job does: called there with the job's number and a function
        that sends bytes here. An exception of it goes to standard error, and the status is 1; but
        ``Scarce`` is told in silence.
    :param most: bytes that a process may send.
    :param name: of each process, for ``ps``; at most 15 bytes.
    :param heard: called in ``wait`` with a job's number and the next bytes that its process has
        sent, within the limit, as they come; raises nothing. ``wait`` returns all of them at the
        end, too.
    :ivar stopped: whether ``stop`` or ``close`` was called.
    :raises HostError: there can be no process.
    """

    def __init__(self, body: Body, *, most: int, name: bytes, heard: Heard | None = None) -> None:
        self._most, self._heard = most, heard
        self.stopped = False
        self._running: dict[int, _Running] = {}
        self._failed: deque[Ended] = deque()  # without a process; ``wait`` will tell
        self._poll = select.poll()
        self._attended = time.monotonic()  # when ``wait`` has looked last
        ends: tuple[_socket.socket, ...] = ()
        try:
            ends = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
            self._pid = os.fork()
        except OSError as e:
            for end in ends:
                end.close()
            raise HostError(f"cannot start a process for jobs: {e.strerror}") from e
        self._channel, theirs = ends
        if not self._pid:
            _be_starter(theirs, body, name)
        theirs.close()
        self._poll.register(self._channel, select.POLLIN)

    @property
    def running(self) -> int:
        """The number of jobs that have been started, and whose ends ``wait`` has not told."""
        return len(self._running) + len(self._failed)

    def start(self, job: int, seconds: float) -> None:
        """Start the process of a job; nothing after ``stop``. If there can be no process, ``wait``
        says so.

        :param job: a number that no running job has. :param seconds: after which it is killed.
        :raises HostError: the starter has ended.
        """
        ends: list[int] = []
        try:
            pair = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            ends += (end.detach() for end in pair)
            ends += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            out, theirs, err, said = ends
            os.set_blocking(out, False)
            os.set_blocking(said, True)
            send_fds(self._channel, f"start {job}".encode(), (theirs, said))
        except OSError as e:
            close_all(ends)
            if self.stopped:
                return
            if e.errno not in SCARCE:
                what = f"cannot start a process for a job: {e.strerror}"
                raise HostError(what, "the host's memory may have run out") from e
            self._failed.append(Ended(job))
            self._failed[-1].fail(e.errno)
            return
        close_all((theirs, said))
        self._running[job] = _Running(job, _Ear(out, self._poll), _Ear(err, self._poll), seconds)

    def wait(self) -> Ended | None:
        """Wait until the process of a job has ended; None after ``stop``.

        The time in which nobody waits here, or in which this process is stopped, delays a process
        that has much to send. So it does not count, but for what is more than ``GRACE``.

        :raises HostError: the starter has ended by itself.
        """
        if self._failed:
            return None if self.stopped else self._failed.popleft()
        while self._channel.fileno() >= 0:
            ready = self._ready()
            for one in list(self._running.values()):
                if one.out.fd in ready:
                    self._hear(one)
                if one.err.fd in ready:
                    _listen(one)
            if self._channel.fileno() in ready:
                return self._told()
            # What has come by now counts.
            for one in self._running.values():
                if self._attended >= one.until and not one.killed:
                    one.end.late = True
                    self._kill(one)
        return None  # after ``close``

    def _ready(self) -> set[int]:
        """Wait for descriptors, or for the end of the next process's time."""
        begin = time.monotonic()
        patience = self._patience(begin)
        ready = {fd for fd, _ in self._poll.poll(patience)}
        now = time.monotonic()
        late = 0.0 if patience is None else max(now - begin - patience / 1000, 0)
        for one in self._running.values():
            away = begin - max(self._attended, one.begin) + late
            one.until = max(one.until, min(one.until + away, now + GRACE))
        self._attended = now
        return ready

    def _patience(self, now: float) -> float | None:
        """Until the time of the next process is over; for poll(2)."""
        until = min((r.until for r in self._running.values() if not r.killed), default=None)
        if until is None:
            return None
        return min(max(until - now, 0) * 1000 + 1, DAY_MS)

    def _hear(self, one: _Running) -> bool:
        """Take what a process has sent; whether there was anything, within the limit."""
        known = len(one.out.data)
        some = one.out.read()
        if len(one.out.data) > self._most:
            one.end.flood = True
            del one.out.data[self._most :]
            self._kill(one)
            one.out.ignore()
        if self._heard is not None and len(one.out.data) > known:
            self._heard(one.end.job, bytes(one.out.data[known:]))
        return some and not one.end.flood

    def _kill(self, one: _Running) -> None:
        try:
            send_fds(self._channel, f"kill {one.end.job}".encode())
        except OSError:
            pass  # the starter has ended, and the process with it, which ``wait`` will find

    def _told(self) -> Ended | None:
        """What the starter says: an end; None after ``stop``."""
        data = _received(self._channel)[0]
        if not data:
            if self.stopped:
                return None
            raise HostError("pyvmm's starter has ended", "the host's memory may have run out")
        what, job, number = data.decode().split()
        one = self._running.pop(int(job))
        end = one.end
        while not end.flood and one.out.fd >= 0 and self._hear(one):
            pass
        for _ in range(PIPE_MAX // PIECE):  # a process of its own may go on to write
            if one.err.fd < 0 or not _listen(one):
                break
        if what == "ended":
            end.status = int(number)
            # Else it has ended by itself before it could be killed.
            end.late = end.late and end.status == -signal.SIGKILL
            end.scarce = end.status == os.EX_TEMPFAIL
        else:
            end.fail(int(number))
        end.data, end.said = bytes(one.out.data), bytes(one.err.data)
        end.seconds = time.monotonic() - one.begin
        one.close()
        return end

    def stop(self) -> None:
        """Kill all processes, and start no more. Any thread; does not wait."""
        self.stopped = True
        try:
            self._channel.shutdown(_socket.SHUT_RDWR)
        except OSError:
            pass  # closed, or the starter has ended

    def close(self) -> None:
        """Kill all processes; returns when none is left. A second call does nothing."""
        self.stopped = True
        self._channel.close()
        pid, self._pid = self._pid, 0
        if pid:
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass  # whoever uses this library ignores SIGCHLD
        while self._running:
            self._running.popitem()[1].close()
        self._failed.clear()


def _listen(one: _Running) -> bool:
    """Take what a process has written to its standard error; whether there was anything."""
    some = one.err.read()
    del one.err.data[:-SAID_MAX]
    return some


def _received(channel: _socket.socket) -> tuple[bytes, list[int]]:
    """The next message and its descriptors; empty if the other end is closed."""
    try:
        return recv_fds(channel, MESSAGE_MAX, 2)
    except ConnectionResetError:  # by an end that has left a message unread
        return b"", []


# --- the starter ----------------------------------------------------------------------------------


def _be_starter(channel: _socket.socket, body: Body, name: bytes) -> NoReturn:
    status = 1
    try:
        helper.withdraw(b"pyvmm-starter")
        gc.freeze()  # to look at what is here by now would part the pages that processes share
        lib.pv_be_seen(False)  # nor its children
        lib.pv_adopt_orphans()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it has no statuses
        close_all_but((channel.fileno(),))
        _Starter(channel, body, name).serve()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


class _Starter:
    def __init__(self, channel: _socket.socket, body: Body, name: bytes) -> None:
        self._channel, self._body, self._name = channel, body, name
        self._pid = os.getpid()
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> job, process id
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)

    def serve(self) -> None:
        """Do what is asked until the other end of the socket is closed; then kill all processes."""
        try:
            while True:
                for fd, _ in self._poll.poll():
                    if fd != self._channel.fileno():
                        self._ended(fd)
                    elif not self._asked():
                        return
        except ConnectionError:
            pass  # the other end is closed, whether or not it has left a message unread
        finally:
            for _, pid in self._children.values():
                os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is its own
            for _, pid in self._children.values():
                os.waitpid(pid, 0)
            _wait_for_orphans()

    def _asked(self) -> bool:
        """Do what the next message says; False at the end."""
        try:
            data, fds = _received(self._channel)
        except RightsLost as e:
            self._tell("failed", int(e.data.split()[1]), errno.EMFILE)
            return True
        if not data:
            return False
        what, number = data.decode().split()
        try:
            if what == "start":
                self._start(int(number), fds)
        finally:
            close_all(fds)
        for job, pid in self._children.values() if what == "kill" else ():
            if job == int(number):
                os.kill(pid, signal.SIGKILL)
        return True

    def _start(self, job: int, fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as e:
            return self._tell("failed", job, e.errno or 0)
        if not pid:
            self._be_job(job, *fds)
        try:
            child = os.pidfd_open(pid)
        except OSError as e:  # there is no free descriptor
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return self._tell("failed", job, e.errno or 0)
        self._children[child] = job, pid
        self._poll.register(child, select.POLLIN)
        return None

    def _be_job(self, job: int, out: int, err: int) -> NoReturn:
        status = 1
        try:
            if lib.pv_follow_parent(self._pid):
                os._exit(status)
            os.dup2(err, 2)
            sys.stderr = sys.__stderr__ or sys.stderr  # whatever a caller has put there
            close_all_but((out,))
            lib.pv_thread_name(self._name)

            def send(data: bytes) -> None:
                view = memoryview(data)
                while view:
                    view = view[os.write(out, view) :]

            self._body(job, send)
            status = 0
        except Scarce:
            status = os.EX_TEMPFAIL
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _ended(self, child: int) -> None:
        self._poll.unregister(child)
        os.close(child)
        job, pid = self._children.pop(child)
        _, status = os.waitpid(pid, 0)
        self._bury()
        self._tell("ended", job, os.waitstatus_to_exitcode(status))

    def _bury(self) -> None:
        """Let go of what jobs have started and has ended, but of no job: its own event comes."""
        jobs = [pid for _, pid in self._children.values()]
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or found.si_pid in jobs:
                return
            os.waitpid(found.si_pid, 0)

    def _tell(self, what: str, job: int, number: int) -> None:
        send_fds(self._channel, f"{what} {job} {number}".encode())


def _wait_for_orphans() -> None:
    """Wait for the children of this process, which have nobody left to work for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    until = time.monotonic() + PARTING
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        left = until - time.monotonic()
        if not pid and left > 0:
            signal.sigtimedwait((signal.SIGCHLD,), left)
        elif not pid and left < -PARTING:
            return  # the kernel does not let go of them
        elif not pid:
            for child in _children():
                os.kill(child, signal.SIGKILL)
            signal.sigtimedwait((signal.SIGCHLD,), 1)


def _children() -> list[int]:
    """The children of this process."""
    found, me = [], str(os.getpid()).encode()
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                with suppress(OSError), open(f"{entry.path}/stat", "rb") as f:
                    if f.read().rpartition(b")")[2].split()[1] == me:
                        found.append(int(entry.name))
    return found
