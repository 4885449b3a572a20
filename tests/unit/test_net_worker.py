"""The emulated data path with a mock driver as the guest, over a packet socket and over a
real tap.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.conformance.driver import Ring
from pyvmm.datapath.base import Frames, Vring
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.datapath.impair import ImpairPoint
from pyvmm.datapath.ringformat import PACKED, SPLIT, RingFormat
from pyvmm.errors import RingFault
from pyvmm.fd import EventFd
from pyvmm.hostnet.netns import Namespace
from pyvmm.kvm.recorder import BATCH, BYTES, PACKET, SEGMENT, Recorder
from pyvmm.memory import GuestMemory
from pyvmm.spec.virtio import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from tests.descriptors import open_fds
from tests.driver import Cable, Events, NetDriver, bits, fence, wait_for
from tests.ringforms import Form, form, only, pytest_generate_tests

NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT


__all__ = ["form", "pytest_generate_tests"]

VERSION_1 = bits("VIRTIO_F_VERSION_1")
EVENT_IDX = bits("VIRTIO_RING_F_EVENT_IDX")
INDIRECT_DESC = bits("VIRTIO_RING_F_INDIRECT_DESC")
MRG = bits("VIRTIO_NET_F_MRG_RXBUF")
CSUM = bits("VIRTIO_NET_F_GUEST_CSUM")
CTRL_OFFLOADS = bits("VIRTIO_NET_F_CTRL_GUEST_OFFLOADS")
GSO = bits("VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4")
#: Seconds for what comes at once on a machine that has nothing else to do.
PATIENCE = 60.0
#: Longer than any test takes: for frames that are to be held for as long as they must be.
LONG_MS = 60_000
ALL = VERSION_1 | EVENT_IDX | INDIRECT_DESC | MRG


def start_near_wrap(start: int = 65530) -> int:
    """A position shortly before one where something turns over: the indices of a split ring at
    65536, the lap of a packed one of 256 entries at its end.
    """
    if Form.now is SPLIT:
        return start
    place = (start % 256) | (1 << 15 if start else 0)
    return place | place << 16


def positions(start: int, count: int, ring: Ring) -> int:
    """The position of a ring after so many chains of one descriptor each."""
    if Form.now is SPLIT:
        return start + count & 0xFFFF
    at = (start & 0x7FFF) + (0 if start >> 15 & 1 else ring.size) + count
    place = at % ring.size | (1 << 15 if at % (2 * ring.size) < ring.size else 0)
    return place | place << 16


class Rig:
    """Memory, mock driver, cable and data path, put together.

    :param port: in the place of the cable. :param impair: faults on demand.
    """

    def __init__(
        self,
        acked: int = ALL,
        *,
        mtu: int = 1500,
        poll_us: int = 0,
        hold_ms: int = 200,
        worker_cpu: int | None = None,
        recorder: Recorder | None = None,
        fill: bool = True,
        port: Frames | None = None,
        impair: ImpairPoint | None = None,
        **driver: Any,
    ) -> None:
        self.acked = acked = Form.features(acked)
        self.memory = GuestMemory(16 << 20)
        self.cable = Cable(mtu)
        self.path = EmulatedNet(
            port or self.cable,
            poll_us=poll_us,
            hold_ms=hold_ms,
            worker_cpu=worker_cpu,
            recorder=recorder.scope("net0") if recorder is not None else None,
            impair=impair,
        )
        self.events = Events()
        self.faults, self.links = self.events.faults, self.events.links
        self.driver = NetDriver(
            self.memory,
            event_idx=bool(acked & EVENT_IDX),
            indirect=bool(acked & INDIRECT_DESC),
            mrg_rxbuf=bool(acked & MRG),
            packed=Form.now is PACKED,
            **driver,
        )
        if fill:
            self.driver.fill()

    def start(self, bases: Sequence[int | None] = (None, None)) -> Rig:
        rings = [r.vring(b) for r, b in zip(self.driver.rings, bases, strict=True)]
        self.path.start(self.acked, self.memory, rings, self.events)
        return self

    def counter(self, name: str) -> int:
        return self.path.counters().get(name, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: Any) -> None:
        self.path.close()
        self.cable.close()
        self.driver.close()
        self.memory.close()


def frame(n: int, length: int = 60) -> bytes:
    return struct.pack("<I", n) + bytes((n + i) & 0xFF for i in range(length - 4))


FEATURE_SETS = [
    VERSION_1 | event | indirect | mrg
    for event in (0, EVENT_IDX)
    for indirect in (0, INDIRECT_DESC)
    for mrg in (0, MRG)
]


@pytest.mark.parametrize("acked", FEATURE_SETS)
@pytest.mark.parametrize("near_wrap", [False, True])
def test_packets_pass_both_ways_in_order(acked: int, near_wrap: bool, form: RingFormat) -> None:
    start = start_near_wrap(65500) if near_wrap else form.start
    with Rig(acked, start=start) as rig:
        rig.start()
        sent = [frame(i, 60 + i % 1400) for i in range(600)]
        got = []
        for at in range(0, 600, 50):
            rig.driver.send(*sent[at : at + 50])
            for f in sent[at : at + 50]:
                rig.cable.far.send(bytes(12) + f)
            got += [rig.cable.receive() for _ in range(50)]
            assert len(rig.driver.wait_packets(at + 50)) == at + 50
        assert got == [bytes(12) + f for f in sent]
        assert [p[12:] for p in rig.driver.received] == sent
        assert all(p[10:12] == b"\1\0" for p in rig.driver.received)
        assert wait_for(lambda: rig.driver.tx.outstanding == 0)
        bases = rig.path.stop()
        assert (
            bases
            == [ring.position for ring in rig.driver.rings]
            == [positions(start, 600, rig.driver.rx)] * 2
        )
        c = rig.path.counters()
        assert (c["rx_packets"], c["tx_packets"]) == (600, 600)
        assert c["rx_bytes"] == c["tx_bytes"] == sum(map(len, sent))
        assert not rig.faults


@pytest.mark.parametrize("near_wrap", [False, True])
def test_a_trace_has_every_packet(near_wrap: bool, form: RingFormat) -> None:
    """Its place in both rings, its segments and its first bytes, in the order of the tap."""
    start = start_near_wrap() if near_wrap else form.start
    recorder, count = Recorder(1 << 12), 20
    try:
        with Rig(recorder=recorder, start=start) as rig:
            rig.start()
            for i in range(count):
                rig.driver.send(frame(i, 60 + i))
                rig.cable.receive()
                rig.cable.far.send(bytes(12) + frame(i, 60 + i))
                rig.driver.wait_packets(i + 1)
            rig.path.stop()
            size = rig.driver.tx.size
        events, lost = recorder.events("net0", "worker 0")
    finally:
        recorder.close()
    assert not lost
    for queue in (0, 1):
        packets = [e for e in events if e.kind == PACKET and e.reg == queue]
        assert [e.value for e in packets] == [12 + 60 + i for i in range(count)]
        assert all(e.write for e in packets)
        places = [e.reason for e in packets]
        # Where a chain is taken it is returned, in either form.
        assert places == [e.region for e in packets]
        if form is SPLIT:
            assert places == [(start + i) & 0xFFFF for i in range(count)]
        else:
            assert len({p & 0x7FFF for p in places}) > 1 and max(p & 0x7FFF for p in places) < size
        for e in packets:
            at = events.index(e)
            inside = events[at + 1 : at + 1 + e.count]
            assert e.count >= 1 and all(s.kind == SEGMENT and s.addr for s in inside)
            assert sum(s.value for s in inside) >= e.value
            data = b"".join(b.bytes for b in events[at + 1 + e.count : at + 3 + e.count])
            want = frame(e.value - 72, e.value - 12)[:68]
            assert data[12:] == want and events[at + 1 + e.count].header == 12
    batches = [e for e in events if e.kind == BATCH]
    assert sum(e.count for e in batches) == 2 * count


def test_a_trace_tells_of_dropped_packets() -> None:
    recorder = Recorder(1 << 10)
    try:
        with Rig(recorder=recorder) as rig:
            rig.start()
            rig.cable.far.close()
            rig.driver.send(frame(1))
            assert wait_for(lambda: rig.counter("tx_drop_link") == 1)
            rig.path.stop()
        packets = [e for e in recorder.events("net0", "worker 0")[0] if e.kind == PACKET]
        assert [(e.reg, e.write) for e in packets] == [(1, False)]
        # The tap may have found that the host has no page there.
        assert not any(e.kind == BYTES for e in recorder.events("net0", "worker 0")[0])
    finally:
        recorder.close()


# --- what a well-behaved guest may do -------------------------------------------------------------


def cpu_seconds(rig: Rig) -> float:
    """CPU time that the worker threads have used."""
    workers: list[dict[str, Any]] = rig.path.workers()
    return float(sum(worker["cpu_s"] for worker in workers))


def test_pending_before_start_is_served_without_a_kick() -> None:
    with Rig() as rig:
        rig.driver.send(frame(1), frame(2), kick=False)
        rig.cable.far.send(bytes(12) + frame(3))
        rig.driver.rx.kick_fd.drain()
        rig.start()
        assert [rig.cable.receive()[12:] for _ in range(2)] == [frame(1), frame(2)]
        assert rig.driver.wait_packets(1)[0][12:] == frame(3)


def test_a_restart_goes_on_where_the_last_one_stopped() -> None:
    with Rig(start=start_near_wrap()) as rig:
        sent, got = 0, []
        bases = tuple(ring.start for ring in rig.driver.rings)
        for _ in range(40):
            rig.start(bases)
            for _ in range(20):
                rig.driver.send(frame(sent))
                rig.cable.far.send(bytes(12) + frame(sent))
                sent += 1
            rig.driver.poll()
            assert wait_for(lambda: rig.driver.tx.outstanding < 200)
            bases = tuple(rig.path.stop())
            assert bases == tuple(ring.position for ring in rig.driver.rings)
            with pytest.raises(BlockingIOError):
                while True:
                    got.append(rig.cable.far.recv(2048))
        rig.start(bases)
        rig.driver.wait_packets(sent)
        assert [p[12:] for p in rig.driver.received] == [frame(i) for i in range(sent)]
        while len(got) < sent:
            got.append(rig.cable.receive())
        assert [p[12:] for p in got] == [frame(i) for i in range(sent)]


@pytest.mark.parametrize("acked", [ALL, VERSION_1 | MRG])
def test_a_parked_ring_asks_for_kicks(acked: int) -> None:
    """So that they gather in the eventfd, for whoever takes over."""
    with Rig(acked) as rig:
        for n in range(1, 4):
            rig.start([ring.position for ring in rig.driver.rings])
            rig.driver.send(frame(n), frame(n))
            rig.cable.far.send(bytes(12) + frame(n))
            assert wait_for(lambda: rig.driver.tx.outstanding == 0)
            rig.path.stop()
            assert rig.driver.tx.asked
            rig.driver.tx.kick_fd.drain()
            rig.driver.send(frame(n))
            assert rig.driver.tx.kick_fd.drain() == 1


@pytest.mark.parametrize("acked", [ALL, VERSION_1])
def test_transmit_batches_need_few_kicks_and_calls(acked: int) -> None:
    with Rig(acked) as rig:
        rig.start()
        assert wait_for(lambda: rig.driver.tx.asked)
        for at in range(0, 4000, 100):
            rig.driver.send(*(frame(i) for i in range(at, at + 100)))
            for _ in range(100):
                rig.cable.receive()
        assert wait_for(lambda: rig.driver.tx.outstanding == 0)
        rig.path.stop()
        c = rig.path.counters()
        assert c["tx_packets"] == 4000 and c["fd_writes"] == 4000
        assert c["tx_batches"] < 400
        assert rig.driver.tx.kicks <= 60
        assert sum(c[f"tx_batch_size_{1 << i}"] for i in range(8)) == c["tx_batches"]
        assert c["tx_calls"] + c["tx_calls_suppressed"] == c["tx_batches"]
        assert c["wakeups"] < 400


@pytest.mark.parametrize("acked", [ALL, VERSION_1])
def test_a_guest_that_goes_on_sending_gets_by_without_kicks(acked: int) -> None:
    """Two packets as soon as the last two are done; each pair would need a kick if the worker asked
    at once.
    """
    pairs, rest = 400, bytes(20000)
    with Rig(acked) as rig:
        rig.start()
        tx = rig.driver.tx
        for i in range(pairs):
            rig.driver.send(*(struct.pack("<I", n) + rest for n in (2 * i, 2 * i + 1)))
            deadline = time.monotonic() + PATIENCE
            while tx.outstanding:
                assert time.monotonic() < deadline, f"packet {2 * i} is stuck"
            for n in (2 * i, 2 * i + 1):
                assert rig.cable.receive()[12:16] == struct.pack("<I", n)
        assert rig.counter("tx_lingers") > 0
        assert tx.kicks < pairs

        def asked() -> bool:
            """Whether the guest is to kick for its next packet."""
            return tx.outstanding == 0 and tx.asked

        # A guest that sends one packet and waits is asked to kick for each.
        assert wait_for(asked)
        lingers, kicks = rig.counter("tx_lingers"), tx.kicks
        for i in range(3):
            rig.driver.send(frame(i))
            assert wait_for(asked)
            time.sleep(0.01)
        assert (rig.counter("tx_lingers"), tx.kicks) == (lingers, kicks + 3)


def sent(rig: Rig, packets: int) -> bool:
    """Whether so many packets have been sent and given back, and the guest has been called for all
    that it wanted to be called for.
    """
    c = rig.path.counters()
    told = c["tx_calls"] + c["tx_calls_suppressed"]
    return c["tx_packets"] == packets and not rig.driver.tx.outstanding and told == c["tx_batches"]


@pytest.mark.parametrize("event_idx", [0, EVENT_IDX])
def test_no_calls_where_the_guest_wants_none(event_idx: int) -> None:
    with Rig(VERSION_1 | MRG | event_idx) as rig:
        rig.start()
        rig.driver.send(frame(0))  # with EVENT_IDX the first batch is always signalled
        rig.cable.receive()
        assert wait_for(lambda: sent(rig, 1))
        rig.driver.tx.disable_interrupts()
        rig.driver.tx.call_fd.drain()
        for i in range(20):
            rig.driver.send(frame(i))
            rig.cable.receive()
        assert wait_for(lambda: sent(rig, 21))
        assert rig.driver.tx.call_fd.drain() == 0
        assert not rig.driver.tx.enable_interrupts() or rig.driver.tx.take_used()
        rig.driver.tx.take_used()
        rig.driver.tx.enable_interrupts()
        rig.driver.send(frame(21))
        assert wait_for(lambda: rig.driver.tx.call_fd.drain() > 0)


@pytest.mark.parametrize("acked", [ALL, VERSION_1 | MRG])
@pytest.mark.parametrize("poll_us", [0, 50])
def test_no_wakeup_is_lost(acked: int, poll_us: int) -> None:
    """Ping-pong with kicks and calls only where asked for: one lost notification and it hangs."""
    with Rig(acked, poll_us=poll_us) as rig:
        rig.start()
        rx = rig.driver.rx
        for i in range(3000):
            rig.driver.send(frame(i))
            data = rig.cable.receive()
            rig.cable.far.send(data)
            while rx.enable_interrupts() is False:
                os_poll([rx.call_fd])
                rx.call_fd.drain()
            assert [p[12:] for p in rig.driver.poll()] == [frame(i)]


def os_poll(fds: list[EventFd]) -> None:
    p = select.poll()
    for fd in fds:
        p.register(fd.fileno(), select.POLLIN)
    assert p.poll(PATIENCE * 1000), "a notification was lost"


@only(SPLIT)
@pytest.mark.parametrize("acked", [ALL, VERSION_1])
def test_no_kick_is_lost_to_a_guest_that_answers_at_once(acked: int) -> None:
    """Each packet is made available the moment the last one is done, right when the worker decides
    to sleep.
    """
    with Rig(acked, fill=False) as rig:
        tx = rig.driver.tx
        gpa = 0x200000
        tx.set_desc(0, gpa, 12, 0, 0)  # a header and nothing else: cheap
        for i in range(tx.size):
            tx.set_avail(i, 0)
        rig.start()
        used, avail, kick = tx._used, tx._avail, tx.kick
        event = 2 + 4 * tx.size
        for i in range(20000):
            avail[1] = i + 1
            fence()
            if used[event] == i if acked & EVENT_IDX else not used[0]:
                kick()
            spins = 0
            while used[1] != i + 1:
                spins += 1
                if spins == 2000:
                    assert wait_for(lambda n=i + 1: used[1] == n), f"packet {i} is stuck"  # type: ignore[misc]
            if i % 64 == 63:
                for _ in range(64):
                    rig.cable.far.recv(16)


def test_transmit_waits_while_the_tap_is_full() -> None:
    with Rig() as rig:
        rig.start()
        sent = [frame(i, 1400) for i in range(3000)]
        got: list[bytes] = []
        at = 0
        while at < len(sent) and rig.counter("tx_blocks") == 0:
            rig.driver.send(*sent[at : at + 50])
            at += 50
            assert wait_for(lambda: rig.driver.tx.outstanding == 0 or rig.counter("tx_blocks"))
        assert rig.counter("tx_blocks"), "the socket never filled"
        used = cpu_seconds(rig)
        time.sleep(0.2)
        assert cpu_seconds(rig) - used < 0.1
        while len(got) < at:
            got.append(rig.cable.receive())
        assert got == [bytes(12) + f for f in sent[:at]]
        rig.driver.send(frame(9))
        assert rig.cable.receive()[12:] == frame(9)
        assert rig.counter("tx_drop_error") == 0


def test_stopping_while_the_tap_is_full_gives_the_chains_back() -> None:
    with Rig() as rig:
        rig.start()
        while rig.counter("tx_blocks") == 0:
            rig.driver.send(*(frame(0, 1400) for _ in range(50)))
            assert wait_for(lambda: rig.driver.tx.outstanding == 0 or rig.counter("tx_blocks"))
        base = rig.path.stop()[1]
        assert base == rig.driver.tx.position
        assert rig.driver.tx.outstanding > 0


def test_receive_without_buffers_waits_quietly_and_resumes() -> None:
    """CVE-2020-16843: ring and tap both full, then receive must come back."""
    with Rig(fill=False, rx_buffers=64) as rig:
        rig.start()
        sent = 0
        with pytest.raises(BlockingIOError):
            while True:
                rig.cable.far.send(bytes(12) + frame(sent))
                sent += 1
                time.sleep(0.0005)
        used = cpu_seconds(rig)
        time.sleep(0.2)
        assert cpu_seconds(rig) - used < 0.1
        rig.driver.send(frame(1))
        assert rig.cable.receive()[12:] == frame(1)
        assert rig.counter("wakeups") <= 5  # not one a frame
        for n in range(5):
            rig.driver.fill(8)
            assert len(rig.driver.wait_packets(8 * n)) >= 8 * n
            rig.driver.poll(refill=False)
        rig.driver.fill()
        assert len(rig.driver.wait_packets(sent)) == sent
        assert [p[12:] for p in rig.driver.received] == [frame(i) for i in range(sent)]


@pytest.mark.parametrize("rx_size", [700, 2048, 4096])
def test_long_frames_are_merged(rx_size: int) -> None:
    with Rig(ALL | GSO, rx_size=rx_size) as rig:
        rig.start()
        lengths = [60, 1514, 9000, 65549, 65549, 64, 30000, 1514, 65549] + [60] * 100 + [65549, 60]
        for i, n in enumerate(lengths):
            rig.cable.far.send(bytes(12) + frame(i, n))
            assert len(rig.driver.wait_packets(i + 1)) == i + 1
        assert [p[12:] for p in rig.driver.received] == [frame(i, n) for i, n in enumerate(lengths)]
        for p in rig.driver.received:
            assert struct.unpack_from("<H", p, 10)[0] == -(-len(p) // rx_size)
        assert rig.counter("rx_overflows") > 0
        # Once long frames have been seen, they are read in place.
        assert rig.counter("rx_overflows") < 5
        assert rig.path.stop()[0] == rig.driver.rx.position


def test_a_frame_that_lacks_buffers_is_held_until_they_come() -> None:
    with Rig(ALL | GSO, hold_ms=LONG_MS, fill=False) as rig:
        rig.driver.fill(10)
        rig.start()
        rig.cable.far.send(bytes(12) + frame(1, 65000))
        rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.counter("fd_reads") > 0)
        time.sleep(0.02)
        assert rig.driver.rx.returned == 0
        rig.driver.fill(10)
        time.sleep(0.02)
        assert rig.driver.rx.returned == 0
        rig.driver.fill()
        assert [p[12:] for p in rig.driver.wait_packets(2)] == [frame(1, 65000), frame(2)]
        assert rig.counter("rx_drop_held") == 0


def test_each_held_frame_has_its_own_time() -> None:
    """Together they are held longer than one frame may be; each has 4 s to spare."""
    with Rig(ALL | GSO, hold_ms=5000, fill=False) as rig:
        rig.start()
        for i in range(6):
            rig.driver.fill(5)
            rig.cable.far.send(bytes(12) + frame(i, 30000))
            time.sleep(1)
            rig.driver.fill(10)
            assert wait_for(lambda n=i: rig.counter("rx_packets") == n + 1)  # type: ignore[misc]
            assert rig.driver.poll(refill=False)
        assert rig.counter("rx_drop_held") == 0


def test_a_held_frame_s_time_starts_anew_at_the_stop() -> None:
    """``stop(finish=True)`` promises the guest its full time; 4.8 s are there to spare."""
    with Rig(ALL | GSO, hold_ms=5000, fill=False) as rig:
        rig.driver.fill(5)
        rig.start()
        rig.cable.far.send(bytes(12) + frame(1, 30000))
        assert wait_for(lambda: rig.counter("fd_reads") > 0)
        time.sleep(0.2)
        begin = time.monotonic()
        rig.path.stop(finish=True)
        assert time.monotonic() - begin >= 5
        assert rig.counter("rx_drop_held") == 1


def test_a_held_frame_does_not_freeze_receive() -> None:
    with Rig(ALL | GSO, fill=False) as rig:
        rig.driver.fill(10)
        rig.start()
        rig.cable.far.send(bytes(12) + frame(1, 65000))
        rig.cable.far.send(bytes(12) + frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1)] == [frame(2)]
        assert rig.counter("rx_drop_held") == 1


def test_a_frame_longer_than_the_whole_ring_is_dropped() -> None:
    with Rig(ALL | GSO, size=16) as rig:
        rig.start()
        rig.cable.far.send(bytes(12) + frame(1, 65000))
        rig.cable.far.send(bytes(12) + frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1)] == [frame(2)]
        assert rig.counter("rx_drop_long") == 1


def test_a_frame_longer_than_its_chain_is_dropped_without_mrg_rxbuf() -> None:
    with Rig(ALL & ~MRG) as rig:
        rig.start()
        for f in (frame(1, 3000), frame(2), frame(3, 2036), frame(4, 2037), frame(5)):
            rig.cable.far.send(bytes(12) + f)
        assert [p[12:] for p in rig.driver.wait_packets(3)] == [frame(2), frame(3, 2036), frame(5)]
        assert all(p[10:12] == b"\1\0" for p in rig.driver.received)
        assert rig.counter("rx_drop_long") == 2


def test_a_packet_without_a_full_header_is_dropped() -> None:
    with Rig() as rig:
        rig.start()
        rig.cable.far.send(bytes(11))
        rig.cable.far.send(bytes(12) + frame(2))
        assert [p[12:] for p in rig.driver.wait_packets(1)] == [frame(2)]
        assert rig.counter("rx_drop_short") == 1


@pytest.mark.parametrize(
    "split", [[12], [1] * 12, [10, 2], [11, 1, 13], [5, 5, 20], [12, 14, 20, 1]]
)
@pytest.mark.parametrize("indirect", [0, INDIRECT_DESC])
@pytest.mark.parametrize("csum", [0, CSUM, CTRL_OFFLOADS], ids=["zeros", "csum", "later"])
def test_the_header_may_be_split_anywhere(split: list[int], indirect: int, csum: int) -> None:
    """CVE-2022-2132. And a driver without GUEST_CSUM gets no flags, lengths or offsets
    (5.1.6.4.1), whoever has written them.
    """
    header = bytes(range(1, 13))
    expected = header[:10] if csum else bytes(10)
    with Rig(VERSION_1 | EVENT_IDX | indirect | csum, fill=False) as rig:
        d, gpa = rig.driver, 0x200000
        segments, at = [], gpa
        for n in [*split, 2000]:
            segments.append((at, n, True))
            at += n + 3  # leave gaps, so that a wrong segment shows
        d.rx.add(segments, indirect=0x300000 if indirect else None)
        d.rx.publish()
        rig.start()
        d.queue(frame(7, 500), header=header, split=split)
        d.tx.publish()
        assert rig.cable.receive() == header + frame(7, 500)
        rig.cable.far.send(header[:10] + b"\xff\xff" + frame(8, 500))
        assert wait_for(lambda: d.rx.returned == 1)
        data = b"".join(rig.memory.read(a, n) for a, n, _ in segments)[:512]
        assert data == expected + b"\1\0" + frame(8, 500)
        assert [n for _, n in d.rx.take_used()] == [512]


def test_many_frames_in_chains_of_several_buffers() -> None:
    """More chains ahead than frames all the time, so that the receive window wraps in its
    arrays.
    """
    with Rig(fill=False) as rig:
        rig.start()
        rx, where = rig.driver.rx, {}

        def post(number: int) -> None:
            gpa = 0x200000 + 4096 * (number % 100)
            where[
                rx.add(
                    [(gpa + 700 * k, 20 + k, True) for k in range(4)] + [(gpa + 3500, 500, True)]
                )
            ] = gpa

        for i in range(20):
            post(i)
        for at in range(0, 2000, 20):
            for i in range(at, at + 20):
                post(i + 20)
            rx.publish()
            for i in range(at, at + 20):
                rig.cable.far.send(bytes(12) + frame(i, 100 + i % 50))
            assert wait_for(lambda n=at + 20: rx.returned == n)  # type: ignore[misc]
            for i, (head, length) in enumerate(rx.take_used(), at):
                gpa = where.pop(head)
                data = b"".join(rig.memory.read(gpa + 700 * k, 20 + k) for k in range(4))
                assert (data + rig.memory.read(gpa + 3500, 500))[12:length] == frame(
                    i, 100 + i % 50
                )


def test_only_one_queue_enabled() -> None:
    with Rig() as rig:
        rig.path.start(rig.acked, rig.memory, [rig.driver.tx.vring()], rig.events)
        rig.driver.send(frame(1))
        assert rig.cable.receive()[12:] == frame(1)
        rig.cable.far.send(bytes(12) + frame(2))
        used = cpu_seconds(rig)
        time.sleep(0.1)
        assert cpu_seconds(rig) - used < 0.05
        assert rig.path.stop() == [rig.driver.tx.position] and rig.driver.tx.returned == 1
        assert not rig.faults


def test_two_queue_pairs() -> None:
    with Rig() as rig:
        other = Cable()
        rig.cable.fds.append(other.fds[0])
        second = NetDriver(rig.memory, base=8 << 20, pair=1, packed=Form.now is PACKED)
        second.fill()
        rings = [*rig.driver.rings, *second.rings]
        vrings = [r.vring() for r in rings]
        rig.path.start(rig.acked, rig.memory, vrings, rig.events)
        rig.driver.send(frame(1))
        second.send(frame(2))
        assert rig.cable.receive()[12:] == frame(1)
        assert other.receive()[12:] == frame(2)
        other.far.send(bytes(12) + frame(3))
        assert second.wait_packets(1)[0][12:] == frame(3)
        assert [ring.returned for ring in rings] == [0, 1, 1, 1]
        assert rig.path.stop() == [ring.position for ring in rings]
        second.close()
        other.far.close()


def test_stop_is_quick_under_load_and_idempotent() -> None:
    """The quickest of eight: this machine may have other things to do at times."""
    delays = []
    with Rig(size=1024) as rig:
        for _ in range(8):
            for _i in range(300):
                rig.driver.queue(frame(0))
            rig.start([ring.position for ring in rig.driver.rings])
            rig.driver.tx.publish()
            t = time.monotonic()
            rig.path.stop()
            delays.append(time.monotonic() - t)
            while rig.driver.tx.room < 300:
                rig.start([ring.position for ring in rig.driver.rings])
                rig.cable.receive()
                rig.driver.tx.take_used()
                rig.path.stop()
        assert rig.path.stop() == []
    assert min(delays) < 0.2, delays


# --- the threads ----------------------------------------------------------------------------------


def test_the_thread_is_known_when_start_returns() -> None:
    with Rig(worker_cpu=0) as rig:
        rig.start()
        workers: list[dict[str, Any]] = rig.path.workers()
        (worker,) = workers
        assert worker["name"] == "cable-0" and worker["cpu_s"] > 0
        assert Path(f"/proc/self/task/{worker['tid']}/comm").read_text() == "cable-0\n"
        assert os.sched_getaffinity(worker["tid"]) == {0}
        assert set(rig.path.times.began) == {0, 1}
        assert 0 < max(rig.path.times.began.values()) <= time.monotonic_ns()
        rig.path.stop()
        assert rig.path.workers() == []
        # Whoever joins a thread may go on a moment before the kernel's thread has ended.
        assert wait_for(lambda: not Path(f"/proc/self/task/{worker['tid']}").exists())
        used = rig.counter("worker_cpu_ns")
        assert used >= worker["cpu_s"] * 1e9
        rig.start((0, 0))
        assert rig.counter("worker_cpu_ns") > used


def test_the_supervisor_lives_as_long_as_the_data_path() -> None:
    """A start waits for no Python thread but the first time, and ``prepare`` makes that one."""
    # By difference: threads and descriptors of earlier tests may go at any time.
    before, fds = set(threading.enumerate()), open_fds()
    with Rig() as rig:
        rig.path.prepare(ALL, rig.memory, [])
        (supervisor,) = set(threading.enumerate()) - before
        for base in (0, 0, 0):
            rig.start((base, base))
            assert set(threading.enumerate()) - before == {supervisor}
            rig.path.stop()
        rig.path.close()
        rig.path.close()
    assert not set(threading.enumerate()) - before
    assert not open_fds() - fds


def test_a_worker_that_cannot_be_pinned_serves_all_the_same() -> None:
    with Rig(worker_cpu=8000) as rig:
        rig.start()
        assert wait_for(lambda: rig.faults)
        assert rig.faults == [(-1, "worker-cpu=8000: Invalid argument")]
        rig.driver.send(frame(1))
        assert rig.cable.receive()[12:] == frame(1)


def test_a_worker_never_waits_for_python() -> None:
    """A guest that spoils its transmit ring goes on receiving, although Python's lock is taken: by
    this thread, whose system calls and loop keep it.
    """
    libc = ctypes.PyDLL(None)
    data, one = bytes(12) + frame(1), struct.pack("=Q", 1)
    with Rig() as rig:
        rig.start()
        tx, rx = rig.driver.tx, rig.driver.rx
        far, kick = rig.cable.far.fileno(), tx.kick_fd.fileno()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(60)
        try:
            end = time.monotonic() + 10
            tx.spoil(kick=False)
            libc.write(kick, one, 8)
            while not (ours := rx.returned) and time.monotonic() < end:
                libc.write(far, data, len(data))
            told = list(rig.faults)
        finally:
            sys.setswitchinterval(interval)
        assert ours and not told
        assert wait_for(lambda: rig.faults)
        assert rig.faults[0][0] == 1


def flap(rig: Rig, cables: list[Cable], times: int) -> None:
    """The link is lost and comes back, ``times`` times."""
    worker = rig.path._pairs[0].worker
    for n in range(times):
        cables[-1].far.close()
        assert wait_for(lambda n=n: rig.counter("link_losses") == n + 1)  # type: ignore[misc]
        cables.append(Cable())
        lib.pv_net_worker_attach(worker, cables[-1].fds[0].fileno())
        cables[-1].far.send(bytes(12) + frame(n))
        assert wait_for(lambda n=n: rig.counter("rx_packets") == n + 1)  # type: ignore[misc]


def test_what_was_sent_before_the_other_end_closed_arrives() -> None:
    """The end of a socket and what is left to read come as one event."""
    for _ in range(10):
        with Rig() as rig:
            rig.start()
            rig.cable.far.send(bytes(12) + frame(0))
            assert len(rig.driver.wait_packets(1, PATIENCE)) == 1
            for i in range(1, 5):
                rig.cable.far.send(bytes(12) + frame(i))
            rig.cable.far.close()
            assert wait_for(lambda rig=rig: rig.links == [False])  # type: ignore[misc]
            got = rig.driver.wait_packets(5, PATIENCE)
            assert [p[12:] for p in got] == [frame(i) for i in range(5)]


def test_a_slow_supervisor_misses_no_fault_and_not_the_latest_link_state() -> None:
    """The ring of events is bounded, and the worker does not wait for room."""
    go_on = threading.Event()
    with Rig(fill=False) as rig:
        links = rig.links
        rig.driver.fill(20)
        cables = [rig.cable]

        def slow(up: bool) -> None:
            go_on.wait()
            links.append(up)

        rig.events.link = slow  # type: ignore[method-assign]
        rig.start()
        try:
            flap(rig, cables, 20)
            for ring in rig.driver.rings:
                ring.spoil()
            cables[-1].far.send(bytes(12) + frame(20))
            assert wait_for(lambda: rig.counter("ring_faults") == 2)
            cables[-1].far.close()
            assert wait_for(lambda: rig.counter("link_losses") == 21)
            # The worker counts the loss first: have it reported before anybody reads on.
            worker = rig.path._pairs[0].worker
            lib.pv_net_worker_stop(worker, False)
            lib.pv_net_worker_join(worker)
        finally:
            go_on.set()
        rig.path.stop()
        missed = rig.counter("events_missed")
        assert 41 - 16 <= missed < 41
        assert sorted(queue for queue, _ in rig.faults) == [0, 1]
        assert links == [bool(i % 2) for i in range(len(links))]  # down, up, ... down
        assert links[-1] is False and 41 - missed <= len(links) <= 41 - missed + 1
        for cable in cables[1:]:
            cable.close()


FEW_THREADS = """
import resource, sys, threading
from pyvmm.errors import HostError
from tests.driver import Cable, NetDriver
from tests.unit.test_net_worker import ALL, Rig, frame

stacks = int(sys.argv[1])
soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
stack = soft if soft != resource.RLIM_INFINITY else 2 << 20
with Rig() as rig:
    other = Cable()
    rig.cable.fds.append(other.fds[0])
    second = NetDriver(rig.memory, base=8 << 20, pair=1)
    second.fill()
    rings = [r.vring() for r in [*rig.driver.rings, *second.rings]]
    rig.driver.send(frame(1))
    second.send(frame(2))
    before = rig.memory.read(0, 16 << 20)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + stack * stacks + stack // 2, -1))
    try:
        rig.path.start(rig.acked, rig.memory, rings, rig.events)
    except HostError as e:
        print(e)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert rig.memory.read(0, 16 << 20) == before
    assert threading.active_count() == 1 and rig.path.stop() == []
    rig.path.start(rig.acked, rig.memory, rings, rig.events)
    assert rig.cable.receive()[12:] == frame(1) and other.receive()[12:] == frame(2)
"""


@pytest.mark.parametrize("stacks", [0, 1, 2])
def test_all_threads_or_none(stacks: int) -> None:
    """Two workers and a supervisor, and address space for ``stacks`` of them: the rings are as they
    were.
    """
    run = subprocess.run(
        [sys.executable, "-c", FEW_THREADS, str(stacks)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "cannot start a network thread" in run.stdout


# --- coalescing -----------------------------------------------------------------------------------


def coalesced(rig: Rig, packets: int, usecs: int) -> list[Vring]:
    """The rings, whose interrupts wait."""
    vrings = [r.vring(r.position) for r in rig.driver.rings]
    for vring in vrings:
        vring.coalesce = (packets, usecs)
    return vrings


def interrupted(ring: Ring, patience: float = PATIENCE) -> bool:
    """Whether an interrupt comes."""
    return bool(select.select([ring.call_fd.fileno()], [], [], patience)[0])


@pytest.mark.parametrize("acked", [ALL, VERSION_1 | MRG])
def test_an_interrupt_waits_for_so_many_packets(acked: int) -> None:
    """5.1.6.5.7: a guest that polls sees each packet at once; an interrupt comes with the fifth."""
    with Rig(acked) as rig:
        rig.path.start(rig.acked, rig.memory, coalesced(rig, 5, LONG_MS * 1000), rig.events)
        for round in range(3):
            for ring in rig.driver.rings:
                ring.enable_interrupts()
                ring.call_fd.drain()
            for n in range(5):
                assert not interrupted(rig.driver.rx, 0) and not interrupted(rig.driver.tx, 0)
                rig.driver.queue(frame(n))
                rig.driver.tx.publish()
                rig.cable.far.send(bytes(12) + frame(n))
                assert rig.cable.receive()[12:] == frame(n)
                assert wait_for(lambda: rig.driver.tx.outstanding == 0)
                rig.driver.tx.take_used()
                assert len(rig.driver.wait_packets(5 * round + n + 1)) == 5 * round + n + 1
            assert interrupted(rig.driver.rx) and interrupted(rig.driver.tx)
        rig.path.stop()
        c = rig.path.counters()
        assert c["rx_calls_delayed"] == c["tx_calls_delayed"] == 12
        assert c["rx_calls"] + c["rx_calls_suppressed"] == 3


def test_an_interrupt_waits_for_so_long() -> None:
    """And no longer, whether or not more packets come."""
    with Rig() as rig:
        rig.path.start(rig.acked, rig.memory, coalesced(rig, 0, 50_000), rig.events)
        for ring in rig.driver.rings:
            ring.enable_interrupts()
            ring.call_fd.drain()
        begin = time.monotonic()
        rig.driver.send(frame(1))
        rig.cable.far.send(bytes(12) + frame(1))
        assert interrupted(rig.driver.tx)
        assert time.monotonic() - begin >= 0.05
        assert interrupted(rig.driver.rx)
        assert rig.counter("tx_calls_delayed") == 1


def test_no_interrupt_is_owed_when_the_worker_stops() -> None:
    with Rig() as rig:
        rig.path.start(rig.acked, rig.memory, coalesced(rig, 0, LONG_MS * 1000), rig.events)
        rig.driver.tx.enable_interrupts()
        rig.driver.tx.call_fd.drain()
        rig.driver.send(frame(1))
        rig.driver.tx.enable_interrupts()
        assert rig.cable.receive()[12:] == frame(1)
        assert wait_for(lambda: rig.counter("tx_calls_delayed"))
        assert not interrupted(rig.driver.tx, 0)
        rig.path.stop()
        assert interrupted(rig.driver.tx, 0)


def test_a_full_ring_does_not_wait() -> None:
    """A driver's wish is a place in the ring, so the worker asks at least once per ring."""
    with Rig(size=16, rx_buffers=16) as rig:
        rig.path.start(rig.acked, rig.memory, coalesced(rig, 0, LONG_MS * 1000), rig.events)
        for n in range(16):
            rig.driver.tx.enable_interrupts() if not n else None
            rig.driver.queue(frame(n))
        rig.driver.tx.call_fd.drain()
        rig.driver.tx.publish()
        assert interrupted(rig.driver.tx)


# --- what a hostile guest tries -------------------------------------------------------------------


def raw(*descs: tuple[int, int, int, int], head: int = 0, ahead: int = 1) -> Callable[..., Any]:
    """Descriptors (gpa, length, flags, next) from index 0, made available from ``head``."""

    def apply(ring: Ring, memory: GuestMemory, write: bool) -> None:
        for i, (gpa, length, flags, following) in enumerate(descs):
            ring.set_desc(i, gpa, length, flags | (WRITE if write else 0), following)
        ring.set_avail(ring.avail_idx, head)
        ring.set_avail_idx(ring.avail_idx + ahead)

    return apply


def indirect(
    *descs: tuple[int, int, int, int],
    length: int | None = None,
    flags: int = 0,
    table: int = 0x400000,
) -> Callable[..., Any]:
    def apply(ring: Ring, memory: GuestMemory, write: bool) -> None:
        data = b"".join(
            struct.pack("<QIHH", gpa, n, f | (WRITE if write else 0), following)
            for gpa, n, f, following in descs
        )
        memory.write(table, data)
        ring.set_desc(0, table, len(data) if length is None else length, INDIRECT | flags, 1)
        ring.set_avail(ring.avail_idx, 0)
        ring.set_avail_idx(ring.avail_idx + 1)

    return apply


GOOD = (0x200000, 100, 0, 0)
TOP = 16 << 20
#: name -> (what the guest does, words of the fault)
HOSTILE = {
    "index ahead by size + 1": (raw(GOOD, ahead=257), "available index"),
    "index backwards": (raw(GOOD, ahead=-1), "available index"),
    "index half way round": (raw(GOOD, ahead=32768), "available index"),
    "head outside": (raw(GOOD, head=256), "head is outside"),
    "head 65535": (raw(GOOD, head=65535), "head is outside"),
    "next outside": (raw((0x200000, 20, NEXT, 256)), "next is outside"),
    "self loop": (raw((0x200000, 20, NEXT, 0)), "loops"),
    "loop of two": (raw((0x200000, 20, NEXT, 1), (0x200000, 20, NEXT, 0)), "loops"),
    "length 0": (raw((0x200000, 0, 0, 0)), "length 0"),
    "length 0 in the middle": (raw((0x200000, 20, NEXT, 1), (0x200000, 0, 0, 0)), "length 0"),
    "length 2^32-1": (raw((0x200000, 0xFFFFFFFF, 0, 0)), "not in guest memory"),
    "address wraps": (raw((2**64 - 50, 100, 0, 0)), "not in guest memory"),
    "starts outside": (raw((TOP, 100, 0, 0)), "not in guest memory"),
    "ends outside": (raw((TOP - 99, 100, 0, 0)), "not in guest memory"),
    "in the MMIO hole": (raw((0xFEC00000, 100, 0, 0)), "not in guest memory"),
    "shorter than the header": (raw((0x200000, 11, 0, 0)), "shorter than"),
    "nested indirect": (indirect((0x400000, 32, INDIRECT, 0)), "inside an indirect"),
    "indirect of length 0": (indirect(GOOD, length=0), "bad length"),
    "indirect of length 17": (indirect(GOOD, length=17), "bad length"),
    "indirect of length 2^32-16": (indirect(GOOD, length=2**32 - 16), "not in guest memory"),
    "indirect and next": (indirect(GOOD, flags=NEXT), "with a next one"),
    "indirect outside": (raw((TOP, 16, INDIRECT, 0)), "not in guest memory"),
    "indirect, next outside the table": (indirect((0x200000, 20, NEXT, 1)), "next is outside"),
    "indirect loop": (indirect((0x200000, 20, NEXT, 1), (0x200000, 20, NEXT, 0)), "loops"),
    "indirect loop that never writes": (indirect((0x200000, 20, NEXT, 0)), "loops"),
    "indirect of 1025": (
        indirect(*((0x200000, 16, NEXT if i < 1024 else 0, i + 1) for i in range(1025))),
        "too many segments",
    ),
}


@only(SPLIT)
@pytest.mark.parametrize("queue", [0, 1])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_ring_is_stopped_and_the_other_goes_on(name: str, queue: int) -> None:
    act, words = HOSTILE[name]
    with Rig(fill=False) as rig:
        rig.start()
        d = rig.driver
        victim = d.rings[queue]
        if queue == 1:
            d.fill()
            d.send(frame(1))
            assert rig.cable.receive()[12:] == frame(1)
            assert wait_for(lambda: victim.outstanding == 0)
        before = victim.position
        act(victim, rig.memory, queue == 0)
        victim.kick()
        if queue == 0:
            rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.faults)
        assert rig.faults[0][0] == queue and words in rig.faults[0][1], rig.faults
        # The other direction is unharmed.
        if queue == 1:
            rig.cable.far.send(bytes(12) + frame(3))
            assert d.wait_packets(1)[0][12:] == frame(3)
        else:
            d.send(frame(3))
            assert rig.cable.receive()[12:] == frame(3)
        # And it is quiet: no loop, no second report.
        used = cpu_seconds(rig)
        victim.kick()
        time.sleep(0.03)
        assert cpu_seconds(rig) - used < 0.03
        assert len(rig.faults) == 1
        assert rig.path.stop()[queue] == before == victim.position


@pytest.mark.parametrize("queue", [0, 1])
def test_the_wrong_direction_is_a_fault(queue: int) -> None:
    with Rig(fill=False) as rig:
        rig.start()
        ring = rig.driver.rings[queue]
        ring.add([(0x200000, 100, queue == 1)])
        ring.publish()
        rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.faults)
        assert rig.faults == [(queue, f"queue {queue}: descriptor of the wrong direction")]


@pytest.mark.parametrize("queue", [0, 1])
def test_writable_before_readable_is_a_fault(queue: int) -> None:
    with Rig(fill=False) as rig:
        rig.start()
        ring = rig.driver.rings[queue]
        ring.add([(0x200000, 100, True), (0x201000, 100, False)])
        ring.publish()
        rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.faults)
        assert rig.faults[0][0] == queue and "readable descriptor after" in rig.faults[0][1]


def test_indirect_without_the_feature_is_a_fault() -> None:
    with Rig(VERSION_1 | MRG) as rig:
        rig.start()
        rig.driver.tx.add([(0x200000, 100, False)], indirect=0x300000)
        rig.driver.tx.publish()
        assert wait_for(lambda: rig.faults)
        assert "without INDIRECT_DESC" in rig.faults[0][1]


def test_chains_before_the_bad_one_are_finished() -> None:
    with Rig() as rig:
        rig.driver.send(*(frame(i) for i in range(10)), kick=False)
        tx = rig.driver.tx
        tx.spoil()
        rig.start()
        assert wait_for(lambda: rig.faults)
        assert [rig.cable.receive()[12:] for _ in range(10)] == [frame(i) for i in range(10)]
        assert wait_for(lambda: rig.driver.tx.returned == 10)
        assert rig.path.stop()[1] == tx.position


BAD_PLACES = [
    ({"size": 3}, "power of two"),
    ({"size": 65536}, "power of two"),
    ({"desc": 0x1008}, "misaligned"),
    ({"avail": 0x1001}, "misaligned"),
    ({"used": 0x1002}, "misaligned"),
    ({"desc": TOP - 16}, "not in guest memory"),
    ({"avail": TOP - 512}, "not in guest memory"),
    ({"used": TOP - 2048}, "not in guest memory"),
    ({"desc": 2**64 - 4096}, "not in guest memory"),
    ({"used": 2**64 - 4}, "not in guest memory"),
    ({"avail": 0xD0000000}, "not in guest memory"),
]


@only(SPLIT)
@pytest.mark.parametrize(("change", "words"), BAD_PLACES)
@pytest.mark.parametrize("queue", [0, 1])
def test_a_bad_ring_is_refused_and_nothing_touched(
    change: dict[str, int], words: str, queue: int
) -> None:
    with Rig() as rig:
        rings = [r.vring() for r in rig.driver.rings]
        for key, value in change.items():
            setattr(rings[queue], key, value)
        before = rig.memory.read(0, 1 << 20)
        fds, threads = open_fds(), set(threading.enumerate())
        with pytest.raises(RingFault, match=words):
            rig.path.start(rig.acked, rig.memory, rings, rig.events)
        assert rig.memory.read(0, 1 << 20) == before
        assert not open_fds() - fds
        assert not set(threading.enumerate()) - threads
        assert rig.path.stop() == []


def test_ring_areas_that_end_with_the_memory_are_fine() -> None:
    with Rig() as rig:
        v = rig.driver.tx.vring()
        v.used = (TOP - 6 - 8 * 256) & ~3
        rig.path.start(rig.acked, rig.memory, [v], rig.events)
        rig.path.stop()


# --- the outside goes wrong -----------------------------------------------------------------------


def test_a_vanished_peer_is_link_down_without_a_busy_loop() -> None:
    with Rig() as rig:
        rig.start()
        rig.cable.far.close()
        assert wait_for(lambda: rig.links == [False])
        rig.driver.send(frame(1), frame(2))
        assert wait_for(lambda: rig.driver.tx.outstanding == 0)
        used = cpu_seconds(rig)
        time.sleep(0.1)
        assert cpu_seconds(rig) - used < 0.05
        assert rig.counter("tx_drop_link") == 2
        assert rig.links == [False] and not rig.faults


# --- over a real tap ------------------------------------------------------------------------------


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(address="192.168.90.1/24", mtu=1500) as ns:
        yield ns


MAC = bytes.fromhex("525400123456")
GUEST_IP, HOST_IP = bytes([192, 168, 90, 2]), bytes([192, 168, 90, 1])


def arp_request() -> bytes:
    head = b"\xff" * 6 + MAC + b"\x08\x06" + struct.pack(">HHBBH", 1, 0x800, 6, 4, 1)
    return head + MAC + GUEST_IP + bytes(6) + HOST_IP


class TapRig(Rig):
    def __init__(self, namespace: Namespace, acked: int = ALL, **driver: Any) -> None:
        super().__init__(acked, **driver)
        self.tap = namespace.tap
        self.path = EmulatedNet(self.tap)


def test_arp_over_a_tap(namespace: Namespace) -> None:
    with TapRig(namespace) as rig:
        rig.start()
        rig.driver.send(arp_request())
        assert wait_for(
            lambda: any(p[24:26] == b"\x08\x06" for p in rig.driver.poll() or rig.driver.received)
        )
        reply = next(p for p in rig.driver.received if p[24:26] == b"\x08\x06")
        assert reply[12:18] == MAC and reply[10:12] == b"\1\0"
        assert reply[40:44] == HOST_IP


@only(SPLIT)
def test_both_directions_get_their_turn(namespace: Namespace) -> None:
    """A guest that transmits without end starves neither receive nor stop (CVE-2019-3900)."""
    with TapRig(namespace, size=32768, rx_buffers=64) as rig:
        tx, enough = rig.driver.tx, threading.Event()
        rig.memory.write(0x800000, bytes(12) + b"\2" * 12 + b"\x88\xb5" + bytes(46))
        tx.set_desc(0, 0x800000, 72, 0, 0)
        for i in range(tx.size):
            tx.set_avail(i, 0)

        def hog() -> None:
            while not enough.is_set():
                tx.set_avail_idx(tx.used_idx + tx.size)

        rig.start()
        thread = threading.Thread(target=hog)
        thread.start()
        try:
            tx.kick()
            assert wait_for(lambda: rig.counter("tx_packets") > 1000)
            with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
                s.bind(("tap0", 0))
                for n in range(1, 6):
                    s.send(MAC * 2 + b"\x88\xb5" + frame(n))
                    assert wait_for(lambda n=n: rig.counter("rx_packets") >= n)  # type: ignore[misc]
            used = rig.counter("worker_cpu_ns")
            rig.path.stop()
            assert rig.counter("worker_cpu_ns") - used < 0.5e9
        finally:
            enough.set()
            thread.join()


@only(SPLIT)
def test_a_frame_that_was_not_sent_before_a_kill_is_sent_after_an_announcement() -> None:
    """The next back-end is asked for a RARP before it has come to that frame, stops its worker for
    the RARP, and so the tap's count moves on.
    """
    counts = [7, 8]

    class Interface:
        def link(self) -> Any:
            return self

        def stats(self) -> dict[str, int]:
            return {"rx_packets": counts.pop(0)}

        def reopen(self) -> Any:
            return False

    memory = GuestMemory(1 << 20)
    cable = Cable()
    cable.interface = Interface()  # type: ignore[assignment]
    driver = NetDriver(memory, size=8)
    path = EmulatedNet(cable)
    region = ffi.new("uint64_t[]", 2 + 2 * 8)  # aligned
    rings = [r.vring() for r in driver.rings]
    rings[1].inflight = ffi.cast("uint8_t *", region)
    driver.queue(b"first" + bytes(60))
    driver.queue(b"second" + bytes(60))
    first = next(iter(driver.tx.chains))
    notes = bytearray(16 + 16 * 8)
    struct.pack_into("<QHHHH", notes, 0, 0, 1, 8, 0, 0)
    struct.pack_into("<BBxxxxHQ", notes, 16 + 16 * first, 1, 2, 0, 7)
    ffi.memmove(region, bytes(notes), len(notes))
    acked = bits("VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX", "VIRTIO_NET_F_MRG_RXBUF")
    path.start(acked, memory, rings, Events())  # nothing is published yet
    path.stop()
    path.start(acked, memory, rings, Events())
    assert not counts
    driver.tx.publish()
    assert [cable.receive()[12:18] for _ in range(2)] == [b"first\0", b"second"]
    assert path.counters()["tx_in_doubt"] == 0
    path.close()
    cable.close()
    driver.close()
    memory.close()


@only(SPLIT)
@pytest.mark.parametrize(
    ("given", "before", "taken", "sent"),
    [(2, 7, 7, True), (2, 7, 8, False), (2, 7, 9, False), (1, 7, 7, False), (2, 7, None, False)],
    ids=["not sent", "sent", "others send", "not counted then", "not counted now"],
)
def test_the_tap_s_count_says_what_was_sent_before_a_kill(
    given: int, before: int, taken: int | None, sent: bool
) -> None:
    """A frame that was in the hands of a process that was killed: its notes, and the tap's count of
    what it took.
    """

    class Interface:
        def link(self) -> Any:
            return self

        def stats(self) -> dict[str, int]:
            assert taken is not None
            return {"rx_packets": taken}

        def reopen(self) -> Any:
            return False

    memory = GuestMemory(1 << 20)
    cable = Cable()
    if taken is not None:
        cable.interface = Interface()  # type: ignore[assignment]
    driver = NetDriver(memory, size=8)
    path = EmulatedNet(cable)
    region = ffi.new("uint64_t[]", 2 + 2 * 8)  # aligned
    rings = [r.vring() for r in driver.rings]
    rings[1].inflight = ffi.cast("uint8_t *", region)
    driver.send(b"first" + bytes(60), b"second" + bytes(60))
    first = next(iter(driver.tx.chains))
    notes = bytearray(16 + 16 * 8)
    struct.pack_into("<QHHHH", notes, 0, 0, 1, 8, 0, 0)
    struct.pack_into("<BBxxxxHQ", notes, 16 + 16 * first, 1, given, 0, before)
    ffi.memmove(region, bytes(notes), len(notes))
    path.start(
        bits("VIRTIO_F_VERSION_1", "VIRTIO_RING_F_EVENT_IDX", "VIRTIO_NET_F_MRG_RXBUF"),
        memory,
        rings,
        Events(),
    )
    assert wait_for(lambda: driver.tx.outstanding == 0)
    got = [cable.receive()[12:18] for _ in range(1 + sent)]
    assert got == ([b"first\0"] if sent else []) + [b"second"]
    assert path.counters()["tx_in_doubt"] == (not sent)
    path.close()
    cable.close()
    driver.close()
    memory.close()
