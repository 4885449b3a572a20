"""The clock's alarm. Clock and CMOS RAM (MC146818) answer in C (cext/rtc.c)."""

from __future__ import annotations

import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.bus import PIO, Bus, Registers
from pyvmm.spec.platform import PORT_RTC
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Registers of the data sheet, table 3.
ALARM_SECONDS, ALARM_MINUTES, ALARM_HOURS, REG_B = 1, 3, 5, 11
ALARM_ENABLED = 0x20  # in register B
FLAG_ALARM = 0x80 | 0x20  # in register C: the alarm has interrupted
ANY = 0xC0  # an alarm register with these two bits matches every value
DAY = 86400


def matching(register: int, count: int) -> list[int]:
    """The values below ``count`` that an alarm register in BCD matches; none if it holds no
    number.
    """
    if register & ANY == ANY:
        return list(range(count))
    value = (register >> 4) * 10 + (register & 15)
    return [value] if register & 15 < 10 and value < count else []


def next_alarm(now: int, hours: int, minutes: int, seconds: int) -> int | None:
    """The first second after ``now`` (since 1970, UTC) that the alarm registers match; None if no
    second does.
    """
    day, today = now - now % DAY, now % DAY
    for start in (today + 1, 0):  # the rest of today, then tomorrow
        for h in matching(hours, 24):
            for m in matching(minutes, 60) if h >= start // 3600 else ():
                if (h * 60 + m) * 60 + 59 >= start:
                    for s in matching(seconds, 60):
                        if (h * 60 + m) * 60 + s >= start:
                            return day + (h * 60 + m) * 60 + s
        day += DAY
    return None


class Rtc:
    """The clock of a PC, with its alarm.

    :param alarm: called when the alarm comes, by a thread of the clock's own.
    """

    def __init__(self, bus: Bus, alarm: Callable[[], object]) -> None:
        self._alarm = alarm
        self._c = ffi.new("struct pv_rtc *")
        self._changed = threading.Condition()
        self._due: int | None = None
        self._closed = False
        self._thread: Thread | None = None
        region = bus.add(PIO, PORT_RTC, 2, "rtc", self, kind=lib.PV_REGION_RTC, opaque=self._c)
        region.names = Registers({0: "index", 1: "data"})

    def read(self, offset: int, size: int) -> int:
        """Never called: C answers all reads."""
        raise AssertionError

    def write(self, offset: int, size: int, value: int) -> None:
        """The alarm may have changed; C has stored the value."""
        ram = self._c.ram
        due = None
        if ram[REG_B] & ALARM_ENABLED:
            due = next_alarm(
                int(time.time()), ram[ALARM_HOURS], ram[ALARM_MINUTES], ram[ALARM_SECONDS]
            )
        with self._changed:
            self._due = due
            self._changed.notify_all()
            if due is not None and self._thread is None and not self._closed:
                self._thread = Thread(target=self._watch, name="rtc", daemon=True)
                self._thread.start()

    def reset(self) -> None:
        """No alarm, as after power-on; the CMOS RAM has a battery."""
        self._c.ram[REG_B] = 0
        self._c.flags = 0
        with self._changed:
            self._due = None

    def close(self) -> None:
        """End the clock's thread. Nobody may hold a lock that ``alarm`` takes. A second call does
        nothing.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.time()  # the guest reads the same clock, which somebody may set
                if self._due is None or now < self._due:
                    wait = None if self._due is None else min(self._due - now, 1.0)
                    self._changed.wait(wait)
                    continue
                self._due = None
            self._c.flags = FLAG_ALARM
            self._alarm()
            self.write(1, 1, 0)  # the alarm comes again each time the registers match
