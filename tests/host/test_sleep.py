"""Suspend to memory (ACPI S3), with guests of a few instructions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.errors import HostError

TIMEOUT = 120.0
BASE, WAKING = 0x7C00, 0x7C40
GOODBYE = "ba 0c 06 b8 00 24 ef f4 eb fd"  # out 0x60c, SLP_EN | S3; hlt, for ever
#: [es:FACS + 12] = 0000:7C40, as 0x7C40; a byte that must survive; sleep.
SLEEP = f"b8 00 e0 8e c0 66 26 c7 06 4c 00 40 7c 00 00 c6 06 00 70 2a {GOODBYE}"
#: debug-exit with the byte.
AWAKE = "31 c0 8e d8 a0 00 70 e6 f4 f4"


class Sleeper(Machine):
    """A guest in real mode that goes to sleep, and after that ends with status 42 << 1 | 1."""

    def __init__(self, path: Path, code: str, waking: int = WAKING, **kwargs: Any) -> None:
        image = bytes.fromhex(code).ljust(waking - BASE, b"\xf4") + bytes.fromhex(AWAKE)
        path.write_bytes(image)
        super().__init__(
            str(path), memory="4M", load_address=BASE, load_mode="real16", test_devices=True,
            **kwargs,
        )  # fmt: skip

    def until(self, state: str) -> None:
        """Wait for a state of the machine."""
        begin = time.monotonic()
        while self.state != state:
            assert time.monotonic() - begin < TIMEOUT, self.state
            time.sleep(0.01)


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Sleeper]:
    with Sleeper(tmp_path / "sleeper", SLEEP, cpus=2, nets=[Net("vhost-user")]) as machine:
        with pytest.raises(HostError, match="not suspended"):
            machine.wake()
        machine.start()
        machine.until("suspended")
        yield machine


def ends_well(vm: Machine) -> None:
    outcome = vm.wait(TIMEOUT)
    assert (outcome.kind, outcome.status) == ("debug-exit", 42 << 1 | 1)
    assert vm.reboots == 0
    with pytest.raises(HostError, match="has ended"):
        vm.wake()


def test_wake_up(vm: Sleeper) -> None:
    vm.wake()
    ends_well(vm)


def test_the_power_button_wakes(vm: Sleeper) -> None:
    vm.powerdown()
    ends_well(vm)


def test_a_paused_machine_wakes_when_it_goes_on(vm: Sleeper) -> None:
    assert vm.pause()
    vm.wake()
    vm.until("paused")
    assert vm.outcome is None
    assert vm.resume()
    ends_well(vm)


def test_a_reset_starts_over(vm: Sleeper) -> None:
    vm.reset()
    while not vm.reboots:
        time.sleep(0.01)
    vm.until("suspended")
    vm.wake()
    assert vm.wait(TIMEOUT).status == 42 << 1 | 1
    assert vm.reboots == 1


def test_the_end_comes_in_spite_of_sleep(vm: Sleeper) -> None:
    vm.stop()
    assert vm.wait(TIMEOUT).kind == "stopped"


def test_time_out(vm: Sleeper) -> None:
    assert vm.wait(0.2).kind == "timeout"


@pytest.mark.parametrize(
    "vector", ["", SLEEP.partition("c6 06")[0].replace("40 7c 00 00", "00 00 10 00")]
)
def test_without_a_waking_vector(tmp_path: Path, vector: str) -> None:
    """None, or one that real mode does not reach: what follows is a reset."""
    with Sleeper(tmp_path / "sleeper", vector + GOODBYE) as vm:
        vm.start()
        vm.until("suspended")
        vm.wake()
        outcome = vm.wait(TIMEOUT)
        assert outcome.kind == "reboot" and "without a waking vector" in outcome.detail


def test_an_alarm_that_has_come_already_wakes(tmp_path: Path) -> None:
    """The guest sets an alarm for each second, waits until it has come, and sleeps then."""

    def cmos(index: int, value: int) -> str:
        return f"b0 {index:02x} e6 70 b0 {value:02x} e6 71"

    alarm = " ".join(cmos(i, v) for i, v in ((1, 0xC0), (3, 0xC0), (5, 0xC0), (11, 0x20)))
    wants = "ba 0a 06 b8 00 04 ef"  # PM1 enable: the clock's alarm
    until = "ba 08 06 ed f6 c4 04 74 fa"  # again: in ax, dx; test ah, 4; jz again
    before = SLEEP.removesuffix(GOODBYE)
    code = before.replace("40 7c", "00 7d") + f"{alarm} {wants} {until} {GOODBYE}"
    with Sleeper(tmp_path / "sleeper", code, waking=0x7D00) as machine:
        machine.start()
        ends_well(machine)
