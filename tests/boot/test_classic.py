"""The textbook device with a Linux guest: ping, TCP both ways, and the way up while it runs."""

from __future__ import annotations

import pytest

from tests.boot.guest import PYVMM, Guest, Host, check_ping, check_tcp, exits_by_device

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_linux_on_the_textbook_device(host: Host) -> None:
    """Each frame is an exit out, or a call in; the data path changes under the guest."""
    with Guest(host, "--name", "classic", "--net", "classic") as guest:
        check_ping(guest)
        for keys in ("emulated,batch=on", "emulated,worker=vcpu,batch=off"):
            result = host.run(*PYVMM, "switch", "--host", "local", "classic", keys)
            assert result.status == 0 and "net0: emulated -> emulated, gap " in result.out, result
            check_ping(guest)
        for keys, why in (
            ("vhost-net", "interrupt=ioctl and vhost-net"),
            ("classic", "switch to emulated,worker=vcpu,batch=off"),
        ):
            result = host.run(*PYVMM, "switch", "--host", "local", "classic", keys)
            assert result.status == 114 and why in result.err, result
        check_tcp(guest, megabytes=1)
        guest.leave()
        nic = guest.report["nets"][0]
        assert nic["interrupt_calls"] > 0 and not nic["faults"] and not nic["driver_mistakes"]
        assert {"EVENT_IDX", "INDIRECT_DESC", "CSUM", "GUEST_TSO4"}.isdisjoint(nic["negotiated"])
        assert exits_by_device(guest.report, "net0 notify") > 100


def test_the_way_up_while_the_guest_runs(host: Host) -> None:
    """With irqfds, a card that begins with the vCPU as its worker can go as far as vhost-net."""
    net = "emulated,worker=vcpu,notify=exit,batch=off,switchable=vhost-net"
    with Guest(host, "--name", "climber", "--net", net) as guest:
        for to in ("emulated,worker=vcpu", "emulated", "vhost-net", "emulated,worker=vcpu"):
            check_ping(guest)
            result = host.run(*PYVMM, "switch", "--host", "local", "climber", to)
            assert result.status == 0, result
        check_ping(guest)
        check_tcp(guest, megabytes=1)
        guest.leave()
        nic = guest.report["nets"][0]
        assert [s["outcome"] for s in nic["switches"]] == ["switched"] * 4 and not nic["faults"]
