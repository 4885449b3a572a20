"""``pyvmm test``: the process of each kernel, what it may do, and what becomes of the others if it
is not ours any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.testing.suite import Case, Suite
from tests.driver import wait_for
from tests.host.test_confined import status_of, threads
from tests.host.test_sandbox import filters
from tests.inject import EXECVE, inject

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 120.0
PYVMM = "import sys; from pyvmm import cli; {} sys.exit(cli.main())"
#: Kernels that end, before and after one that does not, of those that know how=hang.
HANG = ("--timeout", "600", "--append", "how=hang")
visible = pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at these processes")


def kernels(guest: Guest) -> list[str]:
    return [guest(name) for name in ("hello", "reset", "smp")]


@contextlib.contextmanager
def started(*args: str, code: str = "", session: bool = False) -> Iterator[subprocess.Popen[str]]:
    """:param code: statements that change pyvmm before."""
    with subprocess.Popen(
        [sys.executable, "-c", PYVMM.format(code), "test", "--host", "local", *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_COLOR": "1"},
        start_new_session=session,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*args: str, code: str = "") -> tuple[int, str, str]:
    with started(*args, code=code) as process:
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {test["name"]: test for test in json.loads(path.read_text())["tests"]}


def children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def processes(pid: int) -> list[int]:
    """The starter, and the processes of kernels whose machines run."""
    starters = children(pid)
    running = [child for starter in starters for child in children(starter)]
    return [*starters, *(child for child in running if "vcpu0" in threads(child))]


def hanging(process: subprocess.Popen[str], ended: int = 2) -> list[int]:
    """The processes, once so many kernels have ended and those that are left run."""
    assert process.stdout is not None
    for _ in range(ended):
        assert "PASS" in process.stdout.readline()
    assert wait_for(lambda: len(processes(process.pid)) == 2)
    return processes(process.pid)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@visible
@pytest.mark.parametrize("thread", ["vcpu0", "supervisor", "pyvmm-kernel"])
def test_a_thread_is_stopped(guest: Guest, tmp_path: Path, thread: str) -> None:
    """That is the verdict of its kernel, which says which thread asked for what; also if the main
    thread is stopped, and nobody can end the machine in order.
    """
    report = tmp_path / "r.json"
    args = ["--sandbox", "on", "--jobs", "2", "--json", str(report), *HANG]
    with started(*args, *kernels(guest)) as process:
        _, pid = hanging(process)

        def ask() -> bool:
            with contextlib.suppress(OSError, KeyError):
                wanted = 2 if thread == "vcpu0" else 1
                return filters(pid, thread) == wanted and inject(threads(pid)[thread], EXECVE)
            return False

        assert wait_for(ask)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (1, ""), out
    told = results(report)
    assert told["reset"]["verdict"] == "thread-stopped"
    what = f"a thread of pyvmm's was stopped: {thread} asked for execve(), which it may not have"
    assert told["reset"]["message"] == what and f"FAIL reset: {what}" in out
    assert told["hello"]["verdict"] == told["smp"]["verdict"] == "passed"
    assert ": 2 passed, 1 failed, 0 skipped" in out


@visible
@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_what_a_process_has(guest: Guest, tmp_path: Path, sandbox: str) -> None:
    """All its threads are confined, and it has no descriptor but its own."""
    args = ["--sandbox", sandbox, "--junit", str(tmp_path / "j.xml"), "--jobs", "2", *HANG]
    with started(*args, *kernels(guest)) as process:
        starter, pid = hanging(process)
        assert sorted(threads(starter)) == ["pyvmm-starter"]
        own = {name: tid for name, tid in threads(pid).items() if name[:4] != "kvm-"}
        assert {"pyvmm-kernel", "supervisor", "vcpu0"} <= set(own)
        for name, tid in own.items():
            assert status_of(tid, "Seccomp") == ("2" if sandbox == "on" else "0"), name
            assert status_of(tid, "NoNewPrivs") == str(int(sandbox == "on")), name
            if sandbox == "on":
                assert int(status_of(tid, "CapEff"), 16) & ~(1 << 2) == 0, name
        files = [path.readlink() for path in Path(f"/proc/{pid}/fd").iterdir()]
        targets = sorted(str(file).partition(":")[0] for file in files)
        # Standard error, and what it sends the answer by.
        assert (targets.count("pipe"), targets.count("socket")) == (1, 1), targets
        known = ("pipe", "socket", "/dev/null", "/memfd", "/dev/kvm", "anon_inode")
        assert all(target in known for target in targets), targets
        assert {file for file in files if str(file).startswith("/dev/")} <= {
            Path("/dev/null"),
            Path("/dev/kvm"),
        }
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSYS])
def test_a_process_that_is_killed(guest: Guest, tmp_path: Path, number: signal.Signals) -> None:
    """It is its kernel's verdict, and the next kernels run. SIGSYS is the filter's."""
    report = tmp_path / "r.json"
    args = ["--sandbox", "off", "--jobs", "2", "--json", str(report), *HANG]
    with started(*args, *kernels(guest)) as process:
        _, pid = hanging(process)
        os.kill(pid, number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (1, ""), out
    told = results(report)["reset"]
    if number == signal.SIGSYS:
        assert told["verdict"] == "thread-stopped"
    else:
        assert told["verdict"] == "host-problem" and f"was killed ({number.name})" in out
    assert ": 2 passed, 1 failed, 0 skipped" in out


#: Statements that the process of the kernel ``reset`` executes instead of its run.
DEEDS = {
    "garbage": ("send(b'made\\n{]'); os._exit(0)", "host-problem", "has sent less than an answer"),
    "nothing": ("os._exit(0)", "host-problem", "has sent nothing"),
    "half": ("send(b'made\\n'); os._exit(0)", "host-problem", "has sent nothing"),
    "a lie about the host": (
        "send(b'made\\nerror\\nKvmMissing\\nno\\n\\n'); os._exit(0)",
        "host-problem",
        "has sent less than an answer",
    ),
    "too much": ("[send(bytes(1 << 20)) for _ in range(100)]", "host-problem", "more than 4 MiB"),
    "a status": ("os._exit(3)", "host-problem", "has failed, with status 3"),
    "a bug": ("1 // 0", "host-problem", "has failed, with status 1"),
    "silence": ("time.sleep(600)", "timeout", "had to be killed"),
    "a stop": ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "had to be killed"),
}
HOSTILE = """
import os, signal, time
from pyvmm.testing import suite
from pyvmm.testing.suite import Suite
suite.longest = lambda seconds: seconds
boot = Suite._boot
def other(self, number, send):
    if self._cases[number].name == "reset":
        self._cases[number].timeout = 600
        {}
    boot(self, number, send)
Suite._boot = other
"""


@pytest.mark.parametrize("deed", DEEDS)
def test_a_hostile_process(guest: Guest, tmp_path: Path, deed: str) -> None:
    """Whatever it does: one verdict, in time, and the next kernels run."""
    what, verdict, text = DEEDS[deed]
    report = tmp_path / "r.json"
    code = f"exec({HOSTILE.format(what)!r});"
    seconds = "0.5" if verdict == "timeout" else "600"
    args = ["--timeout", seconds, "--json", str(report)]
    names = ["reset"] if verdict == "timeout" else ["reset", "hello", "smp"]
    status, out, err = run(*args, *map(guest, names), code=code)
    assert (status, err) == (1, ""), out
    told = results(report)
    assert told["reset"]["verdict"] == verdict and text in told["reset"]["message"], told
    assert f": {len(names) - 1} passed, 1 failed, 0 skipped" in out
    if deed == "a bug":
        assert "    ZeroDivisionError: integer division or modulo by zero\n" in out


#: What a kernel does that has its process while it runs, and a command that is slow.
TAKE_BACK = """
import contextlib, os, select
from pyvmm.apart import Apart
from pyvmm.errors import KvmMissing
from pyvmm.testing import answer, suite
attend, wait = suite._attend, Apart.wait
def deed(case, machine):
    if case.name != "reset":
        return attend(case, machine)
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
            os.read(own, len(answer.MADE))
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2:
            with contextlib.suppress(OSError):
                os.write(number, answer.encode_error(KvmMissing("no", "\x1b[2J")))
    os._exit(0)
def slow(self):
    select.select([self._channel], [], [])  # until a process has ended
    return wait(self)
suite._attend, Apart.wait = deed, slow
"""


@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_a_word_that_is_taken_back(guest: Guest, tmp_path: Path, sandbox: str) -> None:
    """A process whose guest runs cannot take back that its machine was made, and say instead that
    no machine can be made here, which would end all.
    """
    report = tmp_path / "r.json"
    args = ["--sandbox", sandbox, "--json", str(report)]
    code = f"exec({TAKE_BACK!r});"
    status, out, err = run(*args, *map(guest, ["reset", "hello", "smp"]), code=code)
    assert (status, err) == (1, ""), (out, err)
    told = results(report)
    assert told["reset"]["verdict"] == "host-problem", told["reset"]
    assert ": 2 passed, 1 failed, 0 skipped" in out


@pytest.mark.parametrize("group", [True, False])
def test_ctrl_c(guest: Guest, group: bool) -> None:
    """Of a terminal, or of a process that knows the command alone."""
    with started("--jobs", "2", *HANG, *kernels(guest), session=True) as process:
        pids = hanging(process)
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (130, ""), out
        assert ": 2 passed, 1 failed, 0 skipped" in out
        assert gone(pids)


def test_a_command_that_is_killed(guest: Guest) -> None:
    """The starter and the machines end with it."""
    with started("--jobs", "2", *HANG, *kernels(guest)) as process:
        pids = hanging(process)
        process.kill()
        process.wait()
        assert wait_for(lambda: gone(pids))


def test_a_starter_that_is_killed(guest: Guest, tmp_path: Path) -> None:
    """One line, no machine goes on, and what has ended is reported."""
    report, junit = tmp_path / "r.json", tmp_path / "j.xml"
    files = ("--json", str(report), "--junit", str(junit))
    with started("--jobs", "2", *files, *HANG, *kernels(guest)) as process:
        pids = hanging(process)
        os.kill(pids[0], signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err.count("\n")) == (101, 1)
        assert err.startswith("pyvmm: pyvmm's starter has ended; ")
        assert wait_for(lambda: gone(pids))
    assert ": 2 passed, 1 failed, 0 skipped" in out
    told = results(report)
    assert {name: test["verdict"] for name, test in told.items()} == {
        "hello": "passed",
        "smp": "passed",
        "reset": "host-problem",
    }
    assert told["reset"]["message"] == "not run to its end: pyvmm's starter has ended"
    assert "starter has ended" in junit.read_text()


def test_too_few_descriptors(guest: Guest) -> None:
    """Fewer kernels run at a time then."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40));"
    status, out, err = run("--jobs", "30", *[guest("hello")] * 30, code=code)
    assert (status, err) == (0, "") and ": 30 passed, 0 failed, 0 skipped" in out


def test_the_same_with_and_without(guest: Guest, tmp_path: Path) -> None:
    """Verdicts, registers, symbols, results: the sandbox changes nothing but the report's word."""
    found = {}
    for sandbox in ("on", "off", "auto"):
        report = tmp_path / f"{sandbox}.json"
        names = ("hello", "smp-mb", "testdev", "reset", "exits")
        args = ["--sandbox", sandbox, "--json", str(report), "--append", "how=nowhere"]
        status, out, err = run(*args, *map(guest, names), "/nonexistent")
        assert (status, err) == (1, ""), out
        found[sandbox] = results(report)
        for name, test in found[sandbox].items():
            said = test.pop("report")
            assert name == "nonexistent" or said["sandbox"] == sandbox.replace("auto", "on")
            assert test.pop("seconds") >= 0
    assert found["on"] == found["off"] == found["auto"]
    assert {test["verdict"] for test in found["on"].values()} >= {"passed", "kvm-error", "error"}


def test_what_is_said(guest: Guest) -> None:
    """-v says whether the kernels are confined; a refusal has a status of its own."""
    for want, said in (("on", "on"), ("auto", "on"), ("off", "off")):
        status, _, err = run("-v", "--sandbox", want, guest("hello"))
        assert (status, err) == (0, f"pyvmm: sandbox: {said}\n")
    old = "from pyvmm import sandbox; sandbox._why_no_files = lambda: 'no Landlock';"
    status, out, err = run("--sandbox", "on", guest("hello"), code=old)
    line = "pyvmm: --sandbox on: no Landlock; use --sandbox auto, or off\n"
    assert (status, out, err) == (132, "", line)
    status, _, err = run("-v", guest("hello"), code=old)
    assert (status, err) == (0, "pyvmm: sandbox: on, but for files: no Landlock\n")


def test_a_host_without_kvm(guest: Guest) -> None:
    """It is told once, with its own status, and moves no cursor; no kernel has a verdict."""
    code = (
        "from pyvmm import errors\n"
        "from pyvmm.kvm import ahead\n"
        "def no(*args): raise errors.KvmForbidden('not here', 'go\\x1b[2J away')\n"
        "ahead.Kvm = no\n"
    )
    status, out, err = run(*kernels(guest), code=f"exec({code!r});")
    assert (status, out, err) == (103, "", "pyvmm: not here; go\ufffd[2J away\n")


def test_a_process_imports_nothing(guest: Guest) -> None:
    """What kernels need was imported before, once: under emulation, an import takes long."""
    code = (
        "import os\n"
        "from pyvmm.testing.suite import Suite\n"
        "boot = Suite._boot\n"
        "def watched(self, number, send):\n"
        "    before = set(sys.modules)\n"
        "    boot(self, number, send)\n"
        "    os.write(2, repr(set(sys.modules) - before).encode())\n"
        "Suite._boot = watched\n"
    )
    status, out, err = run("-v", *map(guest, ("hello", "smp-mb", "exits")), code=f"exec({code!r});")
    assert status == 0 and out.count("    set()\n") == 3, (out, err)


def test_from_python(guest: Guest) -> None:
    """Results come as they are there; a suite that is stopped ends without the others."""
    cases = [
        Case("hello", guest("hello")),
        Case("other", guest("smp"), skip="not today"),
        Case("reset", guest("reset"), append="how=hang", timeout=600),
    ]
    found = []
    with Suite(cases, jobs=2) as suite:
        assert suite.sandbox == "on"
        for result in suite.run():
            found.append((result.case.name, result.verdict.kind))
            if len(found) == 2:
                suite.stop()
    assert found == [("other", "skipped"), ("hello", "passed")]
