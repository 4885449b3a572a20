"""What ``pyvmm run`` says about a run that was not simply good: its verdict, with the reasons, on stderr and as JUnit.

Imported only where it is needed: a run that ends as it should and asks for no files starts faster without.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm.errors import GuestEnded, GuestTrouble, PyvmmError, UsageError
from pyvmm.suite import state_lines
from pyvmm.testing import console as says
from pyvmm.testing.verdict import Verdict, last_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pyvmm.exits.budget import Result
    from pyvmm.machine import Machine, Outcome

OUTPUT_LINES = 20


def open_file(option: str, path: str) -> int:
    """Open a file to write before the guest runs: a bad path must not cost a whole run."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else str(e)
        raise UsageError(f"{option} {path}: {why}", "name a file that can be written") from e


class Extras:
    """What --fail-on, --log and --junit need; owns their files.

    :raises UsageError: one cannot be opened.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._files: dict[str, int] = {}
        self._name = " ".join(args.guest_command) or "boot"
        self._begin = time.monotonic()
        self.watch = says.Watch(args.fail_on) if args.fail_on else None
        self._log: says.Log | None = None
        try:
            for option, path in (("--log", args.log), ("--junit", args.junit)):
                if path is not None:
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
        view = memoryview(data)
        while view:
            view = view[os.write(self._files["--log"], view) :]

    def junit(self, verdict: Verdict, vm: Machine | None) -> None:
        """Write it, if asked for; also where there was no machine."""
        fd = self._files.get("--junit")
        if fd is None:
            return
        from pyvmm.testing.junit import TestCase, document
        from pyvmm.testing.points import parse

        seconds = time.monotonic() - self._begin
        result = {"passed": "passed", "failed": "failed", "budget": "failed"}.get(verdict.kind, "error")
        output, points, properties = b"", [], {"verdict": verdict.kind}
        if vm is not None:
            output = b"".join(bytes(s.text) for s in (vm.console, vm.stdout, vm.stderr))
            points = parse(vm.console.text) + parse(vm.stdout.text)
            start = vm.phases["vmm"]
            properties |= {f"{k}_s": f"{(t - start) / 1e9:.3f}" for k, t in vm.phases.items()}
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
            TestCase(self._name, p.name, 0.0, p.result, kind="failed", message=p.message) for p in points
        ]
        try:
            os.ftruncate(fd, 0)
            data = memoryview(document("pyvmm run", cases, seconds).encode())
            while data:
                data = data[os.write(fd, data) :]
        except OSError as e:
            print(f"pyvmm: --junit: {e.strerror}", file=sys.stderr)

    def broken_off(self, why: BaseException, vm: Machine | None) -> None:
        """There will be no verdict of the guest's: it could not be had, or a signal came first."""
        if isinstance(why, PyvmmError):
            self.junit(Verdict("error", str(why)), vm)
        else:
            self.junit(Verdict("interrupted", "a signal came before the end"), vm)

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
    """The one verdict of a run: how it ended, else what the kernel reported, else the command's status, else its budgets.

    :param symbols: path of a kernel that may have symbols.
    """
    kind, error = outcome.kind, outcome.error()
    details: list[str] = []
    if kind == "panic":
        details = says.panic_quote(vm.console.text)
    elif error is not None and kind == "timeout":
        error.cause += f", {says.phase(vm.phases, bool(vm.console.text))}"
    if error is not None:
        details += state_lines(outcome, symbols, says.offset(vm.console.text))
        return Verdict(kind, str(error), status=outcome.status, details=details)
    if watch is not None:
        watch.finish()
        if watch.troubles:
            first = watch.troubles[0]
            more = f" and {watch.count - 1} more" if watch.count > 1 else ""
            trouble = GuestTrouble(f"the guest kernel reported {first.kind}{more}: {first.message}")
            return Verdict("trouble", str(trouble), status=outcome.status, details=first.lines)
    if kind == "stopped" and commanded and outcome.asked and outcome.status is None:
        return Verdict("ended", str(GuestEnded("the machine was told to quit before the command ended")))
    broken = [result.message for result in budgets if not result.held]
    if kind == "stopped" and not broken:
        return Verdict("passed", status=outcome.status)
    if commanded and kind != "stopped" and outcome.status is None:
        ended = GuestEnded("the guest powered off before the command ended", "see its console: --verbose")
        return Verdict("ended", str(ended))
    if outcome.status and kind != "stopped":
        return Verdict("failed", f"the command's exit status is {outcome.status}", status=outcome.status)
    if broken:
        more = f"{len(broken)} of {len(budgets)} budgets are broken"
        message = f"{broken[0]} (broken)" if len(broken) == 1 else more
        return Verdict("budget", message, status=outcome.status, details=broken if len(broken) > 1 else [])
    return Verdict("passed", status=outcome.status)


def annotate(title: str, message: str) -> None:
    """An error that GitHub Actions shows at the run, where this is one."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        text = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        print(f"::error title={title}::{text}", file=sys.stderr)


def tell(vm: Machine, verdict: Verdict, *, shown: bool) -> None:
    """On stderr: what helps to find out why, and last the one line. A command's own status needs none.

    :param shown: the user has seen the console.
    """
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
