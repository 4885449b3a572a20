"""The ISR status of a virtio device and the interrupt line that shows it (cext/intx.h)."""

from __future__ import annotations

from pyvmm._ext import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.fd import EventFd


class Isr:
    """The register and its line, which is driven by a thread in C while ``drive`` says so.

    :param name: of the thread.
    :ivar c: ``struct pv_intx *``, lent to the bus. :ivar errors: how often there could be no more
        threads or descriptors.
    """

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        made = lib.pv_intx_new()
        if made == ffi.NULL:
            raise MemoryError
        self.c: Any = ffi.gc(made, lib.pv_intx_free)
        self._line: Any = None
        self._driven = False
        self.errors = 0

    def wire(self, line: Any) -> None:
        """Connect with an input of the interrupt controller (``Vm.shared_line``), which is lent."""
        self._line = line
        lib.pv_intx_wire(self.c, line)

    def drive(self, want: bool, events: Sequence[tuple[EventFd, int]]) -> None:
        """Have the thread turn eventfds into bits of the register, or end it.

        :param events: an eventfd, which is lent, and the bit that it sets.
        """
        if want == self._driven:
            return
        if not want:
            lib.pv_intx_stop(self.c)
            self._driven = False
            return
        fds = [event.fileno() for event, _ in events]
        bits = [bit for _, bit in events]
        if lib.pv_intx_start(self.c, self._name, fds, bits, len(events)):
            self.errors += 1
        else:
            self._driven = True

    def set(self, bits: int) -> None:
        """Set bits, which raises the line. Any thread."""
        lib.pv_intx_raise(self.c, bits)

    def peek(self) -> int:
        """The bits."""
        return int(lib.pv_intx_peek(self.c))

    def take(self) -> int:
        """The bits, which are cleared."""
        return int(lib.pv_intx_read(self.c))

    def hide(self, hidden: bool) -> None:
        """Keep the line low whatever the bits are, or no longer."""
        lib.pv_intx_disable(self.c, hidden)

    def reset(self) -> None:
        """Clear all bits, which lowers the line."""
        lib.pv_intx_reset(self.c)
