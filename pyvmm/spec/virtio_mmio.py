"""virtio over MMIO (virtio 1.3, 4.2; linux/virtio_mmio.h spellings). The window of a device has
registers of 32 bits below VIRTIO_MMIO_CONFIG; the device configuration begins there.
"""

# 4.2.2
VIRTIO_MMIO_MAGIC_VALUE = 0x000  # R
VIRTIO_MMIO_VERSION = 0x004  # R
VIRTIO_MMIO_DEVICE_ID = 0x008  # R
VIRTIO_MMIO_VENDOR_ID = 0x00C  # R
VIRTIO_MMIO_DEVICE_FEATURES = 0x010  # R
VIRTIO_MMIO_DEVICE_FEATURES_SEL = 0x014  # W
VIRTIO_MMIO_DRIVER_FEATURES = 0x020  # W
VIRTIO_MMIO_DRIVER_FEATURES_SEL = 0x024  # W
VIRTIO_MMIO_QUEUE_SEL = 0x030  # W
VIRTIO_MMIO_QUEUE_NUM_MAX = 0x034  # R
VIRTIO_MMIO_QUEUE_NUM = 0x038  # W
VIRTIO_MMIO_QUEUE_READY = 0x044  # RW
VIRTIO_MMIO_QUEUE_NOTIFY = 0x050  # W
VIRTIO_MMIO_INTERRUPT_STATUS = 0x060  # R
VIRTIO_MMIO_INTERRUPT_ACK = 0x064  # W
VIRTIO_MMIO_STATUS = 0x070  # RW
VIRTIO_MMIO_QUEUE_DESC_LOW = 0x080  # W, like the five that follow
VIRTIO_MMIO_QUEUE_DESC_HIGH = 0x084
VIRTIO_MMIO_QUEUE_AVAIL_LOW = 0x090
VIRTIO_MMIO_QUEUE_AVAIL_HIGH = 0x094
VIRTIO_MMIO_QUEUE_USED_LOW = 0x0A0
VIRTIO_MMIO_QUEUE_USED_HIGH = 0x0A4
VIRTIO_MMIO_SHM_SEL = 0x0AC  # W
VIRTIO_MMIO_SHM_LEN_LOW = 0x0B0  # R, like the three that follow
VIRTIO_MMIO_SHM_LEN_HIGH = 0x0B4
VIRTIO_MMIO_SHM_BASE_LOW = 0x0B8
VIRTIO_MMIO_SHM_BASE_HIGH = 0x0BC
VIRTIO_MMIO_QUEUE_RESET = 0x0C0  # RW
VIRTIO_MMIO_CONFIG_GENERATION = 0x0FC  # R
VIRTIO_MMIO_CONFIG = 0x100

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2

# The names of the same registers in the specification.
MMIO_NAMES: dict[int, str | tuple[str, str]] = {
    VIRTIO_MMIO_MAGIC_VALUE: "MagicValue",
    VIRTIO_MMIO_VERSION: "Version",
    VIRTIO_MMIO_DEVICE_ID: "DeviceID",
    VIRTIO_MMIO_VENDOR_ID: "VendorID",
    VIRTIO_MMIO_DEVICE_FEATURES: "DeviceFeatures",
    VIRTIO_MMIO_DEVICE_FEATURES_SEL: "DeviceFeaturesSel",
    VIRTIO_MMIO_DRIVER_FEATURES: "DriverFeatures",
    VIRTIO_MMIO_DRIVER_FEATURES_SEL: "DriverFeaturesSel",
    VIRTIO_MMIO_QUEUE_SEL: "QueueSel",
    VIRTIO_MMIO_QUEUE_NUM_MAX: "QueueSizeMax",
    VIRTIO_MMIO_QUEUE_NUM: "QueueSize",
    VIRTIO_MMIO_QUEUE_READY: "QueueReady",
    VIRTIO_MMIO_QUEUE_NOTIFY: "QueueNotify",
    VIRTIO_MMIO_INTERRUPT_STATUS: "InterruptStatus",
    VIRTIO_MMIO_INTERRUPT_ACK: "InterruptACK",
    VIRTIO_MMIO_STATUS: "Status",
    VIRTIO_MMIO_QUEUE_DESC_LOW: "QueueDescLow",
    VIRTIO_MMIO_QUEUE_DESC_HIGH: "QueueDescHigh",
    VIRTIO_MMIO_QUEUE_AVAIL_LOW: "QueueDriverLow",
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH: "QueueDriverHigh",
    VIRTIO_MMIO_QUEUE_USED_LOW: "QueueDeviceLow",
    VIRTIO_MMIO_QUEUE_USED_HIGH: "QueueDeviceHigh",
    VIRTIO_MMIO_SHM_SEL: "SHMSel",
    VIRTIO_MMIO_SHM_LEN_LOW: "SHMLenLow",
    VIRTIO_MMIO_SHM_LEN_HIGH: "SHMLenHigh",
    VIRTIO_MMIO_SHM_BASE_LOW: "SHMBaseLow",
    VIRTIO_MMIO_SHM_BASE_HIGH: "SHMBaseHigh",
    VIRTIO_MMIO_QUEUE_RESET: "QueueReset",
    VIRTIO_MMIO_CONFIG_GENERATION: "ConfigGeneration",
}

# The names of registers that virtio over PCI has, too, and their names there (4.1.4.3).
MMIO_COMMON = {
    "DeviceFeatures": "device_feature",
    "DeviceFeaturesSel": "device_feature_select",
    "DriverFeatures": "driver_feature",
    "DriverFeaturesSel": "driver_feature_select",
    "QueueSel": "queue_select",
    "QueueSize": "queue_size",
    "QueueReady": "queue_enable",
    "QueueDesc": "queue_desc",
    "QueueDriver": "queue_driver",
    "QueueDevice": "queue_device",
    "QueueReset": "queue_reset",
    "Status": "device_status",
}
# From the words of virtio over PCI: registers, and the clauses that say the same here.
MMIO_WORDS = {
    **{common: name for name, common in MMIO_COMMON.items()},
    "4.1.4.3": "4.2.2",
    "4.1.4.3.2": "4.2.2.2",
}
