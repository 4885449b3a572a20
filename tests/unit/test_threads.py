"""What narrow threads, of vCPUs in a confined process, have another thread do for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest

from pyvmm import threads
from pyvmm.threads import Thread, aside


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The thread of this test is narrow, but for the kernel."""
    monkeypatch.setattr(threads, "_here", threading.local())
    monkeypatch.setattr(threads, "_jobs", None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    threads.prepare_narrow()
    assert threads._jobs is not None
    monkeypatch.setattr(threads._here, "narrow", True, raising=False)
    yield
    threads._jobs.put(None)


def test_a_thread_that_is_not_narrow_does_it_itself() -> None:
    assert aside(threading.get_ident) == threading.get_ident()


def test_a_narrow_thread_has_it_done(narrow: None) -> None:
    """With its value or its error; and so threads start, which have the other one's rights."""
    assert aside(threading.get_ident) != threading.get_ident()
    assert aside(lambda: threading.current_thread().name) == "aside"
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)
    started = threading.Event()
    thread = Thread(target=started.set, name="started")
    thread.start()
    thread.join(60)
    assert started.is_set()


def test_errors_that_nobody_catches_are_reported_by_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A traceback reads source files, which would end a machine whose vCPU's thread does so."""

    class Bad:
        def __del__(self) -> None:
            raise RuntimeError("in a finalizer")

    said: SimpleQueue[tuple[str, str]] = SimpleQueue()

    def note(args: Any) -> None:
        said.put((threading.current_thread().name, str(args.exc_value)))

    for owner, name in ((threads, "_here"), (threads, "_jobs")):
        monkeypatch.setattr(owner, name, threading.local() if name == "_here" else None)
    monkeypatch.setattr(threading, "excepthook", note)
    monkeypatch.setattr(sys, "unraisablehook", note)
    threads.prepare_narrow()
    assert threads._jobs is not None
    monkeypatch.setattr(threads._here, "narrow", True, raising=False)
    try:
        Bad()  # which ends at once
        assert said.get(timeout=60) == ("aside", "in a finalizer")
        threads.report_bug(ValueError("a bug"))
        assert said.get(timeout=60) == ("aside", "a bug")
    finally:
        threads._jobs.put(None)


def test_threads_of_no_machine_stay_as_they_are() -> None:
    """Without a confined process, ``narrow`` does nothing."""

    def run() -> None:
        threads.narrow()
        with open("/proc/thread-self/status") as f:  # a file, which a narrow thread may not open
            said.append(next(line for line in f if line.startswith("Seccomp:")).split()[1])

    said: list[str] = []
    thread = Thread(target=run)
    thread.start()
    thread.join(60)
    with open("/proc/thread-self/status") as f:
        assert said == [next(line for line in f if line.startswith("Seccomp:")).split()[1]]


def test_jobs_of_many_threads() -> None:
    """Each thread's come in order, whether the reader waits for them or not, and none is lost."""
    jobs, each = threads._Jobs(), 200
    got: list[tuple[str, int]] = []

    def write(name: str) -> None:
        for number in range(each):
            jobs.put(partial(got.append, (name, number)))

    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    for _ in range(len(writers) * each):
        job = jobs.get()
        assert job is not None
        job()
    for writer in writers:
        writer.join()
    assert sorted(got) == [(name, number) for name in "abc" for number in range(each)]
    assert [g for g in got if g[0] == "b"] == [("b", number) for number in range(each)]
