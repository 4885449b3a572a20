"""Completion in real shells: what the user types, up to Tab, and what the shell makes of it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli.support import completion

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
#: What the wheel puts where bash-completion, zsh and fish look.
INSTALLED = ROOT / "tools/completions"


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's environment, with pyvmm on the PATH and an image built."""
    home = tmp_path_factory.mktemp("home")
    (home / "bin").mkdir()
    program = home / "bin/pyvmm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pyvmm "$@"\n')
    program.chmod(0o755)
    image = home / ".cache/pyvmm/images/default"
    image.mkdir(parents=True)
    for name in ("vmlinux", "bzImage", "initrd", "image.json"):
        (image / name).write_text("{}")
    (home / "a-kernel").touch()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("_ARG", "XDG_"))}
    return {
        **keep,
        "HOME": str(home),
        "PATH": f"{home}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYVMM_IN_TESTBED": "1",  # no testbed is asked for its machines
        "TERM": "dumb",
    }


class Shell:
    """An interactive shell on a terminal, which completes at Tab."""

    START = {
        "bash": (["--norc", "-i"], 'PS1="> "; eval "$(pyvmm completion bash)"'),
        "bash, installed": (["--norc", "-i"], f'PS1="> "; . "{INSTALLED}/pyvmm"'),
        "zsh, installed": (
            ["-f", "-i"],
            f'PS1="> "; fpath=("{INSTALLED}" $fpath); autoload -U compinit; compinit -u -D',
        ),
        "zsh": (
            ["-f", "-i"],
            'PS1="> "; autoload -U compinit; compinit -u -D; eval "$(pyvmm completion zsh)"',
        ),
    }

    def __init__(self, name: str, env: dict[str, str]) -> None:
        program = shutil.which(name.partition(",")[0])
        assert program, f"{name} is missing: make setup"
        words, start = self.START[name]
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", program, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=env["HOME"],
            env=env,
        )
        os.close(slave)
        self.text = ""
        self.type(f"{start}; echo re''ady\n", "ready")

    def type(self, keys: str, until: str) -> None:
        """Type, and wait for what the terminal shows then."""
        at = len(self.text)
        os.write(self.master, keys.encode())
        end = time.monotonic() + PATIENCE
        while not re.search(until, self.text[at:]):
            left = end - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            assert ready, f"{keys!r} shows {self.text[at:]!r}, not {until!r}"
            self.text += os.read(self.master, 65536).decode(errors="replace").replace("\r", "")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.parametrize("name", Shell.START)
def test_tab_completes_a_line(name: str, env: dict[str, str]) -> None:
    shell = Shell(name, env)
    clear = "\x15"  # Ctrl-U
    try:
        shell.type("pyvmm swi\t", "switch ")
        shell.type(f"{clear}pyvmm run --hang\t", "--hang-timeout ")
        shell.type(f"{clear}pyvmm run --host test\t", "testbed ")
        shell.type(f"{clear}pyvmm run --image de\t", "default ")
        shell.type(f"{clear}pyvmm run --net emulated,queue-s\t", "queue-size=")
        shell.type(f"{clear}pyvmm run --kernel a-k\t", "a-kernel ")
        shell.type(f"{clear}pyvmm nic re\t", "remove ")
        shell.type(f"{clear}pyvmm image build --ti\t", "--tiny ")
    finally:
        shell.close()


FISH = {
    "swi": {"switch"},
    "run --hang": {"--hang-timeout"},
    "run --host ": {"auto", "local", "testbed", "ssh://"},
    "run --image ": {"default"},
    "run --net emulated,queue": {"emulated,queue-size=", "emulated,queues="},
    "run --kernel a-k": {"a-kernel"},
    "run --cpus ": set(),
    "nic ": {"add", "remove", "list", "-h", "--help"},
    "image build --ti": {"--tiny"},
}


@pytest.mark.parametrize(
    "start", ["pyvmm completion fish | source", f"set -p fish_complete_path {INSTALLED}"]
)
def test_fish_completes(env: dict[str, str], start: str) -> None:
    assert shutil.which("fish"), "fish is missing: make setup"
    script = f"{start}\n" + "".join(f"complete -C 'pyvmm {line}'; echo @\n" for line in FISH)
    command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(command, env=env, cwd=env["HOME"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [set(re.findall(r"(?m)^[^\t\n]+", part)) for part in done.stdout.split("@\n")]
    for line, answer in zip(FISH, answers, strict=False):
        assert answer == FISH[line], line
    assert "switch\tchange the data path" in done.stdout  # with the line of the help


# --- what is proposed -----------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv("COMP_POINT", raising=False)
    yield monkeypatch


def test_words_before_the_present_one(typed: pytest.MonkeyPatch) -> None:
    typed.setenv("COMP_LINE", "pyvmm run --net ")
    assert completion.typed_words() == ["run", "--net"]
    typed.setenv("COMP_LINE", "pyvmm run --ne")
    assert completion.typed_words() == ["run"]
    typed.setenv("COMP_POINT", "8")
    assert completion.typed_words() == []


def test_cards() -> None:
    assert completion.cards("vhost-") == ["vhost-net", "vhost-user", "vhost-vdpa"]
    assert completion.cards("vhost-user,so") == ["vhost-user,socket="]
    assert completion.cards("emulated,mtu=9000,notify=e") == ["emulated,mtu=9000,notify=exit"]
    assert completion.cards("emulated,without=tso+us") == ["emulated,without=tso+uso"]
    assert completion.cards("emulated,mtu=9") == []
    assert completion.troubles("oops,war") == ["oops,warning"]
    assert completion.modes("emulated,vhost-u") == ["emulated,vhost-user"]
