"""Power, reset and panic: devices of the board that are too small for files of their own."""

from __future__ import annotations

from pyvmm._ext import lib
from pyvmm.bus import PIO, Bus, Registers
from pyvmm.spec import acpi
from pyvmm.spec.platform import (
    ACPI_RESET_VALUE,
    ACPI_S3_TYPE,
    ACPI_S5_TYPE,
    PORT_ACPI_GPE0,
    PORT_ACPI_PM1_EVENT,
    PORT_ACPI_PM_TIMER,
    PORT_ACPI_SLEEP_CONTROL,
    PORT_I8042,
    PORT_POST,
    PORT_PVPANIC,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Power:
    """The ACPI sleep control and reset registers (ACPI 6.4, 4.8.3.6 and 4.8.3.7), the PM1
    and GPE0 registers, the PM timer, the keyboard controller, and the POST port, which ignores all
    writes.

    :param on_off: called when the guest powers off.
    :param on_reset: called when the guest asks for a reset.
    :param on_suspend: called when the guest suspends to memory (S3).
    :param sci: sets the level of the system control interrupt, 0 or 1.
    :ivar pm1: the PM1 registers. :ivar gpe0: the GPE0 registers.
    """

    SLP_EN = 1 << 5

    def __init__(
        self,
        bus: Bus,
        on_off: Callable[[], object],
        on_reset: Callable[[], object],
        on_suspend: Callable[[], object],
        sci: Callable[[int], object],
    ) -> None:
        self._sleeps = {ACPI_S5_TYPE: on_off, ACPI_S3_TYPE: on_suspend}
        self._on_reset = on_reset
        power = bus.add(PIO, PORT_ACPI_SLEEP_CONTROL, 3, "acpi-power", self)
        power.names = Registers({0: "sleep control", 1: "sleep status", 2: "reset"})
        self._sci = Sci(sci)
        self.pm1 = Pm1(self.sleep, lambda level: self._sci.drive("pm1", level))
        pm1 = bus.add(PIO, PORT_ACPI_PM1_EVENT, 6, "acpi-pm1", self.pm1)
        pm1.names = Registers({0: "status", 2: "enable", 4: "control"})
        self.gpe0 = Gpe(lambda level: self._sci.drive("gpe0", level))
        gpe0 = bus.add(PIO, PORT_ACPI_GPE0, 2, "acpi-gpe0", self.gpe0)
        gpe0.names = Registers({0: "status", 1: "enable"})
        timer = bus.add(PIO, PORT_ACPI_PM_TIMER, 4, "acpi-timer", kind=lib.PV_REGION_PMTIMER)
        timer.names = Registers({0: "value"})
        keyboard = bus.add(PIO, PORT_I8042, 5, "i8042", Keyboard(on_reset))
        keyboard.names = Registers({0: "data", 1: "", 4: ("status", "command")})
        bus.add(PIO, PORT_POST, 1, "post", kind=lib.PV_REGION_IGNORE)

    def reset(self) -> None:
        """As after power-on, with interrupt controllers that were reset."""
        self._sci.reset()
        self.pm1.reset()
        self.gpe0.reset()

    def woken(self) -> None:
        """The machine wakes up from a sleep, with interrupt controllers that were reset."""
        self._sci.reset()
        self.gpe0.woken()
        self.pm1.woken()

    def sleep(self, kind: int) -> None:
        """Enter the sleep state whose SLP_TYP this is. Other types do nothing."""
        self._sleeps.get(kind, lambda: None)()

    def read(self, offset: int, size: int) -> int:
        """All registers read as zero: the sleep status never has anything to report."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Offset 0 is sleep control, offset 2 is the reset register."""
        if offset == 0 and value & self.SLP_EN:
            self.sleep(value >> 2 & 7)
        elif offset == 2 and value == ACPI_RESET_VALUE:
            self._on_reset()


class Sci:
    """The system control interrupt, whose line is high while PM1 or GPE0 wants it.

    :param line: sets the line's level, 0 or 1.
    """

    def __init__(self, line: Callable[[int], object]) -> None:
        self._line = line
        self._high: set[str] = set()

    def drive(self, source: str, level: int) -> None:
        """``source`` wants this level."""
        if level:
            self._high.add(source)
        else:
            self._high.discard(source)
        self._line(int(bool(self._high)))

    def reset(self) -> None:
        """The line has gone down, because the interrupt controllers were reset."""
        self._high.clear()


class Gpe:
    """The general-purpose event block GPE0 (ACPI 6.4, 4.8.4.1): one byte of status and one of
    enable bits. The machine's I/O lock is held in every method.

    :param sci: sets the level that the block wants of the system control interrupt, 0 or 1.
    """

    def __init__(self, sci: Callable[[int], object]) -> None:
        self._sci = sci
        self._status = self._enable = self._level = 0

    def event(self, bit: int) -> None:
        """Event number ``bit`` has come, which the guest hears of now, or once it wants to."""
        self._status |= 1 << bit
        self._update()

    def woken(self) -> None:
        """The machine wakes up from a sleep, with interrupt controllers that were reset."""
        self._level = 0
        self._update()

    def reset(self) -> None:
        """As after power-on."""
        self._status = self._enable = self._level = 0

    def _update(self) -> None:
        level = int(bool(self._status & self._enable))
        if level != self._level:
            self._level = level
            self._sci(level)

    def read(self, offset: int, size: int) -> int:
        """Status and enable."""
        return (self._status | self._enable << 8) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear status bits, or take the enable bits."""
        if offset == 0:
            self._status &= ~value
        if offset + size == 2:
            self._enable = value >> 8 * (size - 1) & 0xFF
        self._update()


class Pm1:
    """The PM1 event and control registers of ACPI hardware that is not reduced (ACPI 6.4, 4.8.3).
    The events are the clock's alarm and the end of a sleep: the power button is a device of its
    own. The machine's I/O lock is held in every method.

    :param sleep: called with SLP_TYP when the guest sets SLP_EN.
    :param sci: sets the level of the system control interrupt, 0 or 1.
    """

    def __init__(self, sleep: Callable[[int], object], sci: Callable[[int], object]) -> None:
        self._sleep, self._sci = sleep, sci
        self._status = self._enable = self._level = 0

    @property
    def wakes(self) -> bool:
        """Whether an event has come that ends a sleep."""
        return bool(self._status & self._enable)

    def event(self, bit: int) -> None:
        """An event has come: set its status bit, and the interrupt if the guest wants it."""
        self._status |= bit
        self._update()

    def woken(self) -> None:
        """The machine wakes up from a sleep, with interrupt controllers that were reset."""
        self._level = 0
        self.event(acpi.PM1_WAK)

    def reset(self) -> None:
        """As after power-on."""
        self._status = self._enable = self._level = 0

    def _update(self) -> None:
        level = int(self.wakes)
        if level != self._level:
            self._level = level
            self._sci(level)

    def read(self, offset: int, size: int) -> int:
        """Status, enable, and the control register, which says that ACPI is on."""
        value: int = self._status | self._enable << 16 | acpi.PM1_SCI_EN << 32
        return value >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Clear status bits, take the enable bits, or go to sleep."""
        if offset < 2:
            self._status &= ~(value << 8 * offset)
            if offset == 0 and size == 4:
                self._enable = value >> 16
        elif offset == 2:
            self._enable = value & 0xFFFF
        elif offset == 4 and value & acpi.PM1_SLP_EN:
            self._sleep(value >> acpi.PM1_SLP_TYPE_SHIFT & 7)
        self._update()


class Keyboard:
    """Ports 0x60 to 0x64 of a keyboard controller without a keyboard. It knows one command: 0xFE,
    which pulses the reset line.

    Port 0x61 belongs to KVM's PIT. KVM answers it, so accesses to it never come here.
    """

    def __init__(self, on_reset: Callable[[], object]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """All ones, as without a controller, so that Linux stops looking for a keyboard."""
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 0x64 takes commands; all but 0xFE are ignored."""
        if offset == 4 and value & 0xFF == 0xFE:
            self._on_reset()


class PvPanic:
    """QEMU's pvpanic ISA device (docs/specs/pvpanic.rst in QEMU), by which the guest kernel says
    that it has panicked.

    :param on_panic: called with the event bits: 1, the kernel has panicked; 2, it starts a crash
        kernel.
    """

    EVENTS = 0x3

    def __init__(self, bus: Bus, on_panic: Callable[[int], None]) -> None:
        self._on_panic = on_panic
        bus.add(PIO, PORT_PVPANIC, 1, "pvpanic", self)

    def read(self, offset: int, size: int) -> int:
        """The event bits that the device understands."""
        return self.EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        """Report an event."""
        self._on_panic(value & self.EVENTS)
