"""Speak the QEMU Machine Protocol with a running machine.

Examples:
  pyvmm qmp vm0                                 a shell with history, if stdin is a terminal
  pyvmm qmp vm0 query-status
  pyvmm qmp vm0 set_link name=net0 up=false
  pyvmm qmp vm0 query-stats target=vcpu 'providers=[{"provider": "kvm", "names": ["exits"]}]'
  echo '{"execute": "stop"}' | pyvmm qmp vm0    one command and one answer per line
  pyvmm qmp vm0 --events                        print events as they come
  pyvmm qmp vm0 --raw                           the protocol itself on stdin and stdout

A command on stdin is written as JSON, or as on the command line. A value that is valid JSON is
taken as JSON; any other value is a string. `pyvmm qmp vm0 x-pyvmm-help` lists the commands, and
docs/control.md describes them. --raw passes bytes on as they are, for programs that speak QMP with
a machine in the testbed or on another host.

Exit status: 0, 113 no such machine, 114 a command was refused.
"""

from __future__ import annotations

import os
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
    parser.add_argument(
        "--raw", action="store_true", help="carry the protocol as it is, until either side ends"
    )


def run(args: argparse.Namespace) -> int:
    """Run one command, a shell, or the lines of stdin; returns the exit status."""
    if args.raw and (args.words or args.events):
        raise UsageError("--raw with a command or --events", "write the command on stdin")
    status = remote.there(args)
    if status is not None:
        return status
    if args.raw:
        return _raw(args.name)
    if not args.words and not args.events and sys.stdin.isatty() and sys.stdout.isatty():
        return _shell(args.name)
    return remote.with_client(args, lambda client: _plain(client, args))


def _raw(name: str) -> int:
    """Carry bytes between stdin, stdout and the machine's socket."""
    import select
    from socket import MSG_DONTWAIT, SHUT_WR

    from pyvmm.control.client import dial, socket_of

    with dial(socket_of(name)) as sock:
        pending, reading = b"", True
        while True:
            # What the machine has not taken yet is all that is read of stdin, but its answers are
            # always passed on.
            poll = select.poll()
            poll.register(sock, select.POLLIN | (select.POLLOUT if pending else 0))
            if reading and not pending:
                poll.register(0, select.POLLIN)
            for fd, mask in poll.poll():
                if fd == 0:
                    pending = os.read(0, 65536)
                    if not pending:  # answers to what was asked may still come
                        sock.shutdown(SHUT_WR)
                        reading = False
                    continue
                if mask & select.POLLOUT:
                    pending = pending[sock.send(pending, MSG_DONTWAIT) :]
                if mask & ~select.POLLOUT:
                    data = sock.recv(65536)
                    if not data:
                        return 0
                    while data:
                        data = data[os.write(1, data) :]


def _shell(name: str) -> int:
    """Run the shell of the library qemu.qmp."""
    from qemu.qmp.qmp_shell import QMPShell

    from pyvmm.control.client import socket_of

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

    with Shell(socket_of(name), pretty=True) as shell:
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
