"""QEMU's firmware configuration device, read-only. Test kernels ask it about their machine.

The source is docs/specs/fw_cfg.rst in QEMU.
"""

from __future__ import annotations

import struct

from pyvmm.bus import PIO, Bus
from pyvmm.spec import fw_cfg as spec
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.memory import GuestMemory

DMA_MAX = 1 << 20  # bytes per transfer: no item is as long, and the vCPU waits for the transfer


class FwCfg:
    """The selector at port 0x510, the data port at 0x511 and the DMA register at 0x514.

    :param memory: lent; DMA reads and writes it.
    :param cpus: the number of vCPUs, an item of the device.
    :param files: names (at most 55 bytes) and contents of files besides ``etc/e820``.
    """

    def __init__(
        self, bus: Bus, memory: GuestMemory, cpus: int, files: Mapping[str, bytes] | None = None
    ) -> None:
        self._memory = memory
        e820 = [(r.gpa, r.size, lb.E820_RAM) for r in memory.regions]
        content = {spec.FILE_E820: b"".join(struct.pack(lb.E820_ENTRY, *e) for e in e820)}
        content.update(files or {})
        self._items = {
            spec.SIGNATURE: spec.SIGNATURE_VALUE,
            spec.ID: struct.pack("<I", spec.VERSION | spec.VERSION_DMA),
            spec.RAM_SIZE: struct.pack("<Q", memory.size),
            spec.NB_CPUS: struct.pack("<H", cpus),
            spec.MAX_CPUS: struct.pack("<H", cpus),
        }
        directory = struct.pack(">I", len(content))
        for key, (name, data) in enumerate(sorted(content.items()), spec.FILE_FIRST):
            directory += struct.pack(spec.FILE, len(data), key, 0, name.encode()[:55])
            self._items[key] = data
        self._items[spec.FILE_DIR] = directory
        self._item, self._at = b"", 0
        bus.add(PIO, pf.PORT_FW_CFG, 2, "fw-cfg", self)
        bus.add(PIO, pf.PORT_FW_CFG_DMA, 8, "fw-cfg-dma", Dma(self))

    def select(self, key: int) -> None:
        """Start to read item ``key`` from its beginning. An unknown item is empty."""
        self._item, self._at = self._items.get(key, b""), 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes of the selected item, with zeroes beyond its end."""
        data = self._item[self._at : self._at + count]
        self._at = min(self._at + count, len(self._item))
        return data.ljust(count, b"\0")

    def read(self, offset: int, size: int) -> int:
        """Port 0x511 reads as the next byte of the selected item, any other access as zero."""
        return self.take(1)[0] if offset == 1 and size == 1 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A 16-bit write to port 0x510 selects an item. The guest cannot write data."""
        if offset == 0 and size == 2:
            self.select(value)

    def transfer(self, at: int) -> None:
        """Do the transfer that the access structure at the guest-physical address ``at`` describes,
        and write 0 or an error into its control field.
        """
        try:
            control, length, address = struct.unpack(
                spec.DMA_ACCESS, self._memory.read(at, spec.DMA_ACCESS_SIZE)
            )
            if control & spec.DMA_CTL_SELECT:
                self.select(control >> 16)
            error = 0
            if control & spec.DMA_CTL_READ:
                try:
                    if length > DMA_MAX:
                        raise IndexError
                    self._memory.write(address, self.take(length))
                except IndexError:
                    error = spec.DMA_CTL_ERROR
            elif control & spec.DMA_CTL_WRITE:
                error = spec.DMA_CTL_ERROR
            elif control & spec.DMA_CTL_SKIP:
                self._at = min(self._at + length, len(self._item))
            self._memory.write(at, struct.pack(">I", error))
        except IndexError:
            pass  # the structure itself is not in RAM, so the error cannot be reported


class Dma:
    """The DMA address register at port 0x514. It is big-endian; a write of its lower half starts
    the transfer.
    """

    def __init__(self, fw_cfg: FwCfg) -> None:
        self._fw_cfg = fw_cfg
        self._high = 0

    def read(self, offset: int, size: int) -> int:
        """The register reads as the signature ``QEMU CFG``."""
        raw = spec.DMA_SIGNATURE.to_bytes(8, "big")
        return int.from_bytes(raw[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the upper half (offset 0) or the lower half (offset 4), 32 bits each. Any other
        access is ignored.
        """
        if size != 4:
            return
        half = int.from_bytes(value.to_bytes(4, "little"), "big")
        if offset == 0:
            self._high = half
        elif offset == 4:
            high, self._high = self._high, 0
            self._fw_cfg.transfer(high << 32 | half)
