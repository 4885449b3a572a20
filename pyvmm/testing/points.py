"""Single results in a console: KTAP, as KUnit and kselftest write it, and the lines ``PASS: name``
of test kernels.
"""

from __future__ import annotations

import re

from pyvmm.testing.verdict import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Result = Literal["passed", "failed", "skipped"]

POINTS_MAX = 20000  # the most results that are taken from one console
NAME_MAX = 1000  # characters of a name, with those of the results around it, or of a message
LEFT_OUT = "the rest is left out"
TEXT_MAX = 1 << 20  # bytes of all names and messages, of one console, in UTF-8
#: The time stamp of Linux, with the caller that CONFIG_PRINTK_CALLER adds.
STAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ?")
VERSION = re.compile(r"^[# ]*(?:K?TAP version \d+)\s*$")
PLAN = re.compile(r"^([# ]*)1\.\.(\d{1,9})\b")
RESULT = re.compile(r"^([# ]*)(not )?ok (\d{1,9})\b(?: - | )?([^#]*)(?:# *(.*))?$")
LINE = re.compile(r"^(PASS|FAIL|SKIP|XFAIL|XPASS|KFAIL): (.*)$")
LINES: dict[str, Result] = {
    "PASS": "passed",
    "FAIL": "failed",
    "SKIP": "skipped",
    "XFAIL": "passed",
    "KFAIL": "passed",
    "XPASS": "failed",
}


class Point:
    """One result.

    :ivar result: ``passed``, ``failed`` or ``skipped``.
    :ivar message: the text beside the result.
    """

    __slots__ = ("message", "name", "result")

    def __init__(self, name: str, result: Result, message: str = "") -> None:
        self.name, self.result, self.message = name, result, message

    def __repr__(self) -> str:
        return f"Point({self.name!r}, {self.result!r}, {self.message!r})"


class _Level:
    """The results at one depth of nesting, all of them parts of the same outer result."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.plan: int | None = None
        self.seen = 0

    def finished(self) -> list[Point]:
        """The results. If fewer came than the plan promised, one more failure says so."""
        if self.plan is not None and self.seen < self.plan:
            text = f"{self.seen} of {self.plan} results came"
            self.points.append(Point("(plan)", "failed", text))
        return self.points


def parse(console: bytes | bytearray) -> list[Point]:
    """Every result in the console, in order. Nested results are named ``outer/inner``, and their
    sum is left out.

    After ``POINTS_MAX`` results or ``TEXT_MAX`` bytes, one failure says that the rest is left
    out.

    KTAP counts only after its version line, so that an "ok 1" which a program prints by chance is
    not a result.
    """
    levels: dict[int, _Level] = {}
    lines: list[Point] = []
    tap = cut = False
    for raw in bytes(console).decode(errors="replace").splitlines():
        text = STAMP.sub("", clean(raw))
        if VERSION.match(text):
            tap = True
        elif match := LINE.match(text):
            lines.append(Point(match[2].strip()[:NAME_MAX], LINES[match[1]]))
        elif tap and (match := PLAN.match(text)):
            _level(levels, len(match[1])).plan = int(match[2])
        elif tap and (match := RESULT.match(text)):
            _result(levels, match)
        if len(lines) + sum(len(v.points) for v in levels.values()) >= POINTS_MAX:
            cut = True
            break
    out: list[Point] = []
    for depth in sorted(levels, reverse=True):  # their parts came, and their sum never came
        out += levels[depth].points if cut else levels[depth].finished()
    found = out + lines
    size = 0
    for index, point in enumerate(found):
        size += len(point.name.encode()) + len(point.message.encode())
        if size > TEXT_MAX:
            found[index:] = [Point("(results)", "failed", f"{index} are read, {LEFT_OUT}")]
            return found
    if cut:
        found.append(Point("(results)", "failed", f"{POINTS_MAX} are read, {LEFT_OUT}"))
    return found


def _level(levels: dict[int, _Level], depth: int) -> _Level:
    return levels.setdefault(depth, _Level())


def _result(levels: dict[int, _Level], match: re.Match[str]) -> None:
    depth = len(match[1])
    name = match[4].strip()[:NAME_MAX] or f"test {match[3]}"
    directive = (match[5] or "").strip()[:NAME_MAX]
    word = directive.partition(" ")[0].upper()
    result: Result = "failed" if match[2] else "passed"
    if word == "SKIP" or (word in ("TODO", "XFAIL") and match[2]):
        result = "skipped"
    inner: list[Point] = []
    for deeper in sorted((d for d in levels if d > depth), reverse=True):
        inner += levels.pop(deeper).finished()
    level = _level(levels, depth)
    level.seen += 1
    for point in inner:
        point.name = f"{name}/{point.name}"[:NAME_MAX]
    # The sum is news only if it is worse than its parts.
    if not inner or (result == "failed" and not any(p.result == "failed" for p in inner)):
        inner.append(Point(name, result, directive))
    level.points += inner
