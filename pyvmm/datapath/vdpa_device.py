"""One vDPA device, by the ioctls of vhost-vdpa (linux/vhost.h) and its messages about memory.

The kernel's vDPA framework gives every device the same interface, whether it is hardware, the
kernel's simulator, or a process behind VDUSE. Rings and buffers are named by guest-physical
addresses, which the device translates by the mappings that it has been told (IOTLB).
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import time
from contextlib import suppress

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.datapath.vhost_device import VhostFd, open_device
from pyvmm.errors import HostError, VdpaError
from pyvmm.memory import PAGE
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_ACKNOWLEDGE,
    VIRTIO_CONFIG_S_DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_ID_NET,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.datapath.base import Vring
    from pyvmm.fd import EventFd

    #: An address that the device will use, bytes, and our address.
    Mapping = tuple[int, int, int]

DEVICES = "/sys/bus/vdpa/devices"
#: What we can use of the features of the kernel's side (VHOST_GET_BACKEND_FEATURES).
BACKEND_FEATURES = sum(
    1 << bit
    for bit in (
        lib.VHOST_BACKEND_F_IOTLB_MSG_V2,
        lib.VHOST_BACKEND_F_IOTLB_BATCH,
        lib.VHOST_BACKEND_F_IOTLB_ASID,
        lib.VHOST_BACKEND_F_SUSPEND,
        lib.VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK,
        lib.VHOST_BACKEND_F_IOTLB_PERSIST,
    )
)
#: Bytes of struct virtio_net_config that we look at: up to the MTU.
CONFIG_SIZE = 12
UP = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER


def find(device: str) -> tuple[str, str]:
    """The character device of a vDPA device, and the device's name; the name is empty if it is not
    known.

    :param device: a path, or a name as ``vdpa dev show`` has it.
    :raises VdpaError: there is no such device, or another driver than vhost_vdpa has it.
    """
    if "/" in device:
        return device, _name(os.path.basename(device))
    try:
        entries = os.listdir(f"{DEVICES}/{device}")
    except OSError as e:
        known = names()
        raise VdpaError(
            f"there is no vDPA device {device}",
            f"devices: {', '.join(known)}" if known else "make one: docs/vhost-vdpa.md",
        ) from e
    for entry in entries:
        if entry.startswith("vhost-vdpa-"):
            return f"/dev/{entry}", device
    bound = driver(device)
    release = f"echo {device} >/sys/bus/vdpa/drivers/{bound}/unbind; " if bound else ""
    raise VdpaError(
        f"the vDPA device {device} belongs to " + (f"the driver {bound}" if bound else "no driver"),
        f"as root: modprobe vhost_vdpa; {release}"
        f"echo {device} >/sys/bus/vdpa/drivers/vhost_vdpa/bind",
    )


def names() -> list[str]:
    """All vDPA devices of this machine."""
    try:
        return sorted(os.listdir(DEVICES))
    except OSError:
        return []


def driver(name: str) -> str:
    """The driver that has a vDPA device; empty if none has."""
    try:
        return os.path.basename(os.readlink(f"{DEVICES}/{name}/driver"))
    except OSError:
        return ""


class Given(VhostFd):
    """A vDPA device that is opened for a process that may not open it: in a jail. It stays open, so
    nobody else can have it, and no other device gets its number.

    :param device: what the user calls it, see ``find``.
    :ivar path, name: as of ``Vdpa``.
    :ivar owned: whether the kernel takes it for this process's. :ivar used: there is a ``Vdpa``
        of it.
    :raises VdpaError: it cannot be found or opened, or is none.
    """

    def __init__(self, device: str) -> None:
        (self.path, self.name), (fd,) = open_described([device])
        super().__init__(self.path, fd=fd)
        self.device, self.owned, self.used = device, False, False
        try:
            self.number("VHOST_VDPA_GET_DEVICE_ID", "uint32_t")
        except HostError as e:
            self.close()
            raise VdpaError(f"{self.path}: {e.cause}", "is it a vhost-vdpa device?") from e


#: By what the user calls them.
_given: dict[str, Given] = {}


def take(given: Sequence[Given]) -> None:
    """Use these devices by their descriptors, lent, from now on: in this process and its helper."""
    _given.update({one.device: one for one in given})


def open_described(words: list[str]) -> tuple[list[str], list[int]]:
    """Open a vDPA device; an operation of ``helper``.

    :param words: the device, see ``find``.
    :returns: the path, the device's name, or else the path's last part; and a descriptor.
    :raises VdpaError: it cannot be found or opened.
    """
    given = _given.get(words[0])
    path, name = (given.path, given.name) if given is not None else find(words[0])
    try:
        fd = os.dup(given.fileno()) if given is not None else open_device(path)
    except OSError as e:
        raise VdpaError(*_why_not(path, e)) from e
    return [path, name or os.path.basename(path)], [fd]


def _name(node: str) -> str:
    return next((n for n in names() if os.path.exists(f"{DEVICES}/{n}/{node}")), "")


class Vdpa(VhostFd):
    """A network card behind vhost-vdpa. The kernel lets one process at a time open it.

    :param device: see ``find``.
    :param recorder: a ``kvm.recorder.Scope`` for every ioctl and message, or None.
    :ivar path: of the character device. :ivar name: of the device, else the path's last part.
    :ivar features: virtio feature bits on offer. :ivar backend: those of the kernel's side in use.
    :ivar size_max: entries of the largest ring. :ivar rings: how many it has, control queue
        included.
    :ivar iova: the first and the last address that it can use.
    :ivar spaces: address spaces that it has.
    :raises VdpaError: no such device, forbidden, in use, or no network card.
    """

    #: Whose descriptor this one's is a copy of.
    _lent: Given | None = None

    def __init__(self, device: str, recorder: Any = None) -> None:
        self._lent = _given.get(device)
        if self._lent is not None and self._lent.used:
            raise VdpaError(*_why_not(self._lent.path, OSError(errno.EBUSY, "")))
        (self.path, self.name), (fd,) = helper.do("vdpa", device)
        super().__init__(self.path, recorder, fd)
        self.iova, self.spaces = (0, 0), 0  # nothing is mapped yet
        try:
            if self._lent is None:
                self.ioctl("VHOST_SET_OWNER")
            else:
                self._lent.used = True
                if not self._lent.owned:
                    self.ioctl("VHOST_SET_OWNER")
                    self._lent.owned = True
            kind = self.number("VHOST_VDPA_GET_DEVICE_ID", "uint32_t")
            if kind != VIRTIO_ID_NET:
                raise VdpaError(
                    f"the vDPA device {self.name} is of virtio type {kind}, no network card (1)",
                    "name another device=",
                )
            self.features = self.number("VHOST_GET_FEATURES")
            self.backend = self.number("VHOST_GET_BACKEND_FEATURES") & BACKEND_FEATURES
            self.ioctl("VHOST_SET_BACKEND_FEATURES", ffi.new("uint64_t *", self.backend))
            self.size_max = self.number("VHOST_VDPA_GET_VRING_NUM", "uint16_t")
            self.rings = self.number("VHOST_VDPA_GET_VQS_COUNT", "uint32_t")
            span = self.ioctl(
                "VHOST_VDPA_GET_IOVA_RANGE", ffi.new("struct vhost_vdpa_iova_range *")
            )
            self.iova = int(span.first), int(span.last)
            self.spaces = 1
            if self.has(lib.VHOST_BACKEND_F_IOTLB_ASID):
                self.spaces = self.number("VHOST_VDPA_GET_AS_NUM", "unsigned int")
        except HostError as e:
            self.close()
            raise VdpaError(f"{self.path}: {e.cause}", "is it a vhost-vdpa device?") from e
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the device, with the memory that it was lent. A second call does nothing."""
        given, self._lent = self._lent, None
        try:
            if given is not None:
                self._forget()
        finally:
            super().close()
            if given is not None:
                given.used = False

    def _forget(self) -> None:
        """Leave the device as a new descriptor would find it, because this one is not the last."""
        with suppress(HostError):  # a device that has died refuses the reset
            self.set_status(0)
        with suppress(HostError):
            self.call_for_config(None)
        first, last = self.iova
        middle = 1 << 63  # a size has 64 bits
        parts = [(first, min(last, middle - 1)), (max(first, middle), last)]
        every = [(begin, end - begin + 1, 0) for begin, end in parts if begin <= end]
        for space in range(self.spaces):
            with suppress(HostError):  # the kernel knows of none that has no memory
                self.unmap(every, space)

    def has(self, bit: int) -> bool:
        """Whether the kernel's side has a feature, VHOST_BACKEND_F_*."""
        return bool(self.backend >> bit & 1)

    @property
    def suspends(self) -> bool:
        """Whether it can stop so that its rings' positions are exact."""
        return self.has(lib.VHOST_BACKEND_F_SUSPEND)

    # --- status, features, configuration ----------------------------------------------------------

    def status(self) -> int:
        """VIRTIO_CONFIG_S_* as the device has them now."""
        return self.number("VHOST_VDPA_GET_STATUS", "uint8_t")

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets the device."""
        self.ioctl("VHOST_VDPA_SET_STATUS", ffi.new("uint8_t *", status))

    def negotiate(self, features: int) -> None:
        """Reset the device, and go to FEATURES_OK with ``features``.

        :raises HostError: the device does not take them.
        """
        self.set_status(0)
        self.set_status(UP)
        self.ioctl("VHOST_SET_FEATURES", ffi.new("uint64_t *", features))
        self.set_status(UP | VIRTIO_CONFIG_S_FEATURES_OK)
        if not self.status() & VIRTIO_CONFIG_S_FEATURES_OK:
            raise HostError(f"{self.name} does not take the features {features:#x}")

    def go(self) -> None:
        """DRIVER_OK."""
        self.set_status(UP | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK)

    def suspend(self) -> None:
        """VHOST_VDPA_SUSPEND: finish what was taken from the rings, and take nothing more."""
        self.ioctl("VHOST_VDPA_SUSPEND")

    def config(self) -> bytes:
        """struct virtio_net_config up to the MTU; what the device does not have reads as 0."""
        size = min(CONFIG_SIZE, self.number("VHOST_VDPA_GET_CONFIG_SIZE", "uint32_t"))
        arg = ffi.new("struct vhost_vdpa_config *", {"len": size, "buf": size})
        self.ioctl("VHOST_VDPA_GET_CONFIG", arg)
        return bytes(arg.buf[0:size]).ljust(CONFIG_SIZE, b"\0")

    def call_for_config(self, event: EventFd | None) -> None:
        """Have a change of the configuration signal ``event``, lent; None: have nobody told."""
        fd = lib.VHOST_FILE_UNBIND if event is None else event.fileno()
        self.ioctl("VHOST_VDPA_SET_CONFIG_CALL", ffi.new("int *", fd))

    # --- rings ------------------------------------------------------------------------------------

    def set_ring(self, index: int, vring: Vring) -> None:
        """Everything of a ring but its start; ``index`` is the device's number of it."""
        self.state("VHOST_SET_VRING_NUM", index, vring.size)
        self.state("VHOST_SET_VRING_BASE", index, vring.base)
        addr = ffi.new("struct vhost_vring_addr *")
        addr.index = index
        addr.desc_user_addr, addr.avail_user_addr = vring.desc, vring.avail
        addr.used_user_addr = vring.used
        self.ioctl("VHOST_SET_VRING_ADDR", addr)
        self.file("VHOST_SET_VRING_CALL", index, vring.call.fileno())
        self.file("VHOST_SET_VRING_KICK", index, vring.kick.fileno())

    def enable(self, index: int) -> None:
        """VHOST_VDPA_SET_VRING_ENABLE: have the device serve the ring."""
        self.state("VHOST_VDPA_SET_VRING_ENABLE", index, 1)

    def clear_ring(self, index: int) -> None:
        """Let go of a stopped ring's eventfds."""
        for name in ("VHOST_SET_VRING_KICK", "VHOST_SET_VRING_CALL"):
            self.file(name, index, lib.VHOST_FILE_UNBIND)

    def space_of(self, index: int) -> int:
        """Give ring ``index`` an address space of its own if the device can; returns its number: 0
        is the guest's.
        """
        if self.spaces < 2:
            return 0
        group = self.state("VHOST_VDPA_GET_VRING_GROUP", index, 0)
        if group == self.state("VHOST_VDPA_GET_VRING_GROUP", 0, 0):
            return 0
        self.state("VHOST_VDPA_SET_GROUP_ASID", group, 1)
        return 1

    def doorbell(self, index: int) -> mmap.mmap | None:
        """The page of ring ``index`` to which kicks may be written, if the device has one for it
        alone; owned by the caller. The kernel lets nobody read it.
        """
        try:
            return mmap.mmap(
                self.fileno(), PAGE, mmap.MAP_SHARED, mmap.PROT_WRITE, offset=PAGE * index
            )
        except OSError:  # no such pages, or several rings share one
            return None

    # --- memory -----------------------------------------------------------------------------------

    def map(self, mappings: Sequence[Mapping], space: int = 0) -> None:
        """Let the device use memory of ours at the addresses that ``mappings`` say.

        :raises VdpaError: the device cannot use such an address, or the kernel may not keep so much
            memory in place.
        """
        first, last = self.iova
        size = sum(length for _, length, _ in mappings)
        for at, length, _ in mappings:
            if at < first or at + length - 1 > last:
                raise VdpaError(
                    f"{self.name} can use the addresses {first:#x} to {last:#x}, and the guest has"
                    f" memory at {at:#x} to {at + length - 1:#x}",
                    "lower --memory",
                )
        raise_memlock(size)
        try:
            self._batch(lib.VHOST_IOTLB_UPDATE, mappings, space)
        except OSError as e:
            # What is mapped already must go: the kernel maps no address twice (EEXIST).
            with suppress(OSError):
                self._batch(lib.VHOST_IOTLB_INVALIDATE, mappings, space)
            # The kernel says EFAULT, whatever is wrong.
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            if limit != resource.RLIM_INFINITY and limit < size:
                raise VdpaError(
                    f"{self.name} needs {size >> 20} MiB of locked memory, and the limit is"
                    f" {limit >> 10} KiB",
                    "raise the limit: ulimit -l unlimited",
                ) from e
            raise VdpaError(
                f"the kernel does not map the guest's memory for {self.name}: {e.strerror}; the"
                f" memory may lie in more physical ranges than vhost maps ({_ranges_max()})",
                "--memory-backing huge, lower --memory, or load vhost with max_iotlb_entries=65536",
            ) from e

    def unmap(self, mappings: Sequence[Mapping], space: int = 0) -> None:
        """Take memory from the device.

        :raises HostError: the kernel refuses.
        """
        try:
            self._batch(lib.VHOST_IOTLB_INVALIDATE, mappings, space)
        except OSError as e:
            raise HostError(f"cannot take the memory from {self.name}: {e.strerror}") from e

    def _batch(self, kind: int, mappings: Sequence[Mapping], space: int) -> None:
        batch = self.has(lib.VHOST_BACKEND_F_IOTLB_BATCH)
        if batch:
            self._tell(lib.VHOST_IOTLB_BATCH_BEGIN, (0, 0, 0), space)
        try:
            for mapping in mappings:
                self._tell(kind, mapping, space)
        finally:
            if batch:
                self._tell(lib.VHOST_IOTLB_BATCH_END, (0, 0, 0), space)

    def _tell(self, kind: int, mapping: Mapping, space: int) -> None:
        """Write one message (struct vhost_msg_v2)."""
        begin = time.monotonic_ns() if self._recorder is not None else 0
        message = ffi.new("struct vhost_msg_v2 *", {"type": lib.VHOST_IOTLB_MSG_V2, "asid": space})
        iotlb = message.iotlb
        iotlb.type, iotlb.perm = kind, lib.VHOST_ACCESS_RW
        iotlb.iova, iotlb.size, iotlb.uaddr = mapping
        result = 0
        try:
            os.write(self.fileno(), ffi.buffer(message))
        except OSError as e:
            result = -(e.errno or errno.EIO)
            raise
        finally:
            if begin:
                name = MESSAGES[kind]
                args: dict[str, object] = {"asid": space, "returns": result}
                if mapping[1]:
                    args = {"iova": mapping[0], "size": mapping[1], "uaddr": mapping[2], **args}
                self._recorder.step(name, begin, args)


#: Names of the messages, for traces.
MESSAGES = {
    int(getattr(lib, name)): name
    for name in (
        "VHOST_IOTLB_UPDATE",
        "VHOST_IOTLB_INVALIDATE",
        "VHOST_IOTLB_BATCH_BEGIN",
        "VHOST_IOTLB_BATCH_END",
    )
}


def _ranges_max() -> str:
    """How many ranges of physical memory the kernel maps for a device, if known."""
    try:
        with open("/sys/module/vhost/parameters/max_iotlb_entries") as file:
            return file.read().strip()
    except OSError:
        return "max_iotlb_entries"


def raise_memlock(size: int | None = None) -> None:
    """Raise our own limit of locked memory as far as we may, if it is too low.

    :param size: bytes that will be locked; None: nobody knows yet.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or (size is not None and soft >= 2 * size):
        return
    for limit in (resource.RLIM_INFINITY, hard):
        try:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, max(limit, hard, key=_order)))
            return
        except (OSError, ValueError):
            continue


def _order(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _why_not(path: str, e: OSError) -> tuple[str, str]:
    """Cause and remedy of a device that cannot be opened."""
    if isinstance(e, PermissionError):
        return f"no permission to open {path}", f"as root: chown $USER {path}"
    if e.errno == errno.EBUSY:
        return f"{path} is in use by another process", "end that process, or name another device="
    if e.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return (
            f"there is no vDPA device {path}",
            "as root: modprobe vhost_vdpa, and make a device; see docs/vhost-vdpa.md",
        )
    return f"cannot open {path}: {e.strerror}", "name a vhost-vdpa device"
