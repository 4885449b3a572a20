"""Linux' legacy driver (virtio_pci force_legacy=1) on transitional cards: every data path, with
headers of 12 bytes and of 10, under live switches; then the modern driver on the same cards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PYVMM, Guest, check_ping, check_tcp, nic_address

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

CARD = "emulated,legacy=on,switchable=vhost-net+vhost-user"
#: The header has 12 bytes with MRG_RXBUF, which the first card offers, and else 10.
CARDS = ("--net", CARD, "--net", f"{CARD},without=mrg-rxbuf")


def load(guest: Guest, *options: str) -> None:
    """Load the drivers again, and give the interfaces their addresses back."""
    guest.do("rmmod virtio_net virtio_pci")
    guest.do(f"modprobe virtio_pci {' '.join(options)} && modprobe virtio_net")
    for nic in (0, 1):
        guest.do(f"ip link set eth{nic} up")
        guest.do(f"ip addr add {nic_address(nic, 'guest')}/24 dev eth{nic}")


def test_linux_legacy_driver(host: Host) -> None:
    with Guest(host, "--name", "legacy", *CARDS) as guest:
        load(guest, "force_legacy=1")
        assert "virtio-pci-legacy" in guest.do("cat /proc/ioports")
        check_tcp(guest, 0, megabytes=1)
        for nic, mode in ((0, "vhost-net"), (1, "vhost-net"), (1, "vhost-user")):
            argv = [*PYVMM, "switch", "--host", "local", "--nic", str(nic), "legacy", mode]
            result = host.run(*argv)
            assert result.status == 0, result
            check_tcp(guest, nic, megabytes=1)
        load(guest)
        check_ping(guest, 1)
        guest.leave()
        for nic, switches in zip(guest.report["nets"], (1, 2), strict=True):
            assert [s["outcome"] for s in nic["switches"]] == ["switched"] * switches
            assert nic["refused_writes"] == 0 and nic["kvm_refusals"] == 0
            assert nic["interface"] == "modern"
