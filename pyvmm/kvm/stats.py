"""KVM's binary statistics (KVM_GET_STATS_FD, Documentation/virt/kvm/api.rst section 4.133)."""

from __future__ import annotations

import os
import threading

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError
from pyvmm.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    Value = int | list[int]


#: KVM's types and units, with their names in QEMU's schema (qapi/stats.json).
TYPES = {
    lib.KVM_STATS_TYPE_CUMULATIVE: "cumulative",
    lib.KVM_STATS_TYPE_INSTANT: "instant",
    lib.KVM_STATS_TYPE_PEAK: "peak",
    lib.KVM_STATS_TYPE_LINEAR_HIST: "linear-histogram",
    lib.KVM_STATS_TYPE_LOG_HIST: "log2-histogram",
}
UNITS = {
    lib.KVM_STATS_UNIT_BYTES: "bytes",
    lib.KVM_STATS_UNIT_SECONDS: "seconds",
    lib.KVM_STATS_UNIT_CYCLES: "cycles",
    lib.KVM_STATS_UNIT_BOOLEAN: "boolean",
}


DATA_MAX = 1 << 16  # bytes of values that are read at most; a vCPU has about 2000


class Stats(Fd):
    """The statistics of one VM or vCPU. The object owns their descriptor. It stays readable after
    the VM's other descriptors are closed, and keeps the VM in the kernel as long as it is open.

    Make the object before the vCPU runs: KVM_GET_STATS_FD waits until KVM_RUN returns. Reading the
    statistics does not wait. The table of names is read when it is first needed.

    :param fd: the VM's or vCPU's descriptor; lent for this call.
    :raises HostError: the kernel has no KVM_CAP_BINARY_STATS_FD.
    """

    def __init__(self, fd: int) -> None:
        got = lib.pv_ioctl(fd, lib.KVM_GET_STATS_FD, ffi.NULL)
        if got < 0:
            raise HostError(f"KVM_GET_STATS_FD failed: {os.strerror(-got)}")
        super().__init__(got)
        self._data_offset = 0
        # One thread reads the table: another one would find the descriptor closed by the first.
        self._reading = threading.Lock()
        #: (name, offset in the data block, number of 64-bit values)
        self._rows: list[tuple[str, int, int]] = []
        self._schema: list[dict[str, object]] = []

    @property
    def schema(self) -> list[dict[str, object]]:
        """A description of each statistic, as QEMU's StatsSchemaValue: name, type, ``unit``,
        ``base`` and ``exponent``. The value in that unit is number * base ** exponent.
        """
        self._need_table()
        return self._schema

    def _need_table(self) -> None:
        with self._reading:
            if not self._rows:
                self._read_table()

    def _read_table(self) -> None:
        got = self.fileno()
        header = ffi.new("struct kvm_stats_header *")
        raw = os.pread(got, ffi.sizeof("struct kvm_stats_header"), 0)
        ffi.memmove(header, raw, len(raw))
        size = ffi.sizeof("struct kvm_stats_desc") + header.name_size
        table = os.pread(got, size * header.num_desc, header.desc_offset)
        desc = ffi.new("struct kvm_stats_desc *")
        fixed = ffi.sizeof("struct kvm_stats_desc")
        self._data_offset = header.data_offset
        for at in range(0, len(table), size):
            ffi.memmove(desc, table[at : at + fixed], fixed)
            name = table[at + fixed : at + size].split(b"\0", 1)[0].decode()
            kind = TYPES.get(desc.flags & lib.KVM_STATS_TYPE_MASK)
            self._rows.append((name, desc.offset, desc.size))
            if kind is None:
                continue  # a type that QEMU's schema does not know yet
            row: dict[str, object] = {"name": name, "type": kind, "exponent": desc.exponent}
            if unit := UNITS.get(desc.flags & lib.KVM_STATS_UNIT_MASK):
                row["unit"] = unit
            if desc.exponent:
                row["base"] = (
                    2 if desc.flags & lib.KVM_STATS_BASE_MASK == lib.KVM_STATS_BASE_POW2 else 10
                )
            if kind == "linear-histogram":
                row["bucket-size"] = desc.bucket_size
            self._schema.append(row)

    def raw(self) -> bytes:
        """The present values as KVM's bytes, for ``decode``. This is quick because it does not need
        the table of names.
        """
        if not self._data_offset:
            header = ffi.new("struct kvm_stats_header *")
            ffi.buffer(header)[:] = os.pread(
                self.fileno(), ffi.sizeof("struct kvm_stats_header"), 0
            )
            self._data_offset = header.data_offset
        return os.pread(self.fileno(), DATA_MAX, self._data_offset)

    def growing(self, data: bytes) -> dict[str, int]:
        """Decode the bytes of ``raw``, but only the statistics that never shrink: for others, a
        difference of two values means nothing.
        """
        names = {row["name"] for row in self.schema if row["type"] == "cumulative"}
        values = self.decode(data)
        return {name: n for name, n in values.items() if name in names and isinstance(n, int)}

    def read(self) -> dict[str, Value]:
        """The present values by KVM's names. The value of a histogram is a list."""
        return self.decode(self.raw())

    def decode(self, data: bytes) -> dict[str, Value]:
        """Decode the bytes of ``raw`` into values by KVM's names. After ``close`` this works only
        if the table of names has been read before.
        """
        self._need_table()
        out: dict[str, Value] = {}
        for name, offset, count in self._rows:
            values = [
                int.from_bytes(data[i : i + 8], "little")
                for i in range(offset, offset + 8 * count, 8)
            ]
            out[name] = values[0] if count == 1 else values
        return out
