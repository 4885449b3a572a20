"""The textbook device (docs/ladder.md): frames that the vCPU's thread sends, interrupts by ioctl,
one frame at a time. A mock guest on the machine's real buses; tests/host has real vCPUs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pyvmm.bus import MMIO
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.fd import Fd
from pyvmm.kvm.inject import Injection
from pyvmm.kvm.vm import Vm
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.spec.virtio_pci import VIRTIO_PCI_CAP_NOTIFY_CFG
from pyvmm.virtio.net import PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.driver import bits, wait_for
from tests.pci_guest import Board, NetGuest
from tests.vhost_fake import LinkedCable

MAC = bytes.fromhex("525400123456")
PLAIN = bits("VIRTIO_F_VERSION_1", "VIRTIO_NET_F_MRG_RXBUF")
EVENT_IDX = bits("VIRTIO_RING_F_EVENT_IDX")
PACKED = bits("VIRTIO_F_RING_PACKED")


class Rig:
    """A board with one card in slot 1, on a cable."""

    def __init__(
        self,
        features: int = PLAIN,
        *,
        interrupt: str = "ioctl",
        cable: LinkedCable | None = None,
        fill: bool = True,
        **path: Any,
    ) -> None:
        self.board = Board()
        self.cable = cable or LinkedCable()
        self.path = EmulatedNet(self.cable, **{"in_exit": True, "batch": False, **path})
        self.device = NetDevice("net0", self.board.memory, self.path, self.cable, MAC)
        self.board.add(
            VirtioPci(
                cast("Vm", self.board.vm),
                self.board.bus,
                self.device,
                PCI_CLASS_NETWORK_ETHERNET,
                notify="exit",
                interrupt=interrupt,
            )
        )
        self.guest = NetGuest(self.board, 1, features, fill=fill)

    def kick(self) -> None:
        """As the driver's write, by the bus; other threads may do so at once."""
        at = self.guest.pci.place(VIRTIO_PCI_CAP_NOTIFY_CFG, self.guest.pci.notify_multiplier)
        self.board.access(MMIO, at, 2, b"\1\0")

    def sent(self) -> list[bytes]:
        """The frames on the cable now, without their headers."""
        out = []
        while True:
            try:
                out.append(self.cable.far.recv(65536)[12:])
            except BlockingIOError:
                return out

    def raised(self) -> list[int]:
        """Interrupts by ioctl, per virtqueue."""
        return [q.call.raised for q in self.device.queues[:2] if isinstance(q.call, Injection)]

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: Any) -> None:
        self.guest.close()
        self.board.close()
        self.cable.close()


@pytest.fixture(params=[PLAIN, PLAIN | EVENT_IDX, PLAIN | PACKED], ids=["plain", "event", "packed"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with Rig(request.param) as r:
        yield r


def frame(n: int) -> bytes:
    return n.to_bytes(4, "little") + bytes(56)


def idle(rig: Rig) -> None:
    """Wait until the thread has found nothing to send at the start. It has the lock until it
    sleeps, so from then on kicks are the vCPU's. One frame has come in.
    """
    assert wait_for(lambda: rig.path.counters()["fd_reads"])
    rig.cable.far.send(bytes(12) + frame(999))
    assert rig.guest.net.wait_packets(1)


def test_the_vcpu_sends_in_its_exit(rig: Rig) -> None:
    """When the access returns, the frames are out; each has a publication of its own."""
    idle(rig)
    before = rig.path.counters()
    for n in range(20):
        rig.guest.net.queue(frame(2 * n))
        rig.guest.net.queue(frame(2 * n + 1))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert rig.sent() == [frame(2 * n), frame(2 * n + 1)]
        rig.guest.net.poll()
    after = rig.path.counters()
    for name, want in (("tx_kicks", 20), ("tx_packets", 40), ("tx_batches", 40)):
        assert after[name] - before[name] == want, name


def test_a_batch_is_one_publication() -> None:
    with Rig(batch=True) as rig:
        idle(rig)
        before = rig.path.counters()["tx_batches"]
        for n in range(10):
            rig.guest.net.queue(frame(n))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert rig.sent() == [frame(n) for n in range(10)]
        assert rig.path.counters()["tx_batches"] == before + 1


def test_one_interrupt_per_frame(rig: Rig) -> None:
    idle(rig)
    before, irqs = rig.path.counters(), rig.raised()
    for n in range(30):
        rig.cable.far.send(bytes(12) + frame(n))
        assert rig.guest.net.wait_packets(n + 2)
    after = rig.path.counters()
    assert after["rx_packets"] - before["rx_packets"] == 30
    assert after["rx_batches"] - before["rx_batches"] == 30
    calls = after["rx_calls"] - before["rx_calls"]
    assert rig.raised()[0] - irqs[0] == calls
    if not rig.device.driver_features & EVENT_IDX:  # else this driver asks for the first one only
        assert calls == 30
    assert not rig.board.vm.irqfds and not rig.board.vm.kicks


def test_a_masked_vector_keeps_its_interrupt() -> None:
    with Rig() as rig:
        idle(rig)
        rig.guest.pci.mask(1, True)
        before = rig.raised()[0]
        rig.cable.far.send(bytes(12) + frame(1))
        assert rig.guest.net.wait_packets(2)
        assert wait_for(lambda: rig.guest.pci.pending() & 2)
        assert rig.raised()[0] == before
        rig.guest.pci.mask(1, False)
        assert rig.raised()[0] == before + 1 and not rig.guest.pci.pending()


def test_what_a_full_tap_took_not_is_sent_by_the_thread() -> None:
    """The exit ends, and the frames go on in order once the tap takes them."""
    with Rig() as rig:
        idle(rig)
        total = 0
        frames: list[bytes] = []
        while not rig.path.counters()["tx_blocks"]:
            rig.guest.net.poll()
            rig.guest.net.send(frame(total))
            total += 1
            assert total < 100_000

        def all_there() -> bool:
            frames.extend(rig.sent())
            return len(frames) >= total

        assert wait_for(all_there)
        assert frames == [frame(n) for n in range(total)]


class Clogged(LinkedCable):
    """A cable that takes no frame, and when ``cut`` tells nothing but an error, as a deleted tap
    does: a full pipe. Nothing can be read from it.
    """

    def __init__(self) -> None:
        super().__init__()
        for fd in self.fds:
            fd.close()
        self.reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            self.fds = [Fd(writer)]

    def cut(self) -> None:
        os.close(self.reader)


def test_what_a_full_tap_took_not_is_dropped_when_the_tap_goes() -> None:
    """The vCPU found the tap full and asked for no kick, so none comes for that frame."""
    cable = Clogged()
    with Rig(PLAIN | EVENT_IDX, cable=cable, fill=False, batch=True) as rig:
        rig.kick()  # nothing is to be sent, so from here on the thread waits for the next kick
        rig.guest.net.queue(frame(1))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert wait_for(lambda: rig.path.counters()["tx_blocks"])
        cable.cut()
        assert wait_for(lambda: rig.path.counters()["tx_drop_link"] == 1)
        rig.guest.net.queue(frame(2))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert wait_for(lambda: rig.path.counters()["tx_drop_link"] == 2)


def refuse_epoll_ctl() -> None:
    """Have the calling thread's epoll_ctl() fail, as a filter of vCPUs' threads refuses it."""
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, 233), (0x06, 0, 0, 0x50000 | errno.EPERM)]
    code += [(0x06, 0, 0, 0x7FFF0000)]
    rows = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(rows))
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert not libc.prctl(22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def watchers(number: int) -> int:
    """How many epoll descriptors of this process look at a descriptor."""
    count = 0
    for info in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            count += len(re.findall(rf"^tfd: +{number} ", info.read_text(), re.M))
    return count


def test_a_vcpu_that_finds_the_tap_gone_leaves_epoll_to_the_thread() -> None:
    """The sandbox ends a machine whose vCPU calls epoll_ctl()."""
    with Rig(batch=True) as rig:
        idle(rig)
        number = rig.cable.fds[0].fileno()
        assert watchers(number) == 1
        rig.cable.far.shutdown(socket.SHUT_RD)  # only who sends finds out
        rig.guest.net.queue(frame(1))
        rig.guest.net.tx.publish(kick=False)

        def vcpu() -> None:
            refuse_epoll_ctl()
            rig.kick()

        thread = threading.Thread(target=vcpu)
        thread.start()
        thread.join()
        assert rig.path.counters()["tx_drop_link"] == 1
        assert wait_for(lambda: watchers(number) == 0)
        assert rig.path.counters()["link_losses"] == 1


def test_vcpu_and_thread_take_turns() -> None:
    """Frames go out in the exits while others come in by the thread; nothing is lost or swapped."""
    with Rig(PLAIN | EVENT_IDX) as rig:
        idle(rig)
        sent, got = 0, []
        for _ in range(50):
            for _ in range(10):
                rig.guest.net.queue(frame(sent))
                rig.cable.far.send(bytes(12) + frame(sent))
                sent += 1
            rig.guest.net.tx.publish(kick=False)
            rig.kick()
            got += rig.sent()
            rig.guest.net.tx.take_used()
            rig.guest.net.poll()
        assert got == [frame(n) for n in range(sent)]
        packets = rig.guest.net.wait_packets(sent + 1)
        assert [p[12:] for p in packets[1:]] == got


def test_a_pause_and_a_reset_take_the_kicks_back() -> None:
    """Meanwhile a kick goes to the eventfd, and whoever goes on serves it."""
    with Rig() as rig:
        idle(rig)
        rig.device.set_paused(True)
        rig.guest.net.queue(frame(1))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert not rig.sent()
        rig.device.set_paused(False)
        assert wait_for(lambda: rig.path.counters()["tx_packets"])
        assert rig.sent() == [frame(1)]
        rig.guest.pci.reset()
        rig.kick()
        assert not rig.sent() and not rig.path.workers()


def test_a_malformed_ring_ends_in_needs_reset() -> None:
    """The fault is found in the vCPU's own exit."""
    with Rig() as rig:
        idle(rig)
        rig.guest.net.tx.set_desc(0, 1 << 40, 64, 0, 0)
        rig.guest.net.tx.set_avail(rig.guest.net.tx.avail_idx, 0)
        rig.guest.net.tx.avail_idx += 1
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert wait_for(lambda: rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET)
        assert any("queue 1" in fault for fault in rig.device.faults)
        rig.cable.far.send(bytes(12) + frame(1))
        assert rig.guest.net.wait_packets(2)  # the other direction goes on


def test_interrupts_by_irqfd_from_the_exit() -> None:
    """worker=vcpu alone: the rest as usual."""
    with Rig(interrupt="irqfd", batch=True) as rig:
        idle(rig)
        assert len(rig.board.vm.irqfds) >= 2 and not rig.raised()
        rig.guest.net.queue(frame(1))
        rig.guest.net.tx.publish(kick=False)
        rig.kick()
        assert rig.sent() == [frame(1)]
