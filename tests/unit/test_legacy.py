"""The legacy interface of a transitional card (virtio 1.2, 4.1.4.10), register by register. Drivers
that live on it are in tests/host and tests/boot.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

import pytest

from pyvmm.bus import PIO
from pyvmm.card.thread import CardThread
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.spec import pci
from pyvmm.spec import virtio_pci as vp
from pyvmm.spec.virtio import VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1
from pyvmm.spec.virtio_net import VIRTIO_NET_HDR_SIZE
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.driver import Cable, bits, wait_for
from tests.pci_guest import ACK, DRIVER, DRIVER_OK, Board, NetGuest, VirtioPciDriver, frame

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

MAC = bytes.fromhex("525400123456")
SIZE = 16
#: Where the tests put the two rings of SIZE entries: two pages each.
RX, TX, BUFFERS = 0x10000, 0x20000, 0x30000
UP = ACK | DRIVER | DRIVER_OK


class Rig:
    """A board with a transitional card in slot 1, whose rings a legacy driver has at RX and TX."""

    def __init__(self) -> None:
        self.board = Board()
        self.cable = Cable()
        self.thread = CardThread("net0")
        self.device = NetDevice(
            "net0",
            self.board.memory,
            EmulatedNet(self.cable),
            self.cable,
            MAC,
            queue_size=SIZE,
            jobs=self.thread,
            lock=self.board.lock,
        )
        self.card = self.board.add(
            VirtioPci(
                cast("Vm", self.board.vm),
                self.board.bus,
                self.device,
                PCI_CLASS_NETWORK_ETHERNET,
                transitional=vp.VIRTIO_TRANS_ID_NET,
            )
        )
        self.modern = VirtioPciDriver(self.board, 1)
        self.modern.enable(pci.PCI_COMMAND_IO)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: object) -> None:
        self.thread.end()
        self.board.close()
        self.cable.close()

    def out(self, register: int, size: int, value: int) -> None:
        self.board.write(PIO, self.modern.ports + register, size, value)

    def get(self, register: int, size: int) -> int:
        return self.board.read(PIO, self.modern.ports + register, size)

    @property
    def status(self) -> int:
        return self.get(vp.VIRTIO_PCI_STATUS, 1)

    def queue(self, index: int, address: int) -> None:
        self.out(vp.VIRTIO_PCI_QUEUE_SEL, 2, index)
        self.out(vp.VIRTIO_PCI_QUEUE_PFN, 4, address >> 12)

    def up(self, features: int = 0) -> None:
        self.out(vp.VIRTIO_PCI_STATUS, 1, ACK | DRIVER)
        self.out(vp.VIRTIO_PCI_GUEST_FEATURES, 4, features)
        self.board.memory.write(RX, bytes(0x20000))
        self.queue(0, RX)
        self.queue(1, TX)
        self.out(vp.VIRTIO_PCI_STATUS, 1, UP)

    def send(self, data: bytes, n: int) -> None:
        """Queue ``data`` as the nth packet, and kick."""
        memory, slot = self.board.memory, n % SIZE
        memory.write(BUFFERS + 4096 * slot, data)
        descriptor = struct.pack("<QIHH", BUFFERS + 4096 * slot, len(data), 0, 0)
        memory.write(TX + 16 * slot, descriptor)
        memory.write(TX + 16 * SIZE + 4 + 2 * slot, struct.pack("<H", slot))
        memory.write(TX + 16 * SIZE + 2, struct.pack("<H", n + 1))
        self.out(vp.VIRTIO_PCI_QUEUE_NOTIFY, 2, 1)

    def sent(self, n: int) -> bool:
        """Whether n packets have come back in the used ring, which begins a page of its own."""
        return self.board.memory.read(TX + 4096 + 2, 2) == struct.pack("<H", n)

    def reset(self) -> None:
        """As legacy drivers do, who do not wait; a machine holds their vCPU instead."""
        self.out(vp.VIRTIO_PCI_STATUS, 1, 0)
        assert wait_for(lambda: self.status == 0)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as r:
        yield r


def test_what_identifies_a_transitional_card(rig: Rig) -> None:
    board = rig.board
    assert board.config_read(1, 0) == 0x10001AF4
    assert board.config_read(1, 8) & 0xFF == 0  # the revision: legacy drivers want 0
    assert board.config_read(1, pci.PCI_SUBSYSTEM_ID, 2) == 1  # their id of a network card
    assert board.config_read(1, pci.PCI_BASE_ADDRESS_0) & pci.PCI_BASE_ADDRESS_SPACE_IO
    assert {bar for bar, _, _ in rig.modern.caps.values()} == {1}


def test_the_offer_is_that_of_the_modern_interface_below_bit_32(rig: Rig) -> None:
    modern = rig.modern.offered()
    legacy = rig.get(vp.VIRTIO_PCI_HOST_FEATURES, 4)
    assert modern >> VIRTIO_F_VERSION_1 & 1 and not modern >> VIRTIO_F_ANY_LAYOUT & 1
    assert legacy == modern & 0xFFFF_FFFF | 1 << VIRTIO_F_ANY_LAYOUT
    rig.up(legacy | 1 << 30)
    assert rig.get(vp.VIRTIO_PCI_GUEST_FEATURES, 4) == legacy
    assert "features that were not offered: 0x40000000 (2.2.1)" in rig.device.mistakes[0]
    rig.out(vp.VIRTIO_PCI_GUEST_FEATURES, 4, 0)
    assert rig.get(vp.VIRTIO_PCI_GUEST_FEATURES, 4) == legacy
    assert "after DRIVER_OK" in rig.device.mistakes[1]


@pytest.mark.parametrize("features", [0, bits("VIRTIO_NET_F_MRG_RXBUF")])
def test_header_and_layout(rig: Rig, features: int) -> None:
    """The used ring begins a page of its own, and the header has 10 bytes unless MRG_RXBUF is
    negotiated.
    """
    rig.up(features)
    header = bytes(12 if features else VIRTIO_NET_HDR_SIZE)
    for n in range(3 * SIZE):
        rig.send(header + frame(n), n)
        assert rig.cable.receive() == header + frame(n)
        assert wait_for(partial(rig.sent, n + 1))
    assert rig.cable.header == len(header)
    assert not rig.device.faults and not rig.device.mistakes


def test_kicks_follow_the_interface_in_use(rig: Rig) -> None:
    """The kernel answers at the port while a legacy driver runs, and at the memory BAR while a
    modern one does.
    """
    rig.up()
    at = rig.modern.ports + vp.VIRTIO_PCI_QUEUE_NOTIFY
    assert set(rig.board.vm.kicks) == {(at, 0), (at, 1), (at, 2)}
    rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, 0xD000)
    assert set(rig.board.vm.kicks) == {(0xD010, n) for n in range(3)}
    rig.send(bytes(10) + frame(1), 0)
    assert rig.cable.receive()[10:] == frame(1)
    rig.reset()
    assert not rig.board.vm.kicks
    guest = NetGuest(rig.board, 1, 1 << VIRTIO_F_VERSION_1)
    assert all(isinstance(at, int) for at in rig.board.vm.kicks) and rig.board.vm.kicks
    guest.net.send(frame(2))
    assert rig.cable.receive()[12:] == frame(2) and rig.cable.header == 12
    guest.close()


def test_vectors_precede_the_configuration_while_msix_is_enabled(rig: Rig) -> None:
    assert bytes(rig.get(20 + i, 1) for i in range(6)) == MAC
    rig.modern.use_msix()
    assert bytes(rig.get(24 + i, 1) for i in range(6)) == MAC
    assert rig.get(vp.VIRTIO_MSI_CONFIG_VECTOR, 2) == vp.VIRTIO_MSI_NO_VECTOR
    rig.out(vp.VIRTIO_MSI_CONFIG_VECTOR, 2, 1)
    rig.out(vp.VIRTIO_PCI_QUEUE_SEL, 2, 1)
    for wanted, got in ((2, 2), (99, vp.VIRTIO_MSI_NO_VECTOR)):
        rig.out(vp.VIRTIO_MSI_QUEUE_VECTOR, 2, wanted)
        assert rig.get(vp.VIRTIO_MSI_QUEUE_VECTOR, 2) == got
    assert rig.get(vp.VIRTIO_MSI_CONFIG_VECTOR, 2) == 1
    rig.modern.msix_flags(0)
    assert bytes(rig.get(20 + i, 1) for i in range(6)) == MAC


def test_the_address_can_be_written(rig: Rig) -> None:
    other = bytes.fromhex("0200cafe0001")
    rig.up()
    for i, byte in enumerate(other):
        rig.out(20 + i, 1, byte)
    assert bytes(rig.get(20 + i, 1) for i in range(6)) == other
    assert wait_for(lambda: rig.device.rx.mac == other and rig.cable.rx.mac == other)
    rig.out(25, 2, 0)  # across the end of the field
    assert "device configuration mac+5 = 0x0, which is read-only" in rig.device.mistakes[0]
    rig.reset()
    assert bytes(rig.get(20 + i, 1) for i in range(6)) == MAC
    rig.up(bits("VIRTIO_NET_F_CTRL_VQ", "VIRTIO_NET_F_CTRL_MAC_ADDR"))
    rig.out(20, 1, 0)  # there is a command for it
    assert rig.get(20, 1) == MAC[0] and rig.device.refused == 2


def test_one_interface_until_a_reset(rig: Rig) -> None:
    """Writes through the other interface are refused and told, reads are harmless."""
    rig.up()
    before = rig.device.refused
    rig.modern.set("device_status", ACK | DRIVER)
    rig.modern.accept(rig.modern.offered())
    rig.modern.set("queue_enable", 1)
    assert rig.device.refused > before and rig.status == UP
    assert "while the driver uses the legacy interface (4.1.4.10)" in rig.device.mistakes[-1]
    rig.modern.reset()  # but any driver may reset
    assert rig.modern.negotiate(1 << VIRTIO_F_VERSION_1)
    before = rig.device.refused
    rig.out(vp.VIRTIO_PCI_STATUS, 1, UP)
    rig.out(vp.VIRTIO_PCI_GUEST_FEATURES, 4, 0)
    rig.queue(0, RX)
    rig.out(20, 1, 0)
    assert rig.device.refused == before + 4 and not rig.device.active
    assert rig.get(vp.VIRTIO_PCI_QUEUE_PFN, 4) == 0
    assert "while the driver uses the modern interface (4.1.4.10)" in rig.device.mistakes[-1]


def test_a_queue_is_let_go_of_and_comes_back(rig: Rig) -> None:
    rig.up()
    rig.send(bytes(10) + frame(0), 0)
    assert rig.cable.receive()[10:] == frame(0)
    rig.queue(1, 0)
    rig.out(vp.VIRTIO_PCI_QUEUE_SEL, 2, 1)
    assert wait_for(lambda: rig.get(vp.VIRTIO_PCI_QUEUE_PFN, 4) == 0)
    rig.board.memory.write(TX, b"\xff" * 0x2000)  # the memory is the driver's
    assert not rig.device.faults
    rig.board.memory.write(TX, bytes(0x2000))
    rig.queue(1, TX)
    rig.send(bytes(10) + frame(1), 0)
    assert rig.cable.receive()[10:] == frame(1)


def test_the_vcpu_that_resets_waits_for_the_reset(rig: Rig) -> None:
    """Legacy drivers do not: they read the status once, and free their memory."""
    rig.up()
    blocked, go = threading.Event(), threading.Event()

    def job() -> None:
        blocked.set()
        go.wait(60)

    rig.thread.post(job)
    assert blocked.wait(60)
    seen: list[threading.Event | None] = []
    dispatch = rig.board.bus.dispatch
    rig.board.bus.dispatch = lambda c: seen.append(dispatch(c))  # type: ignore[method-assign]
    rig.out(vp.VIRTIO_PCI_STATUS, 1, 0)
    held = seen[0]
    assert held is not None and not held.is_set() and rig.status == UP
    go.set()
    assert held.wait(60) and rig.status == 0
    rig.out(vp.VIRTIO_PCI_QUEUE_SEL, 2, 0)
    assert seen[-1] is None


def test_a_path_that_lacks_features_is_refused_to_legacy_drivers_too(rig: Rig) -> None:
    """ANY_LAYOUT counts for nothing, and before DRIVER_OK the driver may still choose."""

    class Less(EmulatedNet):
        def features(self) -> int:
            return 0

    less = Less(rig.cable)
    try:
        assert rig.device.lacks(less) == 0
        rig.out(vp.VIRTIO_PCI_GUEST_FEATURES, 4, 1 << VIRTIO_F_ANY_LAYOUT)
        assert rig.device.lacks(less)
        rig.reset()
        rig.up(1 << VIRTIO_F_ANY_LAYOUT)
        assert rig.device.lacks(less) == 0
        assert rig.device.in_force == 0  # to vhost-net, the bit means another header
        rig.reset()
        rig.up(bits("VIRTIO_NET_F_MRG_RXBUF"))
        assert rig.device.lacks(less) == bits("VIRTIO_NET_F_MRG_RXBUF")
    finally:
        less.close()
