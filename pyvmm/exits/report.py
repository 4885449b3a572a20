"""The report of a run (``--report FILE``): one JSON object, described in docs/report.md."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.machine import Machine

SCHEMA = "pyvmm-report/1"


def build(machine: Machine) -> dict[str, object]:
    """The report of ``machine``, running or ended, not yet closed."""
    from pyvmm import __version__

    outcome = machine.outcome
    phases = dict(machine.phases)
    firsts = [v.c.first_run for v in machine.vcpus if v.c.first_run]
    exits = [v.c.first_exit for v in machine.vcpus if v.c.first_exit]
    if firsts:
        phases["first_run"] = min(firsts)
    if exits:  # not yet, where the report is of a machine that has only just begun
        phases["kernel"] = min(exits)
    start = phases["vmm"]
    return {
        "schema": SCHEMA,
        "pyvmm": __version__,
        "outcome": None
        if outcome is None
        else {"kind": outcome.kind, "status": outcome.status, "detail": outcome.detail},
        "cpus": machine.cpus,
        "memory_bytes": machine.memory.size,
        "boot": {"kind": machine.boot.kind, "cmdline": machine.cmdline()},
        "reboots": machine.reboots,
        "phases_s": {
            name: round((t - start) / 1e9, 6)
            for name, t in sorted(phases.items(), key=lambda p: p[1])
        },
        "exits": machine.ledger().as_dict(),
        "phases": [phase.as_dict(machine) for phase in machine.phase_exits()],
        "kvm": machine.kvm_stats(),
        "kvm_before_reboots": machine.old_stats,
        "nets": [nic.report() for nic in machine.nets],
        "streams": {
            s.name: {"dropped_bytes": s.dropped}
            for s in (machine.console, machine.stdout, machine.stderr)
        },
    }
