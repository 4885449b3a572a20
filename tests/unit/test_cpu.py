"""``--cpu``: what is hidden from the guest's CPUID."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from pyvmm._ext import ffi
from pyvmm.errors import UsageError
from pyvmm.kvm import CPUID_ENTRY, cpuid
from pyvmm.kvm.cpu import FIXED, Cpu, canonical, present
from pyvmm.spec.cpuid import ALIASES, EAX, EBX, ECX, EDX, NAMES

FULL = 0xFFFFFFFF


def vendor_row(function: int, name: str) -> list[int]:
    ebx, edx, ecx = struct.unpack("<III", name.encode())
    return [function, 0, 0, 0x80000021 if function else 0x20, ebx, ecx, edx]


def table(vendor: str = "GenuineIntel") -> list[list[int]]:
    """A host that has everything."""
    places = {(function, index) for function, index, _ in NAMES}
    rows = [[function, index, 0, FULL, FULL, FULL, FULL] for function, index in sorted(places)]
    for row in rows:
        if row[0] == 0x80000008:
            row[EAX] = 0x3030
    rows.append([0xD, 0, 1, 7, 832, 832, 0])
    rows.append([0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D])
    rows.append([0xA, 0, 0, 0x07300802, 0, 0, 0x603])
    rows.append([0x80000022, 0, 0, 1, 6, 0, 0])
    return [*rows, vendor_row(0, vendor), vendor_row(0x80000000, vendor)]


def seen(text: str, vendor: str = "GenuineIntel") -> list[list[int]]:
    """What a guest of one vCPU sees."""
    return cpuid.for_vcpu(table(vendor), 0, 1, True, Cpu(text))


COUNTERS = {"pdcm", "perfctr-core", "perfctr-nb", "perfctr-llc"}


def cell(rows: list[list[int]], function: int, column: int, index: int = 0) -> int:
    return next(row[column] for row in rows if row[:2] == [function, index])


def every_name() -> list[str]:
    names = {name for text in NAMES.values() for name in text.split()}
    return sorted(names - {"-", *FIXED})


def test_255_cpus() -> None:
    """APIC ids of 8 bits; leaf 4 has six bits for the cores, so leaf 0xB has their number."""
    rows = {(r[0], r[1]): r[3:] for r in cpuid.for_vcpu(table("GenuineIntel"), 254, 255, True)}
    assert rows[1, 0][1] >> 16 == 254 << 8 | 255
    assert all(row[0] >> 26 == 63 for key, row in rows.items() if key[0] == 4 and row[0] & 31)
    assert rows[0xB, 1][0] == 8 and rows[0xB, 1][1] == 255 and rows[0xB, 1][3] == 254
    assert all(0 <= n < 1 << 32 for row in rows.values() for n in row)


def test_the_names() -> None:
    for text in NAMES.values():
        assert len(text.split()) <= 32
    for alias, name in ALIASES.items():
        assert alias not in every_name() and name in every_name()
        assert canonical(alias) == name
    for way in ("sse4_1", "SSE4.1", "sse4-1", "sse4.1"):
        assert canonical(way) == "sse4.1"


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_each_feature_can_be_hidden_alone(vendor: str) -> None:
    everything = present(seen("host,pmu=on", vendor))
    # One vCPU has no other thread.
    assert everything == {*every_name(), *FIXED} - {"ht"}
    for name in every_name():
        rows = seen(f"max,pmu=on,-{name}", vendor)
        gone = everything - present(rows)
        # With XSAVE goes its leaf, which has the variants of the instruction.
        also = {"xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"} if name == "xsave" else set()
        assert gone == {name} | also


def test_copies_of_amd() -> None:
    """FPU to FXSR are in leaf 0x80000001, too; 64-bit mode and SYSCALL are only there."""
    mmx, syscall = 1 << 23, 1 << 11
    assert cell(seen("host,-mmx", "AuthenticAMD"), 0x80000001, EDX) == FULL & ~mmx
    assert cell(seen("host,-mmx"), 0x80000001, EDX) == FULL
    assert cell(seen("host,-sep", "AuthenticAMD"), 0x80000001, EDX) & syscall
    assert not cell(seen("host,vendor=AuthenticAMD,-mmx"), 0x80000001, EDX) & mmx


def test_vendor_width_hypervisor_and_counters() -> None:
    rows = seen("host,vendor=AuthenticAMD,phys-bits=36,kvm=off,-hypervisor")
    for function in (0, 0x80000000):
        name = struct.pack("<III", *(cell(rows, function, c) for c in (EBX, EDX, ECX)))
        assert name == b"AuthenticAMD"
    assert cell(rows, 0x80000008, EAX) == 0x3024
    assert not [row for row in rows if row[0] >> 16 == 0x4000]
    assert not cell(rows, 1, ECX) >> 31


def test_counters() -> None:
    """All or none of them, wherever CPUID tells of them."""
    without, with_them = seen("host"), seen("host,pmu=on")
    assert cell(without, 0xA, EAX) == 0 and cell(with_them, 0xA, EAX) == 0x07300802
    assert cell(without, 0x80000022, EAX) == 0 and cell(with_them, 0x80000022, EAX) == 1
    assert present(with_them) - present(without) == COUNTERS


def test_the_last_word_counts() -> None:
    cpu = Cpu("host,-avx,+avx,+aes,aes=off")
    assert (cpu.wanted, cpu.hidden) == ({"avx"}, {"aes"})


def test_a_feature_that_the_host_lacks() -> None:
    poor = [row for row in table() if row[0] != 7]
    with pytest.raises(UsageError, match=r"this host's KVM has no avx2, smep; leave"):
        cpuid.for_vcpu(poor, 0, 1, True, Cpu("host,+smep,+avx2,+kvm,+pmu,+aes"))
    with pytest.raises(UsageError, match="the host has 48"):
        seen("host,phys-bits=52")


BAD = {
    "": "the CPU is always the host's",
    "qemu64": "the CPU is always the host's",
    "host,": "'' says nothing",
    "host,x2apic": "'x2apic' says nothing",
    "host,x2apic=maybe": "says nothing",
    "host,-": "says nothing",
    "host,+-x2apic": "unknown feature '-x2apic'",
    "host,-x2apci": "did you mean x2apic",
    "host,-apic": "the machine's own",
    "host,+ht": "the machine's own",
    "host,vendor=Intel": "use one of GenuineIntel",
    "host,phys-bits=many": "use 32 to 52",
    "host,phys-bits=64": "use 32 to 52",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_texts(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Cpu(text)
    assert BAD[text] in str(caught.value)
    assert caught.value.hint


BRANDS = (0x80000002, 0x80000003, 0x80000004)


def name_of(rows: list[list[int]]) -> bytes:
    return b"".join(
        n.to_bytes(4, "little") for leaf in BRANDS for r in rows if r[0] == leaf for n in r[3:]
    )


@pytest.mark.parametrize("brand", ["", "A", "Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz", "x" * 99])
def test_the_cpu_gets_the_hosts_name(brand: str) -> None:
    """KVM has the leaves, but leaves them empty."""
    poor = [[leaf, 0, 0, 0, 0, 0, 0] for leaf in (1, *BRANDS, 0x80000005)]
    rows = cpuid.with_brand(poor, brand)
    assert name_of(rows) == brand[:47].encode().ljust(48, b"\0")
    assert [row for row in rows if row[0] not in BRANDS] == [poor[0], poor[-1]]
    assert cpuid.with_brand(rows, "another") == rows if brand else True, "a name stays"


def test_the_hosts_name_is_that_of_linux() -> None:
    text = Path("/proc/cpuinfo").read_text()
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    assert cpuid.host_brand() == (names[0].strip() if names else "")


def test_an_entry_of_kvm() -> None:
    """The layout in Python is that of the kernel's header."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": 2})
    data = struct.pack(CPUID_ENTRY, *range(1, 8)) + struct.pack(CPUID_ENTRY, *range(11, 18))
    ffi.memmove(table.entries, data, ffi.sizeof("struct kvm_cpuid_entry2[2]"))
    entries = [
        (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[0:2]
    ]
    assert entries == [tuple(range(1, 8)), tuple(range(11, 18))]
