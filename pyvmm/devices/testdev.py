"""Devices of QEMU that test kernels expect: isa-debug-exit, the debug console and pc-testdev. A
machine has them only on request.
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
    """Put all test devices and fw_cfg (``devices.fw_cfg``) on the bus.

    :param vm: lent. The interrupt device sets its lines.
    :param memory: lent.
    :param cpus: the number of vCPUs.
    :param console: gets the output of the debug console, mixed with that of the serial port.
    :param on_exit: called with the exit status that the kernel chose (``DebugExit``).
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
    """isa-debug-exit at port 0xF4: a write of any width ends the machine.

    :param on_exit: called with the exit status (value << 1) | 1, as in QEMU, in the range 0..255;
        the status is always odd.
    """

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Zero, as in QEMU."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the machine. The status is cut to the eight bits of a process's exit status."""
        self._on_exit((value << 1 | 1) & 0xFF)


class Scratch:
    """``length`` bytes that keep their value, with accesses of any width: pc-testdev's echo port
    and its memory whose accesses exit.
    """

    def __init__(self, length: int) -> None:
        self._bytes = bytearray(length)

    def read(self, offset: int, size: int) -> int:
        """The bytes as they were last written."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the value."""
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")


class Flush:
    """pc-testdev at port 0xE4: the guest writes a guest-physical address, and the host unmaps the
    page there. The page keeps its content.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Unmap the page. An address outside RAM is ignored."""
        if offset == 0 and size == 4:
            try:
                self._memory.unmap_page(value)
            except IndexError:
                pass


class IrqLines:
    """pc-testdev at port 0x2000 + n: a byte written there is the level of interrupt line n."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def read(self, offset: int, size: int) -> int:
        """Zero."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the level. A line that the interrupt chips do not have is ignored."""
        if size == 1:
            try:
                self._vm.irq_line(offset, int(value != 0))
            except HostError:
                pass
