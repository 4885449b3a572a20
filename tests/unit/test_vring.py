"""The device side of the split virtqueue (cext/vring.c) through pyvmm.virtio.queue, against a mock
driver and a model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm._ext import ffi, lib
from pyvmm.conformance.driver import PackedRing
from pyvmm.datapath.base import Vring
from pyvmm.datapath.ringformat import PACKED, SPLIT, RingFormat
from pyvmm.errors import RingFault
from pyvmm.memory import GuestMemory
from pyvmm.spec.platform import RAM_HIGH_BASE, RAM_LOW_MAX
from pyvmm.spec.virtio import (
    VIRTIO_F_RING_PACKED,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
)
from pyvmm.virtio.queue import ServedQueue
from tests.driver import Ring

INDIRECT = 1 << VIRTIO_RING_F_INDIRECT_DESC
EVENT_IDX = 1 << VIRTIO_RING_F_EVENT_IDX


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(4 << 20)
    yield m
    m.close()


def push_next(queue: ServedQueue) -> None:
    """Take the next chain, which there is, and return it with nothing written."""
    chain = queue.pop()
    assert chain is not None
    queue.push(chain, 0)


def make(
    memory: GuestMemory, size: int = 8, acked: int = INDIRECT, start: int = 0, **kw: Any
) -> tuple[Ring, ServedQueue]:
    ring = Ring(memory, size, 0x1000, start=start, event_idx=bool(acked & EVENT_IDX), **kw)
    return ring, ServedQueue(memory, ring.vring(start), acked)


def test_an_impossible_index_is_found_again(memory: GuestMemory) -> None:
    """A worker that gives chains back takes the fault behind them for one that is met again."""
    ring, queue = make(memory)
    ring.set_avail_idx(9)
    iov = ffi.new("struct iovec[]", lib.PV_CHAIN_MAX)
    chain = ffi.new("struct pv_chain *")
    for _ in range(3):
        assert lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain) == lib.PV_BAD
        assert queue.c.fault == lib.PV_FAULT_AVAIL_IDX
        queue.c.fault = lib.PV_FAULT_NONE


def taken_one_by_one(queue: ServedQueue) -> list[tuple[int, ...]]:
    """The chains of one segment that ``pv_vring_pop`` takes until it meets another kind."""
    iov, chain = ffi.new("struct iovec[]", lib.PV_CHAIN_MAX), ffi.new("struct pv_chain *")
    out = []
    while lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain) == lib.PV_MORE:
        if chain.out_num + chain.in_num != 1 or chain.slots != 1:
            lib.pv_vring_unpop(queue.c, chain.slots)
            break
        out.append(described(iov[0], chain))
    queue.c.fault = lib.PV_FAULT_NONE
    return out


def described(iov: Any, chain: Any) -> tuple[int, ...]:
    """A chain of one segment."""
    where = int(ffi.cast("uintptr_t", iov.iov_base)), int(iov.iov_len)
    return (*where, chain.head, chain.out_num, chain.in_num, chain.out_len, chain.in_len)


#: What may follow good single descriptors: a chain that pv_vring_pop_burst() leaves alone.
ODD: dict[str, list[list[tuple[int, int, bool]]]] = {
    "none": [],
    "chain": [[(0x9000, 5, False), (0x9100, 5, True)]],
    "zero": [[(0x9000, 0, True)]],
    "outside": [[(1 << 40, 5, False)]],
}


@pytest.mark.parametrize("form", [SPLIT, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("last", ODD)
def test_a_burst_is_so_many_pops(memory: GuestMemory, last: str, form: RingFormat) -> None:
    """pv_vring_pop_burst() takes what pv_vring_pop() would take one by one, up to the first chain
    that is no single good descriptor, at every place in the ring; the driver gets back what
    pv_vring_push_burst() gives.
    """
    packed = form is PACKED
    ring = (PackedRing if packed else Ring)(memory, 8, 0x1000, event_idx=True)
    acked = INDIRECT | EVENT_IDX | (1 << VIRTIO_F_RING_PACKED if packed else 0)
    queue = ServedQueue(memory, ring.vring(form.start), acked)
    iov, chains = ffi.new("struct iovec[]", 8), ffi.new("struct pv_chain[]", 8)
    done = ffi.new("struct pv_done[]", 8)
    for lap in range(20 if last == "none" else 1):  # more than twice round the ring
        kinds = [[(0x8000 + 64 * i, 64 - i, (lap + i) % 3 == 0)] for i in range(5)]
        for chain in kinds + ODD[last]:
            ring.add(chain)
        ring.publish(kick=False)
        expected = taken_one_by_one(queue)
        assert len(expected) == 5
        lib.pv_vring_unpop(queue.c, 5)
        assert lib.pv_vring_pop_burst(queue.c, iov, chains, 3) == 3
        assert lib.pv_vring_pop_burst(queue.c, iov + 3, chains + 3, 5) == 2
        assert [described(iov[i], chains[i]) for i in range(5)] == expected
        assert not queue.c.fault
        for i in range(5):
            done[i] = {"head": chains[i].head, "slots": chains[i].slots, "len": 100 * lap + i}
        assert lib.pv_vring_pop_burst(queue.c, iov, chains, 8) == 0
        lib.pv_vring_push_burst(queue.c, done, 2)
        lib.pv_vring_push_burst(queue.c, done + 2, 3)
        assert ring.take_used() == []
        lib.pv_vring_flush(queue.c)
        given = [(done[i].head, done[i].len) for i in range(5)]
        assert ring.take_used() == given
    if last in ("zero", "outside"):
        assert lib.pv_vring_pop(queue.c, iov, 8, chains) == lib.PV_BAD
        assert lib.pv_vring_pop_burst(queue.c, iov, chains, 8) == 0  # for good
    ring.close()


@pytest.mark.parametrize("form", [SPLIT, PACKED], ids=["split", "packed"])
def test_a_burst_never_takes_more_than_the_ring_has(memory: GuestMemory, form: RingFormat) -> None:
    """A driver that makes descriptors available again before they were used, or is ahead by more
    than its ring.
    """
    packed = form is PACKED
    ring = (PackedRing if packed else Ring)(memory, 8, 0x1000)
    queue = ServedQueue(memory, ring.vring(form.start), 1 << VIRTIO_F_RING_PACKED if packed else 0)
    iov, chains = ffi.new("struct iovec[]", 32), ffi.new("struct pv_chain[]", 32)
    for i in range(8):
        ring.add([(0x8000 + 64 * i, 64, False)])
    ring.publish(kick=False)
    assert lib.pv_vring_pop_burst(queue.c, iov, chains, 8) == 8
    if packed:
        for i in range(8):  # of the next lap
            memory.write(0x1000 + 16 * i + 14, struct.pack("<H", 1 << 15))
    else:
        ring.set_avail_idx(8 + 9)
    assert lib.pv_vring_pop_burst(queue.c, iov, chains, 32) == 0
    assert lib.pv_vring_pop(queue.c, iov, 32, chains) == lib.PV_BAD
    ring.close()


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
    start=st.sampled_from([0, 1, 32767, 65530, 65535]),
    acked=st.sampled_from([INDIRECT, INDIRECT | EVENT_IDX]),
    batch=st.integers(1, 5),
)
def test_requests_and_replies_pass_unchanged(
    memory: GuestMemory,
    chains: list[tuple[list[tuple[Any, ...]], bool, int]],
    start: int,
    acked: int,
    batch: int,
) -> None:
    """However the bytes are split into descriptors and tables, the device sees the request, and the
    driver sees the reply.
    """
    ring, queue = make(memory, acked=acked, start=start)
    done = pending = 0
    for number, (shape, indirect, reply_len) in enumerate(chains):
        if len(ring.free) < (1 if indirect else len(shape)):
            queue.flush()
            ring.take_used()
            pending = 0
        at, listed, request, room = 0x100000, [], b"", []
        for i, (length, write) in enumerate(shape):
            listed.append((at, length, write))
            data = bytes((number + i + k) & 0xFF for k in range(length))
            memory.write(at, b"\xee" * length if write else data)
            request += b"" if write else data
            room += [(at, length)] if write else []
            at += length + 16
        head = ring.add(listed, indirect=0x200000 if indirect else None)
        ring.publish()
        chain = queue.pop()
        assert chain is not None and chain.head == head
        assert chain.request == request
        assert chain.room == sum(n for _, n in room)
        reply = bytes(k & 0xFF for k in range(reply_len))
        written = chain.reply(reply)
        assert written == min(reply_len, chain.room)
        stored = b"".join(memory.read(gpa, n) for gpa, n in room)
        assert stored == reply[:written] + b"\xee" * (chain.room - written)
        assert queue.pop() is None
        queue.push(chain, written)
        pending += 1
        done += 1
        assert (
            ring.used_idx == (start + done - pending) & 0xFFFF
        )  # nothing is published before flush
        if pending == batch:
            queue.flush()
            assert ring.take_used()[-1] == (head, written)
            pending = 0
    assert queue.base == (start + done) & 0xFFFF
    ring.close()


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    table=st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 4 << 20),
                st.integers(0, 2**64 - 1),
                st.sampled_from([0x1000, 0x3000]),
            ),
            st.one_of(
                st.integers(0, 4096), st.integers(0, 2**32 - 1), st.sampled_from([16, 32, 48])
            ),
            st.integers(0, 15),
            st.one_of(st.integers(0, 8), st.integers(0, 65535)),
        ),
        min_size=8,
        max_size=8,
    ),
    heads=st.lists(st.one_of(st.integers(0, 8), st.integers(0, 65535)), min_size=8, max_size=8),
    idx=st.integers(0, 65535),
    acked=st.sampled_from([0, INDIRECT]),
)
def test_any_bytes_end_in_a_chain_or_a_fault(
    memory: GuestMemory,
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    idx: int,
    acked: int,
) -> None:
    """Random bytes in the ring never make us crash or loop. An accepted chain lies in guest RAM,
    and its readable segments come before the writable ones.
    """
    ring, queue = make(memory, acked=acked)
    memory.write(0x3000, b"".join(struct.pack("<QIHH", *one) for one in table[:3]))
    for i, one in enumerate(table):
        ring.set_desc(i, *one)
    for i, head in enumerate(heads):
        ring.set_avail(i, head)
    ring.set_avail_idx(idx)
    low = int(ffi.cast("uintptr_t", memory.c.region[0].host))
    taken = 0
    iov = ffi.new("struct iovec[]", lib.PV_CHAIN_MAX)
    chain = ffi.new("struct pv_chain *")
    while (step := lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain)) == lib.PV_MORE:
        taken += 1
        assert taken <= 8
        assert chain.head < 8
        for i in range(chain.out_num + chain.in_num):
            start = int(ffi.cast("uintptr_t", iov[i].iov_base))
            assert low <= start and start + iov[i].iov_len <= low + (4 << 20)
            assert iov[i].iov_len
    assert queue.base == taken  # a bad chain is not taken
    if step == lib.PV_BAD:
        assert queue.c.fault
        assert lib.pv_vring_pop(queue.c, iov, lib.PV_CHAIN_MAX, chain) == lib.PV_BAD  # for good
    else:
        assert taken == idx
    ring.close()


def test_descriptors_that_cross_the_hole_are_bad() -> None:
    """RAM on both sides of the 32-bit hole is not contiguous for the guest, although its mapping on
    the host is.
    """
    memory = GuestMemory(RAM_LOW_MAX + (2 << 20))
    try:
        for gpa, length, good in [
            (RAM_LOW_MAX - 16, 16, True),
            (RAM_LOW_MAX - 16, 17, False),
            (RAM_HIGH_BASE, 32, True),
            (RAM_HIGH_BASE - 1, 2, False),
            (RAM_HIGH_BASE + (2 << 20) - 8, 8, True),
            (RAM_HIGH_BASE + (2 << 20) - 8, 9, False),
        ]:
            ring, queue = make(memory)
            ring.add([(gpa, length, True)])
            ring.publish()
            if good:
                chain = queue.pop()
                assert chain is not None and chain.room == length
            else:
                with pytest.raises(RingFault, match="not in guest memory"):
                    queue.pop()
            ring.close()
        # A ring area may not cross the hole either.
        ring, _ = make(memory)
        v = ring.vring()
        v.desc = RAM_LOW_MAX - 64
        with pytest.raises(RingFault, match="not in guest memory"):
            ServedQueue(memory, v, 0)
        ring.close()
    finally:
        memory.close()


@pytest.mark.parametrize("size", [1, 2, 1024, 32768])
def test_sizes(memory: GuestMemory, size: int) -> None:
    ring, queue = make(memory, size)
    for _ in range(2):
        for _i in range(size):
            ring.add([(0x200000, 16, True)])
        ring.publish()
        for _i in range(size):
            chain = queue.pop()
            assert chain is not None
            queue.push(chain, 1)
        assert queue.pop() is None
        queue.flush()
        assert len(ring.take_used()) == size
    ring.close()


def test_a_chain_through_direct_descriptors_may_end_in_a_table(memory: GuestMemory) -> None:
    """2.7.5.3.2: a chain may have normal descriptors and then one INDIRECT descriptor, whose WRITE
    flag is ignored.
    """
    ring, queue = make(memory)
    memory.write(0x100000, b"abcdef")
    memory.write(0x3000, struct.pack("<QIHH", 0x100003, 3, 0, 0))
    ring.set_desc(0, 0x100000, 3, VRING_DESC_F_NEXT, 1)
    ring.set_desc(1, 0x3000, 16, VRING_DESC_F_INDIRECT | VRING_DESC_F_WRITE, 0)
    ring.set_avail(0, 0)
    ring.set_avail_idx(1)
    chain = queue.pop()
    assert chain is not None and chain.request == b"abcdef"
    ring.close()


def test_a_request_beyond_the_limit_is_a_fault(memory: GuestMemory) -> None:
    ring = Ring(memory, 8, 0x1000)
    queue = ServedQueue(memory, ring.vring(), 0, limit=100)
    ring.add([(0x100000, 100, False), (0x100000, 5000, True)])
    ring.add([(0x100000, 101, False)])
    ring.publish()
    assert queue.pop() is not None
    with pytest.raises(RingFault, match="too many bytes"):
        queue.pop()
    assert queue.base == 1
    ring.close()


@pytest.mark.parametrize("start", [0, 65534])
def test_event_idx_signals_when_the_asked_for_entry_is_passed(
    memory: GuestMemory, start: int
) -> None:
    ring, queue = make(memory, acked=EVENT_IDX, start=start)

    def use(n: int) -> bool:
        for _ in range(n):
            ring.add([(0x200000, 16, True)])
        ring.publish()
        for _ in range(n):
            push_next(queue)
        wanted = queue.flush()
        ring.take_used()
        return wanted

    assert use(1)  # the first one always
    ring._avail[2 + ring.size] = (start + 3) & 0xFFFF  # after the 4th entry
    assert [use(1), use(1), use(1), use(1)] == [False, False, True, False]
    ring._avail[2 + ring.size] = (start + 6) & 0xFFFF
    assert use(4)
    assert not queue.flush()  # nothing new
    ring.close()


@pytest.mark.parametrize("acked", [0, EVENT_IDX])
def test_enabling_notifications_sees_what_came_meanwhile(memory: GuestMemory, acked: int) -> None:
    ring, queue = make(memory, acked=acked)
    queue.enable_notify()
    queue.disable_notify()
    if acked:
        ring.add([(0x200000, 16, True)])
        assert ring.publish()  # avail_event is still at the first
        push_next(queue)
    for _ in range(3):
        ring.add([(0x200000, 16, True)])
        assert not ring.publish()
        push_next(queue)
    ring.add([(0x200000, 16, True)])
    assert not ring.publish()
    assert queue.enable_notify()
    push_next(queue)
    assert not queue.enable_notify()
    ring.add([(0x200000, 16, True)])
    assert ring.publish()
    ring.close()


def test_every_fault_has_words() -> None:
    texts = [ffi.string(lib.pv_fault_text(i)).decode() for i in range(lib.PV_FAULT_COUNT)]
    assert len(set(texts)) == lib.PV_FAULT_COUNT
    assert ffi.string(lib.pv_fault_text(lib.PV_FAULT_COUNT)) == b"unknown fault"


def test_starting_reads_the_used_index_and_writes_nothing(memory: GuestMemory) -> None:
    ring, _ = make(memory)
    ring._used[1] = 77
    before = memory.read(0x1000, ring.end - 0x1000)
    queue = ServedQueue(
        memory, Vring(0, 8, ring.desc, ring.avail, ring.used, 77, ring.kick_fd, ring.call_fd), 0
    )
    assert memory.read(0x1000, ring.end - 0x1000) == before
    assert (queue.c.used_idx, queue.base) == (77, 77)
    ring.close()
