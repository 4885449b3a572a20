"""Boot each kernel on each data path, with each number of processors and set of features, and say
how each went.

A cell is one boot: the guest comes up, pings, receives and sends by TCP (iperf3), runs COMMAND if
there is one, and powers off. Its row has the verdict, the features that kernel and card agreed on,
the throughput both ways and the exits to the VMM for 1000 packets.

Modes are those of `pyvmm run --net`, their keys joined by colons (emulated:notify=exit). Feature
sets are `all`, or what is not offered, joined by +: no-mrg-rxbuf, no-offloads+no-event-idx. Kernels
are files or names of images (default, 6.12, tiny, host).

With --json FILE each cell is written as soon as it has ended, and --resume goes on where an
interruption, a crash or a lost machine left it: cells that are there are taken from it, unless
their kernel or the options have changed.

Examples:
  pyvmm matrix pyvmm matrix --kernels default,6.12 --modes emulated,vhost-net --cpus 1,2 --features
  all,no-mrg-rxbuf --json matrix.json pyvmm matrix --kernels old/bzImage,new/bzImage --modes
  emulated --junit matrix.xml -- sh -c 'ethtool -k eth0' pyvmm matrix --kernels default,6.12 --json
  matrix.json --resume

Exit status: 0 all cells passed, 1 some did not, 2 bad usage, 102..104 no usable KVM, 110 the
testbed failed, 130, 143, 129 ended by SIGINT, SIGTERM, SIGHUP.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm.cli.support.values import count, seconds, trouble_kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from contextlib import ExitStack
    from typing import Any

    from pyvmm.hostnet.netns import Namespace
    from pyvmm.testing.vm import Vm

SCHEMA = "pyvmm-matrix/1"
HOST_ADDRESS = "192.168.100.1"
#: Figures of a cell, from when it was ready on (docs/budgets.md).
COUNTED = (
    "user_exits",
    "notify",
    "kvm_exits",
    "irq_injections",
    "packets",
    "bytes",
    "kicks",
    "interrupts",
)
GUEST_ADDRESS = "192.168.100.2"
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
    add("--memory", metavar="SIZE", default="256M", help="guest memory (256M)")
    add("--append", metavar="S", default="", help="more kernel command line")
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
        help="as in `pyvmm run`: oops,warning,bug,rcu-stall,lockdep or all",
    )
    add("--json", metavar="FILE", help="write each cell as JSON as soon as it has ended")
    add("--resume", action="store_true", help="take the cells that --json FILE has, run the others")
    add("--junit", metavar="FILE", help="write JUnit XML, a test case a cell")
    add("--quiet", "-q", action="store_true", help="no progress on stderr")
    add("--host", choices=("auto", "local", "testbed"), default="auto", help="where to run (auto)")
    add(
        "guest_command", metavar="COMMAND", nargs="*", help="after --: what each guest runs at last"
    )


class Cell:
    """One boot that is to be."""

    def __init__(self, kernel: str, mode: str, cpus: int, features: str) -> None:
        self.kernel, self.mode, self.cpus, self.features = kernel, mode, cpus, features
        self.name = f"{os.path.basename(kernel)}/{mode}/{cpus}/{features}"  # noqa: PTH119 - no pathlib for that

    def net(self) -> str:
        """As ``--net`` takes it."""
        if self.mode == "none":
            return self.mode
        without = (
            "+".join(part.removeprefix("no-") for part in self.features.split("+"))
            if self.features != "all"
            else ""
        )
        return self.mode.replace(":", ",") + (f",without={without}" if without else "")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "kernel": self.kernel,
            "mode": self.mode,
            "cpus": self.cpus,
            "features": self.features,
        }


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the cells there."""
    from pyvmm.cli.support.hostchoice import elsewhere
    from pyvmm.cli.support.signals import orderly
    from pyvmm.errors import UsageError

    if args.seconds > args.timeout:
        raise UsageError(f"--seconds {args.seconds}", f"use less than --timeout {args.timeout:g}")
    if args.resume and not args.json:
        raise UsageError("--resume without --json", "name the file that has the cells")
    cells = _cells(args)
    linux = next((c.kernel for c in cells if _is_linux(c.kernel)), None)
    at = args.argv.index("matrix") + 1
    vhost = any(c.mode.partition(":")[0] == "vhost-net" for c in cells)
    host = "local" if args.host == "auto" and linux is None else args.host
    status = elsewhere(host, None, ["matrix", "--host", "local", *args.argv[at:]], vhost=vhost)
    return orderly(lambda: _run(args, cells)) if status is None else status


def _is_linux(kernel: str) -> bool:
    from pyvmm.boot import is_linux
    from pyvmm.errors import ImageError
    from pyvmm.images import NAMES

    if kernel in NAMES:
        return True
    try:
        return is_linux(kernel)
    except ImageError:
        return False  # it is told with its verdict


def _cells(args: argparse.Namespace) -> list[Cell]:
    """All combinations, each checked."""
    from pyvmm.errors import UsageError
    from pyvmm.netopt import Net

    def words(option: str, text: str) -> list[str]:
        out = [w.strip() for w in text.split(",") if w.strip()]
        if not out or len(set(out)) != len(out):
            raise UsageError(f"{option} {text!r}", "write a list without repetitions, by commas")
        return out

    cells = []
    for kernel in words("--kernels", args.kernels):
        for mode in words("--modes", args.modes):
            for cpus in words("--cpus", args.cpus):
                for features in words("--features", args.features):
                    if not cpus.isascii() or not cpus.isdecimal() or not 1 <= int(cpus) <= 64:
                        raise UsageError(f"--cpus {cpus}", "use 1 to 64")
                    if features != "all" and not all(
                        p.startswith("no-") for p in features.split("+")
                    ):
                        raise UsageError(
                            f"--features {features}", "write all, or no-mrg-rxbuf+no-event-idx"
                        )
                    cell = Cell(kernel, mode, int(cpus), features)
                    net = cell.net() + (
                        ",socket=x" if mode.partition(":")[0] == "vhost-user" else ""
                    )
                    if Net.parse(net).tap or "socket=" in mode:
                        raise UsageError(
                            f"--modes {mode}", "each cell makes its own tap and socket"
                        )
                    cells.append(cell)
    return cells


# --- running --------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, cells: list[Cell]) -> int:
    from pyvmm.cli.support.signals import Terminated
    from pyvmm.cli.support.verdicts import annotate

    store = _Store(args, cells)
    table = _Table(cells)
    begin = time.monotonic()
    ended = 0
    results: dict[str, dict[str, Any]] = {}
    try:
        for number, cell in enumerate(cells, 1):
            result = store.find(cell)
            if result is None:
                if not args.quiet:
                    print(
                        f"pyvmm: [{number}/{len(cells)}] {cell.name}", file=sys.stderr, flush=True
                    )
                result = _boot(args, cell)
                if result["verdict"] != "passed":
                    annotate(f"pyvmm {result['verdict']}", f"{cell.name}: {result['message']}")
            results[cell.name] = result
            store.add(cell, result)
            table.row(cell, result)
    except Terminated as e:
        ended = 128 + e.number
        left = len(cells) - len(results)
        hint = "; go on with --resume" if args.json else ""
        print(
            f"pyvmm: interrupted, {left} of {len(cells)} cells were not run{hint}", file=sys.stderr
        )
    finally:
        if args.junit:
            _write_junit(args.junit, cells, results, time.monotonic() - begin)
    good = sum(r["verdict"] == "passed" for r in results.values())
    print(
        f"{len(cells)} cells in {time.monotonic() - begin:.0f} s: {good} passed, {len(results) - good} failed"
    )
    return ended or int(good != len(cells))


def _boot(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """One cell, whatever happens in it."""
    from contextlib import ExitStack

    from pyvmm.errors import CommandFailed, KvmForbidden, KvmMissing, KvmUnsuitable, PyvmmError
    from pyvmm.testing.console import Watch
    from pyvmm.testing.judge import judge
    from pyvmm.testing.verdict import Verdict, last_lines, of_error

    begin = time.monotonic()
    result: dict[str, Any] = {**cell.as_dict(), "negotiated": []}
    watch = Watch(args.fail_on) if args.fail_on else None
    vm: Vm | None = None
    verdict = Verdict("passed")
    with ExitStack() as stack:
        try:
            vm, namespace = _machine(args, cell, stack)
            if watch is not None:
                vm.console.add_sink(watch)
            problem = _measure(args, vm, namespace, result)
            outcome = vm.outcome or vm.power_off(20)
            verdict = judge(
                outcome,
                console=vm.console.text,
                phases=vm.phases,
                commanded=False,
                watch=watch,
                symbols=cell.kernel,
            )
            if verdict.kind == "passed" and problem:
                verdict = Verdict("failed", problem, status=1)
        except (KvmMissing, KvmForbidden, KvmUnsuitable):
            raise
        except CommandFailed as e:
            verdict = Verdict(
                "failed", str(e).partition("\n")[0], status=1, details=str(e).splitlines()[1:]
            )
        except PyvmmError as e:
            if vm is not None and vm.outcome is not None and vm.outcome.error() is not None:
                verdict = judge(
                    vm.outcome,
                    console=vm.console.text,
                    phases=vm.phases,
                    commanded=False,
                    watch=watch,
                    symbols=cell.kernel,
                )
            else:
                verdict = of_error(e)
        if vm is not None:
            _facts(vm, result)
            if verdict.kind != "passed":
                result["console"] = last_lines(vm.console.text, 30)
    result |= {"verdict": verdict.kind, "message": verdict.message, "details": verdict.details}
    result["seconds"] = round(time.monotonic() - begin, 3)
    return result


def _machine(args: argparse.Namespace, cell: Cell, stack: ExitStack) -> tuple[Vm, Namespace | None]:
    """The cell's machine, bounded by its time-out, and the namespace at the other end of its card;
    closed with ``stack``.
    """
    import threading

    from pyvmm.netopt import Net
    from pyvmm.outcome import Outcome
    from pyvmm.testing.vm import Vm

    net = cell.net()
    namespace: Namespace | None = None
    if cell.mode.partition(":")[0] == "vhost-user":
        path, namespace = _backend(stack)
        net += f",socket={path},guest={GUEST_ADDRESS}/24,host={HOST_ADDRESS}/24"
    vm = stack.enter_context(
        Vm(
            cell.kernel,
            append=args.append,
            cpus=cell.cpus,
            memory=args.memory,
            nets=[Net.parse(net)],
            hang_timeout=args.hang_timeout,
        )
    )
    timer = threading.Timer(
        args.timeout, lambda: vm.stop(Outcome("timeout", f"{args.timeout:g} s are over"))
    )
    timer.daemon = True
    timer.start()
    stack.callback(timer.join)
    stack.callback(timer.cancel)
    return vm, namespace or (vm.nets[0].namespace if vm.nets else None)


def _backend(stack: ExitStack) -> tuple[str, Namespace]:
    """The socket of a vhost-user back-end in this process, and the namespace of its tap. It ends
    with ``stack``.
    """
    import tempfile
    import threading

    from pyvmm.backend.net import NetService
    from pyvmm.backend.server import Backend
    from pyvmm.hostnet.netns import Namespace

    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-matrix-"))
    namespace = stack.enter_context(Namespace(address=f"{HOST_ADDRESS}/24"))
    backend = stack.enter_context(Backend(NetService(namespace.tap)))
    path = f"{directory}/socket"
    thread = threading.Thread(target=backend.run, args=(path,), name="back-end", daemon=True)
    thread.start()
    stack.callback(thread.join)
    stack.callback(backend.stop)
    until = time.monotonic() + 10
    while not os.path.exists(path) and time.monotonic() < until:  # noqa: PTH110
        time.sleep(0.01)
    return path, namespace


def _measure(
    args: argparse.Namespace, vm: Vm, namespace: Namespace | None, result: dict[str, Any]
) -> str:
    """Boot, ping, TCP both ways, the command. What went wrong in one line, or nothing."""
    vm.ready(args.timeout + 30)  # the time-out itself comes first
    if vm.agent is None:  # a test kernel, or another init: its end is all that it says
        vm.wait(args.timeout)
        return ""
    if namespace is not None:
        vm.run(["ping", "-c", "3", "-i", "0.2", HOST_ADDRESS], timeout=30).check()
        if args.seconds:
            vm.run(["iperf3", "-s", "-D"]).check()
            for way, extra in (("to_guest_mbit", []), ("from_guest_mbit", ["-R"])):
                result[way] = _iperf(namespace, args.seconds, extra)
    counts = vm.exits.counts()
    result |= {name: counts[name] for name in COUNTED}
    if args.guest_command:
        done = vm.run(args.guest_command, timeout=args.timeout)
        result["command"] = {
            "status": done.status,
            "stdout": done.out[-4000:],
            "stderr": done.err[-4000:],
        }
        if done.status:
            return f"the command's exit status is {done.status}"
    return ""


def _iperf(namespace: Namespace, seconds: int, extra: list[str]) -> float:
    """Mbit/s of TCP from the host's side, a while being allowed for the guest's server to listen.

    :raises PyvmmError: there is no iperf3, or it never got through.
    """
    import json

    from pyvmm.errors import CommandFailed, HostError

    command = [
        "iperf3",
        "-c",
        GUEST_ADDRESS,
        "-t",
        str(seconds),
        "--connect-timeout",
        "3000",
        "--json",
        *extra,
    ]
    error = ""
    for _ in range(20):
        try:
            done = namespace.run(command, capture_output=True, text=True, timeout=seconds + 30)
        except FileNotFoundError as e:
            raise HostError(
                "iperf3 cannot be run", "install iperf3 and util-linux, or use --seconds 0"
            ) from e
        except (
            Exception
        ) as e:  # subprocess.TimeoutExpired, whose module is not to be imported for that
            raise CommandFailed(f"iperf3 did not end: {e}") from e
        try:
            data = json.loads(done.stdout)
        except ValueError:
            data = {"error": done.stderr or done.stdout}
        if "error" not in data:
            return round(float(data["end"]["sum_received"]["bits_per_second"]) / 1e6, 1)
        error = str(data["error"]).strip()
        time.sleep(0.3)
    raise CommandFailed(f"iperf3: {error}")


def _facts(vm: Vm, result: dict[str, Any]) -> None:
    """What is known of a machine, however it ended."""
    from pyvmm.virtio.features import names

    start = vm.phases["vmm"]
    result["phases_s"] = {
        k: round((t - start) / 1e9, 3) for k, t in sorted(vm.phases.items(), key=lambda p: p[1])
    }
    if vm.nets:
        result["negotiated"] = names(vm.nets[0].device.negotiated)
        result["offered"] = names(vm.nets[0].device.offered())


# --- what is written ------------------------------------------------------------------------------


class _Store:
    """The JSON file: cells by name, written anew after each."""

    def __init__(self, args: argparse.Namespace, cells: list[Cell]) -> None:
        import json

        from pyvmm.errors import UsageError

        self._path: str | None = args.json
        self._keys = {c.name: _key(args, c) for c in cells}
        self._old: dict[str, dict[str, Any]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        if args.resume:
            try:
                with open(args.json) as f:
                    data = json.load(f)
                if data.get("schema") != SCHEMA:
                    raise ValueError(f"its schema is not {SCHEMA}")
                self._old = {str(c["name"]): c for c in data["cells"]}
            except FileNotFoundError:
                pass  # nothing has been done yet
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise UsageError(
                    f"--json {args.json} --resume: {e}", "leave --resume out to begin anew"
                ) from e
        self._write()

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result of an earlier run that still holds; a host's problem does not."""
        old = self._old.get(cell.name)
        good = (
            old is not None
            and old.get("key") == self._keys[cell.name]
            and old.get("verdict") != "host-problem"
        )
        return old if good else None

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep it."""
        self._done[cell.name] = {"name": cell.name, "key": self._keys[cell.name], **result}
        self._write()

    def _write(self) -> None:
        """Old cells stay until this run has come to them. A file that is read meanwhile is
        whole.
        """
        import json

        from pyvmm import __version__
        from pyvmm.errors import UsageError

        if self._path is None:
            return
        cells = {**self._old, **self._done}
        data = {"schema": SCHEMA, "pyvmm": __version__, "cells": list(cells.values())}
        part = f"{self._path}.part"
        try:
            with open(part, "w") as f:
                f.write(json.dumps(data, indent=2) + "\n")
            os.rename(part, self._path)  # noqa: PTH104
        except OSError as e:
            raise UsageError(
                f"--json {self._path}: {e.strerror}", "name a file that can be written"
            ) from e


def _key(args: argparse.Namespace, cell: Cell) -> str:
    """What a result depends on, beside the cell's own words: the kernel as it is now, and the
    options.
    """
    from pyvmm.errors import ImageError
    from pyvmm.testing.vm import resolve

    try:
        files = [path for path in resolve(cell.kernel)[:2] if path]
    except ImageError:
        files = [cell.kernel]
    parts = [args.seconds, args.memory, args.append, args.fail_on, args.guest_command]
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116
            parts.append((os.path.realpath(path), status.st_size, status.st_mtime_ns))
        except OSError:
            parts.append(path)
    return repr(parts)


class _Table:
    """A row a cell, as they come."""

    def __init__(self, cells: list[Cell]) -> None:
        texts = [(os.path.basename(c.kernel), c.mode, str(c.cpus), c.features) for c in cells]  # noqa: PTH119
        self._widths = [
            max(len(name), *(len(t[i]) for t in texts)) for i, name in enumerate(COLUMNS[:4])
        ]
        self._widths += [
            max(len(name), 12) if name == "verdict" else len(name) for name in COLUMNS[4:]
        ]
        self._first: dict[str, set[str]] = {}
        self._print(COLUMNS)

    def _print(self, texts: tuple[str, ...]) -> None:
        left = [t.ljust(w) for t, w in zip(texts[:5], self._widths, strict=False)]
        right = [t.rjust(w) for t, w in zip(texts[5:9], self._widths[5:], strict=False)]
        print("  ".join([*left, *right, texts[9]]).rstrip(), flush=True)

    def row(self, cell: Cell, result: dict[str, Any]) -> None:
        """One has ended."""
        phases = result.get("phases_s", {})
        boot = phases.get("init")
        packets, exits = result.get("packets"), result.get("user_exits")
        negotiated = set(result["negotiated"])
        first = self._first.setdefault(cell.kernel, negotiated)
        changes = [f"-{n}" for n in sorted(first - negotiated)] + [
            f"+{n}" for n in sorted(negotiated - first)
        ]
        cells = (
            os.path.basename(cell.kernel),  # noqa: PTH119
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
            print(f"    {result['message']}", flush=True)


def _write_junit(
    path: str, cells: list[Cell], results: dict[str, dict[str, Any]], seconds: float
) -> None:
    from pyvmm.testing.junit import TestCase, document

    cases = []
    for cell in cells:
        r = results.get(cell.name)
        if r is None:
            cases.append(TestCase("pyvmm.matrix", cell.name, 0, "skipped", message="not run"))
            continue
        kind = r["verdict"]
        names = ("to_guest_mbit", "from_guest_mbit", *COUNTED)
        properties = {n: str(r[n]) for n in names if r.get(n) is not None}
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
    try:
        with open(path, "w") as f:
            f.write(document("pyvmm matrix", cases, seconds))
    except OSError as e:
        print(f"pyvmm: --junit: {e.strerror}", file=sys.stderr)
