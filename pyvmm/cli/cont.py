"""Let a paused machine go on.

Example:
  pyvmm cont vm0

Exit status: 0, 113 no such machine, 114 it has ended, or a data path does not start again.
"""

from __future__ import annotations

from pyvmm.cli.support import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

add_arguments = remote.add_arguments


def run(args: argparse.Namespace) -> int:
    """Send the command; returns when the machine runs."""
    return remote.tell(args, "cont")
