"""Plots as SVG: bars that are stacked or have whiskers, and lines over time. Colours are classes;
the page's style sheet gives their meaning.

A plot is WIDTH or NARROW units wide and is shown at about as many pixels. Its text has 12 and 11
units.
"""

from __future__ import annotations

import math
from html import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, NARROW = 360, 264
ROW, BAR = 40, 14  # a bar's row: a line of text, and below it the bar
TOP, AXIS = 6, 26
CHAR = 6.7  # width of an average letter at 12 units, rather too large
LEFT, PLOT = 46, 150  # of a line plot: room for the labels at the left, and its height


def ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least ``top``, in about ``count`` steps."""
    if top < 1e-6:
        return [0.0, 1.0]
    top = min(top, 1e15)
    raw = top / count
    power = 10.0
    while power > raw:
        power /= 10
    while power * 10 <= raw:
        power *= 10
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(step * i, 10) for i in range(math.ceil(top / step - 1e-3) + 1)]


def short(value: float) -> str:
    """A tick's label: 12k, 3.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def clip(text: str, room: float) -> str:
    """``text`` if it fits into ``room`` units, else its beginning."""
    most = max(int(room / CHAR), 3)
    return text if len(text) <= most else text[: most - 1] + "…"


def _frame(width: int, height: float, title: str, describe: str, body: list[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height:g}" width="{width}" '
        f'height="{height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f"<title>{escape(title)}</title><desc>{escape(describe)}</desc>" + "".join(body) + "</svg>"
    )


class Bar:
    """One row of a bar plot.

    :param parts: (class, value, words) from left to right.
    :param text: at the right, above the bar.
    :param whisker: (lowest, highest) of the whole bar.
    :param missing: why there is no bar; empty if there is one.
    """

    __slots__ = ("label", "missing", "parts", "text", "whisker")

    def __init__(
        self,
        label: str,
        parts: Sequence[tuple[str, float, str]],
        text: str,
        whisker: tuple[float, float] | None = None,
        missing: str = "",
    ) -> None:
        self.label, self.parts, self.text, self.whisker, self.missing = (
            label,
            parts,
            text,
            whisker,
            missing,
        )

    @property
    def top(self) -> float:
        """The value at which the bar or its whisker ends."""
        return max(sum(value for _, value, _ in self.parts), self.whisker[1] if self.whisker else 0)


def bars(title: str, unit: str, rows: Sequence[Bar], width: int = WIDTH) -> str:
    """Horizontal bars on one scale."""
    steps = ticks(max((row.top for row in rows), default=0), width // 90)
    left, right = 1.0, width - 1.0
    scale = (right - left) / steps[-1]
    height = TOP + ROW * len(rows) + AXIS
    bottom = height - AXIS
    body = []
    for step in steps:
        x = left + step * scale
        body.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom + 3:g}"/>'
            if step
            else f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom + 3:g}"/>'
        )
        anchor = "start" if step == 0 else "end" if step == steps[-1] else "middle"
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17:g}" '
            f'text-anchor="{anchor}">{short(step)}</text>'
        )
    said = []
    for index, row in enumerate(rows):
        y = TOP + index * ROW
        room = right - left - 8 - CHAR * len(row.text)
        body.append(
            f'<text class="name" x="{left:g}" y="{y + 13:g}">{escape(clip(row.label, room))}</text>'
        )
        text = row.text
        kind = "value"
        if row.missing:
            text, kind = clip(row.missing, width - 10 - CHAR * len(row.label)), "value missing"
        body.append(
            f'<text class="{kind}" x="{right:g}" y="{y + 13:g}" '
            f'text-anchor="end">{escape(text)}</text>'
        )
        x = left
        for name, value, words in row.parts:
            wide = value * scale
            if wide >= 0.05:
                body.append(
                    f'<rect class="{name}" x="{x:.2f}" y="{y + 19:g}" '
                    f'width="{wide:.2f}" height="{BAR}">'
                    f"<title>{escape(f'{row.label}: {words}')}</title></rect>"
                )
            x += wide
        if row.whisker and row.whisker[0] < row.whisker[1]:
            low, high = (left + v * scale for v in row.whisker)
            middle = y + 19 + BAR / 2
            body.append(
                f'<path class="whisker" d="M{low:.1f} {middle:g}H{high:.1f}'
                f"M{low:.1f} {middle - 4:g}v8"
                f'M{high:.1f} {middle - 4:g}v8"/>'
            )
        said.append(f"{row.label}: {row.missing or row.text}")
    return _frame(width, height, f"{title}, {unit}", "; ".join(said), body)


def lines(
    title: str,
    unit: str,
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    width: int = NARROW,
) -> str:
    """Lines over seconds: (name, class, points)."""
    end = max((x for _, _, points in series for x, _ in points), default=1) or 1
    top = max((y for _, _, points in series for _, y in points), default=0)
    steps = ticks(top, 3)
    right, bottom = width - 6.0, TOP + PLOT
    height = bottom + AXIS
    across, up = (right - LEFT) / end, (PLOT - 6) / steps[-1]
    body = []
    for step in steps:
        y = bottom - step * up
        kind = "grid" if step else "axis"
        body.append(f'<line class="{kind}" x1="{LEFT}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" '
            f'text-anchor="end">{short(step)}</text>'
        )
    seconds = [t for t in ticks(end, 4) if t <= end * 1.001]
    for step in seconds:
        x = LEFT + step * across
        anchor = "end" if x > right - 8 else "middle"
        text = f"{short(step)} s" if step == seconds[-1] else short(step)
        body.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 17:g}" '
            f'text-anchor="{anchor}">{text}</text>'
        )
    said = []
    for name, kind, points in series:
        path = "L".join(f"{LEFT + x * across:.1f} {bottom - y * up:.1f}" for x, y in points)
        if points:
            body.append(
                f'<path class="line {kind}" d="M{path}"><title>{escape(name)}</title></path>'
            )
            said.append(f"{name}: up to {short(round(max(y for _, y in points)))}")
    return _frame(width, height, f"{title}, {unit}", "; ".join(said), body)


def height_of(svg: str) -> float:
    """The height of a plot that was made here."""
    return float(svg.partition('" height="')[2].partition('"')[0])
