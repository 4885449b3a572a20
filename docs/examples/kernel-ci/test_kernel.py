"""One guest for the whole file: what a kernel must do at the least."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.pyvmm(cpus=2, net="emulated", fail_on="all", hang_timeout=60)


def test_processors(vm):
    assert vm.run("nproc").check().out.strip() == "2"


def test_memory(vm):
    total = re.search(
        r"^MemTotal: +(\d+) kB", vm.run("cat /proc/meminfo").check().out, re.MULTILINE
    )
    assert int(total[1]) > 150_000, "of 256 MiB"


def test_files(vm):
    """Input goes in, output and errors come out apart, byte for byte."""
    data = bytes(range(256)) * 100
    vm.run("cat >/tmp/data", input=data).check()
    result = vm.run("cat /tmp/data; echo done >&2").check()
    assert (result.stdout, result.err) == (data, "done\n")


@pytest.mark.parametrize("size", [56, 1400, 8000])
def test_ping(vm, size):
    vm.run(["ping", "-c", "3", "-i", "0.2", "-s", str(size), "192.168.100.1"]).check()


def test_packets_cost_no_exits(vm):
    """A kick is an ioeventfd and an interrupt an irqfd: no packet may bring the guest out to
    userspace.
    """
    with vm.exits:
        vm.run("ping -q -c 50 -i 0.01 192.168.100.1").check()
        vm.exits.assert_within("packets>=100", user_exits=200, notify=0)


def test_time_goes_on(vm):
    begin = float(vm.run("cut -d' ' -f1 /proc/uptime").check().out)
    vm.run("sleep 1").check()
    assert float(vm.run("cut -d' ' -f1 /proc/uptime").check().out) >= begin + 1
