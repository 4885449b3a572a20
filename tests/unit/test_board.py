"""The board's devices for clock, power, reset and panic, with usual and with odd accesses."""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.bus import PIO
from pyvmm.devices.legacy import Power, PvPanic
from pyvmm.devices.rtc import FLAG_ALARM, Rtc, next_alarm
from pyvmm.spec import acpi
from pyvmm.spec.platform import (
    ACPI_RESET_VALUE,
    ACPI_S3_TYPE,
    ACPI_S5_TYPE,
    PORT_ACPI_PM1_CONTROL,
    PORT_ACPI_PM1_EVENT,
    PORT_ACPI_PM_TIMER,
    PORT_ACPI_SLEEP_CONTROL,
    PORT_PVPANIC,
)
from tests.pci_guest import Board

SLEEP, STATUS, RESET = (
    PORT_ACPI_SLEEP_CONTROL,
    PORT_ACPI_SLEEP_CONTROL + 1,
    PORT_ACPI_SLEEP_CONTROL + 2,
)
SLP_EN = 1 << 5


class EventBoard(Board):
    """A board that notes what its devices report."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.alarms: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.power: Power


@pytest.fixture
def board() -> Iterator[Any]:
    b = EventBoard()
    with b:
        rtc = Rtc(b.bus, lambda: b.alarms.put(None))
        b.power = Power(
            b.bus,
            lambda: b.events.append("off"),
            lambda: b.events.append("reset"),
            lambda: b.events.append("suspend"),
            lambda level: b.events.append(("sci", level)),
        )
        PvPanic(b.bus, lambda bits: b.events.append(("panic", bits)))
        yield b
        rtc.close()


def cmos(board: Any, index: Any) -> Any:
    board.write(PIO, 0x70, 1, index)
    return board.read(PIO, 0x71, 1)


def bcd(value: Any) -> Any:
    return (value >> 4) * 10 + (value & 15)


def test_the_clock_tells_utc_in_bcd(board: Any) -> None:
    """The test reads the time as Linux' mc146818_get_time() does: again until the seconds have not
    changed meanwhile.
    """
    for _ in range(10):
        second = cmos(board, 0)
        rest = [bcd(cmos(board, i)) for i in (2, 4, 7, 8, 9, 0x32)]
        if cmos(board, 0) == second:
            break
    minute, hour, day, month, year, century = rest
    told = time.strptime(
        f"{century}{year:02}-{month}-{day} {hour}:{minute}:{bcd(second)}", "%Y-%m-%d %H:%M:%S"
    )
    now = time.gmtime()
    assert abs(time.mktime(told) - time.mktime(now)) < 5
    assert cmos(board, 6) == (now.tm_wday + 1) % 7 + 1  # Sunday is 1
    assert cmos(board, 0x0B) & 0x06 == 0x02  # BCD, 24 hours
    assert cmos(board, 0x0C) == 0 and cmos(board, 0x0D) == 0x80


def test_the_clock_says_that_it_is_about_to_change(board: Any) -> None:
    """Software that waits for the update finds it, just before the second changes."""
    while not cmos(board, 0x0A) & 0x80:
        pass
    before = time.time()
    while cmos(board, 0x0A) & 0x80:
        pass
    assert int(time.time()) != int(before)


NOON = 1_000_000_000 - 1_000_000_000 % 86400 + 12 * 3600
ALARMS = {
    (0x12, 0x00, 0x01): 1,
    (0x12, 0x00, 0x00): 86400,
    (0xFF, 0xFF, 0xFF): 1,
    (0xC0, 0xC0, 0x30): 30,
    (0xC0, 0x59, 0x59): 3599,
    (0x11, 0xC0, 0xC0): 23 * 3600,
    (0x24, 0x00, 0x00): None,
    (0xC0, 0x1A, 0x00): None,
}


@pytest.mark.parametrize("registers", ALARMS)
def test_when_the_alarm_comes(registers: tuple[int, int, int]) -> None:
    found = next_alarm(NOON, *registers)
    assert (found - NOON if found is not None else None) == ALARMS[registers]


def test_the_alarm(board: Any) -> None:
    """Each second, once it is switched on; its flags go when they are read; then none any more."""

    def put(index: int, value: int) -> None:
        board.write(PIO, 0x70, 1, index)
        board.write(PIO, 0x71, 1, value)

    for index in (1, 3, 5):
        put(index, 0xC0)
    assert board.alarms.empty() and cmos(board, 0x0B) == 0x02
    put(0x0B, 0x22)
    assert cmos(board, 0x0B) == 0x22
    for _ in range(2):
        board.alarms.get(timeout=60)
        assert cmos(board, 0x0C) == FLAG_ALARM and cmos(board, 0x0C) == 0
    put(1, 0x61)  # no second is the sixty-first
    put(0x0B, 0x02)
    assert cmos(board, 0x0B) == 0x02


def test_cmos_ram_keeps_and_the_nmi_bit_is_no_index(board: Any) -> None:
    board.write(PIO, 0x70, 1, 0x0F)
    board.write(PIO, 0x71, 1, 0xA5)
    assert cmos(board, 0x0F) == 0xA5 and cmos(board, 0x8F) == 0xA5
    assert cmos(board, 0x7F) == 0
    second = cmos(board, 0)
    board.write(PIO, 0x71, 1, 0x99)  # the clock is not set
    assert cmos(board, 0) in (second, second + 1, 0)
    assert board.read(PIO, 0x70, 1) == 0xFF


def test_power_off_by_acpi(board: Any) -> None:
    for value in (0, SLP_EN, SLP_EN | 3 << 2, ACPI_S5_TYPE << 2, ACPI_S3_TYPE << 2):
        board.write(PIO, SLEEP, 1, value)
    assert board.events == []
    board.write(PIO, SLEEP, 1, SLP_EN | ACPI_S5_TYPE << 2)
    assert board.events == ["off"]
    assert board.read(PIO, STATUS, 1) == 0


def test_suspend_by_acpi(board: Any) -> None:
    board.write(PIO, SLEEP, 1, SLP_EN | ACPI_S3_TYPE << 2)
    control = ACPI_S3_TYPE << acpi.PM1_SLP_TYPE_SHIFT
    board.write(PIO, PORT_ACPI_PM1_CONTROL, 2, control)
    board.write(PIO, PORT_ACPI_PM1_CONTROL, 2, control | acpi.PM1_SLP_EN)
    assert board.events == ["suspend", "suspend"]


def test_events_of_acpi(board: Any) -> None:
    """The interrupt is up as long as an event stands that the guest wants."""
    pm1 = board.power.pm1
    status, enable = PORT_ACPI_PM1_EVENT, PORT_ACPI_PM1_EVENT + 2
    pm1.event(acpi.PM1_RTC)
    assert board.read(PIO, status, 2) == acpi.PM1_RTC
    assert board.events == [] and not pm1.wakes
    board.write(PIO, enable, 2, acpi.PM1_RTC)
    assert board.events == [("sci", 1)] and pm1.wakes
    pm1.woken()  # from a sleep, after which the line is down
    assert board.events == [("sci", 1)] * 2
    assert board.read(PIO, status, 4) == acpi.PM1_RTC | acpi.PM1_WAK | acpi.PM1_RTC << 16
    board.write(PIO, status, 2, acpi.PM1_WAK)
    assert board.read(PIO, status, 2) == acpi.PM1_RTC
    board.write(PIO, status, 2, acpi.PM1_RTC)
    assert board.events == [("sci", 1), ("sci", 1), ("sci", 0)]
    assert board.read(PIO, status, 2) == 0


def test_resets(board: Any) -> None:
    board.write(PIO, RESET, 1, ACPI_RESET_VALUE + 1)
    board.write(PIO, 0x64, 1, 0xAE)
    assert board.events == []
    board.write(PIO, RESET, 1, ACPI_RESET_VALUE)
    board.write(PIO, 0x64, 1, 0xFE)
    assert board.events == ["reset", "reset"]
    assert board.read(PIO, 0x64, 1) == 0xFF and board.read(PIO, 0x60, 1) == 0xFF


def test_pvpanic(board: Any) -> None:
    assert board.read(PIO, PORT_PVPANIC, 1) == 3
    board.write(PIO, PORT_PVPANIC, 1, 0xFD)
    assert board.events == [("panic", 1)]


def test_any_access_to_any_port_is_answered(board: Any) -> None:
    rng = random.Random(5)
    ports = [
        *range(0x60, 0x72),
        0x80,
        *range(0x500, 0x510),
        *range(0x5F8, 0x630),
        *range(0xCF0, 0xD00),
    ]
    for _ in range(5000):
        port, size, count = rng.choice(ports), rng.choice([1, 2, 4]), rng.choice([1, 1, 1, 7])
        data = rng.randbytes(size * count) if rng.randrange(2) else None
        assert len(board.access(PIO, port, size, data, count=count)) == size * count


def test_the_clock_needs_no_python(board: Any) -> None:
    """Each access would be a return to Python; a boot of Linux has some 150 of them."""
    before = board.exits
    for index in range(128):
        cmos(board, index)
        board.write(PIO, 0x71, 1, index)
    board.write(PIO, 0x70, 2, 0x2211)  # one byte, whatever the width
    board.write(PIO, 0x71, 1, 0x33)
    assert cmos(board, 0x11) == 0x33 and cmos(board, 0x22) == 0x22
    assert board.read(PIO, 0x70, 2) == 0xFF
    assert board.access(PIO, 0x71, 1, count=3) == bytes([cmos(board, 0x22)] * 3)
    assert board.exits == before


def test_pm1_says_that_acpi_is_on_and_powers_off(board: Any) -> None:
    """ACPI 6.4, 4.8.3: no SMI command switches ACPI on, so it is on."""
    assert board.read(PIO, PORT_ACPI_PM1_CONTROL, 2) == 1
    assert board.read(PIO, PORT_ACPI_PM1_EVENT, 2) == 0
    board.write(PIO, PORT_ACPI_PM1_EVENT, 2, 0xFFFF)
    board.write(PIO, PORT_ACPI_PM1_EVENT + 2, 2, 0x120)
    assert board.read(PIO, PORT_ACPI_PM1_EVENT + 2, 2) == 0x120
    assert board.read(PIO, PORT_ACPI_PM1_EVENT, 4) == 0x120_0000
    for value in (1, 1 << 13, 5 << 10, 4 << 10 | 1 << 13):
        board.write(PIO, PORT_ACPI_PM1_CONTROL, 2, value)
    assert board.events == []
    board.write(PIO, PORT_ACPI_PM1_CONTROL, 2, ACPI_S5_TYPE << 10 | 1 << 13)
    assert board.events == ["off"]


def test_the_acpi_timer_counts_at_its_rate(board: Any) -> None:
    """3.579545 MHz of CLOCK_MONOTONIC, in C."""
    exits = board.exits
    for _ in range(50):
        before = time.monotonic_ns()
        ticks = board.read(PIO, PORT_ACPI_PM_TIMER, 4)
        after = time.monotonic_ns()
        low, high = (ns * 3579545 // 10**9 for ns in (before, after))
        assert ticks - low & 0xFFFFFFFF <= high - low + 1
    assert board.exits == exits
    assert board.read(PIO, PORT_ACPI_PM_TIMER + 2, 2) - (ticks >> 16) & 0xFFFF <= 0x7F
    board.write(PIO, PORT_ACPI_PM_TIMER, 4, 0)
