"""Finds out that the guest kernel has panicked, and what it wrote.

A kernel reports its panic in two ways: by a line on the console, and, if it has the driver, by a
write to the pvpanic device. After that it reboots, spins, or halts with interrupts off, as its
parameter ``panic=`` says. So a panic may look like a reboot, a hang or a time-out, and this module
calls the end by its right name.
"""

from __future__ import annotations

import threading

from pyvmm.threads import aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.console import Stream
    from pyvmm.outcome import Outcome

PANIC = b"Kernel panic - not syncing"
#: The last line of a kernel that does not reboot (panic=0). It repeats the panic's text.
LAST_LINE = b"---[ end Kernel panic"
LINE_MAX = 1000  # bytes after which the last line counts as complete, although no newline has come
#: Seconds from pvpanic's report to the end of a kernel that does not end itself: it still prints.
PVPANIC_GRACE = 1.0
PANICKED = 1  # event bit of pvpanic (QEMU, docs/specs/pvpanic)
#: Ends that may follow from a panic.
CONSEQUENCES = ("reboot", "poweroff", "triple-fault", "timeout", "hang", "panic")


class PanicWatch:
    """Watches the console and the pvpanic device for a panic.

    :param console: lent; its text is kept and searched.
    :param over: called, by any thread and perhaps more than once, when a kernel has panicked and
        will do nothing more.
    """

    def __init__(self, console: Stream, over: Callable[[], object]) -> None:
        self._console, self._over = console, over
        self._begin = 0  # the console's position at which the present guest began
        self._said = b""  # the end of the console's text, or its unfinished last line
        self._reported = False
        self._timer: threading.Timer | None = None
        console.add_sink(self._look)

    def pvpanic(self, events: int) -> None:
        """The guest has written ``events`` to pvpanic; from a vCPU's thread."""
        if events & PANICKED and not self._reported:
            self._reported = True
            self._timer = threading.Timer(PVPANIC_GRACE, self._over)
            self._timer.daemon = True
            aside(self._timer.start)

    def text(self) -> str:
        """The text of the guest kernel's panic; empty if no panic is known."""
        kept = self._console.text
        begin = max(self._begin - self._console.dropped_text, 0)
        at = kept.rfind(PANIC, begin)
        if kept[max(at - 4, 0) : at] == b"end ":  # the last line repeats the text
            first = kept.rfind(PANIC, begin, at)
            at = first if first >= 0 else at
        if at >= 0:
            end = kept.find(b"\n", at)
            return bytes(kept[at : end if end >= 0 else None]).decode(errors="replace").strip()
        return "reported by pvpanic" if self._reported else ""

    def judge(self, outcome: Outcome) -> None:
        """Change ``outcome`` to a panic, if a panic has led to it. An end with the status of the
        guest's command stays as it is.
        """
        if outcome.kind in CONSEQUENCES and outcome.status is None and (text := self.text()):
            outcome.kind, outcome.detail = "panic", text

    def restart(self) -> None:
        """Another guest begins: forget the panic of the one before. No vCPU may run."""
        self.stop()
        self._reported = False
        self._begin = self._console.written  # the reader may not have come so far yet

    def stop(self) -> None:
        """Do not call ``over`` for pvpanic's report any more. A second call does nothing."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, data: bytes) -> None:
        """The console's sink. After a panic whose kernel prints nothing more, the machine ends now
        and not by its time-out.
        """
        if (before := self._begin - self._console.position) > 0:  # a former guest's words
            self._said, data = b"", data[before:]
        text = self._said + data
        at = text.find(LAST_LINE)
        if at < 0:
            self._said = text[-len(LAST_LINE) :]
        elif b"\n" in text[at:] or len(text) - at > LINE_MAX:
            self._said = b""
            self._over()
        else:
            self._said = text[at:]  # the rest of the line is still to come
