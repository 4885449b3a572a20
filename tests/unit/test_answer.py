"""What the process of a test kernel sends: what it may say, and what is refused."""

from __future__ import annotations

import base64
import json

import pytest

from pyvmm.errors import KvmMissing, PyvmmError, SandboxError, UsageError
from pyvmm.testing import answer, points
from pyvmm.testing.answer import MADE, Answer, BadAnswer, decode
from pyvmm.testing.points import Point
from pyvmm.testing.verdict import Verdict

WHOLE = {"verdict": ["passed", "", 0, []], "console": "", "points": [], "report": None}


def sent(**changes: object) -> bytes:
    return MADE + json.dumps(WHOLE | changes).encode()


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


def test_there_and_back() -> None:
    verdict = Verdict("failed", "why\N{SNOWMAN}", status=5, details=["one\ttwo", "three"])
    console = bytes(range(256)) * 10
    report = {"exits": {"total": 3, "share": 0.5}, "lines": [None, True, "\ud800"]}
    told = [Point("a/b", "failed", "text"), Point("\N{SNOWMAN}", "skipped")]
    found = decode(MADE + Answer(verdict, console=console, points=told, report=report).encode())
    assert repr(found.verdict) == repr(verdict) and found.verdict.details == verdict.details
    assert (found.console, list(map(repr, found.points))) == (console, list(map(repr, told)))
    assert found.report == report
    assert decode(Answer(Verdict("error", "no file")).encode()).verdict.kind == "error"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "nothing"),
        (MADE, "nothing"),
        (b"\x00\xff garbage", "no JSON"),
        (MADE + b"{}{}", "no JSON"),
        (MADE + MADE + json.dumps(WHOLE).encode(), "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"9" * 10_000, "no JSON"),
        (b"[]", "no object"),
        (b"{}", "no list"),
        (sent(verdict=["won", "", 0, []]), "an unknown verdict"),
        (sent(verdict=[["passed"], "", 0, []]), "an unknown verdict"),
        (sent(verdict=["passed", "", 0]), "too short a list"),
        (sent(verdict=["passed", 1, 0, []]), "no text"),
        (sent(verdict=["passed", "", 256, []]), "a status that is none"),
        (sent(verdict=["passed", "", True, []]), "a status that is none"),
        (sent(verdict=["passed", "", -1, []]), "a status that is none"),
        (sent(verdict=["passed", "", 0, [1]]), "a list of other things"),
        (sent(verdict=["passed", "", 0, [""] * 1001]), "too long a list"),
        (sent(console=None), "a console that is none"),
        (sent(console="&&&&"), "a console that is none"),
        (sent(console=base64.b64encode(bytes(answer.CONSOLE_MAX + 1)).decode()), "too long a con"),
        (sent(points=[["a", "won", ""]]), "an unknown result"),
        (sent(points=[["a", "passed"]]), "too short a list"),
        (sent(points=["abc"]), "a list of other things"),
        (sent(points=[["", "passed", ""]] * (answer.POINTS_LIMIT + 1)), "too long a list"),
        (sent(report=[]), "a report that is none"),
        (sent(report=nested(100)), "too deep"),
        (sent(report={"a": [0] * (1 << 18), "b": 0}), "more than 262144 values"),
        (sent(report={"a": 0}).replace(b"0}", b"NaN}"), "no JSON"),
        (sent(report={"a": 0}).replace(b"0}", b"1e999}"), "no JSON"),
        (sent(error=["KvmMissing", "no", ""], verdict=0), "no list"),
        (json.dumps({"error": ["HostError", "no", ""]}).encode(), "no list"),
        (json.dumps({"error": ["KvmMissing", "no"]}).encode(), "too short a list"),
        (json.dumps({"error": []}).encode(), "too short a list"),
        (json.dumps({"error": "KvmMissing"}).encode(), "no list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_answer(data: bytes, why: str) -> None:
    with pytest.raises(BadAnswer, match=why):
        decode(data)


def test_an_error_of_the_host() -> None:
    """Before the machine was made, while the process is still ours; an unknown one is refused."""
    for error in (KvmMissing("none", "load it"), SandboxError("no")):
        with pytest.raises(type(error)) as e:
            decode(answer.encode_error(error))
        assert str(e.value) == str(error)
        with pytest.raises(BadAnswer):
            decode(MADE + answer.encode_error(error))
    with pytest.raises(BadAnswer):
        decode(answer.encode_error(UsageError("no")))
    assert all(issubclass(kind, PyvmmError) for kind in answer.FATAL.values())


def test_lines_move_no_cursor() -> None:
    text = "a\x1b[2J\nb\ud800"
    found = decode(sent(verdict=["failed", text, 1, [text]], points=[[text, "failed", text]]))
    (point,) = found.points
    for shown in (found.verdict.message, *found.verdict.details, point.name, point.message):
        assert shown == "a\N{REPLACEMENT CHARACTER}[2J" + "\N{REPLACEMENT CHARACTER}b" + (
            "\N{REPLACEMENT CHARACTER}"
        )
        shown.encode()
    assert len(decode(sent(verdict=["failed", "x" * 10**6, 1, []])).verdict.message) == (
        answer.LINE_MAX
    )


def test_the_largest_answers_fit() -> None:
    """Whatever a kernel prints, however much the report has."""
    console = b"TAP version 13\n" + b"".join(
        b"    " * (n % 3) + b"ok %d - \xff%d\n" % (n, n) for n in range(100_000)
    )
    console += b"PASS: " + b"\xff" * answer.CONSOLE_MAX
    verdict = Verdict("failed", "\xff" * 10**6, details=["\xff" * 10**5] * 2000)
    for report in ({"a": ["x" * 10] * (1 << 19)}, {"a": "x" * (5 << 20)}, nested(50)):
        told = points.parse(console[: answer.CONSOLE_MAX])
        data = MADE + Answer(verdict, console=console, points=told, report=report).encode()
        assert len(data) <= answer.ANSWER_MAX
        found = decode(data)
        assert found.report is None and "is left out" in found.verdict.details[-1]
        assert len(found.points) == len(told) > 1000
        assert found.console == console[-answer.CONSOLE_MAX :]
