"""virtio-net under real Linux: traffic both ways with every set of features and every way of
interrupting.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.netopt import GROUPS, HONOURED
from tests.boot import seqnet
from tests.boot.guest import (
    PYVMM,
    Guest,
    check_iperf,
    check_ping,
    check_tcp,
    check_traffic,
    exits_by_device,
    nic_address,
)

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

OFFLOADS = {"CSUM", "GUEST_CSUM"} | {
    f"{side}_{kind}" for side in ("HOST", "GUEST") for kind in ("TSO4", "TSO6", "ECN", "UFO")
}
TSO = {name for name in OFFLOADS if not name.endswith("CSUM")}
RINGS = {"MRG_RXBUF", "INDIRECT_DESC", "EVENT_IDX"}

#: One card each in a guest, which has room for eight: --net keys, and the features that then must
#: not be negotiated.
SPLIT_CARDS: dict[str, set[str]] = {
    "without=offloads": OFFLOADS,
    "without=tso": TSO,
    "without=mrg-rxbuf": {"MRG_RXBUF"},
    "without=event-idx": {"EVENT_IDX"},
    "without=indirect": {"INDIRECT_DESC"},
    "without=offloads+mrg-rxbuf+indirect+event-idx,queue-size=32": OFFLOADS | RINGS,
    "mtu=9000": set(),
    "notify=exit": set(),
}
#: The same in another guest.
PACKED_CARDS: dict[str, set[str]] = {
    "with=packed": set(),
    "with=packed,without=event-idx": {"EVENT_IDX"},
    "with=packed,without=indirect,queue-size=32": {"INDIRECT_DESC"},
    "with=packed,without=mrg-rxbuf": {"MRG_RXBUF"},
    "with=packed,without=offloads,notify=exit": OFFLOADS,
}
CARDS = SPLIT_CARDS | PACKED_CARDS


def reload_driver(guest: Guest, *options: str) -> None:
    """Unload virtio_net, load it again and give eth0 its address back."""
    guest.do("rmmod virtio_net && ! [ -e /sys/class/net/eth0 ]")
    guest.do(f"modprobe virtio_net {' '.join(options)} && ip link set eth0 up")
    guest.do(f"ip addr add {nic_address(0, 'guest')}/24 dev eth0")


def ethtool(guest: Guest, flag: str) -> None:
    """Set all offloads of eth0 that can be set."""
    for feature in ("tso", "gso", "gro", "tx", "sg"):
        guest.sh(f"ethtool -K eth0 {feature} {flag}")


def interrupts(guest: Guest, pattern: str) -> list[int]:
    """Interrupts a CPU of the /proc/interrupts lines that match."""
    cpus = int(guest.do("nproc"))
    sums = [0] * cpus
    for line in guest.do(f"grep '{pattern}' /proc/interrupts").splitlines():
        for cpu, count in enumerate(line.split()[1 : 1 + cpus]):
            sums[cpu] += int(count)
    return sums


def test_default_card(host: Host) -> None:
    """All features: traffic with and without offloads, the interface down and up, the driver
    reloaded.
    """
    with Guest(host) as guest:
        check_ping(guest)
        check_ping(guest, size=1400)
        check_tcp(guest, megabytes=4)
        check_iperf(guest)
        assert "tcp-segmentation-offload: on" in guest.do("ethtool -k eth0")

        ethtool(guest, "off")
        assert "tcp-segmentation-offload: off" in guest.do("ethtool -k eth0")
        check_tcp(guest)
        check_iperf(guest, megabytes=2)
        ethtool(guest, "on")
        check_tcp(guest)

        for _ in range(3):
            guest.do("ip link set eth0 down")
            assert guest.sh(f"ping -c 1 -W 1 {nic_address(0, 'host')}").status != 0
            guest.do("ip link set eth0 up")
            check_ping(guest)

        for _ in range(3):
            reload_driver(guest)
            check_traffic(guest)
        guest.leave()
        nic = guest.report["nets"][0]
        assert set(nic["negotiated"]) >= OFFLOADS | RINGS
        assert nic["resets"] >= 3  # each unload, at least
        assert nic["refused_writes"] == 0
        # Commands are kicked by exits, packets are not.
        assert exits_by_device(guest.report, "net0 notify") <= nic["control_commands"]


def test_bus_mastering(host: Host) -> None:
    """Off, as Linux does before it jumps into another kernel: nothing moves. On: all goes on. So
    with each data path. No control queue: Linux polls for a command's answer with the CPU, as when
    IPv6 has found its address good, a second after the start; a driver would hang then.
    """
    off, on = r"\002", r"\006"
    write = "printf '{}' | dd of=/sys/bus/pci/devices/0000:00:0{}.0/config bs=1 seek=4 conv=notrunc"
    modes = ("emulated", "vhost-net", "vhost-user")
    nets = (arg for mode in modes for arg in ("--net", f"{mode},without=ctrl-vq"))
    with Guest(host, *nets) as guest:
        for nic in range(len(modes)):
            check_ping(guest, nic)
            guest.do(write.format(off, 1 + nic))
            assert guest.sh(f"ping -q -c 1 -W 2 {nic_address(nic, 'host')}").status != 0
            guest.do(write.format(on, 1 + nic))
            check_ping(guest, nic)
        guest.leave()
        for nic in guest.report["nets"]:
            assert not nic["faults"] and not nic["driver_mistakes"] and not nic["kvm_refusals"]


@pytest.fixture(scope="module")
def cards(host: Host) -> dict[str, Any]:
    """A guest with SPLIT_CARDS, and one with PACKED_CARDS: what the traffic of each card gave, and
    the report of its guest.
    """
    results: dict[str, Any] = {}
    for group in (SPLIT_CARDS, PACKED_CARDS):
        nets = [arg for card in group for arg in ("--net", f"emulated,{card}")]
        with Guest(host, *nets) as guest:
            got: dict[str, Any] = {}
            for nic, card in enumerate(group):
                try:
                    check_traffic(guest, nic)
                    got[card] = guest.do(f"cat /sys/class/net/eth{nic}/mtu")
                except AssertionError as e:
                    got[card] = e
            guest.leave()
            results |= {card: (index, got[card], guest.report) for index, card in enumerate(got)}
    return results


@pytest.mark.parametrize("card", CARDS)
def test_card(cards: dict[str, Any], card: str) -> None:
    """Traffic with one card's features."""
    index, mtu, report = cards[card]
    if isinstance(mtu, Exception):
        raise mtu
    nic = report["nets"][index]
    negotiated = set(nic["negotiated"])
    assert not negotiated & CARDS[card]
    assert (OFFLOADS | RINGS) - CARDS[card] <= negotiated
    assert ("RING_PACKED" in negotiated) == ("with=packed" in card)
    assert mtu.strip() == ("9000" if card == "mtu=9000" else "1500")
    assert ("MTU" in negotiated) == card.startswith("mtu=")
    counters = nic["counters"]
    assert counters["tx_packets"] > 0 and counters["rx_packets"] > 0
    notifies = exits_by_device(report, f"net{index} notify")
    if "notify=exit" in card:
        # Every kick is an exit; the worker counts those that woke it up.
        assert notifies >= counters["tx_kicks"] + counters["rx_kicks"] > 0
    else:
        assert notifies <= nic["control_commands"]
        assert counters["tx_kicks"] > 0


RESIZED = ("emulated", "emulated,with=packed", "vhost-net", "vhost-user", "emulated,queues=2")


def test_virtqueues_of_another_size(host: Host) -> None:
    """`ethtool -G` resets each virtqueue and sets it up anew (RING_RESET) on each data path, while
    the card goes on; and `ethtool` shows the cable's speed (SPEED_DUPLEX).
    """
    with Guest(host, *(arg for net in RESIZED for arg in ("--net", net)), "--cpus", "2") as guest:
        for nic in range(len(RESIZED)):
            for rx, tx in ((64, 32), (256, 256)):
                guest.do(f"ethtool -G eth{nic} rx {rx} tx {tx}")
                now = guest.do(f"ethtool -g eth{nic} | sed '1,/^Current/d'")
                assert re.findall(r"^[RT]X:\s+(\d+)", now, re.M) == [str(rx), str(tx)], now
                check_traffic(guest, nic)
            link = guest.do(f"ethtool eth{nic}")
            assert "Speed: 10000Mb/s" in link and "Duplex: Full" in link, link
        guest.leave()
        for nic in guest.report["nets"]:
            assert not nic["faults"] and not nic["driver_mistakes"]
            assert nic["resets"] <= 1  # that of the shutdown


def test_coalescing(host: Host) -> None:
    """`ethtool -C` in the guest lets interrupts wait: an answer to a ping is late by that."""
    with Guest(host, "--net", "emulated,with=coalescing") as guest:
        for usecs, frames in ((50_000, 128), (0, 0)):
            # tx-frames 0 would mean another kind of driver to Linux 6.1.
            guest.do(f"ethtool -C eth0 rx-usecs {usecs} rx-frames {frames} tx-usecs 9 tx-frames 4")
            text = guest.do("ping -c 3 192.168.100.1")
            found = re.search(r"min/avg/max = ([\d.]+)/", text)
            assert found is not None and float(found[1]) * 1000 >= usecs, text
        check_traffic(guest)
        guest.leave()
        nic = guest.report["nets"][0]
        assert nic["counters"]["rx_calls_delayed"] >= 3 and nic["counters"]["tx_calls_delayed"]
        assert not nic["faults"] and not nic["driver_mistakes"]


def test_device_statistics(host: Host) -> None:
    """`ethtool -S` in a guest with Linux 6.12: what the card has counted is what the driver has
    counted, also after a live switch.
    """
    net = "emulated,queues=2,with=device-stats"
    with Guest(host, "--image", "6.12", "--cpus", "2", "--name", "told", "--net", net) as guest:

        def told() -> dict[str, int]:
            text = guest.do("ethtool -S eth0; cd /sys/class/net/eth0/statistics; grep . [rt]x_*")
            return {key: int(n) for key, n in re.findall(r"(\w+): ?(\d+)", text)}

        def differences() -> list[str]:
            now, names = told(), ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes")
            both = ((name, now[name], now[name.replace("_", "_hw_")]) for name in names)
            return [f"{name}: {own}, the card {card}" for name, own, card in both if own != card]

        def check() -> dict[str, int]:
            check_traffic(guest)
            host.wait_until(lambda: not differences(), lambda: "; ".join(differences()))
            return told()

        before = check()
        assert 0 < before["tx_hw_notifications"] <= before["tx_kicks"]
        result = host.run(*PYVMM, "switch", "--host", "local", "told", "emulated,poll=50")
        assert result.status == 0, result
        after = check()
        assert all(after[key] >= n for key, n in before.items()), (before, after)
        for key in ("rx{}_hw_bytes", "tx{}_hw_bytes"):
            assert after[key.format("")] == after[key.format(0)] + after[key.format(1)], after
        for key in ("rx_hw_needs_csum", "rx_hw_interrupts", "tx_hw_gso_packets_noseg"):
            assert after[key] > before[key] > 0, key
        assert after["cq_hw_command_num"] == after["cq_hw_ok_num"] > before["cq_hw_ok_num"]
        guest.leave()
        nic = guest.report["nets"][0]
        assert "DEVICE_STATS" in nic["negotiated"] and not nic["faults"]


STEERED = ("emulated", "vhost-net", "vhost-user", "emulated,with=hash-report+rss+packed")


def test_rss(host: Host) -> None:
    """`ethtool -X` in the guest says which queue pairs frames come in by, on each data path, and a
    live switch keeps that.
    """
    nets = [f"{net},queues=2" + ("" if "with=" in net else ",with=rss") for net in STEERED]
    nets[0] += ",switchable=vhost-net"
    cards = [arg for net in nets for arg in ("--net", net)]
    with Guest(host, "--name", "steered", "--cpus", "2", *cards) as guest:

        def received(nic: int) -> list[int]:
            text = guest.do(f"ethtool -S eth{nic}")
            return [int(n) for n in re.findall(r"rx_queue_\d+_packets: (\d+)", text)]

        def traffic(nic: int) -> list[int]:
            before = received(nic)
            check_tcp(guest, nic)
            return [b - a for a, b in zip(before, received(nic), strict=True)]

        def check(nic: int, pair: int) -> None:
            guest.do(f"ethtool -X eth{nic} weight {1 - pair} {pair}")
            by_queue = traffic(nic)
            # What is not IP, such as ARP, comes in by the first.
            assert by_queue[pair] > 100 and by_queue[1 - pair] < 20, (nic, pair, by_queue)

        for nic in range(len(nets)):
            text = guest.do(f"ethtool -x eth{nic}")
            assert "toeplitz: on" in text or "RSS hash key:" in text, text
            check(nic, 1)
            check(nic, 0)
        guest.do("ethtool -K eth3 rxhash on && ethtool -N eth3 rx-flow-hash udp4 sdfn")
        check_traffic(guest, 3)
        check(0, 1)
        for mode in ("vhost-net", "emulated"):
            result = host.run(*PYVMM, "switch", "--host", "local", "steered", mode)
            assert result.status == 0, result
            by_queue = traffic(0)
            assert by_queue[1] > 100 and by_queue[0] < 20, (mode, by_queue)
        guest.leave()
        for nic, net in zip(guest.report["nets"], nets, strict=True):
            assert not nic["faults"] and not nic["driver_mistakes"], net
            assert "RSS" in nic["negotiated"] and nic["queue_pairs"]["used"] == 2
        assert "HASH_REPORT" in guest.report["nets"][3]["negotiated"]


def test_the_table_of_features(host: Host) -> None:
    """docs/features.md says what each data path offers, and what Linux 6.1 uses."""
    page = (Path(__file__).parents[2] / "docs/features.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    heads = rows[0]
    table = {row[0]: dict(zip(heads, row, strict=True)) for row in rows if len(row) == len(heads)}
    of_the_host = set(GROUPS["uso"].split())
    nets = [
        f"{mode},queues=2,mtu=1500,with={'+'.join(HONOURED[mode])}"
        for mode in ("emulated", "vhost-net", "vhost-user")
    ]
    used = set()
    with Guest(host, *(arg for net in nets for arg in ("--net", net))) as guest:
        for nic in range(len(nets)):
            check_ping(guest, nic)
        guest.leave()
        for nic in guest.report["nets"]:
            column = f"`{nic['mode']}`"
            told = {n for n, row in table.items() if row.get(column) in ("yes", "on request")}
            assert set(nic["offered"]) - of_the_host == told - of_the_host, nic["mode"]
            used |= set(nic["negotiated"])
    told = {n for n, row in table.items() if row["used by Linux 6.1"] == "yes"}
    assert used - of_the_host == told - of_the_host


def test_function_reset(host: Host) -> None:
    """Linux resets a card alone (FLR), as before it gives the card away, and binds it again."""
    nets = ("emulated", "vhost-net", "emulated,legacy=on")
    with Guest(host, *(arg for net in nets for arg in ("--net", net))) as guest:
        for nic in range(len(nets)):
            check_ping(guest, nic)
            card, bind = f"0000:00:{nic + 1:02x}.0", "/sys/bus/pci/drivers/virtio-pci"
            there = f"/sys/bus/pci/devices/{card}"
            assert "af_flr" in guest.do(f"cat {there}/reset_method")
            guest.do(f"echo {card} >{bind}/unbind")
            guest.do(f"echo 1 >{there}/reset && echo {card} >{bind}/bind")
            name = guest.do(f"ls {there}/virtio*/net").strip()
            address = nic_address(nic, "guest")
            guest.do(f"ip link set {name} up && ip addr add {address}/24 dev {name}")
            check_ping(guest, nic)
        guest.leave()
        for nic in guest.report["nets"]:
            assert not nic["faults"] and not nic["driver_mistakes"]


def build_image(series: str) -> None:
    """A guest image with Debian's kernel of ``series``, if Debian has one."""
    done = subprocess.run(
        [*PYVMM, "image", "build", "--kernel-version", series], capture_output=True, text=True
    )
    if "apt knows no kernel" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


def test_af_xdp_without_copies(host: Host, tmp_path: Path) -> None:
    """A socket of AF_XDP gets frames that the device has written into its memory: Linux (since
    6.13) resets the virtqueue alone, and gives the socket's frames as buffers. Without
    ACCESS_PLATFORM Linux refuses.
    """
    build_image("6.18")
    programs = [seqnet.build(tmp_path), seqnet.build(tmp_path, "xsk")]
    nets = [f"{mode},with=access-platform" for mode in ("emulated", "vhost-net", "vhost-user")]
    args = [arg for net in (*nets, "emulated") for arg in ("--net", net)]
    count = 500
    with Guest(host, "--image", "6.18", "--add", f"{programs[1]}:/bin/xsk", *args) as guest:
        for nic in range(len(nets)):
            # The file of the card before is not to be taken for this one's.
            guest.do(f"rm -f /tmp/xsk; xsk eth{nic} {count} >/tmp/xsk &")
            guest.do("until grep -q ready /tmp/xsk 2>/dev/null; do sleep 0.1; done")
            tap = re.findall(r"^(?!lo)\w+", guest.host_run(nic, "ip", "-br", "link").out, re.M)
            send = [str(programs[0]), "send", tap[0], str(count), "500"]
            assert guest.host_run(nic, *send).status == 0
            # Its end, with which the queue gets its own buffers again. Frames may be lost by that.
            text = guest.do("wait $!; grep received /tmp/xsk")
            found = json.loads(text)
            assert found == {"received": count, "out_of_order": 0, "zero_copy": True}, nets[nic]
            ask = f"ping -q -c 1 -W 1 {nic_address(nic, 'host')} >/tmp/ping"
            guest.do(f"until {ask}; do sleep 0.1; done")
            check_ping(guest, nic)
        assert "Invalid argument" in guest.sh(f"xsk eth{len(nets)} 1").text
        guest.leave()
        for nic in guest.report["nets"]:
            assert not nic["faults"] and not nic["driver_mistakes"], nic["mode"]


def test_vlans(host: Host) -> None:
    """Frames of a VLAN that the guest has not asked for stay in the host, with each data path;
    without the control queue all come.
    """
    nets = ("emulated", "vhost-net", "vhost-user", "emulated,without=ctrl-vq")
    with Guest(host, *(arg for net in nets for arg in ("--net", net))) as guest:
        host.sh("modprobe 8021q")
        for nic in range(len(nets)):
            check_ping(guest, nic)
            inside = shlex.join(guest.inside(nic))
            script = f"""
                tap=$(ip -o link | grep -o 'tap[0-9]*' | head -n 1)
                ip link add link $tap name vlan7 type vlan id 7
                ip addr add 10.7.{nic}.1/24 dev vlan7
                ip link set vlan7 up
                ping -c 3 -i 0.2 -W 1 10.7.{nic}.9 >/dev/null || true
                ip link del vlan7
                ip -j -s link show dev $tap"""
            text = host.sh(f"{inside} sh -ec {shlex.quote(script)}")
            dropped = json.loads(text)[0]["stats64"]["tx"]["dropped"]
            assert dropped == 0 if "without" in nets[nic] else dropped >= 3
            check_ping(guest, nic)
        guest.leave()


def test_jumbo_frames(host: Host) -> None:
    """With mtu=9000 a packet of that size goes through whole, both ways, also without mergeable
    buffers.
    """
    nets = (
        "--net",
        "emulated,mtu=9000,without=tso",
        "--net",
        "emulated,mtu=9000,without=tso+mrg-rxbuf",
    )
    with Guest(host, *nets) as guest:
        for nic in (0, 1):
            check_ping(guest, nic, size=8972)
            assert guest.host_run(
                nic, *f"ping -M do -s 8973 -c 1 {nic_address(nic, 'guest')}".split()
            ).status
            check_traffic(guest, nic)
        guest.leave()


def test_two_cpus(host: Host) -> None:
    """Both are online, and a queue's interrupt comes to the CPU that it is sent to."""
    with Guest(host, "--cpus", "2") as guest:
        assert guest.do("cat /sys/devices/system/cpu/online").strip() == "0-1"
        numbers = guest.do("grep virtio0- /proc/interrupts | cut -d: -f1").split()
        assert len(numbers) == 3  # configuration, receive, transmit
        for cpu in (0, 1, 0):
            for number in numbers:
                guest.do(f"echo {cpu} >/proc/irq/{number}/smp_affinity_list")
            before = interrupts(guest, "virtio0-input")
            check_traffic(guest)
            after = interrupts(guest, "virtio0-input")
            assert after[cpu] > before[cpu]
            assert after[1 - cpu] - before[1 - cpu] <= 2  # on their way while it changed
        check_iperf(guest)
        guest.leave()


@pytest.mark.thorough
def test_eight_cpus(host: Host) -> None:
    """As many as the testbed has to share out; all come up and do work."""
    with Guest(host, "--cpus", "8", "--memory", "512M") as guest:
        assert guest.do("nproc").strip() == "8"
        assert guest.do("cat /sys/devices/system/cpu/online").strip() == "0-7"
        for cpu in range(8):
            assert guest.do(f"taskset {1 << cpu:x} sh -c 'echo works'").strip() == "works"
        check_traffic(guest)
        guest.leave()


def test_intx(host: Host) -> None:
    """Without MSI, two cards interrupt by their lines."""
    nets = ("--net", "emulated", "--net", "emulated,notify=exit")
    with Guest(host, "--append", "pci=nomsi", "--cpus", "2", *nets) as guest:
        assert not guest.sh("grep MSI /proc/interrupts").text
        for nic in (0, 1):
            check_traffic(guest, nic)
            assert sum(interrupts(guest, f"IO-APIC.*virtio{nic}")) > 0
        reload_driver(guest)
        check_traffic(guest, 0)
        guest.leave()
        assert exits_by_device(guest.report, "net0 isr") > 0
        by_line, by_exit = guest.report["nets"]
        assert exits_by_device(guest.report, "net0 notify") <= by_line["control_commands"]
        kicks = by_exit["counters"]["tx_kicks"] + by_exit["counters"]["rx_kicks"]
        assert exits_by_device(guest.report, "net1 notify") >= kicks > 0


def test_memory_above_the_pci_hole(host: Host) -> None:
    """With 5 GiB, RAM goes on above 4 GiB, and the card reaches it."""
    with Guest(host, "--memory", "5G") as guest:
        total = int(guest.do("awk '/MemTotal/ {print $2}' /proc/meminfo"))
        assert total > 4.5 * (1 << 20)
        assert "100000000-" in guest.do("grep 'System RAM' /proc/iomem")
        check_traffic(guest)
        check_iperf(guest)
        guest.leave()
        assert guest.report["memory_bytes"] == 5 << 30
