"""A kernel or an initrd that comes through a pipe: process substitution, a FIFO."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
RUN = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--net", "none", "--qmp", "none"]


def shell(words: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A run with these words for the shell."""
    line = f"{shlex.join([*RUN, *options])} {words}"
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)


def test_process_substitution(guest: Guest) -> None:
    done = shell(f"--kernel <(cat {guest('hello')}) --initrd=<(echo not looked at)")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "hello, stdout\n" or "hello, console" in done.stdout


def test_a_pipe_feeds_each_start_of_a_machine(guest: Guest) -> None:
    """After a reboot the kernel is loaded again."""
    done = shell(f"--kernel <(cat {guest('reset')})", "--append", "how=acpi times=2", "--on-reboot")
    assert done.returncode == 2  # --on-reboot lacks its value
    options = ["--append", "how=acpi", "--on-reboot", "restart", "--timeout", "20"]
    done = shell(f"--kernel <(cat {guest('reset')})", *options)
    assert done.stdout.count("reset: by acpi") > 1, done


def test_a_fifo_waits_for_its_writer(guest: Guest, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(Path(guest("hello")).read_bytes()))
    writer.start()
    done = shell(f"--kernel {fifo}")
    writer.join()
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ("--kernel <(true)", 105, "is a pipe through which nothing came; see whether"),
        ("--kernel <(echo text)", 105, "is neither a bzImage nor an ELF"),
        ("--timeout 0.5 --kernel <(sleep 20)", 124, "the run did not end in time"),
    ],
)
def test_pipes_that_bring_no_kernel(words: str, code: int, text: str) -> None:
    done = shell(words)
    assert (done.returncode, done.stdout) == (code, "") and text in done.stderr
    assert done.stderr.count("\n") == 1
