"""Press the reset button of a running machine: memory and devices start over, whatever --on-reboot
it was started with.

Example:
  pyvmm reset vm0

The guest is not asked. A paused machine stays paused.

Exit status: 0, 113 no such machine, 114 it has ended.
"""

from __future__ import annotations

from pyvmm.cli.support import remote

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

add_arguments = remote.add_arguments


def run(args: argparse.Namespace) -> int:
    """Send the command; returns when the machine has been reset."""
    return remote.tell(args, "system_reset", "RESET")
