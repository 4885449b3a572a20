"""Traces of bare-metal guests: the format, known content, bounds, and files that cannot be
written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.exits.trace import write
from pyvmm.kvm.stats import Stats
from pyvmm.kvm.vm import Vm
from tests.driver import wait_for
from tests.trace_format import check_trace, in_order, names
from tests.unit.test_explain import check, embedded

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
TIMEOUT = 120.0

#: The driver's dialogue with the device (virtio 1.2, 3.1.1), as the trace has it.
DISCOVERY = [
    "read vendor id: 0x10411af4",
    "write BAR 0: 0xffffffff",
    "read BAR 0: 0xffff8000",
    "write BAR 0: 0xc0000000",
    "write command: MEMORY MASTER",
    "read notify-cfg notify_off_multiplier: 0x4",
    "write common device_status: ACKNOWLEDGE",
    "write common device_status: ACKNOWLEDGE DRIVER",
    "write common driver_feature: MAC",
    "read common device_feature: VERSION_1 NOTIFICATION_DATA RING_RESET GUEST_HDRLEN SPEED_DUPLEX",
    "write common driver_feature: VERSION_1",
    "write common device_status: ACKNOWLEDGE DRIVER FEATURES_OK",
    "write common queue_select: 0",
    "write common queue_size: 16",
    "write common queue_msix_vector: vector 0",
    "write common queue_enable: 1",
    "write common queue_select: 1",
    "write common queue_msix_vector: none",
    "write common queue_enable: 1",
    "write common device_status: ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK",
]

#: The same of a legacy driver (4.1.4.10).
LEGACY = [
    "read vendor id: 0x10001af4",
    "write BAR 0: 0xc800",
    "write command: IO MEMORY MASTER",
    "write legacy device_status: 0",
    "write legacy device_status: ACKNOWLEDGE",
    "write legacy device_status: ACKNOWLEDGE DRIVER",
    "write legacy driver_feature: MAC ANY_LAYOUT",
    "read legacy config mac: 0x52",
    "write legacy queue_select: 0",
    "read legacy queue_size: 256",
    "write legacy queue_msix_vector: vector 0",
    "write legacy queue_select: 1",
    "write legacy queue_msix_vector: none",
    "write legacy device_status: ACKNOWLEDGE DRIVER DRIVER_OK",
]


def traced(vm: Machine, path: Path) -> dict[str, Any]:
    """Run to the end, write the trace, check it."""
    vm.start()
    outcome = vm.wait(TIMEOUT)
    assert (outcome.kind, outcome.status) == ("poweroff", 0)
    with path.open("wb") as f:
        write(vm, f.write)
    return check_trace(path)


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
def test_what_a_driver_and_its_packets_do(guest: Guest, tmp_path: Path, notify: str) -> None:
    # Whether the host has USO depends on its kernel.
    count, net = 20, Net("emulated", notify=notify, without="uso")
    append = f"count={count} irq=msix"
    with Machine(guest("pcinet"), memory="4M", append=append, nets=[net], trace=1 << 12) as vm:
        trace = traced(vm, tmp_path / "trace")
        returns = vm.ledger().total
        counters = vm.nets[0].device.datapath.counters()
        said = vm.stdout.expect(r"(\d+) kicks", TIMEOUT)
    assert trace["otherData"]["dropped"] == {}
    exits = names(trace, "vCPUs", "vcpu0")
    assert len(exits) == returns, "every return of KVM_RUN is there"
    assert in_order(DISCOVERY, names(trace, "net0", "driver"))
    # The guest knows how often it kicked: seldom, a worker that is awake takes a chain without.
    kicked = [exits.count(f"write net0 queue {queue} notify") for queue in (0, 1)]
    assert sum(kicked) == (int(said[1]) if notify == "exit" else 0)
    kvm = names(trace, "KVM", "")
    assert ("KVM_IOEVENTFD" in kvm) == (notify == "ioeventfd")
    assert in_order(["KVM_SET_GSI_ROUTING", "KVM_IRQFD"], kvm)
    assert in_order(["start data path", "stop data path"], names(trace, "net0", "data path"))
    worker = [e for (p, t), es in trace["tracks"].items() if t.startswith("worker 0") for e in es]
    for way, queue in (("rx", 0), ("tx", 1)):
        batches = [e for e in worker if e["cat"] == "batch" and e["args"]["queue"] == queue]
        assert len(batches) == counters[f"{way}_batches"]
        assert sum(e["args"]["chains"] for e in batches) == counters[f"{way}_packets"] >= count
        assert sum(e["args"]["interrupt"] for e in batches) == counters[f"{way}_calls"]
        interrupts = [e for e in worker if e["name"] == f"interrupt for queue {queue}"]
        assert len(interrupts) == counters[f"{way}_calls"]
        kicks = [e for e in worker if e["name"] == f"kick of queue {queue}"]
        assert len(kicks) == counters[f"{way}_kicks"]
    packets = [e for (p, t), es in trace["tracks"].items() if t.endswith("packets") for e in es]
    for queue, way, key in ((0, "receive", "rx"), (1, "send", "tx")):
        mine = [e for e in packets if e["args"]["queue"] == queue]
        assert len(mine) == counters[f"{key}_packets"]
        assert all(e["name"] == f"{way} {e['args']['length']} bytes" for e in mine)
        assert (
            sum(e["args"]["length"] - e["args"]["header"] for e in mine) == counters[f"{key}_bytes"]
        )
        assert all(e["args"]["segments"] and len(e["args"]["bytes"]) > 100 for e in mine)
    phases = names(trace, "guest", "phases")
    assert {"boot", "shutdown", "vmm", "end"} <= set(phases)


def test_a_legacy_driver_s_registers_have_names(guest: Guest, tmp_path: Path) -> None:
    """With MSI-X enabled, the vectors precede the device configuration."""
    net = Net("emulated", notify="exit", legacy="on")
    append = "count=5 irq=msix"
    with Machine(guest("legacynet"), memory="4M", append=append, nets=[net], trace=1 << 12) as vm:
        trace = traced(vm, tmp_path / "trace")
    assert in_order(LEGACY, names(trace, "net0", "driver"))
    assert names(trace, "vCPUs", "vcpu0").count("write net0 queue 1 notify") == 5


def test_the_latest_exits_are_kept(guest: Guest, tmp_path: Path) -> None:
    with Machine(guest("exits"), memory="4M", trace=64) as vm:
        trace = traced(vm, tmp_path / "trace")
        total = vm.ledger().total
    exits = names(trace, "vCPUs", "vcpu0")
    assert len(exits) == 64
    assert trace["otherData"]["dropped"] == {"vcpu0": total - 64}
    assert exits[-1].startswith("write acpi-power sleep control")


def test_values_and_strings(guest: Guest, tmp_path: Path) -> None:
    with Machine(guest("exits"), memory="4M", trace=1 << 10) as vm:
        trace = traced(vm, tmp_path / "trace")
    (exits,) = (es for (p, _), es in trace["tracks"].items() if p == "vCPUs")
    found = {
        (e["args"]["address"], e["args"]["size"], e["name"], e["args"]["value"])
        for e in exits
        if "args" in e
    }
    assert ("0x1230", 4, "write nobody", "0x3") in found
    assert ("0x1230", 4, "read nobody", "0xffffffff") in found
    assert ("0xd0000000", 8, "write nobody", "0x4") in found
    assert ("0xd0000000", 8, "read nobody", "0xffffffffffffffff") in found
    (string,) = (e for e in exits if e["args"].get("elements") == 64)
    assert string["args"]["address"] == "0x1234"


def test_while_it_runs_and_over_reboots(guest: Guest, tmp_path: Path) -> None:
    with Machine(
        guest("reset"), memory="4M", append="how=acpi", on_reboot="restart", trace=256
    ) as vm:
        vm.start()
        vm.stdout.expect(r"(reset: by acpi\n){3}", TIMEOUT)
        with (tmp_path / "running").open("wb") as f:
            write(vm, f.write)
        check_trace(tmp_path / "running")
        vm.stop()


def test_without_a_trace_there_is_nothing(guest: Guest) -> None:
    with Machine(guest("hello"), memory="2M", append="status=0", nets=[Net("emulated")]) as vm:
        assert vm.recorder is None and not vm.vcpus[0].c.trace
        vm.start()
        vm.wait(TIMEOUT)


# --- the command line -----------------------------------------------------------------------------


def run(guest: Guest, *args: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pyvmm",
        "run",
        "--host",
        "local",
        "--net",
        "none",
        "--memory",
        "4M",
    ]
    return subprocess.run(
        [*command, "--kernel", guest("hello"), "--append", "status=7", *args, "--", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )


def test_command_line(guest: Guest, tmp_path: Path) -> None:
    done = run(guest, "--trace", str(tmp_path / "trace"))
    assert (done.returncode, done.stderr) == (7, "")
    assert "write serial0 THR" in names(check_trace(tmp_path / "trace"), "vCPUs", "vcpu0")


def test_the_page_of_a_run(guest: Guest, tmp_path: Path) -> None:
    """``--explain`` draws what ``--trace`` writes: every event, each with its arrows."""
    trace, made = tmp_path / "trace", tmp_path / "page.html"
    options = ("--net", "emulated", "--append", "count=5 irq=msix", "--kernel", guest("pcinet"))
    done = run(guest, *options, "--trace", str(trace), "--explain", str(made))
    assert (done.returncode, done.stderr) == (0, "")
    check_trace(trace)
    (data,) = embedded(made.read_text())
    check(json.loads(trace.read_text()), data)
    assert data["left"] == 0 and data["counts"]["packet"]["events"] >= 10


def test_a_page_without_a_card(guest: Guest, tmp_path: Path) -> None:
    done = run(guest, "--explain", str(tmp_path / "page.html"))
    assert done.returncode == 7 and not (tmp_path / "page.html").exists()
    assert done.stderr.endswith("is lost: the trace has no card; trace a run with a network card\n")


def test_disk_full_does_not_harm_the_run(guest: Guest) -> None:
    done = run(guest, "--trace", "/dev/full")
    assert done.returncode == 7
    assert done.stderr == "pyvmm: --trace /dev/full is lost: No space left on device\n"
    assert done.stdout == "hello, stdout\n"


def test_bad_use_is_told_before_the_guest_runs(guest: Guest) -> None:
    for args in (
        ("--trace", "/nowhere/trace"),
        ("--explain", "/nowhere/page"),
        ("--trace", "x", "--trace-events", "3"),
        ("--trace-kernel",),
    ):
        done = run(guest, *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done


def test_one_thread_reads_the_names_of_statistics(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace is written while the guest restarts: whoever waits for the names of the old VM's
    statistics gets them, although the descriptor is closed as soon as the first thread has them.
    """
    stats = Stats(vm.fileno())
    reads, hold = [], threading.Event()
    read = Stats._read_table

    def slow(self: Stats) -> None:
        reads.append(threading.get_ident())
        assert hold.wait(TIMEOUT)
        read(self)

    def read_and_close() -> list[dict[str, object]]:
        schema = stats.schema
        stats.close()
        return schema

    monkeypatch.setattr(Stats, "_read_table", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_and_close)
        assert wait_for(lambda: bool(reads))
        second = pool.submit(lambda: stats.schema)
        hold.set()
        assert first.result() == second.result() != []
    assert len(reads) == 1
