"""The machine's two I/O spaces: which device answers at which port or memory address.

The table of regions is in C (cext/bus.c). Devices that are accessed often answer in C as well; C
hands every other access to Python, to ``Bus.dispatch``.
"""

from __future__ import annotations

import errno
import os
import threading

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    class Handler(Protocol):
        """A device's registers as the bus sees them. Values are integers of ``size`` bytes; the
        bus converts from and to the guest's byte order.
        """

        def read(self, offset: int, size: int) -> int:
            """The value at ``offset`` from the region's base; higher bits are ignored."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Store ``value`` at ``offset`` from the region's base."""

    #: (the register's number as pv_bus_register in cext/bus.h makes it, whether it is written) ->
    #: the register's name, empty if it has none.
    Names = Callable[[int, bool], str]

PIO = lib.PV_PIO
MMIO = lib.PV_MMIO
#: The flag in the number of a register that is reached through the PCI data port (cext/bus.h).
PCI_DATA = lib.PV_REG_PCI


class Registers:
    """The names of a region's registers, for the exit ledger. Each offset maps to a name, or to two
    names: the register as it is read and as it is written.

    An access N bytes behind the beginning of a register gets the register's name with ``+N``.
    """

    __slots__ = ("_names", "_starts")

    def __init__(self, names: Mapping[int, str | tuple[str, str]]) -> None:
        self._names = names
        self._starts = sorted(names)

    def __call__(self, reg: int, write: bool) -> str:
        """The name of the register at offset ``reg``; empty if it has none."""
        start = max((at for at in self._starts if at <= reg), default=-1)
        if start < 0:
            return ""
        name = self._names[start]
        text = name if isinstance(name, str) else name[write]
        return f"{text}+{reg - start}" if reg > start and text else text


class Region:
    """A range of ports or addresses that belongs to one device. It is mapped while ``base`` is not
    None.

    :ivar names: the names of the region's registers; whoever makes the region sets them.
    :ivar prefix: the text that precedes a register's name in its full name.
    :ivar role: tells whether a register is a kick: maps its number to ``notify`` (a data queue's),
        ``control`` (the control queue's) or an empty string.
    """

    __slots__ = (
        "base",
        "bus",
        "handler",
        "id",
        "kind",
        "length",
        "name",
        "names",
        "opaque",
        "prefix",
        "role",
        "space",
    )

    def __init__(
        self,
        bus: Bus,
        region_id: int,
        space: int,
        length: int,
        name: str,
        handler: Handler | None,
        kind: int,
        opaque: Any,
    ) -> None:
        self.bus, self.id, self.space, self.length, self.name = bus, region_id, space, length, name
        self.handler, self.kind, self.opaque = handler, kind, opaque
        self.base: int | None = None
        self.names: Names | None = None
        self.prefix = name
        self.role: Callable[[int], str] | None = None

    def register(self, reg: int, write: bool) -> str:
        """The name of a register by its number in the ledger; empty if it has none."""
        return self.names(reg, write) if self.names is not None else ""

    def map(self, base: int) -> bool:
        """Move the region to ``base``.

        :returns: whether that succeeded. If another region is in the way, the region is left
            unmapped.
        :raises HostError: the table in C is full, or ``base`` plus ``length`` overflows.
        """
        self.unmap()
        error = lib.pv_bus_add(
            self.bus.c, self.space, base, self.length, self.id, self.kind, self.opaque
        )
        if not error:
            self.base = base
        elif error != -errno.EEXIST:
            raise HostError(f"bus: {os.strerror(-error)}")
        return not error

    def unmap(self) -> None:
        """Take the region off the bus. The ledger still knows its id and name."""
        if self.base is not None:
            lib.pv_bus_remove(self.bus.c, self.space, self.base, self.id)
            self.base = None


class Nobody:
    """The handler for addresses without a device, as on a PC's bus."""

    def read(self, offset: int, size: int) -> int:
        """All bits are ones."""
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        """The value is lost."""


NOBODY = Nobody()


class Bus:
    """Both I/O spaces of one machine. The object owns the table in C."""

    def __init__(self) -> None:
        self.c = lib.pv_bus_new()
        if self.c == ffi.NULL:
            raise MemoryError
        self._regions: dict[int, Region] = {}
        self._held: threading.Event | None = None
        # (space, name) -> the ids of regions, in the order in which they were retired
        self._retired: dict[tuple[int, str], list[int]] = {}

    def close(self) -> None:
        """Free the table once no vCPU runs any more. A second call does nothing."""
        if self.c != ffi.NULL:
            lib.pv_bus_free(self.c)
            self.c = ffi.NULL

    def region(
        self,
        space: int,
        length: int,
        name: str,
        handler: Handler | None = None,
        *,
        kind: int = lib.PV_REGION_PYTHON,
        opaque: Any = ffi.NULL,
    ) -> Region:
        """Make a region of ``length`` bytes that is not mapped yet.

        :param space: PIO or MMIO.
        :param handler: the device that answers in Python, if ``kind`` is PV_REGION_PYTHON.
        :param kind: PV_REGION_*: which C code answers (cext/bus.h).
        :param opaque: the C object that this code needs; lent until the bus is closed, or until
            ``unmap`` for the kinds that ``pv_bus_find`` pins.
        """
        retired = self._retired.get((space, name))
        number = retired.pop(0) if retired else len(self._regions) + 1
        r = Region(self, number, space, length, name, handler, kind, opaque)
        self._regions[r.id] = r
        return r

    def retire(self, region: Region) -> None:
        """Unmap ``region`` for good. The ledger still knows its id and its names, until a region
        with the same name takes the id over: of several, the first one that was retired.
        """
        region.unmap()
        self._retired.setdefault((region.space, region.name), []).append(region.id)

    def add(
        self,
        space: int,
        base: int,
        length: int,
        name: str,
        handler: Handler | None = None,
        **c: Any,
    ) -> Region:
        """Make a region and map it at ``base``. The other parameters are those of ``region``.

        :raises HostError: another region is there already.
        """
        r = self.region(space, length, name, handler, **c)
        if not r.map(base):
            raise HostError(f"bus: {name} at {base:#x} overlaps another device")
        return r

    def name(self, region_id: int) -> str:
        """The name of a region in the ledger; empty if no region has this id."""
        r = self._regions.get(region_id)
        return r.name if r else ""

    def describe(self, region_id: int, reg: int, write: bool) -> tuple[str, str, str]:
        """The names of an access in the ledger.

        :returns: the device, the register (may be empty) and the full name, such as
            ``net0 queue 1 notify``; three empty strings if no region has this id.
        """
        r = self._regions.get(region_id)
        if r is None:
            return "", "", ""
        register = r.register(reg, write)
        return r.name, register, f"{r.prefix} {register}" if register else r.name

    def role(self, region_id: int, reg: int) -> str:
        """``notify`` or ``control`` if a write to the register kicks a data queue or the control
        queue, else an empty string.
        """
        r = self._regions.get(region_id)
        return r.role(reg) if r is not None and r.role is not None else ""

    def region_names(self) -> set[tuple[str, str]]:
        """The name and the prefix of each region."""
        return {(r.name, r.prefix) for r in list(self._regions.values())}

    def hold(self, until: threading.Event) -> None:
        """For a handler that answers an access: the vCPU is not to enter the guest before
        ``until``.
        """
        self._held = until

    def dispatch(self, c: Any) -> threading.Event | None:
        """Answer the access that ``c`` (``struct pv_vcpu *``) describes after PV_STOP_PIO or
        PV_STOP_MMIO.

        :returns: what the vCPU has to wait for before it enters the guest; usually None.
        """
        self._held = None
        r = self._regions[c.region]
        offset, size, data = c.addr - (r.base or 0), c.size, c.data
        handler = r.handler
        if handler is None or r.base is None or not 0 <= offset <= r.length - size:
            handler = NOBODY  # another vCPU has moved the region since C looked it up
        for i in range(0, size * c.count, size):
            if c.write:
                handler.write(offset, size, int.from_bytes(ffi.buffer(data + i, size), "little"))
            else:
                value = handler.read(offset, size) & ((1 << 8 * size) - 1)
                ffi.memmove(data + i, value.to_bytes(size, "little"), size)
        return self._held
