"""The drop-in for selftests/hid/vmtest.sh (docs/kselftest.md): it is called as the script does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "docs" / "examples" / "kselftest" / "vm2c.py"
COMMAND = "mount bpffs -t bpf /sys/fs/bpf/; set -o pipefail ; ./hid_bpf 2>&1 | tee results/log"


def call(tests: Path, workdir: Path, command: str, path: str) -> subprocess.CompletedProcess[str]:
    """As the script calls vm2c.py, in the directory of its tests."""
    tests.mkdir(exist_ok=True)
    options = ["--kernel", "/k/bzImage", "--workdir", str(workdir), "--image", "fedora:36"]
    return subprocess.run(
        [sys.executable, PROGRAM, "--command", command, *options],
        cwd=tests,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pyvmm(tmp_path: Path) -> str:
    """A PATH with a pyvmm that prints what it is called with, and fails as a test would."""
    program = tmp_path / "bin" / "pyvmm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 3\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize(("workdir", "shares"), [("tests/results", 1), ("elsewhere", 2)])
def test_what_the_script_calls(tmp_path: Path, pyvmm: str, workdir: str, shares: int) -> None:
    done = call(tmp_path / "tests", tmp_path / workdir, COMMAND, pyvmm)
    assert done.returncode == 3 and not done.stderr
    assert done.stdout.splitlines() == [
        *("run", "--kernel", "/k/bzImage", "--root", "/", "--net", "none"),
        *[f"--share={tmp_path / 'tests'}:rw", f"--share={tmp_path / 'elsewhere'}:rw"][:shares],
        *("--", "bash", "-c", COMMAND),
    ]


@pytest.mark.parametrize("shell", ["/bin/sh", "bash"])
def test_a_shell_is_on_the_console(tmp_path: Path, pyvmm: str, shell: str) -> None:
    command = f"mount bpffs -t bpf /sys/fs/bpf/; {shell}"
    done = call(tmp_path / "tests", tmp_path / "tests", command, pyvmm)
    assert "--" not in done.stdout.splitlines()
    assert done.stderr == (
        "vm2c.py: the shell is on the console; begin with: mount bpffs -t bpf /sys/fs/bpf/\n"
    )
    done = call(tmp_path / "tests", tmp_path / "tests", shell, pyvmm)
    assert done.stderr == "vm2c.py: the shell is on the console\n", "there is nothing to begin with"


def test_no_pyvmm(tmp_path: Path) -> None:
    done = call(tmp_path / "tests", tmp_path / "tests", COMMAND, str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot run pyvmm: No such file or directory; put its .venv/bin" in done.stderr
