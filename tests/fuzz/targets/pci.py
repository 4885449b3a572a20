"""PCI configuration space, BARs, virtio registers and the control queue of a network card, on each
data path: no guest can make it raise, and after a reset there is a working card.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvmm.spec import pci
from pyvmm.spec.platform import PCI_MMIO_BASE
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from tests.fuzz.data import Data
from tests.pci_guest import frame
from tests.unit.test_virtio_pci import VERSION_1, Rig, act

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.pci_guest import VirtioPciDriver

#: Where the regions of the BAR begin, and how much of each is worth while.
PLACES = ((0, 0x40), (0x1000, 8), (0x2000, 0x18), (0x3000, 0x10), (0x4000, 0x40), (0x5000, 0x10))
BAR_PLACES = (0, PCI_MMIO_BASE, PCI_MMIO_BASE + 0x100000, 0xFEE00000, 0xFFFFFFFF, 0xC0008000)
KINDS = (
    "bar",
    "read",
    "config",
    "window",
    "status",
    "msix",
    "packet",
    "up",
    "port",
    "legacy status",
    "legacy queue",
    "refuse",
    "move",
    "control",
    "pause",
)
REFUSED = ("", "ioeventfd", "irqfd", "set_msi_route")
ACTIONS = 40


def offset(d: Data) -> int:
    base, length = d.of(PLACES)
    return base + d.below(length) if not d.one_in(8) else d.number(2) & 0x7FFF


def control(rig: Rig, d: Data) -> None:
    """A guest that is up sends commands of any bytes. Each is answered, or ends in NEEDS_RESET."""
    rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0 + 4 * bar_of(rig), 4, PCI_MMIO_BASE)
    guest = rig.guest(control=True)
    try:
        for _ in range(1 + d.below(6)):
            kind, command, room = d.below(8), d.below(6), d.below(40)
            if guest.command(kind, command, d.some(80), room=room) is None:
                assert guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET
                return
    finally:
        guest.close()
        rig.guests.pop()


def bar_of(rig: Rig) -> int:
    return rig.driver().caps[1][0]


def step(rig: Rig, driver: VirtioPciDriver, d: Data, paused: bool) -> bool:
    """One action; returns whether the machine is paused then."""
    kind = d.of(KINDS)
    size = 1 << d.below(4)
    a: Any = 0
    if kind in ("bar", "read", "window"):
        a = offset(d)
        size = min(size, 4) if kind == "window" else size
    elif kind == "config":
        a = d.below(0x105)
    elif kind == "status":
        a = d.of((0, 1, 3, 11, 15, 15, 15, 128, 255))
    elif kind == "msix":
        a = d.below(4) << 14
    elif kind == "packet":
        a = 1 + d.below(1600)
    elif kind == "port":
        a = d.below(0x41)
    elif kind == "legacy status":
        a = d.of((0, 1, 3, 7, 7))
    elif kind == "legacy queue":
        a = d.below(4)
    elif kind == "refuse":
        a = d.of(REFUSED)
    if kind == "move":
        rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0 + 4 * d.below(6), 4, d.of(BAR_PLACES))
    elif kind == "pause":
        paused = not paused
        rig.device.set_paused(paused)
    elif kind not in ("up", "control"):
        act(rig, driver, (kind, a, size, d.value(size)))
    elif not paused and not rig.vm.refuse:  # a good driver waits for its card
        if kind == "control":
            control(rig, d)
        else:
            act(rig, driver, (kind, d.below(2), size, 0))
    return paused


def make(mode: str) -> Callable[[bytes], None]:
    """What runs one input. The cards live as long as the process."""
    rigs = [Rig(mode=mode, legacy=legacy) for legacy in (False, True)]
    drivers = []
    for rig in rigs:
        drivers.append(rig.driver())

    def one(data: bytes) -> None:
        d = Data(data)
        which = d.below(2)
        rig, driver = rigs[which], drivers[which]
        driver.enable(pci.PCI_COMMAND_IO)
        paused = False
        for _ in range(ACTIONS):
            if not d.left:
                break
            paused = step(rig, driver, d, paused)
        rig.vm.refuse = set()
        rig.device.set_paused(False)
        rig.board.pci.reset()
        assert not rig.vm.irqfds and not rig.vm.kicks
        while True:  # what the guest before has sent
            try:
                rig.cable.far.recv(1 << 17)
            except BlockingIOError:
                break
        assert not rig.device.tracebacks, rig.device.tracebacks
        guest = rig.guest(VERSION_1, fill=False)
        guest.net.send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)
        guest.close()
        rig.guests.pop()

    return one
