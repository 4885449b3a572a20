"""Runs a comparison: boots each mode in turn, several times, and counts each workload from its
start to its end.

A boot runs all workloads, one after another. Counters are read right before and right after a
workload, so that neither the boot nor the other workloads are in its figures.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, nullcontext
from subprocess import SubprocessError

from pyvmm import __version__
from pyvmm.compare import counters, plan
from pyvmm.compare.guests import TOOL_LIMIT, open_guest
from pyvmm.compare.ladder import steps
from pyvmm.compare.pinning import pinned, possible
from pyvmm.compare.stats import summarise
from pyvmm.doctor import flavour
from pyvmm.errors import (
    HostError,
    ImageError,
    KvmForbidden,
    KvmMissing,
    KvmUnsuitable,
    MemoryShort,
    NetError,
    PyvmmError,
    UsageError,
    VhostMissing,
    VhostUserError,
)
from pyvmm.hostnet import tools
from pyvmm.memory import parse_size
from pyvmm.testbed.testbed import emulated
from pyvmm.workloads import ToolFailed, read_ping, read_udp, received_mbit, run_tool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.compare.guests import Guest
    from pyvmm.compare.plan import Mode, Plan

SCHEMA = "pyvmm-compare/1"
#: Errors that every other mode would meet, too.
FOR_ALL = (KvmMissing, KvmForbidden, KvmUnsuitable, ImageError, MemoryShort, UsageError)
#: Errors that the next repeat of the same mode would meet, too.
FOR_MODE = (VhostMissing, NetError, VhostUserError)
SAMPLES_MAX = 600  # samples that are kept per workload
FEW_PACKETS = 10  # with fewer packets there are no figures per 1,000 packets
LINES_MAX = 40  # lines of the ledger that are kept per workload, the most frequent ones
SETTLE = 0.5  # seconds between workloads, so that no workload counts the last one's packets


class Comparison:
    """Runs a plan and keeps the results. ``document`` may be called at any time, also after an
    exception has ended ``run``.

    :param progress: called with one line of text for each step.
    """

    def __init__(self, p: Plan, progress: Callable[[str], None]) -> None:
        self._plan, self._progress = p, progress
        self._created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._runs: list[dict[str, Any]] = []
        self._modes: dict[str, dict[str, Any]] = {
            m.name: {
                "name": m.name,
                "kind": m.kind,
                "net": m.net,
                "problem": None,
                "notes": [],
                "version": "",
                "offered": [],
                "negotiated": [],
            }
            for m in p.modes
        }
        self._complete = False
        self._pin = p.pin and possible(p.cpus)
        self._trace: counters.ExitTrace | None = None

    def run(self) -> None:
        """Run all modes, workloads and repeats.

        :raises PyvmmError: no mode can run here (no KVM, no image). If some modes can, the document
            says which cannot.
        """
        p = self._plan
        with ExitStack() as stack:
            if p.reasons or any(mode.kind != "pyvmm" for mode in p.modes):
                self._open_trace(stack)
            total, number = p.repeat * len(p.modes), 0
            for repeat in range(p.repeat):
                for mode in p.modes:
                    number += 1
                    if self._modes[mode.name]["problem"] is None:
                        self._progress(f"{number}/{total} {mode.name}, repeat {repeat + 1}")
                        self._boot(mode, repeat)
        self._complete = True

    def _open_trace(self, stack: ExitStack) -> None:
        try:
            self._trace = stack.enter_context(counters.ExitTrace(reasons=self._plan.reasons))
        except HostError as e:
            for mode in self._plan.modes:
                if self._plan.reasons or mode.kind != "pyvmm":
                    self._modes[mode.name]["notes"].append(str(e))

    def _boot(self, mode: Mode, repeat: int) -> None:
        facts = self._modes[mode.name]
        run: dict[str, Any] = {
            "mode": mode.name,
            "repeat": repeat,
            "error": None,
            "boot_s": None,
            "workloads": [],
        }
        try:
            with open_guest(self._plan, mode, self._trace) as guest:
                self._runs.append(run)
                run["boot_s"] = round(guest.boot(), 3)
                got = guest.facts()
                notes = [*facts["notes"], *got.pop("notes", [])]
                facts |= {**got, "notes": list(dict.fromkeys(notes))}
                with pinned(guest.tasks(), self._plan.cpus) if self._pin else nullcontext():
                    self._warm_up(guest)
                    for workload in self._plan.workloads:
                        time.sleep(SETTLE)
                        done = self._workload(guest, workload)
                        run["workloads"].append(done)
                        self._progress(f"  {outcome(done)}")
        except FOR_ALL as e:
            if not (mode.huge and isinstance(e, MemoryShort)):
                raise
            facts["problem"] = str(e)
            self._progress(f"  {mode.name}: {e}")
        except (PyvmmError, OSError, SubprocessError) as e:
            if run in self._runs:
                run["error"] = str(e)
            if run not in self._runs or isinstance(e, FOR_MODE):
                facts["problem"] = str(e)
            self._progress(f"  {mode.name}: {e}")

    def _warm_up(self, guest: Guest) -> None:
        """Send pings that are not counted: both ends learn addresses, and Linux moves the first
        interrupts of a new card to their CPU.
        """
        try:
            self._tool(guest, tools.ping(plan.GUEST, 10, 0.05))
        except HostError as e:
            self._progress(f"  warming up: {e}")  # the workloads will report it, too

    def _workload(self, guest: Guest, name: str) -> dict[str, Any]:
        """Run a workload, and return what it counted."""
        out: dict[str, Any] = {"name": name, "error": None, "seconds": None}
        sampler = Sampler(guest, self._plan.samples)
        before, tasks = guest.counts(), guest.tasks()
        sampler.start()
        start = time.monotonic()
        result: dict[str, float | None] = {}
        try:
            try:
                text = self._drive(guest, name)
            finally:
                seconds = time.monotonic() - start
                samples = sampler.stop()
                tasks_after, after = guest.tasks(), guest.counts()
            result = read_result(name, text)
        except HostError as e:
            out["error"] = str(e)
        out |= figures(before, after, seconds)
        out["threads"] = counters.by_role(tasks, tasks_after)
        out |= {"throughput_mbit_s": None, "rtt_ms": None, "loss_percent": None, **result}
        out["samples"] = samples
        return out

    def _drive(self, guest: Guest, name: str) -> str:
        """Run the workload itself; returns the output of its tool.

        :raises HostError: the tool failed.
        """
        p = self._plan
        if name == "idle":
            time.sleep(p.seconds)
            return ""
        if name == "ping":
            count = max(1, round(p.seconds / plan.PING_INTERVAL))
            return self._tool(guest, tools.ping(plan.GUEST, count, plan.PING_INTERVAL))
        words = tools.iperf3(
            plan.GUEST,
            int(p.port(name)),
            p.seconds,
            reverse=not name.endswith("-rx"),
            udp=(plan.UDP_BYTES, plan.UDP[name]) if name in plan.UDP else None,
        )
        return self._tool(guest, words)

    def _tool(self, guest: Guest, words: list[str]) -> str:
        return run_tool(guest.space, words, self._plan.seconds + TOOL_LIMIT)

    def document(self) -> dict[str, Any]:
        """The results so far, as docs/compare.md describes them."""
        p = self._plan
        document = {
            "schema": SCHEMA,
            "pyvmm": __version__,
            "created": self._created,
            "partial": not self._complete,
            "host": {
                "kernel": os.uname().release,
                "kvm": flavour(),
                "testbed": emulated(),
                "cpus": len(os.sched_getaffinity(0)),
            },
            "guest": {
                "image": p.image,
                "kernel": p.kernel,
                "cpus": p.cpus,
                "memory_bytes": parse_size(p.memory),
                "append": p.append,
            },
            "settings": {
                "repeat": p.repeat,
                "seconds": p.seconds,
                "sample_s": p.samples,
                "reasons": p.reasons,
                "pinned": self._pin,
                "workloads": [{"name": w, "what": plan.WORKLOADS[w]} for w in p.workloads],
            },
            "modes": list(self._modes.values()),
            "runs": self._runs,
        }
        document["summary"] = summarise(document)
        if p.ladder:
            document["ladder"] = steps(document)
        return document


class Sampler:
    """Takes samples of a guest's exits, in a thread of its own that ends with ``stop``.

    Their number is bounded: if there are too many samples, every second one is dropped and the
    interval is doubled.
    """

    def __init__(self, guest: Guest, interval: float) -> None:
        self._guest, self._interval = guest, interval
        self._quit = threading.Event()
        self._rows: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._run, name="compare-sampler", daemon=True)
        self._begin = 0.0

    def start(self) -> None:
        """Begin to take samples."""
        self._begin = time.monotonic()
        self._thread.start()

    def _look(self) -> None:
        user, exits = self._guest.quick()
        self._rows.append((round(time.monotonic() - self._begin, 3), user, exits))

    def _run(self) -> None:
        try:
            self._look()
            while not self._quit.wait(self._interval):
                self._look()
                if len(self._rows) >= SAMPLES_MAX:
                    self._rows = self._rows[::2]
                    self._interval *= 2
        except (OSError, HostError):
            pass  # the guest is gone, and the workload reports it

    def stop(self) -> dict[str, list[float]]:
        """Stop; returns the time of each sample in seconds, and the counts since the first."""
        self._quit.set()
        self._thread.join()
        rows = self._rows
        return {
            "t": [row[0] for row in rows],
            "user_exits": [row[1] - rows[0][1] for row in rows],
            "kvm_exits": [row[2] - rows[0][2] for row in rows],
        }


def figures(
    before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], seconds: float
) -> dict[str, Any]:
    """What was counted between two readings. None: this mode does not count it."""

    def delta(group: str) -> dict[str, int]:
        return {name: value - before[group].get(name, 0) for name, value in after[group].items()}

    lines = {name: count for name, count in delta("lines").items() if count}
    causes, kvm, packets = delta("causes"), delta("kvm"), delta("packets")
    moved = packets["packets_to_guest"] + packets["packets_from_guest"]
    user = sum(causes.values()) if causes else None
    exits = kvm.get("exits")

    def per(count: int | None) -> float | None:
        return (
            round(1000 * count / moved, 3) if moved >= FEW_PACKETS and count is not None else None
        )

    return {
        "seconds": max(round(seconds, 4), 1e-4),
        "user_exits": user,
        "causes": causes or None,
        "reasons": delta("reasons") or None,
        "lines": dict(sorted(lines.items(), key=lambda item: -item[1])[:LINES_MAX]),
        "kvm": kvm,
        "interrupts": kvm.get("irq_injections"),
        "packets": packets,
        "queues": delta("queues"),
        "per_kpacket": {
            "user_exits": per(user),
            "kvm_exits": per(exits),
            "interrupts": per(kvm.get("irq_injections")),
        },
    }


def outcome(done: dict[str, Any]) -> str:
    """A workload's figures in one line of progress."""
    if done["error"]:
        return f"{done['name']} failed: {done['error']}"
    words = [f"{done['user_exits']} exits to userspace"] if done["user_exits"] is not None else []
    for key, unit in (("throughput_mbit_s", "Mbit/s"), ("rtt_ms", "ms")):
        if done[key] is not None:
            words.insert(0, f"{done[key]:g} {unit}")
    return f"{done['name']}: {', '.join(words)}"


def read_result(name: str, text: str) -> dict[str, float | None]:
    """The figures of a workload, from what its tool printed.

    :raises HostError: the tool's output cannot be parsed.
    """
    try:
        if name == "idle":
            return {}
        if name == "ping":
            rtt, loss = read_ping(text)
            return {"rtt_ms": rtt, "loss_percent": loss}
        if name in plan.UDP:
            rate, loss = read_udp(text)
            return {"throughput_mbit_s": round(rate, 3), "loss_percent": round(loss, 2)}
        return {"throughput_mbit_s": round(received_mbit(text), 3)}
    except ToolFailed as e:
        raise HostError(f"{name}: {e}") from e
