"""The answer of a test kernel's process that the kernel has taken over: whatever it sends, it is no
answer, or one that can be shown and written to files.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

from pyvmm.testing import answer
from pyvmm.testing.answer import MADE, BadAnswer, decode
from pyvmm.testing.junit import TestCase, document
from pyvmm.testing.verdict import CODES, clean
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

#: What may be in the place of anything.
VALUES: tuple[object, ...] = (
    *(None, True, 0, 1, 255, 256, -1, 1.5, 1e308, 10**40, "", "passed", "failed", "nothing"),
    *("\x1b[2J", "a\nb", "\ud800", "x" * 3000, "AAAA", "A", "&", [], {}, [[]], [{}], [None]),
    *(["KvmMissing", "no", ""], ["passed", "", 0, []], ["a", "passed", ""], [["a", "failed", ""]]),
)
KEYS = ("verdict", "console", "points", "report", "error", "more")
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
    found: dict[str, object] = {
        "verdict": [d.of(tuple(CODES)), "why", d.number(1), ["one", "two"]],
        "console": base64.b64encode(d.some(30)).decode(),
        "points": [["a", "passed", "b"]] * d.below(3),
        "report": {"exits": {"total": d.number(4)}},
    }
    for _ in range(d.below(3)):
        found[d.of(KEYS)] = value(d)
    data = json.dumps(found).encode()
    if d.one_in(3):
        at = d.below(len(data) + 1)
        data = data[:at] + d.of(ODD) + data[at + d.below(8) :]
    return (MADE if d.one_in(2) else b"") + data + d.some(4)


def look(data: bytes) -> None:
    """Take an answer, and do with it what the command does."""
    try:
        found = decode(data)
    except BadAnswer as e:
        assert str(e).isprintable() and len(str(e)) < 100
        return
    except tuple(answer.FATAL.values()):
        assert not data.startswith(MADE)
        return
    verdict = found.verdict
    assert verdict.kind in CODES and 0 <= verdict.code <= 255
    lines = [verdict.message, *verdict.details]
    for point in found.points:
        assert point.result in ("passed", "failed", "skipped")
        lines += [point.name, point.message]
    for line in lines:
        assert line == clean(line), repr(line)
        line.encode()
    text = json.dumps({"report": found.report, "lines": lines}, indent=2, allow_nan=False)
    assert len(text) < 100 * len(data) + 1000
    case = TestCase("x", "x", 0.0, "error", message=verdict.message, output=found.console)
    assert document("x", [case], 0.0)
    again = decode(MADE + found.encode())
    assert (again.console, again.report, repr(again.verdict)) == (
        found.console,
        found.report,
        repr(verdict),
    )


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""

    def one(data: bytes) -> None:
        d = Data(data)
        kind = d.below(4)
        if kind < 2:
            look(sent(d))
        else:
            look((MADE if kind == 2 else b"") + d.rest())

    return one
