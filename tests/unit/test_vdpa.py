"""vhost-vdpa without a device: its messages about memory byte by byte, what the control queue is
told, and what is refused.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import subprocess
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import helper
from pyvmm._ext import ffi, lib
from pyvmm.backend import vduse, vduse_process
from pyvmm.datapath import vdpa_device
from pyvmm.datapath.base import RxFilter, Vring
from pyvmm.datapath.vdpa_control import MEMORY, ControlQueue, commands, free_address
from pyvmm.datapath.vdpa_device import Vdpa
from pyvmm.datapath.vhost_device import VhostFd
from pyvmm.datapath.vhost_vdpa import VhostVdpa, facts
from pyvmm.errors import HostError, UsageError, VdpaError
from pyvmm.fd import EventFd
from pyvmm.netopt import Net
from pyvmm.spec.virtio import (
    VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_ID_NET,
)
from tests import vhost_fake
from tests.descriptors import open_fds
from tests.driver import bits

MAC, OTHER = bytes.fromhex("525411223344"), bytes.fromhex("525411223355")
ACCESS_RW, MSG_V2 = 3, 2
UPDATE, INVALIDATE, BATCH_BEGIN, BATCH_END = 2, 3, 5, 6
SUSPEND = 1 << lib.VHOST_BACKEND_F_SUSPEND
BATCH = 1 << lib.VHOST_BACKEND_F_IOTLB_BATCH
LAST = (1 << 64) - 1


class PipeDevice(Vdpa):
    """A device whose descriptor is a pipe: it shows what is written, and has no ioctls."""

    def __init__(
        self, features: int = 0, backend: int = 0, config: bytes = bytes(12), rings: int = 2
    ) -> None:
        self.reader, fd = os.pipe()
        self._fd, self._recorder = fd, None
        self.name, self.path = "card", "/dev/vhost-vdpa-9"
        self.features, self.backend, self.rings = features, backend, rings
        self.size_max, self.iova, self.spaces = 256, (0, LAST), 1
        self._config = config

    def config(self) -> bytes:
        return self._config

    def messages(self) -> list[bytes]:
        """What was written, as one message of 72 bytes each."""
        self.close()
        with os.fdopen(self.reader, "rb") as f:
            raw = f.read()
        assert len(raw) % 72 == 0
        return [raw[i : i + 72] for i in range(0, len(raw), 72)]


def message(kind: int, space: int, iova: int = 0, size: int = 0, user: int = 0) -> bytes:
    """struct vhost_msg_v2 as the kernel reads it."""
    head = struct.pack("<II", MSG_V2, space)
    return head + struct.pack("<QQQBB", iova, size, user, ACCESS_RW, kind) + bytes(38)


def test_messages() -> None:
    device = PipeDevice(backend=BATCH)
    device.map([(0, 0x1000, 0x7000), (1 << 32, 0x2000, 0x8000)], 1)
    device.unmap([(0, 0x1000, 0x7000)])
    assert device.messages() == [
        message(BATCH_BEGIN, 1),
        message(UPDATE, 1, 0, 0x1000, 0x7000),
        message(UPDATE, 1, 1 << 32, 0x2000, 0x8000),
        message(BATCH_END, 1),
        message(BATCH_BEGIN, 0),
        message(INVALIDATE, 0, 0, 0x1000, 0x7000),
        message(BATCH_END, 0),
    ]


def test_messages_without_batches() -> None:
    device = PipeDevice()
    device.map([(0x1000, 0x1000, 0x7000)])
    assert device.messages() == [message(UPDATE, 0, 0x1000, 0x1000, 0x7000)]


def test_range_of_addresses() -> None:
    """Memory that the device cannot reach is refused before anything is mapped."""
    device = PipeDevice()
    device.iova = 0x1000, 0xFFFF
    with pytest.raises(VdpaError, match="can use the addresses 0x1000 to 0xffff"):
        device.map([(0x1000, 0x1000, 0x7000), (0xF000, 0x2000, 0x9000)])
    with pytest.raises(VdpaError, match="memory at 0x0 to 0xfff"):
        device.map([(0, 0x1000, 0x7000)])
    assert device.messages() == []


def test_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says EFAULT for a limit that is too low."""
    device = PipeDevice()

    def write(fd: int, data: object) -> int:
        raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, 8 << 20))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: None)
    with pytest.raises(VdpaError, match="needs 16 MiB of locked memory, and the limit is 8192 KiB"):
        device.map([(0, 16 << 20, 0x7000)])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    cause = "does not map the guest's memory for card: Bad address; .* more physical ranges"
    with pytest.raises(VdpaError, match=cause):
        device.map([(0, 16 << 20, 0x7000)])


def test_nothing_stays_mapped_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel would refuse the next try, as it maps no address twice."""
    device = PipeDevice()
    real, writes = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes == 2:
            raise OSError(errno.EFAULT, "Bad address")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    both = [(0, 0x1000, 0x7000), (1 << 32, 0x2000, 0x8000)]
    with pytest.raises(VdpaError, match="does not map"):
        device.map(both)
    assert device.messages() == [
        message(UPDATE, 0, 0, 0x1000, 0x7000),
        message(INVALIDATE, 0, 0, 0x1000, 0x7000),
        message(INVALIDATE, 0, 1 << 32, 0x2000, 0x8000),
    ]


ADDRESS = st.integers(0, 1 << 20)


@given(ADDRESS, ADDRESS, st.lists(st.tuples(ADDRESS, st.integers(1, 1 << 18), st.just(0))))
def test_address_of_the_control_queue(
    first: int, length: int, taken: list[tuple[int, int, int]]
) -> None:
    """It lies in the device's range and in nobody's memory; or there is really no place."""
    last = first + length

    def free(at: int) -> bool:
        end = at + MEMORY
        return end - 1 <= last and all(end <= a or at >= a + n for a, n, _ in taken)

    try:
        at = free_address((first, last), taken, MEMORY)
    except VdpaError:
        start = -(-max(first, 4096) // 4096) * 4096
        assert not any(free(at) for at in range(start, last + 1, 4096))
    else:
        assert at % 4096 == 0 and at >= max(first, 4096) and free(at)


def test_what_the_control_queue_is_told() -> None:
    rx = RxFilter(OTHER, filters_vlans=True)
    rx.flags = {"allmulti", "unicast-overflow"}
    rx.multicast, rx.vlans = [b"\x01" + bytes(5)], {1, 7}
    assert list(commands(0, rx, set())) == []
    assert list(commands(bits("VIRTIO_NET_F_CTRL_MAC_ADDR"), rx, set())) == [(1, 1, OTHER)]
    # Without CTRL_RX_EXTRA there is no "all unicast": promiscuous instead.
    assert list(commands(bits("VIRTIO_NET_F_CTRL_RX"), rx, set())) == [
        (0, 0, b"\1"),
        (0, 1, b"\1"),
        (1, 0, bytes(4) + b"\1\0\0\0" + b"\x01" + bytes(5)),
    ]
    extra = bits("VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_RX_EXTRA")
    flags = [(command, data) for kind, command, data in commands(extra, rx, set()) if kind == 0]
    assert flags == [(0, b"\0"), (1, b"\1"), (2, b"\1"), (3, b"\0"), (4, b"\0"), (5, b"\0")]
    assert list(commands(bits("VIRTIO_NET_F_CTRL_VLAN"), rx, {7, 9})) == [
        (2, 0, b"\1\0"),
        (2, 1, b"\x09\0"),
    ]


def test_the_control_queue_asks_for_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With EVENT_IDX a device interrupts for the answer that used_event names, and no other."""
    device = PipeDevice()
    monkeypatch.setattr(device, "set_ring", lambda index, ring: None)
    queue = ControlQueue(device, [])
    queue.attach(2, 0)
    waited_for = []

    def answer() -> None:
        """The device's part: AVAIL at 256, used_event behind its ring, USED at 512."""
        ring = queue._map
        waited_for.append(struct.unpack_from("<H", ring, 256 + 4 + 2 * 4)[0])
        ring[512 + 2 : 512 + 4] = ring[256 + 2 : 256 + 4]
        ring[4096 - 8] = 0

    monkeypatch.setattr(queue, "_kick", SimpleNamespace(nudge=answer, close=queue._kick.close))
    for _ in range(3):
        queue.command(0, 0, b"\1")
    assert waited_for == [0, 1, 2]
    queue.close()
    device.close()


NET = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MAC", "VIRTIO_NET_F_MTU")
CONTROL = bits("VIRTIO_NET_F_CTRL_VQ", "VIRTIO_NET_F_CTRL_MAC_ADDR", "VIRTIO_NET_F_CTRL_RX")
CONFIG = MAC + struct.pack("<HHH", 1, 4, 1400)


def test_facts() -> None:
    """MAC address, MTU and queue pairs, as far as features say that they are there."""
    assert facts(PipeDevice(NET, config=CONFIG)) == (MAC, 1400, 1)
    assert facts(PipeDevice(config=CONFIG, rings=8)) == (None, None, 4)
    assert facts(PipeDevice(NET, config=bytes(12))) == (None, 0, 1)
    mq = NET | CONTROL | bits("VIRTIO_NET_F_MQ")
    assert facts(PipeDevice(mq, config=CONFIG, rings=9))[2] == 4
    assert facts(PipeDevice(mq, config=CONFIG, rings=5))[2] == 2  # it says more than it has
    assert facts(PipeDevice(NET | CONTROL, config=CONFIG, rings=9))[2] == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"queues": 2}, "has 1 queue pairs, not 2"),
        ({"mac": OTHER}, "has the MAC address 52:54:11:22:33:44 and takes no other"),
        ({"mtu": 1500}, "has an MTU of 1400, not 1500"),
    ],
)
def test_what_does_not_fit(keys: dict[str, Any], words: str) -> None:
    device = PipeDevice(NET, config=CONFIG)
    with pytest.raises(VdpaError, match=words):
        VhostVdpa(device, **keys)
    assert device.closed
    if "mac" in keys:
        VhostVdpa(PipeDevice(NET | CONTROL, config=CONFIG, rings=3), **keys).close()


def test_what_a_device_stands_for() -> None:
    """Features that it cannot honour are not offered; without SUSPEND there are no packed rings."""
    offload = bits("VIRTIO_NET_F_HOST_TSO4", "VIRTIO_F_RING_PACKED")
    rx = bits("VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_RX_EXTRA")
    path = VhostVdpa(PipeDevice(NET | offload, config=CONFIG))
    assert path.features() == bits("VIRTIO_F_VERSION_1")  # HOST_TSO4 needs CSUM
    assert path.withholds == rx | bits("VIRTIO_NET_F_CTRL_MAC_ADDR")
    path.close()
    path = VhostVdpa(PipeDevice(NET | CONTROL | offload, SUSPEND, CONFIG, 3), mac=OTHER)
    assert path.features() == bits("VIRTIO_F_VERSION_1", "VIRTIO_F_RING_PACKED")
    assert path.withholds == 0 and path.bound() == ""
    path.close()
    path = VhostVdpa(PipeDevice(bits("VIRTIO_F_VERSION_1")))  # one that does not filter
    assert path.withholds == 0
    path.close()


def test_a_device_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses its reset as well; the path has let go of the rings all the same."""
    path = VhostVdpa(PipeDevice(NET, config=CONFIG))
    ring = cast("Any", SimpleNamespace(index=0))

    def refuse(*args: object) -> None:
        raise VdpaError("it is gone")

    monkeypatch.setattr(path._device, "set_status", refuse)
    monkeypatch.setattr(path, "_device", path._device)
    for name in ("call_for_config", "clear_ring"):
        monkeypatch.setattr(path._device, name, lambda *args: None)
    monkeypatch.setattr(path, "_unmap", lambda: None)
    path._rings, path._memory = [ring], cast("Any", object())
    with pytest.raises(VdpaError, match="it is gone"):
        path.stop()
    assert path.stop() == []
    path._memory = None
    path.close()


def test_a_start_kicks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains may have been made available while nobody served the rings; a device need not look for
    them at its start, and takes a kick of before DRIVER_OK for none.
    """
    path = VhostVdpa(PipeDevice(NET, config=CONFIG))
    with EventFd() as kick, EventFd() as call:
        kicked: list[int] = []
        monkeypatch.setattr(path, "_start", lambda *args: kicked.append(kick.drain()))
        monkeypatch.setattr(path, "_map", lambda memory: None)
        monkeypatch.setattr(path, "_watch", lambda: None)
        ring = Vring(1, 256, 0, 0, 0, 7, kick, call)
        nothing = cast("Any", object())
        path.start(bits("VIRTIO_F_VERSION_1"), nothing, [ring], nothing)
        assert kicked == [0] and kick.drain() == 1
        path.close()


def test_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A device by name; one that belongs to another driver, with what to do."""
    for name, bound in (("card0", "vhost_vdpa"), ("card1", "virtio_vdpa")):
        directory = tmp_path / name
        directory.mkdir()
        (tmp_path.parent / bound).mkdir(exist_ok=True)
        (directory / "driver").symlink_to(tmp_path.parent / bound)
    (tmp_path / "card0" / "vhost-vdpa-3").mkdir()
    monkeypatch.setattr(vdpa_device, "DEVICES", str(tmp_path))
    assert vdpa_device.find("card0") == ("/dev/vhost-vdpa-3", "card0")
    assert vdpa_device.find("/dev/vhost-vdpa-3") == ("/dev/vhost-vdpa-3", "card0")
    assert vdpa_device.find("/dev/vhost-vdpa-4") == ("/dev/vhost-vdpa-4", "")
    with pytest.raises(VdpaError, match=r"card1 belongs to the driver virtio_vdpa; .*unbind"):
        vdpa_device.find("card1")
    with pytest.raises(VdpaError, match="no vDPA device card2; devices: card0, card1"):
        vdpa_device.find("card2")


def test_a_device_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened once, and used by its descriptor, by one card at a time. Nothing else of its
    name is opened.
    """
    told: list[str] = []
    opened: list[str] = []

    def ioctl(device: VhostFd, name: str, arg: Any = ffi.NULL) -> Any:
        told.append(name)
        if name == "VHOST_VDPA_GET_DEVICE_ID":
            arg[0] = VIRTIO_ID_NET
        return arg

    def open_device(path: str) -> int:
        opened.append(path)
        return os.open("/dev/null", os.O_RDWR)

    monkeypatch.setattr(VhostFd, "ioctl", ioctl)
    monkeypatch.setattr(vdpa_device, "open_device", open_device)
    monkeypatch.setattr(vdpa_device, "_given", {})
    before = open_fds()
    with vdpa_device.Given("/dev/vhost-vdpa-3") as given:
        vdpa_device.take([given])
        for _ in range(2):
            with Vdpa("/dev/vhost-vdpa-3") as device:
                assert os.fstat(device.fileno()) == os.fstat(given.fileno())
                with pytest.raises(VdpaError, match="vhost-vdpa-3 is in use by another process"):
                    Vdpa("/dev/vhost-vdpa-3")
            assert told[-2:] == ["VHOST_VDPA_SET_STATUS", "VHOST_VDPA_SET_CONFIG_CALL"]

        def dup(fd: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch, pytest.raises(VdpaError, match="Too many open files"):
            patch.setattr(os, "dup", dup)
            Vdpa("/dev/vhost-vdpa-3")
    assert told.count("VHOST_SET_OWNER") == 1 and opened == ["/dev/vhost-vdpa-3"]
    assert open_fds() == before


def test_a_device_that_is_given_keeps_no_memory() -> None:
    """All of it is taken back by the end of a card, in sizes that 64 bits can hold."""
    for span, taken in (
        ((0, LAST), [(0, 1 << 63), (1 << 63, 1 << 63)]),
        ((4096, 8191), [(4096, 4096)]),
        (((1 << 63) + 1, LAST), [((1 << 63) + 1, (1 << 63) - 1)]),
    ):
        device = PipeDevice()
        device.iova, device._lent = span, cast("Any", SimpleNamespace(used=True))
        device.close()
        told = [struct.unpack("<I4xQQQBB", message[:34]) for message in device.messages()]
        assert [(iova, size) for _, iova, size, *_ in told] == taken
        assert {kind for *_, kind in told} == {INVALIDATE}


def test_option() -> None:
    net = Net.parse("emulated,switchable=vhost-vdpa,device=card0")
    assert net.has_tap and net.switched("vhost-vdpa").device == "card0"
    assert net.switched("vhost-vdpa,device=card1").device == "card1"
    assert not Net.parse("vhost-vdpa,device=card0").has_tap
    assert Net.parse("vhost-vdpa").has_tap  # pyvmm's own device
    for text in ("emulated,device=x", "vhost-vdpa,device=", "vhost-vdpa,device=x,tap=t"):
        with pytest.raises(UsageError):
            Net.parse(text)


def test_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is removed is a run's own device whose owner has ended for sure."""
    live = vduse.own_name(0, os.getpid())
    assert len(live) < lib.VDUSE_NAME_MAX
    _, pid, start, namespace, _ = live.split("-")
    with subprocess.Popen(["true"]) as ended:
        pass
    orphans = [f"pyvmm-{pid}-1{start}-{namespace}-0", f"pyvmm-{ended.pid}-7-{namespace}-2"]
    others = ["control", "card0", "pyvmm-card", f"pyvmm-{ended.pid}-7-1-0", f"pyvmm-{pid}", live]
    others.append(f"pyvmm-\u00b2-7-{namespace}-0")
    monkeypatch.setattr(os, "listdir", lambda path: [*others, *orphans])
    removed: list[str] = []
    monkeypatch.setattr(vduse, "remove", removed.append)
    vduse.remove_orphans()
    assert removed == orphans


def test_its_server_without_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor is left of a server that does not start; its end needs no helper."""
    pairs: list[socket.socket] = []

    def socketpair(*args: Any, real: Any = socket.socketpair) -> tuple[socket.socket, ...]:
        pairs.extend(real(*args))
        return pairs[0], pairs[1]

    def gone(*args: Any) -> Any:
        raise HostError("pyvmm's helper has ended")

    tap = SimpleNamespace(fds=[], name="tap0", mtu=1500, features=lambda: 0)
    server = vduse_process.VduseProcess(cast(Any, tap))
    monkeypatch.setattr(socket, "socketpair", socketpair)
    monkeypatch.setattr(helper, "do", lambda *args: ([], []))
    monkeypatch.setattr(helper, "start_module", gone)
    with pytest.raises(HostError, match="has ended"):
        server.device()
    assert [end.fileno() for end in pairs] == [-1, -1]
    with subprocess.Popen(["true"]) as child:
        server._child = child
        monkeypatch.setattr(helper, "do", gone)
        server.close()
        assert child.returncode == 0


def test_a_fault_while_the_stand_in_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of the device that stands in for the kernel's may fail before ``go`` returns."""

    class Failing:
        def __init__(self, port: Any) -> None:
            pass

        def start(self, acked: int, memory: Any, rings: Any, device: vhost_fake.FakeVdpa) -> None:
            assert device.status() == VIRTIO_CONFIG_S_DRIVER_OK
            device.fault(0, "a bad ring")

    monkeypatch.setattr(vhost_fake, "EmulatedNet", Failing)
    device = vhost_fake.FakeVdpa(cast(Any, None), cast(Any, None))
    device.map([cast(Any, None)])
    device.go()
    assert device.status() == VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET


class Requests(vduse.VduseBackend):
    """A back-end that is asked by a test in place of the kernel."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._log = self.lines.append
        self._counts = dict.fromkeys(vduse.COUNTERS, 0)
        self._features = bits("VIRTIO_F_VERSION_1")
        self._device = cast(Any, self)
        self._status, self._due, self._awaited = 0, False, set()
        self._served, self._bases = [], {0: 7}
        self.acked = 0

    def driver_features(self) -> int:
        return self.acked

    def ask(self, kind: int, **fields: int) -> Any:
        request = ffi.new("struct vduse_dev_request *", {"type": kind, "request_id": 99})
        if "status" in fields:
            request.s.status = fields["status"]
        else:
            request.vq_state.index = fields.get("index", 0)
        response = ffi.new("struct vduse_dev_response *")
        ffi.memmove(response, self._answer(request), ffi.sizeof(response[0]))
        assert response.request_id == 99
        return response


def test_requests_of_the_kernel() -> None:
    """Positions in both formats; what is unknown or not on offer is refused, and told."""
    backend = Requests()
    answer = backend.ask(lib.VDUSE_GET_VQ_STATE, index=0)
    assert (answer.result, answer.vq_state.split.avail_index) == (0, 7)
    backend.acked = bits("VIRTIO_F_RING_PACKED")
    backend._bases[1] = 0x8003 | 0x0002 << 16
    state = backend.ask(lib.VDUSE_GET_VQ_STATE, index=1).vq_state.packed
    assert (state.last_avail_idx, state.last_avail_counter) == (3, 1)
    assert (state.last_used_idx, state.last_used_counter) == (2, 0)
    assert backend.ask(77).result == lib.VDUSE_REQ_RESULT_FAILED
    assert backend.ask(lib.VDUSE_SET_STATUS, status=11).result == lib.VDUSE_REQ_RESULT_FAILED
    assert [line.partition(":")[0] for line in backend.lines] == ["refused", "refused"]
    assert not backend._due
