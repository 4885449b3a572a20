"""KVM's binary statistics (KVM_GET_STATS_FD, Documentation/virt/kvm/api.rst section 4.133)."""

from __future__ import annotations

import os

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError
from pyvmm.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    Value = int | list[int]


class Stats(Fd):
    """The statistics of one VM or vCPU; owns the descriptor, which stays readable after the VM is gone.

    :param fd: the VM's or vCPU's descriptor, lent.
    :raises HostError: the kernel has no KVM_CAP_BINARY_STATS_FD.
    """

    def __init__(self, fd: int) -> None:
        got = lib.pv_ioctl(fd, lib.KVM_GET_STATS_FD, ffi.NULL)
        if got < 0:
            raise HostError(f"KVM_GET_STATS_FD failed: {os.strerror(-got)}")
        super().__init__(got)
        header = ffi.new("struct kvm_stats_header *")
        raw = os.pread(got, ffi.sizeof("struct kvm_stats_header"), 0)
        ffi.memmove(header, raw, len(raw))
        size = ffi.sizeof("struct kvm_stats_desc") + header.name_size
        table = os.pread(got, size * header.num_desc, header.desc_offset)
        desc = ffi.new("struct kvm_stats_desc *")
        fixed = ffi.sizeof("struct kvm_stats_desc")
        self._data_offset = header.data_offset
        #: (name, offset in the data block, number of 64-bit values, cumulative?)
        self._rows: list[tuple[str, int, int, bool]] = []
        for at in range(0, len(table), size):
            ffi.memmove(desc, table[at : at + fixed], fixed)
            name = table[at + fixed : at + size].split(b"\0", 1)[0].decode()
            kind = desc.flags & lib.KVM_STATS_TYPE_MASK
            self._rows.append((name, desc.offset, desc.size, kind == lib.KVM_STATS_TYPE_CUMULATIVE))
        self._data_size = max((o + 8 * n for _, o, n, _ in self._rows), default=0)

    def read(self) -> dict[str, Value]:
        """The present values by KVM's names; histograms are lists."""
        data = os.pread(self.fileno(), self._data_size, self._data_offset)
        out: dict[str, Value] = {}
        for name, offset, count, _ in self._rows:
            values = [int.from_bytes(data[i : i + 8], "little") for i in range(offset, offset + 8 * count, 8)]
            out[name] = values[0] if count == 1 else values
        return out
