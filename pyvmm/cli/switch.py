"""Change the data path of a running machine's network card. Traffic goes on, and the guest does not
notice.

Examples:
  pyvmm switch vm0 vhost-net
  pyvmm switch vm0 --nic 1 vhost-user,socket=$DIR/s
  pyvmm switch vm0 --json emulated,poll=50

The mode and its keys are those of `pyvmm run --net`.

Exit status: 0, 113 no such machine, 114 the switch was refused or failed, and the card goes on as
before.
"""

from __future__ import annotations

from pyvmm.cli.support import remote
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.errors import ControlError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.control.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument(
        "mode", metavar="MODE[,K=V...]", help="the data path that moves packets from now on"
    )
    parser.add_argument(
        "--nic", metavar="N", type=int, default=0, help="the card, counted from 0 (0)"
    )
    add_json(parser, "the report as an object")


def run(args: argparse.Namespace) -> int:
    """Switch, and print how long it took."""

    def body(client: Client) -> int:
        result = client.command("x-pyvmm-switch", nic=args.nic, mode=args.mode)
        if args.json:
            print_json(result)
        elif result["outcome"] == "switched":
            gap = max(result["gap_ns"].values(), default=0) / 1e6
            chains = sum(result["pending"].values())
            print(
                f"{result['nic']}: {result['from']} -> {result['mode']}, gap {gap:.2f} ms, "
                f"{chains} chains handed over"
            )
        if result["outcome"] != "switched":
            raise ControlError(
                f"{result['nic']} is {result['outcome']} to {result['mode']}: {result['reason']}"
            )
        return 0

    return remote.with_client(args, body, timeout=120)
