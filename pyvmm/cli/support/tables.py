"""Tables for people."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.machine import Machine

GAP = "  "
#: Columns of a terminal below which the last cell of a row is no longer wrapped beside the others.
BESIDE_MIN = 24


def rows_as_text(rows: Sequence[Sequence[str]], width: int | None, heads: Sequence[str]) -> str:
    """A table as text without a newline at its end.

    Whatever is wider than ``width`` is wrapped in the last column, or, if that leaves too little,
    written as one record per row.

    :param width: of the terminal; None for lines of any length.
    :param heads: of the columns; none for a table without a first line.
    """
    if not rows:
        line = GAP.join(heads)
        return line if width is None else "\n".join(wrapped(line, width))
    table = [list(heads), *rows] if heads else [*rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    before = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
    if width is None or before + widths[-1] <= width:
        lines = [[row[-1]] for row in table]
    elif width - before >= BESIDE_MIN:
        lines = [wrapped(row[-1], width - before) for row in table]
    else:
        return "\n".join(_record(row, width, heads) for row in rows)
    out = []
    for row, last in zip(table, lines, strict=True):
        cells = [text.ljust(n) for text, n in zip(row, widths, strict=False)][:-1]
        out.append(GAP.join([*cells, last[0]]).rstrip())
        out += [" " * before + line for line in last[1:]]
    return "\n".join(out)


def _record(row: Sequence[str], width: int, heads: Sequence[str]) -> str:
    """A row of a table that is too wide: a line per cell, or without heads the last cell below the
    others.
    """
    if heads:
        room = max(map(len, heads))
        lines = [f"{head.ljust(room)}{GAP}{cell}" for head, cell in zip(heads, row, strict=True)]
        return "\n".join([*(line.rstrip() for line in lines), ""])
    first = GAP.join(row[:-1]).rstrip()
    return "\n".join([first, *(f"    {line}" for line in wrapped(row[-1], width - 4))])


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns, but for longer words; at least one line."""
    import textwrap

    return textwrap.wrap(text, max(width, 8), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def exits_table(machine: Machine, rows: int = 12) -> str:
    """How often the guest exited to the VMM, and why: the most frequent causes first."""
    ledger = machine.ledger()
    out = [f"{ledger.total} exits to the VMM:"]
    for line in ledger.lines[:rows]:
        mean = line.time / line.count / 1000
        out.append(f"  {line.count:8}  {line.what:56} {mean:9.1f} us each")
    rest = sum(line.count for line in ledger.lines[rows:])
    if rest:
        out.append(f"  {rest:8}  {len(ledger.lines) - rows} other causes")
    return "\n".join(out)
