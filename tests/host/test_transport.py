"""virtio-pci, MSI-X, INTx and the vCPU loop on the machine's own KVM, which tests/unit plays with a
fake.

The mock guest makes the accesses; KVM does what it does with irqfds, ioeventfds, routes and lines.
"""

from __future__ import annotations

import fcntl
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm._ext import lib
from pyvmm.boot import BootState
from pyvmm.bus import MMIO, Bus
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.devices.console import Console
from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.kvm.vcpu import STOP_ASKED, Vcpu
from pyvmm.kvm.vm import Vm
from pyvmm.netopt import MAX_QUEUES
from pyvmm.pci import gsi_of, line_of
from pyvmm.pci.msix import Msix
from pyvmm.spec import pci
from pyvmm.spec.pci import PCI_MSIX_FLAGS_ENABLE as ENABLE
from pyvmm.spec.platform import MAX_CARDS, PCI_MMIO_BASE
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import NOTIFY, VirtioPci
from tests.driver import PATIENCE, Cable, wait_for
from tests.pci_guest import Board, NetGuest, frame

if TYPE_CHECKING:
    from pyvmm.virtio.device import Jobs

KVM_GET_IRQCHIP = 0xC208AE62  # linux/kvm.h: _IOWR(KVMIO, 0x62, struct kvm_irqchip)
MASTER, SLAVE, IOAPIC = 0, 1, 2
VERSION_1 = 1 << VIRTIO_F_VERSION_1
MAC = bytes.fromhex("525400123456")


def lines(vm: Vm) -> int:
    """The IO-APIC's pending inputs as a mask (struct kvm_ioapic_state, irr)."""
    chip = bytearray(520)
    struct.pack_into("=I", chip, 0, IOAPIC)
    fcntl.ioctl(vm.fileno(), KVM_GET_IRQCHIP, chip)
    return int(struct.unpack_from("=I", chip, 8 + 16)[0])


def pins(vm: Vm) -> int:
    """The pending inputs of both 8259s as a mask (struct kvm_pic_state, irr)."""
    out = 0
    for number in (MASTER, SLAVE):
        chip = bytearray(520)
        struct.pack_into("=I", chip, 0, number)
        fcntl.ioctl(vm.fileno(), KVM_GET_IRQCHIP, chip)
        out |= chip[8 + 1] << 8 * number
    return out


class Later:
    """Keeps jobs until ``run``: a device whose transitions take long."""

    def __init__(self) -> None:
        self._jobs: list[Callable[[], None]] = []

    def post(self, job: Callable[[], None]) -> bool:
        self._jobs.append(job)
        return True

    def run(self) -> None:
        while self._jobs:
            self._jobs.pop(0)()


class Rig:
    """A card on a cable in slot 1, with KVM behind."""

    def __init__(self, vm: Vm, jobs: Jobs | None = None) -> None:
        self.vm = vm
        self.board = Board(vm)
        self.cable = Cable()
        path = EmulatedNet(self.cable)
        self.device = NetDevice("net0", self.board.memory, path, self.cable, MAC, jobs=jobs)
        self.card = self.board.add(
            VirtioPci(vm, self.board.bus, self.device, PCI_CLASS_NETWORK_ETHERNET)
        )
        self.guests: list[NetGuest] = []

    def guest(self, **kw: Any) -> NetGuest:
        g = NetGuest(self.board, 1, VERSION_1, **kw)
        self.guests.append(g)
        return g

    def echo(self, g: NetGuest, n: int = 20) -> None:
        g.net.received.clear()
        g.net.send(*[frame(i) for i in range(n)])
        assert [self.cable.receive()[12:] for _ in range(n)] == [frame(i) for i in range(n)]
        for i in range(n):
            self.cable.far.send(bytes(12) + frame(i))
        assert [p[12:] for p in g.net.wait_packets(n)] == [frame(i) for i in range(n)]

    def close(self) -> None:
        for g in self.guests:
            g.close()
        self.board.close()
        self.cable.close()


@pytest.fixture
def rig(vm: Vm) -> Iterator[Rig]:
    r = Rig(vm)
    yield r
    r.close()


# --- KVM's own rules, on which msix.py and pci.py rely --------------------------------------------


def taken(event: EventFd) -> bool:
    """Whether KVM takes what is signalled."""
    event.drain()
    event.signal()
    return not event.drain()


def test_an_irqfd_takes_at_once_and_gives_back(vm: Vm) -> None:
    with EventFd() as e:
        gsi = vm.alloc_gsi()
        vm.set_msi_route(gsi, 0xFEE00000, 0x30)
        assert not taken(e)
        vm.irqfd(e, gsi)
        assert taken(e)
        with pytest.raises(HostError, match="busy"):
            vm.irqfd(e, gsi)
        vm.irqfd(e, gsi, assign=False)
        assert not taken(e)
        vm.irqfd(e, gsi, assign=False)  # nothing there: fine
        vm.free_gsi(gsi)


def test_a_counter_left_by_a_mask_is_consumed_by_the_next_one(vm: Vm) -> None:
    """Assigning fires for what is there but leaves the counter; taking the irqfd back clears it. So
    nothing is told twice.
    """
    with EventFd() as e:
        gsi = vm.alloc_gsi()
        vm.set_msi_route(gsi, 0xFEE00000, 0x30)
        e.signal()
        vm.irqfd(e, gsi)
        vm.irqfd(e, gsi, assign=False)
        assert e.drain() == 0
        vm.free_gsi(gsi)


ODD = [0, 4, 0xFEE00000, 0xFEEFFFFC, 0xFFFFFFFC, 0x1_FEE00000, 0xFF_FEE00000, (1 << 64) - 4]


@pytest.mark.parametrize("address", ODD, ids=hex)
@pytest.mark.parametrize("data", [0, 0x10, 0xFF, 0x4100, 0xC0FF, 0xFFFFFFFF], ids=hex)
def test_odd_messages_harm_nobody(vm: Vm, address: int, data: int) -> None:
    with EventFd() as e:
        msix = Msix(vm, 2)
        msix.set_flags(ENABLE)
        msix.attach(0, e)
        for at, value in ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data), (12, 0)):
            msix.table.write(at, 4, value)
        e.signal()
        assert msix.errors == 0 or msix.pending(msix.vectors[0])
        # Another device's route still works.
        gsi = vm.alloc_gsi()
        vm.set_msi_route(gsi, 0xFEE00000, 0x30)
        vm.free_gsi(gsi)
        msix.reset()


def test_a_refused_route_leaves_the_others(vm: Vm) -> None:
    gsi = vm.alloc_gsi()
    vm.set_msi_route(gsi, 0xFEE00000, 0x30)
    with pytest.raises(HostError):
        vm.set_msi_route(1 << 20, 0xFEE00000, 0x31)  # no such GSI
    vm.set_msi_route(gsi, 0xFEE00000, 0x32)
    with EventFd() as e:
        vm.irqfd(e, gsi)
        assert taken(e)
        vm.irqfd(e, gsi, assign=False)
    vm.free_gsi(gsi)


def test_ioeventfds_collide_and_go(vm: Vm) -> None:
    with EventFd() as a, EventFd() as b:
        vm.ioeventfd(a, 0xC0003000, pio=False)
        with pytest.raises(HostError, match="exists"):
            vm.ioeventfd(b, 0xC0003000, pio=False)
        vm.ioeventfd(b, 0xC0003004, pio=False)
        vm.ioeventfd(a, 0xC0003000, pio=False, assign=False)
        vm.ioeventfd(a, 0xC0003000, pio=False, assign=False)
        vm.ioeventfd(b, 0xC0003000, pio=False)
        for at in (0xC0003000, 0xC0003004):
            vm.ioeventfd(b, at, pio=False, assign=False)


# --- the transport --------------------------------------------------------------------------------


def kicks_at(vm: Vm, base: int) -> bool:
    """Whether KVM answers kicks at a BAR's place."""
    with EventFd() as probe:
        try:
            vm.ioeventfd(probe, base + NOTIFY, pio=False)
        except HostError:
            return True
        vm.ioeventfd(probe, base + NOTIFY, pio=False, assign=False)
        return False


@pytest.mark.parametrize("msix", [True, False])
def test_traffic_and_resets(rig: Rig, msix: bool) -> None:
    for _ in range(20):
        g = rig.guest(msix=msix)
        rig.echo(g)
        g.pci.set("device_status", 0)
        g.pci.msix_flags(0)
        assert lines(rig.vm) >> gsi_of(1) & 1 == 0
    assert rig.card.errors == 0 and not rig.device.faults


def test_kicks_follow_the_bar_in_kvm(rig: Rig) -> None:
    g = rig.guest()
    old = g.pci.bar
    assert kicks_at(rig.vm, old)
    for n in range(1, 50):
        new = PCI_MMIO_BASE + n * 0x10000
        rig.board.config_write(1, pci.PCI_BASE_ADDRESS_0, 4, new)
        assert kicks_at(rig.vm, new) and not kicks_at(rig.vm, old)
        old = new
    g.pci.command(0)
    assert not kicks_at(rig.vm, old)
    g.pci.enable()
    assert kicks_at(rig.vm, old)
    g.pci.set("device_status", 0)
    assert not kicks_at(rig.vm, old)
    assert rig.card.errors == 0


def test_masking_under_traffic(rig: Rig) -> None:
    """The eventfd keeps what is pending while masked, KVM takes it when unmasked."""
    g = rig.guest()
    call = rig.device.queues[0].call
    for n in range(50):
        g.pci.mask(1, True)
        assert g.pci.pending() == 0
        rig.cable.far.send(bytes(12) + frame(n))
        assert len(g.net.wait_packets(n + 1)) == n + 1
        assert wait_for(lambda: g.pci.pending() == 2)
        g.pci.mask(1, False)
        assert g.pci.pending() == 0
        assert taken(call)
    g.pci.set("queue_select", 0)
    g.pci.set("queue_msix_vector", 0xFFFF)
    assert not taken(call)
    g.pci.set("queue_msix_vector", 2)
    assert taken(call)


def test_intx_line_in_the_io_apic(rig: Rig) -> None:
    g = rig.guest(msix=False)
    bit = 1 << gsi_of(1)

    def high() -> bool:
        return bool(lines(rig.vm) & bit)

    assert not high()
    rig.cable.far.send(bytes(12) + frame(1))
    assert wait_for(high)
    g.pci.enable(pci.PCI_COMMAND_INTX_DISABLE)
    assert not high()
    g.pci.enable()
    assert high()
    assert g.pci.isr() == 1 and not high()
    # MSI-X hides the line (PCI 3.0, 6.8.3.3); so does a reset.
    rig.device.config_changed()
    assert wait_for(high)
    g.pci.msix_flags(ENABLE)
    assert not high()
    g.pci.msix_flags(0)
    assert high()
    g.pci.set("device_status", 0)
    assert not high() and g.pci.isr() == 0


@pytest.mark.parametrize("msix", [True, False])
def test_a_function_that_is_being_reset_keeps_its_line_low(vm: Vm, msix: bool) -> None:
    """FLR while the device takes its time. With MSI-X, whose reset shows the line, the ISR has kept
    the bit of a configuration change.
    """
    later = Later()
    rig = Rig(vm, later)

    def high() -> bool:
        return bool(lines(vm) & 1 << gsi_of(1))

    g = rig.guest(msix=msix)
    later.run()
    rig.device.config_changed()
    assert msix or wait_for(high)
    at = next(at for cap, at in rig.board.capabilities(1) if cap == pci.PCI_CAP_ID_AF)
    rig.board.config_write(1, at + pci.PCI_AF_CTRL, 1, pci.PCI_AF_CTRL_FLR)
    held = rig.board.held
    assert held is not None and not held.is_set() and not high()
    rig.device.queues[0].call.signal()  # the relay goes on until the job
    assert msix or wait_for(lambda: bool(rig.card._isr.peek() & 1))
    assert not high()
    later.run()
    assert held.is_set() and not high() and rig.device.status == 0
    g.close()
    g = rig.guest(msix=False)
    later.run()
    assert not high()
    rig.device.config_changed()
    assert wait_for(high) and g.pci.isr() == 2 and not high()
    rig.close()


def test_cards_share_a_line(vm: Vm) -> None:
    """The input is high while any of them holds it so, whatever the others do."""
    gsi = gsi_of(9)
    cards = [lib.pv_intx_new() for _ in range(3)]
    for card in cards:
        lib.pv_intx_wire(card, vm.shared_line(gsi))
    assert vm.shared_line(gsi) is vm.shared_line(gsi_of(17))
    held: set[int] = set()
    rng = random.Random(3)
    for _ in range(300):
        which = rng.randrange(3)
        if which in held:
            assert lib.pv_intx_read(cards[which])
        else:
            lib.pv_intx_raise(cards[which], 1)
        held ^= {which}
        assert lines(vm) >> gsi & 1 == bool(held)
    for card in cards:
        lib.pv_intx_reset(card)
        lib.pv_intx_free(card)
    assert lines(vm) == 0


@pytest.mark.parametrize("slot", range(1, 9))
def test_a_card_over_mmio_and_one_over_pci_share_a_pin(vm: Vm, slot: int) -> None:
    """Of the 8259s, for kernels without an IO-APIC; whoever falls first leaves the pin high."""
    gsis = gsi_of(slot), line_of(slot)
    cards = [lib.pv_intx_new() for _ in gsis]
    for card, gsi in zip(cards, gsis, strict=True):
        lib.pv_intx_wire(card, vm.shared_line(gsi))
    pin = 1 << line_of(slot)
    for first, second in (cards, cards[::-1]):
        lib.pv_intx_raise(cards[0], 1)
        lib.pv_intx_raise(cards[1], 1)
        assert pins(vm) & pin and lines(vm) == sum(1 << gsi for gsi in gsis)
        lib.pv_intx_read(first)
        assert pins(vm) & pin
        lib.pv_intx_read(second)
        assert not pins(vm) & pin and lines(vm) == 0
    for card in cards:
        lib.pv_intx_free(card)


def test_kvm_has_a_route_for_every_vector_of_31_large_cards(vm: Vm) -> None:
    """64 queue pairs, the control queue and the configuration: KVM_MAX_IRQ_ROUTES is 4096. The
    routes are made at once here, as each change makes all of them again.
    """
    gsis = [vm.alloc_gsi() for _ in range(MAX_CARDS * (2 * MAX_QUEUES + 2))]
    vm._msi.update({gsi: (0xFEE00000, gsi & 0xFF) for gsi in gsis[:-1]})
    vm.set_msi_route(gsis[-1], 0xFEE00000, 0x30)
    with EventFd() as event:
        vm.irqfd(event, gsis[-1])
        vm.irqfd(event, gsis[-1], assign=False)


def test_a_machine_reset_replaces_the_vm(rig: Rig) -> None:
    for msix in (True, False, True):
        g = rig.guest(msix=msix)
        rig.echo(g)
        rig.board.pci.reset()
        rig.vm.recreate()
        assert lines(rig.vm) == 0
    g = rig.guest(msix=False)
    rig.echo(g)
    assert wait_for(lambda: bool(lines(rig.vm) & 1 << gsi_of(1)))


def test_toggling_for_a_while_leaks_nothing(rig: Rig) -> None:
    """Descriptors are counted by conftest; KVM would run out of routes or of places on its bus."""
    rng = random.Random(7)
    g = rig.guest()
    for _ in range(1500):
        what = rng.randrange(4)
        if what == 0:
            g.pci.mask(rng.randrange(3), bool(rng.randrange(2)))
        elif what == 1:
            rig.board.config_write(
                1, pci.PCI_BASE_ADDRESS_0, 4, PCI_MMIO_BASE + 0x10000 * rng.randrange(8)
            )
        elif what == 2:
            g.pci.msix_flags(rng.choice([0, ENABLE, ENABLE | 0x4000]))
        else:
            g.pci.set("queue_select", rng.randrange(2))
            g.pci.set("queue_msix_vector", rng.choice([0, 1, 2, 7, 0xFFFF]))
    assert rig.card.errors == 0
    rig.board.pci.reset()
    rig.echo(rig.guest())


# --- the serial port's line -----------------------------------------------------------------------


def test_serial_line_in_the_io_apic(vm: Vm) -> None:
    with Board(vm) as board:
        console = Console("console", vm, 4)
        console.plug(board.bus, 0x3F8, "serial0")

        def high() -> bool:
            return bool(lines(vm) & 1 << 4)

        console.feed(b"x")
        assert not high()  # not enabled
        board.write(0, 0x3F9, 1, 1)
        assert high()
        assert board.read(0, 0x3F8, 1) == ord("x")
        assert not high()
        board.write(0, 0x3F9, 1, 2)  # THRI: at once
        assert high()
        assert board.read(0, 0x3FA, 1) & 0xF == 2
        assert not high()
        board.write(0, 0x3F8, 1, ord("y"))
        assert high()
        board.write(0, 0x3F9, 1, 0)
        assert not high()
        console.close()


# --- the vCPU loop --------------------------------------------------------------------------------

CODE = 0x1000


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    bus = Bus()
    v = Vcpu(vm, 0, 1, bus)
    v.set_boot_state(BootState("protected32", "machine code", CODE, {}, 0))
    yield v
    v.close()
    bus.close()


@pytest.mark.parametrize("code", [b"\xf4\xeb\xfd", b"\xeb\xfe"], ids=["halted", "spinning"])
def test_every_kick_is_answered_and_none_leaves_a_busy_loop(
    vm: Vm, vcpu: Vcpu, code: bytes
) -> None:
    vm.memory.write(CODE, code)
    answers: list[int] = []
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            answers.append(vcpu.run())

    t = threading.Thread(target=loop)
    t.start()
    rng = random.Random(3)
    for _ in range(300):
        before = len(answers)
        for _ in range(
            rng.randrange(1, 4)
        ):  # also several at once: the second may meet the first one's answer
            vcpu.kick()
        assert wait_for(lambda n=before: len(answers) > n)  # type: ignore[misc]
    time.sleep(0.05)
    runs = vcpu.runs
    time.sleep(0.3)
    assert vcpu.runs - runs < 100  # a flag left behind would make thousands
    stop.set()
    vcpu.kick()
    t.join(PATIENCE)
    assert not t.is_alive() and set(answers) == {STOP_ASKED}
    assert sum(r.count for r in vcpu.ledger()) == vcpu.runs


def test_a_kick_before_run_is_not_lost(vm: Vm, vcpu: Vcpu) -> None:
    vm.memory.write(CODE, b"\xeb\xfe")
    for _ in range(20):
        vcpu.kick()
        assert vcpu.run() == STOP_ASKED


def test_kicks_while_the_vm_is_replaced(vm: Vm, vcpu: Vcpu) -> None:
    """kick() writes to the run area that a machine reset unmaps."""
    stop = threading.Event()

    def kicks() -> None:
        while not stop.is_set():
            vcpu.kick()

    t = threading.Thread(target=kicks)
    t.start()
    for _ in range(30):
        vcpu.detach()
        vm.recreate()
        vcpu.reattach()
    stop.set()
    t.join()
    vcpu.kick()
    assert vcpu.run() == STOP_ASKED


def test_reads_of_nobody_s_place_in_the_guest(vm: Vm, vcpu: Vcpu) -> None:
    """mov eax, [0xd0000000]; then out to a port: the ledger has both, and eax is all ones."""
    # It halts then: an L1 under Bochs would freeze if it went round with interrupts disabled.
    vm.memory.write(CODE, b"\xa1\x00\x00\x00\xd0" + b"\xe6\x99" + b"\xf4\xeb\xfd")
    t = threading.Thread(target=vcpu.run)
    t.start()
    assert wait_for(lambda: any(r.reason == "io" for r in vcpu.ledger()))
    vcpu.kick()
    t.join(PATIENCE)
    book = {
        (r.reason, r.addr, r.write): r.count for r in vcpu.ledger() if r.reason in ("io", "mmio")
    }
    assert book == {("mmio", 0xD0000000, False): 1, ("io", 0x99, True): 1}
    assert vcpu.registers()["rax"] == 0xFFFFFFFF
    assert MMIO == lib.PV_MMIO
