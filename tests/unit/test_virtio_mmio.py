"""The virtio-mmio transport (virtio 1.3, 4.2) with a whole network card behind it, register by
register. Drivers that live on it are in tests/host and tests/boot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.bus import MMIO
from pyvmm.card.thread import CardThread
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError
from pyvmm.netopt import Net
from pyvmm.spec import platform as pf
from pyvmm.spec import virtio_mmio as vm
from pyvmm.spec.platform import MAX_CARDS
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.virtio.mmio import VirtioMmio, line_of, window_of
from pyvmm.virtio.net import NetDevice
from tests.driver import Cable, NetDriver, bits, wait_for
from tests.pci_guest import ACK, DRIVER, DRIVER_OK, FEATURES_OK, Board, frame

if TYPE_CHECKING:
    from pyvmm.conformance.driver import Ring
    from pyvmm.kvm.vm import Vm

MAC = bytes.fromhex("525400123456")
VERSION_1 = bits("VIRTIO_F_VERSION_1")
RING_RESET = bits("VIRTIO_F_RING_RESET")
RUNNING = ACK | DRIVER | FEATURES_OK | DRIVER_OK
#: Registers by their names in the specification.
AT = {str(name): at for at, name in vm.MMIO_NAMES.items()}
WRITE_ONLY = [
    *("DeviceFeaturesSel", "DriverFeatures", "DriverFeaturesSel", "QueueSel", "QueueSize"),
    *("QueueNotify", "InterruptACK", "QueueDescLow", "QueueDescHigh", "QueueDriverLow"),
    *("QueueDriverHigh", "QueueDeviceLow", "QueueDeviceHigh", "SHMSel"),
]
READ_ONLY = [
    *("MagicValue", "Version", "DeviceID", "VendorID", "DeviceFeatures", "QueueSizeMax"),
    *("SHMLenLow", "SHMLenHigh", "SHMBaseLow", "SHMBaseHigh", "ConfigGeneration"),
]


class Rig:
    """A board with card 3 over MMIO, and its registers as a driver has them."""

    def __init__(self, *, notify: str = "ioeventfd", queue_size: int = 64) -> None:
        self.board = Board()
        self.cable = Cable()
        self.thread = CardThread("net3")
        self.device = NetDevice(
            "net3",
            self.board.memory,
            EmulatedNet(self.cable),
            self.cable,
            MAC,
            queue_size=queue_size,
            without=Net(transport="mmio").excluded(),
            jobs=self.thread,
            lock=self.board.lock,
        )
        fake = cast("Vm", self.board.vm)
        self.card = self.board.own(VirtioMmio(fake, self.board.bus, self.device, 3, notify=notify))
        self.net: NetDriver | None = None

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: object) -> None:
        if self.net is not None:
            self.net.close()
        self.thread.end()
        self.board.close()
        self.cable.close()

    def get(self, name: str | int, size: int = 4) -> int:
        return self.board.read(MMIO, self.card.window + AT.get(cast("str", name), name), size)

    def set(self, name: str | int, value: int, size: int = 4) -> None:
        at = self.card.window + AT.get(cast("str", name), name)
        self.board.write(MMIO, at, size, value)

    def reset(self) -> None:
        """As drivers do, who do not wait; a machine holds their vCPU instead."""
        self.set("Status", 0)
        assert wait_for(lambda: self.get("Status") == 0)

    def offered(self) -> int:
        out = 0
        for half in (0, 1):
            self.set("DeviceFeaturesSel", half)
            out |= self.get("DeviceFeatures") << 32 * half
        return out

    def negotiate(self, features: int = VERSION_1) -> None:
        self.reset()
        self.set("Status", ACK)
        self.set("Status", ACK | DRIVER)
        for half in (0, 1):
            self.set("DriverFeaturesSel", half)
            self.set("DriverFeatures", features >> 32 * half & 0xFFFFFFFF)
        self.set("Status", ACK | DRIVER | FEATURES_OK)
        assert self.get("Status") == ACK | DRIVER | FEATURES_OK

    def set_ring(self, ring: Ring) -> None:
        self.set("QueueSel", ring.index)
        self.set("QueueSize", ring.size)
        for name, address in (("Desc", ring.desc), ("Driver", ring.avail), ("Device", ring.used)):
            self.set(f"Queue{name}Low", address & 0xFFFFFFFF)
            self.set(f"Queue{name}High", address >> 32)
        self.set("QueueReady", 1)

    def up(self, features: int = VERSION_1) -> NetDriver:
        self.negotiate(features)
        self.net = NetDriver(self.board.memory, size=64, event_idx=False, mrg_rxbuf=False)
        for ring in self.net.rings:
            ring.kick = partial(self.set, "QueueNotify", ring.index)  # type: ignore[method-assign]
            self.set_ring(ring)
        self.net.fill(kick=False)
        self.set("Status", RUNNING)
        assert wait_for(lambda: bool(self.device.serving))
        return self.net

    @property
    def mistakes(self) -> list[str]:
        return [text.removeprefix("driver wrote ") for text in self.device.mistakes]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as r:
        yield r


def test_the_registers_after_reset(rig: Rig) -> None:
    """4.2.2, also what does not exist."""
    assert rig.get("MagicValue").to_bytes(4, "little") == b"virt"
    assert [rig.get(name) for name in ("Version", "DeviceID", "VendorID")] == [2, 1, 0x1AF4]
    assert rig.get("Status") == rig.get("InterruptStatus") == rig.get("ConfigGeneration") == 0
    sizes = []
    for queue in range(4):
        rig.set("QueueSel", queue)
        assert rig.get("QueueReady") == rig.get("QueueReset") == 0
        sizes.append(rig.get("QueueSizeMax"))
    assert sizes == [64, 64, 64, 0]  # the last one does not exist
    assert [rig.get(name) for name in WRITE_ONLY] == [0] * len(WRITE_ONLY)
    for region in range(3):  # no shared memory: length and address are -1
        rig.set("SHMSel", region)
        values = [
            rig.get(name) for name in ("SHMLenLow", "SHMLenHigh", "SHMBaseLow", "SHMBaseHigh")
        ]
        assert values == [0xFFFFFFFF] * 4
    assert rig.get(0x0F0) == 0
    assert rig.get(vm.VIRTIO_MMIO_CONFIG, 4).to_bytes(4, "little") == MAC[:4]
    assert rig.get(vm.VIRTIO_MMIO_CONFIG + 5, 1) == MAC[5]
    assert rig.board.read(MMIO, rig.card.window + pf.VIRTIO_MMIO_SIZE, 4) == 0xFFFFFFFF
    assert not rig.device.refused


def test_features(rig: Rig) -> None:
    """64 bits by halves; a kick has no room for NOTIFICATION_DATA."""
    offered = rig.offered()
    assert offered == rig.device.offered()
    assert offered & VERSION_1 and offered & RING_RESET
    assert not offered & bits("VIRTIO_F_NOTIFICATION_DATA")
    rig.set("DeviceFeaturesSel", 2)
    assert rig.get("DeviceFeatures") == 0
    rig.negotiate(VERSION_1 | RING_RESET)
    assert rig.device.driver_features == VERSION_1 | RING_RESET


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
def test_packets_kicks_and_interrupts(notify: str) -> None:
    with Rig(notify=notify) as rig:
        net = rig.up()
        place = rig.card.window + AT["QueueNotify"]
        kicks = {(place, 0), (place, 1)}  # and queue 2 is the control queue, which is not ready
        assert set(rig.board.vm.kicks) & kicks == (kicks if notify == "ioeventfd" else set())
        net.send(frame(1))
        assert rig.cable.receive()[12:] == frame(1)
        rig.cable.far.send(bytes(12) + frame(2))
        assert wait_for(lambda: rig.get("InterruptStatus") == 1)
        assert net.wait_packets(1)[0][12:] == frame(2)
        # A read changes nothing; the bits that the driver acknowledges go (4.2.2).
        assert rig.get("InterruptStatus") == 1
        rig.set("InterruptACK", 2)
        assert rig.get("InterruptStatus") == 1
        rig.set("InterruptACK", 1)
        assert rig.get("InterruptStatus") == 0
        assert not rig.device.refused and not rig.card.errors
        rig.reset()
        assert not rig.board.vm.kicks


def test_a_change_of_the_configuration(rig: Rig) -> None:
    rig.up(VERSION_1 | bits("VIRTIO_NET_F_STATUS"))
    generation = rig.get("ConfigGeneration")
    rig.thread.call(lambda: rig.device.set_link(False))
    assert rig.get("InterruptStatus") & 2
    assert rig.get("ConfigGeneration") == generation + 1
    assert rig.get(vm.VIRTIO_MMIO_CONFIG + 6, 2) == 0
    rig.set("InterruptACK", 3)
    assert rig.get("InterruptStatus") == 0


def test_a_reset_clears_everything(rig: Rig) -> None:
    """4.2.2.1: InterruptStatus and QueueReady; and the selectors."""
    rig.up()
    rig.device.fault(0, "made up")
    assert rig.get("Status") == RUNNING | VIRTIO_CONFIG_S_NEEDS_RESET
    assert rig.get("InterruptStatus") & 2
    rig.reset()
    assert rig.get("InterruptStatus") == 0
    for queue in range(3):
        rig.set("QueueSel", queue)
        assert rig.get("QueueReady") == 0
    assert not rig.device.refused


def held(rig: Rig) -> threading.Event | None:
    """What the vCPU has to wait for that made the latest access."""
    return rig.board.bus._held


def test_a_vcpu_is_held_until_a_reset_is_done(rig: Rig) -> None:
    """Linux writes 0 to Status and does not look again (vm_reset)."""
    rig.up()
    goes_on = threading.Event()
    rig.device.post("something slow", lambda: cast("None", goes_on.wait(60)))
    rig.set("Status", 0)
    done = held(rig)
    assert done is not None and not done.is_set()
    assert rig.get("Status") == RUNNING
    goes_on.set()
    assert done.wait(60) and rig.get("Status") == 0
    rig.set("Status", 0)  # the second time there is nothing to wait for
    done = held(rig)
    assert done is None or done.wait(60)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | RING_RESET])
def test_queue_ready_takes_a_virtqueue_back(rig: Rig, features: int) -> None:
    """4.2.2.1, with DRIVER_OK and before. Drivers write 0 after a reset, too."""
    rig.set("QueueReady", 0)
    net = rig.up(features)
    rig.set("QueueSel", 1)
    assert rig.get("QueueReady") == 1
    rig.set("QueueReady", 0)
    done = held(rig)
    assert done is None or done.wait(60)
    assert rig.get("QueueReady") == 0
    assert rig.device.serving == [0]
    net.send(frame(3))
    with pytest.raises(TimeoutError):
        rig.cable.receive(0.05)
    rig.cable.far.settimeout(0)
    rig.cable.far.send(bytes(12) + frame(4))  # the other one goes on
    assert net.wait_packets(1)[0][12:] == frame(4)
    assert not rig.device.refused and not rig.device.faults
    rig.set_ring(net.tx)
    again = rig.get("QueueReady")
    assert again == (1 if features & RING_RESET else 0)


def test_queue_reset(rig: Rig) -> None:
    """4.2.2.1, RING_RESET; the driver polls."""
    net = rig.up(VERSION_1 | RING_RESET)
    rig.set("QueueSel", 1)
    rig.set("QueueReset", 1)
    assert wait_for(lambda: not rig.get("QueueReset"))
    assert rig.get("QueueReady") == 0
    net.tx.close()
    net.tx = type(net.tx)(rig.board.memory, 32, 0x800000, index=1, event_idx=False)
    net.tx.kick = partial(rig.set, "QueueNotify", 1)  # type: ignore[method-assign]
    rig.set_ring(net.tx)
    net.send(frame(5))
    assert rig.cable.receive()[12:] == frame(5)
    assert not rig.device.refused


def test_what_is_refused_is_told_in_the_words_of_mmio(rig: Rig) -> None:
    for name in READ_ONLY:
        rig.set(name, 1)
    rig.device.mistakes.clear()
    rig.set("Version", 1)
    rig.set("Status", ACK, 1)
    rig.set(0x0F0, 7)
    rig.set(vm.VIRTIO_MMIO_CONFIG, 7, 1)
    rig.set("QueueSize", 8)
    rig.negotiate()
    rig.set("QueueSize", 3)
    rig.set("QueueReady", 2)
    rig.set("QueueReset", 1)
    rig.set("DriverFeatures", 0)
    rig.set("Status", RUNNING & ~ACK)
    assert rig.mistakes == [
        "Version = 0x1, which is read-only (4.2.2)",
        "Status = 0x1 by 8 bits, not 32 (4.2.2.2)",
        "registers + 0xf0 = 0x7 where no register begins (4.2.2)",
        "device configuration mac = 0x7, which is read-only (5.1.4)",
        "QueueSize = 0x8 before FEATURES_OK (3.1.1)",
        "QueueSize = 0x3, which is no power of two (4.2.2.2)",
        "QueueReady = 0x2, but only a reset disables a queue (4.2.2.2)",
        "QueueReset = 0x1 without VIRTIO_F_RING_RESET (4.2.2.2)",
        "DriverFeatures = 0x0 after FEATURES_OK (3.1.1)",
        "Status = 0xe, which clears bits of 0xb (2.1.1)",
    ]
    assert rig.device.refused == len(READ_ONLY) + 10


def test_without_ioeventfds_kicks_are_exits(rig: Rig) -> None:
    rig.board.vm.refuse = {"ioeventfd"}
    net = rig.up()
    assert rig.card.errors == 1 and not rig.board.vm.kicks
    net.send(frame(6))
    assert rig.cable.receive()[12:] == frame(6)


def test_names_in_the_ledger(rig: Rig) -> None:
    """Each register has its name, in whatever region."""
    named: dict[int, str] = {}
    for region in rig.card.regions():
        start = (region.base or 0) - rig.card.window
        for at in AT.values():
            if start <= at < start + region.length:
                # The number of a kick register is that of the virtqueue that is kicked.
                register = 1 if at == AT["QueueNotify"] else at - start
                named[at] = rig.board.bus.describe(region.id, register, True)[2]
                kick = rig.board.bus.role(region.id, register)
                assert kick == ("notify" if at == AT["QueueNotify"] else "")
    expected = {at: f"net3 mmio {name}" for name, at in AT.items()}
    assert named == expected | {AT["QueueNotify"]: "net3 queue 1 notify"}


def test_windows_are_where_nothing_else_is(rig: Rig) -> None:
    windows = [window_of(n) for n in range(MAX_CARDS)]
    assert len(set(windows)) == MAX_CARDS
    for base in windows:
        assert base >= pf.PCI_ECAM_BASE + pf.PCI_ECAM_SIZE > pf.PCI_MMIO_BASE + pf.PCI_MMIO_SIZE
        assert base >= pf.RAM_LOW_MAX and base + pf.VIRTIO_MMIO_SIZE <= pf.IOAPIC_BASE
    lines = {line_of(n) for n in range(MAX_CARDS)}
    assert lines == set(pf.PIC_PCI_LINES)
    assert not lines & {pf.IRQ_COM1, pf.IRQ_COM2, pf.IRQ_RTC, pf.IRQ_SCI, pf.IRQ_GED, 0, 1, 2}
    with pytest.raises(HostError, match="overlaps another device"):
        VirtioMmio(cast("Vm", rig.board.vm), rig.board.bus, rig.device, 3)


# --- malice ---------------------------------------------------------------------------------------

VALUE = st.one_of(st.integers(0, 3), st.integers(0, 1 << 64), st.sampled_from([64, 0x10000]))
OFFSET = st.one_of(st.sampled_from(sorted(AT.values())), st.integers(0, pf.VIRTIO_MMIO_SIZE - 1))
ACTION = st.one_of(
    st.tuples(st.just("write"), OFFSET, st.sampled_from([1, 2, 4, 4, 4, 8]), VALUE),
    st.tuples(st.just("read"), OFFSET, st.sampled_from([1, 2, 4, 8]), VALUE),
    st.tuples(st.just("status"), st.sampled_from([0, 1, 3, 11, 15, 0x80, 0xFF]), VALUE, VALUE),
    st.tuples(st.just("packet"), st.integers(1, 2000), VALUE, VALUE),
    st.tuples(st.just("up"), st.sampled_from([VERSION_1, VERSION_1 | RING_RESET]), VALUE, VALUE),
    st.tuples(st.just("refuse"), st.sampled_from(["", "ioeventfd"]), VALUE, VALUE),
)


def act(rig: Rig, action: tuple[Any, ...]) -> None:
    kind, a, size, value = action
    if kind == "write":
        rig.set(a, value, size)
    elif kind == "read":
        rig.get(a, size)
    elif kind == "status":
        rig.set("Status", a)
    elif kind == "packet":
        try:
            rig.cable.far.send(bytes(a))
        except OSError:
            pass
    elif kind == "refuse":
        rig.board.vm.refuse = {a} - {""}
    elif rig.net is None:
        rig.up(a)


@settings(max_examples=120, deadline=None)
@given(st.lists(ACTION, max_size=40))
def test_no_guest_can_make_it_raise(actions: list[Any]) -> None:
    """Any accesses in any order, with a running data path or without; then a well-behaved driver
    finds a working card.
    """
    with Rig() as rig:
        for action in actions:
            act(rig, action)
        rig.board.vm.refuse = set()
        rig.reset()
        assert not rig.board.vm.kicks and rig.get("InterruptStatus") == 0
        while True:  # what the driver before has sent
            try:
                rig.cable.far.recv(1 << 17)
            except BlockingIOError:
                break
        assert not rig.device.tracebacks
        if rig.net is not None:
            rig.net.close()
        rig.up().send(frame(5))
        assert rig.cable.receive()[12:] == frame(5)
