"""The configuration file: defaults for the options of commands, in TOML.

    [run]
    memory = "1G"
    net = ["vhost-net,mtu=9000"]

    [image.build]
    kernel-version = "6.12"

A setting is an option's name without its dashes. The settings of a command become words of its
command line, unless the user gives the option. So everything that takes part in a command, such as
the testbed, gets them as it gets all options.

The file is ``~/.config/pyvmm/config.toml``, or one that the user names. The current directory is
not searched, because its owner may be anybody.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping
    from typing import Any

#: Names the file by its absolute path; empty: there is none.
VARIABLE = "PYVMM_CONFIG"
#: Larger files are no configuration.
SIZE_MAX = 1 << 20


class Settings:
    """The content of a configuration file; empty without a file.

    :ivar path: the file that is read, or would be if it were there; empty: none.
    :ivar why: what named the file: ``--config``, the variable, or empty for the user's own file.
    :ivar table: command -> its table.
    """

    def __init__(self, commands: Mapping[str, str], named: str | None = None) -> None:
        """Read the file.

        :param commands: the names that tables may have.
        :param named: the file of ``--config``; empty: no file; None: not given.
        :raises UsageError: a named file is not there; others than the user may have written the
            file; the file is not TOML, or its tables are no commands.
        """
        self.path, self.why = _place(named)
        self.table: dict[str, dict[str, Any]] = {}
        data = _read(self.path, trusted=bool(self.why)) if self.path else None
        if data is not None:
            self._take(data, commands)

    def _take(self, data: bytes, commands: Mapping[str, str]) -> None:
        import tomllib

        try:
            document = tomllib.loads(data.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise UsageError(f"{self.path} is not TOML: {e}", "correct it") from e
        for name, table in document.items():
            if name not in commands:
                hint = did_you_mean(name, commands) or "its tables are commands, such as [run]"
                raise UsageError(f"{self.path}: {name}: there is no such command", hint)
            if not isinstance(table, dict):
                raise UsageError(f"{self.path}: {name}: not a table", f"write [{name}]")
            self.table[name] = table

    def words(
        self, parser: argparse.ArgumentParser, command: str, typed: list[str]
    ) -> tuple[list[str], dict[str, str]]:
        """The settings of a command, as options for its command line.

        :param parser: the command's, or of one of its actions. :param command: ``run`` or, for an
            action, ``image.build``. :param typed: the user's words, whose options are left out.
        :returns: the words, and the name in the file of each option among them.
        :raises UsageError: a setting is no option of the command, or has no fitting value.
        """
        table: Any = self.table
        for name in command.split("."):
            table = table.get(name, {}) if isinstance(table, dict) else {}
        words: list[str] = []
        names: dict[str, str] = {}
        for key, value in table.items():
            name = f"{self.path}: {command}.{key}"
            if isinstance(value, dict) and key in actions_of(parser):
                continue
            action = parser._option_string_actions.get(f"--{key}")
            if action is None or action.dest == "help":
                known = [o[2:] for o in parser._option_string_actions if o.startswith("--")]
                hint = did_you_mean(key, known) or f"see pyvmm {command.replace('.', ' ')} --help"
                raise UsageError(f"{name}: there is no such option", hint)
            made = [*_option(action, f"--{key}", value, name)]
            if not any(_names(word, action) for word in typed):
                words += made
                names[f"--{key}"] = name
        return words, names


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The actions of a command, such as ``build`` of ``image``."""
    import argparse  # here: without a file, and with usual words, nothing needs argparse

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _names(word: str, action: argparse.Action) -> bool:
    """Whether a word of a command line is this option."""
    return any(
        word == option or word.startswith(f"{option}=" if option.startswith("--") else option)
        for option in action.option_strings
    )


def _option(action: argparse.Action, option: str, value: Any, name: str) -> Iterator[str]:
    """The words for one setting."""
    import argparse

    if action.nargs == 0 or (action.nargs == "?" and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise UsageError(f"{name}: {value!r} is no boolean", "use true or false")
        yield from [option] * value
        return
    many = isinstance(action, argparse._AppendAction)
    values = value if many and isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            kinds = "text, a number or a list of them" if many else "text or a number"
            raise UsageError(f"{name}: {one!r} is no value for {option}", f"use {kinds}")
        yield f"{option}={one}"


def _place(named: str | None) -> tuple[str, str]:
    """The file's path, and what named it."""
    if named is not None:
        return (os.path.abspath(named) if named else ""), "--config"
    named = os.environ.get(VARIABLE)
    if named is not None:
        if named and not named.startswith("/"):
            raise UsageError(f"{VARIABLE}={named} is no absolute path", "write the whole path")
        return named, VARIABLE
    base = os.environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):  # the XDG specification: a relative path is to be ignored
        base = os.path.expanduser("~/.config")
    return (f"{base}/pyvmm/config.toml" if base.startswith("/") else ""), ""


def _read(path: str, *, trusted: bool) -> bytes | None:
    """The content of a file, or None if the user's own file is not there.

    :param trusted: the user has named the file, and so vouches for it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as e:
        if not trusted and isinstance(e, FileNotFoundError | NotADirectoryError):
            return None
        raise UsageError(f"{path}: {e.strerror}", "name another file, or correct it") from e
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise UsageError(f"{path} is no regular file", "name another file")
        if not trusted:
            directory = os.path.dirname(path)
            _check_owner(directory, os.stat(directory))
            _check_owner(path, info)
        data = os.read(fd, SIZE_MAX + 1)
    finally:
        os.close(fd)
    if len(data) > SIZE_MAX:
        raise UsageError(f"{path} is larger than 1 MiB", "name another file")
    return data


def _check_owner(path: str, info: os.stat_result) -> None:
    """Refuse a file or directory that somebody else may have written."""
    user = os.geteuid()
    if info.st_uid not in (user, 0):
        raise UsageError(
            f"{path} belongs to user {info.st_uid}, and this is user {user}",
            f"do without: pyvmm --config '' COMMAND; or name a file: --config FILE, {VARIABLE}",
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"{path} may be written by others", f"chmod go-w {path}")


def applied(
    args: list[str],
    parser: argparse.ArgumentParser,
    commands: Mapping[str, str],
    named: str | None,
) -> tuple[list[str], dict[str, str]]:
    """A command line with the settings of the configuration file.

    :param args: the command line from the command on. :param parser: the command's.
    :returns: the command line, and for each added option its name in the file.
    :raises UsageError: as ``Settings`` and ``Settings.words``.
    """
    settings = Settings(commands, named)
    if settings.table or settings.why == "--config":
        # Whatever takes part in the command gets the words, and must not read a file.
        os.environ[VARIABLE] = ""
    if not settings.table:
        return args, {}
    at = next(i for i, word in enumerate(args) if not word.startswith("-")) + 1
    names = [args[at - 1]]
    if len(args) > at and args[at] in (actions := actions_of(parser)):
        settings.words(parser, names[0], [])  # the table's own keys are checked, too
        parser = actions[args[at]]
        names.append(args[at])
        at += 1
    typed = args[at : args.index("--", at) if "--" in args[at:] else None]
    words, origins = settings.words(parser, ".".join(names), typed)
    return [*args[:at], *words, *args[at:]], origins


def blamed(error: UsageError, origins: dict[str, str]) -> UsageError:
    """The error, with the file and the setting if the wrong option comes from there."""
    for option, name in origins.items():
        cause = error.cause.removeprefix("argument ")
        if cause.startswith((f"{option} ", f"{option}:", f"{option}=")):
            return UsageError(f"{name}: {cause}", error.hint)
    return error
