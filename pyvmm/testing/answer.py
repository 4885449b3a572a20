"""What the process of a test kernel says of it, as bytes: the verdict, the console, the results in
it, and the machine's report.

Whoever reads them must not trust them: the kernel may have taken the process over. So they are data
of known types within limits, and lines in them have no control characters. An answer can still be
wrong, as that of a kernel which says that it has passed.
"""

from __future__ import annotations

import base64
import json
import math

from pyvmm.errors import KvmForbidden, KvmMissing, KvmUnsuitable, PyvmmError, SandboxError
from pyvmm.testing import points
from pyvmm.testing.points import Point
from pyvmm.testing.verdict import CODES, Verdict, clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What a process sends first: its machine is made and confined. After that, nothing that it says is
#: about this host.
MADE = b"made\n"
#: Bytes of an answer, with all that it may contain.
ANSWER_MAX = 16 << 20
CONSOLE_MAX = 1 << 20
#: A larger report is left out: bytes of its JSON, values in it, and the depth of their nesting.
REPORT_MAX, VALUES_MAX, DEPTH_MAX = 4 << 20, 1 << 18, 16
DETAILS_MAX, LINE_MAX = 1000, 2000
POINTS_LIMIT = 2 * points.POINTS_MAX
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
        verdict = self.verdict
        details = [line(text) for text in verdict.details[:DETAILS_MAX]]
        report = json.dumps(self.report)
        try:
            if len(report) > REPORT_MAX:
                raise BadAnswer(f"a report of {len(report) >> 20} MiB")
            _check_values(self.report)
        except BadAnswer as e:
            details = [*details[: DETAILS_MAX - 1], f"{e} is left out"]
            report = "null"
        head = json.dumps(
            {
                "verdict": [verdict.kind, line(verdict.message), verdict.status, details],
                "console": base64.b64encode(self.console[-CONSOLE_MAX:]).decode(),
                "points": [[p.name, p.result, p.message] for p in self.points[:POINTS_LIMIT]],
            },
            ensure_ascii=False,
        )
        return f'{head[:-1]}, "report": {report}}}'.encode(errors="replace")


def encode_error(error: PyvmmError) -> bytes:
    """An error of ``FATAL``, which takes the place of ``MADE`` and the answer."""
    return json.dumps({"error": [type(error).__name__, error.cause, error.hint]}).encode()


def decode(data: bytes) -> Answer:
    """The answer in what a process has sent.

    :raises BadAnswer: there is none.
    :raises PyvmmError: of ``FATAL``, which the process has sent before its guest could run.
    """
    made = data.startswith(MADE)
    data = data.removeprefix(MADE)
    if not data:
        raise BadAnswer("nothing")
    try:
        found = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as e:
        raise BadAnswer("what is no JSON") from e
    if not isinstance(found, dict):
        raise BadAnswer("what is no object")
    if "error" in found and not made:
        name, cause, hint = _of(_list(found["error"], str, 3), 3)
        if name in FATAL:
            raise FATAL[name](cause, hint)
    kind, message, status, details = _of(_list(found.get("verdict"), object, 4), 4)
    if not isinstance(kind, str) or kind not in CODES:
        raise BadAnswer("an unknown verdict")
    if status is not None and (type(status) is not int or not 0 <= status <= 255):
        raise BadAnswer("a status that is none")
    lines = [line(text) for text in _list(details, str, DETAILS_MAX)]
    report = found.get("report")
    if report is not None and not isinstance(report, dict):
        raise BadAnswer("a report that is none")
    _check_values(report)
    return Answer(
        Verdict(kind, line(_str(message)), status=status, details=lines),
        console=_console(found.get("console")),
        points=[_point(row) for row in _list(found.get("points"), list, POINTS_LIMIT)],
        report=report,
    )


def line(text: str) -> str:
    """A text as a line of a verdict: without control characters, not too long."""
    return clean(text[:LINE_MAX])


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("no number of JSON")
    return value


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise BadAnswer("what is no text")
    return value


def _list(value: object, kind: type, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise BadAnswer("no list, or too long a list")
    if not all(isinstance(item, kind) for item in value):
        raise BadAnswer("a list of other things")
    return value


def _of(values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise BadAnswer("too short a list")
    return values


def _point(row: list[object]) -> Point:
    name, result, message = map(_str, _of(row, 3))
    if result not in ("passed", "failed", "skipped"):
        raise BadAnswer("an unknown result")
    return Point(clean(name), result, clean(message))  # type: ignore[arg-type]


def _console(text: object) -> bytes:
    try:
        console = base64.b64decode(_str(text), validate=True)
    except ValueError as e:
        raise BadAnswer("a console that is none") from e
    if len(console) > CONSOLE_MAX:
        raise BadAnswer("too long a console")
    return console


def _check_values(report: object) -> None:
    """:raises BadAnswer: to write the report as text would take much memory, or a deep stack."""
    level, count = [report], 0
    for _ in range(DEPTH_MAX):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        count += len(inner)
        if count > VALUES_MAX:
            raise BadAnswer(f"a report of more than {VALUES_MAX} values")
        if not inner:
            return
        level = inner
    raise BadAnswer("a report that is too deep")
