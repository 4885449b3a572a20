"""Options: types that refuse values that make no sense, and texts that commands share.

A type raises ``value; remedy``, and the parser puts the option's name before it. The user sees one
line, such as ``--jobs 0; use 1 to 256``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from argparse import ArgumentTypeError
    from collections.abc import Callable
    from typing import Any, TypeVar

    from pyvmm.jailopt import Jail

    Item = TypeVar("Item")

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


def _refused(problem: str) -> ArgumentTypeError:
    from argparse import ArgumentTypeError  # here: a command line of known words needs no argparse

    return ArgumentTypeError(problem)


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
            raise _refused(f"invalid float value: {text!r}") from None
        if not low <= value <= high or (not low and not value):  # NaN is not within any bounds
            raise _refused(f"{value:g}; {remedy}")
        return value

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """A type for a whole number, ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refused(f"invalid int value: {text!r}") from None
        if not low <= value <= high:
            raise _refused(f"{value}; use {low} to {high}")
        return value

    return parse


def trouble_kinds(text: str) -> list[str]:
    """A type for ``--fail-on``: kinds of reports of the kernel, joined by commas, or ``all``."""
    from pyvmm.testing.console import parse_kinds
    from pyvmm.testing.phrases import KINDS

    try:
        return parse_kinds(text)
    except ValueError as e:
        raise _refused(f"{e}; use {', '.join(KINDS)} or all") from e


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
        raise _refused(f"{text}; write K/N, the part and the number of parts, as 3/10")
    return int(part), int(parts)


#: For help texts: what ``--shard`` takes.
SHARD_HELP = "only part K of N, of equal sizes: for machines or jobs side by side"


def part_of(items: list[Item], which: tuple[int, int] | None) -> list[Item]:
    """Part K of N: every N-th item, so that neighbours, which take alike long, are spread."""
    return items if which is None else items[which[0] - 1 :: which[1]]


def add_sandbox(parser: argparse.ArgumentParser, what: str) -> None:
    """The option ``--sandbox``. :param what: is confined, and when."""
    parser.add_argument(
        "--sandbox",
        choices=("auto", "on", "off"),
        default="auto",
        help=f"confine {what} (auto: as far as the host can); see docs/sandbox.md",
    )


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
    raise _refused(
        f"invalid choice: {text!r} (choose from {', '.join(map(repr, (*HOSTS, SSH + 'NAME')))})"
    )


def _hosts(prefix: str, **kwargs: Any) -> list[str]:
    return [text for text in (*HOSTS, SSH) if text.startswith(prefix)]
