"""Budgets: ``notify_per_kpacket<=20`` limits how much of something a run may cause.
docs/budgets.md describes them for users.

A budget has the form ``[PHASE.]NAME[_per_kpacket|_per_mb] OPERATOR NUMBER``; NAME is one of
``METRICS`` or ``exits[WHAT]``.
"""

from __future__ import annotations

import operator
import re

from pyvmm.errors import BudgetBroken, UsageError
from pyvmm.exits.accounts import PHASES
from pyvmm.exits.phases import ALL, COUNTER_METRICS, KVM_METRICS, phase
from pyvmm.kvm.vcpu import reasons

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.exits.ledger import Line
    from pyvmm.exits.phases import Phase

OPERATORS = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
METRICS = (
    "user_exits",
    "pio",
    "mmio",
    "notify",
    "control",
    *KVM_METRICS.values(),
    *COUNTER_METRICS,
)
#: Suffix -> (the metric that divides the value, the unit in which that metric is taken).
PER = {"_per_kpacket": ("packets", 1000), "_per_mb": ("bytes", 1_000_000)}
PHASE_NAMES = (*PHASES.values(), ALL)
FORM = re.compile(
    r"\s*(?:(\w+)\s*\.)?\s*(\w+)(?:\[([^\[\]]+)\](\w*))?\s*(<=|>=|==|<|>)\s*(\d+(?:\.\d+)?)\s*",
    re.ASCII,
)


class Result:
    """The result of the check of a budget.

    :ivar phase: the phase that was checked. :ivar value: its figure; None if it has none.
    :ivar message: one line for people, also if the budget held.
    """

    __slots__ = ("budget", "held", "message", "phase", "value")

    def __init__(
        self, budget: Budget, phase: str, value: float | None, *, held: bool, message: str
    ) -> None:
        self.budget, self.phase, self.value, self.held, self.message = (
            budget,
            phase,
            value,
            held,
            message,
        )

    def error(self) -> BudgetBroken | None:
        """The error to raise if the budget was broken, else None."""
        return None if self.held else BudgetBroken(self.message)

    def as_dict(self) -> dict[str, object]:
        """The result for JSON (docs/report.md)."""
        return {
            "budget": self.budget.text,
            "phase": self.phase,
            "value": self.value,
            "limit": self.budget.limit,
            "held": self.held,
        }


class Budget:
    """One budget.

    :param text: as the user wrote it.
    :ivar phase: of ``PHASE_NAMES``; None means ``command`` if the guest gets there, else ``all``.
    :ivar what: the WHAT of ``exits[WHAT]``, else empty. :ivar per: a key of ``PER``, or empty.
    :raises UsageError: ``text`` is not a budget.
    """

    def __init__(self, text: str) -> None:
        match = FORM.fullmatch(text) if len(text) < 200 else None
        if match is None:
            raise UsageError(
                f"--budget {text[:200]!r} is no budget",
                "write NAME<=NUMBER, as in 'notify_per_kpacket<=20'",
            )
        self.text = text.strip()
        self.phase: str | None = match[1]
        self.name, self.what, suffix = match[2], (match[3] or "").strip(), match[4] or ""
        self.operator, self.limit = match[5], float(match[6])
        self.per = (
            next((per for per in PER if self.name.endswith(per)), "") if not self.what else suffix
        )
        if not self.what:
            self.name = self.name.removesuffix(self.per)
        if self.phase is not None and self.phase not in PHASE_NAMES:
            raise UsageError(
                f"--budget {text}: no phase {self.phase!r}", f"phases: {', '.join(PHASE_NAMES)}"
            )
        if self.name not in METRICS and not (self.name == "exits" and self.what):
            raise UsageError(
                f"--budget {text}: nothing is called {self.name!r}",
                f"names: {', '.join(METRICS)}, exits[WHAT]; each also with _per_kpacket or _per_mb",
            )
        if (self.what and self.name != "exits") or (self.per and self.per not in PER):
            raise UsageError(
                f"--budget {text}: only exits[WHAT] has brackets", "see docs/budgets.md"
            )

    def check_names(self, accounts: MachineAccounts) -> None:
        """Check that the machine, started or not, counts what the budget limits.

        :raises UsageError: the machine does not count it; the text says why.
        """
        needs = {self.name, PER[self.per][0] if self.per else self.name}
        for metric in sorted(needs & set(COUNTER_METRICS)):
            silent = [
                nic.mode
                for nic in accounts.nets
                if not all(name in nic.counters() for name in COUNTER_METRICS[metric])
            ]
            if silent or not accounts.nets:
                why = (
                    f"not counted with --net {silent[0]}"
                    if silent
                    else "none without a network card"
                )
                raise UsageError(
                    f"--budget {self.text}: {metric} are {why}",
                    "docs/budgets.md says which data path counts what",
                )
        if self.name in KVM_METRICS.values() and accounts.snapshot("now").stats is None:
            raise UsageError(
                f"--budget {self.text}: this KVM has no statistics", "use a kernel from 5.14 on"
            )
        if self.what and not self._known(accounts):
            devices = sorted({name for name, _ in accounts.bus.region_names()})
            raise UsageError(
                f"--budget {self.text}: no device or reason {self.what!r}",
                f"devices: {', '.join(devices)}",
            )

    def _known(self, accounts: MachineAccounts) -> bool:
        """Whether WHAT can match any exit: it is a device, the first words of a device's name, one
        of its registers, or a KVM_EXIT_* reason.
        """
        if self.what in (*reasons().values(), "nobody"):
            return True
        return any(
            _begins(name, self.what) or any(_begins(self.what, n) for n in (name, prefix))
            for name, prefix in accounts.bus.region_names()
        )

    def _selects(self, line: Line) -> bool:
        if not line.is_access or self.what == "nobody":
            return self.what == (line.reason if not line.is_access else line.device or "nobody")
        return _begins(line.device, self.what) or _begins(line.name, self.what)

    def value(self, phase: Phase) -> float | None:
        """The figure of ``phase``; None if the divisor is 0, or if no data path counts the
        metric.
        """
        metrics = phase.metrics()
        if self.what:
            value: float | None = sum(
                line.count for line in phase.ledger.lines if self._selects(line)
            )
        else:
            value = metrics[self.name]
        if self.per and value is not None:
            name, unit = PER[self.per]
            amount = metrics[name]
            value = value * unit / amount if amount else None
        return value

    def check(self, accounts: MachineAccounts) -> Result:
        """Check the budget against what the machine has counted up to now."""
        name = self.phase
        found = phase(accounts, name or "command")
        if found is None and name is None:
            found = phase(accounts, ALL)
        if found is None:
            text = f"budget {self.text}: the run did not get to {name}"
            return Result(self, name or "", None, held=False, message=text)
        value = self.value(found)
        if value is None:
            metric = PER[self.per][0] if self.per else self.name
            text = f"budget {self.text}: no {metric} in {found.name}"
            return Result(self, found.name, None, held=False, message=text)
        held = self.holds(value)
        text = f"budget {self.text}: {_number(value)} in {found.name}"
        if not held:
            text += f", {self._difference(value)}"
        return Result(self, found.name, value, held=held, message=text)

    def holds(self, value: float) -> bool:
        """Whether ``value`` is within the budget."""
        return bool(OPERATORS[self.operator](value, self.limit))

    def _difference(self, value: float) -> str:
        """By how much ``value`` differs from the limit: ``15.2 (76 %) over``."""
        gap = abs(value - self.limit)
        share = f" ({gap / self.limit:.0%})" if self.limit else ""
        if not gap:
            return "exactly that much"
        return f"{_number(gap)}{share} {'over' if value > self.limit else 'short'}"


def _begins(name: str, what: str) -> bool:
    """Whether ``what`` is ``name`` or its first words."""
    return name == what or name.startswith(f"{what} ")


def _number(value: float) -> str:
    return (
        f"{value:.0f}"
        if value == int(value)
        else f"{value:.4g}"
        if value < 1000
        else f"{value:.1f}"
    )
