"""The man pages: without a warning, and what they show is what --help says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli import COMMANDS
from tools.site import man
from tools.site.commands import commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return man.write(tmp_path_factory.mktemp("man"))


def shown(page: Path) -> str:
    """A page as a reader sees it, on a terminal of any width."""
    command = ["mandoc", "-T", "utf8", "-O", "width=200", str(page)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"\s+", " ", re.sub(r".\x08", "", out))


def test_one_page_per_command(pages: list[Path]) -> None:
    names = {page.name for page in pages}
    assert names == {"pyvmm.1", *(f"pyvmm-{command}.1" for command in COMMANDS)}
    first = shown(next(page for page in pages if page.name == "pyvmm.1"))
    assert all(f"pyvmm {command} {line}" in first for command, line in COMMANDS.items())


def test_a_build_needs_no_other_package() -> None:
    """The pages are made while a wheel is built, where little is installed."""
    code = "from tools.site import man; print(len(man.pages()))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{len(COMMANDS) + 1}\n", "")


def test_the_build_s_environment_colours_nothing() -> None:
    """argparse of Python 3.14 colours a usage if FORCE_COLOR is set."""
    code = "from tools.site import man; print(''.join(man.pages().values()))"
    env = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": ""}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True).stdout
    assert b"pyvmm" in out and b"\x1b" not in out


def test_no_warnings(pages: list[Path]) -> None:
    assert shutil.which("mandoc"), "mandoc is missing: make setup"
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *pages], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


def test_each_text_is_shown_as_it_is(pages: list[Path]) -> None:
    texts = {page.stem: shown(page) for page in pages}
    for command in commands():
        text = texts[command.name.replace(" ", "-")]
        for one in (command, *command.actions):
            for _, options in one.groups:
                for option in options:
                    assert option.heading in text, option.heading
        for part in command.parts:
            words = part.text.removeprefix("Exit status:")
            words = words if part.literal else words.replace("`", "")
            assert " ".join(words.split()[1:]) in text, part.text


def test_text_that_looks_like_a_macro() -> None:
    assert man.text("a\n.TH x\n'quoted'") == "a\n\\&.TH x\n\\(aqquoted\\(aq"
    assert man.prose("use `--net`\\") == "use \\fB\\-\\-net\\fR\\e"


def test_the_date_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert man.date() == "1970-01-02"
