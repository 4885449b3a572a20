"""End a running machine at once, without asking the guest.

Example:
  pyvmm quit vm0

Its `pyvmm run` ends with 0, or with 119 if its COMMAND has not ended.

Exit status: 0, 113 no such machine.
"""

from __future__ import annotations

from pyvmm.cli.support import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

add_arguments = remote.add_arguments


def run(args: argparse.Namespace) -> int:
    """Send the command; returns when the machine has ended."""
    return remote.tell(args, "quit", "SHUTDOWN")
