"""The smallest ACPI 6.4 tables by which Linux finds every CPU, the IO-APIC, PCI and the serial
ports.

The tables describe a PC: both 8259s, the PIT, the PM1 registers and the PM timer are there. On a
hardware-reduced machine (4.1) Linux would not look at the 8259s and the PIT, so that a kernel
without kvm-clock could not find out how fast the TSC counts, and a kernel that is told to leave the
local or the IO-APIC alone would get no interrupt at all (docs/kernel-options.md). There is no SMI:
ACPI is always on. The SCI reports the clock's alarm and PCI hot plug; the power button is a device.

PCI hot plug: event 1 of block GPE0 says that the registers at PORT_PCI_HOTPLUG name slots. The
method of the event notifies the devices of these slots (ACPI 6.4, 5.6.4 and 6.3): a device check
for a new function, an eject request for one that is to go. ``_EJ0`` of a slot's device says that
the guest has let go of the function.
"""

from __future__ import annotations

import struct

from pyvmm.boot import aml
from pyvmm.spec import acpi
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyvmm.memory import GuestMemory

ALL_SLOTS = range(1, 32)
FACS_OFFSET = acpi.FACS_ALIGN  # from the RSDP: the next place where a FACS may be


def build(
    memory: GuestMemory,
    *,
    cpus: int = 1,
    pci_slots: Iterable[int] = ALL_SLOTS,
    com2: bool = True,
    ecam: bool = False,
    windows: Sequence[tuple[int, int]] = (),
) -> int:
    """Write RSDP, FACS, DSDT, FADT, MADT, MCFG (with ``ecam``), RSDT and XSDT from FIRMWARE_BASE
    up. The RSDT is for kernels that know ACPI 1.0 only.

    :param cpus: 1..MAX_CPUS; their local APIC ids are 0..cpus-1.
    :param pci_slots: the slots of bus 0 whose INTA is routed, and whose functions may come and go
        while the guest runs.
    :param com2: whether the machine has the second serial port.
    :param ecam: whether configuration space is also mapped at PCI_ECAM_BASE. Linux accesses the
        first 256 bytes through port 0xCF8 in any case.
    :param windows: the address and the GSI of each device of virtio over MMIO.
    :returns: the guest-physical address of the RSDP.
    """
    blob = bytearray(acpi.RSDP_SIZE)
    addresses = []

    def add_table(table: bytes, align: int = 16) -> int:
        blob.extend(bytes(-len(blob) % align))
        address = pf.FIRMWARE_BASE + len(blob)
        blob.extend(table)
        return address

    facs = struct.pack(acpi.FACS, b"FACS", struct.calcsize(acpi.FACS), 0, 0, 0, 0, 0, 2)
    facs_at = add_table(facs, acpi.FACS_ALIGN)
    assert facs_at == pf.FIRMWARE_BASE + FACS_OFFSET
    dsdt_at = add_table(dsdt(pci_slots, com2=com2, ecam=ecam, windows=windows))
    addresses.append(add_table(_fadt(facs_at, dsdt_at)))
    addresses.append(add_table(_madt(cpus)))
    if ecam:
        addresses.append(add_table(_mcfg()))
    rsdt = add_table(_sdt(b"RSDT", 1, struct.pack(f"<{len(addresses)}I", *addresses)))
    xsdt = add_table(_sdt(b"XSDT", 1, struct.pack(f"<{len(addresses)}Q", *addresses)))
    rsdp = bytearray(
        struct.pack(acpi.RSDP, b"RSD PTR ", 0, acpi.OEM_ID, 2, rsdt, acpi.RSDP_SIZE, xsdt, 0)
    )
    rsdp[acpi.RSDP_CHECKSUM] = -sum(rsdp[: acpi.RSDP_V1_SIZE]) & 0xFF
    rsdp[acpi.RSDP_EXT_CHECKSUM] = -sum(rsdp) & 0xFF
    blob[: acpi.RSDP_SIZE] = rsdp
    memory.write(pf.FIRMWARE_BASE, blob)
    return pf.FIRMWARE_BASE


def waking_vector(memory: GuestMemory) -> int:
    """The guest-physical address at which the guest wants to go on in real mode after a sleep (the
    FACS, 5.2.10); 0 if it has named none, or one where real mode does not reach.
    """
    table = pf.FIRMWARE_BASE + FACS_OFFSET
    vector = int.from_bytes(memory.read(table + acpi.FACS_WAKING_VECTOR, 4), "little")
    return vector if vector < pf.KERNEL_BASE else 0


def _sdt(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header, length and checksum (5.2.6)."""
    table = bytearray(
        struct.pack(
            acpi.SDT_HEADER,
            signature,
            acpi.SDT_HEADER_SIZE + len(body),
            revision,
            0,
            acpi.OEM_ID,
            acpi.OEM_TABLE_ID,
            1,
            acpi.CREATOR_ID,
            1,
        )
    )
    table += body
    table[acpi.SDT_CHECKSUM] = -sum(table) & 0xFF
    return bytes(table)


def _fadt(facs_at: int, dsdt_at: int) -> bytes:
    body = bytearray(acpi.FADT_SIZE - acpi.SDT_HEADER_SIZE)

    def put(fmt: str, offset: int, *values: int | bytes) -> None:
        struct.pack_into(fmt, body, offset - acpi.SDT_HEADER_SIZE, *values)

    def register(offset: int, port: int) -> None:
        put(acpi.GAS, offset, acpi.GAS_SYSTEM_IO, 8, 0, acpi.GAS_BYTE, port)

    put("<H", acpi.FADT_SCI_INT, pf.IRQ_SCI)
    for offset, x_offset, length_at, port, length in (
        (
            acpi.FADT_PM1A_EVENT,
            acpi.FADT_X_PM1A_EVENT,
            acpi.FADT_PM1_EVENT_LENGTH,
            pf.PORT_ACPI_PM1_EVENT,
            4,
        ),
        (
            acpi.FADT_PM1A_CONTROL,
            acpi.FADT_X_PM1A_CONTROL,
            acpi.FADT_PM1_CONTROL_LENGTH,
            pf.PORT_ACPI_PM1_CONTROL,
            2,
        ),
        (
            acpi.FADT_PM_TIMER,
            acpi.FADT_X_PM_TIMER,
            acpi.FADT_PM_TIMER_LENGTH,
            pf.PORT_ACPI_PM_TIMER,
            4,
        ),
        (acpi.FADT_GPE0, acpi.FADT_X_GPE0, acpi.FADT_GPE0_LENGTH, pf.PORT_ACPI_GPE0, 2),
    ):
        put("<I", offset, port)
        put("<B", length_at, length)
        put(acpi.GAS, x_offset, acpi.GAS_SYSTEM_IO, 8 * length, 0, 0, port)
    put("<HH", acpi.FADT_C2_LATENCY, 0xFFFF, 0xFFFF)  # there are no such states
    put("<B", acpi.FADT_CENTURY, 0x32)
    put("<I", acpi.FADT_FIRMWARE_CTRL, facs_at)
    put("<I", acpi.FADT_DSDT, dsdt_at)
    put("<Q", acpi.FADT_X_DSDT, dsdt_at)
    put("<H", acpi.FADT_IAPC_BOOT_ARCH, acpi.IAPC_LEGACY_DEVICES | acpi.IAPC_NO_VGA)
    put(
        "<I",
        acpi.FADT_FLAGS,
        acpi.FADT_F_WBINVD
        | acpi.FADT_F_PROC_C1
        | acpi.FADT_F_PWR_BUTTON
        | acpi.FADT_F_SLP_BUTTON
        | acpi.FADT_F_RESET_REG_SUP
        | acpi.FADT_F_TIMER_32_BITS,
    )
    register(acpi.FADT_RESET_REG, pf.PORT_ACPI_RESET)
    put("<B", acpi.FADT_RESET_VALUE, pf.ACPI_RESET_VALUE)
    put("<B", acpi.FADT_MINOR_VERSION, acpi.FADT_MINOR)
    register(acpi.FADT_SLEEP_CONTROL_REG, pf.PORT_ACPI_SLEEP_CONTROL)
    register(acpi.FADT_SLEEP_STATUS_REG, pf.PORT_ACPI_SLEEP_STATUS)
    put("<8s", acpi.FADT_HYPERVISOR_ID, acpi.OEM_TABLE_ID)
    return _sdt(b"FACP", acpi.FADT_REVISION, bytes(body))


def _madt(cpus: int) -> bytes:
    entries = [struct.pack("<II", pf.LAPIC_BASE, 0)]
    entries += [struct.pack(acpi.MADT_LAPIC, 0, 8, n, n, acpi.MADT_ENABLED) for n in range(cpus)]
    entries.append(struct.pack(acpi.MADT_IOAPIC, 1, 12, 0, 0, pf.IOAPIC_BASE, 0))
    entries.append(struct.pack(acpi.MADT_OVERRIDE, 2, 10, 0, 0, pf.IOAPIC_PIN_TIMER, 0))
    entries.append(struct.pack(acpi.MADT_NMI, 4, 6, acpi.MADT_ALL_CPUS, 0, 1))
    return _sdt(b"APIC", acpi.MADT_REVISION, b"".join(entries))


def _mcfg() -> bytes:
    return _sdt(b"MCFG", 1, struct.pack(acpi.MCFG_ENTRY, pf.PCI_ECAM_BASE, 0, 0, 0))


def dsdt(
    pci_slots: Iterable[int] = ALL_SLOTS,
    *,
    com2: bool = True,
    ecam: bool = False,
    windows: Sequence[tuple[int, int]] = (),
) -> bytes:
    """The DSDT: the devices that the guest cannot enumerate, and the routes of PCI's INTA.

    The parameters are those of ``build``.
    """

    def routes(lines: Sequence[int]) -> bytes:
        return aml.package(
            # Without a link device, a GSI is level-triggered and active-low.
            aml.route(slot, lines[slot % pf.GSI_PCI_COUNT])
            for slot in pci_slots
        )

    apic_lines = range(pf.GSI_PCI_BASE, pf.GSI_PCI_BASE + pf.GSI_PCI_COUNT)
    pci = aml.device(
        "PCI0",
        # PNP0A03 and not PNP0A08 (PCI Express): the latter would need an _OSC to negotiate with.
        aml.name("_HID", aml.eisaid("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.resources(
            aml.word_space(acpi.RES_TYPE_BUS, 0, 0, 0),
            aml.io(pf.PORT_PCI_ADDRESS, 8),
            # The window starts at 0x1000 so that BARs stay clear of the fixed ports.
            aml.word_space(acpi.RES_TYPE_IO, acpi.RES_IO_ENTIRE_RANGE, 0x1000, 0xFFFF),
            aml.dword_memory(pf.PCI_MMIO_BASE, pf.PCI_MMIO_BASE + pf.PCI_MMIO_SIZE - 1),
        ),
        aml.method(
            "_PRT",
            0,
            aml.if_name("PICM", aml.give(routes(apic_lines))),
            aml.give(routes(pf.PIC_PCI_LINES)),
        ),
        aml.io_fields("PHPR", pf.PORT_PCI_HOTPLUG, ("PCUP", "PCDN", "PCEJ")),
        *(
            aml.device(
                _slot_name(slot),
                aml.name("_ADR", aml.integer(slot << 16)),
                aml.name("_SUN", aml.integer(slot)),
                aml.method("_EJ0", 1, aml.store(aml.integer(1 << slot), aml.path("PCEJ"))),
            )
            for slot in pci_slots
        ),
    )

    def notices(register: str, value: int) -> bytes:
        return aml.store(aml.path(f"\\_SB.PCI0.{register}"), aml.LOCAL0) + b"".join(
            aml.notify_if_bit(slot, f"\\_SB.PCI0.{_slot_name(slot)}", value) for slot in pci_slots
        )

    event = aml.scope(
        "\\_GPE",
        aml.method(
            f"_E{pf.GPE_PCI_HOTPLUG:02X}",
            0,
            notices("PCUP", acpi.NOTIFY_DEVICE_CHECK),
            notices("PCDN", acpi.NOTIFY_EJECT_REQUEST),
        ),
    )
    devices = [pci, _serial("COM1", 1, pf.PORT_COM1, pf.IRQ_COM1)]
    if com2:
        devices.append(_serial("COM2", 2, pf.PORT_COM2, pf.IRQ_COM2))
    devices += [
        aml.device(
            "RTC",
            aml.name("_HID", aml.eisaid("PNP0B00")),
            aml.resources(aml.io(pf.PORT_RTC, 2), aml.irq(pf.IRQ_RTC)),
        ),
        aml.device(
            "PEVT",
            aml.name("_HID", aml.string("QEMU0001")),
            aml.resources(aml.io(pf.PORT_PVPANIC, 1)),
        ),
        aml.device("PWRB", aml.name("_HID", aml.eisaid("PNP0C0C"))),
        aml.device(
            "GED",
            aml.name("_HID", aml.string("ACPI0013")),
            aml.resources(aml.interrupt(pf.IRQ_GED)),
            aml.method("_EVT", 1, aml.notify("\\_SB.PWRB", acpi.NOTIFY_BUTTON_PRESSED)),
        ),
    ]
    if ecam:
        devices.append(
            aml.device(
                "MRES",
                aml.name("_HID", aml.eisaid("PNP0C02")),
                aml.resources(aml.memory32_fixed(pf.PCI_ECAM_BASE, pf.PCI_ECAM_SIZE)),
            )
        )
    devices += [_virtio(n, base, gsi) for n, (base, gsi) in enumerate(windows)]
    sleeps = b"".join(
        aml.name(name, aml.package([aml.integer(kind)] + 3 * [aml.integer(0)]))
        for name, kind in (("_S3", pf.ACPI_S3_TYPE), ("_S5", pf.ACPI_S5_TYPE))
    )
    # The kernel says by \_PIC whether it uses the IO-APIC (5.8.1).
    mode = aml.name("PICM", aml.integer(0)) + aml.method("_PIC", 1, aml.store_argument("PICM"))
    return _sdt(b"DSDT", 2, sleeps + mode + aml.scope("\\_SB", *devices) + event)


def _slot_name(slot: int) -> str:
    """The name of the device that stands for a slot of bus 0."""
    return f"S{slot:02X}"


def _virtio(number: int, base: int, gsi: int) -> bytes:
    """A device of virtio over MMIO, with the id by which Linux' driver knows one. Cards may
    share a line, so it is level-triggered.
    """
    flags = acpi.RES_IRQ_ACTIVE_LOW | acpi.RES_IRQ_SHARED
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.resources(aml.memory32_fixed(base, pf.VIRTIO_MMIO_SIZE), aml.interrupt(gsi, flags)),
    )


def _serial(text: str, uid: int, port: int, irq: int) -> bytes:
    """A 16550 serial port (PNP0501)."""
    return aml.device(
        text,
        aml.name("_HID", aml.eisaid("PNP0501")),
        aml.name("_UID", aml.integer(uid)),
        aml.resources(aml.io(port, 8), aml.irq(irq)),
    )
