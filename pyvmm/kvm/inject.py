"""The interrupt of a virtqueue, raised by an ioctl of whoever moves the packets (cext/inject.h)."""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.fd import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.vm import Vm


class Injection(EventFd):
    """An interrupt in the place of a call eventfd, which keeps the interrupt while it goes nowhere.
    Each ``nudge`` raises the interrupt.

    :param vm: lent.
    :raises HostError: the process has no free descriptor.
    """

    def __init__(self, vm: Vm) -> None:
        super().__init__()
        made = lib.pv_inject_new(vm.c_fd, self.fileno())
        if made == ffi.NULL:
            self.close()
            raise MemoryError
        self.inject: Any = ffi.gc(made, lib.pv_inject_free)

    def nudge(self) -> None:
        """Raise the interrupt. Any thread.

        :raises ValueError: it has been closed.
        """
        self.fileno()
        lib.pv_inject(self.inject)

    def to_message(self, address: int, data: int) -> None:
        """Let the interrupt go to a message, at once if one has been kept."""
        lib.pv_inject_message(self.inject, address, data)

    def to_line(self, isr: Any, bits: int) -> None:
        """Let the interrupt go to the card's line, at once if one has been kept.

        :param isr: ``struct pv_intx *``, lent until ``hold``. :param bits: of the ISR status.
        """
        lib.pv_inject_line(self.inject, isr, bits)

    def hold(self) -> None:
        """Keep interrupts; nothing goes to the message or the line any more."""
        lib.pv_inject_hold(self.inject)

    @property
    def raised(self) -> int:
        """How many interrupts have gone to a message or a line."""
        return int(lib.pv_inject_count(self.inject))
