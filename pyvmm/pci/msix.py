"""MSI-X (PCI Local Bus 3.0, 6.8.2) over irqfds, or by an ioctl per interrupt.

A source is an eventfd that the transport lends. While a vector can deliver, its sources are wired:
an irqfd connects each of them to the vector's GSI. While the vector is masked, the irqfds are
removed, so that the eventfd itself keeps a pending interrupt. The pending bit is a poll of the
eventfd, and KVM delivers the interrupt when the irqfd is made again. All this works the same
whoever signals the eventfd. A source that is an ``Injection`` needs neither irqfd nor GSI: whoever
raises it sends the vector's message itself.
"""

from __future__ import annotations

import select

from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.kvm.inject import Injection
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
    """One entry of the MSI-X table and its sources.

    :ivar wired: the sources that deliver now: those that have an irqfd, or send messages.
    :ivar gsi: the GSI of the vector's message; -1 until the vector first delivers.
    """

    __slots__ = ("address", "control", "data", "gsi", "sources", "wired")

    def __init__(self) -> None:
        self.sources: list[EventFd] = []
        self.wired: list[EventFd] = []
        self.gsi = -1
        self.clear()

    def clear(self) -> None:
        """Set the state after reset, in which the vector is masked."""
        self.address = self.data = 0
        self.control = PCI_MSIX_ENTRY_CTRL_MASKBIT


class Msix:
    """The table, the pending bits and the wiring of one function.

    :param vm: lent.
    :param count: the number of vectors, 1 to 2048.
    :ivar flags: the enable and mask-all bits of message control.
    :ivar mastering: the function may write to memory, as each message does (6.8.2).
    :ivar errors: how often KVM refused to wire or unwire a source. Interrupts of a vector that
        could not be wired stay pending.
    """

    def __init__(self, vm: Vm, count: int) -> None:
        self._vm = vm
        self.vectors = [Vector() for _ in range(count)]
        self.flags = 0
        self.mastering = True
        self.errors = 0
        self.table = Table(self)
        self.pba = PendingBits(self)

    @staticmethod
    def capability(count: int, bar: int, table: int, pba: int) -> bytes:
        """The capability's body for ``PciFunction.add_capability``.

        :param count: the number of vectors.
        :param bar: the index of the BAR that holds table and pending bits.
        :param table: the offset of the table in that BAR, a multiple of 8.
        :param pba: the offset of the pending bits in that BAR, a multiple of 8.
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
        """Take over the guest's write to message control."""
        self.flags = flags & (PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL)
        for v in self.vectors:
            self.update(v)

    def set_mastering(self, on: bool) -> None:
        """Bus mastering is on or off. While it is off, interrupts stay pending."""
        if on != self.mastering:
            self.mastering = on
            for v in self.vectors:
                self.update(v)

    def attach(self, index: int, source: EventFd) -> bool:
        """Let ``source`` fire vector ``index``. ``source`` is lent until ``detach``.

        :returns: False if KVM refuses an interrupt that may be delivered now; then ``source`` is
            not attached.
        """
        v = self.vectors[index]
        v.sources.append(source)
        self.update(v)
        if self.masked(v) or source in v.wired:
            return True
        v.sources.remove(source)
        self.update(v)
        return False

    def detach(self, index: int, source: EventFd) -> None:
        """Take ``source`` from vector ``index``. A pending interrupt stays in the eventfd."""
        v = self.vectors[index]
        v.sources.remove(source)
        self.update(v)

    def masked(self, v: Vector) -> bool:
        """Whether ``v`` must not deliver now: it or the function is masked, MSI-X is off, or the
        function may not write to memory.
        """
        function = self.flags & (PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL)
        if function != PCI_MSIX_FLAGS_ENABLE or not self.mastering:
            return True
        return bool(v.control & PCI_MSIX_ENTRY_CTRL_MASKBIT)

    def update(self, v: Vector) -> None:
        """Wire or unwire the sources of ``v`` according to its state. If KVM refuses, unwire all
        of them and count an error.
        """
        want = [] if self.masked(v) else v.sources
        self._unwire(v, [s for s in v.wired if s not in want])
        if not want:
            return
        for source in want:
            if isinstance(source, Injection):
                source.to_message(v.address, v.data)
                if source not in v.wired:
                    v.wired.append(source)
        if all(isinstance(source, Injection) for source in want):
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
            # The guest can cause this error, so it must not end the machine. Interrupts must not go
            # to the old destination either.
            self.errors += 1
            self._unwire(v, list(v.wired))

    def _unwire(self, v: Vector, sources: list[EventFd]) -> None:
        for source in sources:
            v.wired.remove(source)
            if isinstance(source, Injection):
                source.hold()
                continue
            try:
                self._vm.irqfd(source, v.gsi, assign=False)
            except HostError:
                self.errors += 1

    def pending(self, v: Vector) -> bool:
        """The pending bit: whether a source was signalled and could not deliver."""
        poll = select.poll()  # select() would raise for descriptors from 1024 on
        for source in v.sources:
            if source not in v.wired:
                poll.register(source, select.POLLIN)
        return bool(poll.poll(0))

    def reset(self) -> None:
        """Disable MSI-X, mask all vectors and give their GSIs back."""
        self.flags = 0
        for v in self.vectors:
            v.clear()
            self.update(v)
            if v.gsi >= 0:
                self._vm.free_gsi(v.gsi)
                v.gsi = -1


def entry_name(offset: int, write: bool) -> str:
    """The name in the ledger of the table's register at ``offset``."""
    entry, at = divmod(offset, PCI_MSIX_ENTRY_SIZE)
    return f"entry {entry} {MSIX_ENTRY_NAMES[at // 4]}" + (f"+{at % 4}" if at % 4 else "")


class Table:
    """The registers of the MSI-X table."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def _entry(self, offset: int) -> tuple[Vector | None, int]:
        index, at = divmod(offset, PCI_MSIX_ENTRY_SIZE)
        vectors = self._msix.vectors
        return (vectors[index] if index < len(vectors) else None), at

    def read(self, offset: int, size: int) -> int:
        """Read 4 or 8 aligned bytes; any other access reads as zero."""
        v, at = self._entry(offset)
        if v is None or size not in (4, 8) or at % size:
            return 0
        whole = v.address | v.data << 64 | v.control << 96
        return whole >> 8 * at

    def write(self, offset: int, size: int, value: int) -> None:
        """Write 4 or 8 aligned bytes; any other access is ignored."""
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
    """The pending bit array: one bit per vector, read-only."""

    def __init__(self, msix: Msix) -> None:
        self._msix = msix

    def read(self, offset: int, size: int) -> int:
        """The pending bits of the ``8 * size`` vectors from ``8 * offset`` on."""
        bits = 0
        for i, v in enumerate(self._msix.vectors[8 * offset : 8 * (offset + size)]):
            bits |= self._msix.pending(v) << i
        return bits

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest cannot write pending bits."""
