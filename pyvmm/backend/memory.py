"""A front-end's memory as the back-end maps it: the memory table, the in-flight regions and the log
of a migration.

A front-end names its memory by files and offsets, and each file is mapped no further than the
front-end said. A file that gets shorter under us would end this process by SIGBUS, and with it the
sessions of others. So files are sealed against that (F_SEAL_SHRINK of fcntl(2)), and files that
cannot be sealed are refused; unless the front-end is trusted not to do it. A file system in user
space could make us wait for each page, so only memory itself is taken: tmpfs and hugetlbfs.
"""

from __future__ import annotations

import fcntl
import mmap
import struct
from os import SEEK_END, lseek, readlink

from pyvmm._ext import ffi, lib
from pyvmm.spec.vhost_user import (
    INFLIGHT_DESC,
    INFLIGHT_PACKED_DESC,
    INFLIGHT_PACKED_HEAD_SIZE,
    INFLIGHT_REGION,
    VHOST_LOG_PAGE,
)
from pyvmm.vhostuser.wire import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.vhostuser.wire import Region

#: Memory regions that a front-end may have at once.
SLOTS_MAX = int(lib.PV_MEM_REGIONS)
#: Total bytes that a front-end may have us map.
MEMORY_MAX = 1 << 46
#: The file of the memory through which the kernel passes buffers of drivers to a VDUSE device.
VDUSE_MEMORY = "anon_inode:[vduse-domain]"
#: Bytes to which each queue's in-flight region is aligned. Other back-ends do the same.
INFLIGHT_ALIGN = 64


class FileMapping:
    """A shared, writable mapping of the first ``size`` bytes of a file.

    :param fd: of the file; stays the caller's.
    :param unsealed: take a file that can be made shorter.
    :ivar host: address of the mapping in this process.
    :raises ProtocolError: the file is shorter, cannot be mapped, or is none that we take.
    """

    def __init__(self, fd: int, size: int, *, unsealed: bool = False) -> None:
        check_file(fd, unsealed=unsealed)
        try:
            # mmap asks fstat(2), which a confined process may not have, and takes no answer for
            # one.
            end = lseek(fd, 0, SEEK_END)
        except OSError:
            end = size  # of the kernel's own file for VDUSE, which has no place
        if end < size:
            raise ProtocolError(f"cannot map {size} bytes of a memory file of {end}")
        try:
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as e:
            raise ProtocolError(f"cannot map {size} bytes of a memory file: {e}") from e
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        self.size = size
        self.host = int(ffi.cast("uintptr_t", self._buffer))

    def close(self) -> None:
        """Unmap. Nothing may use ``host`` any more."""
        ffi.release(self._buffer)
        self._map.close()


def check_file(fd: int, *, unsealed: bool) -> None:
    """Seal a memory file against being made shorter.

    :param unsealed: go on if that is not possible.
    :raises ProtocolError: it is not possible, or the file is not in memory.
    """
    info = ffi.new("struct statfs *")
    if readlink(f"/proc/self/fd/{fd}") == VDUSE_MEMORY:  # noqa: PTH115
        return  # the kernel's own
    if lib.fstatfs(fd, info) or info.f_type not in (lib.TMPFS_MAGIC, lib.HUGETLBFS_MAGIC):
        raise ProtocolError(
            "a memory file that is neither in tmpfs nor in hugetlbfs",
            "have the front-end use a memfd",
        )
    try:
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    except OSError as e:
        if not unsealed:
            raise ProtocolError(
                "a memory file that can be made shorter, which would end this process",
                "have the front-end use a memfd that can be sealed; or trust it: --unsealed",
            ) from e


class MemoryTable:
    """A front-end's memory table, mapped. A data path takes it in place of a ``GuestMemory``.

    :param unsealed: see ``FileMapping``.
    :ivar regions: each region with its mapping.
    :ivar c: ``struct pv_memory *`` for C; valid for as long as this object is.
    """

    def __init__(self, *, unsealed: bool = False) -> None:
        self._unsealed = unsealed
        self.regions: list[tuple[Region, FileMapping]] = []
        self.c = ffi.new("struct pv_memory *")

    def add(self, region: Region, fd: int) -> None:
        """Map one more region.

        :param fd: of its file; stays the caller's.
        :raises ProtocolError: the region is empty, too large, overlaps another, or is not in its
            file; or there are too many.
        """
        end = region.offset + region.size
        total = sum(r.size for r, _ in self.regions)
        if not region.size or end > MEMORY_MAX or total + region.size > MEMORY_MAX:
            raise ProtocolError(
                f"memory region of {region.size:#x} bytes at {region.offset:#x} of its file"
            )
        if region.gpa + region.size > 1 << 64 or region.user + region.size > 1 << 64:
            raise ProtocolError(f"memory region at {region.gpa:#x} wraps round")
        if len(self.regions) >= SLOTS_MAX:
            raise ProtocolError(f"more than {SLOTS_MAX} memory regions")
        for r, _ in self.regions:
            if region.gpa < r.gpa + r.size and r.gpa < region.gpa + region.size:
                raise ProtocolError(f"memory regions overlap at {region.gpa:#x}")
        self.regions.append((region, FileMapping(fd, end, unsealed=self._unsealed)))
        self._update()

    def remove(self, region: Region) -> None:
        """Unmap the region of these addresses and this size.

        :raises ProtocolError: there is no such region.
        """
        for i, (r, mapping) in enumerate(self.regions):
            if (r.gpa, r.user, r.size) == (region.gpa, region.user, region.size):
                del self.regions[i]
                self._update()
                mapping.close()
                return
        raise ProtocolError(f"no memory region at {region.gpa:#x}")

    def _update(self) -> None:
        self.c.count = len(self.regions)
        for i, (r, mapping) in enumerate(self.regions):
            c = self.c.region[i]
            c.gpa, c.size, c.offset = r.gpa, r.size, r.offset
            c.host = ffi.cast("uint8_t *", mapping.host + r.offset)

    def gpa(self, user: int, what: str) -> int:
        """The guest-physical address of a front-end address. Only this byte is looked up; code
        that uses more bytes has to check that they are in memory, too.

        :raises ProtocolError: the address is in no region.
        """
        for r, _ in self.regions:
            if r.user <= user < r.user + r.size:
                return r.gpa + user - r.user
        raise ProtocolError(f"{what} at {user:#x} is in no memory region")

    def read_u16(self, gpa: int) -> int | None:
        """The 16 bits at an even guest-physical address; None outside memory."""
        for r, mapping in self.regions:
            if r.gpa <= gpa and gpa + 2 <= r.gpa + r.size and gpa % 2 == 0:
                return int(ffi.cast("uint16_t *", mapping.host + r.offset + gpa - r.gpa)[0])
        return None

    @property
    def end(self) -> int:
        """The guest-physical address behind the last region; 0 without memory."""
        return max((r.gpa + r.size for r, _ in self.regions), default=0)

    def clear(self) -> None:
        """Unmap everything."""
        regions, self.regions = self.regions, []
        self._update()
        for _, mapping in regions:
            mapping.close()


class InflightRegions:
    """The in-flight regions of all queues, one after another in one file. The front-end has the
    file, too, and keeps it while there is no back-end.

    :param mapping: of the file; owned from here on.
    :param size: bytes of all regions. :param offset: of the first region in the file, in bytes.
    :param queues: regions in the file. :param queue_size: entries of each.
    """

    def __init__(
        self, mapping: FileMapping, size: int, offset: int, queues: int, queue_size: int
    ) -> None:
        self._mapping, self._size, self._offset = mapping, size, offset
        self.queues, self.queue_size = queues, queue_size

    @staticmethod
    def stride(queue_size: int, *, packed: bool) -> int:
        """Bytes from one queue's region to the next."""
        if packed:
            head, entry = INFLIGHT_PACKED_HEAD_SIZE, struct.calcsize(INFLIGHT_PACKED_DESC)
        else:
            head, entry = struct.calcsize(INFLIGHT_REGION), struct.calcsize(INFLIGHT_DESC)
        return -(-(head + entry * queue_size) // INFLIGHT_ALIGN) * INFLIGHT_ALIGN

    def region(self, ring: int, size: int, *, packed: bool) -> Any:
        """The region of one ring as ``uint8_t *``; None for a ring that has none, that has more
        entries (``size``) than its region, or whose format makes the region larger than the file.
        """
        stride = self.stride(self.queue_size, packed=packed)
        fits = (ring + 1) * stride <= self._size
        if ring >= self.queues or size > self.queue_size or not fits:
            return None
        return ffi.cast("uint8_t *", self._mapping.host + self._offset + ring * stride)

    def close(self) -> None:
        """Unmap the file."""
        self._mapping.close()


class DirtyLog:
    """The bitmap in which the pages of guest memory are marked that were written, from
    guest-physical address 0 on.

    :param mapping: of its file; owned from here on. :param size: bytes of the bitmap.
    :param offset: where it begins in the file, in bytes.
    :ivar bits: cdata ``uint8_t *``, valid until ``close``. :ivar end: the first address for which
        there is no bit.
    """

    def __init__(self, mapping: FileMapping, size: int, offset: int) -> None:
        self._mapping = mapping
        self.size, self.end = size, 8 * size * VHOST_LOG_PAGE
        self.bits = ffi.cast("uint8_t *", mapping.host + offset)

    def close(self) -> None:
        """Unmap the file."""
        self._mapping.close()
