"""How a machine ended: one word, and what helps to find the reason."""

from __future__ import annotations

from pyvmm.errors import (
    GuestHang,
    GuestPanic,
    GuestReboot,
    GuestTimeout,
    KvmRunError,
    PyvmmError,
    ShareError,
    ThreadStopped,
    TripleFault,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pyvmm.kvm.vcpu import State

    #: Kinds of ends that are errors: ``Outcome.error`` makes the exception of each.
    Abnormal = Literal[
        "panic", "reboot", "triple-fault", "kvm-error", "timeout", "hang", "thread-stopped", "share"
    ]
    Kind = Literal[Abnormal, "poweroff", "stopped", "debug-exit", "suspend"]


class Outcome:
    """How a machine ended.

    :ivar kind: ``poweroff``, ``reboot``, ``panic``, ``triple-fault``, ``kvm-error``, ``timeout``,
        ``hang``, ``thread-stopped``, ``share``, ``stopped`` or ``debug-exit``; inside the machine
        also ``suspend``, which ends nothing.
    :ivar status: exit status of the guest's command, or of a test kernel at the debug-exit port,
        0..255; None if there was no status.
    :ivar detail: one more line about the end; may be empty.
    :ivar registers: registers of the vCPU that explains the end, by name; None if no vCPU does.
    :ivar rips: the address at which each vCPU was at a time-out or hang, else empty.
    :ivar states: the state of each vCPU at a time-out or hang (``Vcpu.state``), else empty.
    :ivar asked: True if the user asked for the end through the control socket.
    """

    ERRORS: dict[Abnormal, tuple[type[PyvmmError], str]] = {
        "panic": (GuestPanic, "the guest kernel panicked"),
        "reboot": (GuestReboot, "the guest rebooted"),
        "triple-fault": (TripleFault, "the guest triple-faulted"),
        "kvm-error": (KvmRunError, "KVM_RUN failed"),
        "timeout": (GuestTimeout, "the guest did not end in time"),
        "hang": (GuestHang, "the guest hangs"),
        "thread-stopped": (ThreadStopped, "a thread of pyvmm's was stopped"),
        "share": (ShareError, "the guest cannot use what is shared with it"),
    }

    def __init__(
        self, kind: Kind, detail: str = "", registers: dict[str, int] | None = None
    ) -> None:
        self.kind = kind
        self.detail = detail
        self.registers = registers
        self.rips: list[int] = []
        self.states: list[State] = []
        self.status: int | None = None
        self.asked = False

    @property
    def abnormal(self) -> Abnormal | None:
        """``kind``, if the end is an error; None for an orderly end."""
        return next((kind for kind in self.ERRORS if kind == self.kind), None)

    def error(self) -> PyvmmError | None:
        """The exception to raise for an end that is an error; None for an orderly end."""
        if self.abnormal is None:
            return None
        error, text = self.ERRORS[self.abnormal]
        return error(f"{text}: {self.detail}" if self.detail else text)

    def __repr__(self) -> str:
        return f"Outcome({self.kind!r}, status={self.status}, detail={self.detail!r})"
