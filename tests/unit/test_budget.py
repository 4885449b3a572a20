"""Budgets: what is one, what is none, and the arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm.errors import BudgetBroken, UsageError
from pyvmm.exits.budget import METRICS, OPERATORS, Budget

if TYPE_CHECKING:
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.exits.phases import Phase


def line(count: int, device: str, name: str = "", reason: str = "io", role: str = "") -> Any:
    return SimpleNamespace(
        count=count,
        device=device,
        name=name or device,
        reason=reason,
        role=role,
        is_access=reason in ("io", "mmio"),
    )


class FakePhase:
    """The figures of a phase, without a machine."""

    name = "command"

    def __init__(self, **metrics: int) -> None:
        self._metrics = {**dict.fromkeys(METRICS), "user_exits": 100, **metrics}
        self.ledger = SimpleNamespace(
            lines=[
                line(50, "serial0", "serial0 LSR"),
                line(20, "serial0", "serial0 THR"),
                line(7, "serial01"),
                line(5, "net0 notify", "net0 queue 1 notify", "mmio"),
                line(4, "net0 notify", "net0 queue 2 notify (control)", "mmio"),
                line(3, "net0 common", "net0 common device_status", "mmio"),
                line(9, "", "", "io"),
                line(2, "", "", "intr"),
            ]
        )

    def metrics(self) -> dict[str, int | None]:
        return self._metrics


def fake_phase(**metrics: int) -> Phase:
    return cast("Phase", FakePhase(**metrics))


#: For a budget whose phase does not come from a machine.
NO_MACHINE = cast("MachineAccounts", None)


@pytest.mark.parametrize(
    ("text", "phase", "name", "what", "per", "limit"),
    [
        ("user_exits<=5000", None, "user_exits", "", "", 5000),
        (" notify_per_kpacket <= 20.5 ", None, "notify", "", "_per_kpacket", 20.5),
        ("command.kvm_exits_per_mb<1", "command", "kvm_exits", "", "_per_mb", 1),
        ("all.exits[serial0]==0", "all", "exits", "serial0", "", 0),
        ("exits[net0 queue 1]_per_kpacket>3", None, "exits", "net0 queue 1", "_per_kpacket", 3),
        ("boot . halt >= 2", "boot", "halt", "", "", 2),
    ],
)
def test_good(text: str, phase: str | None, name: str, what: str, per: str, limit: float) -> None:
    budget = Budget(text)
    assert (budget.phase, budget.name, budget.what, budget.per) == (phase, name, what, per)
    assert budget.limit == limit and budget.text == text.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no budget"),
        ("user_exits", "is no budget"),
        ("user_exits<=", "is no budget"),
        ("user_exits<=-1", "is no budget"),
        ("user_exits<=1e3", "is no budget"),
        ("user_exits<=1 2", "is no budget"),
        ("user_exits!=1", "is no budget"),
        ("user_exits=1", "is no budget"),
        ("5<=user_exits", "is no budget"),
        ("user_exits<=\u0663", "is no budget"),
        ("x" * 10000 + "<=1", "is no budget"),
        ("cows<=1", "nothing is called 'cows'"),
        ("_per_kpacket<=1", "nothing is called"),
        ("exits<=1", "nothing is called 'exits'"),
        ("exits[]<=1", "is no budget"),
        ("halt[serial0]<=1", "only exits[WHAT]"),
        ("exits[serial0]_per_cow<=1", "only exits[WHAT]"),
        ("lunch.user_exits<=1", "no phase 'lunch'"),
    ],
)
def test_bad(text: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        Budget(text)
    assert said in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("serial0", 70),
        ("serial0 LSR", 50),
        ("serial", 0),
        ("net0", 12),
        ("net0 queue 1", 5),
        ("net0 queue", 9),
        ("net0 notify", 9),
        ("net0 common device_status", 3),
        ("nobody", 9),
        ("intr", 2),
    ],
)
def test_selection(what: str, value: int) -> None:
    assert Budget(f"exits[{what}]<=1").value(fake_phase()) == value


def test_rates() -> None:
    phase = fake_phase(packets=2000, bytes=3_000_000, notify=30, kvm_exits=600)
    assert Budget("notify_per_kpacket<=1").value(phase) == 15
    assert Budget("kvm_exits_per_mb<=1").value(phase) == 200
    assert Budget("exits[serial0]_per_kpacket<=1").value(phase) == 35
    assert Budget("notify_per_kpacket<=1").value(fake_phase(packets=0, notify=0)) is None
    assert Budget("packets<=1").value(fake_phase()) is None


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("limit", [99, 100, 101])
def test_verdict_and_words(op: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.exits.budget.phase", lambda machine, name: fake_phase())
    result = Budget(f"user_exits{op}{limit}").check(NO_MACHINE)
    assert result.held == eval(f"100 {op} {limit}")
    assert result.value == 100 and result.phase == "command"
    assert (result.error() is None) == result.held
    if not result.held:
        error = result.error()
        assert isinstance(error, BudgetBroken) and error.exit_code == 117
        want = {99: "1 (1%) over", 100: "exactly that much", 101: "1 (1%) short"}[limit]
        assert result.message == f"budget user_exits{op}{limit}: 100 in command, {want}"


def test_a_phase_that_was_not_reached_or_a_rate_of_nothing_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "pyvmm.exits.budget.phase", lambda machine, name: fake_phase() if name == "all" else None
    )
    assert not Budget("command.user_exits<=1000").check(NO_MACHINE).held
    assert Budget("user_exits<=1000").check(NO_MACHINE).held, (
        "without a command phase, all of it counts"
    )
    result = Budget("user_exits_per_kpacket<=1000").check(NO_MACHINE)
    assert not result.held and "no packets" in result.message
