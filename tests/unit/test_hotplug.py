"""PCI hot plug: its registers and its event of ACPI. For the AML see test_acpi."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.bus import PIO
from pyvmm.devices.hotplug import PciHotplug
from pyvmm.devices.legacy import Power
from pyvmm.spec.platform import (
    GPE_PCI_HOTPLUG,
    PCI_HOTPLUG_DOWN,
    PCI_HOTPLUG_EJECT,
    PCI_HOTPLUG_UP,
    PORT_ACPI_GPE0,
    PORT_PCI_HOTPLUG,
)
from tests.pci_guest import Board

UP, DOWN, EJECT = (
    PORT_PCI_HOTPLUG + at for at in (PCI_HOTPLUG_UP, PCI_HOTPLUG_DOWN, PCI_HOTPLUG_EJECT)
)


class Slots(Board):
    """A board with the registers, and with the slots that were ejected."""

    def __init__(self) -> None:
        super().__init__()
        self.ejected: list[int] = []
        self.levels: list[int] = []
        nothing = lambda: None  # noqa: E731
        self.power = Power(self.bus, nothing, nothing, nothing, self.levels.append)
        self.hotplug = PciHotplug(
            self.bus, lambda: self.power.gpe0.event(GPE_PCI_HOTPLUG), self.ejected.append
        )


@pytest.fixture
def board() -> Iterator[Any]:
    with Slots() as b:
        yield b


def test_a_card_comes_and_goes(board: Any) -> None:
    """The event waits for a guest that wants it; reading UP clears it, ejecting clears DOWN."""
    board.hotplug.added(3)
    assert board.levels == [] and not board.hotplug.seen(3)
    board.write(PIO, PORT_ACPI_GPE0 + 1, 1, 1 << GPE_PCI_HOTPLUG)
    assert board.levels == [1] and board.read(PIO, PORT_ACPI_GPE0, 1) == 2
    board.write(PIO, PORT_ACPI_GPE0, 1, 2)
    assert board.levels == [1, 0]
    assert board.read(PIO, UP, 2) == 8  # only a read of the whole register clears it
    assert board.read(PIO, UP, 4) == 8 and board.read(PIO, UP, 4) == 0 and board.hotplug.seen(3)
    board.hotplug.ask(3)
    board.hotplug.ask(31)
    assert board.levels == [1, 0, 1]
    assert board.read(PIO, DOWN, 4) == 1 << 31 | 8 and board.read(PIO, DOWN + 3, 1) == 0x80
    board.write(PIO, EJECT, 4, 8)
    assert board.ejected == [3] and board.read(PIO, DOWN, 4) == 1 << 31
    board.hotplug.reset()
    assert board.ejected == [3, 31] and board.read(PIO, DOWN, 4) == 0


def test_a_sleep_keeps_what_the_guest_has_not_seen(board: Any) -> None:
    board.write(PIO, PORT_ACPI_GPE0, 2, 1 << GPE_PCI_HOTPLUG << 8)
    board.hotplug.added(1)
    board.power.woken()
    assert board.levels[:2] == [1, 1] and board.read(PIO, UP, 4) == 2
    board.power.reset()
    board.hotplug.reset()
    assert board.read(PIO, PORT_ACPI_GPE0, 2) == 0 and board.read(PIO, UP, 4) == 0


STEP = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 31), st.just(0), st.just(0)),
    st.tuples(
        st.sampled_from(["read", "write"]),
        st.integers(0, 12),
        st.sampled_from([1, 2, 4]),
        st.one_of(st.just(0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)),
    ),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEP, max_size=40))
def test_a_guest_ejects_only_what_is_asked_for(steps: Any) -> None:
    """Whatever it writes, of any width, anywhere; and each slot once per request."""
    board = Slots()
    with board:
        asked: list[int] = []
        for what, at, size, value in steps:
            if what == "ask":
                if at not in asked:
                    asked.append(at)
                board.hotplug.ask(at)
            elif what == "read":
                board.read(PIO, PORT_PCI_HOTPLUG + at, size)
            else:
                board.write(PIO, PORT_PCI_HOTPLUG + at, size, value)
            assert set(board.ejected) <= set(asked)
            for slot in board.ejected:
                assert value >> slot & 1 and at == PCI_HOTPLUG_EJECT and size == 4
                asked.remove(slot)
            board.ejected.clear()
            assert board.read(PIO, DOWN, 4) == sum(1 << slot for slot in asked)
