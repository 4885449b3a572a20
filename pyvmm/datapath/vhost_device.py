"""vhost devices of the kernel, by their ioctls (linux/vhost.h): owner, features, memory, rings,
worker. ``datapath.vdpa_device`` has those of vhost-vdpa.
"""

from __future__ import annotations

import errno
import os
import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, UsageError, VhostMissing
from pyvmm.fd import EventFd, Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.datapath.base import Vring
    from pyvmm.memory import GuestMemory

VHOST_NET = "/dev/vhost-net"


def open_device(path: str) -> int:
    """Open a device; returns a descriptor. :raises OSError: from open(2)."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)


class VhostFd(Fd):
    """A vhost device of the kernel: its ioctls, and those that all kinds of devices have.

    :param recorder: a ``kvm.recorder.Scope`` for every ioctl, or None.
    :param fd: the device, if somebody has opened it; owned from here on.
    :raises OSError: the device cannot be opened.
    """

    def __init__(self, path: str, recorder: Any = None, fd: int | None = None) -> None:
        self._recorder, self._name = recorder, path.rpartition("/")[2]
        super().__init__(open_device(path) if fd is None else fd)

    def ioctl(self, name: str, arg: Any = ffi.NULL) -> Any:
        """Make an ioctl; returns ``arg``.

        :raises HostError: the kernel refuses.
        """
        begin = time.monotonic_ns() if self._recorder is not None else 0
        ret = lib.pv_ioctl(self.fileno(), getattr(lib, name), arg)
        if begin:
            args = {**_fields(arg), "device": self._name, "returns": int(ret)}
            self._recorder.step(name, begin, args)
        if ret < 0:
            raise HostError(f"{name} failed: {os.strerror(-ret)}")
        return arg

    def number(self, name: str, kind: str = "uint64_t") -> int:
        """Make an ioctl that returns one number of the C type ``kind``.

        :raises HostError: as ``ioctl``.
        """
        return int(self.ioctl(name, ffi.new(f"{kind} *"))[0])

    def state(self, name: str, ring: int, value: int) -> int:
        """Make an ioctl with ``struct vhost_vring_state``; returns its number after the call.

        :raises HostError: as ``ioctl``.
        """
        arg = ffi.new("struct vhost_vring_state *", {"index": ring, "num": value})
        return int(self.ioctl(name, arg).num)

    def file(self, name: str, ring: int, fd: int) -> None:
        """Make an ioctl with ``struct vhost_vring_file``.

        :raises HostError: as ``ioctl``.
        """
        self.ioctl(name, ffi.new("struct vhost_vring_file *", {"index": ring, "fd": fd}))

    def base(self, ring: int) -> int:
        """VHOST_GET_VRING_BASE of a stopped ring: the position."""
        return self.state("VHOST_GET_VRING_BASE", ring, 0)


class Vhost(VhostFd):
    """A device of vhost-net: one queue pair, ring 0 receives, ring 1 transmits. Owned by the
    process that opened it.

    :param recorder: a ``kvm.recorder.Scope`` for every ioctl, or None.
    :ivar features: bits that the kernel offers.
    :ivar worker: thread id of the kernel's worker, None where it is hidden. :ivar worker_name:
        ``vhost-PID``.
    :raises VhostMissing: no such device, or forbidden.
    """

    def __init__(self, path: str = VHOST_NET, recorder: Any = None) -> None:
        try:
            super().__init__(path, recorder)
        except PermissionError as e:
            raise VhostMissing(
                f"no permission to open {path}",
                "join its group (usually kvm), or use --net emulated",
            ) from e
        except OSError as e:
            raise VhostMissing(
                f"cannot open {path}: {e.strerror}",
                "as root: modprobe vhost_net; or use --host testbed or --net emulated",
            ) from e
        try:
            before = _tasks()
            self.ioctl("VHOST_SET_OWNER")
            self.worker, self.worker_name = _worker(_tasks() - before)
            self.features = self.number("VHOST_GET_FEATURES")
        except BaseException:
            self.close()
            raise

    def pin(self, cpu: int) -> None:
        """Let the worker run on ``cpu`` only.

        :raises UsageError: no such CPU. :raises HostError: not allowed, or the worker cannot be
            seen from here.
        """
        if self.worker is None:
            raise HostError(
                "the vhost worker cannot be seen from this PID namespace", "leave out worker-cpu="
            )
        try:
            os.sched_setaffinity(self.worker, {cpu})
        except OSError as e:
            if e.errno == errno.EINVAL:
                raise UsageError(
                    f"--net: worker-cpu={cpu} is not to be had",
                    f"online: {', '.join(map(str, sorted(os.sched_getaffinity(0))))}",
                ) from e
            raise HostError(
                f"cannot pin the vhost worker: {e.strerror}",
                "run as root, or leave out worker-cpu=",
            ) from e

    def set_features(self, acked: int) -> None:
        """VHOST_SET_FEATURES: of the negotiated bits those that are the kernel's."""
        self.ioctl("VHOST_SET_FEATURES", ffi.new("uint64_t *", acked & self.features))

    def set_memory(self, memory: GuestMemory) -> None:
        """VHOST_SET_MEM_TABLE: all of the guest's RAM, by our addresses."""
        table = ffi.new("struct vhost_memory *", {"regions": len(memory.regions)})
        table.nregions = len(memory.regions)
        for entry, r in zip(table.regions[0 : table.nregions], memory.regions, strict=True):
            entry.guest_phys_addr, entry.memory_size, entry.userspace_addr = r.gpa, r.size, r.host
        self.ioctl("VHOST_SET_MEM_TABLE", table)

    def set_ring(self, ring: int, vring: Vring, memory: GuestMemory, err: EventFd) -> None:
        """Everything of a ring but its backend. NUM and BASE first: ADDR is checked against them.

        :param err: signalled when the worker finds the ring malformed; lent.
        """
        size = vring.size
        self.state("VHOST_SET_VRING_NUM", ring, size)
        self.state("VHOST_SET_VRING_BASE", ring, vring.base)
        addr = ffi.new("struct vhost_vring_addr *")
        addr.index = ring
        desc, avail, used = vring.format.areas(size)
        addr.desc_user_addr = memory.host_address(vring.desc, desc.length)
        addr.avail_user_addr = memory.host_address(vring.avail, avail.length)
        addr.used_user_addr = memory.host_address(vring.used, used.length)
        self.ioctl("VHOST_SET_VRING_ADDR", addr)
        self.file("VHOST_SET_VRING_ERR", ring, err.fileno())
        self.file("VHOST_SET_VRING_CALL", ring, vring.call.fileno())
        self.file("VHOST_SET_VRING_KICK", ring, vring.kick.fileno())

    def set_base(self, ring: int, position: int) -> None:
        """VHOST_SET_VRING_BASE of a stopped ring."""
        self.state("VHOST_SET_VRING_BASE", ring, position)

    def set_poll(self, ring: int, usecs: int) -> None:
        """VHOST_SET_VRING_BUSYLOOP_TIMEOUT: let the worker look for more work for so long before it
        sleeps.
        """
        self.state("VHOST_SET_VRING_BUSYLOOP_TIMEOUT", ring, usecs)

    def clear_ring(self, ring: int) -> None:
        """Let go of a stopped ring's eventfds: its kicks would wake the worker for nothing."""
        for name in ("VHOST_SET_VRING_KICK", "VHOST_SET_VRING_CALL", "VHOST_SET_VRING_ERR"):
            self.file(name, ring, lib.VHOST_FILE_UNBIND)

    def set_backend(self, ring: int, fd: int) -> None:
        """VHOST_NET_SET_BACKEND: start the ring on a tap; -1 stops it and waits for what the worker
        is doing.
        """
        self.file("VHOST_NET_SET_BACKEND", ring, fd)


def _fields(arg: Any) -> dict[str, object]:
    """An ioctl's argument as it is after the call, for the trace: a struct's fields, or one
    number.
    """
    if arg == ffi.NULL:
        return {}
    item = ffi.typeof(arg).item
    if item.kind != "struct":
        return {"fd" if item.cname == "int" else "value": int(arg[0])}
    if item.cname == "struct vhost_vdpa_config":
        return {"off": int(arg.off), "len": int(arg.len), "buf": bytes(arg.buf[0 : arg.len]).hex()}

    def of(struct: Any, fields: Any) -> dict[str, object]:
        out: dict[str, object] = {}
        for name, field in fields:
            value = getattr(struct, name)
            if field.type.kind == "array":
                out[name] = [of(e, field.type.item.fields) for e in value[0 : struct.nregions]]
            else:
                out[name] = int(value)
        return out

    return of(arg, item.fields)


def _tasks() -> set[str]:
    """Processes, kernel threads among them, and our own threads."""
    found = set()
    for directory in ("/proc", "/proc/self/task"):
        with os.scandir(directory) as entries:
            found |= {entry.name for entry in entries if entry.name.isdecimal()}
    return found


def _worker(new: set[str]) -> tuple[int | None, str]:
    """Which of the new tasks is the worker, and its name: a kernel thread named after the thread
    that became owner, since Linux 6.4 a thread of ours named after the process."""
    names = {f"vhost-{threading.get_native_id()}", f"vhost-{os.getpid()}"}
    for task in sorted(new, key=int):
        try:
            with open(f"/proc/{task}/comm", encoding="ascii") as f:
                name = f.read().strip()
        except OSError:
            continue
        if name in names:
            return int(task), name
    return None, ""
