"""Boots test kernels, several at a time, and makes a verdict of each run.

Theory of operation: each kernel has a process of its own (``apart``), which makes the machine,
confines itself (docs/sandbox.md), lets the kernel run, and sends its verdict (``answer``). The
kernel may take that process over: so it can end badly or send anything, which is a verdict, too,
and changes nothing for the other kernels. The time-out of a case bounds its run; if the process has
not ended some time after it, it is killed. ``stop`` ends the present runs and starts no more.
"""

from __future__ import annotations

import threading
from collections import deque

from pyvmm import helper
from pyvmm.apart import Apart, Ended
from pyvmm.errors import ImageError, UsageError
from pyvmm.fd import Closing
from pyvmm.machine import Machine
from pyvmm.sandbox import longest, outlook
from pyvmm.testing import answer, job, points
from pyvmm.testing.answer import Answer
from pyvmm.testing.judge import entry_lines, state_lines
from pyvmm.testing.verdict import Verdict, judge_test

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pyvmm.apart import Send

TIMEOUT = 90.0  # seconds, as in kvm-unit-tests
MEMORY = "128M"
#: What the machine of most test kernels needs, besides what is imported at the top: imported once,
#: instead of by each process.
MODULES = (
    "fcntl",
    *(f"pyvmm.boot.{name}" for name in ("elf", "multiboot")),
    *(f"pyvmm.devices.{name}" for name in ("fw_cfg", "testdev")),
    *(f"pyvmm.exits.{name}" for name in ("ledger", "phases", "report")),
    "pyvmm.spec.fw_cfg",
)


class Case:
    """A kernel to boot.

    :param timeout: in seconds.
    :param skip: why the kernel is not booted; empty if it is booted.
    :param notes: lines for the report. The other parameters are those of ``Machine``.
    """

    def __init__(
        self,
        name: str,
        kernel: str,
        *,
        append: str = "",
        initrd: Sequence[str] | None = None,
        cpus: int = 1,
        memory: str = MEMORY,
        timeout: float = TIMEOUT,
        load_address: int | None = None,
        load_mode: str = "protected32",
        skip: str = "",
        notes: Sequence[str] = (),
        hang_timeout: float | None = None,
        cpu: str | None = None,
    ) -> None:
        self.name, self.kernel, self.append, self.initrd = name, kernel, append, initrd
        self.cpus, self.memory, self.timeout = cpus, memory, timeout
        self.load_address, self.load_mode = load_address, load_mode
        self.skip, self.notes = skip, list(notes)
        self.hang_timeout, self.cpu = hang_timeout, cpu


class Result:
    """The result of a case.

    :ivar seconds: from the start of the kernel's process to its end.
    :ivar console: the end of the kernel's output, all streams.
    :ivar report: ``Machine.report()``; None if no machine was made.
    :ivar points: the single results in the console.
    """

    def __init__(self, case: Case, verdict: Verdict) -> None:
        self.case, self.verdict = case, verdict
        self.seconds = 0.0
        self.console = b""
        self.report: dict[str, object] | None = None
        self.points: list[points.Point] = []

    def as_dict(self) -> dict[str, object]:
        """The result for JSON (docs/test-kernels.md)."""
        case, verdict = self.case, self.verdict
        return {
            "name": case.name,
            "kernel": case.kernel,
            "append": case.append,
            "cpus": case.cpus,
            "memory": case.memory,
            "cpu": case.cpu,
            "verdict": verdict.kind,
            "status": verdict.status,
            "message": verdict.message,
            "details": verdict.details,
            "seconds": round(self.seconds, 3),
            "notes": case.notes,
            "points": [
                {"name": p.name, "result": p.result, "message": p.message} for p in self.points
            ],
            "report": self.report,
        }


class Suite(Closing):
    """Runs cases once, and ends them. A context manager: it has a process from the beginning,
    which ``close`` ends, and so does ``run`` at its end.

    Make it before this process has threads, because it forks a process that needs none of them.

    :param jobs: machines at a time, 1 or more.
    :param sandbox: ``auto``, ``on`` or ``off``: whether the process of each kernel is confined
        (docs/sandbox.md). This process never is.
    :ivar sandbox: ``on`` or ``off``, and the reason if ``auto`` cannot make it whole.
    :raises UsageError: no machine at a time.
    :raises SandboxError: ``on``, and this host cannot confine a process.
    :raises HostError: there can be no process.
    """

    def __init__(self, cases: Sequence[Case], jobs: int = 1, *, sandbox: str = "auto") -> None:
        if jobs < 1:
            raise UsageError(f"{jobs} machines at a time", "use jobs=1 or more")
        self._cases, self._jobs, self._want = list(cases), jobs, sandbox
        self._used = False
        self.sandbox = outlook(sandbox)
        for name in MODULES:
            __import__(name)
        self._apart = Apart(self._boot, most=answer.ANSWER_MAX, name=b"pyvmm-kernel")

    def run(self) -> Iterator[Result]:
        """Run the cases; yields each result as soon as it exists, in the order of the ends. Once.

        If the host has no room for one more process and its threads, the case waits until another
        process has ended. A process that says so without need only delays its own verdict.

        :raises UsageError: the suite was run before, or closed.
        :raises PyvmmError: this host cannot make any machine; all machines have been stopped.
        """
        if self._used:
            raise UsageError("this suite was run before, or closed", "make another one")
        self._used = True
        return self._results()

    def _results(self) -> Iterator[Result]:
        todo = deque(enumerate(self._cases))
        full = False  # the host has no room for one more process than there are
        try:
            while (todo or self._apart.running) and not self._apart.stopped:
                while todo and self._apart.running < self._jobs and not full:
                    number, case = todo.popleft()
                    if case.skip:
                        yield Result(case, Verdict("skipped", case.skip))
                    else:
                        self._apart.start(number, longest(case.timeout))
                if not self._apart.running or (ended := self._apart.wait()) is None:
                    continue
                full = ended.scarce and self._apart.running > 0
                if full:
                    todo.appendleft((ended.job, self._cases[ended.job]))
                else:
                    yield self._result(ended)
        finally:
            self.close()

    def stop(self) -> None:
        """End the running machines soon, and start no more: their cases have no result, and ``run``
        yields no more. Any thread; does not wait.
        """
        self._apart.stop()

    def close(self) -> None:
        """End the running machines; returns when none is left. A second call does nothing."""
        self._used = True
        self._apart.close()

    def _result(self, ended: Ended) -> Result:
        """The result of a process that has ended. Nothing that it has sent is to be trusted."""
        case = self._cases[ended.job]
        found = job.read(ended, case.timeout)
        result = Result(case, found.verdict)
        result.seconds = ended.seconds
        result.console, result.points, result.report = found.console, found.points, found.report
        return result

    # --- in the process of a kernel ---------------------------------------------------------------

    def _boot(self, number: int, send: Send) -> None:
        """Run a case, and send the answer."""
        case = self._cases[number]
        helper.do_without()

        def body(made: Callable[[], None]) -> Answer:
            try:
                with Machine(
                    case.kernel,
                    initrd=case.initrd,
                    append=case.append,
                    cpus=case.cpus,
                    memory=case.memory,
                    load_address=case.load_address,
                    load_mode=case.load_mode,
                    test_devices=True,
                    hang_timeout=case.hang_timeout,
                    cpu=case.cpu,
                    sandbox=self._want,
                ) as machine:
                    machine.confine()
                    made()
                    return _attend(case, machine)
            except (ImageError, UsageError) as e:  # the fault is in this kernel, not in the host
                return Answer(Verdict("error", str(e)))

        job.work(send, body)


def _attend(case: Case, machine: Machine) -> Answer:
    said = bytearray()
    lock = threading.Lock()

    def sink(data: bytes) -> None:
        with lock:
            said.extend(data)
            del said[: max(len(said) - answer.CONSOLE_MAX, 0)]

    for stream in (machine.console, machine.stdout, machine.stderr):
        stream.add_sink(sink)
    machine.start()
    outcome = machine.wait(case.timeout)
    verdict = judge_test(outcome)
    if verdict.kind == "timeout":
        silent = "" if said else ", without a word"
        verdict.message = f"the kernel did not end in {case.timeout:g} s{silent}"
    if not verdict.good:
        verdict.details += entry_lines(outcome, machine.boot, bool(said))
        verdict.details += state_lines(outcome, case.kernel)
    with lock:
        console = bytes(said)
    return Answer(verdict, console=console, points=points.parse(console), report=machine.report())
