"""``pyvmm/cli`` has one module per command, and nothing else; its help is laid out by hand."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from pyvmm.cli import COMMANDS

CLI = Path(__file__).resolve().parents[2] / "pyvmm" / "cli"
EXAMPLE = re.compile(r"  (?:pyvmm|\S.*[|&] pyvmm) [a-z-]+\b")


def path(command: str) -> Path:
    return CLI / f"{command.replace('-', '_')}.py"


def test_each_module_is_a_command_and_each_command_a_module() -> None:
    """What commands share is in ``cli/support``."""
    modules = {p for p in CLI.glob("*.py") if p.name != "__init__.py"}
    assert modules == {path(command) for command in COMMANDS}
    assert {p.name for p in CLI.iterdir() if p.is_dir()} - {"__pycache__"} == {"support"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_two_functions(command: str) -> None:
    module = importlib.import_module(f"pyvmm.cli.{path(command).stem}")
    assert list(inspect.signature(module.add_arguments).parameters) == ["parser"]
    assert list(inspect.signature(module.run).parameters) == ["args"]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_take_one_line_each(command: str) -> None:
    """A docstring is printed as it is, so that no tool may fill its paragraphs."""
    text = importlib.import_module(f"pyvmm.cli.{path(command).stem}").__doc__ or ""
    assert all(len(line) <= 100 for line in text.splitlines())
    if "Example" not in text:
        return
    block = re.split(r"^Examples?:\n", text, flags=re.MULTILINE)[1].partition("\n\n")[0]
    wrong = [line for line in block.splitlines() if not EXAMPLE.match(line)]
    assert not wrong, f"{command}: {wrong}"
