"""Boots test kernels, several at a time, and makes a verdict of each run.

Theory of operation: worker threads take cases from a queue, boot each as a ``Machine`` with test
devices, and give its ``Result`` to the caller's thread, which reports it. The time-out of a case
bounds its run. ``stop`` ends the present runs and starts no more.
"""

from __future__ import annotations

import queue
import threading
import time

from pyvmm.errors import ImageError, KvmForbidden, KvmMissing, KvmUnsuitable, UsageError
from pyvmm.machine import Machine
from pyvmm.outcome import Outcome
from pyvmm.testing import points
from pyvmm.testing.judge import entry_lines, state_lines
from pyvmm.testing.verdict import Verdict, judge_test

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TIMEOUT = 90.0  # seconds, as in kvm-unit-tests
MEMORY = "128M"


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

    :ivar seconds: from the making of the machine to its end.
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


class Suite:
    """Runs cases, and ends them.

    :param jobs: machines at a time.
    """

    def __init__(self, cases: Sequence[Case], jobs: int = 1) -> None:
        self._todo: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            self._todo.put(case)
        self._count = len(cases)
        self._results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: set[Machine] = set()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"suite{i}", daemon=True)
            for i in range(min(jobs, self._count))
        ]

    def run(self) -> Iterator[Result]:
        """Run the cases; yields each result as soon as it exists, in the order of the ends.

        :raises PyvmmError: this host cannot make any machine; all machines have been stopped.
        """
        for thread in self._threads:
            thread.start()
        try:
            for _ in range(self._count):
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            self.stop()

    def stop(self) -> None:
        """End the running machines and start no more; returns when no machine is left. Any thread
        but a worker.
        """
        with self._lock:
            self._stopped = True
            live = list(self._live)
        for machine in live:
            machine.stop(Outcome("stopped"))
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        while not self._stopped:
            try:
                case = self._todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._results.put(self._boot(case))
            except BaseException as e:
                self._results.put(e)
                return

    def _boot(self, case: Case) -> Result:
        if case.skip:
            return Result(case, Verdict("skipped", case.skip))
        begin = time.monotonic()
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
            ) as machine:
                result = self._attend(case, machine)
        except (KvmMissing, KvmForbidden, KvmUnsuitable):
            raise
        except (ImageError, UsageError) as e:  # the fault is in this kernel, not in the host
            result = Result(case, Verdict("error", str(e)))
        result.seconds = time.monotonic() - begin
        return result

    def _attend(self, case: Case, machine: Machine) -> Result:
        said = bytearray()
        lock = threading.Lock()

        def sink(data: bytes) -> None:
            with lock:
                said.extend(data)
                del said[: max(len(said) - (1 << 20), 0)]

        for stream in (machine.console, machine.stdout, machine.stderr):
            stream.add_sink(sink)
        with self._lock:
            if self._stopped:
                return Result(case, Verdict("interrupted", "stopped before it began"))
            self._live.add(machine)
        try:
            machine.start()
            outcome = machine.wait(case.timeout)
        finally:
            with self._lock:
                self._live.discard(machine)
        verdict = judge_test(outcome)
        if verdict.kind == "timeout":
            silent = "" if said else ", without a word"
            verdict.message = f"the kernel did not end in {case.timeout:g} s{silent}"
        if not verdict.good:
            verdict.details += entry_lines(outcome, machine.boot, bool(said))
            verdict.details += state_lines(outcome, case.kernel)
        result = Result(case, verdict)
        with lock:
            result.console = bytes(said)
        result.points = points.parse(result.console)
        result.report = machine.report()
        return result
