"""vhost-net under real Linux: the same traffic as emulation, several queue pairs, and no wake-up
for a packet.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot.guest import (
    ECHO,
    PATIENCE,
    Guest,
    Run,
    check_iperf,
    check_ping,
    check_tcp,
    check_traffic,
    exits_by_device,
    nic_address,
    pings,
    serve_iperf,
)
from tests.boot.test_net import OFFLOADS, RINGS, ethtool, interrupts, reload_driver

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: One card each in one guest: --net keys, and the features that then must not be negotiated.
CARDS: dict[str, set[str]] = {
    "without=offloads": OFFLOADS,
    "without=event-idx": {"EVENT_IDX"},
    "without=indirect": {"INDIRECT_DESC"},
    "without=offloads+mrg-rxbuf+indirect+event-idx,queue-size=32": OFFLOADS | RINGS,
    "mtu=9000": set(),
    "notify=exit": set(),
    "without=ctrl-vq": {"CTRL_VQ", "MQ"},
}


def udp_lost(guest: Guest, nic: int, *extra: str) -> dict[str, Any]:
    """iperf3 -u at a low rate, datagrams numbered; its summary.

    The receiving socket holds all that is sent (2,500 times 400 bytes, of which the kernel counts
    three times as much), and so do the queues on the way: a receiver that gets no processor must
    not count as a lossy network.
    """
    room = "sysctl -q -w net.core.rmem_max=8388608 net.core.wmem_max=8388608"
    guest.do(f"{room}; echo 4000 >/sys/class/net/eth{nic}/tx_queue_len")
    guest.host.sh(room)  # a network namespace has no limit of its own
    guest.host_run(nic, "ip", "link", "set", "tap0", "txqueuelen", "4000")
    serve_iperf(guest, "-1")
    to = nic_address(nic, "guest")
    command = f"iperf3 -u -c {to} -w 4M -b 2M -l 400 -t 4 --json {' '.join(extra)}"
    script = (
        f'until text=$({command}) && echo "$text" | grep -q lost_packets; do sleep 0.5; done; '
        'echo "$text"'
    )
    summary: dict[str, Any] = json.loads(guest.host_run(nic, "sh", "-c", script).out)["end"]["sum"]
    return summary


def test_default_card(host: Host) -> None:
    """All features, offloads off, the interface down and up, UDP without loss."""
    with Guest(host, "--net", "vhost-net") as guest:
        check_ping(guest)
        check_ping(guest, size=1400)
        check_tcp(guest, megabytes=8)
        check_iperf(guest)
        ethtool(guest, "off")
        check_tcp(guest)
        ethtool(guest, "on")
        for _ in range(3):
            guest.do("ip link set eth0 down && ip link set eth0 up")
            check_ping(guest)
        for extra in ((), ("-R",)):
            summary = udp_lost(guest, 0, *extra)
            assert summary["packets"] > 2000 and summary["lost_packets"] == 0, summary
        guest.leave()
        nic = guest.report["nets"][0]
        assert set(nic["negotiated"]) >= OFFLOADS | RINGS
        assert nic["refused_writes"] == 0 and nic["kvm_refusals"] == 0
        assert nic["counters"]["rx_packets"] > 100 < nic["counters"]["tx_packets"]
        (worker,) = nic["workers"]
        assert worker["name"].startswith("vhost-") and worker["cpu_s"] > 0


def test_every_feature_off(host: Host) -> None:
    """One guest, a card for each feature that can be left out; and a jumbo frame."""
    nets = [arg for card in CARDS for arg in ("--net", f"vhost-net,{card}")]
    with Guest(host, *nets) as guest:
        for nic in range(len(CARDS)):
            check_traffic(guest, nic)
        jumbo = list(CARDS).index("mtu=9000")
        check_ping(guest, jumbo, size=8972)
        guest.leave()
        for nic, (card, missing) in zip(guest.report["nets"], CARDS.items(), strict=True):
            negotiated = set(nic["negotiated"])
            assert not negotiated & missing, card
            assert (OFFLOADS | RINGS) - missing <= negotiated, card


@pytest.mark.parametrize(
    "mode", ["vhost-net", pytest.param("emulated", marks=pytest.mark.thorough)]
)
def test_queue_pairs(host: Host, mode: str) -> None:
    """Four pairs and two CPUs: the driver takes two, ethtool -L changes it under traffic."""
    with Guest(host, "--cpus", "2", "--net", f"{mode},queues=4") as guest:
        text = guest.do("ethtool -l eth0")
        assert [int(line.split()[1]) for line in text.splitlines() if "Combined" in line] == [4, 2]
        check_traffic(guest)
        # Room for all that TCP sends to a guest that gets no processor: else pings are lost.
        guest.host_run(0, "ip", "link", "set", "tap0", "txqueuelen", "10000")
        serve_iperf(guest)
        flood = host.start(
            *guest.inside(0), *f"iperf3 -c {nic_address(0, 'guest')} -t 12 -P 4 --json".split()
        )
        for pairs in (1, 4, 2, 3, 1, 2):
            guest.do(f"ethtool -L eth0 combined {pairs}")
            check_ping(guest)
        result = flood.result()
        assert result.status == 0, result
        assert json.loads(result.out)["end"]["sum_received"]["bytes"] > 1 << 20, result
        guest.do("killall iperf3; ethtool -L eth0 combined 4")
        check_traffic(guest)
        guest.leave()
        nic = guest.report["nets"][0]
        assert nic["queue_pairs"] == {"max": 4, "used": 4}
        assert nic["faults"] == []


def test_no_exit_for_a_packet(host: Host) -> None:
    """Once the link is up, 100,000 packets do not make KVM_RUN return for a kick or an
    interrupt.
    """
    with Guest(host, "--net", "vhost-net") as guest:
        check_ping(guest)
        # Without offloads a packet is a frame, both here and there.
        ethtool(guest, "off")
        guest.host_run(
            0, "ethtool", "-K", "tap0", "tx", "off", "tso", "off", "gso", "off", "gro", "off"
        )
        check_iperf(guest, megabytes=80)
        guest.leave()
        report = guest.report
        (nic,) = report["nets"]
        packets = nic["counters"]["rx_packets"] + nic["counters"]["tx_packets"]
        exits = report["exits"]
        assert packets > 100_000
        # What is left of the card's exits is set-up and control commands; the rest is boot and
        # console.
        assert exits_by_device(report, "net0 notify") <= nic["control_commands"]
        assert exits_by_device(report, "net0 isr") == 0
        set_up = sum(n for name, n in exits["by_device"].items() if name.startswith("net0"))
        assert set_up < 500
        console = exits_by_device(report, "serial0")
        assert exits["kvm_run_returns"] - console < 3000, exits["by_device"]


@pytest.mark.parametrize("times", [15, pytest.param(100, marks=pytest.mark.thorough)])
def test_reload_again_and_again(host: Host, times: int) -> None:
    """virtio_net unloaded and loaded under traffic; each time the rings start anew and the card
    works.
    """
    with Guest(host, "--net", "vhost-net") as guest:
        flood = host.start(
            *[*guest.inside(0), *f"ping -q -i 0.02 -w 1800 {nic_address(0, 'guest')}".split()],
            timeout=1900,
        )
        try:
            guest.do(
                # busybox' ping has a small socket buffer: a burst of the host's requests can push
                # the answer out.
                f"""for i in $(seq {times}); do
                    rmmod virtio_net && modprobe virtio_net && ip link set eth0 up &&
                        ip addr add {nic_address(0, "guest")}/24 dev eth0 || break
                    for try in 1 2 3 4 5; do
                        ping -q -c 1 -W 2 {nic_address(0, "host")} >/tmp/out && continue 2
                    done
                    cat /tmp/out; ip addr; break
                done
                echo reloads: $i
                [ $i = {times} ]""",
                1800,
            )
        finally:
            host.sh("killall ping || true")
            flood.result()
        check_traffic(guest)
        guest.leave()
        nic = guest.report["nets"][0]
        assert nic["resets"] >= times
        assert nic["faults"] == [] and nic["refused_writes"] == 0


def test_reboot_under_traffic(host: Host) -> None:
    """The machine is reset while frames come and go; the kernel lets go of the old memory, and the
    card works again.
    """
    with Guest(host, "--on-reboot", "restart", "--net", "vhost-net") as guest:
        flood = host.start(
            *[*guest.inside(0), *f"ping -q -i 0.01 -w 600 {nic_address(0, 'guest')}".split()],
            timeout=700,
        )
        try:
            guest.start(f"ping -q {nic_address(0, 'host')}")
            start = len(guest.stdout)
            # At once: `reboot` would have the driver reset the card before. A frame that is sent
            # then has the driver go round for ever, up to Linux' commit 0d0eff39ceb3.
            guest.type("echo b >/proc/sysrq-trigger\n")
            guest.log_in(start)
        finally:
            host.sh("killall ping || true")
            flood.result()
        check_traffic(guest)
        guest.leave()
        assert guest.report["reboots"] == 1
        assert guest.report["nets"][0]["faults"] == []


def test_intx_and_two_cpus(host: Host) -> None:
    """Interrupt lines without MSI; with MSI-X a queue's interrupt moves between CPUs under
    traffic.
    """
    with Guest(host, "--append", "pci=nomsi", "--net", "vhost-net") as guest:
        check_traffic(guest)
        assert sum(interrupts(guest, "IO-APIC.*virtio0")) > 0
        reload_driver(guest)
        check_ping(guest)
        guest.leave()
    with Guest(host, "--cpus", "2", "--net", "vhost-net") as guest:
        numbers = guest.do("grep virtio0- /proc/interrupts | cut -d: -f1").split()
        argv = [*guest.inside(0), *ECHO, nic_address(0, "guest"), "0", "56"]
        floods = [host.start(*argv, timeout=3 * PATIENCE) for _ in range(4)]
        started = "until [ $(grep -vc sl /proc/net/raw) = 4 ]; do sleep 0.1; done"
        assert guest.host_run(0, "sh", "-c", started).status == 0
        count = "/sys/class/net/eth0/statistics/rx_packets"
        more = f"until [ $(cat {count}) -gt $((had + 50)) ]; do sleep 0.1; done"
        guest.do(f"had=$(cat {count}); {more}")
        for _ in range(10):
            for cpu in (1, 0):
                for number in numbers:
                    guest.do(f"echo {cpu} >/proc/irq/{number}/smp_affinity_list")
        guest.do(f"had=$(cat {count}); {more}")
        host.sh("pkill -INT -f '[/]echo.py'")
        for flood in floods:
            assert flood.result().status == 0, flood.result()  # every one is answered
        check_traffic(guest)
        guest.leave()


def test_memory_above_the_pci_hole(host: Host) -> None:
    """With 5 GiB the kernel translates addresses of two regions."""
    with Guest(host, "--memory", "5G", "--net", "vhost-net") as guest:
        check_traffic(guest)
        check_tcp(guest, megabytes=16)
        guest.leave()


def test_link(host: Host) -> None:
    """A card that starts without a cable; and a tap that vanishes under traffic and comes back."""
    host.sh("ip tuntap add dev vh0 mode tap vnet_hdr && ip addr add 192.168.160.1/24 dev vh0")
    try:
        nets = ("--net", "vhost-net,link=off", "--net", "vhost-net,tap=vh0,guest=192.168.160.2/24")
        with Guest(host, *nets) as guest:
            assert guest.do("cat /sys/class/net/eth0/carrier").strip() == "0"
            assert "NO-CARRIER" in guest.host_run(0, "ip", "link", "show", "tap0").out
            guest.do(pings("192.168.160.1"))
            # Frames that a deleted tap refuses: the worker reports an error and forgets the chains.
            for _ in range(8):
                guest.start("ping -q -i 0.001 -s 1000 192.168.160.1")
            sent = "/sys/class/net/vh0/statistics/rx_packets"
            host.sh(f"until [ $(cat {sent}) -gt 2000 ]; do sleep 0.1; done; ip link del vh0")
            guest.do("until [ $(cat /sys/class/net/eth1/carrier) = 0 ]; do sleep 0.1; done")
            # Their answers would push out that to another ping: its buffer is small.
            guest.sh("killall ping")
            host.sh(
                "ip tuntap add dev vh0 mode tap vnet_hdr && "
                "ip addr add 192.168.160.1/24 dev vh0 && ip link set vh0 up"
            )
            guest.do("until [ $(cat /sys/class/net/eth1/carrier) = 1 ]; do sleep 0.1; done")
            guest.do("until ping -q -c 1 -W 1 192.168.160.1 >/dev/null; do sleep 0.2; done")
            guest.do(pings("192.168.160.1"))
            guest.leave()
            report = guest.report["nets"]
            assert report[1]["counters"]["link_losses"] == 1
            assert report[1]["counters"]["rx_packets"] > 3
    finally:
        host.sh("ip link del vh0")


def test_the_kernel_polls(host: Host) -> None:
    """poll=: the worker looks for work before it sleeps (VHOST_SET_VRING_BUSYLOOP_TIMEOUT)."""
    trace = "/tmp/vhost-poll.json"
    net = "vhost-net,poll=50"
    with Guest(host, "--net", net, "--trace", trace) as guest:
        check_traffic(guest)
        guest.leave()
    name = "VHOST_SET_VRING_BUSYLOOP_TIMEOUT"
    assert int(host.sh(f"grep -o {name} {trace} | wc -l; rm {trace}")) == 2


def test_pinned_workers(host: Host) -> None:
    """worker-cpu= confines the kernel's threads."""
    with Guest(host, "--cpus", "2", "--net", "vhost-net,queues=2,worker-cpu=0") as guest:
        text = host.sh(f"for p in $(pgrep '^vhost-{guest.pid}$'); do taskset -p $p; done")
        assert sorted(line.split(": ")[1] for line in text.splitlines()) == ["1", "2"], text
        check_ping(guest)
        guest.leave()


def test_missing_or_wrong(host: Host) -> None:
    """No /dev/vhost-net, no permission, no such CPU: one line, its own exit code, nothing left."""
    cases = {
        "mv /dev/vhost-net /dev/vhost-off": ("vhost-net", 108, "modprobe vhost_net"),
        "true": ("vhost-net,worker-cpu=99", 2, "worker-cpu=99"),
    }
    for prepare, (net, status, text) in cases.items():
        host.sh(prepare)
        try:
            with Run(host, "--net", net, "--", "true", report=False) as run:
                assert run.wait() == status, run
                assert text in run.err and run.err.count("\n") == 1, run
        finally:
            host.sh("[ -e /dev/vhost-net ] || mv /dev/vhost-off /dev/vhost-net")
