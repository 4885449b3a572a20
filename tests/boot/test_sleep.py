"""Linux suspends to memory (ACPI S3) and goes on: processors, clock, cards (in D3hot)."""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import Guest, check_ping, check_tcp
from tests.boot.test_control import pyvmm

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

MODES = ("emulated", "vhost-net,transport=mmio", "vhost-user")
NAME = f"sleeper-{os.getpid()}"
SLEEP = "echo mem >/sys/power/state"
#: Who wakes the guest up: the alarm, a command, the power button.
WAYS = (None, ("qmp", NAME, "system_wakeup"), ("powerdown", NAME))


def test_suspend(host: Host) -> None:
    """It is asleep for longer than a guest may hang, and that is no hang."""
    nets = (arg for mode in MODES for arg in ("--net", mode))
    args = ("--cpus", "2", "--name", NAME, "--hang-timeout", "3", *nets)
    with Guest(host, *args) as guest:
        for wake in WAYS:
            if wake is None:
                # Not before the guest is asleep, which takes seconds on a busy machine.
                guest.do(f"echo +20 >/sys/class/rtc/rtc0/wakealarm; {SLEEP}")
            else:
                start = len(guest.stdout)
                guest.type(f"{SLEEP}; echo woken-$?\n")
                while '"suspended"' not in pyvmm(host, "qmp", NAME, "query-status"):
                    pass
                pyvmm(host, *wake)
                guest.expect(r"woken-0\n", start)
            assert guest.do("nproc").strip() == "2"
            for nic in range(len(MODES)):
                check_ping(guest, nic)
        for nic in range(len(MODES)):
            check_tcp(guest, nic, megabytes=1)
        log = guest.do("dmesg")
        guest.leave()
    assert len(re.findall(r"Waking up from system sleep state S3", log)) == len(WAYS)
    # The kernel's clock does not jump: neither back to 0 nor to the end of time.
    stamps = [float(s) for s in re.findall(r"^\[ *([0-9.]+)\]", log, re.MULTILINE)]
    assert all(b - a > -1 for a, b in itertools.pairwise(stamps)) and stamps[-1] < 3600
    report = guest.report
    assert report["reboots"] == 0
    exits = report["exits"]["by_name"]
    for nic, mode in enumerate(MODES):  # a PCI card: to D3hot and back, each time
        register = f"pci-config net{nic} power management control"
        assert "mmio" in mode or exits[register] >= 2 * len(WAYS)
    for nic in report["nets"]:
        assert not nic["faults"] and not nic["driver_mistakes"] and not nic["kvm_refusals"]
