"""Clock, power, reset and panic: devices of the board that are too small for files of their own."""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.bus import PIO, Bus, Registers
from pyvmm.spec import acpi
from pyvmm.spec.platform import (
    ACPI_RESET_VALUE,
    ACPI_S5_TYPE,
    PORT_ACPI_PM1_EVENT,
    PORT_ACPI_PM_TIMER,
    PORT_ACPI_SLEEP_CONTROL,
    PORT_I8042,
    PORT_POST,
    PORT_PVPANIC,
    PORT_RTC,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


#: The bits of the PM1 control register that make the machine sleep, and the value that powers off.
PM1_SLEEP = acpi.PM1_SLP_EN | 7 << acpi.PM1_SLP_TYPE_SHIFT
PM1_OFF = acpi.PM1_SLP_EN | ACPI_S5_TYPE << acpi.PM1_SLP_TYPE_SHIFT


class Rtc:
    """MC146818 clock and CMOS RAM, which answer in C (cext/rtc.c)."""

    def __init__(self, bus: Bus) -> None:
        region = bus.add(
            PIO, PORT_RTC, 2, "rtc", kind=lib.PV_REGION_RTC, opaque=ffi.new("struct pv_rtc *")
        )
        region.names = Registers({0: "index", 1: "data"})


class Power:
    """The ACPI sleep control and reset registers (ACPI 6.4, 4.8.3.6 and 4.8.3.7), the keyboard
    controller, and the POST port, which ignores all writes.

    :param on_off: called when the guest powers off.
    :param on_reset: called when the guest asks for a reset.
    """

    SLP_EN = 1 << 5

    def __init__(
        self, bus: Bus, on_off: Callable[[], object], on_reset: Callable[[], object]
    ) -> None:
        self._on_off, self._on_reset = on_off, on_reset
        power = bus.add(PIO, PORT_ACPI_SLEEP_CONTROL, 3, "acpi-power", self)
        power.names = Registers({0: "sleep control", 1: "sleep status", 2: "reset"})
        pm1 = bus.add(PIO, PORT_ACPI_PM1_EVENT, 6, "acpi-pm1", Pm1(on_off))
        pm1.names = Registers({0: "status", 2: "enable", 4: "control"})
        timer = bus.add(PIO, PORT_ACPI_PM_TIMER, 4, "acpi-timer", kind=lib.PV_REGION_PMTIMER)
        timer.names = Registers({0: "value"})
        keyboard = bus.add(PIO, PORT_I8042, 5, "i8042", Keyboard(on_reset))
        keyboard.names = Registers({0: "data", 1: "", 4: ("status", "command")})
        bus.add(PIO, PORT_POST, 1, "post", kind=lib.PV_REGION_IGNORE)

    def read(self, offset: int, size: int) -> int:
        """All registers read as zero: the sleep status never has anything to report."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Offset 0 is sleep control, offset 2 is the reset register."""
        if offset == 0 and value & self.SLP_EN and value >> 2 & 7 == ACPI_S5_TYPE:
            self._on_off()
        elif offset == 2 and value == ACPI_RESET_VALUE:
            self._on_reset()


class Pm1:
    """The PM1 event and control registers of ACPI hardware that is not reduced (ACPI 6.4, 4.8.3).
    No event ever happens: the power button is a device of its own.
    """

    def __init__(self, on_off: Callable[[], object]) -> None:
        self._on_off = on_off
        self._enable = 0

    def read(self, offset: int, size: int) -> int:
        """Status, enable, and the control register, which says that ACPI is on."""
        return (self._enable << 16 | acpi.PM1_SCI_EN << 32) >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the enable bits, or power off."""
        if offset == 2:
            self._enable = value & 0xFFFF
        elif offset == 4 and value & PM1_SLEEP == PM1_OFF:
            self._on_off()


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
