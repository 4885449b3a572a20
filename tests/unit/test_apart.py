"""Processes apart: what comes of them, whatever they do, and that none is left."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm import apart
from pyvmm.apart import Apart, Ended
from pyvmm.errors import HostError
from tests.driver import wait_for

ROOT = Path(__file__).parents[2]
LONG = 600.0  # seconds that no test waits for
MOST = 1 << 20
Send = Callable[[bytes], None]
Body = Callable[[int, Send], None]


def end_of(body: Body, seconds: float = LONG) -> Ended:
    """The end of one process."""
    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(7, seconds)
        end = jobs.wait()
        assert end is not None and (end.job, jobs.running) == (7, 0)
        return end


def descriptors() -> Iterator[tuple[int, str]]:
    """Those of this process, and what they are."""
    for path in sorted(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # that of the directory itself
            yield int(path.name), str(path.readlink())


def forever() -> None:
    while True:
        signal.pause()


def no_room(job: int, send: Send) -> None:
    raise apart.Scarce


def unread(jobs: Apart, job: int = 0) -> int:
    """Bytes that a process has sent, and that nobody has read."""
    count = bytearray(4)
    fcntl.ioctl(jobs._running[job].out.fd, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def test_what_a_process_sends_is_heard_while_it_runs(tmp_path: Path) -> None:
    """All of it, once, in its order; and the process goes on after it was heard only."""
    heard: dict[int, bytes] = {}
    seen = tmp_path / "seen"

    def body(job: int, send: Send) -> None:
        send(b"one")
        assert wait_for(seen.exists)
        send(b"two" * job)

    def hear(job: int, data: bytes) -> None:
        heard[job] = heard.get(job, b"") + data
        seen.touch()

    with Apart(body, most=MOST, name=b"apart", heard=hear) as jobs:
        for job in (1, 100_000):
            jobs.start(job, LONG)
        ends = [jobs.wait() for _ in range(2)]
    assert {end.job: end.data for end in ends if end} == heard
    assert heard == {1: b"onetwo", 100_000: b"one" + b"two" * 100_000}


def test_what_is_too_much_is_not_heard() -> None:
    heard = bytearray()

    def body(job: int, send: Send) -> None:
        while True:
            send(b"x" * 9999)

    with Apart(body, most=MOST, name=b"apart", heard=lambda _, data: heard.extend(data)) as jobs:
        jobs.start(7, LONG)
        end = jobs.wait()
    assert end is not None and end.flood and end.data == bytes(heard) == b"x" * MOST


def test_nothing_is_waited_for_after_the_end() -> None:
    with Apart(lambda number, send: None, most=MOST, name=b"apart") as jobs:
        jobs.close()
        jobs.start(1, 60.0)
        assert jobs.wait() is None


def test_several_at_a_time() -> None:
    """Each with its own number and bytes, in the order of their ends."""

    def body(job: int, send: Send) -> None:
        send(b"begin ")
        send(b"%d " % job * 100_000)  # more than a pipe holds

    with Apart(body, most=MOST, name=b"apart") as jobs:
        for job in range(3):
            jobs.start(job, LONG)
        ends = [jobs.wait() for _ in range(3)]
    found = {end.job: end for end in ends if end is not None}
    assert sorted(found) == [0, 1, 2]
    for job, end in found.items():
        assert end.data == b"begin " + b"%d " % job * 100_000
        assert (end.status, end.said, end.problem) == (0, b"", "")
        assert not end.late and not end.flood


def test_too_much() -> None:
    def body(job: int, send: Send) -> None:
        while True:
            send(bytes(1 << 16))

    end = end_of(body)
    assert end.flood and not end.late and end.status == -signal.SIGKILL
    assert len(end.data) == MOST


def test_too_much_at_the_end() -> None:
    """The process has ended by itself before all of it was read."""
    end = end_of(lambda job, send: send(bytes(MOST + 1)))
    assert end.flood and len(end.data) == MOST


@pytest.mark.parametrize("stopped", [False, True])
def test_silence(stopped: bool) -> None:
    """Also of a process that does not run, which no signal but SIGKILL ends."""

    def body(job: int, send: Send) -> None:
        send(b"some")
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        forever()

    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        assert wait_for(lambda: unread(jobs) == 4)
        jobs._running[0].until = time.monotonic()
        end = jobs.wait()
    assert end is not None and end.late and not end.flood
    assert (end.status, end.data) == (-signal.SIGKILL, b"some")


def test_what_has_come_by_then_is_kept() -> None:
    """The process ends before its time, and somebody waits for it after that."""
    with Apart(lambda job, send: send(b"all"), most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        jobs._running[0].until = 0.0
        assert wait_for(lambda: select.select([jobs._channel], [], [], 0)[0])
        end = jobs.wait()
    assert end is not None and (end.data, end.status, end.late) == (b"all", 0, False)


class Clock:
    """The time, for a process that may have been away."""

    def __init__(self) -> None:
        self.away = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.away


class StoppedPoll:
    """As ``select.poll``, in a process that is stopped while it waits, for once."""

    def __init__(self, real: select.poll, clock: Clock) -> None:
        self._real, self._clock = real, clock
        self.unregister = real.unregister

    def poll(self, patience: float | None) -> list[tuple[int, int]]:
        ready = self._real.poll(patience)
        self._clock.away = 2 * LONG
        return ready


@pytest.mark.parametrize("when", ["before", "in between"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_caller_that_was_away(monkeypatch: pytest.MonkeyPatch, when: str, ends: bool) -> None:
    """A process that had to wait for its reader has time to send the rest, but not for ever."""

    def body(job: int, send: Send) -> None:
        send(bytes(MOST))
        if not ends:
            forever()

    clock = Clock()
    monkeypatch.setattr(apart, "time", clock)
    monkeypatch.setattr(apart, "GRACE", LONG / 2 if ends else 0.5)
    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        # It waits for a reader.
        assert wait_for(lambda: unread(jobs) > 0 and state(pids(jobs)[1]) == "S")
        assert unread(jobs) < MOST
        if when == "before":
            clock.away = 2 * LONG
        else:
            monkeypatch.setattr(jobs, "_poll", StoppedPoll(jobs._poll, clock))
        end = jobs.wait()
    assert end is not None and end.late is not ends
    if ends:
        assert (len(end.data), end.status) == (MOST, 0)


def test_a_process_that_ends_just_before_it_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has ended by itself, and was not late."""

    def body(job: int, send: Send) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(0))
        send(b"all")
        forever()

    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        assert wait_for(lambda: unread(jobs) == 3)
        starter, pid = pids(jobs)
        kill = jobs._kill

        def late_kill(one: apart._Running) -> None:
            kill(one)
            os.kill(starter, signal.SIGCONT)

        monkeypatch.setattr(jobs, "_kill", late_kill)
        os.kill(starter, signal.SIGSTOP)
        assert wait_for(lambda: state(starter) == "T")
        os.kill(pid, signal.SIGUSR1)
        assert wait_for(lambda: state(pid) == "Z")
        jobs._running[0].until = time.monotonic()
        end = jobs.wait()
    assert end is not None and (end.data, end.status, end.late) == (b"all", 0, False)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (lambda job, send: os._exit(3), 3, b""),
        (lambda job, send: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV, b""),
        (lambda job, send: 1 // 0, 1, b"ZeroDivisionError: integer division or modulo by zero\n"),
        (lambda job, send: sys.exit("why"), 1, b"SystemExit: why\n"),
        (no_room, os.EX_TEMPFAIL, b""),
    ],
)
def test_other_ends(body: Body, status: int, said: bytes) -> None:
    end = end_of(body)
    assert end.status == status and end.scarce is (body is no_room)
    assert end.said.endswith(said) and bool(end.said) == bool(said)


def test_a_caller_that_ignores_the_ends_of_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert end_of(lambda job, send: os._exit(3)).status == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_words_without_end() -> None:
    """A process may say as much as it wants; the end of that is kept, which says why it died."""

    def body(job: int, send: Send) -> None:
        for number in range(20_000):
            print(f"{number:99}", file=sys.stderr)
        send(b"all")
        raise KeyError("the last word")

    end = end_of(body)
    assert (end.status, end.data, len(end.said)) == (1, b"all", apart.SAID_MAX)
    assert b" 19999\nTraceback" in end.said and end.said.endswith(b"KeyError: 'the last word'\n")


def test_a_process_that_closes_its_pipes() -> None:
    """That is not yet its end, and what it has sent before counts."""

    def body(job: int, send: Send) -> None:
        signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(3))
        send(b"%d" % job)
        if not job:
            os.closerange(2, 100)
            forever()

    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        pid = pids(jobs)[1]
        assert wait_for(lambda: not any(Path(f"/proc/{pid}/fd").glob("[2-9]")))
        jobs.start(1, LONG)
        other = jobs.wait()
        os.kill(pid, signal.SIGUSR1)
        end = jobs.wait()
    assert other is not None and (other.job, other.data) == (1, b"1")
    assert end is not None and (end.job, end.data, end.said, end.status) == (0, b"0", b"", 3)


def test_what_was_sent_stays_sent() -> None:
    """A process that reads what it writes to, opens it again or shuts it down, takes nothing back,
    however late somebody else reads.
    """

    def body(job: int, send: Send) -> None:
        send(b"first")
        for number, _ in descriptors():
            for flags in (os.O_RDONLY, os.O_RDWR):
                with contextlib.suppress(OSError):
                    own = os.open(f"/proc/self/fd/{number}", flags | os.O_NONBLOCK)
                    os.read(own, 100)
            with contextlib.suppress(OSError):
                os.set_blocking(number, False)
                os.read(number, 100)
        send(b" and last")
        for number, _ in descriptors():
            with contextlib.suppress(OSError):
                socket.socket(fileno=number).shutdown(socket.SHUT_RDWR)

    with Apart(body, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        assert select.select([jobs._channel], [], [], LONG)[0]  # the process has ended
        end = jobs.wait()
    assert end is not None and (end.data, end.status, end.said) == (b"first and last", 0, b"")


def test_a_process_that_sends_descriptors() -> None:
    """Also its own end: nobody gets them, and nobody waits for it to be closed."""

    def body(job: int, send: Send) -> None:
        out = next(number for number, _ in descriptors() if number > 2)
        own = socket.socket(fileno=out)
        own.sendmsg(
            [b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, out.to_bytes(4, sys.byteorder))]
        )

    before = set(descriptors())
    end = end_of(body)
    assert (end.data, end.status) == (b"x", 0)
    assert set(descriptors()) == before


def test_nobody_looks_at_a_process() -> None:
    """Others of its user, as the processes of other jobs, cannot open what it has."""

    def body(job: int, send: Send) -> None:
        send(b"%d" % ctypes.CDLL(None).prctl(3))  # PR_GET_DUMPABLE

    assert end_of(body).data == b"0"
    assert ctypes.CDLL(None).prctl(3) == 1  # the caller is as it was


def test_what_a_process_has() -> None:
    """Standard input and output lead nowhere; nothing of the caller's and of the starter's."""
    read, write = os.pipe()

    def body(job: int, send: Send) -> None:
        for number, target in descriptors():
            send(f"{number}={target.partition(':')[0]} ".encode())
        ignored = [signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGTERM)]
        send(f"{ignored} {os.getsid(0) == os.getppid()} ".encode())
        send(Path("/proc/self/comm").read_bytes())

    end = end_of(body)
    os.close(read)
    os.close(write)
    *fds, _, _, session, name = end.data.decode().split()
    links = dict(word.split("=") for word in fds)
    assert links.pop("0") == links.pop("1") == "/dev/null"
    assert links.pop("2") == "pipe" and list(links.values()) == ["socket"]
    assert "[True, True] True" in end.data.decode() and (session, name) == ("True", "apart")


def test_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The starter cannot fork: it says why, and goes on."""
    fork, forks = os.fork, [0]

    def limited() -> int:
        forks[0] += 1
        if forks[0] == 2:  # 1 is the starter
            raise BlockingIOError(errno.EAGAIN, "no")
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    with Apart(lambda job, send: None, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        first = jobs.wait()
        jobs.start(1, LONG)
        second = jobs.wait()
    assert first is not None and first.problem == os.strerror(errno.EAGAIN) and first.scarce
    assert second is not None and not second.problem and not second.scarce


@pytest.mark.parametrize("where", ["here", "in the starter"])
def test_no_descriptors(where: str) -> None:
    """``wait`` says so, and once there are some again, all goes on."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    def limit(pid: int, most: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))

    with Apart(lambda job, send: None, most=MOST, name=b"apart") as jobs:
        pid = 0 if where == "here" else jobs._pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
        jobs.start(0, LONG)
        jobs.wait()  # the starter is ready
        try:
            limit(pid, 3)
            jobs.start(0, LONG)
            assert jobs.running == 1
            first = jobs.wait()
        finally:
            limit(pid, before)
        jobs.start(1, LONG)
        second = jobs.wait()
        assert not jobs.running
    assert first is not None and first.job == 0 and first.scarce
    assert first.problem == "Too many open files; raise the limit: ulimit -n"
    assert second is not None and (second.job, second.problem, second.status) == (1, "", 0)


def test_nothing_stays_frozen() -> None:
    """The collector of the caller's garbage goes on as before."""
    before = gc.get_freeze_count()
    with Apart(lambda job, send: None, most=MOST, name=b"apart"):
        assert gc.get_freeze_count() == before


def test_a_caller_that_leaves_a_message_unread() -> None:
    """The starter, which has another one to send, ends without a word."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    starter = apart._Starter(theirs, lambda job, send: None, b"apart")
    read, write = os.pipe()
    starter._start(0, [write, write])
    os.close(write)
    starter._poll.unregister(theirs)
    starter._poll.register(theirs, select.POLLIN)  # behind the process, which is attended first
    ((child, (_, pid)),) = starter._children.items()
    assert wait_for(lambda: select.select([child], [], [], 0)[0])
    starter._tell("ended", 1, 0)
    ours.close()
    starter.serve()
    theirs.close()
    os.close(read)
    assert not Path(f"/proc/{pid}").exists()


def test_no_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(descriptors())

    def none() -> int:
        raise BlockingIOError(errno.EAGAIN, "no more")

    monkeypatch.setattr(os, "fork", none)
    with pytest.raises(HostError, match="cannot start a process for jobs: no more"):
        Apart(lambda job, send: None, most=MOST, name=b"apart")
    assert set(descriptors()) == before


def send_pid(job: int, send: Send) -> None:
    send(f"{os.getpid()}\n".encode())
    forever()


def pids(jobs: Apart) -> list[int]:
    """The starter and its children, once there are as many of them as jobs."""

    def children() -> list[int]:
        path = Path(f"/proc/{jobs._pid}/task/{jobs._pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    assert wait_for(lambda: len(children()) == jobs.running)
    return [jobs._pid, *children()]


def gone(processes: list[int]) -> bool:
    """None of them runs. A zombie is its parent's, which may be init."""
    for pid in processes:
        try:
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                return False
        except (FileNotFoundError, ProcessLookupError):
            pass
    return True


def test_the_end_leaves_nothing() -> None:
    """Nor a stopped process; a second end does nothing."""
    jobs = Apart(send_pid, most=MOST, name=b"apart")
    for job in range(3):
        jobs.start(job, LONG)
    processes = pids(jobs)
    os.kill(processes[1], signal.SIGSTOP)
    jobs.close()
    jobs.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_starter_that_is_killed() -> None:
    """Its children end with it, and the caller is told."""
    with Apart(send_pid, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        processes = pids(jobs)
        os.kill(jobs._pid, signal.SIGKILL)
        with pytest.raises(HostError, match="starter has ended"):
            jobs.wait()
        assert wait_for(lambda: gone(processes[1:]))
        with pytest.raises(HostError, match="cannot start a process"):
            jobs.start(1, LONG)


def test_another_thread_stops_it() -> None:
    with Apart(send_pid, most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        processes = pids(jobs)
        thread = threading.Timer(0.1, jobs.stop)
        thread.start()
        assert jobs.wait() is None and jobs.stopped
        thread.join()
        jobs.start(1, LONG)
        assert jobs.running == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


KILLED = """
import signal
from pyvmm.apart import Apart
def body(job, send):
    while True:
        signal.pause()
jobs = Apart(body, most=1, name=b"apart")
jobs.start(0, 600)
jobs.start(1, 600)
print(jobs._pid, flush=True)
jobs.wait()
"""


def test_a_caller_that_is_killed() -> None:
    """The starter and the processes end with it."""
    argv = [sys.executable, "-c", KILLED]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        starter = int(caller.stdout.readline())
        children = Path(f"/proc/{starter}/task/{starter}/children")
        assert wait_for(lambda: len(children.read_text().split()) == 2)
        processes = [starter, *map(int, children.read_text().split())]
        caller.kill()
    assert wait_for(lambda: gone(processes))


def test_what_a_job_has_started_ends_too(tmp_path: Path) -> None:
    """Before ``close`` returns: whatever ends by itself once the job has gone, and whatever does
    not.
    """
    note = tmp_path / "pids"

    def body(job: int, send: Send) -> None:
        ours, theirs = os.pipe()
        for stubborn in (False, True):
            if not os.fork():
                os.close(theirs)
                with note.open("a") as f:
                    f.write(f"{os.getpid()}\n")
                os.read(ours, 1)  # until the job has ended
                while stubborn:
                    signal.pause()
                time.sleep(0.2)
                os._exit(0)
        while note.read_text().count("\n") < 2:
            time.sleep(0.01)
        send(b"x")
        forever()

    note.write_text("")
    before = apart.PARTING
    apart.PARTING = 1.0
    try:
        with Apart(body, most=MOST, name=b"apart") as jobs:
            jobs.start(0, LONG)
            assert wait_for(lambda: unread(jobs) == 1)
    finally:
        apart.PARTING = before
    pids = note.read_text().split()
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def lives(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return state(int(pid)) != "Z"
    return False


def test_orphans_do_not_pile_up() -> None:
    """Of jobs that have ended before: their children, too, are waited for."""

    def body(job: int, send: Send) -> None:
        ours, theirs = os.pipe()
        if not os.fork():
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)

    with Apart(body, most=MOST, name=b"apart") as jobs:
        starter = Path(f"/proc/{jobs._pid}/task/{jobs._pid}/children")
        for job in range(5):
            jobs.start(job, LONG)
            assert jobs.wait() is not None
            children = starter.read_text().split()
            assert len(children) <= 1, "those of the jobs before are gone"
            assert wait_for(lambda: not any(lives(pid) for pid in children))  # noqa: B023
