"""What `--trace` costs: the time of an exit with and without, in turn.

    python tests/perf/trace_cost.py [--exits N] [--repeat N]

Exits are the kicks of guest/kicks.c with notify=exit, on this machine's /dev/kvm: from the first to the last, guest and all. Medians
with the lowest and the highest. Compare, do not gate. For the worker: ring_bench.py with and without --trace.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyvmm import Machine, Net

ROOT = Path(__file__).resolve().parents[2]


def exits(count: int, trace: int) -> float:
    """Nanoseconds an exit."""
    append = f"count={count} control=0 halts=0"
    kernel = str(ROOT / "guest" / "build" / "kicks.elf")
    with Machine(kernel, memory="4M", append=append, nets=[Net(notify="exit")], trace=trace) as vm:
        vm.start()
        outcome = vm.wait(600)
        assert outcome.status == 0, outcome
        return (vm.phases["command_end"] - vm.phases["command"]) / count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exits", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest")], check=True)
    times: dict[int, list[float]] = {0: [], 1 << 15: []}
    for _ in range(args.repeat):
        for trace, into in times.items():
            into.append(exits(args.exits, trace))
    for trace, got in times.items():
        way = "with a trace" if trace else "without"
        print(f"an exit {way:13} {statistics.median(got):6.0f} ns ({min(got):.0f}..{max(got):.0f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
