"""Completion in bash, zsh and fish: what argcomplete proposes for each argument of a command.

The shell starts ``pyvmm`` itself at each Tab, with the line typed so far in the environment. So the
proposals are those of the parsers. An argument proposes its choices or what is said here, files if
its metavar is that of a file, else nothing.
"""

from __future__ import annotations

import argparse
import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

#: Metavars of arguments that begin with the name of a file or directory.
FILES = re.compile(r"(FILE|DIR|F|K|I|PATH|PROGRAM|KERNEL|SOCKET|TRACE|COMMAND)(?![\w/=])")


def typed_words() -> list[str]:
    """The words before the one that is being completed, without the program's own."""
    try:
        point = int(os.environ.get("COMP_POINT", ""))
    except ValueError:
        point = len(os.environ.get("COMP_LINE", ""))
    line = os.environ.get("COMP_LINE", "")[:point]
    return line.split()[1 : None if line[-1:].isspace() else -1]


def last_of(prefix: str, choices: Iterable[str], separators: str = ",") -> list[str]:
    """A list that is being typed, completed by each of ``choices`` for its last item."""
    end = max(prefix.rfind(separator) for separator in separators) + 1
    return [prefix[:end] + choice for choice in choices if choice.startswith(prefix[end:])]


def cards(prefix: str, **_: Any) -> list[str]:
    """A mode of ``--net``, or a key of that mode, or one of a key's values."""
    from pyvmm.netopt import CHOICES, COMMON_KEYS, GROUPS, MODES, PRESETS

    mode, comma, _keys = prefix.partition(",")
    if not comma:
        return [name for name in (*MODES, *PRESETS) if name.startswith(prefix)]
    key, equals, _value = prefix.rpartition(",")[2].partition("=")
    if not equals:
        keys = (*COMMON_KEYS, *MODES.get(mode, ()), *(("worker",) if mode in PRESETS else ()))
        return last_of(prefix, [f"{name}=" for name in keys])
    values: Iterable[str] = CHOICES.get(key, ())
    if key in ("with", "without"):
        values = GROUPS
    elif key == "switchable":
        values = [name for name in MODES if name not in ("none", "user")]
    return last_of(prefix, values, "=+")


def modes(prefix: str, **_: Any) -> list[str]:
    """One mode or several."""
    from pyvmm.netopt import MODES

    return last_of(prefix, MODES)


def images(prefix: str, **_: Any) -> list[str]:
    """The images that are built."""
    from pyvmm.images import built

    return [image.name for image in built() if image.name.startswith(prefix)]


def troubles(prefix: str, **_: Any) -> list[str]:
    """Kinds of reports of a kernel."""
    from pyvmm.testing.phrases import KINDS

    return last_of(prefix, (*KINDS, "all"))


def actions(prefix: str, **_: Any) -> list[str]:
    """What ``pyvmm testbed`` does but for running a command."""
    from pyvmm.cli.testbed import ACTIONS

    return [action for action in ACTIONS if action.startswith(prefix)]


#: Names of arguments in their commands' namespaces -> what they propose.
PROPOSALS: dict[str, Callable[..., list[str]]] = {
    "net": cards,
    "mode": modes,
    "modes": modes,
    "image": images,
    "kernels": images,
    "fail_on": troubles,
    "words": actions,
}


def propose(parser: argparse.ArgumentParser) -> None:
    """Give the arguments of a parser, and of the parsers below, what they propose."""
    from argcomplete.completers import ChoicesCompleter, FilesCompleter

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                propose(one)
            continue
        if hasattr(action, "completer") or action.choices is not None or action.nargs == 0:
            continue
        proposal: Any = PROPOSALS.get(action.dest)
        if proposal is None:
            metavar = action.metavar if isinstance(action.metavar, str) else ""
            proposal = FilesCompleter() if FILES.match(metavar) else ChoicesCompleter({})
        action.completer = proposal  # type: ignore[attr-defined]


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and end the process; or return if no shell asks."""
    import argcomplete

    propose(parser)
    argcomplete.autocomplete(parser)
