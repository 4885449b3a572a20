"""What `--trace` costs: an exit with and without, in turn.

    python tests/perf/trace_cost.py [--exits N] [--repeat N]

First the VMM's own share, without KVM: CPU time of counting an exit and answering it in C, called
from Python, whose share is the same in both; look at the lowest, since whatever disturbs only adds.
Then whole exits, guest and all: the kicks of guest/kicks.c with notify=exit on this machine's
/dev/kvm. Medians with the lowest and the highest. Compare, do not gate. For the worker:
ring_bench.py with and without --trace.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pyvmm import Machine, Net
from pyvmm._ext import ffi, lib
from pyvmm.bus import PIO
from pyvmm.kvm.recorder import Recorder
from tests.pci_guest import Board

ROOT = Path(__file__).resolve().parents[2]


def share(count: int, trace: int) -> float:
    """Nanoseconds of CPU an exit, Python's call included."""
    recorder = Recorder(trace) if trace else None
    with Board() as board:
        c = board.vcpu
        board.bus.add(PIO, 0x80, 1, "post", kind=lib.PV_REGION_IGNORE)
        c.addr, c.size, c.count, c.write, c.data = 0x80, 1, 1, True, ffi.new("uint8_t[]", 1)
        if recorder:
            c.trace = recorder.ring("vcpus", "vcpu0")
        access, settle = lib.pv_vcpu_access, lib.pv_vcpu_settle
        begin = time.thread_time_ns()
        for _ in range(count):
            access(c, PIO)
            settle(c)
        took = time.thread_time_ns() - begin
    if recorder:
        assert recorder.ring("vcpus", "vcpu0").next == count
        recorder.close()
    return took / count


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
    parser.add_argument("--exits", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest")], check=True)
    for name, measure, repeat in (
        ("own share", share, 10 * args.repeat),
        ("whole exit", exits, args.repeat),
    ):
        times: dict[int, list[float]] = {0: [], 1 << 15: []}
        for _ in range(repeat):
            for trace, into in times.items():
                into.append(measure(args.exits, trace))
        for trace, got in times.items():
            way = "with a trace" if trace else "without"
            text = f"{statistics.median(got):6.0f} ns ({min(got):.0f}..{max(got):.0f})"
            print(f"{name}, {way:13} {text}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
