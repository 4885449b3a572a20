"""A device that is no network card, on the PCI bus, with a vhost-user back-end: a real one for a
disk (qemu-storage-daemon), and bad ones.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm.bus import MMIO
from pyvmm.card.peripheral import Peripheral, make
from pyvmm.devopt import KINDS, Device
from pyvmm.errors import UsageError, VhostUserError
from pyvmm.pci import PciFunction
from pyvmm.spec import vhost_user as spec
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.vhostuser.wire import Listener
from tests.driver import Ring, bits, wait_for
from tests.pci_guest import Board, VirtioPciDriver
from tests.unit.test_vhost_user import no_leak, path
from tests.vu_fake import REPLY_ACK, Fake, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyvmm.kvm.vm import Vm

__all__ = ["no_leak", "path"]  # fixtures

PATIENCE = 60.0
CONFIG = REPLY_ACK | 1 << spec.VHOST_USER_PROTOCOL_F_CONFIG
CHANGES = CONFIG | 1 << spec.VHOST_USER_PROTOCOL_F_BACKEND_REQ
VERSION_1 = bits("VIRTIO_F_VERSION_1")
SECTORS = 2048
SLOT = 31


class Guest:
    """A board with one device, and its driver. :ivar ring: virtqueue 0."""

    def __init__(self, options: Device) -> None:
        self.board = Board()
        self.events: list[tuple[str, dict[str, object]]] = []
        self.lost: list[str] = []
        self.card: Peripheral
        try:
            self.card, self._release = make(
                SLOT - 1,
                "dev0",
                options,
                cast("Vm", self.board.vm),
                self.board.bus,
                self.board.memory,
                self.board.lock,
                recorder=None,
                emit=lambda event, **data: self.events.append((event, data)),
                lost=self.lost.append,
            )
        except BaseException:
            self.board.close()
            raise
        assert isinstance(self.card.transport, PciFunction)
        self.board.pci.add(self.card.transport, SLOT)
        self.pci = VirtioPciDriver(self.board, SLOT)
        self.pci.enable()
        self.ring: Ring | None = None

    def start(self, features: int = VERSION_1) -> Ring:
        """The driver is ready, with virtqueue 0."""
        if self.ring is not None:
            self.ring.close()
        self.pci.use_msix()
        assert self.pci.negotiate(features)
        self.pci.set("config_msix_vector", 0)
        self.ring = ring = Ring(self.board.memory, 64, 0x10000)
        ring.kick = lambda: self.pci.notify(0)  # type: ignore[method-assign]
        self.pci.set_ring(ring, vector=1)
        self.pci.driver_ok()
        return ring

    def config(self, offset: int, size: int) -> int:
        return self.pci.config(offset, size)

    def interrupts(self) -> set[int]:
        """The vectors that have come since the last call."""
        return {data - 0x30 for _, data in self.board.vm.delivered(0.0)}

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.card.cut()
        self._release.close()
        if self.ring is not None:
            self.ring.close()
        self.board.close()


@pytest.fixture
def listener(path: str) -> Iterator[Listener]:
    with closing(Listener(path)) as one:
        yield one


def reply(config: bytes, size: int | None = None) -> Callable[[socket.socket, Any], None]:
    """An answer to GET_CONFIG. :param size: what it says of its size."""

    def answer(sock: socket.socket, m: Any) -> None:
        head = struct.pack(spec.CONFIG, 0, len(config) if size is None else size, 0)
        sock.sendall(raw(m.request, head + config))

    return answer


# --- a real disk ----------------------------------------------------------------------------------


class Daemon:
    """qemu-storage-daemon with a disk of a mebibyte, whose sectors say their numbers."""

    def __init__(self, directory: Path, path: str) -> None:
        self.image, self.path = directory / "disk", path
        self.image.write_bytes(b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS)))
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"file,node-name=d,filename={self.image}"),
                "--export",
                f"vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={self.path},writable=on",
            ]
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def read(guest: Guest, ring: Ring, sector: int) -> None:
    """Ask for one sector (virtio 1.2, 5.2.6)."""
    guest.board.memory.write(0x20000, struct.pack("<IIQ", 0, 0, sector))
    guest.board.memory.write(0x21000, b"\xff" * 513)
    ring.add([(0x20000, 16, False), (0x21000, 512, True), (0x21200, 1, True)])
    ring.publish()


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="needs qemu-storage-daemon")
def test_a_disk_of_qemu_s_daemon_and_a_daemon_that_comes_back(path: str, tmp_path: Path) -> None:
    options = Device(id="block", socket=path)
    with Daemon(tmp_path, path) as daemon, Guest(options) as guest:
        assert guest.config(0, 8) == SECTORS
        assert guest.pci.offered() & bits("VIRTIO_F_RING_RESET", "VIRTIO_RING_F_EVENT_IDX")
        ring = guest.start()

        def served(sector: int) -> bool:
            data = guest.board.memory.read(0x21000, 513)
            return bool(ring.take_used()) and data == struct.pack("<Q", sector) * 64 + b"\0"

        read(guest, ring, 7)
        assert wait_for(lambda: served(7), PATIENCE)
        guest.card.set_paused(True)
        read(guest, ring, 8)
        guest.card.set_paused(False)
        assert wait_for(lambda: served(8), PATIENCE)

        daemon.kill()
        assert wait_for(lambda: guest.card.counters()["disconnections"], PATIENCE)
        read(guest, ring, 9)
        daemon.start()
        assert wait_for(lambda: served(9), PATIENCE)
        assert guest.card.counters()["connections"] == 2

        guest.pci.reset()
        ring = guest.start()
        read(guest, ring, 11)
        assert wait_for(lambda: served(11), PATIENCE)
        report = guest.card.report()
        assert report["kind"] == "block" and not report["faults"] and not report["driver_mistakes"]


# --- the configuration ----------------------------------------------------------------------------


def test_a_change_of_the_configuration_reaches_the_driver(path: str, listener: Listener) -> None:
    answers: dict[int, Any] = {spec.VHOST_USER_GET_CONFIG: reply(b"A" * 8)}
    options = Device(id="vsock", socket=path, queues=1)
    with Fake(listener, CHANGES, answers) as fake, Guest(options) as guest:
        assert guest.config(0, 8) == int.from_bytes(b"A" * 8, "little")
        guest.start()
        generation = guest.pci.get("config_generation")
        guest.interrupts()
        with socket.socket(fileno=os.dup(fake.requests[0])) as s:
            s.settimeout(PATIENCE)
            request = raw(spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, flags=9)
            s.send(request)  # nothing has changed: the driver need not look
            assert s.recv(100)[12:] == bytes(8)
            answers[spec.VHOST_USER_GET_CONFIG] = reply(b"B" * 8)
            s.send(request)
            assert s.recv(100)[12:] == bytes(8)
        assert wait_for(lambda: guest.config(0, 8) == int.from_bytes(b"B" * 8, "little"), PATIENCE)
        assert wait_for(lambda: guest.interrupts() == {0}, PATIENCE)
        assert guest.pci.get("config_generation") == generation + 1
        # The configuration of a back-end that comes back may be another one, too.
        answers[spec.VHOST_USER_GET_CONFIG] = reply(b"C" * 8)
        fake.drop()
        assert wait_for(lambda: guest.config(0, 8) == int.from_bytes(b"C" * 8, "little"), PATIENCE)


def test_what_the_driver_writes_reaches_the_back_end(path: str, listener: Listener) -> None:
    written: list[bytes] = []
    verdict = [0]

    def take(sock: socket.socket, m: Any) -> None:
        written.append(m.payload)
        sock.sendall(raw(m.request, struct.pack("<Q", verdict[0])))

    answers: dict[int, Any] = {
        spec.VHOST_USER_GET_CONFIG: reply(bytes(60)),
        spec.VHOST_USER_SET_CONFIG: take,
    }
    options = Device(id="block", socket=path)
    with Fake(listener, CONFIG, answers), Guest(options) as guest:
        at = guest.pci.place(4, 32)
        guest.board.write(MMIO, at, 1, 1)
        assert guest.config(32, 1) == 0 and guest.card.device.refused == 1  # no driver yet
        guest.start()
        guest.board.write(MMIO, at, 1, 1)
        assert guest.config(32, 1) == 1
        head = struct.pack(spec.CONFIG, 32, 1, 0)
        assert wait_for(lambda: written == [head + b"\1"], PATIENCE)
        verdict[0] = 1
        guest.board.write(MMIO, at, 1, 0)
        assert wait_for(lambda: len(guest.card.device.mistakes) == 2, PATIENCE)
        assert "refuses a write to the configuration" in guest.card.device.mistakes[1]
        assert guest.card.report()["vhost_user"]["connected"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(bytes(8), 60), "answered with 8 bytes that are said to be 60"),
        (reply(bytes(256), 60), "answered with 256 bytes"),
        (reply(bytes(60), 1 << 31), "said to be 2147483648"),
        (raw(spec.VHOST_USER_GET_CONFIG, b"\0" * 5), "said to be nothing"),
        (raw(spec.VHOST_USER_GET_CONFIG), "has no configuration of 60 bytes; give its size"),
        (reply(b"", 0), "has no configuration of 60 bytes"),
        (raw(spec.VHOST_USER_GET_CONFIG, bytes(5000)), "message of 5000 bytes"),
        (lambda sock, m: sock.close(), "GET_CONFIG"),
    ],
)
def test_a_back_end_that_lies_about_its_configuration(
    path: str, listener: Listener, answer: Any, words: str
) -> None:
    """At the start it is an error in one line; nothing is left behind."""
    with Fake(listener, CONFIG, {spec.VHOST_USER_GET_CONFIG: answer}):
        with pytest.raises(VhostUserError) as e:
            Guest(Device(id="block", socket=path))
        assert words in str(e.value)


def test_lies_silence_and_death_later_only_park_the_rings(path: str, listener: Listener) -> None:
    """The driver goes on with the configuration that it knows, until a back-end fits again."""
    answers: dict[int, Any] = {spec.VHOST_USER_GET_CONFIG: reply(b"A" * 60)}
    with Fake(listener, CHANGES, answers) as fake, Guest(Device(id="block", socket=path)) as guest:
        guest.start()
        assert guest.card.device.active
        for lie in (reply(bytes(8), 60), lambda sock, m: sock.close(), reply(b"", 0)):
            known = guest.card.counters()["disconnections"]
            answers[spec.VHOST_USER_GET_CONFIG] = lie
            os.write(fake.requests[-1], raw(spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, flags=1))
            assert wait_for(lambda: guest.card.counters()["disconnections"] > known, PATIENCE)  # noqa: B023
            assert guest.config(0, 1) == ord("A")
            answers[spec.VHOST_USER_GET_CONFIG] = reply(b"A" * 60)
            connected = guest.card.counters()["connections"]
            assert wait_for(lambda: guest.card.counters()["connections"] >= connected, PATIENCE)  # noqa: B023
            assert wait_for(lambda: not guest.card.device.datapath.problem(), PATIENCE)
        assert not guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET
        # A back-end that says nothing: the end of the machine does not wait for it.
        answers[spec.VHOST_USER_GET_CONFIG] = lambda sock, m: None
        seen = len(fake.seen)
        os.write(fake.requests[-1], raw(spec.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, flags=1))
        assert wait_for(lambda: spec.VHOST_USER_GET_CONFIG in fake.seen[seen:], PATIENCE)
        threading.Timer(0, guest.card.cut).start()
        guest.card.stop()


def test_features_are_the_back_end_s_without_what_no_device_has(
    path: str, listener: Listener
) -> None:
    class All(Fake):
        FEATURES = (1 << 64) - 1

    answers: dict[int, Any] = {spec.VHOST_USER_GET_CONFIG: reply(bytes(60))}
    with All(listener, CONFIG, answers), Guest(Device(id="block", socket=path)) as guest:
        offered = guest.pci.offered()
        assert offered & (1 << 24) - 1 == (1 << 24) - 1
        no = bits("VIRTIO_F_ACCESS_PLATFORM", "VIRTIO_F_SR_IOV", "VIRTIO_F_RING_PACKED")
        assert not offered & (no | 1 << 30 | 1 << 26 | 1 << 24)
        assert offered & bits("VIRTIO_F_IN_ORDER", "VIRTIO_RING_F_INDIRECT_DESC")


def test_a_back_end_can_call_before_it_sees_a_kick(path: str, listener: Listener) -> None:
    """Some serve the ring as soon as they have the kick's eventfd."""
    with Fake(listener) as fake, Guest(Device(id="rng", socket=path)) as guest:
        guest.start()
        assert wait_for(lambda: guest.card.device.serving, PATIENCE)
        call, kick = spec.VHOST_USER_SET_VRING_CALL, spec.VHOST_USER_SET_VRING_KICK
        assert [request for request in fake.seen if request in (call, kick)] == [call, kick]


def test_a_tag_of_our_own_and_a_device_without_configuration(path: str, listener: Listener) -> None:
    with Fake(listener):
        with Guest(Device(id="fs", socket=path, tag="x")) as guest:
            assert guest.config(0, 4) == ord("x") and guest.config(36, 4) == 1
        with Guest(Device(id=4, socket=path)) as guest:
            assert 4 not in guest.pci.caps  # VIRTIO_PCI_CAP_DEVICE_CFG
            assert guest.card.kind == "rng"
            guest.start()
        with pytest.raises(VhostUserError, match="protocol feature CONFIG"):
            Guest(Device(id="fs", socket=path))


# --- what is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vhost-net,id=rng,socket=s", "the only kind of device is vhost-user"),
        ("vhost-user,socket=s", "without id="),
        ("vhost-user,id=rng", "without socket="),
        ("vhost-user,id=rng,socket=", "socket="),
        ("vhost-user,id=rgn,socket=s", "did you mean rng?"),
        ("vhost-user,id=net,socket=s", "--net vhost-user,socket="),
        ("vhost-user,id=1,socket=s", "--net vhost-user,socket="),
        ("vhost-user,id=0,socket=s", "--device: id=0"),
        ("vhost-user,id=33,socket=s", "say how many virtqueues"),
        ("vhost-user,id=33,socket=s,queues=65", "use 1 to 64"),
        ("vhost-user,id=33,socket=s,queues=2,config-size=257", "use 0 to 256"),
        ("vhost-user,id=rng,socket=s,queue-size=100", "power of two"),
        ("vhost-user,id=rng,socket=s,tag=x", "only a file system"),
        (f"vhost-user,id=fs,socket=s,tag={'x' * 37}", "1 to 36 bytes"),
        ("vhost-user,id=fs,socket=s,queues=1", "use 2 or more"),
        ("vhost-user,id=rng,socket=s,color=red", "unknown key 'color'"),
        ("vhost-user,id=rng,id=rng,socket=s", "given twice"),
        ("vhost-user,id=rng,socket=s,notify=x", "notify=ioeventfd or notify=exit"),
        ("vhost-user,id=rng,socket=s,server=x", "server=on or server=off"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(UsageError) as e:
        Device.parse(text)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    kind = KINDS[name]
    same = Device.parse(f"vhost-user,id={kind.id},socket=s")
    assert same.kind is kind and same.queues == kind.queues > 0
    assert all(offset < kind.config_size for offset in kind.fields)
