"""The testbed's protocol: a client whose testbed says anything, and the supervisor whose machine
does. Each ends with a line, and what waits stays bounded.
"""

from __future__ import annotations

import contextlib
import os
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pyvmm.errors import TestbedError
from pyvmm.testbed import protocol as p
from pyvmm.testbed.session import Session
from pyvmm.testbed.supervisor import OUT_MAX, Client, Supervisor
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = (
    *(p.DATA, p.EOF, p.CREDIT, p.HELLO, p.READY, p.EXIT, p.NOTE, p.ERROR, p.PONG),
    *(p.OPEN, p.CLOSE, p.SIGNAL, p.WINDOW, p.CONFIG, p.PING, p.STATUS, 99),
)
NUMBERS = (b"0", b"1", b"256", b"-1", b"65536", b"", b"x", b"9" * 5000, b"1e9", b"\xff")


def frames(d: Data) -> bytes:
    """What the other end says."""
    out = b""
    while d.left:
        kind = d.of(KINDS)
        payload = d.of(NUMBERS) if kind in (p.CREDIT, p.EXIT) else d.some(40)
        if d.one_in(16):
            payload = bytes(d.number(2) * 16)
        out += p.frame(kind, d.below(4), payload, d.below(5))
        if d.one_in(16):
            out += d.some(12)
    return out


class Port:
    """The supervisor's way to the agent, which the input plays."""

    source = sink = -2
    busy = False

    def __init__(self, said: bytes) -> None:
        self.said = said

    def recv(self) -> bytes:
        said, self.said = self.said[:65536], self.said[65536:]
        return said

    def send(self, data: memoryview) -> int:
        return min(len(data), 1000)


class Selector:
    """Nobody waits here."""

    def modify(self, *args: object) -> None:
        pass

    register = unregister = modify

    def get_map(self) -> dict[int, object]:
        return {}


def client(said: bytes) -> None:
    """A client that runs a command."""
    ours, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        theirs.setblocking(False)
        session = Session(ours, ["true"], cwd="/", env={}, stdin=b"12", stdout=null, stderr=None)
        with contextlib.suppress(BlockingIOError):
            theirs.send(said)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TestbedError):
            status = session.wait(10)
            assert 0 <= status < 512
    finally:
        os.close(null)
        ours.close()
        theirs.close()


def supervisor(said: bytes) -> None:
    """A supervisor with two clients, one of which reads nothing."""
    s = Supervisor({"cpu": "amd", "log_later": "log"})
    s.selector.close()
    s.selector = Selector()  # type: ignore[assignment]
    pairs = [socket.socketpair() for _ in range(2)]
    s.machine = machine = SimpleNamespace(  # type: ignore[assignment]
        port=Port(said), clock=lambda: 0.0, started=lambda kernel: None, config=lambda: {"a": 1}
    )
    try:
        for number, (ours, _) in enumerate(pairs, 1):
            ours.setblocking(False)
            one = Client(ours)
            one.channel = number
            s.clients[ours.fileno()] = s.channels[number] = one
        port: Any = machine.port
        with contextlib.suppress(TestbedError):
            while port.said:
                s.from_port()
        for c in s.clients.values():
            assert len(c.out) <= OUT_MAX
        assert len(s.notes) <= 1000
    finally:
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""

    def one(data: bytes) -> None:
        d = Data(data)
        which = d.below(2)
        said = frames(d)
        with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
            (supervisor if which else client)(said)

    return one
