"""pyvmm under kvm_intel: its own tests of bare-metal guests, run there, and Linux guests."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pyvmm.errors import TestbedError
from pyvmm.testbed.testbed import Testbed
from tests import reasons
from tests.intel.conftest import L1, PATIENCE, ROOT

PYVMM = f"{sys.executable} -m pyvmm"
#: A part of the processor's name (CPUID) of each model of Bochs.
BRANDS = {"corei7_haswell_4770": "i7-4770", "broadwell_ult": "5Y70"}
#: Guests that spin with interrupts disabled: Bochs freezes L1.
FREEZE = (
    "tests/host/test_transport.py::test_every_kick_is_answered_and_none_leaves_a_busy_loop[spinning]",
)
DESELECT = [f"--deselect={name}" for name in FREEZE]
#: What says most in a minute: long mode, every end, several processors, timers, counted exits.
SOME = "hello or entry or processors or kernel_devices or told_apart or accounted or restart"


# --- the testbed itself ---------------------------------------------------------------------------


@pytest.mark.intel_quick
def test_it_is_kvm_intel(l1: L1) -> None:
    out = l1.run(*PYVMM.split(), "doctor")
    assert out.status == 0, out
    assert "kvm_intel: Intel VMX, nested" in out.out and "/dev/vhost-net" in out.out
    assert "lacks" not in out.out
    flags = l1.sh("grep -m1 -o 'ept\\|vnmi' /proc/cpuinfo || grep -m1 'vmx flags' /proc/cpuinfo")
    assert flags


@pytest.mark.intel_quick
def test_streams_status_and_files(l1: L1, tmp_path: Path) -> None:
    result = l1.bed.run(["sh", "-c", "echo out; echo err >&2; cat; exit 7"], input=b"in\n")
    assert (result.status, result.out, result.err) == (7, "out\nin\n", "err\n")
    assert l1.run("sh", "-c", "kill -SEGV $$").status == 139
    assert l1.run("no-such-command").status == 127
    # Every byte arrives, both ways, also more than any buffer holds.
    data = bytes(range(256)) * 256
    assert l1.bed.run(["cat"], input=data, timeout=PATIENCE).stdout == data


def test_files_travel_and_come_back(tmp_path: Path, built: None) -> None:
    """A testbed of its own, because files travel when it starts."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "given").write_text("from here")
    (out / "kept").write_text("as it was")
    script = f"""cd {out}; cat given; mkdir d; head -c 70000 /dev/urandom >d/new
        sha256sum <d/new; echo changed >given"""
    said: list[str] = []
    with Testbed("check-travel", cpu="intel", writable=[str(out)], progress=said.append) as bed:
        result = bed.run(["sh", "-ec", script], timeout=PATIENCE)
        assert result.status == 0, result
        status = bed.status()
        assert status and not status["shares"] and status["writable"] == [str(out)]
    content = (out / "d" / "new").read_bytes()
    assert result.out.split() == ["from", f"here{hashlib.sha256(content).hexdigest()}", "-"]
    assert (out / "given").read_text() == "changed\n" and (out / "kept").read_text() == "as it was"
    assert f"came back: {out}/d/new" in said and f"came back: {out}/kept" not in said


def test_an_idle_l1_costs_nothing(l1: L1) -> None:
    status = l1.bed.status()
    assert status
    bochs = psutil.Process(status["pid"]).children()[0]
    until = time.monotonic() + 60
    while not (status := l1.bed.status()) or not status["resting"]:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert bochs.status() == psutil.STATUS_STOPPED
    assert l1.sh("echo it goes on") == "it goes on\n"


def test_a_frozen_l1_is_ended(built: None) -> None:
    """The kernel of L1 panics: no agent answers any more, and no time-out inside fires."""
    with (
        Testbed("check-frozen", cpu="intel") as bed,
        pytest.raises(TestbedError, match="Kernel panic"),
    ):
        bed.run(["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"], timeout=PATIENCE)


# --- bare-metal guests ----------------------------------------------------------------------------


@pytest.mark.intel_quick
def test_some_guests(l1: L1) -> None:
    l1.pytest("tests/host/test_guests.py", "-k", SOME)


def test_guests(l1: L1) -> None:
    l1.pytest("tests/host/test_guests.py", "-k", "not dpdk")  # no DPDK has travelled


@pytest.mark.parametrize(
    "name", ["ledger", "test_command", "testdev", "trace", "transport", "verdicts"]
)
def test_exits_rings_and_verdicts(l1: L1, name: str) -> None:
    l1.pytest(f"tests/host/test_{name}.py", *DESELECT)


def test_the_processors_reasons(l1: L1) -> None:
    """As in tests/boot/test_ledger.py, where they are SVM's."""
    kernel = ROOT / "guest" / "build" / "kicks.elf"
    found = json.loads(l1.sh(f"{sys.executable} -m tests.reasons {kernel}"))
    assert found["intel"]
    print(reasons.check(found))


@pytest.mark.parametrize("option", ["ept=0", "unrestricted_guest=0"])
def test_guests_and_linux_without(l1_of: Callable[..., L1], option: str) -> None:
    """Shadow paging; real mode by a virtual-8086 task and the emulator."""
    l1 = l1_of(option, kvm=[option])
    name = option.partition("=")[0]
    assert l1.sh(f"cat /sys/module/kvm_intel/parameters/{name}") == "N\n"
    l1.pytest("tests/host/test_guests.py", "-k", SOME)
    assert "\n2\n" in ping(l1, "emulated", "--cpus", "2")


def test_guests_under_linux_6_12(l1_of: Callable[..., L1]) -> None:
    l1 = l1_of("6.12", kernel="6.12")
    assert l1.sh("uname -r").startswith("6.12.")
    l1.pytest("tests/host/test_guests.py", "-k", SOME)
    ping(l1, "vhost-net")


# --- Linux guests ---------------------------------------------------------------------------------


def ping(l1: L1, net: str, *options: str) -> str:
    """Boot Linux with a card, and ping the host."""
    words = " ".join(options)
    out = l1.sh(
        f"{PYVMM} run --host local --net {net} {words} -- "
        "sh -c 'for i in 1 2 3; do ping -c 1 -W 60 192.168.100.1; done;"
        " grep -m1 model.name /proc/cpuinfo; nproc; grep virtio /proc/interrupts'"
    )
    assert out.count("1 packets received") == 3, out  # of several, ping waits little for the last
    return out


@pytest.mark.intel_quick
def test_linux_pings_by_vhost_net(l1: L1) -> None:
    out = ping(l1, "vhost-net", "--cpus", "2")
    assert "\n2\n" in out, "the second vCPU has started"
    status = l1.bed.status()
    assert status is not None
    name = re.search(r"(?m)^model name\s*: (.*)$", out)
    assert name and BRANDS[status["model"]] in name[1], "the guest has the CPU's name"
    assert "MSI" in out


@pytest.mark.parametrize("net", ["emulated", "vhost-user", "emulated,notify=exit"])
def test_linux_pings(l1: L1, net: str) -> None:
    ping(l1, net)


def test_intx(l1: L1) -> None:
    """The interrupt comes by the line."""
    assert "IO-APIC" in ping(l1, "emulated", "--append", "pci=nomsi")


def test_ten_switches_under_tcp_and_ping(l1: L1) -> None:
    """No ping is lost over ten live switches, and TCP works on each data path."""
    switches = ("vhost-net", "vhost-user", "emulated") * 3 + ("vhost-net",)
    l1.sh(
        f"""cd /tmp
        {PYVMM} run --host local --detach=log --name sw --report report \\
            --net emulated,switchable=vhost-net+vhost-user -- ping -i 1 -c 100000 192.168.100.1
        {PYVMM} exec --net sw --host local -- iperf3 -s -D
        for to in {" ".join(switches)}; do
            {PYVMM} switch --host local sw $to
            {PYVMM} exec --host local sw -- iperf3 -c 192.168.100.1 -n 200K
        done
        # That ends the guest, perhaps before it answers.
        {PYVMM} exec --host local sw -- killall -INT ping || [ $? = 119 ]
        """,
    )
    out = l1.sh("cd /tmp; until [ -s report ]; do sleep 0.2; done; cat log")
    assert re.search(r"(\d+) packets transmitted, \1 packets received", out), out
    report = json.loads(l1.sh("cat /tmp/report"))
    (nic,) = report["nets"]
    assert [s["outcome"] for s in nic["switches"]] == ["switched"] * len(switches)
    exits = report["exits"]
    assert sum(exits["by_device"].values()) == exits["kvm_run_returns"]


def test_reboot(l1: L1) -> None:
    command = [*PYVMM.split(), "run", "--host", "local", "--net", "none", "--", "reboot", "-f"]
    result = l1.run(*command)
    assert result.status == 121, result


def test_the_project_is_there(l1: L1) -> None:
    """What a user calls, by its short name, from any directory."""
    assert "usage: pyvmm" in l1.bed.run(["pyvmm", "--help"], cwd="/").out
    assert l1.sh("pwd").strip() == str(ROOT)
