"""Eventfds that a hostile process shares: it clears O_NONBLOCK and fills the counter, even between
our look at the counter and our write.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyvmm.bus import MMIO
from pyvmm.fd import EventFd
from pyvmm.virtio.pci.transport import NOTIFY
from tests.driver import bits, wait_for
from tests.unit.test_net_worker import MRG, Rig, frame
from tests.unit.test_virtio_pci import Rig as CardRig
from tests.unit.test_virtio_pci import window

PATIENCE = 60.0
FULL = 2**64 - 2
PLAIN = bits("VIRTIO_F_VERSION_1") | MRG

#: Says of every counter that it has room: so the peer has filled it since, whenever we look.
SHIM = r"""
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask)
{
	if (n == 1 && fds->events == POLLOUT) {
		fds->revents = POLLOUT;
		return 1;
	}
	return (int)syscall(SYS_ppoll, fds, n, timeout, mask, 8);
}
"""


def spoil(event: EventFd) -> None:
    """What the peer does."""
    event.drain()
    os.eventfd_write(event.fileno(), FULL)
    os.set_blocking(event.fileno(), True)


def test_a_worker_goes_on_if_the_call_s_counter_is_full() -> None:
    with Rig(PLAIN) as rig:
        for ring in rig.driver.rings:
            spoil(ring.call_fd)
        rig.start()
        for n in range(50):
            rig.driver.send(frame(n))
            assert rig.cable.receive()[12:] == frame(n)
        assert wait_for(lambda: rig.driver.tx.outstanding == 0, PATIENCE)
        assert rig.path.stop() == [0, 50]


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
def test_a_guest_may_kick_although_the_counter_is_full(notify: str) -> None:
    """By the register, of which KVM knows or not, and by the window in configuration space."""
    with CardRig(notify=notify) as rig:
        g = rig.guest()
        for queue in rig.device.queues[:2]:
            spoil(queue.kick)
        for n in (0, 1):
            rig.board.access(MMIO, g.pci.bar + NOTIFY + 4 * n, 2, b"\0\0")
            window(rig.board, g.pci, NOTIFY + 4 * n, 2, 0)
            rig.board.config_write(1, g.pci.window + 16, 2, n)
        for queue in rig.device.queues[:2]:
            assert queue.kick.drain() == FULL
        assert not rig.device.faults


def races() -> None:
    """In a process of its own, under the shim."""
    with EventFd() as event:
        spoil(event)
        event.nudge()
        assert event.drain() == FULL
    with Rig(PLAIN) as rig:
        spoil(rig.driver.tx.call_fd)
        rig.start()
        rig.driver.send(frame(1))
        assert rig.cable.receive()[12:] == frame(1)
        syscall = Path(f"/proc/self/task/{rig.path.workers()[0]['tid']}/syscall")
        try:  # the worker is in writev(2)
            assert wait_for(lambda: syscall.read_text().split()[0] == "20", PATIENCE)
        except PermissionError:
            assert wait_for(lambda: rig.driver.tx.outstanding == 0, PATIENCE)
        assert rig.path.stop() == [0, 1]


def test_a_counter_that_is_filled_just_before_we_write(tmp_path: Path) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    options = ["-shared", "-fPIC", "-Wl,-z,now"]
    subprocess.run(["gcc", *options, "-o", shim, tmp_path / "shim.c"], check=True)
    subprocess.run(
        [sys.executable, "-c", "from tests.unit.test_event import races; races()"],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        cwd=Path(__file__).parents[2],
        timeout=PATIENCE,
        check=True,
    )


def test_nudge_from_many_threads() -> None:
    """Each has a timer of its own; no kick is lost."""

    def nudge(event: EventFd) -> None:
        for _ in range(200):
            event.nudge()

    with EventFd() as event:
        threads = [threading.Thread(target=nudge, args=(event,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert event.drain() == 800
