"""``pyvmm test`` from outside: verdicts of real guests, exit status, TAP, JUnit, JSON,
configuration files, Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 180.0  # seconds; nothing here needs more than five


def spawn(*args: str, **more: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "GITHUB_ACTIONS"} | more
    return subprocess.Popen(
        [sys.executable, "-m", "pyvmm", "test", *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**env, "NO_COLOR": "1"},
    )


def run(*args: str, **more: str) -> tuple[int, str, str]:
    with spawn(*args, **more) as child:
        out, err = child.communicate(timeout=PATIENCE)
        return child.returncode, out, err


def test_all_pass(guest: Guest) -> None:
    status, out, err = run(
        "--jobs", "3", *(guest(n) for n in ("hello", "smp", "smp-mb", "timer", "exits"))
    )
    assert (status, err) == (0, ""), out
    assert "5 tests in " in out and ": 5 passed, 0 failed, 0 skipped\n" in out
    for name in ("hello", "smp", "smp-mb", "timer", "exits"):
        assert f"PASS {name} (" in out


def test_a_kernel_that_dies_at_once_is_told_what_it_was_taken_for(tmp_path: Path) -> None:
    """An invalid opcode, and nowhere to handle it."""
    (tmp_path / "flat").write_bytes(b"\x0f\x0b")
    status, out, err = run("--load-address", "0x100000", str(tmp_path / "flat"))
    assert (status, err) == (1, "") and "the guest triple-faulted" in out
    assert "said nothing; it was entered as flat binary in 32-bit mode, at 0x100000\n" in out


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("triple", "triple-fault", "triple-faulted"),
        ("acpi", "reboot", "rebooted"),
        ("panic", "panic", "reported by pvpanic"),
        ("nowhere", "kvm-error", "KVM_RUN failed"),
        ("moonwalk", "failed", "status 1"),
        ("hang", "timeout", "did not end in 6 s"),
        ("halt", "timeout", "did not end in 6 s"),
    ],
)
def test_every_verdict(guest: Guest, tmp_path: Path, how: str, kind: str, text: str) -> None:
    """Whatever happens: one line, the details, JUnit and JSON say the same, and it is over
    in time.
    """
    junit, report = tmp_path / "junit.xml", tmp_path / "report.json"
    files = ("--junit", str(junit), "--json", str(report))
    seconds = "6" if kind == "timeout" else str(PATIENCE)
    status, out, err = run("--timeout", seconds, "--append", f"how={how}", *files, guest("reset"))
    assert (status, err) == (1, ""), out
    assert "FAIL reset: " in out and text in out
    assert "| reset: by " in out or how == "moonwalk"
    (test,) = json.loads(report.read_text())["tests"]
    assert (test["verdict"], test["name"]) == (kind, "reset")
    assert text in test["message"]
    assert test["seconds"] < 30 or kind != "timeout"
    assert test["report"]["exits"]["kvm_run_returns"] > 0
    case = ET.parse(junit).getroot().find("testsuite/testcase")
    assert case is not None
    failure = case.find("failure") if kind == "failed" else case.find("error")
    assert failure is not None
    assert failure.get("type") == kind and text in failure.get("message", "")
    if kind == "timeout":
        assert "main+0x" in (failure.text or ""), "the RIP has its symbol"


def test_hang(guest: Guest, tmp_path: Path) -> None:
    """Long before its time-out, and with its own verdict."""
    report = tmp_path / "report.json"
    args = ("--hang-timeout", "0.5", "--timeout", str(PATIENCE), "--json", str(report))
    status, out, err = run(*args, "--append", "how=halt", guest("reset"))
    assert (status, err) == (1, ""), out
    (test,) = json.loads(report.read_text())["tests"]
    assert test["verdict"] == "hang" and "vCPU 0 halted with interrupts off" in test["message"]
    assert "main+0x" in test["details"][-1]


def test_skip_and_status(guest: Guest) -> None:
    memory = 128 << 20
    args = ("--append", f"memory={memory} exit=38", guest("testdev-mb"))
    status, out, _ = run(*args)
    assert status == 0 and "SKIP testdev-mb: " in out and "0 passed, 0 failed, 1 skipped" in out
    status, out, _ = run("--append", f"memory={memory} exit=2", guest("testdev-mb"))
    assert status == 1 and "debug-exit with 2, status 5" in out


def test_points(guest: Guest, tmp_path: Path) -> None:
    """A kernel's own results are JUnit cases; here one is bound to fail."""
    junit = tmp_path / "junit.xml"
    status, out, _ = run("--append", "memory=1", "--junit", str(junit), guest("testdev"))
    assert status == 1
    assert "10 points, 1 failed: fw_cfg: memory" in out
    cases = ET.parse(junit).getroot().findall("testsuite/testcase[@classname='testdev']")
    assert len(cases) == 10
    assert [c.get("name") for c in cases if c.find("failure") is not None] == ["fw_cfg: memory"]


def test_tap(guest: Guest) -> None:
    status, out, err = run(
        "--tap", "--append", "how=poweroff", guest("hello"), guest("reset"), "/nonexistent"
    )
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[:4] == ["TAP version 13", "1..3", "ok 1 - hello", "ok 2 - reset"]
    assert lines[4] == "not ok 3 - nonexistent"
    assert '  verdict: "error"' in lines
    assert lines[-1].startswith("# 2 passed, 1 failed, 0 skipped")


def test_annotation(guest: Guest) -> None:
    status, _, err = run(
        "--append", "how=acpi", guest("hello"), guest("reset"), GITHUB_ACTIONS="true"
    )
    assert (status, err) == (1, "::error title=pyvmm reboot::reset: the guest rebooted\n")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_any_name_can_be_printed(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "\N{SNOWMAN}").write_bytes(b"\x0f\x0b")
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    args = ["--load-address", "0x100000", str(tmp_path / "\N{SNOWMAN}"), strange]
    status, out, err = run(*args, PYTHONIOENCODING=encoding)
    assert (status, err) == (1, "") and "2 failed" in out
    assert "FAIL \\udcff" in out and ("FAIL \\u2603" in out) == (encoding == "latin-1")


def test_flat(tmp_path: Path) -> None:
    (tmp_path / "sector.bin").write_bytes(
        bytes([0x31, 0xC0, 0xE6, 0xF4, 0xF4])
    )  # xor ax, ax; out 0xf4, al
    sector = str(tmp_path / "sector.bin")
    for mode in ("real16", "protected32"):
        status, out, err = run("--load-address", "0x7c00", "--load-mode", mode, sector)
        assert (status, err) == (0, ""), out
    status, out, _ = run("--load-address", "0x6000", sector)
    assert status == 1 and "load address 0x6000" in out


def test_configuration(guest: Guest, tmp_path: Path) -> None:
    build = Path(guest("hello")).parent
    for name in ("smp-mb.elf", "testdev-mb.elf", "reset.elf"):
        (tmp_path / name).symlink_to(build / name)
    (tmp_path / "unittests.cfg").write_text(
        f"""
[smp2]
file = smp-mb.elf
smp = 2
extra_params = -cpu max -append 'cpus=2'
groups = smp

[devices]
file = testdev-mb.elf
extra_params = -m 64 -append 'memory={64 << 20}'

[split]
file = smp-mb.elf
extra_params = -machine kernel_irqchip=split

[hang]
file = reset.elf
extra_params = -append how=hang
timeout = 1s
groups = nodefault
"""
    )
    config = ("--config", str(tmp_path / "unittests.cfg"))
    status, out, err = run(*config)
    assert (status, err) == (0, ""), out
    assert "PASS smp2" in out and "PASS devices: 13 points, 0 failed" in out
    assert "SKIP split: needs a machine with kernel_irqchip=split\n" in out
    assert "SKIP hang: not run unless asked for" in out
    assert "4 tests in " in out and ": 2 passed, 0 failed, 2 skipped" in out
    status, out, _ = run(*config, "--group", "smp")
    assert status == 0 and "1 test in " in out
    status, out, _ = run(*config, "hang")
    assert status == 1 and "did not end in 1 s" in out
    status, _, err = run(*config, "nothing")
    assert status == 2 and "no test 'nothing'" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(guest: Guest, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """What has ended is reported, the rest as skipped; no machine goes on."""
    junit = tmp_path / "junit.xml"
    kernels = [guest(name) for name in ("hello", "reset", "smp", "reset")]
    with spawn("--junit", str(junit), "--jobs", "2", "--append", "how=hang", *kernels) as child:
        assert child.stdout is not None
        # Only reset takes note of how=hang: once the other two have ended, each job is at one that
        # hangs.
        seen = [child.stdout.readline() for _ in range(2)]
        assert all("PASS" in line for line in seen), seen
        child.send_signal(number)
        begin = time.monotonic()
        out, err = child.communicate(timeout=PATIENCE)
        assert time.monotonic() - begin < PATIENCE / 2
    assert (child.returncode, err) == (code, ""), out
    assert "2 passed, 2 failed" in out
    cases = ET.parse(junit).getroot().findall("testsuite/testcase")
    assert len(cases) == 4
    assert sum(c.find("skipped") is not None for c in cases) == 2


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "no kernel"),
        (["--timeout", "0", "x"], "positive number"),
        (["--jobs", "0", "x"], "use 1 to 256"),
        (["--hang-timeout", "0", "x"], "use 0.1 seconds or more"),
        (["--group", "g", "x"], "--config file"),
        (["--load-address", "here", "x"], "write 0x100000"),
        (["--json", "-", "--tap", "x"], "both write to stdout"),
        (["--junit", "/nonexistent/x", "x"], "/nonexistent/x"),
        (["--config", "/nonexistent/x"], "--config /nonexistent/x"),
    ],
)
def test_bad_usage(args: list[str], text: str) -> None:
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert err.startswith("pyvmm: ") and err.count("\n") == 1 and text in err
