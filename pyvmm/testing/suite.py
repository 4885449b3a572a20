"""Boots test kernels, several at a time, and makes a verdict of each run.

Theory of operation: each kernel has a process of its own (``apart``), which makes the machine,
confines itself (docs/sandbox.md), lets the kernel run, and sends its verdict (``answer``). The
kernel may take that process over: so it can end badly or send anything, which is a verdict, too,
and changes nothing for the other kernels. The time-out of a case bounds its run; if the process has
not ended some time after it, it is killed. ``stop`` ends the present runs and starts no more.
"""

from __future__ import annotations

import signal
import threading
from collections import deque

from pyvmm import helper
from pyvmm.apart import Apart, Ended, Scarce
from pyvmm.errors import HostError, ImageError, PyvmmError, ThreadStopped, UsageError
from pyvmm.fd import Closing
from pyvmm.machine import Machine
from pyvmm.sandbox import longest, outlook
from pyvmm.testing import answer, points
from pyvmm.testing.answer import Answer, BadAnswer
from pyvmm.testing.judge import entry_lines, state_lines
from pyvmm.testing.verdict import Verdict, judge_test, last_lines, of_error
from pyvmm.threads import NoThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
#: In messages.
OURS = "pyvmm's process for it"
REPORT_IT = "report it: the kernel may have been in control of the process"
#: How the handler of a stopped thread begins its line (``cext/confine.c``).
OF_US, STOPPED = "pyvmm: ", "pyvmm: a thread of pyvmm's was stopped: "


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
        said = [answer.line(text) for text in last_lines(ended.said)]
        found = None
        verdict = _death(case, ended, said)
        if verdict is None:
            try:
                found = answer.decode(ended.data)
                verdict = found.verdict
            except BadAnswer as e:
                what = f"{OURS} has sent {e} in the place of a result"
                verdict = Verdict("host-problem", f"{what}; {REPORT_IT}")
        verdict.details += said
        result = Result(case, verdict)
        result.seconds = ended.seconds
        if found is not None:
            result.console, result.points, result.report = found.console, found.points, found.report
        return result

    # --- in the process of a kernel ---------------------------------------------------------------

    def _boot(self, number: int, send: Send) -> None:
        """Run a case, and send the answer."""
        case, made = self._cases[number], False
        helper.do_without()
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
                send(answer.MADE)
                made = True
                found = _attend(case, machine)
        except (ImageError, UsageError) as e:  # the fault is in this kernel, not in the host
            found = Answer(Verdict("error", str(e)))
        except PyvmmError as e:
            if type(e).__name__ in answer.FATAL and not made:
                send(answer.encode_error(e))
                return
            found = Answer(of_error(e))
        except NoThread as e:
            why = HostError("there can be no thread for this kernel", "raise the limit: ulimit -u")
            send(Answer(of_error(why)).encode())
            raise Scarce from e
        send(found.encode())


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


def _death(case: Case, ended: Ended, said: list[str]) -> Verdict | None:
    """The verdict if the process of a kernel has not ended by itself and in order; else None.

    :param said: the end of what it has written to standard error.
    """
    if ended.problem:
        return Verdict("host-problem", f"there can be no process for this kernel: {ended.problem}")
    if ended.late:
        over = f"the kernel did not end in {case.timeout:g} s"
        return Verdict("timeout", f"{over}, and {OURS} had to be killed")
    if ended.flood:
        most = answer.ANSWER_MAX >> 20
        return Verdict("host-problem", f"{OURS} has sent more than {most} MiB; {REPORT_IT}")
    if ended.status in (ThreadStopped.exit_code, -signal.SIGSYS):
        told = [text for text in said if text.startswith(STOPPED)]
        if told:
            said.remove(told[-1])
            return Verdict("thread-stopped", told[-1].removeprefix(OF_US))
        return Verdict("thread-stopped", "a thread of pyvmm's was stopped, and its process killed")
    if ended.status < 0:
        try:
            name = signal.Signals(-ended.status).name
        except ValueError:  # of real time
            name = f"signal {-ended.status}"
        hint = "; the host's memory may have run out" if name == "SIGKILL" else ""
        return Verdict("host-problem", f"{OURS} was killed ({name}){hint}")
    if ended.status and not ended.scarce:
        return Verdict("host-problem", f"{OURS} has failed, with status {ended.status}")
    return None
