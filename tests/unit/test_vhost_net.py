"""The data path of vhost-net when the tap is deleted, with a device that has workers of the
emulated path: what the kernel's worker then reports, and where the rings go on.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from pyvmm.conformance.driver import NetDriver, Ring
from pyvmm.datapath.vhost_device import Vhost
from pyvmm.datapath.vhost_net import VhostNet, forgotten_chains
from pyvmm.fd import EventFd
from pyvmm.hostnet.rtnetlink import STATS, PacketCount, Reopener
from pyvmm.hostnet.rtnetlink import Link as KernelLink
from pyvmm.hostnet.tap import Tap
from pyvmm.memory import GuestMemory
from tests.driver import Events, bits, wait_for
from tests.vhost_fake import FakeVhost, LinkedCable, StillLink

ACKED = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF")


class Link(StillLink):
    """A link that a test takes away."""

    there = True

    def stats(self) -> dict[str, int]:
        return super().stats() if self.there else {}

    def gone(self) -> bool:
        self._event.drain()
        return not self.there

    def replaced(self) -> None:
        """``Tap.reopen`` closes the link of the old tap; who sleeps on it is woken by what happens
        to other links.
        """
        with open(os.dup(self._event.fileno()), "r+b", buffering=0) as again:
            self._event.close()
            again.write((1).to_bytes(8, "little"))

    def take_away(self, *, tell: bool = True) -> None:
        self.there = False
        if tell:
            self._event.signal()


class Counted(Link):
    """A link of a tap that has moved packets."""

    def __init__(self, packets: int) -> None:
        super().__init__()
        self.packets = packets

    def stats(self) -> dict[str, int]:
        return dict.fromkeys(STATS, self.packets) if self.there else {}


class Deleted(LinkedCable):
    """A tap that can be deleted and made again."""

    def __init__(self) -> None:
        super().__init__()
        self._link.close()
        self._link: Link = Link()
        self.again = False
        self.returning: Callable[[], None] = lambda: None  # just before ``reopen`` returns

    def link(self) -> Link:
        return self._link

    def reopen(self) -> bool:
        if self.again:
            old, self._link = self._link, Link()
            old.replaced()
            self.returning()
        return self.again


class Forgetful(FakeVhost):
    """A device that takes chains without returning them, as vhost_tx_batch does with frames that
    the tap refuses.
    """

    def forget(self, count: int) -> None:
        with self._mutex:
            self.set_backend(1, -1)
            own = self._rings[1]
            own.position += count
            assert own.err is not None
            own.err.signal()

    def refuse_all(self, ring: Ring, returned: list[int]) -> None:
        """Take all chains that are there, and return these, whose frames are too long for a
        batch.
        """
        self.set_backend(1, -1)
        own = self._rings[1]
        for place, head in enumerate(returned, ring.used_idx):
            at = ring.used + 4 + 8 * (place % ring.size)
            ring.memory.write(at, head.to_bytes(8, "little"))
        used = ring.used_idx + len(returned) & 0xFFFF
        ring.memory.write(ring.used + 2, used.to_bytes(2, "little"))
        own.position = ring.avail_idx
        assert own.err is not None
        own.err.signal()


class Rig:
    """A mock driver on the data path."""

    def __init__(self) -> None:
        self.memory, self.cable, self.device = GuestMemory(16 << 20), Deleted(), Forgetful()
        self.path = VhostNet(cast("Tap", self.cable), [cast("Vhost", self.device)])
        self.driver = NetDriver(self.memory, event_idx=False, indirect=False)
        self.events = Events()
        self.driver.fill()
        rings = [r.vring(None) for r in self.driver.rings]
        self.path.start(ACKED, self.memory, rings, self.events)

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.driver.queue(frame)
        self.driver.tx.publish()

    def sent(self, *frames: bytes) -> None:
        for frame in frames:
            assert self.cable.receive()[12:] == frame

    def all_returned(self) -> bool:
        self.driver.tx.take_used()
        return not self.driver.tx.chains

    def lose(self) -> None:
        """The tap is deleted, and refuses three frames before its loss is known."""
        self.cable.link().take_away(tell=False)
        self.device.forget(3)
        self.send(b"a" * 60, b"b" * 60, b"c" * 60)
        self.cable.link().take_away()
        assert wait_for(lambda: self.events.links == [False])

    def close(self) -> None:
        self.path.close()
        self.cable.close()
        self.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        made = Rig()
        stack.callback(made.close)
        yield made


def test_a_tap_comes_back(rig: Rig) -> None:
    """Neither a fault nor a chain less: what the deleted tap has refused is sent."""
    rig.send(b"1" * 60)
    rig.sent(b"1" * 60)
    rig.lose()
    rig.cable.again = True
    assert wait_for(lambda: rig.events.links == [False, True])
    rig.sent(b"a" * 60, b"b" * 60, b"c" * 60)
    rig.send(b"2" * 60)
    rig.sent(b"2" * 60)
    assert rig.events.faults == [] and rig.path.counters()["ring_faults"] == 0
    assert wait_for(rig.all_returned)


def test_another_data_path_sends_what_a_deleted_tap_has_refused(rig: Rig) -> None:
    rig.send(b"1" * 60)
    rig.sent(b"1" * 60)
    rig.lose()
    assert rig.path.stop()[1] == 1
    assert rig.events.faults == []


def test_transmission_that_was_stopped_stays_so(rig: Rig) -> None:
    """A tap that returns while another data path takes over."""
    rig.lose()
    rig.path.stop_transmit()
    rig.cable.again = True
    assert wait_for(lambda: rig.events.links == [False, True])
    assert rig.device._rings[0].path is not None and rig.device._rings[1].path is None
    assert rig.path.stop()[1] == 0


def test_an_error_while_there_is_a_tap(rig: Rig) -> None:
    """This is the ring's; and it is told once."""
    rig.device.forget(0)
    assert wait_for(lambda: rig.events.faults)
    rig.device._rings[1].fault(1, "")
    rig.path.stop()
    assert rig.events.faults == [(1, "queue 1: vhost-net calls the ring malformed")]


def test_an_index_that_the_guest_has_spoilt(rig: Rig) -> None:
    """The kernel's position counts if the used ring tells of more chains than the ring has."""
    rig.send(b"1" * 60)
    rig.sent(b"1" * 60)
    ring = rig.driver.tx
    rig.memory.write(ring.used + 2, (0x8000).to_bytes(2, "little"))
    assert rig.path.stop()[1] == 1


def test_a_tap_that_is_lost_is_taken_from_the_worker(rig: Rig) -> None:
    """Otherwise the worker goes on to drop long frames."""
    rig.cable.link().take_away()
    assert wait_for(lambda: rig.events.links == [False])
    assert [ring.path for ring in rig.device._rings] == [None, None]


def test_frames_that_a_deleted_tap_refuses_one_by_one(rig: Rig) -> None:
    """The worker returns long frames, and forgets the short ones before and behind them."""
    rig.send(b"1" * 60)
    rig.sent(b"1" * 60)
    assert wait_for(rig.all_returned)
    rig.cable.link().take_away(tell=False)
    rig.device.set_backend(1, -1)
    _, long, _ = (rig.driver.queue(frame) for frame in (b"a" * 60, b"b" * 9000, b"c" * 60))
    rig.driver.tx.publish()
    rig.device.refuse_all(rig.driver.tx, [long])
    rig.cable.link().take_away()
    rig.cable.again = True
    assert wait_for(lambda: rig.events.links == [False, True])
    rig.send(b"2" * 60)
    rig.sent(b"2" * 60)
    assert wait_for(rig.all_returned)
    assert rig.path.stop()[1] == 5
    assert rig.events.faults == []


def test_an_error_of_the_old_tap_while_the_new_one_is_there(rig: Rig) -> None:
    """The tap has been opened again, and the rings are not yet on it."""

    def refuse() -> None:
        err = rig.device._rings[1].err
        assert err is not None
        err.signal()
        poll = select.poll()
        poll.register(err, select.POLLIN)
        assert wait_for(lambda: not poll.poll(0))

    rig.lose()
    rig.cable.returning = refuse
    rig.cable.again = True
    assert wait_for(lambda: rig.events.links == [False, True])
    rig.sent(b"a" * 60, b"b" * 60, b"c" * 60)
    rig.path.stop()
    assert rig.events.faults == []


def test_a_start_without_a_tap(rig: Rig) -> None:
    """A reset, or another data path, while there is none."""
    rig.path.stop()
    rig.cable.link().take_away()
    rings = [rig.driver.rx.vring(0), rig.driver.tx.vring(0)]
    rig.path.start(ACKED, rig.memory, rings, rig.events)
    assert wait_for(lambda: rig.events.links == [False])
    rig.cable.again = True
    assert wait_for(lambda: rig.events.links == [False, True])
    rig.send(b"1" * 60)
    rig.sent(b"1" * 60)
    rig.cable.again = False
    rig.cable.link().take_away()
    assert wait_for(lambda: rig.events.links == [False, True, False])
    rig.path.stop()
    assert rig.events.faults == []


def test_a_stop_while_the_tap_returns() -> None:
    """Otherwise rings would get a tap that are nobody's, or another data path's."""
    with EventFd() as begun:
        told: list[str] = []

        def back() -> None:
            begun.signal()
            assert wait_for(reopener._quit.is_set)
            told.append("back")

        def failed(error: Exception) -> None:
            told.append(str(error))

        reopener = Reopener("tap0", lambda: True, back, failed)
        reopener.start()
        assert wait_for(begun.drain)
        reopener.stop()
        assert told == ["back"]


@pytest.mark.parametrize(
    ("begun", "taken", "returned", "forgotten"),
    [
        (0, [4, 5], [], [4, 5]),
        (0, [4, 5, 6], [4], [5, 6]),
        (0, [4, 5, 6], [5], [4, 6]),
        (0, [4, 5, 6], [6], [4, 5]),
        (0, [4, 4], [4], [4]),
        (0, [0, 0], [0], [0]),
        (0, [4, 5, 4, 6, 4], [4, 4, 6], [5, 4]),
        (0xFFFE, [1, 2, 3, 4], [1, 3], [2, 4]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 1], [0, 2]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7, 1, 2], [1, 2, 3, 4, 5, 6, 7, 1, 2], None),
    ],
)
def test_which_chains_are_forgotten(
    begun: int, taken: list[int], returned: list[int], forgotten: list[int] | None
) -> None:
    """In a ring of eight; None if the driver has overwritten what tells."""
    memory = GuestMemory(16 << 20)
    ring = Ring(memory, 8, 0x10000, start=begun)
    for place, head in enumerate(taken, begun):
        memory.write(ring.avail + 4 + 2 * (place % 8), head.to_bytes(2, "little"))
    for place, head in enumerate(returned, begun):
        memory.write(ring.used + 4 + 8 * (place % 8), head.to_bytes(8, "little"))
    base = begun + len(taken) & 0xFFFF
    memory.write(ring.avail + 2, base.to_bytes(2, "little"))
    memory.write(ring.used + 2, (begun + len(returned) & 0xFFFF).to_bytes(2, "little"))
    found = forgotten_chains(memory, ring.vring(), begun, base)
    assert (found and sorted(found)) == (forgotten and sorted(forgotten))
    memory.close()


def test_packets_of_a_tap_that_is_replaced() -> None:
    """Whoever asks between the return of the tap and that of the rings gets no mixture."""
    old, new = Counted(1000), Counted(0)
    links = [old]
    count = PacketCount(lambda: cast("KernelLink", links[-1]))
    count.start()
    old.packets = 1007
    assert count.read()["tx_packets"] == 7
    old.there = False
    links.append(new)
    assert count.read()["tx_packets"] == 7
    count.start()
    new.packets = 3
    count.stop()
    assert count.read()["tx_packets"] == 10
    old.close()
    new.close()
