"""What counts as a hang (docs/verdicts.md); tests/host and tests/boot have guests that do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import pytest

from pyvmm.hang import HangWatch, stuck_too_long
from pyvmm.kvm.vcpu import ALIVE, HALTED_OFF, NOT_STARTED, RUNS_OFF

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.kvm.vcpu import State, Vcpu
    from pyvmm.memory import GuestMemory


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


class Stuck:
    """A vCPU that is found halted with interrupts off, and runs again when its machine does."""

    index, runs = 0, 0

    def __init__(self) -> None:
        self.now: State = HALTED_OFF

    def state(self) -> State:
        return self.now

    def registers(self) -> dict[str, int]:
        return {"rax": 0}


def watch(vcpu: Stuck, kick: Callable[[HangWatch], None], found: Callable[[str], object]) -> None:
    """Watch a vCPU that reports at each kick, until ``kick`` ends that."""
    hang: HangWatch

    def look() -> None:
        kick(hang)
        hang.looked_at(cast("Vcpu", vcpu))

    hang = HangWatch(
        [cast("Vcpu", vcpu)], [], cast("GuestMemory", None),
        kick=look, linux=True, limit=0.3, found=found,
    )  # fmt: skip
    hang._watch()


def test_a_host_that_stands_still_is_no_guest_that_hangs() -> None:
    """The vCPU could not go on for all that time, and does so afterwards."""
    looks, hangs = list[float](), list[str]()
    vcpu = Stuck()

    def kick(hang: HangWatch) -> None:
        looks.append(time.monotonic())
        if len(looks) == 2:
            time.sleep(0.5)  # more than the time-out
        elif len(looks) == 3:
            vcpu.now = ALIVE
        elif len(looks) == 4:
            hang._end.set()

    watch(vcpu, kick, hangs.append)
    assert len(looks) == 4 and not hangs


def test_a_guest_hangs() -> None:
    """It is told once, after ten looks."""
    looks, hangs = list[float](), list[str]()
    watch(Stuck(), lambda hang: looks.append(time.monotonic()), hangs.append)
    assert hangs == ["no progress for 0.3 s: vCPU 0 halted with interrupts off"]
    assert len(looks) >= 10 and looks[-1] - looks[0] >= 0.2
