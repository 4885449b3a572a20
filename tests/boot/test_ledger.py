"""The exit ledger beside KVM's own counters, for each data path: what a kick costs, exactly; and
where Linux' exits go.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.explain.arrows import Diagram
from pyvmm.explain.page import page
from pyvmm.explain.read import load
from tests import reasons
from tests.boot.guest import run_all
from tests.boot.test_vhost_user import SOCKET, tap_backend, tap_space
from tests.trace_format import check_trace, in_order, names
from tests.unit.test_explain import check, embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

ROOT = Path(__file__).parents[2]
KICKS, CONTROL, HALTS = 500, 20, 30
MODES = {
    "notify=exit": "emulated,notify=exit",
    "emulated": "emulated",
    "vhost-net": "vhost-net",
    "vhost-user": f"vhost-user,socket={SOCKET}",
}


@pytest.fixture
def backend(host: Host) -> Iterator[None]:
    """A vhost-user back-end of ours."""
    with tap_space(host), tap_backend(host):
        yield


def guest_kernel(name: str) -> list[str]:
    """The options that boot a bare-metal guest."""
    subprocess.run(["flock", ROOT / "guest", "make", "-s", "-C", ROOT / "guest"], check=True)
    return ["--kernel", str(ROOT / "guest" / "build" / f"{name}.elf"), "--memory", "4M"]


def phase(report: dict[str, Any], name: str = "command") -> dict[str, Any]:
    """One phase of a report."""
    found: dict[str, Any] = next(p for p in report["phases"] if p["name"] == name)
    return found


def test_what_a_kick_costs(host: Host, backend: None) -> None:
    """The same 500 kicks: each an exit to the VMM with notify=exit, none with ioeventfd, and no
    wake-up of the VMM with vhost.
    """
    append = ("--append", f"count={KICKS} control={CONTROL} halts={HALTS}")
    runs = {mode: ["--net", net] for mode, net in MODES.items()}
    for mode, run in run_all(host, runs, *guest_kernel("kicks"), *append).items():
        assert run.status == 0, run
        command = phase(run.report)
        kicks = KICKS if mode == "notify=exit" else 0
        names = command["exits"]["by_name"]
        others = names.pop("intr", 0)
        assert names == {"net0 queue 2 notify (control)": CONTROL, "guest-control": 1} | (
            {"net0 queue 1 notify": kicks} if kicks else {}
        ), mode
        vcpu, metrics = command["kvm"]["vcpu0"], command["metrics"]
        assert vcpu["mmio_exits"] == kicks + CONTROL == metrics["mmio"], mode
        assert vcpu["io_exits"] == metrics["pio"] == 1, mode
        assert vcpu["halt_exits"] == metrics["halt"] == HALTS, mode
        assert vcpu.get("signal_exits", 0) == others, mode
        # Each kick leaves the guest all the same: who answers it is what differs.
        assert vcpu["exits"] >= KICKS + CONTROL + HALTS + 1, mode
        assert (metrics["notify"], metrics["control"]) == (kicks, CONTROL), mode
        assert metrics["user_exits"] == kicks + CONTROL + 1 + others, mode
        assert (metrics["kicks"] is None) == mode.startswith("vhost"), mode
        if mode == "emulated":
            # Wake-ups of the worker. On a busy host all kicks may be over before the first one.
            assert metrics["kicks"] <= KICKS
            assert run.report["nets"][0]["counters"]["tx_kicks"] > 0
        (nic,) = run.report["nets"]
        # What wakes up the VMM is its workers' threads, and with vhost there are none of ours.
        assert [w["name"].startswith("vhost-") for w in nic["workers"]] in ([], [True])


def test_the_processors_reasons(host: Host) -> None:
    """As in tests/intel, where they are VMX's."""
    _, kernel, *_ = guest_kernel("kicks")
    result = host.run(sys.executable, "-m", "tests.reasons", kernel)
    assert result.status == 0, result
    found = json.loads(result.out)
    assert not found["intel"]
    reasons.check(found)


def test_exits_of_each_kind(host: Host) -> None:
    """The guest of tests/host on AMD's KVM: counted exactly, in the phase that they belong to."""
    (run,) = run_all(host, {"exits": ["--net", "none"]}, *guest_kernel("exits")).values()
    assert run.status == 0, run
    command = phase(run.report)
    assert command["exits"]["kvm_run_returns"] == 356 + command["exits"]["by_reason"].get("intr", 0)
    assert command["metrics"]["pio"] == 246 and command["metrics"]["mmio"] == 110
    assert command["kvm"]["vcpu0"]["mmio_exits"] == 110
    assert phase(run.report, "boot")["exits"]["by_device"] == {"guest-control": 1}


#: What Linux' driver does to a card, in this order (virtio 1.2, 3.1.1).
SET_UP = [
    "read vendor id: 0x10411af4",
    "write BAR 0: 0xffffffff",
    "write BAR 0: 0xc0000000",
    "write common device_status: 0",
    "write common device_status: ACKNOWLEDGE",
    "write common device_status: ACKNOWLEDGE DRIVER",
    "write common driver_feature_select: 0x0",
    "write common driver_feature_select: 0x1",
    "write common driver_feature: VERSION_1 RING_RESET SPEED_DUPLEX",
    "write common device_status: ACKNOWLEDGE DRIVER FEATURES_OK",
    "write common queue_select: 0",
    "write common queue_enable: 1",
    "write common queue_select: 1",
    "write common queue_enable: 1",
    "write common device_status: ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK",
]
#: What then goes to whoever moves the packets.
PATHS = {
    "notify=exit": ["start data path"],
    "emulated": ["start data path"],
    "vhost-net": [
        "VHOST_SET_OWNER",
        "VHOST_GET_FEATURES",
        "VHOST_SET_FEATURES",
        "VHOST_SET_MEM_TABLE",
        *(
            f"VHOST_SET_VRING_{what}"
            for _ in range(2)
            for what in ("NUM", "BASE", "ADDR", "ERR", "CALL", "KICK")
        ),
        "VHOST_NET_SET_BACKEND",
        "VHOST_NET_SET_BACKEND",
    ],
    "vhost-user": [
        "send GET_FEATURES",
        "receive GET_FEATURES",
        "send SET_PROTOCOL_FEATURES",
        "send SET_OWNER",
        "send SET_FEATURES",
        "send ADD_MEM_REG",
        "send SET_VRING_NUM",
        "send SET_VRING_BASE",
        "send SET_VRING_ADDR",
        "send SET_VRING_CALL",
        "send SET_VRING_KICK",
        "send SET_VRING_ENABLE",
    ],
}


def check_timeline(path: Path, mode: str, report: dict[str, Any]) -> None:
    """The trace of a Linux guest with 40 pings shows what happened, and what did not."""
    trace = check_trace(path)
    assert in_order(SET_UP, names(trace, "net0", "driver")), names(trace, "net0", "driver")
    control = names(trace, "net0", "data path")
    assert in_order(PATHS[mode], control), control
    assert any(name.startswith(("RX ", "MAC ")) for name in control), "control commands"
    exits = names(trace, "vCPUs", "vcpu0")
    assert (
        len(exits) + sum(trace["otherData"]["dropped"].values())
        == report["exits"]["kvm_run_returns"]
    )
    kicks = [
        name for name in exits if name in ("write net0 queue 0 notify", "write net0 queue 1 notify")
    ]
    assert (
        len(kicks)
        == report["phases"][-1]["metrics"]["notify"]
        + phase(report)["metrics"]["notify"]
        + phase(report, "init")["metrics"]["notify"]
    )
    assert bool(kicks) == (mode == "notify=exit")
    worker = names(trace, "net0", "worker 0")
    # A worker that is late finds several kicks at once.
    assert ("kick of queue 1" in worker) == (not mode.startswith("vhost"))
    assert ("interrupt for queue 0" in worker) == (not mode.startswith("vhost"))
    assert ("KVM_IOEVENTFD" in names(trace, "KVM", "")) == (mode != "notify=exit")
    seen = Counter(name.partition(" ")[0] for name in names(trace, "net0", "kernel"))
    assert (seen["kick:"] > 0) == (mode != "notify=exit"), seen
    assert seen["interrupt:"] > 0
    # The socket's back-end has a tap of its own.
    assert (seen["send:"] >= 40 and seen["receive:"] >= 40) == (mode != "vhost-user"), seen
    one = load(str(path))
    (data,) = embedded(page([(mode, Diagram(one, one.card(None)))]))
    check(json.loads(path.read_text()), data)


def test_linux_by_register(host: Host, backend: None, tmp_path: Path) -> None:
    """A command's packets in every mode, apart from the boot; set-up by register; budgets hold and
    break; traces.
    """
    # ping -c 40 would wait for its last answer for a second only.
    script = "ping -i 0.02 192.168.100.1 | head -n 41 | grep -o 'seq=[0-9]*'"
    ping = ["sh", "-c", script]
    budget = {
        "notify=exit": ["--budget", "notify>=40", "--budget", "notify_per_kpacket>=300"],
        "emulated": [
            "--budget",
            "notify==0",
            "--budget",
            "exits[net0 common]==0",
            "--budget",
            "packets>=80",
        ],
        "vhost-net": [
            "--budget",
            "notify==0",
            "--budget",
            "packets>=80",
            "--budget",
            "boot.user_exits<=5",
        ],
        "vhost-user": ["--budget", "notify==0", "--budget", "command.irq_injections>=40"],
    }
    runs = {
        mode: [
            "--net",
            net,
            "--trace",
            str(tmp_path / mode),
            "--trace-kernel",
            *budget[mode],
            "--",
            *ping,
        ]
        for mode, net in MODES.items()
    }
    for mode, run in run_all(host, runs).items():
        assert run.out.splitlines() == [f"seq={n}" for n in range(40)], run
        assert run.status == (117 if mode == "vhost-net" else 0), run
        assert ("budget boot.user_exits<=5: " in run.err) == (mode == "vhost-net")
        report = run.report
        check_timeline(tmp_path / mode, mode, report)
        command, boot = phase(report), phase(report, "boot")
        kvm = command["kvm"]["vcpu0"]
        assert kvm.get("mmio_exits", 0) == command["metrics"]["mmio"], mode  # zeroes are left out
        assert kvm["io_exits"] >= command["metrics"]["pio"] > 0, mode
        assert kvm["exits"] >= command["metrics"]["user_exits"] > 0, mode
        assert boot["metrics"]["notify"] == 0 and boot["metrics"]["pio"] > 100
        whole = report["exits"]["by_name"]
        for register in (
            "net0 common device_status",
            "net0 common driver_feature",
            "net0 common queue_enable",
            "net0 queue 2 notify (control)",
            "net0 msix-table entry 0 vector control",
            "pci-config net0 BAR 0",
            "pci-config net0 MSI-X message control",
            "serial0 DLL",
            "rtc data",
        ):
            assert whole.get(register), (mode, register)
        nameless = {
            line["device"]
            for line in report["exits"]["lines"]
            if line.get("device") and not line["register"]
        }
        assert nameless <= {
            "guest-channel",
            "guest-control",
            "guest-input",
            "guest-stdout",
            "guest-stderr",
            "post",
            "pvpanic",
            "net0 isr",
        }
