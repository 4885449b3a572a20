"""`pyvmm compare` for real: forwarded to the testbed, results here; the classic result; and Ctrl-C
in the middle.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from pyvmm.compare.schema import schema
from tests.boot.guest import PATIENCE, PYVMM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.boot.guest import Host

ROOT = Path(__file__).resolve().parents[2]
LEFTOVERS = """
grep -alE '[-]m.pyvmm.(compare|backend)' /proc/[0-9]*/cmdline
ls -d /run/pyvmm-compare-* /sys/kernel/tracing/instances/*
true
"""


@pytest.fixture(autouse=True)
def nothing_of_ours(host: Host, nothing_left: None) -> Iterator[None]:
    """Beyond what ``nothing_left`` looks for: our processes, sockets and tracing instances."""
    yield
    host.wait_until(
        lambda: host.run("sh", "-c", LEFTOVERS).out == "",
        lambda: host.run("sh", "-c", LEFTOVERS).out,
    )


def compare(host: Host, directory: Path, *args: str) -> subprocess.Popen[str]:
    """``pyvmm compare --host testbed ARGS`` from ``directory``, with its results in files there."""
    return subprocess.Popen(
        [*PYVMM, "compare", "--host", "testbed", *args, "--json", "r.json", "--html", "r.html"],
        cwd=directory,
        env={**os.environ, "PYVMM_TESTBED": host.testbed.name},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def figures(document: dict[str, Any], mode: str, workload: str) -> dict[str, Any]:
    """A workload's figures in the first run of a mode."""
    run = next(r for r in document["runs"] if r["mode"] == mode)
    assert run["error"] is None, run
    got: dict[str, Any] = next(w for w in run["workloads"] if w["name"] == workload)
    assert got["error"] is None, got
    return got


def test_the_classic_result(host: Host, tmp_path: Path) -> None:
    """notify=exit: one exit to userspace a kick. vhost-net: none, and nothing in the VMM wakes up
    for a packet. Each is counted in a process that is confined.
    """
    modes = ["emulated:notify=exit", "vhost-net"]
    child = compare(
        host,
        tmp_path,
        *("--modes", ",".join(modes), "--peers", "kvmtool", "--workload", "ping,tcp-tx"),
        *("--repeat", "1", "--seconds", "1", "--reasons", "--sandbox", "on"),
    )
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 1, (out, err)  # kvmtool is not there
    assert "kvmtool cannot run here: kvmtool is not installed" in out, out
    document = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(document, schema())
    assert not document["partial"] and [r["mode"] for r in document["runs"]] == modes
    assert [r["sandbox"] for r in document["runs"]] == ["on", "on"], document["runs"]
    for workload in ("ping", "tcp-tx"):
        exit_, vhost = (figures(document, mode, workload) for mode in modes)
        frames = exit_["packets"]["packets_from_guest"] + exit_["packets"]["packets_to_guest"]
        # An answer to a ping is a kick of its own, unless the worker is still busy; a TCP stream's
        # packets share them. Buffers in the place of received frames may be a kick, too.
        assert (10 if workload == "ping" else 1) <= exit_["causes"]["notify"] <= frames, exit_
        assert vhost["causes"]["notify"] == 0, vhost
        for one in (exit_, vhost):
            assert one["user_exits"] <= one["kvm"]["exits"] and one["interrupts"] > 0, one
            assert sum(one["causes"].values()) == one["user_exits"] == sum(one["lines"].values()), (
                one
            )
            # What KVM itself counts as memory accesses to userspace; the two are not read at the
            # same instant.
            assert (
                abs(one["kvm"]["mmio_exits"] - one["causes"]["notify"] - one["causes"]["mmio"]) <= 3
            ), one
            assert len(one["samples"]["t"]) > 2, one
            assert sum(one["reasons"].values()) > one["user_exits"], one
        assert exit_["threads"]["worker"]["voluntary"] > 0 and "vhost" not in exit_["threads"]
        assert vhost["threads"]["vhost"]["voluntary"] > 0 and "worker" not in vhost["threads"]
        assert vhost["threads"]["vmm"]["voluntary"] == 0, vhost["threads"]
    assert figures(document, modes[0], "ping")["rtt_ms"] > 0
    assert figures(document, modes[1], "tcp-tx")["throughput_mbit_s"] > 0
    for mode in document["modes"][:2]:
        assert (
            {"VERSION_1", "MRG_RXBUF", "EVENT_IDX"}
            <= set(mode["negotiated"])
            <= set(mode["offered"])
        )
    assert "<svg" in (tmp_path / "r.html").read_text()


EXITS = """
import json, sys
from pyvmm import Machine
from pyvmm.compare.counters import ExitTrace, causes
with ExitTrace(reasons=True) as trace:
    with Machine(sys.argv[1], memory="2M") as vm:
        vm.start()
        vm.wait(60)
        tids = [vcpu.thread_id for vcpu in vm.vcpus]
        exits = vm.kvm_stats()["vcpus"][0]["exits"]
        print(json.dumps([trace.counts(tids), causes(vm.ledger()), trace.reasons(tids), exits]))
"""


def test_exits_seen_from_outside(host: Host) -> None:
    """What the tracepoint's histogram counts of a guest is what our own ledger does, to the last
    exit.
    """
    subprocess.run(["flock", ROOT / "guest", "make", "-s", "-C", ROOT / "guest"], check=True)
    kernel = str(ROOT / "guest" / "build" / "exits.elf")
    result = host.run(sys.executable, "-c", EXITS, kernel)
    assert result.status == 0, result
    outside, ledger, reasons, exits = json.loads(result.out)
    assert outside == ledger and sum(ledger.values()) > 200, (outside, ledger)
    # One exit of the processor may be several to userspace, and the other way round.
    assert reasons["npf"] > 50 and reasons["io"] > 50, reasons
    assert sum(reasons.values()) == exits, (reasons, exits)


def test_ctrl_c(host: Host, tmp_path: Path) -> None:
    """In the middle of a workload with a back-end beside the guest: all ends, and what there is by
    then is shown and written.
    """
    child = compare(
        host,
        tmp_path,
        "--modes",
        "vhost-user",
        "--workload",
        "ping,idle,tcp-tx,tcp-rx,udp-small",  # those after the ping give the signal time
        "--seconds",
        "1",
        "--repeat",
        "1000",
        "--reasons",  # whose files the process of the boot has open
    )
    assert child.stderr
    said = ""
    for line in child.stderr:
        said += line
        if "  ping: " in line:
            break
    assert " exits to userspace" in said, said
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130, (out, said, err)
    assert "PARTIAL: broken off after 1 of 1000 boots" in out and "Traceback" not in err, (out, err)
    document = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(document, schema())
    assert document["runs"][0]["sandbox"] == "on", document["runs"]
    ping = figures(document, "vhost-user", "ping")
    assert document["partial"] and ping["user_exits"] == 0
    backend = ping["threads"]["backend"]
    assert backend["cpu_s"] > 0 and backend["voluntary"] > 0, "another process moves the packets"
    assert "Partial results" in (tmp_path / "r.html").read_text()
