"""The machine's own address map: guest-physical addresses, I/O ports and interrupt lines.

The devices use these constants, and so do the firmware tables that describe the devices to the
guest. ``guest/pyvmm_port.h`` repeats the constants of the guest port; a test compares the two.
"""

# --- guest-physical memory ------------------------------------------------------------------------
# RAM is [0, min(size, RAM_LOW_MAX)) and, beyond it, from RAM_HIGH_BASE up.
RAM_LOW_MAX = 0xC000_0000
RAM_HIGH_BASE = 0x1_0000_0000
PCI_MMIO_BASE = 0xC000_0000  # the 32-bit window for BARs
PCI_MMIO_SIZE = 0x2000_0000
PCI_ECAM_BASE = 0xE000_0000  # bus 0 only
PCI_ECAM_SIZE = 0x0010_0000
VIRTIO_MMIO_BASE = 0xFEB0_0000  # as in QEMU's microvm: card n has the nth window
VIRTIO_MMIO_SIZE = 0x1000  # of one window; 31 cards at most
IOAPIC_BASE = 0xFEC0_0000
LAPIC_BASE = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000  # one page for KVM on Intel hosts without "unrestricted guest"
KVM_TSS_BASE = 0xFFFB_D000  # three pages, for the same hosts

# Low memory that the loader fills. The guest may use all RAM below EBDA_BASE once it has booted.
BOOT_GDT = 0x500
BOOT_PARAMS = 0x7000
PVH_START_INFO = 0x6000
MULTIBOOT_INFO = 0x6000  # the same page: a kernel gets either PVH or multiboot information
BOOT_PAGE_TABLES = 0x9000  # PML4, PDPT and four page directories: 0x9000..0xEFFF
BOOT_CMDLINE = 0x2_0000  # at most BOOT_CMDLINE_MAX bytes, the terminating NUL included
BOOT_CMDLINE_MAX = 0x1000
EBDA_BASE = 0x9_FC00  # the MP floating pointer
FIRMWARE_BASE = 0xE_0000  # ACPI tables, RSDP first; reserved in e820
FIRMWARE_END = 0x10_0000
BIOS_CODE = 0xF_F000  # the interrupt handlers of a machine that starts as by a BIOS
KERNEL_BASE = 0x10_0000
# Where a kernel may lie below KERNEL_BASE, for each mode in which it starts: where the loader puts
# nothing that the kernel needs.
LOW_ROOMS = {
    "real16": ((0x500, BOOT_CMDLINE),),
    "protected32": (
        (0x1000, MULTIBOOT_INFO),
        (MULTIBOOT_INFO + 0x1000, BOOT_CMDLINE),
        (BOOT_CMDLINE + BOOT_CMDLINE_MAX, EBDA_BASE),
    ),
    "long64": ((BOOT_CMDLINE + BOOT_CMDLINE_MAX, EBDA_BASE),),
}

# --- I/O ports ------------------------------------------------------------------------------------
PORT_RTC = 0x70  # index, data
PORT_I8042 = 0x60  # 0x60 and 0x64; only the reset command is understood
PORT_POST = 0x80
# Only machines with test devices have PORT_DEBUGCON, PORT_DEBUG_EXIT, PORT_FW_CFG* and the
# PORT_TESTDEV_* and TESTDEV_MMIO below.
PORT_DEBUGCON = 0xE9
PORT_DEBUG_EXIT = 0xF4
PORT_COM1 = 0x3F8
PORT_COM2 = 0x2F8
PORT_PVPANIC = 0x505
PORT_FW_CFG = 0x510
PORT_FW_CFG_DMA = 0x514
PORT_TESTDEV_ECHO = 0xE0  # four bytes that keep their value; accesses of any width
# A 32-bit write of a guest-physical address makes the host drop its mapping of that page.
PORT_TESTDEV_FLUSH = 0xE4
PORT_TESTDEV_IRQ = 0x2000  # a byte written to PORT_TESTDEV_IRQ + n is the level of line n
TESTDEV_MMIO = 0xFF00_0000  # memory whose every access exits
TESTDEV_MMIO_SIZE = 0x1_0000
PORT_ACPI_SLEEP_CONTROL = 0x600  # ACPI 6.4, 4.8.3.7: bits 2..4 SLP_TYP, bit 5 SLP_EN
PORT_ACPI_SLEEP_STATUS = 0x601
PORT_ACPI_PM1_EVENT = 0x608  # 4 bytes: status, enable (4.8.3.1)
PORT_ACPI_PM1_CONTROL = 0x60C  # 2 bytes (4.8.3.2)
PORT_ACPI_PM_TIMER = 0x610  # 4 bytes (4.8.2.1)
PORT_ACPI_GPE0 = 0x614  # 2 bytes: status, enable (4.8.4.1)
PORT_ACPI_RESET = 0x602  # write ACPI_RESET_VALUE
ACPI_RESET_VALUE = 0x01
ACPI_S3_TYPE = 1  # as in QEMU; test kernels know no other
ACPI_S5_TYPE = 5
PORT_PCI_ADDRESS = 0xCF8
PORT_PCI_RESET = 0xCF9
PORT_PCI_DATA = 0xCFC
# The guest port: how our init talks to the VMM without any driver (see guest/pyvmm_port.h).
PORT_GUEST_CONTROL = 0x620  # 32-bit write: GUEST_* << 24 | value
PORT_GUEST_STDOUT = 0x624  # 8-bit writes, also rep outsb
PORT_GUEST_STDERR = 0x625
# A 32-bit read or write carries frames in the pages of GUEST_CHANNEL.
PORT_GUEST_CHANNEL = 0x628
# A 32-bit read makes the VMM copy the next bytes of the command's standard input to the page of
# GUEST_PAGE.
PORT_GUEST_INPUT = 0x62C
# Hot plug of PCI functions, one bit per slot of bus 0. UP, which a read clears, names slots that
# have got a function; DOWN names slots that are to lose theirs. A write to EJECT tells which slots'
# functions the guest has let go.
PORT_PCI_HOTPLUG = 0x630
PCI_HOTPLUG_UP, PCI_HOTPLUG_DOWN, PCI_HOTPLUG_EJECT = 0, 4, 8
PCI_HOTPLUG_SIZE = 12

GUEST_INIT = 1  # init runs
GUEST_COMMAND = 2  # the command is about to start
GUEST_STATUS = 3  # the command has ended; value is its exit status, 0..255
GUEST_POWEROFF = 4  # init is about to power off
GUEST_NET_UP = 5  # the network interfaces are configured; value is their number
GUEST_PAGE = 6  # value is the page frame number of the page for output and input
GUEST_WRITE = 7  # output: bits 0..15 of value are the length, at most 4096; bit 16: standard error
GUEST_AGENT = 8  # init runs no command of its own, but waits for sessions
GUEST_CHANNEL = 9  # value is the page frame number of the page with the channel's list
GUEST_SHARES = 10  # the shares are mounted; value is their number
GUEST_NO_SHARE = 11  # a share is not mounted: bits 0..15 of value are the errno, 16..23 its number
SHARE_OVERLAY = 255  # that number for the overlay of the root
#: The first word of the page after GUEST_PAGE; after each GUEST_WRITE, a mask of GONE_*.
GUEST_ANSWERS = 0x534E4150
GONE_STDOUT, GONE_STDERR = 1, 2
#: What PORT_GUEST_INPUT gives at the end of the input.
INPUT_ENDS = 0xFFFF_FFFF
#: What the second serial port tells init.
BELL_INPUT, BELL_CHANNEL = 0x3C, 0x21
CHANNEL_PAGES = 16  # the most pages of the channel
CHANNEL_WINDOW = 256 << 10  # bytes that the sender of a stream may send without further credit
FRAME_OPEN, FRAME_START, FRAME_INPUT, FRAME_OUTPUT, FRAME_ERROR, FRAME_CREDIT = 1, 2, 3, 4, 5, 6
FRAME_SIGNAL, FRAME_SIZE, FRAME_EXIT, FRAME_CLOSE, FRAME_LEAVE, FRAME_FAILED = 7, 8, 9, 10, 11, 12

# --- interrupt lines (GSIs of the one IO-APIC) ----------------------------------------------------
IRQ_COM2 = 3
IRQ_COM1 = 4
IRQ_RTC = 8
IRQ_SCI = 13  # level; the clock's alarm and PCI hot plug as events of ACPI
GPE_PCI_HOTPLUG = 1  # the bit in GPE0 of PCI hot plug
IRQ_GED = 9  # ACPI generic event device: an edge means that the power button was pressed
IOAPIC_PIN_TIMER = 2  # a PC wires the PIT (ISA IRQ 0) to this pin; so do our GSI routes
GSI_PCI_BASE = 16  # INTA of slot n is GSI_PCI_BASE + n % GSI_PCI_COUNT, level, active low
GSI_PCI_COUNT = 8
# INTA of slot n also reaches the 8259s, for kernels without an IO-APIC: line PIC_PCI_LINES[n % 8],
# which no other device has but those of virtio over MMIO, whose GSIs the same lines are.
PIC_PCI_LINES = (15, 11, 10, 5, 7, 6, 12, 14)
GSI_MSI_BASE = 24  # MSI routes start here

MAX_CPUS = 255  # local APIC ids of 8 bits, of which 255 means all (SDM 3A, 11.6.1)
#: The most cards of a machine: slots of PCI bus 0, less the host bridge.
MAX_CARDS = 31
