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
    parser.add_argument(
        "--json", action="store_true", help="print an object: vm and vcpu are arrays of objects"
    )


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
            import json

            print(json.dumps(values, indent=2))
            return 0
        for target in targets:
            _print(target, schemas.get(target, []), values[target], everything=args.all)
        return 0

    return remote.with_client(args, body)


def _print(
    target: str, schema: list[dict[str, Any]], rows: list[dict[str, Any]], *, everything: bool
) -> None:
    print(target if len(rows) == 1 else f"{target} 0 to {len(rows) - 1}")
    for s in schema:
        columns = [row.get(s["name"], "-") for row in rows]
        histogram = s["type"].endswith("histogram")
        if not everything and (histogram or not any(columns)):
            continue
        unit = s.get("unit", "")
        if s["exponent"] and unit:
            unit = f"{s.get('base', 10)}^{s['exponent']} {unit}"
        text = "".join(f" {c!s:>14}" for c in columns)
        print(f"  {s['name']:32}{text}  {unit}".rstrip())
