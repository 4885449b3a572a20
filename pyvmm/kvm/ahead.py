"""A VM in KVM as it is before it has memory and vCPUs, and how it is made ahead of the machine."""

from __future__ import annotations

import os

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, PyvmmError
from pyvmm.fd import Closing, Fd
from pyvmm.kvm import Kvm, ioctl
from pyvmm.spec.platform import GSI_PCI_BASE, KVM_IDENTITY_MAP, KVM_TSS_BASE, PIC_PCI_LINES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

IOAPIC_PINS = 24


class BlankVm(Fd):
    """The descriptor of a VM with the kernel's interrupt chips and PIT.

    The PIT is not to repeat lost ticks: for that, KVM watches each EOI, and on AMD hosts does
    without AVIC. KVM_REINJECT_CONTROL waits for two grace periods of SRCU. The kernel does not
    hurry the second one if the call asks for it within 25 us of the end of the first
    (srcutree.exp_holdoff); then the call takes 14 ms. If the call were left out, the end of the VM
    would wait as long. So a thread makes the call, while the caller does something else, and
    ``settle`` is to follow before a guest runs.

    :raises HostError: KVM cannot create the VM.
    """

    def __init__(self, kvm: Kvm) -> None:
        super().__init__(ioctl(kvm.fileno(), "KVM_CREATE_VM"))
        self._pending: Any = None
        try:
            self._add_chips()
            # Before the call that waits: this one would wait for the same grace periods.
            set_routes(self.fileno(), {})
            if kvm.extension("KVM_CAP_REINJECT_CONTROL"):
                self._control = ffi.new("struct kvm_reinject_control *")
                self._pending = lib.pv_ioctl_begin(
                    self.fileno(), lib.KVM_REINJECT_CONTROL, self._control
                )
                if self._pending == ffi.NULL:
                    raise MemoryError
        except BaseException:
            self.close()
            raise

    def _add_chips(self) -> None:
        ioctl(self.fileno(), "KVM_SET_TSS_ADDR", KVM_TSS_BASE)
        identity = ffi.new("uint64_t *", KVM_IDENTITY_MAP)
        ioctl(self.fileno(), "KVM_SET_IDENTITY_MAP_ADDR", identity)
        ioctl(self.fileno(), "KVM_CREATE_IRQCHIP")
        error = lib.pv_pic_set_up(self.fileno(), sum(1 << line for line in PIC_PCI_LINES))
        if error:
            raise HostError(f"cannot set up the 8259s: {os.strerror(-error)}")
        pit = ffi.new("struct kvm_pit_config *")
        # KVM answers port 0x61, too, through which Linux calibrates the TSC.
        pit.flags = lib.KVM_PIT_SPEAKER_DUMMY
        ioctl(self.fileno(), "KVM_CREATE_PIT2", pit)

    def settle(self) -> None:
        """Wait until the VM is complete. A second call does nothing.

        :raises HostError: KVM refuses.
        """
        error = self._end()
        if error < 0:
            raise HostError(f"KVM_REINJECT_CONTROL failed: {os.strerror(-error)}")

    def _end(self) -> int:
        pending, self._pending = self._pending, None
        return lib.pv_ioctl_end(pending) if pending else 0

    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""
        self._end()
        super().close()


def set_routes(fd: int, msi: Mapping[int, tuple[int, int]]) -> None:
    """Have GSIs of the VM ``fd`` reach its interrupt chips, and others be MSI messages.

    :param msi: GSI -> address and data.
    :raises HostError: KVM does not take the routes; they are as before.
    """
    routes: list[tuple[int, int, int, int, int]] = []
    for pin in range(8):
        routes.append((pin, lib.KVM_IRQ_ROUTING_IRQCHIP, lib.KVM_IRQCHIP_PIC_MASTER, pin, 0))
        routes.append((pin + 8, lib.KVM_IRQ_ROUTING_IRQCHIP, lib.KVM_IRQCHIP_PIC_SLAVE, pin, 0))
    for pin in range(IOAPIC_PINS):
        # As on every PC with an IO-APIC, the timer (line 0) is wired to pin 2. Line 2 is the
        # cascade of the PICs and has no pin.
        if pin != 2:
            target = 2 if pin == 0 else pin
            routes.append((pin, lib.KVM_IRQ_ROUTING_IRQCHIP, lib.KVM_IRQCHIP_IOAPIC, target, 0))
    for slot, line in enumerate(PIC_PCI_LINES):
        chip = lib.KVM_IRQCHIP_PIC_SLAVE if line > 7 else lib.KVM_IRQCHIP_PIC_MASTER
        gsi = GSI_PCI_BASE + slot
        routes.append((gsi, lib.KVM_IRQ_ROUTING_IRQCHIP, chip, line % 8, 0))
    for gsi, (address, data) in msi.items():
        routes.append((gsi, lib.KVM_IRQ_ROUTING_MSI, address & 0xFFFFFFFF, address >> 32, data))
    table = ffi.new("struct kvm_irq_routing *", {"entries": len(routes)})
    table.nr = len(routes)
    for entry, (gsi, kind, a, b, c) in zip(table.entries[0 : len(routes)], routes, strict=True):
        entry.gsi, entry.type = gsi, kind
        if kind == lib.KVM_IRQ_ROUTING_MSI:
            entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = a, b, c
        else:
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = a, b
    ioctl(fd, "KVM_SET_GSI_ROUTING", table)


class Ahead(Closing):
    """KVM, and a VM of it, for one machine: made before anything else of the machine, and owned
    until ``take``, for which an error waits, too.
    """

    def __init__(self) -> None:
        self._error: PyvmmError | None = None
        self._owned: list[Fd] = []
        try:
            self._kvm = Kvm()
            self._owned.append(self._kvm)
            self._vm = BlankVm(self._kvm)
            self._owned.append(self._vm)
        except PyvmmError as e:
            self._error = e

    def take(self) -> tuple[Kvm, BlankVm]:
        """KVM and the VM, which the caller owns from here on. Call this once.

        :raises PyvmmError: as for ``Kvm``, or KVM cannot create the VM.
        """
        if self._error is not None:
            raise self._error
        assert self._owned
        self._owned.clear()
        return self._kvm, self._vm

    def close(self) -> None:
        """Release what nobody has taken. A second call does nothing."""
        while self._owned:
            self._owned.pop().close()
