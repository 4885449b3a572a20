"""Boot each kernel on each data path, with each number of processors and set of features, and show
how each boot went.

A cell is one boot: the guest comes up, pings, returns 1 MiB that is compared byte by byte, receives
and sends by TCP (iperf3), runs COMMAND if there is one, and powers off. Its row has the verdict,
the features that kernel and card agreed on, the throughput both ways, and the exits to the VMM per
1000 packets.

Modes are those of `pyvmm run --net`, their keys joined by colons (emulated:notify=exit). Feature
sets are `all`, or the groups that are not offered and those that are offered on request only,
joined by +: no-mrg-rxbuf, no-offloads+packed. `most` stands for all those on request that the data
path has; `each` for `all`, each group alone, and `most`; `pairs` for each kind of ring with each
kind of offload.
Kernels are files or names of images (default, 6.12, tiny, host).

With --json FILE each cell is written as soon as it has ended. --resume goes on after an
interruption, a crash or the loss of a machine: results in FILE are kept, unless their kernel or the
options have changed.

Examples:
  pyvmm matrix
  pyvmm matrix --kernels default,6.12 --cpus 1,2 --features all,no-mrg-rxbuf --json matrix.json
  pyvmm matrix --kernels default,6.12 --json matrix.json --resume
  pyvmm matrix --modes emulated,vhost-net,vhost-user --features each,pairs --seconds 0
  pyvmm matrix --cpu host,-pcid --kernels default,6.12
  pyvmm matrix --kernels default,6.12 --shard 3/10 --json part3.json
  pyvmm matrix --merge part*.json --json all.json --junit all.xml
  pyvmm matrix --kernels default,6.12 --add build/mytest -- mytest --quick
  pyvmm matrix --kernels old/bzImage,new/bzImage --modes vhost-user --junit m.xml -- ethtool -k eth0

Exit status: 0 all cells passed, 1 some did not, 2 bad usage, 101 a result could not be written,
102..104 no usable KVM, 105 a kernel or image is missing, 110 the testbed failed, 132 --sandbox on
is impossible, 130, 143, 129 ended by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import sys
import time

from pyvmm.cli.support.options import (
    ADD_HELP,
    CPU_HELP,
    MODULES_HELP,
    SHARD_HELP,
    TROUBLE_KINDS,
    add_host,
    add_sandbox,
    count,
    cpu_model,
    part_of,
    seconds,
    shard,
    trouble_kinds,
)
from pyvmm.cli.support.outputs import STDOUT, Outputs
from pyvmm.cli.support.screen import columns
from pyvmm.cli.support.tables import wrapped
from pyvmm.errors import ImageError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.matrix.run import Cell, Settings, Sweep
    from pyvmm.matrix.store import Store

COLUMNS = (
    "kernel",
    "mode",
    "cpus",
    "features",
    "verdict",
    "boot s",
    "to Mbit/s",
    "from Mbit/s",
    "exits/kpkt",
    "negotiated",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("--kernels", metavar="LIST", default="default", help="kernels, by commas (default)")
    add(
        "--modes",
        metavar="LIST",
        default="emulated,vhost-net",
        help="data paths (emulated,vhost-net)",
    )
    add("--cpus", metavar="LIST", default="1", help="numbers of virtual CPUs (1)")
    add("--features", metavar="LIST", default="all", help="feature sets (all)")
    add(
        "--seconds",
        metavar="S",
        type=count(0, 1000000),
        default=2,
        help="of TCP each way, 0 for none (2)",
    )
    add("--cpu", metavar="CPU", type=cpu_model, help=CPU_HELP)
    add("--memory", metavar="SIZE", default="256M", help="guest memory (256M)")
    add("--append", metavar="S", default="", help="more kernel command line")
    add("--add", metavar="F[:PATH]", action="append", default=[], help=ADD_HELP)
    add(
        "--modules",
        metavar="DIR",
        help=f"{MODULES_HELP}; each kernel gets those of its release",
    )
    add(
        "--timeout",
        metavar="S",
        type=seconds(1, 1e6),
        default=180.0,
        help="seconds for each cell (180)",
    )
    add(
        "--hang-timeout",
        metavar="S",
        type=seconds(0.1, 1e7),
        default=30.0,
        help="seconds without progress that end one (30)",
    )
    add(
        "--fail-on",
        metavar="LIST",
        type=trouble_kinds,
        default=[],
        help=f"as in `pyvmm run`: {TROUBLE_KINDS}",
    )
    add(
        "--json",
        metavar="FILE",
        help="write each cell as JSON as soon as it has ended ('-': all to stdout, at the end)",
    )
    add("--shard", metavar="K/N", type=shard, help=SHARD_HELP)
    add(
        "--merge",
        metavar="FILE",
        nargs="+",
        help="run nothing: put the --json files of shards together",
    )
    add("--resume", action="store_true", help="take the cells that --json FILE has, run the others")
    add("--junit", metavar="FILE", help="write JUnit XML, one test case per cell")
    add("--quiet", "-q", action="store_true", help="no progress on stderr")
    add_sandbox(parser, "the process of each cell before its guest runs")
    add_host(parser, "where to run (auto)")
    add(
        "guest_command",
        metavar="COMMAND",
        nargs="*",
        help="after --: the last command of each guest",
    )


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the cells there."""
    from pyvmm.cli.support.hostchoice import elsewhere
    from pyvmm.cli.support.signals import orderly
    from pyvmm.matrix.run import Settings, Sweep, check_added, check_kernels, combine

    if args.merge:
        return orderly(lambda: _merge(args))
    if args.seconds > args.timeout:
        raise UsageError(f"--seconds {args.seconds}", f"use less than --timeout {args.timeout:g}")
    if args.resume and args.json in (None, STDOUT):
        raise UsageError("--resume without --json", "name the file that has the cells")
    cells = part_of(combine(args.kernels, args.modes, args.cpus, args.features), args.shard)
    settings = Settings(
        seconds=args.seconds,
        cpu=args.cpu,
        memory=args.memory,
        append=args.append,
        timeout=args.timeout,
        hang_timeout=args.hang_timeout,
        fail_on=args.fail_on,
        command=args.guest_command,
        add=args.add,
        modules=args.modules,
    )
    linux = any(_is_linux(cell.kernel) for cell in cells)
    host = "local" if args.host == "auto" and not linux else args.host
    if host != "local":
        check_kernels(cells)  # before the testbed is started
        check_added(settings)
    at = args.argv.index("matrix") + 1
    vhost = any(cell.mode.partition(":")[0] == "vhost-net" for cell in cells)
    vdpa = any(cell.mode.partition(":")[0] == "vhost-vdpa" for cell in cells)
    argv = ["matrix", "--host", "local", *args.argv[at:]]
    status = elsewhere(host, None, argv, vhost=vhost, vdpa=vdpa)
    if status is not None:
        return status
    # The sweep comes first: `orderly` starts a thread.
    with Sweep(cells, settings, sandbox=args.sandbox) as sweep:
        return orderly(lambda: _sweep(args, cells, settings, sweep))


def _merge(args: argparse.Namespace) -> int:
    """Show the cells of several files as one sweep; returns the exit status."""
    from pyvmm.matrix.run import Cell
    from pyvmm.matrix.store import document, load

    results: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for path in args.merge:
        for name, result in load(path).items():
            if name in results:
                raise UsageError(
                    f"{name} is in {origin[name]} and in {path}", "name each part once"
                )
            results[name], origin[name] = result, path
    cells = [
        Cell(*(r[k] for k in ("kernel", "mode", "cpus", "features"))) for r in results.values()
    ]
    with Outputs({"--json": args.json, "--junit": args.junit}) as outputs:
        table = _Table(cells, args)
        for cell in cells:
            table.row(cell, results[cell.name])
        took = sum(float(r["seconds"]) for r in results.values())
        if "--json" in outputs:
            outputs.write("--json", document(results.values()))
        if "--junit" in outputs:
            outputs.write("--junit", _junit(cells, results, took))
        good = sum(r["verdict"] == "passed" for r in results.values())
        table.say(f"{len(cells)} cells in {took:.0f} s: {good} passed, {len(cells) - good} failed")
        return outputs.status(int(good != len(cells)))


def _is_linux(kernel: str) -> bool:
    from pyvmm.boot import is_linux
    from pyvmm.images import is_name

    if is_name(kernel):
        return True
    try:
        return is_linux(kernel)
    except ImageError:
        return False  # the kernel's verdict will report it


def _sweep(args: argparse.Namespace, cells: list[Cell], settings: Settings, sweep: Sweep) -> int:
    """Run the cells here; returns the exit status."""
    from pyvmm.matrix.run import check_added, check_kernels
    from pyvmm.matrix.store import Store

    at_end = args.json == STDOUT
    with (
        Outputs({"--junit": args.junit, "--json": STDOUT if at_end else None}) as outputs,
        Store(None if at_end else args.json, cells, settings, resume=args.resume) as store,
    ):
        check_kernels(cells)
        check_added(settings)
        store.begin()
        return outputs.status(_run_cells(args, cells, sweep, store, outputs))


def _run_cells(
    args: argparse.Namespace,
    cells: list[Cell],
    sweep: Sweep,
    store: Store,
    outputs: Outputs,
) -> int:
    """Run one cell after another, and print its row; returns the exit status."""
    from pyvmm.cli.support.signals import Terminated
    from pyvmm.cli.support.verdicts import annotate, quoted

    table = _Table(cells, args)
    begin = time.monotonic()
    ended = 0
    results: dict[str, dict[str, Any]] = {}
    told: set[str] = set()
    try:
        for number, cell in enumerate(cells, 1):
            result = store.find(cell)
            if result is None:
                if not args.quiet:
                    progress = f"pyvmm: [{number}/{len(cells)}] {cell.name}"
                    print(progress, file=sys.stderr, flush=True)
                result = sweep.boot(cell)
                assert result is not None  # the sweep is open
                for note in result.get("notes", []):
                    if note not in told:
                        print(*quoted([f"pyvmm: {note}"]), file=sys.stderr)
                        told.add(note)
                if result["verdict"] != "passed":
                    annotate(f"pyvmm {result['verdict']}", f"{cell.name}: {result['message']}")
            results[cell.name] = result
            store.add(cell, result)
            table.row(cell, result)
    except Terminated as e:
        sweep.close()
        ended = 128 + e.number
        left = len(cells) - len(results)
        hint = "; go on with --resume" if args.json not in (None, STDOUT) else ""
        print(
            f"pyvmm: interrupted, {left} of {len(cells)} cells were not run{hint}", file=sys.stderr
        )
    finally:
        if "--junit" in outputs:
            outputs.write("--junit", _junit(cells, results, time.monotonic() - begin))
        if "--json" in outputs:
            outputs.write("--json", store.text())
    good = sum(r["verdict"] == "passed" for r in results.values())
    table.say(
        f"{len(cells)} cells in {time.monotonic() - begin:.0f} s: {good} passed, "
        f"{len(results) - good} failed"
    )
    return ended or int(good != len(cells))


class _Table:
    """One row per cell, printed when the cell has ended; on a narrow terminal, some lines."""

    def __init__(self, cells: list[Cell], args: argparse.Namespace) -> None:
        self._to = sys.stderr if args.json == STDOUT else sys.stdout
        texts = [(c.title, c.mode, str(c.cpus), c.features) for c in cells]
        self._widths = [
            max(len(name), *(len(t[i]) for t in texts)) for i, name in enumerate(COLUMNS[:4])
        ]
        self._widths += [
            max(len(name), 12) if name == "verdict" else len(name) for name in COLUMNS[4:]
        ]
        self._first: dict[str, set[str]] = {}
        room, needed = columns(self._to), sum(self._widths) + 2 * (len(COLUMNS) - 1)
        self._narrow = room if room is not None and room < needed else None
        if self._narrow is None:
            self._print(COLUMNS)

    def say(self, line: str) -> None:
        """Print lines, in which a kernel may have a hand."""
        from pyvmm.cli.support.verdicts import quoted

        print("\n".join(quoted(line.split("\n"))), file=self._to, flush=True)

    def _print(self, texts: tuple[str, ...]) -> None:
        if self._narrow is not None:
            self.say(f"{'/'.join(texts[:4])}: {texts[4]}")
            named = zip(COLUMNS[5:], texts[5:], strict=True)
            rest = ", ".join(f"{name} {text}" for name, text in named if text)
            self.say("\n".join(f"    {line}" for line in wrapped(rest, self._narrow - 4)))
            return
        left = [t.ljust(w) for t, w in zip(texts[:5], self._widths, strict=False)]
        right = [t.rjust(w) for t, w in zip(texts[5:9], self._widths[5:], strict=False)]
        self.say("  ".join([*left, *right, texts[9]]).rstrip())

    def row(self, cell: Cell, result: dict[str, Any]) -> None:
        """Print the row of a cell."""
        phases = result.get("phases_s", {})
        boot = phases.get("init")
        packets, exits = result.get("packets"), result.get("user_exits")
        negotiated = set(result["negotiated"])
        first = self._first.setdefault(cell.kernel, negotiated)
        changes = [f"-{n}" for n in sorted(first - negotiated)] + [
            f"+{n}" for n in sorted(negotiated - first)
        ]
        cells = (
            cell.title,
            cell.mode,
            str(cell.cpus),
            cell.features,
            result["verdict"],
            f"{boot:.1f}" if boot is not None else "",
            f"{result['to_guest_mbit']:.0f}" if "to_guest_mbit" in result else "",
            f"{result['from_guest_mbit']:.0f}" if "from_guest_mbit" in result else "",
            f"{exits * 1000 / packets:.1f}" if packets and exits is not None else "",
            " ".join([str(len(negotiated)), *changes]),
        )
        self._print(cells)
        if result["verdict"] != "passed":
            self.say(f"    {result['message']}")


def _junit(cells: list[Cell], results: dict[str, dict[str, Any]], seconds: float) -> str:
    from pyvmm.matrix.facts import COUNTED
    from pyvmm.testing.junit import TestCase, document

    cases = []
    for cell in cells:
        r = results.get(cell.name)
        if r is None:
            cases.append(TestCase("pyvmm.matrix", cell.name, 0, "skipped", message="not run"))
            continue
        kind = r["verdict"]
        figures = ("to_guest_mbit", "from_guest_mbit", *COUNTED)
        properties = {n: str(r[n]) for n in figures if r.get(n) is not None}
        properties |= {"verdict": kind, "negotiated": " ".join(r["negotiated"])}
        properties |= {f"{k}_s": str(t) for k, t in r.get("phases_s", {}).items()}
        cases.append(
            TestCase(
                "pyvmm.matrix",
                cell.name,
                r["seconds"],
                kind if kind in ("passed", "failed") else "error",
                kind=kind,
                message=r["message"],
                text="\n".join([r["message"], *r["details"]]),
                output="\n".join(r.get("console", [])).encode(),
                properties=properties,
            )
        )
    return document("pyvmm matrix", cases, seconds)
