"""The two I/O spaces of the machine: who answers at which port or address.

The table is in C (cext/bus.c), where the hot devices answer as well; what it hands to Python ends
up in ``Bus.dispatch``.
"""

from __future__ import annotations

import errno
import os

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    class Handler(Protocol):
        """A device's registers as the bus sees them: values are little-endian integers of ``size``
        bytes.
        """

        def read(self, offset: int, size: int) -> int:
            """The value at ``offset`` from the region's base."""

        def write(self, offset: int, size: int, value: int) -> None:
            """Store ``value`` at ``offset``."""

    #: (which register, see pv_bus_register in cext/bus.h; written?) -> its name, empty where it has
    #: none.
    Names = Callable[[int, bool], str]

PIO = lib.PV_PIO
MMIO = lib.PV_MMIO
#: In the number of a register of the PCI data port (cext/bus.h).
PCI_DATA = lib.PV_REG_PCI


class Registers:
    """Names of a region's registers, for the ledger: offset to name, or to the names for reading
    and for writing.

    An access in the middle of a register has its name with ``+N``.
    """

    __slots__ = ("_names", "_starts")

    def __init__(self, names: Mapping[int, str | tuple[str, str]]) -> None:
        self._names = names
        self._starts = sorted(names)

    def __call__(self, reg: int, write: bool) -> str:
        """The name of the register at offset ``reg``."""
        start = max((at for at in self._starts if at <= reg), default=-1)
        if start < 0:
            return ""
        name = self._names[start]
        text = name if isinstance(name, str) else name[write]
        return f"{text}+{reg - start}" if reg > start and text else text


class Region:
    """A run of ports or addresses that belongs to one device; on the bus while ``base`` is not
    None.

    :ivar names: of its registers; set by who makes it. :ivar prefix: what goes before them in a
        full name.
    :ivar role: which register -> ``notify`` or ``control``, for registers that are kicks.
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
        """The name of a register by its number in the ledger; empty where it has none."""
        return self.names(reg, write) if self.names is not None else ""

    def map(self, base: int) -> bool:
        """Put it at ``base``, away from where it was; False (and unmapped) where something else is
        in the way.
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
        """Take it off the bus; its id and name stay known to the ledger."""
        if self.base is not None:
            lib.pv_bus_remove(self.bus.c, self.space, self.base, self.id)
            self.base = None


class Nobody:
    """A place without a device: reads as all ones."""

    def read(self, offset: int, size: int) -> int:
        """All ones."""
        return -1

    def write(self, offset: int, size: int, value: int) -> None:
        """Lost."""


NOBODY = Nobody()


class Bus:
    """Both I/O spaces of one machine; owns the table in C."""

    def __init__(self) -> None:
        self.c = lib.pv_bus_new()
        if self.c == ffi.NULL:
            raise MemoryError
        self._regions: dict[int, Region] = {}

    def close(self) -> None:
        """Free the table; no vCPU runs any more. A second call does nothing."""
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
        """Make a region of ``length`` bytes, not yet mapped.

        :param handler: answers in Python; or else ``kind`` and ``opaque`` name what answers in C
            (lent).
        """
        r = Region(self, len(self._regions) + 1, space, length, name, handler, kind, opaque)
        self._regions[r.id] = r
        return r

    def add(
        self,
        space: int,
        base: int,
        length: int,
        name: str,
        handler: Handler | None = None,
        **c: Any,
    ) -> Region:
        """``region`` and ``map`` at a fixed place. Raises HostError where something is there
        already.
        """
        r = self.region(space, length, name, handler, **c)
        if not r.map(base):
            raise HostError(f"bus: {name} at {base:#x} overlaps another device")
        return r

    def name(self, region_id: int) -> str:
        """What the ledger calls a region; empty for nobody's."""
        r = self._regions.get(region_id)
        return r.name if r else ""

    def describe(self, region_id: int, reg: int, write: bool) -> tuple[str, str, str]:
        """What the ledger calls an access: device, register (or empty) and both together, ``net0
        queue 1 notify``.
        """
        r = self._regions.get(region_id)
        if r is None:
            return "", "", ""
        register = r.register(reg, write)
        return r.name, register, f"{r.prefix} {register}" if register else r.name

    def role(self, region_id: int, reg: int) -> str:
        """What an access is for: ``notify`` or ``control`` for the kick of a queue, else
        nothing.
        """
        r = self._regions.get(region_id)
        return r.role(reg) if r is not None and r.role is not None else ""

    def region_names(self) -> set[tuple[str, str]]:
        """Name and prefix of every region there is."""
        return {(r.name, r.prefix) for r in self._regions.values()}

    def dispatch(self, c: Any) -> None:
        """Answer the access described in ``struct pv_vcpu`` ``c`` (after PV_STOP_PIO or
        PV_STOP_MMIO).
        """
        r = self._regions[c.region]
        offset, size, data = c.addr - (r.base or 0), c.size, c.data
        handler = r.handler
        if handler is None or r.base is None or not 0 <= offset <= r.length - size:
            handler = NOBODY  # another vCPU has moved the region since the table was asked
        for i in range(0, size * c.count, size):
            if c.write:
                handler.write(offset, size, int.from_bytes(ffi.buffer(data + i, size), "little"))
            else:
                value = handler.read(offset, size) & ((1 << 8 * size) - 1)
                ffi.memmove(data + i, value.to_bytes(size, "little"), size)
