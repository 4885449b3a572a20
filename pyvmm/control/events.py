"""The events of the control socket that tell of the end of a machine, in QEMU's words."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.outcome import Kind, Outcome

#: An end that the guest has caused -> QEMU's ShutdownCause (qapi/run-state.json).
GUEST_REASONS: dict[Kind, str] = {
    "poweroff": "guest-shutdown",
    "reboot": "guest-reset",
    "triple-fault": "guest-reset",
    "panic": "guest-panic",
    "debug-exit": "guest-shutdown",
}


def end_events(outcome: Outcome) -> list[tuple[str, dict[str, object]]]:
    """The events that report the machine's end, with their data: QEMU's reason and our own
    word.
    """
    reason = GUEST_REASONS.get(outcome.kind)
    data: dict[str, object] = {
        "guest": reason is not None,
        "reason": reason or ("host-qmp-quit" if outcome.asked else "host-signal"),
        "x-pyvmm-outcome": outcome.kind,
    }
    panicked: list[tuple[str, dict[str, object]]] = [("GUEST_PANICKED", {"action": "shutdown"})]
    return [*(panicked if outcome.kind == "panic" else []), ("SHUTDOWN", data)]
