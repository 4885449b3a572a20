"""One virtual CPU: its start state, its run loop and its exit ledger."""

from __future__ import annotations

import os
import struct
import threading
from functools import cache

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError
from pyvmm.fd import Fd
from pyvmm.kvm import CPUID_ENTRY, ioctl
from pyvmm.kvm.cpuid import for_vcpu, host_brand, with_brand
from pyvmm.kvm.stats import Stats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    from pyvmm.boot import BootState
    from pyvmm.bus import Bus
    from pyvmm.kvm.cpu import Cpu
    from pyvmm.kvm.vm import Vm

    State = Literal[
        "not started", "alive", "halted with interrupts off", "runs with interrupts off"
    ]

MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE_WB = 1 << 11 | 6
MSR_MISC_ENABLE = 0x1A0
FAST_STRINGS = 1

#: The values that ``Vcpu.run`` returns (enum pv_stop, cext/vcpu.h).
STOP_ASKED, STOP_PIO, STOP_MMIO = lib.PV_STOP_ASKED, lib.PV_STOP_PIO, lib.PV_STOP_MMIO
STOP_OTHER, STOP_ERROR = lib.PV_STOP_OTHER, lib.PV_STOP_ERROR
EXIT_SHUTDOWN, EXIT_FAIL_ENTRY = lib.KVM_EXIT_SHUTDOWN, lib.KVM_EXIT_FAIL_ENTRY

#: What ``Vcpu.state`` says. Only an ALIVE vCPU can take an interrupt, and only a start-up interrupt
#: wakes a NOT_STARTED one.
NOT_STARTED: State = "not started"
ALIVE: State = "alive"
HALTED_OFF: State = "halted with interrupts off"
RUNS_OFF: State = "runs with interrupts off"
RFLAGS_IF = 1 << 9

CR0_PE, CR0_ET, CR0_NE, CR0_PG = 1, 1 << 4, 1 << 5, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10


@cache
def reasons() -> dict[int, str]:
    """KVM_EXIT_* -> its name, in lower case without its prefix."""
    return {
        getattr(lib, name): name.removeprefix("KVM_EXIT_").lower()
        for name in dir(lib)
        if name.startswith("KVM_EXIT_")
    } | {lib.PV_EXIT_ERROR: "error"}


class ExitRecord:
    """One line of the exit ledger: all exits for one cause.

    :ivar reason: the name of KVM_EXIT_* in lower case without its prefix. ``intr`` also covers
        EINTR; ``error`` is any other errno.
    :ivar addr: the port or guest-physical address that the guest accessed; for other reasons the
        suberror or the errno.
    :ivar size: bytes per access.
    :ivar write: whether the guest wrote.
    :ivar region: the id of the bus region, 0 for none.
    :ivar reg: the register of that region (pv_bus_register, cext/bus.h).
    :ivar count: how often KVM_RUN returned.
    :ivar time: the time that these exits kept the vCPU outside the guest, in ns.
    :ivar units: the number of accesses. One exit of a string instruction has several.
    """

    __slots__ = ("addr", "count", "reason", "reg", "region", "size", "time", "units", "write")

    def __init__(
        self,
        reason: str,
        addr: int,
        size: int,
        write: bool,
        region: int,
        reg: int,
        count: int,
        time: int,
        units: int,
    ) -> None:
        self.reason, self.addr, self.size, self.write = reason, addr, size, write
        self.region, self.reg, self.count, self.time, self.units = region, reg, count, time, units


class VcpuSnapshot:
    """A copy of one vCPU's ledger at one moment. Only the copying has to be quick; ``records`` can
    decode the copy later.
    """

    __slots__ = ("_count", "_lines", "_overflow")

    def __init__(self, c: Any) -> None:
        size = c.used + 16  # room for lines that the vCPU adds meanwhile
        self._lines = ffi.new("struct pv_exit_slot[]", size)
        self._count = lib.pv_vcpu_ledger(c, self._lines, size)
        self._overflow = c.overflow, c.overflow_time

    def records(self) -> list[ExitRecord]:
        """The lines of the ledger. One record with the reason ``overflow`` sums up the exits that
        found the ledger full.
        """
        out = []
        for s in self._lines[0 : self._count]:
            reason = reasons().get(s.reason, f"reason-{s.reason}")
            out.append(
                ExitRecord(
                    reason, s.addr, s.size, bool(s.write), s.region, s.reg, s.count, s.time, s.units
                )
            )
        n, time = self._overflow
        if n:
            out.append(ExitRecord("overflow", 0, 0, False, 0, 0, n, time, n))
        return out


class Vcpu:
    """One vCPU. The object owns its descriptor and its state in C. One thread at a time may call
    ``run``.

    :param vm: lent.
    :param index: the vCPU's number, 0 to ``cpus`` - 1.
    :param cpus: how many vCPUs the machine has.
    :param bus: lent. It decides which exits C answers and which come to Python.
    :param cpu: how the CPU differs from the host's; None: in nothing.
    :raises HostError: KVM cannot create the vCPU.
    :raises UsageError: the host cannot give this CPU.
    :ivar thread_id: the system's id of the thread that runs the vCPU; 0 until it runs.
    :ivar threads: of all that have run it: a machine that starts over has new threads.
    """

    #: Held by a kick, so that ``close`` does not free what the kick uses: a timer or a user's
    #: thread may kick late. One lock for all vCPUs is enough: kicks are short and rare.
    _kicking = threading.Lock()

    def __init__(self, vm: Vm, index: int, cpus: int, bus: Bus, cpu: Cpu | None = None) -> None:
        self.index = index
        self._cpu = cpu
        self.thread_id = 0
        self.threads: set[int] = set()
        self._vm = vm
        self._cpus = cpus
        if lib.pv_vcpu_init():  # one call per process would do; further calls do no harm
            raise HostError("cannot install the vCPU signal handler")
        #: KVM's statistics of this vCPU; None if the kernel has none.
        self.stats: Stats | None = None
        self._fd = self._create()
        self.c = lib.pv_vcpu_new(self._fd.fileno(), vm.kvm.mmap_size(), bus.c)
        if self.c == ffi.NULL:
            self._close_fds()
            raise HostError("cannot map the vCPU's run area")

    def _create(self) -> Fd:
        fd = Fd(ioctl(self._vm.fileno(), "KVM_CREATE_VCPU", self.index))
        try:
            kvm = self._vm.kvm
            rows = for_vcpu(
                supported_cpuid(kvm),
                self.index,
                self._cpus,
                bool(kvm.extension("KVM_CAP_TSC_DEADLINE_TIMER")),
                self._cpu,
            )
            table = ffi.new("struct kvm_cpuid2 *", {"entries": len(rows)})
            table.nent = len(rows)
            packed = b"".join([struct.pack(CPUID_ENTRY, *row) for row in rows])
            ffi.memmove(table.entries, packed, len(packed))
            ioctl(fd.fileno(), "KVM_SET_CPUID2", table)
            for msr, value in (
                (MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WB),
                (MSR_MISC_ENABLE, FAST_STRINGS),
            ):
                msrs = ffi.new("struct kvm_msrs *", {"entries": 1})
                msrs.nmsrs = 1
                msrs.entries[0].index, msrs.entries[0].data = msr, value
                # The result is ignored: a KVM that lacks one of these MSRs is good enough.
                lib.pv_ioctl(fd.fileno(), lib.KVM_SET_MSRS, msrs)
            self.stats = Stats(fd.fileno()) if kvm.extension("KVM_CAP_BINARY_STATS_FD") else None
        except BaseException:
            fd.close()
            raise
        return fd

    def _close_fds(self) -> None:
        self._fd.close()
        if self.stats is not None:
            self.stats.close()

    def fileno(self) -> int:
        """The vCPU's descriptor."""
        return self._fd.fileno()

    def detach(self) -> None:
        """Close the KVM vCPU and keep the ledger. Call this before ``Vm.recreate``."""
        lib.pv_vcpu_attach(self.c, -1, 0)
        self._close_fds()

    def reattach(self) -> None:
        """Create a new KVM vCPU, in its reset state, in the recreated VM.

        :raises HostError: KVM cannot create it.
        """
        self._fd = self._create()
        error = lib.pv_vcpu_attach(self.c, self._fd.fileno(), self._vm.kvm.mmap_size())
        if error:
            raise HostError(f"cannot map the vCPU's run area: {os.strerror(-error)}")

    def close(self) -> None:
        """Release the vCPU once its thread has left ``run``. A second call does nothing."""
        with self._kicking:
            c, self.c = self.c, ffi.NULL
        if c != ffi.NULL:
            lib.pv_vcpu_free(c)
            self._close_fds()

    # --- start state ------------------------------------------------------------------------------

    def set_boot_state(self, boot: BootState) -> None:
        """Set the registers with which the boot loader wants the vCPU to start. This is for the
        boot CPU only; the others wait for a start-up interrupt (SIPI).
        """
        sregs = ffi.new("struct kvm_sregs *")
        ioctl(self.fileno(), "KVM_GET_SREGS", sregs)
        if boot.mode != "real16":
            self._protected(sregs, long_mode=boot.mode == "long64")
            sregs.gdt.base, sregs.gdt.limit = boot.gdt_base, 0x1F
            sregs.cr0 = CR0_PE | CR0_ET | CR0_NE
            if boot.mode == "long64":
                sregs.cr3, sregs.cr4 = boot.cr3, CR4_PAE
                sregs.cr0 |= CR0_PG
                sregs.efer = EFER_LME | EFER_LMA
        else:  # at reset all segments are 0 except CS, whose base makes the reset vector
            sregs.cs.selector, sregs.cs.base = boot.segment, boot.segment << 4
        ioctl(self.fileno(), "KVM_SET_SREGS", sregs)
        regs = ffi.new("struct kvm_regs *")
        regs.rflags = 2
        for name, value in boot.regs.items():
            setattr(regs, name, value)
        ioctl(self.fileno(), "KVM_SET_REGS", regs)

    @staticmethod
    def _protected(sregs: object, *, long_mode: bool) -> None:
        """Set flat segments: CS is 0x10, the others are 0x18 (the 64-bit boot protocol in
        Documentation/arch/x86/boot.rst; PVH's start state is compatible).
        """
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            seg = getattr(sregs, name)
            code = name == "cs"
            seg.base, seg.limit, seg.g, seg.s, seg.present, seg.dpl = 0, 0xFFFFFFFF, 1, 1, 1, 0
            seg.selector = 0x10 if code else 0x18
            seg.type = 0xB if code else 0x3
            seg.l = int(code and long_mode)
            seg.db = int(not (code and long_mode))
            seg.unusable = 0
        tr = sregs.tr  # type: ignore[attr-defined]
        tr.base, tr.limit, tr.type, tr.present, tr.s, tr.g = 0, 0x67, 0xB, 1, 0, 0

    # --- running ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Run the guest until Python is needed; returns one of STOP_*."""
        stop: int = lib.pv_vcpu_run(self.c)
        return stop

    def kick(self) -> None:
        """Make ``run`` return STOP_ASKED soon. Any thread may call this, also after ``close``."""
        with self._kicking:
            if self.c != ffi.NULL:
                lib.pv_vcpu_kick(self.c)

    @property
    def inside(self) -> bool:
        """Whether it may be in the guest now. Any thread, also after ``close``."""
        with self._kicking:
            return bool(self.c != ffi.NULL and lib.pv_vcpu_inside(self.c))

    def rested(self) -> None:
        """The machine goes on after a pause: do not count the pause as the latest exit's time, and
        tell the guest's clock of it (KVM_KVMCLOCK_CTRL), so that the guest does not take the pause
        for a lockup. The thread that runs the vCPU calls this.
        """
        lib.pv_vcpu_rested(self.c)

    def registers(self) -> dict[str, int]:
        """The general registers and the main control registers by name, for messages. Call this
        from the vCPU's thread or while the vCPU does not run: KVM waits for KVM_RUN to return.
        """
        regs = ffi.new("struct kvm_regs *")
        sregs = ffi.new("struct kvm_sregs *")
        ioctl(self.fileno(), "KVM_GET_REGS", regs)
        ioctl(self.fileno(), "KVM_GET_SREGS", sregs)
        names = [
            "rip",
            "rsp",
            "rflags",
            "rax",
            "rbx",
            "rcx",
            "rdx",
            "rsi",
            "rdi",
            "rbp",
            "r8",
            "r9",
            "r10",
            "r11",
            "r12",
            "r13",
            "r14",
            "r15",
        ]
        out: dict[str, int] = {name: getattr(regs, name) for name in names}
        out.update({name: getattr(sregs, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")})
        return out

    def reset_by_kvm(self) -> bool:
        """Whether the registers are those after reset: on AMD, KVM resets a vCPU that has
        triple-faulted, because the processor does not keep its state. Threads as ``registers``.
        """
        sregs = ffi.new("struct kvm_sregs *")
        ioctl(self.fileno(), "KVM_GET_SREGS", sregs)
        return sregs.cs.base == 0xFFFF0000 and self.registers()["rip"] == 0xFFF0

    def state(self) -> State:
        """The present state: NOT_STARTED, ALIVE, HALTED_OFF or RUNS_OFF. Call this from the vCPU's
        thread or while the vCPU does not run.
        """
        mp = ffi.new("struct kvm_mp_state *")
        ioctl(self.fileno(), "KVM_GET_MP_STATE", mp)
        if mp.mp_state in (
            lib.KVM_MP_STATE_UNINITIALIZED,
            lib.KVM_MP_STATE_INIT_RECEIVED,
            lib.KVM_MP_STATE_SIPI_RECEIVED,
        ):
            return NOT_STARTED
        if self.registers()["rflags"] & RFLAGS_IF:
            return ALIVE
        return HALTED_OFF if mp.mp_state == lib.KVM_MP_STATE_HALTED else RUNS_OFF

    # --- ledger -----------------------------------------------------------------------------------

    @property
    def runs(self) -> int:
        """How often KVM_RUN has returned so far."""
        n: int = self.c.runs
        return n

    def ledger(self) -> list[ExitRecord]:
        """The exit ledger at this moment. It is exact once ``run`` has returned; while the vCPU
        runs, each line may lack its latest exit.
        """
        return self.snapshot().records()

    def snapshot(self) -> VcpuSnapshot:
        """Copy the ledger, to decode it later. Any thread may call this."""
        return VcpuSnapshot(self.c)

    def settle(self) -> None:
        """End the time of the latest exit here, because ``run`` will not be called again soon. The
        thread that runs the vCPU calls this.
        """
        lib.pv_vcpu_settle(self.c)

    def trace(self, ring: Any) -> None:
        """Write every exit to ``ring`` (``struct pv_trace *``, lent). Call this before the first
        ``run``.
        """
        self.c.trace = ring


_cpuid_cache: list[list[int]] | None = None


def supported_cpuid(kvm: object) -> list[list[int]]:
    """The CPUID that KVM supports (``Kvm.supported_cpuid``), with the name of the host's CPU.

    KVM is asked once per process.
    """
    global _cpuid_cache
    if _cpuid_cache is None:
        rows = kvm.supported_cpuid()  # type: ignore[attr-defined]
        _cpuid_cache = with_brand(rows, host_brand())
    return _cpuid_cache
