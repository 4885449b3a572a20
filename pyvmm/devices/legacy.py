"""Clock, reset, power and panic: the board's devices that are too small for a file each."""

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
    """MC146818 clock and CMOS RAM, as much as Linux reads at boot: UTC in BCD, no alarms, never
    busy.

    Answering with all ones instead would stall Linux' rtc_cmos for 10 s waiting for "update in
    progress" to clear.
    """

    REG_A = 0x26  # 32.768 kHz, 1024 Hz rate, UIP 0
    REG_B = 0x02  # BCD, 24 hours
    REG_D = 0x80  # battery good

    def __init__(self, bus: Bus) -> None:
        self._index = 0
        self._ram = bytearray(128)
        bus.add(PIO, PORT_RTC, 2, "rtc", self).names = Registers({0: "index", 1: "data"})

    def read(self, offset: int, size: int) -> int:
        """Port 0x70 reads as ones; 0x71 is the register selected."""
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
        """0x70 selects (bit 7 masks NMI), 0x71 stores into CMOS RAM; the clock cannot be set."""
        if offset == 0:
            self._index = value & 0x7F
        else:
            self._ram[self._index] = value & 0xFF


class Power:
    """ACPI sleep control and reset register (ACPI 6.4, 4.8.3.6 and 4.8.3.7), and the keyboard
    controller's reset.

    :param on_off: the guest powered off. :param on_reset: it asked for a reset.
    """

    SLP_EN = 1 << 5

    def __init__(self, bus: Bus, on_off: Callable[[], None], on_reset: Callable[[], None]) -> None:
        self._on_off, self._on_reset = on_off, on_reset
        power = bus.add(PIO, PORT_ACPI_SLEEP_CONTROL, 3, "acpi-power", self)
        power.names = Registers({0: "sleep control", 1: "sleep status", 2: "reset"})
        keyboard = bus.add(PIO, PORT_I8042, 5, "i8042", Keyboard(on_reset))
        keyboard.names = Registers({0: "data", 1: "", 4: ("status", "command")})
        bus.add(PIO, PORT_POST, 1, "post", kind=lib.PV_REGION_IGNORE)

    def read(self, offset: int, size: int) -> int:
        """Nothing is ever pending."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Sleep control at 0, reset at 2."""
        if offset == 0 and value & self.SLP_EN and value >> 2 & 7 == ACPI_S5_TYPE:
            self._on_off()
        elif offset == 2 and value == ACPI_RESET_VALUE:
            self._on_reset()


class Keyboard:
    """Ports 0x60..0x64 of a keyboard controller without keyboard: command 0xFE pulses the reset
    line.

    Port 0x61 lies between and belongs to KVM's PIT, which answers it before we are asked.
    """

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """Absent: all ones; Linux gives up on it."""
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """0x64: commands."""
        if offset == 4 and value & 0xFF == 0xFE:
            self._on_reset()


class PvPanic:
    """QEMU's pvpanic ISA device (docs/specs/pvpanic): the guest kernel says that it panicked.

    :param on_panic: called with the event bits, 1 panicked, 2 crash kernel loaded.
    """

    EVENTS = 0x3

    def __init__(self, bus: Bus, on_panic: Callable[[int], None]) -> None:
        self._on_panic = on_panic
        bus.add(PIO, PORT_PVPANIC, 1, "pvpanic", self)

    def read(self, offset: int, size: int) -> int:
        """The events understood."""
        return self.EVENTS

    def write(self, offset: int, size: int, value: int) -> None:
        """An event."""
        self._on_panic(value & self.EVENTS)
