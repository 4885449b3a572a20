"""Judges the run of a Linux guest: makes a verdict of how the machine ended and of what its kernel
reported.

``pyvmm run`` and ``pyvmm matrix`` judge by ``judge``. Test kernels have rules of their own
(``verdict.judge_test``).
"""

from __future__ import annotations

from pyvmm.errors import GuestEnded, GuestTrouble
from pyvmm.kvm.vcpu import ALIVE, NOT_STARTED
from pyvmm.testing import console as says
from pyvmm.testing.symbols import Symbols
from pyvmm.testing.verdict import LOSSES, Verdict, register_lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyvmm.boot import BootState
    from pyvmm.errors import PyvmmError
    from pyvmm.exits.budget import Result
    from pyvmm.outcome import Outcome

RESET_RIP = 0xFFF0  # the address of a processor that waits for its start-up interrupt


def judge(
    outcome: Outcome,
    *,
    console: bytes | bytearray,
    boot: BootState,
    phases: Mapping[str, int],
    commanded: bool,
    watch: says.Watch | None = None,
    symbols: str | None = None,
    budgets: Sequence[Result] = (),
    lost: Sequence[PyvmmError] = (),
) -> Verdict:
    """The verdict of a run. The machine's end comes first, then the reports of the kernel, then the
    status of the command, then the budgets.

    :param outcome: the ``Outcome`` of the machine.
    :param console: the end of what the guest wrote to its console.
    :param boot: how the kernel was entered.
    :param phases: ``Machine.phases``.
    :param commanded: whether the guest was given a command.
    :param watch: has searched the console for reports that must not be in it.
    :param lost: of shares and disks that have broken off during the run.
    :param symbols: path of a kernel that may have symbols, to name the vCPUs' addresses.
    """
    kind, abnormal, error = outcome.kind, outcome.abnormal, outcome.error()
    details: list[str] = []
    if kind == "panic":
        details = says.panic_quote(console)
    elif error is not None and kind in ("timeout", "hang"):
        error.cause += f", {says.PHASES[says.phase(phases, bool(console))]}"
    elif error is not None and kind == "reboot" and not console:
        error.cause += ", before there was any output"
    if abnormal is not None:
        details += entry_lines(outcome, boot, bool(console))
        details += state_lines(outcome, symbols, says.offset(console))
        return Verdict(abnormal, str(error), status=outcome.status, details=details)
    if watch is not None:
        watch.finish()
        if watch.troubles:
            first = watch.troubles[0]
            trouble = GuestTrouble(f"{says.headline(first, watch.count)}: {first.message}")
            return Verdict("trouble", str(trouble), status=outcome.status, details=first.lines)
    if lost:  # before the command's status, which may follow from it
        kinds = [kind for error, kind in LOSSES.items() if isinstance(lost[0], error)]
        others = [str(error) for error in lost[1:]]
        return Verdict(kinds[0], str(lost[0]), status=outcome.status, details=others)
    if kind == "stopped" and commanded and outcome.asked and outcome.status is None:
        return Verdict(
            "ended", str(GuestEnded("the machine was told to quit before the command ended"))
        )
    broken = [result.message for result in budgets if not result.held]
    if kind == "stopped" and not broken:
        return Verdict("passed", status=outcome.status)
    if commanded and kind != "stopped" and outcome.status is None:
        ended = GuestEnded(
            "the guest powered off before the command ended", "see its console: --verbose"
        )
        return Verdict("ended", str(ended))
    if outcome.status and kind != "stopped":
        return Verdict(
            "failed", f"the command's exit status is {outcome.status}", status=outcome.status
        )
    if broken:
        more = f"{len(broken)} of {len(budgets)} budgets are broken"
        message = f"{broken[0]} (broken)" if len(broken) == 1 else more
        return Verdict(
            "budget", message, status=outcome.status, details=broken if len(broken) > 1 else []
        )
    return Verdict("passed", status=outcome.status)


def entry_lines(outcome: Outcome, boot: BootState, said: bool) -> list[str]:
    """What the kernel file was taken for, if the kernel ended badly before it said anything: it may
    have been entered in another way than it expects. Else nothing.

    :param said: whether there was any output.
    """
    if said or outcome.kind not in ("reboot", "triple-fault", "kvm-error"):
        return []
    return [f"the kernel said nothing; it was entered as {boot.kind}, at {boot.entry:#x}"]


def state_lines(outcome: Outcome, symbols: str | None, moved: int = 0) -> list[str]:
    """Where the vCPUs were at the end: the registers that the outcome has, and each instruction
    pointer with its symbol.

    :param symbols: path of an ELF with symbols; another file just has none.
    :param moved: the distance in bytes by which KASLR has moved the kernel.
    """
    lines = []
    if outcome.registers:
        lines += register_lines(outcome.registers)
    rips = outcome.rips or ([outcome.registers["rip"]] if outcome.registers else [])
    if rips:
        table = Symbols(symbols) if symbols else None
        for index, rip in enumerate(rips):
            where = table.name(rip - moved) if table else ""
            state = outcome.states[index] if outcome.states else ""
            state = NOT_STARTED if rip == RESET_RIP else "" if state == ALIVE else state
            lines.append(", ".join(filter(None, (f"vCPU {index} at {rip:#x}", where, state))))
    return lines
