"""The virtio-mmio transport (virtio 1.3, 4.2): a card without PCI, at an address and with an
interrupt line that the ACPI tables or the kernel command line name (boot.acpi, assembly).

Theory of operation. The window has six regions. C answers the two that a running driver uses per
interrupt and per kick: InterruptStatus with InterruptACK, and QueueNotify, unless KVM takes the
kick by an ioeventfd that matches the value. Python answers the others. There is no MSI-X: a thread
in C turns the virtqueues' eventfds into bits of InterruptStatus and the line (cext/intx.h), as it
does for a PCI card whose driver uses no MSI-X. A driver need not wait for a reset, and Linux' does
not: the vCPU that asks for a reset, or takes a virtqueue back, enters the guest again when that is
done.
"""

from __future__ import annotations

from pyvmm._ext import lib
from pyvmm.bus import MMIO, Bus, Registers
from pyvmm.errors import HostError
from pyvmm.pci import line_of as pci_line_of
from pyvmm.spec.platform import VIRTIO_MMIO_BASE, VIRTIO_MMIO_SIZE
from pyvmm.spec.virtio_mmio import (
    MAGIC,
    MMIO_NAMES,
    MMIO_WORDS,
    VERSION,
    VIRTIO_MMIO_CONFIG,
    VIRTIO_MMIO_CONFIG_GENERATION,
    VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID,
    VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_RESET,
    VIRTIO_MMIO_QUEUE_SEL,
    VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH,
    VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_SHM_SEL,
    VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
)
from pyvmm.spec.virtio_pci import (
    PCI_VENDOR_ID_REDHAT_QUMRANET,
    VIRTIO_PCI_ISR_CONFIG,
    VIRTIO_PCI_ISR_QUEUE,
)
from pyvmm.virtio.isr import Isr, inject_calls
from pyvmm.virtio.kicks import Kicks
from pyvmm.virtio.registers import WORD, DeviceConfig, ModernRegisters, Register

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.bus import Region
    from pyvmm.kvm.vm import Vm
    from pyvmm.virtio.device import Queue, VirtioDevice

# Where the registers go on behind those that C answers.
AFTER_NOTIFY = VIRTIO_MMIO_QUEUE_NOTIFY + 4
AFTER_ISR = VIRTIO_MMIO_INTERRUPT_STATUS + 8


def window_of(index: int) -> int:
    """The guest-physical address of the window of card ``index``."""
    return VIRTIO_MMIO_BASE + VIRTIO_MMIO_SIZE * index


def line_of(index: int) -> int:
    """The GSI of card ``index``: an ISA line, one of those that PCI's INTA has without an IO-APIC.
    A kernel command line can name it, because an ISA line has the same number for Linux whether the
    8259s, MP tables or ACPI are in use.
    """
    return pci_line_of(1 + index)


class MmioRegisters(ModernRegisters):
    """The registers that Python answers. In which status one may be written is the device's
    business (``VirtioDevice``).
    """

    section, width_section, where = "4.2.2", "4.2.2.2", "registers"

    def __init__(self, device: VirtioDevice, bus: Bus) -> None:
        self._shm_select = 0
        half, selector = self._address_half, self._selector
        nothing = Register(4, lambda: WORD)  # there is no shared memory: -1 (4.2.2)
        registers = {
            VIRTIO_MMIO_MAGIC_VALUE: Register(4, lambda: MAGIC),
            VIRTIO_MMIO_VERSION: Register(4, lambda: VERSION),
            VIRTIO_MMIO_DEVICE_ID: Register(4, lambda: device.device_id),
            VIRTIO_MMIO_VENDOR_ID: Register(4, lambda: PCI_VENDOR_ID_REDHAT_QUMRANET),
            VIRTIO_MMIO_DEVICE_FEATURES: Register(4, self._offered_word),
            VIRTIO_MMIO_DEVICE_FEATURES_SEL: write_only(selector(4, "_device_select")),
            VIRTIO_MMIO_DRIVER_FEATURES: write_only(
                Register(4, self._chosen_word, self._choose_word)
            ),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL: write_only(selector(4, "_driver_select")),
            VIRTIO_MMIO_QUEUE_SEL: write_only(selector(4, "_queue_select")),
            VIRTIO_MMIO_QUEUE_NUM_MAX: Register(4, lambda: self._queue("max_size")),
            VIRTIO_MMIO_QUEUE_NUM: write_only(self._queue_register(4, "size")),
            VIRTIO_MMIO_QUEUE_READY: Register(
                4, lambda: self._queue("enabled"), self._set_queue_ready
            ),
            VIRTIO_MMIO_STATUS: Register(4, lambda: device.status, self._set_status),
            VIRTIO_MMIO_QUEUE_DESC_LOW: write_only(half("desc", 0)),
            VIRTIO_MMIO_QUEUE_DESC_HIGH: write_only(half("desc", 32)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW: write_only(half("avail", 0)),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH: write_only(half("avail", 32)),
            VIRTIO_MMIO_QUEUE_USED_LOW: write_only(half("used", 0)),
            VIRTIO_MMIO_QUEUE_USED_HIGH: write_only(half("used", 32)),
            VIRTIO_MMIO_SHM_SEL: write_only(selector(4, "_shm_select")),
            VIRTIO_MMIO_SHM_LEN_LOW: nothing,
            VIRTIO_MMIO_SHM_LEN_HIGH: nothing,
            VIRTIO_MMIO_SHM_BASE_LOW: nothing,
            VIRTIO_MMIO_SHM_BASE_HIGH: nothing,
            VIRTIO_MMIO_QUEUE_RESET: self._queue_register(4, "resetting"),
            VIRTIO_MMIO_CONFIG_GENERATION: Register(4, lambda: device.generation),
        }
        super().__init__(device, bus, MMIO_NAMES, registers)

    def reset(self) -> None:
        """The selectors after reset."""
        super().reset()
        self._shm_select = 0

    def _set_status(self, value: int) -> None:
        self._device.set_status(value)
        if value == 0:
            self.hold()

    def _set_queue_ready(self, value: int) -> None:
        """1 gives the virtqueue to the device; 0 takes it back, and then the device leaves it alone
        (4.2.2.1).
        """
        if value:
            self._set_queue("enabled", value)
        elif self._device.release_queue(self._queue_select):
            self.hold()


def write_only(register: Register) -> Register:
    """The register, which reads as zero."""
    return Register(register.width, lambda: 0, register.write)


class _Part:
    """Some of the registers, from ``start`` on, as a region of its own."""

    def __init__(self, registers: MmioRegisters, start: int) -> None:
        self._registers, self._start = registers, start

    def read(self, offset: int, size: int) -> int:
        """As ``RegisterTable.read``."""
        return self._registers.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As ``RegisterTable.write``."""
        self._registers.write(self._start + offset, size, value)


class VirtioMmio:
    """A virtio device in a window of its own; it is on the bus from the beginning to ``close``.

    :param vm, bus: lent. :param index: the card's number, which decides where the window is and
        which line the device has. :param notify: "ioeventfd" or "exit". :param interrupt: "irqfd",
        or "ioctl"; over MMIO no irqfd is used, but the eventfds are.
    :ivar window: the guest-physical address.
    :ivar gsi: of the interrupt line, which is level-triggered, active low and shared.
    :raises HostError: another device is there.
    """

    def __init__(
        self,
        vm: Vm,
        bus: Bus,
        device: VirtioDevice,
        index: int,
        *,
        notify: str = "ioeventfd",
        interrupt: str = "irqfd",
    ) -> None:
        self.name, self.device = device.name, device
        self.window, self.gsi = window_of(index), line_of(index)
        if interrupt == "ioctl":
            inject_calls(vm, device)
        self._kicks = Kicks(vm, bus, device, ioeventfd=notify == "ioeventfd")
        self._isr = Isr(f"{self.name} irq")
        self._isr.wire(vm.shared_line(self.gsi))
        self._closed = False
        self.registers = MmioRegisters(device, bus)
        device.plug(self, MMIO_WORDS)
        config = bus.region(
            MMIO, VIRTIO_MMIO_SIZE - VIRTIO_MMIO_CONFIG, f"{self.name} config", DeviceConfig(device)
        )
        config.names = Registers(device.config_names)
        isr = bus.region(
            MMIO, 8, f"{self.name} mmio", kind=lib.PV_REGION_ISR_ACK, opaque=self._isr.c
        )
        isr.names = self._names(VIRTIO_MMIO_INTERRUPT_STATUS)
        self._parts = [
            (0, self._part(bus, 0, VIRTIO_MMIO_QUEUE_NOTIFY)),
            (VIRTIO_MMIO_QUEUE_NOTIFY, self._kicks.by_value(bus, MMIO, 4)),
            (AFTER_NOTIFY, self._part(bus, AFTER_NOTIFY, VIRTIO_MMIO_INTERRUPT_STATUS)),
            (VIRTIO_MMIO_INTERRUPT_STATUS, isr),
            (AFTER_ISR, self._part(bus, AFTER_ISR, VIRTIO_MMIO_CONFIG)),
            (VIRTIO_MMIO_CONFIG, config),
        ]
        for offset, region in self._parts:
            if not region.map(self.window + offset):
                raise HostError(f"bus: {region.name} at {self.window:#x} overlaps another device")

    def _part(self, bus: Bus, start: int, end: int) -> Region:
        region = bus.region(MMIO, end - start, f"{self.name} mmio", _Part(self.registers, start))
        region.names = self._names(start)
        return region

    @staticmethod
    def _names(start: int) -> Registers:
        return Registers({at - start: text for at, text in MMIO_NAMES.items() if at >= start})

    def regions(self) -> list[Region]:
        """All regions of the window."""
        return [region for _, region in self._parts]

    def eventfds(self) -> dict[int, str]:
        """What the device's eventfds are for, by descriptor: ``net0 queue 1 kick``."""
        return self._kicks.eventfds()

    @property
    def errors(self) -> int:
        """Times that KVM or the host refused what the guest had asked of the transport."""
        return self._kicks.errors + self._isr.errors

    # --- for the device ---------------------------------------------------------------------------

    def set_active(self, active: bool) -> None:
        """Take kicks by eventfd, and drive the interrupt line; or stop both."""
        self._kicks.set_running(active)
        self._kicks.move((False, self.window + VIRTIO_MMIO_QUEUE_NOTIFY, 0, 4))
        events = [(q.call, VIRTIO_PCI_ISR_QUEUE) for q in self.device.queues]
        self._isr.drive(active, events)

    def interrupt_config(self) -> None:
        """Tell that the configuration has changed. Any thread."""
        self._isr.set(VIRTIO_PCI_ISR_CONFIG)

    def queue_reset(self, q: Queue) -> None:
        """A virtqueue has nothing in the transport that a reset would change."""

    def set_doorbells(self, pages: dict[int, int]) -> None:
        """None: one register takes the kicks of all virtqueues. They go on by the eventfds."""

    def set_takers(self, takers: dict[int, Any]) -> None:
        """Have kicks of these virtqueues taken in the vCPU's thread, and no others."""
        self._kicks.set_takers(takers)

    def device_reset(self) -> None:
        """The driver reset the device: selectors and InterruptStatus go back (4.2.2.1)."""
        self.registers.reset()
        self._isr.reset()

    # --- life -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """The machine starts over. The device is at rest, or comes to rest in this thread."""
        self.device.reset()
        assert not self.device.active

    def close(self) -> None:
        """Stop the device and release the plumbing; no vCPU runs any more. A second call does
        nothing.
        """
        if self._closed:
            return
        self._closed = True
        self.device.shut_down()
        self.device_reset()
        self.set_active(False)
        for region in self.regions():
            region.bus.retire(region)
        self.device.close()
