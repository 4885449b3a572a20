"""What the console of a Linux guest tells about its state: panic, oops, warnings, stalls, and how
far the boot has come.

``testing.phrases`` has the kernel's words. This module finds the kernel's lines among all others.
"""

from __future__ import annotations

import re
import time

from pyvmm.testing.phrases import GROUPS, KINDS, PHRASES, find, hinted
from pyvmm.testing.verdict import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Literal

    Phase = Literal["no-output", "kernel", "init", "command", "end"]

#: The time stamp of Linux, with the level that some consoles add, and the caller that
#: CONFIG_PRINTK_CALLER adds: a task (T) or a CPU (C). It may come after other output on its line.
STAMP = re.compile(r"(?:<\d+>)?\[ *\d+\.\d{6}\](?:\[ *([TC]\d+)\])? ?")
#: The first line of every kernel.
BANNER = "Linux version "
PANIC = "Kernel panic - not syncing"
QUOTE_MAX = 60  # the most lines of a call trace
#: A phrase that comes so many lines after the first line of a report is part of the report: an oops
#: begins with the address, and the line of die() comes five lines later.
HEAD = 8
END = re.compile(r"---\[ end (?:trace|Kernel panic)")
#: What follows the first line of a report of any kind: die(), BUG(), WARN(). Other kinds come by
#: themselves.
FOLLOWS = ("oops", "bug", "warning")
#: Kinds that do not end in a panic, so a panic that comes soon after has another cause.
HARMLESS = ("warning", "alloc")
OFFSET = re.compile(r"Kernel Offset: (0x[0-9a-f]+) from 0x")


class Trouble:
    """One report of the kernel.

    :ivar kind: key of KINDS.
    :ivar lines: its first lines, without time stamps.
    :ivar phrases: the indices of the PHRASES in it.
    """

    __slots__ = ("kind", "lines", "phrases")

    def __init__(self, kind: str, lines: list[str], phrases: set[int]) -> None:
        self.kind, self.lines, self.phrases = kind, lines, phrases

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
    """The kinds that ``text`` names, joined by commas, in the order of KINDS. A name of GROUPS
    stands for all kinds of the group.

    :raises ValueError: a kind is unknown; the error's text is this kind.
    """
    kinds: set[str] = set()
    for name in filter(None, (k.strip() for k in text.split(","))):
        if name not in KINDS and name not in GROUPS:
            raise ValueError(name)
        kinds.update(GROUPS.get(name, (name,)))
    return [kind for kind in KINDS if kind in kinds]


#: The least console loglevel at which the console has everything that PHRASES are part of: the
#: kernel prints WARN(), lockdep's reports and call traces as warnings, which have level 4.
LOGLEVEL = 5


def audible(append: str) -> str:
    """The kernel command line ``append``, with a ``loglevel=`` added if it asks for a console that
    does not show the kernel's warnings, as ``quiet`` does: a ``Watch`` would not see them.
    """
    ours, dashes, rest = f" {append}".partition(" -- ")  # the words after "--" are for init
    level = LOGLEVEL
    for word in ours.split():
        name, _, value = word.partition("=")
        if word == "quiet":
            level = 4
        elif word in ("debug", "ignore_loglevel"):
            level = 10
        elif name == "loglevel" and value.isdecimal():
            level = int(value)
    if level < LOGLEVEL and "ignore_loglevel" not in ours.split():
        ours += f" loglevel={LOGLEVEL}"
    return (ours + dashes + rest).strip()


def pieces(line: str) -> list[tuple[str | None, str]]:
    """Take apart one line of a console: what came before the first time stamp, if anything, then
    the text after each time stamp. More than one text is in a line if a program has not ended its
    own line when the kernel writes.

    :returns: caller and text of each: None without a time stamp; empty if the stamp has no caller.
    """
    found: list[tuple[str | None, str]] = []
    end, caller = 0, None
    for stamp in STAMP.finditer(line):
        if stamp.start() > end or caller is not None:
            found.append((caller, line[end : stamp.start()]))
        caller, end = stamp[1] or "", stamp.end()
    return [*found, (caller, line[end:])]


class Watch:
    """A sink of the console that keeps the reports of some kinds. It works line by line, however
    much output comes.

    Programs of the guest write to the same console. A kernel that stamps its lines with the time
    (CONFIG_PRINTK_TIME) is told from them by the stamps: then only text with a stamp counts. If the
    stamps also have the caller, reports of several CPUs at once are kept apart.

    :param kinds: of KINDS.
    :ivar troubles: the first ``MAX`` reports, in order.
    :ivar count: how many reports there were.
    """

    MAX = 20

    def __init__(self, kinds: Iterable[str]) -> None:
        self._kinds = set(kinds)
        self._rest = b""
        self._stamped = False
        self._open: dict[str, Trouble] = {}
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
        for part in raw.rstrip(b"\r").split(b"\r"):  # such as a progress bar's
            line = part.decode(errors="replace")
            known = self._stamped or "[" not in line  # whether the kernel writes stamps
            if known and not self._open and not hinted(line) and BANNER not in line:
                continue  # as almost all lines
            for caller, text in pieces(clean(line)):
                if caller is not None:
                    self._stamped = True
                elif text.startswith(BANNER):  # another kernel begins, perhaps without stamps
                    self._stamped = False
                if caller is not None or not self._stamped:
                    self._text(caller or "", text)

    def _text(self, caller: str, text: str) -> None:
        trouble = self._open.get(caller)
        if trouble is not None:
            trouble.lines.append(text)
            if END.search(text) or len(trouble.lines) >= QUOTE_MAX:
                del self._open[caller]
        found = find(text)
        if found is None or (kind := PHRASES[found][0]) not in self._kinds:
            return
        if kind == "oom" and self.troubles and self.troubles[-1].kind == kind:
            trouble = self.troubles[-1]  # who was killed comes after all memory has been listed
        elif trouble is not None and (
            len(trouble.lines) > HEAD or kind not in (trouble.kind, *FOLLOWS)
        ):
            trouble = None
        if trouble is not None and found not in trouble.phrases:
            trouble.phrases.add(found)
            return
        self.count += 1
        if len(self.troubles) < self.MAX:
            new = self._open[caller] = Trouble(kind, [text], {found})
            self.troubles.append(new)


def panic_quote(console: bytes | bytearray) -> list[str]:
    """The last panic in a console, with the call trace that belongs to it; empty if there is none.

    The report that led to the panic comes before the panic's own line and has the trace.
    Without it the trace follows the panic's line.
    """
    text = bytes(console[-(1 << 16) :]).decode(errors="replace")
    lines = [pieces(clean(line))[-1][1] for line in text.splitlines()]
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
        found = find(lines[i])
        if found is not None and (
            PHRASES[found][0] not in HARMLESS or "panic_on_warn" in lines[at]
        ):
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


LOG_MAX = 1 << 30  # bytes


class Log:
    """A sink of the console that writes each line with the seconds since the start: ``[ 12.345678]
    text``.

    :param write: takes the bytes. Its errors are raised unchanged.
    :param limit: the most bytes of the console, so that no guest can fill the disk.
    :ivar dropped: how many bytes came after them.
    """

    def __init__(self, write: Callable[[bytes], object], limit: int = LOG_MAX) -> None:
        self._write = write
        self._left = limit
        self.dropped = 0
        self._begin = time.monotonic()
        self._at_start = True

    def __call__(self, data: bytes) -> None:
        """Take the next piece. The time of a line is the time of its first byte."""
        if self.dropped or len(data) > self._left:
            if not self.dropped:
                self.note("the log has reached its largest size; the console goes on")
            self.dropped += len(data)
            return
        self._left -= len(data)
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
