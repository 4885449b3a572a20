"""The cells of a matrix, and the run of one cell: a boot, ping, TCP both ways, a command, and the
verdict.

Theory of operation: each cell has a process of its own (``apart``), which makes the machine,
confines itself (docs/sandbox.md), lets the guest run, and sends verdict and figures. The guest may
take that process over: so what comes is checked (``matrix.facts``), and only this cell's.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from pyvmm.apart import Apart
from pyvmm.errors import CommandFailed, ImageError, PyvmmError, UsageError
from pyvmm.fd import Closing
from pyvmm.hostnet import tools
from pyvmm.images import NAMES, find, is_name
from pyvmm.images.additions import Additions
from pyvmm.matrix import facts
from pyvmm.matrix.facts import CONSOLE_LINES, COUNTED, OUTPUT_MAX
from pyvmm.netopt import GROUPS, HONOURED, ON_REQUEST, Net
from pyvmm.outcome import Outcome
from pyvmm.sandbox import longest, outlook
from pyvmm.spec.platform import MAX_CPUS
from pyvmm.testing import answer, job
from pyvmm.testing.answer import Answer, BadAnswer
from pyvmm.testing.console import Watch
from pyvmm.testing.judge import judge
from pyvmm.testing.verdict import Verdict, last_lines, of_error
from pyvmm.testing.vm import TestMachine
from pyvmm.virtio.features import names
from pyvmm.workloads import ToolFailed, check_echo, tcp_mbit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.apart import Send

POWER_OFF_S = 20.0  # seconds for the guest's init to end the machine
ATTEMPTS = 20  # attempts to reach the guest's iperf3 server, which needs a moment until it listens
#: In ``--features pairs``, each of these with each of those.
RINGS = ("packed", "in-order", "no-indirect", "no-event-idx", "no-mrg-rxbuf")
OFFLOADS = ("no-offloads", "no-tso", "no-uso")
ECHO_PORT = 7001
ECHO_BYTES = 1 << 20
TOOL_S = 30.0  # seconds for a tool beyond the time that it is told to run


class Settings:
    """The settings of all cells of a sweep.

    :param seconds: of TCP each way, 0 for no TCP.
    :param cpu: how the CPU differs from the host's, as ``Machine`` takes it.
    :param timeout, hang_timeout: seconds for one cell, and seconds without progress that end it.
    :param fail_on: reports of the kernel that fail a cell: kinds of ``testing.phrases.KINDS``.
    :param command: what each guest runs at the end; empty for nothing.
    :param add, modules: what each guest gets besides, as ``Machine`` takes it.
    """

    def __init__(
        self,
        *,
        seconds: int = 2,
        cpu: str | None = None,
        memory: str = "256M",
        append: str = "",
        timeout: float = 180.0,
        hang_timeout: float = 30.0,
        fail_on: Sequence[str] = (),
        command: Sequence[str] = (),
        add: Sequence[str] = (),
        modules: str | None = None,
    ) -> None:
        self.add, self.modules, self.cpu = list(add), modules, cpu
        self.seconds, self.memory, self.append = seconds, memory, append
        self.timeout, self.hang_timeout = timeout, hang_timeout
        self.fail_on, self.command = list(fail_on), list(command)

    def key(self) -> list[object]:
        """The settings on which the result of a cell depends."""
        added = [self.add, self.modules] if self.add or self.modules else []
        model = [f"cpu {self.cpu}"] if self.cpu else []
        common = [self.seconds, self.memory, self.append, self.fail_on, self.command]
        return [*common, *added, *model]


class Cell:
    """One boot: a kernel (a file, or the name of an image), a mode with its keys joined by colons,
    a number of processors, and a set of features: ``all``, or ``no-GROUP+GROUP``: without
        the one, with the other (``netopt.ON_REQUEST``).
    """

    def __init__(self, kernel: str, mode: str, cpus: int, features: str) -> None:
        self.kernel, self.mode, self.cpus, self.features = kernel, mode, cpus, features

    @property
    def title(self) -> str:
        """The name of the kernel, for people."""
        return Path(self.kernel).name

    @property
    def name(self) -> str:
        """``KERNEL/MODE/CPUS/FEATURES``."""
        return f"{self.title}/{self.mode}/{self.cpus}/{self.features}"

    def net(self) -> str:
        """The card, as ``--net`` takes it."""
        words = self.mode.split(":")
        if self.features != "all" and self.mode != "none":
            parts = self.features.split("+")
            without = [part.removeprefix("no-") for part in parts if part.startswith("no-")]
            given = [part for part in parts if not part.startswith("no-")]
            for key, groups in (("without", without), ("with", given)):
                if groups:
                    words.append(f"{key}={'+'.join(groups)}")
        return ",".join(words)

    def as_dict(self) -> dict[str, object]:
        """The cell for JSON (docs/matrix.md)."""
        return {
            "kernel": self.kernel,
            "mode": self.mode,
            "cpus": self.cpus,
            "features": self.features,
        }


def combine(kernels: str, modes: str, cpus: str, features: str) -> list[Cell]:
    """All combinations of the values in these lists, in the order of the sweep.

    :raises UsageError: a value in a list makes no sense.
    """
    return [
        _checked(kernel, mode, count, groups)
        for kernel in _words("--kernels", kernels)
        for mode in _words("--modes", modes)
        for count in _words("--cpus", cpus)
        for groups in _feature_sets(mode.partition(":")[0], features)
    ]


def _feature_sets(mode: str, features: str) -> list[str]:
    """The sets that the words of ``--features`` mean with a mode."""
    honoured = HONOURED.get(mode, ())
    most = ["+".join(honoured)] if honoured else []
    sets = []
    for word in _words("--features", features):
        if word == "each":
            without = [f"no-{group}" for group in GROUPS if group not in ON_REQUEST]
            sets += ["all", *without, *honoured, *most]
        elif word == "most":
            sets += most or ["all"]
        elif word == "pairs":
            rings = [ring for ring in RINGS if ring.startswith("no-") or ring in honoured]
            sets += [f"{ring}+{offload}" for ring in rings for offload in OFFLOADS]
        else:
            sets.append(word)
    return list(dict.fromkeys(sets))


def _words(option: str, text: str) -> list[str]:
    out = [word.strip() for word in text.split(",") if word.strip()]
    if not out or len(set(out)) != len(out):
        raise UsageError(f"{option} {text!r}", "write a list without repetitions, by commas")
    return out


def _checked(kernel: str, mode: str, cpus: str, features: str) -> Cell:
    if not cpus.isascii() or not cpus.isdecimal() or not 1 <= int(cpus) <= MAX_CPUS:
        raise UsageError(f"--cpus {cpus}", f"use 1 to {MAX_CPUS}")
    parts = features.split("+")
    if features != "all" and not all(p.startswith("no-") or p in ON_REQUEST for p in parts):
        hint = "write all, most, each, pairs, or no-mrg-rxbuf+packed"
        raise UsageError(f"--features {features}", hint)
    cell = Cell(kernel, mode, int(cpus), features)
    net = Net.parse(cell.net())
    if not net.own_network or net.socket or net.device:
        raise UsageError(f"--modes {mode}", "each cell makes its own tap and its own back-end")
    return cell


def check_kernels(cells: Sequence[Cell]) -> None:
    """Check before the first boot that each kernel exists. The verdicts of its cells say whether a
    file is a kernel.

    :raises ImageError: an image is not built, or there is no such file.
    """
    for kernel in dict.fromkeys(cell.kernel for cell in cells):
        if is_name(kernel):
            find(kernel)
            continue
        try:
            Path(kernel).stat()
        except OSError as e:
            known = ", ".join((*NAMES, "6.12 and the like"))
            raise ImageError(
                f"kernel {kernel!r}: {e.strerror}", f"name a file, or an image: {known}"
            ) from e


def check_added(settings: Settings) -> None:
    """Check before the first boot that what each guest gets besides can be packed.

    :raises PyvmmError: something cannot be added.
    """
    if settings.add:
        Additions(settings.add, None, (), str)


# --- one cell -------------------------------------------------------------------------------------


class Sweep(Closing):
    """Runs cells, one after another, each in a process of its own. A context manager: it has a
    process from the beginning, which ``close`` ends.

    Make it before this process has threads, because it forks a process that needs none of them.

    :param sandbox: ``auto``, ``on`` or ``off``: whether the process of each cell is confined
        (docs/sandbox.md). This process never is.
    :raises SandboxError: ``on``, and this host cannot confine a process.
    :raises HostError: there can be no process.
    """

    def __init__(self, cells: Sequence[Cell], settings: Settings, *, sandbox: str = "auto") -> None:
        self._cells, self._settings, self._want = list(cells), settings, sandbox
        outlook(sandbox)
        self._apart = Apart(self._boot, most=answer.ANSWER_MAX, name=b"pyvmm-cell")

    def boot(self, cell: Cell) -> dict[str, Any] | None:
        """Run one cell; returns its result for JSON (docs/matrix.md), whatever happens in the cell;
        None after ``close``.

        :raises PyvmmError: this host cannot make any machine.
        """
        settings = self._settings
        # A tool may be at work when the time-out ends the machine.
        more = settings.seconds + TOOL_S + POWER_OFF_S
        self._apart.start(self._cells.index(cell), longest(settings.timeout + more))
        ended = self._apart.wait()
        if ended is None:
            return None
        found = job.read(ended, settings.timeout)
        result: dict[str, Any] = {**cell.as_dict(), "negotiated": []}
        try:
            result |= facts.checked(found.report or {})
        except BadAnswer as e:
            found = job.bad(e)
        verdict = found.verdict
        result |= {"verdict": verdict.kind, "message": verdict.message, "details": verdict.details}
        result["seconds"] = round(ended.seconds, 3)
        return result

    def close(self) -> None:
        """End the cell that runs; returns when nothing of it is left. A second call does
        nothing.
        """
        self._apart.close()

    def _boot(self, number: int, send: Send) -> None:
        """Run one cell, and send the answer, in the process of a cell."""
        job.work(send, lambda made: _run(self._cells[number], self._settings, self._want, made))


def _run(cell: Cell, settings: Settings, sandbox: str, made: Callable[[], None]) -> Answer:
    result: dict[str, Any] = {}
    watch = Watch(settings.fail_on) if settings.fail_on else None
    with ExitStack() as stack:
        machine = _machine(cell, settings, sandbox, stack)
        tools.permit()
        machine.confine()
        made()
        result["sandbox"] = machine.sandbox
        try:
            if watch is not None:
                machine.console.add_sink(watch)
            problem = _measure(machine, settings, result)
            outcome = machine.outcome or machine.power_off(POWER_OFF_S)
            verdict = _judge(cell, machine, outcome, watch)
            if verdict.kind == "passed" and problem:
                verdict = Verdict("failed", problem, status=1)
        except (CommandFailed, ToolFailed) as e:
            message, *details = str(e).splitlines()
            verdict = Verdict("failed", message, status=1, details=details)
        except PyvmmError as e:
            verdict = of_error(e)
            if machine.outcome is not None and machine.outcome.error():
                verdict = _judge(cell, machine, machine.outcome, watch)
        result |= _facts(machine)
        if verdict.kind != "passed":
            result["console"] = last_lines(machine.console.text, CONSOLE_LINES)
    return Answer(verdict, report=result)


def _judge(cell: Cell, machine: TestMachine, outcome: Outcome, watch: Watch | None) -> Verdict:
    return judge(
        outcome,
        console=machine.console.text,
        boot=machine.boot,
        phases=machine.phases,
        commanded=False,
        watch=watch,
        symbols=cell.kernel,
    )


def _machine(cell: Cell, settings: Settings, sandbox: str, stack: ExitStack) -> TestMachine:
    """Make the cell's machine, which its time-out bounds; ``stack`` closes it."""
    machine = stack.enter_context(
        TestMachine(
            cell.kernel,
            append=settings.append,
            watched=bool(settings.fail_on),
            cpus=cell.cpus,
            cpu=settings.cpu,
            memory=settings.memory,
            nets=[Net.parse(cell.net())],
            hang_timeout=settings.hang_timeout,
            add=settings.add,
            modules=settings.modules,
            sandbox=sandbox,
        )
    )
    over = Outcome("timeout", f"{settings.timeout:g} s are over")
    timer = threading.Timer(settings.timeout, lambda: machine.stop(over))
    timer.daemon = True
    timer.start()
    stack.callback(timer.join)
    stack.callback(timer.cancel)
    return machine


def _measure(machine: TestMachine, settings: Settings, result: dict[str, Any]) -> str:
    """Boot, ping, bytes there and back, TCP both ways, the command: the figures go to ``result``.
    Returns why the cell fails, in one line; empty if it does not fail.
    """
    machine.ready(settings.timeout + 30)  # the time-out of the cell comes first
    if not machine.waits_for_commands:  # a test kernel, or another init: its end is the only result
        machine.wait(settings.timeout)
        return ""
    for nic in machine.nets:
        assert nic.host is not None and nic.guest is not None
        host, guest = nic.host.partition("/")[0], nic.guest.partition("/")[0]
        machine.run(["ping", "-c", "3", "-i", "0.2", host], timeout=30).check()
        echo = f"nc -l -p {ECHO_PORT} -e cat </dev/null >/dev/null 2>&1 &"
        machine.run(["sh", "-c", echo]).check()
        check_echo(nic.namespace, (guest, ECHO_PORT), ECHO_BYTES, TOOL_S)
        if settings.seconds:
            machine.run(["iperf3", "-s", "-D"]).check()
            for way, reverse in (("to_guest_mbit", False), ("from_guest_mbit", True)):
                rate = tcp_mbit(
                    nic.namespace,
                    guest,
                    settings.seconds,
                    reverse=reverse,
                    attempts=ATTEMPTS,
                    timeout=settings.seconds + TOOL_S,
                )
                result[way] = round(rate, 1)
    counts = machine.exits.counts()
    result |= {name: counts[name] for name in COUNTED}
    if settings.command:
        done = machine.run(settings.command, timeout=settings.timeout)
        result["command"] = {
            "status": done.status,
            "stdout": done.out[-OUTPUT_MAX:],
            "stderr": done.err[-OUTPUT_MAX:],
        }
        if done.status:
            return f"the command's exit status is {done.status}"
    return ""


def _facts(machine: TestMachine) -> dict[str, Any]:
    """Everything that is known of a machine, however it ended."""
    start = machine.phases["vmm"]
    in_order = sorted(machine.phases.items(), key=lambda phase: phase[1])
    facts: dict[str, Any] = {
        "phases_s": {name: round((at - start) / 1e9, 3) for name, at in in_order}
    }
    if machine.notes:
        facts["notes"] = machine.notes
    if machine.nets:
        device = machine.nets[0].device
        facts |= {"negotiated": names(device.negotiated), "offered": names(device.offered())}
    return facts
