"""Show live rates of a running machine: exits by cause, packets, interrupts, the CPU time of
workers.

The command reads the counters by the machine's control socket (docs/control.md) once per interval,
and shows rates per second. `q` or Ctrl-C ends it.

Examples:
  pyvmm top vm0
  pyvmm top vm0 --interval 5
  pyvmm top vm0 --once --json

Exit status: 0; or 2 bad usage, 113 no such machine, 130 Ctrl-C.
"""

from __future__ import annotations

import sys

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds
from pyvmm.cli.support.rates import cause_lines, net_lines, vcpu_lines
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import ROWS, Screen, steerable
from pyvmm.errors import MachineMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client

ENDED = ("shutdown", "guest-panicked")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument(
        "--interval",
        metavar="S",
        type=seconds(0.1, 3600),
        default=1.0,
        help="seconds between two readings, 0.1 to 3600 (1)",
    )
    parser.add_argument("--once", action="store_true", help="print one interval and leave")
    add_json(parser, "an object per line")


def run(args: argparse.Namespace) -> int:
    """Show rates until the machine ends or the user leaves."""
    return remote.with_client(args, lambda client: _watch(args, client))


def _watch(args: argparse.Namespace, client: Client) -> int:
    live = steerable(sys.stdout) and not args.once and not args.json
    with Screen(live) as screen:
        before = client.command("x-pyvmm-ledger")
        while True:
            if screen.wait(args.interval):
                return 0
            try:
                after = client.command("x-pyvmm-ledger")
            except MachineMissing:
                if args.once:
                    raise
                return 0  # the machine has ended
            _show(before, after, args, screen)
            if args.once or after["status"] in ENDED:
                return 0
            before = after


def _show(
    before: dict[str, Any], after: dict[str, Any], args: argparse.Namespace, screen: Screen
) -> None:
    from pyvmm.exits.rates import rates

    now = rates(before, after)
    if args.json:
        print_json(now, line=True)
    elif screen.live:
        screen.draw(table(now, screen.size()[1] - 1))
    else:
        print("\n".join(table(now, ROWS)), end="\n" if args.once else "\n\n", flush=True)


def table(now: dict[str, Any], rows: int) -> list[str]:
    """The rates as at most ``rows`` lines of text; the rarest causes are left out first."""
    out = [f"{now['name']}  {now['status']}  rates per second over {now['seconds']:.1f} s"]
    out += ["", *vcpu_lines(now)]
    for net in now["nets"]:
        out += ["", *net_lines(net)]
    return [*out, "", *cause_lines(now, rows - len(out) - 2)]
