"""``pyvmm matrix`` over bare-metal guests: rows, verdicts, JSON, JUnit, resumption, Ctrl-C.
tests/boot has Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.compare import counters
from tests.driver import wait_for
from tests.host.test_confined import status_of, threads
from tests.host.test_kernel_processes import PYVMM, gone, processes, visible
from tests.inject import EXECVE, inject

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 180.0  # seconds


@contextlib.contextmanager
def spawn(*args: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """:param code: statements that change pyvmm before."""
    env = {k: v for k, v in os.environ.items() if k != "GITHUB_ACTIONS"}
    command = [sys.executable, "-c", PYVMM.format(code), "matrix", "--host", "local", *args]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def run(*args: str, code: str = "") -> tuple[int, str, str]:
    with spawn(*args, code=code) as child:
        out, err = child.communicate(timeout=PATIENCE)
        return child.returncode, out, err


def cells(path: Path) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in json.loads(path.read_text())["cells"]}


def test_rows_verdicts_and_resumption(guest: Guest, tmp_path: Path) -> None:
    """Each cell once; what has been done is not done again, unless its kernel or the options have
    changed.
    """
    own = tmp_path / "own.elf"
    own.write_bytes(Path(guest("hello")).read_bytes())
    out, junit = tmp_path / "m.json", tmp_path / "m.xml"
    args = ["--kernels", f"{own},{guest('timer')}", "--modes", "emulated,none", "--json", str(out)]
    args += ["--cpus", "1,2", "--junit", str(junit), "--features", "all,no-mrg-rxbuf+no-tso"]
    status, text, err = run(*args)
    assert status == 0, text + err
    assert text.splitlines()[0].split()[:5] == ["kernel", "mode", "cpus", "features", "verdict"]
    assert len(text.splitlines()) == 1 + 16 + 1 and "16 passed, 0 failed" in text
    assert err.splitlines()[-1] == "pyvmm: [16/16] timer.elf/none/2/no-mrg-rxbuf+no-tso"
    done = cells(out)
    assert len(done) == 16 and {c["verdict"] for c in done.values()} == {"passed"}
    assert "MRG_RXBUF" in done["own.elf/emulated/1/all"]["offered"]
    assert "MRG_RXBUF" not in done["own.elf/emulated/1/no-mrg-rxbuf+no-tso"]["offered"]
    cases = ET.parse(junit).getroot().findall("testsuite/testcase")
    assert [c.get("name") for c in cases] == list(done)

    status, text, err = run(*args, "--resume")
    assert (status, err) == (0, ""), "all was there"
    assert "16 passed" in text and cells(out) == done
    own.write_bytes(Path(guest("hello")).read_bytes() + b"\0")
    status, text, err = run(*args, "--resume")
    assert status == 0 and err.count("own.elf") == 8 and "timer.elf" not in err, (
        "a kernel has changed"
    )
    status, text, err = run(*args, "--resume", "--append", "status=3")
    assert status == 1 and err.count("pyvmm: [") == 16, "the options have"
    assert "8 passed, 8 failed" in text and "the command's exit status is 3" in text
    status, text, err = run(*args, "--resume", "--cpu", "host,+ds-cpl")
    assert status == 1 and err.count("pyvmm: [") == 16, "the CPU has"
    assert text.count("this host's KVM has no ds-cpl") == 16, "which no KVM has"


def test_shards(guest: Guest, tmp_path: Path) -> None:
    """Two machines share a sweep, and their results make one."""
    common = ["--kernels", f"{guest('hello')},{guest('timer')}", "--modes", "emulated,none"]
    common += ["--cpus", "1,2", "--quiet"]
    parts = [tmp_path / f"part{k}.json" for k in (1, 2, 3)]
    for k, part in enumerate(parts, 1):
        status, text, err = run(*common, "--shard", f"{k}/3", "--json", str(part))
        assert (status, err) == (0, "") and text.count(" passed ") >= 2, text
    assert [len(cells(part)) for part in parts] == [3, 3, 2]
    whole, junit = tmp_path / "all.json", tmp_path / "all.xml"
    names = [str(part) for part in parts]
    status, text, err = run("--merge", *names, "--json", str(whole), "--junit", str(junit))
    assert (status, err) == (0, "") and text.splitlines()[-1].endswith("8 passed, 0 failed")
    assert cells(whole) == cells(parts[0]) | cells(parts[1]) | cells(parts[2])
    assert len(ET.parse(junit).getroot().findall("testsuite/testcase")) == 8
    # What was merged can be resumed as if it had been run here.
    status, text, err = run(*common, "--json", str(whole), "--resume")
    assert (status, err) == (0, "") and "8 passed" in text and len(cells(whole)) == 8

    status, text, err = run("--merge", names[0], names[0])
    assert status == 2 and err.count("\n") == 1 and " is in " in err
    for wrong in ("/nonexistent", str(junit)):
        status, text, err = run("--merge", names[0], wrong)
        assert status == 2 and err.startswith(f"pyvmm: {wrong}") and err.count("\n") == 1, err
    for wrong in ("0/3", "4/3", "3", "a/b", "1/"):
        status, text, err = run(*common, "--shard", wrong)
        assert status == 2 and err.startswith(f"pyvmm: --shard {wrong}; write K/N"), err


@pytest.mark.parametrize(
    ("append", "verdict"),
    [
        ("how=hang", "hang"),
        ("how=idle", "timeout"),
        ("how=panic", "panic"),
        ("how=acpi", "reboot"),
        ("how=triple", "triple-fault"),
    ],
)
def test_every_verdict(guest: Guest, tmp_path: Path, append: str, verdict: str) -> None:
    out, junit = tmp_path / "m.json", tmp_path / "m.xml"
    args = (
        "--kernels",
        guest("reset"),
        "--modes",
        "none",
        "--append",
        append,
        "--json",
        str(out),
        "--junit",
        str(junit),
    )
    # The others end by themselves, on a busy machine as well.
    timeout = "3" if verdict == "timeout" else str(PATIENCE)
    hang = "1" if verdict in ("hang", "timeout") else str(PATIENCE)
    status, text, _ = run(*args, "--timeout", timeout, "--hang-timeout", hang, "--seconds", "0")
    assert status == 1 and f"  {verdict}" in text and "0 passed, 1 failed" in text
    (cell,) = cells(out).values()
    assert cell["verdict"] == verdict and cell["message"] in text
    error = ET.parse(junit).getroot().find("testsuite/testcase/error")
    assert error is not None and error.get("type") == verdict


def test_what_cannot_be_had_is_a_row(guest: Guest, tmp_path: Path) -> None:
    """A kernel that is none, and a mode that this host has not got, do not end the sweep."""
    (tmp_path / "cut.elf").write_bytes(Path(guest("hello")).read_bytes()[:1000])
    out = tmp_path / "m.json"
    kernels = f"{tmp_path}/cut.elf,{guest('hello')}"
    status, text, _ = run("--kernels", kernels, "--modes", "none,vhost-user", "--json", str(out))
    assert status == 1, text
    done = cells(out)
    assert (
        done["cut.elf/none/1/all"]["verdict"] == "error"
        and done["hello.elf/none/1/all"]["verdict"] == "passed"
    )
    assert done["hello.elf/vhost-user/1/all"]["verdict"] == "passed", "with a back-end of its own"


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (
            "/nonexistent/vmlinux",
            "kernel '/nonexistent/vmlinux': No such file or directory; name a",
        ),
        (
            "6.12",
            "image '6.12' is not built; run: pyvmm image build --kernel-version 6.12",
        ),
    ],
)
def test_a_missing_kernel_is_told_before_the_first_boot(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, text: str
) -> None:
    """And the results of an earlier sweep are still there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "m.json"
    out.write_text("earlier results")
    args = ("--kernels", f"{guest('hello')},{kernel}", "--modes", "none", "--json", str(out))
    status, text_, err = run(*args, "--junit", str(tmp_path / "m.xml"))
    assert (status, text_) == (105, "")
    assert err.startswith(f"pyvmm: {text}") and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]
    assert out.read_text() == "earlier results"


def test_results_that_cannot_be_written(guest: Guest, tmp_path: Path) -> None:
    status, text, err = run(
        "--kernels", guest("hello"), "--modes", "none", "--junit", "/dev/full", "--quiet"
    )
    assert status == 101 and "1 passed" in text
    assert err == "pyvmm: --junit /dev/full is lost: No space left on device\n"


def test_another_process_moves_the_packets(guest: Guest, tmp_path: Path) -> None:
    """As a cell of mode vhost-user claims: the guest has such a card, and pyvmm its back-end."""
    out = tmp_path / "m.json"
    args = ["--kernels", guest("reset"), "--append", "how=idle", "--modes", "vhost-user:queues=2"]
    with spawn(*args, "--json", str(out)) as child:
        until = time.monotonic() + PATIENCE
        while not (backends := counters.backends_of(child.pid)):
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert len(backends) == 1 and not Path(f"/proc/{backends[0]}").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]


@visible
@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_what_the_process_of_a_cell_has(guest: Guest, sandbox: str) -> None:
    """All its threads are confined, if they are to be, and the helper is all that is not."""
    args = ["--kernels", guest("reset"), "--append", "how=hang", "--hang-timeout", "600"]
    with spawn(*args, "--modes", "vhost-user", "--sandbox", sandbox) as child:
        assert wait_for(lambda: len(processes(child.pid)) == 2)
        starter, pid = processes(child.pid)
        assert sorted(threads(starter)) == ["pyvmm-starter"]
        assert {"supervisor", "vcpu0", "net0"} <= set(threads(pid))
        tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        own = [tid for tid in tasks if status_of(tid, "Name")[:4] != "kvm-"]
        assert len(own) > 8, own
        for tid in own:
            name = status_of(tid, "Name")
            assert status_of(tid, "Seccomp") == ("2" if sandbox == "on" else "0"), name
            if sandbox == "on":
                assert int(status_of(tid, "CapEff"), 16) & ~(1 << 2) == 0, name
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=PATIENCE)
        assert gone([starter, pid])
    assert child.returncode == 143


@visible
def test_a_thread_of_a_cell_is_stopped(guest: Guest, tmp_path: Path) -> None:
    """That is the verdict of its cell, and the next cell runs."""
    out = tmp_path / "m.json"
    args = [
        "--kernels",
        f"{guest('reset')},{guest('hello')}",
        "--modes",
        "none",
        "--json",
        str(out),
    ]
    args += ["--append", "how=hang", "--hang-timeout", "600", "--timeout", "600"]
    with spawn(*args, "--sandbox", "on") as child:
        assert wait_for(lambda: len(processes(child.pid)) == 2)
        _, pid = processes(child.pid)
        assert wait_for(lambda: inject(threads(pid)["supervisor"], EXECVE))
        text, _ = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1 and "1 passed, 1 failed" in text
    cell = cells(out)["reset.elf/none/1/all"]
    what = "a thread of pyvmm's was stopped: supervisor asked for execve(), which it may not have"
    assert (cell["verdict"], cell["message"]) == ("thread-stopped", what)


#: Statements that the process of the cell with hello.elf executes once its guest could run.
DEEDS = {
    "nothing": ("os._exit(0)", "host-problem", "has sent nothing"),
    "a status": ("os._exit(3)", "host-problem", "has failed, with status 3"),
    "too much": ("[send(bytes(1 << 20)) for _ in range(100)]", "host-problem", "more than 4 MiB"),
    "a lie about the host": (
        "send(answer.encode_error(KvmMissing('no'))); os._exit(0)",
        "host-problem",
        "has sent less than an answer",
    ),
    "an unknown field": ("report = {'kernel': 'other'}", "host-problem", "an unknown field"),
    "another verdict": ("report = {'verdict': 'passed'}", "host-problem", "an unknown field"),
    "a large figure": ("report = {'packets': 10**4000}", "host-problem", "that is too large"),
    "another shape": ("report = {'command': []}", "host-problem", "a command that is none"),
    "a moved cursor": ("report = {'notes': ['\x1b[2J']}", "passed", ""),
    "a command of GitHub's": (
        "return answer.Answer(Verdict('failed', '::stop-commands::x'))",
        "failed",
        "::stop-commands::x",
    ),
    "too long a list": (
        "report = {'console': ['x'] * 31}",
        "host-problem",
        "a list that is none, or too long",
    ),
}
HOSTILE = """
import os
os.environ["GITHUB_ACTIONS"] = "true"
from pyvmm.errors import KvmMissing
from pyvmm.matrix import run
from pyvmm.testing import answer
from pyvmm.testing.verdict import Verdict
real, begin = run._run, run.Sweep._boot
def boot(self, number, send):
    def other(cell, settings, sandbox, made):
        if "hello" not in cell.kernel:
            return real(cell, settings, sandbox, made)
        made()
        report = {{}}
        {}
        return answer.Answer(Verdict("passed"), report=report)
    run._run = other
    begin(self, number, send)
run.Sweep._boot = boot
"""


@pytest.mark.parametrize("deed", DEEDS)
def test_a_hostile_cell(guest: Guest, tmp_path: Path, deed: str) -> None:
    """Whatever it says: that is the verdict of this cell, and the next one runs."""
    what, verdict, text = DEEDS[deed]
    out = tmp_path / "m.json"
    args = ["--kernels", f"{guest('hello')},{guest('timer')}", "--modes", "none"]
    code = f"exec({HOSTILE.format(what)!r});"
    status, told, err = run(*args, "--json", str(out), code=code)
    found = cells(out)
    cell = found["hello.elf/none/1/all"]
    assert cell["verdict"] == verdict and text in cell["message"], cell
    assert (cell["kernel"], cell["mode"], cell["cpus"]) == (guest("hello"), "none", 1)
    assert found["timer.elf/none/1/all"]["verdict"] == "passed"
    assert status == int(verdict != "passed") and "\x1b" not in told + err
    assert not any(line.lstrip().startswith("::stop") for line in (told + err).splitlines())


def test_the_same_with_and_without(guest: Guest, tmp_path: Path) -> None:
    """The sandbox changes nothing but its own field; what cannot be had is told."""
    args = ["--kernels", f"{guest('hello')},{guest('reset')}", "--modes", "emulated,vhost-user"]
    args += ["--append", "how=triple", "--quiet"]
    found = {}
    for sandbox in ("on", "off", "auto"):
        out = tmp_path / f"{sandbox}.json"
        status, text, err = run(*args, "--sandbox", sandbox, "--json", str(out))
        assert (status, err) == (1, ""), text
        found[sandbox] = cells(out)
        for cell in found[sandbox].values():
            assert cell.pop("sandbox") == sandbox.replace("auto", "on")
            assert cell.pop("seconds") > 0
            cell["phases_s"] = list(cell["phases_s"])
    assert found["on"] == found["off"] == found["auto"]
    assert {cell["verdict"] for cell in found["on"].values()} == {"passed", "triple-fault"}
    old = "from pyvmm import sandbox; sandbox._why_no_files = lambda: 'no Landlock';"
    status, text, err = run(*args, "--sandbox", "on", code=old)
    line = "pyvmm: --sandbox on: no Landlock; use --sandbox auto, or off\n"
    assert (status, text, err) == (132, "", line)
    status, text, _ = run(*args, "--json", "-", code=old)
    assert status == 1
    states = {cell["sandbox"] for cell in json.loads(text)["cells"]}
    assert states == {"on, but for files: no Landlock"}


def test_a_host_without_kvm(guest: Guest, tmp_path: Path) -> None:
    """It is told once, and no cell has a verdict."""
    code = (
        "from pyvmm import errors\n"
        "from pyvmm.kvm import ahead\n"
        "def no(*args): raise errors.KvmForbidden('not here', 'go away')\n"
        "ahead.Kvm = no\n"
    )
    args = ["--kernels", f"{guest('hello')},{guest('timer')}", "--modes", "none", "--quiet"]
    out = tmp_path / "m.json"
    status, _, err = run(*args, "--json", str(out), code=f"exec({code!r});")
    assert (status, err) == (103, "pyvmm: not here; go away\n") and cells(out) == {}


def test_interrupted_and_resumed(guest: Guest, tmp_path: Path) -> None:
    out, junit = tmp_path / "m.json", tmp_path / "m.xml"
    args = ["--kernels", f"{guest('hello')},{guest('reset')},{guest('timer')}", "--modes", "none"]
    args += ["--append", "how=idle", "--json", str(out), "--junit", str(junit)]
    with spawn(*args) as child:
        assert child.stderr is not None
        while "[2/3]" not in child.stderr.readline():
            pass
        time.sleep(0.2)  # anywhere in the second cell, which never ends
        child.send_signal(signal.SIGINT)
        text, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert (
        "interrupted, 2 of 3 cells were not run; go on with --resume" in err and "1 passed" in text
    )
    assert list(cells(out)) == ["hello.elf/none/1/all"]
    assert len(ET.parse(junit).getroot().findall("testsuite/testcase/skipped")) == 2
    status, text, err = run(*args, "--resume", "--timeout", "2", "--seconds", "1")
    assert status == 1 and "[1/3]" in err, "the options have changed"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--kernels", ""], "--kernels ''"),
        (["--kernels", "a,a"], "without repetitions"),
        (["--modes", "bridge"], "unknown mode 'bridge'"),
        (["--modes", "emulated:tap=tap0"], "makes its own tap"),
        (["--cpus", "0"], "--cpus 0; use 1 to 255"),
        (["--features", "mrg-rxbuf"], "write all, most, each, pairs, or no-mrg-rxbuf+packed"),
        (["--features", "no-wings"], "without=wings"),
        (["--resume"], "--resume without --json"),
        (["--json", "/nonexistent/x"], "--json /nonexistent/x"),
        (["--junit", "/nonexistent/x"], "--junit /nonexistent/x"),
        (["--modes", "vhost-user:socket=/tmp/s"], "makes its own tap and its own back-end"),
        (["--fail-on", "ooops"], "--fail-on ooops"),
        (["--timeout", "0"], "--timeout 0; use 1 seconds or more"),
        (["--timeout", "5", "--seconds", "6"], "--seconds 6; use less than --timeout 5"),
    ],
)
def test_bad_usage(args: list[str], text: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("pyvmm: ") and err.count("\n") == 1 and text in err


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"schema": "other"}')
    status, _, err = run("--json", str(tmp_path / "x.json"), "--resume")
    assert status == 2 and "its schema is not pyvmm-matrix/1" in err
    assert (tmp_path / "x.json").read_text() == '{"schema": "other"}', "it is left alone"
