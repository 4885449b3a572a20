"""What a run of tests says that a CI job's time-out ends: each failure, and what hung."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = """
import time

def test_wrong():
    assert 3 == 4

def test_stuck():
    time.sleep(600)
"""


def test_terminated(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    argv = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", "1", "-v"]
    with subprocess.Popen(
        argv,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as run:
        assert run.stdout is not None
        said = ""
        while "\ntest_it.py::test_stuck" not in said:  # in its line, which does not end yet
            more = os.read(run.stdout.fileno(), 4096)
            assert more, said
            said += more.decode()
        assert "test_it.py::test_wrong (call): " in said, said  # while the run goes on
        run.send_signal(signal.SIGTERM)
        rest = run.stdout.read().decode()
    assert " s: test_it.py::test_stuck\n" in rest, rest
    assert "FAILED test_it.py::test_wrong" in rest, rest
    assert run.returncode == 2, rest
