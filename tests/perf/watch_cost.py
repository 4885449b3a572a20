"""What `pyvmm watch` costs: CPU time of the machine's process and of the watching one, in turn
without a watch, with one at which nobody looks, with one looker and with three.

    python tests/perf/watch_cost.py [--seconds S] [--repeat N] [--interval S]

The guest is guest/pcinet.c on this machine's /dev/kvm: its driver has set the card up, asks for an
address that nobody has, and waits in a halt. So the machine's process has nothing else to do.
Medians with the lowest and the highest. Compare, do not gate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyvmm.control.client import connect
from tests.driver import wait_for
from tests.host.names import reachable

ROOT = Path(__file__).resolve().parents[2]
PYVMM = [sys.executable, "-m", "pyvmm"]
LOCAL = ["--host", "local"]
GUEST = ROOT / "guest" / "build" / "pcinet.elf"
WAYS = {"no watch": -1, "nobody looks": 0, "one looks": 1, "three look": 3}


def cpu_ns(pid: int) -> int:
    """CPU time of a process, threads that have ended included (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns(~pid << 3 | 2) if pid else 0


def has_asked(name: str) -> bool:
    """Whether the machine's guest has sent its question, which comes after all else."""
    if not reachable(name):
        return False
    with connect(name) as client:
        return bool(client.command("x-pyvmm-ledger")["nets"][0]["counters"].get("tx_packets"))


@contextmanager
def machine(name: str) -> Iterator[int]:
    """A machine whose guest waits; its process."""
    argv = [*PYVMM, "run", *LOCAL, "--kernel", str(GUEST), "--memory", "4M", "--name", name]
    argv += ["--net", "emulated", "--append", "target=192.168.100.77"]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as child:
        try:
            assert wait_for(lambda: has_asked(name)), "the guest has not asked"
            yield child.pid
        finally:
            child.terminate()


@contextmanager
def watch(name: str, interval: float) -> Iterator[tuple[int, str]]:
    """`pyvmm watch`: its process, and the page's address."""
    argv = [*PYVMM, "watch", *LOCAL, "--interval", str(interval), name]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout
            yield child.pid, child.stdout.readline().strip()
        finally:
            child.terminate()


def look(url: str, over: threading.Event, numbers: list[int]) -> None:
    """Look as the page does, and note the number of each look."""
    number = 0
    while not over.is_set():
        with urllib.request.urlopen(f"{url}look?after={number}", timeout=60) as answer:
            number = json.load(answer)["number"]
        numbers.append(number)


def measure(name: str, pid: int, way: str, args: argparse.Namespace) -> tuple[float, float, int]:
    """CPU time, in ns, of the machine's process and of the watching one; and the looks."""
    if WAYS[way] < 0:
        return *timed(pid, 0, args.seconds), 0
    with watch(name, args.interval) as (watcher, url):
        over, numbers = threading.Event(), [[0] for _ in range(WAYS[way])]
        lookers = [threading.Thread(target=look, args=(url, over, mine)) for mine in numbers]
        for thread in lookers:
            thread.start()
        assert wait_for(lambda: all(len(mine) > 3 for mine in numbers))
        first = max((mine[-1] for mine in numbers), default=0)
        machine_ns, watcher_ns = timed(pid, watcher, args.seconds)
        last = max((mine[-1] for mine in numbers), default=0)
        over.set()
        for thread in lookers:
            thread.join()
    return machine_ns, watcher_ns, last - first


def timed(pid: int, watcher: int, seconds: float) -> tuple[float, float]:
    """CPU time of both within so many seconds, in ns per second."""
    begin, before = time.monotonic(), (cpu_ns(pid), cpu_ns(watcher))
    time.sleep(seconds)
    took = time.monotonic() - begin
    return (cpu_ns(pid) - before[0]) / took, (cpu_ns(watcher) - before[1]) / took


def shown(numbers: list[float]) -> str:
    return f"{statistics.median(numbers):8.2f} ({min(numbers):.2f}..{max(numbers):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--interval", type=float, default=0.1)
    args = parser.parse_args()
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest")], check=True)
    name = f"watchcost{os.getpid()}"
    found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    with machine(name) as pid:
        for _ in range(args.repeat):
            for way, into in found.items():
                into.append(measure(name, pid, way, args))
    base = statistics.median(one[0] for one in found["no watch"])
    for way, all_ in found.items():
        ours = shown([one[0] / 1e6 for one in all_])
        theirs = shown([one[1] / 1e6 for one in all_])
        print(f"{way:13} ms of CPU per second: machine {ours}, watch {theirs}")
        looks = [one[2] / args.seconds for one in all_]
        if min(looks) > 0:
            each = [(one[0] - base) / n / 1e6 for one, n in zip(all_, looks, strict=True)]
            print(f"{'':13} looks per second: {shown(looks)}; ms per look: machine {shown(each)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
