"""The kicks of a virtio device, whatever its transport: from the register that the guest writes to
the virtqueue's eventfd.

By ioeventfd, KVM signals the eventfd, and the vCPU goes on. Else, or while a place has no
ioeventfds, the kick is an exit, and the bus signals the eventfd in C, or lets a data path take the
kick in the vCPU's thread. Only kicks of the virtqueues that the device serves itself reach Python.
"""

from __future__ import annotations

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.bus import Bus, Region
    from pyvmm.kvm.vm import Vm
    from pyvmm.virtio.device import Queue, VirtioDevice

    #: Where a driver kicks: whether at a port, the address, the bytes from one virtqueue's register
    #: to the next one's (0: they share one, and the value says which), and the bytes of a write.
    Place = tuple[bool, int, int, int]


class Kicks:
    """Turns kicks into eventfds; lent to the regions of a transport.

    :param vm, bus: lent. :param stride: of registers of which each virtqueue has its own.
    :param ioeventfd: whether to use ioeventfds at all.
    :ivar c: ``struct pv_notify *``. :ivar running: the device is between DRIVER_OK and a reset.
    :ivar errors: how often KVM has refused.
    """

    def __init__(
        self, vm: Vm, bus: Bus, device: VirtioDevice, stride: int = 1, *, ioeventfd: bool = True
    ) -> None:
        self._vm, self._bus, self._device, self._ioeventfd = vm, bus, device, ioeventfd
        self._takers: dict[int, Any] = {}
        self.running = False
        self.errors = 0
        self._place: Place | None = None  # which has ioeventfds
        self._kicked: list[Queue] = []  # those with an eventfd, while the device runs
        self.c: Any = ffi.new("struct pv_notify *")
        self.c.count, self.c.stride = len(device.queues), stride
        for q in device.queues:
            self.c.fd[q.index] = q.kick.fileno()

    def set_running(self, running: bool) -> None:
        """The device starts or stops; ``move`` comes next."""
        self.running = running
        if running:
            own = self._device.own_queues()
            self._kicked = [q for q in self._device.queues if q.index not in own]
            for q in self._device.queues:
                self.c.fd[q.index] = -1 if q.index in own else q.kick.fileno()

    def set_takers(self, takers: dict[int, Any]) -> None:
        """Have kicks of these virtqueues taken in the thread of the vCPU that kicks, and all others
        go to the eventfds. On return no vCPU is in a taker of before.

        :param takers: ``struct pv_taker *`` by virtqueue (``DataPath.takers``), lent until the next
            call.
        """
        for index in {*self._takers, *takers}:
            lib.pv_notify_take(self._bus.c, self.c, index, takers.get(index, ffi.NULL))
        self._takers = takers

    def move(self, place: Place | None) -> None:
        """Let KVM answer the kicks of a driver that runs, at the place where it kicks; None if that
        decodes nowhere. If KVM refuses, kicks are exits, which the bus answers.
        """
        if not self._ioeventfd or not self.running:
            place = None
        if place == self._place:
            return
        old, self._place = self._place, None
        if old is not None:
            self._assign(old, assign=False)
        if place is None:
            return
        try:
            self._assign(place, assign=True)
            self._place = place
        except HostError:
            self.errors += 1  # the guest chose the place: no reason to end the machine
            self._assign(place, assign=False)

    def _assign(self, place: Place, *, assign: bool) -> None:
        pio, address, stride, length = place
        for q in self._kicked:
            self._vm.ioeventfd(
                q.kick,
                address + stride * q.index,
                pio=pio,
                assign=assign,
                length=length,
                value=None if stride else q.index,
            )

    def by_address(self, bus: Bus, space: int) -> Region:
        """A region in which each virtqueue has a register of its own, to which any value is
        written.
        """
        device, stride = self._device, self.c.stride

        def name(offset: int, write: bool) -> str:
            """``queue 1 notify``, for the ledger."""
            index, rest = divmod(offset, stride)
            return device.queue_name(index) + (f"+{rest}" if rest else "")

        region = bus.region(
            space,
            stride * len(device.queues),
            f"{device.name} notify",
            _ByAddress(device, stride),
            kind=lib.PV_REGION_NOTIFY,
            opaque=self.c,
        )
        region.names, region.prefix = name, device.name
        region.role = lambda offset: device.kick_role(offset // stride)
        return region

    def by_value(self, bus: Bus, space: int, length: int) -> Region:
        """A region with one register, to which the number of the virtqueue is written."""
        device = self._device
        region = bus.region(
            space,
            length,
            f"{device.name} notify",
            _ByValue(device),
            kind=lib.PV_REGION_NOTIFY_VALUE,
            opaque=self.c,
        )
        region.names = lambda queue, write: (
            device.queue_name(queue) if queue < len(device.queues) else "no queue notify"
        )
        region.prefix = device.name
        region.role = lambda queue: device.kick_role(queue) if queue < len(device.queues) else ""
        return region

    def eventfds(self) -> dict[int, str]:
        """What the virtqueues' eventfds are for, by descriptor: ``net0 queue 1 kick``."""
        names = {}
        for q in self._device.queues:
            names[q.kick.fileno()] = f"{self._device.name} queue {q.index} kick"
            names[q.call.fileno()] = f"{self._device.name} queue {q.index} call"
        return names


class _ByAddress:
    """Kicks of the queues that the device serves itself; the others become eventfds in C."""

    def __init__(self, device: VirtioDevice, stride: int) -> None:
        self._device, self._stride = device, stride

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A kick, by the address alone."""
        index, rest = divmod(offset, self._stride)
        if not rest and index in self._device.own_queues():
            self._device.notified(index)


class _ByValue:
    """The same, at a register that all queues have in common."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A kick of the queue with this number."""
        if value in self._device.own_queues():
            self._device.notified(value)
