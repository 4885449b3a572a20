"""Guest memory: one sealed memfd, mapped shared and split around the PCI hole.

The memory is a memfd and not anonymous memory because vhost-user back-ends must map the same pages.
"""

from __future__ import annotations

import errno
import mmap
import os

from pyvmm._ext import ffi, lib
from pyvmm.errors import MemoryShort, UsageError
from pyvmm.fd import memfd
from pyvmm.spec.platform import RAM_HIGH_BASE, RAM_LOW_MAX

PAGE = 4096
HUGE_PAGE = 2 << 20
SIZE_MAX = 1 << 44  # RAM and the PCI hole together stay below 2^48, which every CPU can address


def parse_size(text: str | int, what: str = "--memory") -> int:
    """Bytes from ``128M``, ``4G``, ``1T``, ``65536K``, or from the text of a number of MiB. An
    integer is bytes already.

    :param what: names the text in the error.
    :raises UsageError: ``text`` is no size.
    """
    if isinstance(text, int):
        return text
    raw = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = {"K": 10, "M": 20, "G": 30, "T": 40}.get(raw[-1:], 0)
    digits = raw[:-1] if unit else raw
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 30):
        raise UsageError(f"{what} {text!r} is no size", "write 256M, 4G or 1T")
    return int(digits) << (unit or 20)


class MemoryRegion:
    """One contiguous range of guest RAM.

    :ivar gpa: the guest-physical address of its first byte.
    :ivar size: its length in bytes.
    :ivar host: the address of its first byte in this process.
    :ivar offset: the position of its first byte in the memfd.
    """

    __slots__ = ("gpa", "host", "offset", "size")

    def __init__(self, gpa: int, size: int, host: int, offset: int) -> None:
        self.gpa, self.size, self.host, self.offset = gpa, size, host, offset

    def __repr__(self) -> str:
        return f"MemoryRegion(gpa={self.gpa:#x}, size={self.size:#x}, offset={self.offset:#x})"


class GuestMemory:
    """``size`` bytes of guest RAM. The object owns the memfd and its mapping.

    :param size: bytes, 1 MiB to 16 TiB, a multiple of 4 KiB (of 2 MiB with ``huge``).
    :param huge: take huge pages of 2 MiB from the host's pool (MFD_HUGETLB).
    :raises UsageError: ``size`` is out of range or no such multiple.
    :raises MemoryShort: the host has not enough memory or no free descriptor.
    """

    def __init__(self, size: int, *, huge: bool = False) -> None:
        unit = HUGE_PAGE if huge else PAGE
        if not 1 << 20 <= size <= SIZE_MAX or size % unit:
            raise UsageError(
                f"guest memory of {size} bytes",
                f"use 1M to {SIZE_MAX >> 40}T and a multiple of {unit}",
            )
        self.size = size
        self.huge = huge
        self._settled = False
        try:
            self.fd = memfd("pyvmm-ram", size, huge=huge)
            try:
                self._map = mmap.mmap(self.fd.fileno(), size, flags=mmap.MAP_SHARED)
            except OSError:
                self.fd.close()
                raise
        except OSError as e:
            hint = "lower --memory"
            if e.errno in (errno.EMFILE, errno.ENFILE):
                hint = "raise the limit: ulimit -n"
            elif huge:
                hint = f"reserve huge pages: sysctl vm.nr_hugepages={size // HUGE_PAGE}"
            raise MemoryShort(
                f"cannot get {size >> 20} MiB for the guest: {e.strerror}", hint
            ) from e
        try:
            # A host that gives huge pages to shared memory on advice (shmem_enabled is "advise")
            # then handles one page fault per 2 MiB instead of 512.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # the host's kernel has no transparent huge pages
        self._view = memoryview(self._map)
        # This export of the buffer keeps the mapping alive as long as C may use it.
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        base = int(ffi.cast("uintptr_t", self._buffer))
        low = min(size, RAM_LOW_MAX)
        self.regions = [MemoryRegion(0, low, base, 0)]
        if size > low:
            self.regions.append(MemoryRegion(RAM_HIGH_BASE, size - low, base + low, low))
        #: ``struct pv_memory *`` for C. It is valid until close().
        self.c = ffi.new("struct pv_memory *")
        self.c.count = len(self.regions)
        for i, r in enumerate(self.regions):
            c = self.c.region[i]
            c.gpa, c.size, c.host, c.offset = r.gpa, r.size, ffi.cast("uint8_t *", r.host), r.offset

    @property
    def low_size(self) -> int:
        """Bytes of RAM below the PCI hole."""
        return self.regions[0].size

    def _offset(self, gpa: int, length: int) -> int:
        for r in self.regions:
            if r.gpa <= gpa and 0 <= length <= r.gpa + r.size - gpa:
                return r.offset + gpa - r.gpa
        raise IndexError(f"guest range {gpa:#x}+{length:#x} is not in RAM")

    def host_address(self, gpa: int, length: int) -> int:
        """The address in this process at which [gpa, gpa + length) is mapped.

        :raises IndexError: the range is not inside RAM.
        """
        return self.regions[0].host + self._offset(gpa, length)

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable view of [gpa, gpa + length), not a copy. Release the view before close().

        :raises IndexError: the range is not inside RAM.
        """
        start = self._offset(gpa, length)
        return self._view[start : start + length]

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of [gpa, gpa + length).

        :raises IndexError: the range is not inside RAM.
        """
        start = self._offset(gpa, length)
        return bytes(self._view[start : start + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``.

        :raises IndexError: the range is not inside RAM.
        """
        start = self._offset(gpa, len(data))
        self._view[start : start + len(data)] = data

    def read_file(self, gpa: int, fd: int, offset: int, length: int) -> int:
        """Read up to ``length`` bytes of the file ``fd`` from ``offset`` on straight into RAM at
        ``gpa``.

        Only one thread at a time may call this method because it moves the memfd's file position.

        :returns: the number of bytes read, less than ``length`` if the file is shorter.
        :raises IndexError: the range is not inside RAM.
        :raises OSError: the file cannot be read.
        """
        start = self._offset(gpa, length)
        # A host that gives huge pages on advice gives them for a fault of the mapping, and not for
        # sendfile(). With small ones, the guest takes a fault in KVM for each page that it touches.
        for place in range(start - start % HUGE_PAGE, start + length, HUGE_PAGE):
            _ = self._view[place]
        done = 0
        os.lseek(self.fd.fileno(), start, os.SEEK_SET)
        try:
            # sendfile() copies from page cache to page cache: there is no page fault per page, and
            # the kernel does not zero pages that are overwritten anyway.
            while done < length:
                n = os.sendfile(self.fd.fileno(), fd, offset + done, length - done)
                if not n:
                    return done
                done += n
        except OSError:
            pass  # Some file systems cannot do it. preadv() below meets a true error again.
        while done < length:
            n = os.preadv(fd, [self._view[start + done : start + length]], offset + done)
            if not n:
                break
            done += n
        return done

    def unmap_page(self, gpa: int) -> None:
        """Remove the page that holds ``gpa`` from our page tables and from KVM's. The page keeps
        its content: the next access faults it in again.

        :raises IndexError: the page is not inside RAM.
        """
        unit = HUGE_PAGE if self.huge else PAGE
        start = self._offset(gpa & ~(unit - 1), unit)
        self._map.madvise(mmap.MADV_DONTNEED, start, unit)

    def settle(self) -> None:
        """Take all pages from the host now, in the order of their addresses, and keep them until
        close(). A device that reaches the memory by DMA then finds it in as few physical ranges as
        the host can give: the kernel limits their number (vhost's max_iotlb_entries), and pages
        that a guest has touched in an order of its own lie apart.

        :raises MemoryShort: the host has not enough memory.
        """
        if self._settled:
            return
        for r in self.regions:
            # Not by ``mmap``, which would have all threads of Python wait.
            if lib.madvise(ffi.cast("void *", r.host), r.size, lib.MADV_POPULATE_WRITE):
                if ffi.errno == errno.EINVAL:
                    return  # before Linux 5.14: the order is the guest's
                raise MemoryShort(
                    f"cannot get {self.size >> 20} MiB for the guest at once:"
                    f" {os.strerror(ffi.errno)}",
                    "lower --memory",
                )
        self._settled = True

    def zero(self) -> None:
        """Make RAM read as zero again (for a machine reset): drop all pages, or clear those that
        are to stay.
        """
        if self._settled:
            for r in self.regions:
                lib.memset(ffi.cast("void *", r.host), 0, r.size)
        else:
            self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Unmap the memory and close the memfd. A second call does nothing.

        The caller has stopped every thread that uses the memory. A view that was not released
        keeps the mapping alive; the memfd is closed all the same.
        """
        if self.fd.closed:
            return
        self.c.count = 0
        ffi.release(self._buffer)
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass
        finally:
            self.fd.close()
