"""MSI-X (PCI Local Bus 3.0, 6.8.2) over irqfds.

A source is an eventfd, lent by the transport. It is wired (irqfd) to its vector's GSI while the
vector can deliver. A vector that is masked has its irqfds taken away, so that the eventfd itself
keeps what is pending: KVM fires it when the irqfd comes back, and the pending bit is a poll of the
eventfd. This works the same whoever signals the eventfd.
"""

from __future__ import annotations

import select

from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.spec.pci import (
    MSIX_ENTRY_NAMES,
    PCI_CAP_MSIX_SIZEOF,
    PCI_MSIX_ENTRY_CTRL_MASKBIT,
    PCI_MSIX_ENTRY_SIZE,
    PCI_MSIX_FLAGS_ENABLE,
    PCI_MSIX_FLAGS_MASKALL,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm


class Vector:
    """One MSI-X table entry and the sources behind it."""

    __slots__ = ("address", "control", "data", "gsi", "sources", "wired")

    def __init__(self) -> None:
        self.sources: list[EventFd] = []
        self.wired: list[EventFd] = []
        self.gsi = -1
        self.clear()

    def clear(self) -> None:
        """The state after reset: masked."""
        self.address = self.data = 0
        self.control = PCI_MSIX_ENTRY_CTRL_MASKBIT


class Msix:
    """The table, the pending bits and the wiring of one function.

    :param vm: lent. :param count: vectors, 1 to 2048.
    :ivar errors: times that KVM refused to wire a vector; its interrupts stay pending.
    """

    def __init__(self, vm: Vm, count: int) -> None:
        self._vm = vm
        self.vectors = [Vector() for _ in range(count)]
        self.flags = 0
        self.errors = 0
        self.table = Table(self)
        self.pba = PendingBits(self)

    @staticmethod
    def capability(count: int, bar: int, table: int, pba: int) -> bytes:
        """The capability's body for ``add_capability``: message control, table and PBA offsets in
        ``bar``.
        """
        body = (count - 1).to_bytes(2, "little") + (table | bar).to_bytes(4, "little")
        body += (pba | bar).to_bytes(4, "little")
        assert len(body) == PCI_CAP_MSIX_SIZEOF - 2
        return body

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched the function to MSI-X."""
        return bool(self.flags & PCI_MSIX_FLAGS_ENABLE)

    def set_flags(self, flags: int) -> None:
        """Message control has been written."""
        self.flags = flags & (PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL)
        for v in self.vectors:
            self.update(v)

    def attach(self, index: int, source: EventFd) -> None:
        """Let ``source`` fire vector ``index``."""
        v = self.vectors[index]
        v.sources.append(source)
        self.update(v)

    def detach(self, index: int, source: EventFd) -> None:
        """Take ``source`` from vector ``index``; what it has pending stays in the eventfd."""
        v = self.vectors[index]
        v.sources.remove(source)
        self.update(v)

    def masked(self, v: Vector) -> bool:
        """Whether ``v`` may not deliver now."""
        return self.flags & (
            PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL
        ) != PCI_MSIX_FLAGS_ENABLE or bool(v.control & PCI_MSIX_ENTRY_CTRL_MASKBIT)

    def update(self, v: Vector) -> None:
        """Make the wiring of ``v`` what its state asks for, as far as KVM agrees."""
        want = [] if self.masked(v) else v.sources
        self._unwire(v, [s for s in v.wired if s not in want])
        if not want:
            return
        try:
            if v.gsi < 0:
                v.gsi = self._vm.alloc_gsi()
            self._vm.set_msi_route(v.gsi, v.address, v.data)
            for source in want:
                if source not in v.wired:
                    self._vm.irqfd(source, v.gsi)
                    v.wired.append(source)
        except HostError:
            # The guest asked for it, so it may not end the machine; nor may interrupts go where
            # they went before.
            self.errors += 1
            self._unwire(v, list(v.wired))

    def _unwire(self, v: Vector, sources: list[EventFd]) -> None:
        for source in sources:
            v.wired.remove(source)
            try:
                self._vm.irqfd(source, v.gsi, assign=False)
            except HostError:
                self.errors += 1

    def pending(self, v: Vector) -> bool:
        """The pending bit: something was signalled that could not be delivered."""
        poll = select.poll()  # not select(): that raises for descriptors from 1024 on
        for source in v.sources:
            if source not in v.wired:
                poll.register(source, select.POLLIN)
        return bool(poll.poll(0))

    def reset(self) -> None:
        """All masked, disabled, and the GSIs given back."""
        self.flags = 0
        for v in self.vectors:
            v.clear()
            self.update(v)
            if v.gsi >= 0:
                self._vm.free_gsi(v.gsi)
                v.gsi = -1


def entry_name(offset: int, write: bool) -> str:
    """What the ledger calls a register of the table."""
    entry, at = divmod(offset, PCI_MSIX_ENTRY_SIZE)
    return f"entry {entry} {MSIX_ENTRY_NAMES[at // 4]}" + (f"+{at % 4}" if at % 4 else "")


class Table:
    """The MSI-X table's registers."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def _entry(self, offset: int) -> tuple[Vector | None, int]:
        index, at = divmod(offset, PCI_MSIX_ENTRY_SIZE)
        vectors = self._msix.vectors
        return (vectors[index] if index < len(vectors) else None), at

    def read(self, offset: int, size: int) -> int:
        """4 or 8 bytes, aligned; anything else reads as zero."""
        v, at = self._entry(offset)
        if v is None or size not in (4, 8) or at % size:
            return 0
        whole = v.address | v.data << 64 | v.control << 96
        return whole >> 8 * at

    def write(self, offset: int, size: int, value: int) -> None:
        """4 or 8 bytes, aligned; anything else is ignored."""
        v, at = self._entry(offset)
        if v is None or size not in (4, 8) or at % size:
            return
        mask = ((1 << 8 * size) - 1) << 8 * at
        whole = ((v.address | v.data << 64 | v.control << 96) & ~mask) | value << 8 * at
        v.address = whole & 0xFFFFFFFFFFFFFFFC
        v.data = whole >> 64 & 0xFFFFFFFF
        v.control = whole >> 96 & PCI_MSIX_ENTRY_CTRL_MASKBIT
        self._msix.update(v)


class PendingBits:
    """The pending bit array: read only, 64 vectors a quadword."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        """The pending bits of the vectors from 8 * offset on."""
        bits = 0
        for i, v in enumerate(self._msix.vectors[8 * offset : 8 * (offset + size)]):
            bits |= self._msix.pending(v) << i
        return bits

    def write(self, offset: int, size: int, value: int) -> None:
        """Read only."""
