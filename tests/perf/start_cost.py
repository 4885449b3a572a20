"""What the whole of `pyvmm run` costs with a bare guest that prints two lines, from exec to exit:
time of day, and CPU time of all its processes. Trees of pyvmm take turns, this one and others.

    python tests/perf/start_cost.py [--rounds N] [--seconds S] [DIR...]

Each DIR is another tree with its C extension built; `python -c pass` takes part, too. Medians with
the lowest and the highest, and how many runs took 10 ms longer than the tree's lowest, as they do
if KVM waits for a grace period, or the machine is busy. Each run waits for a moment in which nobody
else has the processors, as long as there is one within the first S seconds in all (60).
"""

from __future__ import annotations

import argparse
import os
import py_compile
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUEST = ROOT / "guest" / "build" / "hello.elf"
OPTIONS = ["--host", "local", "--net", "none", "--memory", "64M", "--kernel", str(GUEST)]
#: As the script `pyvmm` of an installation does.
CODE = "import sys; sys.path.insert(0, {!r}); from pyvmm.cli import main; sys.exit(main())"
LOOK_S, IDLE, LONGER_MS = 0.05, 0.9, 10


def processors() -> tuple[int, int]:
    """How long the processors have been idle, and in all, in ticks."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def await_quiet(until: float) -> None:
    """Wait until nobody else has the processors, at most until this time."""
    while time.monotonic() < until:
        idle, whole = processors()
        time.sleep(LOOK_S)
        more_idle, more = processors()
        if more_idle - idle >= IDLE * (more - whole) > 0:
            return


def run(argv: list[str]) -> tuple[float, float]:
    """Run a command; milliseconds from exec to exit, and of CPU time."""
    null = os.open(os.devnull, os.O_RDWR)
    began = time.monotonic_ns()
    pid = os.posix_spawn(
        argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, n) for n in range(3)]
    )
    _, status, used = os.wait4(pid, 0)
    wall = (time.monotonic_ns() - began) / 1e6
    os.close(null)
    if status:
        sys.exit(f"{argv} ended with status {os.waitstatus_to_exitcode(status)}")
    return wall, (used.ru_utime + used.ru_stime) * 1e3


def told(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}..{max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("trees", nargs="*", metavar="DIR")
    args = parser.parse_args()
    ways = {"python -c pass": [sys.executable, "-c", "pass"]}
    for tree in [str(ROOT), *map(os.path.realpath, args.trees)]:
        for file in Path(tree, "pyvmm").rglob("*.py"):
            py_compile.compile(str(file), doraise=True)
        ways[tree] = [sys.executable, "-c", CODE.format(tree), "run", *OPTIONS]
    for argv in ways.values():
        run(argv)  # reads files from disk
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    until = time.monotonic() + args.seconds
    for number in range(args.rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            await_quiet(until)
            times[name].append(run(ways[name]))
    for name, pairs in times.items():
        wall, cpu = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        long = sum(value > min(wall) + LONGER_MS for value in wall)
        print(f"{name}: ms {told(wall)}, CPU {told(cpu)}; {long} of {len(wall)} took longer")


if __name__ == "__main__":
    main()
