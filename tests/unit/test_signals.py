"""Signals end a command in order, and soon."""

import signal
import subprocess
import sys

import pytest

BODY = """
import os, signal, sys, threading, time
from pyvmm.cli.support.signals import orderly

def body():
    number = int(sys.argv[1])
    # The C handler runs in another thread: as with a signal between the interpreter's look and its wait, nobody wakes the main one.
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    threading.Event().wait(60)
    return 0

sys.exit(orderly(body))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_wakes_nobody_is_taken(number):
    argv = [sys.executable, "-c", BODY, str(int(number))]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert (child.returncode, child.stderr) == (128 + number, "")


def test_without_a_signal_all_is_as_before():
    text = """
import os, signal, threading
from pyvmm.cli.support.signals import ENDING, orderly
def state():
    return [signal.getsignal(n) for n in (*ENDING, signal.SIGURG)], threading.active_count(), os.listdir("/proc/self/fd")
before = state()
assert orderly(lambda: 7) == 7
assert state() == before, (before, state())
"""
    child = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=30)
    assert (child.returncode, child.stderr) == (0, "")
