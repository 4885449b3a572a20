"""Runs jobs in processes of their own, several at a time, and takes from each what it sends, within
limits, whoever has the process by then.

Theory of operation. Another process, the starter, forks the processes of the jobs. It is forked
itself before this process has a thread, and never has one: so a job finds everything imported, and
no lock that nobody will release. The starter waits at a socket for jobs to start and processes to
kill, and tells which have ended. The process of a job has two descriptors of this one: a pipe for
what it sends, and a pipe as its standard error.

A job may run a guest that takes the process over. Then what the process sends is the guest's: bytes
within a limit, which the caller has to judge. Its time is bounded, too, by a kill from here. It has
no descriptor of the starter's and of other jobs.

The kernel kills the processes when the starter ends. The starter ends with this process, whose end
of the socket it watches.
"""

from __future__ import annotations

import _socket
import gc
import os
import select
import sys
import time

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import HostError
from pyvmm.fd import Closing, close_all_but
from pyvmm.hostnet.rights import close_all, recv_fds, send_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import NoReturn

    Send = Callable[[bytes], None]
    Body = Callable[[int, Send], None]
else:
    import _signal as signal  # without enumerations, which take long to make

#: Bytes that are kept of what a process writes to its standard error.
SAID_MAX = 1 << 16
#: Bytes of a message between this process and the starter.
MESSAGE_MAX = 64
#: poll(2) takes an int.
DAY_MS = 86_400_000.0


class Ended:
    """The end of a job's process.

    :ivar job: its number. :ivar data: what it has sent, as far as the limit.
    :ivar flood: whether it has sent more than the limit, and was killed for that.
    :ivar late: whether it was killed because its time was over.
    :ivar said: the beginning of what it has written to its standard error.
    :ivar status: its exit status, or minus the number of the signal that has ended it.
    :ivar problem: why there was no process; empty if there was one.
    :ivar seconds: from the start to the end.
    """

    def __init__(self, job: int) -> None:
        self.job, self.status, self.seconds = job, 0, 0.0
        self.data, self.said, self.problem = b"", b"", ""
        self.flood = self.late = False


class _Running:
    """A process as seen from here. Owns the ends of its pipes."""

    def __init__(self, job: int, out: int, err: int, seconds: float) -> None:
        self.end = Ended(job)
        self.out, self.err = out, err
        self.begin = time.monotonic()
        self.until = self.begin + seconds
        self.data = bytearray()

    @property
    def killed(self) -> bool:
        return self.end.flood or self.end.late


class Apart(Closing):
    """Runs jobs; ends all of them at ``close``.

    :param body: what the process of a job does: called there with the job's number and a function
        that sends bytes here. An exception of it goes to standard error, and the status is 1.
    :param most: bytes that a process may send.
    :param name: of each process, for ``ps``; at most 15 bytes.
    :ivar stopped: whether ``stop`` or ``close`` was called.
    :raises HostError: there can be no process.
    """

    def __init__(self, body: Body, *, most: int, name: bytes) -> None:
        self._most = most
        self.stopped = False
        self._running: dict[int, _Running] = {}
        self._poll = select.poll()
        gc.freeze()  # to look at what is here by now would part the pages that processes share
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
        return len(self._running)

    def start(self, job: int, seconds: float) -> None:
        """Start the process of a job; nothing after ``stop``.

        :param job: a number that no running job has. :param seconds: after which it is killed.
        :raises HostError: the starter has ended, or there are no descriptors.
        """
        pipes: list[int] = []
        try:
            for _ in range(2):
                pipes += os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            out, theirs, err, said = pipes
            os.set_blocking(theirs, True)  # but a full pipe loses words of standard error
            send_fds(self._channel, f"start {job}".encode(), (theirs, said))
        except OSError as e:
            close_all(pipes)
            if self.stopped:
                return
            raise HostError(
                f"cannot start a process for a job: {e.strerror}", "raise the limit: ulimit -n"
            ) from e
        close_all((theirs, said))
        self._running[job] = _Running(job, out, err, seconds)
        self._poll.register(out, select.POLLIN)

    def wait(self) -> Ended | None:
        """Wait until the process of a job has ended; None after ``stop``.

        :raises HostError: the starter has ended by itself.
        """
        while True:
            ready = {fd for fd, _ in self._poll.poll(self._patience())}
            for one in list(self._running.values()):
                if one.out in ready:
                    self._hear(one)
            if self._channel.fileno() in ready:
                return self._told()
            # What has come by now counts.
            now = time.monotonic()
            for one in self._running.values():
                if now >= one.until and not one.killed:
                    one.end.late = True
                    self._kill(one)

    def _patience(self) -> float | None:
        """Until the time of the next process is over; for poll(2)."""
        until = min((r.until for r in self._running.values() if not r.killed), default=None)
        if until is None:
            return None
        return min(max(until - time.monotonic(), 0) * 1000 + 1, DAY_MS)

    def _hear(self, one: _Running) -> None:
        """Take what a process has sent."""
        try:
            piece = os.read(one.out, 1 << 16)
        except BlockingIOError:
            return  # the process itself has read it
        one.data += piece
        if len(one.data) > self._most:
            one.end.flood = True
            del one.data[self._most :]
            self._kill(one)
            self._poll.unregister(one.out)  # but open, or the process may end of that by itself
        elif not piece:
            self._poll.unregister(one.out)
            os.close(one.out)
            one.out = -1

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
        while one.out >= 0 and not one.end.flood:
            before = len(one.data)
            self._hear(one)
            if len(one.data) == before:
                break  # it keeps its own pipe open
        end = one.end
        if what == "ended":
            end.status = int(number)
        else:
            end.problem = os.strerror(int(number))
        end.data, end.seconds = bytes(one.data), time.monotonic() - one.begin
        try:
            end.said = os.read(one.err, SAID_MAX)
        except BlockingIOError:
            pass
        self._release(one)
        return end

    def _release(self, one: _Running) -> None:
        if one.out >= 0:
            if not one.end.flood:
                self._poll.unregister(one.out)
            os.close(one.out)
        os.close(one.err)

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
            self._release(self._running.popitem()[1])


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
        except BrokenPipeError:
            pass  # the other end is closed
        finally:
            for _, pid in self._children.values():
                os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is its own
            for _, pid in self._children.values():
                os.waitpid(pid, 0)

    def _asked(self) -> bool:
        """Do what the next message says; False at the end."""
        data, fds = _received(self._channel)
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
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _ended(self, child: int) -> None:
        self._poll.unregister(child)
        os.close(child)
        job, pid = self._children.pop(child)
        _, status = os.waitpid(pid, 0)
        self._tell("ended", job, os.waitstatus_to_exitcode(status))

    def _tell(self, what: str, job: int, number: int) -> None:
        send_fds(self._channel, f"{what} {job} {number}".encode())
