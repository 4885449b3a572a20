"""Cables: frames go from one queue pair to another, or back to the same one, through the memory of
this process (cext/cable.h). The workers of the emulated data path are at their ends.
"""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError
from pyvmm.fd import EventFd, Fd, eventfds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Cable:
    """The memory of a cable, for as long as one of its ends is open.

    :param bells: of its ends, one for a loop; owned from here on.
    """

    def __init__(self, bells: list[EventFd]) -> None:
        self._bells, self._open = bells, len(bells)
        self.c = lib.pv_cable_new(bells[0].fileno(), bells[1].fileno() if bells[1:] else -1)
        if not self.c:
            self._close_bells()
            raise HostError("no memory for a cable between two queue pairs")

    def _close_bells(self) -> None:
        for bell in self._bells:
            bell.close()

    def let_go(self) -> None:
        """One end is closed. Until all are, a worker may still ring the bell of either."""
        self._open -= 1
        if not self._open:
            lib.pv_cable_free(self.c)
            self._close_bells()


class CableEnd(Fd):
    """One end of a cable, in the place of a tap's descriptor. One worker at a time uses it. The
    descriptor is the eventfd by which that worker is woken.

    :ivar c: ``struct pv_cable_end *``, valid until ``close``.
    """

    def __init__(self, cable: _Cable, bell: EventFd, end: int) -> None:
        super().__init__(bell.fileno())
        self._cable = cable
        self.c: Any = lib.pv_cable_end(cable.c, end)

    def send(self, frame: bytes) -> None:
        """Send a frame to the far end, if there is room. No worker uses this end now."""
        lib.pv_cable_send(self.c, ffi.from_buffer(frame), len(frame))

    def close(self) -> None:
        """Let go of the cable; no worker uses this end any more. A second call does nothing."""
        if not self.closed:
            self._fd = -1
            self._cable.let_go()


def cables(count: int, ends: int) -> list[list[CableEnd]]:
    """The ends of each of ``count`` cables: two, or one, to which every frame comes back.

    :raises HostError: no descriptors or memory; nothing is left behind.
    """
    made: list[list[CableEnd]] = []
    try:
        for _ in range(count):
            bells = eventfds(ends)
            cable = _Cable(bells)
            made.append([CableEnd(cable, bell, end) for end, bell in enumerate(bells)])
    except HostError:
        for both in made:
            for one in both:
                one.close()
        raise
    return made
