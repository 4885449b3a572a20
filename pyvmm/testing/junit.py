"""JUnit XML, in the form that GitHub, GitLab and Jenkins read."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from pyvmm.testing.verdict import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    Result = Literal["passed", "failed", "error", "skipped"]

OUTPUT_MAX = 1 << 16  # the last bytes of a test's output that go into the file


class TestCase:
    """One <testcase>.

    :ivar result: ``passed``, ``failed``, ``error`` or ``skipped``.
    :ivar kind: the failure's type, such as ``panic``.
    :ivar message: one line.
    :ivar text: the failure's body.
    :ivar output: the test's output.
    :ivar properties: name -> value.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        classname: str,
        name: str,
        seconds: float,
        result: Result,
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
    """The whole file, in ASCII, so that it is valid whatever the tests have printed and whatever
    encoding a reader assumes.
    """
    counts = {r: sum(c.result == r for c in cases) for r in ("failed", "error", "skipped")}
    totals = {
        "tests": str(len(cases)),
        "failures": str(counts["failed"]),
        "errors": str(counts["error"]),
        "skipped": str(counts["skipped"]),
        "time": f"{seconds:.3f}",
    }
    root = ET.Element("testsuites", totals)
    inner = ET.SubElement(root, "testsuite", {"name": _legal(suite), **totals})
    for case in cases:
        inner.append(_case(case))
    ET.indent(root, "")
    # Other characters become character references.
    text = ET.tostring(root, "us-ascii").decode("ascii")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _case(case: TestCase) -> ET.Element:
    attributes = {"classname": _legal(case.classname), "name": _legal(case.name)}
    out = ET.Element("testcase", attributes, time=f"{case.seconds:.3f}")
    if case.properties:
        properties = ET.SubElement(out, "properties")
        for name, value in case.properties.items():
            ET.SubElement(properties, "property", name=_legal(name), value=_legal(value))
    if case.result in ("failed", "error"):
        tag = "failure" if case.result == "failed" else "error"
        about = {"type": _legal(case.kind), "message": _legal(case.message)}
        ET.SubElement(out, tag, about).text = _legal(case.text)
    elif case.result == "skipped":
        ET.SubElement(out, "skipped", message=_legal(case.message))
    if case.output:
        text = case.output[-OUTPUT_MAX:].decode(errors="replace")
        ET.SubElement(out, "system-out").text = _legal(text)
    return out


def _legal(text: str) -> str:
    """``text`` with U+FFFD in place of each character that XML 1.0 cannot hold (section 2.2) or
    that would move a terminal's cursor.
    """
    return "\n".join(clean(line) for line in text.splitlines())
