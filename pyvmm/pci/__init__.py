"""PCI: configuration space, BARs that the guest may move, and the bus that finds functions.

The source is the PCI Local Bus Specification 3.0, chapter 6. There is one bus (0), and each device
has function 0 only.
"""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.bus import MMIO, PIO, Bus, Region, Registers
from pyvmm.errors import UsageError
from pyvmm.spec.pci import (
    AF_NAMES,
    HEADER_NAMES,
    PCI_AF_CAP_TP_FLR,
    PCI_AF_CTRL,
    PCI_AF_CTRL_FLR,
    PCI_BASE_ADDRESS_0,
    PCI_BASE_ADDRESS_SPACE_IO,
    PCI_CAP_AF_SIZEOF,
    PCI_CAP_ID_AF,
    PCI_CAP_ID_PM,
    PCI_CAPABILITY_LIST,
    PCI_CLASS_PROG,
    PCI_COMMAND,
    PCI_COMMAND_INTX_DISABLE,
    PCI_COMMAND_IO,
    PCI_COMMAND_MASTER,
    PCI_COMMAND_MEMORY,
    PCI_D0,
    PCI_D3HOT,
    PCI_INTERRUPT_LINE,
    PCI_INTERRUPT_PIN,
    PCI_PM_CTRL,
    PCI_PM_CTRL_NO_SOFT_RESET,
    PCI_PM_CTRL_STATE_MASK,
    PCI_STATUS,
    PCI_STATUS_CAP_LIST,
    PCI_SUBSYSTEM_VENDOR_ID,
    PM_NAMES,
)
from pyvmm.spec.platform import (
    GSI_PCI_BASE,
    GSI_PCI_COUNT,
    PCI_ECAM_BASE,
    PCI_ECAM_SIZE,
    PCI_MMIO_BASE,
    PCI_MMIO_SIZE,
    PIC_PCI_LINES,
    PORT_PCI_ADDRESS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIG_SIZE = 256
SLOTS = 32  # the host bridge, and 31 devices that may come and go
RST_CPU = 4  # bit 2 of port 0xCF9: reset now
PCI_IO_BASE = 0xC000  # we place BARs in I/O space from here on
BAR_IO_MIN = 0x1000  # the guest may move them down to here; below are the board's own ports


class Bar:
    """One base address register and the bus regions behind it.

    :param size: bytes, a power of two.
    :param io: whether the BAR is in I/O space and not in memory space.
    :ivar base: the address at which the BAR decodes; None if it does not decode.
    :ivar parts: pairs of an offset in the BAR and a region; all are mapped and unmapped together.
    :ivar on_move: called after the regions have moved, with the new base or None.
    :ivar start: the BAR's address after reset.
    """

    __slots__ = ("base", "io", "on_move", "parts", "size", "start")

    def __init__(self, size: int, *, io: bool = False) -> None:
        self.size = size
        self.io = io
        self.parts: list[tuple[int, Region]] = []
        self.on_move: Callable[[int | None], None] | None = None
        self.base: int | None = None
        self.start = 0

    def move(self, base: int | None) -> None:
        """Decode at ``base``, or not at all if it is None."""
        if base == self.base:
            return
        for _, region in self.parts:
            region.unmap()
        self.base = base
        if base is not None and not all(region.map(base + offset) for offset, region in self.parts):
            # The guest moved the BAR on top of another device, which a BAR must not hide.
            for _, region in self.parts:
                region.unmap()
            self.base = None
        if self.on_move:
            self.on_move(self.base)


class PciFunction:
    """Function 0 of a device: its type 00h header, capabilities and BARs.

    Subclasses override ``config_written`` for registers whose writes have side effects, and
    ``config_read`` for the registers in ``live``.

    :param class_code: base class, sub-class and programming interface, 24 bits.
    :param subsystem: the subsystem id; the subsystem vendor id equals ``vendor``.
    :param pin: the interrupt pin, 1 for INTA or 0 for none.
    :param revision: the revision id.
    :ivar config: the configuration space. C answers reads from these bytes.
    :ivar live: offsets of doublewords whose value is more than the bytes in ``config``, so that
        Python answers reads of them.
    :ivar slot: the device number on bus 0; -1 until ``PciBus.add``.
    """

    def __init__(
        self,
        name: str,
        vendor: int,
        device: int,
        class_code: int,
        *,
        subsystem: int = 0,
        pin: int = 0,
        revision: int = 1,
    ) -> None:
        self.name = name
        self.config = memoryview(bytearray(CONFIG_SIZE))
        self._writable = bytearray(CONFIG_SIZE)
        self.bars: dict[int, Bar] = {}
        self.slot = -1
        self.live: set[int] = set()
        self._cap_end = 0x40
        self._names: dict[int, str | tuple[str, str]] = {**HEADER_NAMES, 0x40: ""}
        self._cap_link = PCI_CAPABILITY_LIST
        self.put(0, vendor | device << 16, 4)
        self.put(PCI_CLASS_PROG - 1, class_code << 8 | revision, 4)
        self.put(PCI_SUBSYSTEM_VENDOR_ID, vendor | subsystem << 16, 4)
        self.put(PCI_INTERRUPT_PIN, pin, 1)
        self.allow(PCI_COMMAND, COMMAND_BITS, 2)
        self.allow(PCI_INTERRUPT_LINE, 0xFF, 1)
        self._initial = b""
        self._pm_cap = self._af_cap = 0  # none
        self._power = PCI_D0

    def put(self, at: int, value: int, size: int) -> None:
        """Set a register from the device's side, also one that the guest may not write."""
        self.config[at : at + size] = value.to_bytes(size, "little")

    def get(self, at: int, size: int) -> int:
        """The present value of a register."""
        return int.from_bytes(self.config[at : at + size], "little")

    def allow(self, at: int, mask: int, size: int) -> None:
        """Let the guest write those bits of a register that are set in ``mask``."""
        self._writable[at : at + size] = mask.to_bytes(size, "little")

    def add_bar(self, index: int, bar: Bar) -> None:
        """Give the function a 32-bit BAR."""
        at = PCI_BASE_ADDRESS_0 + 4 * index
        self.bars[index] = bar
        self.put(at, PCI_BASE_ADDRESS_SPACE_IO if bar.io else 0, 4)
        self.allow(at, (0xFFFF if bar.io else 0xFFFFFFFF) & ~(bar.size - 1), 4)

    def add_capability(
        self, cap_id: int, body: bytes, name: str = "", fields: dict[int, str] | None = None
    ) -> int:
        """Append a capability to the function's list; returns its offset.

        :param body: the capability without its id and its next pointer.
        :param name: the capability's name in the ledger.
        :param fields: the names of its registers by offset, for the ledger.
        """
        at = self._cap_end
        name = name or f"capability {cap_id:#x}"
        for offset, field in {0: "id", 1: "next", **(fields or {})}.items():
            self._names[at + offset] = f"{name} {field}"
        self._names[at + 2 + len(body)] = ""
        self.config[at : at + 2 + len(body)] = bytes((cap_id, 0)) + body
        self.config[self._cap_link] = at
        self._cap_link = at + 1
        self._cap_end = (at + 2 + len(body) + 3) & ~3
        self.put(PCI_STATUS, PCI_STATUS_CAP_LIST, 2)
        return at

    def add_power_management(self) -> None:
        """Let the driver put the function to sleep (D3hot), from which it wakes as it was, and
        reset it alone (FLR).
        """
        control = PCI_PM_CTRL_NO_SOFT_RESET.to_bytes(2, "little")
        # Version 3 of the interface; no D1, D2 or power management events.
        self._pm_cap = self.add_capability(
            PCI_CAP_ID_PM, b"\x03\x00" + control + bytes(2), "power management", PM_NAMES
        )
        self.allow(self._pm_cap + PCI_PM_CTRL, PCI_PM_CTRL_STATE_MASK, 2)
        body = bytes([PCI_CAP_AF_SIZEOF, PCI_AF_CAP_TP_FLR, 0, 0])
        self._af_cap = self.add_capability(PCI_CAP_ID_AF, body, "advanced features", AF_NAMES)
        self.allow(self._af_cap + PCI_AF_CTRL, PCI_AF_CTRL_FLR, 1)

    @property
    def asleep(self) -> bool:
        """Whether the function is in D3hot: it answers in configuration space only, and does not
        access memory or interrupt.
        """
        return self._power == PCI_D3HOT

    @property
    def command(self) -> int:
        """The command register as far as it is in force."""
        off = PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER if self.asleep else 0
        return self.get(PCI_COMMAND, 2) & ~off

    def register_name(self, at: int, write: bool) -> str:
        """The name in the ledger of the register at ``at``."""
        return Registers(self._names)(at, write) or f"register {at:#x}"

    def config_read(self, at: int, size: int) -> int:
        """Answer a configuration read of 1 to 4 bytes, which lie in one aligned doubleword."""
        return self.get(at, size)

    def config_write(self, at: int, size: int, value: int) -> None:
        """Do a configuration write of 1 to 4 bytes, which lie in one aligned doubleword. Change the
        writable bits, then do what the write causes.
        """
        for i in range(at, at + size):
            mask = self._writable[i]
            self.config[i] = (self.config[i] & ~mask) | (value & 0xFF & mask)
            value >>= 8
        if at < PCI_COMMAND + 2 and at + size > PCI_COMMAND:
            self.decode()
            self.command_written(self.command)
        elif PCI_BASE_ADDRESS_0 <= at < PCI_BASE_ADDRESS_0 + 24:
            self.decode()
        else:
            self._power_written()
            self.config_written(at, size)

    def _power_written(self) -> None:
        """After a write to any capability: what it asks of power management."""
        if self._pm_cap:
            at = self._pm_cap + PCI_PM_CTRL
            state = self.get(at, 2) & PCI_PM_CTRL_STATE_MASK
            if state not in (PCI_D0, PCI_D3HOT):  # 3.2.4: not supported, so it stays as it was
                self.put(at, PCI_PM_CTRL_NO_SOFT_RESET | self._power, 2)
            elif state != self._power:
                self._power = state
                self.decode()
                self.command_written(self.command)
        if self._af_cap and self.config[self._af_cap + PCI_AF_CTRL]:
            self.function_reset()  # which clears the bit, too

    def decode(self) -> None:
        """Let each BAR decode where its register says, unless another region is there already."""
        command = self.command
        for index, bar in self.bars.items():
            base = self.bar_address(index)
            enabled = command & (PCI_COMMAND_IO if bar.io else PCI_COMMAND_MEMORY)
            bar.move(base if enabled and _may_decode(base, bar) else None)

    def bar_address(self, index: int) -> int:
        """The address that the register of BAR ``index`` holds."""
        return self.get(PCI_BASE_ADDRESS_0 + 4 * index, 4) & ~(self.bars[index].size - 1)

    def plugged(self) -> None:
        """Called after the function has got its slot; for subclasses."""

    def command_written(self, command: int) -> None:
        """Called after a write to the command register; for subclasses."""

    def config_written(self, at: int, size: int) -> None:
        """Called after a write to any register but the command register and the BARs; for
        subclasses.
        """

    def power_on(self) -> None:
        """Remember the present registers: ``reset`` restores them."""
        self._initial = bytes(self.config)

    def function_reset(self) -> None:
        """The driver resets the function alone (FLR); for subclasses that hold more."""
        self.reset()

    def reset(self) -> None:
        """Restore the registers as ``power_on`` saw them. The BARs decode nothing any more."""
        self.config[:] = self._initial
        self._power = PCI_D0
        self.decode()
        self.command_written(self.command)


COMMAND_BITS = PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE


def _may_decode(base: int, bar: Bar) -> bool:
    """Whether the BAR may decode at ``base``: not over RAM, the interrupt controllers or the
    board's ports, nor at the address that the guest writes to find out the BAR's size.
    """
    if bar.io:
        return base >= BAR_IO_MIN and base + bar.size <= 0x10000
    return base >= PCI_MMIO_BASE and base + bar.size <= PCI_MMIO_BASE + PCI_MMIO_SIZE


class PciBus:
    """Bus 0 with its host bridge. It answers at ports 0xCF8 to 0xCFF and in the ECAM window.

    It gives each function its slot and each BAR its first address. Functions may come and go while
    the guest runs, under the I/O lock.

    :param on_reset: called when the guest resets the machine through port 0xCF9.
    """

    def __init__(self, bus: Bus, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._functions: dict[int, PciFunction] = {}
        self._latch = ffi.new("struct pv_pci_latch *")
        # The registers of all slots, which C reads at any time, also those of a function that has
        # just been unplugged.
        # C has the bytes themselves: Python crashes if the garbage collector finds a memoryview
        # whose buffer somebody else holds.
        registers = bytearray(SLOTS * CONFIG_SIZE)
        self._c_registers = ffi.from_buffer("uint8_t[]", registers)
        self._registers = memoryview(registers)
        ports = bus.add(
            PIO, PORT_PCI_ADDRESS, 8, "pci-config", self, kind=lib.PV_REGION_PCI, opaque=self._latch
        )
        ports.names = self._port_name
        bus.add(MMIO, PCI_ECAM_BASE, PCI_ECAM_SIZE, "pci-ecam", Ecam(self)).names = self._ecam_name
        self.add(PciFunction("host-bridge", 0x1B36, 0x0008, 0x060000))

    def add(self, function: PciFunction, slot: int | None = None) -> int:
        """Plug ``function`` into a slot; returns the slot.

        :param slot: a free one; by default the first.
        :raises UsageError: all slots are taken, or no address is left for a BAR.
        """
        free = [n for n in range(SLOTS) if n not in self._functions]
        if not free:
            raise UsageError(
                f"no PCI slot is left for {function.name}", f"use at most {SLOTS - 1} devices"
            )
        slot = free[0] if slot is None else slot
        assert slot in free
        for index, bar in function.bars.items():
            bar.start = self._room(bar, function)
            at = PCI_BASE_ADDRESS_0 + 4 * index
            function.put(at, function.get(at, 4) | bar.start, 4)
        if function.config[PCI_INTERRUPT_PIN]:
            function.put(PCI_INTERRUPT_LINE, line_of(slot), 1)
        function.slot = slot
        registers = self._registers[slot * CONFIG_SIZE : (slot + 1) * CONFIG_SIZE]
        registers[:] = function.config
        function.config = registers
        function.power_on()
        self._functions[slot] = function
        self._latch.config[slot] = self._c_registers + slot * CONFIG_SIZE
        self._latch.live[slot] = sum(1 << at // 4 for at in function.live)
        self._latch.present |= 1 << slot
        function.plugged()
        return slot

    def _room(self, bar: Bar, function: PciFunction) -> int:
        """The first address for ``bar``: nobody decodes there after a reset, or has been told to
        by the guest.
        """
        taken = sorted(
            (at, at + other.size)
            for owner in (*self._functions.values(), function)
            for index, other in owner.bars.items()
            if other.io == bar.io and other is not bar
            for at in {other.start, owner.bar_address(index)}
        )
        start = PCI_IO_BASE if bar.io else PCI_MMIO_BASE
        for begin, end in taken:
            if begin < start + bar.size and start < end:
                start = (end + bar.size - 1) & ~(bar.size - 1)
        if not _may_decode(start, bar):
            raise UsageError(
                f"no address is left for a BAR of {function.name}", "use fewer devices"
            )
        return start

    def remove(self, slot: int) -> None:
        """Unplug the function in ``slot``: nothing answers there any more. The function itself is
        the caller's.
        """
        function = self._functions.pop(slot)
        self._latch.present &= ~(1 << slot)
        function.config = memoryview(bytearray(function.config))
        for bar in function.bars.values():
            bar.move(None)
        self._decode_all()

    def _decode_all(self) -> None:
        """A BAR may have left an address at which another BAR wants to decode."""
        for function in self._functions.values():
            function.decode()

    def reset(self) -> None:
        """Reset every function and the address latch."""
        self._latch.address = 0
        for function in self._functions.values():
            function.reset()

    def config_read(self, slot: int, at: int, size: int) -> int:
        """Read from a function's configuration space; all ones if the slot is empty. An access
        across doublewords is split.
        """
        function = self._functions.get(slot)
        if function is None:
            return (1 << 8 * size) - 1
        value = 0
        for start, n in dwords(at, size):
            value |= function.config_read(start, n) << 8 * (start - at)
        return value

    def config_write(self, slot: int, at: int, size: int, value: int) -> None:
        """Write to a function's configuration space, if the slot has one. An access across
        doublewords is split.
        """
        function = self._functions.get(slot)
        if function is None:
            return
        for start, n in dwords(at, size):
            function.config_write(start, n, value >> 8 * (start - at) & (1 << 8 * n) - 1)
            if start < PCI_BASE_ADDRESS_0 + 24:
                self._decode_all()

    def _register_name(self, device: int, function: int, at: int, write: bool) -> str:
        known = self._functions.get(device) if not function else None
        if known is None:
            return "no function"
        return f"{known.name} {known.register_name(at, write)}"

    def _port_name(self, reg: int, write: bool) -> str:
        """The name of a register of ports 0xCF8 to 0xCFF; for ``reg`` see PV_REG_PCI in
        cext/bus.h.
        """
        if reg & lib.PV_REG_PCI:
            return self._register_name(reg >> 11 & 31, reg >> 8 & 7, reg & 0xFF, write)
        if reg & lib.PV_REG_PCI_NOBODY:
            return "no function"
        return {0: "address", 1: "reset control"}.get(reg, f"address+{reg}")

    def _ecam_name(self, reg: int, write: bool) -> str:
        return self._register_name(reg >> 15 & 31, reg >> 12 & 7, reg & 0xFFF, write)

    # C leaves these accesses to ports 0xCF8..0xCFF to Python: the data window of a function that
    # exists, and port 0xCF9.
    def read(self, offset: int, size: int) -> int:
        """Answer a read from port 0xCF8 + offset."""
        if offset < 4:
            return 0 if offset == 1 else (1 << 8 * size) - 1
        address = self._latch.address
        return self.config_read(address >> 11 & 31, (address & 0xFC) + (offset & 3), size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Do a write to port 0xCF8 + offset."""
        if offset == 1 and size == 1:
            if value & RST_CPU:
                self._on_reset()
        elif offset >= 4:
            address = self._latch.address
            self.config_write(address >> 11 & 31, (address & 0xFC) + (offset & 3), size, value)


class Ecam:
    """The memory-mapped configuration window of bus 0: 4 KiB per function (PCI Express, 7.2.2)."""

    def __init__(self, pci: PciBus) -> None:
        self._pci = pci

    def read(self, offset: int, size: int) -> int:
        """Answer a read in the window; functions other than 0 do not exist."""
        if offset >> 12 & 7:
            return (1 << 8 * size) - 1
        return self._pci.config_read(offset >> 15 & 31, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Do a write in the window."""
        if not offset >> 12 & 7:
            self._pci.config_write(offset >> 15 & 31, offset & 0xFFF, size, value)


def dwords(at: int, size: int) -> Iterator[tuple[int, int]]:
    """Split an access into parts that lie in one doubleword each.

    :returns: the offset and the size in bytes of each part. Parts beyond the end of configuration
        space are left out.
    """
    end = min(at + size, CONFIG_SIZE)
    while at < end:
        n = min(end, (at | 3) + 1) - at
        yield at, n
        at += n


def line_of(slot: int) -> int:
    """The line of the 8259s to which INTA of ``slot`` is routed as well."""
    return PIC_PCI_LINES[slot % GSI_PCI_COUNT]


def gsi_of(slot: int) -> int:
    """The GSI to which INTA of ``slot`` is routed. The firmware tables describe the same route."""
    return GSI_PCI_BASE + slot % GSI_PCI_COUNT
