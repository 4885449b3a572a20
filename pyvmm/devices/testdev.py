"""Devices that test kernels expect of QEMU: isa-debug-exit, the debug console and pc-testdev. Only
where asked for.
"""

from __future__ import annotations

from pyvmm._ext import lib
from pyvmm.bus import MMIO, PIO, Bus
from pyvmm.devices.fw_cfg import FwCfg
from pyvmm.errors import HostError
from pyvmm.spec import platform as pf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.console import Stream
    from pyvmm.kvm.vm import Vm
    from pyvmm.memory import GuestMemory


def add_test_devices(
    bus: Bus,
    vm: Vm,
    memory: GuestMemory,
    cpus: int,
    console: Stream,
    on_exit: Callable[[int], None],
) -> None:
    """Put all of them on the bus, and fw_cfg (``devices.fw_cfg``).

    :param console: gets what is written to the debug console, between what the serial port gives
        it.
    :param on_exit: called with the status that the kernel ends with, 0..255, always odd
        (``DebugExit``).
    """
    bus.add(PIO, pf.PORT_DEBUGCON, 1, "debugcon", kind=lib.PV_REGION_DEBUGCON, opaque=console.pipe)
    bus.add(PIO, pf.PORT_DEBUG_EXIT, 4, "debug-exit", DebugExit(on_exit))
    bus.add(PIO, pf.PORT_TESTDEV_ECHO, 4, "testdev-echo", Scratch(4))
    bus.add(PIO, pf.PORT_TESTDEV_FLUSH, 4, "testdev-flush", Flush(memory))
    bus.add(PIO, pf.PORT_TESTDEV_IRQ, 24, "testdev-irq", IrqLines(vm))
    bus.add(
        MMIO, pf.TESTDEV_MMIO, pf.TESTDEV_MMIO_SIZE, "testdev-mmio", Scratch(pf.TESTDEV_MMIO_SIZE)
    )
    FwCfg(bus, memory, cpus)


class DebugExit:
    """isa-debug-exit at 0xF4: a write of any width ends the machine with status (value << 1) | 1,
    as QEMU does.
    """

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Zero, as QEMU's."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The end. A process has eight bits of status, and so has this."""
        self._on_exit((value << 1 | 1) & 0xFF)


class Scratch:
    """Bytes that keep what is written, at any width: pc-testdev's echo port, and its memory that
    exits.
    """

    def __init__(self, length: int) -> None:
        self._bytes = bytearray(length)

    def read(self, offset: int, size: int) -> int:
        """What was written."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep it."""
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")


class Flush:
    """pc-testdev at 0xE4: a guest-physical address whose page the host is to unmap; its content
    stays.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """An address outside RAM does nothing."""
        if offset == 0 and size == 4:
            try:
                self._memory.unmap_page(value)
            except IndexError:
                pass


class IrqLines:
    """pc-testdev at 0x2000 + n: a byte is the level of interrupt line n."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A line that the chips do not have stays as it is."""
        if size == 1:
            try:
                self._vm.irq_line(offset, int(value != 0))
            except HostError:
                pass
