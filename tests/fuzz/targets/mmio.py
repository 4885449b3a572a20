"""The registers of a network card over MMIO: no guest can make it raise, and after a reset there is
a working card.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvmm.spec import platform as pf
from tests.fuzz.data import Data
from tests.pci_guest import frame
from tests.unit.test_virtio_mmio import AT, RING_RESET, VERSION_1, Rig, act

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES = sorted(AT.values())
ACTIONS = 40


def step(rig: Rig, d: Data) -> None:
    kind = d.of(("write", "write", "read", "status", "packet", "up", "refuse"))
    size = 1 << d.below(4)
    a: Any = d.of(PLACES) if not d.one_in(8) else d.below(pf.VIRTIO_MMIO_SIZE)
    if kind == "status":
        a = d.of((0, 1, 3, 11, 15, 15, 0x80, 0xFF))
    elif kind == "packet":
        a = 1 + d.below(2000)
    elif kind == "up":
        a = d.of((VERSION_1, VERSION_1 | RING_RESET))
    elif kind == "refuse":
        a = d.of(("", "ioeventfd"))
    if kind != "up" or (rig.net is None and not rig.board.vm.refuse):
        act(rig, (kind, a, size, d.value(size)))


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input, on a new card each time."""

    def one(data: bytes) -> None:
        d = Data(data)
        with Rig() as rig:
            for _ in range(ACTIONS):
                if not d.left:
                    break
                step(rig, d)
            rig.board.vm.refuse = set()
            rig.reset()
            assert not rig.board.vm.kicks and rig.get("InterruptStatus") == 0
            while True:
                try:
                    rig.cable.far.recv(1 << 17)
                except BlockingIOError:
                    break
            assert not rig.device.tracebacks, rig.device.tracebacks
            if rig.net is not None:
                rig.net.close()
            rig.up().send(frame(5))
            assert rig.cable.receive()[12:] == frame(5)

    return one
