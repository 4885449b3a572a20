"""PCI hot plug: tells the guest which functions have come and are to go, and hears of those that it
has let go (ACPI PCI hot plug, see boot.acpi).

Theory of operation. A function that the machine has plugged in sets its slot's bit in UP, one that
is to go sets the bit in DOWN; either raises event GPE_PCI_HOTPLUG, whose method in the DSDT reads
both registers and notifies the slots' devices. A guest that does not look loses nothing: the bits
and the event stay. The guest takes its driver off, and writes the slot's bit to EJECT. Only then,
or at a machine reset, may the machine take the function away. A bit in EJECT counts only while the
same bit is set in DOWN, so that a guest ejects nothing that nobody asked for.

The machine's I/O lock is held in every method.
"""

from __future__ import annotations

from pyvmm.bus import PIO, Bus, Registers
from pyvmm.spec.platform import (
    PCI_HOTPLUG_DOWN,
    PCI_HOTPLUG_EJECT,
    PCI_HOTPLUG_SIZE,
    PCI_HOTPLUG_UP,
    PORT_PCI_HOTPLUG,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class PciHotplug:
    """The registers at PORT_PCI_HOTPLUG.

    :param event: raises the event of PCI hot plug.
    :param ejected: is told of a slot whose function the guest, or a reset, has let go. The function
        is to be unplugged at once.
    """

    def __init__(
        self, bus: Bus, event: Callable[[], object], ejected: Callable[[int], object]
    ) -> None:
        self._event, self._ejected = event, ejected
        self._up = self._down = 0
        region = bus.add(PIO, PORT_PCI_HOTPLUG, PCI_HOTPLUG_SIZE, "pci-hotplug", self)
        region.names = Registers(
            {PCI_HOTPLUG_UP: "up", PCI_HOTPLUG_DOWN: "down", PCI_HOTPLUG_EJECT: "eject"}
        )

    def added(self, slot: int) -> None:
        """A function has been plugged into ``slot``."""
        self._up |= 1 << slot
        self._event()

    def seen(self, slot: int) -> bool:
        """Whether the guest has read of the function in ``slot``, or has had it from the start."""
        return not self._up >> slot & 1

    def ask(self, slot: int) -> None:
        """Ask the guest, for the first time or again, to let go of the function in ``slot``."""
        self._down |= 1 << slot
        self._event()

    def asked(self, slot: int) -> bool:
        """Whether the function in ``slot`` is to go."""
        return bool(self._down >> slot & 1)

    def reset(self) -> None:
        """The machine starts over: functions that are to go are gone, the others are known to the
        guest from the start.
        """
        self._eject(self._down)
        self._up = 0

    def _eject(self, slots: int) -> None:
        gone = slots & self._down
        self._down &= ~gone
        self._up &= ~gone
        for slot in range(32):
            if gone >> slot & 1:
                self._ejected(slot)

    def read(self, offset: int, size: int) -> int:
        """UP or DOWN; a read of all of UP clears it. EJECT reads as zero."""
        value = self._up | self._down << 8 * PCI_HOTPLUG_DOWN
        if offset == PCI_HOTPLUG_UP and size == 4:
            self._up = 0
        return value >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Only a write to all of EJECT does anything."""
        if offset == PCI_HOTPLUG_EJECT and size == 4:
            self._eject(value)
