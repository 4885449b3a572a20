#!/usr/bin/env python3
"""Where the time goes between exec and the guest's init, or its end.

    tools/boot_trace.py [--repeat N] [--markdown] [--json FILE] [-- OPTION... [-- COMMAND...]]

The options are those of `pyvmm run`; it needs `--host local`, and gets it if no host is named.
Where KVM runs no Linux, run it in the testbed: `pyvmm testbed -- python tools/boot_trace.py`.
Without options a Linux guest boots, whose init tells the time by the kernel's clock. The first boot
does not count: it compiles modules of Python, and reads files from disk.

Each stage has its time of day and the CPU time that the process took in it, both in milliseconds:
the median and, in parentheses, the lowest of all boots. A stage's time is its own: a module that is
loaded while KVM is set up counts as a module. The hooks cost about 2 % of the whole.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

BEGAN, CPU = time.monotonic_ns(), time.process_time_ns()  # before anything of ours is loaded

MODULES, REST = "modules of Python", "command line, devices and the rest"
MEMORY, KVM, LOAD = "guest memory", "KVM: VM and vCPUs", "kernel, initrd and tables"
SANDBOX, THREADS = "sandbox and its helper", "threads, until KVM_RUN"
EARLY, KERNEL = "guest, until the kernel's clock", "kernel, until init"
GUEST, END = "guest, until its first output", "guest, the rest, and the end"
EXEC = "exec, and Python's own start"
STAGES = (EXEC, MODULES, REST, SANDBOX, MEMORY, KVM, LOAD, THREADS)
#: Module -> what belongs to a stage there: the class, or nothing; the function; the stage.
HOOKS = {
    "pyvmm.cli.run": [("", "_start_helper", SANDBOX)],
    "pyvmm.machine": [("Machine", "confine", SANDBOX), ("Machine", "start", THREADS)],
    "pyvmm.memory": [("GuestMemory", "__init__", MEMORY)],
    "pyvmm.kvm": [("Kvm", "__init__", KVM)],
    "pyvmm.kvm.vm": [("Vm", "__init__", KVM)],
    "pyvmm.kvm.vcpu": [("Vcpu", "__init__", KVM), ("Vcpu", "set_boot_state", KVM)],
    "pyvmm.assembly": [("Parts", "_load", LOAD)],
}


class Clock:
    """Adds up the time of each stage of the main thread, until a vCPU enters the guest.

    :ivar wall: nanoseconds of each stage. :ivar cpu: likewise, of the whole process's CPU time.
    """

    def __init__(self, began: int) -> None:
        import threading

        self.wall, self.cpu = {EXEC: BEGAN - began}, {EXEC: CPU}
        self._thread, self._stack = threading.get_ident(), [REST]
        self._ident = threading.get_ident
        self._at, self._cpu_at = BEGAN, CPU
        self._lock = threading.Lock()
        self.entered = 0

    def _note(self, *, last: bool = False) -> None:
        """The time until now was the present stage's. A vCPU's thread notes the last one."""
        with self._lock:
            if self.entered:
                return
            now, cpu = time.monotonic_ns(), time.process_time_ns()
            stage = self._stack[-1]
            self.wall[stage] = self.wall.get(stage, 0) + now - self._at
            self.cpu[stage] = self.cpu.get(stage, 0) + cpu - self._cpu_at
            self._at, self._cpu_at = now, cpu
            if last:
                self.entered = now

    def within(
        self, stage: str, function: Callable[..., Any], then: Callable[[object], None] | None = None
    ) -> Callable[..., Any]:
        """The function, whose time counts for a stage. ``then`` is called with its result."""

        def timed(*args: Any, **named: Any) -> Any:
            if self.entered or self._ident() != self._thread:
                return function(*args, **named)
            self._note()
            self._stack.append(stage)
            try:
                result = function(*args, **named)
                if then is not None:
                    then(result)
                return result
            finally:
                self._note()
                self._stack.pop()

        return timed

    def enter(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``Vcpu.run``: the first call ends what is counted."""

        def entering(*args: Any, **named: Any) -> Any:
            self._note(last=True)
            return run(*args, **named)

        return entering


def child(began: int, report: int, argv: list[str]) -> None:
    """Be `pyvmm` with these arguments, and write to a descriptor what was counted."""
    clock = Clock(began)
    import os
    from importlib import _bootstrap as bootstrap

    loader: Any = bootstrap
    hooked = set()

    def hook(_module: object) -> None:
        for name in [name for name in HOOKS if name in sys.modules and name not in hooked]:
            module = sys.modules[name]
            if getattr(module.__spec__, "_initializing", False):
                continue
            hooked.add(name)
            for owner, function, stage in HOOKS[name]:
                at = getattr(module, owner) if owner else module
                setattr(at, function, clock.within(stage, getattr(at, function)))
            if name == "pyvmm.kvm.vcpu":
                module.Vcpu.run = clock.enter(module.Vcpu.run)

    loader._find_and_load = clock.within(MODULES, loader._find_and_load, hook)
    sys.argv = ["pyvmm", *argv]
    leave, own = os._exit, os.getpid()

    def last(status: int) -> NoReturn:
        lines = [f"{s}\t{clock.wall[s]}\t{clock.cpu[s]}\n" for s in clock.wall]
        lines.append(f"entered\t{clock.entered}\t{time.process_time_ns()}\n")
        if os.getpid() == own:  # and not the sandbox's helper
            os.write(report, "".join(lines).encode())
        leave(status)

    os._exit = last
    from pyvmm.cli import main

    main()


def boot(argv: list[str], linux: bool) -> dict[str, tuple[float, float]]:
    """Boot once; the wall-clock and CPU milliseconds of each stage."""
    import os
    import re
    import subprocess

    started = re.compile(rb"pyvmm-init: start at ([\d.]+) s")
    read, write = os.pipe()
    began = time.monotonic_ns()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", str(began), str(write), *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[write],
    )
    os.close(write)
    assert process.stdout
    text, first, init = b"", 0, 0
    while piece := os.read(process.stdout.fileno(), 65536):
        first = first or time.monotonic_ns()
        text += piece
        if not init and started.search(text):
            init = time.monotonic_ns()
    process.wait()
    ended = time.monotonic_ns()
    with os.fdopen(read) as file:
        rows = [line.split("\t") for line in file.read().splitlines()]
    if process.returncode or not rows:
        said = text.decode(errors="replace")[-400:]
        raise SystemExit(f"boot_trace: pyvmm ended with {process.returncode}: {said}")
    counted = {name: (int(wall), int(cpu)) for name, wall, cpu in rows}
    entered, all_cpu = counted.pop("entered")
    out = {s: (counted[s][0] / 1e6, counted[s][1] / 1e6) for s in STAGES if s in counted}
    clock = started.search(text)
    if linux and not clock:
        raise SystemExit("boot_trace: the guest's init did not tell when it started")
    if clock:
        kernel = float(clock[1]) * 1e3
        out[EARLY] = (init - entered) / 1e6 - kernel, 0.0
        out[KERNEL] = kernel, 0.0
        first = init
    else:
        out[GUEST] = (first - entered) / 1e6, 0.0
    before = sum(cpu for _, cpu in counted.values())
    out[END] = (ended - first) / 1e6, (all_cpu - before) / 1e6
    out["all"] = (ended - began) / 1e6, all_cpu / 1e6
    return out


def main() -> None:
    """Boot several times, and print the table."""
    import argparse
    import json
    import statistics
    from pathlib import Path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="boots (5)")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    parser.add_argument("--json", metavar="FILE", help="write all values to a file, too")
    parser.add_argument("run", nargs="*", metavar="OPTION", help="of pyvmm run")
    args = parser.parse_args()
    linux = "--kernel" not in args.run
    argv = ["run", *([] if "--host" in args.run else ["--host", "local"])]
    if linux:
        argv += ["-v", "--append", "pyvmm.verbose", *(args.run or ["--net", "none", "--", "true"])]
    else:
        argv += args.run
    boot(argv, linux)
    boots = [boot(argv, linux) for _ in range(args.repeat)]
    if args.json:
        Path(args.json).write_text(json.dumps({"argv": argv, "boots": boots}, indent=1) + "\n")
    rows = [("ms, median (lowest)", "time of day", "CPU time of the process")]
    for stage in boots[0]:
        both = [[b[stage][i] for b in boots if stage in b] for i in (0, 1)]
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f})" if any(v) else "-" for v in both]
        rows.append((stage, cells[0], cells[1]))
    if args.markdown:
        rows.insert(1, ("---", "---", "---"))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        for stage, wall, cpu in rows:
            print(f"{stage:40}{wall:>22}{cpu:>26}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()
