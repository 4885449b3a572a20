"""The user's terminal as a console: raw while it lasts, put back on every way out, Ctrl-A x always
works. On a real pty.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A child with the pty as its stdin: a terminal for a machine that only has a console. Its answers
# go to descriptor 3.
CHILD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from pyvmm.cli.support.terminal import Terminal

def say(data):
    os.write(3, data)

class Vm:
    class console:
        @staticmethod
        def feed(data):
            if {deaf}:
                return 0
            say(data[:70])
            return min(len(data), 70)

    stopped = False

    def stop(self):
        say(b"<stop>")
        Vm.stopped = True

def leave(*_):
    raise SystemExit(143)

signal.signal(signal.SIGTERM, leave)
terminal = Terminal(Vm())
try:
    terminal.open()
    say(b"<open>")
    while not Vm.stopped:
        time.sleep(0.01)
finally:
    terminal.close()
    terminal.close()
    say(b"<closed>")
"""


class Session:
    """The child, the user's end of its terminal, and what it said."""

    def __init__(self, deaf: bool = False, piped: int | None = None) -> None:
        self.out, child_out = os.pipe()
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        argv = [sys.executable, "-c", CHILD.format(root=str(ROOT), deaf=deaf)]
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(piped if piped is not None else self.slave, 0)
                os.dup2(child_out, 3)
                os.closerange(4, 256)
                os.execv(argv[0], argv)
            finally:
                os._exit(99)
        os.close(child_out)
        self.said = b""

    def hear(self, what: bytes, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        while what not in self.said:
            assert select.select([self.out], [], [], max(0, end - time.monotonic()))[0], self.said
            piece = os.read(self.out, 4096)
            assert piece, self.said
            self.said += piece

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def end(self) -> int:
        _pid, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for fd in (self.out, self.master, self.slave):
            os.close(fd)


@pytest.fixture
def session() -> Iterator[Callable[..., Any]]:
    made = []

    def make(**kw: Any) -> Session:
        made.append(Session(**kw))
        return made[-1]

    yield make
    for s in made:
        s.close()


def test_what_is_typed_arrives_and_ctrl_a_x_leaves(session: Callable[..., Any]) -> None:
    s = session()
    s.hear(b"<open>")
    assert s.raw()
    s.type(b"ls\r\x03\x01\x01\x01yend")  # Ctrl-C and Ctrl-A Ctrl-A are the guest's; Ctrl-A y is y
    s.hear(b"yend")
    assert s.said.removeprefix(b"<open>") == b"ls\r\x03\x01yend"
    s.type(b"\x01x")
    s.hear(b"<stop>")
    s.hear(b"<closed>")
    assert s.end() == 0
    assert termios.tcgetattr(s.slave) == s.before


def test_ctrl_a_x_leaves_a_guest_that_does_not_read(session: Callable[..., Any]) -> None:
    s = session(deaf=True)
    s.hear(b"<open>")
    for _ in range(100):  # more than is kept for it
        s.type(b"x" * 1000)
    s.type(b"\x01x")
    s.hear(b"<stop>")
    assert s.end() == 0
    assert termios.tcgetattr(s.slave) == s.before


@pytest.mark.parametrize("deaf", [False, True])
def test_a_signal_puts_the_terminal_back(session: Callable[..., Any], deaf: bool) -> None:
    s = session(deaf=deaf)
    s.hear(b"<open>")
    s.type(b"y" * 3000)
    time.sleep(0.05)
    os.kill(s.pid, signal.SIGTERM)
    s.hear(b"<closed>")
    assert s.end() == 143
    assert termios.tcgetattr(s.slave) == s.before


def test_a_pipe_is_read_to_its_end_and_has_no_escapes(session: Callable[..., Any]) -> None:
    r, w = os.pipe()
    s = session(piped=r)
    os.close(r)
    s.hear(b"<open>")
    assert not s.raw()
    data = b"\x01x" + bytes(range(32, 127)) * 40 + b"end"
    os.write(w, data)
    os.close(w)
    s.hear(b"end")
    time.sleep(0.05)
    assert s.said.removeprefix(b"<open>") == data and b"<stop>" not in s.said
    os.kill(s.pid, signal.SIGTERM)
    assert s.end() == 143
