"""As much of qcow2 as it takes to find the files that an image names, to refuse it for them, and to
make an empty image that lies above another one.
"""

from __future__ import annotations

import struct

from pyvmm.spec.qcow2 import (
    BACKING_FILE_SIZE_MAX,
    EXTENSION,
    HEADER,
    HEADER_V3,
    QCOW2_EXT_MAGIC_BACKING_FORMAT,
    QCOW2_EXT_MAGIC_END,
    QCOW2_INCOMPAT_DATA_FILE,
    QCOW_MAGIC,
)

#: Bytes of an image that the functions here look at: QEMU writes the name of a backing file behind
#: the header's few hundred bytes.
HEAD_READ = 1 << 16
#: Bytes of the header of version 3.
HEAD_SIZE = struct.calcsize(HEADER) + struct.calcsize(HEADER_V3)
CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
#: The largest disk in bytes that QEMU takes with our clusters: its first table has at most 32 MiB.
SIZE_MAX = (32 << 20) // 8 * (CLUSTER // 8) << CLUSTER_BITS
#: A number of 16 bits per cluster.
REFCOUNT_ORDER = 4


def problem(head: bytes, *, backing: bool = False) -> tuple[str, str]:
    """Why an image is not taken, and what to do about it; empty if it is taken.

    :param head: its first bytes. :param backing: whether it may have a backing file.
    """
    if len(head) < struct.calcsize(HEADER) or not head.startswith(QCOW_MAGIC):
        return "is no qcow2 image", "say what it is: format=raw"
    (_, version, place, *_) = struct.unpack_from(HEADER, head)
    if version not in (2, 3):
        return f"is of version {version} of qcow2", "convert it: qemu-img convert -O qcow2"
    if place and not backing:
        return (
            "has a backing file, and an image may not name other files of the host",
            "allow it by backing=on, or make it complete: qemu-img convert -O qcow2 OLD NEW",
        )
    if virtual_size(head) > SIZE_MAX:
        return too_large(virtual_size(head))
    if version == 3:
        if len(head) < HEAD_SIZE:
            return "is no qcow2 image: it is too short", "say what it is: format=raw"
        (incompatible, *_) = struct.unpack_from(HEADER_V3, head, struct.calcsize(HEADER))
        if incompatible >> QCOW2_INCOMPAT_DATA_FILE & 1:
            return (
                "has its data in another file, and an image may not name other files of the host",
                "make it complete: qemu-img convert -O qcow2 OLD NEW",
            )
    return "", ""


def backing_file(head: bytes) -> tuple[bytes, str]:
    """The name of an image's backing file, as the image has it, and the name of its format; each is
    empty if there is none.

    :param head: the first bytes of an image that ``problem`` takes.
    :raises ValueError: the name is not where it must be.
    """
    (_, version, place, size, *_) = struct.unpack_from(HEADER, head)
    if not place:
        return b"", ""
    name = head[place : place + size]
    if not 0 < size <= BACKING_FILE_SIZE_MAX or len(name) < size:
        raise ValueError
    at, form = struct.calcsize(HEADER), b""
    if version == 3:
        (*_, at) = struct.unpack_from(HEADER_V3, head, at)
    while at + 8 <= min(place, len(head)):
        kind, length = struct.unpack_from(EXTENSION, head, at)
        if kind == QCOW2_EXT_MAGIC_END:
            break
        if kind == QCOW2_EXT_MAGIC_BACKING_FORMAT:
            form = head[at + 8 : at + 8 + length]
        at += 8 + -(-length // 8) * 8
    return name, form.decode(errors="replace")


def too_large(size: int) -> tuple[str, str]:
    """As ``problem``, for a disk of more than ``SIZE_MAX`` bytes."""
    return f"has {size} bytes, and a disk has at most {SIZE_MAX}", "name a smaller image"


def virtual_size(head: bytes) -> int:
    """The size of the disk in an image, in bytes. :param head: its first bytes."""
    return int(struct.unpack_from(HEADER, head)[5])


def empty(size: int) -> bytes:
    """An image without data, which names no backing file.

    :param size: of the disk, in bytes, at most ``SIZE_MAX``.
    """
    assert size <= SIZE_MAX
    by_l1 = CLUSTER // 8 << CLUSTER_BITS  # what one entry of the first table stands for
    entries = max(1, -(-size // by_l1))
    l1_clusters = -(-entries * 8 // CLUSTER)
    used = 3 + l1_clusters  # header, table of reference counts, a block of them, first table
    head = struct.pack(
        HEADER,
        QCOW_MAGIC,
        3,
        0,
        0,
        CLUSTER_BITS,
        size,
        0,
        entries,
        3 * CLUSTER,
        CLUSTER,
        1,
        0,
        0,
    )
    head += struct.pack(HEADER_V3, 0, 0, 0, REFCOUNT_ORDER, HEAD_SIZE)
    clusters = (head, struct.pack(">Q", 2 * CLUSTER), b"\0\1" * used, bytes(l1_clusters * CLUSTER))
    return b"".join(part.ljust(CLUSTER, b"\0") for part in clusters)
