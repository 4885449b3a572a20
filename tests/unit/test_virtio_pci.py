"""The virtio-pci transport with a whole network card behind it: a mock driver finds it, negotiates,
and moves packets.

Transport, device and worker are the real ones; KVM's book-keeping is played by FakeVm (tests/host
has the same with KVM).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.backend.net import NetService
from pyvmm.backend.server import Backend
from pyvmm.bus import MMIO, PIO
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.datapath.vhost_net import VhostNet
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.datapath.vhost_vdpa import VhostVdpa
from pyvmm.errors import HostError
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.tap import Tap
from pyvmm.spec import pci, virtio_pci
from pyvmm.spec.platform import PCI_MMIO_BASE
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_NEEDS_RESET,
)
from pyvmm.spec.virtio_pci import VIRTIO_MSI_NO_VECTOR
from pyvmm.vhostuser.connect import Connector
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import BAR_SIZE, NOTIFY, VirtioPci
from tests.descriptors import thread_names
from tests.driver import Cable, Ring, bits, wait_for
from tests.pci_guest import (
    ACK,
    COMMON,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    Board,
    NetGuest,
    VirtioPciDriver,
    frame,
)
from tests.vhost_fake import LinkedCable, fake_vhost_net, fake_vhost_vdpa

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

MAC = bytes.fromhex("525400123456")
VERSION_1 = bits("VIRTIO_F_VERSION_1")
EVENT_IDX = bits("VIRTIO_RING_F_EVENT_IDX")
ALL = (1 << 64) - 1
PLAIN = VERSION_1 | bits("VIRTIO_NET_F_MRG_RXBUF")
NEEDS_RESET = VIRTIO_CONFIG_S_NEEDS_RESET
RUNNING = ACK | DRIVER | FEATURES_OK | DRIVER_OK
FEE = 0xFEE00000


@contextmanager
def vhost_user(cable: LinkedCable) -> Iterator[VhostUserNet]:
    """The data path to a back-end of ours, in a thread, on ``cable``."""
    with TemporaryDirectory() as directory, Backend(NetService(cable)) as backend:
        path = f"{directory}/s"
        thread = threading.Thread(target=backend.run, args=(path,))
        thread.start()
        try:
            net = VhostUserNet(Connector(path))
            net.connect(60)
            yield net  # the device closes it
        finally:
            backend.stop()
            thread.join(60)


class Rig:
    """A board with one network card in slot 1.

    :param port: the tap that the card is on, owned from here on; None for ``cable``.
    """

    cable: Cable  # unless a port was given

    def __init__(
        self,
        *,
        notify: str = "ioeventfd",
        mtu: int | None = None,
        port: Tap | None = None,
        vm: Any = None,
        queue_size: int = 256,
        mode: str = "emulated",
        legacy: bool = False,
        pages: bool = False,
    ) -> None:
        self.board = Board(vm)
        self.stack = ExitStack()
        if port is None:
            self.cable = cable = LinkedCable()
            self.port: Tap | Cable = cable
        else:
            self.port = port
        self.path: EmulatedNet | VhostNet | VhostUserNet | VhostVdpa
        if mode == "emulated":
            self.path = EmulatedNet(self.port)
        elif mode == "vhost-net":
            self.path, self.vhost = fake_vhost_net(cable)
        elif mode == "vhost-vdpa":
            self.path = fake_vhost_vdpa(cable, self.board.memory)
        else:
            self.path = self.stack.enter_context(vhost_user(cable))
        self.device = NetDevice(
            "net0", self.board.memory, self.path, self.port, MAC, mtu=mtu, queue_size=queue_size
        )
        self.card = self.board.add(
            VirtioPci(
                cast("Vm", self.board.vm),
                self.board.bus,
                self.device,
                PCI_CLASS_NETWORK_ETHERNET,
                notify=notify,
                notify_pages=pages,
                transitional=virtio_pci.VIRTIO_TRANS_ID_NET if legacy else None,
            )
        )
        self.vm = self.board.vm
        self.guests: list[NetGuest] = []

    def driver(self) -> VirtioPciDriver:
        d = VirtioPciDriver(self.board, 1)
        d.enable()
        return d

    def guest(self, features: int = ALL, **kw: bool) -> NetGuest:
        g = NetGuest(self.board, 1, features, **kw)
        self.guests.append(g)
        return g

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: Any) -> None:
        for g in self.guests:
            g.close()
        self.board.close()
        self.stack.close()
        self.port.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as r:
        yield r


def echo(rig: Rig, guest: NetGuest, n: int = 50, start: int = 0) -> None:
    """n frames out and n in; all arrive in order."""
    out = [frame(start + i, 60 + i % 1000) for i in range(n)]
    guest.net.received.clear()
    guest.net.send(*out)
    assert [rig.cable.receive()[12:] for _ in out] == out
    for f in out:
        rig.cable.far.send(bytes(12) + f)
    assert [p[12:] for p in guest.net.wait_packets(n)] == out


# --- discovery (4.1.2, 4.1.4) ---------------------------------------------------------------------


def test_the_device_is_what_the_specification_says(rig: Rig) -> None:
    board = rig.board
    assert board.config_read(1, 0) == 0x10411AF4
    assert board.config_read(1, 8) >> 8 == 0x020000 and board.config_read(1, 8) & 0xFF >= 1
    assert board.config_read(1, pci.PCI_SUBSYSTEM_ID, 2) >= 0x40
    assert board.bar_size(1, 0) == BAR_SIZE
    d = rig.driver()
    assert set(d.caps) == {
        virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG,
        virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG,
        virtio_pci.VIRTIO_PCI_CAP_ISR_CFG,
        virtio_pci.VIRTIO_PCI_CAP_DEVICE_CFG,
    }
    assert d.window and d.msix_cap and d.vectors == 4
    spans = sorted((offset, offset + length) for bar, offset, length in d.caps.values() if bar == 0)
    assert len(spans) == 4 and all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] <= BAR_SIZE
    _bar, offset, length = d.caps[virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG]
    assert offset % 2 == 0 and length >= d.notify_multiplier + 2  # 4.1.4.4.1
    assert d.caps[virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG][1] % 4 == 0
    for cap, at in board.capabilities(1):
        if cap == pci.PCI_CAP_ID_VNDR:
            kind = board.config_read(1, at + 3, 1)
            extra = (
                4
                if kind in (virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG, virtio_pci.VIRTIO_PCI_CAP_PCI_CFG)
                else 0
            )
            assert board.config_read(1, at + 2, 1) == 16 + extra


def test_the_registers_after_reset(rig: Rig) -> None:
    d = rig.driver()
    assert d.status == 0
    assert d.get("num_queues") == 3
    assert d.get("config_msix_vector") == VIRTIO_MSI_NO_VECTOR
    for q, size in ((0, 256), (1, 256), (2, 64)):
        d.set("queue_select", q)
        assert [
            d.get(f"queue_{n}") for n in ("size", "msix_vector", "enable", "notify_off", "desc")
        ] == [
            size,
            VIRTIO_MSI_NO_VECTOR,
            0,
            q,
            0,
        ]
    for q in (3, 0xFFFF):
        d.set("queue_select", q)
        assert d.get("queue_select") == q and d.get("queue_size") == 0
        d.set("queue_desc", 0x1000)
        d.set("queue_msix_vector", 0)
        assert d.get("queue_desc") == 0 and d.get("queue_msix_vector") == VIRTIO_MSI_NO_VECTOR


def test_features_in_windows_of_32_bits(rig: Rig) -> None:
    d = rig.driver()
    offered = d.offered()
    assert offered == rig.device.offered() and offered & VERSION_1
    for select in (2, 3, 0xFFFFFFFF):
        d.set("device_feature_select", select)
        d.set("driver_feature_select", select)
        assert d.get("device_feature") == d.get("driver_feature") == 0
    assert d.negotiate(offered)
    for select, want in ((0, offered & 0xFFFFFFFF), (1, offered >> 32)):
        d.set("driver_feature_select", select)
        assert d.get("driver_feature") == want


def test_negotiation_fails_where_it_must(rig: Rig) -> None:
    d = rig.driver()
    assert not d.negotiate(d.offered() & ~VERSION_1)
    assert not d.negotiate(d.offered() | 1 << 36)  # ORDER_PLATFORM
    assert not d.negotiate(d.offered() | 1 << 127)
    d.set("driver_feature_select", 5)
    assert d.negotiate(VERSION_1)


def test_the_configuration_space_and_its_generation() -> None:
    with Rig(mtu=9000) as rig:
        d = rig.driver()
        assert bytes(d.config(i, 1) for i in range(6)) == MAC
        assert d.config(0, 4) | d.config(4, 2) << 32 == int.from_bytes(MAC, "little")
        assert d.config(6, 2) == 1 and d.config(10, 2) == 9000
        at = d.place(virtio_pci.VIRTIO_PCI_CAP_DEVICE_CFG)
        assert rig.board.read(MMIO, at + 0xFFC, 4) == 0  # far beyond
        assert d.config(12, 4) == 10_000 and d.config(16, 1) == 1  # full duplex
        assert rig.board.read(MMIO, at + 15, 4) == 1 << 8  # beyond the end
        rig.board.write(MMIO, at, 1, 0xAA)
        assert d.config(0, 1) == MAC[0] and rig.device.refused == 1
        before = d.get("config_generation")
        rig.device.set_link(False)
        assert d.config(6, 2) == 0 and d.get("config_generation") != before
        before = d.get("config_generation")
        rig.device.set_link(False)  # no change
        assert d.get("config_generation") == before


def test_fields_take_their_own_width_only(rig: Rig) -> None:
    """4.1.3.1: the driver uses it, so anything else is a mistake or an attack."""
    d = rig.driver()
    d.set("device_status", ACK)
    base = d.place(virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG)
    for offset, width in COMMON.values():
        for at in range(offset, offset + width):
            for size in (1, 2, 4, 8):
                if at != offset or size not in (width, min(width, 4)):
                    rig.board.read(MMIO, base + at, size)
                    if size < 4 or width < 4:
                        rig.board.write(MMIO, base + at, size, -1)
    assert d.status == ACK
    assert d.get("queue_select") == 0
    assert rig.device.refused > 20 and len(rig.device.mistakes) == 16
    told = "driver wrote device_feature_select = 0xff by 8 bits, not 32 (4.1.3.1)"
    assert rig.device.mistakes[0] == told


def test_64_bit_fields_may_be_written_at_once(rig: Rig) -> None:
    d = rig.driver()
    assert d.negotiate(VERSION_1)
    at = d.place(virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG, COMMON["queue_desc"][0])
    rig.board.write(MMIO, at, 8, 0x123456789ABCDEF0)
    assert rig.board.read(MMIO, at, 8) == 0x123456789ABCDEF0
    rig.board.write(MMIO, at + 4, 4, 0x55)
    assert d.get("queue_desc") == 0x559ABCDEF0


# --- traffic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
@pytest.mark.parametrize("msix", [True, False])
@pytest.mark.parametrize("features", [ALL, PLAIN, VERSION_1])
def test_packets_both_ways(notify: str, msix: bool, features: int) -> None:
    with Rig(notify=notify) as rig:
        g = rig.guest(features, msix=msix)
        assert bool(rig.vm.kicks) == (notify == "ioeventfd")
        for n in range(3):
            echo(rig, g, start=100 * n)
        # Interrupts: receive at least, by message or by line.
        if msix:
            messages = rig.vm.delivered(60)
            assert (FEE, 0x31) in messages and set(messages) <= {(FEE, 0x31), (FEE, 0x32)}
            assert g.pci.isr() == 0
        else:
            assert wait_for(lambda: g.pci.isr() & virtio_pci.VIRTIO_PCI_ISR_QUEUE)
            assert not rig.vm.irqfds
        assert rig.path.counters()["tx_packets"] == 150
        g.pci.set("device_status", 0)
        assert not rig.vm.irqfds and not rig.vm.kicks


def test_kicks_reach_the_worker_by_every_way(rig: Rig) -> None:
    """ioeventfd, the notify region (while the ioeventfd is elsewhere), and the window in
    configuration space.
    """
    g = rig.guest(VERSION_1)
    at = g.pci.place(virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG, g.pci.notify_multiplier)
    assert set(rig.vm.kicks) == {at - g.pci.notify_multiplier, at, at + g.pci.notify_multiplier}

    def by_region() -> None:
        rig.board.access(MMIO, at, 2, b"\1\0")

    def by_window() -> None:
        window_write(rig.board, g.pci, at - g.pci.bar, 2, 1)

    for n, kick in enumerate((lambda: rig.board.write(MMIO, at, 2, 1), by_region, by_window)):
        g.net.tx.kick = kick  # type: ignore[method-assign]
        g.net.send(frame(n))
        assert rig.cable.receive()[12:] == frame(n)
    assert rig.board.exits  # the window


def test_before_driver_ok_nothing_moves_and_kicks_are_kept(rig: Rig) -> None:
    d = rig.driver()
    assert d.negotiate(VERSION_1)
    ring = Ring(rig.board.memory, 256, 0x10000, index=1)
    d.set_ring(ring)
    rig.board.memory.write(0x80000, bytes(12) + frame(1))
    ring.add([(0x80000, 72, False)])
    ring.publish(kick=False)
    d.notify(1)
    assert not rig.vm.kicks
    time.sleep(0.02)
    assert ring.used_idx == 0
    d.driver_ok()
    assert rig.cable.receive()[12:] == frame(1)
    ring.close()


def test_link_loss_is_told_by_a_configuration_interrupt(rig: Rig) -> None:
    g = rig.guest()
    assert g.link()
    generation = g.pci.get("config_generation")
    rig.cable.far.close()
    assert wait_for(lambda: not g.link())
    assert (FEE, 0x30) in rig.vm.delivered(60)
    assert g.pci.get("config_generation") != generation
    assert g.pci.isr() == virtio_pci.VIRTIO_PCI_ISR_CONFIG  # with MSI-X, too (4.1.4.5.1)
    assert not g.pci.status & NEEDS_RESET


def test_a_real_tap_answers() -> None:
    with Namespace(address="192.168.91.1/24") as ns, Rig(port=ns.tap) as rig:
        g = rig.guest(ALL & ~bits("VIRTIO_NET_F_HASH_REPORT"))  # a header of 12 bytes
        arp = (
            b"\xff" * 6
            + MAC
            + bytes.fromhex("08060001080006040001")
            + MAC
            + bytes([192, 168, 91, 2])
        )
        g.net.send(arp + bytes(6) + bytes([192, 168, 91, 1]))
        assert wait_for(
            lambda: any(p[24:26] == b"\x08\x06" for p in g.net.poll() or g.net.received)
        )
        assert (FEE, 0x31) in rig.vm.delivered(60)
        assert g.features & bits("VIRTIO_NET_F_CSUM")


# --- reset ----------------------------------------------------------------------------------------


def has_received(guest: NetGuest, count: int) -> bool:
    """Whether the device has returned more than ``count`` receive buffers."""
    return guest.net.rx.used_idx > count


@pytest.mark.parametrize("msix", [True, False])
def test_reset_under_traffic_then_not_a_byte_of_guest_memory_changes(rig: Rig, msix: bool) -> None:
    """FAULTS 7. The peer floods all the time."""
    stop = threading.Event()

    def flood() -> None:
        n = 0
        while not stop.is_set():
            try:
                rig.cable.far.send(bytes(12) + frame(n, 1000))
                n += 1
            except BlockingIOError:
                time.sleep(0.0005)

    t = threading.Thread(target=flood)
    t.start()
    try:
        for round_ in range(20):
            g = rig.guest(ALL if round_ % 2 else PLAIN, msix=msix)
            g.net.send(*[frame(i, 500) for i in range(round_ * 5)])
            assert wait_for(partial(has_received, g, round_ % 7))
            g.pci.set("device_status", 0)
            assert g.pci.status == 0
            before = rig.board.memory.read(0, rig.board.memory.size)
            time.sleep(0.01)
            assert rig.board.memory.read(0, rig.board.memory.size) == before
            assert rig.vm.delivered() is not None and rig.vm.delivered() == []
            assert g.pci.isr() == 0
            assert threading.active_count() < 10
            g.net.close()
            rig.guests.remove(g)
            while True:
                try:
                    rig.cable.far.recv(1 << 17)
                except BlockingIOError:
                    break
    finally:
        stop.set()
        t.join()
    assert rig.device.resets == 20 and not rig.device.faults


def test_reset_takes_everything_back(rig: Rig) -> None:
    g = rig.guest()
    echo(rig, g)
    g.pci.set("queue_select", 1)
    g.pci.set("driver_feature_select", 1)
    g.pci.set("device_status", 0)
    d = g.pci
    assert [
        d.get(n) for n in ("queue_select", "driver_feature_select", "device_feature_select")
    ] == [0, 0, 0]
    assert d.get("config_msix_vector") == d.get("queue_msix_vector") == VIRTIO_MSI_NO_VECTOR
    assert d.get("queue_size") == 256 and d.get("queue_desc") == d.get("queue_enable") == 0
    assert rig.card.msix.enabled  # belongs to PCI
    assert rig.board.read(MMIO, d.msix_area(pci.PCI_MSIX_TABLE) + 8, 4) == 0x30


def test_reset_forgets_interrupts_that_were_not_delivered(rig: Rig) -> None:
    g = rig.guest()
    g.pci.msix_flags(pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
    rig.device.config_changed()
    rig.cable.far.send(bytes(12) + frame(1))
    assert wait_for(lambda: g.pci.pending() == 0b011)
    g.pci.set("device_status", 0)
    assert g.pci.pending() == 0
    g.pci.set("config_msix_vector", 0)
    for q in (0, 1):
        g.pci.set("queue_select", q)
        g.pci.set("queue_msix_vector", 1 + q)
    assert g.pci.pending() == 0
    g.pci.msix_flags(pci.PCI_MSIX_FLAGS_ENABLE)
    assert rig.vm.delivered() == []


def test_reset_in_every_state_and_again_up(rig: Rig) -> None:
    d = rig.driver()
    for depth in range(6):
        d.set("device_status", 0)
        for step in (ACK, ACK | DRIVER)[:depth]:
            d.set("device_status", step)
        if depth > 2:
            assert d.negotiate(VERSION_1)
        if depth > 3:
            d.set("queue_select", 0)
            d.set("queue_enable", 1)
        if depth > 4:
            d.driver_ok()
        d.set("device_status", 0)
        assert d.status == 0
    echo(rig, rig.guest())


def test_a_machine_reset_finds_the_device_as_new(rig: Rig) -> None:
    g = rig.guest()
    echo(rig, g)
    g.pci.enable(pci.PCI_COMMAND_INTX_DISABLE)
    config = bytes(rig.card._initial)
    rig.board.pci.reset()
    assert bytes(rig.card.config) == config
    assert not rig.vm.irqfds and not rig.vm.kicks and not rig.vm.gsis
    assert not rig.card.msix.enabled
    g2 = rig.guest(msix=False)
    echo(rig, g2)
    assert wait_for(lambda: g2.pci.isr())


def test_close_in_the_middle_of_it() -> None:
    for msix in (True, False):
        with Rig() as rig:
            echo(rig, rig.guest(msix=msix))
        assert not rig.vm.irqfds and not rig.vm.kicks and not rig.vm.gsis
        rig.card.close()


# --- hostile drivers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queue_desc", 0x10008),
        ("queue_driver", 1),
        ("queue_device", 2),
        ("queue_desc", 1 << 40),
        ("queue_device", ALL - 3),
    ],
)
@pytest.mark.parametrize("msix", [True, False])
def test_garbage_queue_addresses_need_a_reset_and_say_so(
    rig: Rig, field: str, value: int, msix: bool
) -> None:
    d = rig.driver()
    if msix:
        d.use_msix()
    assert d.negotiate(VERSION_1)
    if msix:
        d.set("config_msix_vector", 0)
    ring = Ring(rig.board.memory, 256, 0x10000)
    d.set_ring(ring, enable=False)
    d.set(field, value)
    d.set("queue_enable", 1)
    before = rig.board.memory.read(0, rig.board.memory.size)
    d.driver_ok()
    assert d.status == RUNNING | NEEDS_RESET
    if msix:
        assert rig.vm.delivered(60) == [(FEE, 0x30)]
    else:
        assert wait_for(lambda: d.isr() & virtio_pci.VIRTIO_PCI_ISR_CONFIG)
    assert rig.board.memory.read(0, rig.board.memory.size) == before
    ring.close()
    d.set("device_status", 0)
    d.msix_flags(0)
    echo(rig, rig.guest())


def test_queue_registers_after_driver_ok_are_ignored_and_counted(rig: Rig) -> None:
    """FAULTS 10, CVE-2026-5747."""
    g = rig.guest()
    before = rig.device.refused
    for q in (0, 1):
        g.pci.set("queue_select", q)
        g.pci.set("queue_size", 2)
        g.pci.set("queue_enable", 0)
        for name in ("queue_desc", "queue_driver", "queue_device"):
            g.pci.set(name, 0xFFFF000)
        assert g.pci.get("queue_size") == 256 and g.pci.get("queue_enable") == 1
    assert rig.device.refused == before + 2 * 8
    echo(rig, g)


def test_a_malformed_ring_stops_it_and_the_rest_goes_on(rig: Rig) -> None:
    g = rig.guest()
    g.net.tx.set_avail_idx(300)  # FAULTS 9
    g.pci.notify(1)
    assert wait_for(lambda: g.pci.status & NEEDS_RESET)
    assert (FEE, 0x30) in rig.vm.delivered(60)
    assert g.pci.status == RUNNING | NEEDS_RESET and len(rig.device.faults) == 1
    for n in range(10):  # receiving still works
        rig.cable.far.send(bytes(12) + frame(n))
    assert len(g.net.wait_packets(10)) == 10
    g.pci.set("device_status", RUNNING | VIRTIO_CONFIG_S_FAILED)
    assert g.pci.status == RUNNING | NEEDS_RESET | VIRTIO_CONFIG_S_FAILED
    g.pci.set("device_status", 0)
    g.pci.msix_flags(0)
    echo(rig, rig.guest())


# --- interrupts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["vector", "function"])
def test_masking_under_traffic_loses_no_interrupt(rig: Rig, how: str) -> None:
    """FAULTS 12: each round the vector is masked, something arrives, and unmasking must bring the
    interrupt.
    """
    g = rig.guest(VERSION_1)
    for n in range(50):
        if how == "vector":
            g.pci.mask(1, True)
        else:
            g.pci.msix_flags(pci.PCI_MSIX_FLAGS_ENABLE | pci.PCI_MSIX_FLAGS_MASKALL)
        rig.vm.delivered()
        rig.cable.far.send(bytes(12) + frame(n))
        assert len(g.net.wait_packets(n + 1)) == n + 1
        assert wait_for(lambda: g.pci.pending() & 2)
        assert rig.vm.delivered() == []
        if how == "vector":
            g.pci.mask(1, False)
        else:
            g.pci.msix_flags(pci.PCI_MSIX_FLAGS_ENABLE)
        assert rig.vm.delivered(60) == [(FEE, 0x31)]
        assert g.pci.pending() == 0


def test_a_queue_s_vector_changes_while_it_runs(rig: Rig) -> None:
    g = rig.guest(VERSION_1)
    g.pci.set("queue_select", 0)
    for n, vector in enumerate((0, 2, 1, VIRTIO_MSI_NO_VECTOR, 1)):
        g.pci.set("queue_msix_vector", vector)
        assert g.pci.get("queue_msix_vector") == vector
        rig.vm.delivered()
        rig.cable.far.send(bytes(12) + frame(n))
        g.net.wait_packets(n + 1)
        expected = [] if vector == VIRTIO_MSI_NO_VECTOR else [(FEE, 0x30 + vector)]
        if expected:
            assert set(rig.vm.delivered(60)) == set(expected)
        else:
            time.sleep(0.02)
            assert rig.vm.delivered() == []


@pytest.mark.parametrize("register", ["queue_msix_vector", "config_msix_vector"])
def test_what_comes_without_a_vector_is_not_told_later(rig: Rig, register: str) -> None:
    """4.1.5.1.3: no interrupt for it."""
    g = rig.guest()
    g.pci.set("queue_select", 0)
    g.pci.set(register, VIRTIO_MSI_NO_VECTOR)
    rig.vm.delivered()
    if register == "queue_msix_vector":
        rig.device.queues[0].call.signal()
    else:
        rig.device.config_changed()
    g.pci.set(register, 2)
    assert g.pci.get(register) == 2 and rig.vm.delivered() == [] and not g.pci.pending()
    if register == "queue_msix_vector":
        rig.device.queues[0].call.signal()
    else:
        rig.device.config_changed()
    assert rig.vm.delivered() == [(FEE, 0x32)]


@pytest.mark.parametrize("register", ["queue_msix_vector", "config_msix_vector"])
@pytest.mark.parametrize("call", ["irqfd", "set_msi_route"])
def test_a_vector_that_kvm_refuses_reads_back_as_none(rig: Rig, register: str, call: str) -> None:
    """4.1.5.1.2.1: by this the driver learns of it, and takes fewer vectors."""
    g = rig.guest()
    g.pci.set("queue_select", 1)
    g.pci.set(register, VIRTIO_MSI_NO_VECTOR)
    rig.vm.refuse = {call}
    g.pci.set_vector(3, FEE, 0x77)
    g.pci.set(register, 3)
    assert g.pci.get(register) == VIRTIO_MSI_NO_VECTOR and rig.card.errors
    rig.vm.refuse = set()
    g.pci.set(register, 3)
    assert g.pci.get(register) == 3
    echo(rig, g)


@pytest.mark.parametrize("vector", [4, 100, 0xFFFE])
def test_vectors_that_do_not_exist_read_back_as_none(rig: Rig, vector: int) -> None:
    d = rig.driver()
    d.use_msix()
    for name in ("config_msix_vector", "queue_msix_vector"):
        d.set(name, 1)
        assert d.get(name) == 1
        d.set(name, vector)
        assert d.get(name) == VIRTIO_MSI_NO_VECTOR


def test_intx_status_bit_disable_bit_and_isr(rig: Rig) -> None:
    g = rig.guest(VERSION_1, msix=False)

    def pending() -> bool:
        return bool(rig.board.config_read(1, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT)

    assert not pending()
    g.pci.enable(pci.PCI_COMMAND_INTX_DISABLE)
    rig.cable.far.send(bytes(12) + frame(1))
    assert wait_for(pending)  # also while the line is disabled
    assert rig.board.config_read(1, pci.PCI_COMMAND) >> 16 & pci.PCI_STATUS_INTERRUPT
    assert rig.board.read(MMIO, rig.board.ecam(1, pci.PCI_STATUS), 1) & pci.PCI_STATUS_INTERRUPT
    g.pci.enable()
    assert pending()
    assert g.pci.isr() == 1 and g.pci.isr() == 0 and not pending()
    rig.device.config_changed()
    assert wait_for(pending) and g.pci.isr() == virtio_pci.VIRTIO_PCI_ISR_CONFIG


def test_switching_between_line_and_messages_while_running(rig: Rig) -> None:
    g = rig.guest(VERSION_1, msix=False)
    g.pci.set("queue_select", 0)
    g.pci.set("queue_msix_vector", 1)
    for n in range(20):
        g.pci.use_msix()
        rig.cable.far.send(bytes(12) + frame(2 * n))
        g.net.wait_packets(2 * n + 1)
        assert rig.vm.delivered(60)[-1] == (FEE, 0x31)
        assert not rig.board.config_read(1, pci.PCI_STATUS, 2) & pci.PCI_STATUS_INTERRUPT
        g.pci.msix_flags(0)
        rig.cable.far.send(bytes(12) + frame(2 * n + 1))
        g.net.wait_packets(2 * n + 2)
        assert wait_for(g.pci.isr)
        assert rig.vm.delivered() == []
    # One that has been joined may be there for another moment.
    assert wait_for(lambda: thread_names().count("net0 intx") == 1)


# --- the BAR --------------------------------------------------------------------------------------


def test_kicks_follow_the_bar(rig: Rig) -> None:
    """FAULTS 11."""
    g = rig.guest()
    offsets = {NOTIFY, NOTIFY + 4}
    for n in range(10):
        base = PCI_MMIO_BASE + 0x100000 * (n + 1)
        rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, base)
        assert set(rig.vm.kicks) == {base + o for o in offsets}
        echo(rig, g, 10, 100 * n)
    g.pci.command(pci.PCI_COMMAND_MASTER)  # memory decoding off
    assert not rig.vm.kicks
    assert rig.board.read(MMIO, g.pci.bar, 4) == 0xFFFFFFFF
    for i in range(10):  # what is under way still arrives
        rig.cable.far.send(bytes(12) + frame(i))
    g.net.received.clear()
    assert len(g.net.wait_packets(10)) == 10
    g.pci.enable()
    echo(rig, g)


MASTER_OFF = pci.PCI_COMMAND_MEMORY


def memory_of(rig: Rig) -> bytes:
    return rig.board.memory.read(0, rig.board.memory.size)


@pytest.mark.parametrize("msix", [True, False])
def test_without_bus_mastering_memory_stays_as_it_is(rig: Rig, msix: bool) -> None:
    """PCI 3.0, 6.2.2: no access to memory, and a message of MSI-X is one. Frames wait on either
    side, and both go on from where they were.
    """
    g = rig.guest(msix=msix, control=True)
    echo(rig, g)
    rig.vm.delivered()
    g.net.received.clear()
    g.pci.command(MASTER_OFF)
    before = memory_of(rig)
    assert rig.path.workers() == []
    for i in range(5):
        rig.cable.far.send(bytes(12) + frame(i))
    rig.device.set_link(False)  # a change of the configuration, twice
    rig.device.set_link(True)
    assert memory_of(rig) == before
    if msix:
        assert rig.vm.delivered() == [] and g.pci.pending() & 1
    g.net.send(frame(9), kick=True)
    g.pci.notify(2)
    assert g.control is not None
    g.control.add([(0x6000, 2, False), (0x5FF0, 1, True)])
    g.control.publish()
    after = memory_of(rig)
    assert g.control.take_used() == [] and not g.net.poll()
    assert memory_of(rig) == after
    g.pci.enable()
    assert rig.cable.receive()[12:] == frame(9)
    assert [p[12:] for p in g.net.wait_packets(5)] == [frame(i) for i in range(5)]
    assert wait_for(lambda: g.control is not None and len(g.control.take_used()) == 1)
    if msix:
        assert (FEE, 0x30) in rig.vm.delivered(60)  # the configuration's, kept
    else:
        assert wait_for(lambda: g.pci.isr() != 0)
    echo(rig, g)
    assert not rig.device.faults


def capability(rig: Rig, cap: int) -> int:
    return next(at for kind, at in rig.board.capabilities(1) if kind == cap)


@pytest.mark.parametrize("msix", [True, False])
def test_asleep_it_does_nothing_and_wakes_as_it_was(rig: Rig, msix: bool) -> None:
    """D3hot (PCI PM 1.2, 5.4.1): configuration space answers, and nothing else."""
    g = rig.guest(msix=msix)
    echo(rig, g)
    control = capability(rig, pci.PCI_CAP_ID_PM) + pci.PCI_PM_CTRL
    rig.vm.delivered()
    g.net.received.clear()
    rig.board.config_write(1, control, 2, pci.PCI_D3HOT)
    assert rig.board.config_read(1, control, 2) == pci.PCI_PM_CTRL_NO_SOFT_RESET | pci.PCI_D3HOT
    assert rig.board.config_read(1, 0) == 0x10411AF4 and g.pci.status == 0xFF
    before = memory_of(rig)
    assert rig.path.workers() == []
    rig.cable.far.send(bytes(12) + frame(1))
    g.pci.enable()  # stays without effect
    rig.board.config_write(1, control, 2, 1)  # D1: not supported, and ignored
    assert rig.board.config_read(1, control, 2) & pci.PCI_PM_CTRL_STATE_MASK == pci.PCI_D3HOT
    assert memory_of(rig) == before and rig.vm.delivered() == [] and rig.path.workers() == []
    rig.board.config_write(1, control, 2, pci.PCI_D0)
    assert [p[12:] for p in g.net.wait_packets(1)] == [frame(1)]
    echo(rig, g)
    assert not rig.device.faults and g.pci.status & DRIVER_OK


@pytest.mark.parametrize("msix", [True, False])
def test_a_reset_of_the_function_alone(rig: Rig, msix: bool) -> None:
    """FLR under traffic: registers, BARs, MSI-X and device as after power-on; the driver begins
    anew.
    """
    g = rig.guest(msix=msix)
    echo(rig, g)
    control = capability(rig, pci.PCI_CAP_ID_AF) + pci.PCI_AF_CTRL
    rig.board.config_write(1, control, 1, pci.PCI_AF_CTRL_FLR)
    assert rig.board.config_read(1, control, 1) == 0
    assert rig.board.config_read(1, pci.PCI_COMMAND, 2) == 0 and g.pci.status == 0xFF
    assert rig.board.config_read(1, g.pci.msix_cap + pci.PCI_MSIX_FLAGS, 2) >> 15 == 0
    rig.vm.delivered()
    rig.cable.far.send(bytes(12) + frame(1))
    g.pci.enable()
    assert wait_for(lambda: g.pci.status == 0)
    before = memory_of(rig)
    assert rig.vm.delivered() == [] and memory_of(rig) == before
    g.close()
    g = rig.guest(msix=msix)
    assert [p[12:] for p in g.net.wait_packets(1)] == [frame(1)]  # it has waited in the tap
    echo(rig, g)
    assert not rig.device.faults


def test_a_driver_without_bus_mastering_is_told(rig: Rig) -> None:
    d = rig.driver()
    d.command(MASTER_OFF)
    before = memory_of(rig)
    assert d.negotiate(VERSION_1 | bits("VIRTIO_NET_F_CTRL_VQ"))
    ring = Ring(rig.board.memory, 64, 0x10000, index=2)
    before = memory_of(rig)
    d.set_ring(ring)
    d.driver_ok()
    assert memory_of(rig) == before and rig.path.workers() == []
    assert rig.device.refused == 0 and "bus mastering is off" in rig.device.mistakes[0]
    d.reset()
    d.enable()
    assert rig.path.workers() == []
    ring.close()
    echo(rig, rig.guest())
    assert len(rig.device.mistakes) == 1


def test_bus_mastering_and_a_pause_hold_the_rings_together(rig: Rig) -> None:
    g = rig.guest()
    rig.device.set_paused(True)
    g.pci.command(MASTER_OFF)
    rig.device.set_paused(False)
    assert rig.path.workers() == []
    g.pci.enable()
    echo(rig, g)
    g.pci.command(MASTER_OFF)
    rig.device.set_paused(True)
    g.pci.enable()
    assert rig.path.workers() == []
    rig.device.set_paused(False)
    echo(rig, g)


def test_a_machine_reset_takes_bus_mastering_back(rig: Rig) -> None:
    rig.guest()
    rig.board.pci.reset()
    assert not rig.device.mastering and not rig.card.msix.mastering
    echo(rig, rig.guest())


def test_a_bar_on_top_of_another_card(rig: Rig) -> None:
    other = NetDevice("net1", rig.board.memory, EmulatedNet(cable := Cable()), cable, MAC)
    card = rig.board.add(
        VirtioPci(cast("Vm", rig.vm), rig.board.bus, other, PCI_CLASS_NETWORK_ETHERNET)
    )
    g = rig.guest()
    first, second = g.pci.bar, VirtioPciDriver(rig.board, 2)
    rig.board.config_write(2, pci.PCI_BASE_ADDRESS_0, 4, first)
    second.enable()
    assert card.bars[0].base is None
    echo(rig, g)  # undisturbed, and its kicks are its own
    rig.board.config_write(2, pci.PCI_BASE_ADDRESS_0, 4, first + 0x10000)
    assert second.get("num_queues") == 3
    # Moving the running one onto it: the kicks go nowhere, then come back.
    rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, first + 0x10000)
    assert not rig.vm.kicks
    rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, first)
    echo(rig, g)


def test_sizing_a_running_card_s_bar(rig: Rig) -> None:
    g = rig.guest()
    assert rig.board.bar_size(1, 0) == BAR_SIZE
    echo(rig, g)


@pytest.mark.parametrize("refuse", ["ioeventfd", "irqfd", "set_msi_route"])
def test_what_kvm_refuses_does_not_end_the_machine(rig: Rig, refuse: str) -> None:
    rig.vm.refuse = {refuse}
    g = rig.guest(VERSION_1)
    g.net.send(frame(1))
    assert rig.cable.receive()[12:] == frame(1)
    assert rig.card.errors > 0
    rig.vm.refuse = set()
    g.pci.set("device_status", 0)
    g.pci.msix_flags(0)
    g2 = rig.guest()
    echo(rig, g2)
    assert rig.vm.delivered(60)
    assert len(rig.vm.kicks) == 2


# --- the window in configuration space (4.1.4.9) --------------------------------------------------


def window(board: Board, d: VirtioPciDriver, offset: int, length: int, bar: int = 0) -> None:
    board.config_write(1, d.window + 4, 1, bar)
    board.config_write(1, d.window + 8, 4, offset)
    board.config_write(1, d.window + 12, 4, length)


def window_write(board: Board, d: VirtioPciDriver, offset: int, length: int, value: int) -> None:
    window(board, d, offset, length)
    board.config_write(1, d.window + 16, length, value)


def window_read(board: Board, d: VirtioPciDriver, offset: int, length: int) -> int:
    window(board, d, offset, length)
    return board.config_read(1, d.window + 16, length)


def test_all_of_the_device_through_the_window(rig: Rig) -> None:
    """Even with memory decoding off: what a driver without access to the BAR does."""
    d = VirtioPciDriver(rig.board, 1)
    d.command(pci.PCI_COMMAND_MASTER)
    at = {name: offset for name, (offset, _) in COMMON.items()}
    board = rig.board
    assert window_read(board, d, at["num_queues"], 2) == 3
    for step in (ACK, ACK | DRIVER):
        window_write(board, d, at["device_status"], 1, step)
    window_write(board, d, at["driver_feature_select"], 4, 1)
    window_write(board, d, at["driver_feature"], 4, 1)
    window_write(board, d, at["device_status"], 1, ACK | DRIVER | FEATURES_OK)
    assert window_read(board, d, at["device_status"], 1) == ACK | DRIVER | FEATURES_OK
    ring = Ring(board.memory, 256, 0x10000, index=1)
    window_write(board, d, at["queue_select"], 2, 1)
    for name, value in (
        ("queue_desc", ring.desc),
        ("queue_driver", ring.avail),
        ("queue_device", ring.used),
    ):
        window_write(board, d, at[name], 4, value)
    window_write(board, d, at["queue_enable"], 2, 1)
    window_write(board, d, at["device_status"], 1, RUNNING)
    board.memory.write(0x80000, bytes(12) + frame(7))
    ring.add([(0x80000, 72, False)])
    ring.publish(kick=False)
    window_write(
        board, d, d.caps[virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG][1] + d.notify_multiplier, 2, 1
    )
    assert rig.cable.receive()[12:] == frame(7)
    isr = d.caps[virtio_pci.VIRTIO_PCI_CAP_ISR_CFG][1]
    assert wait_for(lambda: window_read(board, d, isr, 1) & 1)
    assert window_read(board, d, isr, 1) == 0
    config = d.caps[virtio_pci.VIRTIO_PCI_CAP_DEVICE_CFG][1]
    assert window_read(board, d, config, 4) == int.from_bytes(MAC[:4], "little")
    ring.close()


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (1, 0x2000, 4),
        (0, 0x2001, 2),
        (0, 0x2002, 4),
        (0, 0x2000, 3),
        (0, 0x2000, 8),
        (0, 0x2000, 0),
        (0, BAR_SIZE, 4),
        (0, 0xFFFFFFFC, 4),
        (0, 0x800, 4),  # between the structures
    ],
)
def test_bad_windows_show_nothing(rig: Rig, bar: int, offset: int, length: int) -> None:
    d = VirtioPciDriver(rig.board, 1)
    assert window_read(rig.board, d, 0x2000, 2) == 0x5452  # the MAC address, through a good one
    window(rig.board, d, offset, length, bar)
    rig.board.config_write(1, d.window + 16, 4, 0x5A5A5A5A)
    assert rig.board.config_read(1, d.window + 16) == 0x5A5A5A5A
    assert rig.device.refused == 0


# --- fuzz -----------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 4, 8])
OFFSET = st.one_of(
    st.integers(0, 0x40),
    st.integers(0x1000, 0x1008),
    st.integers(0x2000, 0x2010),
    st.integers(0x3000, 0x3010),
    st.integers(0x4000, 0x4040),
    st.integers(0x5000, 0x5010),
    st.integers(0, BAR_SIZE),
)
VALUE = st.one_of(
    st.sampled_from(
        [0, 1, 2, 3, 0xB, 0xF, 0xFF, 0xFFFF, 0x1000, 0x10000, 0x20000, 0xFEE00000, 0xC000, ALL]
    ),
    st.integers(0, ALL),
)
ACTION = st.one_of(
    st.tuples(st.just("bar"), OFFSET, SIZES, VALUE),
    st.tuples(st.just("read"), OFFSET, SIZES, VALUE),
    st.tuples(st.just("config"), st.integers(0, 0x104), SIZES, VALUE),
    st.tuples(st.just("window"), OFFSET, st.sampled_from([1, 2, 4]), VALUE),
    st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 11, 15, 15, 15]), SIZES, VALUE),
    st.tuples(st.just("msix"), st.sampled_from([0, 0x4000, 0x8000, 0xC000]), SIZES, VALUE),
    st.tuples(st.just("packet"), st.integers(1, 1600), SIZES, VALUE),
    st.tuples(st.just("up"), st.integers(0, 1), SIZES, VALUE),
    st.tuples(st.just("port"), st.integers(0, 0x40), SIZES, VALUE),
    st.tuples(st.just("legacy status"), st.sampled_from([0, 1, 3, 7, 7, 7]), SIZES, VALUE),
    st.tuples(st.just("legacy queue"), st.integers(0, 3), SIZES, VALUE),
    st.tuples(
        st.just("refuse"),
        st.sampled_from(["", "ioeventfd", "irqfd", "set_msi_route"]),
        SIZES,
        VALUE,
    ),
)


def act(rig: Rig, d: VirtioPciDriver, action: tuple[Any, ...]) -> None:
    kind, a, size, value = action
    board = rig.board
    if kind == "bar":
        board.write(MMIO, d.bar + a, size, value)
    elif kind == "read":
        board.read(MMIO, d.bar + a, size)
    elif kind == "config":
        board.write(MMIO, board.ecam(1, a), size, value)
        board.read(MMIO, board.ecam(1, a), size)
    elif kind == "window":
        window_write(board, d, a, size, value)
        window_read(board, d, a, size)
    elif kind == "status":
        d.set("device_status", a)
    elif kind == "port":
        board.write(PIO, d.ports + a, min(size, 4), value)
        board.read(PIO, d.ports + a, min(size, 4))
    elif kind == "legacy status":
        board.write(PIO, d.ports + virtio_pci.VIRTIO_PCI_STATUS, 1, a)
    elif kind == "legacy queue":
        board.write(PIO, d.ports + virtio_pci.VIRTIO_PCI_QUEUE_SEL, 2, a)
        board.write(PIO, d.ports + virtio_pci.VIRTIO_PCI_QUEUE_PFN, 4, value)
    elif kind == "msix":
        d.msix_flags(a)
    elif kind == "packet":
        try:
            rig.cable.far.send(bytes(a))
        except OSError:
            pass
    elif kind == "refuse":
        rig.vm.refuse = {a} - {""}
    elif not rig.vm.refuse:
        place = pci.PCI_BASE_ADDRESS_0 + 4 * d.caps[virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG][0]
        board.config_write(1, place, 4, PCI_MMIO_BASE + 0x200000)
        rig.guest(msix=bool(a)).close()
        rig.guests.pop()


MODES = ("emulated", "vhost-net", "vhost-user", "vhost-vdpa")


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=120, deadline=None)
@given(st.lists(ACTION, max_size=40), st.booleans())
def test_no_guest_can_make_it_raise(mode: str, actions: list[Any], legacy: bool) -> None:
    """Any accesses in any order, with a running data path or without; then a well-behaved guest
    finds a working card.
    """
    with Rig(mode=mode, legacy=legacy) as rig:
        d = rig.driver()
        d.enable(pci.PCI_COMMAND_IO)
        for action in actions:
            act(rig, d, action)
        rig.vm.refuse = set()
        rig.board.pci.reset()
        assert not rig.vm.irqfds and not rig.vm.kicks
        while True:  # what the guest before has sent
            try:
                rig.cable.far.recv(1 << 17)
            except BlockingIOError:
                break
        assert not rig.device.tracebacks
        g = rig.guest(VERSION_1)
        g.net.send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [[], [0], [1], [2]])
def test_driver_ok_with_few_queues_or_none(mode: str, which: list[int]) -> None:
    """A driver that enables no queue, or not both of a pair, has a device that does nothing."""
    with Rig(mode=mode) as rig:
        d = rig.driver()
        assert d.negotiate(VERSION_1 | bits("VIRTIO_NET_F_CTRL_VQ"))
        rings = [Ring(rig.board.memory, 64, 0x10000 * (i + 1), index=i) for i in which]
        for ring in rings:
            d.set_ring(ring)
        d.driver_ok()
        for queue in range(3):
            d.notify(queue)
        assert d.status == RUNNING and not rig.device.faults
        rig.device.set_paused(True)
        rig.device.set_paused(False)
        d.set("device_status", 0)
        assert d.status == 0 and not rig.device.faults
        for ring in rings:
            ring.close()
        g = rig.guest(VERSION_1)
        g.net.send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["start", "stop"])
def test_a_bug_in_a_data_path_is_a_fault_with_a_name(
    monkeypatch: pytest.MonkeyPatch, mode: str, method: str
) -> None:
    with Rig(mode=mode) as rig:
        real, broken = getattr(rig.path, method), True

        def bug(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            if broken:
                raise ZeroDivisionError("a bug")
            return result

        monkeypatch.setattr(rig.path, method, bug)
        g = rig.guest(VERSION_1)
        if method == "stop":
            g.pci.set("device_status", 0)
            assert g.pci.status == 0
        else:
            assert wait_for(lambda: g.pci.status & NEEDS_RESET)
        assert rig.device.faults_total == 1 and len(rig.device.tracebacks) == 1
        assert "ZeroDivisionError: a bug" in rig.device.faults[0]
        broken = False
        rig.guest(VERSION_1).net.send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)


@pytest.mark.parametrize("mode", MODES)
def test_a_bug_in_a_data_path_s_thread_is_a_fault_with_a_name(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Whatever thread of Python the path has. The guest sees NEEDS_RESET, and a reset cures it."""
    hooked: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", hooked.append)
    with Rig(mode=mode) as rig:
        g = rig.guest(VERSION_1)
        broken = True

        def bug(real: Any) -> Any:
            def call(*args: Any) -> Any:
                if broken:
                    raise ZeroDivisionError("a bug")
                return real(*args)

            return call

        if isinstance(rig.path, EmulatedNet):
            monkeypatch.setattr(rig.path, "_tell", bug(rig.path._tell))
        elif isinstance(rig.path, VhostNet):
            monkeypatch.setattr(rig.path, "_ring_fault", bug(rig.path._ring_fault))
        elif isinstance(rig.path, VhostVdpa):
            monkeypatch.setattr(rig.path, "_look", bug(rig.path._look))
        else:
            monkeypatch.setattr(rig.path, "ring_error", bug(rig.path.ring_error))
        tx = g.net.tx  # a malformed ring gives the thread something to tell
        tx.set_avail(tx.published, 0xFFFF)
        tx.set_avail_idx(tx.published + 1)
        g.pci.notify(1)
        assert wait_for(lambda: g.pci.status & NEEDS_RESET)
        assert any("ZeroDivisionError: a bug" in fault for fault in rig.device.faults)
        assert hooked and rig.device.faults_total >= 1
        broken = False
        again = rig.guest(VERSION_1)
        again.net.send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)


PAGES = {0: 0x1000, 1: 0x2000}


def test_a_page_that_kvm_keeps_keeps_no_data_path_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM does not take back a page of the notifications: the rings are at rest all the same, and
    the page goes at the next occasion.
    """
    with Rig(pages=True) as rig:
        monkeypatch.setattr(rig.path, "doorbells", lambda: PAGES)
        g = rig.guest()
        echo(rig, g)
        assert sorted(host for _, host in rig.vm.pages.values()) == [0x1000, 0x2000]
        rig.vm.refuse = {"unmap_page"}
        errors = rig.card.errors
        rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, PCI_MMIO_BASE + 0x100000)
        assert rig.card.errors == errors + 1 and len(rig.vm.pages) == 2
        with pytest.raises(HostError, match="unmap_page"):
            rig.device.set_paused(True)
        assert rig.path.workers() == []
        assert [rig.device.ring(index).base for index in (0, 1)] == [50, 50]
        rig.vm.refuse = set()
        g.pci.reset()
        assert not rig.vm.pages
        rig.device.set_paused(False)
        echo(rig, rig.guest())
        assert all(gpa > PCI_MMIO_BASE + 0x100000 for gpa, _ in rig.vm.pages.values())


def test_a_start_that_fails_late_leaves_nothing_running(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data path serves the rings already when its pages are asked for; nothing that has been
    sent by then is sent again.
    """
    g = rig.guest()
    echo(rig, g)
    rig.device.set_paused(True)

    def doorbells() -> dict[int, int]:
        g.net.send(frame(7))
        assert rig.cable.receive()[12:] == frame(7)
        raise HostError("no page")

    monkeypatch.setattr(rig.path, "doorbells", doorbells)
    with pytest.raises(HostError, match="no page"):
        rig.device.set_paused(False)
    assert rig.path.workers() == [] and rig.device.serving == []
    assert rig.device.ring(1).base == 51 and g.pci.status & NEEDS_RESET


def test_two_vcpus_fight_over_one_card(rig: Rig) -> None:
    """Under the machine's lock, as there; nothing raises and nothing hangs."""
    lock, stop, errors = threading.RLock(), threading.Event(), []
    d = rig.driver()

    def fight(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                with lock:
                    what = rng.randrange(8)
                    if what == 0:
                        rig.guest(msix=bool(rng.randrange(2))).close()
                        rig.guests.pop()
                    elif what == 1:
                        d.set("device_status", 0)
                    elif what == 2:
                        d.msix_flags(rng.choice([0, 0x4000, 0x8000, 0xC000]))
                    elif what == 3:
                        rig.board.config_write(
                            1, 0x10, 4, PCI_MMIO_BASE + 0x10000 * rng.randrange(16)
                        )
                        d.enable()
                    elif what == 4:
                        d.notify(rng.randrange(2))
                    else:
                        rig.board.write(
                            MMIO,
                            d.bar + rng.randrange(BAR_SIZE),
                            rng.choice([1, 2, 4, 8]),
                            rng.getrandbits(64),
                        )
        except (AssertionError, HostError) as e:
            errors.append(e)

    threads = [threading.Thread(target=fight, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    time.sleep(1.5)
    stop.set()
    for t in threads:
        t.join(60)
    assert not errors
    rig.board.pci.reset()
    echo(rig, rig.guest())
