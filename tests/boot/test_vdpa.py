"""vhost-vdpa with the kernel's real devices: our own one in user space (VDUSE) on a tap, and the
kernel's simulator, which sends each frame back that is addressed to itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pyvmm.testbed import simulator
from pyvmm.testbed.testbed import Testbed
from pyvmm.virtio.pci.transport import NOTIFY_PAGES
from tests.boot.guest import (
    PYVMM,
    Guest,
    Host,
    check_ping,
    check_tcp,
    check_traffic,
    exits_by_device,
    nic_address,
    pings,
)
from tests.boot.test_net import reload_driver
from tests.boot.test_switch import flow, soak

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["flow"]

#: The simulator compares MAC addresses as strings, so a byte of 0 would end the comparison.
SIM_MAC, OTHER_MAC = "52:54:11:22:33:44", "52:54:11:22:33:55"
STATISTICS = (
    "cat /sys/class/net/eth0/statistics/tx_packets /sys/class/net/eth0/statistics/rx_packets"
)
DEVICES = "ls /dev/vduse /sys/bus/vdpa/devices"
#: By number as ``nic_address`` has it: no address of a tap here.
CABLE = 40
#: A card on L1's PCI bus becomes a vDPA device; the other end of its cable gets an address.
CARD = f"""
card=0000:00:1c.0
echo $card >/sys/bus/pci/devices/$card/driver/unbind
echo vp-vdpa >/sys/bus/pci/devices/$card/driver_override
echo $card >/sys/bus/pci/drivers_probe
vdpa dev add name card1 mgmtdev pci/$card
peer=$(ls /sys/bus/pci/devices/0000:00:1d.0/virtio*/net)
ip addr add {nic_address(CABLE, "host")}/24 dev $peer; ip link set $peer up
"""
USER = 65431
JAIL = ("--jail", f"{USER},memory=600M,cpus=2,pids=200")
#: The limit of locked memory that Debian has by default.
LITTLE_LOCKED = ("prlimit", f"--memlock={8 << 20}:{8 << 20}")
KICKS = "/sys/kernel/tracing/instances/kicks"


@pytest.fixture(scope="module")
def vdpa() -> Iterator[Host]:
    """A second testbed, with Linux 6.12 and its vDPA modules."""
    version = simulator.setup(print)
    name = f"{os.environ.get('PYVMM_TESTBED', 'default')}-vdpa"
    with Testbed(name, kernel=version, vdpa_card=True) as bed:
        host = Host(bed)
        host.sh(
            "modprobe -a vhost_vdpa vduse vdpa_sim_net vp_vdpa virtio_net; vdpa dev show sim0"
            f" 2>/dev/null || vdpa dev add mgmtdev vdpasim_net name sim0 mac {SIM_MAC}"
        )
        host.sh(f"vdpa dev show card1 2>/dev/null && exit; {CARD}")
        yield host


@pytest.fixture(autouse=True)
def nothing_left(vdpa: Host) -> Iterator[None]:
    """Fail a test that leaves a process, an interface, a namespace, a VM or a vDPA device
    behind.
    """
    before, devices = vdpa.leftovers(), vdpa.sh(DEVICES)

    def now() -> list[str]:
        found = vdpa.sh(DEVICES)
        return vdpa.left_behind(before) + ([found] if found != devices else [])

    yield
    vdpa.wait_until(lambda: not now(), lambda: f"left behind: {now()}; before: {devices}")


def check_return(guest: Guest, *, comes: bool) -> None:
    """Pings come back, or are lost: all or none of them, as the packets of eth0 tell. Linux may
    send a few multicast frames meanwhile.
    """
    before = [int(word) for word in guest.do(STATISTICS).split()]

    def moved() -> list[int]:
        now = map(int, guest.do(STATISTICS).split())
        return [new - old for new, old in zip(now, before, strict=True)]

    guest.sh("ping -c 20 -i 0.05 -W 1 192.168.100.9")
    sent, received = moved()
    assert 20 <= sent <= 30, (sent, received)
    if comes:
        guest.host.wait_until(lambda: moved()[1] >= 20, lambda: str(moved()))
    else:
        assert received <= 10, (sent, received)


def test_a_cell_of_a_matrix(vdpa: Host, tmp_path: Path) -> None:
    """In a confined process, with traffic both ways; its helper makes and removes the device."""
    out = tmp_path / "m.json"
    args = ["--modes", "vhost-vdpa", "--sandbox", "on", "--seconds", "1", "--json", str(out)]
    done = vdpa.run(*PYVMM, "matrix", "--host", "local", *args, timeout=400)
    assert done.status == 0, done
    (cell,) = json.loads(out.read_text())["cells"]
    assert (cell["verdict"], cell["sandbox"]) == ("passed", "on")
    assert cell["to_guest_mbit"] > 0 and cell["from_guest_mbit"] > 0


def test_own_device(vdpa: Host) -> None:
    """Guest, vhost-vdpa, VDUSE, tap: traffic, queue pairs, another driver, a reboot; and no packet
    makes KVM_RUN return.
    """
    options = "--cpus 2 --on-reboot restart --net vhost-vdpa,queues=2"
    with Guest(vdpa, *options.split()) as guest:
        check_traffic(guest)
        for pairs in (1, 2):
            guest.do(f"ethtool -L eth0 combined {pairs}")
            check_ping(guest)
        reload_driver(guest)
        check_ping(guest)
        start = len(guest.stdout)
        guest.type("echo b >/proc/sysrq-trigger\n")
        guest.log_in(start)
        check_ping(guest)
        guest.leave()
        assert guest.report["sandbox"] == "on"
        nic = guest.report["nets"][0]
        assert nic["vhost_vdpa"]["queue_pairs"] == 2 and not nic["vhost_vdpa"]["suspend"]
        counters = nic["counters"]
        assert counters["rx_packets"] > 100 < counters["tx_packets"]
        assert counters["tx_possible_repeats"] == 0
        assert exits_by_device(guest.report, "net0 notify") <= nic["control_commands"]
        assert exits_by_device(guest.report, "net0 isr") == 0


def processes(guest: Guest) -> list[str]:
    """The ids of the run, of its device's keeper, and of the confined server."""
    keeper = guest.host.sh(f"pgrep -P {guest.pid} -f vduse_keeper").strip()
    return [str(guest.pid), keeper, guest.host.sh(f"pgrep -P {keeper}").strip()]


def test_own_device_dies(vdpa: Host, tmp_path: Path) -> None:
    """Its server is confined. If that is killed while the guest sends, this is a fault with a name;
    the card goes on after a switch, and another device serves it after the next. If all processes
    are killed, the next run removes what is left; if only the run is, the keeper does.
    """
    keys = ["--net", "vhost-vdpa,switchable=emulated", "--name", "mortal", "--report"]
    with Guest(vdpa, *keys, str(tmp_path / "report"), report=False) as guest:
        server = processes(guest)[2]
        status = vdpa.sh(f"grep -E '^(CapEff|NoNewPrivs|Seccomp_filters):' /proc/{server}/status")
        assert status.split()[1::2] == ["0" * 16, "1", "1"], status
        guest.start(f"ping -i 0.05 {nic_address(0, 'host')}")
        vdpa.sh(f"kill -KILL {server}")
        see = "cat /sys/class/net/eth0/device/status"
        vdpa.wait_until(lambda: int(guest.do(see), 16) & 0x40 != 0, lambda: guest.do(see))
        for mode in ("emulated", "vhost-vdpa"):
            result = vdpa.run(*PYVMM, "switch", "--host", "local", "mortal", mode)
            assert result.status == 0 and f"-> {mode}, gap " in result.out, result
            check_ping(guest)
        guest.leave()
        report = json.loads((tmp_path / "report").read_text())
        nic = report["nets"][0]
        assert report["sandbox"] == "on", "what the two switches took, the helper did"
        assert nic["faults"] == ["our own vDPA device has lost its server: it was killed (SIGKILL)"]
    with Guest(vdpa, "--net", "vhost-vdpa", report=False) as guest:
        left = vdpa.sh(f"ls /dev/vduse | grep ^pyvmm-{guest.pid}-").strip()
        # Stopped first: else the keeper may see the run die, and tidy up, before it is killed.
        all_of_them = " ".join(processes(guest))
        vdpa.sh(f"kill -STOP {all_of_them}; kill -KILL {all_of_them}")
    assert left in vdpa.sh(DEVICES)
    with Guest(vdpa, "--net", "vhost-vdpa", report=False) as guest:
        assert left not in vdpa.sh(DEVICES)
        check_ping(guest)
        vdpa.sh(f"kill -KILL {guest.pid}")


def test_switches(vdpa: Host, flow: str) -> None:
    """Round all four modes under numbered datagrams and TCP both ways."""
    modes = "emulated+vhost-net+vhost-user+vhost-vdpa"
    last = soak(vdpa, flow, "--switches", "12", "--modes", modes)
    assert "12 switches (12 switched, 0 refused)" in last, last


@pytest.mark.thorough
def test_simulator(vdpa: Host, tmp_path: Path) -> None:
    """A device with a MAC address and a control queue of its own that can be suspended. The card
    takes its address, and a live switch takes it away and back.
    """
    keys = "vhost-vdpa,device=sim0,switchable=emulated"
    trace = tmp_path / "trace"
    with Guest(vdpa, "--name", "sim", "--net", keys, "--trace", str(trace)) as guest:
        assert guest.do("cat /sys/class/net/eth0/address").strip() == SIM_MAC
        guest.do(f"arp -s 192.168.100.9 {SIM_MAC}")
        check_return(guest, comes=True)
        # The device hears of another address by its own control queue.
        guest.do(f"ip link set eth0 address {OTHER_MAC}; arp -s 192.168.100.9 {SIM_MAC}")
        check_return(guest, comes=False)
        again = vdpa.run(
            *PYVMM, *["run", "--host", "local", "--net", "vhost-vdpa,device=sim0", "--", "true"]
        )
        assert again.status == 125 and "in use by another process" in again.err, again
        guest.do(f"arp -s 192.168.100.9 {OTHER_MAC}")
        for old, new in (("vhost-vdpa", "emulated"), ("emulated", "vhost-vdpa")):
            result = vdpa.run(*PYVMM, "switch", "--host", "local", "sim", new)
            assert result.status == 0 and f"net0: {old} -> {new}, gap " in result.out, result
            check_return(guest, comes=new == "vhost-vdpa")
        guest.do(f"ip link set eth0 address {SIM_MAC}")  # the simulator keeps it
        result = vdpa.run(*PYVMM, "switch", "--host", "local", "sim", "vhost-vdpa,device=card1")
        assert result.status and "device=card1: the sandbox has only what" in result.err, result
        guest.leave()
        assert guest.report["sandbox"] == "on"
        nic = guest.report["nets"][0]
        assert nic["counters"]["filter_errors"] == 0 < nic["counters"]["filters"]
        assert nic["vhost_vdpa"]["suspend"] and nic["vhost_vdpa"]["address_spaces"] == 2
        assert "CTRL_RX" not in nic["offered"]
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    doctor = vdpa.run(*PYVMM, "doctor").out
    assert "sim0: /dev/vhost-vdpa-0" in doctor and "/dev/vduse/control" in doctor, doctor
    steps = [e["name"] for e in events if e["name"].startswith("VHOST_")]
    updates = [e["args"] for e in events if e["name"] == "VHOST_IOTLB_UPDATE"]
    assert {u["asid"] for u in updates} == {0, 1} and "VHOST_VDPA_SUSPEND" in steps


class CardGuest(Guest):
    """A guest whose peer is in the testbed's own network namespace."""

    def inside(self, nic: int) -> list[str]:
        """Any command is there."""
        return ["env"]


def test_card(vdpa: Host) -> None:
    """A PCI card with a control queue and with pages for kicks, which then cause no exit at all,
    whatever a hostile guest reads and writes there.
    """
    keys = f"vhost-vdpa,device=card1,guest={nic_address(CABLE, 'guest')}/24"
    options = "--append", "iomem=relaxed"  # devmem reaches the card
    with CardGuest(vdpa, *options, "--net", keys) as guest:
        bar = int(guest.do("head -n 1 /sys/class/net/eth0/device/../resource").split()[0], 16)
        receive, transmit, control = (bar + NOTIFY_PAGES + 4096 * n for n in range(3))
        vdpa.sh(
            f"""
            mkdir {KICKS}; cd {KICKS}/events/kvm/kvm_mmio
            echo 'gpa >= {receive:#x} && gpa <= {control:#x}' >filter; echo 1 >enable
            """
        )
        check_tcp(guest, CABLE, megabytes=2)
        guest.do("ip link set eth0 promisc on")  # a kick of the control queue
        seen = vdpa.sh(f"grep -o 'gpa 0x[0-9a-f]*' {KICKS}/trace; rmdir {KICKS}").split("\n")
        assert set(seen) == {f"gpa {control:#x}", ""}, seen
        # The vCPU's thread, which may not map memory, has the pages taken away and put back.
        command = "dd of=/sys/class/net/eth0/device/../config bs=1 seek=4 conv=notrunc"
        guest.do(f"printf '\\004' | {command}; printf '\\006' | {command}")
        check_tcp(guest, CABLE, megabytes=1)
        for at in (receive, receive + 2, transmit + 0xFF8):
            for width in (8, 16, 32):
                guest.do(f"devmem {at:#x} {width}; devmem {at:#x} {width} 0xff")
        guest.leave()
        assert guest.report["sandbox"] == "on"
        nic = guest.report["nets"][0]
        assert nic["vhost_vdpa"]["notification_pages"] == 2, nic["vhost_vdpa"]
        assert "NOTIFICATION_DATA" not in nic["offered"]
        assert nic["counters"]["filter_errors"] == 0 < nic["counters"]["filters"]


def test_card_after_a_reload_and_a_reboot(vdpa: Host) -> None:
    """The rings go on after the driver has been loaded again, and after a reboot."""
    keys = f"vhost-vdpa,device=card1,guest={nic_address(CABLE, 'guest')}/24"
    with CardGuest(vdpa, "--on-reboot", "restart", "--net", keys) as guest:
        reload_driver(guest)
        guest.do(f"ip addr add {nic_address(CABLE, 'guest')}/24 dev eth0")
        check_ping(guest, CABLE)
        start = len(guest.stdout)
        guest.type("echo b >/proc/sysrq-trigger\n")
        guest.log_in(start)
        check_tcp(guest, CABLE, megabytes=1)
        guest.leave()


def test_simulator_in_a_jail(vdpa: Host) -> None:
    """The device comes as a descriptor, and the jail can open no such device. Switches away and
    back, and another driver, find nothing left in a device that has one descriptor all the time.
    """
    keys = "vhost-vdpa,device=sim0,switchable=emulated"
    again = [*PYVMM, *["run", "--host", "local", "--net", "vhost-vdpa,device=sim0", "--", "true"]]
    with Guest(vdpa, *JAIL, "--name", "sim", "--net", keys, wrapper=LITTLE_LOCKED) as guest:
        jailed = vdpa.sh(f"pgrep -U {USER}").split()
        assert len(jailed) >= 3
        for pid in jailed:
            assert "vhost-vdpa" not in vdpa.sh(f"ls /proc/{pid}/root/dev")
        assert guest.do("cat /sys/class/net/eth0/address").strip() == SIM_MAC
        for _ in range(2):
            guest.do(f"arp -s 192.168.100.9 {SIM_MAC}")
            check_return(guest, comes=True)
            for old, new in (("vhost-vdpa", "emulated"), ("emulated", "vhost-vdpa")):
                result = vdpa.run(*PYVMM, "switch", "--host", "local", "sim", new)
                assert result.status == 0 and f"net0: {old} -> {new}, gap " in result.out, result
                check_return(guest, comes=new == "vhost-vdpa")
            reload_driver(guest)
        refused = vdpa.run(*again)
        assert refused.status == 125 and "in use by another process" in refused.err, refused
        guest.leave()
        assert guest.report["sandbox"] == "on"
        assert guest.report["nets"][0]["vhost_vdpa"]["device"] == "sim0"
    assert vdpa.run(*again).status == 0, "the device is free"


def test_card_in_a_jail(vdpa: Host) -> None:
    """It has its pages for kicks there, too."""
    keys = f"vhost-vdpa,device=card1,guest={nic_address(CABLE, 'guest')}/24"
    options = [*JAIL, "--on-reboot", "restart", "--net", keys]
    with CardGuest(vdpa, *options, wrapper=LITTLE_LOCKED) as guest:
        check_tcp(guest, CABLE, megabytes=1)
        start = len(guest.stdout)
        guest.type("echo b >/proc/sysrq-trigger\n")
        guest.log_in(start)
        check_tcp(guest, CABLE, megabytes=1)
        guest.leave()
        assert guest.report["nets"][0]["vhost_vdpa"]["notification_pages"] == 2


def test_back_end(vdpa: Host, tmp_path: Path) -> None:
    """`pyvmm backend --vduse`: a VMM uses the device, which cannot leave it; then the host itself
    does (virtio_vdpa).
    """
    log = tmp_path / "log"
    log.touch()
    command = " ".join(PYVMM) + " backend --vduse card0 --tap tapv --address 192.168.100.1/24"
    vdpa.sh(f"{command} >/dev/null 2>{log} & echo $! >{tmp_path}/pid")
    vdpa.wait_until(lambda: "ready: /dev/vhost-vdpa-" in log.read_text(), log.read_text)
    keys = "vhost-vdpa,device=card0,switchable=emulated"
    with Guest(vdpa, "--name", "bound", "--net", keys) as guest:
        guest.do(pings(nic_address(0, "host")))
        result = vdpa.run(*PYVMM, "switch", "--host", "local", "bound", "emulated")
        assert result.status == 114 and "card0 cannot be suspended" in result.err, result
        for command in ("stop", "cont"):
            vdpa.sh(" ".join((*PYVMM, command, "--host", "local", "bound")))
        guest.do(pings(nic_address(0, "host")))
        guest.leave()
    vdpa.sh(
        """
        modprobe -a virtio_vdpa virtio_net
        cd /sys/bus/vdpa/drivers
        echo card0 >vhost_vdpa/unbind; echo card0 >virtio_vdpa/bind
        card=$(ls /sys/bus/vdpa/devices/card0/virtio*/net)
        ip netns add v; ip link set $card netns v
        ip netns exec v ip addr add 192.168.100.5/24 dev $card
        ip netns exec v ip link set $card up
        ip netns exec v ping -q -c 3 -i 0.2 192.168.100.1
        ip netns del v
        """
    )
    vdpa.sh(f"kill -INT $(cat {tmp_path}/pid)")
    vdpa.wait_until(lambda: "card0" not in vdpa.sh(DEVICES), log.read_text)


def test_no_device(vdpa: Host) -> None:
    """One line with the cause, and exit status 125."""
    for device, words in (
        ("nosuch", "there is no vDPA device nosuch; devices: "),
        ("/dev/vhost-vdpa-77", "there is no vDPA device /dev/vhost-vdpa-77"),
        ("/dev/null", "is it a vhost-vdpa device?"),
    ):
        net = f"vhost-vdpa,device={device}"
        result = vdpa.run(*PYVMM, *f"run --host local --net {net} -- true".split())
        assert result.status == 125 and words in result.err, result
        assert result.err.count("\n") == 1, result
