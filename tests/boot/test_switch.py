"""Switching the data path of a running Linux guest, with real vhost-net and our own back-end:
nothing lost, nothing repeated.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PYVMM, Guest, check_ping
from tests.perf.soak import build, waiting

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program that sends and counts, built out here where that is quick."""
    return build(str(tmp_path_factory.mktemp("flow")))


def soak(host: Host, flow: str, *args: str) -> str:
    """`make soak` in the testbed; its last line."""
    result = host.run(sys.executable, "-m", "tests.perf.soak", "--flow", flow, *args, timeout=1200)
    last = result.out.rstrip().rpartition("\n")[2]
    assert result.status == 0 and last.startswith("PASS: "), f"{result.out}\n{result.err}"
    return last


def test_under_traffic(host: Host, flow: str) -> None:
    """Round all three modes under numbered datagrams and TCP both ways."""
    assert "60 switches (60 switched, 0 refused)" in soak(host, flow, "--switches", "60")


def test_queue_pairs(host: Host, flow: str) -> None:
    """The same with two queue pairs and two vCPUs."""
    soak(host, flow, "--switches", "12", "--queues", "2", "--cpus", "2")


def test_packed_rings(host: Host, flow: str) -> None:
    """Positions of packed rings are handed over, with two queue pairs."""
    soak(host, flow, "--switches", "24", "--packed", "--queues", "2")


def test_faults_in_the_hand_over(host: Host, flow: str) -> None:
    """Every other switch fails at the worst moment; traffic goes on, and the next one succeeds."""
    last = soak(host, flow, "--switches", "12", "--faults")
    assert "rolled-back" in last, last


def test_by_name(host: Host) -> None:
    """`switchable=` is told in one line; `pyvmm switch` reaches the machine; the report splits by
    mode.
    """
    keys = "emulated,switchable=vhost-net+vhost-user"
    with Guest(host, "--name", "switched", "--net", keys) as guest:
        line = "pyvmm: net0 can be switched between emulated, vhost-net, vhost-user; offers "
        assert line in guest.err and "MRG_RXBUF" in guest.err
        check_ping(guest)
        for old, new in (("emulated", "vhost-net"), ("vhost-net", "vhost-user")):
            result = host.run(*PYVMM, "switch", "--host", "local", "switched", new)
            assert result.status == 0 and f"net0: {old} -> {new}, gap " in result.out, result
            check_ping(guest)
        result = host.run(*PYVMM, "switch", "--host", "local", "switched", "vhost-net,mtu=9000")
        assert result.status == 114 and "unknown key 'mtu'" in result.err, result
        guest.leave()
        report = guest.report
        nic = report["nets"][0]
        assert nic["mode"] == "vhost-user" and nic["switch_count"] == len(nic["switches"]) == 2
        assert [s["outcome"] for s in nic["switches"]] == ["switched"] * 2
        modes = nic["modes"]
        assert {m: modes[m]["times"] for m in modes} == {
            "emulated": 1,
            "vhost-net": 1,
            "vhost-user": 1,
        }
        returns = report["exits"]["kvm_run_returns"]
        assert sum(m["exits"]["kvm_run_returns"] for m in modes.values()) == returns
        for mode in modes.values():
            assert mode["counters"]["rx_packets"] > 0 < mode["counters"]["tx_packets"]
            assert sum(mode["exits"]["by_device"].values()) == mode["exits"]["kvm_run_returns"]


def test_what_counts_can_count(host: Host, flow: str) -> None:
    """Lost, repeated and late datagrams, all are told."""
    receiver = subprocess.Popen([flow, "udp-receive", "9009"], stdout=subprocess.PIPE, text=True)
    with receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        host.wait_until(lambda: waiting(9009, receiver.pid) is not None, "no receiver")
        for number in (0, 1, 1, 3, 2, 6):
            s.sendto(struct.pack("<Q", number) + bytes(8), ("127.0.0.1", 9009))
        host.wait_until(lambda: waiting(9009, receiver.pid) == 0, "not read")
        receiver.terminate()
        assert receiver.stdout
        text = receiver.stdout.read()
    assert "received=6 repeated=1 missing=2 first-missing=4 disordered=2" in text, text
