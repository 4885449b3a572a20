"""What the process of a test kernel sends: what it may say, and what is refused."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from pyvmm.errors import KvmMissing, PyvmmError, SandboxError, UsageError
from pyvmm.testing import answer, points
from pyvmm.testing.answer import ERROR, MADE, Answer, BadAnswer, decode
from pyvmm.testing.points import Point
from pyvmm.testing.verdict import Verdict

PASSED = b"passed\n0\n\n"


def part(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def sent(
    verdict: bytes = PASSED, console: bytes = b"", told: bytes = b"", report: bytes = b""
) -> bytes:
    return MADE + b"".join(map(part, (verdict, console, told, report)))


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
    none = decode(Answer(Verdict("error", "no file")).encode())
    assert (none.verdict.kind, none.verdict.status, none.report) == ("error", None, None)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "nothing"),
        (MADE, "nothing"),
        (b"\x00\xff garbage", "less than an answer"),
        (sent()[:-1], "less than an answer"),
        (sent()[:-2], "less than an answer"),
        (sent() + b"\0", "more than an answer"),
        (sent() + sent(), "more than an answer"),
        (MADE + sent(), "less than an answer"),
        (MADE + b"\xff" * 100_000, "less than an answer"),
        (sent(b""), "less than a verdict"),
        (sent(b"passed\n0\n"), "less than a verdict"),
        (sent(b"passed\n0\n\nmore"), "half a line"),
        (sent(b"won\n0\n\n"), "an unknown verdict"),
        (sent(b"passed\n0\n\xff\n"), "no text"),
        (sent(b"passed\n256\n\n"), "a status that is none"),
        (sent(b"passed\n-1\n\n"), "a status that is none"),
        (sent(b"passed\n00\n\n"), "a status that is none"),
        (sent(b"passed\n\xd9\xa1\n\n"), "a status that is none"),  # a digit, but not of ASCII
        (sent(PASSED + b"\n" * 1001), "too many lines"),
        (sent(PASSED + b"x" * answer.VERDICT_MAX), "a verdict of more than 256 KiB"),
        (sent(console=bytes(answer.CONSOLE_MAX + 1)), "a console of more than 1024 KiB"),
        (sent(told=b"won\na\n\n"), "an unknown result"),
        (sent(told=b"passed\na\n"), "less than a result"),
        (sent(told=b"passed\na\n\nx"), "half a line"),
        (sent(told=b"passed\n\n\n" * (answer.POINTS_LIMIT + 1)), "too many lines"),
        (sent(told=b"x" * (answer.POINTS_BYTES + 1)), "results of more than"),
        (sent(report=b"{]"), "a report that is no JSON"),
        (sent(report=b"{}{}"), "a report that is no JSON"),
        (sent(report=b"[" * 10_000), "a report that is no JSON"),
        (sent(report=b"9" * 10_000), "a report that is no JSON"),
        (sent(report="{}".encode("utf-16")), "a report that is no JSON"),
        (sent(report=b"[]"), "a report that is no object"),
        (sent(report=b"null"), "a report that is no object"),
        (sent(report=json.dumps(nested(100)).encode()), "too deep"),
        (sent(report=b'{"a": [%s0]}' % (b"0," * (1 << 16))), "more than 65536 values"),
        (sent(report=b'"%s"' % (b"x" * (1 << 20))), "a report of more than 1024 KiB"),
        (sent(report=b'{"a": NaN}'), "no JSON"),
        (sent(report=b'{"a": 1e999}'), "no JSON"),
        (MADE + ERROR + b"KvmMissing\nno\n\n", "less than an answer"),
        (ERROR + b"HostError\nno\n\n", "an unknown error"),
        (ERROR + b"KvmMissing\nno\n", "an unknown error"),
        (ERROR + b"KvmMissing\nno\n\n\n", "too many lines"),
        (ERROR, "an unknown error"),
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


TEXT = "a\x1b[2J\rb\x85"
SHOWN = "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b"


def test_lines_move_no_cursor() -> None:
    text = TEXT.encode()
    found = decode(
        sent(b"failed\n1\n%s\n%s\n" % (text, text), told=b"failed\n%s\n%s\n" % (text, text))
    )
    (point,) = found.points
    for shown in (found.verdict.message, *found.verdict.details, point.name, point.message):
        assert shown == SHOWN
    for error in (answer.encode_error(KvmMissing(TEXT, TEXT)), ERROR + b"KvmMissing\n%s\n%s\n"):
        with pytest.raises(KvmMissing) as e:
            decode(error.replace(b"%s", text))
        assert (e.value.cause, e.value.hint) == (SHOWN, SHOWN)


def test_what_is_sent_has_no_end_of_a_line_in_it() -> None:
    told = [Point("a\nb", "passed", "c\nd")]
    found = decode(Answer(Verdict("failed", "e\nf", details=["g\nh"]), points=told).encode())
    mark = "\N{REPLACEMENT CHARACTER}"
    (point,) = found.points
    assert (point.name, point.message) == (f"a{mark}b", f"c{mark}d")
    assert (found.verdict.message, found.verdict.details) == (f"e{mark}f", [f"g{mark}h"])


def test_long_texts_are_cut() -> None:
    long = b"x" * 100_000
    found = decode(
        sent(b"failed\n1\n%s\n%s\n" % (long, long), told=b"failed\n%s\n%s\n" % (long, long))
    )
    (point,) = found.points
    assert [len(text) for text in (found.verdict.message, *found.verdict.details)] == [
        answer.LINE_MAX
    ] * 2
    assert (len(point.name), len(point.message)) == (points.NAME_MAX, points.NAME_MAX)


#: Answers that would take much memory: of the most parts, and as large as those may be.
BOMBS = {
    "values": sent(report=b'{"a": [%s{}]}' % (b"[]," * 32_000)),
    "objects": sent(report=b'{"a": [%s{}]}' % (b'{"a":0},' * 32_000)),
    "too many values": sent(report=b'{"a": [%s{}]}' % (b"[]," * 349_000)),
    "a text": sent(report='{{"a": "{}\N{GRINNING FACE}"}}'.format("x" * 1_040_000).encode()),
    "a key": sent(report='{{"{}\N{GRINNING FACE}": 0}}'.format("x" * 1_040_000).encode()),
    "results": sent(told=b"passed\n\n\n" * 1000 + b"failed\nab\ncd\n" * 39_000),
    "long results": sent(told=b"failed\n\x1b%s\n\n" % (b"\x01" * 999) * 1400),
    "one result": sent(told=b"failed\n%s\n\n" % (b"x" * 1_500_000)),
    "wide results": sent(
        told=b"failed\n\xf0\x9f\x98\x80\n\n" + b"failed\n%s\n\n" % (b"x" * 1_500_000)
    ),
    "lines": sent(PASSED + b"\n" * 1000, console=bytes(1 << 20)),
    "all": sent(
        PASSED + b"x\n" * 1000,
        bytes(1 << 20),
        b"failed\nab\ncd\n" * 40_000,
        b'{"a": [%s{}]}' % (b'{"a":0},' * 32_000),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_an_answer_takes(name: str) -> None:
    """Bytes of memory, at the most, whether the answer is refused or not."""
    data = BOMBS[name]
    assert len(data) <= answer.ANSWER_MAX
    tracemalloc.start()
    try:
        found = decode(data)
        assert found.verdict.kind == "passed"
    except BadAnswer as e:
        assert name == "too many values", e
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 << 20


def test_the_largest_answers_fit() -> None:
    """Whatever a kernel prints, however much the report has."""
    assert sum(answer.PARTS.values()) + 100 < answer.ANSWER_MAX
    console = b"TAP version 13\n" + b"".join(
        b"    " * (n % 3) + b"ok %d - \xff%d\n" % (n, n) for n in range(100_000)
    )
    console += b"PASS: " + b"\xff" * answer.CONSOLE_MAX
    verdict = Verdict("failed", "\xff" * 10**6, details=["\xff" * 10**5] * 2000)
    for report in ({"a": ["x" * 10] * (1 << 16)}, {"a": "x" * (1 << 20)}, nested(50)):
        told = points.parse(console[: answer.CONSOLE_MAX])
        data = MADE + Answer(verdict, console=console, points=told, report=report).encode()
        assert len(data) <= answer.ANSWER_MAX
        found = decode(data)
        assert found.report is None and "is left out" in found.verdict.details[-1]
        assert len(found.points) == len(told) > 1000
        assert found.console == console[-answer.CONSOLE_MAX :]
    wide = points.parse(b"\n".join([b"PASS: " + b"\xff" * 2000] * 500))
    assert [p.name for p in decode(Answer(verdict, points=wide).encode()).points] == [
        p.name for p in wide
    ]
    assert sum(len(p.name.encode()) for p in wide) <= points.TEXT_MAX + 100
    assert max(len(p.name) for p in wide) == points.NAME_MAX
