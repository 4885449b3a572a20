"""``testing.suite`` without a machine: which case runs when, and what its caller may ask for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm import apart
from pyvmm.errors import UsageError
from pyvmm.testing import answer
from pyvmm.testing.answer import Answer
from pyvmm.testing.suite import Case, Suite
from pyvmm.testing.verdict import Verdict
from pyvmm.threads import NoThread

PASSED = Answer(Verdict("passed"))
CASES = [Case(name, "/nonexistent") for name in ("a", "b", "c", "d", "e")]


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels pass."""

    def boot(self: Suite, number: int, send: Callable[[bytes], None]) -> None:
        send(answer.MADE)
        send(PASSED.encode())

    monkeypatch.setattr(Suite, "_boot", boot)


def limit_processes(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let the starter have so many at a time, as RLIMIT_NPROC or a jail does."""
    fork, here = os.fork, os.getpid()

    def limited() -> int:
        me = os.getpid()
        children = Path(f"/proc/self/task/{me}/children").read_text().split()
        if me != here and len(children) >= most:
            raise BlockingIOError(errno.EAGAIN, "no more")
        return fork()

    monkeypatch.setattr(os, "fork", limited)


@pytest.mark.parametrize("most", [1, 2])
def test_no_room_for_all_at_a_time(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Cases wait until another process has ended; none is lost."""
    limit_processes(monkeypatch, most)
    with Suite(CASES, jobs=4) as suite:
        found = {r.case.name: r.verdict.kind for r in suite.run()}
    assert found == dict.fromkeys("abcde", "passed")


def test_no_room_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case says so, once."""
    limit_processes(monkeypatch, 0)
    with Suite(CASES, jobs=2) as suite:
        results = list(suite.run())
    assert sorted(r.case.name for r in results) == list("abcde")
    assert {r.verdict.kind for r in results} == {"host-problem"}
    what = f"there can be no process for this kernel: {os.strerror(errno.EAGAIN)}"
    assert {r.verdict.message for r in results} == {what}


def test_processes_that_say_that_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not that is true: each has a verdict in the end, and the others run."""

    def boot(self: Suite, number: int, send: Callable[[bytes], None]) -> None:
        send(PASSED.encode())
        if CASES[number].name in "ac":
            send(b"?")
            raise apart.Scarce

    monkeypatch.setattr(Suite, "_boot", boot)
    with Suite(CASES, jobs=3) as suite:
        found = sorted((r.case.name, r.verdict.kind) for r in suite.run())
    bad = "host-problem"
    assert found == [("a", bad), ("b", "passed"), ("c", bad), ("d", "passed"), ("e", "passed")]


def test_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict of a kernel that is alone says what there is too little of."""

    def boot(self: Suite, number: int, send: Callable[[bytes], None]) -> None:
        def none(*args: object, **kwargs: object) -> None:
            raise NoThread("no more")

        monkeypatch.setattr("pyvmm.testing.suite.Machine", none)
        real(self, number, send)

    monkeypatch.undo()
    real = Suite._boot
    monkeypatch.setattr(Suite, "_boot", boot)
    with Suite(CASES[:1]) as suite:
        (result,) = suite.run()
    assert result.verdict.kind == "host-problem"
    what = "there can be no thread for this kernel; raise the limit: ulimit -u"
    assert result.verdict.message == what


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_machine_at_a_time(jobs: int) -> None:
    with pytest.raises(UsageError, match=f"{jobs} machines at a time; use jobs=1 or more"):
        Suite(CASES, jobs)


@pytest.mark.parametrize("how", ["run", "closed"])
def test_once(how: str) -> None:
    """A suite without results would look as if all had passed."""
    with Suite(CASES) as suite:
        if how == "run":
            assert len(list(suite.run())) == len(CASES)
        else:
            suite.close()
        with pytest.raises(UsageError, match="was run before, or closed"):
            suite.run()
