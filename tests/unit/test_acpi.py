"""Firmware tables have right checksums and lengths, and Intel's compiler accepts them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.boot import acpi, aml, mptable
from pyvmm.memory import GuestMemory
from pyvmm.spec import platform as pf


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(16 << 20)
    yield m
    m.close()


def tables(memory: GuestMemory, rsdp: int) -> dict[str, bytes]:
    """Find all tables as a guest does, and check their lengths and checksums; returns them by their
    signatures.
    """
    root = memory.read(rsdp, 36)
    assert root[:8] == b"RSD PTR "
    assert sum(root[:20]) & 0xFF == 0
    assert sum(root) & 0xFF == 0

    def table(address: int) -> bytes:
        length = struct.unpack("<I", memory.read(address + 4, 4))[0]
        data = memory.read(address, length)
        assert sum(data) & 0xFF == 0
        assert pf.FIRMWARE_BASE <= address <= address + length <= mptable.TABLE_BASE
        return data

    xsdt = table(struct.unpack_from("<Q", root, 24)[0])
    assert xsdt[:4] == b"XSDT"
    found = [table(a) for (a,) in struct.iter_unpack("<Q", xsdt[36:])]
    rsdt = table(struct.unpack_from("<I", root, 16)[0])  # for kernels of ACPI 1.0
    assert [a for (a,) in struct.iter_unpack("<I", rsdt[36:])] == [
        a for (a,) in struct.iter_unpack("<Q", xsdt[36:])
    ]
    fadt = next(t for t in found if t[:4] == b"FACP")
    facs_at = struct.unpack_from("<I", fadt, 36)[0]
    facs = memory.read(facs_at, 64)
    assert facs_at % 64 == 0 and facs[:8] == b"FACS" + struct.pack("<I", 64)
    found.append(table(struct.unpack_from("<Q", fadt, 140)[0]))
    return {t[:4].decode(): t for t in found}


def test_tables_are_found_by_the_old_search(memory: GuestMemory) -> None:
    rsdp = acpi.build(memory)
    assert 0xE_0000 <= rsdp < 0x10_0000
    assert rsdp % 16 == 0


def test_fadt_says_how_to_leave(memory: GuestMemory) -> None:
    fadt = tables(memory, acpi.build(memory))["FACP"]
    assert len(fadt) == 276
    assert not struct.unpack_from("<I", fadt, 112)[0] & (1 << 20)  # HW_REDUCED_ACPI
    for at, x_at, port in (
        (56, 148, pf.PORT_ACPI_PM1_EVENT),
        (64, 172, pf.PORT_ACPI_PM1_CONTROL),
        (76, 208, pf.PORT_ACPI_PM_TIMER),
    ):
        assert struct.unpack_from("<I", fadt, at)[0] == port
        assert struct.unpack_from("<Q", fadt, x_at + 4)[0] == port
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, pf.PORT_ACPI_RESET)
    assert fadt[128] == pf.ACPI_RESET_VALUE
    assert struct.unpack_from("<Q", fadt, 248)[0] == pf.PORT_ACPI_SLEEP_CONTROL
    assert struct.unpack_from("<Q", fadt, 260)[0] == pf.PORT_ACPI_SLEEP_STATUS


@pytest.mark.parametrize("cpus", [1, 2, pf.MAX_CPUS])
def test_madt_lists_every_cpu(memory: GuestMemory, cpus: int) -> None:
    madt = tables(memory, acpi.build(memory, cpus=cpus))["APIC"]
    at, ids, ioapics = 44, [], []
    while at < len(madt):
        kind, length = madt[at], madt[at + 1]
        if kind == 0:
            ids.append(madt[at + 3])
            assert madt[at + 4] == 1
        elif kind == 1:
            ioapics.append(struct.unpack_from("<I", madt, at + 4)[0])
        at += length
    assert at == len(madt)
    assert ids == list(range(cpus))
    assert ioapics == [pf.IOAPIC_BASE]


def test_mcfg_only_with_ecam(memory: GuestMemory) -> None:
    assert "MCFG" not in tables(memory, acpi.build(memory))
    mcfg = tables(memory, acpi.build(memory, ecam=True))["MCFG"]
    assert struct.unpack_from("<Q", mcfg, 44)[0] == pf.PCI_ECAM_BASE


@pytest.mark.skipif(
    not shutil.which("iasl"), reason="iasl is not installed (make setup installs acpica-tools)"
)
@pytest.mark.parametrize("ecam", [False, True])
def test_iasl_takes_the_tables(memory: GuestMemory, tmp_path: Path, ecam: bool) -> None:
    rsdp = acpi.build(memory, cpus=2, ecam=ecam, windows=[(0xFEB0_0000, 11)] if ecam else [])
    for name, data in tables(memory, rsdp).items():
        (tmp_path / f"{name}.dat").write_bytes(data)
        out = subprocess.run(
            ["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert "Error" not in out.stdout + out.stderr
    source = (tmp_path / "DSDT.dsl").read_text()
    out = subprocess.run(
        ["iasl", "-tc", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "0 Errors, 0 Warnings" in out.stdout
    for text in (
        "PNP0A03",
        "PNP0501",
        "PNP0B00",
        "QEMU0001",
        "ACPI0013",
        "PNP0C0C",
        "Notify (\\_SB.PWRB, 0x80)",
        "If ((Local0 & 0x80000000))",
        "Notify (\\_SB.PCI0.S1F, One)",
        "Notify (\\_SB.PCI0.S1F, 0x03)",
        "PCEJ = 0x02",
    ):
        assert text in source
    assert ("PNP0C02" in source) == ecam
    assert ("LNRO0005" in source) == ecam
    if ecam:
        # Version 20260408 of iasl shows bytes for any resources, its own among them.
        window = source[source.index("LNRO0005") :]
        if "ResourceTemplate" in source:
            assert "0xFEB00000,         // Address Base" in window
            assert "Interrupt (ResourceConsumer, Level, ActiveLow, Shared" in window
            assert "0x0000000B," in window
        else:
            assert "0x86, 0x09, 0x00, 0x01, 0x00, 0x00, 0xB0, 0xFE," in window
            assert "0x00, 0x10, 0x00, 0x00, 0x89, 0x06, 0x00, 0x0D," in window
    for name in ("FACP", "APIC"):
        assert "Invalid" not in (tmp_path / f"{name}.dsl").read_text()


def test_room_for_31_windows(memory: GuestMemory) -> None:
    windows = [(pf.VIRTIO_MMIO_BASE + n * pf.VIRTIO_MMIO_SIZE, 16 + n % 8) for n in range(31)]
    dsdt = tables(memory, acpi.build(memory, cpus=pf.MAX_CPUS, windows=windows))["DSDT"]
    assert dsdt.count(b"LNRO0005") == 31


def test_dsdt_routes_inta() -> None:
    data = acpi.dsdt([3, 9])
    assert aml.integer(0x0003_FFFF) in data
    assert aml.integer(0x0009_FFFF) in data
    assert aml.integer(0x0004_FFFF) not in data


def test_aml_package_lengths() -> None:
    # ACPI 6.4, 20.2.4: PkgLength has 1 byte up to 63, then 4 + 8 bits, then 4 + 16 bits. It counts
    # its own bytes, too.
    for size in (0, 10, 61, 62, 63, 64, 4000, 4091, 4093, 4094, 4095, 70000):
        data = aml.scope("ABCD", bytes(size))
        lead = data[1]
        extra = lead >> 6
        length = (
            lead & 0x3F
            if not extra
            else lead & 0xF | int.from_bytes(data[2 : 2 + extra], "little") << 4
        )
        assert length == len(data) - 1
        assert data[2 + extra : 6 + extra] == b"ABCD"


def test_aml_terms() -> None:
    assert aml.eisaid("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"
    assert aml.path("\\_SB.PCI0") == b"\\\x2e_SB_PCI0"
    assert [aml.integer(n) for n in (0, 1, 2, 0x100, 0x10000)] == [
        b"\0",
        b"\1",
        b"\x0a\2",
        b"\x0b\0\1",
        b"\x0c\0\0\1\0",
    ]
    assert aml.path("A.B.C") == b"\x2f\3A___B___C___"
    # If (Local0 & 0x400) {Notify (\_SB.DEV, 3)}
    notice = b"\xa0\x16\x7b\x60\x0c\0\4\0\0\0\x86\\\x2e_SB_DEV_\x0a\3"
    assert aml.notify_if_bit(10, "\\_SB.DEV", 3) == notice


@pytest.mark.parametrize("cpus", [1, 8, pf.MAX_CPUS])
def test_mp_tables(memory: GuestMemory, cpus: int) -> None:
    mptable.build(memory, cpus=cpus)
    floating = memory.read(pf.EBDA_BASE, 16)
    assert floating[:4] == b"_MP_"
    assert sum(floating) & 0xFF == 0
    address = struct.unpack_from("<I", floating, 4)[0]
    size = struct.unpack("<H", memory.read(address + 4, 2))[0]
    assert address + size <= pf.FIRMWARE_END
    table = memory.read(address, size)
    assert table[:4] == b"PCMP"
    assert sum(table) & 0xFF == 0
    count = struct.unpack_from("<H", table, 34)[0]
    at = struct.calcsize("<4sHBB8s12sIHHIHBB")
    assert at == 44
    seen: dict[int, list[bytes]] = {n: [] for n in range(5)}
    for _ in range(count):
        kind = table[at]
        length = 20 if kind == 0 else 8
        seen[kind].append(table[at : at + length])
        at += length
    assert at == size
    assert [e[1] for e in seen[0]] == list(range(cpus))
    assert [e[3] for e in seen[0]] == [3] + [1] * (cpus - 1)
    assert [e[2:] for e in seen[1]] == [b"PCI   ", b"ISA   "]
    assert struct.unpack_from("<I", seen[2][0], 4)[0] == pf.IOAPIC_BASE
    isa = {e[5]: e[7] for e in seen[3] if e[4] == mptable.BUS_ISA}
    assert isa == {0: pf.IOAPIC_PIN_TIMER} | {n: n for n in range(1, 16) if n != 2}
    levels = {e[5] for e in seen[3] if e[4] == mptable.BUS_ISA and e[2] == 0xF}
    assert levels == set(pf.PIC_PCI_LINES)
    pci = {e[5] >> 2: e[7] for e in seen[3] if e[4] == mptable.BUS_PCI}
    assert pci == {n: pf.GSI_PCI_BASE + n % pf.GSI_PCI_COUNT for n in range(1, 32)}
    assert [e[1] for e in seen[4]] == [3, 1]
