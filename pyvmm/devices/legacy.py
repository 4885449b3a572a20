"""Clock, power, reset and panic: devices of the board that are too small for files of their own."""

from __future__ import annotations

import time

from pyvmm._ext import lib
from pyvmm.bus import PIO, Bus, Registers
from pyvmm.spec.platform import (
    ACPI_RESET_VALUE,
    ACPI_S5_TYPE,
    PORT_ACPI_SLEEP_CONTROL,
    PORT_I8042,
    PORT_POST,
    PORT_PVPANIC,
    PORT_RTC,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Rtc:
    """The parts of an MC146818 clock with CMOS RAM that Linux reads at boot: the time, UTC in BCD.
    There are no alarms, and the clock is never busy.

    Without the device, Linux' rtc_cmos would read all ones and wait 10 s for the bit "update in
    progress" to clear.
    """

    REG_A = 0x26  # 32.768 kHz, rate 1024 Hz, no update in progress
    REG_B = 0x02  # BCD, 24 hours
    REG_D = 0x80  # battery good

    def __init__(self, bus: Bus) -> None:
        self._index = 0
        self._ram = bytearray(128)
        bus.add(PIO, PORT_RTC, 2, "rtc", self).names = Registers({0: "index", 1: "data"})

    def read(self, offset: int, size: int) -> int:
        """Port 0x70 reads as all ones, port 0x71 as the selected register."""
        if offset == 0:
            return 0xFF
        now = time.gmtime()
        values = {
            0: now.tm_sec,
            2: now.tm_min,
            4: now.tm_hour,
            6: (now.tm_wday + 1) % 7 + 1,
            7: now.tm_mday,
            8: now.tm_mon,
            9: now.tm_year % 100,
            0x32: now.tm_year // 100,
        }
        if self._index in values:
            value = values[self._index]
            return value // 10 << 4 | value % 10
        fixed = {0xA: self.REG_A, 0xB: self.REG_B, 0xC: 0, 0xD: self.REG_D}
        return fixed.get(self._index, self._ram[self._index])

    def write(self, offset: int, size: int, value: int) -> None:
        """Port 0x70 selects a register (bit 7, which masks NMIs, is ignored); port 0x71 stores into
        CMOS RAM. The guest cannot set the clock.
        """
        if offset == 0:
            self._index = value & 0x7F
        else:
            self._ram[self._index] = value & 0xFF


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
