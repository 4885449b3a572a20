"""The guest's CPUID, made from the CPUID that KVM supports.

The guest sees one package; each vCPU is a core with one thread, and its APIC id is its index. The
leaves are described in the Intel SDM, volume 2A, CPUID; in the AMD APM, volume 3, appendix E; and,
for KVM's own leaves, in Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.cpu import Cpu

TSC_DEADLINE = 1 << 24
HYPERVISOR = 1 << 31
HTT = 1 << 28
PDCM = 1 << 15  # IA32_PERF_CAPABILITIES
AMD_COUNTERS = 1 << 23 | 1 << 24 | 1 << 28  # of the core, of the north bridge, of the last cache
BRAND_LEAVES = (0x80000002, 0x80000003, 0x80000004)  # 16 characters each
BRAND_MAX = 47  # characters of a brand string; a zero byte follows
PMU_LEAVES = (0xA, 0x80000022)  # Intel's counters, and AMD's from version 2 on

SIGNIFICANT_INDEX = 1


def shift_for(cpus: int) -> int:
    """How many bits of the APIC id are needed to number ``cpus`` cores."""
    return (cpus - 1).bit_length()


def for_vcpu(
    supported: list[list[int]],
    index: int,
    cpus: int,
    tsc_deadline: bool,
    cpu: Cpu | None = None,
) -> list[list[int]]:
    """The CPUID of vCPU ``index`` of a machine with ``cpus`` vCPUs.

    :param supported: the rows that ``Kvm.supported_cpuid`` returns.
    :param tsc_deadline: whether the local APIC's timer has the TSC deadline mode.
    :param cpu: how the CPU differs from the host's; None: in nothing.
    :returns: rows of function, index, flags, eax, ebx, ecx, edx.
    :raises UsageError: ``cpu`` demands a feature that the host lacks.
    """
    counters = cpu is not None and cpu.counters
    rows = []
    for function, sub, flags, eax, ebx, ecx, edx in supported:
        if function in (0xB, 0x1F):
            continue  # rebuilt below
        if function == 1:
            ebx = (ebx & 0xFFFF) | (index << 24) | (cpus << 16)
            if not counters:
                ecx &= ~PDCM
            ecx |= HYPERVISOR | (TSC_DEADLINE if tsc_deadline else 0)
            edx = edx | HTT if cpus > 1 else edx & ~HTT
        elif function == 4 and eax & 31:
            level = (eax >> 5) & 7
            sharing = cpus - 1 if level >= 3 else 0
            # Six bits: leaf 0xB has the number of cores where they are more.
            eax = (eax & 0x3FFF) | min(cpus - 1, 63) << 26 | sharing << 14
        elif function in PMU_LEAVES and not counters:
            eax = ebx = ecx = edx = 0  # to set up counters would cost the guest time at boot
        elif function == 0x80000001 and not counters:
            ecx &= ~AMD_COUNTERS
        elif function == 0x80000008:
            ecx = (ecx & ~0xF0FF) | (cpus - 1) | shift_for(cpus) << 12
        elif function == 0x8000001D and eax & 31:
            level = (eax >> 5) & 7
            eax = (eax & 0x3FFF) | ((cpus - 1 if level >= 3 else 0) << 14)
        elif function == 0x8000001E:
            eax, ebx, ecx = index, index, 0
        rows.append([function, sub, flags, eax, ebx, ecx, edx])
    if any(row[0] >= 0xB for row in supported if row[0] < 0x40000000):
        rows.append([0xB, 0, SIGNIFICANT_INDEX, 0, 1, 0x100, index])
        rows.append([0xB, 1, SIGNIFICANT_INDEX, shift_for(cpus), cpus, 0x201, index])
    if cpu is not None:
        cpu.apply(rows)
    return rows


def with_brand(supported: list[list[int]], brand: str) -> list[list[int]]:
    """The rows that KVM supports with ``brand`` as the name of the CPU, unless they have a name.

    KVM supports the leaves of the brand string, but leaves them empty for the VMM to fill.
    """
    if any(any(row[3:]) for row in supported if row[0] in BRAND_LEAVES):
        return supported
    text = brand.encode("ascii", "replace")[:BRAND_MAX].ljust(BRAND_MAX + 1, b"\0")
    words = struct.unpack("<12I", text)
    rows = []
    for row in supported:
        if row[0] in BRAND_LEAVES:
            at = 4 * BRAND_LEAVES.index(row[0])
            row = [*row[:3], *words[at : at + 4]]
        rows.append(row)
    return rows


def host_brand() -> str:
    """The name of this machine's CPU as Linux has it; empty if it has none."""
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as f:
            head = f.read(1024)  # the first processor; all of them would take long
    except OSError:
        return ""
    for line in head.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""
