"""Our own back-end as a child process: what it has to say reaches its parent."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.backend.faults import BackendFaults
from pyvmm.backend.process import LINES_MAX, READY, BackendProcess, serve
from pyvmm.backend.server import Backend
from pyvmm.conformance.check import LoggedNet
from pyvmm.conformance.dirty_log import FrontendLog, page
from pyvmm.errors import HostError, VhostUserError
from pyvmm.faultopt import of_text
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from tests.driver import Cable, Events, NetDriver, bits, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyvmm.vhostuser.wire import Channel

PATIENCE = 60.0


@pytest.fixture
def process() -> Iterator[BackendProcess]:
    tap = Cable()
    one = BackendProcess(tap)  # type: ignore[arg-type]
    yield one
    one.close()
    tap.close()


def end_of(channel: Channel) -> None:
    """Wait until the child has hung up."""
    with pytest.raises(VhostUserError):
        channel.receive(PATIENCE)
    channel.close()


def test_why_a_session_ended(process: BackendProcess) -> None:
    channel = process.dial()
    assert process.complaints() == []
    channel.send(spec.VHOST_USER_SET_VRING_NUM, struct.pack(spec.VRING_STATE, 9, 256))
    end_of(channel)
    words = "our own back-end: session ended: SET_VRING_NUM for ring 9, but there are 2"
    said: list[str] = []

    def told() -> bool:
        said.extend(process.complaints())
        return said == [words]

    assert wait_for(told, PATIENCE), said
    process.dial().close()  # the same child
    assert process.complaints() == []


def test_the_confined_child_marks_pages(process: BackendProcess) -> None:
    """The log of a migration needs no system call that the child may not have."""
    acked, tap = bits("VIRTIO_F_VERSION_1"), process._tap
    assert isinstance(tap, Cable)
    with closing(GuestMemory(1 << 20)) as memory, FrontendLog(memory) as log:
        driver, net = NetDriver(memory, size=16, event_idx=False), LoggedNet(process.connector())
        driver.fill()
        net.connect(PATIENCE)
        rings = [ring.vring() for ring in driver.rings]
        net.start(acked, memory, rings, Events())
        assert net.converse(lambda s: log.start(s, acked, rings))
        tap.far.send(bytes(12) + b"\x55" * 60)
        assert driver.wait_packets(1, PATIENCE)
        net.stop()
        assert not net.problems and process.complaints() == []
        assert {page(driver.filled[0][0]), page(driver.rx.used)} <= log.pages()
        net.close()
        driver.close()


def test_the_confined_child_has_faults() -> None:
    """Rules that are set before it starts, while it serves, and again after its death."""
    acked, tap, faults = bits("VIRTIO_F_VERSION_1"), Cable(), BackendFaults()
    process = BackendProcess(tap, faults=faults)  # type: ignore[arg-type]
    faults.set(of_text(["tx loss filter='arp'"]), 7)
    with closing(GuestMemory(1 << 20)) as memory, closing(tap), closing(process):
        driver, net = NetDriver(memory, size=16, event_idx=False), LoggedNet(process.connector())
        driver.fill()
        net.connect(PATIENCE)
        net.start(acked, memory, [ring.vring() for ring in driver.rings], Events())
        driver.send(b"\x55" * 12 + b"\x08\x06" + bytes(46), b"\x55" * 60)
        assert tap.receive()[12:] == b"\x55" * 60
        faults.look()
        assert faults.counters()["tx_fault_loss"] == 1
        assert faults.report()["seed"] == 7
        faults.set(of_text(["rx duplicate", "tx delay=60s"]), 8)
        tap.far.send(bytes(12) + b"\x66" * 60)
        assert driver.wait_packets(2, PATIENCE)
        driver.send(b"\x77" * 60)

        def waits() -> bool:
            faults.look()
            return faults.report()["waiting"] == {"rx": 0, "tx": 1}

        assert wait_for(waits, PATIENCE)
        assert faults.counters()["rx_fault_duplicate"] == 1
        pid = process.pid
        assert pid is not None and process.complaints() == []
        os.kill(pid, signal.SIGKILL)
        # The data path notices, and connects again: to another child.
        assert wait_for(lambda: process.pid not in (None, pid), PATIENCE) and faults.active
        assert faults.counters()["tx_fault_loss"] == 1, "what the first child has counted"
        faults.set([], 0)
        assert faults.report()["rules"] == []
        net.close()
        driver.close()


def test_no_thread_of_the_child_keeps_a_capability() -> None:
    """Among them the one that answers about faults."""
    acked, tap, faults = bits("VIRTIO_F_VERSION_1"), Cable(), BackendFaults()
    process = BackendProcess(tap, faults=faults)  # type: ignore[arg-type]
    with closing(GuestMemory(1 << 20)) as memory, closing(tap), closing(process):
        driver, net = NetDriver(memory, size=16, event_idx=False), LoggedNet(process.connector())
        net.connect(PATIENCE)
        net.start(acked, memory, [ring.vring() for ring in driver.rings], Events())
        faults.set(of_text(["rx loss"]), 1)  # the thread has answered
        threads = {}
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            words = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            threads[task.name] = [words[name] for name in ("CapEff", "CapPrm", "Seccomp")]
        assert len(threads) >= 3, "the main thread, the worker, and the one that answers"
        assert set(map(tuple, threads.values())) == {("0" * 16, "0" * 16, "2")}, threads
        net.close()
        driver.close()


def test_a_child_that_does_not_answer() -> None:
    """It is asked once; what it has told last stays, and rules are for the next child."""
    faults, (ours, theirs) = BackendFaults(), socket.socketpair()
    with theirs:
        theirs.send(b"ok rx_fault_loss=3 waiting_rx=1\n")
        faults.set(of_text(["rx loss"]), 1)
        faults.attach(ours)
        ours.settimeout(0.01)
        faults.look()
        faults.look()
        assert faults.counters() == {"rx_fault_loss": 3}
        faults.set(of_text(["tx loss"]), 1)
        other, far = socket.socketpair()
        with far:
            far.send(b"no memory for faults\n")
            with pytest.raises(HostError, match="takes no faults: memory for faults"):
                faults.attach(other)
        faults.close()


def test_the_lines_come_before_the_next_session(process: BackendProcess) -> None:
    """Nobody has to ask in between, and however many they are the child is not held up."""
    for number in range(2 * LINES_MAX):
        channel = process.dial()
        channel.send(100 + number)
        end_of(channel)
    pid = process.pid
    process.dial().close()
    said = process.complaints()
    assert process.pid == pid and len(said) == LINES_MAX
    assert said[-1].endswith(f"request {100 + 2 * LINES_MAX - 1} is not supported")


def test_how_the_child_ended(process: BackendProcess) -> None:
    process.dial().close()
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    process.dial().close()
    assert process.pid != pid
    assert process.complaints() == ["our own back-end: it was killed (SIGKILL)"]


def test_a_bug_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child dies of it, and says of what."""

    def buggy(backend: Backend, channel: Channel) -> None:
        channel.close()
        raise TypeError("no such thing")

    monkeypatch.setattr(Backend, "serve", buggy)
    died: list[BaseException] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session, other = socket.socketpair()
    port = Cable()

    def child() -> None:
        try:
            serve(theirs.detach(), "cable", 1500, 0, 0, [os.dup(port.fds[0].fileno())])
        except TypeError as e:
            died.append(e)

    thread = threading.Thread(target=child)
    thread.start()
    with ours, session, other:
        ours.settimeout(PATIENCE)
        socket.send_fds(ours, [b"\0"], [session.fileno()])
        words = [ours.recv(1024) for _ in range(3)]
        thread.join(PATIENCE)
    port.close()
    assert words == [READY, READY, b"it dies of TypeError: no such thing"] and len(died) == 1
