"""Run a command in a running machine; or a program of the host on the other end of its cards.

Examples:
  pyvmm exec vm0 -- uname -r
  pyvmm exec vm0 -- dmesg | tail
  pyvmm exec vm0 -- sh -c 'cat >/tmp/x' <file        a file or a pipe is the command's input
  pyvmm exec -it vm0 -- top                          on a terminal
  pyvmm exec -u nobody -e LANG=C -C /tmp vm0 -- env
  pyvmm exec --timeout 10 vm0 -- ./mytest || echo failed
  pyvmm exec --net vm0 -- tcpdump -ni tap0           on the host, in the cards' network namespace

The guest has an init of `pyvmm image build`. The command's output and errors come apart, of any
length, and its status is pyvmm's. Standard input reaches the command if it is a file, a pipe, or
with -i. Ctrl-C, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 go to the command; a second one of
the first four kills it. If pyvmm exec ends otherwise, the command gets SIGHUP, and SIGKILL a second
later. On a terminal (-t), keys go to the command; Ctrl-A x leaves, Ctrl-A Ctrl-A types Ctrl-A.

Exit status: that of the command (126 it cannot be run, 127 it was not found, 128 + N signal N ended
it); 113 no such machine, 115 the guest takes no commands, 119 the machine has ended (120 and more:
by a panic and the like, docs/exit-codes.md), 124 --timeout, 129 left by Ctrl-A x. With --net, that
of the program.
"""

from __future__ import annotations

import os
import stat
import sys

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

READY_S = 60  # seconds that a guest may take until it takes commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    add_options(parser)
    parser.add_argument(
        "-i",
        "--interactive",
        action="store_true",
        help="pass standard input on, also if it is a terminal",
    )
    parser.add_argument(
        "-t", "--tty", action="store_true", help="give the command a terminal in the guest"
    )
    parser.add_argument(
        "--net",
        action="store_true",
        help="run a program of this host in the network namespace that pyvmm has made for a card",
    )
    parser.add_argument(
        "--nic", type=int, metavar="N", help="with --net: the card (the first with a namespace)"
    )
    parser.add_argument(
        "guest_command", metavar="COMMAND", nargs="+", help="a program and its arguments"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``pyvmm shell`` has as well."""
    parser.add_argument(
        "-u",
        "--user",
        metavar="NAME[:GROUP]",
        help="user in the guest, by name or number (default: root)",
    )
    parser.add_argument(
        "-e",
        "--env",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="environment variable; without a value that of pyvmm's environment",
    )
    parser.add_argument(
        "-C",
        "--cwd",
        metavar="DIR",
        help="working directory (default: the home of --user, or that of the guest's own command)",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=seconds(0.001, 1e6), help="kill the command after S seconds"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns its status."""
    if args.net:
        return _beside(args)
    if args.nic is not None:
        raise UsageError("--nic without --net", "a command in the guest has all cards")
    given = _is_given() or args.interactive or (args.tty and os.isatty(0))
    return attend(args, args.guest_command, terminal=args.tty, input=given)


def _beside(args: argparse.Namespace) -> int:
    """Become the program, in the network namespace of a card."""
    if args.tty or args.interactive or args.user or args.env or args.cwd or args.timeout:
        raise UsageError(
            "--net with an option for the guest", "the program runs on the host, as you are"
        )
    status = remote.there(args)
    if status is not None:
        return status
    from pyvmm.control.client import connect

    with connect(args.name, timeout=remote.TIMEOUT) as client:
        cards = client.command("x-pyvmm-machine")["nets"]
    inside = {card["name"]: card["enter"] for card in cards if card["enter"]}
    name = next(iter(inside), "net0") if args.nic is None else f"net{args.nic}"
    if name not in inside:
        raise UsageError(
            f"{args.name} has no card {name} in a namespace of pyvmm's",
            f"there are: {', '.join(inside) or 'none'}; a tap of yours (tap=) is where you made it",
        )
    os.execv(inside[name][0], [*inside[name], *args.guest_command])


def _is_given() -> bool:
    """Whether standard input is a file or a pipe, which the command reads then."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def attend(args: argparse.Namespace, command: list[str], *, terminal: bool, input: bool) -> int:
    """Run ``command`` in the machine that ``args`` names; returns the exit status.

    :param command: empty for the user's shell. :param terminal: give it a terminal.
    :param input: it reads standard input.
    """
    from pyvmm.devices.guest_frames import describe

    own = 0 if terminal and input and os.isatty(0) else None
    env = _environment(args.env)
    size = None
    if terminal:
        size = _size()
        env.setdefault("TERM", os.environ.get("TERM", "vt100"))
    description = describe(
        command, input=input, user=args.user, env=env, cwd=args.cwd, terminal=size
    )
    status = remote.there(args)
    if status is not None:
        return status
    from pyvmm.control.attach import HUNG_UP, Attached, Left
    from pyvmm.control.client import connect
    from pyvmm.host.attended import attend as attend_to

    with connect(args.name, timeout=remote.TIMEOUT) as client:
        sock, early = client.take_over("x-pyvmm-exec", timeout=READY_S)
    attached: Attached | None = None
    try:
        attached = Attached(sock, early, description, stdin=0 if input else None, terminal=own)
        status = attend_to(attached, args.timeout)
    except Left:
        print("\npyvmm: left; the command has been hung up", file=sys.stderr)
        return HUNG_UP
    finally:
        sock.close()
    if attached.lost is not None:
        raise attached.lost
    return status


def _environment(words: list[str]) -> dict[str, str]:
    """The variables of ``--env``."""
    env: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise UsageError(f"--env {word!r}", "use NAME=VALUE or NAME")
        if equals:
            env[name] = value
        elif name in os.environ:
            env[name] = os.environ[name]
    return env


def _size() -> tuple[int, int]:
    """Columns and rows of this process's terminal; 80 and 24 without one."""
    for fd in (0, 1, 2):
        try:
            size = os.get_terminal_size(fd)
        except OSError:
            continue
        if size.columns and size.lines:
            return size.columns, size.lines
    return 80, 24
