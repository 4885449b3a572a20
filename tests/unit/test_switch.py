"""Switching the data path under a mock driver, through the whole transport: what must survive, and
what may go wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import pytest

from pyvmm.backend.net import NetService
from pyvmm.backend.process import OwnConnector
from pyvmm.backend.server import Backend
from pyvmm.card.handover import HandOver
from pyvmm.card.nic import KEPT_SWITCHES, Nic
from pyvmm.card.report import SwitchReport
from pyvmm.card.thread import CardThread
from pyvmm.card.uplink import Route, Uplink
from pyvmm.datapath.base import DataPath, Frames, PathEvents, Vring
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.datapath.ringformat import PACKED, SPLIT
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.exits.ledger import Ledger
from pyvmm.hostnet.frames import rarp
from pyvmm.kvm.recorder import Recorder
from pyvmm.memory import GuestMemory
from pyvmm.netopt import Net
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_OK,
)
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.driver import Cable, bits, wait_for
from tests.pci_guest import Board, NetGuest, frame
from tests.ringforms import form, only, pytest_generate_tests

__all__ = ["form", "pytest_generate_tests"]

if TYPE_CHECKING:
    from pyvmm.hostnet.tap import Tap
    from pyvmm.kvm.vm import Vm

#: mode -> what to make in place of the next data paths of that mode, first come first served.
Script = dict[str, list[Callable[[Frames], DataPath]]]

MAC = bytes.fromhex("525400123456")
ALL = (1 << 64) - 1
MQ, EVENT_IDX = bits("VIRTIO_NET_F_MQ"), bits("VIRTIO_RING_F_EVENT_IDX")
OFFLOADS = bits("VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4")


class NoLink:
    """A link that counts nothing."""

    def stats(self) -> dict[str, int]:
        return {}


class Place(Cable):
    """A cable in place of the card's tap; it announces nothing and nothing waits in it."""

    created = True  # as a tap of pyvmm's own

    def link(self) -> NoLink:
        return NoLink()

    def accept_mtu(self, mtu: int) -> bool:
        return True

    def announce(self, mac: bytes) -> bool:
        return False

    def waiting(self) -> bool:
        return False

    def discard(self) -> int:
        return 0


class Bundle(Place):
    """Several cables in place of a multi-queue tap."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.cables: list[Cable] = [self, *(Cable() for _ in range(count - 1))]
        self.fds = [c.fds[0] for c in self.cables]
        self.queues: list[int] = []
        self.offloads: list[int] = []

    def features(self) -> int:
        return OFFLOADS

    def set_queues(self, count: int) -> None:
        self.queues.append(count)

    def set_offloads(self, acked: int) -> None:
        self.offloads.append(acked & OFFLOADS)

    def close(self) -> None:
        super().close()
        for cable in self.cables[1:]:
            cable.close()


class Wires(Uplink):
    """Cables in place of a tap, and data paths that a test provides.

    :ivar script: see ``Script``.
    """

    def __init__(self, tap: Place, script: Script | None = None) -> None:
        super().__init__(Net("vhost-user", socket="/nowhere"), None)
        self.tap: Tap = cast("Tap", tap)
        self.script = script or {}

    def open(self, net: Net, mac: bytes, wait: float = 10.0) -> Route:
        waiting = self.script.get(net.mode)
        if waiting:
            path = waiting.pop(0)(self.tap)
            self.register(path)
            return Route(path, net, self.tap, self.tap.announce)
        return super().open(net, mac, wait)

    @property
    def child_pid(self) -> int:
        """The process id of our own back-end, which runs."""
        assert self._backend is not None and self._backend.pid is not None
        return self._backend.pid


class Rig:
    """A card with ``pairs`` queue pairs as the machine makes it, and a guest that drives it.

    :param tap: the card's host side, owned from here on; None for ``cable``.
    :param fill, rx_size: see ``drive``.
    """

    cable: Bundle  # unless a tap was given

    def __init__(
        self,
        pairs: int = 1,
        features: int = ALL,
        *,
        drive: bool = True,
        mode: str = "emulated",
        tap: Place | None = None,
        script: Script | None = None,
        fill: bool = True,
        rx_size: int = 2048,
    ) -> None:
        self.board = Board(memory=32 << 20)
        if tap is None:
            tap = self.cable = Bundle(pairs)
        self.wires = Wires(tap, script)
        self.net = Net(mode, queues=pairs)
        route = self.wires.open(self.net, MAC)
        thread, self.lock = CardThread("net0"), self.board.lock
        self.device = NetDevice(
            "net0",
            self.board.memory,
            route.path,
            self.wires,
            MAC,
            pairs=pairs,
            without=self.net.excluded() & ~bits("VIRTIO_F_RING_PACKED"),
            jobs=thread,
            lock=self.lock,
        )
        pci = VirtioPci(
            cast("Vm", self.board.vm),
            self.board.bus,
            self.device,
            PCI_CLASS_NETWORK_ETHERNET,
            notify="ioeventfd",
        )
        self.board.add(pci)
        self.events: list[str] = []
        self.nic = Nic(
            0,
            self.net,
            self.device,
            pci,
            self.wires,
            route,
            thread,
            self.lock,
            lambda: Ledger.of([], self.board.bus),
            lambda event, **data: self.events.append(event),
        )
        self._guest: NetGuest | None = None
        if drive:
            self.drive(features, pairs, fill=fill, rx_size=rx_size)
        self.sent = 0

    @property
    def guest(self) -> NetGuest:
        """The guest that drives the card since the latest ``drive``."""
        assert self._guest is not None
        return self._guest

    def drive(
        self, features: int = ALL, pairs: int = 1, *, fill: bool = True, rx_size: int = 2048
    ) -> None:
        """Have a new guest drive the card.

        :param fill: whether it posts receive buffers at once. :param rx_size: bytes of each.
        """
        self._guest = NetGuest(
            self.board,
            1,
            features,
            pairs=pairs if features & MQ else 1,
            control=True,
            fill=fill,
            rx_size=rx_size,
        )
        for pair, net in enumerate(self.guest.nets):  # each its own memory, however much it sends
            net.end = 0x10000 + 0x200000 * (pair + 1)
        if pairs > 1:
            command = self.guest.command(
                VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", pairs)
            )
            assert command == VIRTIO_NET_OK

    def exchange(self, pair: int = 0, count: int = 20) -> None:
        """Frames both ways, each exactly once and in order."""
        net, cable = self.guest.nets[pair], self.cable.cables[pair]
        frames = [frame(self.sent + i) for i in range(count)]
        self.sent += count
        net.received.clear()
        net.send(*frames)
        assert [cable.receive()[12:] for _ in frames] == frames
        for f in frames:
            cable.far.send(bytes(12) + f)
        assert [p[12:] for p in net.wait_packets(count)] == frames

    @property
    def healthy(self) -> bool:
        return not self.device.faults and not self.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET

    def report(self) -> dict[str, Any]:
        """The card's report, whose values each have a type of their own."""
        return self.nic.report()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: Any) -> None:
        self.nic.close()
        if self._guest is not None:
            self._guest.close()
        self.board.close()
        self.wires.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as r:
        yield r


class Switching:
    """Switches in a thread of its own while the test plays the guest."""

    def __init__(self, rig: Rig, modes: list[str]) -> None:
        self.reports: list[SwitchReport] = []
        self.error: BaseException | None = None
        self._rig, self._modes = rig, modes
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            for mode in self._modes:
                self.reports.append(self._rig.nic.switch(mode))
        except BaseException as e:
            self.error = e

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def done(self) -> list[SwitchReport]:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.reports


def stream(rig: Rig, switching: Switching, pairs: int = 1) -> None:
    """Numbered frames both ways through all pairs for as long as the switches last; none lost,
    repeated or out of order.
    """
    out = [0] * pairs  # sent by the guest, arrived outside, and the other way
    arrived, back, taken = [0] * pairs, [0] * pairs, [0] * pairs
    while switching.running or any(arrived[k] < out[k] or taken[k] < back[k] for k in range(pairs)):
        for k, net in enumerate(rig.guest.nets):
            far = rig.cable.cables[k].far
            if switching.running and out[k] - arrived[k] < 100:
                net.send(*(frame(out[k] + i) for i in range(5)))
                out[k] += 5
            if switching.running and back[k] - taken[k] < 100:
                far.send(bytes(12) + frame(back[k]))
                back[k] += 1
            while arrived[k] < out[k]:
                try:
                    data = far.recv(4096)
                except BlockingIOError:
                    break
                assert data[12:] == frame(arrived[k])
                arrived[k] += 1
            for packet in net.poll():
                assert packet[12:] == frame(taken[k])
                taken[k] += 1
            net.received.clear()
    assert min(out) > 20 < min(back)


# --- what must survive ----------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "features"), [(1, ALL), (1, ALL & ~EVENT_IDX), (3, ALL)])
def test_under_traffic(pairs: int, features: int) -> None:
    """Round the modes, with the child process as another one, under traffic both ways."""
    modes = [
        "emulated",
        "vhost-user",
        "emulated",
        "emulated",
        "vhost-user",
        "emulated",
        "vhost-user",
    ]
    with Rig(pairs, features) as rig:
        switching = Switching(rig, modes)
        stream(rig, switching, pairs)
        reports = switching.done()
        assert [r.outcome for r in reports] == ["switched"] * len(modes), [
            r.reason for r in reports
        ]
        assert [r.mode for r in reports] == modes and rig.nic.mode == "vhost-user"
        for report in reports:
            assert set(report.gap_ns) == {"rx", "tx"} and min(report.gap_ns.values()) > 0
            assert sorted(report.pending) == report.rings == list(range(2 * pairs))
        assert rig.healthy and rig.device.resets == 0
        for pair in range(pairs):
            rig.exchange(pair)
        told = rig.report()
        assert told["mode"] == "vhost-user" and told["switch_count"] == len(modes)
        json.dumps(told)
        modes_told = told["modes"]
        assert modes_told["emulated"]["times"] == 5 and modes_told["vhost-user"]["times"] == 3
        # Counters of paths that are gone are there yet.
        assert (
            told["counters"]["tx_packets"] == modes_told["emulated"]["counters"]["tx_packets"] > 0
        )
        assert told["counters"]["connections"] == 3


def test_interrupts_masked_during_the_switch(rig: Rig) -> None:
    """What comes while its vector is masked is pending afterwards, and is delivered when that
    opens.
    """
    rig.guest.pci.mask(1, True)
    rig.cable.far.send(bytes(12) + frame(1))
    assert rig.guest.net.wait_packets(1)
    rig.nic.switch("vhost-user")
    assert rig.guest.pci.pending() >> 1 & 1
    rig.board.vm.delivered()
    rig.guest.pci.mask(1, False)
    assert (0xFEE00000, 0x31) in rig.board.vm.delivered(60)
    rig.exchange()


def test_vectors_changed_during_switches(rig: Rig) -> None:
    """The driver gives its receive virtqueue another vector all the time: each interrupt comes by
    the one in force, or by the one before.
    """
    switching = Switching(rig, ["vhost-user", "emulated"] * 6)
    pci, vector, count = rig.guest.pci, 1, 0
    pci.set("queue_select", 0)
    while switching.running:
        before, vector = vector, 1 + vector % 2
        pci.set("queue_msix_vector", vector)
        assert pci.get("queue_msix_vector") == vector
        rig.board.vm.delivered()
        rig.cable.far.send(bytes(12) + frame(count))
        count += 1
        assert len(rig.guest.net.wait_packets(count)) == count
        told = {0xFEE00000: {0x30 + before, 0x30 + vector}}
        assert all(data in told[address] for address, data in rig.board.vm.delivered(1))
    switching.done()
    assert count > 6 and rig.healthy
    rig.exchange()


def test_two_switches_at_once(rig: Rig) -> None:
    """One waits for the other; each is whole."""
    both = [Switching(rig, modes) for modes in (["vhost-user", "emulated"] * 5, ["emulated"] * 10)]
    while any(one.running for one in both):
        rig.exchange()
    reports = [report for one in both for report in one.done()]
    assert len(reports) == 20 and {report.outcome for report in reports} == {"switched"}
    assert rig.healthy
    rig.exchange()


def test_a_guest_that_has_not_driven_it() -> None:
    with Rig(drive=False) as rig:
        report = rig.nic.switch("vhost-user")
        assert report.outcome == "switched" and not report.gap_ns and not report.pending
        rig.drive()
        rig.exchange()
        assert rig.nic.switch("emulated").outcome == "switched"
        rig.exchange()


def test_a_trace_has_the_hand_over_and_its_steps(rig: Rig) -> None:
    recorder = Recorder()
    rig.nic.device.recorder = recorder.scope("net0")
    report = rig.nic.switch("vhost-user")
    steps = {
        (name, args.get("step")): (begin, end, args)
        for _, name, begin, end, args in recorder.steps()[0]
    }
    begin, end, told = steps["hand-over", None]
    assert (told["from"], told["to"], told["outcome"]) == ("emulated", "vhost-user", "switched")
    assert told["worker"] == "thread"
    assert {step.name for step in report.steps} == {s for n, s in steps if n == "hand-over step"}
    for name in ("park", "start vhost-user"):
        since, until, _ = steps["hand-over step", name]
        assert begin <= since < until <= end
    recorder.close()


def test_with_the_cable_pulled(rig: Rig) -> None:
    rig.nic.set_link(False)
    rig.guest.net.send(frame(7))
    assert rig.nic.switch("vhost-user").outcome == "switched"
    assert not rig.guest.link()
    rig.nic.set_link(True)
    assert rig.cable.receive()[12:] == frame(7)
    assert rig.guest.link()
    rig.exchange()


def test_what_the_driver_has_commanded() -> None:
    """Offloads, receive filter and queue pairs in use go on."""
    with Rig(3) as rig:
        command = rig.guest.command
        assert (
            command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", 2))
            == VIRTIO_NET_OK
        )
        assert command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == VIRTIO_NET_OK
        data = struct.pack("<Q", bits("VIRTIO_NET_F_GUEST_CSUM"))
        assert (
            command(VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, data)
            == VIRTIO_NET_OK
        )
        for mode in ("vhost-user", "emulated"):
            assert rig.nic.switch(mode).rings == [0, 1, 2, 3]
            assert rig.cable.offloads[-1] == bits("VIRTIO_NET_F_GUEST_CSUM")
            assert rig.cable.queues[-1] == 2 and "promisc" not in rig.cable.rx.flags
            rig.exchange(0)
            rig.exchange(1)
        assert (
            command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", 3))
            == VIRTIO_NET_OK
        )
        rig.exchange(2)


def test_offloads_of_a_back_end(tmp_path: Path) -> None:
    """CTRL_GUEST_OFFLOADS: a back-end learns of them only by a stop and a start."""
    port = Bundle(1)
    backend = Backend(NetService(port))
    server = threading.Thread(target=backend.run, args=(str(tmp_path / "s"),))
    server.start()
    try:
        with Rig() as rig:
            assert rig.nic.switch(f"vhost-user,socket={tmp_path / 's'}").outcome == "switched"
            assert backend.frontend and backend.frontend.acked & OFFLOADS == OFFLOADS
            csum = bits("VIRTIO_NET_F_GUEST_CSUM")
            set_offloads = VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
            for mask in (csum, OFFLOADS):
                assert rig.guest.command(*set_offloads, struct.pack("<Q", mask)) == VIRTIO_NET_OK
                assert (
                    backend.frontend and backend.frontend.acked & OFFLOADS == mask and rig.healthy
                )
            Switchboard(port).pump()  # takes the announcements
            rig.cable.cables = port.cables
            rig.exchange()
    finally:
        backend.stop()
        server.join()
        backend.close()


def test_a_frame_that_waits_for_buffers() -> None:
    """It has been read from the tap, so it must not be lost: the guest gets its time to add
    buffers, here enough for a test on a busy machine.
    """
    script: Script = {"emulated": [lambda tap: EmulatedNet(tap, hold_ms=10_000)]}
    with Rig(fill=False, rx_size=512, script=script) as rig:
        rig.guest.net.fill(1)
        long = bytes(range(250)) * 6
        rig.cable.far.send(bytes(12) + long)
        path = rig.device.datapath
        assert wait_for(lambda: path.counters()["fd_reads"] > 0)
        switching = Switching(rig, ["vhost-user"])
        assert wait_for(lambda: not rig.device.serving)  # parking
        rig.guest.net.fill()
        switching.done()
        assert [p[12:] for p in rig.guest.net.wait_packets(1)] == [long]
        assert rig.report()["counters"]["rx_drop_held"] == 0


def test_a_frame_that_waits_in_vain() -> None:
    with Rig(fill=False, rx_size=512) as rig:
        rig.guest.net.fill(1)
        rig.cable.far.send(bytes(12) + bytes(1500))
        path = rig.device.datapath
        assert wait_for(lambda: path.counters()["fd_reads"] > 0)
        assert rig.nic.switch("vhost-user").outcome == "switched"
        assert rig.report()["counters"]["rx_drop_held"] == 1
        rig.guest.net.fill()
        rig.exchange()


def test_resets_between_switches(rig: Rig) -> None:
    """A guest that resets the card all the time while it is switched all the time."""
    rounds = 0
    while rounds <= 3:  # a busy machine may have time for fewer while it switches twelve times
        switching = Switching(rig, ["emulated", "vhost-user"] * 6)
        while switching.running:
            rig.guest.close()
            rig.drive()
            rounds += 1
            rig.nic.set_link(rounds % 3 != 0)
        switching.done()
    rig.nic.set_link(True)
    assert rig.healthy
    rig.exchange()


# --- another outside ------------------------------------------------------------------------------


class Switchboard:
    """A network of two ports that learns where the guest is: where its latest frame came from.
    Counts what must not be lost.
    """

    def __init__(self, *cables: Cable) -> None:
        self.fars = [cable.far for cable in cables]
        self.place = 0
        self.sent = 0
        self.seen: set[int] = set()
        self.announcements = 0
        self._announced: set[int] = set()
        self._turn: int | None = None

    def turn(self, place: int) -> None:
        """For the thread that switches, once the guest has been announced there and its own frames
        are stopped: wait until the network sends to ``place``.
        """
        self._turn = place
        assert wait_for(lambda: self._turn is None, 60)

    def pump(self) -> None:
        turn = self._turn
        for place in range(len(self.fars)):
            self._take(place)
        if turn is not None:  # what came before has been taken, in whichever order
            assert turn in self._announced
            self._announced.clear()
            self.place, self._turn = turn, None

    def _take(self, place: int) -> None:
        while True:
            try:
                data = self.fars[place].recv(4096)[12:]
            except BlockingIOError:
                return
            self.place = place
            if data[12:14] == b"\x80\x35":
                self.announcements += 1
                self._announced.add(place)
                continue
            (number,) = struct.unpack_from("<I", data)
            assert data == frame(number) and number not in self.seen
            self.seen.add(number)

    def send(self) -> None:
        self.fars[self.place].send(bytes(12) + frame(self.sent))
        self.sent += 1


class Port(Place):
    """A cable that announces and is waited for, as a tap."""

    def announce(self, mac: bytes) -> bool:
        return os.write(self.fds[0].fileno(), bytes(12) + rarp(mac)) > 0

    def waiting(self) -> bool:
        poll = select.poll()
        poll.register(self.fds[0].fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def discard(self) -> int:
        count = 0
        try:
            while os.read(self.fds[0].fileno(), 64):
                count += 1
        except BlockingIOError:
            pass
        return count


def test_moving_to_another_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our tap and one of the back-end's, to and fro under traffic: each frame once, wherever the
    network sent it.
    """
    monkeypatch.setattr("pyvmm.card.handover.QUIET_S", 0.7)  # the network here is this thread
    monkeypatch.setattr("pyvmm.card.handover.UNSEEN_S", 0.7)
    monkeypatch.setattr("pyvmm.card.handover.MOVE_S", 5.0)
    ours, theirs = Port(), Port()
    path = str(tmp_path / "s")
    backend = Backend(NetService(theirs))
    server = threading.Thread(target=backend.run, args=(path,))
    server.start()
    board = Switchboard(ours, theirs)
    places: list[object] = [ours, None]  # as ``tap`` of a route has them
    drain = HandOver._drain

    def drain_once_the_network_knows(self: HandOver) -> None:
        """However slow this thread is, the quiet time begins when it has turned round."""
        board.turn(places.index(self._new.tap))
        drain(self)

    monkeypatch.setattr(HandOver, "_drain", drain_once_the_network_knows)
    try:
        go_to_and_fro(path, ours, board)
    finally:
        backend.stop()
        server.join()
        backend.close()


def go_to_and_fro(path: str, ours: Port, board: Switchboard) -> None:
    with Rig(tap=ours) as rig:
        target = f"vhost-user,socket={path}"
        switching = Switching(rig, [target, "emulated", target])
        net, sent, got = rig.guest.net, 0, list[int]()
        while switching.running or len(board.seen) < sent or len(got) < board.sent:
            board.pump()
            if switching.running and sent - len(board.seen) < 50:
                net.send(frame(sent))
                sent += 1
            if switching.running and board.sent - len(got) < 50:
                board.send()
            got += [struct.unpack_from("<I", p, 12)[0] for p in net.poll()]
            net.received.clear()
        reports = switching.done()
        assert [r.outcome for r in reports] == ["switched"] * 3
        assert sorted(got) == list(range(board.sent)) and board.seen == set(range(sent))
        assert min(sent, board.sent) > 100 and board.announcements >= 3 and board.place == 1
        # What comes where the card is not is not the card's.
        board.fars[0].send(bytes(12) + frame(999999))
        switching = Switching(rig, ["emulated"])
        while switching.running:
            board.pump()
        (report,) = switching.done()
        assert report.stale == 1 and not net.poll()


# --- features -------------------------------------------------------------------------------------


class Less(EmulatedNet):
    """A data path without EVENT_IDX."""

    def features(self) -> int:
        return super().features() & ~EVENT_IDX


def test_features_in_use_are_required(rig: Rig) -> None:
    rig.wires.script["vhost-net"] = [Less]
    with pytest.raises(UsageError, match="lacks features that the guest uses: EVENT_IDX"):
        rig.nic.switch("vhost-net")
    assert rig.nic.mode == "emulated" and rig.nic.switches[-1].outcome == "refused"
    assert "EVENT_IDX" in rig.report()["switches"][-1]["reason"]
    rig.exchange()


def test_features_not_in_use_are_not() -> None:
    with Rig(features=ALL & ~EVENT_IDX) as rig:
        rig.wires.script["vhost-net"] = [Less]
        assert rig.nic.switch("vhost-net").outcome == "switched"
        rig.exchange()
        # After a reset the driver is offered what there is now.
        rig.guest.pci.reset()
        assert not rig.guest.pci.offered() & EVENT_IDX
        rig.nic.switch("emulated")
        assert rig.guest.pci.offered() & EVENT_IDX


def test_offer_of_a_set() -> None:
    board = Board()
    device = NetDevice(
        "net0", board.memory, EmulatedNet(cable := Cable()), cable, MAC, offer=~EVENT_IDX
    )
    assert not device.offered() & EVENT_IDX and device.offered() & bits("VIRTIO_NET_F_MAC")
    device.close()
    board.close()


# --- what goes wrong ------------------------------------------------------------------------------


class Broken(EmulatedNet):
    """Does not start."""

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        raise HostError("no start today")


class Fickle(EmulatedNet):
    """Starts once."""

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        if self.times.began:
            raise HostError("not again")
        super().start(acked, memory, rings, events)


class Greedy(EmulatedNet):
    """Says of its first stop that it took a chain more from the transmit rings than it has
    returned.
    """

    greedy = True

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        bases = super().stop(finish=finish)
        if bases and self.greedy:
            self.greedy = False
            bases[1] += 1
        return bases


class Stuck(EmulatedNet):
    """Fails when it is stopped for a switch, after it has."""

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        bases = super().stop(finish=finish)
        if bases and finish:
            raise HostError("cannot stop")
        return bases


def test_the_new_one_does_not_start(rig: Rig) -> None:
    rig.wires.script["vhost-net"] = [Broken]
    switching = Switching(rig, ["vhost-net"])
    while switching.running:
        rig.exchange()
    (report,) = switching.done()
    assert (report.outcome, report.mode) == ("rolled-back", "emulated")
    assert "no start today" in report.reason and set(report.gap_ns) == {"rx", "tx"}
    assert rig.healthy
    rig.exchange()


def test_nor_does_the_old_one(rig: Rig) -> None:
    rig.wires.script = {"vhost-net": [Fickle, Broken]}
    assert rig.nic.switch("vhost-net").outcome == "switched"
    report = rig.nic.switch("vhost-net")
    assert (report.outcome, report.mode) == ("fallback", "emulated")
    assert report.reason == "no start today; not again" and rig.healthy
    rig.exchange()


def test_nothing_starts(rig: Rig) -> None:
    rig.wires.script = {"vhost-net": [Fickle, Broken], "emulated": [Broken]}
    rig.nic.switch("vhost-net")
    report = rig.nic.switch("vhost-net")
    assert report.outcome == "failed"
    assert rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET
    # A reset cures it as far as the path can.
    assert rig.nic.switch("emulated").outcome == "switched"
    rig.guest.close()
    rig.drive()
    rig.exchange()


def test_chains_still_in_the_old_one_s_hands(rig: Rig) -> None:
    """Transmits that were taken and not returned belong to nobody else."""
    rig.wires.script["vhost-net"] = [Greedy]
    rig.nic.switch("vhost-net")
    rig.exchange()
    report = rig.nic.switch("emulated")
    assert report.outcome == "rolled-back"
    assert re.search(r"queue 1 stopped at 21\b.* with 20\b.* returned", report.reason), report


@only(PACKED)
def test_the_old_one_of_packed_rings_does_not_let_go(rig: Rig) -> None:
    """Nothing says where the rings are: the driver has to reset the device, and then all is
    well.
    """
    rig.wires.script["vhost-net"] = [Stuck]
    rig.nic.switch("vhost-net")
    rig.exchange()
    report = rig.nic.switch("emulated")
    assert report.outcome == "failed" and "cannot stop" in report.reason
    assert rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET
    rig.guest.close()
    rig.drive()
    rig.exchange()


@only(SPLIT)
def test_the_old_one_does_not_let_go(rig: Rig) -> None:
    """Then the used indices say where the rings are; the old one goes on."""
    rig.wires.script["vhost-net"] = [Stuck]
    rig.nic.switch("vhost-net")
    rig.exchange()
    report = rig.nic.switch("emulated")
    assert report.outcome == "rolled-back" and "cannot stop" in report.reason
    rig.exchange()


@only(SPLIT)
@pytest.mark.parametrize("area", ["used", "avail"])
def test_a_guest_that_writes_the_indices(rig: Rig, area: str) -> None:
    """It gets what it deserves, and a reset cures it."""
    rig.exchange()
    for ring in rig.guest.net.rings:
        rig.board.memory.write(getattr(ring, area) + 2, b"\x34\x12")
    report = rig.nic.switch("vhost-user")
    assert report.outcome == ("rolled-back" if area == "used" else "switched")
    rig.nic.switch("emulated")
    rig.guest.close()
    rig.drive()
    rig.exchange()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_back_end_dies_or_falls_silent_in_the_hand_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    rig.nic.switch("vhost-user")
    rig.nic.switch("emulated")
    pid = rig.wires.child_pid
    monkeypatch.setattr("pyvmm.card.nic.HANDOVER_S", 0.3)
    run = HandOver.run

    def run_without(self: HandOver) -> Route:
        os.kill(pid, how)
        with contextlib.suppress(ChildProcessError):  # it has ended, and somebody has waited for it
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        monkeypatch.setattr(OwnConnector, "connect", _gone)
        return run(self)

    monkeypatch.setattr(HandOver, "run", run_without)
    switching = Switching(rig, ["vhost-user"])
    while switching.running:
        rig.guest.net.poll()
    (report,) = switching.done()
    assert (report.outcome, report.mode) == ("rolled-back", "emulated"), report
    assert max(report.gap_ns.values()) < 5e9 and rig.healthy
    rig.exchange()
    if how == signal.SIGSTOP:
        os.kill(pid, signal.SIGKILL)
    monkeypatch.undo()
    assert rig.nic.switch("vhost-user").outcome == "switched"  # with another child
    rig.exchange()


def _gone(connector: OwnConnector, seconds: Any, end: int) -> None:
    raise PyvmmError("gone")


def test_rescue_from_a_dead_back_end(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rings are parked; emulation takes over where the used indices are."""
    rig.nic.switch("vhost-user")
    rig.exchange()
    path = rig.device.datapath
    assert isinstance(path, VhostUserNet)
    monkeypatch.setattr(OwnConnector, "connect", _gone)
    os.kill(rig.wires.child_pid, signal.SIGKILL)
    assert wait_for(lambda: not path.connected)
    rig.guest.net.send(frame(1), frame(2))
    report = rig.nic.switch("emulated")
    assert report.outcome == "switched" and report.pending[1] == 2
    assert [rig.cable.receive()[12:] for _ in range(2)] == [frame(1), frame(2)]
    rig.exchange()


def test_why_our_own_back_end_ended_a_session(rig: Rig) -> None:
    """It is in the machine's report, beside what our side has seen of it."""
    rig.nic.switch("vhost-user")
    path = rig.device.datapath
    assert isinstance(path, VhostUserNet)
    assert path.converse(lambda session: session.tell(199))
    assert wait_for(lambda: path.counters()["connections"] == 2 and path.connected)
    assert rig.cable.receive()[12:] == rarp(MAC)  # the successor announces the card
    rig.exchange()
    assert rig.report()["vhost_user"]["problems"] == [
        "vhost-user peer has closed the connection",
        "our own back-end: session ended: request 199 is not supported",
    ]


def descriptors() -> dict[int, str]:
    """Those in use, without the one that lists them: number -> kind of file, without its number."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[int(path.name)] = re.sub(r"\d+", "", str(path.readlink()))
    listing = "/proc//fd"  # what iterdir() itself has open
    return {fd: kind for fd, kind in found.items() if kind != listing}


def test_no_descriptors_left(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused or rolled back, and nothing leaks."""
    rig.nic.switch("vhost-user")
    rig.nic.switch("emulated")  # the child lives on, so that it is not short of descriptors itself
    monkeypatch.setattr("pyvmm.card.nic.HANDOVER_S", 0.3)
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [fd for fd in range(1000) if fd not in before]
    outcomes = []
    for spare in range(20):
        if spare == 19:  # which is to succeed, however long it takes
            monkeypatch.setattr("pyvmm.card.nic.HANDOVER_S", 60.0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[spare], hard))
        try:
            outcomes.append(rig.nic.switch("vhost-user").outcome)
        except PyvmmError:
            outcomes.append("refused")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        rig.exchange()
        if rig.nic.mode == "vhost-user":
            rig.nic.switch("emulated")
    assert outcomes[0] == "refused" and rig.healthy
    monkeypatch.undo()
    for mode in ("vhost-user", "emulated"):  # with enough of them, and of time
        assert rig.nic.switch(mode).outcome == "switched"
    kinds = Counter(before.values())  # a file that was opened anew may have another number
    assert wait_for(lambda: Counter(descriptors().values()) == kinds), (before, descriptors())


def test_usage(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.card.nic.SWITCH_WAIT_S", 0.1)
    for text in ("none", "vdpa", "emulated,mtu=9000", "vhost-user,socket=/nobody/there"):
        with pytest.raises(PyvmmError):
            rig.nic.switch(text)
    assert rig.nic.switch("vhost-user").outcome == "switched"
    with pytest.raises(UsageError, match="is on that"):
        rig.nic.switch("vhost-user")
    rig.exchange()
    rig.nic.close()
    with pytest.raises(HostError):
        rig.nic.switch("emulated")


def test_reports_are_bounded(rig: Rig) -> None:
    for _ in range(KEPT_SWITCHES + 3):
        assert rig.nic.switch("emulated").outcome == "switched"
    assert len(rig.nic.switches) == KEPT_SWITCHES and rig.nic.switch_count == KEPT_SWITCHES + 3
    rig.exchange()
