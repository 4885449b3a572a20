"""Guest memory: one sealed memfd, mapped shared, split around the PCI hole.

A memfd rather than anonymous memory because vhost-user backends must be able to map the same pages.
"""

from __future__ import annotations

import errno
import mmap

from pyvmm._ext import ffi
from pyvmm.errors import MemoryShort, UsageError
from pyvmm.fd import memfd
from pyvmm.spec.platform import RAM_HIGH_BASE, RAM_LOW_MAX

PAGE = 4096
HUGE_PAGE = 2 << 20
SIZE_MAX = 1 << 44  # with the PCI hole still inside the 48 bits that any CPU has


def parse_size(text: str | int, what: str = "--memory") -> int:
    """Bytes from ``128M``, ``4G``, ``65536K``, or from the text of a number of MiB. An integer is
    bytes already.

    :param what: names the text in the error.
    :raises UsageError: ``text`` is no size.
    """
    if isinstance(text, int):
        return text
    raw = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = {"K": 10, "M": 20, "G": 30}.get(raw[-1:], 0)
    digits = raw[:-1] if unit else raw
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 30):
        raise UsageError(f"{what} {text!r} is no size", "write 256M or 4G")
    return int(digits) << (unit or 20)


class MemoryRegion:
    """One contiguous run of guest RAM.

    :ivar gpa: guest-physical start; :ivar size: bytes; :ivar host: host-virtual address; :ivar
        offset: in the memfd.
    """

    __slots__ = ("gpa", "host", "offset", "size")

    def __init__(self, gpa: int, size: int, host: int, offset: int) -> None:
        self.gpa, self.size, self.host, self.offset = gpa, size, host, offset

    def __repr__(self) -> str:
        return f"MemoryRegion(gpa={self.gpa:#x}, size={self.size:#x}, offset={self.offset:#x})"


class GuestMemory:
    """``size`` bytes of guest RAM; owns the memfd and its mapping.

    :param size: bytes, a multiple of 4 KiB (2 MiB with ``huge``), 1 MiB to 16 TiB.
    :raises MemoryShort: the host cannot give that much.
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
            # Where the host gives shared memory huge pages on advice (shmem_enabled), a boot faults
            # 512 times less often.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
        self._view = memoryview(self._map)
        # The buffer export keeps the mapping alive for as long as C may use it.
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        base = int(ffi.cast("uintptr_t", self._buffer))
        low = min(size, RAM_LOW_MAX)
        self.regions = [MemoryRegion(0, low, base, 0)]
        if size > low:
            self.regions.append(MemoryRegion(RAM_HIGH_BASE, size - low, base + low, low))
        #: ``struct pv_memory *`` for C; valid until close().
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
        """Where [gpa, gpa + length) is mapped in this process. Raises IndexError outside RAM."""
        return self.regions[0].host + self._offset(gpa, length)

    def view(self, gpa: int, length: int) -> memoryview:
        """The live bytes of [gpa, gpa + length); release it before close(). Raises IndexError
        outside RAM.
        """
        start = self._offset(gpa, length)
        return self._view[start : start + length]

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of [gpa, gpa + length). Raises IndexError outside RAM."""
        start = self._offset(gpa, length)
        return bytes(self._view[start : start + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data`` at ``gpa``. Raises IndexError outside RAM."""
        start = self._offset(gpa, len(data))
        self._view[start : start + len(data)] = data

    def read_file(self, gpa: int, fd: int, offset: int, length: int) -> int:
        """Read up to ``length`` bytes of the file at ``offset`` straight into RAM; returns the
        bytes read.

        One thread at a time: it moves the memfd's file position.
        """
        import os

        start = self._offset(gpa, length)
        done = 0
        os.lseek(self.fd.fileno(), start, os.SEEK_SET)
        try:
            # Page cache to page cache: no page fault a page, no zeroing of what is overwritten.
            while done < length:
                n = os.sendfile(self.fd.fileno(), fd, offset + done, length - done)
                if not n:
                    return done
                done += n
        except OSError:
            pass  # not every file system can; a true error comes again
        while done < length:
            n = os.preadv(fd, [self._view[start + done : start + length]], offset + done)
            if not n:
                break
            done += n
        return done

    def unmap_page(self, gpa: int) -> None:
        """Take the page of ``gpa`` out of page tables, ours and KVM's; its content stays. Raises
        IndexError outside RAM.
        """
        unit = HUGE_PAGE if self.huge else PAGE
        start = self._offset(gpa & ~(unit - 1), unit)
        self._map.madvise(mmap.MADV_DONTNEED, start, unit)

    def zero(self) -> None:
        """Drop all pages: RAM reads as zero again (a machine reset)."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Unmap and release; the caller has stopped every thread that uses it. A second call does
        nothing.

        Views that are still out keep the mapping, not the descriptor.
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
