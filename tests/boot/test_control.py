"""Linux under control of its socket, from outside of the testbed: stop, cont, link, rings, reset,
power button.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot.guest import PATIENCE, PYVMM, Guest, Run, check_ping, check_tcp, nic_address

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pyvmm.testbed.testbed import Result
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
NAME = f"boot-{os.getpid()}"


def pyvmm(host: Host, *args: str, status: int = 0) -> str:
    """`pyvmm ARGS` on this side, as a user types it; its stdout."""
    env = {**os.environ, "PYVMM_TESTBED": host.testbed.name}
    done = subprocess.run(
        [*PYVMM, *args], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == status, done
    return done.stdout


class Qmp:
    """One `pyvmm qmp NAME` that is fed with lines: starting Python in the testbed takes seconds."""

    def __init__(self, host: Host) -> None:
        env = {**os.environ, "PYVMM_TESTBED": host.testbed.name}
        self._process = subprocess.Popen(
            [*PYVMM, "qmp", NAME], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, name: str, /, **arguments: Any) -> Any:
        """Run a command, which must succeed."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "return" in answer, answer
        return answer["return"]

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is not None:
            self._process.kill()
        self._process.communicate()
        assert exc[0] is not None or self._process.returncode == 0


def machines(host: Host) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(pyvmm(host, "ps", "--json"))}


def listen(host: Host, guest: Guest, file: Path) -> Future[Result]:
    """Print all events to ``file`` from now on, until the machine's end."""
    argv = [*PYVMM, "qmp", NAME, "--host", "local", "--events"]
    events = host.start("sh", "-c", 'exec "$@" >"$0"', str(file), *argv)

    def listens() -> bool:
        """Whether an event has come. Each query allows one more event of the filter."""
        pyvmm(host, "qmp", NAME, "query-rx-filter", "name=net1")
        guest.do("ip link set eth1 promisc on && ip link set eth1 promisc off")
        return file.exists() and file.stat().st_size > 0

    host.wait_until(listens, "no event comes")
    return events


def moved(ledger: dict[str, Any]) -> list[dict[str, int]]:
    """What the cards' counters say of the guest's side; the tap alone may filter and drop
    meanwhile.
    """
    return [
        {k: v for k, v in n["counters"].items() if not k.endswith("_tap")} for n in ledger["nets"]
    ]


def check_paused(qmp: Qmp, guest: Guest) -> None:
    """Nothing moves: no exit, no packet, no ring index, no answer on the console or to a ping."""
    assert qmp("query-status")["status"] == "paused"
    before, rings = qmp("x-pyvmm-ledger"), qmp("x-pyvmm-rings")
    start = len(guest.stdout)
    guest.type("echo still-here\n")
    for nic in (0, 1):
        lost = guest.host_run(nic, *f"ping -c 2 -i 0.3 -W 1 {nic_address(nic, 'guest')}".split())
        assert lost.status == 1 and " 0 received" in lost.out, lost
    after = qmp("x-pyvmm-ledger")
    assert after["exits"] == before["exits"]
    assert moved(after) == moved(before)
    assert qmp("x-pyvmm-rings") == rings
    assert len(guest.stdout) == start


def check_link(qmp: Qmp, guest: Guest) -> None:
    for up in (False, True):
        qmp("set_link", name="net0", up=up)
        guest.do(f"until [ $(cat /sys/class/net/eth0/carrier) = {int(up)} ]; do sleep 0.1; done")
    check_ping(guest)


def check_filter(qmp: Qmp, guest: Guest) -> None:
    """What the driver wants to receive, as it changes."""
    (before,) = qmp("query-rx-filter", name="net0")
    assert before["main-mac"] == "52:54:00:12:34:56"
    guest.do(
        "ip link set eth0 promisc on && ip link set eth0 promisc off && "
        "ip addr add fd00::12:3456/64 dev eth0"
    )
    after: dict[str, Any] = {}

    def arrived() -> bool:
        """Linux joins the address' group, and sets the filter, by work of its own."""
        nonlocal after
        (after,) = qmp("query-rx-filter", name="net0")
        return "33:33:ff:12:34:56" in after["multicast-table"] and not after["promiscuous"]

    guest.host.wait_until(arrived, lambda: repr(after))
    assert after["multicast"] == "normal"


def check_rings(host: Host, qmp: Qmp) -> None:
    look = qmp("x-pyvmm-rings", chains=256)
    assert look["active"]
    receive, transmit, control = look["queues"]
    assert [q["role"] for q in look["queues"]] == ["receive", "transmit", "control"]
    for q in look["queues"]:
        assert q["enabled"] and q["problems"] == []
        assert (
            q["outstanding"]
            == (q["avail"]["idx"] - q["used"]["idx"]) % 65536
            == len(q["available"])
        )
        assert not any("problem" in chain for chain in q["available"])
        taken = None if q["role"] == "control" else (q["taken"] - q["used"]["idx"]) % 65536
        assert taken == q["in-flight"] and (taken is None or taken <= q["outstanding"])
    assert receive["outstanding"] > 100  # Linux fills it up
    for chain in receive["available"]:
        assert all("write" in d["flags"] or "indirect" in d["flags"] for d in chain["descriptors"])
    assert control["used"]["idx"] > 0 and transmit["used"]["idx"] > 0
    heads = {
        d["index"] for c in receive["available"] for d in c["descriptors"] if not d.get("indirect")
    }
    assert heads == set(receive["device-owned"])
    text = pyvmm(host, "rings", NAME, "--queue", "0", "--chains", "2")
    assert "queue 0  receive  256 entries" in text and "DDDD" in text and "avail_event" in text
    assert "queue 1" not in text


def check_stats(host: Host) -> None:
    stats = json.loads(pyvmm(host, "stats", NAME, "--json"))
    assert len(stats["vcpu"]) == 2 and all(
        v["exits"] > 1000 and v["irq_injections"] > 0 for v in stats["vcpu"]
    )
    assert "  exits " in pyvmm(host, "stats", NAME)


def check_shell(host: Host, path: str) -> None:
    """qmp-shell of qemu.qmp, unchanged, and another client at the same time."""
    shell = str(Path(sys.executable).parent / "qmp-shell")
    script = "query-status\nquery-cpus-fast\nset_link name=net7 up=true\nx-pyvmm-rings queue=1\n"
    done = host.run(sys.executable, shell, path, input=script.encode())
    assert done.status == 0 and '"status": "running"' in done.out, done
    assert '"cpu-index": 1' in done.out and '"class": "DeviceNotFound"' in done.out


def test_a_guest_under_control(host: Host, tmp_path: Path) -> None:
    """One boot for all of it, on an emulated card and one of vhost-net; a second after the
    reset.
    """
    nets = ("--net", "emulated,mac=52:54:00:12:34:56", "--net", "vhost-net")
    with Guest(host, "--cpus", "2", *nets, "--name", NAME, "--on-reboot", "exit") as guest:
        events = listen(host, guest, tmp_path / "events")
        row = machines(host)[NAME]
        assert (row["host"], row["status"], row["cpus"], row["pid"]) == (
            "testbed",
            "running",
            2,
            guest.pid,
        )
        assert [n["mode"] for n in row["nets"]] == ["emulated", "vhost-net"]
        assert NAME in pyvmm(host, "ps")
        with Qmp(host) as qmp:
            pyvmm(host, "stop", NAME)
            check_paused(qmp, guest)
            start = len(guest.stdout)
            pyvmm(host, "cont", NAME)
            guest.expect(r"still-here\n", start)
            for _ in range(3):
                qmp("stop")
                qmp("cont")
            for nic in (0, 1):
                check_ping(guest, nic)
                check_tcp(guest, nic, megabytes=1)
            check_link(qmp, guest)
            check_filter(qmp, guest)
            check_rings(host, qmp)
        check_stats(host)
        check_shell(host, row["qmp"])
        pyvmm(host, "stop", "no-such-machine", status=113)
        start = len(guest.stdout)
        pyvmm(host, "reset", NAME)
        guest.log_in(start)
        check_ping(guest, 0)
        check_ping(guest, 1)
        pyvmm(host, "powerdown", "--wait", str(PATIENCE), NAME)
        assert guest.wait() == 0, repr(guest)
        assert NAME not in machines(host)
    assert guest.report["reboots"] == 1
    assert events.result(PATIENCE).status == 0
    seen = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    names = [e["event"] for e in seen if e["event"] != "NIC_RX_FILTER_CHANGED"]
    assert names == [*["STOP", "RESUME"] * 4, "RESET", "POWERDOWN", "SHUTDOWN"]
    assert seen[-1]["data"] == {
        "guest": True,
        "reason": "guest-shutdown",
        "x-pyvmm-outcome": "poweroff",
    }
    assert {e["data"]["name"] for e in seen if e["event"] == "NIC_RX_FILTER_CHANGED"} >= {"net0"}
    times = [e["timestamp"]["seconds"] * 10**6 + e["timestamp"]["microseconds"] for e in seen]
    assert times == sorted(times)


def test_the_power_button_ends_a_command_by_sigterm(host: Host) -> None:
    script = 'trap "echo bye; exit 7" TERM; echo ready; while :; do sleep 0.2; done'
    with Run(host, "--net", "none", "--name", NAME, "--", "sh", "-c", script) as run:
        run.expect("ready")
        pyvmm(host, "stop", NAME)
        pyvmm(host, "powerdown", NAME)  # to be noticed once it goes on
        assert run.status is None
        pyvmm(host, "cont", NAME)
        assert run.wait() == 7, repr(run)
        assert run.out == "ready\nbye\n"


def test_quit_before_the_command_has_ended(host: Host) -> None:
    with Run(
        host, "--net", "none", "--name", NAME, "--", "sh", "-c", "echo ready; sleep 1000"
    ) as run:
        run.expect("ready")
        pyvmm(host, "quit", NAME)
        assert run.wait() == 119, repr(run)
        assert "told to quit before the command ended" in run.err
