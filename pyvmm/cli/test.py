"""Boot test kernels and show how each run went.

A test kernel is a multiboot, PVH or 64-bit ELF or a flat binary that tests something and ends by
debug-exit (port 0xf4) or by powering off; docs/test-kernels.md lists the devices that it finds.
Each kernel has a time-out, so that no run hangs.

Examples:
  pyvmm test build/*.elf
  pyvmm test --append 'verbose' --cpus 2 --timeout 10 kernel.elf
  pyvmm test --config x86/unittests.cfg --jobs 2 --junit results.xml
  pyvmm test --config x86/unittests.cfg --group vmexit smptest
  pyvmm test --config x86/unittests.cfg --shard 3/10 --junit part3.xml
  pyvmm test --cpu host,-x2apic,-pcid apic.elf
  pyvmm test --load-address 0x7c00 --load-mode real16 boot.bin
  pyvmm test --sandbox on --jobs 2 theirs/*.elf
  pyvmm test --jail 5001,memory=512M,pids=64 theirs/*.elf

With --config, KERNEL is the name of a test in the file. An option here applies to all tests whose
section does not set it.

Each kernel has a process of its own, which is confined unless --sandbox off is said
(docs/sandbox.md).

Exit status: 0 all passed or were skipped, 1 some did not, 2 bad usage or no test selected, 101 a
result could not be written or pyvmm had to give up, 102..104 no usable KVM, 130 Ctrl-C, 132
--sandbox on is impossible, 134 --jail is impossible or its memory ran out.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm import __version__
from pyvmm.cli.support.options import (
    CPU_HELP,
    JAIL_HELP,
    SHARD_HELP,
    add_host,
    add_sandbox,
    count,
    cpu_model,
    jail,
    part_of,
    seconds,
    shard,
)
from pyvmm.cli.support.outputs import Outputs
from pyvmm.cli.support.screen import colours
from pyvmm.errors import ImageError, PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pyvmm.testing.suite import Case, Result, Suite

LAST_LINES = 20
WORDS = {"passed": "PASS", "skipped": "SKIP"}
COLOURS = {"PASS": "32", "SKIP": "33", "FAIL": "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("kernels", metavar="KERNEL", nargs="*", help="kernels, or with --config names of tests")
    add("--append", metavar="S", default="", help="command line")
    add(
        "--initrd",
        metavar="I",
        action="append",
        help="multiboot modules, FILE [ARGS][,FILE ...], or an initial RAM disk; repeatable",
    )
    add("--cpus", metavar="N", type=int, default=1, help="virtual CPUs, 1 to 255 (1)")
    add("--cpu", metavar="CPU", type=cpu_model, help=CPU_HELP)
    add("--memory", metavar="SIZE", default="128M", help="guest memory, as 256M or 4G (128M)")
    add(
        "--timeout", metavar="S", type=seconds(0, 1e7), default=90.0, help="seconds per kernel (90)"
    )
    add(
        "--hang-timeout",
        metavar="S",
        type=seconds(0.1, 1e7),
        help="seconds without progress after which a kernel is ended (off)",
    )
    add("--jobs", "-j", metavar="N", type=count(1, 256), default=1, help="kernels at a time (1)")
    add("--config", metavar="FILE", help="tests in the format of kvm-unit-tests' unittests.cfg")
    add(
        "--group",
        "-g",
        metavar="G",
        action="append",
        default=[],
        help="with --config: only tests of this group",
    )
    add("--all", action="store_true", help="with --config: also tests of the group nodefault")
    add(
        "--load-address",
        metavar="A",
        help="kernels are flat binaries for this address, e.g. 0x100000",
    )
    add(
        "--load-mode",
        choices=("protected32", "long64", "real16"),
        default="protected32",
        help="the processor's mode in which flat binaries start",
    )
    add_sandbox(parser, "the process of each kernel before it runs")
    add("--jail", metavar="UID[:GID][,K=V]", type=jail, help=JAIL_HELP)
    add("--shard", metavar="K/N", type=shard, help=SHARD_HELP)
    add("--tap", action="store_true", help="TAP on stdout")
    add("--junit", metavar="FILE", help="write JUnit XML")
    add("--json", metavar="FILE", help="write everything as JSON ('-': stdout)")
    add(
        "--verbose",
        "-v",
        action="store_true",
        help="show the console of each kernel, not only of those that fail",
    )
    add_host(parser, "where to run (auto)")


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the tests there."""
    from pyvmm.cli.support.hostchoice import elsewhere

    if args.json == "-" and args.tap:
        raise UsageError("--json - and --tap both write to stdout", "give --json a file")
    if not args.kernels and not args.config:
        raise UsageError("no kernel", "name one, or a --config file")
    cases = part_of(_cases(args), args.shard)
    at = args.argv.index("test") + 1
    linux = _linux(cases) if args.host == "auto" else None
    host = "local" if args.host == "auto" and linux is None else args.host
    status = elsewhere(host, linux, ["test", "--host", "local", *args.argv[at:]])
    return _run(args, cases) if status is None else status


def _linux(cases: list[Case]) -> str | None:
    """The first kernel that is Linux, which not every host can run; None if there is none."""
    from pyvmm.boot import is_linux

    for case in cases:
        try:
            if not case.skip and case.load_address is None and is_linux(case.kernel):
                return case.kernel
        except ImageError:
            pass  # the kernel's verdict will report it
    return None


def _cases(args: argparse.Namespace) -> list[Case]:
    from pyvmm.testing.suite import Case

    address: int | None = None
    if args.load_address is not None:
        try:
            address = int(args.load_address, 0)
        except ValueError:
            raise UsageError(f"--load-address {args.load_address!r}", "write 0x100000") from None
        if not 0 <= address < 1 << 64:
            raise UsageError(f"--load-address {args.load_address}", "use an address of 64 bits")
    if args.config is not None:
        return _configured(args)
    if args.group or args.all:
        raise UsageError("--group and --all are about a --config file", "name one")
    return [
        Case(
            _name(kernel, args.kernels),
            kernel,
            append=args.append,
            initrd=args.initrd,
            cpus=args.cpus,
            memory=args.memory,
            timeout=args.timeout,
            load_address=address,
            load_mode=args.load_mode,
            hang_timeout=args.hang_timeout,
            cpu=args.cpu,
        )
        for kernel in args.kernels
    ]


def _name(kernel: str, kernels: list[str]) -> str:
    """The file's name without its suffix, or its path if two files have the same name."""

    def stem(path: str) -> str:
        return path.rpartition("/")[2].rpartition(".")[0] or path.rpartition("/")[2]

    return stem(kernel) if sum(stem(k) == stem(kernel) for k in kernels) == 1 else kernel


def _configured(args: argparse.Namespace) -> list[Case]:
    from pyvmm.testing import unittests
    from pyvmm.testing.suite import Case

    tests = unittests.read(args.config, len(os.sched_getaffinity(0)))
    known = {t.name for t in tests}
    for name in args.kernels:
        if name not in known:
            raise UsageError(f"no test {name!r} in {args.config}", "see its [sections]")
    cases = []
    for t in tests:
        if args.kernels and t.name not in args.kernels:
            continue
        if args.group and not set(args.group) & set(t.groups):
            continue
        skip = t.skip
        if not skip and t.manual and not (args.all or args.kernels or args.group):
            skip = "not run unless asked for (group nodefault)"
        cases.append(
            Case(
                t.name,
                t.kernel,
                append=f"{t.append} {args.append}".strip(),
                initrd=[t.initrd] if t.initrd else args.initrd,
                cpus=t.cpus,
                memory=t.memory or args.memory,
                timeout=t.timeout or args.timeout,
                skip=skip,
                notes=t.notes,
                hang_timeout=args.hang_timeout,
                cpu=t.cpu or args.cpu,
            )
        )
    if not cases:
        raise UsageError(f"no test in {args.config} is selected", "see its groups")
    return cases


def _run(args: argparse.Namespace, cases: list[Case]) -> int:
    if args.jail is not None:
        return _in_jail(args, cases)

    def body(suite: Suite) -> int:
        with Outputs({"--junit": args.junit, "--json": args.json}) as outputs:
            return outputs.status(_attend(args, cases, suite, outputs))

    return _with_suite(args, cases, body)


def _with_suite(args: argparse.Namespace, cases: list[Case], body: Callable[[Suite], int]) -> int:
    """Run ``body`` with the suite of the cases, whatever signals come; returns its status."""
    from pyvmm.cli.support.signals import orderly
    from pyvmm.testing.suite import Suite

    # The suite comes first: `orderly` starts a thread.
    with Suite(cases, args.jobs, sandbox=args.sandbox) as suite:
        return orderly(lambda: body(suite))


def _in_jail(args: argparse.Namespace, cases: list[Case]) -> int:
    """Run all the cases in one jail."""
    from pyvmm.assembly import initrd_files
    from pyvmm.cli.support.jailed import run_in
    from pyvmm.memory import parse_size
    from pyvmm.sandbox import longest

    files: list[str] = []
    for case in cases:
        files += [case.kernel, *initrd_files(case.initrd or ())]
        try:
            memory = parse_size(case.memory)
        except UsageError:
            continue  # the kernel's verdict will report it
        args.jail.check(memory, cpus=case.cpus, cards=0, machines=args.jobs)
    # One after another; then what had to be killed is told.
    timeout = sum(longest(case.timeout) for case in cases if not case.skip) + longest(0)
    with Outputs({"--junit": args.junit, "--json": args.json}) as outputs:

        def body(suite: Suite) -> int:
            outputs.leave_files()
            return outputs.status(_attend(args, cases, suite, outputs))

        def inside() -> int:
            return _with_suite(args, cases, body)

        status = run_in(args.jail, inside, files=files, keep=outputs.filenos(), timeout=timeout)
        return outputs.status(status)


def _attend(args: argparse.Namespace, cases: list[Case], suite: Suite, outputs: Outputs) -> int:
    """Run the cases, show each result, write the outputs; returns the exit status.

    :raises PyvmmError: as ``Suite.run``; if there are results, they have been written before.
    """
    from pyvmm.cli.support.signals import Terminated
    from pyvmm.cli.support.verdicts import annotate
    from pyvmm.testing.suite import Result
    from pyvmm.testing.verdict import Verdict

    if args.verbose:
        print(f"pyvmm: sandbox: {suite.sandbox}", file=sys.stderr)
    show = _Tap(len(cases), args) if args.tap else _Plain(len(cases), args)
    begin = time.monotonic()
    results: list[Result] = []
    error: Terminated | PyvmmError | None = None
    rest = Verdict("interrupted", "not run to its end")
    try:
        for result in suite.run():
            results.append(result)
            show.result(result)
            if not result.verdict.good:
                annotate(
                    f"pyvmm {result.verdict.kind}", f"{result.case.name}: {result.verdict.message}"
                )
            _let_go(result, outputs)
    except Terminated as e:
        error = e
    except PyvmmError as e:
        if not results:
            raise
        error, rest = e, Verdict("host-problem", f"not run to its end: {e.cause}")
    if error is not None:
        suite.close()
        done = {id(r.case) for r in results}
        results += [Result(case, rest) for case in cases if id(case) not in done]
    seconds = time.monotonic() - begin
    show.end(results, seconds)
    if "--junit" in outputs:
        outputs.write("--junit", _junit(results, seconds))
    if "--json" in outputs:
        outputs.write("--json", _json(results, seconds))
    if isinstance(error, Terminated):
        return 128 + error.number
    if error is not None:
        raise error
    return int(not all(r.verdict.good for r in results))


def _let_go(result: Result, outputs: Outputs) -> None:
    """Of a result, keep until the end of all cases only what an output will have."""
    from pyvmm.testing.junit import OUTPUT_MAX

    result.console = result.console[-OUTPUT_MAX:] if "--junit" in outputs else b""
    if "--json" not in outputs:
        result.report = None
        if "--junit" not in outputs:
            result.points = []


def _summary(results: list[Result]) -> dict[str, int]:
    kinds = [r.verdict.kind for r in results]
    passed, skipped = kinds.count("passed"), kinds.count("skipped")
    return {
        "total": len(kinds),
        "passed": passed,
        "failed": len(kinds) - passed - skipped,
        "skipped": skipped,
    }


def _json(results: list[Result], seconds: float) -> str:
    import json

    data = {
        "schema": "pyvmm-test/1",
        "pyvmm": __version__,
        "seconds": round(seconds, 3),
        "summary": _summary(results),
        "tests": [r.as_dict() for r in results],
    }
    return json.dumps(data, indent=2) + "\n"


def _junit(results: list[Result], seconds: float) -> str:
    from pyvmm.testing.junit import TestCase, document

    cases = []
    for r in results:
        kind = r.verdict.kind
        outcome = kind if kind in ("passed", "skipped", "failed") else "error"
        if kind == "interrupted":
            outcome = "skipped"
        properties = {"kernel": r.case.kernel, "cpus": str(r.case.cpus), "memory": r.case.memory}
        properties |= {"append": r.case.append} if r.case.append else {}
        properties |= {f"note {i}": note for i, note in enumerate(r.case.notes, 1)}
        cases.append(
            TestCase(
                "pyvmm",
                r.case.name,
                r.seconds,
                outcome,
                kind=kind,
                message=r.verdict.message,
                text="\n".join([r.verdict.message, *r.verdict.details]),
                output=r.console,
                properties=properties,
            )
        )
        for p in r.points:
            cases.append(
                TestCase(r.case.name, p.name, 0.0, p.result, kind="failed", message=p.message)
            )
    return document("pyvmm test", cases, seconds)


def _points(result: Result) -> str:
    """How many single results the kernel has reported, and the first failure; empty without
    results.
    """
    if not result.points:
        return ""
    failed = [p for p in result.points if p.result == "failed"]
    text = f"{len(result.points)} points, {len(failed)} failed"
    return text + (f": {failed[0].name}" if failed else "")


class _Plain:
    """Output for people: one line per test, with the end of its console if it failed."""

    def __init__(self, total: int, args: argparse.Namespace) -> None:
        self.total, self.done, self.verbose = total, 0, args.verbose
        self.to = sys.stderr if args.json == "-" else sys.stdout
        self.colour = colours(self.to)

    def result(self, r: Result) -> None:
        """Show the result of a test that has ended."""
        from pyvmm.cli.support.verdicts import quoted
        from pyvmm.testing.verdict import last_lines

        self.done += 1
        word = WORDS.get(r.verdict.kind, "FAIL")
        shown = f"\x1b[{COLOURS[word]}m{word}\x1b[0m" if self.colour else word
        parts = [p for p in (r.verdict.message, _points(r)) if p]
        line = f"{shown} {r.case.name}" + (f": {'; '.join(parts)}" if parts else "")
        took = "" if r.verdict.kind == "skipped" and not r.console else f" ({r.seconds:.1f} s)"
        lines = [f"[{self.done}/{self.total}] {line}{took}"]
        if self.verbose:
            lines += [f"    note: {note}" for note in r.case.notes]
        if self.verbose or not r.verdict.good:
            lines += [f"    {text}" for text in r.verdict.details]
            lines += [
                f"    | {text}"
                for text in last_lines(r.console, 10000 if self.verbose else LAST_LINES)
            ]
        print("\n".join(quoted(lines)), file=self.to, flush=True)

    def end(self, results: list[Result], seconds: float) -> None:
        """Show the sums after all tests have ended."""
        s = _summary(results)
        print(
            f"{s['total']} test{'s' * (s['total'] != 1)} in {seconds:.1f} s: "
            f"{s['passed']} passed, {s['failed']} failed, {s['skipped']} skipped",
            file=self.to,
            flush=True,
        )


class _Tap:
    """Output in TAP 13; the tests are numbered in the order in which they end."""

    def __init__(self, total: int, args: argparse.Namespace) -> None:
        self.done, self.verbose = 0, args.verbose
        print(f"TAP version 13\n1..{total}", flush=True)

    def result(self, r: Result) -> None:
        """Show the result of a test that has ended."""
        import json

        from pyvmm.cli.support.verdicts import quoted
        from pyvmm.testing.verdict import last_lines

        self.done += 1
        # In TAP a # begins a directive.
        name = r.case.name.replace("#", "\\#")
        line = f"{'' if r.verdict.good else 'not '}ok {self.done} - {name}"
        if r.verdict.kind == "skipped":
            line += f" # SKIP {r.verdict.message}"
        lines = [line]
        if not r.verdict.good or self.verbose:
            texts = {
                "verdict": r.verdict.kind,
                "message": r.verdict.message,
                "status": r.verdict.status,
                "seconds": round(r.seconds, 3),
                "points": _points(r),
                "details": r.verdict.details,
                "notes": r.case.notes,
                "console": last_lines(r.console, 10000 if self.verbose else LAST_LINES),
            }
            # JSON is valid YAML.
            lines += ["  ---", *(f"  {k}: {json.dumps(v)}" for k, v in texts.items()), "  ..."]
        print("\n".join(quoted(lines)), flush=True)

    def end(self, results: list[Result], seconds: float) -> None:
        """Show the sums. Interrupted tests have no line, but the plan counts them."""
        s = _summary(results)
        print(
            f"# {s['passed']} passed, {s['failed']} failed, {s['skipped']} skipped "
            f"in {seconds:.1f} s",
            flush=True,
        )
