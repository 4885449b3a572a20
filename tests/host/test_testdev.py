"""Test kernels on a real vCPU: every way in, and the devices that only they get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm import Machine

Guest = Callable[[str], str]
TIMEOUT = 180.0  # seconds; the guests need a tenth of one
MEMORY = 16 << 20
LINE = f"cpus=2 memory={MEMORY}"


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("testdev.elf", "ELF by PVH note"),
        ("testdev-mb.elf", "multiboot ELF"),
        ("testdev-mb.bin", "multiboot by addresses"),
    ],
)
def test_devices(guest: Guest, image: str, kind: str) -> None:
    kernel = str(Path(guest("testdev")).parent / image)
    with Machine(kernel, memory=MEMORY, cpus=2, append=LINE, test_devices=True) as vm:
        vm.start()
        outcome = vm.wait(TIMEOUT)
        text = vm.console.text.decode()
        assert vm.boot.kind == kind
        assert (outcome.kind, outcome.status) == ("debug-exit", 1), text
        assert "FAIL" not in text
        assert text.count("PASS: multiboot") == (3 if kind.startswith("multiboot") else 0)
        # Both ways out are one stream, in the order of the guest's writes.
        assert text.endswith("PASS: debugcon: found\r\ndebugcon speaks\n")


def test_modules(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"module 1")
    (tmp_path / "b").write_bytes(b"module 2")
    initrd = f"{tmp_path}/a x=1,{tmp_path}/b"
    with Machine(
        guest("testdev-mb"),
        initrd=initrd,
        memory=MEMORY,
        cpus=2,
        append=f"{LINE} module=module",
        test_devices=True,
    ) as vm:
        vm.start()
        assert vm.wait(TIMEOUT).status == 1
        text = vm.console.text.decode()
        assert "PASS: multiboot: modules" in text
        assert f"{tmp_path}/a x=1\r\n{tmp_path}/b\r\n" in text


@pytest.mark.parametrize("value", [0, 1, 38, 127])
def test_status(guest: Guest, value: int) -> None:
    with Machine(
        guest("testdev-mb"), memory=MEMORY, cpus=2, append=f"{LINE} exit={value}", test_devices=True
    ) as vm:
        vm.start()
        outcome = vm.wait(TIMEOUT)
        assert (outcome.kind, outcome.status) == ("debug-exit", value << 1 | 1)
        assert outcome.error() is None


def test_processors_of_a_multiboot_kernel(guest: Guest) -> None:
    with Machine(guest("smp-mb"), memory=MEMORY, cpus=3, append="cpus=3") as vm:
        vm.start()
        outcome = vm.wait(TIMEOUT)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)


# mov al, 0x15; out 0xf4, al; hlt: the same bytes in every mode.
EXIT_WITH_0X15 = bytes([0xB0, 0x15, 0xE6, 0xF4, 0xF4])


@pytest.mark.parametrize(
    ("mode", "address"),
    [("real16", 0x7C00), ("protected32", 0x1000), ("protected32", 0x3_0000), ("long64", 0x20_0000)],
)
def test_flat_binary(tmp_path: Path, mode: str, address: int) -> None:
    path = tmp_path / "flat"
    path.write_bytes(EXIT_WITH_0X15)
    with Machine(
        str(path), memory="4M", load_address=address, load_mode=mode, test_devices=True
    ) as vm:
        vm.start()
        assert vm.wait(TIMEOUT).status == 0x15 << 1 | 1


def boot_flat(tmp_path: Path, code: str, mode: str, cpu: str | None = None) -> int | None:
    """Boot machine code at 0x7C00; the value that it writes to debug-exit."""
    path = tmp_path / "flat"
    path.write_bytes(bytes.fromhex(code))
    with Machine(
        str(path), memory="4M", load_address=0x7C00, load_mode=mode, test_devices=True, cpu=cpu
    ) as vm:
        vm.start()
        status = vm.wait(TIMEOUT).status
        return status >> 1 if status is not None else None


def test_a_boot_sector_finds_the_timer_running(tmp_path: Path) -> None:
    """It waits for two ticks of the BIOS' clock, and makes a BIOS call, which returns."""
    code = """
        fb cd 10               # sti; int 0x10
        f4                     # again: hlt
        83 3e 6c 04 02 72 f8   # cmp word [0x46c], 2; jb again
        a0 6c 04 e6 f4 f4      # mov al, [0x46c]; out 0xf4, al
    """
    code = "".join(line.partition("#")[0] for line in code.splitlines())
    ticks = boot_flat(tmp_path, code, "real16")
    # The next tick may come before the clock is read for the answer.
    assert ticks is not None and ticks >= 2


@pytest.mark.parametrize(
    ("cpu", "want"),
    [(None, 3), ("host,-hypervisor", 2), ("host,-x2apic", 1), ("max,-hypervisor,x2apic=off", 0)],
)
def test_cpu(tmp_path: Path, cpu: str | None, want: int) -> None:
    """Bit 0 of the answer: whether CPUID says that this is a virtual machine; bit 1: x2APIC."""
    code = """
        b8 01 00 00 00 0f a2   # mov eax, 1; cpuid
        89 c8 c1 e8 1f         # eax = ecx >> 31
        c1 e9 14 83 e1 02      # ecx = ecx >> 20 & 2
        09 c8 e6 f4 f4         # or eax, ecx; out 0xf4, al
    """
    code = "".join(line.partition("#")[0] for line in code.splitlines())
    assert boot_flat(tmp_path, code, "protected32", cpu) == want


def test_flat_binary_of_a_whole_guest(guest: Guest) -> None:
    """The multiboot binary starts with a jump, and then finds what a PVH kernel finds."""
    kernel = str(Path(guest("testdev")).parent / "testdev-mb.bin")
    with Machine(
        kernel, memory=MEMORY, cpus=2, append=LINE, load_address=0x10_0000, test_devices=True
    ) as vm:
        vm.start()
        assert vm.wait(TIMEOUT).status == 1


def test_other_guests_see_none_of_it(guest: Guest) -> None:
    """Without the option nobody answers at these ports, and the guest says so on COM1; 0xf4 does
    not end it.
    """
    with Machine(guest("testdev"), memory=MEMORY, append=f"memory={MEMORY}") as vm:
        vm.start()
        vm.console.expect(r"FAIL: debugcon: found", TIMEOUT)
        assert b"PASS: fw_cfg" not in vm.console.text
        assert vm.outcome is None
        vm.stop()
        names = set(vm.ledger().by_device())
        assert not {n for n in names if n.startswith(("testdev", "fw-cfg", "debug"))}
