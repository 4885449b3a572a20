"""The answer of a test kernel's process that the kernel has taken over: whatever it sends, it is no
answer, or one that can be shown and written to files.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pyvmm.testing import answer, points
from pyvmm.testing.answer import ERROR, LENGTH, MADE, BadAnswer, decode
from pyvmm.testing.junit import TestCase, document
from pyvmm.testing.verdict import CODES, clean
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

#: What may be in the place of any value of the report.
VALUES: tuple[object, ...] = (
    *(None, True, 0, 1, 255, 256, -1, 1.5, 1e308, 10**40, "", "passed", "failed", "nothing"),
    *("\x1b[2J", "a\nb", "\ud800", "x" * 3000, "[{,", "&", [], {}, [[]], [{}], [None]),
)
#: What may be in the place of any line.
LINES = (
    *(b"", b"passed", b"failed", b"skipped", b"0", b"255", b"256", b"-1", b"KvmMissing", b"a/b"),
    *(b"\x1b[2J", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\r", b" \t", b"x" * 3000),
)
#: JSON of Python's that is none.
ODD = (b"NaN", b"-Infinity", b"1e999", b"1" * 5000, b"[" * 2000, b'"\\ud800"', b"{", b"0}")


def value(d: Data, depth: int = 0) -> object:
    if depth < 6 and d.one_in(3):
        return [value(d, depth + 1) for _ in range(d.below(5))]
    if depth < 20 and d.one_in(4):
        return {str(d.of(VALUES))[:9]: value(d, depth + 1) for _ in range(d.below(4))}
    return d.of(VALUES)


def sent(d: Data) -> bytes:
    """What looks like an answer, with something else in some places."""
    kinds = [kind.encode() for kind in CODES]
    lines = [d.of(kinds), b"%d" % d.number(1), b"why", b"one", b"two"]
    told = [d.of((b"passed", b"failed", b"skipped")), b"a", b"b"] * d.below(3)
    report: dict[str, object] = {"exits": {"total": d.number(4)}}
    for _ in range(d.below(3)):
        kind = d.below(3)
        if kind == 2:
            report["more"] = value(d)
        elif rows := (lines, told)[kind]:
            rows[d.below(len(rows))] = d.of(LINES)
    text = json.dumps(report).encode()
    if d.one_in(3):
        at = d.below(len(text) + 1)
        text = text[:at] + d.of(ODD) + text[at + d.below(8) :]
    parts = [
        b"".join(row + b"\n" for row in lines),
        d.some(30),
        b"".join(row + b"\n" for row in told),
        text,
    ]
    data = b""
    for part in parts:
        size = d.number(4) if d.one_in(16) else len(part)
        data += size.to_bytes(LENGTH, "big") + part
    return d.of((b"", MADE, MADE, ERROR)) + data + d.some(4)


def look(data: bytes) -> None:
    """Take an answer, and do with it what the command does."""
    try:
        found = decode(data)
    except BadAnswer as e:
        assert str(e).isprintable() and len(str(e)) < 100
        return
    except tuple(answer.FATAL.values()) as e:
        assert data.startswith(ERROR)
        assert str(e) == clean(str(e))
        return
    verdict = found.verdict
    assert verdict.kind in CODES and 0 <= verdict.code <= 255
    lines = [verdict.message, *verdict.details]
    for point in found.points:
        assert point.result in ("passed", "failed", "skipped")
        assert max(len(point.name), len(point.message)) <= points.NAME_MAX
        lines += [point.name, point.message]
    for line in lines:
        assert line == clean(line), repr(line)
        line.encode()
    text = json.dumps({"report": found.report, "lines": lines}, indent=2, allow_nan=False)
    assert len(text) < 100 * len(data) + 1000
    case = TestCase("x", "x", 0.0, "error", message=verdict.message, output=found.console)
    assert document("x", [case], 0.0)
    again = decode(MADE + found.encode())
    assert (again.console, again.report, repr(again.verdict), repr(again.points)) == (
        found.console,
        found.report,
        repr(verdict),
        repr(found.points),
    )


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""

    def one(data: bytes) -> None:
        d = Data(data)
        kind = d.below(4)
        if kind < 2:
            look(sent(d))
        else:
            look((MADE, ERROR)[kind - 2] + d.rest())

    return one
