"""Our vhost-user front-end and back-end, joined by a real socket; a mock driver is the guest."""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.backend.memory import MemoryTable
from pyvmm.backend.net import NetService
from pyvmm.backend.ports import PythonPort, SocketPort, joined_ports, loop_port, sink_port
from pyvmm.backend.server import Backend
from pyvmm.conformance.driver import PackedRing
from pyvmm.conformance.probe import Probe
from pyvmm.datapath.base import Vring
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.errors import VhostUserError
from pyvmm.fd import EventFd
from pyvmm.hostnet.frames import rarp
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.tap import Tap
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.connect import Connector, ListeningConnector
from pyvmm.vhostuser.wire import Channel, Listener, Message, ProtocolError, TimedOut
from tests.boot.seqnet import build, datagram
from tests.descriptors import open_fds
from tests.driver import Cable, Events, NetDriver, bits, wait_for
from tests.vu_fake import HOSTILE, Fake, raw

if TYPE_CHECKING:
    from pyvmm.backend.frontend import Handler, Service
    from pyvmm.datapath.base import PathEvents
    from tests.vu_fake import Answer

PATIENCE = 60.0
VERSION_1 = bits("VIRTIO_F_VERSION_1")
EVENT_IDX = bits("VIRTIO_RING_F_EVENT_IDX")
INDIRECT_DESC = bits("VIRTIO_RING_F_INDIRECT_DESC")
MRG = bits("VIRTIO_NET_F_MRG_RXBUF")
RING_PACKED = bits("VIRTIO_F_RING_PACKED")
MTU = bits("VIRTIO_NET_F_MTU")
ALL = VERSION_1 | EVENT_IDX | INDIRECT_DESC | MRG
REPLY_ACK = 1 << spec.VHOST_USER_PROTOCOL_F_REPLY_ACK
INFLIGHT = 1 << spec.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
SLOTS = 1 << spec.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS
MQ = 1 << spec.VHOST_USER_PROTOCOL_F_MQ
MAC = bytes.fromhex("525400123456")


def frame(n: int, length: int = 60) -> bytes:
    return struct.pack("<I", n) + bytes((n + i) & 0xFF for i in range(length - 4))


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    assert not open_fds() - before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def listening(path: str) -> bool:
    """Whether it is not only there: a socket is bound first."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.split()[3] == "00010000" and line.endswith(f" {path}") for line in lines[1:])


class Running:
    """A back-end in a thread."""

    def __init__(
        self,
        path: str,
        port: PythonPort | SocketPort | Tap | None = None,
        *,
        client: bool = False,
        poll_us: int = 0,
        service: TagService | None = None,
        **options: Any,
    ) -> None:
        self.log: list[str] = []
        served: Service = service or NetService(port or loop_port(1), poll_us=poll_us)
        self.backend = Backend(served, log=self.log.append, **options)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(path, client), daemon=True)
        self.thread.start()

    def _run(self, path: str, client: bool) -> None:
        try:
            self.backend.run(path, client=client, retry=0.01, retry_max=0.05)
        except BaseException as e:
            self.error = e

    @property
    def acked(self) -> int:
        """The features that the present front-end has acknowledged."""
        assert self.backend.frontend is not None
        return self.backend.frontend.acked

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.backend.stop()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.backend.close()
        assert self.error is None


def front_end(
    path: str, *, server: bool = False, wait: float = PATIENCE, **options: Any
) -> VhostUserNet:
    """A connected front-end."""
    net = VhostUserNet(ListeningConnector(path) if server else Connector(path), **options)
    try:
        net.connect(wait)
    except BaseException:
        net.close()
        raise
    return net


class Guest:
    """Memory, drivers and our front-end."""

    def __init__(
        self, path: str, *, acked: int = ALL, queues: int = 1, size: int = 256, **options: Any
    ) -> None:
        options.setdefault("timeout", PATIENCE)
        self.memory = GuestMemory(16 << 20)
        self.path = front_end(path, queues=queues, mac=MAC, **options)
        self.events = Events()
        self.faults = self.events.faults
        self.acked = acked & (self.path.features() | MTU)
        self.drivers = []
        at = 0x10000
        for pair in range(queues):
            driver = NetDriver(
                self.memory,
                base=at,
                size=size,
                event_idx=bool(self.acked & EVENT_IDX),
                indirect=bool(self.acked & INDIRECT_DESC),
                mrg_rxbuf=bool(self.acked & MRG),
                packed=bool(self.acked & RING_PACKED),
                pair=pair,
            )
            driver.end = at + (4 << 20)
            at += 4 << 20
            driver.fill()
            self.drivers.append(driver)
        self.driver = self.drivers[0]

    def start(self, bases: Sequence[int | None] = ()) -> Guest:
        rings = [r for d in self.drivers for r in d.rings]
        bases = bases or [None] * len(rings)
        self.path.start(
            self.acked,
            self.memory,
            [r.vring(b) for r, b in zip(rings, bases, strict=True)],
            self.events,
        )
        return self

    def counter(self, name: str) -> int:
        return self.path.counters()[name]

    def connected(self, times: int) -> bool:
        """Wait until the back-end has been connected that many times, and is."""
        return wait_for(
            lambda: self.counter("connections") >= times and self.path.connected,
            PATIENCE,
        )

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.path.close()
        for driver in self.drivers:
            driver.close()
        self.memory.close()


def arrived(driver: NetDriver, count: int) -> list[bytes]:
    """Wait for that many frames altogether; those so far, without the announcements that a loop
    echoes, too.
    """

    def frames() -> list[bytes]:
        driver.poll()
        return [p[12:] for p in driver.received if p[24:26] != b"\x80\x35"]

    wait_for(lambda: len(frames()) >= count, PATIENCE)
    return frames()


def echo(guest: Guest, numbers: Any, driver: NetDriver | None = None) -> None:
    """Send frames to a loop and get them back in order."""
    driver = driver or guest.driver
    before = len(arrived(driver, 0))
    sent = [frame(i, 60 + i % 1400) for i in numbers]
    for at in range(0, len(sent), 32):
        driver.send(*sent[at : at + 32])
        done = min(at + 32, len(sent))
        assert len(arrived(driver, before + done)) == before + done, guest.path.problems
    assert arrived(driver, 0)[before:] == sent
    assert wait_for(lambda: driver.tx.outstanding == 0, PATIENCE)


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("server", [False, True], ids=["client", "server"])
@pytest.mark.parametrize(
    "protocol",
    [-1, 0, REPLY_ACK, ~REPLY_ACK, ~(SLOTS | INFLIGHT)],
    ids=["all", "none", "reply-ack", "no-reply-ack", "old"],
)
def test_packets_pass(path: str, server: bool, protocol: int) -> None:
    with ExitStack() as stack:
        if server:
            running = None
            started = threading.Thread(
                target=lambda: stack.enter_context(
                    Running(path, client=True, protocol_features=protocol)
                )
            )
            started.start()
        else:
            running = stack.enter_context(Running(path, protocol_features=protocol))
        with Guest(path, server=server) as guest:
            if server:
                started.join()
            assert guest.path.features() & ALL == ALL
            guest.start()
            echo(guest, range(300))
            bases = [ring.position for ring in guest.driver.rings]
            assert guest.path.stop() == bases
            guest.start(bases)
            echo(guest, range(300, 400))
            assert not guest.path.problems and not guest.faults
        del running


@pytest.mark.parametrize("acked", [VERSION_1, VERSION_1 | MRG, VERSION_1 | EVENT_IDX, ALL])
def test_feature_sets(path: str, acked: int) -> None:
    with Running(path, features=acked) as running, Guest(path) as guest:
        assert guest.acked == acked
        guest.start()
        echo(guest, range(100))
        assert running.acked & ALL == acked


def test_sockets_cannot_have_the_short_header() -> None:
    """The frames of a legacy driver without MRG_RXBUF would be two bytes off at the other end."""
    service = NetService(loop_port(1))
    try:
        service.check_features(MRG)
        with pytest.raises(ProtocolError, match="loop cannot have the short header"):
            service.check_features(0)
    finally:
        service.close()


def test_features_that_lack_what_they_require_are_not_offered(
    path: str, listener: Listener
) -> None:
    with Fake(listener) as fake:
        fake.FEATURES |= bits(
            "VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_HOST_ECN", "VIRTIO_NET_F_HOST_TSO6"
        )
        fake.FEATURES |= bits("VIRTIO_NET_F_GUEST_ECN", "VIRTIO_NET_F_GUEST_TSO4")
        with Guest(path) as guest:
            offered = bits("VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_HOST_ECN", "VIRTIO_NET_F_HOST_TSO6")
            assert guest.path.features() == ALL | offered


def test_offloads_change_while_it_runs(path: str) -> None:
    """The back-end is told by its features, which takes a stop and a start."""
    with (
        Namespace(address="192.168.93.1/24") as namespace,
        Running(path, namespace.tap) as running,
        Guest(path, acked=-1) as guest,
    ):
        csum, tso = bits("VIRTIO_NET_F_GUEST_CSUM"), bits("VIRTIO_NET_F_GUEST_TSO4")
        guest.start()
        assert running.acked & (csum | tso) == csum | tso
        guest.acked &= ~tso
        guest.start(guest.path.stop())
        assert running.acked & (csum | tso) == csum
        assert running.acked & bits("VIRTIO_NET_F_CSUM")
        guest.acked |= tso
        guest.start(guest.path.stop())
        assert running.acked & (csum | tso) == csum | tso
        assert not guest.path.problems


def test_queue_pairs(path: str) -> None:
    with Running(path, loop_port(3)), Guest(path, queues=3) as guest:
        guest.start()
        for pair, driver in enumerate(guest.drivers):
            echo(guest, range(100 * pair, 100 * pair + 100), driver)
        guest.path.stop()
        # One pair less, as after VQ_PAIRS_SET.
        rings = [r.vring(r.position) for d in guest.drivers[:2] for r in d.rings]
        guest.path.start(guest.acked, guest.memory, rings, guest.events)
        for driver in guest.drivers[:2]:
            echo(guest, range(50), driver)
        assert not guest.path.problems


@pytest.mark.parametrize("which", [[], [0], [1]])
def test_queues_that_the_driver_has_not_enabled(path: str, which: list[int]) -> None:
    with Running(path), Guest(path) as guest:
        rings = [guest.driver.rings[i].vring() for i in which]
        guest.path.prepare(guest.acked, guest.memory, rings)
        guest.path.start(guest.acked, guest.memory, rings, guest.events)
        assert not guest.path.problem()
        guest.path.stop_transmit()
        assert guest.path.stop() == [0] * len(which)
        guest.start()
        echo(guest, range(50))
        assert not guest.path.problems


def test_too_few_queue_pairs_are_refused(path: str) -> None:
    with (
        Running(path, loop_port(2)),
        pytest.raises(VhostUserError, match="has 2 queue pairs, not 3"),
    ):
        front_end(path, queues=3)


def test_two_guests_joined(tmp_path: Path) -> None:
    left, right = joined_ports(1)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with Running(a, left), Running(b, right), Guest(a) as one, Guest(b) as two:
        one.start()
        two.start()
        for sender, receiver in ((one, two), (two, one)):
            sent = [frame(i, 100) for i in range(100)]
            sender.driver.send(*sent)
            assert [p[12:] for p in receiver.driver.wait_packets(100, PATIENCE)] == sent
        # NEEDS_CSUM, GSO_TCPV4, lengths and offsets beyond the frame: the other guest has
        # negotiated none of it, and must not be told (5.1.6.4.1).
        evil = struct.pack("<BBHHHHH", 1, 1, 0xFFFF, 1, 0xFFF0, 0xFFF0, 0)
        for sender, receiver in ((one, two), (two, one)):
            receiver.driver.received.clear()
            sender.driver.queue(frame(1, 100), header=evil)
            sender.driver.tx.publish()
            assert receiver.driver.wait_packets(1, PATIENCE) == [
                bytes(10) + b"\1\0" + frame(1, 100)
            ]


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def test_the_example_of_a_python_function(path: str) -> None:
    """docs/examples/everybody.py, which docs/vhost-user.md quotes: every address answers ARP and
    pings.
    """
    example = Path("docs/examples/everybody.py")
    assert f"```python\n{example.read_text()}```" in Path("docs/vhost-user.md").read_text()
    code = [
        line
        for line in example.read_text().split("\n")
        if line.strip() and not line.startswith('"""')
    ]
    assert len(code) <= 20
    me, you = bytes([192, 168, 100, 2]), bytes([192, 168, 100, 77])
    process = subprocess.Popen([sys.executable, example, path], stdout=subprocess.PIPE, text=True)
    try:
        with Guest(path) as guest:
            guest.start()
            ask = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + MAC + me + bytes(6) + you
            guest.driver.send(b"\xff" * 6 + MAC + b"\x08\x06" + ask)
            answer = guest.driver.wait_packets(1, PATIENCE)[0][12:]
            its = answer[6:12]
            assert answer[:6] == MAC and answer[12:14] == b"\x08\x06"
            assert answer[14:] == struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + its + you + MAC + me
            for n in (1, 0xF7FF, 0xFFFF):  # carries in the checksum, too
                echo = struct.pack(">BBHHH", 8, 0, 0, n, 1) + bytes(range(56))
                echo = echo[:2] + struct.pack(">H", checksum(echo)) + echo[4:]
                ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(echo), n, 0, 64, 1, 0) + me + you
                ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
                guest.driver.received.clear()
                guest.driver.send(its + MAC + b"\x08\x00" + ip + echo)
                packet = guest.driver.wait_packets(1, PATIENCE)[0][12:]
                assert packet[:14] == MAC + its + b"\x08\x00" and packet[26:34] == you + me
                assert not checksum(packet[14:34]) and not checksum(packet[34:])
                assert packet[34:36] == b"\x00\x00" and packet[38:] == echo[4:]
    finally:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE)
    assert out.startswith("front-end connected\n")


def test_a_python_function_that_swaps(path: str) -> None:
    def swap(packet: bytes, pair: int) -> None:
        port.send(packet[6:12] + packet[:6] + packet[12:], pair)

    port = PythonPort(swap)
    with Running(path, port), Guest(path) as guest:
        guest.start()
        guest.driver.send(b"AAAAAABBBBBB" + bytes(50))
        assert guest.driver.wait_packets(1, PATIENCE)[0][12:] == b"BBBBBBAAAAAA" + bytes(50)


def test_a_python_function_that_fails_says_so() -> None:
    def fail(packet: bytes, pair: int) -> None:
        raise RuntimeError("no")

    port = PythonPort(fail)
    os.write(port.fds[0].fileno(), bytes(80))
    assert wait_for(lambda: not port._thread.is_alive(), PATIENCE)
    with pytest.raises(RuntimeError, match="no"):
        port.close()
    port.close()


def test_a_sink_takes_everything_and_waits_for_nothing(path: str) -> None:
    """More than any socket could hold."""
    with Running(path, sink_port(1)), Guest(path) as guest:
        guest.start()
        for n in range(40):
            guest.driver.send(*[frame(n, 1500)] * 100)
            assert wait_for(
                lambda: not guest.driver.tx.take_used() and not guest.driver.tx.outstanding
            )
        assert not guest.driver.received


def test_a_sink_reaches_no_other_socket() -> None:
    """Whoever has taken over the back-end has its descriptors."""
    port = sink_port(1)
    name = f"\0pyvmm-sink-{os.getpid()}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.bind(name)
            with socket.socket(fileno=os.dup(port.fds[0].fileno())) as held:
                with suppress(OSError):
                    held.sendto(b"x", name)
                with suppress(OSError):
                    held.connect(name)
                    held.send(b"x")
            with pytest.raises(BlockingIOError):
                other.recv(1)
    finally:
        port.close()


def test_over_a_tap(path: str) -> None:
    with Namespace(address="192.168.91.1/24", mtu=1500) as namespace:
        guest_ip, host_ip = bytes([192, 168, 91, 2]), bytes([192, 168, 91, 1])
        arp = b"\xff" * 6 + MAC + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 1)
        arp += MAC + guest_ip + bytes(6) + host_ip
        with Running(path, namespace.tap) as running, Guest(path, mtu=1400, acked=-1) as guest:
            assert guest.path.features() & bits("VIRTIO_NET_F_GUEST_TSO4", "VIRTIO_NET_F_CSUM")
            guest.start()
            guest.driver.send(arp)
            assert wait_for(
                lambda: any(
                    p[24:26] == b"\x08\x06" for p in guest.driver.poll() or guest.driver.received
                ),
                PATIENCE,
            )
            assert not running.backend.counters()["refused"]


def test_the_mtu_is_checked(path: str) -> None:
    with (
        Namespace(address="192.168.92.1/24", mtu=1500) as namespace,
        Running(path, namespace.tap),
        Guest(path, mtu=9000, acked=ALL | MTU) as guest,
    ):
        guest.start()
        assert wait_for(lambda: guest.path.problems, PATIENCE)
        assert "refuses an MTU of 9000" in guest.path.problems[0]
    with (
        Running(path, protocol_features=REPLY_ACK),
        pytest.raises(VhostUserError, match="does not take an MTU"),
    ):
        front_end(path, mtu=1500)


def test_no_backend(path: str) -> None:
    for server, words in ((False, "cannot connect"), (True, "no back-end has connected")):
        with pytest.raises(VhostUserError, match=words) as e:
            front_end(path, server=server, wait=0.05)
        assert e.value.hint


def test_busy_polling(path: str) -> None:
    with Running(path, poll_us=1 << 31), Guest(path) as guest:
        guest.start()
        echo(guest, range(200))


# --- coming and going -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [-1, ~INFLIGHT], ids=["inflight", "used"])
@pytest.mark.parametrize("server", [False, True], ids=["client", "server"])
def test_the_backend_comes_back(path: str, server: bool, protocol: int) -> None:
    """Nothing lost or repeated here, since each time all is returned before the back-end goes."""
    options: dict[str, Any] = {"client": server, "protocol_features": protocol}
    with ExitStack() as stack:
        box: list[Running] = []
        if not server:
            box.append(Running(path, **options))
        else:
            thread = threading.Thread(target=lambda: box.append(Running(path, **options)))
            thread.start()
        guest = stack.enter_context(Guest(path, server=server))
        if server:
            thread.join()
        (first,) = box
        guest.start()
        echo(guest, range(50))
        for round in range(1, 6):
            first.__exit__()
            assert wait_for(lambda: not guest.path.connected, PATIENCE)
            numbers = range(50 * round, 50 * round + 20)
            guest.driver.send(*[frame(i) for i in numbers])  # while nobody is there
            before = len(arrived(guest.driver, 0))
            first = Running(path, **options)
            assert guest.connected(round + 1)
            assert arrived(guest.driver, before + 20)[before:] == [frame(i) for i in numbers]
            echo(guest, range(1000, 1050))
        assert guest.counter("disconnections") == 5 and guest.counter("announcements") == 5
        assert guest.counter("tx_possible_repeats") == 0
        assert not guest.faults
        guest.path.close()
        first.__exit__()


def test_a_start_without_a_backend_is_made_up_for(path: str) -> None:
    first = Running(path)
    with Guest(path) as guest:
        first.__exit__()
        assert wait_for(lambda: not guest.path.connected, PATIENCE)
        guest.start()
        guest.driver.send(frame(1))
        assert guest.path.stop() == [0, 0]  # and a stop then
        guest.start([0, 0])
        with Running(path):
            assert arrived(guest.driver, 1) == [frame(1)]
            echo(guest, range(50))


def test_a_backend_with_less_is_refused(path: str) -> None:
    first = Running(path)
    with Guest(path) as guest:
        guest.start()
        echo(guest, range(10))
        first.__exit__()
        with Running(path, features=~EVENT_IDX):
            words = "lacks features that the guest uses: EVENT_IDX"
            assert wait_for(lambda: any(words in p for p in guest.path.problems), PATIENCE)
            assert guest.counter("refusals") >= 1
            assert not guest.path.connected
        with Running(path):
            assert guest.connected(2)
            echo(guest, range(10, 20))


def test_a_backend_with_fewer_queues_is_refused(path: str) -> None:
    first = Running(path, loop_port(2))
    with Guest(path, queues=2) as guest:
        guest.start()
        first.__exit__()
        with Running(path, loop_port(1)):
            words = "has 1 queue pairs, not 2"
            assert wait_for(lambda: any(words in p for p in guest.path.problems), PATIENCE)
            assert not guest.path.connected
        with Running(path, loop_port(3)):
            assert guest.connected(2)
            for driver in guest.drivers:
                echo(guest, range(20), driver)


def test_a_backend_with_another_mtu_is_refused(path: str) -> None:
    with ExitStack() as stack:
        first, other = (
            stack.enter_context(Namespace(address=f"192.168.{n}.1/24", mtu=1500)) for n in (95, 96)
        )
        running = Running(path, first.tap)
        with Guest(path, mtu=1400, acked=ALL | MTU) as guest:
            guest.start()
            assert guest.path.connected
            running.__exit__()
            other.tap.mtu = 1300
            with Running(path, other.tap):
                words = "refuses an MTU of 1400"
                assert wait_for(lambda: any(words in p for p in guest.path.problems), PATIENCE)
                assert not guest.path.connected
            with Running(path):  # takes any
                assert guest.connected(2)
                echo(guest, range(20))


CHILD = """
import os, sys
from pyvmm.backend.net import NetService
from pyvmm.backend.server import Backend
from pyvmm.backend.ports import SocketPort
from pyvmm.datapath.impair import ImpairPoint
from pyvmm.faultopt import of_text
from pyvmm.fd import Fd

impair = ImpairPoint()
impair.set(of_text(sys.argv[4:]), 1)
service = NetService(SocketPort("far", [Fd(int(sys.argv[2]))]), impair=impair)
backend = Backend(service, protocol_features=int(sys.argv[3]))
backend.run(sys.argv[1])
"""


@contextmanager
def child(
    path: str, far: socket.socket, protocol: int = -1, *rules: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A back-end in a process of its own, which is killed at the end; its port is ``far``.

    :param rules: of faults on demand.
    """
    argv = [sys.executable, "-c", CHILD, path, str(far.fileno()), str(protocol), *rules]
    process = subprocess.Popen(argv, pass_fds=[far.fileno()])
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)


@pytest.mark.parametrize(
    ("protocol", "acked", "rules"),
    [
        (-1, ALL, []),
        (~INFLIGHT, ALL, []),
        (-1, ALL | RING_PACKED, []),
        (-1, ALL, ["both reorder-used=1/3"]),
        (~INFLIGHT, ALL, ["both reorder-used=1/3"]),
    ],
    ids=["inflight", "used", "inflight packed", "inflight swapped", "used swapped"],
)
def test_kills_under_traffic(path: str, protocol: int, acked: int, rules: list[str]) -> None:
    """With an in-flight region a kill repeats no transmit, and loses at most the one in the
    kernel's hands. The same while used entries are kept back, to come in another order.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        for s in (near, far):
            s.setblocking(False)
        kills, sent, got, swapped = 6, 0, [], False

        def collect() -> None:
            try:
                while True:
                    data = near.recv(4096)
                    if data[24:26] != b"\x80\x35":  # no announcement
                        got.append(struct.unpack_from("<I", data, 12)[0])
            except BlockingIOError:
                pass

        with ExitStack() as stack:
            killer = stack.enter_context(ExitStack())
            killer.enter_context(child(path, far, protocol, *rules))
            guest = stack.enter_context(Guest(path, acked=acked))
            guest.start()
            for kill in range(kills):
                assert guest.connected(kill + 1), guest.path.problems
                goal, end = len(got) + 200, time.monotonic() + PATIENCE
                while len(got) < goal:
                    assert time.monotonic() < end, (len(got), guest.path.counters())
                    order = list(guest.driver.tx.chains)
                    used = [head for head, _ in guest.driver.tx.take_used()]
                    swapped |= used != order[: len(used)]
                    if guest.driver.tx.room > 32:
                        guest.driver.send(*[frame(sent + i) for i in range(8)])
                        sent += 8
                    collect()
                killer.close()  # in the middle of it
                killer.enter_context(child(path, far, protocol, *rules))
            assert guest.connected(kills + 1), guest.path.problems

            def settled() -> bool:
                collect()
                return guest.driver.tx.outstanding == 0

            assert wait_for(settled, PATIENCE)
            collect()
            repeats = len(got) - len(set(got))
            lost = sent - len(set(got))
            assert not guest.faults and swapped == bool(rules)
            if protocol == -1:
                assert repeats == 0 and lost <= kills, (repeats, lost)
                assert got == sorted(got)
            else:
                assert lost == 0 and repeats <= guest.counter("tx_possible_repeats"), (
                    repeats,
                    lost,
                )


@pytest.mark.parametrize("acked", [ALL, ALL | RING_PACKED], ids=["split", "packed"])
def test_kills_under_traffic_to_a_tap(path: str, tmp_path: Path, acked: int) -> None:
    """What the back-end does between write and publication is in doubt after a kill: each datagram
    comes once all the same.
    """
    seqnet = build(tmp_path)
    with Namespace() as namespace, ExitStack() as stack:

        def start(*argv: Path | int | str) -> subprocess.Popen[str]:
            process = namespace.popen([*map(str, argv)], stdout=subprocess.PIPE, text=True)
            stack.callback(process.communicate)
            stack.callback(process.terminate)
            return process

        script = "ip tuntap add dev vu0 mode tap && ip link set vu0 up"
        assert namespace.run(["sh", "-c", script]).returncode == 0
        counter = start(seqnet, "count", "vu0")
        assert counter.stdout is not None
        assert counter.stdout.readline() == "ready\n"
        kills = 20
        reviver = start(sys.executable, "-m", "tests.boot.reviver", path, "vu0", kills, 1)
        revived = reviver.stdout
        assert revived is not None
        ended: list[str] = []
        watcher = threading.Thread(target=lambda: ended.append(revived.readline()), daemon=True)
        watcher.start()
        with Guest(path, acked=acked) as guest:
            guest.start()
            sent, end = 0, time.monotonic() + PATIENCE
            while not ended and time.monotonic() < end:
                guest.driver.tx.take_used()
                if guest.driver.tx.room > 64:
                    guest.driver.send(*[datagram(sent + i) for i in range(16)])
                    sent += 16
            assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
            assert guest.connected(kills + 1) and not guest.faults
        watcher.join(PATIENCE)
        counter.terminate()
        account = json.loads(counter.stdout.read())
        assert account["received"] == account["next"] == sent and not account["late"], account


def test_without_notes_the_driver_of_packed_rings_has_to_reset(path: str) -> None:
    """Nothing says how far the back-end was. The rings are lost until the driver starts anew."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    far.setblocking(False)
    with near, far, ExitStack() as stack:
        killer = stack.enter_context(ExitStack())
        killer.enter_context(child(path, far, ~INFLIGHT))
        guest = stack.enter_context(Guest(path, acked=ALL | RING_PACKED))
        guest.start()
        guest.driver.send(frame(1))
        assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
        killer.close()
        assert wait_for(lambda: guest.faults, PATIENCE)
        assert "nobody knows how far" in guest.faults[0][1] and guest.faults[0][0] == -1
        with pytest.raises(VhostUserError, match="nobody knows how far"):
            guest.path.stop()
        assert guest.path.stop() == []
        killer.enter_context(child(path, far, ~INFLIGHT))
        assert guest.connected(2)
        guest.start([ring.position for ring in guest.driver.rings])  # as the driver knows them
        guest.driver.send(frame(2))
        assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
        assert len(guest.faults) == 1


def stop_in_a_batch(process: subprocess.Popen[bytes], guest: Guest, near: socket.socket) -> None:
    """SIGSTOP a back-end of packed rings while it has received frames that it has not published."""
    rx = guest.driver.rx
    assert isinstance(rx, PackedRing)
    dice, end = random.Random(1), time.monotonic() + 2 * PATIENCE
    for tries in count():
        assert time.monotonic() < end, f"no stop in a batch in {tries} tries"
        with suppress(BlockingIOError):
            while True:
                near.send(bytes(12) + frame(0))
        process.send_signal(signal.SIGCONT)
        # A busy machine gives the process no CPU at once: the range grows with the tries.
        time.sleep(dice.random() * min(50, 1 + tries / 100) / 1000)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # all its threads, also the worker's
        guest.driver.poll()
        if rx._is_used(rx._forward(rx._taken, 1)) and not rx._is_used(rx._taken):
            return


def receive_all(guest: Guest, near: socket.socket) -> None:
    """Frames come again and again round the whole receive ring."""
    del guest.driver.received[:]
    sent = [bytes(10) + b"\1\0" + frame(n, 1400) for n in range(3 * guest.driver.rx.size)]
    for n, packet in enumerate(sent, 1):
        near.send(packet)
        assert len(guest.driver.wait_packets(n, PATIENCE)) == n
    assert guest.driver.received == sent and not guest.faults


def refuse_memory(path: str, guest: Guest) -> None:
    """Be a back-end without notes that agrees on everything but the memory."""

    class Refusing(Fake):
        FEATURES = guest.path.features() | 1 << spec.VHOST_USER_F_PROTOCOL_FEATURES

    request = spec.VHOST_USER_SET_MEM_TABLE
    answers: dict[int, Answer] = {request: raw(request, struct.pack("<Q", 1))}
    with closing(Listener(path)) as listener, Refusing(listener, answers=answers) as heir:
        # The second time, nobody has kept notes any more.
        assert wait_for(lambda: heir.seen.count(request) >= 2, PATIENCE), guest.path.problems
    assert not guest.path.connected


@pytest.mark.parametrize(
    "heir",
    [
        "emulated",
        "without notes",
        "with notes",
        "itself",
        "without notes, after a refusal",
        "with notes, after a refusal",
    ],
)
def test_a_back_end_that_ends_in_a_batch_leaves_a_whole_ring(path: str, heir: str) -> None:
    """Used descriptors of a packed ring take the place of available ones. The notes have what was
    there; a data path that does not know these notes finds the ring as the driver has left it. A
    back-end that was merely disconnected ends its batch, and goes on. One without notes that does
    not come to serve leaves all that is known to the next one.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far, ExitStack() as stack:
        for s in (near, far):
            s.setblocking(False)
        killer = stack.enter_context(ExitStack())
        process = killer.enter_context(child(path, far))
        guest = stack.enter_context(Guest(path, acked=ALL | RING_PACKED))
        guest.start()
        stop_in_a_batch(process, guest, near)
        if heir == "itself":
            guest.path.drop()
        else:
            killer.close()
        assert wait_for(lambda: not guest.path.connected, PATIENCE)
        with suppress(BlockingIOError):  # what nobody has read
            while True:
                far.recv(4096)
        if heir == "emulated":
            cable = Cable()
            stack.callback(cable.close)
            net = EmulatedNet(cable)
            stack.callback(net.close)
            rings = zip(guest.driver.rings, guest.path.stop(), strict=True)
            vrings = [ring.vring(base) for ring, base in rings]
            net.start(guest.acked, guest.memory, vrings, guest.events)
            receive_all(guest, cable.far)
            return
        if heir == "itself":
            process.send_signal(signal.SIGCONT)
        else:
            if "refusal" in heir:
                refuse_memory(path, guest)
            killer.enter_context(child(path, far, ~INFLIGHT if "without" in heir else -1))
        assert guest.connected(2), guest.path.problems
        guest.driver.poll()
        receive_all(guest, near)


def signalled(calls: Sequence[EventFd]) -> None:
    """Each of them is signalled, or has been; and reads as if it had not."""
    for call in calls:
        assert select.select([call], [], [], PATIENCE)[0]
        assert call.drain()


@pytest.mark.parametrize("acked", [ALL, ALL | RING_PACKED], ids=["split", "packed"])
def test_what_a_dead_back_end_has_not_signalled_is_signalled(path: str, acked: int) -> None:
    """It was killed between the return of chains and their interrupt. The driver waits for that
    interrupt, and gives the next back-end nothing to do: no return of a chain brings another one.
    """
    with Running(path), Guest(path, acked=acked) as guest:
        driver = guest.driver
        lost = [EventFd() for _ in driver.rings]
        vrings = [ring.vring() for ring in driver.rings]
        for vring, call in zip(vrings, lost, strict=True):
            vring.call = call
        guest.path.start(guest.acked, guest.memory, vrings, guest.events)
        signalled(lost)  # once at the start, whatever is in the rings
        for ring in driver.rings:
            ring.enable_interrupts()
        driver.send(frame(1))
        assert wait_for(lambda: driver.tx.outstanding == 0, PATIENCE)
        assert len(arrived(driver, 1)) == 1
        signalled(lost)
        bases = guest.path.stop()
        guest.path.close()
        guest.path = front_end(path, mac=MAC, timeout=PATIENCE)  # of QEMU's manners: it just starts
        guest.start(bases)
        signalled([ring.call_fd for ring in driver.rings])
        echo(guest, range(2, 5))
        for call in lost:
            call.close()


def test_a_kill_is_noticed_at_once(path: str) -> None:
    """By the end of the connection and nothing else, so within 100 ms (FAULTS, 1) unless the
    machine is busy each time.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setblocking(False)
    delays = []
    with near, far, ExitStack() as stack:
        killer = stack.enter_context(ExitStack())
        process = killer.enter_context(child(path, far))
        guest = stack.enter_context(Guest(path))
        guest.start()
        for round in range(5):
            assert guest.connected(round + 1), guest.path.problems
            died = time.monotonic()
            process.kill()
            assert wait_for(lambda n=round + 1: guest.counter("disconnections") == n, PATIENCE)  # type: ignore[misc]
            delays.append(time.monotonic() - died)
            killer.close()
            process = killer.enter_context(child(path, far))
    assert min(delays) < 0.1, delays


def test_a_stopped_backend_is_given_up_when_its_answer_is_needed(path: str) -> None:
    """SIGSTOP: the rings just wait; a stop of the rings waits for the time-out and no longer."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    far.setblocking(False)
    with near, far, child(path, far) as process, Guest(path) as guest:
        guest.start()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # all its threads, also the worker's
        guest.driver.send(frame(1))
        assert guest.path.connected and guest.driver.tx.outstanding == 1
        with impatient(guest):
            bases = guest.path.stop()
            assert guest.counter("timeouts") == 1
            guest.start(bases)  # there is nobody: parked
        process.send_signal(signal.SIGCONT)
        assert guest.connected(2), guest.path.problems
        assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)


def test_a_stop_does_not_wait_for_a_backend_that_hangs_while_it_comes_back(
    path: str, listener: Listener
) -> None:
    with Fake(listener) as fake, Guest(path, timeout=10 * PATIENCE) as guest:
        guest.start()
        fake.mute = True  # accepts, says nothing
        fake.drop()
        assert wait_for(lambda: fake.seen[-1] == spec.VHOST_USER_GET_FEATURES, PATIENCE)
        assert wait_for(lambda: fake.connections == 2, PATIENCE)
        stopper = threading.Thread(target=guest.path.stop, daemon=True)
        stopper.start()
        stopper.join(PATIENCE)
        assert not stopper.is_alive()
        fake.mute = False


# --- hostile back-ends ----------------------------------------------------------------------------


@pytest.fixture
def listener(path: str) -> Iterator[Listener]:
    one = Listener(path)
    yield one
    one.close()


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_backend_at_the_first_connection_is_an_error(
    path: str, listener: Listener, how: str
) -> None:
    with (
        Fake(listener, answers={spec.VHOST_USER_GET_FEATURES: HOSTILE[how]}),
        pytest.raises(VhostUserError),
    ):
        front_end(path, timeout=PATIENCE)


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_backend_later_costs_its_connection_only(
    path: str, listener: Listener, how: str
) -> None:
    with Fake(listener) as fake, Guest(path) as guest:
        guest.start()
        fake.answers[spec.VHOST_USER_GET_FEATURES] = HOSTILE[how]
        fake.drop()
        assert wait_for(lambda: guest.counter("refusals") >= 2, PATIENCE)
        fake.answers.clear()
        assert guest.connected(2)
        assert guest.path.stop() == [0, 0] and not guest.faults


@contextmanager
def impatient(guest: Guest) -> Iterator[None]:
    """A short time-out, for a conversation that is to fail."""
    guest.path.timeout = 0.2
    yield
    guest.path.timeout = PATIENCE


def test_a_silent_backend_times_out(path: str, listener: Listener) -> None:
    with Fake(listener) as fake, Guest(path) as guest:
        fake.mute = True
        with impatient(guest):
            guest.start()  # returns: the rings are parked
            assert guest.counter("timeouts") == 1 and not guest.path.connected
        fake.mute = False
        fake.drop()  # where the watcher waits for it
        assert guest.connected(2)
        fake.mute = True
        with impatient(guest):
            assert guest.path.stop() == [0, 0]
        assert guest.counter("timeouts") == 2
        fake.mute = False


@pytest.mark.parametrize(
    "request_",
    [
        spec.VHOST_USER_SET_VRING_ERR,
        spec.VHOST_USER_SET_VRING_KICK,
        spec.VHOST_USER_SET_VRING_CALL,
    ],
    ids=["err", "kick", "call"],
)
def test_a_backend_that_makes_our_eventfds_blocking(
    path: str, listener: Listener, request_: int
) -> None:
    """It shares their flags and counters: an empty one to read, or a full one to write, would
    block us.
    """
    kept: list[int] = []

    def grab(sock: socket.socket, m: Message) -> None:
        kept.extend(m.take_fds(1, 1))
        if len(kept) > 2:  # once per ring: we must not block ourselves
            return
        with suppress(BlockingIOError):
            os.eventfd_read(kept[-1])
        os.set_blocking(kept[-1], True)
        if request_ != spec.VHOST_USER_SET_VRING_ERR:
            os.eventfd_write(kept[-1], 2**64 - 2)

    with Fake(listener, answers={request_: grab}) as fake, Guest(path) as guest:

        def reset_twice() -> None:
            for _ in range(3):
                guest.start()
                assert guest.path.stop() == [0, 0]
            for ring in guest.driver.rings:  # as the device does in a reset
                ring.kick_fd.drain()
                ring.call_fd.drain()

        thread = threading.Thread(target=reset_twice, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive() and fake.connections == 1
    for fd in kept:
        os.close(fd)


def test_a_byte_now_and_then_times_out(path: str, listener: Listener) -> None:
    def drip(sock: socket.socket, m: Message) -> None:
        for byte in raw(m.request, struct.pack(spec.VRING_STATE, 0, 0)):
            if fake._stop.wait(0.1):
                return
            sock.send(bytes([byte]))

    with Fake(listener) as fake, Guest(path) as guest:
        guest.start()
        fake.answers[spec.VHOST_USER_GET_VRING_BASE] = drip
        with impatient(guest):
            assert guest.path.stop() == [0, 0]
        assert guest.counter("timeouts") == 1


def test_words_unasked_end_the_connection(path: str, listener: Listener) -> None:
    with Fake(listener) as fake, Guest(path) as guest:
        guest.start()
        fake._socks[-1].send(spec.VHOST_USER_GET_FEATURES, bytes(8), flags=4)
        assert wait_for(lambda: guest.counter("disconnections") == 1, PATIENCE)
        assert "unasked" in guest.path.problems[0]
        assert guest.connected(2)


@pytest.mark.parametrize("base", [257, 0x8000, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_wild_bases_are_clamped(path: str, listener: Listener, base: int) -> None:
    def wild(sock: socket.socket, m: Message) -> None:
        (index, _) = struct.unpack(spec.VRING_STATE, m.payload)
        sock.send(raw(m.request, struct.pack(spec.VRING_STATE, index, base)))

    with (
        Fake(listener, answers={spec.VHOST_USER_GET_VRING_BASE: wild}) as fake,
        Guest(path) as guest,
    ):
        guest.start()
        assert guest.path.stop() == [0, 0]
        assert guest.counter("bad_bases") == 2 and guest.path.connected
        del fake


def test_the_base_of_another_ring(path: str, listener: Listener) -> None:
    answer = raw(spec.VHOST_USER_GET_VRING_BASE, struct.pack(spec.VRING_STATE, 7, 0))
    with Fake(listener, answers={spec.VHOST_USER_GET_VRING_BASE: answer}), Guest(path) as guest:
        guest.start()
        assert guest.path.stop() == [0, 0]
        assert "answered for ring 7" in guest.path.problems[0]


def test_refused_memory(path: str, listener: Listener) -> None:
    no = raw(spec.VHOST_USER_SET_MEM_TABLE, struct.pack("<Q", 1))
    with Fake(listener, answers={spec.VHOST_USER_SET_MEM_TABLE: no}) as fake, Guest(path) as guest:
        guest.start()
        assert "refuses our memory" in guest.path.problems[0] and not guest.faults
        fake.answers.clear()
        assert guest.connected(2)


def test_the_backend_s_own_requests(path: str, listener: Listener) -> None:
    protocol = REPLY_ACK | 1 << spec.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    with Fake(listener, protocol) as fake, Guest(path) as guest:
        guest.start()
        with socket.socket(fileno=os.dup(fake.requests[0])) as s:
            s.settimeout(PATIENCE)
            for request, verdict in (
                (spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, 0),
                (99, 1),
                (3, 1),
            ):
                s.send(raw(request, flags=9))
                assert s.recv(100) == raw(request, struct.pack("<Q", verdict))
            fd = os.eventfd(0)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("8i", *[fd] * 8))]
            s.sendmsg([raw(2, flags=9)], rights)
            os.close(fd)
            assert s.recv(100) == raw(2, bytes(8))
            s.send(b"\xff" * 40)
            try:
                assert s.recv(100) == b""  # closed
            except ConnectionResetError:
                pass  # with some of it unread
        assert guest.path.connected and guest.counter("backend_requests") == 4
        assert guest.path.stop() == [0, 0]


def test_an_error_of_a_ring_is_the_guest_s(path: str) -> None:
    with Running(path) as running, Guest(path) as guest:
        guest.start()
        guest.driver.tx.set_avail(0, 999)  # a head outside the table
        guest.driver.tx.set_avail_idx(1)
        guest.driver.tx.kick()
        assert wait_for(lambda: guest.faults, PATIENCE)
        assert guest.faults == [(1, "queue 1: the vhost-user back-end has found it malformed")]
        assert running.backend.counters()["ring_faults"] == 1


# --- hostile front-ends ---------------------------------------------------------------------------


class FrontEnd:
    """Says what it is told to, as it is."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        assert wait_for(lambda: not self.sock.connect_ex(path), PATIENCE)
        self.sock.settimeout(PATIENCE)
        self.channel = Channel(self.sock.dup())
        self.memory = GuestMemory(1 << 20)

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        answer = self.channel.ask(request, payload, fds, need_reply=True, timeout=PATIENCE)
        answer.close()
        return answer

    def nacked(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        return self.ask(request, payload, fds).u64 != 0

    def negotiate(self) -> FrontEnd:
        self.channel.send(
            spec.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", REPLY_ACK | SLOTS | INFLIGHT)
        )
        return self

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.channel.close()
        self.sock.close()
        self.memory.close()


def state(index: int, num: int) -> bytes:
    return struct.pack(spec.VRING_STATE, index, num)


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return struct.pack(spec.MEM_HEADER, len(regions), 0) + b"".join(
        struct.pack(spec.MEM_REGION, *r) for r in regions
    )


def test_hostile_requests_are_refused(path: str) -> None:
    with Running(path) as running:
        with FrontEnd(path).negotiate() as f:
            fd = f.memory.fd.fileno()
            event = os.eventfd(0)
            pipe = os.pipe()
            mib = 1 << 20
            wrong: list[tuple[Any, ...]] = [
                (spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", 1 << 63 | VERSION_1)),
                (spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", 0)),
                (spec.VHOST_USER_SET_FEATURES, b"1234"),
                (spec.VHOST_USER_SET_VRING_NUM, state(2, 256)),
                (spec.VHOST_USER_SET_VRING_NUM, state(0xFFFFFFFF, 256)),
                (spec.VHOST_USER_SET_VRING_NUM, state(0, 255)),
                (spec.VHOST_USER_SET_VRING_NUM, state(0, 0)),
                (spec.VHOST_USER_SET_VRING_NUM, state(0, 65536)),
                (spec.VHOST_USER_SET_VRING_BASE, state(0, 65536)),
                (spec.VHOST_USER_SET_VRING_ENABLE, state(64, 1)),
                (spec.VHOST_USER_SET_VRING_ADDR, struct.pack(spec.VRING_ADDR, 0, 1, 0, 0, 0, 0)),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 0, 0))),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 0, 0)), [fd, fd]),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, 0, 0, 0)), [fd]),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 0, mib)), [fd]),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, 1 << 62, 0, 1 << 62)), [fd]),
                (spec.VHOST_USER_SET_MEM_TABLE, table((2**64 - 4096, 8192, 0, 0)), [fd]),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 2**64 - 4096, 0)), [fd]),
                (
                    spec.VHOST_USER_SET_MEM_TABLE,
                    table((0, 8192, 0, 0), (4096, 8192, mib, 8192)),
                    [fd, fd],
                ),
                (spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 0, 0)), [pipe[0]]),
                (spec.VHOST_USER_SET_MEM_TABLE, struct.pack("<II", 9, 0) + bytes(32), [fd]),
                (spec.VHOST_USER_ADD_MEM_REG, bytes(40)),
                (spec.VHOST_USER_ADD_MEM_REG, bytes(40), [fd]),
                (spec.VHOST_USER_REM_MEM_REG, bytes(40)),
                (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 0)),
                (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 256)),
                (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 256), [event]),
                (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 0), [event] * 2),
                (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 200), [event]),
                (spec.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", 0), [pipe[1]]),
                (spec.VHOST_USER_SET_VRING_ERR, struct.pack("<Q", 0), [fd]),
                (
                    spec.VHOST_USER_SET_INFLIGHT_FD,
                    struct.pack(spec.INFLIGHT, 4096, 0, 2, 256),
                    [fd],
                ),
                (
                    spec.VHOST_USER_SET_INFLIGHT_FD,
                    struct.pack(spec.INFLIGHT, 1 << 31, 0, 2, 256),
                    [fd],
                ),
                (
                    spec.VHOST_USER_SET_INFLIGHT_FD,
                    struct.pack(spec.INFLIGHT, 1 << 15, 1, 2, 256),
                    [fd],
                ),
                (spec.VHOST_USER_GET_INFLIGHT_FD, struct.pack(spec.INFLIGHT, 0, 0, 1000, 256)),
                (spec.VHOST_USER_GET_INFLIGHT_FD, struct.pack(spec.INFLIGHT, 0, 0, 2, 0xFFFF)),
                (spec.VHOST_USER_NET_SET_MTU, struct.pack("<Q", 1)),
                (spec.VHOST_USER_SEND_RARP, b"12"),
                (spec.VHOST_USER_SET_LOG_BASE, bytes(16), [fd]),
                (spec.VHOST_USER_SET_LOG_FD, b"", [fd]),
                (spec.VHOST_USER_IOTLB_MSG, bytes(32)),
                (0, b""),
                (0xFFFFFFFF, b"", [fd] * 8),
            ]
            f.ask(spec.VHOST_USER_GET_FEATURES)  # it has accepted us
            before = open_fds()
            for message in wrong:
                assert f.nacked(*message), message
            # The answer comes before the message's descriptors are closed.
            assert wait_for(lambda: not open_fds() - before, PATIENCE)
            # And it serves on.
            assert f.ask(spec.VHOST_USER_GET_FEATURES).u64 & ALL == ALL
            assert not f.nacked(spec.VHOST_USER_SET_MEM_TABLE, table((0, mib, 4096, 0)), [fd])
            assert f.nacked(
                spec.VHOST_USER_SET_VRING_ADDR, struct.pack(spec.VRING_ADDR, 0, 0, 0, 0, 0, 0)
            )
            for one in (event, *pipe):
                os.close(one)
        assert wait_for(lambda: "front-end disconnected" in running.log, PATIENCE)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.tuples(
            # Not SET_PROTOCOL_FEATURES: without REPLY_ACK we would wait for answers in vain.
            st.integers(0, 45).filter(lambda n: n != spec.VHOST_USER_SET_PROTOCOL_FEATURES),
            st.one_of(
                st.binary(max_size=64),
                st.tuples(st.integers(0, 3), st.integers(0, 300)).map(lambda t: state(*t)),
                st.integers(0, 300).map(lambda n: struct.pack("<Q", n)),
                st.just(table((0, 1 << 20, 0, 0))),
                st.integers(0, 3).map(
                    lambda i: struct.pack(spec.VRING_ADDR, i, 0, 0x1000, 0x2000, 0x3000, 0)
                ),
                st.just(struct.pack(spec.INFLIGHT, 1 << 14, 0, 2, 256)),
            ),
            st.lists(st.sampled_from(["memory", "event"]), max_size=3),
        ),
        max_size=30,
    )
)
def test_any_sequence_of_requests_leaves_a_working_backend(
    busy: tuple[str, int], messages: list[tuple[int, bytes, list[str]]]
) -> None:
    """Requests in any order with any payload: each is answered or ends the session, and the next
    one is served.
    """
    path, event = busy
    with FrontEnd(path).negotiate() as f:
        fds = {"memory": f.memory.fd.fileno(), "event": event}
        try:
            for request, payload, names in messages:
                f.ask(request, payload, [fds[n] for n in names])
        except VhostUserError as e:
            # It has ended the session, or its answer is no number.
            assert not isinstance(e, TimedOut), e
    with FrontEnd(path) as f:
        assert f.ask(spec.VHOST_USER_GET_FEATURES).u64 & ALL == ALL


@pytest.fixture
def busy(path: str) -> Iterator[tuple[str, int]]:
    """A back-end, and an eventfd for its rings."""
    event = os.eventfd(0)
    with Running(path) as running:
        yield path, event
        assert running.thread.is_alive()
    os.close(event)


def test_without_acks_a_refusal_ends_the_session_only(path: str) -> None:
    with Running(path) as running:
        with FrontEnd(path) as f:
            f.channel.send(spec.VHOST_USER_SET_VRING_NUM, state(9, 9))
            with pytest.raises(VhostUserError):
                f.channel.receive(PATIENCE)
        assert wait_for(lambda: any("session ended" in line for line in running.log), PATIENCE)
        with Guest(path) as guest:
            guest.start()
            echo(guest, range(20))


def test_memory_slots_come_and_go(path: str) -> None:
    with Running(path), FrontEnd(path).negotiate() as f:
        fd = f.memory.fd.fileno()
        for _ in range(3):
            for i in range(64):
                region = bytes(8) + struct.pack(spec.MEM_REGION, i << 14, 1 << 14, i << 14, i << 14)
                assert not f.nacked(spec.VHOST_USER_ADD_MEM_REG, region, [fd])
            one_more = bytes(8) + struct.pack(spec.MEM_REGION, 1 << 30, 1 << 14, 1 << 30, 0)
            assert f.nacked(spec.VHOST_USER_ADD_MEM_REG, one_more, [fd])
            for i in range(64):
                region = bytes(8) + struct.pack(spec.MEM_REGION, i << 14, 1 << 14, i << 14, 0)
                # A descriptor with it is an old mistake that is to be tolerated.
                assert not f.nacked(spec.VHOST_USER_REM_MEM_REG, region, [fd] * (i % 2))


class TagService:
    """A back-end's part for a device that is no network card: one ring, and a tag to be read.

    :ivar started: what ``start`` was given, each time.
    """

    name = "tag"
    rings = queue_num = 1
    in_order = False
    protocol_features = 1 << spec.VHOST_USER_PROTOCOL_F_CONFIG

    def __init__(self) -> None:
        self.requests: Mapping[int, Handler] = {
            spec.VHOST_USER_GET_CONFIG: lambda frontend, m: (b"myfs", [])
        }
        self.started: list[tuple[Any, ...]] = []
        self.running = False
        self.closed = False

    def features(self) -> int:
        return VERSION_1 | 1 << 5

    def check_features(self, acked: int) -> None:
        pass

    def start(
        self, acked: int, memory: MemoryTable, rings: Sequence[Vring], events: PathEvents
    ) -> None:
        self.started.append((acked, memory, rings, events))
        self.running = True

    def stop(self) -> list[int]:
        self.running = False
        return [7]

    def counters(self) -> dict[str, int]:
        return {"starts": len(self.started)}

    def close(self) -> None:
        self.closed = True


def test_a_backend_for_a_device_that_is_no_network_card(path: str) -> None:
    """Features, messages, rings and positions are the service's; none of a network card's are
    there.
    """
    service = TagService()
    with Running(path, service=service) as running, FrontEnd(path) as f:
        kick, call, err = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        offered = f.ask(spec.VHOST_USER_GET_FEATURES).u64
        assert offered == VERSION_1 | 1 << 5 | 1 << spec.VHOST_USER_F_PROTOCOL_FEATURES
        protocol = f.ask(spec.VHOST_USER_GET_PROTOCOL_FEATURES).u64
        assert protocol >> spec.VHOST_USER_PROTOCOL_F_CONFIG & 1
        assert not protocol >> spec.VHOST_USER_PROTOCOL_F_MTU & 1
        f.channel.send(spec.VHOST_USER_SET_PROTOCOL_FEATURES, struct.pack("<Q", REPLY_ACK))
        assert f.nacked(spec.VHOST_USER_SEND_RARP, bytes(8))
        assert f.nacked(spec.VHOST_USER_SET_VRING_NUM, state(1, 64))
        assert f.ask(spec.VHOST_USER_GET_CONFIG, bytes(16)).payload == b"myfs"
        fd = f.memory.fd.fileno()
        for request, payload, *fds in (
            (spec.VHOST_USER_SET_FEATURES, struct.pack("<Q", offered)),
            (spec.VHOST_USER_SET_MEM_TABLE, table((0, 1 << 20, 1 << 30, 0)), fd),
            (spec.VHOST_USER_SET_VRING_NUM, state(0, 64)),
            (spec.VHOST_USER_SET_VRING_BASE, state(0, 3)),
            (
                spec.VHOST_USER_SET_VRING_ADDR,
                struct.pack(spec.VRING_ADDR, 0, 0, *((1 << 30) + n for n in (0, 8192, 4096)), 0),
            ),
            (spec.VHOST_USER_SET_VRING_ERR, struct.pack("<Q", 0), err),
            (spec.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 0), kick),
            (spec.VHOST_USER_SET_VRING_CALL, struct.pack("<Q", 0), call),
            (spec.VHOST_USER_SET_VRING_ENABLE, state(0, 1)),
        ):
            assert not f.nacked(request, payload, fds)
        ((acked, _memory, (ring,), events),) = service.started
        assert acked == offered
        # Not corrected: its device may finish chains in any order.
        assert (ring.size, ring.base) == (64, 3)
        assert (ring.desc, ring.used, ring.avail) == (0, 8192, 4096)
        events.fault(0, "it is malformed")
        assert os.eventfd_read(err) == 1 and "fault: it is malformed" in running.log
        f.channel.send(spec.VHOST_USER_GET_VRING_BASE, state(0, 0))
        with closing(f.channel.receive(PATIENCE)) as answer:
            assert answer.payload == state(0, 7)
        assert running.backend.counters()["starts"] == 1 and not service.running
        for event in (kick, call, err):
            os.close(event)
    assert service.closed


def test_an_inflight_region_of_garbage(path: str) -> None:
    """Whatever is in it, the back-end stays in bounds and serves."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for s in (near, far):
        s.setblocking(False)
    with near, far, ExitStack() as stack:
        killer = stack.enter_context(ExitStack())
        killer.enter_context(child(path, far))
        guest = stack.enter_context(Guest(path))
        guest.start()
        inflight = guest.path._rings.inflight
        assert inflight is not None
        size = struct.unpack(spec.INFLIGHT, inflight.description)[0]
        fd = inflight.fd.fileno()
        for round, fill in enumerate((b"\xff", b"\x01\x00", os.urandom(64))):
            killer.close()
            assert wait_for(lambda: not guest.path.connected, PATIENCE)
            image = bytearray((fill * size)[:size])
            image[8:12] = struct.pack("<HH", 1, 256)
            os.pwrite(fd, image, 0)
            killer.enter_context(child(path, far))
            assert guest.connected(round + 2), guest.path.problems
            guest.driver.send(*[frame(i) for i in range(8)])
            assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)


def test_rarp_is_a_frame() -> None:
    assert len(rarp(MAC)) == 60 and rarp(MAC)[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
    assert re.match(rb"\x00\x01\x08\x00\x06\x04\x00\x03", rarp(MAC)[14:], re.DOTALL)


# --- the commands ---------------------------------------------------------------------------------


class Ran:
    """`pyvmm backend` as a process.

    :ivar out: what it printed to stdout; empty until it has ended. :ivar err: to stderr.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self.out = self.err = ""


@contextmanager
def command(*argv: str) -> Iterator[Ran]:
    """`pyvmm backend ARGV`; asked to end at the end, which it must do properly."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "backend", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ran = Ran(process)
        yield ran
        process.terminate()
        ran.out, ran.err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, ran.err
    finally:
        process.kill()
        process.communicate()


def test_a_confined_back_end_captures(path: str, tmp_path: Path) -> None:
    """Beside a port, what it moves; alone, what it takes."""
    beside, alone = tmp_path / "beside.pcapng", tmp_path / "alone.pcapng"
    with command("--socket", path, "--loopback", "--pcap", str(beside)), Guest(path) as guest:
        guest.start()
        echo(guest, range(20))
    with command("--socket", path, "--pcap", str(alone)), Guest(path) as guest:
        guest.start()
        guest.driver.send(*[frame(n) for n in range(20)])
        assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
    ways = "frame.packet_flags_direction"
    for file, want in ((beside, {"0x00000001": 20, "0x00000002": 20}), (alone, {"0x00000002": 20})):
        argv = ["tshark", "-n", "-r", str(file), "-T", "fields", "-e", ways]
        shown = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=PATIENCE)
        assert Counter(shown.stdout.split()) == want
        assert file.stat().st_mode & 0o777 == 0o600


def test_busy_polling_and_pinning_by_the_command(path: str) -> None:
    """`--poll --worker-cpu C`: worker k is on CPU C + k, and the guest is not asked for kicks."""
    first = min(os.sched_getaffinity(0))
    argv = ("--socket", path, "--loopback", "--poll", "--worker-cpu", str(first), "--counters")
    with command(*argv) as backend, Guest(path) as guest:
        guest.start()
        echo(guest, range(64))
        kicks = guest.driver.tx.kicks
        echo(guest, range(64, 256))
        assert guest.driver.tx.kicks == kicks
        tasks = [
            t
            for t in Path(f"/proc/{backend.pid}/task").iterdir()
            if (t / "comm").read_text() == "loop-0\n"
        ]
        assert [os.sched_getaffinity(int(t.name)) for t in tasks] == [{first}]
    assert json.loads(backend.out)["wakeups"] == 0


def test_backend_and_probe_commands(path: str) -> None:
    probe = [sys.executable, "-m", "pyvmm", "vhost-user", "probe", "--timeout", "60"]
    with command("--socket", path, "--loopback", "--queues", "2", "--counters") as backend:
        assert wait_for(lambda: listening(path), PATIENCE)
        with Guest(path, queues=2) as guest:
            guest.start()
            echo(guest, range(64))
        done = subprocess.run([*probe, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "queue pairs:       2" in done.stdout and "EVENT_IDX" in done.stdout
        assert re.search(r"us  SET_VRING_ENABLE\(1, 1\) +ok$", done.stdout, re.MULTILINE)
        done = subprocess.run([*probe, "--json", path], capture_output=True, text=True)
        report = json.loads(done.stdout)
        assert "INFLIGHT_SHMFD" in report["protocol_features"] and report["error"] is None
        assert {s["outcome"] for s in report["steps"]} <= {"ok", "sent"}
    counters = json.loads(backend.out)
    assert (
        counters["tx_packets"] == 64 and counters["connections"] == 3 and counters["refused"] == 0
    )
    assert backend.err.count("front-end connected") == 3
    assert not Path(path).exists()
    done = subprocess.run([*probe, path], capture_output=True, text=True)
    assert done.returncode == 112 and "start the other side first" in done.stderr


def test_two_machines_joined_by_the_backend_command(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with command("--socket", a, "--connect", b), Guest(a) as one, Guest(b) as two:
        one.start()
        two.start()
        one.driver.send(frame(7))
        assert two.driver.wait_packets(1, PATIENCE)[0][12:] == frame(7)


def test_probe_of_backends_that_misbehave(path: str, listener: Listener) -> None:
    no = raw(spec.VHOST_USER_SET_MEM_TABLE, struct.pack("<Q", 1))
    with Fake(listener, answers={spec.VHOST_USER_SET_MEM_TABLE: no}) as fake:
        with Probe(path, timeout=PATIENCE) as probe:
            probe.run()
        refused = [s.message for s in probe.steps if s.outcome == "refused"]
        assert refused == ["SET_MEM_TABLE"] and probe.queues is None
        fake.answers[spec.VHOST_USER_SET_OWNER] = lambda sock, m: sock.shutdown(socket.SHUT_RDWR)
        with Probe(path, timeout=PATIENCE) as probe, pytest.raises(VhostUserError):
            probe.run()
        assert (
            probe.steps[-1].message == "SET_OWNER"
            and probe.steps[-1].outcome == "closed the connection"
        )
        fake.answers[spec.VHOST_USER_SET_OWNER] = lambda sock, m: None
        with Probe(path, timeout=0.05) as probe, pytest.raises(VhostUserError):
            probe.run()
        assert "no answer" in probe.steps[-1].outcome


@pytest.mark.parametrize(
    "argv",
    [
        ["--queues", "0", "--loopback"],
        ["--loopback", "--address", "10.0.0.1/8"],
        ["--pcap", "/no/such/dir/x"],
    ],
)
def test_backend_usage(path: str, argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "backend", "--socket", path, *argv],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
