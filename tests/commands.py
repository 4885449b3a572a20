"""The parsers of all commands and of their actions, for tests that hold for each of them."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from pyvmm.cli import COMMANDS
from pyvmm.cli.support.parser import Parser
from pyvmm.cli.support.settings import actions_of


def module_of(command: str) -> str:
    """The name of a command's module."""
    return f"pyvmm.cli.{command.replace('-', '_')}"


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Name and parser: ``nic`` and then ``nic add``."""
    for command in COMMANDS:
        module = importlib.import_module(module_of(command))
        parser = Parser(prog=f"pyvmm {command}", description=module.__doc__)
        module.add_arguments(parser)
        yield command, parser
        yield from ((f"{command} {name}", one) for name, one in actions_of(parser).items())
