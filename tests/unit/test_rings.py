"""Looking at rings from outside: what is there is shown, and nothing that a guest can write makes
the look fail or long.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.cli import rings
from pyvmm.memory import GuestMemory
from pyvmm.spec.virtio import VRING_DESC_F_INDIRECT as INDIRECT
from pyvmm.spec.virtio import VRING_DESC_F_NEXT as NEXT
from pyvmm.spec.virtio import VRING_DESC_F_WRITE as WRITE
from pyvmm.virtio.device import Queue
from pyvmm.virtio.rings import CHAIN_MAX, RingSnapshot, ring_snapshot

SIZE = 8
DESC, AVAIL, USED, TABLE = 0x1000, 0x2000, 0x3000, 0x4000
ACKED = 1 << 28 | 1 << 29


@pytest.fixture(scope="module")
def ram() -> Iterator[GuestMemory]:
    m = GuestMemory(1 << 20)
    yield m
    m.close()


class Guest:
    """A driver that writes what it likes."""

    def __init__(self, ram: GuestMemory, size: int = SIZE) -> None:
        ram.zero()
        self.ram, self.size = ram, size
        self.queue = Queue(0, size, None, None)  # type: ignore[arg-type]  # nobody kicks
        self.queue.desc, self.queue.avail, self.queue.used = DESC, AVAIL, USED
        self.queue.enabled = True

    def desc(
        self, n: int, addr: int, length: int, flags: int = 0, following: int = 0, table: int = DESC
    ) -> None:
        self.ram.write(table + 16 * n, struct.pack("<QIHH", addr, length, flags, following))

    def avail(self, idx: int, heads: list[int], flags: int = 0, used_event: int = 0) -> None:
        ring = bytearray(2 * self.size)
        for n, head in enumerate(heads):
            struct.pack_into("<H", ring, 2 * ((idx - len(heads) + n) % self.size), head)
        self.ram.write(
            AVAIL, struct.pack("<HH", flags, idx & 0xFFFF) + ring + struct.pack("<H", used_event)
        )

    def used(
        self,
        idx: int,
        entries: list[tuple[int, int]] | tuple[()] = (),
        avail_event: int = 0,
        flags: int = 0,
    ) -> None:
        ring = bytearray(8 * self.size)
        for n, entry in enumerate(entries):
            struct.pack_into("<II", ring, 8 * ((idx - len(entries) + n) % self.size), *entry)
        self.ram.write(
            USED, struct.pack("<HH", flags, idx & 0xFFFF) + ring + struct.pack("<H", avail_event)
        )

    def look(self, acked: int = ACKED, **kwargs: int) -> RingSnapshot:
        return RingSnapshot(self.ram, self.queue, acked, **kwargs)


def picture(look: RingSnapshot, role: str = "receive") -> str:
    """The drawing of one queue."""
    row = {
        "index": 0,
        "role": role,
        "enabled": True,
        "vector": 1,
        "desc-addr": 1,
        "avail-addr": 2,
        "used-addr": 3,
    }
    whole = {
        "name": "net0",
        "mode": "emulated",
        "active": True,
        "machine": "running",
        "queues": [{**row, **look.as_dict()}],
    }
    json.dumps(whole)
    return "\n".join(rings.draw(whole))


def test_a_queue_at_work(ram: GuestMemory) -> None:
    """Indices that have run over, a chain of two, one by an indirect table, and what has
    come back.
    """
    g = Guest(ram)
    g.desc(3, 0x8000, 12, NEXT, 5)
    g.desc(5, 0x9000, 1500, WRITE)
    g.desc(1, TABLE, 32, INDIRECT)
    g.desc(0, 0xA000, 10, NEXT, 1, table=TABLE)
    g.desc(1, 0xB000, 20, WRITE, table=TABLE)
    g.avail(1, [7, 3, 1], used_event=0xFFFE)
    g.used(0xFFFF, [(2, 60), (7, 0)], avail_event=1)
    look: dict[str, Any] = g.look(chains=2).as_dict()
    assert (look["outstanding"], look["device-owned"], look["problems"]) == (2, [1, 3, 5], [])
    first, second = look["available"]
    assert (first["at"], first["head"], second["at"], second["head"]) == (0xFFFF, 3, 0, 1)
    assert first["descriptors"] == [
        {"index": 3, "addr": 0x8000, "len": 12, "flags": ["next"], "next": 5},
        {"index": 5, "addr": 0x9000, "len": 1500, "flags": ["write"]},
    ]
    assert [(d["index"], d.get("indirect", False), d["len"]) for d in second["descriptors"]] == [
        (1, False, 32),
        (0, True, 10),
        (1, True, 20),
    ]
    assert look["returned"] == [
        {"at": 0xFFFD, "id": 2, "len": 60},
        {"at": 0xFFFE, "id": 7, "len": 0},
    ]
    assert look["avail"] == {"flags": 0, "idx": 1, "used-event": 0xFFFE}
    assert look["used"] == {"flags": 0, "idx": 0xFFFF, "avail-event": 1}
    text = picture(g.look(chains=2))
    assert "0  .D.D.D.." in text and "2 with the device" in text
    assert "kick at 1 (avail_event)" in text and "interrupt at 65534 (passed) (used_event)" in text
    assert "[65535] head 3: 3 read 0x8000+12, 5 write 0x9000+1500" in text
    assert "head 7, 0 bytes written" in text


def test_flags_count_without_event_indices(ram: GuestMemory) -> None:
    g = Guest(ram)
    g.avail(0, [], flags=1)
    g.used(0, flags=1)
    assert "the device asks for no kicks, the driver for no interrupts" in picture(g.look(acked=0))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda g: g.avail(0, [8]), "descriptor 8 in a table of 8"),
        (lambda g: g.desc(0, 0, 1, NEXT, 0), "a loop"),
        (lambda g: g.desc(0, 0, 1, NEXT, 99), "descriptor 99 in a table of 8"),
        (lambda g: g.desc(0, TABLE, 15, INDIRECT), "an indirect table of 15 bytes"),
        (lambda g: g.desc(0, TABLE, 0, INDIRECT), "an indirect table of 0 bytes"),
        (lambda g: g.desc(0, 1 << 60, 16, INDIRECT), "outside RAM"),
        (lambda g: (g.desc(0, TABLE, 32, INDIRECT), g.desc(0, 0, 1, NEXT, 0, TABLE)), "a loop"),
        (
            lambda g: (g.desc(0, TABLE, 32, INDIRECT), g.desc(0, 0, 1, NEXT, 2, TABLE)),
            "descriptor 2 in an indirect",
        ),
    ],
)
def test_malformed_chains_are_shown_as_such(
    ram: GuestMemory, write: Callable[..., Any], problem: str
) -> None:
    g = Guest(ram)
    g.avail(1, [0])
    write(g)
    if g.look().outstanding != 1:
        g.ram.write(AVAIL + 2, b"\x01\x00")
        g.ram.write(AVAIL + 4, b"\x08\x00")
    look = g.look()
    assert problem in look.available[0]["problem"]
    assert problem in picture(look)


def test_indirect_that_was_not_negotiated(ram: GuestMemory) -> None:
    g = Guest(ram)
    g.desc(0, TABLE, 16, INDIRECT)
    g.avail(1, [0])
    assert "not negotiated" in g.look(acked=0).available[0]["problem"]


def test_more_outstanding_than_there_is_room(ram: GuestMemory) -> None:
    g = Guest(ram)
    g.avail(1000, [0])
    look = g.look()
    assert look.outstanding == 1000 and len(look.available) == SIZE
    assert "! 1000 chains are outstanding in a queue of 8" in picture(look)


def test_the_largest_queue_of_one_huge_chain_is_bounded(ram: GuestMemory) -> None:
    """32768 heads that all lead through the same 32768 descriptors."""
    size = 32768
    with_room = GuestMemory(4 << 20)
    try:
        g = Guest(with_room, size)
        g.queue.desc, g.queue.avail, g.queue.used = 0x100000, 0x200000, 0x300000
        table = b"".join(struct.pack("<QIHH", 0, 1, NEXT, (i + 1) % size) for i in range(size))
        with_room.write(0x100000, table)
        heads = b"".join(struct.pack("<H", i) for i in range(size))
        with_room.write(0x200000, struct.pack("<HH", 0, size) + heads)
        look = g.look(chains=256)
        assert len(look.available) == 256 and len(look.device_owned) == size
        assert all(len(c["descriptors"]) <= CHAIN_MAX for c in look.available)
        assert "31744 more" in picture(look)
    finally:
        with_room.close()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_memory_can_be_looked_at(ram: GuestMemory, data: Any) -> None:
    g = Guest(ram)
    words = st.sampled_from(
        [0, 1, 2, 3, 4, 5, 7, 8, 16, 32, TABLE, DESC, 0xFFFF, 1 << 20]
    ) | st.integers(0, 0xFFFF)
    for area, length in (
        (DESC, 16 * SIZE),
        (TABLE, 64),
        (AVAIL, 6 + 2 * SIZE),
        (USED, 6 + 8 * SIZE),
    ):
        raw = b"".join(struct.pack("<I", data.draw(words)) for _ in range(length // 4 + 1))
        ram.write(area, raw[:length])
    picture(
        g.look(acked=data.draw(st.sampled_from([0, ACKED])), chains=data.draw(st.integers(0, 16)))
    )


def test_rings_outside_ram(ram: GuestMemory) -> None:
    g = Guest(ram)
    g.queue.used = 1 << 40
    with pytest.raises(IndexError):
        g.look()


def test_what_the_device_has_taken(ram: GuestMemory) -> None:
    """A position is of a moment after the snapshot, and is cut to what the snapshot knows of."""
    g = Guest(ram)
    g.avail(5, [0, 1, 2, 3])
    g.used(2, [(9, 0)])

    def taken(position: int | None) -> object:
        q = ring_snapshot(ram, g.queue, ACKED, position=lambda: position)
        return q["taken"], q["in-flight"]

    assert taken(None) == (None, None)
    assert taken(2) == (2, 0) and taken(4) == (4, 2) and taken(5) == (5, 3)
    assert taken(9) == (5, 3), "it has gone on since"
    g.used(65535)
    g.avail(2, [0, 1, 2])
    assert taken(1) == (1, 2), "indices run round"


@pytest.mark.parametrize(
    ("position", "taken"),
    [
        (0x8002, ({"next": 2, "wrap": 1}, 0)),
        (0x8004, ({"next": 4, "wrap": 1}, 2)),
        (0x0000, ({"next": 0, "wrap": 0}, 6)),
        (0x0003, ({"next": 1, "wrap": 0}, 7)),
    ],
)
def test_what_the_device_has_taken_of_a_packed_ring(
    ram: GuestMemory, position: int, taken: tuple[dict[str, int], int]
) -> None:
    """Descriptors 0 and 1 have been returned, and 0 is available again, in the next lap."""
    g = Guest(ram)
    available, used = 1 << 7, 1 << 7 | 1 << 15
    for n in range(2, SIZE):
        g.desc(n, 0x8000, 60, n, available)
    g.desc(1, 0x8000, 60, 1, used)
    g.desc(0, 0x8000, 60, 0, 1 << 15)
    q = ring_snapshot(ram, g.queue, ACKED | 1 << 34, position=lambda: position)
    assert q["device"] == {"next": 2, "wrap": 1, "event": q["device"]["event"]}  # type: ignore[index]
    assert (q["taken"], q["in-flight"]) == taken
