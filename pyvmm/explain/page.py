"""The page of one trace, or of two side by side: one file that loads nothing.

What comes from a guest or a back-end reaches the page in two ways only: as JSON without the
characters that could end its element, from which the script makes text nodes, and as escaped text.
The content security policy lets this module's script run, by its hash, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html import escape
from pathlib import Path

from pyvmm.errors import UsageError
from pyvmm.explain.arrows import PER_EVENT, WORK, Arrow, Diagram
from pyvmm.explain.fold import KEEP, Fold, Gap, fold
from pyvmm.explain.read import REMEDY, clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HERE = Path(__file__).parent


def page(diagrams: list[tuple[str, Diagram]], keep: int = KEEP) -> str:
    """The page.

    :param diagrams: one or two, each with the path of its trace.
    :param keep: about how many arrows the page has in all.
    :raises UsageError: the trace has something that no page can have.
    """
    diagrams = [(clean(os.path.basename(path), 80), one) for path, one in diagrams]  # noqa: PTH119
    texts = _Texts()
    data = [_data(name, diagram, keep // len(diagrams), texts) for name, diagram in diagrams]
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    title = " and ".join(_paths(d) for _, d in diagrams)
    parts = {
        "SCRIPT-HASH": _hash(script),
        "STYLE-HASH": _hash(style),
        "STYLE": style,
        "SCRIPT": script,
        "TITLE": escape(f"The two flows of virtio networking: {title}"),
        "CLASS": "two" if len(diagrams) == 2 else "one",
        "LEAD": escape(_lead(diagrams)),
        "SAVES": difference(diagrams[0][1], diagrams[1][1]) if len(diagrams) == 2 else "",
        "TABLES": "".join(_table(name, diagram) for name, diagram in diagrams),
        "DATA": _script_safe({"texts": list(texts.numbers), "traces": data}),
    }
    pieces = (HERE / "page.html").read_text(encoding="utf-8").split("@")
    # Every second piece is a name: nothing that was put in is looked at again.
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


class _Texts:
    """The texts of a page, each of them once: an arrow has their numbers."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _script_safe(data: object) -> str:
    """JSON that cannot end the element that it is in, nor begin another.

    :raises UsageError: a number is none, such as NaN.
    """
    try:
        text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except ValueError as e:
        raise UsageError(f"the trace has what no page can have: {e}", REMEDY) from e
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _paths(diagram: Diagram) -> str:
    """The data paths of a diagram's card, and what of its ways is not the usual one."""
    card = diagram.card
    ways = ["notify=exit"] if card.notify == "exit" else []
    ways += ["worker=vcpu"] if card.worker == "vcpu" else []
    ways += ["interrupt=ioctl"] if card.interrupt == "ioctl" else []
    return ", ".join([", then ".join(card.paths), *ways])


def _lead(diagrams: list[tuple[str, Diagram]]) -> str:
    said = []
    for name, diagram in diagrams:
        packets = diagram.packets()
        text = f"{name}: {len(diagram.arrows)} arrows, "
        text += f"{packets['sent']} packets to the host and {packets['received']} to the guest"
        said.append(text)
    return "; ".join(said) + ". Each arrow is an event of the trace. Press ? for the keys."


def _data(name: str, diagram: Diagram, keep: int, texts: _Texts) -> dict[str, Any]:
    """A diagram for the script."""
    places = {line[0]: at for at, line in enumerate(diagram.lifelines)}
    rows = fold(diagram.arrows, keep)
    headers = list(diagram.headers)
    out: list[dict[str, Any]] = []
    for row in rows:
        begin = row.at if isinstance(row, Arrow) else row.arrows[0].at
        while headers and headers[0][0] <= begin:
            at, text = headers.pop(0)
            out.append({"h": text, "t": at})
        out.append(_row(row, places, texts))
    out += [{"h": text, "t": at} for at, text in headers]
    trace = diagram.trace
    notes = [f"{diagram.card.name}, notify={diagram.card.notify}"]
    left = left_out(rows)
    if left:
        notes.append(f"{left} of {len(diagram.arrows)} arrows left out")
    if diagram.others:
        notes.append(f"{diagram.others} exits of other devices not drawn")
    for track, count in trace.dropped.items():
        notes.append(f"{count} older events of {track} were overwritten (--trace-events)")
    if trace.malformed:
        notes.append(f"{trace.malformed} malformed events left out")
    if len(trace.cards) > 1:
        notes.append(
            f"the first of {len(trace.cards)} cards"
            if diagram.card is trace.cards[0]
            else f"one of {len(trace.cards)} cards"
        )
    return {
        "title": _paths(diagram),
        "subtitle": "; ".join([name, *notes]),
        "quiet": diagram.quiet(),
        "lifelines": [
            {"id": id_, "name": name, "where": where, "seen": id_ in diagram.seen}
            for id_, name, where in diagram.lifelines
        ],
        "bands": [[begin, end] for begin, end, _ in diagram.hand_overs],
        "rows": out,
        "counts": counts(diagram),
        "left": left,
    }


def counts(diagram: Diagram) -> dict[str, dict[str, int]]:
    """Per category: events that belong to the card, and arrows."""
    events: dict[str, set[int]] = {}
    arrows: dict[str, int] = {}
    by_number = {event.number: event.category for event in diagram.trace.events}
    for arrow in diagram.arrows:
        category = by_number[arrow.event]
        events.setdefault(category, set()).add(arrow.event)
        arrows[category] = arrows.get(category, 0) + 1
    return {
        category: {"events": len(events.get(category, ())), "arrows": arrows.get(category, 0)}
        for category in PER_EVENT
    }


def left_out(rows: list[Arrow | Fold | Gap]) -> int:
    """How many arrows the page does not have."""
    gaps = sum(len(row.arrows) for row in rows if isinstance(row, Gap))
    return gaps + sum(len(r.inner) for r in rows if isinstance(r, Fold) and not r.kept)


def _row(row: Arrow | Fold | Gap, places: dict[str, int], texts: _Texts) -> dict[str, Any]:
    if isinstance(row, Gap):
        return {"gap": len(row.arrows), "t": row.arrows[0].at, "t1": row.arrows[-1].at}
    if isinstance(row, Fold):
        return {
            "n": row.times,
            "period": row.period,
            "t": row.arrows[0].at,
            "t1": row.arrows[-1].at,
            "spread": row.spread(),
            "first": [_row(arrow, places, texts) for arrow in row.arrows[: row.period]],
            "more": [_row(arrow, places, texts) for arrow in row.inner] if row.kept else None,
        }
    out: dict[str, Any] = {
        "i": row.event,
        "t": round(row.at, 3),
        "s": places[row.src],
        "e": places[row.dst],
        "v": [places[via] for via in row.via],
        "k": row.kind,
        "l": texts(row.label),
        "f": "hand-over" if row.kind == "hand-over" else row.flow,
        # Name, value and whether it has changed, of each.
        "x": [n for name, value, new in row.details for n in (texts(name), texts(value), int(new))],
    }
    if row.dur:
        out["d"] = round(row.dur, 3)
    if row.packet:
        out["p"] = row.packet
        out["m"] = row.same
    if row.ring is not None:
        out["r"] = row.ring
    return out


# --- tables ---------------------------------------------------------------------------------------


def duration(us: float) -> str:
    """Microseconds as a text."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= size:
            return f"{us / size:.2f} {unit}"
    return f"{us:.2f} µs" if us else "\u2013"


def _table(name: str, diagram: Diagram) -> str:
    """What all arrows of a trace amount to."""
    head = ("arrow", "count", "lowest", "median", "highest", "in all")
    rows = "".join(
        f'<tr><th scope="row">{escape(s["group"])}</th><td class="num">{s["count"]}</td>'
        + "".join(
            f'<td class="num">{duration(s[key])}</td>'
            for key in ("least", "median", "most", "total")
        )
        + "</tr>"
        for s in diagram.sums()
    )
    title = escape(f"All arrows of {name} ({_paths(diagram)})")
    columns = "".join(
        f'<th scope="col"{"" if i == 0 else " class=num"}>{text}</th>'
        for i, text in enumerate(head)
    )
    return (
        f'<details class="part"><summary>{title}</summary><div class="scrolls"><table><thead><tr>'
        f"{columns}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def difference(one: Diagram, other: Diagram) -> str:
    """The table of what one data path does and the other does not."""
    first = {s["group"]: s for s in one.sums()}
    second = {s["group"]: s for s in other.sums()}
    columns = "".join(f'<th scope="col" class="num">{escape(_paths(d))}</th>' for d in (one, other))
    rows = ""
    for group in [*first, *(g for g in second if g not in first)]:
        a, b = first.get(group), second.get(group)
        said, kind = "", ""
        lacks = one if a is None else other
        if (a is None or b is None) and group in WORK and lacks.elsewhere():
            said = f"not seen: {lacks.elsewhere()} does it"
        elif a is None or b is None:
            there = a or b
            assert there is not None
            kind = ' class="gone"'
            said = "vanishes" if b is None else "is new"
            if there["total"]:
                said += f"; {'saves' if b is None else 'costs'} {duration(there['total'])} in all"
        rows += (
            f'<tr{kind}><th scope="row">{escape(group)}</th><td class="num">{_cell(a, one)}</td>'
            f'<td class="num">{_cell(b, other)}</td><td>{said}</td></tr>'
        )
    return (
        '<details class="part" open><summary>Which arrows vanish, and what that saves</summary>'
        '<div class="scrolls"><table id="difference"><thead><tr><th scope="col">arrow</th>'
        f'{columns}<th scope="col">from left to right</th></tr></thead><tbody>{rows}</tbody>'
        '</table></div><p class="note">Count; per packet of both directions; median of the '
        "durations.</p>"
        "</details>"
    )


def _cell(s: dict[str, Any] | None, diagram: Diagram) -> str:
    if s is None:
        return "0"
    packets = sum(diagram.packets().values())
    each = f", {s['count'] / packets:.2f} per packet" if packets else ""
    return f"{s['count']}{each if 'register' not in s['group'] else ''}; {duration(s['median'])}"
