"""The server of our own vDPA device ends with its keeper, and when the keeper wants it to, even if
a guest has taken it over. (The device itself is in tests/boot.)
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, cast

import pytest

from pyvmm.backend import vduse_keeper
from pyvmm.backend.process import READY
from pyvmm.backend.vduse_keeper import Server
from pyvmm.fd import Fd
from pyvmm.vhostuser.wire import readable

if TYPE_CHECKING:
    from pyvmm.backend.ports import LentTap

PATIENCE = 60.0


class Port:
    """Nothing to serve."""

    def close(self) -> None:
        pass


def deaf(name: str, port: object, link: socket.socket) -> None:
    """A server that does not look whether it is to end."""
    link.send(READY)
    time.sleep(600)


def make() -> Server:
    control, _other = socket.socketpair()
    with control, _other:
        server = Server("card", control, cast("LentTap", Port()))
    assert server.hear(PATIENCE) == READY
    return server


def test_a_server_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vduse_keeper, "_serve", deaf)
    monkeypatch.setattr(vduse_keeper, "SERVER_END_S", 0.1)
    assert make().end() == "it was killed (SIGKILL)"


def test_a_server_ends_with_its_keeper() -> None:
    program = (
        "from tests.unit import test_vduse_keeper as t\n"
        "t.vduse_keeper._serve = t.deaf\n"
        "print(t.make().pid, flush=True)\n"
        "t.time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        with Fd(os.pidfd_open(int(keeper.stdout.readline()))) as server:
            keeper.send_signal(signal.SIGKILL)
            assert readable([server.fileno()], PATIENCE)
