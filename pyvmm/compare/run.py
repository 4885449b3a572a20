"""Runs a comparison: boots each mode in turn, several times (``boot``), and keeps the results.

Theory of operation. A guest of pyvmm has a process of its own for each boot (``apart``), which
makes the machine, confines itself (docs/sandbox.md), and sends what it measures as soon as it has.
The guest may take that process over: so what comes is checked (``facts``), and only that boot's.
Other programs are started from here, and are not confined by pyvmm.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, nullcontext
from subprocess import SubprocessError

from pyvmm import __version__
from pyvmm.apart import Apart
from pyvmm.compare import counters, plan
from pyvmm.compare import facts as facts_of
from pyvmm.compare.boot import BOOTED, MADE, SAID, WORKLOAD, Boot, limit
from pyvmm.compare.facts import Reader
from pyvmm.compare.ladder import steps
from pyvmm.compare.pinning import pinned, possible
from pyvmm.compare.stats import summarise
from pyvmm.doctor import flavour
from pyvmm.errors import HostError, MemoryShort, PyvmmError
from pyvmm.fd import Closing
from pyvmm.memory import parse_size
from pyvmm.sandbox import longest, outlook
from pyvmm.testbed.testbed import emulated
from pyvmm.testing import answer, job
from pyvmm.testing.answer import BadAnswer
from pyvmm.testing.verdict import last_lines
from pyvmm.threads import NoThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.apart import Send
    from pyvmm.compare.plan import Mode, Plan

SCHEMA = "pyvmm-compare/1"


class Comparison(Closing):
    """Runs a plan and keeps the results. ``document`` may be called at any time, also after an
    exception has ended ``run``. A context manager: it has a process from the beginning, which
    ``close`` ends.

    Make it before this process has threads, because it forks a process that needs none of them.

    :param progress: called with one line of text for each step.
    :param sandbox: ``auto``, ``on`` or ``off``: whether the process of each guest of pyvmm is
        confined (docs/sandbox.md). This process never is.
    :raises SandboxError: ``on``, and this host cannot confine a process.
    :raises HostError: there can be no process.
    """

    def __init__(self, p: Plan, progress: Callable[[str], None], *, sandbox: str = "auto") -> None:
        self._plan, self._progress, self._want = p, progress, sandbox
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
        self._trace_at = counters.trace_directory(os.getpid())
        outlook(sandbox)
        self._apart = Apart(
            self._be_boot, most=answer.ANSWER_MAX, name=b"pyvmm-boot", heard=self._heard
        )

    def run(self) -> None:
        """Run all modes, workloads and repeats.

        :raises PyvmmError: no mode can run here (no KVM, no image). If some modes can, the document
            says which cannot.
        """
        p = self._plan
        with ExitStack() as stack:
            if p.reasons or any(mode.kind != "pyvmm" for mode in p.modes):
                self._open_trace(stack)
            stack.callback(self.close)  # first: a boot has files of the trace open
            total, number = p.repeat * len(p.modes), 0
            for repeat in range(p.repeat):
                for mode in p.modes:
                    number += 1
                    if self._modes[mode.name]["problem"] is None:
                        self._progress(f"{number}/{total} {mode.name}, repeat {repeat + 1}")
                        self._boot(mode, repeat)
            self._complete = not self._apart.stopped

    def close(self) -> None:
        """End the guest that runs; returns when nothing of it is left. A second call does
        nothing.
        """
        self._apart.close()

    def _open_trace(self, stack: ExitStack) -> None:
        try:
            trace = counters.ExitTrace(self._trace_at, reasons=self._plan.reasons)
            self._trace = stack.enter_context(trace)
        except HostError as e:
            for mode in self._plan.modes:
                if self._plan.reasons or mode.kind != "pyvmm":
                    self._modes[mode.name]["notes"].append(str(e))

    def _boot(self, mode: Mode, repeat: int) -> None:
        facts = self._modes[mode.name]
        run: dict[str, Any] = {
            "mode": mode.name,
            "repeat": repeat,
            "sandbox": None,
            "error": None,
            "boot_s": None,
            "workloads": [],
        }

        def take(kind: str, value: Any) -> None:
            if kind == MADE:
                self._runs.append(run)
                run["sandbox"] = value
            elif kind == BOOTED:
                run["boot_s"] = value.pop("boot_s")
                notes = [*facts["notes"], *value.pop("notes", [])]
                facts.update(value, notes=list(dict.fromkeys(notes)))
            elif kind == SAID:
                self._progress(f"  {value}")
            elif kind == WORKLOAD:
                run["workloads"].append(value)
                self._progress(f"  {outcome(value)}")

        try:
            if mode.kind == "pyvmm":
                self._boot_apart(mode, take)
            else:
                Boot(self._plan, pin=self._pin, tell=take).run(mode, self._trace, self._want)
        except _Lost as e:
            if run not in self._runs:
                self._runs.append(run)
            run["error"] = str(e)
            self._progress(f"  {mode.name}: {e}")
        except facts_of.FOR_ALL as e:
            if not (mode.huge and isinstance(e, MemoryShort)):
                raise
            facts["problem"] = str(e)
            self._progress(f"  {mode.name}: {e}")
        except (PyvmmError, OSError, SubprocessError) as e:
            if run in self._runs:
                run["error"] = str(e)
            if run not in self._runs or isinstance(e, facts_of.FOR_MODE):
                facts["problem"] = str(e)
            self._progress(f"  {mode.name}: {e}")

    def _boot_apart(self, mode: Mode, take: Callable[[str, Any], None]) -> None:
        """Boot a mode of pyvmm in a process of its own, and take what that says, as it comes."""
        p = self._plan
        self._reader = reader = Reader(p.workloads, take)
        # This process waits, beside the tools, and checks what comes.
        with pinned((), p.cpus) if self._pin else nullcontext():
            self._apart.start(p.modes.index(mode), longest(limit(p)))
            ended = self._apart.wait()
        if ended is None:
            return  # after ``close``
        said = [answer.line(text) for text in last_lines(ended.said)]
        death = job.death(ended, said, f"the boot did not end in {limit(p):g} s")
        why = ""
        if death is not None:
            why = death.message
        elif reader.bad is not None or not (reader.done or reader.error):
            why = job.bad(reader.bad or BadAnswer("less than a boot")).verdict.message
        if why:
            raise _Lost(": ".join([why, *said[-1:]]))
        if reader.error is not None:
            raise reader.error

    def _heard(self, number: int, data: bytes) -> None:
        self._reader.feed(data)

    def _be_boot(self, number: int, send: Send) -> None:
        """Boot a mode once, in a process of its own, and send what there is to tell."""

        def tell(kind: str, value: object) -> None:
            send(facts_of.encode(kind, value))

        p = self._plan
        try:
            with ExitStack() as stack:
                trace = None
                if p.reasons and self._trace_at.is_dir():  # else the command has said why
                    trace = stack.enter_context(counters.Histograms(self._trace_at, reasons=True))
                Boot(p, pin=self._pin, tell=tell).run(p.modes[number], trace, self._want)
        except NoThread:
            why = HostError("there can be no thread for this guest", "raise the limit: ulimit -u")
            send(facts_of.encode_error(why))
        except (PyvmmError, OSError, SubprocessError) as e:
            send(facts_of.encode_error(e))

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


def outcome(done: dict[str, Any]) -> str:
    """A workload's figures in one line of progress."""
    if done["error"]:
        return f"{done['name']} failed: {done['error']}"
    words = [f"{done['user_exits']} exits to userspace"] if done["user_exits"] is not None else []
    for key, unit in (("throughput_mbit_s", "Mbit/s"), ("rtt_ms", "ms")):
        if done[key] is not None:
            words.insert(0, f"{done[key]:g} {unit}")
    return f"{done['name']}: {', '.join(words)}"


class _Lost(Exception):
    """The process of a boot has not ended by itself and in order, or has sent something else."""
