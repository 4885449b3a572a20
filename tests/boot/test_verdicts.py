"""``--fail-on`` with kernels that are really broken, and with kernels that are not."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot import breaker
from tests.boot.guest import PATIENCE, PYVMM, Guest, run_all
from tests.boot.test_control import pyvmm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
NAME = f"broken-{os.getpid()}"
#: All watchdogs of the guest bark soon, and the console has the kernel's warnings again.
SOON = """
dmesg -n 5; cd /proc/sys/kernel
echo 1 >watchdog_thresh; echo 1 >hung_task_timeout_secs
echo 3 >/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout
test ! -e /sys/module/kfence || echo 1 >/sys/module/kfence/parameters/sample_interval
"""
#: What the kernel may say besides, because the host is slow and the watchdogs are quick.
BESIDES = {"lockup", "rcu-stall"}
#: Image -> breaks, with the kinds of their reports. Tasks hang first: after an oops, Linux does not
#: look for any.
BREAKS = {
    "default": {
        "uninterruptible": "hung-task",
        "spin": "lockup",
        "refcount": "warning",
        "divide": "oops",
        "list": "bug",
    },
    "6.12": {
        "unhandled-irq": "irq",
        "locked-sleep": "bug",
        "warning": "warning",
        "use-after-free": "sanitizer",
        "divide": "oops",
        "double-free": "bug",
    },
}
#: Seconds; the guest's watchdog barks after two. Longer than a busy host makes a guest wait.
PAUSE = 12.0


@pytest.mark.parametrize("image", BREAKS)
def test_a_broken_kernel_never_passes(host: Host, tmp_path: Path, image: str) -> None:
    """One boot, broken in several ways; the command itself ends well."""
    verdict = tmp_path / "verdict.json"
    args = ("--net", "none", "--image", image, "--fail-on", "all", "--json", str(verdict))
    with Guest(host, *args) as guest:
        assert "loglevel=5" in guest.do("cat /proc/cmdline"), "the image's own says quiet"
        where = breaker.symbols(guest)
        guest.do(SOON)
        for name in BREAKS[image]:
            breaker.write(guest, where[breaker.VICTIM], breaker.code(name, where))
            if name == "spin":
                # A busy host delays the watchdog, and each report of another one puts it off.
                start = len(guest.stdout)
                guest.type("cat /proc/version\n")
                guest.expect("BUG: soft lockup", start)
                breaker.release(guest, where)
            guest.sh("cat /proc/version")
        guest.type("exit 0\n")
        status = guest.wait()
    found: dict[str, Any] = json.loads(verdict.read_text())
    assert (status, found["verdict"], found["status"]) == (118, "trouble", 0), repr(guest)
    kinds = [report["kind"] for report in found["reports"]]
    assert ("lockup" in kinds) >= ("spin" in BREAKS[image]), found["reports"]
    # A break may cause several reports of its kind, one after another.
    once = [k for k, _ in itertools.groupby(k for k in kinds if k not in BESIDES)]
    assert once == [k for k in BREAKS[image].values() if k not in BESIDES], found["reports"]


def test_out_of_memory_is_a_report_and_clean_boots_have_none(host: Host) -> None:
    """No break, but the real thing; and both kernels, with all kinds."""
    talk = "echo 'BUG: Oops: 0000 [#1]' >/dev/console; true"
    runs = run_all(
        host,
        {
            "oom": ["--memory", "128M", "--", "sh", "-c", "tail /dev/zero; exit 3"],
            "clean": ["--net", "emulated", "--", "sh", "-c", talk],
            "6.12": ["--net", "emulated", "--image", "6.12", "--", "sh", "-c", talk],
        },
        "--fail-on",
        "all",
        "--append",
        "loglevel=7",
    )
    assert runs["oom"].status == 118, repr(runs["oom"])
    assert "reported oom: tail invoked oom-killer: " in runs["oom"].err.splitlines()[-1]
    for name in ("clean", "6.12"):
        assert runs[name].status == 0, repr(runs[name])


def lockups(text: str) -> list[float]:
    """The seconds of the soft lockups and RCU stalls in a kernel's log that a pause of PAUSE
    seconds explains. A shorter one is the fault of a host that was busy meanwhile.
    """
    found = [float(s) for s in re.findall(r"soft lockup - CPU#0 stuck for (\d+)s", text)]
    stalls = "".join(re.findall(r"rcu: .*\n", text))
    found += [int(n) / breaker.HZ for n in re.findall(r"(\d+) jiffies", stalls)]
    return [s for s in found if s >= PAUSE - 2]


def test_a_pause_is_no_lockup(host: Host) -> None:
    """Busy guests are paused by the control socket, by signals, and by a reader that does not read;
    their watchdogs learn of it.
    """
    script = f"\"$@\" | {{ head -c 2; sleep {PAUSE}; grep -v '^y$'; }}"
    command = f"{SOON} while :; do :; done & yes | head -c 400000; sleep 3; dmesg; kill -9 $!"
    run = [*PYVMM, "run", "--host", "local", "--net", "none", "--", "sh", "-c", command]
    unread = host.start("sh", "-c", script, "sh", *run)
    with Guest(host, "--net", "none", "--name", NAME) as guest:
        guest.do(SOON + "dmesg -n 1; dmesg -c >/dev/null")
        guest.start("while :; do :; done")
        for how in ("control socket", "signal"):
            if how == "signal":
                host.run("kill", "-STOP", str(guest.pid))
            else:
                pyvmm(host, "stop", NAME)
            time.sleep(PAUSE)
            if how == "signal":
                host.run("kill", "-CONT", str(guest.pid))
            else:
                pyvmm(host, "cont", NAME)
            text = guest.do("sleep 3; dmesg -c")
            assert not lockups(text), (how, text)
    result = unread.result(PATIENCE)
    assert result.out.startswith("y\n") and "] " in result.out, result
    assert not lockups(result.out), result
