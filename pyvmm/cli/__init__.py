"""The command line: ``pyvmm COMMAND ...``.

Each command is a module of its own with ``add_arguments(parser)`` and ``run(args) -> exit status``;
its docstring is its help text. The code that commands share is in ``pyvmm.cli.support``. Only the
module of the given command is imported, so that start-up stays short. Nothing outside of this
package prints or exits.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys

from pyvmm import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from types import ModuleType, SimpleNamespace
    from typing import NoReturn

    from pyvmm.errors import UsageError

#: Command -> its line in ``pyvmm --help``. Its module is pyvmm.cli.COMMAND, with "_" for "-".
COMMANDS = {
    "run": "boot a guest and run a command or a console in it",
    "test": "boot test kernels, with a verdict for each, TAP and JUnit",
    "compare": "run the same workload on several data paths, and say what each costs",
    "matrix": "boot kernels on each data path with each set of features, one row per boot",
    "trace": "explain the trace of a run: a page with sequence diagrams",
    "demo": "show a guest's virtio-net card at work, from discovery to the count of exits",
    "doctor": "say what this machine can do, and how to get what is missing",
    "image": "build and list guest images",
    "backend": "serve vhost-user-net: move another machine's packets",
    "vhost-user": "try out a vhost-user back-end without a guest",
    "ps": "list the running machines",
    "exec": "run a command in a running guest",
    "shell": "open a shell in a running machine",
    "stats": "show KVM's statistics of a running machine",
    "top": "show a running machine's rates: exits by cause, packets, interrupts",
    "watch": "show a running machine's virtqueues and rates as a live page",
    "capture": "capture a running machine's packets, for Wireshark",
    "fault": "lose, delay, repeat or damage a running machine's packets on purpose",
    "rings": "draw the virtqueues of a running machine",
    "switch": "change the data path of a running machine's card",
    "nic": "add and remove cards of a running machine, and list them",
    "stop": "pause a running machine",
    "cont": "let a paused machine go on",
    "reset": "press a running machine's reset button",
    "powerdown": "press a running machine's power button",
    "quit": "end a running machine at once",
    "qmp": "speak the QEMU Machine Protocol with a running machine",
    "testbed": "run a command in a virtual machine that has real KVM and vhost-net",
    "config": "show the configuration file's settings",
    "completion": "print what makes bash, zsh or fish complete commands",
}

#: So many more objects than are freed are made before the garbage collector looks at them. What a
#: start makes stays, and to look at it again and again takes as long as to load ten modules.
YOUNG_OBJECTS = 20_000
#: The errors of a write to a full or failing disk.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``pyvmm`` command; returns the exit status. Without ``argv`` the process
    is the command's own: the command takes the process's arguments and SIGALRM, and ends the
    process (``_leave``).
    """
    if argv is not None:
        return guard(lambda: _main(argv))
    gc.set_threshold(YOUNG_OBJECTS)
    # Others may not write what this command makes: some of that is run later. Containers often have
    # no umask at all.
    os.umask(os.umask(0o077) | 0o002)
    try:
        from pyvmm.cli.support.swallowed import raise_again
        from pyvmm.fd import open_standard_descriptors
        from pyvmm.programs import distrust_current_directory

        open_standard_descriptors()
        distrust_current_directory()
        raise_again()
        if getattr(sys.stdout, "errors", "") == "strict":
            # Whatever a guest or a file's name has in it, as standard error does.
            sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    except KeyboardInterrupt:
        return 130
    _leave(guard(lambda: _main(sys.argv[1:])))


def _leave(status: int) -> NoReturn:
    """End the process as the interpreter does, but without taking itself to pieces first: to free
    each object by itself takes as long as the start of Python, and the kernel frees all at once.
    """
    try:
        try:
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
        finally:  # temporary directories go, too, if Ctrl-C ends the wait for threads
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except KeyboardInterrupt:
        status = status or 130
    except OSError:
        pass  # ``guard`` has told of what the command has printed
    finally:
        os._exit(status & 0xFF)


def _main(args: list[str]) -> int:
    completing = "_ARGCOMPLETE" in os.environ
    plain = None if completing else _plain(args)
    if plain is not None:
        return int(plain.run(plain))
    from pyvmm.cli.support.options import HELP
    from pyvmm.cli.support.parser import Parser
    from pyvmm.errors import UsageError

    parser = Parser(
        prog="pyvmm",
        description="A small KVM hypervisor built around one device: virtio-net.",
        epilog="Examples:\n  pyvmm doctor\n  pyvmm run -- ip addr\n"
        "  pyvmm run --net emulated,mtu=9000\n\n"
        "Exit codes are listed in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument(
        "--config",
        metavar="FILE",
        dest="config_file",
        help="the configuration file, before COMMAND; empty: none",
    )
    if completing:
        from pyvmm.cli.support.completion import complete, typed_words

        args = typed_words()
    named, args = _config_file(args)
    chosen = next((a for a in args if not a.startswith("-")), None)
    one = None
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        if chosen in COMMANDS and name != chosen:
            continue  # each parser takes a millisecond, and ten under emulation
        if name == chosen:
            module = _module(name)
            one = sub.add_parser(name, help=text, description=module.__doc__)
            module.add_arguments(one)
            one.set_defaults(run=module.run, known_options=list(one._option_string_actions))
        else:
            sub.add_parser(name, help=text, add_help=False)
    if completing:
        complete(parser)
    if chosen is not None and chosen not in COMMANDS:
        from pyvmm.errors import did_you_mean

        raise UsageError(
            f"there is no command {chosen!r}", f"{did_you_mean(chosen, COMMANDS)}see pyvmm --help"
        )
    origins: dict[str, str] = {}
    own = args[: args.index("--") if "--" in args else None]
    if one is not None and chosen != "config" and not {*HELP} & set(own):
        from pyvmm.cli.support.settings import applied

        args, origins = applied(args, one, COMMANDS, named)
    try:
        return _run(parser, args, named)
    except UsageError as e:
        if not origins:
            raise
        from pyvmm.cli.support.settings import blamed

        raise blamed(e, origins) from e


def _module(command: str) -> ModuleType:
    name = f"pyvmm.cli.{command.replace('-', '_')}"
    __import__(name)
    return sys.modules[name]


def _plain(args: list[str]) -> SimpleNamespace | None:
    """A command line as ``_run`` has it, read without argparse; None if argparse has to read it.

    :raises UsageError: the configuration file is bad.
    """
    if not args or args[0] not in COMMANDS or args[0] == "config":
        return None
    from pyvmm.cli.support.plain import NotPlain, Plain

    module, parser = _module(args[0]), Plain()
    try:
        module.add_arguments(parser)
    except NotPlain:
        return None
    ns = parser.parse(args[1:])
    if ns is None:
        return None
    from pyvmm.cli.support.settings import Settings

    if Settings(COMMANDS).table:
        return None
    ns.command, ns.run, ns.argv = args[0], module.run, args
    ns.config_file, ns.version = None, False
    return ns


def _config_file(args: list[str]) -> tuple[str | None, list[str]]:
    """The file of ``--config`` before the command, or None, and the other words."""
    if args and args[0].startswith("--config="):
        return args[0].partition("=")[2], args[1:]
    if len(args) > 1 and args[0] == "--config":
        return args[1], args[2:]
    return None, args


def _run(parser: argparse.ArgumentParser, args: list[str], named: str | None) -> int:
    """Parse a command line that is complete, and run its command; returns the exit status."""
    ns, rest = parser.parse_known_args(args)
    if rest:
        raise _unrecognized(args, rest, ns)
    ns.argv = args
    ns.config_file = named
    if ns.version:
        print(f"pyvmm {__version__}")
        return 0
    if ns.command is None:
        parser.print_help()
        return 2
    return int(ns.run(ns))


def _unrecognized(args: list[str], rest: list[str], ns: argparse.Namespace) -> UsageError:
    """The error for options that the command does not have."""
    from pyvmm.errors import UsageError, did_you_mean

    guest: list[str] = getattr(ns, "guest_command", None) or []
    if guest and "--" not in args and rest[0] in args[args.index(guest[0]) :]:
        import shlex

        at = args.index(guest[0])
        right = f"pyvmm {shlex.join(args[:at])} -- {shlex.join(args[at:])}"
        hint = f"put -- before the guest's command: {right}"
    else:
        known = getattr(ns, "known_options", ())
        hint = f"see pyvmm {ns.command or ''}".rstrip() + " --help"
        if rest[0] in known:
            hint = f"options come after the command: pyvmm {ns.command} {rest[0]}; {hint}"
        else:
            hint = did_you_mean(rest[0], known) + hint
    return UsageError(f"unrecognized arguments: {' '.join(rest)}", hint)


def guard(body: Callable[[], int]) -> int:
    """Run ``body``; turn its exceptions into one line on stderr and an exit status. The status is
    not 0 if printed text does not reach its reader.
    """
    status = 0
    try:
        from pyvmm.errors import PyvmmError

        try:
            status = body()
        except PyvmmError as e:
            print(f"pyvmm: {e}", file=sys.stderr)
            status = e.exit_code
        except SystemExit:  # --help; argparse of Python 3.13 does not say that it cannot print
            _flush()
            raise
        _flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _give_up_stdout()
        return status or 141
    except OSError as e:
        from pyvmm.host.paths import cache_trouble

        if line := cache_trouble(e):
            print(f"pyvmm: {line}", file=sys.stderr)
            return status or 101
        if e.errno not in NO_ROOM:
            raise
        _give_up_stdout()
        print(f"pyvmm: cannot write all of the output: {e.strerror}", file=sys.stderr)
        return status or 101


def _flush() -> None:
    if sys.stdout is not None:  # it is None in a program that was started without one
        sys.stdout.flush()


def _give_up_stdout() -> None:
    """Drop the rest of the buffer of standard output. Otherwise the interpreter would try once more
    to write it, and end with status 120, which means here that the guest panicked.
    """
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
