"""A reset of one virtqueue while the device goes on (VIRTIO_F_RING_RESET; virtio 1.2, 2.6.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from pyvmm.conformance.driver import PackedRing, Ring
from pyvmm.datapath.ringformat import PACKED
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_CTRL_NOTF_COAL,
    VIRTIO_NET_CTRL_NOTF_COAL_TX_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_OK,
)
from pyvmm.spec.virtio_net import VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET as VQ_SET
from pyvmm.spec.virtio_pci import VIRTIO_MSI_NO_VECTOR
from tests.driver import bits, wait_for
from tests.pci_guest import frame
from tests.ringforms import Form, form, pytest_generate_tests
from tests.unit.test_control import Rig as ControlRig
from tests.unit.test_switch import Rig

if TYPE_CHECKING:
    from tests.pci_guest import NetGuest

__all__ = ["form", "pytest_generate_tests"]

ALL = (1 << 64) - 1


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def reset(guest: NetGuest, index: int) -> None:
    """As Linux does it (vp_modern_set_queue_reset)."""
    pci = guest.pci
    pci.set("queue_select", index)
    pci.set("queue_reset", 1)
    assert wait_for(lambda: not pci.get("queue_reset"))
    assert pci.get("queue_enable") == 0
    assert pci.get("queue_msix_vector") == VIRTIO_MSI_NO_VECTOR
    assert pci.get("queue_desc") == 0


def renew(guest: NetGuest, index: int, size: int, base: int) -> Ring:
    """Set the virtqueue up anew, elsewhere and with another size."""
    kind = PackedRing if Form.now is PACKED else Ring
    old = (*guest.net.rings, guest.control)[index]
    assert old is not None
    ring = kind(guest.board.memory, size, base, index=index, event_idx=old.event_idx)
    ring.kick = partial(guest.pci.notify, index)  # type: ignore[method-assign]
    guest.pci.set_ring(ring, vector=1 + index)
    old.close()
    return ring


def test_a_smaller_transmit_ring(rig: Rig) -> None:
    """Receiving goes on meanwhile; then both do, with an interrupt for each."""
    rig.exchange()
    reset(rig.guest, 1)
    rig.cable.far.send(bytes(12) + frame(7))
    assert [p[12:] for p in rig.guest.net.wait_packets(21)][-1] == frame(7)
    rig.guest.net.tx = renew(rig.guest, 1, 32, 0x800000)
    for _ in range(3):
        rig.exchange()
    assert rig.healthy
    assert wait_for(lambda: rig.device.serving == [0, 1])  # noted after the start of the path


def test_a_larger_receive_ring(rig: Rig) -> None:
    """What arrives while there is none waits in the host; transmitting goes on."""
    rig.exchange()
    net = rig.guest.net
    reset(rig.guest, 0)
    rig.cable.far.send(bytes(12) + frame(7))
    net.send(frame(8))
    assert rig.cable.receive()[12:] == frame(8)
    assert wait_for(lambda: rig.device.serving == [1])
    net.rx = renew(rig.guest, 0, 128, 0x800000)
    net._rx_free += net._rx_busy.values()
    net._rx_busy.clear()
    net.received.clear()
    net.fill()
    assert [p[12:] for p in net.wait_packets(1)] == [frame(7)]
    rig.exchange()
    assert rig.healthy


def test_coalescing_survives() -> None:
    """5.1.6.5.7: a virtqueue that is enabled again has what was set for its direction."""
    with ControlRig() as rig:
        for kind, data in (
            (VIRTIO_NET_CTRL_NOTF_COAL_TX_SET, struct.pack("<II", 2, 30)),
            (VQ_SET, struct.pack("<H2xII", 1, 2, 40)),
        ):
            assert rig.command(VIRTIO_NET_CTRL_NOTF_COAL, kind, data) == VIRTIO_NET_OK
        assert rig.device.coalescing(1) == (2, 40)
        reset(rig.guest, 1)
        assert rig.device.coalescing(1) is None
        rig.guest.net.tx = renew(rig.guest, 1, 32, 0x800000)
        assert wait_for(lambda: rig.device.coalescing(1) == (2, 30))
        assert rig.device.coalescing(0) == (0, 0)


def test_the_control_queue(rig: Rig) -> None:
    rig.exchange()
    reset(rig.guest, 2)
    rig.guest.control = renew(rig.guest, 2, 16, 0x800000)
    for on in (b"\0", b"\1"):
        answer = rig.guest.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, on)
        assert answer == VIRTIO_NET_OK
    rig.exchange()
    assert rig.healthy


def test_switches_with_a_ring_less(rig: Rig) -> None:
    """A data path takes over what there is."""
    rig.exchange()
    reset(rig.guest, 0)
    for mode in ("vhost-user", "emulated"):
        assert rig.nic.switch(mode).outcome == "switched"
        rig.guest.net.send(frame(3))
        assert rig.cable.receive()[12:] == frame(3)
    assert rig.healthy


def test_a_ring_that_is_wrong_the_second_time(rig: Rig) -> None:
    reset(rig.guest, 1)
    ring = renew(rig.guest, 1, 16, 0x800000)
    reset(rig.guest, 1)
    ring.desc = 1 << 40
    rig.guest.pci.set_ring(ring)
    assert wait_for(lambda: not rig.healthy)
    assert "is outside RAM" in rig.device.faults[0]
    ring.close()


def test_the_whole_device_can_be_reset_meanwhile(rig: Rig) -> None:
    pci = rig.guest.pci
    pci.set("queue_select", 1)
    pci.set("queue_reset", 1)
    pci.set("device_status", 0)
    assert wait_for(lambda: pci.status == 0)
    assert pci.get("queue_reset") == 0
    rig.guest.close()
    rig.drive()
    rig.exchange()


def test_what_is_refused(rig: Rig) -> None:
    pci = rig.guest.pci
    before = rig.device.refused

    def refused(index: int, name: str, value: int) -> str:
        pci.set("queue_select", index)
        count = rig.device.refused
        pci.set(name, value)
        assert rig.device.refused == count + 1
        return rig.device.mistakes[-1]

    assert "which is not 1" in refused(1, "queue_reset", 2)
    assert "does not exist" in refused(9, "queue_reset", 1)
    assert "which is enabled" in refused(1, "queue_size", 16)
    reset(rig.guest, 1)
    assert "which is not enabled" in refused(1, "queue_reset", 1)
    assert "only a reset disables" in refused(1, "queue_enable", 0)
    rig.guest.close()
    rig.drive(ALL & ~bits("VIRTIO_F_RING_RESET"))
    pci = rig.guest.pci
    assert "without VIRTIO_F_RING_RESET" in refused(1, "queue_reset", 1)
    assert "after DRIVER_OK" in refused(1, "queue_size", 16)
    assert rig.device.refused == before + 7
    rig.exchange()
