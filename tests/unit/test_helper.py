"""The helper: what it does for a process that has sealed it, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import helper
from pyvmm.errors import HostError, UsageError, VhostUserError
from pyvmm.hostnet.slirp import Forward, UserStack
from pyvmm.vhostuser.wire import Listener, connect
from tests.driver import wait_for


@pytest.fixture
def made() -> Iterator[helper.Helper]:
    with helper.start() as one:
        yield one


def test_it_ends_with_its_client(made: helper.Helper) -> None:
    pid = made.pid
    assert helper.current() is made
    made.close()
    made.close()
    assert helper.current() is None
    assert not Path(f"/proc/{pid}").exists()


def test_sockets_by_permission(made: helper.Helper, tmp_path: Path) -> None:
    """A listener is made, connected to and removed by the helper, if its name was permitted."""
    path, other = str(tmp_path / "s"), str(tmp_path / "t")
    for operation in ("listen", "connect", "remove"):
        helper.permit(operation, path)
    helper.seal()
    with pytest.raises(UsageError, match="only what the command line names"):
        Listener(other)
    listener = Listener(path)
    channel = connect(path)
    with pytest.raises(VhostUserError, match="only what the command"):
        connect(other)
    channel.close()
    accepted = listener.accept()
    assert accepted is not None
    accepted.close()
    assert os.path.exists(path)  # noqa: PTH110
    listener.close()
    assert not os.path.exists(path)  # noqa: PTH110
    with pytest.raises(VhostUserError, match="No such file"):
        connect(path)
    with pytest.raises(HostError, match="sealed"):
        made.ask(["permit", "remove", "/etc/passwd"])


def test_only_known_operations_and_modules(made: helper.Helper) -> None:
    with pytest.raises(HostError, match="does not know"):
        made.ask(["execve", "/bin/sh"])
    with pytest.raises(HostError, match="does not start os"):
        made.ask(["start", "os", "0", ""])
    with pytest.raises(UsageError, match="a back-end of pyvmm's: the sandbox has only what"):
        made.ask(["start", helper.BACKEND, "0", ""])
    helper.permit_start(helper.BACKEND)
    with pytest.raises(HostError, match="descriptors for"):
        made.ask(["start", helper.BACKEND, "0", "2"])


def test_the_user_network_that_was_permitted(made: helper.Helper) -> None:
    """No other ports of the host, and not its loopback."""
    forward = Forward("8080-80")
    helper.permit_start(helper.USER_NETWORK, "0", str(forward))
    helper.seal()
    for loopback, forwards in (
        (True, [forward]),
        (False, []),
        (False, [forward, forward]),
        (False, [Forward("0.0.0.0:8080-80")]),
    ):
        with pytest.raises(UsageError, match="a user network with this loopback= and hostfwd="):
            UserStack("10.0.2.2/24", "10.0.2.15/24", 1500, loopback=loopback, forwards=forwards)
    UserStack("10.0.2.2/24", "10.0.2.15/24", 1500, loopback=False, forwards=[forward]).close()


def test_a_child_is_ours(made: helper.Helper) -> None:
    """A module that the helper starts is a child of this process, has the descriptors under their
    numbers, and can be killed.
    """
    helper.permit_start(helper.BACKEND)
    helper.seal()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = [str(theirs.fileno()), "tap0", "1500", "0", "0"]
        child = helper.start_module(helper.BACKEND, words, [theirs.fileno()])
        theirs.close()  # so that a child that ends is heard
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert str(child.pid) in children
        assert ours.recv(100) == b"\0", "it is ready"
        assert child.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.01)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.kill()


def test_it_kills_no_others(made: helper.Helper) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as own:
        with pytest.raises(HostError, match="is no child"):
            made.ask(["kill", "1"])
        made.ask(["kill", str(own.pid)])
        assert own.wait() == -signal.SIGKILL


def test_a_helper_that_died_is_told(made: helper.Helper) -> None:
    os.kill(made.pid, signal.SIGKILL)
    assert wait_for(lambda: _zombie(made.pid))
    with pytest.raises(HostError, match="helper"):
        made.ask(["seal"])


def _zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_bugs_are_told(made: helper.Helper) -> None:
    """An error that nobody expects comes with its traceback, and the helper goes on."""
    with pytest.raises(RuntimeError, match="ValueError"):
        made.ask(["steering", "no number"])
    made.ask(["seal"])
