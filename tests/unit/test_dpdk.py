"""Our back-end under DPDK's virtio-user driver, and our front-end over DPDK's vhost driver: testpmd
is the foreign half each time.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.backend.ports import loop_port
from pyvmm.conformance.check import Checker
from pyvmm.conformance.probe import Probe
from pyvmm.hostnet.netns import Namespace
from tests.dpdk import TestPmd, command
from tests.driver import bits, wait_for
from tests.unit.test_vhost_user import PATIENCE, Guest, Running, frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.driver import NetDriver


@pytest.fixture(scope="module", autouse=True)
def dpdk() -> None:
    """Fails, rather than skips, where testpmd is missing: says what to do."""
    command()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def forwarded(pmd: TestPmd) -> tuple[int, int]:
    """Stop forwarding; packets that port 0 has received and sent."""
    start = len(pmd.lines)
    pmd.say("stop")
    pmd.expect("Done.", PATIENCE, start)
    text = "\n".join(pmd.lines[start:])
    section = text[text.index("Forward statistics for port 0") :]
    return tuple(int(re.search(rf"{way}-packets: (\d+)", section)[1]) for way in ("RX", "TX"))  # type: ignore[index, return-value]


RING_PACKED, IN_ORDER = bits("VIRTIO_F_RING_PACKED"), bits("VIRTIO_F_IN_ORDER")


# --- DPDK is the front-end ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queues", "keys", "features"),
    [
        (1, "", 0),
        (2, "", 0),
        (2, "packed_vq=1", RING_PACKED),
        (1, "in_order=1", IN_ORDER),
        (2, "packed_vq=1,in_order=1", RING_PACKED | IN_ORDER),
        (1, "in_order=1,mrg_rxbuf=0,vectorized=1", IN_ORDER),
        (1, "packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1", RING_PACKED | IN_ORDER),
    ],
)
def test_virtio_user_drives_our_loop(path: str, queues: int, keys: str, features: int) -> None:
    """Bursts go round and round; every packet is somewhere at the end. DPDK has a driver for each
    kind of ring.
    """
    with Running(path, loop_port(queues), unsealed=True) as running:
        vdev = f"net_virtio_user0,path={path},queues={queues},queue_size=256,{keys}".rstrip(",")
        with TestPmd(
            vdev, options=("--forward-mode=io", f"--rxq={queues}", f"--txq={queues}")
        ) as pmd:
            pmd.say("start tx_first 2")
            assert wait_for(
                lambda: running.backend.counters().get("rx_packets", 0) > 20000, PATIENCE
            )
            assert running.acked & (RING_PACKED | (IN_ORDER & features)) == features
            received, sent = forwarded(pmd)
            # What it sent last our worker may not have taken yet.
            wait_for(lambda: running.backend.counters()["rx_packets"] >= sent, PATIENCE)
            counters = running.backend.counters()
        assert sent == counters["tx_packets"] == counters["rx_packets"] >= received
        assert sent - received <= 64 * queues  # those on their way when it stopped
        assert not running.backend.counters()["refused"] and not counters["ring_faults"]
    assert running.log[:2] == ["front-end connected", "front-end disconnected"]


def test_virtio_user_answers_pings_through_our_tap(path: str) -> None:
    with (
        Namespace(address="192.168.94.1/24") as namespace,
        Running(path, namespace.tap, unsealed=True),
    ):
        vdev = f"net_virtio_user0,path={path},queue_size=256"
        with TestPmd(vdev, options=("--forward-mode=icmpecho", "--auto-start")):
            ping = ["ping", "-c", "5", "-i", "0.05", "-W", "60", "192.168.94.2"]
            text = namespace.run(ping, capture_output=True, text=True).stdout
            assert " 5 received" in text and "DUP" not in text, text


def test_virtio_user_survives_the_death_of_our_backend(path: str) -> None:
    """It is the server of the socket; the back-end is killed and another one comes."""
    argv = [sys.executable, "-m", "pyvmm", "backend", "--socket", path, "--client", "--loopback"]
    argv.append("--unsealed")  # DPDK's memory cannot be sealed
    vdev = f"net_virtio_user0,path={path},queue_size=256,server=1"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(argv, stderr=subprocess.DEVNULL, text=True)

    backend = start()  # testpmd waits for it before it says anything
    try:
        with TestPmd(vdev, options=("--forward-mode=io",)) as pmd:
            for _ in range(3):
                pmd.say("start tx_first")
                assert wait_for(lambda: received(pmd) > 1000, PATIENCE), pmd.lines[-40:]
                backend.kill()
                backend.wait(PATIENCE)
                forwarded(pmd)
                line = len(pmd.lines)
                pmd.say("clear port stats 0")
                pmd.expect("cleared", PATIENCE, line)
                backend = start()
                # A death in the middle of that would end testpmd, by SIGPIPE.
                pmd.expect("reconnection succeeds", PATIENCE, line)
    finally:
        backend.kill()
        backend.wait(PATIENCE)


def received(pmd: TestPmd) -> int:
    """Packets that port 0 has received since its statistics were cleared."""
    start = len(pmd.lines)
    pmd.say("show port stats 0")
    pmd.expect("Tx-bps", PATIENCE, start)
    match = re.search(r"RX-packets: (\d+)", "\n".join(pmd.lines[start:]))
    assert match
    return int(match[1])


# --- DPDK is the back-end -------------------------------------------------------------------------


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
def test_macswap_over_two_queue_pairs(path: str, client: bool) -> None:
    """Sequence numbers over a net_vhost port that swaps addresses and sends back; then it is killed
    and comes back.
    """
    vdev = f"net_vhost0,iface={path},queues=2" + (",client=1" if client else "")
    options = ("--forward-mode=macswap", "--rxq=2", "--txq=2", "--auto-start")
    with TestPmd(vdev, options=options) as pmd, Guest(path, queues=2, server=client) as guest:
        guest.start()
        check_macswap(guest)
        bases = guest.path.stop()
        assert bases == [r.used_idx for d in guest.drivers for r in d.rings]
        guest.start(bases)
        check_macswap(guest)
        pmd.process.kill()
        for round in range(2, 5):
            assert wait_for(lambda: not guest.path.connected, PATIENCE)
            if not client:
                Path(path).unlink(missing_ok=True)  # DPDK does not replace the socket of a dead one
            with TestPmd(vdev, options=options) as pmd:
                assert guest.connected(round), (guest.path.problems, pmd.lines)
                check_macswap(guest)
                pmd.process.kill()
        assert not guest.faults and not guest.counter("timeouts")


def check_macswap(guest: Guest) -> None:
    """On each pair: wait until it forwards (until then packets are lost), then each number once and
    in order.
    """
    for driver in guest.drivers:

        def numbers(driver: NetDriver = driver) -> list[int]:
            driver.tx.take_used()
            driver.poll()
            packets = [
                p for p in driver.received if p[24:26] != b"\x80\x35"
            ]  # DPDK sends our announcement back
            assert all(p[12:24] == b"BBBBBBAAAAAA" for p in packets), packets
            return [struct.unpack_from("<I", p, 26)[0] for p in packets]

        def forwards(
            driver: NetDriver = driver, numbers: Callable[[], list[int]] = numbers
        ) -> bool:
            driver.send(packet(0))
            return wait_for(lambda: bool(numbers()), 0.05)

        driver.received.clear()
        assert wait_for(forwards, PATIENCE), guest.path.problems
        assert wait_for(lambda d=driver: not d.tx.outstanding, PATIENCE)  # type: ignore[misc]
        for at in range(1, 513, 32):
            driver.send(*[packet(n) for n in range(at, at + 32)])
            assert wait_for(lambda last=at + 31, n=numbers: last in n(), PATIENCE)  # type: ignore[misc]
        assert [n for n in numbers() if n] == list(range(1, 513))


def packet(n: int) -> bytes:
    return b"AAAAAABBBBBB\x88\xb5" + frame(n, 100)


def test_probe(path: str) -> None:
    """What DPDK answers to each message, and that it refuses none."""
    with TestPmd(f"net_vhost0,iface={path},queues=2", options=("--rxq=2", "--txq=2")) as pmd:
        pmd.expect("Done", PATIENCE)
        with Probe(path, timeout=PATIENCE) as probe:
            probe.run()
    assert {s.outcome for s in probe.steps} <= {"ok", "sent"}, probe.steps
    assert probe.queues == 128  # its limit, whatever queues= says


def test_check(path: str) -> None:
    """DPDK passes but for num_buffers, which it leaves 0 without MRG_RXBUF (5.1.6.4 wants 1), and
    for packed descriptors, which it marks as written at another address.
    """
    with TestPmd(
        f"net_vhost0,iface={path},queues=2",
        options=("--forward-mode=io", "--rxq=2", "--txq=2", "--auto-start"),
    ) as pmd:
        pmd.expect("Checking link", PATIENCE)
        checker = Checker(path, timeout=PATIENCE, queues=2, echo_seconds=PATIENCE)
        checker.run()
    wrong = {i.name: i.detail for i in checker.items if i.result != "passed"}
    assert list(wrong) == ["num_buffers", "pages are marked for a migration"], wrong
    assert wrong["num_buffers"] == "num_buffers is [0], without MRG_RXBUF"
    marks = wrong["pages are marked for a migration"]
    assert marks.startswith("packed: 2 of ") and "the descriptors of ring 0" in marks
