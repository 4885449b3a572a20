"""The devices for test kernels, access by access. In tests/host, a guest uses them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.bus import MMIO, PIO
from pyvmm.devices.console import Stream
from pyvmm.devices.testdev import add_test_devices
from pyvmm.errors import HostError
from pyvmm.spec import fw_cfg as fc
from pyvmm.spec import linux_boot as lb
from pyvmm.spec import platform as pf
from tests.pci_guest import Board


class Lines:
    """Stands for a VM whose interrupt chips have the lines 0..15 only."""

    def __init__(self) -> None:
        self.set: list[tuple[int, int]] = []

    def irq_line(self, gsi: int, level: int) -> None:
        if gsi > 15:
            raise HostError("KVM_IRQ_LINE: Invalid argument")
        self.set.append((gsi, level))


class Kernel(Board):
    """A board with test devices. It keeps their output and the exit statuses."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()
        self.ends: list[int] = []
        self.stream = Stream("console")
        add_test_devices(self.bus, self.lines, self.memory, 3, self.stream, self.ends.append)  # type: ignore[arg-type]

    def item(self, key: int, size: int) -> bytes:
        self.write(PIO, pf.PORT_FW_CFG, 2, key)
        return bytes(self.read(PIO, pf.PORT_FW_CFG + 1, 1) for _ in range(size))

    def dma(self, control: int, length: int, address: int, at: int = 0x2000) -> int:
        """Make the device do one DMA transfer; returns the control field afterwards."""
        self.memory.write(at, struct.pack(fc.DMA_ACCESS, control, length, address))
        for half, value in ((0, at >> 32), (4, at & 0xFFFFFFFF)):
            swapped = int.from_bytes(value.to_bytes(4, "big"), "little")
            self.write(PIO, pf.PORT_FW_CFG_DMA + half, 4, swapped)
        return int(struct.unpack(">I", self.memory.read(at, 4))[0])


@pytest.fixture
def board() -> Iterator[Kernel]:
    b = Kernel()
    with b:
        yield b
        b.stream.close()


@pytest.mark.parametrize(
    ("value", "status"), [(0, 1), (1, 3), (38, 77), (127, 255), (128, 1), (0xFFFF_FFFF, 255)]
)
def test_debug_exit(board: Kernel, value: int, status: int) -> None:
    board.write(PIO, pf.PORT_DEBUG_EXIT, 4, value)
    assert board.ends == [status]
    assert board.read(PIO, pf.PORT_DEBUG_EXIT, 1) == 0


def test_debug_console(board: Kernel) -> None:
    assert board.read(PIO, pf.PORT_DEBUGCON, 1) == 0xE9
    for c in b"hi!":
        board.write(PIO, pf.PORT_DEBUGCON, 1, c)
    buf = ffi.new("uint8_t[]", 16)
    assert lib.pv_pipe_read(board.stream.pipe, buf, 16, 0) == 3
    assert bytes(buf)[:3] == b"hi!"


def test_scratch(board: Kernel) -> None:
    board.write(PIO, pf.PORT_TESTDEV_ECHO, 4, 0x11223344)
    board.write(PIO, pf.PORT_TESTDEV_ECHO + 2, 1, 0xEE)
    assert board.read(PIO, pf.PORT_TESTDEV_ECHO, 4) == 0x11EE3344
    assert board.read(PIO, pf.PORT_TESTDEV_ECHO + 2, 2) == 0x11EE
    last = pf.TESTDEV_MMIO + pf.TESTDEV_MMIO_SIZE - 8
    board.write(MMIO, last, 8, 0x0123_4567_89AB_CDEF)
    assert board.read(MMIO, last + 4, 4) == 0x0123_4567
    assert board.read(MMIO, last + 7, 4) == 0xFFFF_FFFF  # not whole inside


def test_interrupt_lines(board: Kernel) -> None:
    board.write(PIO, pf.PORT_TESTDEV_IRQ + 5, 1, 0x80)
    board.write(PIO, pf.PORT_TESTDEV_IRQ + 5, 1, 0)
    board.write(PIO, pf.PORT_TESTDEV_IRQ + 5, 2, 1)  # bytes only
    board.write(PIO, pf.PORT_TESTDEV_IRQ + 23, 1, 1)  # KVM has none such: ignored
    assert board.lines.set == [(5, 1), (5, 0)]


def test_flush_keeps_the_content(board: Kernel) -> None:
    board.memory.write(0x5000, b"kept")
    for address in (0x5123, 0xFFFF_F000):
        board.write(PIO, pf.PORT_TESTDEV_FLUSH, 4, address)
    assert board.memory.read(0x5000, 4) == b"kept"
    assert board.read(PIO, pf.PORT_TESTDEV_FLUSH, 4) == 0


def test_fw_cfg(board: Kernel) -> None:
    assert board.item(fc.SIGNATURE, 6) == b"QEMU\0\0"
    assert board.item(fc.ID, 4) == b"\3\0\0\0"
    assert board.item(fc.NB_CPUS, 2) == board.item(fc.MAX_CPUS, 2) == b"\3\0"
    assert board.item(fc.RAM_SIZE, 8) == struct.pack("<Q", board.memory.size)
    assert board.item(0x7777, 4) == bytes(4)
    count, size, key, _, name = struct.unpack(">IIHH56s", board.item(fc.FILE_DIR, 68))
    assert (count, name.rstrip(b"\0")) == (1, b"etc/e820")
    assert board.item(key, size) == struct.pack(lb.E820_ENTRY, 0, board.memory.size, lb.E820_RAM)


def test_fw_cfg_by_dma(board: Kernel) -> None:
    assert board.read(PIO, pf.PORT_FW_CFG_DMA, 4).to_bytes(4, "little") == b"QEMU"
    assert board.read(PIO, pf.PORT_FW_CFG_DMA + 4, 4).to_bytes(4, "little") == b" CFG"
    select, read, skip = fc.DMA_CTL_SELECT | fc.SIGNATURE << 16, fc.DMA_CTL_READ, fc.DMA_CTL_SKIP
    board.memory.write(0x3000, b"x" * 8)
    assert board.dma(select | read, 2, 0x3000) == 0
    assert board.dma(skip, 1, 0) == 0
    assert board.dma(read, 4, 0x3002) == 0  # what is beyond the end is zero
    assert board.memory.read(0x3000, 8) == b"QEU\0\0\0xx"
    assert board.dma(fc.DMA_CTL_WRITE, 2, 0x3000) == fc.DMA_CTL_ERROR
    assert board.dma(select | read, 4, 1 << 40) == fc.DMA_CTL_ERROR
    assert board.dma(select | read, 0xFFFF_FFFF, 0) == fc.DMA_CTL_ERROR
    # The structure itself outside RAM: nothing happens.
    board.write(PIO, pf.PORT_FW_CFG_DMA, 4, 0xFFFF_FFFF)
    board.write(PIO, pf.PORT_FW_CFG_DMA + 4, 4, 0)
    board.write(PIO, pf.PORT_FW_CFG_DMA, 2, 1)
