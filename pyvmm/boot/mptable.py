"""MP tables (Intel MultiProcessor Specification 1.4). They tell kernels without ACPI what ACPI's
MADT and _PRT say.
"""

from __future__ import annotations

import struct

from pyvmm.spec import acpi
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.memory import GuestMemory

# The floating pointer is in the EBDA, where every kernel looks for it. The table itself is not
# because it would be larger than the EBDA with many CPUs.
TABLE_BASE = pf.BIOS_CODE - 0x2000
BUS_PCI = 0
BUS_ISA = 1
IOAPIC_ID = 0


def build(memory: GuestMemory, *, cpus: int = 1, pci_slots: Iterable[int] = range(1, 32)) -> None:
    """Write the floating pointer at EBDA_BASE and the configuration table at TABLE_BASE.

    :param cpus: 1..MAX_CPUS; their local APIC ids are 0..cpus-1.
    :param pci_slots: the slots of bus 0 whose INTA is routed.
    """
    entries = [
        struct.pack(
            acpi.MP_PROCESSOR,
            0,
            n,
            acpi.LAPIC_VERSION,
            acpi.MP_CPU_ENABLED | (0 if n else acpi.MP_CPU_BSP),
            0x600,  # family 6; any family whose CPUs have an APIC would do
            0x201,  # the CPU has an FPU and an on-chip APIC
        )
        for n in range(cpus)
    ]
    entries.append(struct.pack(acpi.MP_BUS, 1, BUS_PCI, b"PCI   "))
    entries.append(struct.pack(acpi.MP_BUS, 1, BUS_ISA, b"ISA   "))
    entries.append(
        struct.pack(
            acpi.MP_IOAPIC,
            2,
            IOAPIC_ID,
            acpi.IOAPIC_VERSION,
            acpi.MP_IOAPIC_ENABLED,
            pf.IOAPIC_BASE,
        )
    )
    for line in range(16):
        if line != 2:  # line 2 is the PIC's cascade; its IO-APIC pin is the timer's
            pin = line or pf.IOAPIC_PIN_TIMER
            # The lines of PCI are also those of devices of virtio over MMIO.
            flags = acpi.MP_ACTIVE_LOW_LEVEL if line in pf.PIC_PCI_LINES else 0
            entries.append(
                struct.pack(
                    acpi.MP_IO_INTERRUPT, 3, acpi.MP_INT, flags, BUS_ISA, line, IOAPIC_ID, pin
                )
            )
    for slot in pci_slots:
        gsi = pf.GSI_PCI_BASE + slot % pf.GSI_PCI_COUNT
        flags = acpi.MP_ACTIVE_LOW_LEVEL
        entries.append(
            struct.pack(
                acpi.MP_IO_INTERRUPT, 3, acpi.MP_INT, flags, BUS_PCI, slot << 2, IOAPIC_ID, gsi
            )  # INTA
        )
    entries.append(struct.pack(acpi.MP_LOCAL_INTERRUPT, 4, acpi.MP_EXTINT, 0, BUS_ISA, 0, 0, 0))
    entries.append(
        struct.pack(acpi.MP_LOCAL_INTERRUPT, 4, acpi.MP_NMI, 0, BUS_ISA, 0, acpi.MP_ALL_LAPICS, 1)
    )
    body = b"".join(entries)
    size = struct.calcsize(acpi.MP_HEADER) + len(body)
    header = struct.pack(
        acpi.MP_HEADER,
        b"PCMP",
        size,
        acpi.MP_REVISION,
        0,
        b"PYVMM   ",
        b"PYVMM       ",
        0,
        0,
        len(entries),
        pf.LAPIC_BASE,
        0,
        0,
        0,
    )
    table = bytearray(header + body)
    table[acpi.MP_HEADER_CHECKSUM] = -sum(table) & 0xFF
    floating = bytearray(
        struct.pack(acpi.MP_FLOATING, b"_MP_", TABLE_BASE, 1, acpi.MP_REVISION, 0, 0, 0, 0, 0, 0)
    )
    floating[acpi.MP_FLOATING_CHECKSUM] = -sum(floating) & 0xFF
    memory.write(TABLE_BASE, table)
    memory.write(pf.EBDA_BASE, floating)
