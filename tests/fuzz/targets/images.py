"""Files of other people that are read before a guest runs or after it has run: the header of a
qcow2 image, and traces.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

from pyvmm.errors import UsageError
from pyvmm.explain.arrows import Diagram
from pyvmm.explain.mermaid import mermaid
from pyvmm.explain.page import page
from pyvmm.explain.read import take
from pyvmm.host import qcow2
from pyvmm.spec.qcow2 import HEADER, HEADER_V3, QCOW_MAGIC
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

FIELDS = HEADER + HEADER_V3.lstrip(">")
EVENTS = (
    *("KVM_EXIT_IO", "KVM_EXIT_MMIO", "kick", "batch", "packet", "negotiated", "process_name"),
    *("irq", "switch", "phase", "driver status", "control", "write", "read", ""),
)
KEYS = (
    *("name", "queue", "device", "register", "value", "size", "write", "address", "length"),
    *("segments", "bytes", "head", "position", "used", "call", "count", "header", "format"),
    *("features", "rings", "paths", "direction", "data"),
)
TEXTS = ("", "net0", "a\x1b[0m\n", "queue 1 notify", "<script>", "0" * 500, "256 entries", "packed")


def header(d: Data) -> None:
    fields = struct.Struct(FIELDS)
    raw = bytearray(qcow2.empty(1 << 20)[: fields.size])
    while d.left:
        at, size = d.below(len(raw)), d.of((1, 2, 4, 8))
        raw[at : at + size] = d.value(size).to_bytes(size, "big")
        if d.one_in(16):
            del raw[d.below(len(raw) + 1) :]
            break
    head = bytes(raw)
    what, remedy = qcow2.problem(head)
    assert bool(what) == bool(remedy)
    if not what:  # it is complete, and names no other file
        magic, version, backing, *_ = struct.unpack_from(HEADER, head)
        assert magic == QCOW_MAGIC and version in (2, 3) and not backing
        assert qcow2.virtual_size(head) <= qcow2.SIZE_MAX


def value(d: Data, depth: int = 0) -> Any:
    kind = d.below(7)
    if kind == 0:
        return d.value(8)
    if kind == 1:
        return -d.value(4)
    if kind == 2:
        return d.of(TEXTS)
    if kind == 3:
        return d.some(20).decode(errors="surrogateescape")
    if kind == 4:
        return d.number(2) / 7
    if depth > 3 or not d.left:
        return None
    if kind == 5:
        return [value(d, depth + 1) for _ in range(d.below(5))]
    return {d.of(KEYS): value(d, depth + 1) for _ in range(d.below(5))}


def trace(d: Data) -> None:
    events: list[Any] = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "ts": 0}]
    events[0]["args"] = {"name": "net0"}
    nics: Any = [{"name": "net0", "paths": [d.of(("emulated", "vhost-net", "?"))]}]
    if d.one_in(8):
        nics = value(d)
    while d.left:
        event: Any = {
            "name": d.of(EVENTS),
            "ph": d.of("XXiM"),
            "cat": d.of(("exit", "worker", "control", "kernel", "M")),
            "ts": d.number(2),
            "dur": d.number(1),
            "pid": d.below(2),
            "tid": d.below(3),
            "args": {d.of(KEYS): value(d) for _ in range(d.below(8))},
        }
        if d.one_in(8):
            event[d.of(("name", "ph", "cat", "ts", "dur", "pid", "tid", "args"))] = value(d)
        events.append(event)
    document = json.loads(json.dumps({"traceEvents": events, "otherData": {"nics": nics}}))
    try:
        found = take(document, "trace")
        diagram = Diagram(found, found.card(None))
    except UsageError:
        return
    html = page([("trace", diagram)])
    html.encode()  # it can be written
    # The page's own scripts only: what is in the trace opens none.
    assert html.lower().count("<script") == html.lower().count("</script>")
    mermaid(diagram)


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""

    def one(data: bytes) -> None:
        d = Data(data)
        (trace if d.below(2) else header)(d)

    return one
