"""Press the power button of a running machine.

Examples:
  pyvmm powerdown vm0
  pyvmm powerdown --wait 20 vm0 || pyvmm quit vm0

The guest decides what to do. Guests of `pyvmm image build` end their command by SIGTERM, after
three seconds by SIGKILL, and power off. Others need ACPI, the driver `button` and a program that
listens to it, such as systemd-logind or acpid. A paused guest reacts when it goes on. A guest that
is still booting takes no notice: with --wait, the button is pressed again every five seconds.

Exit status: 0, 113 no such machine, 114 it has ended, 124 it has not ended within --wait.
"""

from __future__ import annotations

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


#: Seconds between two presses. A guest of ours ends its command within less.
AGAIN_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument(
        "--wait",
        metavar="S",
        type=seconds(0, 1e6),
        help="wait up to S seconds until the machine has ended",
    )


def run(args: argparse.Namespace) -> int:
    """Press the button; wait for the end if the user asks for it."""
    if args.wait is None:
        return remote.tell(args, "system_powerdown")
    return remote.tell(args, "system_powerdown", "SHUTDOWN", args.wait, again=AGAIN_S)
