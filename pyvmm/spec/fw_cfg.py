"""QEMU's firmware configuration device (docs/specs/fw_cfg in QEMU,
include/uapi/linux/qemu_fw_cfg.h). Constants only.
"""

SIGNATURE = 0x00
ID = 0x01
RAM_SIZE = 0x03
NB_CPUS = 0x05
MAX_CPUS = 0x0F
FILE_DIR = 0x19
FILE_FIRST = 0x20

SIGNATURE_VALUE = b"QEMU"
VERSION = 0x01  # bits of item ID: the traditional interface
VERSION_DMA = 0x02  # the DMA interface

FILE = ">IHH56s"  # an entry of FILE_DIR: size, select, reserved, name
DMA_ACCESS = ">IIQ"  # control, length, address; big-endian, in guest memory
DMA_ACCESS_SIZE = 16
DMA_SIGNATURE = 0x51454D5520434647  # "QEMU CFG", big-endian in the address register
DMA_CTL_ERROR = 0x01
DMA_CTL_READ = 0x02
DMA_CTL_SKIP = 0x04
DMA_CTL_SELECT = 0x08
DMA_CTL_WRITE = 0x10

FILE_E820 = "etc/e820"  # struct e820_entry: address, size, type
