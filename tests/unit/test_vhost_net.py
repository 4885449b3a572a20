"""The data path of vhost-net when the tap is deleted, with a device that has workers of the
emulated path: what the kernel's worker then reports, and where the rings go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from pyvmm.conformance.driver import NetDriver
from pyvmm.datapath.vhost_device import Vhost
from pyvmm.datapath.vhost_net import VhostNet
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

    def link(self) -> Link:
        return self._link

    def reopen(self) -> bool:
        if self.again:
            self._link.there = True
        return self.again


class Forgetful(FakeVhost):
    """A device that takes chains without returning them, as vhost_tx_batch does with frames that
    the tap refuses.
    """

    def forget(self, count: int) -> None:
        self.set_backend(1, -1)
        own = self._rings[1]
        own.position += count
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
