"""The commands as data, from their argparse parsers: the one source of the reference pages and the
man pages. Only the standard library and ``pyvmm.cli`` are needed, so that a build can use it.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from pyvmm import cli
from pyvmm.cli.support.parser import Parser


@dataclass(frozen=True)
class Option:
    """An option or an argument: its spellings with their values, and its help."""

    names: tuple[str, ...]
    value: str
    help: str

    @property
    def heading(self) -> str:
        """As a help text shows the option: ``-o, --output FILE``."""
        return f"{', '.join(self.names)} {self.value}".strip()


@dataclass(frozen=True)
class Part:
    """A piece of a help text: prose, or lines that are shown as they are."""

    text: str
    literal: bool


@dataclass(frozen=True)
class Command:
    """A command or an action of a command, as ``pyvmm nic add``."""

    name: str
    summary: str
    usage: str
    parts: tuple[Part, ...]
    groups: tuple[tuple[str, tuple[Option, ...]], ...]
    actions: tuple[Command, ...]


def parts(text: str) -> Iterator[Part]:
    """The pieces of a docstring. Lines that begin with two spaces are shown as they are."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        piece: list[str] = []
        literal = False
        for line in block.split("\n"):
            if piece and line.startswith("  ") != literal:
                yield Part("\n".join(piece), literal)
                piece = []
            literal = line.startswith("  ")
            piece.append(line.rstrip())
        if piece:
            yield Part("\n".join(piece), literal)


def _option(action: argparse.Action, parser: argparse.ArgumentParser) -> Option:
    formatter = parser._get_formatter()
    text = formatter._expand_help(action) if action.help else ""
    if not action.option_strings:
        name = formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
        return Option((name,), "", text)
    value = ""
    if action.nargs != 0:
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    return Option(tuple(action.option_strings), value, text)


def _command(parser: argparse.ArgumentParser, summary: str) -> Command:
    """The command of a parser, with its actions."""
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, width=80)
    # Python 3.14 would colour the usage if the build has a terminal, or FORCE_COLOR.
    vars(parser)["color"] = False
    actions: list[Command] = []
    groups: list[tuple[str, tuple[Option, ...]]] = []
    for group in parser._action_groups:
        options: list[Option] = []
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
                actions += [_command(p, lines.get(n, "")) for n, p in action.choices.items()]
            elif action.help != argparse.SUPPRESS and action.dest != "help":
                options.append(_option(action, parser))
        if options:
            title = (group.title or "").replace("positional arguments", "arguments")
            groups.append((title, tuple(options)))
    return Command(
        parser.prog,
        summary,
        parser.format_usage().removeprefix("usage: ").replace("\n       ", "\n").rstrip(),
        tuple(parts(parser.description or "")),
        tuple(groups),
        tuple(actions),
    )


def commands() -> list[Command]:
    """All commands of pyvmm, in the order of its help."""
    made = []
    for name, summary in cli.COMMANDS.items():
        module = importlib.import_module(f"pyvmm.cli.{name.replace('-', '_')}")
        parser = Parser(prog=f"pyvmm {name}", description=module.__doc__)
        module.add_arguments(parser)
        made.append(_command(parser, summary))
    return made
