"""``--net MODE[,key=value...]``: what is taken, and what is refused in one line."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvmm.errors import UsageError
from pyvmm.macs import mac_text
from pyvmm.netopt import GROUPS, Net, mask, parse_mac
from tests.driver import bits


def test_defaults() -> None:
    net = Net.parse("emulated")
    assert (net.mode, net.tap, net.mac, net.mtu, net.host, net.guest) == (
        "emulated",
        None,
        None,
        None,
        None,
        None,
    )
    assert (net.queue_size, net.notify, net.poll, net.without, net.excluded()) == (
        256,
        "ioeventfd",
        0,
        [],
        bits(
            "VIRTIO_F_ACCESS_PLATFORM",
            "VIRTIO_F_RING_PACKED",
            "VIRTIO_F_IN_ORDER",
            "VIRTIO_NET_F_NOTF_COAL",
            "VIRTIO_NET_F_VQ_NOTF_COAL",
            "VIRTIO_NET_F_RSS",
            "VIRTIO_NET_F_HASH_REPORT",
            "VIRTIO_NET_F_DEVICE_STATS",
            "VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO",
            "VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM",
            "VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO",
            "VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO_CSUM",
        ),
    )
    assert Net.parse("none").mode == "none" and Net().mode == "emulated"


def test_every_key() -> None:
    net = Net.parse(
        "emulated,tap=tap7,mac=52:54:0:12:34:5F,mtu=9000,host=10.0.0.1/8,guest=10.0.0.2/8,queue-size=1024,"
        "without=tso+mrg-rxbuf,notify=exit,poll=50"
    )
    assert (net.tap, net.mtu, net.host, net.guest) == ("tap7", 9000, "10.0.0.1/8", "10.0.0.2/8")
    assert net.mac is not None and mac_text(net.mac) == "52:54:00:12:34:5f"
    assert (net.queue_size, net.notify, net.poll, net.without) == (
        1024,
        "exit",
        50,
        ["tso", "mrg-rxbuf"],
    )
    assert net.excluded() & bits("VIRTIO_NET_F_MRG_RXBUF") and net.excluded() & bits(
        "VIRTIO_NET_F_HOST_TSO4"
    )
    assert not net.excluded() & bits("VIRTIO_NET_F_CSUM")
    same = Net(tap="tap7", mac=net.mac, mtu=9000, queue_size=1024)
    assert (same.mac, same.mtu, same.queue_size) == (net.mac, 9000, 1024)


def test_transport() -> None:
    """A kick over MMIO has no room for data; all else is offered as over PCI."""
    net, pci = Net.parse("vhost-net,transport=mmio"), Net("vhost-net")
    assert (net.transport, pci.transport) == ("mmio", "pci")
    assert net.excluded() ^ pci.excluded() == bits("VIRTIO_F_NOTIFICATION_DATA")


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_names_bits_that_exist(group: str) -> None:
    assert Net(without=group).excluded()


BAD = {
    "": "unknown mode ''",
    "bridge": "unknown mode 'bridge'",
    "Emulated": "modes: none, emulated",
    "emulated,wings=1": "unknown key 'wings'",
    "emulated,mtu": "unknown key 'mtu'",
    "none,tap=x": "keys: none",
    "emulated,mtu=1500,mtu=1500": "mtu is given twice",
    "emulated,queue-size=8,queue-size=8": "queue-size is given twice",
    "emulated,queue_size=8": "unknown key 'queue_size'",
    "emulated,mtu=": "use 68 to 65521",
    "emulated,mtu=67": "use 68 to 65521",
    "emulated,mtu=65522": "use 68 to 65521",
    "emulated,mtu=-1": "use 68 to 65521",
    "emulated,mtu= 1500": "use 68 to 65521",
    "emulated,mtu=1_500": "use 68 to 65521",
    "emulated,mtu=0x600": "use 68 to 65521",
    "emulated,mtu=\u0661\u0665\u0660\u0660": "use 68 to 65521",
    "emulated,mtu=" + "9" * 5000: "use 68 to 65521",
    "emulated,queue-size=0": "use 2 to 32768",
    "emulated,queue-size=3": "power of two",
    "emulated,queue-size=65536": "use 2 to 32768",
    "emulated,legacy=maybe": "use legacy=on or legacy=off",
    "emulated,transport=isa": "use transport=pci or transport=mmio",
    "emulated,transport=mmio,legacy=on": "leave one of them out",
    "emulated,poll=1001": "use 0 to 1000",
    "emulated,notify=never": "notify=ioeventfd or notify=exit",
    "emulated,worker=me": "use worker=thread or worker=vcpu",
    "emulated,interrupt=msi": "use interrupt=irqfd or interrupt=ioctl",
    "emulated,batch=maybe": "use batch=on or batch=off",
    "emulated,worker=vcpu": "only if it is an exit: notify=exit, or worker=thread",
    "classic,notify=ioeventfd": "only if it is an exit: notify=exit, or worker=thread",
    "classic,poll=50": "no thread that could look for work",
    "classic,switchable=vhost-net": "interrupt=ioctl and vhost-net; the interrupts of other data",
    "vhost-net,worker=vcpu": "unknown key 'worker'",
    "vhost-net,switchable=emulated,interrupt=ioctl": "interrupt=ioctl and vhost-net",
    "emulated,switchable=classic": "modes, joined by +",
    "vhost-user,socket=/s,poll=50": "pyvmm backend --poll",
    "clasic": "did you mean classic?",
    "emulated,mac=": "no unicast MAC",
    "emulated,mac=52:54:00:12:34": "no unicast MAC",
    "emulated,mac=52:54:00:12:34:56:78": "no unicast MAC",
    "emulated,mac=53:54:00:12:34:56": "no unicast MAC",
    "emulated,mac=00:00:00:00:00:00": "no unicast MAC",
    "emulated,mac=52:54:00:12:34:156": "no unicast MAC",
    "emulated,mac=52:54:00:12:34:+5": "no unicast MAC",
    "emulated,mac=52:54:00:12:34:-5": "no unicast MAC",
    "emulated,mac=52-54-00-12-34-56": "no unicast MAC",
    "emulated,host=192.168.1.1": "192.168.100.1/24",
    "emulated,host=192.168.1/24": "192.168.100.1/24",
    "emulated,host=192.168.1.256/24": "192.168.100.1/24",
    "emulated,host=192.168.1.\u00b2/24": "192.168.100.1/24",
    "emulated,guest=192.168.1.1/0": "192.168.100.1/24",
    "emulated,guest=192.168.1.1/33": "192.168.100.1/24",
    "emulated,guest=192.168.1.1/\u00b2": "192.168.100.1/24",
    "emulated,guest=fd00::1/64": "192.168.100.1/24",
    "emulated,tap=": "no interface name",
    "emulated,tap=a b": "no interface name",
    "emulated,tap=a/b": "no interface name",
    "emulated,tap=sixteen-letters-": "no interface name",
    "emulated,tap=t\u00e4p": "no interface name",
    "emulated,tap=\udcff": "no interface name",
    "emulated,tap=a\nb": "no interface name",
    "emulated,without=all": "groups, joined by +",
    "emulated,with=packet": "did you mean packed?",
    "emulated,with=tso": "by +: packed, in-order, coalescing, rss, hash-report, device-stats",
    "emulated,with=packed,without=packed": "leave one of them away",
    "emulated,with=packed,with=packed": "given twice",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: ascii(text)[:40])
def test_bad_input_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(UsageError) as e:
        Net.parse(text)
    assert BAD[text] in str(e.value)
    assert "\n" not in str(e.value) and e.value.exit_code == 2


@given(st.text())
@example("emulated,mtu=\u00b2")
def test_any_text_is_taken_or_refused(text: str) -> None:
    for candidate in (
        text,
        f"emulated,{text}",
        f"emulated,mac={text}",
        f"emulated,host={text}",
        f"emulated,mtu={text}",
    ):
        try:
            Net.parse(candidate)
        except UsageError:
            pass


def test_a_mac_may_be_bytes() -> None:
    assert parse_mac(b"\x52\0\0\0\0\1") == b"\x52\0\0\0\0\1"
    for bad in (b"", b"12345", b"1234567", b"\x01\0\0\0\0\1"):
        with pytest.raises(UsageError):
            parse_mac(bad)


def test_vhost_user() -> None:
    net = Net.parse("vhost-user,socket=/tmp/s,server=on,queues=2")
    assert (net.mode, net.socket, net.server, net.queues) == ("vhost-user", "/tmp/s", True, 2)
    assert not Net.parse("vhost-user,socket=/tmp/s").server
    for text in (
        "vhost-user,socket=",
        "vhost-user,server=on",
        "vhost-user,socket=/tmp/s,server=yes",
        "vhost-user,socket=/tmp/s,tap=tap0",
        "vhost-user,socket=/tmp/s,poll=1",
        "emulated,socket=/tmp/s",
    ):
        with pytest.raises(UsageError):
            Net.parse(text)


def test_switchable() -> None:
    net = Net.parse("emulated,switchable=vhost-net+vhost-user,socket=/tmp/s,poll=5,tap=tap0")
    assert net.switchable == ["vhost-net", "vhost-user"] and net.has_tap
    assert Net.parse("vhost-user,tap=tap0").has_tap  # with a back-end of pyvmm's own
    assert not Net.parse("vhost-user,socket=/tmp/s").has_tap
    assert Net.parse("vhost-user,socket=/tmp/s,switchable=emulated").has_tap
    for text in (
        "emulated,switchable=none",
        "none,switchable=emulated",
        "emulated,switchable=vdpa",
    ):
        with pytest.raises(UsageError):
            Net.parse(text)


def test_switched() -> None:
    net = Net.parse("emulated,mac=52:54:00:00:00:09,mtu=9000,queues=2,queue-size=64")
    other = net.switched("vhost-user,socket=/tmp/s,server=on")
    assert (other.mode, other.socket, other.server) == ("vhost-user", "/tmp/s", True)
    assert (other.mac, other.mtu, other.queues, other.queue_size) == (net.mac, 9000, 2, 64)
    assert not net.switched("vhost-user").socket
    assert net.switched("emulated,poll=7,worker-cpu=0").worker_cpu == 0
    assert net.switched(Net("emulated", poll=7, worker_cpu=0)).poll == 7
    card = Net.parse("emulated,switchable=vhost-user,socket=/tmp/s")
    assert card.switched("vhost-user").socket == "/tmp/s"
    for text in (
        "",
        "none",
        "vdpa",
        "emulated,mac=52:54:00:00:00:09",
        "vhost-user,worker-cpu=1",
        "vhost-user,socket=",
    ):
        with pytest.raises(UsageError):
            net.switched(text)
    with pytest.raises(UsageError):
        net.switched(Net("none"))


def test_the_back_end_s_user() -> None:
    net = Net.parse("vhost-user,socket=/s,peer=4294967294")
    assert net.peer == 2**32 - 2 and Net.parse("vhost-user,socket=/s").peer is None
    assert net.switched("vhost-user").peer == 2**32 - 2
    assert net.switched("vhost-user,peer=7").peer == 7
    assert net.switched("vhost-user,socket=/t,peer=7").socket == "/t"
    for text in ("vhost-user,peer=7", "emulated,peer=7", "vhost-user,socket=/s,peer=4294967295"):
        with pytest.raises(UsageError):
            Net.parse(text)


def test_a_host_that_is_too_old() -> None:
    net = Net.parse("emulated,with=tunnel-gso")
    with pytest.raises(UsageError, match=r"emulated has on Linux 6\.17 or later"):
        net.check_offer("emulated", bits("VIRTIO_NET_F_HOST_TSO4"))
    net.check_offer("emulated", mask(["tunnel-gso"]))


def test_classic_is_a_name_for_keys_of_emulated() -> None:
    keys = "worker=vcpu,notify=exit,interrupt=ioctl,batch=off,without=event-idx+indirect+offloads"
    for one in (Net.parse("classic"), Net("classic"), Net.parse(f"emulated,{keys}")):
        assert (one.mode, one.worker, one.notify, one.interrupt) == (
            "emulated",
            "vcpu",
            "exit",
            "ioctl",
        )
        assert not one.batch
        assert one.without == ["event-idx", "indirect", "offloads"]
    usual = Net("emulated")
    assert (usual.worker, usual.notify, usual.interrupt) == ("thread", "ioeventfd", "irqfd")
    assert usual.batch and usual.without == []
    step = Net.parse("classic,worker=thread,notify=ioeventfd,without=offloads,batch=on")
    assert (step.worker, step.notify, step.interrupt) == ("thread", "ioeventfd", "ioctl")
    assert step.batch and step.without == ["offloads"]


def test_a_switch_between_the_steps() -> None:
    """What belongs to the card stays, and decides what its data path may be."""
    card = Net("emulated", notify="exit")
    assert card.switched("emulated,worker=vcpu,batch=off").worker == "vcpu"
    assert card.switched(Net("emulated", notify="exit", worker="vcpu")).worker == "vcpu"
    assert card.switched("vhost-net").notify == "exit"
    for start, to, why in (
        (Net("emulated"), "emulated,worker=vcpu", "only if it is an exit"),
        (Net("classic"), "vhost-net", "interrupt=ioctl and vhost-net"),
        (card, "classic", "switch to emulated,worker=vcpu,batch=off"),
    ):
        with pytest.raises(UsageError, match=why):
            start.switched(to)
    assert Net("classic").switched("emulated,batch=on").interrupt == "ioctl"
