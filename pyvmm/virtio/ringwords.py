"""What a snapshot of a virtqueue says, in words for people: the answer of the command
``x-pyvmm-rings`` (docs/control.md).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def asks(q: Mapping[str, Any]) -> str:
    """The notifications that each side asks for (2.7.7, 2.7.10, 2.8.10).

    :param q: a virtqueue that is in use, of ``x-pyvmm-rings``.
    """
    if q["format"] == "packed":
        return _packed_asks(q)
    if not q["event-idx"]:
        kick = "no kicks" if q["used"]["flags"] & 1 else "kicks"
        call = "no interrupts" if q["avail"]["flags"] & 1 else "interrupts"
        return f"the device asks for {kick}, the driver for {call}"
    kick, call = q["used"]["avail-event"], q["avail"]["used-event"]
    kick_in = (kick - q["avail"]["idx"]) % 65536
    call_in = (call - q["used"]["idx"]) % 65536
    # If an index has passed an event index, that side asks for nothing until it moves the event
    # index (virtio 1.2, 2.7.10).
    kick_text = f"kick at {kick}" + ("" if kick_in < 32768 else " (passed)")
    call_text = f"interrupt at {call}" + ("" if call_in < 32768 else " (passed)")
    return f"device: {kick_text} (avail_event); driver: {call_text} (used_event)"


def _packed_asks(q: Mapping[str, Any]) -> str:
    words = []
    for side, what in (("device", "kick"), ("driver", "interrupt")):
        event = q[side]["event"]
        if event["flags"] == "desc":
            text = f"{what} at {event['offset']}, wrap counter {event['wrap']}"
        else:
            text = {"enable": f"{what}s", "disable": f"no {what}s"}.get(event["flags"], "reserved")
        words.append(f"{side}: {text}")
    return "; ".join(words)


def chain_words(chain: Mapping[str, Any]) -> str:
    """The first six descriptors of a chain, and what is wrong with the chain."""
    parts = []
    for d in chain["descriptors"]:
        way = (
            "indirect table"
            if "indirect" in d["flags"]
            else "write"
            if "write" in d["flags"]
            else "read"
        )
        indent = "  " if d.get("indirect") else ""
        parts.append(f"{indent}{d['index']} {way} {d['addr']:#x}+{d['len']}")
    text = ", ".join(parts[:6]) + (f", ... {len(parts) - 6} more" if len(parts) > 6 else "")
    return text + (f"  ! {chain['problem']}" if "problem" in chain else "")


def regions(q: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The parts of a ring that the device has, in order: what they are, the first entry, and how
    many entries follow each other from there, round the end of the ring if need be.

    ``in-flight`` has been taken by the data path and not returned; ``available`` has not been
    taken, or nobody tells (``taken`` is null). Entries are those of the available ring, or of the
    descriptor ring of a packed virtqueue.

    :param q: a virtqueue that is in use, of ``x-pyvmm-rings``.
    """
    size = q["size"]
    if q["format"] == "packed":
        start = q["device"]["next"]
        many = min((q["driver"]["next"] - start) % size or _full(q), size)
    else:
        start, many = q["used"]["idx"] % size, min(q["outstanding"], size)
    flight = min(q["in-flight"] or 0, many)
    parts = [
        ("in-flight", start, flight),
        ("available", (start + flight) % size, many - flight),
    ]
    return [part for part in parts if part[2]]


def _full(q: Mapping[str, Any]) -> int:
    """Entries of a packed ring whose driver and device are at the same place: all if the driver is
    a lap ahead, none if not.
    """
    return q["size"] if q["driver"]["wrap"] != q["device"]["wrap"] else 0
