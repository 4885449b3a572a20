"""The legacy interface of a transitional device: BAR 0, in I/O space (virtio 1.2, 4.1.4.10).

Which register may be written when is the device's business (``VirtioDevice``), as with the common
configuration. Legacy drivers do not wait for what they ask for: they read the status once after a
reset, or not at all, and then use their memory for something else. So the vCPU that resets the
device, or lets go of a virtqueue, enters the guest again only when that is done.
"""

from __future__ import annotations

from pyvmm._ext import lib
from pyvmm.bus import PIO, Bus, Registers
from pyvmm.pci import Bar
from pyvmm.spec.virtio_pci import (
    LEGACY_NAMES,
    VIRTIO_MSI_CONFIG_VECTOR,
    VIRTIO_MSI_QUEUE_VECTOR,
    VIRTIO_PCI_GUEST_FEATURES,
    VIRTIO_PCI_HOST_FEATURES,
    VIRTIO_PCI_ISR,
    VIRTIO_PCI_QUEUE_NOTIFY,
    VIRTIO_PCI_QUEUE_NUM,
    VIRTIO_PCI_QUEUE_PFN,
    VIRTIO_PCI_QUEUE_SEL,
    VIRTIO_PCI_STATUS,
)
from pyvmm.virtio.pci.common import VectorRows
from pyvmm.virtio.registers import DeviceConfig, Register

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.bus import Region
    from pyvmm.virtio.device import VirtioDevice
    from pyvmm.virtio.kicks import Kicks
    from pyvmm.virtio.pci.common import Vectors

BAR_SIZE = 64
#: Bytes of the device configuration that fit behind the MSI-X vectors.
CONFIG_SIZE = BAR_SIZE - VIRTIO_MSI_QUEUE_VECTOR - 2


class LegacyRegisters(VectorRows):
    """The registers but the notification and the ISR, which C answers.

    :param bus: keeps a vCPU out of the guest.
    """

    section, where = "4.1.4.10", "legacy registers"

    def __init__(self, device: VirtioDevice, vectors: Vectors, bus: Bus) -> None:
        self._vectors = vectors
        super().__init__(
            device,
            bus,
            LEGACY_NAMES,
            {
                VIRTIO_PCI_HOST_FEATURES: Register(4, device.legacy_features),
                VIRTIO_PCI_GUEST_FEATURES: Register(
                    4, lambda: device.driver_features & 0xFFFF_FFFF, device.set_legacy_features
                ),
                VIRTIO_PCI_QUEUE_PFN: Register(
                    4, lambda: device.legacy_queue(self._queue_select), self._set_queue
                ),
                VIRTIO_PCI_QUEUE_NUM: Register(2, self._queue_size),
                VIRTIO_PCI_QUEUE_SEL: self._selector(2, "_queue_select"),
                VIRTIO_PCI_STATUS: Register(1, lambda: device.status, self._set_status),
                VIRTIO_MSI_CONFIG_VECTOR: Register(
                    2, lambda: vectors.config_vector, vectors.set_config_vector
                ),
                VIRTIO_MSI_QUEUE_VECTOR: Register(2, self._queue_vector, self._set_queue_vector),
            },
        )

    def _queue_size(self) -> int:
        """0 for a virtqueue that does not exist."""
        q = self._selected()
        return q.max_size if q else 0

    def _set_status(self, value: int) -> None:
        self._device.set_legacy_status(value)
        if value == 0:
            self.hold()

    def _set_queue(self, page: int) -> None:
        self._device.set_legacy_queue(self._queue_select, page)
        if page == 0:
            self.hold()


class _Part:
    """Some of the registers, from ``start`` on, as a region of its own."""

    def __init__(self, registers: LegacyRegisters, start: int) -> None:
        self._registers, self._start = registers, start

    def read(self, offset: int, size: int) -> int:
        """As ``RegisterTable.read``."""
        return self._registers.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """As ``RegisterTable.write``."""
        self._registers.write(self._start + offset, size, value)


class _Config(DeviceConfig):
    """The device-specific configuration, of which a legacy driver may write some."""

    def write(self, offset: int, size: int, value: int) -> None:
        """As the device allows it."""
        data = value.to_bytes(size, "little")
        self._device.write_legacy_config(self.field(offset), offset, data)


class LegacyBar(Bar):
    """BAR 0 of a transitional device.

    While MSI-X is enabled, two vectors precede the device configuration. So the regions behind the
    BAR change, and the ledger and a trace tell the registers apart.

    :param isr: ``struct pv_intx *``, lent. :param kicks: lent.
    """

    __slots__ = ("_always", "_config", "_vectors", "kicks", "registers")

    def __init__(
        self, bus: Bus, device: VirtioDevice, vectors: Vectors, isr: Any, kicks: Kicks
    ) -> None:
        super().__init__(BAR_SIZE, io=True)
        name = device.name
        self.registers = registers = LegacyRegisters(device, vectors, bus)

        def part(start: int, length: int) -> Region:
            region = bus.region(PIO, length, f"{name} legacy", _Part(registers, start))
            region.names = Registers(
                {at - start: text for at, text in LEGACY_NAMES.items() if at >= start}
            )
            return region

        self.kicks = kicks.by_value(bus, PIO, 2)
        isr_region = bus.region(PIO, 1, f"{name} isr", kind=lib.PV_REGION_ISR, opaque=isr)
        self._always = [
            (0, part(0, VIRTIO_PCI_QUEUE_NOTIFY)),
            (VIRTIO_PCI_QUEUE_NOTIFY, self.kicks),
            (VIRTIO_PCI_STATUS, part(VIRTIO_PCI_STATUS, 1)),
            (VIRTIO_PCI_ISR, isr_region),
        ]
        self._vectors = part(VIRTIO_MSI_CONFIG_VECTOR, 4)
        self._config = bus.region(PIO, CONFIG_SIZE, f"{name} legacy config", _Config(device))
        self._config.names = Registers(device.config_names)
        self.arrange(msix=False)

    def arrange(self, *, msix: bool) -> None:
        """Show the registers as they are with MSI-X enabled, or without."""
        if msix:
            parts = [
                *self._always,
                (VIRTIO_MSI_CONFIG_VECTOR, self._vectors),
                (VIRTIO_MSI_QUEUE_VECTOR + 2, self._config),
            ]
        else:
            parts = [*self._always, (VIRTIO_MSI_CONFIG_VECTOR, self._config)]
        if parts != self.parts:
            base = self.base
            self.move(None)
            self.parts = parts
            self.move(base)

    def regions(self) -> list[Region]:
        """All regions, also those that are not shown now."""
        return [*(region for _, region in self._always), self._vectors, self._config]
