"""A mock guest on the machine's real buses: the accesses of a vCPU without a vCPU, and a virtio-pci
driver on top of them.

Accesses take the way of a VM exit (``pv_vcpu_access``, then ``Bus.dispatch``), so that bus, ledger,
PCI, transport and devices are the real ones. ``FakeVm`` stands in for KVM where only its
book-keeping matters.
"""

from __future__ import annotations

import errno
import select
import struct
import threading
from functools import partial
from typing import Any

from pyvmm._ext import ffi, lib
from pyvmm.bus import MMIO, PIO, Bus
from pyvmm.errors import HostError
from pyvmm.fd import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.pci import PciBus
from pyvmm.spec import pci, virtio_pci
from pyvmm.spec.platform import PCI_ECAM_BASE, PORT_PCI_ADDRESS, PORT_PCI_DATA
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_NOTIFICATION_DATA,
)
from pyvmm.spec.virtio_pci import VIRTIO_MSI_NO_VECTOR
from tests.driver import NetDriver, PackedRing, Ring, wait_for
from tests.ringforms import Form

ACK, DRIVER = VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER
FEATURES_OK, DRIVER_OK = VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_DRIVER_OK


class FakeVm:
    """What Msix and VirtioPci use of a Vm, with KVM's rules, and ``delivered()`` in place of an
    interrupt controller.

    :ivar refuse: names of methods that fail as KVM would, e.g. ``{"irqfd"}``.
    """

    def __init__(self) -> None:
        self.c_fd = ffi.new("int *", -1)
        self.irqfds: dict[EventFd, int] = {}
        #: By address, or by port or address and value.
        self.kicks: dict[int | tuple[int, int], EventFd] = {}
        self.routes: dict[int, tuple[int, int]] = {}
        self.pages: dict[int, tuple[int, int]] = {}  # by memory slot: where the guest sees which
        self.refuse: set[str] = set()
        self.gsis: set[int] = set()
        self._lines: dict[int, Any] = {}
        self._messages: list[tuple[int, int]] = []

    def _check(self, name: str, error: int = 0) -> None:
        if error or name in self.refuse:
            raise HostError(f"{name} failed: {errno.errorcode[error or errno.EINVAL]}")

    def alloc_gsi(self) -> int:
        gsi = next(n for n in range(24, 4096) if n not in self.gsis)
        self.gsis.add(gsi)
        return gsi

    def free_gsi(self, gsi: int) -> None:
        assert gsi not in self.irqfds.values()
        self.gsis.remove(gsi)
        self.routes.pop(gsi, None)

    def set_msi_route(self, gsi: int, address: int, data: int) -> None:
        self._check("set_msi_route")
        assert gsi in self.gsis
        self._collect()
        self.routes[gsi] = (address, data)

    def irqfd(self, event: EventFd, gsi: int, *, assign: bool = True) -> None:
        if assign:
            self._check("irqfd", errno.EBUSY if event in self.irqfds else 0)
            self.irqfds[event] = gsi
        else:
            self._check("irqfd-deassign")
            self._collect()
            assert self.irqfds.pop(event, gsi) == gsi

    def shared_line(self, gsi: int) -> Any:
        return self._lines.setdefault(
            gsi, ffi.gc(lib.pv_line_new(self.c_fd, gsi), lib.pv_line_free)
        )

    def ioeventfd(
        self,
        event: EventFd,
        addr: int,
        *,
        pio: bool,
        assign: bool = True,
        length: int = 2,
        value: int | None = None,
    ) -> None:
        assert value is not None if pio else (length == 4) == (value is not None)
        key = addr if value is None else (addr, value)
        if assign:
            self._check("ioeventfd", errno.EEXIST if key in self.kicks else 0)
            self.kicks[key] = event
        elif self.kicks.get(key) is event:
            del self.kicks[key]

    def map_page(self, gpa: int, host: int) -> int:
        self._check("map_page")
        slot = len(self.pages) + 1
        assert slot not in self.pages
        self.pages[slot] = (gpa, host)
        return slot

    def unmap_page(self, slot: int) -> None:
        self._check("unmap_page")
        del self.pages[slot]

    def _collect(self) -> None:
        """What KVM does the moment that an eventfd with an irqfd is signalled."""
        for event, gsi in self.irqfds.items():
            if event.drain():
                self._messages.append(self.routes[gsi])

    def delivered(self, timeout: float = 0.0) -> list[tuple[int, int]]:
        """MSI messages (address, data) since the last call; waits up to ``timeout`` seconds for the
        first.
        """
        if timeout and self.irqfds and not self._messages:
            poll = select.poll()
            for event in self.irqfds:
                poll.register(event, select.POLLIN)
            poll.poll(timeout * 1000)
        self._collect()
        out, self._messages = self._messages, []
        return out


class Board:
    """Memory, bus and PCI, and one vCPU's way to them. Devices are plugged in by ``pci.add``.

    :ivar exits: accesses that Python was asked for. :ivar lock: the I/O lock, held for these.
    :ivar held: what the vCPU would have to wait for after the latest of them, or None.
    """

    def __init__(self, vm: Any = None, *, memory: int = 16 << 20) -> None:
        self.vm = vm if vm is not None else FakeVm()
        self.memory = GuestMemory(memory)
        self.bus = Bus()
        self.resets = 0
        self.pci = PciBus(self.bus, self._reset)
        self.vcpu = lib.pv_vcpu_new(-1, 0, self.bus.c)
        self.exits = 0
        self.held: threading.Event | None = None
        self.lock = threading.RLock()
        self._opened: list[Any] = []

    def _reset(self) -> None:
        self.resets += 1

    def add(self, function: Any) -> Any:
        """Plug in a function that ``close`` is to close."""
        self.pci.add(function)
        return self.own(function)

    def own(self, thing: Any) -> Any:
        """``close`` is to close it."""
        self._opened.append(thing)
        return thing

    def access(
        self, space: int, addr: int, size: int, data: bytes | None = None, *, count: int = 1
    ) -> bytes:
        """One exit: a write of ``data``, or a read; returns the data area as it is afterwards."""
        c, area = self.vcpu, ffi.new("uint8_t[]", size * count)
        if data is not None:
            ffi.memmove(area, data, size * count)
        else:
            ffi.memmove(area, b"\xcc" * (size * count), size * count)
        c.addr, c.size, c.count, c.write, c.data = addr, size, count, data is not None, area
        if not lib.pv_vcpu_access(c, space):
            self.exits += 1
            with self.lock:
                self.held = self.bus.dispatch(c)
        return bytes(ffi.buffer(area))

    def read(self, space: int, addr: int, size: int) -> int:
        return int.from_bytes(self.access(space, addr, size), "little")

    def write(self, space: int, addr: int, size: int, value: int) -> None:
        kicks = getattr(self.vm, "kicks", {})
        kick = kicks.get(addr) if space == MMIO else None
        if kick is None and size == (4 if space == MMIO else 2):
            kick = kicks.get((addr, value))
        if kick is not None:  # the kernel is faster
            kick.signal()
        else:
            self.access(space, addr, size, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    # --- configuration space ----------------------------------------------------------------------
    def config_read(self, slot: int, at: int, size: int = 4) -> int:
        self.write(PIO, PORT_PCI_ADDRESS, 4, 1 << 31 | slot << 11 | at & 0xFC)
        return self.read(PIO, PORT_PCI_DATA + (at & 3), size)

    def config_write(self, slot: int, at: int, size: int, value: int) -> None:
        self.write(PIO, PORT_PCI_ADDRESS, 4, 1 << 31 | slot << 11 | at & 0xFC)
        self.write(PIO, PORT_PCI_DATA + (at & 3), size, value)

    def ecam(self, slot: int, at: int) -> int:
        """The address of a register in the memory-mapped window."""
        return PCI_ECAM_BASE + (slot << 15) + at

    def capabilities(self, slot: int) -> list[tuple[int, int]]:
        """(id, offset) of a function's capabilities, as a driver walks them."""
        out: list[tuple[int, int]] = []
        if self.config_read(slot, pci.PCI_STATUS, 2) & pci.PCI_STATUS_CAP_LIST:
            at = self.config_read(slot, pci.PCI_CAPABILITY_LIST, 1)
            while at:
                assert at >= 0x40 and not at & 3 and len(out) < 48
                out.append((self.config_read(slot, at, 1), at))
                at = self.config_read(slot, at + 1, 1)
        return out

    def bar_size(self, slot: int, index: int) -> int:
        """Size a BAR the way a driver does, decoding left as it is."""
        at = pci.PCI_BASE_ADDRESS_0 + 4 * index
        old = self.config_read(slot, at)
        self.config_write(slot, at, 4, 0xFFFFFFFF)
        mask = self.config_read(slot, at) & ~0xF
        self.config_write(slot, at, 4, old)
        return -mask & 0xFFFFFFFF

    def close(self) -> None:
        for function in reversed(self._opened):
            function.close()
        lib.pv_vcpu_free(self.vcpu)
        self.bus.close()
        self.memory.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()


#: name -> (offset, width) of struct virtio_pci_common_cfg
COMMON = {
    "device_feature_select": (virtio_pci.VIRTIO_PCI_COMMON_DFSELECT, 4),
    "device_feature": (virtio_pci.VIRTIO_PCI_COMMON_DF, 4),
    "driver_feature_select": (virtio_pci.VIRTIO_PCI_COMMON_GFSELECT, 4),
    "driver_feature": (virtio_pci.VIRTIO_PCI_COMMON_GF, 4),
    "config_msix_vector": (virtio_pci.VIRTIO_PCI_COMMON_MSIX, 2),
    "num_queues": (virtio_pci.VIRTIO_PCI_COMMON_NUMQ, 2),
    "device_status": (virtio_pci.VIRTIO_PCI_COMMON_STATUS, 1),
    "config_generation": (virtio_pci.VIRTIO_PCI_COMMON_CFGGENERATION, 1),
    "queue_select": (virtio_pci.VIRTIO_PCI_COMMON_Q_SELECT, 2),
    "queue_size": (virtio_pci.VIRTIO_PCI_COMMON_Q_SIZE, 2),
    "queue_msix_vector": (virtio_pci.VIRTIO_PCI_COMMON_Q_MSIX, 2),
    "queue_enable": (virtio_pci.VIRTIO_PCI_COMMON_Q_ENABLE, 2),
    "queue_notify_off": (virtio_pci.VIRTIO_PCI_COMMON_Q_NOFF, 2),
    "queue_desc": (virtio_pci.VIRTIO_PCI_COMMON_Q_DESCLO, 8),
    "queue_driver": (virtio_pci.VIRTIO_PCI_COMMON_Q_AVAILLO, 8),
    "queue_device": (virtio_pci.VIRTIO_PCI_COMMON_Q_USEDLO, 8),
    "queue_reset": (virtio_pci.VIRTIO_PCI_COMMON_Q_RESET, 2),
}


class VirtioPciDriver:
    """Finds a virtio device in ``slot`` as virtio 1.2, 4.1 says, and drives its registers."""

    def __init__(self, board: Board, slot: int) -> None:
        self.board, self.slot = board, slot
        self.caps: dict[int, tuple[int, int, int]] = {}  # type -> (bar, offset, length)
        self.window = self.msix_cap = 0
        self.notify_multiplier = 0
        self.vectors = 0
        self.kick_data, self.kicks = False, 0
        for cap, at in board.capabilities(slot):
            if cap == pci.PCI_CAP_ID_MSIX:
                self.msix_cap = at
                self.vectors = (board.config_read(slot, at + pci.PCI_MSIX_FLAGS, 2) & 0x7FF) + 1
            elif cap == pci.PCI_CAP_ID_VNDR:
                kind, bar = board.config_read(slot, at + 3, 1), board.config_read(slot, at + 4, 1)
                offset, length = board.config_read(slot, at + 8), board.config_read(slot, at + 12)
                if kind == virtio_pci.VIRTIO_PCI_CAP_PCI_CFG:
                    self.window = at
                    continue
                self.caps.setdefault(kind, (bar, offset, length))
                if kind == virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG:
                    self.notify_multiplier = board.config_read(slot, at + 16)

    # --- PCI --------------------------------------------------------------------------------------
    @property
    def bar(self) -> int:
        """The address of the memory BAR."""
        index = self.caps[virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG][0]
        return self.board.config_read(self.slot, pci.PCI_BASE_ADDRESS_0 + 4 * index) & ~0xF

    @property
    def ports(self) -> int:
        """The first port of the legacy interface of a transitional device."""
        return self.board.config_read(self.slot, pci.PCI_BASE_ADDRESS_0) & ~3

    def command(self, value: int) -> None:
        self.board.config_write(self.slot, pci.PCI_COMMAND, 2, value)

    def enable(self, *extra: int) -> None:
        """Memory decoding and bus mastering on, and ``extra`` command bits."""
        self.command(pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER | sum(extra))

    def place(self, kind: int, at: int = 0) -> int:
        """The address of offset ``at`` in a structure."""
        _bar, offset, length = self.caps[kind]
        assert at < length
        return self.bar + offset + at

    # --- MSI-X ------------------------------------------------------------------------------------
    def msix_flags(self, flags: int) -> None:
        self.board.config_write(self.slot, self.msix_cap + pci.PCI_MSIX_FLAGS, 2, flags)

    def msix_area(self, register: int) -> int:
        return self.bar + (self.board.config_read(self.slot, self.msix_cap + register) & ~7)

    def set_vector(self, index: int, address: int, data: int, *, masked: bool = False) -> None:
        at = self.msix_area(pci.PCI_MSIX_TABLE) + 16 * index
        for offset, value in (
            (0, address & 0xFFFFFFFF),
            (4, address >> 32),
            (8, data),
            (12, int(masked)),
        ):
            self.board.write(MMIO, at + offset, 4, value)

    def mask(self, index: int, masked: bool) -> None:
        self.board.write(MMIO, self.msix_area(pci.PCI_MSIX_TABLE) + 16 * index + 12, 4, int(masked))

    def pending(self) -> int:
        return self.board.read(MMIO, self.msix_area(pci.PCI_MSIX_PBA), 8)

    def use_msix(self, data: int = 0x30) -> None:
        """Enable MSI-X with every vector open, vector n having message ``data`` + n."""
        self.msix_flags(pci.PCI_MSIX_FLAGS_ENABLE)
        for i in range(self.vectors):
            self.set_vector(i, 0xFEE00000, data + i)

    # --- registers --------------------------------------------------------------------------------
    def get(self, name: str) -> int:
        offset, width = COMMON[name]
        return self.board.read(
            MMIO, self.place(virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG, offset), width
        )

    def set(self, name: str, value: int) -> None:
        offset, width = COMMON[name]
        at = self.place(virtio_pci.VIRTIO_PCI_CAP_COMMON_CFG, offset)
        for i in range(0, width, 4):  # 64-bit fields as two halves
            self.board.write(MMIO, at + i, min(width, 4), value >> 8 * i)

    @property
    def status(self) -> int:
        return self.get("device_status")

    def isr(self) -> int:
        return self.board.read(MMIO, self.place(virtio_pci.VIRTIO_PCI_CAP_ISR_CFG), 1)

    def notify(self, queue: int) -> None:
        self.set("queue_select", queue)
        at = self.get("queue_notify_off") * self.notify_multiplier
        self.kicks += 1
        # 4.1.5.2: with NOTIFICATION_DATA 32 bits, the upper half says how far the driver is.
        width, value = (4, queue | self.kicks << 16) if self.kick_data else (2, queue)
        place = self.place(virtio_pci.VIRTIO_PCI_CAP_NOTIFY_CFG, at)
        self.board.write(MMIO, place, width, value & 0xFFFFFFFF)

    def config(self, offset: int, size: int) -> int:
        return self.board.read(MMIO, self.place(virtio_pci.VIRTIO_PCI_CAP_DEVICE_CFG, offset), size)

    def reset(self) -> None:
        """Reset the device, and wait until it has been (4.1.4.3.2)."""
        self.set("device_status", 0)
        assert wait_for(lambda: self.status == 0)

    # --- the way to DRIVER_OK (3.1.1) -------------------------------------------------------------
    def offered(self) -> int:
        bits = 0
        for select_ in range(4):
            self.set("device_feature_select", select_)
            bits |= self.get("device_feature") << 32 * select_
        return bits

    def accept(self, features: int) -> None:
        for select_ in range(4):
            self.set("driver_feature_select", select_)
            self.set("driver_feature", features >> 32 * select_ & 0xFFFFFFFF)

    def negotiate(self, features: int) -> bool:
        """From reset to FEATURES_OK; whether the device agreed."""
        self.reset()
        self.kick_data = bool(features >> VIRTIO_F_NOTIFICATION_DATA & 1)
        self.set("device_status", ACK)
        self.set("device_status", ACK | DRIVER)
        self.accept(features)
        self.set("device_status", ACK | DRIVER | FEATURES_OK)
        return bool(self.status & FEATURES_OK)

    def set_ring(
        self, ring: Ring, *, vector: int = VIRTIO_MSI_NO_VECTOR, enable: bool = True
    ) -> None:
        self.set("queue_select", ring.index)
        self.set("queue_size", ring.size)
        self.set("queue_desc", ring.desc)
        self.set("queue_driver", ring.avail)
        self.set("queue_device", ring.used)
        self.set("queue_msix_vector", vector)
        if enable:
            self.set("queue_enable", 1)

    def driver_ok(self) -> None:
        self.set("device_status", ACK | DRIVER | FEATURES_OK | DRIVER_OK)


class NetGuest:
    """A guest with a virtio-net driver, up and running: ``pci`` drives registers, ``net`` the
    rings.

    :param features: accepted, of what is offered. :param msix: vector 0 for the configuration, 1 +
        n for queue n.
    :param pairs: queue pairs set up; ``net`` is the first, ``nets`` are all. :param control: set up
        the control queue, too.
    """

    def __init__(
        self,
        board: Board,
        slot: int,
        features: int,
        *,
        msix: bool = True,
        fill: bool = True,
        pairs: int = 1,
        control: bool = False,
        **rings: Any,
    ) -> None:
        from pyvmm.spec.virtio import (
            VIRTIO_F_RING_PACKED,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
        )
        from pyvmm.spec.virtio_net import VIRTIO_NET_F_MRG_RXBUF
        from pyvmm.virtio.net import MULTIQUEUE

        self.board = board
        self.pci = VirtioPciDriver(board, slot)
        self.pci.enable()
        self.features = Form.features(features) & self.pci.offered()
        self.msix = msix
        if msix:
            self.pci.use_msix()
        assert self.pci.negotiate(self.features)
        packed = bool(self.features >> VIRTIO_F_RING_PACKED & 1)
        event_idx = bool(self.features >> VIRTIO_RING_F_EVENT_IDX & 1)
        self.nets = [
            NetDriver(
                board.memory,
                packed=packed,
                event_idx=event_idx,
                indirect=bool(self.features >> VIRTIO_RING_F_INDIRECT_DESC & 1),
                mrg_rxbuf=bool(self.features >> VIRTIO_NET_F_MRG_RXBUF & 1),
                base=0x10000 + 0x200000 * pair,
                pair=pair,
                **rings,
            )
            for pair in range(pairs)
        ]
        self.net = self.nets[0]
        all_rings = [ring for net in self.nets for ring in net.rings]
        self.control: Ring | None = None
        if control:
            index = self.pci.get("num_queues") - 1 if self.features & MULTIQUEUE else 2
            kind: type[Ring] = PackedRing if packed else Ring
            self.control = kind(board.memory, 64, 0x4000, index=index, event_idx=event_idx)
            all_rings.append(self.control)
        if msix:
            self.pci.set("config_msix_vector", 0)
        for ring in all_rings:
            ring.kick = partial(self.pci.notify, ring.index)  # type: ignore[method-assign]
            self.pci.set_ring(ring, vector=1 + ring.index if msix else VIRTIO_MSI_NO_VECTOR)
        if fill:
            for net in self.nets:
                net.fill(kick=False)
        self.pci.driver_ok()

    def command(self, kind: int, command: int, data: bytes = b"", *, room: int = 1) -> int | None:
        """A control command; the acknowledgement, or None if the device needs a reset instead. What
        else the device has written is in ``result``.
        """
        request = bytes([kind, command]) + data
        at, answer = 0x6000, 0x5FF0
        self.board.memory.write(at, request)
        self.board.memory.write(answer, b"\xaa")
        segments = [(at, len(request), False)] + ([(answer, room, True)] if room else [])
        control, used = self.control, list[tuple[int, int]]()
        assert control is not None
        control.add(segments)
        control.publish()

        def over() -> bool:
            used.extend(control.take_used())
            return bool(used or self.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET)

        assert wait_for(over)
        self.result = self.board.memory.read(answer + 1, used[0][1] - 1) if used else b""
        assert used == [] or (len(used) == 1 and 1 <= used[0][1] <= room)
        return self.board.memory.read(answer, 1)[0] if used else None

    def link(self) -> bool:
        return bool(self.pci.config(6, 2) & 1)

    def close(self) -> None:
        for net in self.nets:
            net.close()
        if self.control:
            self.control.close()


def frame(n: int, length: int = 60) -> bytes:
    """A frame that tells its number."""
    return struct.pack("<I", n) + bytes((n + i) & 0xFF for i in range(length - 4))
