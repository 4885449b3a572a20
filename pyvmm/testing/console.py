"""What the console of a Linux guest tells about its state: panic, oops, warnings, stalls, and how
far the boot has come.

The patterns are the kernel's own words (kernel/panic.c, lib/bug.c, arch/x86/mm/fault.c,
kernel/rcu/tree_stall.h, kernel/locking/lockdep.c), Linux 5.10 to 6.15.
"""

from __future__ import annotations

import re
import time

from pyvmm.testing.points import STAMP
from pyvmm.testing.verdict import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal

    Phase = Literal["no-output", "kernel", "init", "command", "end"]

#: Kind -> the beginning of a report's first line, after the time stamp. They are tried in this
#: order, because lockdep's reports begin like warnings.
TROUBLES = {
    "lockdep": r"WARNING: (?:possible (?:circular|recursive|irq lock inversion)|"
    r"inconsistent lock state|bad unlock balance|"
    r"suspicious RCU usage|held lock freed|Nested lock|lock held when returning|\S*-safe -> )|"
    r"DEBUG_LOCKS_WARN_ON|INFO: trying to register non-static key",
    "rcu-stall": r"rcu: INFO: \S+ (?:self-)?detected (?:expedited )?stall|"
    r"INFO: rcu_\S+ (?:self-)?detected (?:expedited )?stall|"
    r"rcu: INFO: \S+ detected stalls",
    "oops": r"Oops: |BUG: unable to handle|BUG: kernel NULL pointer|general protection fault|"
    r"Internal error: ",
    "bug": r"kernel BUG at |BUG: |UBSAN: ",
    "warning": r"WARNING: (?:CPU: \d+ PID: \d+ at |\S+:\d+ at )",
}
PANIC = "Kernel panic - not syncing"
QUOTE_MAX = 60  # the most lines of a call trace
END = re.compile(r"---\[ end (?:trace|Kernel panic)")
#: Matches the first line of a report that ends in a panic: its call trace tells more than the
#: trace of the panic.
CAUSE = re.compile("|".join((TROUBLES["oops"], TROUBLES["bug"])))
OFFSET = re.compile(r"Kernel Offset: (0x[0-9a-f]+) from 0x")


class Trouble:
    """One report of the kernel.

    :ivar kind: key of TROUBLES.
    :ivar lines: its first lines, without time stamps.
    """

    __slots__ = ("kind", "lines")

    def __init__(self, kind: str, lines: list[str]) -> None:
        self.kind, self.lines = kind, lines

    @property
    def message(self) -> str:
        """The first line of the report."""
        return self.lines[0]


def headline(first: Trouble, count: int) -> str:
    """What the kernel reported, in one line without its own words.

    :param first: the first of ``count`` reports.
    """
    return f"the guest kernel reported {first.kind}" + (f" and {count - 1} more" * (count > 1))


def parse_kinds(text: str) -> list[str]:
    """The kinds that ``text`` names, joined by commas; ``all`` stands for all kinds.

    :raises ValueError: a kind is unknown; the error's text is this kind.
    """
    kinds = [k.strip() for k in text.split(",") if k.strip()]
    for kind in kinds:
        if kind not in TROUBLES and kind != "all":
            raise ValueError(kind)
    return list(TROUBLES) if "all" in kinds else kinds


class Watch:
    """A sink of the console that keeps the reports of some kinds. It works line by line, however
    much output comes.

    :param kinds: of TROUBLES.
    :ivar troubles: the first ``MAX`` reports, in order.
    :ivar count: how many reports there were.
    """

    MAX = 20

    def __init__(self, kinds: list[str]) -> None:
        self._rules = [(kind, re.compile(TROUBLES[kind])) for kind in TROUBLES]
        self._kinds = set(kinds)
        self._rest = b""
        self._open: Trouble | None = None
        self.troubles: list[Trouble] = []
        self.count = 0

    def __call__(self, data: bytes) -> None:
        """Take the next piece of the console."""
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-4096:]  # not all of a line that never ends is kept
        for line in lines:
            self._line(line)

    def finish(self) -> None:
        """Take the last line, if the console has ended within it."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""

    def _line(self, raw: bytes) -> None:
        text = STAMP.sub("", clean(raw.decode(errors="replace")))
        trouble = self._open
        if trouble is not None:
            trouble.lines.append(text)
            if END.search(text) or len(trouble.lines) >= QUOTE_MAX:
                self._open = None
        kind = next((kind for kind, rule in self._rules if rule.match(text)), None)
        if (
            kind is None
            or kind not in self._kinds
            or (trouble is not None and self._open is not None and kind == "oops")
        ):
            return  # an oops has two such lines, and the first one counts
        self.count += 1
        if len(self.troubles) < self.MAX:
            self._open = Trouble(kind, [text])
            self.troubles.append(self._open)


def panic_quote(console: bytes | bytearray) -> list[str]:
    """The last panic in a console, with the call trace that belongs to it; empty if there is none.

    An oops or a BUG that led to the panic comes before the panic's own line and has the trace.
    Without it the trace follows the panic's line.
    """
    text = bytes(console[-(1 << 16) :]).decode(errors="replace")
    lines = [STAMP.sub("", clean(line)) for line in text.splitlines()]
    at = next(
        (
            i
            for i in range(len(lines) - 1, -1, -1)
            if PANIC in lines[i] and "end Kernel" not in lines[i]
        ),
        None,
    )
    if at is None:
        return []
    first = at
    for i in range(at - 1, max(at - QUOTE_MAX, -1), -1):
        if CAUSE.match(lines[i]):
            first = i
    last = at
    while last + 1 < len(lines) and last - at < QUOTE_MAX and "end Kernel panic" not in lines[last]:
        last += 1
    return lines[first : last + 1]


def offset(console: bytes | bytearray) -> int:
    """The distance in bytes by which KASLR has moved the kernel, if a panic reports it; else 0."""
    match = OFFSET.search(bytes(console[-(1 << 16) :]).decode(errors="replace"))
    return int(match[1], 16) if match else 0


#: How far a guest has come -> words for people.
PHASES: dict[Phase, str] = {
    "no-output": "before there was any output",
    "kernel": "while the kernel booted",
    "init": "in init, before the command",
    "command": "while the command ran",
    "end": "after the command's end",
}


def phase(phases: Mapping[str, int], said: bool) -> Phase:
    """How far a guest has come, a key of PHASES.

    :param phases: ``Machine.phases``.
    :param said: whether the console has shown any text.
    """
    steps: tuple[tuple[str, Phase], ...] = (
        ("command_end", "end"),
        ("command", "command"),
        ("init", "init"),
    )
    for event, name in steps:
        if event in phases:
            return name
    return "kernel" if said else "no-output"


class Log:
    """A sink of the console that writes each line with the seconds since the start: ``[ 12.345678]
    text``.

    :param write: takes the bytes. Its errors are raised unchanged.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._begin = time.monotonic()
        self._at_start = True

    def __call__(self, data: bytes) -> None:
        """Take the next piece. The time of a line is the time of its first byte."""
        stamp = b"[%12.6f] " % (time.monotonic() - self._begin)
        out = bytearray()
        for line in data.replace(b"\r\n", b"\n").splitlines(keepends=True):
            if self._at_start:
                out += stamp
            out += line
            self._at_start = line.endswith(b"\n")
        self._write(bytes(out))

    def note(self, text: str) -> None:
        """Write a line of pyvmm's own, after the console's present line."""
        stamp = time.monotonic() - self._begin
        self._write(
            b"%s[%12.6f] pyvmm: %s\n" % (b"" if self._at_start else b"\n", stamp, text.encode())
        )
        self._at_start = True
