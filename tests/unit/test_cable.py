"""Workers on a cable (cext/cable.h): a loop, and two front-ends joined, with mock drivers."""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import SocketPort, joined_ports, loop_port
from pyvmm.datapath.cable import CableEnd, cables
from pyvmm.datapath.ringformat import PACKED, SPLIT, RingFormat
from pyvmm.hostnet.frames import rarp
from pyvmm.spec import vhost_user as spec
from tests.driver import wait_for
from tests.ringforms import Form, form, pytest_generate_tests
from tests.unit.test_net_worker import (
    ALL,
    EVENT_IDX,
    FEATURE_SETS,
    LONG_MS,
    MRG,
    PATIENCE,
    VERSION_1,
    Rig,
    cpu_seconds,
    frame,
    positions,
    start_near_wrap,
)
from tests.unit.test_vhost_user import ALL as OFFERED
from tests.unit.test_vhost_user import MAC, RING_PACKED, Guest

__all__ = ["form", "pytest_generate_tests"]

QUEUE = 256 << 10  # PV_CABLE_BYTES


@contextmanager
def joined(acked: int = ALL, **options: Any) -> Iterator[tuple[Rig, Rig]]:
    """Two rigs at the ends of a cable; neither has been started."""
    with ExitStack() as stack:
        ports = joined_ports(1)
        for port in ports:
            stack.callback(port.close)
        near, far = (stack.enter_context(Rig(acked, port=port, **options)) for port in ports)
        yield near, far


@contextmanager
def fed(acked: int = ALL, **options: Any) -> Iterator[tuple[Rig, CableEnd]]:
    """A rig, and the far end of its cable, by which the test sends."""
    ((near, far),) = cables(1, 2)
    port = SocketPort("near", [near])
    with far, Rig(acked, port=port, **options) as rig:
        yield rig, far
        rig.path.close()
        port.close()


@contextmanager
def looped(acked: int = ALL, **options: Any) -> Iterator[Rig]:
    """A rig whose frames come back."""
    port = loop_port(1)
    with Rig(acked, port=port, **options) as rig:
        yield rig
        rig.path.close()
        port.close()


@pytest.mark.parametrize("acked", FEATURE_SETS)
@pytest.mark.parametrize("near_wrap", [False, True])
def test_frames_pass_both_ways_in_order(acked: int, near_wrap: bool, form: RingFormat) -> None:
    start = start_near_wrap(65500) if near_wrap else form.start
    with joined(acked, start=start) as rigs:
        ways = (rigs, rigs[::-1])
        for rig in rigs:
            rig.start()
        sent = [[frame(1000 * way + i, 60 + i % 1400) for i in range(600)] for way in (0, 1)]
        for at in range(0, 600, 50):
            for (sender, _), frames in zip(ways, sent, strict=True):
                sender.driver.send(*frames[at : at + 50])
            for _, receiver in ways:
                assert len(receiver.driver.wait_packets(at + 50, PATIENCE)) == at + 50
        for (sender, receiver), frames in zip(ways, sent, strict=True):
            assert receiver.driver.received == [bytes(10) + b"\1\0" + f for f in frames]
            assert wait_for(lambda s=sender: s.driver.tx.outstanding == 0)  # type: ignore[misc]
        for rig in rigs:
            bases = rig.path.stop()
            assert bases == [ring.position for ring in rig.driver.rings]
            assert bases == [positions(start, 600, rig.driver.rx)] * 2
            c = rig.path.counters()
            assert (c["rx_packets"], c["tx_packets"]) == (600, 600)
            assert c["rx_bytes"] == c["tx_bytes"] == sum(map(len, sent[0]))
            assert c["rx_csum_none"] == c["tx_csum_none"] == 600
            assert c["tx_batches"] < 300 and c["fd_reads"] == c["fd_writes"] == 0
            assert not rig.faults


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_bursts_go_round_rings_of_any_size(size: int, form: RingFormat) -> None:
    """From shortly before the end of the largest: a burst may not go beyond the ring."""
    start, dice, sent = form.start, random.Random(size), 0
    if size == 32768:
        start = 65530 if form is SPLIT else (1 << 15 | 32760) * 0x10001
    with joined(size=size, start=start, rx_buffers=min(size, 256)) as (near, far):
        near.start()
        far.start()
        end = time.monotonic() + PATIENCE
        while sent < 300:
            assert time.monotonic() < end, f"{sent} of 300 frames sent, and no room for more"
            near.driver.tx.take_used()
            count = min(near.driver.tx.room, 300 - sent, dice.choice((1, 2, 5, 40)))
            if count:
                near.driver.send(*[frame(sent + i, 60 + (sent + i) % 700) for i in range(count)])
                sent += count
            far.driver.poll()
        packets = far.driver.wait_packets(300, PATIENCE)
        assert [p[12:] for p in packets] == [frame(i, 60 + i % 700) for i in range(300)]
        assert wait_for(lambda: near.driver.tx.outstanding == 0)
        for rig in (near, far):
            assert rig.path.stop() == [ring.position for ring in rig.driver.rings]
            assert not rig.faults


@pytest.mark.parametrize("acked", FEATURE_SETS)
@pytest.mark.parametrize("poll_us", [0, 1000])
def test_a_loop_shows_nothing_of_the_sender_s_header(acked: int, poll_us: int) -> None:
    """NEEDS_CSUM, GSO_TCPV4, lengths and offsets: nothing of it was negotiated (5.1.6.4.1). The
    header may be in a segment of its own.
    """
    evil = struct.pack("<BBHHHHH", 1, 1, 0xFFFF, 1, 0xFFF0, 0xFFF0, 7)
    with looped(acked, poll_us=poll_us) as rig:
        rig.start()
        for split in ([12], [1] * 12, [5, 20], [71]):
            rig.driver.received.clear()
            rig.driver.queue(frame(7), header=evil, split=split)
            rig.driver.tx.publish()
            (got,) = rig.driver.wait_packets(1, PATIENCE)
            assert got == bytes(10) + b"\1\0" + frame(7)
        c = rig.path.counters()
        assert c["tx_csum_none"] == c["rx_csum_none"] == 4
        assert not any(
            c[f"{way}_{what}"] for way in ("tx", "rx") for what in ("csum_needed", "gso_packets")
        )


@pytest.mark.parametrize("acked", [VERSION_1 | MRG, ALL])
def test_bursts_go_round_a_loop(acked: int) -> None:
    """One publication per burst, and no system call for any of its frames."""
    with looped(acked) as rig:
        frames = [frame(i) for i in range(200)]
        for f in frames:
            rig.driver.queue(f)
        rig.driver.tx.publish(kick=False)
        rig.start()
        assert [p[12:] for p in rig.driver.wait_packets(200, PATIENCE)] == frames
        assert wait_for(lambda: rig.driver.tx.outstanding == 0)
        rig.path.stop()
        c = rig.path.counters()
        assert c["tx_batches"] == 7 and c["rx_batches"] == 7  # of 32
        assert c["tx_calls"] + c["rx_calls"] <= 14


@pytest.mark.parametrize("rx_size", [700, 2048, 4096])
def test_long_frames_are_merged(rx_size: int) -> None:
    with fed(rx_size=rx_size) as (rig, far):
        rig.start()
        lengths = [60, 1514, 9000, 65553, 65553, 64, 1] + [60] * 100 + [65553, 60]
        for i, n in enumerate(lengths):
            far.send(frame(i, n)[:n])
            assert len(rig.driver.wait_packets(i + 1, PATIENCE)) == i + 1
        expected = [frame(i, n)[:n] for i, n in enumerate(lengths)]
        assert [p[12:] for p in rig.driver.received] == expected
        for p in rig.driver.received:
            assert struct.unpack_from("<H", p, 10)[0] == -(-len(p) // rx_size)
        assert rig.path.stop()[0] == rig.driver.rx.position


def test_a_frame_longer_than_its_chain_is_dropped_without_mrg_rxbuf() -> None:
    with fed(ALL & ~MRG) as (rig, far):
        rig.start()
        for f in (frame(1, 3000), frame(2), frame(3, 2036), frame(4, 2037), frame(5)):
            far.send(f)
        packets = rig.driver.wait_packets(3, PATIENCE)
        assert [p[12:] for p in packets] == [frame(2), frame(3, 2036), frame(5)]
        assert rig.counter("rx_drop_long") == 2


def test_a_frame_longer_than_the_whole_ring_is_dropped() -> None:
    with fed(size=16) as (rig, far):
        rig.start()
        far.send(frame(1, 65000))
        far.send(frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1, PATIENCE)] == [frame(2)]
        assert rig.counter("rx_drop_long") == 1


def test_a_frame_longer_than_any_is_refused() -> None:
    with looped() as rig:
        rig.start()
        rig.driver.send(frame(1, 65554), frame(2, 65553), frame(3))
        packets = rig.driver.wait_packets(2, PATIENCE)
        assert [p[12:] for p in packets] == [frame(2, 65553), frame(3)]
        assert rig.counter("tx_drop_error") == 1


def test_a_frame_that_lacks_buffers_waits_until_they_come() -> None:
    with fed(hold_ms=LONG_MS, fill=False) as (rig, far):
        rig.driver.fill(10)
        rig.start()
        far.send(frame(1, 65000))
        far.send(frame(2))
        assert wait_for(lambda: rig.counter("wakeups") > 0)
        rig.driver.fill(10)
        time.sleep(0.02)
        assert rig.driver.rx.returned == 0
        rig.driver.fill()
        packets = rig.driver.wait_packets(2, PATIENCE)
        assert [p[12:] for p in packets] == [frame(1, 65000), frame(2)]
        assert rig.counter("rx_drop_held") == 0


@pytest.mark.parametrize("poll_us", [0, 60_000_000])
def test_a_frame_that_lacks_buffers_does_not_freeze_receive(poll_us: int) -> None:
    with fed(fill=False, poll_us=poll_us) as (rig, far):
        rig.driver.fill(10)
        rig.start()
        far.send(frame(1, 65000))
        far.send(frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1, PATIENCE)] == [frame(2)]
        assert rig.counter("rx_drop_held") == 1


def test_a_full_queue_stops_the_sender_and_loses_nothing() -> None:
    """The far front-end comes late, leaves for a while, and gets every frame once."""
    with joined() as (near, far):
        near.start()
        count, got = 400, 0
        frames = [frame(i, 1400) for i in range(count)]
        assert count * 1400 > QUEUE + 256 * 1400 / 2
        at = 0
        while not near.counter("tx_blocks"):
            near.driver.send(*frames[at : at + 20])
            at += 20
            assert wait_for(
                lambda: near.driver.tx.outstanding == 0 or near.counter("tx_blocks") > 0
            )
        assert at < count
        used = cpu_seconds(near)
        time.sleep(0.2)
        assert cpu_seconds(near) - used < 0.1
        base = near.path.stop()[1]
        assert base == near.driver.tx.position and near.driver.tx.outstanding > 0
        near.start([near.driver.rx.position, base])
        far.start()
        got = len(far.driver.wait_packets(at, PATIENCE))
        assert got == at
        bases = far.path.stop()
        near.driver.send(*frames[at : at + 20])
        assert wait_for(lambda: near.driver.tx.outstanding == 0)
        far.start(bases)
        assert [p[12:] for p in far.driver.wait_packets(at + 20, PATIENCE)] == frames[: at + 20]
        assert near.counter("tx_drop_error") == far.counter("rx_drop_held") == 0


@pytest.mark.parametrize("acked", [VERSION_1 | MRG, ALL])
def test_no_wakeup_is_lost(acked: int) -> None:
    """Ping-pong with pauses about as long as a worker looks for work before it sleeps."""
    dice = random.Random(1)
    with joined(acked) as rigs:
        for rig in rigs:
            rig.start()
        for n in range(400):
            sender, receiver = rigs[n % 2], rigs[1 - n % 2]
            sender.driver.send(frame(n))
            assert receiver.driver.wait_packets(n // 2 + 1, PATIENCE)[-1][12:] == frame(n)
            sender.driver.tx.take_used()
            time.sleep(dice.choice((0, 0.00005, 0.0001, 0.001)))


def test_a_sender_that_waits_for_room_is_woken() -> None:
    """Again and again the queue becomes full, and empty."""
    with joined(rx_buffers=64, hold_ms=LONG_MS) as (near, far):
        near.start()
        far.start()
        sent: list[bytes] = []
        for round in range(1, 11):
            while near.counter("tx_blocks") < round:
                sent.append(frame(len(sent), 9000))
                near.driver.send(sent[-1])
                assert wait_for(
                    lambda n=round: (
                        near.driver.tx.outstanding == 0 or near.counter("tx_blocks") >= n
                    )  # type: ignore[misc]
                )
            assert len(far.driver.wait_packets(len(sent), PATIENCE)) == len(sent)
            assert wait_for(lambda: near.driver.tx.take_used() or not near.driver.tx.outstanding)
        assert [p[12:] for p in far.driver.received] == sent


def test_a_hostile_ring_stops_only_its_own_front_end() -> None:
    with joined() as (near, far):
        near.start()
        far.start()
        near.driver.send(*[frame(i) for i in range(5)])
        assert len(far.driver.wait_packets(5, PATIENCE)) == 5
        assert wait_for(lambda: near.driver.tx.outstanding == 0)
        near.driver.send(frame(5), kick=False)
        near.driver.tx.spoil()
        assert wait_for(lambda: near.faults)
        assert [queue for queue, _ in near.faults] == [1] and not far.faults
        far.driver.send(frame(6))  # near still receives
        assert near.driver.wait_packets(1, PATIENCE)[0][12:] == frame(6)
        assert far.path.stop() == [ring.position for ring in far.driver.rings]


def test_a_frame_that_was_given_up_makes_room() -> None:
    """Also if it is the last in the queue, and the sender waits for that room."""
    with joined(hold_ms=20, fill=False) as (near, far):
        near.start()
        far.driver.fill(10)
        far.start()
        for i in range(6):
            near.driver.send(frame(i, 65553))
            assert wait_for(lambda: near.driver.tx.outstanding == 0)
        near.driver.send(*[frame(i, 65553) for i in range(6)])
        assert wait_for(lambda: near.driver.tx.outstanding == 0)
        assert wait_for(lambda: far.counter("rx_drop_held") == 12)


def test_hold_stops_transmitting_only() -> None:
    with joined() as (near, far):
        near.start()
        far.start()
        near.path.stop_transmit()
        near.driver.send(frame(1))
        far.driver.send(frame(2))
        assert near.driver.wait_packets(1, PATIENCE)[0][12:] == frame(2)
        assert near.driver.tx.outstanding == 1 and not far.driver.poll()
        bases = near.path.stop()
        near.start(bases)
        assert far.driver.wait_packets(1, PATIENCE)[0][12:] == frame(1)


def test_an_announcement_goes_over_the_cable() -> None:
    with joined() as (_, far):
        far.start()
        (left, right) = joined_ports(1)
        right.close()
        service = NetService(left)
        frontend: Any = SimpleNamespace(park=lambda: None, log=print)
        message: Any = SimpleNamespace(payload=MAC + bytes(2))
        service.requests[spec.VHOST_USER_SEND_RARP](frontend, message)
        service.close()
    ends = joined_ports(1)
    with Rig(port=ends[1]) as rig:
        service = NetService(ends[0])
        service.requests[spec.VHOST_USER_SEND_RARP](frontend, message)
        rig.start()
        assert rig.driver.wait_packets(1, PATIENCE)[0][12:] == rarp(MAC)
        rig.path.close()
        service.close()
        ends[1].close()


def test_a_kill_returns_every_chain_once(tmp_path: Path) -> None:
    """The back-end dies with what was in its queue, as a socket does. Nothing comes twice, and
    with in-flight notes every chain is returned.
    """
    path = str(tmp_path / "s")
    argv = [sys.executable, "-m", "pyvmm", "backend", "--loopback", "--quiet", "--socket", path]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*argv, "--sandbox", "off"])

    acked = OFFERED | (RING_PACKED if Form.now is PACKED else 0)
    process = start()
    try:
        assert wait_for(Path(path).exists, PATIENCE)
        with Guest(path, acked=acked) as guest:
            guest.start()
            sent = 0
            numbers: list[int] = []

            def collect() -> int:
                guest.driver.poll()
                numbers[:] = [
                    struct.unpack_from("<I", p, 12)[0]
                    for p in guest.driver.received
                    if p[24:26] != b"\x80\x35"
                ]
                return len(numbers)

            for kill in range(4):
                assert guest.connected(kill + 1), guest.path.problems
                goal, end = collect() + 300, time.monotonic() + PATIENCE
                while collect() < goal:
                    assert time.monotonic() < end
                    guest.driver.tx.take_used()
                    if guest.driver.tx.room > 64:
                        guest.driver.send(*[frame(sent + i) for i in range(16)])
                        sent += 16
                process.send_signal(signal.SIGKILL)
                process.wait(PATIENCE)
                process = start()
            assert guest.connected(5), guest.path.problems
            assert wait_for(lambda: guest.driver.tx.outstanding == 0, PATIENCE)
            collect()
            assert len(numbers) == len(set(numbers)) and numbers == sorted(numbers)
            assert not guest.faults
            assert EVENT_IDX & guest.acked
    finally:
        process.kill()
        process.wait(PATIENCE)
