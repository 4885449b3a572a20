"""The loaders of kernels: whatever a file says, it is refused before anything is written, or all
that is loaded lies in RAM and in its rooms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvmm import boot
from pyvmm.memory import GuestMemory
from tests.fuzz.data import Data
from tests.fuzz.test_boot_fuzz import MIB, check
from tests.unit.test_boot import good_elf, make_bzimage
from tests.unit.test_multiboot import good_elf32, good_flat

if TYPE_CHECKING:
    from collections.abc import Callable

INITRDS = (0, 0, 1, 4096, 20 * MIB, 33 * MIB)


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input: changes to a good kernel, or the bytes as they are."""
    memory = GuestMemory(32 * MIB)
    kernels = [bytes(make()) for make in (good_elf, make_bzimage, good_elf32, good_flat)]

    def one(data: bytes) -> None:
        d = Data(data)
        which = d.below(5)
        protocol, initrd = d.of(boot.PROTOCOLS), d.of(INITRDS)
        line = "a" * (d.below(20) if not d.one_in(8) else 2000 + d.below(3000))
        if which == 4:
            image = d.rest()
        else:
            changed = bytearray(kernels[which])
            while d.left:
                size = d.of((1, 2, 4, 8))
                at = d.number(2) % min(0x400, len(changed))
                changed[at : at + size] = d.value(size).to_bytes(size, "little")
                if d.one_in(32):
                    del changed[d.number(2) :]
                    if not changed:
                        break
            image = bytes(changed)
        check(memory, image, initrd, line, protocol)

    return one
