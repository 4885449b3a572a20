"""The log of a migration: what the worker writes to guest memory, and what it marks."""

from __future__ import annotations

import select
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.backend.net import NetService
from pyvmm.backend.ports import loop_port
from pyvmm.backend.server import Backend
from pyvmm.conformance.check import LoggedNet
from pyvmm.conformance.dirty_log import FrontendLog
from pyvmm.datapath.base import RingLog
from pyvmm.datapath.ringformat import PACKED
from pyvmm.fd import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.spec.vhost_user import VHOST_F_LOG_ALL
from pyvmm.vhostuser.connect import Connector
from tests.driver import Events, NetDriver, PackedRing, Ring, wait_for
from tests.ringforms import Form, form, pytest_generate_tests
from tests.unit.test_net_worker import ALL, EVENT_IDX, MRG, PATIENCE, VERSION_1, Rig, frame

__all__ = ["form", "pytest_generate_tests"]

PAGE = 4096
SIZE = 1 << 14  # bytes of the log: 512 MiB
ELSEWHERE = 256 << 20  # added to the addresses under which the used rings are marked
GUARD = 0xA5


class Log:
    """A bitmap between two guards."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self._bytes = ffi.new(
            "uint8_t[]", bytes([GUARD]) * PAGE + bytes(size) + bytes([GUARD]) * PAGE
        )
        self.bits: Any = ffi.addressof(self._bytes, PAGE)

    def pages(self) -> set[int]:
        """The addresses of the pages that are marked. Nothing outside of the bitmap is written."""
        data = bytes(ffi.buffer(self._bytes, 2 * PAGE + self.size))
        assert data[:PAGE] == data[PAGE + self.size :] == bytes([GUARD]) * PAGE
        marks = int.from_bytes(data[PAGE : PAGE + self.size], "little")
        return {PAGE * i for i in range(marks.bit_length()) if marks >> i & 1}


class LoggedRig(Rig):
    """A rig whose worker marks the pages that it writes. The driver must not write to its memory
    from ``start`` to ``check``.

    :ivar calls: is signalled when something was marked.
    """

    log: Log

    def start_logged(self, size: int = SIZE, *, used: bool = True, inflight: bool = False) -> None:
        """Start. :param used: the used rings are marked, too."""
        self.log, self.calls = Log(size), EventFd()
        self.regions = [ffi.new("uint8_t[]", 1 << 16) for _ in range(2)]  # kept for the worker
        rings = [ring.vring() for ring in self.driver.rings]
        for ring, region in zip(rings, self.regions, strict=True):
            at = ring.used + ELSEWHERE if used else None
            ring.log = RingLog(self.log.bits, size, at, self.calls)
            ring.inflight = ffi.cast("uint8_t *", region) if inflight else None
        self.before = self.memory.read(0, self.memory.size)
        self.path.start(self.acked, self.memory, rings, self.events)

    def changed(self) -> set[int]:
        """Stop; the pages that differ from what they were."""
        self.path.stop()
        self.calls.close()
        after = self.memory.read(0, self.memory.size)
        return {
            at
            for at in range(0, len(after), PAGE)
            if after[at : at + PAGE] != self.before[at : at + PAGE]
        }


FEATURE_SETS = [VERSION_1 | event | mrg for event in (0, EVENT_IDX) for mrg in (0, MRG)]


@pytest.mark.parametrize("acked", FEATURE_SETS)
@pytest.mark.parametrize("inflight", [False, True], ids=["", "inflight"])
def test_each_page_that_is_written_is_marked(acked: int, inflight: bool) -> None:
    # A long frame needs more buffers than one readv(2) has, so that its end is copied.
    size, long = (PAGE, 60000) if acked & MRG else (2048, 1500)
    with LoggedRig(acked, mtu=60000, rx_size=size) as rig:
        for i in range(100):
            rig.driver.queue(frame(i))
        rig.driver.tx.publish(kick=False)
        rig.start_logged(inflight=inflight)
        lengths = [1500 if i % 16 else long for i in range(60)]
        for i, length in enumerate(lengths):
            rig.cable.far.send(bytes(12) + frame(i, length))
        buffers = sum(-(-(12 + length) // size) for length in lengths)
        assert wait_for(lambda: rig.driver.rx.returned == buffers, PATIENCE)
        assert wait_for(lambda: rig.driver.tx.returned == 100, PATIENCE)
        assert select.select([rig.calls.fileno()], [], [], PATIENCE)[0]
        changed = rig.changed()
        marked = rig.log.pages()
        # The areas of a split ring's device are marked elsewhere; so are a packed ring's events.
        areas = {at for r in rig.driver.rings for at in range(r.used & -PAGE, r.end, PAGE)}
        data = {at for at in marked if at < ELSEWHERE}
        there = {at - ELSEWHERE for at in marked if at >= ELSEWHERE}
        assert data | there >= changed
        assert there <= areas
        assert changed - there <= data
        assert data <= changed
        assert rig.counter("log_missed") == 0
        assert bool(rig.counter("rx_overflows")) == bool(acked & MRG)


def test_frames_that_are_dropped_are_marked() -> None:
    """They have been written to buffers that stay the device's."""
    with LoggedRig(VERSION_1, rx_size=2048, hold_ms=0) as rig:
        rig.start_logged()
        rig.cable.far.send(b"\x55" * 11)  # shorter than its header
        rig.cable.far.send(b"\x55" * 5000)  # longer than its buffer
        assert wait_for(lambda: rig.counter("rx_drop_long") == 1, PATIENCE)
        assert rig.counter("rx_drop_short") == 1
        changed = rig.changed()
        assert changed and changed <= rig.log.pages()


def test_used_rings_need_not_be_marked() -> None:
    """Without VHOST_VRING_F_LOG, only buffers are."""
    with LoggedRig(ALL) as rig:
        rig.start_logged(used=False)
        rig.cable.far.send(bytes(12) + frame(1))
        assert wait_for(lambda: rig.driver.rx.returned == 1, PATIENCE)
        changed = rig.changed()
        marked = rig.log.pages()
        assert len(marked) == 1 and marked < changed


@pytest.mark.parametrize("size", [1, 32])
def test_a_log_that_is_too_small(size: int) -> None:
    """Nothing is written behind it; what is missed is counted."""
    with LoggedRig(ALL) as rig:
        rig.start_logged(size)
        for i in range(200):
            rig.cable.far.send(bytes(12) + frame(i))
        assert wait_for(lambda: rig.driver.rx.returned == 200, PATIENCE)
        changed = rig.changed()
        assert rig.log.pages() <= {at for at in changed if at < 8 * PAGE * size}
        assert rig.counter("log_missed") > 0


LAST = 2**64 - 1


@pytest.mark.parametrize(
    ("addr", "length", "marked", "missed"),
    [
        (0, 0, [], 0),
        (0, 1, [0], 0),
        (4095, 2, [0, 1], 0),
        (8 * 4096 - 1, 1, [7], 0),
        (8 * 4096 - 1, 2, [7], 1),
        (8 * 4096, 1, [], 1),
        (LAST, 1, [], 1),
        (LAST, 2, [], 1),  # wraps round
        (1, LAST, list(range(8)), 2**52 - 8),
        (4096, LAST, list(range(1, 8)), 2**52 - 8),
        (2**63, 2**63, [], 2**51),
    ],
)
def test_ranges(addr: int, length: int, marked: list[int], missed: int) -> None:
    """A log of one byte, for 8 pages."""
    log = Log(1)
    c = ffi.new("struct pv_dirty_log *", {"bits": log.bits, "size": 1})
    lib.pv_dirty_mark(c, addr, length)
    assert log.pages() == {PAGE * i for i in marked}
    assert (c.missed, bool(c.marked)) == (missed, length > 0)


USED, DESC = 1 << 20, 2 << 20  # where a ring marks its device area, and its descriptors
ENTRIES = 1024


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("place", [600, 1023])
def test_what_a_ring_marks(event_idx: bool, place: int) -> None:
    """Of its areas exactly the pages that it has written, at once."""
    packed = Form.now is PACKED
    kind = PackedRing if packed else Ring
    start = place | place << 16 if packed else place
    with closing(GuestMemory(1 << 20)) as memory:
        ring = kind(memory, ENTRIES, 0x10000, start=start, event_idx=event_idx)
        try:
            log, vring = Log(), ffi.new("struct pv_vring *")
            dirty = ffi.new("struct pv_dirty_log *", {"bits": log.bits, "size": SIZE})
            form = {"packed": packed, "indirect": False, "event_idx": event_idx}
            areas = ring.desc, ring.avail, ring.used
            assert not lib.pv_vring_init(vring, memory.c, ENTRIES, *areas, start, form)
            lib.pv_vring_log(vring, dirty, USED, DESC)

            def marked() -> list[int]:
                """What was marked since the last call: pages of the area."""
                pages = sorted(log.pages())
                ffi.memmove(log.bits, bytes(SIZE), SIZE)
                area = DESC if packed and len(pages) and pages[0] >= DESC else USED
                return [(at - area) // PAGE for at in pages]

            # The flags are at the beginning of a split ring's area, the index for kicks at its end.
            flags, index = [0], [2] if event_idx and not packed else [0]
            lib.pv_vring_disable_notify(vring)
            assert marked() == ([] if event_idx and not packed else flags)
            lib.pv_vring_enable_notify(vring)
            assert marked() == index
            for _ in range(2):
                ring.add([(0x80000, 64, True)])
            ring.publish(kick=False)
            iov, chain = ffi.new("struct iovec[]", 4), ffi.new("struct pv_chain *")
            for _ in range(2):
                assert lib.pv_vring_pop(vring, iov, 4, chain) == lib.PV_MORE
                lib.pv_vring_push(vring, chain.head, chain.slots, 64)
                assert marked() == []
            lib.pv_vring_flush(vring)
            # Elements of 8 bytes behind 4 bytes, with the index in these; descriptors of 16 bytes.
            if packed:
                assert marked() == ([2] if place == 600 else [0, 3])
            else:
                assert marked() == ([0, 1] if place == 600 else [0, 1, 2])
        finally:
            ring.close()


def test_rings_wait_for_the_log(tmp_path: Path) -> None:
    """A front-end that starts the rings while its guest migrates gives the log last. A log that is
    too small for the memory is reported.
    """
    lines: list[str] = []
    with Backend(NetService(loop_port(1)), log=lines.append) as backend:
        thread = threading.Thread(target=backend.run, args=(str(tmp_path / "s"),))
        thread.start()
        try:
            with closing(GuestMemory(1 << 20)) as memory, FrontendLog(memory) as log:
                assert wait_for((tmp_path / "s").exists, PATIENCE)
                acked, packed = Form.features(VERSION_1), Form.now is PACKED
                driver = NetDriver(memory, size=16, event_idx=False, packed=packed)
                net = LoggedNet(Connector(str(tmp_path / "s")), timeout=PATIENCE)
                rings = [ring.vring() for ring in driver.rings]
                driver.fill()
                net.connect(PATIENCE)
                net.start(acked, memory, rings, Events())
                net.converse(lambda s: s.choose_features(acked | 1 << VHOST_F_LOG_ALL))
                waits = "migration: the rings wait for the log (SET_LOG_BASE)"
                assert wait_for(lambda: waits in lines, PATIENCE), lines
                driver.send(frame(1))
                net.converse(lambda s: s.settle())
                assert driver.tx.outstanding == 1
                net.converse(lambda s: log.start(s, acked, rings))
                assert driver.wait_packets(1, PATIENCE)
                assert lines[-1] == waits, lines
                log.size = 16  # for 512 KiB
                net.converse(lambda s: log.start(s, acked, rings))
                ends = (
                    "migration: the log ends at 0x80000, the memory at 0x100000: pages in between"
                )
                assert wait_for(lambda: ends in lines[-1], PATIENCE), lines
                net.close()
                driver.close()
        finally:
            backend.stop()
            thread.join(PATIENCE)
