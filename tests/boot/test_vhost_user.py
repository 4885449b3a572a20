"""`--net vhost-user` under real Linux: one guest whose back-ends come, go, hang, lie and are
killed; and two guests back to back.
"""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot import hostile, seqnet
from tests.boot.guest import PATIENCE, PYVMM, Guest, check_traffic, pings
from tests.boot.hostile import MALICE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.boot.guest import Host

SOCKET, OTHER, PIDFILE, LOG = (f"/run/vu-test.{end}" for end in ("a", "b", "pid", "log"))
SPACE, TAP, MTU = "vu-test", "vu0", 1400
NAME = "vu-test"
INSIDE = ("ip", "netns", "exec", SPACE)
KILLS = 20


class Backend:
    """A back-end in the testbed, in the background: `pyvmm backend`, or another Python program of
    ours.

    :param args: of `pyvmm backend`. :param program: in its place.
    """

    def __init__(
        self, host: Host, *args: str, program: tuple[str, ...] = (), space: bool = True
    ) -> None:
        self.host = host
        argv = program or (*PYVMM, "backend", "--socket", SOCKET, *args)
        self._command = shlex.join((*(INSIDE if space else ()), *argv))

    def start(self) -> Backend:
        """Start it, and wait until it listens (it replaces what a killed one has left)."""
        self.host.sh(self.script())
        return self

    def script(self) -> str:
        """The same for a longer script."""
        return f"""
            rm -f {SOCKET} {OTHER}
            setsid {self._command} >{LOG} 2>&1 </dev/null & echo $! >{PIDFILE}
            until [ -S {SOCKET} ]; do kill -0 $(cat {PIDFILE}); sleep 0.2; done
        """

    def signal(self, name: str) -> None:
        """Send it a signal."""
        self.host.sh(f"kill -{name} $(cat {PIDFILE})")

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        self.host.sh(
            f"pid=$(cat {PIDFILE}); kill $pid 2>/dev/null || true; "
            "while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
        )
        self.host.sh(f"! [ -e {SOCKET} ]; rm -f {PIDFILE}")

    def log(self) -> str:
        """What it has said."""
        return self.host.run("cat", LOG).out

    def __enter__(self) -> Backend:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


class OutsideGuest(Guest):
    """A guest whose tap is the back-end's."""

    def inside(self, nic: int) -> list[str]:
        return list(INSIDE)


def tap_backend(host: Host) -> Backend:
    """The good one."""
    return Backend(host, "--tap", TAP)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seqnet.build(tmp_path_factory.mktemp("seqnet"))


@contextmanager
def tap_space(host: Host) -> Iterator[None]:
    """SPACE with TAP, the host's end of what a back-end moves."""
    host.sh(
        f"""ip netns add {SPACE}
        ip -n {SPACE} tuntap add dev {TAP} mode tap
        ip -n {SPACE} addr add 192.168.100.1/24 dev {TAP}
        ip -n {SPACE} link set {TAP} up"""
    )
    try:
        yield
    finally:
        host.sh(f"ip netns del {SPACE}")


@contextmanager
def one_guest(host: Host, program: Path, *, packed: bool = False) -> Iterator[OutsideGuest]:
    """A guest with seqnet in it, whose back-end has just gone; SPACE with TAP is there as long as
    it is.
    """
    with tap_space(host):
        backend = tap_backend(host).start()
        net = f"vhost-user,socket={SOCKET},mtu={MTU}{',with=packed' if packed else ''}"
        with OutsideGuest(host, "--name", NAME, "--net", net) as guest:
            seqnet.install(guest, program)
            backend.stop()
            yield guest


@pytest.fixture(scope="module")
def guest(host: Host, program: Path) -> Iterator[OutsideGuest]:
    """The one guest of all tests. No back-end is there before a test, nor after it."""
    before = host.leftovers()
    with one_guest(host, program) as guest:
        yield guest
    host.wait_until(
        lambda: not host.left_behind(before), lambda: f"left behind: {host.left_behind(before)}"
    )


def report_so_far(host: Host) -> dict[str, Any]:
    """The report of the guest's card."""
    answer = host.run(*PYVMM, "qmp", "--host", "local", NAME, "x-pyvmm-report")
    assert answer.status == 0, answer
    (nic,) = json.loads(answer.out)["nets"]
    return dict(nic)


def possible_repeats(host: Host) -> int:
    """The number that pyvmm counts, so far."""
    count: int = report_so_far(host)["counters"]["tx_possible_repeats"]
    return count


def wait_for_problem(host: Host, words: str) -> None:
    """Until the report has such a problem of a back-end."""

    def problems() -> str:
        return "\n".join(report_so_far(host)["vhost_user"]["problems"])

    host.wait_until(lambda: words in problems(), lambda: f"{words!r} is not in:\n{problems()}")


def undisturbed(guest: Guest) -> None:
    """The guest's kernel has said nothing about its card since it booted."""
    text = guest.do(
        "dmesg | grep -E 'NETDEV WATCHDOG|TX timeout|virtio.*(reset|error|fail|unexpected)' || true"
    )
    assert text == "", text


@pytest.mark.usefixtures("nothing_left")
def test_traffic_and_a_kill_under_traffic(host: Host, guest: OutsideGuest) -> None:
    """A TCP transfer survives the back-end's death and return, and the guest's driver notices
    nothing.
    """
    with tap_backend(host) as backend:
        check_traffic(guest)
        want = guest.do("head -c 24m /dev/urandom >/tmp/data; sha256sum </tmp/data").split()[0]
        server = host.start(*INSIDE, "busybox", "nc", "-l", "-p", "7003", "-e", "sha256sum")
        count = f"/sys/class/net/{TAP}/statistics/rx_bytes"
        before = int(host.sh(f"{' '.join(INSIDE)} cat {count}"))
        guest.start(
            "sh -c 'until busybox nc 192.168.100.1 7003 </tmp/data >/tmp/sum; do sleep 0.2; done; "
            "cat /tmp/sum >/tmp/end'"
        )
        host.sh(
            f"""{" ".join(INSIDE)} sh -c '
                while [ $(cat {count}) -lt {before + (2 << 20)} ]; do sleep 0.1; done'
            kill -9 $(cat {PIDFILE})
            {backend.script()}"""
        )
        text = guest.do(
            "until [ -s /tmp/end ]; do sleep 0.2; done; cat /tmp/end; rm /tmp/end /tmp/data"
        )
        assert text.split()[:1] == [want], (text, backend.log())
        assert server.result().status == 0, server.result()
        check_traffic(guest)
        undisturbed(guest)


def kill_under_traffic(
    host: Host,
    guest: OutsideGuest,
    program: Path,
    kills: int,
    *,
    seed: int = 1,
    patience: float = 5 * PATIENCE,
) -> dict[str, Any]:
    """Numbered datagrams from the guest while its back-end is killed again and again.

    :returns: seqnet's account at the tap; the number ``sent``; what the ``reviver`` says.
    """
    argv = (sys.executable, "-m", "tests.boot.reviver", SOCKET, TAP, str(kills), str(seed))
    backend = Backend(host, program=argv).start()
    try:
        counter = seqnet.HostCounter(host, program, TAP, INSIDE)
        try:
            sender = seqnet.GuestSender(guest)
            host.sh(
                f"until grep -q done {LOG}; do kill -0 $(cat {PIDFILE}); sleep 0.5; done",
                timeout=patience,
            )
            sent = sender.stop()
            # It comes after all of them, in the same queue.
            assert "1 packets received" in guest.do("ping -c 1 -W 60 192.168.100.1")
        finally:
            account = counter.account()
    finally:
        backend.stop()
    return {**account, "sent": sent, "reviver": json.loads(backend.log().splitlines()[-1])}


@pytest.mark.usefixtures("nothing_left")
def test_kills_lose_and_repeat_nothing(host: Host, guest: OutsideGuest, program: Path) -> None:
    """With INFLIGHT every datagram of the guest comes to the tap once and in order, whenever the
    back-end is killed.
    """
    before = possible_repeats(host)
    account = kill_under_traffic(host, guest, program, KILLS)
    assert possible_repeats(host) == before, account
    assert account["reviver"]["kills"] == KILLS and not account["reviver"]["problem"], account
    assert account["overflow"] == 0 and account["next"] == account["sent"] > 20 * KILLS, account
    assert (account["repeated"], account["late"], account["missing"]) == (0, 0, 0), json.dumps(
        account
    )
    undisturbed(guest)


@pytest.mark.usefixtures("nothing_left")
def test_a_stopped_backend_stops_no_cpu(host: Host, guest: OutsideGuest) -> None:
    """SIGSTOP: packets wait. What needs the back-end's answer gives it up in the end, and the guest
    goes on.
    """
    with tap_backend(host) as backend:
        check_traffic(guest)
        backend.signal("STOP")
        try:
            guest.start("sh -c 'ping -c 1 -W 60 192.168.100.1 >/tmp/ping; echo $? >/tmp/end'")
            guest.do("i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done; ! [ -e /tmp/end ]")
        finally:
            backend.signal("CONT")
        assert (
            guest.do("until [ -s /tmp/end ]; do sleep 0.1; done; cat /tmp/end; rm /tmp/end").strip()
            == "0"
        )
        backend.signal("STOP")
        try:
            # The control queue: the rings stop and start for it.
            guest.do("ethtool -K eth0 rx-gro-hw off")
            guest.do("i=0; while [ $i -lt 2000 ]; do i=$((i + 1)); done")
        finally:
            backend.signal("CONT")
        check_traffic(guest)
        wait_for_problem(host, "no answer in time")
        guest.do("ethtool -K eth0 rx-gro-hw on")
        check_traffic(guest)
        undisturbed(guest)


@pytest.mark.usefixtures("nothing_left")
def test_those_that_do_not_fit_are_refused_until_a_right_one_comes(
    host: Host, guest: OutsideGuest
) -> None:
    """Fewer features, another MTU; for fewer queues see test_dpdk. The reasons are in the
    report.
    """
    with tap_backend(host):
        check_traffic(guest)
    with Backend(host, "--loopback"):  # no offloads
        wait_for_problem(host, "lacks features that the guest uses: ")
    host.sh(f"ip -n {SPACE} link set {TAP} mtu 1300")
    try:
        with tap_backend(host):
            wait_for_problem(host, f"refuses an MTU of {MTU}")
    finally:
        host.sh(f"ip -n {SPACE} link set {TAP} mtu 1500")
    with tap_backend(host):
        check_traffic(guest)
    undisturbed(guest)


@pytest.mark.usefixtures("nothing_left")
def test_hostile_backends_cost_their_connections_only(host: Host, guest: OutsideGuest) -> None:
    """Each kind of malice (tests/boot/hostile.py) is met once; then the good one is welcome."""
    fds = f"ls /proc/{guest.pid}/fd | wc -l"
    with tap_backend(host):
        check_traffic(guest)
        before = int(host.sh(fds))
    host.sh(
        f"{shlex.join((sys.executable, '-m', 'tests.boot.hostile', SOCKET))} >{LOG} 2>&1 || "
        f"cat {LOG} >&2",
        timeout=len(MALICE) * hostile.PATIENCE,
    )
    assert host.sh(f"cat {LOG}").split("\n")[:-1] == list(MALICE), host.sh(f"cat {LOG}")
    wait_for_problem(host, "descriptors")
    with tap_backend(host):
        check_traffic(guest)
        host.wait_until(
            lambda: int(host.sh(fds)) == before, lambda: f"{before} became {host.sh(fds)}"
        )
    undisturbed(guest)


def test_the_report_says_that_the_driver_noticed_nothing(host: Host, guest: OutsideGuest) -> None:
    with tap_backend(host):
        check_traffic(guest)
        guest.leave()
    nic = guest.report["nets"][0]
    assert nic["resets"] <= 1, nic  # that of the shutdown, if the driver does one
    counters = nic["counters"]
    assert counters["ring_errors"] == 0 and nic["vhost_user"]["connected"], nic
    assert counters["announcements"] > KILLS, nic
    assert "INFLIGHT_SHMFD" in nic["vhost_user"]["protocol_features"], nic
    want = {"MRG_RXBUF", "EVENT_IDX", "INDIRECT_DESC", "HOST_TSO4", "GUEST_TSO4", "MTU"}
    assert want <= set(nic["negotiated"]), nic


@pytest.mark.usefixtures("nothing_left")
def test_two_guests_back_to_back(host: Host) -> None:
    """Joined by the back-end, with two queue pairs each; they ping and talk TCP with each other."""
    backend = Backend(host, "--connect", OTHER, "--queues", "2", space=False)
    backend.start()
    host.sh(f"until [ -S {OTHER} ]; do sleep 0.1; done")
    try:
        nets = [
            f"vhost-user,socket={path},queues=2,mac=52:54:00:00:00:0{n},guest=10.1.0.{n}/24"
            for n, path in ((1, SOCKET), (2, OTHER))
        ]
        with Guest(host, "--net", nets[0]) as one, Guest(host, "--net", nets[1]) as two:
            for guest, other in ((one, 2), (two, 1)):
                guest.do(pings(f"10.1.0.{other}"))
            want = one.do("head -c 1m /dev/urandom >/tmp/data; sha256sum </tmp/data").split()[0]
            two.start("busybox nc -l -p 7001 -e sha256sum")
            text = one.do(
                "until busybox nc 10.1.0.2 7001 </tmp/data 2>/dev/null; do sleep 0.2; done",
                timeout=PATIENCE,
            )
            assert text.split()[:1] == [want], text
            one.leave()
            two.leave()
    finally:
        backend.stop()
