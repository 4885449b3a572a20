"""Tables for people."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import Machine


def exits_table(machine: Machine, rows: int = 12) -> str:
    """How often the guest exited to the VMM, and why: the most frequent causes first."""
    ledger = machine.ledger()
    out = [f"{ledger.total} exits to the VMM:"]
    for line in ledger.lines[:rows]:
        mean = line.time / line.count / 1000
        out.append(f"  {line.count:8}  {line.what:56} {mean:9.1f} us each")
    rest = sum(line.count for line in ledger.lines[rows:])
    if rest:
        out.append(f"  {rest:8}  {len(ledger.lines) - rows} other causes")
    return "\n".join(out)
