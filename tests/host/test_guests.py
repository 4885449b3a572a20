"""The machine, proved by bare-metal guests (guest/README.md says what each does)."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.errors import (
    GuestPanic,
    GuestReboot,
    GuestTimeout,
    KvmRunError,
    TripleFault,
    UsageError,
)
from pyvmm.exits.trace import write
from pyvmm.kvm import Kvm
from pyvmm.kvm.vm import Vm
from pyvmm.outcome import Outcome
from pyvmm.spec import linux_boot as lb
from pyvmm.spec.platform import PORT_ACPI_SLEEP_CONTROL, PORT_GUEST_CONTROL
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1
from tests.dpdk import TestPmd
from tests.driver import wait_for

Guest = Callable[[str], str]
#: Seconds. The guests need a tenth of one, and many times as long if the processors are busy.
TIMEOUT = 120.0


def run(vm: Machine) -> Outcome:
    """To the end; shows what the guest said where that is not an orderly power-off."""
    vm.start()
    outcome = vm.wait(TIMEOUT)
    for stream in (vm.console, vm.stdout):
        stream.drain(TIMEOUT)  # the machine's end waits a second for its readers, and no longer
    print(vm.stdout.text.decode(), outcome)
    return outcome


# --- start and end --------------------------------------------------------------------------------


def test_hello(guest: Guest) -> None:
    with Machine(guest("hello"), memory="2M", append="status=42") as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 42)
        assert vm.boot.kind == "ELF by PVH note"
        assert vm.stdout.text == b"hello, stdout\n"
        assert vm.console.text == b"hello, console\r\n"


def test_more_vcpus_than_kvm_has(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Kvm.extension

    def few(self: Kvm, name: str) -> int:
        return 2 if name == "KVM_CAP_MAX_VCPUS" else real(self, name)

    monkeypatch.setattr(Kvm, "extension", few)
    with pytest.raises(UsageError, match=r"--cpus 3: this host's KVM has at most 2 vCPUs"):
        Machine(guest("hello"), memory="2M", cpus=3)


def test_entry_in_long_mode(guest: Guest, tmp_path: Path) -> None:
    """Without its PVH note the same ELF is entered in 64-bit mode, with the zero page."""
    image = bytearray(Path(guest("smp")).read_bytes())
    count = struct.unpack_from("<H", image, 56)[0]
    for at in range(lb.EHDR_SIZE, lb.EHDR_SIZE + count * lb.PHDR_SIZE, lb.PHDR_SIZE):
        if struct.unpack_from("<I", image, at)[0] == lb.PT_NOTE:
            struct.pack_into("<I", image, at, 0)
    (tmp_path / "smp.elf").write_bytes(image)
    with Machine(str(tmp_path / "smp.elf"), memory="4M", cpus=2, append="cpus=2") as vm:
        outcome = run(vm)
        assert vm.boot.mode == "long64"
        assert (outcome.kind, outcome.status) == ("poweroff", 0)


@pytest.mark.parametrize(
    ("how", "kind", "error"),
    [
        ("poweroff", "poweroff", None),
        ("acpi", "reboot", GuestReboot),
        ("cf9", "reboot", GuestReboot),
        ("i8042", "reboot", GuestReboot),
        ("vector", "reboot", GuestReboot),
        ("triple", "triple-fault", TripleFault),
        ("panic", "panic", GuestPanic),
        ("nowhere", "kvm-error", KvmRunError),
    ],
)
def test_every_end_is_told_apart(
    guest: Guest, how: str, kind: str, error: type[Exception] | None
) -> None:
    with Machine(guest("reset"), memory="4M", cpus=2, append=f"how={how}") as vm:
        outcome = run(vm)
        assert outcome.kind == kind
        raised = outcome.error()
        assert type(raised) is (error or type(None))
        if kind in ("triple-fault", "kvm-error"):
            assert outcome.registers
            assert "rip" in outcome.registers


@pytest.mark.parametrize("how", ["hang", "halt"])
def test_time_out(guest: Guest, how: str) -> None:
    with Machine(guest("reset"), memory="4M", append=f"how={how}") as vm:
        vm.start()
        vm.stdout.expect("reset: by", TIMEOUT)
        begin = time.monotonic()
        outcome = vm.wait(0.2)
        assert time.monotonic() - begin < TIMEOUT
        assert isinstance(outcome.error(), GuestTimeout)


def test_restart(guest: Guest) -> None:
    """Memory, devices and vCPUs start over, time and again; streams and ledger go on."""
    with Machine(guest("reset"), memory="4M", cpus=2, append="how=acpi", on_reboot="restart") as vm:
        vm.start()
        vm.stdout.expect(r"(reset: by acpi\n){4}", TIMEOUT)
        vm.stop()
        assert vm.reboots >= 3
        ledger = vm.ledger()
        assert ledger.total == sum(line.count for line in ledger.lines)


def test_statistics_while_the_guest_restarts(guest: Guest) -> None:
    """The statistics of a VM end with the VM, and whoever asks gets those of the next one."""
    with Machine(guest("reset"), memory="4M", append="how=acpi", on_reboot="restart") as vm:
        vm.start()
        end = time.monotonic() + TIMEOUT
        while vm.reboots < 10:
            assert time.monotonic() < end
            stats = vm.kvm_stats()
            assert stats is None or len(stats["vcpus"]) == 1
            vm.report()
        vm.stop()


def test_threads_end(guest: Guest) -> None:
    before = set(threading.enumerate())  # some that are just ending may be among them
    for _ in range(3):
        with Machine(guest("hello"), memory="2M", cpus=4) as vm:
            run(vm)
    assert not set(threading.enumerate()) - before


# --- exits ----------------------------------------------------------------------------------------

NOBODY = 0x1230
STRINGS = 0x1234
ADDRESS = 0xD000_0000
#: (reason, address, size, write) -> (exits, accesses)
EXITS = {
    ("io", NOBODY, 1, True): (10, 10),
    ("io", NOBODY, 2, True): (20, 20),
    ("io", NOBODY, 4, True): (30, 30),
    ("io", NOBODY, 1, False): (11, 11),
    ("io", NOBODY, 2, False): (21, 21),
    ("io", NOBODY, 4, False): (31, 31),
    ("io", STRINGS, 1, True): (64, 64),
    ("io", STRINGS, 1, False): (1, 64),
    ("mmio", ADDRESS, 1, True): (5, 5),
    ("mmio", ADDRESS, 2, True): (6, 6),
    ("mmio", ADDRESS, 4, True): (7, 7),
    ("mmio", ADDRESS, 8, True): (8, 8),
    ("mmio", ADDRESS, 1, False): (9, 9),
    ("mmio", ADDRESS, 2, False): (10, 10),
    ("mmio", ADDRESS, 4, False): (11, 11),
    ("mmio", ADDRESS, 8, False): (12, 12),
    ("io", STRINGS + 4, 2, True): (32, 32),
    ("io", STRINGS + 8, 4, True): (16, 16),
    ("io", STRINGS + 4, 2, False): (1, 32),
    ("io", STRINGS + 8, 4, False): (1, 16),
    ("io", STRINGS + 12, 1, True): (3, 3),
    ("io", STRINGS + 12, 1, False): (4, 4),
    **{("mmio", ADDRESS + 0x1000 + i, 1, True): (1, 1) for i in range(13)},
    **{("mmio", ADDRESS + 0x1000 + 4 * i, 4, True): (1, 1) for i in range(14)},
    **{("mmio", ADDRESS + 0x1000 + 2 * i, 2, False): (1, 1) for i in range(15)},
    ("io", PORT_GUEST_CONTROL, 4, True): (2, 2),
    ("io", PORT_ACPI_SLEEP_CONTROL, 1, True): (1, 1),
}


def test_every_exit_is_accounted_for(guest: Guest) -> None:
    with Machine(guest("exits"), memory="4M") as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        ledger = vm.ledger()
    found = {
        (line.reason, line.addr, line.size, line.write): (line.count, line.units)
        for line in ledger.lines
        if line.reason != "intr"  # being stopped may cost one
    }
    assert found == EXITS
    assert ledger.total == sum(line.count for line in ledger.lines)
    assert {line.device for line in ledger.lines if line.addr in (NOBODY, STRINGS, ADDRESS)} == {""}
    assert all(line.time > 0 for line in ledger.lines), "also the last exit took time"


def test_kernel_devices_do_not_exit(guest: Guest) -> None:
    """PIT, APICs and hlt are KVM's: of the timer guest only its words are seen."""
    with Machine(guest("timer"), memory="4M") as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        assert vm.stdout.text == b"timer: 10 lapic, 10 pit\n"
        assert set(vm.ledger().by_device()) <= {
            "guest-stdout",
            "guest-control",
            "acpi-power",
            "intr",
        }


# --- processors and the serial port ---------------------------------------------------------------


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 255])
def test_processors(guest: Guest, cpus: int) -> None:
    with Machine(guest("smp"), memory="8M", cpus=cpus, append=f"cpus={cpus}") as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        assert (
            vm.stdout.text.decode() == f"smp: {cpus} cpus, {cpus - 1} started, sum {100 * cpus}\n"
        )


def flood(size: int) -> str:
    """What the serial guest sends, as it goes over the wire."""
    letters = "".join(chr(ord("a") + i % 26) for i in range(64 - 9))
    return "".join(f"{line:07} {letters}\n" for line in range(0, size, 64))[:size]


def test_serial_flood_loses_nothing(guest: Guest) -> None:
    size = 64 << 10
    with Machine(guest("serial"), memory="4M", append=f"flood={size}") as vm:
        assert run(vm).status == 0
        assert vm.console.text.decode() == flood(size)
        assert vm.console.dropped == 0
        assert vm.stdout.text.endswith(b"by interrupts\n")


def test_serial_echo(guest: Guest) -> None:
    text = "the lazy dog jumps over " * 50
    with Machine(guest("serial"), memory="4M", append="echo=1") as vm:
        vm.start()
        vm.stdout.expect("ready", TIMEOUT)
        for part in (text[:1], text[1:30], text[30:]):
            vm.console.send(part)
            vm.console.expect(part[-10:], TIMEOUT)
        vm.console.send("q")
        assert vm.wait(TIMEOUT).kind == "poweroff"
        assert vm.console.text.decode() == text + "q"


# --- virtio-net -----------------------------------------------------------------------------------


@pytest.mark.parametrize("irq", ["msix", "intx", "poll"])
@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
def test_network(guest: Guest, irq: str, notify: str) -> None:
    count = 100
    net = Net("emulated", notify=notify)
    with Machine(guest("pcinet"), memory="4M", append=f"count={count} irq={irq}", nets=[net]) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        text = vm.stdout.text.decode()
        assert f"{count} asked and answered" in text
        kicks = int(text.rsplit(",", 1)[1].split()[0])
        devices = vm.ledger().by_device()
        if notify == "exit":
            assert devices["net0 notify"] == kicks
        else:
            assert "net0 notify" not in devices
        if irq == "intx":
            assert devices["net0 isr"] > 0
        else:
            assert "net0 isr" not in devices
        counters = vm.nets[0].device.datapath.counters()
        assert counters["tx_packets"] == count
        assert counters["rx_packets"] >= count


@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("classic", "irq=msix"),
        ("classic", "irq=intx"),
        ("classic,transport=mmio", "irq=intx acpi=off"),
        ("classic", "irq=msix burst=8"),
        ("classic,batch=on", "irq=msix burst=8"),
        ("classic,worker=thread", "irq=msix"),
    ],
)
def test_the_textbook_device(
    guest: Guest, net: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n kicks are n exits, in which the frames are sent one by one; n frames to the guest are n
    calls; and there is neither ioeventfd nor irqfd.
    """
    made: list[str] = []
    for name in ("irqfd", "ioeventfd"):
        monkeypatch.setattr(Vm, name, lambda *args, name=name, **keys: made.append(name))
    count, burst = 64, 8 if "burst" in options else 1
    with Machine(
        guest("pcinet"), memory="4M", append=f"count={count} {options}", nets=[Net.parse(net)]
    ) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        text = vm.stdout.text.decode()
        assert f"{count} asked and answered, by interrupts" in text
        kicks = int(text.rsplit(",", 1)[1].split()[0])
        assert not made
        lines = {line.name: line.count for line in vm.ledger().lines if line.role == "notify"}
        assert lines["net0 queue 1 notify"] == count / burst
        assert sum(lines.values()) == kicks
        c = vm.nets[0].device.datapath.counters()
        assert c["tx_packets"] == count <= c["rx_packets"]
        if "thread" not in net:
            assert c["tx_kicks"] == count / burst
        if "batch=on" in net:
            # The thread looks once at the start, and may see the first burst half published.
            assert count / burst <= c["tx_batches"] < count / burst + burst
        else:
            assert c["tx_batches"] == count
            assert c["rx_batches"] == c["rx_packets"] == c["rx_calls"]
        # Interrupts for the transmit queue are off in this guest.
        assert vm.nets[0].report()["interrupt_calls"] == c["rx_calls"] and not c["tx_calls"]


def test_the_textbook_device_by_a_port(guest: Guest) -> None:
    """The kick of the articles: an OUT to the legacy interface."""
    net = Net.parse("classic,legacy=on")
    with Machine(guest("legacynet"), memory="4M", append="irq=msix count=20", nets=[net]) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        kicks = [line for line in vm.ledger().lines if line.name == "net0 queue 1 notify"]
        assert [(line.reason, line.count) for line in kicks] == [("io", 20)]
        nic = vm.nets[0].report()
        assert nic["interface"] == "legacy" and not nic["faults"]
        assert nic["interrupt_calls"] == nic["counters"]["rx_packets"] >= 20


@pytest.mark.parametrize(
    ("mode", "irq", "notify"),
    [
        ("emulated", "intx", "ioeventfd"),
        ("emulated", "poll", "exit"),
        ("vhost-user", "intx", "exit"),
        ("vhost-user", "poll", "ioeventfd"),
    ],
)
def test_network_over_mmio(guest: Guest, mode: str, irq: str, notify: str) -> None:
    """The guest has no ACPI, and finds the first window by the kernel command line."""
    count = 20
    nets = [Net("emulated"), Net(mode, notify=notify, transport="mmio"), Net(transport="mmio")]
    append = f"acpi=off count={count} irq={irq}"
    with Machine(
        guest("pcinet"), memory="4M", append=f"{append} target=192.168.101.1", nets=nets
    ) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        text = vm.stdout.text.decode()
        assert f"window feb01000, {count} asked and answered" in text
        kicks = int(text.rsplit(",", 1)[1].split()[0])
        exits: dict[str, int] = {}
        for line in vm.ledger().lines:
            exits[f"{'write' if line.write else 'read'} {line.name}"] = line.count
        sent = sum(exits.get(f"write net1 queue {queue} notify", 0) for queue in (0, 1))
        assert sent == (kicks if notify == "exit" else 0)
        looks = exits.get("read net1 mmio InterruptStatus", 0)
        assert looks == exits.get("write net1 mmio InterruptACK", 0)
        assert bool(looks) == (irq != "poll")
        nic = vm.nets[1].report()
        assert not nic["driver_mistakes"] and not nic["faults"] and not nic["kvm_refusals"]


def test_a_machine_of_31_windows(guest: Guest) -> None:
    nets = [Net(transport="mmio") for _ in range(31)]
    with Machine(guest("pcinet"), memory="4M", append="acpi=off", nets=nets) as vm:
        assert run(vm).status == 0
        assert "window feb00000, 1 asked and answered" in vm.stdout.text.decode()


@pytest.mark.parametrize(
    ("steps", "works", "mistakes"),
    [
        ("book", True, []),
        ("joined", True, []),  # rcore-os/virtio-drivers, SeaBIOS
        (
            "bare",
            False,
            [
                "device_status = 0x2, which clears bits of 0x1 (2.1.1)",
                "driver_feature = 0x20 before DRIVER (3.1.1)",
                "driver_feature = 0x1 before DRIVER (3.1.1)",
                "device_status = 0x8, which clears bits of 0x1 (2.1.1)",
            ],
        ),
        ("queues-first", True, ["queue_size = 0x10 before FEATURES_OK (3.1.1)"]),
    ],
)
def test_steps_of_drivers(
    guest: Guest, tmp_path: Path, steps: str, works: bool, mistakes: list[str]
) -> None:
    """What a card takes and what it tells (docs/drivers.md): in the report, and in the trace."""
    with Machine(
        guest("pcinet"),
        memory="4M",
        append=f"steps={steps}",
        nets=[Net("emulated")],
        trace=1 << 12,
    ) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", int(not works))
        nic = vm.nets[0].report()
        told: Any = nic["driver_mistakes"]
        assert told[: len(mistakes)] == [f"driver wrote {text}" for text in mistakes]
        assert bool(told) == bool(mistakes) == bool(nic["refused_writes"])
        assert len(told) == min(16, vm.nets[0].device.refused)
        path = tmp_path / "trace"
        with path.open("wb") as f:
            write(vm, f.write)
        trace = path.read_text()
        assert trace.count("driver's mistake") == len(told)
        assert all(text in trace for text in told)


@pytest.mark.parametrize("irq", ["msix", "intx", "poll"])
def test_bus_mastering_goes_off_and_on(guest: Guest, irq: str) -> None:
    append = f"irq={irq} masters=10"
    with Machine(
        guest("pcinet"), memory="4M", append=append, nets=[Net("emulated")], trace=1 << 12
    ) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        nic = vm.nets[0]
        assert not nic.device.mistakes and not nic.device.faults and not nic.transport.errors
        assert vm.recorder is not None
        recorder = vm.recorder

        def count(what: str) -> int:
            return sum(step[:2] == ("net0", what) for step in recorder.steps()[0])

        # The card's own thread notes the last one.
        assert wait_for(lambda: count("stop") == 11), recorder.steps()
        assert count("start") == 11


def test_mistakes_are_told_at_the_end(guest: Guest) -> None:
    argv = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--qmp", "none", "--net"]
    argv += ["emulated", "--kernel", guest("pcinet"), "--append"]
    done = subprocess.run([*argv, "steps=queues-first"], capture_output=True, text=True)
    told = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert told[0] == "pyvmm: net0: driver wrote queue_size = 0x10 before FEATURES_OK (3.1.1)"
    assert len(told) == 16
    done = subprocess.run([*argv, "steps=joined"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("mode", "notify", "append"),
    [
        ("emulated", "ioeventfd", "irq=msix count=20"),
        ("emulated", "exit", "irq=intx mrg=1 count=20"),
        ("emulated", "ioeventfd", "early=1 mac=1"),  # as iPXE sets up a card
        ("vhost-user", "ioeventfd", "irq=msix count=5"),
        ("vhost-user", "exit", "mrg=1"),
    ],
)
def test_legacy_driver(guest: Guest, mode: str, notify: str, append: str) -> None:
    """docs/legacy.md: headers of 10 and 12 bytes, both kinds of interrupt, both ways of kicks."""
    net = Net(mode, notify=notify, legacy="on")
    with Machine(guest("legacynet"), memory="4M", append=append, nets=[net]) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        nic = vm.nets[0].report()
        assert nic["interface"] == "legacy"
        assert nic["negotiated"] == ["MAC"] + ["MRG_RXBUF"] * ("mrg" in append) + ["ANY_LAYOUT"]
        assert not nic["driver_mistakes"] and not nic["faults"] and not nic["kvm_refusals"]
        kicks = int(vm.stdout.text.decode().rsplit(",", 1)[1].split()[0])
        devices = vm.ledger().by_device()
        assert devices.get("net0 notify", 0) == (kicks if notify == "exit" else 0)


def test_legacy_driver_on_dpdk(guest: Guest, tmp_path: Path) -> None:
    """A foreign back-end that takes the short header; testpmd answers ARP itself."""
    path = str(tmp_path / "s")
    with TestPmd(f"net_vhost0,iface={path}", options=("--forward-mode=icmpecho",)) as pmd:
        pmd.say("start")
        pmd.expect("icmpecho packet forwarding", TIMEOUT)
        net = Net("vhost-user", socket=path, legacy="on")
        with Machine(guest("legacynet"), memory="4M", append="count=20", nets=[net]) as vm:
            assert run(vm).status == 0
            assert vm.nets[0].report()["interface"] == "legacy"


def test_hostile_legacy_driver(guest: Guest) -> None:
    """Queues beyond memory, both interfaces in one life, registers of any width: each time, the
    card works again after a reset.
    """
    net = Net("emulated", legacy="on")
    with Machine(guest("legacynet"), memory="4M", append="hostile=1", nets=[net]) as vm:
        outcome = run(vm)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        device = vm.nets[0].device
        assert device.refused > 100 and not device.tracebacks
        assert any("is outside RAM" in fault for fault in device.faults)


def test_a_modern_driver_on_a_transitional_card(guest: Guest) -> None:
    net = Net("emulated", legacy="on")
    with Machine(guest("pcinet"), memory="4M", append="count=5", nets=[net]) as vm:
        assert run(vm).status == 0
        assert vm.nets[0].device.interface == "modern"
        assert vm.nets[0].device.negotiated >> VIRTIO_F_VERSION_1 & 1


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
@pytest.mark.parametrize(
    ("append", "tried"), [("", 23), ("packed=1", 33), ("packed=1 acpi=off", 33)]
)
def test_bad_rings(guest: Guest, notify: str, append: str, tried: int) -> None:
    transport = "mmio" if "acpi=off" in append else "pci"
    net = Net("emulated", notify=notify, with_="packed" if append else "", transport=transport)
    with Machine(guest("badring"), append=append, memory="4M", nets=[net]) as vm:
        outcome = run(vm)
        assert f"{tried} tried, 0 bad" in vm.stdout.text.decode()
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        assert vm.nets[0].device.refused > 0
