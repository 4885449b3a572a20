"""The control socket: a server whose clients send anything, in pieces of any size. What it answers
is JSON, one message per line; it serves on; and how the bytes were cut makes no difference.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from typing import TYPE_CHECKING

from pyvmm.control.framer import Framer, TooMuch
from pyvmm.control.registry import Claim
from pyvmm.control.server import Command, Server
from tests.fuzz.data import Data
from tests.unit.test_qmp import COMMANDS, HELLO, PATIENCE, Fake

if TYPE_CHECKING:
    from collections.abc import Callable

#: Those that answer without somebody's help.
USED = ("echo", "need", "apart-fail")


def ignore(machine: object, given: dict[str, object]) -> dict[str, object]:
    return given


def framed(stream: bytes, cuts: Data | None) -> list[bytes | None] | None:
    """What a framer makes of the stream; None if it refuses it."""
    framer, out = Framer(), list[bytes | None]()
    try:
        while stream:
            n = 1 + cuts.below(40) if cuts is not None and cuts.left else len(stream)
            out += framer.feed(stream[:n])
            stream = stream[n:]
    except TooMuch:
        return None
    return out


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input, against one server."""
    directory = tempfile.mkdtemp(prefix="pyvmm-fuzz-")
    os.environ["XDG_RUNTIME_DIR"] = directory
    fake = Fake()
    commands = {name: COMMANDS[name] for name in USED} | {"ignore": Command(ignore, "")}
    server = Server(Claim(), lambda: commands, fake, {"version": {}, "capabilities": []})

    def one(data: bytes) -> None:
        d = Data(data)
        cuts = Data(d.some(16))
        stream = d.rest()
        assert framed(stream, cuts) == framed(stream, None)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(server.path)
            try:
                if not stream.startswith(b"{}"):
                    sock.sendall(HELLO)
                sock.sendall(stream)
                sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was too much
            answers = bytearray()
            try:
                while got := sock.recv(1 << 20):
                    answers += got
            except ConnectionResetError:
                pass
        lines = bytes(answers).split(b"\r\n")
        assert not lines.pop()
        for line in lines:
            answer = json.loads(line)
            assert answer.keys() & {"QMP", "return", "error", "event"}
            assert "pyvmm failed" not in str(answer.get("error")) or "oh" in str(answer)
        fake.calls.clear()

    return one
