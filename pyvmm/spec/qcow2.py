"""The head of a qcow2 image (docs/interop/qcow2.txt of QEMU). All numbers are big-endian."""

QCOW_MAGIC = b"QFI\xfb"
#: magic, version, backing_file_offset, backing_file_size, cluster_bits, size, crypt_method,
#: l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots,
#: snapshots_offset
HEADER = ">4sIQIIQIIQQIIQ"
#: Of version 3, behind it: incompatible_features, compatible_features, autoclear_features,
#: refcount_order, header_length
HEADER_V3 = ">QQQII"
#: Bit of incompatible_features: the guest's data are in another file.
QCOW2_INCOMPAT_DATA_FILE = 2
#: A header extension begins with its type and the length of its data, which are padded to 8 bytes.
EXTENSION = ">II"
#: Types of header extensions: the last one, and the name of the backing file's format.
QCOW2_EXT_MAGIC_END = 0
QCOW2_EXT_MAGIC_BACKING_FORMAT = 0xE2792ACA
#: The most bytes of a backing file's name.
BACKING_FILE_SIZE_MAX = 1023
