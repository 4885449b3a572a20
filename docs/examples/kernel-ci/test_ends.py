"""A guest for each test: how the kernel ends, in order and not."""

from __future__ import annotations

import pytest

from pyvmm.errors import CommandFailed, GuestPanic, GuestReboot


def test_power_off(machine_factory):
    outcome = machine_factory(cpus=2).power_off()
    assert outcome.kind == "poweroff"


def test_panic_is_told(machine_factory):
    vm = machine_factory()
    with pytest.raises(GuestPanic, match="sysrq triggered crash"):
        vm.run("echo c >/proc/sysrq-trigger")
    assert b"Call Trace:" in vm.console.text


def test_reboot(machine_factory):
    vm = machine_factory()
    with pytest.raises(GuestReboot):
        vm.run("reboot -f")


def test_a_command_that_hangs_does_not_hang_the_test(machine_factory):
    vm = machine_factory()
    with pytest.raises(CommandFailed, match="did not end in 1 s"):
        vm.run("sleep 1000", timeout=1)
    vm.run("true").check()
