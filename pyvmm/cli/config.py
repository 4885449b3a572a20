"""Show the configuration: which file is read, and which options it sets.

Examples:
  pyvmm config
  pyvmm config --json
  pyvmm --config ci/pyvmm.toml config

The file ~/.config/pyvmm/config.toml has defaults for options, in one table per command: [run] and,
below it, memory = "1G". It must belong to the user, and nobody else may write it. --config FILE
before the command, or an absolute path in PYVMM_CONFIG, names another file; an empty name stands
for none. The current directory is never searched. See docs/config.md.

Exit status: 0, 2 the file cannot be read, or something in it is no option.
"""

from __future__ import annotations

from pyvmm.cli import COMMANDS
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.settings import Settings, actions_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_json(parser, "an object")


def run(args: argparse.Namespace) -> int:
    """Check all tables, then print what they set."""
    import json
    from pathlib import Path

    settings = Settings(COMMANDS, args.config_file)
    found = dict(_all(settings))
    there = bool(settings.path) and Path(settings.path).exists()
    if args.json:
        document = {"file": settings.path, "named_by": settings.why, "exists": there}
        print_json({**document, "settings": found})
        return 0
    because = f" ({settings.why})" if settings.why else ""
    if not there:
        print(f"no configuration: there is no {settings.path or 'file'}{because}")
        return 0
    print(f"{settings.path}{because}")
    for name, value in found.items():
        print(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return 0


def _all(settings: Settings) -> Iterator[tuple[str, object]]:
    """Name and value of all settings, each of which has been checked."""
    import importlib

    from pyvmm.cli.support.parser import Parser

    for command, table in settings.table.items():
        parser = Parser(prog=f"pyvmm {command}")
        importlib.import_module(f"pyvmm.cli.{command.replace('-', '_')}").add_arguments(parser)
        settings.words(parser, command, [])
        actions = actions_of(parser)
        for key, value in table.items():
            if key in actions and isinstance(value, dict):
                settings.words(actions[key], f"{command}.{key}", [])
                yield from ((f"{command}.{key}.{name}", one) for name, one in value.items())
            else:
                yield f"{command}.{key}", value
