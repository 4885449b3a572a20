"""Panics: what the console says, what pvpanic says, and which ends are a panic's consequence."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from pyvmm import panics
from pyvmm.devices.console import KEEP, Spotter, Stream
from pyvmm.outcome import Outcome
from pyvmm.panics import PanicWatch

PATIENCE = 60.0
LINE = "Kernel panic - not syncing: Attempted to kill init!"
PANIC = f"[    1.000000] {LINE}\n".encode()
END = f"[    1.000000] ---[ end {LINE} ]---\n".encode()


class Rig:
    """A console, and what the watch makes of it."""

    def __init__(self) -> None:
        self.console = Stream("console")
        self.over = 0
        self.watch = PanicWatch(self.console, self._over)
        self.console.start()

    def _over(self) -> None:
        self.over += 1

    def say(self, *pieces: bytes) -> None:
        """Print each piece on its own, and wait until the reader has taken it."""
        for piece in pieces:
            position = self.console.position + len(piece)
            self.console.put(piece)
            until = time.monotonic() + PATIENCE
            while self.console.position < position:
                assert time.monotonic() < until
                time.sleep(0.001)

    def judged(self, outcome: Outcome) -> tuple[str, str]:
        self.watch.judge(outcome)
        return outcome.kind, outcome.detail


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.watch.stop()
    made.console.close()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_kernel_that_does_not_reboot_is_over_with_its_last_line(rig: Rig, size: int) -> None:
    said = PANIC + b"[    1.000000] CPU: 0 PID: 1 Comm: init\n"
    rig.say(*(said[i : i + size] for i in range(0, len(said), size)))
    assert rig.over == 0
    rig.say(*(END[i : i + size] for i in range(0, len(END) - 1, size) if i + size < len(END)))
    assert rig.over == 0, "its last line is not complete"
    rig.say(END[(len(END) - 1) // size * size :])
    assert rig.over == 1
    assert rig.watch.text() == LINE


def test_a_last_line_without_an_end_counts_as_well(rig: Rig) -> None:
    rig.say(PANIC, END[:-1], b"x" * panics.LINE_MAX)
    assert rig.over == 1


def test_the_last_line_alone_names_the_panic(rig: Rig) -> None:
    """The first line was dropped, because the guest has said too much before."""
    rig.say(END)
    assert rig.watch.text() == f"{LINE} ]---"


def test_pvpanic_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panics, "PVPANIC_GRACE", 0.05)
    rig.watch.pvpanic(2)  # a crash kernel is loaded: not a panic
    time.sleep(0.2)
    assert (rig.watch.text(), rig.over) == ("", 0)
    for _ in range(3):
        rig.watch.pvpanic(1)
    until = time.monotonic() + PATIENCE
    while not rig.over:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.2)
    assert (rig.watch.text(), rig.over) == ("reported by pvpanic", 1)
    rig.say(PANIC)
    assert rig.watch.text() == LINE, "the console knows more"


@pytest.mark.parametrize("kind", panics.CONSEQUENCES)
def test_an_end_that_a_panic_has_led_to_is_a_panic(rig: Rig, kind: str) -> None:
    assert rig.judged(Outcome(kind, "x")) == (kind, "x")  # type: ignore[arg-type]
    rig.say(PANIC)
    assert rig.judged(Outcome(kind, "x")) == ("panic", LINE)  # type: ignore[arg-type]


def test_other_ends_stay_what_they_are(rig: Rig) -> None:
    rig.say(PANIC)
    for outcome in (Outcome("stopped"), Outcome("kvm-error"), Outcome("debug-exit")):
        assert rig.judged(outcome)[0] != "panic"
    outcome = Outcome("poweroff")
    outcome.status = 0
    assert rig.judged(outcome) == ("poweroff", ""), "its command had ended"


def test_after_a_restart_the_panic_is_another_guests(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panics, "PVPANIC_GRACE", 0.05)
    rig.say(PANIC)
    rig.watch.pvpanic(1)
    rig.watch.restart()
    time.sleep(0.2)
    assert (rig.watch.text(), rig.over) == ("", 0)
    assert rig.judged(Outcome("poweroff"))[0] == "poweroff"
    rig.say(b"x" * KEEP, b"y" * KEEP, PANIC)  # more than the console keeps
    assert rig.console.dropped_text
    assert rig.watch.text() == LINE


def test_a_phrase_is_spotted_in_any_two_pieces() -> None:
    text = b"xx as init process yy"
    for cut in range(len(text) + 1):
        found: list[int] = []
        spotter = Spotter(b" as init process", partial(found.append, 1))
        spotter(text[:cut])
        spotter(text[cut:])
        assert found == [1], cut


def test_what_nobody_has_read_at_a_restart_is_the_former_guests(rig: Rig) -> None:
    """The reader of the console comes late, as on a busy machine."""
    inside, go_on = threading.Event(), threading.Event()

    def slow(data: bytes) -> None:
        inside.set()
        go_on.wait(PATIENCE)

    rig.console.add_sink(slow)
    rig.console.put(b"x")
    assert inside.wait(PATIENCE)
    rig.console.put(PANIC + END)
    rig.watch.restart()
    go_on.set()
    rig.console.put(b"the next guest\n")
    until = time.monotonic() + PATIENCE
    while rig.console.position < rig.console.written:
        assert time.monotonic() < until
        time.sleep(0.001)
    assert (rig.watch.text(), rig.over) == ("", 0)
    assert rig.judged(Outcome("reboot"))[0] == "reboot"
    rig.say(PANIC, END)
    assert (rig.watch.text(), rig.over) == (LINE, 1)
