"""KVM from Python: the system, a VM, its vCPUs, interrupt routes and statistics.

All request numbers and structs come from the kernel's headers through cffi. The requests are
described in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import os
import struct

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, KvmForbidden, KvmMissing, KvmUnsuitable
from pyvmm.fd import Fd

#: struct kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx, and padding. To handle seven
#: fields of 76 entries by their names would take longer than KVM takes for them.
CPUID_ENTRY = "7I12x"
#: The capabilities without which pyvmm cannot run.
REQUIRED = (
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_IRQFD",
    "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_IOEVENTFD",
    "KVM_CAP_PIT2",
    "KVM_CAP_IMMEDIATE_EXIT",
)


def ioctl(fd: int, name: str, arg: object = 0) -> int:
    """Make one KVM ioctl.

    :param fd: the descriptor of the system, the VM or the vCPU.
    :param name: the name of the request in the kernel's headers.
    :param arg: an integer or a cffi pointer.
    :returns: the ioctl's result, 0 or more.
    :raises HostError: the ioctl failed. The error has the request's name and the errno's text.
    """
    pointer = ffi.cast("void *", arg) if isinstance(arg, int) else arg
    ret: int = lib.pv_ioctl(fd, getattr(lib, name), pointer)
    if ret < 0:
        raise HostError(f"{name} failed: {os.strerror(-ret)}")
    return ret


class Kvm(Fd):
    """/dev/kvm, opened and checked. The object owns the descriptor.

    :raises KvmMissing: the device does not exist or cannot be opened.
    :raises KvmForbidden: the user may not open it.
    :raises KvmUnsuitable: it has another API version, or lacks a capability of ``REQUIRED``.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._extensions: dict[str, int] = {}
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError as e:
            raise KvmMissing(
                f"there is no {path}", "use --host testbed, or a machine with KVM"
            ) from e
        except PermissionError as e:
            raise KvmForbidden(
                f"no permission to open {path}",
                "join its group (usually: adduser $USER kvm) and log in again",
            ) from e
        except OSError as e:
            raise KvmMissing(
                f"cannot open {path}: {e.strerror}",
                "load kvm_intel or kvm_amd, or use --host testbed",
            ) from e
        try:
            self._check(path)
        except BaseException:
            self.close()
            raise

    def _check(self, path: str) -> None:
        try:
            version = ioctl(self.fileno(), "KVM_GET_API_VERSION")
        except HostError as e:
            raise KvmUnsuitable(
                f"{path} does not answer as KVM does ({e})", "is it the right device?"
            ) from e
        if version != lib.KVM_API_VERSION:
            raise KvmUnsuitable(
                f"KVM API version {version}, not {lib.KVM_API_VERSION}",
                "use a kernel from this millennium's second decade",
            )
        missing = [name for name in REQUIRED if not self.extension(name)]
        if missing:
            raise KvmUnsuitable(
                f"this KVM lacks {', '.join(missing)}", "use a newer kernel or --host testbed"
            )

    def extension(self, name: str) -> int:
        """KVM_CHECK_EXTENSION for a KVM_CAP_* name; 0 if KVM lacks the capability. KVM is asked
        once, and not by each vCPU.
        """
        known = self._extensions.get(name)
        if known is None:
            known = ioctl(self.fileno(), "KVM_CHECK_EXTENSION", getattr(lib, name))
            self._extensions[name] = known
        return known

    def mmap_size(self) -> int:
        """The size in bytes of a vCPU's shared area: ``struct kvm_run`` and the pages behind it."""
        return ioctl(self.fileno(), "KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self) -> list[list[int]]:
        """KVM_GET_SUPPORTED_CPUID as rows of function, index, flags, eax, ebx, ecx, edx."""
        table = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
        table.nent = 256
        ioctl(self.fileno(), "KVM_GET_SUPPORTED_CPUID", table)
        data = ffi.buffer(table.entries, table.nent * struct.calcsize(CPUID_ENTRY))
        return [list(row) for row in struct.iter_unpack(CPUID_ENTRY, data)]
