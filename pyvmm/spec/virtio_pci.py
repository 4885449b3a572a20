"""virtio over PCI (virtio 1.2, 4.1; linux/virtio_pci.h spellings)."""

# 4.1.2
PCI_VENDOR_ID_REDHAT_QUMRANET = 0x1AF4
VIRTIO_PCI_DEVICE_ID_BASE = 0x1040  # plus the virtio device id
VIRTIO_TRANS_ID_NET = 0x1000  # a transitional network card (linux/virtio_ids.h)

# 4.1.4
VIRTIO_PCI_CAP_COMMON_CFG = 1
VIRTIO_PCI_CAP_NOTIFY_CFG = 2
VIRTIO_PCI_CAP_ISR_CFG = 3
VIRTIO_PCI_CAP_DEVICE_CFG = 4
VIRTIO_PCI_CAP_PCI_CFG = 5

# 4.1.4.3, struct virtio_pci_common_cfg
VIRTIO_PCI_COMMON_DFSELECT = 0
VIRTIO_PCI_COMMON_DF = 4
VIRTIO_PCI_COMMON_GFSELECT = 8
VIRTIO_PCI_COMMON_GF = 12
VIRTIO_PCI_COMMON_MSIX = 16
VIRTIO_PCI_COMMON_NUMQ = 18
VIRTIO_PCI_COMMON_STATUS = 20
VIRTIO_PCI_COMMON_CFGGENERATION = 21
VIRTIO_PCI_COMMON_Q_SELECT = 22
VIRTIO_PCI_COMMON_Q_SIZE = 24
VIRTIO_PCI_COMMON_Q_MSIX = 26
VIRTIO_PCI_COMMON_Q_ENABLE = 28
VIRTIO_PCI_COMMON_Q_NOFF = 30
VIRTIO_PCI_COMMON_Q_DESCLO = 32
VIRTIO_PCI_COMMON_Q_DESCHI = 36
VIRTIO_PCI_COMMON_Q_AVAILLO = 40
VIRTIO_PCI_COMMON_Q_AVAILHI = 44
VIRTIO_PCI_COMMON_Q_USEDLO = 48
VIRTIO_PCI_COMMON_Q_USEDHI = 52
VIRTIO_PCI_COMMON_Q_NDATA = 56
VIRTIO_PCI_COMMON_Q_RESET = 58

# The names of the same registers in the specification.
COMMON_NAMES = {
    VIRTIO_PCI_COMMON_DFSELECT: "device_feature_select",
    VIRTIO_PCI_COMMON_DF: "device_feature",
    VIRTIO_PCI_COMMON_GFSELECT: "driver_feature_select",
    VIRTIO_PCI_COMMON_GF: "driver_feature",
    VIRTIO_PCI_COMMON_MSIX: "config_msix_vector",
    VIRTIO_PCI_COMMON_NUMQ: "num_queues",
    VIRTIO_PCI_COMMON_STATUS: "device_status",
    VIRTIO_PCI_COMMON_CFGGENERATION: "config_generation",
    VIRTIO_PCI_COMMON_Q_SELECT: "queue_select",
    VIRTIO_PCI_COMMON_Q_SIZE: "queue_size",
    VIRTIO_PCI_COMMON_Q_MSIX: "queue_msix_vector",
    VIRTIO_PCI_COMMON_Q_ENABLE: "queue_enable",
    VIRTIO_PCI_COMMON_Q_NOFF: "queue_notify_off",
    VIRTIO_PCI_COMMON_Q_DESCLO: "queue_desc low",
    VIRTIO_PCI_COMMON_Q_DESCHI: "queue_desc high",
    VIRTIO_PCI_COMMON_Q_AVAILLO: "queue_driver low",
    VIRTIO_PCI_COMMON_Q_AVAILHI: "queue_driver high",
    VIRTIO_PCI_COMMON_Q_USEDLO: "queue_device low",
    VIRTIO_PCI_COMMON_Q_USEDHI: "queue_device high",
    VIRTIO_PCI_COMMON_Q_NDATA: "queue_notif_config_data",
    VIRTIO_PCI_COMMON_Q_RESET: "queue_reset",
}

VIRTIO_MSI_NO_VECTOR = 0xFFFF

# 4.1.4.5
VIRTIO_PCI_ISR_QUEUE = 0x1
VIRTIO_PCI_ISR_CONFIG = 0x2

# 4.1.4.10: the legacy interface, in BAR 0, an I/O BAR
VIRTIO_PCI_HOST_FEATURES = 0
VIRTIO_PCI_GUEST_FEATURES = 4
VIRTIO_PCI_QUEUE_PFN = 8
VIRTIO_PCI_QUEUE_NUM = 12
VIRTIO_PCI_QUEUE_SEL = 14
VIRTIO_PCI_QUEUE_NOTIFY = 16
VIRTIO_PCI_STATUS = 18
VIRTIO_PCI_ISR = 19
# While MSI-X is enabled; the device configuration begins behind them, or else in their place.
VIRTIO_MSI_CONFIG_VECTOR = 20
VIRTIO_MSI_QUEUE_VECTOR = 22
VIRTIO_PCI_QUEUE_ADDR_SHIFT = 12
VIRTIO_PCI_VRING_ALIGN = 4096

# The names of the same registers, those of the modern ones with the same meaning.
LEGACY_NAMES: dict[int, str | tuple[str, str]] = {
    VIRTIO_PCI_HOST_FEATURES: "device_feature",
    VIRTIO_PCI_GUEST_FEATURES: "driver_feature",
    VIRTIO_PCI_QUEUE_PFN: "queue_address",
    VIRTIO_PCI_QUEUE_NUM: "queue_size",
    VIRTIO_PCI_QUEUE_SEL: "queue_select",
    VIRTIO_PCI_STATUS: "device_status",
    VIRTIO_MSI_CONFIG_VECTOR: "config_msix_vector",
    VIRTIO_MSI_QUEUE_VECTOR: "queue_msix_vector",
}

# struct virtio_pci_cap: names of the fields by offset
CAP_NAMES = {2: "cap_len", 3: "cfg_type", 4: "bar", 5: "id", 8: "offset", 12: "length"}
