"""The kernel's tracepoints: the file is read as it is, whatever threads are called, and each event
finds its card.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.exits import kernel_trace
from pyvmm.exits.kernel_trace import KernelEvent, KernelTrace, Owners, other_machines, parse

#: As Linux 6.1 writes it.
TEXT = (Path(__file__).parents[1] / "data" / "explain" / "kernel-6.1.txt").read_text()
FDS = {17: "net0 queue 1 kick", 16: "net0 queue 0 call", 18: "net0 queue 2 call"}


def test_the_file_is_read() -> None:
    events, lost = parse(TEXT)
    assert lost == 3
    assert [(e.at, e.thread, e.event, e.key, e.length) for e in events] == [
        (103_000_007_000, "vcpu0 (4243)", "kvm_mmio", 0xC0003004, 0),
        (103_000_190_000, "a b-7 [1] x (4250)", "netif_receive_skb", "tap0", 84),
        (103_000_300_000, "ping (4260)", "net_dev_start_xmit", "tap0", 98),
        (103_000_320_000, "vhost-4242 (4250)", "kvm_apic_accept_irq", (0, 0x51), 0),
    ]
    assert (events[0].tid, events[0].value) == (4243, 1)


def line(event: str, fields: str) -> str:
    return f"vcpu0-4243 [000] ..... 103.000007: {event}: {fields}\n"


def test_kicks_on_the_fast_bus_and_at_ports() -> None:
    """As Intel's EPT has them, and a legacy card."""
    text = line("kvm_fast_mmio", "fast mmio at gpa 0xc0003004")
    text += line("kvm_pio", "pio_write at 0xc010 size 2 count 1 val 0x1 ")
    text += line("kvm_pio", "pio_read at 0xc010 size 2 count 1 val 0x1 ")
    events, _ = parse(text)
    assert [(e.event, e.key, e.value, e.tid) for e in events] == [
        ("kvm_fast_mmio", 0xC0003004, None, 4243),
        ("kvm_pio", 0xC010, 1, 4243),
    ]
    assert events[1].args() == {"address": "0xc010"}
    fds = {**FDS, 19: "net0 queue 0 kick"}
    owners = Owners(fds, {}, {4243})
    owners.note("KVM_IOEVENTFD", {"eventfd": 17, "address": 0xC0003004, "assign": True})
    for fd, queue in ((19, 0), (17, 1)):  # one port, whose value says which virtqueue
        args = {"eventfd": fd, "address": 0xC010, "assign": True, "value": queue}
        owners.note("KVM_IOEVENTFD", args)
    assert [owners.of(e) for e in events] == [("net0", "kick: queue 1")] * 2
    events[1].value = 0
    assert owners.of(events[1]) == ("net0", "kick: queue 0")
    events[1].value = 7
    assert owners.of(events[1])[0] == ""


def test_kicks_of_other_machines_are_not_ours() -> None:
    """Every machine of the same kind has its cards at the same addresses."""
    kick = parse(TEXT)[0][0]
    for threads, card in (({4243}, "net0"), ({4244}, ""), (set[int](), ""), (None, "net0")):
        owners = Owners(FDS, {}, threads)
        owners.note("KVM_IOEVENTFD", {"eventfd": 17, "address": 0xC0003004, "assign": True})
        assert owners.of(kick)[0] == card


def test_other_machines_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_trace, "KVM_DEBUGFS", tmp_path)
    assert other_machines() == 0
    for name in (f"{os.getpid()}-12", "999999999-7", "exits"):
        (tmp_path / name).mkdir()
    assert other_machines() == 1
    monkeypatch.setattr(kernel_trace, "KVM_DEBUGFS", tmp_path / "nowhere")
    assert other_machines() == 0


@pytest.mark.parametrize("text", ["", "\n", "x", "a-1 [0] . 1.000000: kvm_mmio: ?", "# entries-in"])
def test_other_files_have_no_events(text: str) -> None:
    assert parse(text) == ([], 0)


def test_events_find_their_card() -> None:
    owners = Owners(FDS, {"tap0": "net0"})
    kick, sent, received, call = parse(TEXT)[0]
    assert owners.of(kick)[0] == owners.of(call)[0] == ""
    owners.note("KVM_IOEVENTFD", {"eventfd": 17, "address": 0xC0003004, "assign": True})
    owners.note("KVM_SET_GSI_ROUTING", {"gsi": 25, "address": 0xFEE00000, "data": 0x50})
    owners.note("KVM_IRQFD", {"eventfd": 16, "gsi": 25, "assign": True})
    assert owners.of(call)[0] == "", "another vector"
    owners.note("KVM_SET_GSI_ROUTING", {"gsi": 25, "address": 0xFEE00000, "data": 0x51})
    assert owners.of(kick) == ("net0", "kick: queue 1")
    assert owners.of(sent) == ("net0", "send: 84 bytes")
    assert owners.of(received) == ("net0", "receive: 98 bytes")
    assert owners.of(call) == ("net0", "interrupt: queue 0")
    # The same vector on another CPU, with a physical and with a logical destination.
    owners.note("KVM_SET_GSI_ROUTING", {"gsi": 26, "address": 0xFEE01000, "data": 0x51})
    owners.note("KVM_IRQFD", {"eventfd": 18, "gsi": 26, "assign": True})
    for apic, queue in ((0, 0), (1, 2)):
        event = KernelEvent(1, "t", "kvm_apic_accept_irq", (apic, 0x51))
        assert owners.of(event) == ("net0", f"interrupt: queue {queue}")
    owners.note("KVM_SET_GSI_ROUTING", {"gsi": 26, "address": 0xFEE02004, "data": 0x51})
    assert owners.of(event) == ("net0", "interrupt: queue 2")
    owners.note("KVM_IRQFD", {"eventfd": 18, "gsi": 26, "assign": False})
    owners.note("KVM_IRQFD", {"eventfd": 16, "gsi": 25, "assign": False})
    assert owners.of(call)[0] == ""
    assert owners.of(KernelEvent(1, "t", "netif_receive_skb", "tap9", 1))[0] == ""


def test_what_a_killed_run_has_left_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_trace, "TRACEFS", tmp_path)
    monkeypatch.setattr(kernel_trace, "_remove", lambda instance: removed.append(instance.name))
    removed: list[str] = []
    own = f"pyvmm-{Path('/proc/self/ns/pid').stat().st_ino}"
    gone = [f"{own}-999999999", f"{own}-{os.getpid()}x"]
    # Whether a process of another PID namespace is there, nobody can see.
    stay = [f"{own}-{os.getpid()}", "pyvmm-1-999999999", "pyvmm-compare-7", "other"]
    for name in (*gone, *stay):
        (tmp_path / "instances" / name).mkdir(parents=True)
    kernel_trace._remove_orphans()
    assert sorted(removed) == sorted(gone)


def test_without_tracefs_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_trace, "TRACEFS", tmp_path)
    with pytest.raises(HostError, match=r"--trace-kernel: no tracepoints: .*be root, with tracefs"):
        KernelTrace(["tap0"])
