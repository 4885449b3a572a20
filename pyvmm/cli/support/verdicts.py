"""What ``pyvmm run`` reports about a run: its verdict, with the reasons, on stderr, as JUnit and as
JSON; and the console's log.

``pyvmm run`` imports this module only if the user asks for one of these files, or if the run does
not end as it should. Other runs start faster without it.
"""

from __future__ import annotations

import json
import os
import sys
import time

from pyvmm import __version__
from pyvmm.cli.support.signals import Terminated
from pyvmm.errors import HostError, PyvmmError
from pyvmm.testing import console as says
from pyvmm.testing.junit import TestCase, document
from pyvmm.testing.points import parse
from pyvmm.testing.verdict import Verdict, last_lines, of_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.cli.support.outputs import Outputs
    from pyvmm.machine import Machine
    from pyvmm.testing.junit import Result

OUTPUT_LINES = 20  # lines of the console that are printed on stderr
JSON_LINES = 100  # lines of the console that the JSON has
SCHEMA = "pyvmm-verdict/1"


class RunFiles:
    """The files that follow one run: the log while it runs, JUnit and JSON at its end.

    :param outputs: lent; has those of --log, --junit and --json that the user asks for.
    :ivar watch: searches the console for what --fail-on names; None without --fail-on.
    """

    def __init__(self, args: argparse.Namespace, outputs: Outputs) -> None:
        self._outputs = outputs
        self._name = " ".join(args.guest_command) or "boot"
        self._begin = time.monotonic()
        self._kernel = args.kernel
        self.watch = says.Watch(args.fail_on) if args.fail_on else None
        self._log: says.Log | None = None

    def attach(self, machine: Machine) -> None:
        """Follow the console of a machine that has not been started yet."""
        if self.watch is not None:
            machine.console.add_sink(self.watch)
        if "--log" in self._outputs:
            self._log = says.Log(self._outputs["--log"].write)
            machine.console.add_sink(self._log)

    def finish(self, verdict: Verdict, machine: Machine | None) -> None:
        """Write the verdict to each file that the user asks for. A later verdict replaces it.

        :param machine: None if no machine was made.
        """
        if "--junit" in self._outputs:
            self._outputs.write("--junit", self._junit(verdict, machine))
        if "--json" in self._outputs:
            self._outputs.write("--json", self._json(verdict, machine))
        if self._log is not None:
            phases = ", ".join(f"{name} {t:.3f} s" for name, t in phase_times(machine).items())
            try:
                if self._log.dropped:
                    self._log.note(f"{self._log.dropped} bytes of the console are left out")
                self._log.note(f"phases: {phases}")
                self._log.note(
                    f"verdict: {verdict.kind}{verdict.message and ': '}{verdict.message}"
                )
            except OSError:
                pass  # ``Output.problem`` has the reason

    def _json(self, verdict: Verdict, machine: Machine | None) -> str:
        data: dict[str, object] = {
            "schema": SCHEMA,
            "pyvmm": __version__,
            "name": self._name,
            "verdict": verdict.kind,
            "code": verdict.code,
            "message": verdict.message,
            "details": verdict.details,
            "seconds": round(time.monotonic() - self._begin, 3),
            "phases_s": phase_times(machine),
            "kernel": self._kernel,
        }
        if self.watch is not None:
            data["reports"] = [{"kind": t.kind, "message": t.message} for t in self.watch.troubles]
        if machine is not None:
            outcome = machine.outcome
            points = parse(machine.console.text) + parse(machine.stdout.text)
            data |= {
                "status": machine.command_status,
                "phase": says.phase(machine.phases, bool(machine.console.text)),
                "cmdline": machine.cmdline(),
                "sandbox": machine.sandbox,
                "cpus": machine.cpus,
                "memory_bytes": machine.memory.size,
                "vcpus": [
                    {"rip": rip, "state": state}
                    for rip, state in zip(outcome.rips, outcome.states, strict=True)
                ]
                if outcome is not None
                else [],
                "registers": outcome.registers if outcome is not None else None,
                "points": [
                    {"name": p.name, "result": p.result, "message": p.message} for p in points
                ],
                "console": last_lines(machine.console.text, JSON_LINES),
            }
        return json.dumps(data, indent=2) + "\n"

    def _junit(self, verdict: Verdict, machine: Machine | None) -> str:
        seconds = time.monotonic() - self._begin
        results: dict[str, Result] = {"passed": "passed", "failed": "failed", "budget": "failed"}
        result = results.get(verdict.kind, "error")
        output, points = b"", []
        properties: dict[str, str] = {"verdict": verdict.kind}
        if machine is not None:
            streams = (machine.console, machine.stdout, machine.stderr)
            output = b"".join(bytes(stream.text) for stream in streams)
            points = parse(machine.console.text) + parse(machine.stdout.text)
            properties |= {f"{name}_s": f"{t:.3f}" for name, t in phase_times(machine).items()}
            properties["phase"] = says.phase(machine.phases, bool(machine.console.text))
            properties["kernel"] = machine.boot.kind
            properties |= {"cmdline": machine.cmdline(), "cpus": str(machine.cpus)}
        cases = [
            TestCase(
                "pyvmm.run",
                self._name,
                seconds,
                result,
                kind=verdict.kind,
                message=verdict.message,
                text="\n".join([verdict.message, *verdict.details]),
                output=output,
                properties=properties,
            )
        ]
        cases += [
            TestCase(self._name, p.name, 0.0, p.result, kind="failed", message=p.message)
            for p in points
        ]
        return document("pyvmm run", cases, seconds)


def phase_times(machine: Machine | None) -> dict[str, float]:
    """Seconds from the machine's description to each phase, in order."""
    if machine is None:
        return {}
    start = machine.phases["vmm"]
    in_order = sorted(machine.phases.items(), key=lambda phase: phase[1])
    return {name: round((at - start) / 1e9, 3) for name, at in in_order}


def broken_off(why: BaseException, machine: Machine | None, files: RunFiles | None) -> None:
    """Write that there is no verdict: no machine could be made, or a signal ended the run."""
    if isinstance(why, PyvmmError):
        verdict = of_error(why)
    elif isinstance(why, Terminated):
        verdict = Verdict("interrupted", "a signal came before the end", status=128 + why.number)
    else:
        verdict = of_error(HostError(f"internal error: {why!r}"))
    if files is not None:
        files.finish(verdict, machine)
    if verdict.kind != "interrupted":
        annotate(f"pyvmm {verdict.kind}", verdict.message)


def annotate(title: str, message: str) -> None:
    """If this is a run of GitHub Actions, print an error that is shown beside the run."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        print(f"::error title={title}::{text}", file=sys.stderr)


def quoted(lines: list[str]) -> list[str]:
    """Lines of a guest's, for people to read. GitHub Actions also reads them: what it would take
    for a command of its own is broken there, or a guest could silence the errors of others.
    """
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return lines
    broken = [line.replace("##[", "## [") for line in lines]
    return [f"| {line}" if line.lstrip().startswith("::") else line for line in broken]


def tell(machine: Machine, verdict: Verdict, *, shown: bool) -> None:
    """Print a bad verdict on stderr: first what helps to find the cause, in the last line the
    verdict itself. A command's own status needs no words.

    :param shown: whether the user has seen the console.
    """
    if verdict.kind == "failed":
        annotate("pyvmm failed", verdict.message)
    if verdict.kind in ("passed", "failed"):
        return
    told = verdict.kind in ("panic", "trouble") and len(verdict.details) > 1
    if not shown and not told and verdict.kind != "budget" and machine.console.text:
        tail = quoted(last_lines(machine.console.text, OUTPUT_LINES))
        print("pyvmm: the last of the guest's console:", *tail, sep="\n  ", file=sys.stderr)
    for line in quoted(verdict.details):
        print(f"  {line}", file=sys.stderr)
    annotate(f"pyvmm {verdict.kind}", verdict.message)
    print(*quoted([f"pyvmm: {verdict.message}"]), file=sys.stderr)
