"""What the process of a test kernel says of it, as bytes: the verdict, the console, the results in
it, and the machine's report.

Whoever reads them must not trust them: the kernel may have taken the process over. So they are data
of known types, and lines in them have no control characters. Each part has its length before it,
and a limit of its own, which is checked before anything is made of the part. An answer can still be
wrong, as that of a kernel which says that it has passed.
"""

from __future__ import annotations

import json
import math

from pyvmm.errors import KvmForbidden, KvmMissing, KvmUnsuitable, PyvmmError, SandboxError
from pyvmm.testing import points
from pyvmm.testing.points import Point
from pyvmm.testing.verdict import CODES, Verdict, clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: What a process sends first: its machine is made and confined. After that, nothing that it says is
#: about this host. It cannot take the word back, see ``apart``.
MADE = b"made\n"
#: What it sends instead if this host cannot make the machine.
ERROR = b"error\n"
#: Bytes of an answer, with all that it may contain.
ANSWER_MAX = 4 << 20
CONSOLE_MAX = 1 << 20
#: Bytes of the lines of a verdict and its details; the most details, and characters of each.
VERDICT_MAX, DETAILS_MAX, LINE_MAX = 256 << 10, 1000, 2000
#: The most results, and the bytes of their lines, which have a word and three ends for each.
POINTS_LIMIT = 2 * points.POINTS_MAX
POINTS_BYTES = points.TEXT_MAX + 12 * POINTS_LIMIT
#: A larger report is left out: bytes of its JSON, values in it, and the depth of their nesting.
REPORT_MAX, VALUES_MAX, DEPTH_MAX = 1 << 20, 1 << 16, 16
#: The largest figure in a report, and the smallest one besides 0.
FIGURE_MAX, FIGURE_MIN = 1 << 62, 1e-12
#: The parts of an answer in their order, each after its length in ``LENGTH`` bytes.
PARTS = {
    "a verdict": VERDICT_MAX,
    "a console": CONSOLE_MAX,
    "results": POINTS_BYTES,
    "a report": REPORT_MAX,
}
LENGTH = 4
RESULTS: tuple[points.Result, ...] = ("passed", "failed", "skipped")
#: Errors of which all machines of this host die.
FATAL: dict[str, type[PyvmmError]] = {
    kind.__name__: kind for kind in (KvmMissing, KvmForbidden, KvmUnsuitable, SandboxError)
}


class BadAnswer(ValueError):
    """The bytes are no answer; the text says why, in a few words."""


class Answer:
    """An answer.

    :ivar console: the end of the kernel's output.
    :ivar points: the single results in the console.
    :ivar report: ``Machine.report()``; None if there is none.
    """

    def __init__(
        self,
        verdict: Verdict,
        *,
        console: bytes = b"",
        points: list[Point] | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        self.verdict, self.console, self.report = verdict, console, report
        self.points = points or []

    def encode(self) -> bytes:
        """The answer as ``decode`` takes it."""
        verdict, report, left_out = self.verdict, b"", b""
        if self.report is not None:
            report = json.dumps(self.report).encode()
            try:
                _check_size(report)
                _check_depth(self.report)
            except BadAnswer as e:
                report, left_out = b"", _lines([f"{e} is left out"], VERDICT_MAX)
        status = "" if verdict.status is None else str(verdict.status)
        details = verdict.details[: DETAILS_MAX - 1]
        lines = [verdict.kind, status, *map(line, [verdict.message, *details])]
        told = [
            text
            for p in self.points[:POINTS_LIMIT]
            for text in (p.result, clean(p.name), clean(p.message))
        ]
        parts = (
            _lines(lines, VERDICT_MAX - len(left_out)) + left_out,
            self.console[-CONSOLE_MAX:],
            _lines(told, POINTS_BYTES),
            report,
        )
        return b"".join(len(part).to_bytes(LENGTH, "big") + part for part in parts)


def encode_error(error: PyvmmError) -> bytes:
    """An error of ``FATAL``, which takes the place of ``MADE`` and the answer."""
    texts = (type(error).__name__, line(error.cause), line(error.hint))
    return ERROR + _lines(texts, VERDICT_MAX)


def decode(data: bytes) -> Answer:
    """The answer in what a process has sent.

    :raises BadAnswer: there is none.
    :raises PyvmmError: of ``FATAL``, which the process has sent before its guest could run.
    """
    if data.startswith(ERROR):
        raise _error(data.removeprefix(ERROR))
    data = data.removeprefix(MADE)
    if not data:
        raise BadAnswer("nothing")
    verdict, console, told, report = _parts(data)
    return Answer(
        _verdict(_texts(verdict, DETAILS_MAX + 3)),
        console=console,
        points=_points(_texts(told, 3 * POINTS_LIMIT)),
        report=_report(report),
    )


def figure(value: float) -> float:
    """:raises BadAnswer: the figure is too large, or too small to divide by."""
    if not -FIGURE_MAX <= value <= FIGURE_MAX:
        raise BadAnswer("a figure that is too large")
    if 0 < abs(value) < FIGURE_MIN:
        raise BadAnswer("a figure that is too small")
    return value


def line(text: str) -> str:
    """A text as a line of a verdict: without control characters, not too long."""
    return clean(text[:LINE_MAX])


def _parts(data: bytes) -> list[bytes]:
    parts, at = [], 0
    for name, most in PARTS.items():
        begin = at + LENGTH
        size = int.from_bytes(data[at:begin], "big")
        at = begin + size
        if at > len(data):
            raise BadAnswer("less than an answer")
        if size > most:
            raise BadAnswer(f"{name} of more than {most >> 10} KiB")
        parts.append(data[begin:at])
    if at < len(data):
        raise BadAnswer("more than an answer")
    return parts


def _lines(texts: Iterable[str], most: int) -> bytes:
    """Texts without ends of lines, as lines of at most so many bytes together."""
    out = bytearray()
    for text in texts:
        row = text.encode(errors="replace") + b"\n"
        if len(out) + len(row) > most:
            break
        out += row
    return bytes(out)


def _texts(lines: bytes, most: int) -> list[str]:
    if lines.count(b"\n") > most:
        raise BadAnswer("too many lines")
    try:
        *texts, rest = lines.decode().split("\n")
    except UnicodeDecodeError as e:
        raise BadAnswer("what is no text") from e
    if rest:
        raise BadAnswer("half a line")
    return texts


def _error(lines: bytes) -> PyvmmError:
    texts = _texts(lines, 3)
    if len(texts) != 3 or texts[0] not in FATAL:
        raise BadAnswer("an unknown error")
    return FATAL[texts[0]](line(texts[1]), line(texts[2]))


def _verdict(texts: list[str]) -> Verdict:
    if len(texts) < 3:
        raise BadAnswer("less than a verdict")
    name, status, message, *details = texts
    kinds = [kind for kind in CODES if kind == name]
    if not kinds:
        raise BadAnswer("an unknown verdict")
    if status and status not in map(str, range(256)):
        raise BadAnswer("a status that is none")
    return Verdict(
        kinds[0],
        line(message),
        status=int(status) if status else None,
        details=[line(text) for text in details],
    )


def _points(texts: list[str]) -> list[Point]:
    if len(texts) % 3:
        raise BadAnswer("less than a result")
    found = []
    for result, name, message in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
        if result not in RESULTS:
            raise BadAnswer("an unknown result")
        # One object for all, instead of one for each.
        known = RESULTS[RESULTS.index(result)]
        most = points.NAME_MAX
        found.append(Point(clean(name[:most]), known, clean(message[:most])))
    return found


def _report(data: bytes) -> dict[str, Any] | None:
    return parsed(data) if data else None


def parsed(data: bytes) -> dict[str, Any]:
    """The object of JSON in a report.

    :raises BadAnswer: there is none, or it is larger or deeper than a report may be.
    """
    _check_size(data)
    try:
        found = json.loads(data.decode(), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as e:
        raise BadAnswer("a report that is no JSON") from e
    if not isinstance(found, dict):
        raise BadAnswer("a report that is no object")
    _check_depth(found)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("no number of JSON")
    return value


def _check_size(report: bytes) -> None:
    """Before anything is made of the JSON, whose values take much more memory than their text.

    :raises BadAnswer: it is too long, or has too many values. A text in it that contains a
        separator counts for more than one.
    """
    if len(report) > REPORT_MAX:
        raise BadAnswer(f"a report of more than {REPORT_MAX >> 10} KiB")
    if sum(map(report.count, (b",", b"[", b"{"))) > VALUES_MAX:
        raise BadAnswer(f"a report of more than {VALUES_MAX} values")


def _check_depth(report: object) -> None:
    """:raises BadAnswer: to write the report as text would take a deep stack."""
    level = [report]
    for _ in range(DEPTH_MAX):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return
        level = inner
    raise BadAnswer("a report that is too deep")
