"""Packets per second of `pyvmm backend` beside DPDK's vhost back-end, without a guest: `make
bench-native`.

    python -m tests.perf.bench_native [--rounds N] [--seconds S] [--json FILE] [--only WORDS]
    python -m tests.perf.bench_native --table FILE

The front-end is DPDK's virtio_user driver in dpdk-testpmd on one CPU; the back-end has another CPU
to itself. Frames of 64 bytes go round and round: `loop` is one front-end whose frames come back,
`connect` two front-ends of one process, each of which forwards to the other what it receives, and
`tap` one front-end whose frames come back from the back-end's tap, which is in a network namespace
of its own and returns what it gets (act_mirred). The back-ends take part in turn, round by round:
ours with and without --poll, and dpdk-testpmd with net_vhost in io mode, which forwards to net_tap
for `tap`. A round trip is measured with a single frame on its way. All processes get real-time
priority (SCHED_RR), if the user may give it, so that nothing else takes the two CPUs: while one of
two pollers does not run, neither does anything. Prints medians with the lowest and the highest
round.

`ways` needs no DPDK: it compares the calls by which the kernel moves frames through a tap
(tap_ways.c), in nanoseconds per frame.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.dpdk import TestPmd

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0
FRONT_CPU, BACK_CPU = 0, 1
#: Bursts of 32 frames that are on their way, per port of the front-end.
BURSTS = 8
RINGS = {"split": "", "packed": ",packed_vq=1"}
BACKENDS = ("testpmd", "pyvmm --poll", "pyvmm")
TOPOLOGIES = ("loop", "connect", "tap")
TAP = "bench0"
#: Makes a tap return what it gets, at once; a shell's commands. It has room for all frames on their
#: way, and the kernel sends none of its own.
TURN = (
    f"ip link set {TAP} addrgenmode none && ip link set {TAP} txqueuelen 1000 up"
    f" && tc qdisc add dev {TAP} clsact && tc filter add dev {TAP} ingress"
    f" protocol all u32 match u32 0 0 action mirred egress redirect dev {TAP}"
)
#: The ways of tap_ways.c, in its order, and the frames that they move.
WAYS = (
    "readv, writev",
    "read, write",
    "io_uring: readv, writev",
    "io_uring: fixed buffers",
)
WAY_SIZES = (64, 1514)
WAY_BURSTS = 10_000
#: What each figure is called in a table, and its unit.
MEASURES = {"mpps": "Mpps", "round_trip_us": "us"}


def in_namespace(script: str) -> list[str]:
    """A command that runs ``script`` in a new network namespace, and executes what follows."""
    user = ["--map-root-user"] if os.geteuid() else []
    return ["unshare", *user, "--net", "sh", "-ec", f'{script}\nexec "$@"', "sh"]


@contextmanager
def ours(topology: str, sockets: list[str], poll: bool) -> Iterator[None]:
    """`pyvmm backend`, wholly on its CPU."""
    argv = [sys.executable, "-m", "pyvmm", "backend", "--socket", sockets[0], "--unsealed"]
    ports = {"loop": ["--loopback"], "connect": ["--connect", sockets[-1]], "tap": ["--tap", TAP]}
    argv += [*ports[topology], "--quiet", "--worker-cpu", str(BACK_CPU)]
    argv += ["--poll"] if poll else []
    if topology == "tap":
        argv = [*in_namespace(f"ip tuntap add {TAP} mode tap vnet_hdr\n{TURN}"), *argv]
    process = subprocess.Popen(["taskset", "-c", str(BACK_CPU), *argv])
    try:
        end = time.monotonic() + PATIENCE
        while not all(Path(s).exists() for s in sockets):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("pyvmm backend does not start")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def theirs(topology: str, sockets: list[str]) -> Iterator[int]:
    """testpmd with net_vhost: a single port sends back what it receives, two forward. Gives the id
    of its main thread, which is not the one that moves packets.
    """
    vdevs = [f"net_vhost{i},iface={socket}" for i, socket in enumerate(sockets)]
    within: list[str] = []
    if topology == "tap":
        vdevs.append(f"net_tap0,iface={TAP}")
        # The driver makes its tap; until then the commands wait beside testpmd, which takes the
        # place of the shell. If testpmd ends, so do they, and they do not hold its pipe open.
        wait = f"until ip link show {TAP}; do kill -0 $$ || exit 1; sleep 0.05; done"
        within = in_namespace(f"({wait}; {TURN}) >/dev/null 2>&1 &")
    options = ("--forward-mode=io", "--auto-start")
    with TestPmd(*vdevs, options=options, cpu=BACK_CPU, within=within) as pmd:
        pmd.expect("Done", PATIENCE)
        yield pmd.process.pid


def received(pmd: TestPmd, ports: int) -> int:
    """Packets that the front-end's ports have received."""
    total = 0
    for port in range(ports):
        start = len(pmd.lines)
        pmd.say(f"show port stats {port}")
        pmd.expect("Tx-bps", PATIENCE, start)
        match = re.search(r"RX-packets: (\d+)", "\n".join(pmd.lines[start:]))
        assert match
        total += int(match[1])
    return total


def rate(pmd: TestPmd, ports: int, seconds: float) -> float:
    """Packets per second that the front-end receives, once they flow."""
    end = time.monotonic() + PATIENCE
    while received(pmd, ports) < 1000:
        if time.monotonic() > end:
            raise SystemExit("no packets come back:\n" + "\n".join(pmd.lines[-20:]))
    before, first = time.monotonic(), received(pmd, ports)
    time.sleep(seconds)
    after, last = time.monotonic(), received(pmd, ports)
    return (last - first) / (after - before)


def one(backend: str, topology: str, ring: str, seconds: float) -> dict[str, float]:
    """The figures of one back-end."""
    ports = 2 if topology == "connect" else 1
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-native-"))
        sockets = [f"{directory}/{i}" for i in range(ports)]
        main = 0
        if backend == "testpmd":
            main = stack.enter_context(theirs(topology, sockets))
        else:
            stack.enter_context(ours(topology, sockets, backend.endswith("--poll")))
        vdevs = [
            f"net_virtio_user{i},path={socket},queue_size=256{RINGS[ring]}"
            for i, socket in enumerate(sockets)
        ]
        pmd = TestPmd(*vdevs, options=("--forward-mode=io",), cpu=FRONT_CPU)
        stack.enter_context(pmd)
        pmd.say(f"start tx_first {BURSTS}")
        figures = {"mpps": rate(pmd, ports, seconds) / 1e6}
        if ports == 1:
            if topology == "tap" and main and os.sched_getscheduler(0) == os.SCHED_RR:
                # net_tap hears of frames by a signal, which the main thread gets. The poller on the
                # same CPU would let it wait for 100 ms, a turn of SCHED_RR. With many frames on
                # their way, the poller is quicker if it is not interrupted.
                os.sched_setscheduler(main, os.SCHED_RR, os.sched_param(2))
            for line in ("stop", "set burst 1", "clear port stats all", "start tx_first 1"):
                pmd.say(line)
            figures["round_trip_us"] = 1e6 / rate(pmd, ports, seconds / 2)
        return figures


def ways(rounds: int) -> dict[str, list[float]]:
    """The nanoseconds per frame of each way through a tap, by size and direction."""
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="pyvmm-native-") as directory:
        program = f"{directory}/tap_ways"
        source = Path(__file__).with_name("tap_ways.c")
        subprocess.run(["cc", "-O2", "-o", program, source], check=True)
        for size in WAY_SIZES:
            argv = in_namespace(f"ip tuntap add {TAP} mode tap vnet_hdr\n{TURN}")
            argv += ["taskset", "-c", str(BACK_CPU), program, TAP]
            argv += [str(size), str(rounds), str(WAY_BURSTS)]
            done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
            for line in done.stdout.splitlines():
                way, direction, ns = line.split()
                key = f"{WAYS[int(way)]} {size} {direction}"
                values.setdefault(key, []).append(float(ns))
    return values


def ways_table(values: dict[str, list[float]]) -> list[str]:
    """As a Markdown table: medians (lowest..highest) in ns, and how much quicker than today's: the
    median of the ratios of each round.
    """
    columns = [(size, direction) for size in WAY_SIZES for direction in ("tx", "rx")]
    titles = [f"{size} bytes, {direction}" for size, direction in columns]
    lines = [f"| ns per frame | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for way in WAYS:
        cells = []
        for size, direction in columns:
            row = values.get(f"{way} {size} {direction}")
            if not row:
                cells.append("-")
                continue
            today = values[f"{WAYS[0]} {size} {direction}"]
            gain = statistics.median(t / mine - 1 for t, mine in zip(today, row, strict=True))
            cell = f"{statistics.median(row):.0f} ({min(row):.0f}..{max(row):.0f})"
            cells.append(cell if way == WAYS[0] else f"{cell}, {100 * gain:+.0f} %")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def measure(rounds: int, seconds: float, only: str) -> dict[str, Any]:
    """All cells, round by round, so that each back-end has its share of what else goes on."""
    values: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for topology in TOPOLOGIES:
            for ring in RINGS:
                if only and only not in f"{topology} {ring}":
                    continue
                for backend in BACKENDS:
                    cell = values.setdefault(f"{topology} {ring} {backend}", {})
                    for name, value in one(backend, topology, ring, seconds).items():
                        cell.setdefault(name, []).append(round(value, 4))
                        print(
                            f"round {number + 1}: {topology} {ring}, {backend}: "
                            f"{value:.2f} {MEASURES[name]}",
                            file=sys.stderr,
                            flush=True,
                        )
    return {
        "ways": ways(rounds) if only in ("", "tap", "ways") else {},
        "bytes": 64,
        "rounds": rounds,
        "seconds": seconds,
        "realtime": os.sched_getscheduler(0) == os.SCHED_RR,
        "cpu": cpu_model(),
        "kernel": platform.release(),
        "values": values,
    }


def cpu_model() -> str:
    """The processor's name."""
    match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else "unknown"


def table(result: dict[str, Any]) -> list[str]:
    """The figures as a Markdown table: medians (lowest..highest), and our share of testpmd's."""
    values = result["values"]
    lines = [
        "| | testpmd net_vhost | pyvmm --poll | of testpmd | pyvmm | of testpmd |",
        "|---|---|---|---|---|---|",
    ]
    for topology in TOPOLOGIES:
        for ring in RINGS:
            cells = [values.get(f"{topology} {ring} {b}") for b in BACKENDS]
            for name, unit in MEASURES.items():
                if not all(cell and name in cell for cell in cells):
                    continue
                rows = [cell[name] for cell in cells if cell]
                middle = [statistics.median(row) for row in rows]
                text = [
                    f"{m:.2f} ({min(row):.2f}..{max(row):.2f})"
                    for m, row in zip(middle, rows, strict=True)
                ]
                lines.append(
                    f"| {topology}, {ring}, {unit} | {text[0]} | {text[1]} "
                    f"| {middle[1] / middle[0]:.2f} | {text[2]} | {middle[2] / middle[0]:.2f} |"
                )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (3)")
    parser.add_argument("--json", metavar="FILE", help="write all values to a file, too")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help='such as "loop", "tap split" or "ways"'
    )
    parser.add_argument("--table", metavar="FILE", help="print the table of such a file, and end")
    args = parser.parse_args()
    if args.table:
        tell(json.loads(Path(args.table).read_text()))
        return
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("bench-native: front-end and back-end need one CPU each, but there is one")
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        print("bench-native: no real-time priority; keep the machine quiet", file=sys.stderr)
    result = measure(args.rounds, args.seconds, args.only)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    tell(result)


def tell(result: dict[str, Any]) -> None:
    """Print the tables of what was measured."""
    if result["values"]:
        print("\n".join(table(result)))
    if result.get("ways"):
        print("\n".join(ways_table(result["ways"])))


if __name__ == "__main__":
    main()
