"""Linux with `--net vhost-user` on DPDK's testpmd: net_vhost as server and as client, with net_tap,
with macswap, two queue pairs.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from tests.boot import seqnet
from tests.boot.guest import PYVMM, Guest, check_traffic
from tests.dpdk import command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

SOCKET, CONSOLE, PIDFILE, LOG = (f"/run/dpdk-test.{end}" for end in ("s", "console", "pid", "log"))
SPACE, TAP = "dpdk-test", "dtap0"
TAP_MAC = "02:00:00:00:00:01"
INSIDE = ("ip", "netns", "exec", SPACE)
DATAGRAMS = 300


class Pmd:
    """testpmd in the testbed, forwarding between the guest and a tap of its own (or back to the
    guest, swapped).
    """

    def __init__(self, host: Host, *, client: bool, macswap: bool = False) -> None:
        self.host, self.client, self.macswap = host, client, macswap
        vdevs = [f"net_vhost0,iface={SOCKET},queues=2{',client=1' if client else ''}"]
        if not macswap:
            # Left to itself net_tap has another address each time, and the guest goes on sending to
            # that in its ARP cache.
            vdevs.append(f"net_tap0,iface={TAP},mac={TAP_MAC}")
        mode = "--forward-mode=" + ("macswap" if macswap else "io")
        self._argv = [
            *INSIDE,
            *command(*vdevs, options=(mode, "--rxq=2", "--txq=2", "--auto-start")),
        ]

    def __enter__(self) -> Pmd:
        # Its input has to stay open. The socket of a dead one is not replaced by DPDK.
        self.host.sh(
            f"""rm -f {CONSOLE} {PIDFILE}; mkfifo {CONSOLE}
            {"" if self.client else f"rm -f {SOCKET}"}
            setsid sh -c 'exec 9<>{CONSOLE}; echo $$ >{PIDFILE}
            exec {shlex.join(self._argv)} <&9 >{LOG} 2>&1' &
            until [ -s {PIDFILE} ]; do sleep 0.1; done
            until {"true" if self.client else f"[ -S {SOCKET} ]"}
            do kill -0 $(cat {PIDFILE}); sleep 0.2; done
            {self._tap_script() if not self.macswap else ""}"""
        )
        return self

    @staticmethod
    def _tap_script() -> str:
        return f"""
            until ip -n {SPACE} link show {TAP} up 2>/dev/null | grep -q UP
            do kill -0 $(cat {PIDFILE}); sleep 0.2; done
            ip -n {SPACE} addr add 192.168.100.1/24 dev {TAP}"""

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone with its tap."""
        self.host.sh(
            f"""kill -9 $(cat {PIDFILE})
            while kill -0 $(cat {PIDFILE}) 2>/dev/null; do sleep 0.1; done
            while ip -n {SPACE} link show {TAP} 2>/dev/null; do sleep 0.1; done"""
        )

    def __exit__(self, *exc: object) -> None:
        self.host.sh(f"kill -9 $(cat {PIDFILE}) 2>/dev/null || true; rm -f {CONSOLE} {PIDFILE}")
        if exc[0]:
            print(self.host.run("cat", LOG).out)


class DpdkGuest(Guest):
    """A guest behind testpmd's tap."""

    def inside(self, nic: int) -> list[str]:
        return list(INSIDE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seqnet.build(tmp_path_factory.mktemp("seqnet"))


def check_datagrams(host: Host, guest: Guest, program: Path) -> None:
    """Numbered datagrams both ways, slowly: each comes once, and those of one queue in order."""
    counter = seqnet.HostCounter(host, program, TAP, INSIDE)
    try:
        sent = seqnet.GuestSender(guest, count=DATAGRAMS, pause_us=1000).wait()
        assert "1 packets received" in guest.do("ping -c 1 -W 60 192.168.100.1")  # comes after them
    finally:
        account = counter.account()
    assert (account["received"], account["next"]) == (sent, sent), account
    guest.do(
        f"{seqnet.PROGRAM} count eth0 >/tmp/counted & echo $! >/tmp/counter; "
        "until [ -s /tmp/counted ]; do sleep 0.1; done"
    )
    host.sh(
        f"{shlex.join(INSIDE)} {program} send {TAP} {DATAGRAMS} 1000; "
        f"{shlex.join(INSIDE)} ping -c 1 -W 60 192.168.100.2"
    )
    text = guest.do(
        "kill $(cat /tmp/counter); until grep -q next /tmp/counted; do sleep 0.1; done; "
        "tail -n 1 /tmp/counted"
    )
    assert f'"received": {DATAGRAMS}, "next": {DATAGRAMS}, "missing": 0, "repeated": 0' in text, (
        text
    )


@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
def test_testpmd(host: Host, program: Path, client: bool) -> None:
    """Ping, TCP, numbered datagrams; killed and started again, swapping addresses, and then with a
    tap again.

    :param client: testpmd connects, and pyvmm listens.
    """
    host.sh(f"ip netns add {SPACE}; ip -n {SPACE} link set lo up")
    net = f"vhost-user,socket={SOCKET},queues=2{',server=on' if client else ''}"
    try:
        pmd = Pmd(host, client=client)
        with pmd, DpdkGuest(host, "--cpus", "2", "--net", net) as guest:
            assert "Combined:\t2" in guest.do("ethtool -l eth0 | tail -n 4")
            check_traffic(guest)
            seqnet.install(guest, program)
            check_datagrams(host, guest, program)
            pmd.kill()
            with Pmd(host, client=client, macswap=True) as swapping:
                check_macswap(guest)
                swapping.kill()
            if not client:
                check_fewer_queues(host)
            with Pmd(host, client=client):
                check_traffic(guest)
                check_datagrams(host, guest, program)
                guest.leave()
        nic = guest.report["nets"][0]
        assert nic["counters"]["connections"] == 3 and nic["counters"]["timeouts"] == 0, nic
        assert nic["resets"] <= 1 and nic["queue_pairs"]["used"] == 2, nic
        problems = "\n".join(nic["vhost_user"]["problems"])
        assert client or "has 1 queue pairs, not 2" in problems, nic
    finally:
        host.sh(f"ip netns del {SPACE}; rm -f {SOCKET}")


def check_macswap(guest: Guest) -> None:
    """Numbered datagrams from a made-up address come back to that address."""
    guest.do("ip link set eth0 promisc on")
    before = "cat /sys/class/net/eth0/statistics/rx_packets"
    start = int(guest.do(before))
    guest.do(f"{seqnet.PROGRAM} send eth0 100 2000")
    guest.do(f"until [ $({before}) -ge {start + 50} ]; do {seqnet.PROGRAM} send eth0 10 2000; done")
    guest.do("ip link set eth0 promisc off")


def check_fewer_queues(host: Host) -> None:
    """A back-end of ours, with a tap and all its offloads but one queue pair, is refused."""
    argv = shlex.join((*INSIDE, *PYVMM, "backend", "--socket", SOCKET, "--tap", "one0"))
    host.sh(
        f"""rm -f {SOCKET}; setsid {argv} >{LOG} 2>&1 & pid=$!
        until [ $(grep -c 'front-end disconnected' {LOG}) -ge 2 ]; do kill -0 $pid; sleep 0.2; done
        kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"""
    )
