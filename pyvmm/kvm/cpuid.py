"""What the guest's CPUID says, from what KVM supports.

Leaves: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; KVM's own:
Documentation/virt/kvm/x86/cpuid.rst. All vCPUs are cores of one package, one thread each; APIC id =
vCPU index.
"""

from __future__ import annotations

X2APIC = 1 << 21
TSC_DEADLINE = 1 << 24
HYPERVISOR = 1 << 31
HTT = 1 << 28

SIGNIFICANT_INDEX = 1


def shift_for(cpus: int) -> int:
    """Bits of the APIC id that number ``cpus`` cores."""
    return (cpus - 1).bit_length()


def for_vcpu(
    supported: list[list[int]], index: int, cpus: int, tsc_deadline: bool
) -> list[list[int]]:
    """CPUID rows of vCPU ``index`` of ``cpus``: function, index, flags, eax, ebx, ecx, edx."""
    rows = []
    for function, sub, flags, eax, ebx, ecx, edx in supported:
        if function in (0xB, 0x1F):
            continue  # rebuilt below
        if function == 1:
            ebx = (ebx & 0xFFFF) | (index << 24) | (cpus << 16)
            ecx |= HYPERVISOR | (TSC_DEADLINE if tsc_deadline else 0)
            edx = edx | HTT if cpus > 1 else edx & ~HTT
        elif function == 4 and eax & 31:
            level = (eax >> 5) & 7
            sharing = cpus - 1 if level >= 3 else 0
            eax = (eax & 0x3FFF) | (cpus - 1) << 26 | sharing << 14
        elif function == 0xA:
            eax = ebx = ecx = edx = 0  # no PMU: the guest would spend time on it
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
    return rows
