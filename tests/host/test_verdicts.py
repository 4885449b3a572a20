"""Verdicts of ``pyvmm run``: a real guest says what Linux would say and ends as it would (guest/talk.c)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm import Machine

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 180.0  # seconds; nothing here needs more than five

WARNING = """[    0.500000] WARNING: CPU: 0 PID: 1 at kernel/foo.c:12 foo+0x10/0x20
[    0.500000] Call Trace:
[    0.500000]  bar+0x1/0x2
[    0.500000] ---[ end trace 0000000000000000 ]---
"""
OOPS = """[    0.600000] BUG: kernel NULL pointer dereference, address: 0000000000000000
[    0.600000] Oops: 0002 [#1] PREEMPT SMP
[    0.600000]  sysrq_handle_crash+0x1/0x20
"""
PANIC = "[    0.700000] Kernel panic - not syncing: Fatal exception\n"
PANIC_END = "[    0.700000] ---[ end Kernel panic - not syncing: Fatal exception ]---\n"
KTAP = """[    0.800000] KTAP version 1
[    0.800000] 1..2
[    0.800000] ok 1 good
[    0.800000] not ok 2 bad
"""


class Run:
    """One run of the guest with ``text`` on its console."""

    def __init__(self, guest: Guest, tmp_path: Path, text: str, append: str, *args: str, **env: str) -> None:
        (tmp_path / "text").write_text(text)
        self.junit, self.log, self.report = (
            tmp_path / n for n in ("junit.xml", "console.log", "report.json")
        )
        files = ("--junit", str(self.junit), "--log", str(self.log), "--report", str(self.report))
        kernel = ("--kernel", guest("talk"), "--append", append)
        if text:
            kernel += ("--initrd", str(tmp_path / "text"))
        self.begin = time.monotonic()
        self.child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pyvmm",
                "run",
                "--host",
                "local",
                "--net",
                "none",
                *kernel,
                *files,
                *args,
            ],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "GITHUB_ACTIONS"} | env,
        )

    def end(self, status: int, kind: str) -> str:
        """Wait; the status, JUnit and the report must say the same. Returns stderr."""
        with self.child:
            _, err = self.child.communicate(timeout=PATIENCE)
        assert self.child.returncode == status, err
        case = ET.parse(self.junit).getroot().find("testsuite/testcase")
        assert case is not None
        found = {p.get("name"): p.get("value") for p in case.iter("property")}
        assert found["verdict"] == kind
        failures = [e for e in case if e.tag in ("failure", "error")]
        assert [e.get("type") for e in failures] == ([] if kind == "passed" else [kind])
        verdict = json.loads(self.report.read_text())["verdict"]
        assert (verdict["kind"], verdict["code"]) == (kind, status)
        return err


def test_passed(guest: Guest, tmp_path: Path) -> None:
    run = Run(
        guest, tmp_path, WARNING, "init=1", "--fail-on", "oops,bug,rcu-stall,lockdep", "--boot-timeout", "60"
    )
    assert run.end(0, "passed") == ""
    lines = run.log.read_text().splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"\[ +\d+\.\d{6}\] \[    0\.500000\] Call Trace:", lines[1])


@pytest.mark.parametrize(
    ("text", "kinds", "said"),
    [
        (WARNING, "warning", "reported warning: WARNING: CPU: 0 PID: 1 at kernel/foo.c:12"),
        (WARNING + OOPS, "all", "reported warning and 1 more: "),
        (OOPS, "oops,bug", "reported oops: BUG: kernel NULL pointer"),
        ("rcu: INFO: rcu_sched self-detected stall on CPU\n", "rcu-stall", "reported rcu-stall"),
        ("WARNING: possible circular locking dependency detected\n", "lockdep", "reported lockdep"),
    ],
)
def test_trouble(guest: Guest, tmp_path: Path, text: str, kinds: str, said: str) -> None:
    err = Run(guest, tmp_path, text, "", "--fail-on", kinds).end(118, "trouble")
    assert said in err.splitlines()[-1]
    if "WARNING: CPU" in text:
        assert "  Call Trace:\n   bar+0x1/0x2\n" in err, "the report is quoted"


def test_panic_is_quoted_with_its_trace(guest: Guest, tmp_path: Path) -> None:
    err = Run(guest, tmp_path, WARNING + OOPS + PANIC, "how=reboot").end(120, "panic")
    assert "   sysrq_handle_crash+0x1/0x20\n  Kernel panic - not syncing: Fatal exception\n" in err
    assert "foo.c" not in err
    assert err.splitlines()[-1].startswith(
        "pyvmm: the guest kernel panicked: Kernel panic - not syncing: Fatal"
    )


def test_panic_wins_over_trouble(guest: Guest, tmp_path: Path) -> None:
    Run(guest, tmp_path, OOPS + PANIC, "how=reboot", "--fail-on", "all").end(120, "panic")


def test_panic_that_does_not_reboot_ends_at_once(guest: Guest, tmp_path: Path) -> None:
    """panic=0: the kernel spins for ever. There is no time-out here: only its last line ends the run."""
    run = Run(guest, tmp_path, OOPS + PANIC + PANIC_END, "how=hang")
    err = run.end(120, "panic")
    assert run.log.read_text().endswith(PANIC_END), "its last line is whole"
    assert err.splitlines()[-2].endswith("---[ end Kernel panic - not syncing: Fatal exception ]---")
    assert err.splitlines()[-1].endswith(": Kernel panic - not syncing: Fatal exception")


def test_panic_by_pvpanic_alone(guest: Guest, tmp_path: Path) -> None:
    """Before the console driver: nothing was said."""
    err = Run(guest, tmp_path, "", "how=panic").end(120, "panic")
    assert "reported by pvpanic" in err


def test_panic_before_a_time_out_is_a_panic(guest: Guest, tmp_path: Path) -> None:
    Run(guest, tmp_path, PANIC, "how=hang", "--timeout", "2").end(120, "panic")


@pytest.mark.parametrize(
    ("text", "append", "args", "said"),
    [
        ("", "how=hang", ["--timeout", "3"], "3 s are over, before there was any output"),
        ("Linux version\n", "how=hang", ["--timeout", "3"], "3 s are over, while the kernel booted"),
        ("x\n", "how=hang", ["--boot-timeout", "2"], "init did not run within 2 s, while the kernel booted"),
        ("x\n", "how=hang init=1", ["--timeout", "5", "--boot-timeout", "4"], "5 s are over, in init"),
    ],
)
def test_time_out_names_the_phase(
    guest: Guest, tmp_path: Path, text: str, append: str, args: list[str], said: str
) -> None:
    run = Run(guest, tmp_path, text, append, *args)
    err = run.end(124, "timeout")
    assert said in err.splitlines()[-1]
    assert re.search(r"vCPU 0 at 0x[0-9a-f]+, main\+0x", err), "the RIP has its symbol"
    assert re.search(r"rip [0-9a-f]{16}", err)


@pytest.mark.parametrize(
    ("text", "append"), [("", "init=1 how=hang"), ("Run /init as init process\n", "how=hang")]
)
def test_what_counts_as_booted(guest: Guest, tmp_path: Path, text: str, append: str) -> None:
    (tmp_path / "text").write_text(text or "x\n")
    with Machine(guest("talk"), initrd=str(tmp_path / "text"), append=append, memory="16M") as vm:
        vm.start()
        assert vm.booted.wait(PATIENCE)
        assert vm.outcome is None


def test_interrupted(guest: Guest, tmp_path: Path) -> None:
    run = Run(guest, tmp_path, "x\n", "how=hang")
    until = time.monotonic() + PATIENCE
    while not (run.log.exists() and run.log.read_bytes()):
        assert time.monotonic() < until
        time.sleep(0.05)
    run.child.send_signal(signal.SIGTERM)
    with run.child:
        run.child.communicate(timeout=PATIENCE)
    assert run.child.returncode == 143
    error = ET.parse(run.junit).getroot().find("testsuite/testcase/error")
    assert error is not None and error.get("type") == "interrupted"


def test_ktap_becomes_cases(guest: Guest, tmp_path: Path) -> None:
    run = Run(guest, tmp_path, KTAP, "init=1")
    run.end(0, "passed")
    cases = ET.parse(run.junit).getroot().findall("testsuite/testcase[@classname='boot']")
    assert [(c.get("name"), c.find("failure") is not None) for c in cases] == [("good", False), ("bad", True)]


def test_status_of_the_test(guest: Guest, tmp_path: Path) -> None:
    assert Run(guest, tmp_path, "x\n", "status=7").end(7, "failed") == ""


def test_annotation(guest: Guest, tmp_path: Path) -> None:
    err = Run(guest, tmp_path, PANIC, "how=reboot", GITHUB_ACTIONS="true").end(120, "panic")
    assert "::error title=pyvmm panic::the guest kernel panicked: Kernel panic" in err


def test_flooded_console_keeps_the_verdict(guest: Guest, tmp_path: Path) -> None:
    """What comes after the trouble is more than is kept of the console."""
    run = Run(guest, tmp_path, OOPS + "noise noise noise\n" * 20000, "", "--fail-on", "oops")
    assert "reported oops" in run.end(118, "trouble")


def test_a_bad_kernel_has_its_verdict_too(guest: Guest, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    args = ["run", "--host", "local", "--net", "none", "--kernel", "/nonexistent", "--junit", str(junit)]
    done = subprocess.run([sys.executable, "-m", "pyvmm", *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 105
    error = ET.parse(junit).getroot().find("testsuite/testcase/error")
    assert error is not None and "/nonexistent" in error.get("message", "")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--fail-on", "ooops"], "--fail-on ooops; use lockdep, rcu-stall, oops, bug, warning or all"),
        (["--boot-timeout", "0"], "--boot-timeout 0"),
        (["--junit", "/nonexistent/x"], "--junit /nonexistent/x"),
        (["--log", "/nonexistent/x"], "--log /nonexistent/x"),
    ],
)
def test_bad_usage(guest: Guest, args: list[str], text: str) -> None:
    command = ["run", "--host", "local", "--net", "none", "--kernel", guest("talk"), *args]
    done = subprocess.run([sys.executable, "-m", "pyvmm", *command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pyvmm: ") and done.stderr.count("\n") == 1 and text in done.stderr
