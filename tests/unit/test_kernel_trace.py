"""The kernel's tracepoints: the file is read as it is, whatever threads are called, and each event
finds its card.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.exits import kernel_trace
from pyvmm.exits.kernel_trace import KernelEvent, KernelTrace, Owners, parse

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
    for name in (f"pyvmm-{os.getpid()}x", "pyvmm-999999999", "pyvmm-1", "pyvmm-compare-7", "other"):
        (tmp_path / "instances" / name).mkdir(parents=True)
    kernel_trace._remove_orphans()
    assert sorted(removed) == sorted(["pyvmm-999999999", f"pyvmm-{os.getpid()}x"])


def test_without_tracefs_there_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_trace, "TRACEFS", tmp_path)
    with pytest.raises(HostError, match=r"--trace-kernel: no tracepoints: .*be root, with tracefs"):
        KernelTrace(["tap0"])
