"""The virtio-pci transport (virtio 1.2, 4.1).

A BAR in memory space has the common configuration, ISR, device configuration, notifications, MSI-X
table and pending bits. A transitional device has the legacy interface, too (``pci.legacy``). Kicks
reach the data path as eventfds: by ioeventfd, inside the kernel, or with ``notify="exit"`` through
an exit of the vCPU. Interrupts reach the guest by irqfds, or with ``interrupt="ioctl"`` by a call
of whoever moves the packets.
"""

from __future__ import annotations

from pyvmm._ext import lib
from pyvmm.bus import MMIO, Bus, Registers
from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.kvm.inject import Injection
from pyvmm.memory import PAGE
from pyvmm.pci import Bar, PciFunction, gsi_of
from pyvmm.pci.msix import Msix, entry_name
from pyvmm.spec.pci import (
    MSIX_NAMES,
    PCI_CAP_ID_MSIX,
    PCI_CAP_ID_VNDR,
    PCI_COMMAND,
    PCI_COMMAND_INTX_DISABLE,
    PCI_COMMAND_MASTER,
    PCI_MSIX_FLAGS,
    PCI_MSIX_FLAGS_ENABLE,
    PCI_MSIX_FLAGS_MASKALL,
    PCI_STATUS,
    PCI_STATUS_INTERRUPT,
)
from pyvmm.spec.virtio_pci import (
    CAP_NAMES,
    COMMON_NAMES,
    PCI_VENDOR_ID_REDHAT_QUMRANET,
    VIRTIO_MSI_NO_VECTOR,
    VIRTIO_PCI_CAP_COMMON_CFG,
    VIRTIO_PCI_CAP_DEVICE_CFG,
    VIRTIO_PCI_CAP_ISR_CFG,
    VIRTIO_PCI_CAP_NOTIFY_CFG,
    VIRTIO_PCI_CAP_PCI_CFG,
    VIRTIO_PCI_DEVICE_ID_BASE,
    VIRTIO_PCI_ISR_CONFIG,
    VIRTIO_PCI_ISR_QUEUE,
    VIRTIO_PCI_QUEUE_NOTIFY,
)
from pyvmm.virtio.isr import Isr, inject_calls
from pyvmm.virtio.kicks import Kicks
from pyvmm.virtio.pci.common import CommonConfig
from pyvmm.virtio.pci.legacy import LegacyBar
from pyvmm.virtio.registers import DeviceConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.bus import Region
    from pyvmm.kvm.vm import Vm
    from pyvmm.virtio.device import Queue, VirtioDevice

# The memory BAR: one page a structure, so that a data path could map the notification page alone.
COMMON, ISR, DEVICE, NOTIFY, TABLE, PBA = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
BAR_SIZE = 0x8000
COMMON_SIZE = 60
#: notify_off_multiplier: a queue has its own address, hence its own ioeventfd. With a page for
#: each, behind the rest of the BAR, a device of the host's can take the kicks there.
NOTIFY_STRIDE, NOTIFY_PAGES = 4, BAR_SIZE


class VirtioPci(PciFunction):
    """A virtio device as a PCI function; owns its interrupt plumbing and lends the queues'
    eventfds.

    :param vm, bus: lent. :param notify: "ioeventfd" or "exit".
    :param interrupt: "irqfd" or "ioctl".
    :param notify_pages: each virtqueue has a page of the BAR for its kicks, which ``set_doorbells``
        can fill; else a few bytes.
    :param transitional: the device id of a device that drivers of the legacy interface can use,
        too; then BAR 0 is in I/O space and has that interface, and BAR 1 is the memory BAR. None
        for a modern device, whose BAR 0 is the memory BAR.
    """

    def __init__(
        self,
        vm: Vm,
        bus: Bus,
        device: VirtioDevice,
        class_code: int,
        *,
        notify: str = "ioeventfd",
        interrupt: str = "irqfd",
        notify_pages: bool = False,
        transitional: int | None = None,
    ) -> None:
        modern = transitional is None
        super().__init__(
            device.name,
            PCI_VENDOR_ID_REDHAT_QUMRANET,
            VIRTIO_PCI_DEVICE_ID_BASE + device.device_id if transitional is None else transitional,
            class_code,
            subsystem=0x1100 if modern else device.device_id,  # 4.1.2.3: the legacy driver's id
            pin=1,
            revision=1 if modern else 0,
        )
        self._memory_bar = 0 if modern else 1
        self.device = device
        self._vm = vm
        self._stride, self._notify_at = NOTIFY_STRIDE, NOTIFY
        if notify_pages:
            self._stride, self._notify_at = PAGE, NOTIFY_PAGES
        self._use_ioeventfd = notify == "ioeventfd"
        self._kicks = Kicks(vm, bus, device, self._stride, ioeventfd=self._use_ioeventfd)
        self._doorbells: dict[int, int] = {}
        self._doorbells_at: int | None = None  # the BAR's base
        self._slots: list[int] = []  # of KVM, for the doorbells
        self._refused = 0  # doorbells, by KVM
        self.config_vector = VIRTIO_MSI_NO_VECTOR
        self._config_event = Injection(vm) if interrupt == "ioctl" else EventFd()
        if interrupt == "ioctl":
            inject_calls(vm, device)
        self._isr = Isr(f"{self.name} intx")
        vectors = len(device.queues) + 1
        self.msix = Msix(vm, vectors)
        device.plug(self)
        self._legacy: LegacyBar | None = None
        self._add_bars(bus, vectors)
        if not modern:
            self._legacy = LegacyBar(bus, device, self, self._isr.c, self._kicks)
            self._legacy.on_move = self._bar_moved
            self.add_bar(0, self._legacy)

    def _add_bars(self, bus: Bus, vectors: int) -> None:
        name, device = self.name, self.device
        self.common = CommonConfig(device, self, bus)
        self._device_config = DeviceConfig(device)
        kicks = self._stride * len(device.queues)
        bar = Bar(1 << (max(BAR_SIZE, self._notify_at + kicks) - 1).bit_length())
        self._isr_region = bus.region(
            MMIO, 4, f"{name} isr", kind=lib.PV_REGION_ISR, opaque=self._isr.c
        )
        self._notify_region = self._kicks.by_address(bus, MMIO)
        common = bus.region(MMIO, COMMON_SIZE, f"{name} common", self.common)
        common.names = Registers(COMMON_NAMES)
        config = bus.region(MMIO, 0x1000, f"{name} config", self._device_config)
        config.names = Registers(device.config_names)
        table = bus.region(MMIO, 16 * vectors, f"{name} msix-table", self.msix.table)
        table.names = entry_name
        bar.parts = [
            (COMMON, common),
            (ISR, self._isr_region),
            (DEVICE, config),
            (self._notify_at, self._notify_region),
            (TABLE, table),
            (PBA, bus.region(MMIO, (vectors + 63) // 64 * 8, f"{name} msix-pba", self.msix.pba)),
        ]
        bar.on_move = self._bar_moved
        index = self._memory_bar
        self.add_bar(index, bar)
        own = len(device.config_space())
        for text, kind, at, length, extra in (
            ("common-cfg", VIRTIO_PCI_CAP_COMMON_CFG, COMMON, COMMON_SIZE, b""),
            ("isr-cfg", VIRTIO_PCI_CAP_ISR_CFG, ISR, 1, b""),
            # 4.1.4.6: only a device that has a configuration has the structure.
            *([("device-cfg", VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE, own, b"")] if own else []),
            (
                "notify-cfg",
                VIRTIO_PCI_CAP_NOTIFY_CFG,
                self._notify_at,
                kicks,
                self._stride.to_bytes(4, "little"),
            ),
        ):
            fields = {**CAP_NAMES, **({16: "notify_off_multiplier"} if extra else {})}
            self.add_capability(
                PCI_CAP_ID_VNDR, virtio_cap(kind, index, at, length, extra), text, fields
            )
        # 4.1.4.9: a window on the BAR through configuration space; bar, offset, length and data are
        # the driver's.
        self._window = self.add_capability(
            PCI_CAP_ID_VNDR,
            virtio_cap(VIRTIO_PCI_CAP_PCI_CFG, 0, 0, 0, bytes(4)),
            "pci-cfg",
            {**CAP_NAMES, 16: "pci_cfg_data"},
        )
        self.live = {PCI_COMMAND, self._window + 16}
        self.allow(self._window + 4, 0xFF, 1)
        self.allow(self._window + 8, (1 << 96) - 1, 12)
        self._msix_cap = self.add_capability(
            PCI_CAP_ID_MSIX, Msix.capability(vectors, index, TABLE, PBA), "MSI-X", MSIX_NAMES
        )
        self.allow(
            self._msix_cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL, 2
        )
        self.add_power_management()

    def plugged(self) -> None:
        """The function has its slot, hence its interrupt line."""
        self._isr.wire(self._vm.shared_line(gsi_of(self.slot)))
        self.command_written(self.command)

    # --- kicks ------------------------------------------------------------------------------------

    def _bar_moved(self, base: int | None) -> None:
        self._set_kicks()
        self._place_doorbells()

    def _set_kicks(self) -> None:
        """Kicks come at the interface that the driver uses."""
        legacy = self.device.legacy
        base = self.bars[0 if legacy else self._memory_bar].base
        if base is None:
            self._kicks.move(None)
        elif legacy:
            self._kicks.move((True, base + VIRTIO_PCI_QUEUE_NOTIFY, 0, 2))
        else:
            self._kicks.move((False, base + self._notify_at, self._stride, 2))

    def set_takers(self, takers: dict[int, Any]) -> None:
        """Have kicks of these virtqueues taken in the vCPU's thread, and no others."""
        self._kicks.set_takers(takers)

    def set_doorbells(self, pages: dict[int, int]) -> None:
        """Map pages of the host's device where the driver kicks. The ioeventfds stay: they take the
        kicks wherever no page is.
        """
        if pages != self._doorbells:
            self._take_doorbells()
            self._doorbells = pages
            self._place_doorbells()

    def _place_doorbells(self) -> None:
        base = self.bars[self._memory_bar].base
        if base == self._doorbells_at:
            return
        try:
            self._take_doorbells()
        except HostError:  # the guest moves the BAR when it likes; the next change tries again
            self._refused += 1
            return
        if base is None or self._stride != PAGE or not self._use_ioeventfd:
            return
        self._doorbells_at = base
        for index, host in self._doorbells.items():
            try:
                self._slots.append(self._vm.map_page(base + self._notify_at + PAGE * index, host))
            except HostError:
                self._refused += 1  # as with the ioeventfds: the guest chose the place

    def _take_doorbells(self) -> None:
        """:raises HostError: KVM keeps a page, which stays in ``_slots``."""
        while self._slots:
            self._vm.unmap_page(self._slots[-1])
            self._slots.pop()
        self._doorbells_at = None

    def regions(self) -> list[Region]:
        """All regions of the function's BARs."""
        parts = [region for _, region in self.bars[self._memory_bar].parts]
        return parts + (self._legacy.regions() if self._legacy is not None else [])

    def eventfds(self) -> dict[int, str]:
        """What the function's eventfds are for, by descriptor: ``net0 queue 1 kick``."""
        return self._kicks.eventfds() | {
            self._config_event.fileno(): f"{self.name} configuration change"
        }

    @property
    def errors(self) -> int:
        """Times that KVM or the host refused what the guest had asked of the transport."""
        return self._kicks.errors + self._refused + self._isr.errors + self.msix.errors

    # --- interrupts -------------------------------------------------------------------------------

    def set_active(self, active: bool) -> None:
        """Take kicks by eventfd, and drive the interrupt line; or stop both."""
        self._kicks.set_running(active)
        self._set_kicks()
        self._use_intx(active and not self.msix.enabled)

    def _use_intx(self, want: bool) -> None:
        """Without MSI-X, a thread in C turns the eventfds into the interrupt line."""
        events = [(q.call, VIRTIO_PCI_ISR_QUEUE) for q in self.device.queues]
        self._isr.drive(want, [*events, (self._config_event, VIRTIO_PCI_ISR_CONFIG)])

    def _show_intx(self) -> None:
        """The line is hidden by command bit 10 and while MSI-X is in use (PCI 3.0, 6.8.3.3), and
        until a reset of the device is done: a function that has been reset interrupts nobody.
        """
        off = bool(self.command & PCI_COMMAND_INTX_DISABLE) or self.asleep
        self._isr.hide(off or self.msix.enabled or self.device.stopping)

    def interrupt_config(self) -> None:
        """Tell that the configuration has changed; the ISR bit is set even with MSI-X (4.1.4.5.1).
        Any thread.
        """
        if self.msix.enabled:
            self._isr.set(VIRTIO_PCI_ISR_CONFIG)
        self._config_event.nudge()

    def set_config_vector(self, value: int) -> None:
        """config_msix_vector, which reads back as the vector in force."""
        self.config_vector = self._move(self._config_event, self.config_vector, value)

    def queue_reset(self, q: Queue) -> None:
        """The virtqueue is back in its state after power-on."""
        self.set_queue_vector(q, VIRTIO_MSI_NO_VECTOR)

    def set_queue_vector(self, q: Queue, value: int) -> None:
        """queue_msix_vector; drivers change it while the queue runs, too."""
        q.vector = self._move(q.call, q.vector, value)

    def _move(self, event: EventFd, old: int, new: int) -> int:
        """Let ``event`` fire another vector; returns the vector in force. That is none if there is
        no such vector or KVM refuses the interrupt, by which the driver learns of it
        (4.1.5.1.2.1).
        """
        if old != VIRTIO_MSI_NO_VECTOR:
            self.msix.detach(old, event)
        elif self.msix.enabled:
            event.drain()  # what happened while there was no vector is not told later (4.1.5.1.3)
        if new >= len(self.msix.vectors) or not self.msix.attach(new, event):
            return VIRTIO_MSI_NO_VECTOR
        return new

    # --- configuration space ----------------------------------------------------------------------

    def command_written(self, command: int) -> None:
        """Bit 10 hides the interrupt line. Bit 2 lets the function access memory: without it, MSI-X
        messages stay pending from now on, and the card's thread parks the virtqueues (PCI 3.0,
        6.2.2). The line is no access to memory.
        """
        self._show_intx()
        mastering = bool(command & PCI_COMMAND_MASTER)
        self.msix.set_mastering(mastering)
        self.device.set_mastering(mastering)

    def config_written(self, at: int, size: int) -> None:
        """MSI-X message control, or the data window."""
        flags = self._msix_cap + PCI_MSIX_FLAGS
        if at < flags + 2 and at + size > flags:
            self._msix_written(self.get(flags, 2))
        elif self._window + 16 <= at < self._window + 20:
            self._window_access(write=True)

    def _msix_written(self, flags: int) -> None:
        # The thread and the vectors take from the same eventfds: never both.
        if flags & PCI_MSIX_FLAGS_ENABLE:
            self._use_intx(False)
        self.msix.set_flags(flags)
        self._arrange_legacy()
        self._use_intx(self._kicks.running and not self.msix.enabled)
        self._show_intx()

    def _arrange_legacy(self) -> None:
        if self._legacy is not None:
            self._legacy.arrange(msix=self.msix.enabled)

    def config_read(self, at: int, size: int) -> int:
        """As the base class, but the data window reads from the BAR, and the status register shows
        the ISR (4.1.4.5.1).
        """
        if self._window + 16 <= at < self._window + 20:
            self._window_access(write=False)
        value = super().config_read(at, size)
        if at <= PCI_STATUS < at + size and not self.msix.enabled and self._isr.peek():
            value |= PCI_STATUS_INTERRUPT << 8 * (PCI_STATUS - at)
        return value

    def _window_access(self, *, write: bool) -> None:
        w = self._window
        bar, offset, length = self.config[w + 4], self.get(w + 8, 4), self.get(w + 12, 4)
        if bar != self._memory_bar or length not in (1, 2, 4):
            return
        if offset % length or offset + length > self.bars[bar].size:
            return
        value = self.get(w + 16, length)
        for start, region in self.bars[bar].parts:
            at = offset - start
            if not 0 <= at <= region.length - length:
                continue
            if region is self._notify_region:
                index, rest = divmod(at, self._stride)
                if write and not rest and index in self.device.own_queues():
                    self.device.notified(index)
                elif write and not rest:
                    self.device.queues[index].kick.nudge()
            elif region is self._isr_region:
                if not write:
                    self.put(w + 16, 0 if at else self._isr.take(), 4)
            elif region.handler is not None and write:
                region.handler.write(at, length, value)
            elif region.handler is not None:
                self.put(w + 16, region.handler.read(at, length) & ((1 << 8 * length) - 1), 4)

    # --- life -------------------------------------------------------------------------------------

    def device_reset(self) -> None:
        """The driver reset the device: vectors, selectors and ISR go back (4.1.4.3.1); MSI-X itself
        belongs to PCI.
        """
        for q in self.device.queues:
            self._drop_sources(q.call)
        self._drop_sources(self._config_event)
        self.config_vector = VIRTIO_MSI_NO_VECTOR
        self._config_event.drain()
        self.common.reset()
        if self._legacy is not None:
            self._legacy.registers.reset()
        self._isr.reset()
        self._show_intx()

    def _drop_sources(self, event: EventFd) -> None:
        for v in self.msix.vectors:
            if event in v.sources:
                v.sources.remove(event)
                self.msix.update(v)

    def reset(self) -> None:
        """PCI reset: the device, its interrupts and its BARs. The device is at rest, or comes to
        rest in this thread.
        """
        self.device.reset()
        assert not self.device.active
        self._reset_function()

    def function_reset(self) -> None:
        """FLR: as a reset by the driver, which a job completes if the device runs; the PCI side is
        reset at once, so that nothing interrupts any more. A driver takes the function for quiet
        after 100 ms, so the vCPU enters the guest again when the job is done.
        """
        self.device.reset()
        self._reset_function()
        self.common.hold()

    def _reset_function(self) -> None:
        self.msix.reset()
        super().reset()
        self._arrange_legacy()

    def close(self) -> None:
        """Stop the device and release the plumbing. The function is unplugged, or no vCPU runs any
        more. A second call does nothing.
        """
        if self._config_event.closed:
            return
        self.device.shut_down()
        self.device_reset()
        self.msix.reset()
        self._kicks.set_running(False)
        self._set_kicks()
        for region in self.regions():
            region.bus.retire(region)
        self.device.close()
        self._config_event.close()


def virtio_cap(kind: int, bar: int, offset: int, length: int, extra: bytes) -> bytes:
    """struct virtio_pci_cap without its first two bytes (4.1.4)."""
    body = bytes((16 + len(extra), kind, bar, 0, 0, 0))
    return body + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + extra
