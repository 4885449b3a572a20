"""JUnit XML, as GitHub, GitLab and Jenkins read it."""

from __future__ import annotations

from pyvmm.testing.verdict import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUT_MAX = 1 << 16  # bytes of a test's output that go into the file, the last ones


class TestCase:
    """One <testcase>.

    :ivar result: ``passed``, ``failed``, ``error`` or ``skipped``. :ivar kind: the failure's type,
        e.g. ``panic``.
    :ivar message: one line. :ivar text: the failure's body. :ivar output: the test's output.
    :ivar properties: name -> value.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        classname: str,
        name: str,
        seconds: float,
        result: str,
        *,
        kind: str = "",
        message: str = "",
        text: str = "",
        output: bytes = b"",
        properties: dict[str, str] | None = None,
    ) -> None:
        assert result in ("passed", "failed", "error", "skipped")
        self.classname, self.name, self.seconds, self.result = classname, name, seconds, result
        self.kind, self.message, self.text, self.output = kind, message, text, output
        self.properties = properties or {}


def document(suite: str, cases: Sequence[TestCase], seconds: float) -> str:
    """The whole file."""
    counts = {r: sum(c.result == r for c in cases) for r in ("failed", "error", "skipped")}
    totals = (
        f'tests="{len(cases)}" failures="{counts["failed"]}" errors="{counts["error"]}"'
        f' skipped="{counts["skipped"]}" time="{seconds:.3f}"'
    )
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f"<testsuites {totals}>",
        f"<testsuite name={quoted(suite)} {totals}>",
    ]
    for case in cases:
        lines += _case(case)
    return "\n".join([*lines, "</testsuite>", "</testsuites>", ""])


def _case(case: TestCase) -> list[str]:
    lines = [
        f'<testcase classname={quoted(case.classname)} name={quoted(case.name)} time="{case.seconds:.3f}">'
    ]
    if case.properties:
        lines.append("<properties>")
        lines += [
            f"<property name={quoted(k)} value={quoted(v)}/>" for k, v in case.properties.items()
        ]
        lines.append("</properties>")
    if case.result in ("failed", "error"):
        tag = "failure" if case.result == "failed" else "error"
        lines.append(
            f"<{tag} type={quoted(case.kind)} message={quoted(case.message)}>{escaped(case.text)}</{tag}>"
        )
    elif case.result == "skipped":
        lines.append(f"<skipped message={quoted(case.message)}/>")
    if case.output:
        text = case.output[-OUTPUT_MAX:].decode(errors="replace")
        lines.append(f"<system-out>{escaped(text)}</system-out>")
    return [*lines, "</testcase>"]


def escaped(text: str) -> str:
    """Text between tags; what XML 1.0 cannot hold is replaced."""
    joined = "\n".join(clean(line) for line in text.splitlines())
    return joined.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def quoted(text: str) -> str:
    """An attribute's value, with its quotes."""
    return '"' + escaped(text).replace('"', "&quot;").replace("\n", "&#10;") + '"'
