"""The errors that pyvmm raises on purpose. Each carries its cause and a remedy; each class has one
exit code.

``pyvmm run -- COMMAND`` returns the exit status of the guest's command. Exit codes are therefore
101 and higher, except for 2 (wrong usage): shells and test programs use 0 to 63 themselves.
docs/exit-codes.md has the table.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The beginning of a hint, if ``word`` looks like one of ``choices`` with a mistake in it; else
    empty.
    """
    import difflib

    close = difflib.get_close_matches(word, list(choices), 1)
    return f"did you mean {close[0]}? " if close else ""


class PyvmmError(Exception):
    """The base class of all errors. ``str(e)`` is the one line that the user sees.

    :param cause: what is wrong, including the offending value.
    :param hint: what the user can do about the error; may be empty.
    """

    exit_code = 101

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.cause}; {self.hint}" if self.hint else self.cause


class UsageError(PyvmmError):
    """An option, size, mode or key that makes no sense."""

    exit_code = 2


class HostError(PyvmmError):
    """A system call that should work has failed on the host."""

    exit_code = 101


class KvmMissing(PyvmmError):
    """There is no /dev/kvm."""

    exit_code = 102


class KvmForbidden(PyvmmError):
    """/dev/kvm exists but may not be opened."""

    exit_code = 103


class KvmUnsuitable(PyvmmError):
    """KVM's API version is wrong, a capability is missing, or this KVM cannot run the requested
    guest.
    """

    exit_code = 104


class ImageError(PyvmmError):
    """The kernel, the initrd, the command line or a firmware table cannot be loaded."""

    exit_code = 105


class NetError(PyvmmError):
    """A tap or a network namespace cannot be created or opened."""

    exit_code = 106


class NetForbidden(NetError):
    """The user may not create or open a tap or namespace."""

    exit_code = 107


class RingFault(PyvmmError):
    """The guest's virtqueue is malformed. The device answers with NEEDS_RESET; users never see
    this error.
    """


class VhostMissing(PyvmmError):
    """/dev/vhost-net is missing or may not be opened."""

    exit_code = 108


class MemoryShort(PyvmmError):
    """The host cannot provide the guest's memory."""

    exit_code = 109


class TestbedError(PyvmmError):
    """The testbed is not set up, did not start, or died."""

    __test__ = False  # not a pytest class
    exit_code = 110


class BuildError(PyvmmError):
    """A guest image cannot be built."""

    exit_code = 111


class VhostUserError(PyvmmError):
    """The other side of a vhost-user socket cannot be reached, lacks a feature that pyvmm needs, or
    broke the protocol.
    """

    exit_code = 112


class MachineMissing(PyvmmError):
    """No running machine has that name, or its control socket does not answer."""

    exit_code = 113


class ControlError(PyvmmError):
    """The machine refused a command that came through its control socket.

    :ivar kind: the QMP error class, such as ``GenericError`` or ``CommandNotFound``.
    :ivar desc: the text of the QMP error, without what ``cause`` adds to it.
    """

    exit_code = 114

    def __init__(
        self, cause: str, hint: str = "", *, kind: str = "GenericError", desc: str = ""
    ) -> None:
        super().__init__(cause, hint)
        self.kind, self.desc = kind, desc or cause


class CommandFailed(PyvmmError):
    """A command in the guest (``Machine.run``) failed, did not end in time, or cannot be run
    there.
    """

    exit_code = 115


class GuestHang(PyvmmError):
    """The guest makes no progress and cannot make any more (``--hang-timeout``)."""

    exit_code = 116


class BudgetBroken(PyvmmError):
    """The guest caused more exits, kicks or interrupts than ``--budget`` allows."""

    exit_code = 117


class GuestTrouble(PyvmmError):
    """The guest kernel reported a problem that ``--fail-on`` names, such as an oops, a warning or a
    stall.
    """

    exit_code = 118


class GuestEnded(PyvmmError):
    """The guest powered off before its command had ended."""

    exit_code = 119


class GuestPanic(PyvmmError):
    """The guest kernel panicked."""

    exit_code = 120


class GuestReboot(PyvmmError):
    """The guest asked for a reboot, which ``--on-reboot exit`` forbids."""

    exit_code = 121


class TripleFault(PyvmmError):
    """The guest triple-faulted (KVM_EXIT_SHUTDOWN)."""

    exit_code = 122


class KvmRunError(PyvmmError):
    """KVM_RUN failed: FAIL_ENTRY, INTERNAL_ERROR, EFAULT."""

    exit_code = 123


class GuestTimeout(PyvmmError):
    """The run did not end within --timeout."""

    exit_code = 124


class VdpaError(PyvmmError):
    """A vDPA device is missing, forbidden, in use or no network card; or it cannot do what the
    machine needs.
    """

    exit_code = 125


class ThreadStopped(PyvmmError):
    """A thread of pyvmm's made a system call that it never makes by itself: somebody else may have
    been in control of the thread.
    """

    exit_code = 128


class SandboxError(PyvmmError):
    """The process cannot be confined as ``--sandbox on`` wants it (docs/sandbox.md)."""

    exit_code = 132


class ShareError(PyvmmError):
    """A directory of the host cannot be shared with the guest, or the sharing has broken off."""

    exit_code = 131


class DiskError(PyvmmError):
    """An image of the host cannot be a disk of the guest, or the disk has broken off."""

    exit_code = 133


class JailError(PyvmmError):
    """There can be no jail as ``--jail`` wants it, or the jail's limits were too low for the run
    (docs/jail.md).
    """

    exit_code = 134
