"""QEMU's firmware configuration device: any access, and DMA with any structure in guest memory."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pyvmm.bus import PIO
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.spec import fw_cfg as spec
from pyvmm.spec import platform as pf
from tests.fuzz.data import Data
from tests.pci_guest import Board

if TYPE_CHECKING:
    from collections.abc import Callable

STRUCTURE = 0x1000


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""
    board = Board(memory=1 << 20)
    FwCfg(board.bus, board.memory, 2, {"opt/a": b"abc", "opt/long": bytes(5000)})

    def one(data: bytes) -> None:
        d = Data(data)
        while d.left:
            size = d.of((1, 2, 4))
            kind = d.below(4)
            if kind == 0:
                board.write(PIO, pf.PORT_FW_CFG + d.below(2), size, d.value(size))
            elif kind == 1:
                board.read(PIO, pf.PORT_FW_CFG + d.below(2), size)
            elif kind == 2:
                board.write(PIO, pf.PORT_FW_CFG_DMA + d.below(8), size, d.value(size))
            else:
                control = d.number(1) | d.value(2) << 16
                address = d.value(8) if d.one_in(4) else d.below(1 << 20)
                access = struct.pack(spec.DMA_ACCESS, control, d.value(4), address)
                at = STRUCTURE if not d.one_in(4) else d.value(8)
                try:
                    board.memory.write(at, access)
                except IndexError:
                    pass
                for half, offset in ((at >> 32, 0), (at & 0xFFFFFFFF, 4)):
                    swapped = int.from_bytes(half.to_bytes(4, "big"), "little")
                    board.write(PIO, pf.PORT_FW_CFG_DMA + offset, 4, swapped)

    return one
