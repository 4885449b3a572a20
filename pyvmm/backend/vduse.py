"""A vDPA network card in user space: the kernel's VDUSE (linux/vduse.h) gives this process the
rings of a vDPA device, and the C worker of the emulated data path serves them.

Theory of operation. The kernel asks by requests that are read from /dev/vduse/NAME: the driver has
set the device status, the driver's memory has changed, what is the position of a ring. A thread of
ours answers them. From DRIVER_OK until a reset one worker per queue pair serves the rings. Before
an answer is given that memory has changed, nothing of ours touches the old memory any more. The
workers start after the answer: virtio_net of this machine waits for it with the network's lock held
(rtnl), which programming a tap takes, too.

Who uses the device is the kernel's business: vhost_vdpa gives it to a VMM as /dev/vhost-vdpa-N,
virtio_vdpa makes it a network card of this machine.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from contextlib import suppress

from pyvmm._ext import ffi, lib
from pyvmm.backend.memory import MemoryTable
from pyvmm.datapath.base import Vring
from pyvmm.datapath.ringformat import PACKED, ring_format
from pyvmm.errors import HostError, PyvmmError, VdpaError
from pyvmm.fd import EventFd, Fd, eventfds
from pyvmm.programs import install, which
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_NET,
)
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.threads import Thread
from pyvmm.vhostuser.wire import ProtocolError, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backend.net import NetService

CONTROL = "/dev/vduse/control"
#: A run's own devices: PREFIX PID - START - PID NAMESPACE - NUMBER.
OWN_PREFIX = "pyvmm-"
#: Entries that a ring may have.
SIZE_MAX = 1024
#: Seconds after which the kernel gives up a request that nobody answers; its default of 30 makes
#: users of a dead device wait.
TIMEOUT_S = 5
#: Seconds for a VMM to let go of the device when we end.
RELEASE_S = 3.0
#: A device's features beside those of packets and rings. The kernel lets no network card of VDUSE
#: have a control queue, so there are none that need one.
OWN_FEATURES = sum(
    1 << bit
    for bit in (
        VIRTIO_F_VERSION_1,
        VIRTIO_F_ACCESS_PLATFORM,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MTU,
    )
)
#: What is asked of a device that has been made: all that a confined server needs.
REQUESTS = (
    lib.VDUSE_IOTLB_GET_FD,
    lib.VDUSE_DEV_GET_FEATURES,
    lib.VDUSE_DEV_SET_CONFIG,
    lib.VDUSE_DEV_INJECT_CONFIG_IRQ,
    lib.VDUSE_VQ_GET_INFO,
    lib.VDUSE_VQ_SETUP_KICKFD,
    lib.VDUSE_VQ_INJECT_IRQ,
)
COUNTERS = ("requests", "refused", "starts", "faults")


class Vduse(Fd):
    """A VDUSE device, made and opened. Closing it leaves the device there: see ``destroy``.

    :param name: of the device. :param features: a mask. :param config: the configuration space.
    :param rings: how many.
    :raises VdpaError: the kernel has no VDUSE, or does not make the device.
    """

    def __init__(self, name: str, features: int, config: bytes, rings: int) -> None:
        self.name = name
        raw = name.encode()
        if not 0 < len(raw) < lib.VDUSE_NAME_MAX or "/" in name or not name.isprintable():
            raise VdpaError(f"--vduse {name!r} is no name of a device", "use letters and digits")
        with _control() as control:
            _forget(control, name)
            arg = ffi.new("struct vduse_dev_config *", {"config": len(config)})
            arg.name, arg.device_id, arg.features = raw, VIRTIO_ID_NET, features
            arg.vq_num, arg.vq_align, arg.config_size = rings, 4096, len(config)
            arg.config[0 : len(config)] = list(config)
            error = lib.pv_ioctl(control.fileno(), lib.VDUSE_CREATE_DEV, arg)
            if error:
                raise VdpaError(
                    f"the kernel does not make the VDUSE device {name}: {os.strerror(-error)}",
                    "run as root" if error == -errno.EPERM else "choose another name",
                )
        try:
            super().__init__(
                os.open(f"/dev/vduse/{name}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            )
            set_timeout(name, TIMEOUT_S)
            for index in range(rings):
                vq = {"index": index, "max_size": SIZE_MAX}
                self.ioctl("VDUSE_VQ_SETUP", ffi.new("struct vduse_vq_config *", vq))
        except OSError as e:
            self.destroy()
            raise VdpaError(f"cannot open /dev/vduse/{name}: {e.strerror}", "run as root") from e
        except BaseException:
            self.destroy()
            raise

    def ioctl(self, name: str, arg: Any = ffi.NULL) -> Any:
        """Make an ioctl; returns ``arg``.

        :raises HostError: the kernel refuses.
        """
        error = lib.pv_ioctl(self.fileno(), getattr(lib, name), arg)
        if error:
            raise HostError(f"{self.name}: {name} failed: {os.strerror(-error)}")
        return arg

    def driver_features(self) -> int:
        """The features that the driver has chosen."""
        return int(self.ioctl("VDUSE_DEV_GET_FEATURES", ffi.new("uint64_t *"))[0])

    def ring(self, index: int) -> Any:
        """What the driver has set up (struct vduse_vq_info)."""
        return self.ioctl("VDUSE_VQ_GET_INFO", ffi.new("struct vduse_vq_info *", {"index": index}))

    def set_kick(self, index: int, fd: int) -> None:
        """Have kicks of a ring signal an eventfd, lent; VDUSE_EVENTFD_DEASSIGN: none."""
        arg = ffi.new("struct vduse_vq_eventfd *", {"index": index, "fd": fd})
        self.ioctl("VDUSE_VQ_SETUP_KICKFD", arg)

    def set_config(self, offset: int, data: bytes) -> None:
        """Change the configuration space, and tell the driver."""
        arg = ffi.new("struct vduse_config_data *", {"buffer": len(data)})
        arg.offset, arg.length = offset, len(data)
        arg.buffer[0 : len(data)] = list(data)
        self.ioctl("VDUSE_DEV_SET_CONFIG", arg)
        self.ioctl("VDUSE_DEV_INJECT_CONFIG_IRQ")

    def memory(self) -> list[tuple[Region, Fd]]:
        """The driver's memory that the device may read and write: regions by the driver's
        addresses, and the file of each, owned by the caller.
        """
        found: list[tuple[Region, Fd]] = []
        entry = ffi.new("struct vduse_iotlb_entry *")
        at = 0
        while at < 1 << 64:
            entry.start, entry.last = at, (1 << 64) - 1
            fd = lib.pv_ioctl(self.fileno(), lib.VDUSE_IOTLB_GET_FD, entry)
            if fd < 0:
                break  # EINVAL: there is nothing from ``at`` on
            start, last = int(entry.start), int(entry.last)
            region = Region(start, last + 1 - start, start, int(entry.offset))
            if entry.perm == lib.VDUSE_ACCESS_RW:
                found.append((region, Fd(fd)))
            else:
                os.close(fd)
            at = last + 1
        return found

    def destroy(self) -> None:
        """Close the device and remove it.

        :raises HostError: somebody uses it.
        """
        if hasattr(self, "_fd"):
            self.close()
        with _control() as control:
            error = _destroy(control, self.name)
        if error:
            raise HostError(
                f"the VDUSE device {self.name} is in use",
                f"end its user, then: vdpa dev del {self.name}",
            )


def set_timeout(name: str, seconds: int) -> None:
    """Have the kernel give up a request to the device after so long, if it can."""
    with suppress(OSError), open(f"/sys/class/vduse/{name}/msg_timeout", "w") as f:
        f.write(str(seconds))


def _control() -> Fd:
    try:
        return Fd(os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        hint = "run as root" if e.errno in (errno.EACCES, errno.EPERM) else ""
        raise VdpaError(
            f"cannot open {CONTROL}: {e.strerror}",
            hint or "as root: modprobe vduse; or use the testbed with --kernel-version 6.12",
        ) from e


def _destroy(control: Fd, name: str) -> int:
    arg = ffi.new("char[]", name.encode().ljust(lib.VDUSE_NAME_MAX, b"\0"))
    return int(lib.pv_ioctl(control.fileno(), lib.VDUSE_DESTROY_DEV, arg))


def _forget(control: Fd, name: str) -> None:
    """Remove what a back-end of this name that was killed has left, if nobody uses it."""
    if os.path.exists(f"/dev/vduse/{name}") and _destroy(control, name):
        raise VdpaError(
            f"there is a VDUSE device {name}, and it is in use",
            f"end its back-end and its user; or, if both are gone: vdpa dev del {name}",
        )


def vdpa_tool(*words: str) -> None:
    """Run ``vdpa dev WORDS`` of iproute2.

    :raises VdpaError: it fails or is missing.
    """
    path = which("vdpa", "/usr/sbin:/sbin")
    if path is None:
        raise VdpaError("the program vdpa is missing", install("iproute2"))
    done = subprocess.run([path, "dev", *words], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise VdpaError(
            f"vdpa dev {' '.join(words)} failed: {said}", "as root: modprobe vdpa vhost_vdpa"
        )


class VduseBackend:
    """Serves a vDPA device until ``stop``. ``run`` is for one thread, ``stop`` and ``counters`` for
    any.

    :param service: serves the rings; owned from here on.
    :param mtu: bytes, that the driver is told.
    :param log: gets one line about each start, stop and fault.
    """

    def __init__(
        self, name: str, service: NetService, *, mtu: int, log: Callable[[str], None]
    ) -> None:
        self._service, self._log = service, log
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._quit, self._end = EventFd(), EventFd()
        self._rings = service.rings
        self._features = service.ring_features() | OWN_FEATURES
        self._memory = MemoryTable()
        self._served: list[Vring] = []
        self._bases: dict[int, int] = {}  # positions of rings at rest
        self._status = 0
        self._due = False  # the rings are to be served once the request is answered
        self._awaited: set[int] = set()  # kicks: the rings are to be served with the first of them
        self._kicks: list[EventFd] = []
        self._calls: list[EventFd] = []
        self._injector: Any = ffi.NULL
        config = bytes(6) + (VIRTIO_NET_S_LINK_UP).to_bytes(2, "little")
        config += (service.queue_num).to_bytes(2, "little") + mtu.to_bytes(2, "little")
        try:
            self._device = Vduse(name, self._features, config, self._rings)
        except BaseException:
            self._quit.close()
            self._end.close()
            service.close()
            raise
        try:
            self._kicks = eventfds(self._rings)
            self._calls = eventfds(self._rings)
            error = ffi.new("int *")
            self._injector = lib.pv_vduse_calls_new(
                self._device.fileno(),
                f"{name}-calls".encode(),
                [event.fileno() for event in self._calls],
                self._rings,
                error,
            )
            if self._injector == ffi.NULL:
                raise HostError(f"cannot start a thread: {os.strerror(-error[0])}")
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Give the device to the kernel's vDPA framework, and serve it until ``stop``. Then take it
        back.

        :raises VdpaError: the framework does not take it.
        :raises HostError: a VMM still uses the device, which stays there without service.
        """
        name = self._device.name
        # Answers also while the framework adds or removes the device, which asks for a reset.
        server = Thread(
            target=self.serve, name=f"{name}-vduse", daemon=True, failed=lambda e: self.stop()
        )
        server.start()
        try:
            self._log("ready: " + offer(name))
            select.select([self._quit.fileno()], [], [])
            take_back(name)
        finally:
            self._end.signal()
            server.join()

    def serve(self) -> None:
        """Answer the kernel; ``run`` does it in a thread. Without ``run``, whoever has the process
        confined gives the device to the framework: then this returns when the kernel has given the
        device up.
        """
        device = self._device.fileno()
        while True:
            poll = select.poll()
            for fd in (self._end.fileno(), device, *self._awaited):
                poll.register(fd, select.POLLIN)
            found = dict(poll.poll())
            if self._end.fileno() in found:
                break
            if self._awaited.intersection(found):
                self._begin(kicked=True)
            if found.get(device, 0) & select.POLLERR:
                self._log("gone: the kernel has given the device up, as an answer came too late")
                self.stop()
                break
            if device in found:
                self._take()
        self._park()

    def _take(self) -> None:
        """Answer a request, and then serve the rings if the driver has asked for it."""
        device, size = self._device.fileno(), ffi.sizeof("struct vduse_dev_request")
        request = ffi.new("struct vduse_dev_request *")
        try:
            ffi.memmove(request, os.read(device, size), size)
            os.write(device, self._answer(request))
        except (BlockingIOError, FileNotFoundError):  # the kernel has given up the request
            return
        if self._due:
            self._begin(kicked=False)

    def _answer(self, request: Any) -> bytes:
        """What to answer to one request of the kernel's."""
        self._counts["requests"] += 1
        response = ffi.new("struct vduse_dev_response *", {"request_id": request.request_id})
        try:
            if request.type == lib.VDUSE_SET_STATUS:
                self._set_status(int(request.s.status))
            elif request.type == lib.VDUSE_UPDATE_IOTLB:
                self._memory_changed()
            elif request.type == lib.VDUSE_GET_VQ_STATE:
                self._tell_position(int(request.vq_state.index), response.vq_state)
            else:
                raise HostError(f"unknown request {request.type}")
            response.result = lib.VDUSE_REQ_RESULT_OK
        except PyvmmError as e:
            self._counts["refused"] += 1
            self._log(f"refused: {e}")
            response.result = lib.VDUSE_REQ_RESULT_FAILED
        return bytes(ffi.buffer(response))

    def _set_status(self, status: int) -> None:
        """The driver has written the device status."""
        new, self._status = status & ~self._status, status
        if not status & VIRTIO_CONFIG_S_DRIVER_OK:
            running = bool(self._served)
            self._park()
            self._due = False
            self._bases = {}
            if not status:
                self._memory.clear()
            if running:
                self._log("stopped by the driver")
        if new & VIRTIO_CONFIG_S_FEATURES_OK:
            acked = self._device.driver_features()
            if acked & ~self._features:
                raise HostError(f"features {acked:#x} are not on offer")
            self._service.check_features(acked)
        self._due = bool(new & VIRTIO_CONFIG_S_DRIVER_OK)

    def _memory_changed(self) -> None:
        """The driver's memory has changed: use the new one only, from where the rings are."""
        self._due = bool(self._status & VIRTIO_CONFIG_S_DRIVER_OK)
        self._park()
        self._memory.clear()

    def _begin(self, *, kicked: bool) -> None:
        """Serve the rings, now that the request has been answered, or with the first kick.

        For a driver of this machine the kernel copies all buffers to memory at address 0, which it
        makes for the first of them, and tells nobody. The first kick comes after that.
        """
        self._due, self._awaited = False, set()
        try:
            self._map()
            self._start(late=not kicked and self._memory.read_u16(0) is None)
        except PyvmmError as e:
            self.fault(-1, str(e))
            return
        if self._served:
            self._log(f"serving {len(self._served)} rings")

    def _map(self) -> None:
        files = self._device.memory()
        try:
            self._memory.clear()
            for region, fd in files:
                self._memory.add(region, fd.fileno())
        except ProtocolError:
            self._memory.clear()
            raise
        finally:
            for _, fd in files:
                fd.close()

    def _start(self, *, late: bool) -> None:
        """Serve each ring that the driver has enabled. :param late: with the first kick."""
        acked = self._device.driver_features()
        form = ring_format(acked)
        rings = []
        for index in range(self._rings):
            info = self._device.ring(index)
            if not info.ready:
                continue
            base = self._bases.get(index)
            if base is None:
                base = int(info.split.avail_index)
                if form is PACKED:
                    state = info.packed
                    taken = state.last_avail_idx | state.last_avail_counter << 15
                    base = taken | (state.last_used_idx | state.last_used_counter << 15) << 16
            places = int(info.desc_addr), int(info.driver_addr), int(info.device_addr)
            kick, call = self._kicks[index], self._calls[index]
            rings.append(Vring(index, int(info.num), *places, base, kick, call, form))
        if not rings:
            return
        for ring in rings:
            ring.kick.drain()
            self._device.set_kick(ring.index, ring.kick.fileno())
        if late:
            self._awaited = {ring.kick.fileno() for ring in rings}
            return
        self._service.start(acked, self._memory, rings, self)
        self._served = rings
        self._counts["starts"] += 1
        for ring in rings:
            ring.kick.nudge()  # the kernel has kept no kick of before

    def _park(self) -> None:
        """Stop serving; the positions are kept."""
        self._awaited = set()
        rings, self._served = self._served, []
        if not rings:
            return
        for ring in rings:
            with suppress(HostError):
                self._device.set_kick(ring.index, lib.VDUSE_EVENTFD_DEASSIGN)
        for ring, base in zip(rings, self._service.stop(), strict=False):
            self._bases[ring.index] = base

    def _tell_position(self, index: int, state: Any) -> None:
        """VDUSE_GET_VQ_STATE. The rings stop for good: whoever asks is about to take them away, and
        a position is exact only at rest.
        """
        self._park()
        base = self._bases.get(index, 0)
        state.index = index
        if ring_format(self._device.driver_features()) is PACKED:
            state.packed.last_avail_idx, state.packed.last_avail_counter = _half(base)
            state.packed.last_used_idx, state.packed.last_used_counter = _half(base >> 16)
        else:
            state.split.avail_index = base

    # --- PathEvents -------------------------------------------------------------------------------

    def fault(self, queue: int, problem: str) -> None:
        """A ring is malformed, or the worker cannot go on; a driver's reset cures it."""
        self._counts["faults"] += 1
        self._log(f"fault: {problem}")

    def link(self, up: bool) -> None:
        """The tap is gone, or back: tell the driver."""
        self._log(f"link {'up' if up else 'down'}")
        status = VIRTIO_NET_S_LINK_UP if up else 0
        with suppress(HostError):
            self._device.set_config(6, status.to_bytes(2, "little"))

    # --- the rest ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Have ``run`` return soon."""
        self._quit.signal()

    def counters(self) -> dict[str, int]:
        """Requests of the kernel's, and the counters of the service."""
        return {**self._counts, **self._service.counters()}

    def close(self) -> None:
        """Remove the device and release everything; ``run`` has returned."""
        self._service.close()
        lib.pv_vduse_calls_free(self._injector)
        self._injector = ffi.NULL
        self._memory.clear()
        for event in (*self._kicks, *self._calls, self._quit, self._end):
            event.close()
        with suppress(HostError):  # ``run`` has told of it
            self._device.destroy()

    def __enter__(self) -> VduseBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _half(half: int) -> tuple[int, int]:
    """Index and wrap counter of half a packed ring's position."""
    return half & 0x7FFF, half >> 15 & 1


def offer(name: str) -> str:
    """Give a device that is being served to the kernel's framework; returns its path, or in words
    which driver has it.

    :raises VdpaError: the framework does not take it.
    """
    vdpa_tool("add", "name", name, "mgmtdev", "vduse")
    from pyvmm.datapath.vdpa_device import driver, find

    bound = driver(name)
    if bound == "vhost_vdpa":
        return find(name)[0]
    return f"driver {bound}" if bound else "no driver has it: modprobe vhost_vdpa"


def take_back(name: str) -> None:
    """Take a device from the framework, which asks its server for a reset.

    :raises HostError: a VMM still uses the device. :raises VdpaError: the framework refuses.
    """
    if not _released(name):
        raise HostError(
            f"a machine still uses {name}, which has no service from now on",
            f"end the machine, then: vdpa dev del {name}",
        )
    vdpa_tool("del", name)


def _released(name: str) -> bool:
    """Whether no VMM has the device open: removing it would wait for that VMM, uninterruptibly. A
    VMM that ends at the same time gets a few seconds.
    """
    from pyvmm.datapath.vdpa_device import find

    until = time.monotonic() + RELEASE_S
    while True:
        try:
            os.close(os.open(find(name)[0], os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            if e.errno != errno.EBUSY:
                return True
        except VdpaError:
            return True  # no VMM can open it
        else:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def remove(name: str) -> None:
    """Remove the device of a server that has ended, as far as that is possible."""
    if os.path.exists(f"/dev/vduse/{name}"):
        set_timeout(name, 1)  # nobody answers
        with suppress(PyvmmError):
            take_back(name)
        with suppress(PyvmmError), _control() as control:
            _destroy(control, name)


def own_name(number: int, pid: int) -> str:
    """The name of a device of process ``pid``'s own, from which ``remove_orphans`` of another
    process learns whether the owner still runs.
    """
    return f"{OWN_PREFIX}{pid}-{_start_of(pid)}-{_pid_namespace()}-{number}"


def needs(words: list[str]) -> list[tuple[str, str]]:
    """The permissions that the helper of a VMM needs to open the device ``words[0]``: for all
    devices of the VMM's own the same, for others by this name.
    """
    return [("vduse", "") if _is_own(words[0]) else ("vdpa", words[0])]


def needs_to_remove(words: list[str]) -> list[tuple[str, str]]:
    """The permissions to remove it: as ``needs``, but nobody has one for another's device. Orphans,
    whose name here is empty, are as one's own.
    """
    return [("vduse", "" if _is_own(words[0]) else words[0])]


def _is_own(name: str) -> bool:
    """Whether it is the name of a device of the process whose helper this one is, as ``own_name``
    makes them: what only begins like one may be the path of any file.
    """
    prefix, _, number = name.rpartition("-")
    decimal = number.isascii() and number.isdecimal() and (number == "0" or number[0] != "0")
    return decimal and f"{prefix}-0" == own_name(0, os.getppid())


def remove_described(words: list[str]) -> tuple[list[str], list[int]]:
    """Remove the device ``words[0]`` whose server has ended, or all orphans if that is empty; an
    operation of ``helper``.
    """
    if words[0]:
        remove(words[0])
    else:
        remove_orphans()
    return [], []


def remove_orphans() -> None:
    """Remove the devices of runs that were killed together with all their processes."""
    with suppress(OSError):
        for name in os.listdir("/dev/vduse"):
            if _is_orphan(name):
                remove(name)


def _is_orphan(name: str) -> bool:
    """Whether the owner of a device has ended. Of a process in another PID namespace nobody here
    knows, and a device of the user's may have any name.
    """
    words = name.removeprefix(OWN_PREFIX).split("-")
    if not name.startswith(OWN_PREFIX) or len(words) != 4 or not words[0].isdecimal():
        return False
    pid, start, namespace, _ = words
    return namespace == _pid_namespace() and _start_of(int(pid)) != start


def _start_of(pid: int) -> str:
    """When a process began, in clock ticks (proc(5), stat, field 22): ids are used again. Empty if
    there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return ""


def _pid_namespace() -> str:
    return str(os.stat("/proc/self/ns/pid").st_ino)
