"""The registers of a virtio device, whatever its transport: a table from offset to what reads and
writes the register, and the rows that several transports have.

In which status a register may be written is the device's business (``VirtioDevice``).
"""

from __future__ import annotations

import threading

from pyvmm.bus import Registers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pyvmm.bus import Bus
    from pyvmm.virtio.device import Queue, VirtioDevice

WORD = 0xFFFFFFFF
#: Words of 32 feature bits that there are; the others read as 0.
FEATURE_WORDS = 4


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

    :param names: by offset. :param bus: keeps a vCPU out of the guest.
    :ivar section: of the specification, which has the registers; :ivar width_section: which has
        their widths. :ivar where: the registers as a whole, in words.
    """

    section, width_section, where = "4.1.4.3", "4.1.3.1", "common configuration"

    def __init__(
        self,
        device: VirtioDevice,
        bus: Bus,
        names: Mapping[int, str | tuple[str, str]],
        registers: dict[int, Register],
    ) -> None:
        self._device, self._bus = device, bus
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
            self._device.refuse(name, value, wrong, self.width_section)
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

    def hold(self) -> None:
        """Keep the vCPU out of the guest until the jobs that the device has posted are done: for
        drivers that do not wait for what they have asked for.
        """
        done = threading.Event()
        if self._device.post("driver that does not wait", done.set) and not done.is_set():
            self._bus.hold(done)


class ModernRegisters(RegisterTable):
    """The rows of the modern interface, over PCI and over MMIO."""

    def __init__(
        self,
        device: VirtioDevice,
        bus: Bus,
        names: Mapping[int, str | tuple[str, str]],
        registers: dict[int, Register],
    ) -> None:
        self._device_select = self._driver_select = 0
        super().__init__(device, bus, names, registers)

    def reset(self) -> None:
        """The selectors after reset."""
        super().reset()
        self._device_select = self._driver_select = 0

    # --- rows -------------------------------------------------------------------------------------

    def _queue_register(self, width: int, field: str) -> Register:
        """A register of the selected virtqueue."""
        return Register(
            width, lambda: self._queue(field), lambda value: self._set_queue(field, value)
        )

    def _address_half(self, field: str, shift: int) -> Register:
        """Half of a 64-bit address of the selected virtqueue."""

        def write(value: int) -> None:
            rest = self._queue(field) & ~(WORD << shift)
            self._set_queue(field, rest | value << shift)

        return Register(4, lambda: self._queue(field) >> shift & WORD, write)

    # --- features ---------------------------------------------------------------------------------

    def _offered_word(self) -> int:
        select = self._device_select
        return self._device.offered() >> 32 * select & WORD if select < FEATURE_WORDS else 0

    def _chosen_word(self) -> int:
        select = self._driver_select
        return self._device.driver_features >> 32 * select & WORD if select < FEATURE_WORDS else 0

    def _choose_word(self, value: int) -> None:
        if self._driver_select < FEATURE_WORDS:
            self._device.set_features(32 * self._driver_select, value)

    # --- the selected virtqueue -------------------------------------------------------------------

    def _queue(self, field: str) -> int:
        q = self._selected()
        return int(getattr(q, field)) if q else 0

    def _set_queue(self, field: str, value: int) -> None:
        self._device.set_queue(self._queue_select, field, value)


class DeviceConfig:
    """The device-specific configuration."""

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
        """The device's to take; else ignored, counted and told."""
        if not self._device.config_written(offset, value.to_bytes(size, "little")):
            self._device.refuse(self.field(offset), value, "which is read-only", "5.1.4")
