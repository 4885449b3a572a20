"""List the running machines: here, and in the testbed if it is up.

Examples:
  pyvmm ps
  pyvmm ps --json | jq -r '.[] | select(.status == "paused") | .name'

Exit status: 0.
"""

from __future__ import annotations

import time

from pyvmm.cli.support import remote
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import columns
from pyvmm.cli.support.tables import rows_as_text
from pyvmm.errors import PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

HEADS = ("NAME", "HOST", "PID", "STATUS", "UP", "CPUS", "MEMORY", "CARDS")
ANSWER = 5.0  # seconds that a machine has to answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_host(parser)
    add_json(parser, "an array of objects")
    parser.add_argument(
        "--brief", action="store_true", help="do not ask the machines for their state"
    )


def run(args: argparse.Namespace) -> int:
    """Print the machines; returns the exit status."""

    rows = remote.listing(args.host)
    for row in rows:
        if "status" not in row and not args.brief:
            row |= _ask(row["qmp"])
    if args.json:
        print_json(rows)
        return 0
    table = []
    for row in rows:
        up = max(time.time() - row["since"], 0)
        table.append(
            [
                row["name"],
                row["host"],
                str(row["pid"]),
                row.get("status", "-"),
                f"{up:.0f} s"
                if up < 600
                else f"{up / 60:.0f} min"
                if up < 36000
                else f"{up / 3600:.0f} h",
                str(row.get("cpus", "-")),
                f"{row['memory'] >> 20} MiB" if "memory" in row else "-",
                " ".join(f"{n['name']}:{n['mode']}" for n in row.get("nets", ())) or "-",
            ]
        )
    print(rows_as_text(table, columns(), HEADS))
    return 0


def _ask(path: str) -> dict[str, Any]:
    """A machine's answers about its state, by its control socket."""
    from pyvmm.control.client import connect

    try:
        with connect(path, timeout=ANSWER) as client:
            about: dict[str, Any] = client.command("x-pyvmm-machine")
            return about
    except PyvmmError as e:
        return {"status": "no answer", "error": str(e)}
