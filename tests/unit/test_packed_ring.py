"""The device side of the packed virtqueue (cext/vring_packed.c) and its in-flight notes
(cext/inflight.c), against a mock driver, the specification's bytes, and whatever a guest may write.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm._ext import ffi, lib
from pyvmm.conformance.driver import PackedRing, Ring
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.datapath.ringformat import PACKED, SPLIT, RingFormat, available
from pyvmm.errors import RingFault
from pyvmm.fd import memfd
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.session import InflightFile
from pyvmm.virtio.queue import ServedQueue
from tests.driver import Cable, Events, NetDriver, bits, wait_for

RING_PACKED = bits("VIRTIO_F_RING_PACKED")
INDIRECT = bits("VIRTIO_RING_F_INDIRECT_DESC")
EVENT_IDX = bits("VIRTIO_RING_F_EVENT_IDX")
AVAIL, USED = 1 << 7, 1 << 15
NEXT, WRITE, TABLE = 1, 2, 4
RING, BUFFER = 0x1000, 0x100000


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(4 << 20)
    yield m
    m.close()


def place(index: int, wrap: int) -> int:
    """The position at which nothing is in anybody's hands."""
    half = index | wrap << 15
    return half | half << 16


def make(
    memory: GuestMemory, size: int = 8, acked: int = INDIRECT, start: int = PACKED.start
) -> tuple[PackedRing, ServedQueue]:
    ring = PackedRing(memory, size, RING, start=start, event_idx=bool(acked & EVENT_IDX))
    return ring, ServedQueue(memory, ring.vring(start), acked | RING_PACKED)


def use(queue: ServedQueue, count: int = 1, written: int = 0) -> None:
    """Take so many chains, which there are, and return them."""
    for _ in range(count):
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, written)


def flags_of(memory: GuestMemory, n: int) -> int:
    return int.from_bytes(memory.read(RING + 16 * n + 14, 2), "little")


# --- the specification's bytes --------------------------------------------------------------------


def test_bytes_of_available_and_used_descriptors(memory: GuestMemory) -> None:
    """2.8.1 and 2.8.13, with flags written out: a lap with the wrap counter at 1, then one at 0."""
    ring, queue = make(memory, size=2)
    laps = [(AVAIL, AVAIL | USED), (USED, 0)]
    for avail, used in laps:
        for n in range(2):
            memory.write(RING + 16 * n, struct.pack("<QIH", BUFFER, 64, 0xBEEF))
            memory.write(RING + 16 * n + 14, (avail | WRITE).to_bytes(2, "little"))
            chain = queue.pop()
            assert chain is not None and (chain.head, chain.slots, chain.room) == (0xBEEF, 1, 64)
            queue.push(chain, 33)
            assert flags_of(memory, n) == avail | WRITE  # not before it is published
            queue.flush()
            data = memory.read(RING + 16 * n, 16)
            assert struct.unpack("<QIHH", data) == (BUFFER, 33, 0xBEEF, used | WRITE)
            assert queue.pop() is None
    ring.close()


def test_a_chain_has_one_used_descriptor_with_the_id_of_its_last(memory: GuestMemory) -> None:
    """2.8.6: the device writes over the first descriptor and skips the others."""
    ring, queue = make(memory, size=4)
    for n, (ident, flags) in enumerate([(1, NEXT), (2, NEXT), (7, 0), (9, 0)]):
        memory.write(RING + 16 * n, struct.pack("<QIHH", BUFFER, 8, ident, AVAIL | flags))
    use(queue, 2)
    queue.flush()
    got = [struct.unpack("<QIHH", memory.read(RING + 16 * n, 16))[2:] for n in range(4)]
    assert got == [(7, AVAIL | USED), (2, AVAIL | NEXT), (7, AVAIL), (9, AVAIL | USED)]
    assert queue.base == place(0, 0)
    ring.close()


def test_a_batch_appears_at_once(memory: GuestMemory) -> None:
    """2.8.9: the driver looks at the first descriptor, whose flags are stored last."""
    ring, queue = make(memory)
    for _ in range(3):
        ring.add([(BUFFER, 16, True)])
    ring.publish()
    use(queue, 3, written=1)
    assert not available(flags_of(memory, 1), wrap=True)
    assert available(flags_of(memory, 0), wrap=True) and ring.take_used() == []
    queue.flush()
    assert len(ring.take_used()) == 3
    ring.close()


def test_starting_writes_nothing(memory: GuestMemory) -> None:
    ring, _ = make(memory)
    before = memory.read(RING, ring.end - RING)
    ServedQueue(memory, ring.vring(), RING_PACKED | EVENT_IDX)
    assert memory.read(RING, ring.end - RING) == before
    ring.close()


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 32767, 32768])
def test_sizes(memory: GuestMemory, size: int) -> None:
    """Any size (2.8.10.1): three laps and a bit."""
    ring, queue = make(memory, size)
    for lap in range(3):
        for _ in range(size):
            ring.add([(BUFFER, 16, True)])
        ring.publish()
        use(queue, size, written=1)
        assert queue.pop() is None
        queue.flush()
        assert len(ring.take_used()) == size
        assert queue.base == ring.position == place(0, lap % 2)
    ring.close()


@pytest.mark.parametrize("size", [0, 32769])
def test_no_sizes(memory: GuestMemory, size: int) -> None:
    ring = PackedRing(memory, 8, RING)
    vring = ring.vring()
    vring.size = size
    with pytest.raises(RingFault, match="queue size"):
        ServedQueue(memory, vring, RING_PACKED)
    ring.close()


@pytest.mark.parametrize(
    ("base", "good"),
    [
        (PACKED.start, True),
        (place(7, 0), True),
        (place(8, 1), False),
        (place(0x7FFF, 0), False),
        (2 | 0x8000 | (0x8000 | 7) << 16, False),  # taken before it was available
        (2 | (0x8000 | 7) << 16, True),  # three in hand, over the end of the ring
    ],
)
def test_positions_that_a_ring_can_have(memory: GuestMemory, base: int, *, good: bool) -> None:
    ring = PackedRing(memory, 8, RING)
    if good:
        queue = ServedQueue(memory, ring.vring(base), RING_PACKED)
        assert queue.base == base
        assert PACKED.held(memory, ring.vring(), queue.base) <= 8
    else:
        with pytest.raises(RingFault, match="position"):
            ServedQueue(memory, ring.vring(base), RING_PACKED)
        assert PACKED.held(memory, ring.vring(), base) > 8
    ring.close()


@pytest.mark.parametrize(
    ("given", "whole"),
    [(0x8000, 0x80008000), (0x0005, 0x00050005), (0x8003_8005, 0x8003_8005), (0, 0)],
)
def test_a_peer_may_give_the_lower_half_alone(given: int, whole: int) -> None:
    assert PACKED.whole(given) == whole


def test_chains_that_are_given_back_are_taken_again(memory: GuestMemory) -> None:
    ring, queue = make(memory, size=5, start=place(3, 0))
    ring.add([(BUFFER, 1, False), (BUFFER, 2, False), (BUFFER, 4, True)])
    ring.add([(BUFFER, 8, True)])
    ring.publish()
    first = queue.pop()
    second = queue.pop()
    assert first is not None and second is not None
    assert (first.slots, second.slots) == (3, 1)
    assert PACKED.held(memory, ring.vring(), queue.base) == 4
    assert PACKED.give_back(memory, ring.vring(), queue.base) == place(3, 0)
    lib.pv_vring_unpop(queue.c, 4)
    assert queue.base == place(3, 0)
    again = queue.pop()
    assert again is not None and again.head == first.head
    queue.push(again, 0)
    queue.flush()
    lib.pv_vring_unpop(queue.c, 0)
    assert queue.base == place(1, 1)
    assert PACKED.pending(memory, ring.vring(), queue.base) == 1
    ring.close()


@pytest.mark.parametrize("form", [SPLIT, PACKED], ids=["split", "packed"])
def test_who_has_moved(memory: GuestMemory, form: RingFormat) -> None:
    """A guest that hangs is told from one that works by what the driver does: what the device does
    for frames from outside does not count.
    """
    kind = PackedRing if form is PACKED else Ring
    ring = kind(memory, 4, RING)
    queue = ServedQueue(memory, ring.vring(), RING_PACKED if form is PACKED else 0)
    for _ in range(9):
        before = form.offers(memory, ring), form.returns(memory, ring)
        ring.add([(BUFFER, 16, True)])
        ring.publish()
        offered = form.offers(memory, ring), form.returns(memory, ring)
        assert offered[0] != before[0]
        use(queue, written=1)
        queue.flush()
        assert form.offers(memory, ring) == offered[0]
        assert form.returns(memory, ring) != offered[1]
        ring.take_used()
    ring.close()


# --- all that a driver may do ---------------------------------------------------------------------

segments = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=8).map(
    lambda s: sorted(s, key=lambda one: one[1])
)


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    chains=st.lists(st.tuples(segments, st.booleans(), st.integers(0, 400)), max_size=30),
    size=st.integers(8, 13),
    start=st.tuples(st.integers(0, 7), st.integers(0, 1)),
    acked=st.sampled_from([INDIRECT, INDIRECT | EVENT_IDX]),
    batch=st.integers(1, 5),
)
def test_requests_and_replies_pass_unchanged(
    memory: GuestMemory,
    chains: list[tuple[list[tuple[Any, ...]], bool, int]],
    size: int,
    start: tuple[int, int],
    acked: int,
    batch: int,
) -> None:
    """However the bytes are split into descriptors and tables, the device sees the request, and the
    driver sees the reply.
    """
    ring, queue = make(memory, size, acked, place(*start))
    want: list[tuple[int, int]] = []
    for number, (shape, indirect, reply_len) in enumerate(chains):
        if ring.room < (1 if indirect else len(shape)):
            queue.flush()
            assert ring.take_used() == want
            want = []
        at, listed, request = BUFFER, [], b""
        for i, (length, write) in enumerate(shape):
            listed.append((at, length, write))
            data = bytes((number + i + k) & 0xFF for k in range(length))
            memory.write(at, b"\xee" * length if write else data)
            request += b"" if write else data
            at += length + 16
        ident = ring.add(listed, indirect=0x200000 if indirect else None)
        ring.publish()
        chain = queue.pop()
        assert chain is not None and chain.head == ident and chain.request == request
        assert chain.slots == (1 if indirect else len(shape))
        reply = bytes(k & 0xFF for k in range(reply_len))
        written = chain.reply(reply)
        stored = b"".join(memory.read(gpa, n) for gpa, n, write in listed if write)
        assert stored == reply[:written] + b"\xee" * (chain.room - written)
        assert queue.pop() is None
        queue.push(chain, written)
        want.append((ident, written))
        if len(want) == batch:
            assert ring.take_used() == []
            queue.flush()
            assert ring.take_used() == want
            want = []
    queue.flush()
    assert ring.take_used() == want
    assert queue.base == ring.position
    ring.close()


def test_a_table_s_entries_are_taken_in_order_whatever_their_flags(memory: GuestMemory) -> None:
    """2.8.7: WRITE is the only valid flag; NEXT and the buffer id are ignored."""
    ring, queue = make(memory)
    memory.write(BUFFER, b"abcdef")
    entries = [(BUFFER, 3, 99, NEXT), (BUFFER + 3, 3, 7, 0), (BUFFER + 64, 5, 0, WRITE | NEXT)]
    memory.write(0x3000, b"".join(struct.pack("<QIHH", *e) for e in entries))
    ring.set_desc(0, 0x3000, 48, AVAIL | TABLE | WRITE, 41)
    chain = queue.pop()
    assert chain is not None and (chain.request, chain.room) == (b"abcdef", 5)
    assert (chain.head, chain.slots) == (41, 1)
    ring.close()


# --- notifications --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [place(0, 1), place(6, 1), place(7, 0)])
def test_event_idx_signals_when_the_asked_for_descriptor_is_passed(
    memory: GuestMemory, start: int
) -> None:
    ring, queue = make(memory, acked=EVENT_IDX, start=start)

    def done(n: int) -> bool:
        for _ in range(n):
            ring.add([(BUFFER, 16, True)])
        ring.publish()
        use(queue, n)
        wanted = queue.flush()
        ring.take_used()
        return wanted

    def ask(ahead: int) -> None:
        ring._ours[0] = ring._outside(ring._forward(ring._inside(start & 0xFFFF), ahead))
        ring._ours[1] = 2

    assert done(1)
    ask(3)
    assert [done(1), done(1), done(1), done(1)] == [False, False, True, False]
    ask(6)
    assert done(4)
    assert not queue.flush()  # nothing new
    ring._ours[1] = 1
    assert not done(1)
    ring._ours[1] = 0
    assert done(1)
    ring._ours[0], ring._ours[1] = 8, 2  # outside of the ring
    assert not done(1)
    ring._ours[1] = 3  # reserved
    assert done(1)
    ring.close()


@pytest.mark.parametrize("acked", [0, EVENT_IDX])
def test_enabling_notifications_sees_what_came_meanwhile(memory: GuestMemory, acked: int) -> None:
    ring, queue = make(memory, acked=acked)
    queue.enable_notify()
    assert ring.asked
    queue.disable_notify()
    for _ in range(3):
        ring.add([(BUFFER, 16, True)])
        assert not ring.publish()
        use(queue)
    ring.add([(BUFFER, 16, True)])
    assert not ring.publish()
    assert queue.enable_notify()
    use(queue)
    assert not queue.enable_notify()
    ring.add([(BUFFER, 16, True)])
    assert ring.publish()
    ring.close()


def test_a_driver_without_event_idx_cannot_ask_for_a_descriptor(memory: GuestMemory) -> None:
    """2.8.10: the flag is valid with EVENT_IDX only. Better an interrupt too many."""
    ring, queue = make(memory, acked=0)
    ring._ours[0], ring._ours[1] = 0x8000 | 5, 2
    ring.add([(BUFFER, 16, True)])
    ring.publish()
    use(queue)
    assert queue.flush()
    ring.close()


# --- what a hostile guest writes ------------------------------------------------------------------


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    table=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 4 << 20), st.integers(0, 2**64 - 1), st.just(0x3000)),
            st.one_of(st.integers(0, 4096), st.integers(0, 2**32 - 1), st.sampled_from([16, 48])),
            st.integers(0, 65535),
            st.one_of(st.integers(0, 65535), st.sampled_from([AVAIL, AVAIL | NEXT, USED])),
        ),
        min_size=8,
        max_size=8,
    ),
    acked=st.sampled_from([0, INDIRECT, EVENT_IDX]),
    again=st.booleans(),
)
def test_any_bytes_end_in_a_chain_or_a_fault(
    memory: GuestMemory, table: list[tuple[int, int, int, int]], acked: int, *, again: bool
) -> None:
    """Random bytes in the ring never make us crash or loop, and never take more than the ring
    holds, although a guest may make descriptors available again at once.
    """
    ring, queue = make(memory, acked=acked)
    memory.write(0x3000, b"".join(struct.pack("<QIHH", *one) for one in table[:3]))
    image = b"".join(struct.pack("<QIHH", *one) for one in table)
    memory.write(RING, image)
    low = int(ffi.cast("uintptr_t", memory.c.region[0].host))
    iov = ffi.new("struct iovec[]", lib.PV_CHAIN_MAX)
    chain = ffi.new("struct pv_chain *")
    slots = 0
    while (step := lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain)) == lib.PV_MORE:
        slots += chain.slots
        assert chain.slots >= 1 and slots <= 8
        for i in range(chain.out_num + chain.in_num):
            start = int(ffi.cast("uintptr_t", iov[i].iov_base))
            assert low <= start and start + iov[i].iov_len <= low + (4 << 20)
            assert iov[i].iov_len
        if again:
            flipped = [(*one[:3], one[3] ^ (AVAIL | USED)) for one in table]
            memory.write(RING, b"".join(struct.pack("<QIHH", *one) for one in flipped))
    assert PACKED.held(memory, ring.vring(), queue.base) == slots
    if step == lib.PV_BAD:
        assert queue.c.fault
        assert lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain) == lib.PV_BAD
    lib.pv_vring_unpop(queue.c, slots)
    assert queue.base == PACKED.start
    ring.close()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([(BUFFER, 16, 0, AVAIL | NEXT)] * 4, "loops"),
        ([(BUFFER, 0, 0, AVAIL)], "length 0"),
        ([(2**64 - 8, 16, 0, AVAIL)], "not in guest memory"),
        ([(0x3000, 17, 0, AVAIL | TABLE)], "bad length"),
        ([(0x3000, 16, 0, AVAIL | TABLE | NEXT)], "with a next one"),
        ([(2**63, 16, 0, AVAIL | TABLE)], "table is not in guest memory"),
        ([(BUFFER, 8, 0, AVAIL | NEXT | WRITE), (BUFFER, 8, 0, AVAIL)], "after a writable"),
    ],
)
def test_malformed_chains(
    memory: GuestMemory, entries: list[tuple[int, int, int, int]], words: str
) -> None:
    ring, queue = make(memory, size=4)
    memory.write(RING, b"".join(struct.pack("<QIHH", *one) for one in entries))
    with pytest.raises(RingFault, match=words):
        queue.pop()
    assert queue.base == PACKED.start  # a bad chain is not taken
    ring.close()


def test_what_is_available_again_at_once_is_a_fault(memory: GuestMemory) -> None:
    """A driver that makes descriptors available again before they were used."""
    ring, queue = make(memory, size=2)
    for flags in (AVAIL, USED):
        memory.write(RING, struct.pack("<QIHH", BUFFER, 8, 1, flags) * 2)
        if flags == AVAIL:
            assert queue.pop() is not None and queue.pop() is not None and queue.pop() is None
    with pytest.raises(RingFault, match="again before it was used"):
        queue.pop()
    ring.close()


@pytest.mark.parametrize(
    ("area", "at"), [("desc", 8), ("avail", 2), ("used", 2), ("used", 4 << 20), ("desc", 4 << 20)]
)
def test_areas(memory: GuestMemory, area: str, at: int) -> None:
    """2.8.10.1: alignments of 16, 4 and 4 bytes."""
    ring = PackedRing(memory, 8, RING)
    vring = ring.vring()
    setattr(vring, area, getattr(vring, area) + at)
    with pytest.raises(RingFault, match="misaligned" if at < 16 else "not in guest memory"):
        ServedQueue(memory, vring, RING_PACKED)
    ring.close()


# --- in-flight notes (vhost-user, "Inflight I/O tracking") ----------------------------------------

SIZE = 8
NET = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_F_RING_PACKED")


class Notes:
    """The region of a ring of ``SIZE`` entries."""

    def __init__(self) -> None:
        self.length = spec.INFLIGHT_PACKED_HEAD_SIZE + 32 * SIZE
        self.region = ffi.new("uint64_t[]", self.length // 8)

    def write(self, old: int, new: int, inflight: int, given: int, counter: int) -> None:
        head = (0, 1, SIZE, 0, 0, new & 0x7FFF, old & 0x7FFF, new >> 15, old >> 15)
        data = struct.pack(spec.INFLIGHT_PACKED_HEAD, *head).ljust(32, b"\0")
        data += struct.pack("<BBHHHQ", inflight, given, 1, 0, 1, counter)
        ffi.memmove(self.region, data, len(data))

    @property
    def head(self) -> tuple[int, ...]:
        """version, desc_num, free_head, old_free_head, used_idx, old_used_idx, both wrap
        counters.
        """
        data = bytes(ffi.buffer(self.region, 32))
        return struct.unpack(spec.INFLIGHT_PACKED_HEAD, data[:22])[1:]

    @property
    def first(self) -> tuple[int, ...]:
        """inflight, next, last, num, counter, id, flags, len, addr of the first descriptor."""
        data = bytes(ffi.buffer(self.region, 64))
        return struct.unpack(spec.INFLIGHT_PACKED_DESC, data[32:])


class Counting:
    """An interface that has taken so many frames."""

    def __init__(self, taken: int) -> None:
        self.taken = taken

    def link(self) -> Counting:
        return self

    def stats(self) -> dict[str, int]:
        return {"rx_packets": self.taken}

    def reopen(self) -> bool:
        return False


def serve(driver: NetDriver, notes: Notes, taken: int) -> tuple[list[bytes], dict[str, int]]:
    """Transmit what is in the ring, as the heir of a process that has left these notes."""
    cable = Cable()
    cable.interface = Counting(taken)  # type: ignore[assignment]
    path = EmulatedNet(cable)
    rings = [r.vring() for r in driver.rings]
    rings[1].inflight = ffi.cast("uint8_t *", notes.region)
    path.start(NET, driver.memory, rings, Events())
    assert wait_for(lambda: driver.tx.outstanding == 0)
    path.stop()
    counters = path.counters()
    got = []
    with suppress(BlockingIOError):
        while True:
            got.append(cable.far.recv(2048)[12:])
    path.close()
    cable.close()
    return got, counters


@pytest.mark.parametrize(
    ("notes", "published", "taken", "sent"),
    [
        ((0x8000, 0x8000, 1, 2, 7), False, 7, [b"one", b"two", b"three"]),  # not sent
        ((0x8000, 0x8000, 1, 2, 7), False, 8, [b"two", b"three"]),  # sent, not returned
        ((0x8000, 0x8001, 1, 2, 7), False, 8, [b"two", b"three"]),  # about to be returned
        ((0x8000, 0x8001, 1, 2, 7), True, 8, [b"two", b"three"]),  # returned, not noted
        ((0x8000, 0x8001, 0, 2, 7), True, 8, [b"two", b"three"]),
        ((0x8001, 0x8001, 0, 2, 7), True, 8, [b"two", b"three"]),  # noted
        ((0x8000, 0x8000, 0, 0, 0), False, 8, [b"one", b"two", b"three"]),  # not begun
        ((0x7FFF, 0xFFFF, 1, 1, 1), False, 8, [b"one", b"two", b"three"]),  # nonsense
    ],
)
def test_the_heir_goes_on_where_the_notes_say(
    notes: tuple[int, int, int, int, int], published: bool, taken: int, sent: list[bytes]
) -> None:
    """A process was killed while it sent the first of three frames, at each moment that makes a
    difference.
    """
    memory = GuestMemory(1 << 20)
    driver = NetDriver(memory, size=SIZE, packed=True, event_idx=False, rx_buffers=SIZE)
    for frame in (b"one", b"two", b"three"):
        driver.queue(frame)
    driver.tx.publish(kick=False)
    if published:
        ident, flags = struct.unpack("<HH", memory.read(driver.tx.desc + 12, 4))
        used = struct.pack("<IHH", 0, ident, flags | USED)
        memory.write(driver.tx.desc + 8, used)
    region = Notes()
    region.write(*notes)
    got, counters = serve(driver, region, taken)
    assert got == sent
    assert counters["tx_in_doubt"] == (not published and len(sent) < 3)
    assert region.head == (1, SIZE, 0, 0, 3, 3, 1, 1)
    assert region.first[0] == 0
    driver.close()
    memory.close()


def test_a_new_region_begins_at_the_ring_s_position_and_goes_around(
    memory: GuestMemory,
) -> None:
    """QueueRegionPacked, byte by byte: two chains over the end of the ring."""
    start = place(5, 0)
    driver = NetDriver(memory, size=SIZE, packed=True, event_idx=False, start=start, rx_buffers=8)
    driver.queue(b"frame", split=[12])
    driver.queue(b"other", split=[12])
    driver.tx.publish(kick=False)
    region = Notes()
    got, _ = serve(driver, region, 3)
    assert got == [b"frame", b"other"]
    assert region.head == (1, SIZE, 0, 0, 1, 1, 1, 1)
    # What an heir that is not ours would repeat: a copy of the latest chain.
    second = struct.unpack("<QIHH", memory.read(driver.tx.desc + 16 * 7, 16))
    inflight, following, last, num, counter, ident, flags, length, addr = region.first
    assert (inflight, following, last, num, counter) == (0, 1, 1, 2, 4)
    assert (addr, ident, length) == (second[0], second[2], 12)
    assert flags & (AVAIL | USED) == USED and flags & NEXT
    driver.close()


def test_a_killed_receiver_s_batch_counts_if_it_was_published(memory: GuestMemory) -> None:
    """The notes have both places before the batch is published: its first descriptor's flags
    decide.
    """
    ring = PackedRing(memory, SIZE, RING)
    for _ in range(SIZE):
        ring.add([(BUFFER, 16, True)])
    ring.publish()
    vring, old, new = ring.vring(), 0x8000, 0x8003
    assert PACKED.from_notes(memory, vring, old, new) == place(0, 1)
    memory.write(RING + 14, (AVAIL | USED).to_bytes(2, "little"))
    assert PACKED.from_notes(memory, vring, old, new) == place(3, 1)
    assert PACKED.from_notes(memory, vring, old, old) == place(0, 1)
    for bad in (0x8008, 0x7FFF):
        assert PACKED.from_notes(memory, vring, bad, new) is None
        assert PACKED.from_notes(memory, vring, old, bad) is None
    ring.close()


@pytest.mark.parametrize(
    ("begin", "published", "undone"),
    [(0x8006, False, True), (0x8006, True, False), (0x6, False, False), (0x8008, False, False)],
    ids=["not published", "published", "another lap", "outside"],
)
def test_what_a_killed_receiver_has_overwritten_is_put_back(
    memory: GuestMemory, begin: int, published: bool, undone: bool
) -> None:
    """By the front-end, for whoever serves the ring next; the batch goes round the ring's end."""
    ring = PackedRing(memory, SIZE, RING, start=place(6, 1))
    for length in (16, 17, 18):
        ring.add([(BUFFER, length, True)] * 2)
    ring.publish()
    before = memory.read(RING, 16 * SIZE)
    saved = []
    for at, used in ((6, AVAIL | USED), (0, 0), (2, 0)):
        entry = memory.read(RING + 16 * at, 16)
        saved.append((2, *struct.unpack("<8xIHH", entry)))
        half = struct.pack("<IH", 7, 99)
        memory.write(RING + 16 * at + 8, half)
        if at != 6 or published:
            memory.write(RING + 16 * at + 14, used.to_bytes(2, "little"))
    now = memory.read(RING, 16 * SIZE)
    PACKED.undo(memory, ring.vring(), begin, saved)
    assert memory.read(RING, 16 * SIZE) == (before if undone else now)
    ring.close()


def test_notes_of_overwritten_descriptors_may_be_any_bytes(memory: GuestMemory) -> None:
    """A hostile back-end's: nothing outside of the ring is written."""
    length = spec.INFLIGHT_PACKED_HEAD_SIZE + 32 * SIZE
    fd = memfd("notes", 2 * length)
    notes = InflightFile(fd, struct.pack(spec.INFLIGHT, 2 * length, 0, 2, SIZE))
    ring = PackedRing(memory, SIZE, RING)
    for pattern in (b"\xff", bytes(range(1, 256)), b"\x80\x01\0"):
        data = (pattern * length)[:length]
        os.pwrite(fd.fileno(), data, length)
        begin, overwritten = notes.overwritten(1, SIZE)
        assert begin == int.from_bytes(data[26:28], "little") and len(overwritten) == SIZE
        posted = (b"\0" * 14 + AVAIL.to_bytes(2, "little")) * SIZE
        memory.write(RING - 4096, bytes(4096) + posted + bytes(4096))
        PACKED.undo(memory, ring.vring(), 0x8000, overwritten)
        assert memory.read(RING, 16 * SIZE) != posted
        assert memory.read(RING - 4096, 4096) == memory.read(RING + 16 * SIZE, 4096) == bytes(4096)
    assert notes.overwritten(0, SIZE) == (0, []) == notes.overwritten(2, SIZE)
    notes.close()
    ring.close()
