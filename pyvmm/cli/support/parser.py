"""The parser of every command: argparse's."""

from __future__ import annotations

import argparse
import os
import re
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentParser,
    RawDescriptionHelpFormatter,
)

from pyvmm.cli.support.options import HELP
from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# argparse would look for translations, and load the locale's module for that: a millisecond of each
# start. There are none. Some texts are None.
vars(argparse)["_"] = lambda text: text


class Parser(ArgumentParser):
    """Prints the description as it is laid out, with ``-h`` only its beginning; takes no
    abbreviations; and raises bad usage as an error of one line, like every other error.
    """

    def __init__(self, *, add_help: bool = True, **options: Any) -> None:
        ours: dict[str, Any] = {"formatter_class": Formatter, "allow_abbrev": False}
        super().__init__(**ours | options, add_help=False)
        if add_help:
            self.add_argument("-h", action=_ShortHelp, help="show this list, and leave")
            self.add_argument(
                "--help", action="help", default=SUPPRESS, help="show all, with examples, and leave"
            )
        self._mixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what may be missing may also stand behind an option: until Python 3.13
        the first positional argument decides for all, so that ``NAME --option WORD`` has no WORD.
        """
        optional = any(a.nargs in ("?", "*") for a in self._get_positional_actions())
        plain = args is None or {"--", *HELP} & set(args) or "_ARGCOMPLETE" in os.environ
        if plain or not optional or self._mixed:
            return super().parse_known_args(args, namespace)
        self._mixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixed = False

    def _check_value(self, action: Action, value: Any) -> None:
        """As argparse's; the error names the choice that is meant."""
        try:
            super()._check_value(action, value)
        except ArgumentError as e:
            meant = did_you_mean(str(value), map(str, action.choices or ()))
            raise ArgumentError(action, f"{e.message}; {meant}see {self.prog} --help") from None

    def error(self, message: str) -> NoReturn:
        """Raise the error. argparse's own errors are "argument OPTION: problem"; those with a
        remedy come from our types, and the remedy of all others is --help.
        """
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        value, semicolon, remedy = problem.partition("; ")
        if semicolon and message.startswith("argument "):
            raise UsageError(f"{argument.partition('/')[0]} {value}", remedy)
        raise UsageError(message, f"see {self.prog} --help")


class _ShortHelp(Action):
    """The option ``-h``."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, "help", nargs=0, default=SUPPRESS, help=options["help"])

    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        from pyvmm.cli.support.helptext import short

        parser._print_message(short(parser, Brief), sys.stdout)
        parser.exit()


class Formatter(RawDescriptionHelpFormatter):
    """argparse makes a formatter for every option. By default each formatter imports shutil and
    asks for the terminal's width; this class asks once.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width())

    def _format_usage(self, *args: Any) -> str:
        """From Python 3.13 on, argparse keeps the words of a positional argument in one line,
        however narrow that is.
        """
        text: str = super()._format_usage(*args)
        if max(map(len, text.splitlines())) <= self._width:
            return text
        lines, indent = [""], " " * len("usage: ")
        for part in re.findall(r"\[.*?\]+(?=\s|$)|\(.*?\)+(?=\s|$)|\S+", text):
            if len(lines[-1]) + len(part) > self._width:
                lines.append(indent)
            lines[-1] += f"{part} "
        return "\n".join(line.rstrip() for line in lines) + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The description; argparse calls it with the formatter's width."""
        from pyvmm.cli.support.helptext import fill

        return fill(text, self._width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        from pyvmm.cli.support.helptext import lines

        return lines(text, width)


class Brief(Formatter):
    """One line per option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._max_help_position = min(28, max(self._width - 24, 8))

    def _split_lines(self, text: str, width: int) -> list[str]:
        from pyvmm.cli.support.helptext import brief

        return [brief(" ".join(text.split()).replace("see below", "see --help"), width)]


def _width() -> int:
    """Columns of a help text, as argparse has it: two less than the terminal's."""
    global _columns
    if not _columns:
        try:
            _columns = int(os.environ.get("COLUMNS", ""))
        except ValueError:
            try:
                _columns = os.get_terminal_size(1).columns or 80
            except (OSError, ValueError):
                _columns = 80
    return _columns - 2


_columns = 0  # 0: the terminal has not been asked yet
