"""Peers on a vhost-user socket that are hostile, hang, come in a flood, or belong to somebody
else.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.backend.memory import FileMapping
from pyvmm.backend.server import LineLimit
from pyvmm.errors import VhostUserError
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser import wire
from pyvmm.vhostuser.connect import ListeningConnector
from pyvmm.vhostuser.wire import Channel, Listener, ProtocolError, Stopped, Stranger, connect
from tests.driver import wait_for
from tests.unit.test_event import spoil
from tests.unit.test_vhost_user import (
    PATIENCE,
    FrontEnd,
    Guest,
    Running,
    echo,
    front_end,
    listening,
    no_leak,
    path,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["no_leak", "path"]  # fixtures

MIB = 1 << 20


# --- a front-end that hangs, and one that waits ---------------------------------------------------


@pytest.mark.parametrize("data", [b"\1\0\0", struct.pack(spec.HEADER, 2, 1, 8) + b"1234"])
def test_half_a_message_ends_the_session_in_time(
    path: str, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(wire, "MESSAGE_S", 0.2)
    with Running(path) as running:
        with FrontEnd(path) as f:
            f.channel.send_bytes(data)
            assert wait_for(lambda: running.backend.counters()["sessions_broken"] == 1, PATIENCE)
        with Guest(path) as guest:
            echo(guest.start(), range(10))
        assert any("no answer in time" in line for line in running.log), running.log


def test_a_silent_front_end_may_stay(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MESSAGE_S", 0.05)
    with Running(path), Guest(path) as guest:
        echo(guest.start(), range(10))
        threading.Event().wait(0.3)
        echo(guest, range(10, 20))
        assert not guest.path.problems


def test_a_second_front_end_is_sent_away_at_once(path: str) -> None:
    with Running(path) as running, Guest(path) as guest:
        echo(guest.start(), range(10))
        for _ in range(3):
            with pytest.raises(VhostUserError, match="closed the connection at once") as error:
                front_end(path, timeout=PATIENCE)
            assert "another front-end" in error.value.hint
        assert running.backend.counters()["busy"] == 3
        echo(guest, range(10, 20))
        guest.path.close()
        with Guest(path) as other:  # nobody is sent away once the first has gone
            echo(other.start(), range(10))
        assert running.backend.counters()["busy"] == 3


def test_a_front_end_that_comes_again_is_never_taken_for_a_second_one(path: str) -> None:
    """Its old connection ends before it makes the new one, whether we have noticed or not."""
    with Running(path) as running:
        for _ in range(200):
            channel = connect(path) if listening(path) else None
            if channel is not None:
                channel.send(spec.VHOST_USER_GET_FEATURES, timeout=PATIENCE)
                channel.close()
        with FrontEnd(path) as f:
            assert f.ask(spec.VHOST_USER_GET_FEATURES).u64
        assert running.backend.counters()["busy"] == 0


def test_a_flood_of_connections_is_a_few_lines(path: str) -> None:
    with Running(path) as running:
        assert wait_for(lambda: listening(path), PATIENCE)
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(path)
                s.send(b"\xff" * 64)
        assert wait_for(
            lambda: sum(running.backend.counters()[k] for k in ("connections", "busy")) == 500,
            PATIENCE,
        )
        with Guest(path) as guest:
            echo(guest.start(), range(10))
    assert len(running.log) < 500


def test_lines_of_a_log() -> None:
    now, out = 0.0, list[str]()
    log = LineLimit(out.append, lambda: now)
    for n in range(100):
        log(f"line {n}")
    assert out == [f"line {n}" for n in range(LineLimit.BURST)]
    now = 1.0
    log("another kind")
    log("line later")
    log("line too soon")
    assert out[LineLimit.BURST :] == [
        "another kind",
        f"{100 - LineLimit.BURST} lines like the next one left out",
        "line later",
    ]
    now = 1e6
    out.clear()
    for n in range(100):
        log(f"line {n}")
    assert out[:2] == ["1 lines like the next one left out", "line 0"]
    assert len(out) == LineLimit.BURST + 1


# --- eventfds -------------------------------------------------------------------------------------


def test_calls_and_errors_that_would_block(path: str) -> None:
    """The front-end's eventfds are full and blocking. The worker serves, the ring's fault is
    reported, and the back-end ends when it is asked to (``Running``).
    """
    with Running(path) as running, Guest(path) as guest:
        for ring in guest.driver.rings:
            spoil(ring.call_fd)
        guest.start()
        for err in guest.path._rings.errs:
            spoil(err)
        guest.driver.send(bytes(60))
        assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
        tx = guest.driver.tx
        tx.set_avail(tx.published, 0xFFFF)
        tx.set_avail_idx(tx.published + 1)
        tx.kick()
        assert wait_for(lambda: running.backend.counters()["faults"] == 1, PATIENCE)


# --- memory that goes away ------------------------------------------------------------------------


def seals(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Memory files of 1 MiB by kind."""
    where = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - closed below
    disk = os.open(Path(__file__), os.O_RDONLY)
    made = {
        "sealable": os.memfd_create("a", os.MFD_ALLOW_SEALING),
        "unsealable": os.memfd_create("b", 0),
        "tmpfs": where.fileno(),
        "disk": disk,
        "no file": os.eventfd(0),
    }
    for name in ("sealable", "unsealable", "tmpfs"):
        os.ftruncate(made[name], MIB)
    yield made
    where.close()
    for name, fd in made.items():
        if name != "tmpfs":
            os.close(fd)


@pytest.mark.parametrize("kind", ["sealable", "unsealable", "tmpfs", "disk", "no file"])
@pytest.mark.parametrize("unsealed", [False, True], ids=["", "unsealed"])
def test_memory_that_could_end_us_is_refused(
    path: str, files: dict[str, int], kind: str, unsealed: bool
) -> None:
    """A file that its owner makes shorter: our accesses end in SIGBUS. A file system in user space:
    our accesses wait for it.
    """
    fd = files[kind]
    good = kind == "sealable" or (unsealed and kind in ("unsealable", "tmpfs"))
    with Running(path, unsealed=unsealed) as running:
        with FrontEnd(path).negotiate() as f:
            memory = struct.pack(spec.INFLIGHT, 1 << 15, 0, 2, 256)
            for request, payload in (
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, MIB, 0, 0))),
                (spec.VHOST_USER_ADD_MEM_REG, bytes(8) + struct.pack("<4Q", MIB, MIB, MIB, 0)),
                (spec.VHOST_USER_SET_INFLIGHT_FD, memory),
            ):
                assert f.nacked(request, payload, [fd]) == (not good), request
        if not good:
            assert any("memory file" in line for line in running.log), running.log
    if kind == "sealable":
        assert seals(fd) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def test_the_remedy_is_named(files: dict[str, int]) -> None:
    with pytest.raises(ProtocolError) as error:
        FileMapping(files["unsealable"], MIB)
    assert "--unsealed" in error.value.hint


# --- who is at the other end ----------------------------------------------------------------------

STRANGER = 65534
PYTHON = os.path.realpath(sys.executable)  # which others may run, wherever the checkout lies
CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(1)"
LISTEN = """
import os, socket, sys
os.umask(0)
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen(8)
print(flush=True)
while True:
    s.accept()
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def public() -> Iterator[str]:
    """A directory in which everybody may make files, such as /tmp."""
    directory = tempfile.mkdtemp()
    Path(directory).chmod(0o1777)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_only_our_user_may_connect(path: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        listener = Listener(path)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600 & ~umask
        listener.close()
        listener = Listener(path, peer=STRANGER)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o666
        listener.close()
    finally:
        os.umask(before)


@as_root
def test_a_stranger_s_listener_is_refused(public: str) -> None:
    """It would get all of the guest's memory."""
    path = f"{public}/s"
    with subprocess.Popen(
        [PYTHON, "-c", LISTEN, path], user=STRANGER, stdout=subprocess.PIPE
    ) as squatter:
        assert squatter.stdout is not None
        squatter.stdout.readline()
        with pytest.raises(Stranger, match=f"user with id {STRANGER}") as error:
            front_end(path)  # at once
        assert f"peer={STRANGER}" in error.value.hint
        with pytest.raises(Stranger):
            connect(path, peer=1)
        connect(path, peer=STRANGER).close()
        squatter.kill()


@as_root
def test_a_stranger_that_takes_a_lost_back_end_s_place_is_in_the_report(public: str) -> None:
    path = f"{public}/s"
    with Running(path):
        guest = Guest(path)
        echo(guest.start(), range(10))
    with guest:
        said = f"user with id {STRANGER}"
        argv = [PYTHON, "-c", LISTEN, path]
        with subprocess.Popen(argv, user=STRANGER, stdout=subprocess.PIPE) as squatter:
            try:
                assert squatter.stdout is not None
                squatter.stdout.readline()
                assert wait_for(lambda: any(said in p for p in guest.path.problems), PATIENCE)
                assert guest.path.counters()["refusals"] and not guest.path.connected
            finally:
                squatter.kill()
        with Running(path):
            assert guest.connected(2)
            echo(guest, range(10))


@as_root
def test_a_stranger_is_not_served(public: str) -> None:
    path = f"{public}/s"
    with Running(path) as running:
        assert wait_for(lambda: listening(path), PATIENCE)
        Path(path).chmod(0o666)  # the mode keeps nobody out who has come by another way
        subprocess.run([PYTHON, "-c", CONNECT, path], user=STRANGER, timeout=60, check=True)
        assert running.backend.counters()["strangers"] == 1
        assert f"user with id {STRANGER}" in running.log[0]
        with Guest(path) as guest:
            echo(guest.start(), range(10))
            stranger = subprocess.Popen([PYTHON, "-c", CONNECT, path], user=STRANGER)
            assert stranger.wait(PATIENCE) == 0
            echo(guest, range(10))
        assert running.backend.counters()["strangers"] == 2


@as_root
def test_a_stranger_does_not_become_the_back_end(public: str) -> None:
    """server=on."""
    path = f"{public}/s"
    end = os.eventfd(0)
    connector = ListeningConnector(path)
    Path(path).chmod(0o666)
    got: list[Channel | Exception] = []

    def wait() -> None:
        try:
            got.append(connector.connect(None, end))
        except Stopped as e:
            got.append(e)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    subprocess.run([PYTHON, "-c", CONNECT, path], user=STRANGER, timeout=60, check=True)
    os.eventfd_write(end, 1)
    thread.join(PATIENCE)
    assert len(got) == 1 and isinstance(got[0], Stopped)
    assert f"user with id {STRANGER}" in connector.complaints()[0] and not connector.complaints()
    connector.close()
    os.close(end)
