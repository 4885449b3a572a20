"""`--net vhost-user` under real Linux, with our own back-end: traffic, a kill under traffic, two guests back to back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PATIENCE, PYVMM, Guest, check_traffic

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

SOCKET, OTHER, PIDFILE, LOG = (f"/run/vu-test.{end}" for end in ("a", "b", "pid", "log"))
SPACE, TAP = "vu-test", "vu0"


class Backend:
    """`pyvmm backend` in the testbed, in the background."""

    def __init__(self, host: Host, *args: str, wrapper: tuple[str, ...] = ()) -> None:
        self.host = host
        self._command = " ".join((*wrapper, *PYVMM, "backend", "--socket", SOCKET, *args))

    def start(self) -> None:
        """Start it, and wait until it listens (it replaces what a killed one has left)."""
        self.host.sh(self.script())

    def script(self) -> str:
        """The same for a longer script."""
        return f"""
            rm -f {SOCKET} {OTHER}
            setsid {self._command} >>{LOG} 2>&1 </dev/null & echo $! >{PIDFILE}
            until [ -S {SOCKET} ]; do kill -0 $(cat {PIDFILE}); sleep 0.2; done
        """

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        self.host.sh(
            f"pid=$(cat {PIDFILE}); kill $pid 2>/dev/null || true; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
        )
        self.host.sh(f"! [ -e {SOCKET} ]; rm -f {PIDFILE} {LOG}")

    def log(self) -> str:
        """What it has said."""
        return self.host.run("cat", LOG).out


@pytest.fixture
def space(host: Host) -> Iterator[tuple[str, ...]]:
    """The prefix of commands in a network namespace with a tap of the user's."""
    host.sh(
        f"""ip netns add {SPACE}
        ip -n {SPACE} tuntap add dev {TAP} mode tap
        ip -n {SPACE} addr add 192.168.100.1/24 dev {TAP}
        ip -n {SPACE} link set {TAP} up"""
    )
    yield ("ip", "netns", "exec", SPACE)
    host.sh(f"ip netns del {SPACE}")


class OutsideGuest(Guest):
    """A guest whose tap is the back-end's."""

    def inside(self, nic: int) -> list[str]:
        return ["ip", "netns", "exec", SPACE]


def test_traffic_and_a_kill_under_traffic(host: Host, space: tuple[str, ...]) -> None:
    """A TCP transfer survives the back-end's death and return, and the guest's driver notices nothing."""
    backend = Backend(host, "--tap", TAP, wrapper=space)
    backend.start()
    try:
        with OutsideGuest(host, "--net", f"vhost-user,socket={SOCKET}") as guest:
            check_traffic(guest)
            want = guest.do("head -c 24m /dev/urandom >/tmp/data; sha256sum </tmp/data").split()[0]
            server = host.start(*space, "busybox", "nc", "-l", "-p", "7003", "-e", "sha256sum")
            count = f"/sys/class/net/{TAP}/statistics/rx_bytes"
            before = int(host.sh(f"{' '.join(space)} cat {count}"))
            guest.start(
                "sh -c 'until busybox nc 192.168.100.1 7003 </tmp/data >/tmp/sum; do sleep 0.2; done; cat /tmp/sum >/tmp/end'"
            )
            host.sh(
                f"""{" ".join(space)} sh -c 'while [ $(cat {count}) -lt {before + (2 << 20)} ]; do sleep 0.1; done'
                kill -9 $(cat {PIDFILE})
                {backend.script()}"""
            )
            text = guest.do("until [ -s /tmp/end ]; do sleep 0.2; done; cat /tmp/end")
            assert text.split()[:1] == [want], (text, backend.log())
            assert server.result().status == 0, server.result()
            check_traffic(guest)
            guest.leave()
        nic = guest.report["nets"][0]
        counters = nic["counters"]
        assert (counters["connections"], counters["disconnections"]) == (2, 1), nic
        assert counters["connected"] == 1 and counters["tx_possible_repeats"] == 0, nic
        assert "INFLIGHT_SHMFD" in nic["vhost_user"]["protocol_features"] and not counters["timeouts"]
        assert nic["resets"] <= 1, nic  # that of the shutdown, if the driver does one
        assert {"MRG_RXBUF", "EVENT_IDX", "INDIRECT_DESC", "HOST_TSO4", "GUEST_TSO4"} <= set(
            nic["negotiated"]
        )
    finally:
        backend.stop()


def test_two_guests_back_to_back(host: Host) -> None:
    """Joined by the back-end, with two queue pairs each; they ping and talk TCP with each other."""
    backend = Backend(host, "--connect", OTHER, "--queues", "2")
    backend.start()
    host.sh(f"until [ -S {OTHER} ]; do sleep 0.1; done")
    try:
        nets = [
            f"vhost-user,socket={path},queues=2,mac=52:54:00:00:00:0{n},guest=10.1.0.{n}/24"
            for n, path in ((1, SOCKET), (2, OTHER))
        ]
        with Guest(host, "--net", nets[0]) as one, Guest(host, "--net", nets[1]) as two:
            for guest, other in ((one, 2), (two, 1)):
                text = guest.do(f"ping -c 3 -i 0.3 10.1.0.{other}")
                assert "3 packets received" in text, text
            want = one.do("head -c 1m /dev/urandom >/tmp/data; sha256sum </tmp/data").split()[0]
            two.start("busybox nc -l -p 7001 -e sha256sum")
            text = one.do(
                "until busybox nc 10.1.0.2 7001 </tmp/data 2>/dev/null; do sleep 0.2; done", timeout=PATIENCE
            )
            assert text.split()[:1] == [want], text
            one.leave()
            two.leave()
    finally:
        backend.stop()
