"""Faults on demand where no worker of the VMM moves the packets: by tc(8) at the tap of vhost-net,
and in our own vhost-user back-end.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot.guest import PYVMM, Guest, check_tcp, nic_address, pings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module", autouse=True)
def ifb(host: Host) -> None:
    """The module, before ``nothing_left`` looks around: the first rule for what a guest sends loads
    it, and on its own it makes two interfaces.
    """
    host.sh("modprobe ifb numifbs=0")


def test_what_tc_does_at_a_tap(host: Host) -> None:
    """Each word, with frames of our own: what it does, what is counted, and what is left."""
    done = host.run(sys.executable, "-m", "tests.boot.tapfaults")
    assert done.status == 0, done
    told = json.loads(done.out)
    own = told["own"]
    answers = {
        name: case["answers"]
        for name, case in own.items()
        if isinstance(case, dict) and "answers" in case
    }
    assert answers == {
        "none": 10,
        "rx loss": 0,
        "tx loss": 0,
        "others": 10,
        "delay": 10,
        "duplicate": 20,
        "reorder": 10,
        "rate": 10,
        "burst": 10,
        "queue": 3,
        "after": 10,
    }
    assert own["none"]["counts"] == {}
    assert own["rx loss"]["counts"] == {"rx_fault_frames": 10, "rx_fault_loss": 10}
    assert own["tx loss"]["counts"]["tx_fault_loss"] == 10
    assert own["tx loss"]["counts"]["rx_fault_loss"] == 0
    assert own["others"]["counts"]["tx_fault_loss"] == own["others"]["counts"]["rx_fault_loss"] == 0
    assert own["delay"]["seconds"] >= 0.49 and own["delay"]["counts"]["tx_fault_frames"] == 10
    # 42 bytes each, of which the first goes at once.
    assert own["rate"]["seconds"] >= 0.03 * 9
    assert own["queue"]["counts"]["tx_fault_full"] == 7
    assert own["waiting"] == {"rx": 0, "tx": 4} and own["cleared"] == 4
    assert not own["left"]
    named = told["named"]
    assert "has a qdisc of somebody else's: prio; as root: tc qdisc del" in named["refused"]
    assert not named["active"] and named["changed"] and named["as_before"]


def fault(host: Host, name: str, *words: str) -> dict[str, Any]:
    """``pyvmm fault NAME WORD...``: what is in force, and what was done."""
    done = host.run(*PYVMM, "fault", "--host", "local", "--json", name, *words)
    assert done.status == 0, done
    told: dict[str, Any] = json.loads(done.out)
    return told


def ping(guest: Guest) -> float:
    """Five echoes from the guest, all of which are answered; the shortest way in ms."""
    text = guest.do(pings(nic_address(0, "host"), 5))
    return min(float(least) for least in re.findall(r"min/avg/max = ([0-9.]+)/", text))


def ping_together(guest: Guest) -> tuple[int, bool]:
    """Five echoes from the guest: answers, of which the last one may be missed if it takes more
    than a second, and whether some came twice.
    """
    answer = guest.sh(f"ping -c 5 -i 0.2 -W 5 {nic_address(0, 'host')}")
    match = re.search(r"(\d+) packets received", answer.text)
    assert match, answer
    return int(match[1]), "duplicates" in answer.text


def check_every_second(host: Host, guest: Guest, name: str, before: int) -> None:
    """Four echoes, two of which are lost, and counted from ``before`` on."""
    answered = "grep -c '1 packets received' /tmp/pings"
    guest.do(
        f"for _ in 1 2 3 4; do ping -q -c 1 -W 60 {nic_address(0, 'host')} & done >>/tmp/pings;"
        f" until [ $({answered}) -ge 2 ]; do sleep 0.1; done"
    )
    host.wait_until(
        lambda: fault(host, name)["counters"]["rx_fault_loss"] == before + 2, "too few are lost"
    )
    assert guest.do(answered) == "2\n"
    guest.sh("killall ping")


@pytest.mark.parametrize("mode", ["vhost-net", "vhost-user"])
def test_rules_work_both_ways(host: Host, mode: str) -> None:
    """Under the sandbox, by the command, with traffic of a Linux guest."""
    name = f"faulty-{mode}"
    net = f"{mode},switchable=emulated,fault=rx+loss+filter=icmp"
    with Guest(host, "--name", name, "--sandbox", "on", "--net", net) as guest:
        assert ping_together(guest)[0] == 0
        told = fault(host, name)
        assert told["rules"] == ["rx loss filter='icmp'"]
        assert told["counters"]["rx_fault_loss"] == 5
        check_tcp(guest)  # which the filter does not take

        fault(host, name, "tx", "loss", "filter=icmp")
        assert ping_together(guest)[0] == 0
        counters = fault(host, name)["counters"]
        assert (counters["rx_fault_loss"], counters["tx_fault_loss"]) == (5, 5)

        fault(host, name, "rx", "delay=150ms", "tx", "delay=100ms")
        assert ping(guest) >= 250
        fault(host, name, "tx", "duplicate")
        ping(guest)
        assert ping_together(guest)[1]
        if mode == "vhost-user":  # by the worker of our own back-end, with in-flight notes
            fault(
                host, name, "both", "reorder-used=50%", "rx", "truncate", "keep=33", "filter=icmp"
            )
            check_tcp(guest)  # whose chains come back in another order
            assert ping_together(guest)[0] == 0  # what comes is no answer
            counters = fault(host, name)["counters"]
            assert counters["rx_fault_truncate"] == 5, counters
            assert counters["tx_fault_reorder_used"] and counters["rx_fault_reorder_used"], counters

        done = host.run(*PYVMM, "switch", "--host", "local", name, "emulated")
        assert done.status != 0 and "has faults on demand" in done.err, done
        if mode == "vhost-net":
            done = host.run(*PYVMM, "fault", "--host", "local", name, "rx", "hold-irq=1ms")
            assert done.status == 114 and "do not come past pyvmm there" in done.err, done
        assert fault(host, name, "off")["rules"] == []
        ping(guest)
        assert not ping_together(guest)[1]
        done = host.run(*PYVMM, "switch", "--host", "local", name, "emulated")
        assert done.status == 0, done
        assert fault(host, name, "rx", "loss=1/2", "filter=icmp")["seed"] is not None
        check_every_second(host, guest, name, 5)
        guest.leave()
        nic = guest.report["nets"][0]
        assert (nic["counters"]["rx_fault_loss"], nic["counters"]["tx_fault_loss"]) == (7, 5)
        assert nic["fault_rules"]["rules"] == ["rx loss=1/2 filter='icmp'"]


#: A bridge in a network namespace of the test's own, around pyvmm.
BRIDGE = """
ip link add br0 type bridge; ip addr add 10.9.0.1/24 dev br0; ip link set br0 up
exec "$@"
"""


def test_queue_pairs_in_a_bridge(host: Host) -> None:
    """With faults, the frames of both queue pairs wait in one queue in the place of mq, and each
    goes to the virtqueue that it was for; without them, mq is back.
    """
    name, filter_ = "bridged", "filter=icmp"
    net = "vhost-net,bridge=br0,queues=2,guest=10.9.0.2/24"
    wrapper = ["unshare", "--net", "sh", "-c", BRIDGE, "sh"]
    args = ("--cpus", "2", "--name", name, "--net", net, "--sandbox", "on")
    with Guest(host, *args, wrapper=wrapper) as guest:

        def qdiscs() -> str:
            """The tap's root queueing disciplines, and that of its ifb."""
            script = 'for i in /sys/class/net/pv*; do tc qdisc show dev "${i##*/}" root; done'
            words = ["nsenter", f"--net=/proc/{guest.pid}/ns/net", "unshare", "--mount"]
            script = f"mount -t sysfs sysfs /sys; {script}"
            done = host.run(*words, "sh", "-ec", script)
            assert done.status == 0, done
            return done.out

        def received() -> list[int]:
            """Interrupts of the two receive virtqueues."""
            text = guest.do("cat /proc/interrupts")
            rows = re.findall(r"^\s*\d+:((?:\s+\d+)+).*virtio\d+-input\.([01])$", text, re.M)
            assert [number for _, number in rows] == ["0", "1"], text
            return [sum(map(int, counts.split())) for counts, _ in rows]

        def echoes_by_both() -> None:
            """Echoes that each processor asks for come back to its own virtqueue. Both get other
            frames now and then, and a busy guest takes several for one interrupt.
            """
            for cpu in (0, 1):
                seen: list[list[int]] = []
                while not seen or seen[-1][cpu] <= seen[-1][1 - cpu]:
                    assert len(seen) < 10, (cpu, seen)
                    before = received()
                    guest.do(f"taskset {cpu + 1} sh -c '{pings('10.9.0.1', 3)}'")
                    seen.append([n - then for n, then in zip(received(), before, strict=True)])

        def lost(way: str) -> int:
            count: int = fault(host, name)["counters"][f"{way}_fault_loss"]
            return count

        before = qdiscs()
        assert "qdisc mq 0: root" in before and "netem" not in before
        echoes_by_both()
        asked = "ping -q -c 5 -i 0.2 -W 5 10.9.0.1 | grep '100% packet loss'"
        for way in ("rx", "tx"):
            fault(host, name, way, "loss", filter_)
            guest.do(asked)
            assert lost(way) == 5
        fault(host, name, "both", "delay=20ms")
        during = qdiscs()
        assert "mq" not in during and during.count("qdisc netem 7076: root") == 2, during
        echoes_by_both()
        assert fault(host, name, "off")["rules"] == []
        assert qdiscs() == before
        echoes_by_both()
        guest.leave()
        nic = guest.report["nets"][0]
        assert nic["counters"]["rx_fault_loss"] == nic["counters"]["tx_fault_loss"] == 5
        assert nic["counters"]["tx_fault_frames"] >= 5 + 6


SCENARIO = """
[[step]]
faults = "rx duplicate"

[[step]]
nic = 1
faults = ["rx duplicate", "both reorder-used=50%", "rx truncate=1/7 keep=13"]

[[step]]
nic = 1
packets = 8
do = ["config-interrupt", "interrupt"]
"""


def test_a_scenario_under_linux(host: Host, tmp_path: Path) -> None:
    """On two cards: by tc for the first one, by a worker for the second one."""
    file = tmp_path / "s.toml"
    file.write_text(SCENARIO)
    nets = ("--net", "vhost-net", "--net", "emulated,with=packed")
    with Guest(host, "--name", "played", *nets, "--scenario", str(file)) as run:
        for nic in (0, 1):
            address = nic_address(nic, "host")
            run.do(f"until ping -c 3 -i 0.2 -W 5 {address} | grep duplicates; do :; done")

        def acted() -> bool:
            """Whether the last step, which waits for packets, has been played, and some frames
            more have come twice.
            """
            run.sh(f"ping -c 3 -i 0.2 -W 5 {nic_address(1, 'host')}")
            done = fault(host, "played", "--nic", "1")["counters"]
            many = done.get("rx_fault_duplicate", 0) >= 10 and done["rx_fault_reorder_used"] > 0
            return "fault_interrupt" in done and many

        host.wait_until(acted, lambda: repr(run))
        run.leave()
    first, second = run.report["nets"]
    assert run.report["scenario"] | {"seed": 1, "name": "s"} == run.report["scenario"]
    assert run.report["scenario"]["played"] == 3 and not run.report["scenario"]["problem"], run
    assert first["fault_rules"]["rules"] == second["fault_rules"]["rules"][:1] == ["rx duplicate"]
    assert (first["fault_rules"]["seed"], second["fault_rules"]["seed"]) == (None, 1)
    assert first["counters"]["rx_fault_frames"] >= 2
    # Linux takes packets of any length, and the buffer IDs of a packed virtqueue in any order.
    assert second["counters"]["rx_fault_reorder_used"] > 0 < second["counters"]["rx_fault_truncate"]
    assert second["counters"]["rx_fault_duplicate"] >= 10
    assert second["counters"]["fault_config_interrupt"] == 1
    assert not first["driver_mistakes"] and not second["driver_mistakes"]


@pytest.mark.parametrize(
    ("name", "net", "deeds"),
    [
        ("out-of-order", "emulated", ["rx_fault_reorder_used", "tx_fault_reorder_used"]),
        ("short-frames", "emulated,with=packed", ["rx_fault_truncate"]),
    ],
)
def test_linux_survives_a_scenario(host: Host, name: str, net: str, deeds: list[str]) -> None:
    """Of completion: data arrive as they were, both ways, and the driver makes no mistake."""
    machine = f"survivor-{name}"
    with Guest(host, "--name", machine, "--net", net, "--scenario", name) as guest:

        def done() -> bool:
            """Whether enough was done, and data came through meanwhile."""
            check_tcp(guest)
            counters = fault(host, machine)["counters"]
            return all(counters.get(deed, 0) >= 10 for deed in deeds)

        host.wait_until(done, lambda: repr(guest))
        guest.leave()
    assert guest.report["scenario"]["played"] == 1 and not guest.report["scenario"]["problem"]
    assert not guest.report["nets"][0]["driver_mistakes"]
