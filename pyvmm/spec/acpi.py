"""ACPI 6.4 tables and AML opcodes, and the Intel MultiProcessor Specification 1.4.
Constants only.
"""

OEM_ID = b"PYVMM "
OEM_TABLE_ID = b"PYVMM   "
CREATOR_ID = b"PYVM"

# --- tables ---
# signature, length, revision, checksum, OEM id, OEM table id, OEM revision, creator id, creator
# revision (5.2.6)
SDT_HEADER = "<4sIBB6s8sI4sI"
SDT_HEADER_SIZE = 36
SDT_CHECKSUM = 9
# signature, checksum, OEM id, revision, RSDT, length, XSDT, extended checksum (5.2.5.3)
RSDP = "<8sB6sBIIQB3x"
RSDP_SIZE = 36
RSDP_V1_SIZE = 20
RSDP_CHECKSUM = 8
RSDP_EXT_CHECKSUM = 32
# generic address structure: space, bit width, bit offset, access size, address (5.2.3.2)
GAS = "<BBBBQ"
GAS_SYSTEM_IO = 1
GAS_BYTE = 1

# --- FADT (5.2.9): offsets ---
FADT_REVISION = 6
FADT_MINOR = 4
FADT_SIZE = 276
FADT_FIRMWARE_CTRL = 36
FADT_DSDT = 40
FADT_SCI_INT = 46
FADT_PM1A_EVENT = 56
FADT_PM1A_CONTROL = 64
FADT_PM_TIMER = 76
FADT_GPE0 = 80
FADT_PM1_EVENT_LENGTH = 88
FADT_PM1_CONTROL_LENGTH = 89
FADT_PM_TIMER_LENGTH = 91
FADT_GPE0_LENGTH = 92
FADT_C2_LATENCY = 96
FADT_C3_LATENCY = 98
FADT_CENTURY = 108
FADT_IAPC_BOOT_ARCH = 109
FADT_FLAGS = 112
FADT_RESET_REG = 116
FADT_RESET_VALUE = 128
FADT_MINOR_VERSION = 131
FADT_X_DSDT = 140
FADT_X_PM1A_EVENT = 148
FADT_X_PM1A_CONTROL = 172
FADT_X_PM_TIMER = 208
FADT_X_GPE0 = 220
FADT_SLEEP_CONTROL_REG = 244
FADT_SLEEP_STATUS_REG = 256
FADT_HYPERVISOR_ID = 268
IAPC_LEGACY_DEVICES = 1 << 0  # bit 1 (8042) stays clear, so Linux does not probe for a keyboard
IAPC_NO_VGA = 1 << 2
FADT_F_WBINVD = 1 << 0
FADT_F_PROC_C1 = 1 << 2
FADT_F_PWR_BUTTON = 1 << 4  # if set, there is no fixed-hardware button
FADT_F_SLP_BUTTON = 1 << 5
FADT_F_TIMER_32_BITS = 1 << 8
FADT_F_RESET_REG_SUP = 1 << 10

# --- FACS (5.2.10): signature, length, hardware signature, waking vector, lock, flags, 64-bit
# vector, version ---
FACS = "<4sIIIIIQB31x"
FACS_ALIGN = 64
FACS_WAKING_VECTOR = 12
# PM1 status and control registers (4.8.3)
PM1_RTC = 1 << 10
PM1_WAK = 1 << 15
PM1_SCI_EN = 1 << 0
PM1_SLP_TYPE_SHIFT = 10
PM1_SLP_EN = 1 << 13

# --- MADT (5.2.12) ---
MADT_REVISION = 5
MADT_LAPIC = "<BBBBI"  # type 0, length, processor uid, APIC id, flags
MADT_IOAPIC = "<BBBBII"  # type 1, length, id, 0, address, GSI base
MADT_OVERRIDE = "<BBBBIH"  # type 2, length, bus 0, source IRQ, GSI, flags
MADT_NMI = "<BBBHB"  # type 4, length, processor uid, flags, LINT
MADT_ENABLED = 1
MADT_ALL_CPUS = 0xFF

# --- MCFG (PCI Firmware Specification 3.0, 4.1.2) ---
MCFG_ENTRY = "<8xQHBB4x"  # base, segment, first and last bus

# --- AML (20.2) ---
AML_ZERO = 0x00
AML_ONE = 0x01
AML_NAME = 0x08
AML_BYTE = 0x0A
AML_WORD = 0x0B
AML_DWORD = 0x0C
AML_STRING = 0x0D
AML_SCOPE = 0x10
AML_BUFFER = 0x11
AML_PACKAGE = 0x12
AML_METHOD = 0x14
AML_DUAL_NAME = 0x2E
AML_MULTI_NAME = 0x2F
AML_LOCAL0 = 0x60
AML_ARG0 = 0x68
AML_STORE = 0x70
AML_AND = 0x7B
AML_IF = 0xA0
AML_RETURN = 0xA4
AML_EXT = 0x5B
AML_EXT_REGION = 0x80
AML_EXT_FIELD = 0x81
AML_EXT_DEVICE = 0x82
AML_SYSTEM_IO = 0x01
AML_FIELD_DWORD = 0x03  # accesses of 32 bits, without the global lock
AML_NOTIFY = 0x86
METHOD_SERIALIZED = 1 << 3

# --- resource descriptors (6.4) ---
RES_IRQ_NO_FLAGS = 0x22
RES_IO = 0x47
RES_END = 0x79
RES_MEMORY32_FIXED = 0x86
RES_DWORD = 0x87
RES_WORD = 0x88
RES_INTERRUPT = 0x89
RES_TYPE_MEMORY = 0
RES_TYPE_IO = 1
RES_TYPE_BUS = 2
RES_MIN_MAX_FIXED = 0x0C  # producer, positive decode
RES_IO_ENTIRE_RANGE = 0x03
RES_MEM_READ_WRITE = 0x01
RES_IRQ_CONSUMER = 1 << 0
RES_IRQ_EDGE = 1 << 1
RES_IRQ_ACTIVE_LOW = 1 << 2
RES_IRQ_SHARED = 1 << 3

NOTIFY_DEVICE_CHECK = 0x01
NOTIFY_EJECT_REQUEST = 0x03
NOTIFY_BUTTON_PRESSED = 0x80

# --- MultiProcessor Specification 1.4: chapter 4 ---
MP_FLOATING = "<4sIBBB5B"  # "_MP_", table, length in 16 bytes, spec revision, checksum, features
MP_FLOATING_CHECKSUM = 10
# "PCMP", length, revision, checksum, OEM, product, 0, 0, entries, LAPIC, 0, 0, 0
MP_HEADER = "<4sHBB8s12sIHHIHBB"
MP_HEADER_CHECKSUM = 7
MP_REVISION = 4
MP_PROCESSOR = "<BBBBII8x"  # type 0, LAPIC id, LAPIC version, flags, signature, features
MP_BUS = "<BB6s"  # type 1, id, name
MP_IOAPIC = "<BBBBI"  # type 2, id, version, flags, address
MP_IO_INTERRUPT = "<BBHBBBB"  # type 3, kind, flags, source bus, source IRQ, IO-APIC id, pin
MP_LOCAL_INTERRUPT = "<BBHBBBB"  # type 4, kind, flags, source bus, source IRQ, LAPIC id, LINT
MP_CPU_ENABLED = 1 << 0
MP_CPU_BSP = 1 << 1
MP_IOAPIC_ENABLED = 1
MP_INT = 0
MP_NMI = 1
MP_EXTINT = 3
MP_ACTIVE_LOW_LEVEL = 0x0F  # polarity 3, trigger 3
MP_ALL_LAPICS = 0xFF
LAPIC_VERSION = 0x14
IOAPIC_VERSION = 0x11
