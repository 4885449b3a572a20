#!/usr/bin/env python3
"""Write the table of docs/features.md from what `pyvmm matrix --json FILE` has found.

Usage: tools/feature_table.py FILE [PAGE]: replaces the table of PAGE (docs/features.md). The cells
have to be of `--features all,most`: what a card offers always, and what it offers on request.
"""

import json
import sys
from pathlib import Path

from pyvmm.netopt import GROUPS, ON_REQUEST
from pyvmm.spec import virtio, virtio_net

BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
#: Features that a key of --net brings.
KEYS = {"MQ": "queues=", "MTU": "mtu="}


def bit_of(name: str) -> int:
    """The number of a feature."""
    places = (virtio_net, "VIRTIO_NET_F"), (virtio, "VIRTIO_RING_F"), (virtio, "VIRTIO_F")
    found = (getattr(module, f"{prefix}_{name}", None) for module, prefix in places)
    return next(bit for bit in found if isinstance(bit, int))


def key_of(name: str) -> str:
    """How the user leaves a feature out, or asks for the feature."""
    if name in KEYS:
        return f"`{KEYS[name]}`"
    groups = [group for group, members in GROUPS.items() if name in members.split()]
    # The smallest group says most.
    groups.sort(key=lambda group: len(GROUPS[group].split()))
    if not groups:
        return ""
    return f"`{'with' if groups[0] in ON_REQUEST else 'without'}={groups[0]}`"


def table(cells: list[dict[str, object]]) -> str:
    """The rows, lowest bit first."""
    modes = list(dict.fromkeys(str(c["mode"]).partition(":")[0] for c in cells))
    kernels = list(dict.fromkeys(str(c["kernel"]) for c in cells))
    always: dict[str, set[str]] = {mode: set() for mode in modes}
    asked: dict[str, set[str]] = {mode: set() for mode in modes}
    used: dict[str, set[str]] = {kernel: set() for kernel in kernels}
    for c in cells:
        if c["verdict"] != "passed":
            raise SystemExit(f"{c['name']}: {c['verdict']}: {c['message']}")
        mode = str(c["mode"]).partition(":")[0]
        (always if c["features"] == "all" else asked)[mode] |= set(c["offered"])  # type: ignore[call-overload]
        used[str(c["kernel"])] |= set(c["negotiated"])  # type: ignore[call-overload]
    known = set().union(*always.values(), *asked.values())
    heads = ["feature", "bit", "key of `--net`", *(f"`{mode}`" for mode in modes)]
    heads += [f"used by Linux {'6.1' if kernel == 'default' else kernel}" for kernel in kernels]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name in sorted(known, key=bit_of):
        row = [name, str(bit_of(name)), key_of(name)]
        for mode in modes:
            on = name in always[mode]
            row.append("yes" if on else "on request" if name in asked[mode] else "no")
        row += ["yes" if name in used[kernel] else "no" for kernel in kernels]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the table."""
    page = Path(sys.argv[2] if len(sys.argv) > 2 else "docs/features.md")
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(
        head + BEGIN + table(json.loads(Path(sys.argv[1]).read_text())["cells"]) + END + tail
    )


main()
