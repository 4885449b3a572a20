"""PCI configuration space (PCI Local Bus 3.0 chapter 6; linux/pci_regs.h spellings)."""

# 6.1, type 00h header
PCI_VENDOR_ID = 0x00
PCI_DEVICE_ID = 0x02
PCI_COMMAND = 0x04
PCI_COMMAND_IO = 0x1
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4
PCI_COMMAND_INTX_DISABLE = 0x400
PCI_STATUS = 0x06
PCI_STATUS_INTERRUPT = 0x08
PCI_STATUS_CAP_LIST = 0x10
PCI_REVISION_ID = 0x08
PCI_CLASS_PROG = 0x09
PCI_CLASS_DEVICE = 0x0A
PCI_HEADER_TYPE = 0x0E
PCI_BASE_ADDRESS_0 = 0x10
PCI_BASE_ADDRESS_SPACE_IO = 0x01
PCI_BASE_ADDRESS_MEM_TYPE_64 = 0x04
PCI_SUBSYSTEM_VENDOR_ID = 0x2C
PCI_SUBSYSTEM_ID = 0x2E
PCI_CAPABILITY_LIST = 0x34
PCI_INTERRUPT_LINE = 0x3C
PCI_INTERRUPT_PIN = 0x3D

# PCI Power Management 1.2, 3.2
PCI_CAP_ID_PM = 0x01
PCI_PM_PMC = 2
PCI_PM_CTRL = 4
PCI_PM_CTRL_STATE_MASK = 0x3
PCI_PM_CTRL_NO_SOFT_RESET = 0x8
PCI_D0 = 0
PCI_D3HOT = 3
PM_NAMES = {2: "capabilities", 4: "control"}

# ECN "Advanced Capabilities for Conventional PCI"
PCI_CAP_ID_AF = 0x13
PCI_AF_CTRL = 4
PCI_AF_CTRL_FLR = 0x1
PCI_AF_CAP_TP_FLR = 0x3
PCI_CAP_AF_SIZEOF = 6
AF_NAMES = {2: "length", 3: "capabilities", 4: "control", 5: "status"}

# 6.8.2, MSI-X capability
PCI_CAP_ID_VNDR = 0x09
PCI_CAP_ID_MSIX = 0x11
PCI_MSIX_FLAGS = 2
PCI_MSIX_FLAGS_MASKALL = 0x4000
PCI_MSIX_FLAGS_ENABLE = 0x8000
PCI_MSIX_TABLE = 4
PCI_MSIX_PBA = 8
PCI_CAP_MSIX_SIZEOF = 12
MSIX_NAMES = {2: "message control", 4: "table offset", 8: "PBA offset"}
MSIX_ENTRY_NAMES = ("address", "upper address", "data", "vector control")
PCI_MSIX_ENTRY_SIZE = 16
PCI_MSIX_ENTRY_CTRL_MASKBIT = 0x1

# 6.1, type 00h header: names of the registers for the exit ledger
HEADER_NAMES = {
    0x00: "vendor id",
    0x02: "device id",
    0x04: "command",
    0x06: "status",
    0x08: "revision id",
    0x09: "class code",
    0x0C: "cache line size",
    0x0D: "latency timer",
    0x0E: "header type",
    0x0F: "BIST",
    0x10: "BAR 0",
    0x14: "BAR 1",
    0x18: "BAR 2",
    0x1C: "BAR 3",
    0x20: "BAR 4",
    0x24: "BAR 5",
    0x28: "CardBus CIS",
    0x2C: "subsystem vendor id",
    0x2E: "subsystem id",
    0x30: "expansion ROM",
    0x34: "capabilities pointer",
    0x35: "reserved",
    0x3C: "interrupt line",
    0x3D: "interrupt pin",
    0x3E: "min grant",
    0x3F: "max latency",
}
