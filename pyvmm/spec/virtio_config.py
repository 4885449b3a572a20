"""The device-specific configurations of virtio devices other than network cards: offset -> field,
in the spellings of the kernel's headers (linux/virtio_blk.h, virtio_fs.h, ...).
"""

# 5.2.4: struct virtio_blk_config, up to write_zeroes_may_unmap and its padding
BLOCK = {
    0: "capacity",
    8: "size_max",
    12: "seg_max",
    16: "geometry",
    20: "blk_size",
    24: "physical_block_exp",
    25: "alignment_offset",
    26: "min_io_size",
    28: "opt_io_size",
    32: "wce",
    34: "num_queues",
    36: "max_discard_sectors",
    40: "max_discard_seg",
    44: "discard_sector_alignment",
    48: "max_write_zeroes_sectors",
    52: "max_write_zeroes_seg",
    56: "write_zeroes_may_unmap",
}
BLOCK_SIZE = 60
# 5.3.4
CONSOLE = {0: "cols", 2: "rows", 4: "max_nr_ports", 8: "emerg_wr"}
CONSOLE_SIZE = 12
# 5.6.4
SCSI = {
    0: "num_queues",
    4: "seg_max",
    8: "max_sectors",
    12: "cmd_per_lun",
    16: "event_info_size",
    20: "sense_size",
    24: "cdb_size",
    28: "max_channel",
    30: "max_target",
    32: "max_lun",
}
SCSI_SIZE = 36
# 5.10.4
VSOCK = {0: "guest_cid"}
VSOCK_SIZE = 8
# 5.11.4, without notify_buf_size, which comes with VIRTIO_FS_F_NOTIFICATION
FS = {0: "tag", 36: "num_request_queues"}
FS_SIZE = 40
FS_TAG_SIZE = 36
# 5.14.4
SOUND = {0: "jacks", 4: "streams", 8: "chmaps"}
SOUND_SIZE = 12
# 5.18.4
GPIO = {0: "ngpio", 4: "gpio_names_size"}
GPIO_SIZE = 8
