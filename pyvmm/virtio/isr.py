"""The ISR status of a virtio device and the interrupt line that shows it (cext/intx.h)."""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.kvm.inject import Injection
from pyvmm.threads import aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.fd import EventFd
    from pyvmm.kvm.vm import Vm
    from pyvmm.virtio.device import VirtioDevice


def inject_calls(vm: Vm, device: VirtioDevice) -> None:
    """Have the interrupts of a device's virtqueues raised by ioctls instead of eventfds, which
    nobody uses yet.

    :param vm: lent.
    """
    for q in device.queues:
        q.call.close()
        q.call = Injection(vm)


class Isr:
    """The register and its line, which is driven by a thread in C while ``drive`` says so, or by
    whoever raises an ``Injection``.

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
        self._direct: list[Injection] = []  # those that drive the line themselves
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
            for direct in self._direct:
                direct.hold()
            self._direct = []
            self._driven = False
            return
        told = [(event, bit) for event, bit in events if not isinstance(event, Injection)]
        fds = [event.fileno() for event, _ in told]
        bits = [bit for _, bit in told]
        if told and aside(lambda: lib.pv_intx_start(self.c, self._name, fds, bits, len(told))):
            self.errors += 1
            return
        self._driven = True
        for event, bit in events:
            if isinstance(event, Injection):
                event.to_line(self.c, bit)
                self._direct.append(event)

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
