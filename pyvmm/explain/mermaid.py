"""The text version: Mermaid's sequence diagrams, which GitHub and GitLab draw in a README."""

from __future__ import annotations

from pyvmm.explain.arrows import Arrow
from pyvmm.explain.fold import Fold, Gap, fold
from pyvmm.explain.page import duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.arrows import Diagram

#: Rows of a diagram, and characters of a label.
ROWS, LABEL = 120, 90
SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:_+-*/()=[]'?!µ")


def mermaid(diagram: Diagram, rows: int = ROWS) -> str:
    """The diagram as text.

    :param rows: about how many arrows the text has.
    """
    lines = ["sequenceDiagram"]
    lines += [
        f"    participant {id_} as {_safe(name)} ({_safe(where)})"
        for id_, name, where in diagram.lifelines
        if id_ in diagram.seen
    ]
    first, last = diagram.lifelines[0][0], diagram.lifelines[-1][0]
    seen = [id_ for id_, _, _ in diagram.lifelines if id_ in diagram.seen] or [first, last]
    over = f"{seen[0]},{seen[-1]}"
    headers = list(diagram.headers)
    for row in fold(diagram.arrows, rows):
        begin = row.at if isinstance(row, Arrow) else row.arrows[0].at
        while headers and headers[0][0] <= begin:
            lines.append(f"    Note over {over}: {_safe(headers.pop(0)[1])}")
        if isinstance(row, Gap):
            lines.append(f"    Note over {over}: {len(row.arrows)} arrows left out")
        elif isinstance(row, Fold):
            lines.append(f"    loop {row.times} times")
            lines += [f"    {_arrow(arrow)}" for arrow in row.arrows[: row.period]]
            lines.append("    end")
        else:
            lines.append(_arrow(row))
    if diagram.quiet():
        lines.append(f"    Note over {over}: {_safe(diagram.quiet())}")
    return "\n".join(lines) + "\n"


def _arrow(arrow: Arrow) -> str:
    line = "-->>" if arrow.kind == "read" else "--x" if arrow.kind == "fault" else "->>"
    took = f" ({duration(arrow.dur)})" if arrow.dur else ""
    return f"    {arrow.src}{line}{arrow.dst}: {_safe(arrow.label)}{took}"


def _safe(text: str) -> str:
    """Text in which nothing means something to Mermaid or to Markdown."""
    text = text if len(text) <= LABEL * 3 else text[: LABEL * 3] + "..."
    return "".join(c if c in SAFE else f"#{ord(c)};" for c in text)
