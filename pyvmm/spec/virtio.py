"""Virtio 1.2 constants common to all devices: feature bits, device status, virtqueues. Kernel
spellings.

Section numbers are those of the OASIS virtio specification, version 1.2. Feature constants are bit
numbers.
"""

# 5: device types
VIRTIO_ID_NET = 1

# 2.1: device status field
VIRTIO_CONFIG_S_ACKNOWLEDGE = 1
VIRTIO_CONFIG_S_DRIVER = 2
VIRTIO_CONFIG_S_DRIVER_OK = 4
VIRTIO_CONFIG_S_FEATURES_OK = 8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# 6: reserved feature bits
VIRTIO_F_NOTIFY_ON_EMPTY = 24  # legacy (6.3)
VIRTIO_F_ANY_LAYOUT = 27  # legacy (6.3)
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_ORDER_PLATFORM = 36
VIRTIO_F_SR_IOV = 37
VIRTIO_F_NOTIFICATION_DATA = 38
VIRTIO_F_NOTIF_CONFIG_DATA = 39
VIRTIO_F_RING_RESET = 40

# 2.7: split virtqueues: the largest queue, and the areas' alignment in bytes
VRING_SIZE_MAX = 32768
VRING_DESC_ALIGN_SIZE = 16
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4

# 2.7.5: descriptor table, flags
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4

# 2.7.7 and 2.7.10: notification suppression without EVENT_IDX
VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_USED_F_NO_NOTIFY = 1

# 2.8: packed virtqueues: the areas' alignment in bytes, bit numbers of a descriptor's flags, and
# flags of the event suppression areas
PACKED_EVENT_ALIGN_SIZE = 4
VRING_PACKED_DESC_F_AVAIL = 7
VRING_PACKED_DESC_F_USED = 15
VRING_PACKED_EVENT_FLAG_ENABLE = 0
VRING_PACKED_EVENT_FLAG_DISABLE = 1
VRING_PACKED_EVENT_FLAG_DESC = 2
VRING_PACKED_EVENT_F_WRAP_CTR = 15
