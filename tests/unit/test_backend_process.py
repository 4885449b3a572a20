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

from pyvmm.backend import faults as child_faults
from pyvmm.backend.faults import BackendFaults
from pyvmm.backend.process import LINES_MAX, READY, BackendProcess, serve
from pyvmm.backend.server import Backend
from pyvmm.conformance.check import LoggedNet
from pyvmm.conformance.dirty_log import FrontendLog, page
from pyvmm.errors import HostError, VhostUserError
from pyvmm.faultopt import FaultRule, of_text
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


class Peer:
    """The other end of the faults of a child that is not there, in the test's hands."""

    def __init__(self, faults: BackendFaults, *answers: bytes) -> None:
        self.faults = faults
        self._ours, self.sock = socket.socketpair()
        self._lines = self.sock.makefile("rb")
        for answer in answers:
            self.sock.send(answer)

    def attach(self) -> None:
        self.faults.attach(self._ours)

    def request(self) -> list[str]:
        """The next one: its number, the seed and the rules."""
        return self._lines.readline().decode().rstrip("\n").split("\t")

    def close(self) -> None:
        self._lines.close()
        self.sock.close()


def test_an_answer_that_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for the next one, and what was told last stays until then."""
    faults = BackendFaults()
    with closing(faults), closing(Peer(faults, b"1 ok rx_fault_loss=3 waiting_rx=1\n")) as peer:
        faults.set(of_text(["rx loss"]), 1)
        peer.attach()
        with monkeypatch.context() as hasty:
            hasty.setattr(child_faults, "PATIENCE_S", 0.01)
            faults.look()
            with pytest.raises(HostError, match="does not take faults: timed out"):
                faults.set([], 0)
        assert faults.counters() == {"rx_fault_loss": 3}
        peer.sock.send(b"2 ok rx_fault_loss=4\n3 no mem")
        peer.sock.send(b"ory\n4 ok rx_fault_loss=5\n")
        faults.set(of_text(["tx loss"]), 9)
        assert faults.counters() == {"rx_fault_loss": 5}
        requests = [peer.request() for _ in range(4)]
        assert requests == [["1", "1", "rx loss|"], ["2"], ["3", "0"], ["4", "9", "tx loss|"]]
        peer.sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("wrong", [b"", b"x ok\n", b"2 ok a=b\n", b"2" * (1 << 15)])
def test_a_child_that_breaks_off(wrong: bytes) -> None:
    """Nobody is told that it has rules which it does not know; the next child gets them."""
    faults = BackendFaults()
    with closing(faults):
        with closing(Peer(faults, b"1 ok rx_fault_loss=3\n", wrong)) as peer:
            faults.set(of_text(["rx loss"]), 1)
            peer.attach()
            peer.sock.shutdown(socket.SHUT_WR)
            faults.look()
            assert faults.counters() == {"rx_fault_loss": 3}
            with pytest.raises(HostError, match="takes no faults any more"):
                faults.set([], 0)
        faults.detach()
        faults.set(of_text(["tx loss"]), 1)
        with closing(Peer(faults, b"3 no memory for faults\n")) as peer:
            with pytest.raises(HostError, match="takes no faults: memory for faults"):
                peer.attach()
            peer.sock.shutdown(socket.SHUT_WR)
        assert faults.counters() == {"rx_fault_loss": 3}


def test_who_reads_the_counters_does_not_wait() -> None:
    """Not for the child, and not for a thread that waits for the child."""
    faults = BackendFaults()
    with closing(faults), closing(Peer(faults, b"1 ok rx_fault_loss=3 waiting_rx=1\n")) as peer:
        faults.set(of_text(["rx loss"]), 1)
        peer.attach()
        asker = threading.Thread(target=faults.look)
        asker.start()
        assert peer.request() == ["1", "1", "rx loss|"] and peer.request() == ["2"]
        assert faults.counters() == {"rx_fault_loss": 3} and faults.active
        assert faults.report()["waiting"] == {"rx": 1, "tx": 0}
        assert asker.is_alive()
        peer.sock.send(b"2 ok rx_fault_loss=4\n")
        asker.join(PATIENCE)
        assert faults.counters() == {"rx_fault_loss": 4}
        peer.sock.shutdown(socket.SHUT_WR)


class Point:
    """Stands for the child's ``ImpairPoint``."""

    def __init__(self) -> None:
        self.rules: list[tuple[list[str], int]] = []

    def set(self, rules: list[FaultRule], seed: int) -> None:
        self.rules.append(([str(rule) for rule in rules], seed))

    def counters(self) -> dict[str, int]:
        return {"rx_fault_loss": len(self.rules)}

    def report(self) -> dict[str, object]:
        return {"waiting": {"rx": 0, "tx": 0}}


def test_the_child_answers_each_request_and_ends_its_faults() -> None:
    """Also requests that come at once; and when nobody is left who could end the faults."""
    point, (ours, theirs) = Point(), socket.socketpair()
    child = threading.Thread(target=child_faults.answer, args=(theirs, point))
    with ours:
        ours.send(b"1\t7\trx loss|\n2\n3\t8\ttx lo")
        child.start()
        ours.send(b"ss|\n")
        ours.settimeout(PATIENCE)
        lines = ours.makefile("rb")
        assert [lines.readline() for _ in range(3)] == [
            b"1 ok rx_fault_loss=1\n",
            b"2 ok rx_fault_loss=1\n",
            b"3 ok rx_fault_loss=2\n",
        ]
        lines.close()
    child.join(PATIENCE)
    assert not child.is_alive()
    assert point.rules == [(["rx loss"], 7), (["tx loss"], 8), ([], 0)]


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
