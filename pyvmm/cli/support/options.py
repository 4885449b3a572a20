"""Options: the parser of every command, and types that refuse values that make no sense.

A type raises ``value; remedy``, and the parser puts the option's name before it. The user sees one
line, such as ``--jobs 0; use 1 to 256``.
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import (
    SUPPRESS,
    Action,
    ArgumentError,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)

from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn, TypeVar

    from pyvmm.jailopt import Jail

    Item = TypeVar("Item")

# argparse would look for translations, and load the locale's module for that: a millisecond of each
# start. There are none.
vars(argparse)["_"] = str

#: For help texts: what ``--fail-on`` takes, written out so that help needs no other module.
TROUBLE_KINDS = (
    "panic,oops,bug,lockup,sanitizer,warning,hung-task,rcu-stall,lockdep,oom,alloc,irq,network "
    "or all (docs/verdicts.md)"
)


#: What prints a help text.
HELP = ("-h", "--help")
#: What ``--host`` takes, and how the address of another machine begins.
HOSTS, SSH = ("auto", "local", "testbed"), "ssh://"
#: For help texts: what ``--cpu`` takes.
CPU_HELP = "the CPU: host, and what differs, as in host,-x2apic,vendor=GenuineIntel (docs/cpu.md)"


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

#: For help texts: what ``--add`` and ``--modules`` take.
ADD_HELP = (
    "a file or directory for the guest; repeatable. Without PATH, a program is found by its name, "
    "and anything else is in the command's working directory (docs/add.md)"
)
SHARE_HELP = (
    "a directory of this machine for the guest, at the same path or at PATH, read-only without rw; "
    "repeatable. The command begins in the same directory as pyvmm if it is shared (docs/share.md)"
)
ROOT_HELP = (
    "a tree of this machine, such as /, as the guest's root: read-only, below an overlay that ends "
    "with the guest. COMMAND begins in the same directory as pyvmm (docs/root.md)"
)
INIT_HELP = (
    "with --root: the program of DIR that becomes the guest's process 1: systemd, which boots DIR "
    "as usual and runs COMMAND as a unit; or the path of another init (docs/root.md)"
)
MODULES_HELP = (
    "kernel modules for the guest: what `make modules_install` makes, or a kernel's build tree"
)

JAIL_HELP = (
    "run as user UID in a jail: no file, process or network of the host, and at most this much "
    "memory=SIZE, cpus=N, pids=N (root; docs/jail.md)"
)

#: In the environment of a machine in the background (``detach``), which says RUNNING and its name
#: on stderr as soon as it runs.
DETACHED, RUNNING = "PYVMM_DETACHED", "pyvmm: running in the background:"
#: The bounds below only prevent failures of arithmetic; messages do not name them.
ENDLESS = 1e6


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A type for seconds from ``low`` to ``high``; if ``low`` is 0, the value must be positive."""
    if high >= ENDLESS:
        remedy = f"use {low:g} seconds or more" if low else "use a positive number of seconds"
    else:
        remedy = f"use {low:g} to {high:g} seconds" if low else f"use up to {high:g} seconds"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"invalid float value: {text!r}") from None
        if not low <= value <= high or (not low and not value):  # NaN is not within any bounds
            raise ArgumentTypeError(f"{value:g}; {remedy}")
        return value

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """A type for a whole number, ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"invalid int value: {text!r}") from None
        if not low <= value <= high:
            raise ArgumentTypeError(f"{value}; use {low} to {high}")
        return value

    return parse


def trouble_kinds(text: str) -> list[str]:
    """A type for ``--fail-on``: kinds of reports of the kernel, joined by commas, or ``all``."""
    from pyvmm.testing.console import parse_kinds
    from pyvmm.testing.phrases import KINDS

    try:
        return parse_kinds(text)
    except ValueError as e:
        raise ArgumentTypeError(f"{e}; use {', '.join(KINDS)} or all") from e


def jail(text: str) -> Jail:
    """A type for ``--jail``."""
    from pyvmm.jailopt import Jail

    return Jail(text)


def cpu_model(text: str) -> str:
    """A type for ``--cpu``: the text, checked as far as that goes without a host."""
    from pyvmm.kvm.cpu import Cpu

    Cpu(text)
    return text


def shard(text: str) -> tuple[int, int]:
    """``K/N``: part K of N, from 1/N to N/N. See ``part_of``."""
    part, slash, parts = text.partition("/")
    good = slash and all(
        word.isascii() and word.isdecimal() and len(word) < 5 for word in (part, parts)
    )
    if not good or not 1 <= int(part) <= int(parts):
        raise ArgumentTypeError(f"{text}; write K/N, the part and the number of parts, as 3/10")
    return int(part), int(parts)


#: For help texts: what ``--shard`` takes.
SHARD_HELP = "only part K of N, of equal sizes: for machines or jobs side by side"


def part_of(items: list[Item], which: tuple[int, int] | None) -> list[Item]:
    """Part K of N: every N-th item, so that neighbours, which take alike long, are spread."""
    return items if which is None else items[which[0] - 1 :: which[1]]


def add_host(parser: argparse.ArgumentParser, help: str) -> None:
    """The option ``--host``."""
    option = parser.add_argument(
        "--host",
        type=_host,
        metavar="auto|local|testbed|ssh://[USER@]NAME[:PORT]",
        default="auto",
        help=help,
    )
    option.completer = _hosts  # type: ignore[attr-defined]


def _host(text: str) -> str:
    if text.startswith(SSH) or text in HOSTS:
        return text
    raise argparse.ArgumentTypeError(
        f"invalid choice: {text!r} (choose from {', '.join(map(repr, (*HOSTS, SSH + 'NAME')))})"
    )


def _hosts(prefix: str, **kwargs: Any) -> list[str]:
    return [text for text in (*HOSTS, SSH) if text.startswith(prefix)]
