"""The report of a run (``--report FILE``): one JSON object, described in docs/report.md."""

from __future__ import annotations

from pyvmm import __version__
from pyvmm.exits.phases import phases_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.boot import BootState
    from pyvmm.devices.console import Stream
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.outcome import Outcome

SCHEMA = "pyvmm-report/1"


def build(
    accounts: MachineAccounts,
    outcome: Outcome | None,
    *,
    memory_bytes: int,
    cpu: str,
    boot: BootState,
    cmdline: str,
    streams: Iterable[Stream],
    sandbox: str = "off",
) -> dict[str, object]:
    """Make the report of a machine, which must not be closed yet.

    :param outcome: None while the machine runs. :param streams: the guest's output.
    :param cpu: as ``Machine`` takes it. :param sandbox: ``Machine.sandbox``.
    """
    phases = dict(accounts.phases)
    firsts = [v.c.first_run for v in accounts.vcpus if v.c.first_run]
    exits = [v.c.first_exit for v in accounts.vcpus if v.c.first_exit]
    if firsts:
        phases["first_run"] = min(firsts)
    if exits:  # there are none if the machine has only just begun
        phases["kernel"] = min(exits)
    start = phases["vmm"]
    return {
        "schema": SCHEMA,
        "pyvmm": __version__,
        "outcome": None
        if outcome is None
        else {"kind": outcome.kind, "status": outcome.status, "detail": outcome.detail},
        "cpus": len(accounts.vcpus),
        "memory_bytes": memory_bytes,
        "cpu": cpu,
        "sandbox": sandbox,
        "boot": {"kind": boot.kind, "cmdline": cmdline},
        "reboots": accounts.reboots,
        "phases_s": {
            name: round((t - start) / 1e9, 6)
            for name, t in sorted(phases.items(), key=lambda p: p[1])
        },
        "exits": accounts.ledger().as_dict(),
        "phases": [phase.as_dict(accounts) for phase in phases_of(accounts)],
        "kvm": accounts.kvm_stats(),
        "kvm_before_reboots": accounts.old_stats,
        "nets": [nic.report() for nic in accounts.nets],
        "devices": [device.report() for device in accounts.devices],
        "streams": {s.name: {"dropped_bytes": s.dropped} for s in streams},
        "notes": list(accounts.notes),
    }
