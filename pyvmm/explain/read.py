"""Reads traces. A trace may come from anybody, and what is in it from a hostile guest: all types
and sizes are checked here, and text has no character left that could do more than be read.
"""

from __future__ import annotations

import json
import math
import os
import stat

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Bytes of a file, characters of a text, arguments per event, entries per list.
FILE_MAX, TEXT_MAX, ARGS_MAX, LIST_MAX = 1 << 29, 400, 40, 16
REMEDY = "name a file that pyvmm run --trace has written"


class Event:
    """One event of a trace.

    :ivar number: its place in the file. :ivar at, dur: microseconds.
    """

    __slots__ = ("args", "at", "category", "dur", "name", "number", "pid", "tid")

    def __init__(
        self,
        number: int,
        name: str,
        category: str,
        at: float,
        dur: float,
        pid: int,
        tid: int,
        args: dict[str, Any],
    ) -> None:
        self.number, self.name, self.category = number, name, category
        self.at, self.dur, self.pid, self.tid, self.args = at, dur, pid, tid, args


class Card:
    """A card of the trace: its name, process number, data paths in order, and its ways as ``--net``
    has them: of kicks, of interrupts, and who sends.
    """

    __slots__ = ("interrupt", "name", "notify", "paths", "pid", "worker")

    def __init__(
        self,
        name: str,
        pid: int,
        paths: list[str],
        *,
        notify: str,
        interrupt: str = "irqfd",
        worker: str = "thread",
    ) -> None:
        self.name, self.pid, self.paths = name, pid, paths
        self.notify, self.interrupt, self.worker = notify, interrupt, worker


class Trace:
    """What a page is made of.

    :ivar events: in the order of time. :ivar dropped: per track, how many older events the
        recorder has overwritten. :ivar malformed: events that were left out because they are none.
    """

    def __init__(
        self,
        events: list[Event],
        cards: list[Card],
        about: dict[str, str],
        dropped: dict[str, int],
        malformed: int,
    ) -> None:
        self.events, self.cards, self.about = events, cards, about
        self.dropped, self.malformed = dropped, malformed

    def card(self, name: str | None) -> Card:
        """The card of that name, or the first.

        :raises UsageError: there is none.
        """
        if not self.cards:
            raise UsageError("the trace has no card", "trace a run with a network card")
        for card in self.cards:
            if name in (None, card.name):
                return card
        names = ", ".join(card.name for card in self.cards)
        raise UsageError(f"--card {clean(str(name))}: no such card", f"the trace has {names}")


def clean(text: str, most: int = TEXT_MAX) -> str:
    """``text`` with each character that does not print as its number, and cut to ``most``."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def load(path: str) -> Trace:
    """Read a file.

    :raises UsageError: there is no such file, or it is no trace of pyvmm's.
    """
    try:
        with open(path, "rb", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as f:
            if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
                raise UsageError(f"{path}: no file", REMEDY)
            data = f.read(FILE_MAX + 1)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise UsageError(f"cannot read {path}: {why}", REMEDY) from e
    if len(data) > FILE_MAX:
        raise UsageError(f"{path}: longer than {FILE_MAX >> 20} MiB", "trace fewer events")
    try:
        return take(json.loads(data), path)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{path}: no trace of pyvmm's", REMEDY) from e


def take(document: object, name: str) -> Trace:
    """Check a document.

    :param name: for the error.
    :raises UsageError: it is no trace of pyvmm's.
    """
    events = document.get("traceEvents") if isinstance(document, dict) else None
    other = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(events, list) or not isinstance(other, dict) or "nics" not in other:
        raise UsageError(f"{name}: no trace of pyvmm's, or an old one", REMEDY)
    pids: dict[str, int] = {}
    out, malformed = [], 0
    for number, raw in enumerate(events):
        event = _event(number, raw)
        if event is None:
            malformed += 1
        elif event.category == "M":
            if event.name == "process_name":
                label = event.args.get("name")
                if isinstance(label, str):
                    pids.setdefault(label.partition(" (")[0], event.pid)
        else:
            out.append(event)
    out.sort(key=lambda e: (e.at, -e.dur))
    cards = [card for raw in _list(other["nics"]) if (card := _card(raw, pids)) is not None]
    about = {key: clean(str(other.get(key, ""))) for key in ("pyvmm", "cmdline")}
    lost = other.get("dropped")
    dropped = {
        clean(str(track), 60): count
        for track, count in list(lost.items() if isinstance(lost, dict) else ())[:LIST_MAX]
        if isinstance(count, int)
    }
    return Trace(out, cards, about, dropped, malformed)


def _event(number: int, raw: object) -> Event | None:
    if not isinstance(raw, dict):
        return None
    name, phase, category = raw.get("name"), raw.get("ph"), raw.get("cat", "")
    at, dur = _time(raw.get("ts")), _time(raw.get("dur", 0))
    pid, tid, args = raw.get("pid"), raw.get("tid"), raw.get("args", {})
    if not isinstance(name, str) or phase not in ("X", "i", "M") or not isinstance(category, str):
        return None
    if at is None or dur is None or not isinstance(pid, int) or not isinstance(tid, int):
        return None
    if not isinstance(args, dict):
        return None
    kept = {
        clean(str(key), 60): _value(value)
        for key, value in (list(args.items())[:ARGS_MAX] if len(args) > ARGS_MAX else args.items())
    }
    category = "M" if phase == "M" else clean(category, 20)
    return Event(number, clean(name), category, at, dur, pid, tid, kept)


def _time(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e15 and math.isfinite(value) else None


def _value(value: object) -> Any:
    """An argument: a number, a truth, a text, or a list of texts."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return value if abs(value) < 1 << 64 else clean(hex(value))
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean(str(_short(item))) for item in value[:LIST_MAX]]
    if isinstance(value, dict):
        items = list(value.items())[:LIST_MAX]
        return clean(", ".join(f"{key} {_short(item)}" for key, item in items))
    return ""


def _short(item: object) -> object:
    """What is inside a list or an object, not deeper."""
    if isinstance(item, dict):
        return ", ".join(f"{k} {v}" for k, v in list(item.items())[:LIST_MAX])
    return item


def _list(value: object) -> list[Any]:
    return value[:64] if isinstance(value, list) else []


def _card(raw: object, pids: dict[str, int]) -> Card | None:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        return None
    name = clean(raw["name"])
    if name not in pids:
        return None
    paths = [clean(str(path), 20) for path in _list(raw.get("paths"))]
    return Card(
        name,
        pids[name],
        paths or ["?"],
        notify=clean(str(raw.get("notify")), 20),
        interrupt=clean(str(raw.get("interrupt", "irqfd")), 20),
        worker=clean(str(raw.get("worker", "thread")), 20),
    )
