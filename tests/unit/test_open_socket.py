"""Sockets that another program hands over (`fd=`): the real sockets, and a hostile peer."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from pyvmm import helper
from pyvmm.card.uplink import Uplink
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError, NetError, UsageError
from pyvmm.hostnet.frames import HEADER
from pyvmm.hostnet.opensocket import OpenSocket
from pyvmm.machine import Machine
from pyvmm.memory import GuestMemory
from pyvmm.netopt import Net
from pyvmm.programs import module
from tests.driver import Events, NetDriver, wait_for
from tests.unit.test_vhost_user import no_leak

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["no_leak"]  # a fixture

pytestmark = pytest.mark.usefixtures("no_leak")

KINDS = {
    "stream": socket.SOCK_STREAM,
    "datagram": socket.SOCK_DGRAM,
    "seqpacket": socket.SOCK_SEQPACKET,
}
FRAME = bytes.fromhex("ffffffffffff525400123456") + b"\x08\x06" + bytes(range(46))
LARGEST = FRAME[:14] + bytes(65535 + 4)


class Pair:
    """A port, its worker's end and the peer's socket."""

    def __init__(self, kind: int) -> None:
        self.peer, given = socket.socketpair(socket.AF_UNIX, kind)
        self.kind, self.stream = kind, kind == socket.SOCK_STREAM
        self.peer.settimeout(60)
        with given:
            self.port = OpenSocket(given.fileno(), None)
        self.worker = socket.socket(fileno=os.dup(self.port.fds[0].fileno()))
        self.worker.settimeout(60)

    def frame(self) -> bytes:
        """The next frame for the peer."""
        if not self.stream:
            return self.peer.recv(1 << 17)
        (length,) = struct.unpack("!I", self.peer.recv(4, socket.MSG_WAITALL))
        return self.peer.recv(length, socket.MSG_WAITALL)

    def send(self, frame: bytes) -> None:
        """As the peer does."""
        self.peer.sendall(struct.pack("!I", len(frame)) + frame if self.stream else frame)

    def dropped(self) -> int:
        told = self.port.report()["socket"]
        assert isinstance(told, dict)
        return int(told["dropped"])

    def close(self) -> None:
        self.worker.close()
        self.port.close()
        self.peer.close()


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with closing(Pair(KINDS[request.param])) as made:
        yield made


@pytest.fixture
def stream() -> Iterator[Pair]:
    with closing(Pair(socket.SOCK_STREAM)) as made:
        yield made


def test_frames_in_both_directions(pair: Pair) -> None:
    for frame in (FRAME, FRAME + b"more", LARGEST):
        pair.worker.send(HEADER + frame)
        assert pair.frame() == frame
        pair.send(frame)
        assert pair.worker.recv(1 << 17) == HEADER + frame
    assert pair.port.gone() == "" and pair.dropped() == 0


def test_nothing_is_lost_while_nobody_reads(pair: Pair) -> None:
    """Both sides send until their sockets are full, and all of that arrives, in order."""
    frames = [FRAME + struct.pack("!I", number) + bytes(1400) for number in range(5000)]
    pair.worker.setblocking(False)
    sent = 0
    while True:
        try:
            pair.worker.send(HEADER + frames[sent])
        except BlockingIOError:
            # The thread may be about to take some.
            if not select.select([], [pair.worker], [], 0.3)[1]:
                break
        else:
            sent += 1
    assert 10 < sent < len(frames)
    assert [pair.frame() for _ in range(sent)] == frames[:sent]
    pair.peer.settimeout(0.3)
    back = 0
    try:
        while True:
            pair.send(frames[back])
            back += 1
    except TimeoutError:
        pass
    assert 10 < back < len(frames)
    pair.worker.settimeout(60)
    assert [pair.worker.recv(1 << 17)[12:] for _ in range(back)] == frames[:back]
    assert pair.dropped() == 0


def test_a_stream_is_cut_anywhere(stream: Pair) -> None:
    """Lengths and frames come in pieces, and several at once."""
    data = b"".join(struct.pack("!I", len(f)) + f for f in (FRAME, LARGEST, FRAME))
    for at in range(200):
        stream.peer.sendall(data[at : at + 1])
    stream.peer.sendall(data[200:])
    for frame in (FRAME, LARGEST, FRAME):
        assert stream.worker.recv(1 << 17) == HEADER + frame


def test_packets_that_are_no_frames(pair: Pair) -> None:
    """They are dropped and counted, and do no harm."""
    pair.send(b"short")
    pair.worker.send(HEADER + b"short")
    pair.worker.send(b"headless")
    count = 3
    if not pair.stream:
        pair.send(bytes(len(LARGEST) + 1))
        count += 1
    pair.send(FRAME)
    pair.worker.send(HEADER + FRAME)
    assert pair.worker.recv(1 << 17) == HEADER + FRAME and pair.frame() == FRAME
    assert wait_for(lambda: pair.dropped() == count)


def test_an_empty_datagram_is_no_end() -> None:
    with closing(Pair(socket.SOCK_DGRAM)) as pair:
        pair.peer.send(b"")
        pair.send(FRAME)
        assert pair.worker.recv(1 << 17) == HEADER + FRAME and pair.dropped() == 1


@pytest.mark.parametrize("length", [0, len(LARGEST) + 1, 0xFFFFFFFF])
def test_a_length_that_no_frame_has(stream: Pair, length: int) -> None:
    stream.send(FRAME)
    stream.peer.sendall(struct.pack("!I", length) + bytes(100))
    assert stream.worker.recv(1 << 17) == HEADER + FRAME
    assert stream.worker.recv(1 << 17) == b""
    assert stream.port.gone().endswith(f"has a frame of {length} bytes, which no frame has")


def test_the_peer_closes_its_socket(pair: Pair) -> None:
    """What the peer has sent before arrives."""
    pair.send(FRAME)
    pair.send(FRAME)
    pair.peer.close()
    assert pair.worker.recv(1 << 17) == pair.worker.recv(1 << 17) == HEADER + FRAME
    if pair.kind == socket.SOCK_DGRAM:  # that is seen when a frame is sent
        pair.worker.send(HEADER + FRAME)
    assert pair.worker.recv(1 << 17) == b""
    assert "was closed by its other end" in pair.port.gone()
    pair.port.cut()
    assert pair.port.gone() == ""


def test_an_end_while_everything_is_full(pair: Pair) -> None:
    """The thread waits for the peer, and for nobody when the card is closed."""
    pair.peer.settimeout(0.2)
    pair.worker.settimeout(0.2)
    for send in (lambda: pair.worker.send(HEADER + FRAME), lambda: pair.send(FRAME)):
        with pytest.raises(TimeoutError):
            while True:
                send()


def test_a_card_on_a_socket() -> None:
    """The worker of the emulated path, and the peer's end as the card's loss of its link."""
    peer, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ExitStack() as undo:
        undo.enter_context(peer)
        undo.enter_context(given)
        peer.settimeout(60)
        net = Net("emulated", fd=given.fileno(), mtu=1400)
        uplink = undo.enter_context(closing(Uplink(net, None)))
        assert uplink.tap is None and uplink.report() == {
            "socket": {"fd": given.fileno(), "dropped": 0}
        }
        uplink.set_header(12)
        with pytest.raises(HostError, match="wants headers of 10 bytes"):
            uplink.set_header(10)
        memory = undo.enter_context(closing(GuestMemory(16 << 20)))
        route = uplink.open(net, bytes(6))
        path = undo.enter_context(closing(route.path))
        assert isinstance(path, EmulatedNet) and route.tap is None
        driver = undo.enter_context(closing(NetDriver(memory)))
        events = Events()
        path.start(1 << 32, memory, [ring.vring() for ring in driver.rings], events)
        driver.send(FRAME)
        assert peer.recv(4 + len(FRAME), socket.MSG_WAITALL)[4:] == FRAME
        assert route.announce(b"\x52\x54\0\0\0\1")
        assert peer.recv(4 + 60, socket.MSG_WAITALL)[16:18] == b"\x80\x35"
        peer.close()
        assert wait_for(lambda: events.faults)
        assert "was closed by its other end" in events.faults[0][1] and events.links == [False]
    assert given.fileno() == -1


def test_what_is_no_usable_socket() -> None:
    with ExitStack() as undo:
        loose = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        udp = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        server.bind(("127.0.0.1", 0))
        server.listen()
        for one, problem in (
            (loose, "not connected"),
            (server, "not connected"),
            (udp, "a socket that frames cannot be sent by"),
        ):
            with pytest.raises(NetError, match=problem):
                Uplink(Net("emulated", fd=one.fileno()), None)
        for text, problem in (
            (f"vhost-net,fd={loose.fileno()}", "vhost-net needs a tap"),
            (f"emulated,fd={loose.fileno()},switchable=vhost-net", "vhost-net needs a tap"),
            (f"emulated,fd={loose.fileno()}+{udp.fileno()}", "has one queue pair"),
        ):
            with pytest.raises(UsageError, match=problem):
                Uplink(Net.parse(text), None)


@pytest.mark.parametrize("given", [False, True])
def test_a_number_that_nothing_has_come_by(tmp_path: Path, given: bool) -> None:
    """A number that is not open is not taken for what pyvmm opens there: with --sandbox, the socket
    to its helper, to which the guest's frames would be requests.
    """
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(4096))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fd = theirs.fileno() if given else 3
        words = ["run", "--host", "local", "--kernel", str(kernel), "--net", f"emulated,fd={fd}"]
        end = subprocess.run(
            module("pyvmm", *words, "--timeout", "60", "--", "true"),
            pass_fds=[fd] if given else [],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    if given:  # it gets further
        assert end.returncode not in (0, 106) and "is not open" not in end.stderr, end.stderr
    else:
        assert end.returncode == 106 and "fd=3 is not open" in end.stderr, end.stderr


def test_a_number_that_the_machine_would_take() -> None:
    with socket.socket() as s:
        number = s.fileno()
    with pytest.raises(NetError, match=f"fd={number} is not open"):
        Machine("/nonexistent", nets=[Net("emulated", fd=number)], sandbox="auto")
    assert helper.current() is None, "nothing has been opened before"


def test_the_socket_to_the_helper() -> None:
    with helper.start():
        number = next(n for n in range(3, 1 << 16) if helper.is_channel(n))
        with pytest.raises(NetError, match="of pyvmm's own"):
            Uplink(Net("emulated", fd=number), None)


def test_what_is_told_after_the_end() -> None:
    """In a process of its own, which once died of it."""
    program = """if True:
        import socket
        from pyvmm.hostnet.opensocket import OpenSocket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        port = OpenSocket(ours.fileno(), None)
        port.close()
        port.close()
        print(port.report()["socket"]["dropped"], repr(port.gone()))
    """
    end = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (end.returncode, end.stdout) == (0, "0 ''\n"), end.stderr
