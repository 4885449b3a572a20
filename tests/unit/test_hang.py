"""What counts as a hang (docs/verdicts.md); tests/host and tests/boot have guests that do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pyvmm.hang import stuck_too_long
from pyvmm.kvm.vcpu import ALIVE, HALTED_OFF, NOT_STARTED, RUNS_OFF

if TYPE_CHECKING:
    from pyvmm.kvm.vcpu import State


@pytest.mark.parametrize(
    ("states", "bare", "linux"),
    [
        ([RUNS_OFF], True, True),
        ([HALTED_OFF], True, True),
        ([ALIVE], False, False),
        ([NOT_STARTED], False, False),
        ([RUNS_OFF, NOT_STARTED], True, True),
        ([HALTED_OFF, HALTED_OFF], True, True),
        ([HALTED_OFF, ALIVE], False, False),  # the first is parked, or offline
        ([RUNS_OFF, ALIVE], False, True),  # locked up, while the other one waits for it
        ([RUNS_OFF, HALTED_OFF], True, True),
    ],
)
def test_states(states: list[State], bare: bool, linux: bool) -> None:
    since = [10.0 if s in (RUNS_OFF, HALTED_OFF) else None for s in states]
    assert stuck_too_long(since, states, False, 15.0, 5.0) == bare
    assert stuck_too_long(since, states, True, 15.0, 5.0) == linux
    assert not stuck_too_long(since, states, True, 14.9, 5.0), "not yet"


def test_all_must_have_been_stuck_long_enough() -> None:
    states = [HALTED_OFF, HALTED_OFF]
    assert not stuck_too_long([0.0, 9.0], states, True, 10.0, 5.0)
    assert stuck_too_long([0.0, 9.0], states, True, 14.0, 5.0)
