"""Show KVM's own statistics of a running machine: exits, halts, injected interrupts, page faults,
...

Examples:
  pyvmm stats vm0
  pyvmm stats --target vm --all vm0
  pyvmm stats --json vm0 | jq '.vcpu[0].exits'

There is one column per vCPU. Histograms, and statistics that are 0 everywhere, are left out unless
--all is given.

Exit status: 0, 113 no such machine.
"""

from __future__ import annotations

from pyvmm.cli.support import remote
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import columns
from pyvmm.cli.support.tables import wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument(
        "--target", choices=("vm", "vcpu", "all"), default="all", help="whose statistics (all)"
    )
    parser.add_argument("--all", action="store_true", help="show zeros and histograms, too")
    add_json(parser, "an object: vm and vcpu are arrays of objects")


def run(args: argparse.Namespace) -> int:
    """Ask for the statistics and print them."""

    def body(client: Client) -> int:
        targets = ("vm", "vcpu") if args.target == "all" else (args.target,)
        schemas = {s["target"]: s["stats"] for s in client.command("query-stats-schemas")}
        values = {
            t: [
                {s["name"]: s["value"] for s in row["stats"]}
                for row in client.command("query-stats", target=t)
            ]
            for t in targets
        }
        if args.json:
            print_json(values)
            return 0
        for target in targets:
            _print(target, schemas.get(target, []), values[target], everything=args.all)
        return 0

    return remote.with_client(args, body)


def _print(
    target: str, schema: list[dict[str, Any]], rows: list[dict[str, Any]], *, everything: bool
) -> None:
    print(target if len(rows) == 1 else f"{target} 0 to {len(rows) - 1}")
    room = columns()
    narrow = room is not None and room < 48 + 15 * len(rows)
    for s in schema:
        values = [row.get(s["name"], "-") for row in rows]
        histogram = s["type"].endswith("histogram")
        if not everything and (histogram or not any(values)):
            continue
        unit = s.get("unit", "")
        if s["exponent"] and unit:
            unit = f"{s.get('base', 10)}^{s['exponent']} {unit}"
        text = "".join(f" {v!s:>14}" for v in values)
        if narrow:
            rest = " ".join([f"{s['name']}:", *map(str, values), unit]).rstrip()
            print("\n    ".join(wrapped(f"  {rest}", (room or 0) - 4)))
            continue
        print(f"  {s['name']:32}{text}  {unit}".rstrip())
