"""Signals end a command in order, and soon."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

BODY = """
import os, signal, sys, threading, time
from pyvmm.cli.support.signals import orderly

def body():
    number = int(sys.argv[1])
    # The C handler runs in another thread. Nobody wakes the main one, as with a signal between the
    # interpreter's look and its wait.
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    threading.Event().wait(60)
    return 0

sys.exit(orderly(body))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_wakes_nobody_is_taken(number: Any) -> None:
    argv = [sys.executable, "-c", BODY, str(int(number))]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (child.returncode, child.stderr) == (128 + number, "")


def test_without_a_signal_all_is_as_before() -> None:
    text = """
import os, signal, threading
from pyvmm.cli.support.signals import ENDING, orderly
def state():
    handlers = [signal.getsignal(n) for n in (*ENDING, signal.SIGURG)]
    return handlers, threading.active_count(), os.listdir("/proc/self/fd")
before = state()
assert orderly(lambda: 7) == 7
assert state() == before, (before, state())
"""
    child = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert (child.returncode, child.stderr) == (0, "")


HANGS = """
import signal, sys, threading, time
from pyvmm.cli.support import signals

signals.TWICE_SECONDS, signals.ORDERLY_SECONDS = float(sys.argv[1]), float(sys.argv[2])

def hang():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def body():
    try:
        print("ready", flush=True)
        threading.Event().wait(60)
    finally:
        print("ending", flush=True)
        {clean_up}
        print("cleaned up", flush=True)

sys.exit(signals.orderly(body))
"""


class Child:
    """A process that cleans up after the first signal, or hangs instead.

    :param twice: seconds in which two signals count as one that is sent twice; with 0 or 60 a
        test does not depend on how busy the host is. :param orderly: ORDERLY_SECONDS.
    """

    def __init__(self, clean_up: str, *, twice: float, orderly: float = 60.0) -> None:
        text = HANGS.replace("{clean_up}", clean_up)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text, str(twice), str(orderly)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready\n"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def end(self) -> tuple[int, str, str]:
        """Exit status, and the rest of stdout and stderr."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()


ENDED = "pyvmm: ended by a second signal, without cleaning up\n"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_that_hangs(first: Any, second: Any) -> None:
    with Child("hang()", twice=0) as child:
        child.process.send_signal(first)
        assert child.line() == "ending\n"
        child.process.send_signal(second)
        assert child.end() == (128 + second, "", ENDED)


def test_a_signal_that_is_sent_twice_at_once_leaves_time_for_order() -> None:
    """As timeout(1) sends it."""
    with Child("time.sleep(1)", twice=60) as child:
        child.process.send_signal(signal.SIGTERM)
        assert child.line() == "ending\n"
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == (143, "cleaned up\n", "")


def test_but_not_for_ever() -> None:
    with Child("hang()", twice=60, orderly=0.5) as child:
        child.process.send_signal(signal.SIGTERM)
        assert child.line() == "ending\n"
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == (143, "", ENDED)


def test_one_signal_alone_waits_for_order() -> None:
    with Child("time.sleep(1)", twice=60, orderly=0.1) as child:
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == (143, "ending\ncleaned up\n", "")


def test_a_main_thread_that_takes_no_signal_is_ended_by_the_second() -> None:
    """It waits in C, and goes on waiting: the handler of the first does not even run."""
    clean_up = "signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING); hang()"
    with Child(clean_up, twice=0) as child:
        child.process.send_signal(signal.SIGTERM)
        assert child.line() == "ending\n"
        child.process.send_signal(signal.SIGTERM)
        assert child.end() == (143, "", ENDED)


FINALIZER = """
import os, signal, sys, time
from pyvmm.cli import guard
from pyvmm.cli.support.signals import orderly
from pyvmm.cli.support.swallowed import raise_again

class Owner:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        for _ in range(1000):  # the handler runs between two of these steps
            pass

def body():
    owner = Owner()
    del owner
    os.write(1, b"swallowed\\n")  # at once: the signal may come back between two writes
    time.sleep(60)
    return 0

raise_again()
sys.exit(guard(body if sys.argv[2] == "default" else lambda: orderly(body)))
"""


@pytest.mark.parametrize(
    ("number", "handler"),
    [
        (signal.SIGINT, "default"),
        (signal.SIGINT, "orderly"),
        (signal.SIGTERM, "orderly"),
        (signal.SIGHUP, "orderly"),
    ],
)
def test_a_signal_in_a_finalizer_is_not_lost(number: Any, handler: str) -> None:
    argv = [sys.executable, "-c", FINALIZER, str(int(number)), handler]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (child.returncode, child.stdout, child.stderr) == (128 + number, "swallowed\n", "")


def test_other_errors_in_finalizers_are_reported() -> None:
    text = """
from pyvmm.cli.support.swallowed import raise_again
class Owner:
    def __del__(self):
        raise OSError("a bug")
raise_again()
Owner()
"""
    child = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert child.returncode == 0
    assert "OSError: a bug" in child.stderr
