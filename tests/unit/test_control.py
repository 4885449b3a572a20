"""The control queue and several queue pairs, through the whole transport (virtio 1.2, 5.1.2,
5.1.6.5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.spec.virtio_net import RSS_HASH_TYPES as HASH_TYPES
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_CTRL_ANNOUNCE,
    VIRTIO_NET_CTRL_ANNOUNCE_ACK,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
    VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_HASH_CONFIG,
    VIRTIO_NET_CTRL_MQ_RSS_CONFIG,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_NOTF_COAL,
    VIRTIO_NET_CTRL_NOTF_COAL_RX_SET,
    VIRTIO_NET_CTRL_NOTF_COAL_TX_SET,
    VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET,
    VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET,
    VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_NOBCAST,
    VIRTIO_NET_CTRL_RX_PROMISC,
    VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL,
    VIRTIO_NET_ERR,
    VIRTIO_NET_OK,
    VIRTIO_NET_HASH_REPORT_UDPv4,
)
from pyvmm.virtio.control import MAC_TABLE
from pyvmm.virtio.net import COALESCE_US_MAX, PCI_CLASS_NETWORK_ETHERNET, NetDevice
from pyvmm.virtio.pci.transport import VirtioPci
from tests.driver import Cable, bits, wait_for
from tests.pci_guest import Board, NetGuest, frame
from tests.ringforms import form, pytest_generate_tests

__all__ = ["form", "pytest_generate_tests"]

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm
    from pyvmm.virtio.queue import Chain

MAC = bytes.fromhex("525400123456")
ALL = (1 << 64) - 1
MQ = bits("VIRTIO_NET_F_MQ")
RSS, HASH_REPORT = bits("VIRTIO_NET_F_RSS"), bits("VIRTIO_NET_F_HASH_REPORT")
OFFLOADS = bits("VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_GUEST_TSO4")


class Bundle(Cable):
    """Several cables in place of a multi-queue tap."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.cables = [self, *(Cable() for _ in range(count - 1))]
        self.fds = [c.fds[0] for c in self.cables]
        self.queues: list[int] = []
        self.offloads: list[int] = []
        self.refuse = False
        self.more = 0

    def features(self) -> int:
        return OFFLOADS | self.more

    def set_queues(self, count: int) -> None:
        if self.refuse:
            raise HostError("no")
        self.queues.append(count)

    def set_offloads(self, acked: int) -> None:
        self.offloads.append(acked & OFFLOADS)

    def close(self) -> None:
        super().close()
        for cable in self.cables[1:]:
            cable.close()


class Rig:
    """A card with ``pairs`` queue pairs, and a guest that drives it. :param more: features of the
    host's side beside its offloads.
    """

    def __init__(self, pairs: int = 1, features: int = ALL, *, more: int = 0, **guest: Any) -> None:
        self.board = Board(memory=32 << 20)
        self.cable = Bundle(pairs)
        self.cable.more = more
        self.path = EmulatedNet(self.cable)
        self.device = NetDevice("net0", self.board.memory, self.path, self.cable, MAC, pairs=pairs)
        self.board.add(
            VirtioPci(
                cast("Vm", self.board.vm),
                self.board.bus,
                self.device,
                PCI_CLASS_NETWORK_ETHERNET,
                notify="ioeventfd",
            )
        )
        self.guest = NetGuest(
            self.board,
            1,
            features,
            pairs=pairs if features & (MQ | more & RSS) else 1,
            control=True,
            **guest,
        )
        self.command = self.guest.command

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *args: Any) -> None:
        self.guest.close()
        self.board.close()
        self.cable.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as r:
        yield r


def set_pairs(rig: Rig, n: int) -> int | None:
    return rig.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, struct.pack("<H", n))


def exchange(rig: Rig, pair: int, tag: int) -> None:
    """Frames both ways through one pair."""
    net, cable = rig.guest.nets[pair], rig.cable.cables[pair]
    out = [frame(tag + i) for i in range(20)]
    net.received.clear()
    net.send(*out)
    assert [cable.receive()[12:] for _ in out] == out
    for f in out:
        cable.far.send(bytes(12) + f)
    assert [p[12:] for p in net.wait_packets(len(out))] == out


@pytest.mark.parametrize("features", [ALL, ALL & ~MQ, ALL & ~bits("VIRTIO_RING_F_EVENT_IDX")])
def test_receive_modes(features: int) -> None:
    with Rig(features=features) as rig:
        rx = rig.device.rx
        assert rx.addresses() is None  # as after reset
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == VIRTIO_NET_OK
        assert rx.addresses() == [MAC, b"\xff" * 6]
        assert rig.cable.rx is rx
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, b"\1") == VIRTIO_NET_OK
        assert rx.all_multicast
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_NOBCAST, b"\1") == VIRTIO_NET_OK
        assert rx.flags == {"allmulti", "nobcast"}
        assert rig.command(VIRTIO_NET_CTRL_RX, 6, b"\1") == VIRTIO_NET_ERR
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\2") == VIRTIO_NET_ERR
        assert (
            rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\1\0") == VIRTIO_NET_ERR
        )
        exchange(rig, 0, 1)
        assert rig.device.commands == 6


def table(*lists: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(macs)) + b"".join(macs) for macs in lists)


def test_mac_tables(rig: Rig) -> None:
    def set_tables(*lists: list[bytes]) -> int | None:
        return rig.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET, table(*lists))

    rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0")
    one, many = bytes.fromhex("525400000001"), bytes.fromhex("01005e000001")
    assert set_tables([one], [many]) == VIRTIO_NET_OK
    assert rig.device.rx.addresses() == [MAC, one, b"\xff" * 6, many]
    assert set_tables([many], []) == set_tables([], [one]) == set_tables([one]) == VIRTIO_NET_ERR
    assert rig.command(VIRTIO_NET_CTRL_MAC, 0, struct.pack("<I", 1 << 31)) == VIRTIO_NET_ERR
    assert rig.command(VIRTIO_NET_CTRL_MAC, 0, table([one], [many]) + b"x") == VIRTIO_NET_ERR
    assert rig.device.rx.addresses() == [MAC, one, b"\xff" * 6, many]
    assert set_tables([], [many] * (MAC_TABLE + 1)) == VIRTIO_NET_OK
    assert rig.device.rx.all_multicast and rig.device.rx.multicast == []
    assert set_tables([one] * (MAC_TABLE + 1), []) == VIRTIO_NET_OK
    assert rig.device.rx.addresses() is None and not rig.device.rx.all_multicast


def test_mac_address_until_reset(rig: Rig) -> None:
    new = bytes.fromhex("02aabbccddee")
    assert rig.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, new) == VIRTIO_NET_OK
    assert rig.guest.pci.config(0, 4).to_bytes(4, "little") == new[:4]
    for bad in (bytes.fromhex("01005e000001"), bytes(6), b"12345"):
        assert rig.command(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, bad) == VIRTIO_NET_ERR
    assert rig.device.mac == new
    rig.guest.pci.set("device_status", 0)
    assert rig.device.mac == MAC and rig.device.rx.mac


def test_vlans(rig: Rig) -> None:
    for command, vlan, answer in (
        (VIRTIO_NET_CTRL_VLAN_ADD, 7, VIRTIO_NET_OK),
        (VIRTIO_NET_CTRL_VLAN_ADD, 4095, VIRTIO_NET_OK),
        (VIRTIO_NET_CTRL_VLAN_ADD, 4096, VIRTIO_NET_ERR),
        (VIRTIO_NET_CTRL_VLAN_DEL, 7, VIRTIO_NET_OK),
    ):
        assert rig.command(VIRTIO_NET_CTRL_VLAN, command, struct.pack("<H", vlan)) == answer
    assert rig.device.rx.vlans == {4095}


def test_offloads_reach_the_port(rig: Rig) -> None:
    def set_offloads(mask: int) -> int | None:
        data = struct.pack("<Q", mask)
        return rig.command(VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, data)

    csum = bits("VIRTIO_NET_F_GUEST_CSUM")
    assert rig.cable.offloads == [OFFLOADS]
    assert set_offloads(csum) == VIRTIO_NET_OK
    assert rig.device.in_force & bits("VIRTIO_NET_F_CTRL_GUEST_OFFLOADS")
    assert set_offloads(bits("VIRTIO_NET_F_GUEST_TSO6")) == VIRTIO_NET_ERR  # never negotiated
    assert set_offloads(bits("VIRTIO_NET_F_CSUM")) == VIRTIO_NET_ERR
    assert rig.cable.offloads == [OFFLOADS, csum]
    rig.device.set_link(False)
    rig.device.set_link(True)
    assert rig.cable.offloads == [OFFLOADS, csum, csum]  # what is in force, not what was negotiated


def test_offloads_beyond_the_first_64_features() -> None:
    """GUEST_UDP_TUNNEL_GSO is bit 65; the command has 64 bits, in which 46 stands for it."""
    tunnel, csum = bits("VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO"), bits("VIRTIO_NET_F_GUEST_CSUM")
    mapped = bits("VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_MAPPED")
    more = bits("VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO_CSUM_MAPPED")
    command = VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
    for features in (ALL | tunnel, ALL):
        with Rig(features=features, more=tunnel) as rig:
            chosen = tunnel & features
            assert rig.device.in_force & tunnel == chosen
            assert rig.cable.header == (24 if chosen else 12)
            for offloads, answer in (
                (0, VIRTIO_NET_OK),
                (csum | mapped, VIRTIO_NET_OK if chosen else VIRTIO_NET_ERR),
                (mapped | more, VIRTIO_NET_ERR),
            ):
                assert rig.command(*command, struct.pack("<Q", offloads)) == answer
            assert rig.device.in_force & (tunnel | csum) == (tunnel | csum if chosen else 0)


def test_headers_keep_their_size_without_the_offload_that_made_them_long() -> None:
    """The driver goes on with the size that it has negotiated, and the data path starts again."""
    tunnel = bits("VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO")
    command = VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
    with Rig(features=ALL | tunnel, more=tunnel) as rig:
        assert rig.command(*command, bytes(8)) == VIRTIO_NET_OK
        rig.device.set_link(False)
        rig.device.set_link(True)
        assert not rig.device.in_force & tunnel and rig.cable.header == 24
        net = rig.guest.nets[0]
        net.queue(frame(1), header=bytes(24))
        net.tx.publish()
        assert rig.cable.receive() == bytes(24) + frame(1)
        rig.cable.far.send(bytes(24) + frame(2))
        (packet,) = net.wait_packets(1)
        assert packet[24:] == frame(2)


@pytest.mark.parametrize("negotiated", [True, False])
def test_headers_pass_if_the_driver_may_switch_checksums_on(negotiated: bool) -> None:
    """Without a stop of the data path, and also for frames that have been in the tap since
    before. A driver that cannot is told nothing (5.1.6.4.1).
    """
    csum = bits("VIRTIO_NET_F_GUEST_CSUM")
    header = bytes([1, 0, 0, 0, 0, 0, 34, 0, 6, 0])
    with Rig(features=ALL if negotiated else ALL & ~OFFLOADS) as rig:
        for mask in (0, csum) if negotiated else (0,):
            data = struct.pack("<Q", mask)
            command = VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
            assert rig.command(*command, data) == VIRTIO_NET_OK
            rig.device.set_link(False)
            rig.device.set_link(True)
            net = rig.guest.nets[0]
            net.received.clear()
            rig.cable.cables[0].far.send(header + bytes(2) + frame(1))
            (packet,) = net.wait_packets(1)
            assert packet[:10] == (header if negotiated else bytes(10))


def test_announcing(rig: Rig) -> None:
    acknowledge = (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK)
    assert rig.command(*acknowledge) == VIRTIO_NET_ERR  # nobody had asked
    assert rig.device.announce()
    assert rig.guest.pci.config(6, 2) == 3
    assert rig.board.vm.delivered(60)
    assert rig.command(*acknowledge) == VIRTIO_NET_OK
    assert rig.guest.pci.config(6, 2) == 1


def test_link_by_hand(rig: Rig) -> None:
    exchange(rig, 0, 1)
    rig.device.set_link(False)
    assert not rig.guest.link() and rig.cable.carrier is False
    rig.guest.net.send(frame(99))
    assert rig.path.workers() == []
    rig.device.set_link(True)
    assert rig.guest.link() and rig.cable.carrier is True
    assert rig.cable.receive()[12:] == frame(99)  # waited in the ring
    exchange(rig, 0, 200)


def test_a_paused_card_leaves_the_rings_alone(rig: Rig) -> None:
    """As in a paused machine: frames wait on either side, whatever else happens to the card;
    then each moves once.
    """
    exchange(rig, 0, 1)
    rig.device.set_paused(True)
    rig.device.set_paused(True)
    assert rig.path.workers() == []
    net = rig.guest.net
    net.received.clear()
    net.send(frame(50))
    rig.cable.far.send(bytes(12) + frame(51))
    rig.device.set_link(False)
    rig.device.set_link(True)
    assert rig.path.workers() == [] and not wait_for(net.poll, 0.1)
    rig.cable.far.setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.cable.far.recv(1)
    rig.device.set_paused(False)
    rig.device.set_paused(False)
    assert rig.cable.receive()[12:] == frame(50)
    assert [p[12:] for p in net.wait_packets(1)] == [frame(51)]
    exchange(rig, 0, 100)


def test_a_paused_card_that_is_reset_does_not_start(rig: Rig) -> None:
    rig.device.set_paused(True)
    rig.guest.pci.set("device_status", 0)
    rig.device.set_paused(False)
    assert rig.path.workers() == []


def test_pairs_come_and_go() -> None:
    with Rig(3) as rig:
        assert rig.guest.pci.config(8, 2) == 3
        assert rig.cable.queues == [1]
        exchange(rig, 0, 1)
        for n in (3, 2, 3, 1, 3):
            assert set_pairs(rig, n) == VIRTIO_NET_OK
            assert rig.cable.queues[-1] == rig.device.pairs == n == len(rig.path.workers())
            for pair in range(n):
                exchange(rig, pair, 1000 * n + 100 * pair)
        assert set_pairs(rig, 0) == set_pairs(rig, 4) == VIRTIO_NET_ERR
        assert rig.device.pairs == 3
        rig.guest.pci.set("device_status", 0)
        assert rig.path.workers() == []


def test_a_pair_that_was_not_set_up() -> None:
    with Rig(2) as rig:
        rig.device._rings.pop(3)  # as if the driver had left it out
        assert set_pairs(rig, 2) == VIRTIO_NET_ERR
        exchange(rig, 0, 1)


def test_pairs_that_the_host_refuses() -> None:
    with Rig(2) as rig:
        rig.cable.refuse = True
        assert set_pairs(rig, 2) == VIRTIO_NET_ERR
        assert rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET


def test_without_mq_the_control_queue_is_the_third() -> None:
    with Rig(2, ALL & ~MQ) as rig:
        assert rig.guest.control and rig.guest.control.index == 2
        assert set_pairs(rig, 2) == VIRTIO_NET_ERR
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == VIRTIO_NET_OK


def test_coalescing(rig: Rig) -> None:
    """5.1.6.5.7: per direction and per virtqueue; what is set is in force, and comes back."""

    def command(kind: int, data: bytes) -> bool:
        return rig.command(VIRTIO_NET_CTRL_NOTF_COAL, kind, data) == VIRTIO_NET_OK

    def get(queue: int) -> tuple[int, ...] | None:
        kind, data = VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET, struct.pack("<H2xII", queue, 0, 0)
        answer = rig.command(VIRTIO_NET_CTRL_NOTF_COAL, kind, data, room=13)
        return struct.unpack("<H2xII", rig.guest.result) if answer == VIRTIO_NET_OK else None

    assert command(VIRTIO_NET_CTRL_NOTF_COAL_RX_SET, struct.pack("<II", 9, 70))
    assert (get(0), get(1)) == ((0, 9, 70), (1, 0, 0))
    assert command(VIRTIO_NET_CTRL_NOTF_COAL_TX_SET, struct.pack("<II", 3, 50))
    assert command(VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET, struct.pack("<H2xII", 0, 1, 2**32 - 1))
    assert (get(0), get(1)) == ((0, 1, COALESCE_US_MAX), (1, 3, 50))
    for data in (b"", bytes(7), struct.pack("<H2xII", 77, 1, 1)):
        assert not command(VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET, data)
    assert get(77) is None
    exchange(rig, 0, 1)
    assert not rig.device.faults


def rss_config(
    table: list[int],
    *,
    types: int = HASH_TYPES,
    unclassified: int = 0,
    pairs: int = 1,
    key: bytes = bytes(range(40)),
) -> bytes:
    """struct virtio_net_rss_config (5.1.6.5.7.1)."""
    out = struct.pack("<IHH", types, (len(table) - 1) & 0xFFFF, unclassified)
    return out + struct.pack(f"<{len(table)}HHB", *table, pairs, len(key)) + key


@pytest.mark.parametrize("features", [ALL, ALL & ~MQ], ids=["mq", "rss alone"])
def test_rss(features: int) -> None:
    """5.1.6.5.7: which queue pairs are used, and what the host's side is told."""
    with Rig(4, features, more=RSS) as rig:
        assert rig.guest.pci.config(17, 1) == 40
        assert rig.guest.pci.config(18, 2) == 128 and rig.guest.pci.config(20, 4) == HASH_TYPES
        assert rig.device.pairs == 1 and rig.cable.steering is None

        def rss(data: bytes) -> int | None:
            return rig.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, data)

        assert rss(rss_config([2, 1], pairs=1)) == VIRTIO_NET_OK
        assert rig.device.pairs == 3 and rig.cable.queues[-1] == 3
        s = rig.cable.steering
        assert s is not None and list(s.table) == [2, 1] and s.unclassified == 0
        assert s.hashing.types == HASH_TYPES and s.hashing.key == bytes(range(40))
        exchange(rig, 2, 1)
        assert rss(rss_config([0] * 128, unclassified=1, pairs=4, key=b"")) == VIRTIO_NET_OK
        assert rig.device.pairs == 4
        kept = rig.cable.steering
        good = rss_config([0, 1], pairs=2)
        for bad in (
            rss_config([4, 0]),
            rss_config([0x8001]),
            rss_config([0, 0, 0]),
            rss_config([0] * 256),
            rss_config([]),
            rss_config([0], unclassified=4),
            rss_config([0], pairs=5),
            rss_config([0], pairs=0),
            rss_config([0], key=bytes(41)),
            rss_config([0], types=HASH_TYPES + 1 + max(HASH_TYPES, 63)),
            good + b"\0",
            *(good[:n] for n in range(len(good))),
        ):
            assert rss(bad) == VIRTIO_NET_ERR
        assert rig.cable.steering is kept and rig.device.pairs == 4
        exchange(rig, 3, 60)
        if features & MQ:  # back to what the host likes (5.1.6.5.6)
            assert set_pairs(rig, 2) == VIRTIO_NET_OK
            assert rig.cable.steering is None and rig.device.pairs == 2
        rig.guest.pci.set("device_status", 0)
        assert not rig.device.faults


def test_hash_report() -> None:
    """5.1.6.5.6.4: the headers have room for a hash from the start, and the hash once asked for."""
    with Rig(1, more=HASH_REPORT) as rig:
        assert rig.cable.header == 20
        hello = frame(1)
        header = b"\0" * 20

        def arrives() -> bytes:
            rig.guest.net.received.clear()
            rig.cable.far.send(header + hello)
            (packet,) = rig.guest.net.wait_packets(1)
            assert packet[20:] == hello and packet[:10] == bytes(10)
            return packet[12:20]

        assert arrives() == bytes(8)
        hello = (
            bytes(12) + b"\x08\0\x45" + bytes(8) + b"\x11" + bytes(2) + bytes(range(12)) + bytes(40)
        )

        def ask(data: bytes) -> int | None:
            return rig.command(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_HASH_CONFIG, data)

        types = struct.pack("<I8x", HASH_TYPES)
        for bad in (types, types + b"\x28" + bytes(39), types + b"\x29" + bytes(41), b"\xff" * 53):
            assert ask(bad) == VIRTIO_NET_ERR
        assert arrives() == bytes(8)
        assert ask(types + b"\x28" + bytes(range(40))) == VIRTIO_NET_OK
        value, report = struct.unpack("<IH2x", arrives())
        assert value and report == VIRTIO_NET_HASH_REPORT_UDPv4
        assert ask(bytes(12) + b"\0") == VIRTIO_NET_OK
        assert arrives() == bytes(8)
        rig.guest.net.send(hello)
        assert rig.cable.receive()[12:] == hello and not rig.device.faults


def test_commands_without_their_feature() -> None:
    with Rig(features=ALL & ~bits("VIRTIO_NET_F_CTRL_RX", "VIRTIO_NET_F_CTRL_VLAN")) as rig:
        assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0") == VIRTIO_NET_ERR
        assert (
            rig.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, b"\1\0") == VIRTIO_NET_ERR
        )


def test_no_room_for_the_answer_is_a_fault(rig: Rig) -> None:
    assert rig.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0", room=0) is None
    assert rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET
    assert wait_for(lambda: rig.device.faults)
    rig.guest.pci.notify(2)  # nothing happens


def test_many_commands_in_one_kick(rig: Rig) -> None:
    control, memory = rig.guest.control, rig.board.memory
    assert control is not None
    memory.write(0x6000, bytes([VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, 5, 0]))
    for i in range(32):
        control.add([(0x6000, 4, False), (0x7000 + i, 1, True)])
    control.publish()
    assert len(control.take_used()) == 32
    assert memory.read(0x7000, 32) == bytes(32)
    assert rig.command(VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_DEL, b"\5\0") == VIRTIO_NET_OK


@pytest.mark.parametrize("features", [ALL, ALL & ~bits("VIRTIO_RING_F_EVENT_IDX")])
def test_a_command_that_comes_when_the_queue_seems_empty(
    features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.7.10: the driver does not kick for a command that it publishes before the device has asked
    for kicks again.
    """
    with Rig(features=features) as rig:
        control, memory = rig.guest.control, rig.board.memory
        assert control is not None and rig.device._control is not None
        memory.write(0x6000, bytes([VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD, 5, 0]))
        queue, late = rig.device._control._queue, 5
        pop = queue.pop

        def pop_slowly() -> Chain | None:
            nonlocal late
            chain = pop()
            if chain is None and late:
                late -= 1
                control.add([(0x6000, 4, False), (0x7000 + late, 1, True)])
                control.publish(kick=False)
            return chain

        monkeypatch.setattr(queue, "pop", pop_slowly)
        control.add([(0x6000, 4, False), (0x7010, 1, True)])
        control.publish()
        assert wait_for(lambda: rig.device.commands == 6)
        assert len(control.take_used()) == 6


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    commands=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 7), st.binary(max_size=40)), max_size=12
    )
)
def test_any_command_gets_an_answer(commands: list[tuple[int, int, bytes]]) -> None:
    """Whatever it says, the card answers, lives and goes on."""
    with Rig(2) as rig:
        for kind, command, data in commands:
            assert rig.command(kind, command, data) in (VIRTIO_NET_OK, VIRTIO_NET_ERR)
        assert not rig.device.faults
