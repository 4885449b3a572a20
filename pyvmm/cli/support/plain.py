"""Reads the usual command lines without argparse, which takes longer to load and to set up than a
machine to make.

A command declares its options once, by ``add_arguments(parser)``. ``Plain`` is a parser that keeps
the declarations, and reads a command line of which every word is clear: known options with values
that fit, then ``--`` and the rest. About any other line it says nothing. argparse then reads the
line from the same declarations, so that errors, help, abbreviations and odd orders have one home.
"""

from __future__ import annotations

from types import SimpleNamespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class NotPlain(Exception):
    """The command, or this command line, is argparse's."""


class Option:
    """A declaration: the parameters of argparse's ``add_argument``, as far as ``Plain`` knows
    them.

    :raises NotPlain: it does not know one of them.
    """

    def __init__(
        self,
        *names: str,
        action: str = "store",
        nargs: str | None = None,
        const: Any = None,
        default: Any = None,
        type: Any = str,
        choices: Sequence[Any] | None = None,
        help: str = "",
        metavar: str = "",
        **more: Any,
    ) -> None:
        self.positional = not names[0].startswith("-")
        known = {"*"} if self.positional else {None, "?"}
        if action not in ("store", "append", "store_true") or nargs not in known:
            raise NotPlain
        if more or (nargs is not None and (action != "store" or choices is not None)):
            raise NotPlain
        long = next((name for name in names if name.startswith("--")), names[0])
        self.names, self.dest = names, long.lstrip("-").replace("-", "_")
        self.action, self.nargs, self.const, self.choices = action, nargs, const, choices
        self.default, self.type = default, type
        if action == "store_true":
            self.default = False
        elif self.positional:
            self.default = []
        elif isinstance(default, str):
            self.default = type(default)

    def take(self, out: SimpleNamespace, text: str) -> None:
        """Note a value.

        :raises Exception: it is none.
        """
        value = self.type(text)
        if self.choices is not None and value not in self.choices:
            raise NotPlain
        if self.action == "append":
            value = [*(getattr(out, self.dest) or ()), value]
        setattr(out, self.dest, value)


class Plain:
    """Keeps what ``add_arguments`` declares."""

    def __init__(self) -> None:
        self._options: dict[str, Option] = {}
        self._rest: Option | None = None

    def add_argument(self, *names: str, **about: Any) -> Option:
        """As argparse's. :raises NotPlain: only argparse can do this."""
        option = Option(*names, **about)
        if option.positional and self._rest is not None:
            raise NotPlain
        if option.positional:
            self._rest = option
        else:
            self._options |= dict.fromkeys(names, option)
        return option

    def __getattr__(self, name: str) -> Any:
        raise NotPlain  # groups, sub-commands and whatever else argparse has

    def parse(self, words: Sequence[str]) -> SimpleNamespace | None:
        """The options and the rest as attributes; None if the words are argparse's."""
        try:
            return self._parse(words)
        except Exception:  # a type refuses its value: argparse says what is wrong with it
            return None

    def _parse(self, words: Sequence[str]) -> SimpleNamespace:
        declared = {id(option): option for option in self._options.values()}.values()
        out = SimpleNamespace(**{option.dest: option.default for option in declared})
        left = iter(words)
        rest: list[str] = []
        word = next(left, None)
        while word is not None:
            if word == "--":
                if self._rest is None:
                    raise NotPlain
                rest = list(left)
                break
            name, equals, text = word.partition("=")
            option = self._options.get(name if name.startswith("--") else word)
            if option is None:
                raise NotPlain
            word = next(left, None)
            if option.action == "store_true":
                if equals:
                    raise NotPlain
                setattr(out, option.dest, True)
            elif equals:
                option.take(out, text)
            elif word is not None and not word.startswith("-"):
                option.take(out, word)
                word = next(left, None)
            elif option.nargs == "?":
                setattr(out, option.dest, option.const)
            else:
                raise NotPlain
        if self._rest is None:
            if rest:
                raise NotPlain
        else:
            setattr(out, self._rest.dest, [self._rest.type(text) for text in rest])
        return out
