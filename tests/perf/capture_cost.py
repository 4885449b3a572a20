"""What `pyvmm capture` of a card on vhost-net costs, where a packet socket hears the tap: TCP's
throughput with a capture to /dev/null and without, in turn in one run, both ways.

    pyvmm testbed -- .venv/bin/python tests/perf/capture_cost.py [--seconds S] [--repeat N]
        [--snaplen BYTES]

Runs where KVM runs Linux. Medians with the lowest and the highest, and what the captures have lost.
Compare, do not gate. For captures at the ring: ring_bench.py with and without --capture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.driver import wait_for
from tests.host.names import reachable

PYVMM = [sys.executable, "-m", "pyvmm"]
LOCAL = ["--host", "local"]
GUEST = "192.168.100.2"
BOOT_S = 300
WAYS = {"to the guest": [], "from the guest": ["-R"]}


@contextmanager
def machine(name: str) -> Iterator[None]:
    """A machine that serves iperf3."""
    with tempfile.TemporaryDirectory() as where:
        log = Path(where, "log")
        argv = [*PYVMM, "run", *LOCAL, "--name", name, "--net", "vhost-net", "--"]
        argv += ["iperf3", "-s", "--forceflush"]
        with log.open("wb") as f, subprocess.Popen(argv, stdout=f, stderr=f) as child:
            try:
                up = "Server listening"
                good = wait_for(lambda: reachable(name) and up in log.read_text(), BOOT_S)
                assert good, log.read_text()
                yield
            finally:
                child.terminate()


@contextmanager
def capture(name: str, snaplen: int) -> Iterator[list[int]]:
    """A capture; in the end, how many packets it has, and how many it has lost."""
    words = ["--snaplen", str(snaplen)] if snaplen else []
    argv = [*PYVMM, "capture", *LOCAL, name, "-", *words]
    counted: list[int] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout and child.stderr
        assert os.read(child.stdout.fileno(), 1), "it has begun"
        drain = subprocess.Popen(["cat"], stdin=child.stdout, stdout=subprocess.DEVNULL)
        try:
            yield counted
        finally:
            child.send_signal(signal.SIGINT)
            said = child.stderr.read().decode()
            drain.wait()
    match = re.search(r"(\d+) packets captured(?:, and (\d+) lost)?", said)
    assert match, said
    counted += [int(match[1]), int(match[2] or 0)]


def iperf(name: str, seconds: float, *words: str) -> float:
    """Mbit/s that are received."""
    argv = [*PYVMM, "exec", *LOCAL, "--net", name, "--", "iperf3", "-c", GUEST, "-J", *words]
    done = subprocess.run([*argv, "-t", str(seconds)], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def shown(numbers: list[float]) -> str:
    """The median, the lowest and the highest."""
    return f"{statistics.median(numbers):6.0f} ({min(numbers):.0f}..{max(numbers):.0f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--snaplen", type=int, default=0)
    args = parser.parse_args()
    name = f"capturecost{os.getpid()}"
    found: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    packets = lost = 0
    with machine(name):
        for _ in range(args.repeat):
            for way, words in WAYS.items():
                found[way][0].append(iperf(name, args.seconds, *words))
                with capture(name, args.snaplen) as counted:
                    found[way][1].append(iperf(name, args.seconds, *words))
                packets, lost = packets + counted[0], lost + counted[1]
    for way, (plain, heard) in found.items():
        for what, all_ in (("without", plain), ("with a capture", heard)):
            print(f"{way:15} {what:15} {shown(all_)} Mbit/s")
        shares = [100 * b / a for a, b in zip(plain, heard, strict=True)]
        print(f"{way:15} {'of its neighbour':15} {shown(shares)} %")
    print(f"{packets} packets captured, {lost} lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
