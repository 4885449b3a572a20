"""What ``pyvmm run`` says about a run that was not simply good: its verdict, with the reasons, on
stderr, as JUnit and as JSON.

Imported only where it is needed: a run that ends as it should and asks for no files starts faster
without.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm.errors import GuestEnded, GuestTrouble, HostError, PyvmmError, UsageError
from pyvmm.testing import console as says
from pyvmm.testing.suite import state_lines
from pyvmm.testing.verdict import Verdict, last_lines, of_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pyvmm.exits.budget import Result
    from pyvmm.machine import Machine
    from pyvmm.outcome import Outcome

OUTPUT_LINES = 20
JSON_LINES = 100  # of the console, in the JSON
SCHEMA = "pyvmm-verdict/1"


def open_file(option: str, path: str) -> int:
    """Open a file to write before the guest runs: a bad path must not cost a whole run."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise UsageError(f"{option} {path}: {why}", "name a file that can be written") from e


def write_all(fd: int, data: bytes) -> None:
    """All of it. :raises OSError: the disk is full, the reader has gone."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class Extras:
    """What --fail-on, --log, --junit and --json need; owns their files.

    :raises UsageError: one cannot be opened.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._files: dict[str, int] = {}
        self._name = " ".join(args.guest_command) or "boot"
        self._begin = time.monotonic()
        self.watch = says.Watch(args.fail_on) if args.fail_on else None
        self._log: says.Log | None = None
        self._kernel = args.kernel
        try:
            for option, path in (
                ("--log", args.log),
                ("--junit", args.junit),
                ("--json", args.json),
            ):
                if option == "--json" and path == "-":
                    self._files[option] = os.dup(1)
                elif path is not None:
                    self._files[option] = open_file(option, path)
        except BaseException:
            self.close()
            raise

    def attach(self, vm: Machine) -> None:
        """Before the guest starts."""
        if self.watch is not None:
            vm.console.add_sink(self.watch)
        if "--log" in self._files:
            self._log = says.Log(self._write_log)
            vm.console.add_sink(self._log)

    def _write_log(self, data: bytes) -> None:
        write_all(self._files["--log"], data)

    def finish(self, verdict: Verdict, vm: Machine | None) -> None:
        """Write what was asked for; also where there was no machine."""
        for option, make in (
            ("--junit", self._junit),
            ("--json", self._json),
            ("--log", self._notes),
        ):
            if option not in self._files:
                continue
            try:
                text = make(verdict, vm)
                if option != "--log" and os.isatty(fd := self._files[option]) is False:
                    try:
                        os.ftruncate(fd, 0)
                    except OSError:  # a pipe
                        pass
                write_all(self._files[option], text.encode(errors="replace"))
            except OSError as e:
                print(f"pyvmm: {option}: {e.strerror}", file=sys.stderr)

    def _phases(self, vm: Machine | None) -> dict[str, float]:
        """Seconds from the machine's description to each phase."""
        if vm is None:
            return {}
        start = vm.phases["vmm"]
        return {
            k: round((t - start) / 1e9, 3) for k, t in sorted(vm.phases.items(), key=lambda p: p[1])
        }

    def _notes(self, verdict: Verdict, vm: Machine | None) -> str:
        """The log's last lines: when each phase began, and the verdict."""
        if self._log is not None:
            phases = ", ".join(f"{k} {t:.3f} s" for k, t in self._phases(vm).items())
            self._log.note(f"phases: {phases}")
            self._log.note(f"verdict: {verdict.kind}{verdict.message and ': '}{verdict.message}")
        return ""

    def _json(self, verdict: Verdict, vm: Machine | None) -> str:
        import json

        from pyvmm import __version__
        from pyvmm.testing.points import parse

        data: dict[str, object] = {
            "schema": SCHEMA,
            "pyvmm": __version__,
            "name": self._name,
            "verdict": verdict.kind,
            "code": verdict.code,
            "message": verdict.message,
            "details": verdict.details,
            "seconds": round(time.monotonic() - self._begin, 3),
            "phases_s": self._phases(vm),
            "kernel": self._kernel,
        }
        if vm is not None:
            outcome = vm.outcome
            points = parse(vm.console.text) + parse(vm.stdout.text)
            data |= {
                "status": vm.command_status,
                "phase": says.phase(vm.phases, bool(vm.console.text)),
                "cmdline": vm.cmdline(),
                "cpus": vm.cpus,
                "memory_bytes": vm.memory.size,
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
                "console": last_lines(vm.console.text, JSON_LINES),
            }
        return json.dumps(data, indent=2) + "\n"

    def _junit(self, verdict: Verdict, vm: Machine | None) -> str:
        from pyvmm.testing.junit import TestCase, document
        from pyvmm.testing.points import parse

        seconds = time.monotonic() - self._begin
        result = {"passed": "passed", "failed": "failed", "budget": "failed"}.get(
            verdict.kind, "error"
        )
        output, points = b"", []
        properties: dict[str, str] = {"verdict": verdict.kind}
        if vm is not None:
            output = b"".join(bytes(s.text) for s in (vm.console, vm.stdout, vm.stderr))
            points = parse(vm.console.text) + parse(vm.stdout.text)
            properties |= {f"{k}_s": f"{t:.3f}" for k, t in self._phases(vm).items()}
            properties["phase"] = says.phase(vm.phases, bool(vm.console.text))
            properties |= {"kernel": vm.boot.kind, "cmdline": vm.cmdline(), "cpus": str(vm.cpus)}
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

    def lost(self, vm: Machine) -> None:
        """Say so where the log could not be written to its end."""
        for e in vm.console.lost_sinks:
            if self._log is not None and isinstance(e, OSError):
                print(f"pyvmm: --log: {e.strerror}", file=sys.stderr)

    def close(self) -> None:
        """Release the files; a second call does nothing."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def judge(
    vm: Machine,
    outcome: Outcome,
    *,
    commanded: bool,
    watch: says.Watch | None,
    symbols: str | None,
    budgets: Sequence[Result] = (),
) -> Verdict:
    """The one verdict of a run: how it ended, else what the kernel reported, else the command's
    status, else its budgets.

    :param symbols: path of a kernel that may have symbols.
    """
    kind, abnormal, error = outcome.kind, outcome.abnormal, outcome.error()
    details: list[str] = []
    if kind == "panic":
        details = says.panic_quote(vm.console.text)
    elif error is not None and kind in ("timeout", "hang"):
        error.cause += f", {says.PHASES[says.phase(vm.phases, bool(vm.console.text))]}"
    elif error is not None and kind == "reboot" and not vm.console.text:
        error.cause += ", before there was any output"
    if abnormal is not None:
        details += state_lines(outcome, symbols, says.offset(vm.console.text))
        return Verdict(abnormal, str(error), status=outcome.status, details=details)
    if watch is not None:
        watch.finish()
        if watch.troubles:
            first = watch.troubles[0]
            more = f" and {watch.count - 1} more" if watch.count > 1 else ""
            trouble = GuestTrouble(f"the guest kernel reported {first.kind}{more}: {first.message}")
            return Verdict("trouble", str(trouble), status=outcome.status, details=first.lines)
    if kind == "stopped" and commanded and outcome.asked and outcome.status is None:
        return Verdict(
            "ended", str(GuestEnded("the machine was told to quit before the command ended"))
        )
    broken = [result.message for result in budgets if not result.held]
    if kind == "stopped" and not broken:
        return Verdict("passed", status=outcome.status)
    if commanded and kind != "stopped" and outcome.status is None:
        ended = GuestEnded(
            "the guest powered off before the command ended", "see its console: --verbose"
        )
        return Verdict("ended", str(ended))
    if outcome.status and kind != "stopped":
        return Verdict(
            "failed", f"the command's exit status is {outcome.status}", status=outcome.status
        )
    if broken:
        more = f"{len(broken)} of {len(budgets)} budgets are broken"
        message = f"{broken[0]} (broken)" if len(broken) == 1 else more
        return Verdict(
            "budget", message, status=outcome.status, details=broken if len(broken) > 1 else []
        )
    return Verdict("passed", status=outcome.status)


def broken_off(why: BaseException, vm: Machine | None, extras: Extras | None) -> None:
    """There will be no verdict of the guest's: it could not be had, or a signal came first."""
    from pyvmm.cli.support.signals import Terminated

    if isinstance(why, PyvmmError):
        verdict = of_error(why)
    elif isinstance(why, Terminated):
        verdict = Verdict("interrupted", "a signal came before the end", status=128 + why.number)
    else:
        verdict = of_error(HostError(f"internal error: {why!r}"))
    if extras is not None:
        extras.finish(verdict, vm)
    if verdict.kind != "interrupted":
        annotate(f"pyvmm {verdict.kind}", verdict.message)


def annotate(title: str, message: str) -> None:
    """An error that GitHub Actions shows at the run, where this is one."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        print(f"::error title={title}::{text}", file=sys.stderr)


def tell(vm: Machine, verdict: Verdict, *, shown: bool) -> None:
    """On stderr: what helps to find out why, and last the one line. A command's own status needs
    none.

    :param shown: the user has seen the console.
    """
    if verdict.kind == "failed":
        annotate("pyvmm failed", verdict.message)
    if verdict.kind in ("passed", "failed"):
        return
    quoted = verdict.kind in ("panic", "trouble") and len(verdict.details) > 1
    if not shown and not quoted and verdict.kind != "budget" and vm.console.text:
        tail = last_lines(vm.console.text, OUTPUT_LINES)
        print("pyvmm: the last of the guest's console:", *tail, sep="\n  ", file=sys.stderr)
    for line in verdict.details:
        print(f"  {line}", file=sys.stderr)
    annotate(f"pyvmm {verdict.kind}", verdict.message)
    print(f"pyvmm: {verdict.message}", file=sys.stderr)
