"""One virtual machine in KVM: memory slots, interrupt chips and routes, ioeventfds and irqfds."""

from __future__ import annotations

import os
import time

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, MemoryShort
from pyvmm.fd import EventFd
from pyvmm.kvm import Kvm, ioctl
from pyvmm.kvm.ahead import BlankVm, set_routes
from pyvmm.memory import PAGE
from pyvmm.spec.platform import (
    GSI_MSI_BASE,
    GSI_PCI_BASE,
    PIC_PCI_LINES,
)
from pyvmm.threads import aside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.memory import GuestMemory


class Vm:
    """A KVM VM with the kernel's interrupt chips and PIT. The object owns the VM's descriptor.

    :param kvm: lent.
    :param memory: lent. Its regions become the memory slots 0, 1, ...
    :param blank: the object owns it from here on; None: the object makes one.
    :raises HostError: KVM cannot create the VM.
    :raises MemoryShort: KVM does not take so much memory.
    :ivar c_fd: ``int *`` to the descriptor, for devices in C that raise interrupts. A machine reset
        replaces the VM (``recreate``); whoever borrowed the pointer then uses the new VM.
    :ivar any_length: whether an ioeventfd can match writes of any length.
    """

    def __init__(self, kvm: Kvm, memory: GuestMemory, blank: BlankVm | None = None) -> None:
        self.kvm = kvm
        self.memory = memory
        self.c_fd = ffi.new("int *", -1)
        self.any_length = bool(kvm.extension("KVM_CAP_IOEVENTFD_ANY_LENGTH"))
        self._free_gsis: list[int] = []
        self._next_gsi = GSI_MSI_BASE
        self._msi: dict[int, tuple[int, int]] = {}
        self._lines: dict[int, Any] = {}
        self._free_slots: list[int] = []
        self._next_slot = len(memory.regions)
        #: For traces: a ``kvm.recorder.Scope`` that gets ioeventfds, irqfds and routes, or None.
        self.recorder: Any = None
        self._set_up(blank or BlankVm(kvm))

    def _set_up(self, blank: BlankVm) -> None:
        try:
            for slot, r in enumerate(self.memory.regions):
                region = ffi.new("struct kvm_userspace_memory_region *")
                region.slot, region.guest_phys_addr = slot, r.gpa
                region.memory_size, region.userspace_addr = r.size, r.host
                try:
                    ioctl(blank.fileno(), "KVM_SET_USER_MEMORY_REGION", region)
                except HostError as e:  # too far up for its page tables, or too many pages
                    raise MemoryShort(
                        f"KVM does not take {self.memory.size >> 20} MiB of guest memory ({e})",
                        "lower --memory",
                    ) from e
        except BaseException:
            blank.close()
            raise
        self._fd = blank
        self.c_fd[0] = blank.fileno()

    def settle(self) -> None:
        """As ``BlankVm.settle``. The owner calls this before a guest runs.

        :raises HostError: KVM refuses.
        """
        self._fd.settle()

    def fileno(self) -> int:
        """The VM's descriptor."""
        return self._fd.fileno()

    def recreate(self, *, keep_clock: bool = False) -> None:
        """Replace the VM by a new one with the same memory, for a machine reset. ``settle`` is to
        follow.

        :param keep_clock: kvm-clock goes on, for a guest that was asleep. Else it begins at 0.

        The caller has stopped and detached all vCPUs, and removed every irqfd, ioeventfd and MSI
        route.

        :raises HostError: KVM cannot create the VM.
        """
        clock = ffi.new("struct kvm_clock_data *")
        if keep_clock:
            ioctl(self.fileno(), "KVM_GET_CLOCK", clock)
        self.close()
        self._msi.clear()
        self._set_up(BlankVm(self.kvm))
        if keep_clock:
            clock.flags = 0
            ioctl(self.fileno(), "KVM_SET_CLOCK", clock)

    def start_as_bios(self) -> None:
        """Leave the 8259s and the timer as a BIOS does for a boot sector. Only before the guest
        starts.

        :raises HostError: KVM refuses.
        """
        error = lib.pv_pic_as_bios(self.fileno())
        if error:
            raise HostError(f"cannot set up the 8259s and the timer: {os.strerror(-error)}")

    def close(self) -> None:
        """Close the VM. KVM destroys it when its vCPUs are closed, too. A second call does
        nothing.
        """
        self.c_fd[0] = -1
        self._fd.close()

    # --- interrupts -------------------------------------------------------------------------------

    def _commit_routes(self) -> None:
        set_routes(self.fileno(), self._msi)

    def _record(self, name: str, begin: int, args: dict[str, object]) -> None:
        if self.recorder is not None:
            self.recorder.step(name, begin, args)

    def alloc_gsi(self) -> int:
        """Take a free GSI for an MSI route. Give it back by ``free_gsi``."""
        if self._free_gsis:
            return self._free_gsis.pop()
        self._next_gsi += 1
        return self._next_gsi - 1

    def free_gsi(self, gsi: int) -> None:
        """Give back a GSI, whose irqfds have been removed, and remove its route.

        :raises HostError: KVM does not take the new routes.
        """
        if self._msi.pop(gsi, None) is not None:
            self._commit_routes()
        self._free_gsis.append(gsi)

    def set_msi_route(self, gsi: int, address: int, data: int) -> None:
        """Route ``gsi`` to an MSI message. Address and data are those of the MSI-X table.

        :raises HostError: KVM does not take the route; the routes are as before.
        """
        old = self._msi.get(gsi)
        if old == (address, data):
            return
        self._msi[gsi] = (address, data)
        try:
            begin = time.monotonic_ns()
            self._commit_routes()
            self._record(
                "KVM_SET_GSI_ROUTING", begin, {"gsi": gsi, "address": address, "data": data}
            )
        except HostError:
            # Forget the bad route: every later change would fail because of it, also for other
            # devices.
            if old is None:
                del self._msi[gsi]
            else:
                self._msi[gsi] = old
            raise

    def irqfd(self, event: EventFd, gsi: int, *, assign: bool = True) -> None:
        """Let KVM raise ``gsi`` whenever ``event`` is signalled, or, without ``assign``, stop that.
        If the eventfd's counter is not 0, KVM raises ``gsi`` at once.

        :raises HostError: KVM refuses.
        """
        arg = ffi.new("struct kvm_irqfd *")
        arg.fd, arg.gsi = event.fileno(), gsi
        arg.flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        begin = time.monotonic_ns()
        ioctl(self.fileno(), "KVM_IRQFD", arg)
        self._record("KVM_IRQFD", begin, {"eventfd": event.fileno(), "gsi": gsi, "assign": assign})

    def shared_line(self, gsi: int) -> Any:
        """The input ``gsi`` for functions that share it: ``struct pv_line *``, owned by the VM."""
        if gsi not in self._lines:
            made = {one: self._new_line(one) for one in _same_pin(gsi)}
            if len(made) == 2:
                lib.pv_line_pair(*made.values())
            self._lines |= made
        return self._lines[gsi]

    def _new_line(self, gsi: int) -> Any:
        line = lib.pv_line_new(self.c_fd, gsi)
        if line == ffi.NULL:
            raise MemoryError
        return ffi.gc(line, lib.pv_line_free)

    def irq_line(self, gsi: int, level: int) -> None:
        """Set interrupt line ``gsi`` to ``level``, 0 or 1.

        :raises HostError: the interrupt chips have no such line.
        """
        arg = ffi.new("struct kvm_irq_level *")
        arg.irq, arg.level = gsi, level
        ioctl(self.fileno(), "KVM_IRQ_LINE", arg)

    # --- pages of devices ---------------------------------------------------------------------

    def map_page(self, gpa: int, host: int) -> int:
        """Let the guest reach a page of ours (4096 bytes) at ``gpa`` without an exit; returns the
        memory slot, for ``unmap_page``.

        :raises HostError: KVM refuses; memory of the guest's may be in the way.
        """
        slot = self._free_slots.pop() if self._free_slots else self._next_slot
        try:
            self._set_page(slot, gpa, host, PAGE)
        except HostError:
            if slot != self._next_slot:
                self._free_slots.append(slot)
            raise
        self._next_slot = max(self._next_slot, slot + 1)
        return slot

    def unmap_page(self, slot: int) -> None:
        """Take a page back. No vCPU reaches it any more when this returns.

        :raises HostError: KVM refuses.
        """
        self._set_page(slot, 0, 0, 0)
        self._free_slots.append(slot)

    def _set_page(self, slot: int, gpa: int, host: int, size: int) -> None:
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot, region.guest_phys_addr = slot, gpa
        region.memory_size, region.userspace_addr = size, host
        begin = time.monotonic_ns()
        # A vCPU's thread does not change the guest's memory itself, see ``threads.narrow``.
        aside(lambda: ioctl(self.fileno(), "KVM_SET_USER_MEMORY_REGION", region))
        self._record(
            "KVM_SET_USER_MEMORY_REGION", begin, {"slot": slot, "address": gpa, "size": size}
        )

    # --- kicks ------------------------------------------------------------------------------------

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
        """Let KVM signal ``event`` for each write to ``addr``, without an exit to userspace; or,
        without ``assign``, stop that.

        :param pio: whether ``addr`` is a port and not a guest-physical address.
        :param length: the length of the writes in bytes. It is ignored if the kernel can match
            writes of any length (KVM_CAP_IOEVENTFD_ANY_LENGTH) and ``value`` is None.
        :param value: signal only for writes of this value.
        :raises HostError: KVM does not take the ioeventfd.
        """
        arg = ffi.new("struct kvm_ioeventfd *")
        arg.addr, arg.fd = addr, event.fileno()
        arg.len = 0 if self.any_length and value is None else length
        arg.flags = (lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0) | (
            0 if assign else lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        )
        if value is not None:
            arg.flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
            arg.datamatch = value
        begin = time.monotonic_ns()
        try:
            ioctl(self.fileno(), "KVM_IOEVENTFD", arg)
            args: dict[str, object] = {
                "eventfd": event.fileno(),
                "address": addr,
                "assign": assign,
            }
            if value is not None:
                args["value"] = value
            self._record("KVM_IOEVENTFD", begin, args)
        except HostError:
            if assign:
                raise
            # Removing an ioeventfd fails only if it is gone already, together with its VM.


def _same_pin(gsi: int) -> tuple[int, ...]:
    """``gsi``, and the other GSI that is routed to the same pin of the 8259s if there is one."""
    if gsi in PIC_PCI_LINES:
        return gsi, GSI_PCI_BASE + PIC_PCI_LINES.index(gsi)
    if 0 <= gsi - GSI_PCI_BASE < len(PIC_PCI_LINES):
        return gsi, PIC_PCI_LINES[gsi - GSI_PCI_BASE]
    return (gsi,)
