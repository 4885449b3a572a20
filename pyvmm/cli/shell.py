"""Open a shell in a running machine.

Examples:
  pyvmm shell vm0
  pyvmm shell -u nobody -C /tmp vm0
  echo 'cat /proc/interrupts' | pyvmm shell vm0

The guest has an init of `pyvmm image build`, and the shell is the user's. It is a terminal of its
own beside the machine's console; there may be several. Ctrl-A x leaves: the shell is hung up, and
the machine goes on. Ctrl-A Ctrl-A types Ctrl-A. If standard input is a file or a pipe, the shell
reads its commands from there.

Exit status: that of the shell; 113 no such machine, 115 the guest takes no commands, 119 the
machine has ended (120 and more: by a panic and the like, docs/exit-codes.md), 124 --timeout, 129
left by Ctrl-A x.
"""

from __future__ import annotations

import os

from pyvmm.cli import exec as exec_command
from pyvmm.cli.support import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    exec_command.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the shell; returns its status."""
    return exec_command.attend(args, [], terminal=os.isatty(0), input=True)
