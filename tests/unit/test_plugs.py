"""Cards that come and go: what the guest, a reset and the machine's end may do to it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from pyvmm.bus import PIO
from pyvmm.card.nic import Nic
from pyvmm.card.thread import CardThread
from pyvmm.devices.hotplug import PciHotplug
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.exits.ledger import Ledger
from pyvmm.kvm.vm import Vm
from pyvmm.macs import MacAddresses
from pyvmm.netopt import Net
from pyvmm.plugs import Plugs
from pyvmm.spec.platform import MAX_CARDS, PCI_HOTPLUG_EJECT, PORT_PCI_HOTPLUG
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.descriptors import open_fds
from tests.driver import wait_for
from tests.pci_guest import Board, NetGuest, frame
from tests.unit.test_card_thread import Meanwhile, Slow
from tests.unit.test_switch import ALL, Bundle, Wires

EJECT = PORT_PCI_HOTPLUG + PCI_HOTPLUG_EJECT


class Held(Wires):
    """A host side whose back-end does not answer. :ivar waiting: somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(Bundle(1))
        self.waiting, self._cut_now = threading.Event(), threading.Event()

    def open(self, *args: Any) -> Any:
        self.waiting.set()
        assert self._cut_now.wait(60)
        raise HostError("the conversation was cut")

    def cut(self) -> None:
        super().cut()
        self._cut_now.set()


class Box:
    """A board whose cards have cables. :ivar events: what was told, with its data."""

    def __init__(self) -> None:
        self.board = Board(memory=32 << 20)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.removed: list[Nic] = []
        self.cables: dict[str, Bundle] = {}
        self.held: Held | None = None
        self.plugs = Plugs(
            self.board.pci,
            self.board.lock,
            self.make,
            MacAddresses(""),
            removed=self.removed.append,
            emit=lambda event, **data: self.events.append((event, data)),
        )
        self.plugs.hotplug = PciHotplug(self.board.bus, lambda: None, self.plugs.ejected)

    def make(self, index: int, net: Net, mac: bytes) -> tuple[Nic, ExitStack]:
        """As the machine makes it."""
        name, bundle = f"net{index}", Bundle(1)
        with ExitStack() as undo:
            wires = self.held or Wires(bundle, {"emulated": [Slow]})
            undo.callback(wires.close)
            self.plugs.making(wires)
            route = wires.open(net, mac)
            thread = CardThread(name)
            device = NetDevice(
                name,
                self.board.memory,
                route.path,
                wires,
                mac,
                without=net.excluded(),
                jobs=thread,
                lock=self.board.lock,
            )
            pci = VirtioPci(
                cast("Vm", self.board.vm), self.board.bus, device, PCI_CLASS_NETWORK_ETHERNET
            )
            undo.pop_all()
        ledger = lambda: Ledger.of([], self.board.bus)  # noqa: E731
        nic = Nic(
            index,
            net,
            device,
            pci,
            wires,
            route,
            thread,
            self.board.lock,
            ledger,
            lambda *_: None,
        )
        release = ExitStack()
        for close in (wires.close, pci.close, nic.close):
            release.callback(close)
        self.cables[name] = bundle
        return nic, release

    def path(self, nic: Nic) -> Slow:
        assert isinstance(nic.device.datapath, Slow)
        return nic.device.datapath

    def drive(self, nic: Nic) -> NetGuest:
        """A guest that uses the card."""
        guest = NetGuest(self.board, 1 + nic.index, ALL, control=True)
        guest.nets[0].send(frame(1))
        assert self.cables[nic.name].cables[0].receive()[12:] == frame(1)
        return guest


@pytest.fixture
def box() -> Iterator[Box]:
    b = Box()
    with b.board:
        yield b
        b.plugs.cut()
        b.plugs.close()


@pytest.mark.parametrize("how", ["guest", "reset"])
def test_a_card_in_use_is_pulled_out(box: Box, how: str) -> None:
    """The guest ejects it without having stopped its driver, or is reset; the data path takes its
    time. Nobody waits for that but the removal, and then nothing is left.
    """
    box.plugs.begin([Net()])
    assert box.plugs.state(box.plugs.nets[0]) == "present"
    before = open_fds(), set(threading.enumerate()), len(box.board.bus._regions)
    for number in range(3):
        nic = box.plugs.add(Net())
        assert (nic.name, box.plugs.state(nic)) == ("net1", "added")
        box.drive(nic)
        path = box.path(nic)
        box.board.write(PIO, EJECT, 4, 0xFFFFFFFF)  # nobody has asked for that
        assert len(box.plugs.nets) == 2 and box.board.config_read(2, 0) != 0xFFFFFFFF
        path.gate.clear()
        removal = box.plugs.ask(nic)
        assert box.plugs.ask(nic) is removal and box.plugs.state(nic) == "removing"
        if how == "guest":
            box.board.write(PIO, EJECT, 4, 0xFFFFFFFF)
        else:
            with box.board.lock:
                box.plugs.hotplug.reset()
        assert box.board.config_read(2, 0) == 0xFFFFFFFF
        assert path.waiting.wait(30) and not removal.done.is_set()
        assert not box.board.vm.kicks
        box.plugs.ask(nic)  # it is on its way
        path.gate.set()
        assert removal.done.wait(30) and removal.gone and removal.error is None
        assert not box.board.vm.irqfds and not box.board.vm.gsis
        with pytest.raises(UsageError, match="has been removed"):
            box.plugs.ask(nic)
        # As by whoever has looked at the cards before.
        for late in (nic.reset, nic.stop, lambda n=nic: n.set_paused(True)):
            late()
        assert wait_for(lambda n=number: len(box.events) == n + 1)  # type: ignore[misc]
        if not number:
            before = before[0], before[1], len(box.board.bus._regions)
    assert box.events[0] == (
        "DEVICE_DELETED",
        {"device": "net1", "path": "/machine/peripheral/net1"},
    )
    assert len(box.removed) == 3 and [nic.name for nic in box.plugs.nets] == ["net0"]
    assert wait_for(lambda: not set(threading.enumerate()) - before[1])
    left = {what for _, what in open_fds() - before[0]}
    assert left <= {"anon_inode:[eventfd]"}, left  # those of the mock driver
    assert len(box.board.bus._regions) == before[2]


def test_names(box: Box) -> None:
    box.plugs.begin([Net(), Net(mac="52:54:00:00:00:01")])
    for name, problem in (
        ("net0", "Duplicate device ID 'net0'"),
        ("net31", "use net0 to net30"),
        ("net01", "use net0 to net30"),
        ("", "use net0 to net30"),
    ):
        with pytest.raises(UsageError, match=problem):
            box.plugs.add(Net(), name)
    with pytest.raises(UsageError, match="cards 1 and 2"):
        box.plugs.add(Net(mac="52:54:00:00:00:01"))
    with pytest.raises(UsageError, match="no card"):
        box.plugs.add(Net("none"))
    with pytest.raises(UsageError, match=r"has no hot plug.*leave out transport=mmio"):
        box.plugs.add(Net(transport="mmio"))
    assert box.plugs.add(Net(), "net30").slot == 31
    assert [nic.name for nic in box.plugs.nets] == ["net0", "net1", "net30"]
    while len(box.plugs.nets) < MAX_CARDS:
        box.plugs.add(Net())
    assert len({nic.device.mac for nic in box.plugs.nets}) == MAX_CARDS
    with pytest.raises(UsageError, match="31 cards"):
        box.plugs.add(Net())


def test_the_end_waits_for_no_guest_and_no_back_end(box: Box) -> None:
    """A removal that the guest does not react to, and a card whose back-end says nothing."""
    box.plugs.begin([Net()])
    removal = box.plugs.ask(box.plugs.nets[0])
    box.held = Held()
    adding = Meanwhile(lambda: box.plugs.add(Net()))
    assert box.held.waiting.wait(30)
    box.plugs.cut()
    box.plugs.close()
    with pytest.raises(HostError, match="was cut"):
        adding.done()
    assert removal.done.is_set() and not removal.gone and not box.events
    for late in (lambda: box.plugs.add(Net()), lambda: box.plugs.ask(removal.nic)):
        with pytest.raises(PyvmmError, match="the machine is ending"):
            late()
