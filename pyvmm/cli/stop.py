"""Pause a running machine: its vCPUs stop, its data paths are parked, its memory does not change
any more.

Example:
  pyvmm stop vm0

Received frames wait meanwhile in the tap or in the back-end. Time-outs of `pyvmm run` go on. A
machine that is paused already stays paused.

Exit status: 0, 113 no such machine, 114 it has ended.
"""

from __future__ import annotations

from pyvmm.cli.support import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

add_arguments = remote.add_arguments


def run(args: argparse.Namespace) -> int:
    """Send the command; returns when the machine is paused."""
    return remote.tell(args, "stop")
