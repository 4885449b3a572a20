"""Speak the QEMU Machine Protocol with a running machine.

Examples:
  pyvmm qmp vm0                                 a shell with history, if stdin is a terminal
  pyvmm qmp vm0 query-status
  pyvmm qmp vm0 set_link name=net0 up=false
  pyvmm qmp vm0 query-stats target=vcpu 'providers=[{"provider": "kvm", "names": ["exits"]}]'
  echo '{"execute": "stop"}' | pyvmm qmp vm0    one command and one answer per line
  pyvmm qmp vm0 --events                        print events as they come

A command on stdin is written as JSON, or as on the command line. A value that is valid JSON is
taken as JSON; any other value is a string. `pyvmm qmp vm0 x-pyvmm-help` lists the commands, and
docs/control.md describes them.

Exit status: 0, 113 no such machine, 114 a command was refused.
"""

from __future__ import annotations

import sys

from pyvmm.cli.support import remote
from pyvmm.cli.support.results import print_json
from pyvmm.errors import ControlError, MachineMissing, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument("words", metavar="COMMAND [KEY=VALUE...]", nargs="*", help="one command")
    parser.add_argument(
        "--events", action="store_true", help="print events, one per line, until the machine ends"
    )


def run(args: argparse.Namespace) -> int:
    """Run one command, a shell, or the lines of stdin; returns the exit status."""
    status = remote.there(args)
    if status is not None:
        return status
    if not args.words and not args.events and sys.stdin.isatty() and sys.stdout.isatty():
        return _shell(args.name)
    return remote.with_client(args, lambda client: _plain(client, args))


def _shell(name: str) -> int:
    """Run the shell of the library qemu.qmp."""
    from qemu.qmp.qmp_shell import QMPShell

    from pyvmm.control.registry import find

    class Shell(QMPShell):
        """Its banner and its prompt speak of QEMU, and it has no help."""

        def show_banner(self, msg: str = "") -> None:
            """Say whose prompt it is."""
            print(
                f"This is pyvmm's machine {name}. x-pyvmm-help lists the commands; Ctrl-D leaves."
            )

        @property
        def prompt(self) -> str:
            """The machine's name."""
            return f"({name}) "

    with Shell(name if "/" in name else find(name).path, pretty=True) as shell:
        shell.connect()
        for _ in shell.repl():
            pass
    return 0


def _plain(client: Client, args: argparse.Namespace) -> int:

    if args.events:
        try:
            while True:
                print_json(client.next_event(), line=True)
        except MachineMissing:
            return 0
    if args.words:
        print_json(client.execute(*parse(args.words)))
        return 0
    failed = 0
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            result: dict[str, Any] = {"return": client.execute(*_line(line))}
        except ControlError as e:
            failed = e.exit_code
            result = {"error": {"class": e.kind, "desc": e.desc}}
        print_json(result, line=True)
    return failed


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Command and arguments of the words ``COMMAND KEY=VALUE...``.

    :raises UsageError: a word has no ``=``.
    """
    import json

    arguments: dict[str, Any] = {}
    for word in words[1:]:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is no KEY=VALUE", "see pyvmm qmp --help")
        try:
            arguments[key] = json.loads(text)
        except ValueError:
            arguments[key] = text
    return words[0], arguments


def _line(line: str) -> tuple[str, dict[str, Any]]:
    """Command and arguments of a line of stdin, which is a JSON object or words."""
    import json
    import shlex

    if line.lstrip().startswith("{"):
        try:
            request = json.loads(line)
            return str(request["execute"]), dict(request.get("arguments", {}))
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(
                f"{line.strip()[:60]!r} is no command: {e}", "see pyvmm qmp --help"
            ) from e
    try:
        return parse(shlex.split(line))
    except ValueError as e:
        raise UsageError(f"{line.strip()[:60]!r}: {e}", "see pyvmm qmp --help") from e
