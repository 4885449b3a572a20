"""What holds of every trace that pyvmm writes, by the rules of the Trace Event format."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def check_trace(path: Path) -> dict[str, Any]:
    """Load a trace and check it; returns its content, with ``tracks``: (process, thread) by name ->
    its events.
    """
    trace: dict[str, Any] = json.loads(path.read_text())
    assert trace["displayTimeUnit"] in ("ms", "ns")
    processes: dict[int, str] = {}
    threads: dict[tuple[int, int], str] = {}
    events: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event.get("args", {}), dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            elif event["name"] == "thread_name":
                threads[event["pid"], event["tid"]] = event["args"]["name"]
            continue
        assert event["ph"] in ("X", "i") and event["cat"]
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        else:
            assert event["s"] == "t"
        events[event["pid"], event["tid"]].append(event)
    for (pid, tid), track in events.items():
        assert pid in processes and (pid, tid) in threads, "every track has a name"
        times = [event["ts"] for event in track]
        assert times == sorted(times), (threads[pid, tid], "times only grow")
        ends: list[float] = []  # of the spans that we are in: they nest
        for event in track:
            while ends and ends[-1] <= event["ts"] + 0.0005:
                ends.pop()
            end = event["ts"] + event.get("dur", 0)
            assert not ends or end <= ends[-1] + 0.002, (threads[pid, tid], event)
            if event["ph"] == "X":
                ends.append(end)
    trace["tracks"] = {
        (processes[pid], threads[pid, tid]): track for (pid, tid), track in events.items()
    }
    return trace


def names(trace: dict[str, Any], process: str, thread: str) -> list[str]:
    """The names of a track's events, in order; process and thread by the begin of their names."""
    return [
        event["name"]
        for (p, t), track in trace["tracks"].items()
        if p.startswith(process) and t.startswith(thread)
        for event in track
    ]


def in_order(wanted: list[str], got: list[str]) -> bool:
    """Whether ``wanted`` comes in ``got`` in that order, others in between."""
    rest = iter(got)
    return all(any(name == want for name in rest) for want in wanted)
