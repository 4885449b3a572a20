"""Linux' driver virtio_mmio on cards that ACPI names (docs/mmio.md), beside a card on the PCI bus:
packets, a driver that comes again, live switches, and the exits by register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PYVMM, Guest, check_ping, check_tcp, nic_address

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: The second one has several queue pairs and its kicks are exits.
CARDS = (
    *("--net", "emulated,transport=mmio,switchable=vhost-net"),
    *("--net", "emulated,transport=mmio,queues=2,notify=exit"),
    *("--net", "emulated"),
)


def test_linux_on_mmio(host: Host) -> None:
    with Guest(host, "--name", "mmio", "--cpus", "2", *CARDS) as guest:
        windows = guest.do("grep -c 'LNRO0005:.. LNRO0005' /proc/iomem; ls /sys/bus/pci/devices")
        assert windows.split() == ["2", "0000:00:00.0", "0000:00:03.0"]
        check_ping(guest, 1)
        check_ping(guest, 2)

        guest.do("rmmod virtio_mmio && modprobe virtio_mmio")  # the cards come again
        for nic in (0, 1):
            guest.do(
                f"dev=$(ls /sys/bus/platform/devices/LNRO0005:0{nic}/virtio*/net)"
                f" && ip link set $dev up && ip addr add {nic_address(nic, 'guest')}/24 dev $dev"
            )
        check_ping(guest, 1)

        for mode in ("vhost-net", "emulated"):
            result = host.run(*PYVMM, "switch", "--host", "local", "--nic", "0", "mmio", mode)
            assert result.status == 0, result
            check_ping(guest, 0)
        check_tcp(guest, 0, megabytes=1)
        guest.leave()
        report = guest.report
        for nic, transport in zip(report["nets"], ("mmio", "mmio", "pci"), strict=True):
            assert nic["transport"] == transport and nic["interface"] == "modern"
            assert not nic["driver_mistakes"] and not nic["faults"] and not nic["kvm_refusals"]
        assert [s["outcome"] for s in report["nets"][0]["switches"]] == ["switched"] * 2
        exits = {
            (line["direction"], line["name"]): line["count"]
            for line in report["exits"]["lines"]
            if line["reason"] == "mmio"
        }
        for name in ("net0", "net1"):
            looks = exits["read", f"{name} mmio InterruptStatus"]
            assert exits["write", f"{name} mmio InterruptACK"] == looks > 10
            assert exits["read", f"{name} mmio MagicValue"] == 2
        assert ("write", "net0 queue 1 notify") not in exits
        assert exits["write", "net1 queue 1 notify"] > 5
