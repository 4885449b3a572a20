"""Repeated stretches of arrows become one row with a number. What is still too much is left out,
with a row that says how much.
"""

from __future__ import annotations

import statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.explain.arrows import Arrow

#: The longest stretch that is looked for, how often it must come, and arrows that a page keeps.
PERIOD, TIMES, KEEP = 24, 3, 2000


class Fold:
    """A stretch that comes several times.

    :ivar arrows: all of them. :ivar period: arrows of one stretch. :ivar kept: whether the page
        has the stretches between the first and the last.
    """

    __slots__ = ("arrows", "kept", "period")

    def __init__(self, arrows: list[Arrow], period: int) -> None:
        self.arrows, self.period = arrows, period
        self.kept = False

    @property
    def times(self) -> int:
        """How often the stretch comes."""
        return len(self.arrows) // self.period

    @property
    def inner(self) -> list[Arrow]:
        """The stretches after the first one."""
        return self.arrows[self.period :]

    def spread(self) -> list[tuple[float, float, float]]:
        """Lowest, median and highest duration of each arrow of the stretch, in microseconds."""
        out = []
        for place in range(self.period):
            durs = [arrow.dur for arrow in self.arrows[place :: self.period]]
            out.append((min(durs), round(statistics.median(durs), 3), max(durs)))
        return out


class Gap:
    """Arrows that the page does not have."""

    __slots__ = ("arrows",)

    def __init__(self, arrows: list[Arrow]) -> None:
        self.arrows = arrows


Row = "Arrow | Fold | Gap"


def fold(arrows: list[Arrow], keep: int = KEEP) -> list[Arrow | Fold | Gap]:
    """Rows for ``arrows``, which are in the order of time.

    :param keep: about how many arrows the page may have. First the stretches inside of folds go,
        the longest ones first, then whatever is in the middle.
    """
    names: dict[object, int] = {}
    keys = [names.setdefault(arrow.key, len(names)) for arrow in arrows]
    rows: list[Arrow | Fold | Gap] = []
    at = 0
    while at < len(arrows):
        period, times = _longest(keys, at)
        if times > TIMES:
            # A stretch begins with a kick if it has one.
            begin = next((i for i in range(period) if arrows[at + i].begins), 0)
            rows += arrows[at : at + begin]
            at += begin
            times -= begin > 0
        if times >= TIMES:
            rows.append(Fold(arrows[at : at + period * times], period))
            at += period * times
        else:
            rows.append(arrows[at])
            at += 1
    shown = sum(row.period if isinstance(row, Fold) else 1 for row in rows)
    left = keep - shown
    folds = sorted((r for r in rows if isinstance(r, Fold)), key=lambda r: len(r.arrows))
    for row in folds:
        row.kept = len(row.inner) <= left
        left -= len(row.inner) if row.kept else 0
    return rows if shown <= keep else _cut(rows, keep)


def _longest(keys: list[int], at: int) -> tuple[int, int]:
    """The period whose repetition from ``at`` on covers most, and how often it comes."""
    best, times = 1, 1
    end = len(keys)
    for period in range(1, PERIOD + 1):
        if at + period >= end:
            break
        if keys[at] != keys[at + period]:
            continue
        to = at + period
        while to < end and keys[to] == keys[to - period]:
            to += 1
        count = (to - at) // period
        if count >= TIMES and count * period > best * times:
            best, times = period, count
    return best, times


def _cut(rows: list[Arrow | Fold | Gap], keep: int) -> list[Arrow | Fold | Gap]:
    """Leave out the middle: the set-up is at the beginning, the end of the run at the end."""
    head, used = 0, 0
    while head < len(rows) and used < keep * 3 // 4:
        used += _size(rows[head])
        head += 1
    tail = len(rows)
    while tail > head and used < keep:
        tail -= 1
        used += _size(rows[tail])
    gone: list[Arrow] = []
    for row in rows[head:tail]:
        gone += [row] if not isinstance(row, Fold | Gap) else row.arrows
    return [*rows[:head], Gap(gone), *rows[tail:]] if gone else rows


def _size(row: Arrow | Fold | Gap) -> int:
    return row.period if isinstance(row, Fold) else 1
