"""``pyvmm run --detach``: the machine goes on in the background, and is found by its name."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.cli import main
from pyvmm.cli.support.options import DETACHED
from pyvmm.control.client import connect
from pyvmm.control.registry import machines
from pyvmm.devices import console

Guest = Callable[[str], str]

ROOT = Path(__file__).parents[2]
PATIENCE = 60
RUN = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--net", "none", "--memory", "8M"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm"


def quits(name: str, log: Path) -> None:
    """End the machine once its guest runs, and wait until its process has gone, and with it the
    name, which the next test wants.
    """
    (machine,) = [m for m in machines() if m.name == name]
    # It is no child of ours, so only the descriptor tells its end.
    end = os.pidfd_open(machine.pid)
    until = time.monotonic() + PATIENCE
    while "serial: ready" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)
    with connect(name) as client:
        assert client.command("query-status")["status"] == "running"
        client.command("quit")
    assert select.select([end], [], [], PATIENCE)[0]
    os.close(end)


def test_a_machine_in_the_background(guest: Guest, cache: Path) -> None:
    """Started at a terminal, which it leaves alone: job control cannot stop it."""
    ours, theirs = pty.openpty()
    run = [*RUN, "--kernel", guest("serial"), "--append", "echo=1", "--detach", "--name", "bg"]
    done = subprocess.run(run, cwd=ROOT, stdin=theirs, capture_output=True, timeout=PATIENCE)
    os.close(theirs)
    os.close(ours)
    log = cache / "logs" / "bg.log"
    assert done.returncode == 0, done
    assert done.stderr.decode() == (
        f"pyvmm: bg runs in the background; its output goes to {log}; pyvmm quit bg ends it\n"
    )
    (machine,) = [m for m in machines() if m.name == "bg"]
    status = Path(f"/proc/{machine.pid}/stat").read_text().rpartition(")")[2].split()
    assert status[4] == "0", "it has no terminal"
    assert int(status[3]) == machine.pid, "it leads a session of its own"
    quits("bg", log)


def test_another_may_still_write_to_the_file(guest: Guest, cache: Path, tmp_path: Path) -> None:
    """A machine that is just ending does not hide what the new one says."""
    log, written = tmp_path / "log", 0
    run = [*RUN, "--kernel", guest("serial"), "--append", "echo=1", f"--detach={log}"]
    with log.open("ab", buffering=0) as other:
        new = subprocess.Popen([*run, "--name", "bg"], cwd=ROOT, stdin=subprocess.DEVNULL)
        until = time.monotonic() + PATIENCE
        while new.poll() is None and time.monotonic() < until:
            written += other.write(b"still here\n")
            time.sleep(0.01)
    assert new.returncode == 0 and written
    quits("bg", log)


def test_what_goes_wrong_is_told_here(guest: Guest, tmp_path: Path) -> None:
    run = [*RUN, "--kernel", "/nonexistent", f"--detach={tmp_path}/log", "--name", "bg", "--", "x"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 105
    assert done.stderr.startswith("pyvmm: kernel '/nonexistent' cannot be opened")
    assert done.stderr.count("\n") == 1


def test_the_file_has_a_largest_size(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No guest fills the disk; what is left out is counted and said."""
    monkeypatch.setattr(console, "BACKGROUND_MAX", 20)
    monkeypatch.setenv(DETACHED, "1")
    run = ["--sandbox", "off", "--kernel", guest("hello")]
    run += ["--append", "times=100", "--", "true"]
    assert main([*RUN[3:], *run]) == 101
    out, err = capfd.readouterr()
    beyond = 100 * len("hello, stdout\n") - 20
    assert out == "hello, stdout\nhello,"
    assert f"the file of --detach has its largest size, {beyond} bytes came after it" in err
