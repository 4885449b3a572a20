"""Run the same guest and workload on several data paths; show what each costs, and where.

The modes are booted in turn, once per repeat, so that a disturbance of the host disturbs all of
them. Each boot runs all workloads. Exits, interrupts, packets, CPU time and context switches are
counted from the start of each workload to its end. A figure is the median of the repeats, with the
lowest and the highest value. If the ranges of a mode and of the first mode overlap, the difference
may be noise, and the figure gets the sign ≈. Each vCPU has a CPU of its own if there is one more
for everything else.

Modes are those of `pyvmm run --net`, their keys joined by colons:
  emulated:notify=exit   the data path in this process, each kick an exit to it
  emulated               the same, kicks by ioeventfd
  vhost-net              the data path in the kernel
  vhost-user             the data path in a back-end process of pyvmm's own
  vhost-vdpa             the data path in a vDPA device of pyvmm's own (Linux 6.12)

Workloads: ping, tcp-tx (from the guest), tcp-rx (to the guest), udp-small (64 bytes, 1000 per
second, from the guest), pps-tx and pps-rx (64 bytes, as many as possible), idle

--ladder climbs from the textbook device to the offloaded one, a step per rung, and says what each
step gained over the rung below (docs/ladder.md):
  pio, mmio, thread, ioeventfd, irqfd, event-idx, indirect, offloads, batch, huge, vhost-net,
  vhost-user, vhost-vdpa

Examples:
  pyvmm compare
  pyvmm compare --modes emulated,vhost-net --workload ping,tcp-tx --repeat 5
  pyvmm compare --modes emulated,emulated:without=offloads --workload tcp-rx --html report.html
  pyvmm compare --peers qemu --reasons --json result.json
  pyvmm compare --from result.json --html report.html      shows it again, runs nothing
  pyvmm compare --ladder --rounds 5 --json ladder.json --svg ladder.svg
  pyvmm compare --ladder --rungs mmio,thread,ioeventfd,irqfd --seconds 1

Exit status: 0 everything was measured; 1 something could not be measured (the table says what and
why); 2 bad usage; 101 a result could not be written; 102..105, 109 no usable KVM, image or memory;
110 the testbed failed; 132 --sandbox on is impossible; 130, 143, 129 ended by SIGINT, SIGTERM,
SIGHUP: the results so far are shown and written.
"""

from __future__ import annotations

import argparse
import os
import sys

from pyvmm.cli.support.options import add_host, add_sandbox, count
from pyvmm.cli.support.outputs import STDOUT, Outputs
from pyvmm.errors import TestbedError, UsageError
from pyvmm.spec.platform import MAX_CPUS

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from rich.table import Table

    from pyvmm.compare.plan import Plan
    from pyvmm.compare.run import Comparison

#: The most columns of a table that goes to a file or a pipe.
MAX_WIDTH = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from pyvmm.compare.plan import DEFAULT_MODES, DEFAULT_WORKLOADS, WORKLOADS

    add = parser.add_argument
    add("--modes", metavar="LIST", help=f"data paths ({DEFAULT_MODES})")
    add(
        "--ladder", action="store_true", help="each step from the textbook device to vhost, instead"
    )
    add("--rungs", metavar="LIST", help="these steps of the ladder only (all)")
    add("--peers", metavar="LIST", default="", help="other programs to compare: qemu, kvmtool")
    add(
        "--workload",
        metavar="LIST",
        help=f"of {','.join(WORKLOADS)} ({','.join(DEFAULT_WORKLOADS)}; with --ladder, all but "
        "udp-small and idle)",
    )
    add("--repeat", "--rounds", metavar="N", type=int, default=3, help="boots of each mode (3)")
    add("--seconds", metavar="S", type=float, default=3.0, help="per workload, 0.2 to 3600 (3)")
    add("--cpus", metavar="N", type=count(1, MAX_CPUS), default=1, help="virtual CPUs (1)")
    add("--memory", metavar="SIZE", default="256M", help="guest memory (256M)")
    add("--kernel", metavar="K", help="another kernel; its initrd has pyvmm's init and iperf3")
    add("--initrd", metavar="I", help="another initial RAM disk")
    add("--image", metavar="NAME", help="a built image by name, see `pyvmm image list`")
    add("--append", metavar="S", default="", help="more kernel command line")
    add(
        "--reasons",
        action="store_true",
        help="also trace the processor's reasons for exits (root; slows exits)",
    )
    add(
        "--no-pin",
        dest="pin",
        action="store_false",
        help="let the scheduler choose the CPUs of the vCPUs",
    )
    add("--json", metavar="F", help="write everything as JSON ('-': stdout, instead of the table)")
    add("--html", metavar="F", help="write a page with plots")
    add("--svg", metavar="F", help="write the main plots alone")
    add(
        "--from",
        metavar="F.json",
        dest="source",
        help="show results written by --json; run nothing",
    )
    add_sandbox(parser, "the process of each guest of pyvmm before it runs")
    add_host(parser, "where to run (auto)")
    add("--full", action="store_true", help="show all measures, not only the main ones")
    add("--quiet", "-q", action="store_true", help="no progress on stderr")
    # The file in which a comparison in the testbed leaves its results for the process outside.
    add("--handover", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run or load a comparison, then show and write it."""
    files = {f"--{name}": getattr(args, name) for name in ("json", "html", "svg", "handover")}
    if args.source:
        with Outputs(files, keep=True) as outputs:
            return outputs.status(_show(args, outputs, _load(args.source)))
    plan = _plan(args)
    with Outputs(files, keep=True) as outputs:
        status, document = _forwarded(args, plan)
        if status is None:
            status, document = _measure(args, plan)
        if document is not None:
            shown = _show(args, outputs, document)
            status = status or shown
        return outputs.status(status)


def _plan(args: argparse.Namespace) -> Plan:
    from pyvmm.compare import ladder
    from pyvmm.compare.plan import DEFAULT_MODES, DEFAULT_WORKLOADS, Plan
    from pyvmm.memory import parse_size

    if args.rungs is not None and not args.ladder:
        raise UsageError(f"--rungs {args.rungs} without --ladder", "add --ladder")
    if args.ladder and (args.modes is not None or args.peers):
        raise UsageError(
            "--ladder and --modes or --peers", "the rungs are the modes: leave one out"
        )
    parse_size(args.memory)
    workloads = ladder.WORKLOADS if args.ladder else DEFAULT_WORKLOADS
    return Plan(
        modes=args.modes if args.modes is not None else DEFAULT_MODES,
        peers=args.peers,
        rungs=ladder.choose(args.rungs or "") if args.ladder else (),
        workloads=args.workload if args.workload is not None else ",".join(workloads),
        repeat=args.repeat,
        seconds=args.seconds,
        cpus=args.cpus,
        memory=args.memory,
        reasons=args.reasons,
        pin=args.pin,
    )


def _forwarded(args: argparse.Namespace, plan: Plan) -> tuple[int | None, dict[str, Any] | None]:
    """Run the comparison in the testbed, if this host cannot. The results come back in a file,
    which this process shows and writes.
    """
    import tempfile

    from pyvmm.cli.support.hostchoice import elsewhere

    if args.host == "local":
        return None, None
    own = ["--workload", ",".join(plan.workloads), "--memory", args.memory]
    if args.ladder:
        own += ["--ladder", "--rungs", ",".join(mode.name for mode in plan.modes)]
    else:
        own += ["--modes", ",".join(m.name for m in plan.modes if m.kind == "pyvmm")]
        own += ["--peers", args.peers]
    own += ["--repeat", str(args.repeat), "--seconds", str(args.seconds), "--cpus", str(args.cpus)]
    own += [f"--append={args.append}", *(["--quiet"] if args.quiet else [])]
    own += ["--reasons"] if args.reasons else []
    own += ["--sandbox", args.sandbox, *([] if args.pin else ["--no-pin"])]
    for option in ("kernel", "initrd", "image"):
        if getattr(args, option):
            own.append(f"--{option}={getattr(args, option)}")
    vhost = any(mode.vhost for mode in plan.modes)
    with tempfile.TemporaryDirectory(prefix="pyvmm-compare-") as directory:
        path = f"{directory}/result.json"
        status = elsewhere(
            args.host,
            args.kernel,
            ["compare", "--host", "local", *own, "--handover", path],
            vhost=vhost,
            vdpa=any(mode.net.startswith("vhost-vdpa") for mode in plan.modes),
        )
        if status is None:
            return None, None
        if os.path.exists(path) and os.stat(path).st_size:  # noqa: PTH110, PTH116
            return status, _load(path)
        if status < 2:
            raise TestbedError(
                "no results came back from the testbed",
                f"if it was not interrupted while it started: is {directory} writable there? "
                "(pyvmm testbed status)",
            )
        return status, None


def _measure(args: argparse.Namespace, plan: Plan) -> tuple[int, dict[str, Any] | None]:
    """Run the comparison here; returns the exit status and the results, however it has ended."""
    from pyvmm.cli.support.signals import orderly
    from pyvmm.compare.run import Comparison
    from pyvmm.images import CMDLINE, find

    plan.kernel, plan.initrd, plan.append = args.kernel, args.initrd, args.append
    if args.kernel is None:
        image = find(args.image or "default")
        plan.kernel, plan.initrd = image.kernel, args.initrd or image.initrd
        plan.append = f"{CMDLINE} {args.append}".rstrip()
        plan.image = f"{image.name}: Linux {image.version}"
    found: list[dict[str, Any]] = []
    progress = (lambda line: None) if args.quiet else _progress
    # The comparison comes first: `orderly` starts a thread.
    with Comparison(plan, progress, sandbox=args.sandbox) as comparison:
        status = orderly(lambda: _run(comparison, found))
    return status, found[0] if found else None


def _run(comparison: Comparison, found: list[dict[str, Any]]) -> int:
    try:
        comparison.run()
    finally:
        found.append(comparison.document())
    return 0


def _progress(line: str) -> None:
    from pyvmm.cli.support.verdicts import quoted

    print(*quoted([f"pyvmm compare: {line}"]), file=sys.stderr, flush=True)


def _load(path: str) -> dict[str, Any]:
    import json
    from pathlib import Path

    from pyvmm.compare.ladder import steps
    from pyvmm.compare.schema import check
    from pyvmm.compare.stats import summarise

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON's")

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=constant)
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path}: {e}", "name a file that pyvmm compare --json has written") from e
    problem = check(document)
    if problem:
        raise UsageError(f"{path}: {problem}", "name a file that pyvmm compare --json has written")
    assert isinstance(document, dict)
    # This pyvmm may know more measures than the one that measured.
    document["summary"] = summarise(document)
    if "ladder" in document:
        document["ladder"] = steps(document)
    return document


def complete(document: dict[str, Any]) -> bool:
    """Whether everything that the user asked for has been measured."""
    return not document["partial"] and not any(
        [
            *(mode["problem"] for mode in document["modes"]),
            *(run["error"] for run in document["runs"]),
            *(w["error"] for run in document["runs"] for w in run["workloads"]),
        ]
    )


def _show(args: argparse.Namespace, outputs: Outputs, document: dict[str, Any]) -> int:
    """Write the files that the user asks for, and print the table; returns the exit status."""
    import json
    import re

    status = 0 if complete(document) else 1
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    # A list of numbers is on one line, instead of one line per number.
    text = re.sub(r"\[\n[-\d.,e\s]+\]", lambda m: " ".join(m[0].split()), text)
    if "--handover" in outputs:
        outputs.write("--handover", text)
        return status
    if "--json" in outputs:
        outputs.write("--json", text)
    if "--html" in outputs:
        from pyvmm.compare.html import page

        outputs.write("--html", page(document))
    if "--svg" in outputs:
        from pyvmm.compare.html import figure, ladder_figure

        outputs.write("--svg", (ladder_figure if "ladder" in document else figure)(document))
    if args.json != STDOUT:
        _print_table(document, full=args.full)
    return status


def _print_table(document: dict[str, Any], *, full: bool) -> None:
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    from pyvmm.cli.support.verdicts import quoted
    from pyvmm.compare import ladder
    from pyvmm.compare.stats import remarks

    climb = "ladder" in document
    table = _ladder(document) if climb else _table(document, full=full)
    console = Console(highlight=False)
    if not console.is_terminal:
        wide = Console(width=MAX_WIDTH, highlight=False)
        width = Measurement.get(wide, wide.options, table).maximum
        console = Console(
            width=min(max(width, len(str(table.title)) + 2, 80), MAX_WIDTH), highlight=False
        )
    console.print(table)
    for line in quoted([*([ladder.remark(document)] if climb else ()), *remarks(document)]):
        console.print(Text(line), soft_wrap=True)


def _title(document: dict[str, Any]) -> str:
    settings = document["settings"]
    return (
        f"{document['guest']['image'] or document['guest']['kernel']}, "
        f"{document['guest']['cpus']} vCPU(s), "
        f"{settings['repeat']} x {settings['seconds']:g} s: median (lowest..highest)"
    )


def _new_table(document: dict[str, Any]) -> Table:
    """A table with its title and its first column, of names."""
    from rich import box
    from rich.table import Table

    title = _title(document)
    table = Table(
        title=title,
        min_width=min(len(title) + 2, 78),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        header_style="bold",
    )
    table.add_column("")
    return table


def _ladder(document: dict[str, Any]) -> Table:
    """One line per rung, and what the step to it gained."""
    from rich.text import Text

    from pyvmm.compare import ladder

    table = _new_table(document)
    for *_, head in ladder.COLUMNS:
        table.add_column(Text(head), justify="right")
    for name, row in ladder.cells(document):
        table.add_row(Text(name), *(Text(f"{figure}\n{step}") for figure, step in row))
    return table


def _table(document: dict[str, Any], *, full: bool) -> Table:
    from rich.text import Text

    from pyvmm.compare.stats import DIFFERS, NOISE, Figures, cell

    figures = Figures(document)
    names = [mode["name"] for mode in document["modes"]]
    settings, table = document["settings"], _new_table(document)
    for mode in document["modes"]:
        table.add_column(Text(mode["name"]), justify="right")
    for workload in settings["workloads"]:
        table.add_section()
        rows, _ = figures.rows(workload["name"], names, full=full)
        table.add_row(Text(workload["name"], style="bold"), *([""] * len(names)))
        for measure in rows:
            cells = []
            for name in names:
                entry = figures.get(workload["name"], name, measure.key)
                verdict = entry["verdict"] if entry else None
                style = {DIFFERS: "bold", NOISE: "dim"}.get(verdict or "", "")
                cells.append(Text(cell(entry), style=style))
            unit = f", {measure.unit}" if measure.unit else ""
            table.add_row(Text(f"  {measure.title}{unit}"), *cells)
    return table
