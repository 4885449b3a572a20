"""The common configuration structure of virtio-pci (virtio 1.2, 4.1.4.3): a table of registers."""

from __future__ import annotations

from pyvmm.bus import Registers
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from pyvmm.virtio.device import Queue, VirtioDevice
else:
    Protocol = object  # `typing` costs as much as all else that a run imports

WORD = 0xFFFFFFFF


class Vectors(Protocol):
    """The MSI-X vectors of a function's events.

    :ivar config_vector: of configuration changes.
    """

    config_vector: int

    def set_config_vector(self, value: int) -> None:
        """The driver chooses the vector of configuration changes."""

    def set_queue_vector(self, q: Queue, value: int) -> None:
        """The driver chooses the vector of a virtqueue."""


class Register:
    """A register: its width in bytes, and what reads and writes it.

    :ivar write: None if the register is read-only.
    """

    __slots__ = ("read", "width", "write")

    def __init__(
        self, width: int, read: Callable[[], int], write: Callable[[int], None] | None = None
    ) -> None:
        self.width, self.read, self.write = width, read, write


class RegisterTable:
    """Registers as the bus sees them, some of which show a selected virtqueue.

    :param names: by offset. :ivar section: of the specification, which has the registers.
    :ivar where: the registers as a whole, in words.
    """

    section, where = "4.1.4.3", "common configuration"

    def __init__(
        self,
        device: VirtioDevice,
        vectors: Vectors,
        names: Mapping[int, str | tuple[str, str]],
        registers: dict[int, Register],
    ) -> None:
        self._device, self._vectors = device, vectors
        self._names, self._registers = names, registers
        self._queue_select = 0

    def reset(self) -> None:
        """The selector after reset."""
        self._queue_select = 0

    def read(self, offset: int, size: int) -> int:
        """A register, or for a driver that reads a 64-bit field at once, two; anything else is
        zero.
        """
        register = self._registers.get(offset)
        if register is None:
            return 0
        if size == 8 and register.width == 4:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        return register.read() if size == register.width else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """As ``read``; read-only registers and odd widths are ignored and counted."""
        register = self._registers.get(offset)
        if register is not None and size == 8 and register.width == 4:
            self.write(offset, 4, value & WORD)
            self.write(offset + 4, 4, value >> 32)
        elif register is None or register.write is None or size != register.width:
            self._refuse(offset, size, value)
        else:
            register.write(value)

    def _refuse(self, offset: int, size: int, value: int) -> None:
        register = self._registers.get(offset)
        name = str(self._names.get(offset, f"{self.where} + {offset:#x}"))
        if register is not None and register.write is None:
            self._device.refuse(name, value, "which is read-only", self.section)
        elif register is not None:
            wrong = f"by {8 * size} bits, not {8 * register.width}"
            self._device.refuse(name, value, wrong, "4.1.3.1")
        else:
            self._device.refuse(name, value, "where no register begins", self.section)

    # --- rows that every table has ----------------------------------------------------------------

    def _selector(self, width: int, name: str) -> Register:
        """A register of this object's own, which selects what others show."""
        return Register(
            width, lambda: int(getattr(self, name)), lambda value: setattr(self, name, value)
        )

    def _selected(self) -> Queue | None:
        queues = self._device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _queue_vector(self) -> int:
        q = self._selected()
        return q.vector if q else VIRTIO_MSI_NO_VECTOR

    def _set_queue_vector(self, value: int) -> None:
        q = self._selected()
        if q:
            self._vectors.set_queue_vector(q, value)


class CommonConfig(RegisterTable):
    """struct virtio_pci_common_cfg. In which status a register may be written is the device's
    business (``VirtioDevice``).
    """

    def __init__(self, device: VirtioDevice, vectors: Vectors) -> None:
        self._device_select = self._driver_select = 0
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
            VIRTIO_PCI_COMMON_Q_SIZE: queue("size"),
            VIRTIO_PCI_COMMON_Q_MSIX: Register(2, self._queue_vector, self._set_queue_vector),
            VIRTIO_PCI_COMMON_Q_ENABLE: queue("enabled"),
            VIRTIO_PCI_COMMON_Q_NOFF: Register(2, lambda: self._queue("index")),
            VIRTIO_PCI_COMMON_Q_DESCLO: half("desc", 0),
            VIRTIO_PCI_COMMON_Q_DESCHI: half("desc", 32),
            VIRTIO_PCI_COMMON_Q_AVAILLO: half("avail", 0),
            VIRTIO_PCI_COMMON_Q_AVAILHI: half("avail", 32),
            VIRTIO_PCI_COMMON_Q_USEDLO: half("used", 0),
            VIRTIO_PCI_COMMON_Q_USEDHI: half("used", 32),
            # NOTIF_CONFIG_DATA is not offered.
            VIRTIO_PCI_COMMON_Q_NDATA: Register(2, lambda: 0),
            VIRTIO_PCI_COMMON_Q_RESET: queue("resetting"),
        }
        super().__init__(device, vectors, COMMON_NAMES, registers)

    # --- rows -------------------------------------------------------------------------------------

    def _queue_register(self, field: str) -> Register:
        """A 16-bit register of the selected virtqueue."""
        return Register(2, lambda: self._queue(field), lambda value: self._set_queue(field, value))

    def _address_half(self, field: str, shift: int) -> Register:
        """Half of a 64-bit address of the selected virtqueue."""

        def write(value: int) -> None:
            rest = self._queue(field) & ~(WORD << shift)
            self._set_queue(field, rest | value << shift)

        return Register(4, lambda: self._queue(field) >> shift & WORD, write)

    def reset(self) -> None:
        """The selectors after reset."""
        super().reset()
        self._device_select = self._driver_select = 0

    # --- features ---------------------------------------------------------------------------------

    def _offered_word(self) -> int:
        select = self._device_select
        return self._device.offered() >> 32 * select & WORD if select < 2 else 0

    def _chosen_word(self) -> int:
        select = self._driver_select
        return self._device.driver_features >> 32 * select & WORD if select < 2 else 0

    def _choose_word(self, value: int) -> None:
        if self._driver_select < 2:
            self._device.set_features(32 * self._driver_select, value)

    # --- the selected virtqueue -------------------------------------------------------------------

    def _queue(self, field: str) -> int:
        q = self._selected()
        return int(getattr(q, field)) if q else 0

    def _set_queue(self, field: str, value: int) -> None:
        self._device.set_queue(self._queue_select, field, value)


class DeviceConfig:
    """The device-specific configuration; a modern driver writes none of it."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        """Any width, any alignment; zero beyond the end."""
        return int.from_bytes(self._device.config_space()[offset : offset + size], "little")

    def field(self, offset: int) -> str:
        """What a write to ``offset`` is called, in the words of messages."""
        name = Registers(self._device.config_names)(offset, True)
        return f"device configuration {name or f'+ {offset:#x}'}"

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignored, counted and told."""
        self._device.refuse(self.field(offset), value, "which is read-only", "5.1.4")
