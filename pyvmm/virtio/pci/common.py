"""The common configuration structure of virtio-pci (virtio 1.2, 4.1.4.3): a table of registers."""

from __future__ import annotations

from pyvmm.spec.virtio_pci import (
    COMMON_NAMES,
    VIRTIO_MSI_NO_VECTOR,
    VIRTIO_PCI_COMMON_CFGGENERATION,
    VIRTIO_PCI_COMMON_DF,
    VIRTIO_PCI_COMMON_DFSELECT,
    VIRTIO_PCI_COMMON_GF,
    VIRTIO_PCI_COMMON_GFSELECT,
    VIRTIO_PCI_COMMON_MSIX,
    VIRTIO_PCI_COMMON_NUMQ,
    VIRTIO_PCI_COMMON_Q_AVAILHI,
    VIRTIO_PCI_COMMON_Q_AVAILLO,
    VIRTIO_PCI_COMMON_Q_DESCHI,
    VIRTIO_PCI_COMMON_Q_DESCLO,
    VIRTIO_PCI_COMMON_Q_ENABLE,
    VIRTIO_PCI_COMMON_Q_MSIX,
    VIRTIO_PCI_COMMON_Q_NDATA,
    VIRTIO_PCI_COMMON_Q_NOFF,
    VIRTIO_PCI_COMMON_Q_RESET,
    VIRTIO_PCI_COMMON_Q_SELECT,
    VIRTIO_PCI_COMMON_Q_SIZE,
    VIRTIO_PCI_COMMON_Q_USEDHI,
    VIRTIO_PCI_COMMON_Q_USEDLO,
    VIRTIO_PCI_COMMON_STATUS,
)
from pyvmm.virtio.registers import ModernRegisters, Register, RegisterTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from pyvmm.bus import Bus
    from pyvmm.virtio.device import Queue, VirtioDevice
else:
    Protocol = object  # `typing` costs as much as all else that a run imports


class Vectors(Protocol):
    """The MSI-X vectors of a function's events.

    :ivar config_vector: of configuration changes.
    """

    config_vector: int

    def set_config_vector(self, value: int) -> None:
        """The driver chooses the vector of configuration changes."""

    def set_queue_vector(self, q: Queue, value: int) -> None:
        """The driver chooses the vector of a virtqueue."""


class VectorRows(RegisterTable):
    """The rows that a table of virtio-pci has besides: MSI-X vectors."""

    _vectors: Vectors

    def _queue_vector(self) -> int:
        q = self._selected()
        return q.vector if q else VIRTIO_MSI_NO_VECTOR

    def _set_queue_vector(self, value: int) -> None:
        q = self._selected()
        if q:
            self._vectors.set_queue_vector(q, value)


class CommonConfig(VectorRows, ModernRegisters):
    """struct virtio_pci_common_cfg."""

    def __init__(self, device: VirtioDevice, vectors: Vectors, bus: Bus) -> None:
        self._vectors = vectors
        queue, half, selector = self._queue_register, self._address_half, self._selector
        registers = {
            VIRTIO_PCI_COMMON_DFSELECT: selector(4, "_device_select"),
            VIRTIO_PCI_COMMON_DF: Register(4, self._offered_word),
            VIRTIO_PCI_COMMON_GFSELECT: selector(4, "_driver_select"),
            VIRTIO_PCI_COMMON_GF: Register(4, self._chosen_word, self._choose_word),
            VIRTIO_PCI_COMMON_MSIX: Register(
                2, lambda: vectors.config_vector, vectors.set_config_vector
            ),
            VIRTIO_PCI_COMMON_NUMQ: Register(2, lambda: len(device.queues)),
            VIRTIO_PCI_COMMON_STATUS: Register(1, lambda: device.status, device.set_status),
            VIRTIO_PCI_COMMON_CFGGENERATION: Register(1, lambda: device.generation),
            VIRTIO_PCI_COMMON_Q_SELECT: selector(2, "_queue_select"),
            VIRTIO_PCI_COMMON_Q_SIZE: queue(2, "size"),
            VIRTIO_PCI_COMMON_Q_MSIX: Register(2, self._queue_vector, self._set_queue_vector),
            VIRTIO_PCI_COMMON_Q_ENABLE: queue(2, "enabled"),
            VIRTIO_PCI_COMMON_Q_NOFF: Register(2, lambda: self._queue("index")),
            VIRTIO_PCI_COMMON_Q_DESCLO: half("desc", 0),
            VIRTIO_PCI_COMMON_Q_DESCHI: half("desc", 32),
            VIRTIO_PCI_COMMON_Q_AVAILLO: half("avail", 0),
            VIRTIO_PCI_COMMON_Q_AVAILHI: half("avail", 32),
            VIRTIO_PCI_COMMON_Q_USEDLO: half("used", 0),
            VIRTIO_PCI_COMMON_Q_USEDHI: half("used", 32),
            # NOTIF_CONFIG_DATA is not offered.
            VIRTIO_PCI_COMMON_Q_NDATA: Register(2, lambda: 0),
            VIRTIO_PCI_COMMON_Q_RESET: queue(2, "resetting"),
        }
        super().__init__(device, bus, COMMON_NAMES, registers)
