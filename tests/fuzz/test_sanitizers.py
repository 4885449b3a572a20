"""The C code that guests can reach, under ASan and UBSan: fuzzed by itself, then through the unit
tests. The worker and the threads that call it, under ThreadSanitizer. The notes of chains in
flight, with a kill after each instruction.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = os.environ.get("PYVMM_FUZZ_SECONDS", "20")
#: Other inputs each day; tests/fuzz/run.sh says the seed, with which they come again.
SEED = os.environ.get("PYVMM_FUZZ_SEED", date.today().strftime("%Y%m%d"))
#: To build the fuzz programs and to run the corpus takes the rest of the time.
MADE = str(max(2, int(SECONDS) * 2 // 5))
SUITES = [
    "tests/unit/test_vring.py",
    "tests/unit/test_net_worker.py",
    "tests/unit/test_steering.py",
    "tests/unit/test_vhost_user.py",
]


def test_fuzzed_rings_and_worker() -> None:
    """tests/fuzz/run.sh: the inputs of the corpus, and others that are made of the day's seed."""
    command = [str(ROOT / "tests/fuzz/run.sh"), MADE, SEED]
    run = subprocess.run(command, capture_output=True, text=True)
    again = f"tests/fuzz/run.sh {MADE} {SEED}\n"
    assert run.returncode == 0, again + run.stdout + run.stderr
    assert run.stdout.count("no crash") == 8


def test_worker_and_its_callers_do_not_race() -> None:
    """tests/fuzz/race.sh: all that other threads may do while a worker runs."""
    run = subprocess.run([ROOT / "tests/fuzz/race.sh", SECONDS], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("no race") == 5


def test_killed_at_any_instruction() -> None:
    """tests/fuzz/kill.sh: a vhost-user back-end's heir loses and repeats no chain."""
    run = subprocess.run([ROOT / "tests/fuzz/kill.sh"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("killed at each of") == 7


def test_unit_tests_on_a_sanitized_build(tmp_path: Path) -> None:
    def library(name: Any) -> Any:
        path = subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(path).is_absolute():
            pytest.fail(f"{name} is missing: install gcc's sanitizer libraries (libasan, libubsan)")
        return path

    skip = shutil.ignore_patterns(
        ".git", ".venv", ".cache", "build", "*.so", "__pycache__", ".hypothesis", ".*_cache"
    )
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=skip)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(
        build, cwd=tree, env={**env, "PYVMM_SANITIZE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    env["LD_PRELOAD"] = f"{library('libasan.so')}:{library('libubsan.so')}"
    # Python itself leaks at exit. gcc 13 and later make fake stacks, for which a process with
    # little address space has no room.
    env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITES]
    run = subprocess.run(test, cwd=tree, env=env, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
