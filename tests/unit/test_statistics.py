"""What the driver reads of the card's counters over the control queue (virtio 1.4, 5.1.6.5.10)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_STATS,
    VIRTIO_NET_CTRL_STATS_GET,
    VIRTIO_NET_CTRL_STATS_QUERY,
    VIRTIO_NET_ERR,
    VIRTIO_NET_OK,
    VIRTIO_NET_STATS_TYPE_CVQ,
    VIRTIO_NET_STATS_TYPE_RX_BASIC,
    VIRTIO_NET_STATS_TYPE_RX_CSUM,
    VIRTIO_NET_STATS_TYPE_RX_GSO,
    VIRTIO_NET_STATS_TYPE_TX_BASIC,
    VIRTIO_NET_STATS_TYPE_TX_CSUM,
    VIRTIO_NET_STATS_TYPE_TX_GSO,
)
from tests.driver import bits, wait_for
from tests.pci_guest import NetGuest, frame
from tests.ringforms import form, pytest_generate_tests
from tests.unit.test_control import ALL, Rig, exchange
from tests.unit.test_ring_reset import renew, reset

__all__ = ["form", "pytest_generate_tests"]

#: Beside what the control queue's rig has: GUEST_CSUM and GUEST_TSO4.
MORE = bits("VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_HOST_TSO4")
RX = VIRTIO_NET_STATS_TYPE_RX_BASIC | VIRTIO_NET_STATS_TYPE_RX_CSUM | VIRTIO_NET_STATS_TYPE_RX_GSO
TX = VIRTIO_NET_STATS_TYPE_TX_BASIC | VIRTIO_NET_STATS_TYPE_TX_CSUM | VIRTIO_NET_STATS_TYPE_TX_GSO
CVQ = VIRTIO_NET_STATS_TYPE_CVQ
#: Types of replies.
RX_BASIC, RX_CSUM, RX_GSO, TX_BASIC, TX_CSUM, TX_GSO = 0, 1, 2, 16, 17, 18
#: Headers: flags and gso_type first. A checksum is asked for, TCPv4 in segments of 1000 bytes.
TSO = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
VALID = bytes([2]) + bytes(11)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Two queue pairs; the control queue is virtqueue 4."""
    with Rig(2, more=MORE) as rig:
        yield rig


def known(rig: Rig) -> int:
    """The types that the device says it has."""
    kind = VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_QUERY
    assert rig.command(*kind, room=9) == VIRTIO_NET_OK
    return int.from_bytes(rig.guest.result, "little")


def ask(rig: Rig, *wanted: tuple[int, int], room: int = 2048) -> bytes | None:
    """What the device answers for virtqueues, each with types; None for an error."""
    data = b"".join(struct.pack("<H6xQ", *one) for one in wanted)
    answer = rig.command(VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_GET, data, room=room)
    assert answer in (VIRTIO_NET_OK, VIRTIO_NET_ERR)
    assert answer == VIRTIO_NET_OK or not rig.guest.result
    return rig.guest.result if answer == VIRTIO_NET_OK else None


def get(rig: Rig, *wanted: tuple[int, int]) -> dict[tuple[int, int], tuple[int, ...]]:
    """The records by virtqueue and type."""
    data = ask(rig, *wanted)
    assert data is not None
    out: dict[tuple[int, int], tuple[int, ...]] = {}
    while data:
        kind, index, size = struct.unpack_from("<BxHxxH", data)
        out[index, kind] = struct.unpack_from(f"<{size // 8 - 1}Q", data, 8)
        data = data[size:]
    return out


def send(rig: Rig, header: bytes, data: bytes) -> None:
    """One frame each way with this header, of which the guest's is in segments of a byte."""
    net, far = rig.guest.net, rig.cable.far
    net.received.clear()
    net.queue(data, header=header, split=[1, 1])
    net.tx.publish()
    assert rig.cable.receive()[:2] == header[:2]
    far.send(header + data)
    net.wait_packets(1)


def test_what_was_done_is_told(rig: Rig) -> None:
    assert known(rig) == RX | TX | CVQ
    assert get(rig, (4, CVQ)) == {(4, 32): (2, 2)}  # this command is one of them
    assert ask(rig, (9, 0)) is None
    assert get(rig, (4, CVQ)) == {(4, 32): (4, 3)}
    exchange(rig, 0, 1)
    send(rig, TSO, frame(7, 1400))
    send(rig, VALID, frame(8))
    assert wait_for(lambda: rig.path.counters()["tx_packets"] == 22)
    before = rig.path.counters()
    told = get(rig, (1, TX), (0, RX), (4, CVQ), (2, RX))
    after = rig.path.counters()
    assert list(told) == [
        *((1, kind) for kind in (TX_BASIC, TX_CSUM, TX_GSO)),
        *((0, kind) for kind in (RX_BASIC, RX_CSUM, RX_GSO)),
        (4, 32),
        *((2, kind) for kind in (RX_BASIC, RX_CSUM, RX_GSO)),
    ]
    for index, kind, way in ((0, RX_BASIC, "rx"), (1, TX_BASIC, "tx")):
        kicks, packets, octets, calls, drops, special = told[index, kind]
        assert (packets, octets, drops, special) == (22, 21 * 60 + 1400, 0, 0)
        assert before[f"{way}_kicks"] <= kicks <= after[f"{way}_kicks"]
        assert before[f"{way}_calls"] <= calls <= after[f"{way}_calls"]
    assert after["tx_kicks"] > 0 < after["rx_calls"]
    assert told[0, RX_CSUM] == (1, 1, 20, 0)
    assert told[0, RX_GSO] == (1, 1400, 0, 0)
    assert told[1, TX_CSUM] == (21, 1)
    assert told[1, TX_GSO] == (1, 1400, 0, 0, 1, 1400)
    assert set().union(*(v for (index, _), v in told.items() if index == 2)) == {0}


def test_drops_count_as_such() -> None:
    """A frame without a whole header; one for which the guest has too few buffers in time; and
    one that the guest sends after its cable is gone.
    """
    with Rig(more=MORE, rx_size=256, rx_buffers=8) as rig:
        rig.cable.far.send(bytes(5))
        exchange(rig, 0, 1)
        assert get(rig, (0, RX))[0, RX_BASIC][4:] == (1, 0)
        rig.cable.far.close()
        rig.guest.net.send(frame(1), frame(2))
        assert wait_for(lambda: get(rig, (1, TX))[1, TX_BASIC][4:] == (2, 0))
        assert get(rig, (1, TX))[1, TX_BASIC][1] == 20


def test_counters_outlive_what_is_not_a_reset(rig: Rig) -> None:
    """Another number of queue pairs, a virtqueue that is set up anew, another data path. A reset of
    the device begins new counters.
    """

    def told() -> tuple[int, int]:
        now = get(rig, (0, RX), (1, TX))
        return now[0, RX_BASIC][1], now[1, TX_BASIC][1]

    pairs = VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET
    exchange(rig, 0, 1)
    assert rig.command(*pairs, struct.pack("<H", 2)) == VIRTIO_NET_OK
    exchange(rig, 1, 1)
    assert wait_for(lambda: told() == (20, 20))
    assert rig.command(*pairs, struct.pack("<H", 1)) == VIRTIO_NET_OK
    assert get(rig, (3, TX))[3, TX_BASIC][1] == 20  # of the pair that rests
    exchange(rig, 0, 1)
    assert wait_for(lambda: told() == (40, 40))
    reset(rig.guest, 1)
    assert wait_for(lambda: told() == (40, 40))
    rig.guest.net.tx = renew(rig.guest, 1, 32, 0x800000)
    assert wait_for(lambda: rig.device.serving == [0, 1])
    exchange(rig, 0, 1)
    assert wait_for(lambda: told() == (60, 60))
    rig.device.park()
    assert wait_for(lambda: told() == (60, 60))
    rig.device.use(EmulatedNet(rig.cable))
    rig.device.resume()
    rig.path.close()
    exchange(rig, 0, 1)
    assert wait_for(lambda: told() == (80, 80))
    rig.guest.pci.set("device_status", 0)
    rig.guest.close()
    rig.guest = NetGuest(rig.board, 1, ALL, pairs=2, control=True)
    rig.command = rig.guest.command
    assert wait_for(lambda: told() == (0, 0))


@pytest.mark.parametrize(
    "wanted",
    [
        [(5, RX)],  # behind the control queue
        [(0xFFFF, 0)],
        [(0, TX)],
        [(1, RX)],
        [(1, CVQ)],
        [(4, CVQ | VIRTIO_NET_STATS_TYPE_RX_BASIC)],
        [(0, 1 << 3)],  # the speed limits nothing, so nobody counts that
        [(0, 1 << 63)],
        [(0, RX), (1, TX), (4, CVQ), (4, TX)],  # one is wrong, so all are
    ],
)
def test_what_cannot_be_asked(rig: Rig, wanted: list[tuple[int, int]]) -> None:
    assert ask(rig, *wanted) is None
    assert ask(rig, (0, RX)) and not rig.device.faults


def test_requests_and_answers_of_any_length(rig: Rig) -> None:
    """A request that is cut off is an error; an answer is cut to the room that there is."""
    kind = VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_GET
    whole = struct.pack("<H6xQ", 1, TX)
    for length in (*range(1, 16), 17, 31):
        assert rig.command(*kind, (2 * whole)[:length], room=99) == VIRTIO_NET_ERR
    assert rig.command(VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_QUERY, b"x") == VIRTIO_NET_ERR
    assert rig.command(VIRTIO_NET_CTRL_STATS, 2, room=99) == VIRTIO_NET_ERR
    assert ask(rig) == b""
    answer = ask(rig, (1, TX), (0, RX))
    assert answer
    for room in (1, 2, 8, 9, 10, 56, 57, len(answer), len(answer) + 1, len(answer) + 2):
        assert ask(rig, (1, TX), (0, RX), room=room) == answer[: room - 1]
    assert len(ask(rig, *[(1, TX)] * 9) or b"") == 9 * 3 * 8 + 9 * 8 * (6 + 2 + 6)
    assert not rig.device.faults


def test_types_whose_features_are_not_negotiated() -> None:
    """They are not named, because Linux asks for all that are, and one that cannot be asked for
    spoils all.
    """
    lean = bits("VIRTIO_NET_F_CSUM", "VIRTIO_NET_F_GUEST_CSUM", "VIRTIO_NET_F_HOST_TSO4")
    with Rig(features=ALL & ~(lean | bits("VIRTIO_NET_F_GUEST_TSO4")), more=MORE) as rig:
        basic = VIRTIO_NET_STATS_TYPE_RX_BASIC | VIRTIO_NET_STATS_TYPE_TX_BASIC
        assert known(rig) == basic | CVQ
        for index, kind in ((0, RX), (1, TX)):
            for one in (kind & ~basic & (1 << n) for n in range(33)):
                assert not one or ask(rig, (index, one)) is None
    with Rig(features=ALL & ~bits("VIRTIO_NET_F_DEVICE_STATS")) as rig:
        assert ask(rig, (0, 1)) is None
        query = VIRTIO_NET_CTRL_STATS, VIRTIO_NET_CTRL_STATS_QUERY
        assert rig.command(*query, room=9) == VIRTIO_NET_ERR
