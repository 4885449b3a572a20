"""Processes apart: what comes of them, whatever they do, and that none is left."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
import threading
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

    end = end_of(body, 0.2)
    assert end.late and not end.flood
    assert (end.status, end.data) == (-signal.SIGKILL, b"some")


def test_what_has_come_by_then_is_kept() -> None:
    """The process ends before its time, and somebody waits for it after that."""
    with Apart(lambda job, send: send(b"all"), most=MOST, name=b"apart") as jobs:
        jobs.start(0, LONG)
        jobs._running[0].until = 0.0
        assert wait_for(lambda: select.select([jobs._channel], [], [], 0)[0])
        end = jobs.wait()
    assert end is not None and (end.data, end.status, end.late) == (b"all", 0, False)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (lambda job, send: os._exit(3), 3, b""),
        (lambda job, send: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV, b""),
        (lambda job, send: 1 // 0, 1, b"ZeroDivisionError: integer division or modulo by zero\n"),
        (lambda job, send: sys.exit("why"), 1, b"SystemExit: why\n"),
    ],
)
def test_other_ends(body: Body, status: int, said: bytes) -> None:
    end = end_of(body)
    assert end.status == status
    assert end.said.endswith(said) and bool(end.said) == bool(said)


def test_a_caller_that_ignores_the_ends_of_children() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert end_of(lambda job, send: os._exit(3)).status == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_words_without_end() -> None:
    """What standard error takes is limited, and a process that has more to say does not wait."""

    def body(job: int, send: Send) -> None:
        for _ in range(1000):
            try:
                os.write(2, b"x" * 1000)
            except BlockingIOError:
                send(b"full")
                return

    end = end_of(body)
    assert (end.status, end.data) == (0, b"full")
    assert end.said.startswith(b"xxx") and len(end.said) <= apart.SAID_MAX


def test_a_process_that_reads_its_own_pipe() -> None:
    """It takes away what it has sent, and keeps the pipe open: nobody waits for that."""

    def body(job: int, send: Send) -> None:
        out = next(number for number, _ in descriptors() if number > 2)
        own = os.open(f"/proc/self/fd/{out}", os.O_RDONLY | os.O_NONBLOCK)
        while True:
            send(b"x")
            try:
                os.read(own, 1)
            except BlockingIOError:
                return

    assert end_of(body).status == 0


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
    assert links.pop("2") == "pipe" and list(links.values()) == ["pipe"]
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
    assert first is not None and first.problem == os.strerror(errno.EAGAIN)
    assert second is not None and not second.problem


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
