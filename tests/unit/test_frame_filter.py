"""VLANs and kinds of destinations that a driver does not want, dropped by a real tap."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

from pyvmm.datapath.base import RxFilter
from pyvmm.hostnet.framefilter import VLANS_MAX, frame_filter
from pyvmm.hostnet.netns import Namespace
from tests.driver import wait_for

MAC = bytes.fromhex("525400123456")
GROUP, ALL = bytes.fromhex("01005e000001"), b"\xff" * 6
MARK = b"\x88\xb5"  # an EtherType for local experiments


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    with Namespace(address="192.168.95.1/24") as ns:
        yield ns


def wanted(*flags: str, vlans: set[int] | None = None) -> RxFilter:
    rx = RxFilter(MAC, filters_vlans=vlans is not None)
    rx.flags, rx.vlans = set(flags), vlans or set()
    return rx


def arrive(namespace: Namespace, rx: RxFilter, frames: dict[str, bytes]) -> set[str]:
    """Names of the frames that a data path would get, of those that the host sends."""
    tap = namespace.tap
    tap.set_rx_filter(rx)
    names = {bytes([i]): name for i, name in enumerate(frames)}
    end = b"the end"
    got: set[str] = set()
    with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind((tap.name, 0))
        for i, frame in enumerate(frames.values()):
            s.send(frame + bytes([i]) + bytes(50))
        tap.set_rx_filter(RxFilter(MAC))
        s.send(MAC + MAC + MARK + end + bytes(50))

    def read() -> bool:
        while True:
            try:
                data = os.read(tap.fds[0].fileno(), 4096)[12:]
            except BlockingIOError:
                return False
            if end in data:
                return True
            if MARK in data:
                got.add(names[data[data.index(MARK) + 2 :][:1]])

    assert wait_for(read)
    return got


def tagged(vlan: int, to: bytes = MAC) -> bytes:
    return to + MAC + b"\x81\x00" + struct.pack(">H", 3 << 13 | vlan) + MARK


FRAMES = {
    "own": MAC + MAC + MARK,
    "group": GROUP + MAC + MARK,
    "all": ALL + MAC + MARK,
    "vlan 0": tagged(0),
    "vlan 7": tagged(7),
    "vlan 4095 all": tagged(4095, ALL),
}
PLAIN, TAGGED = {"own", "group", "all"}, {"vlan 0", "vlan 7", "vlan 4095 all"}


@pytest.mark.parametrize(
    ("rx", "want"),
    [
        (wanted("promisc", vlans={7}), PLAIN | TAGGED),
        (wanted("allmulti"), PLAIN | TAGGED),
        (wanted("allmulti", vlans=set()), PLAIN),
        (wanted("allmulti", vlans={7}), PLAIN | {"vlan 7"}),
        (wanted("allmulti", vlans={0, 4095}), PLAIN | {"vlan 0", "vlan 4095 all"}),
        (wanted("allmulti", vlans=set(range(VLANS_MAX))), PLAIN | {"vlan 0", "vlan 7"}),
        (wanted("allmulti", vlans=set(range(VLANS_MAX + 1))), PLAIN | TAGGED),
        (wanted("allmulti", "nobcast"), {"own", "group", "vlan 0", "vlan 7"}),
        (wanted("allmulti", "nomulti"), {"own", "all", *TAGGED}),
        (wanted("allmulti", "nouni"), {"group", "all", "vlan 4095 all"}),
        (wanted("allmulti", "nouni", "nobcast", vlans={7}), {"group"}),
    ],
    ids=lambda value: str(sorted(value.flags)) if isinstance(value, RxFilter) else "",
)
def test_what_passes(namespace: Namespace, rx: RxFilter, want: set[str]) -> None:
    assert arrive(namespace, rx, FRAMES) == want


def test_a_tap_of_the_user_s_gets_no_program() -> None:
    """It would outlive us, SIGKILL included."""
    with Namespace(address="192.168.95.1/24") as namespace:
        namespace.tap.created = False
        assert arrive(namespace, wanted("allmulti", vlans={7}), FRAMES) == PLAIN | TAGGED
        namespace.tap.created = True


def test_queues_that_come_back_filter_as_well() -> None:
    """And they do come back."""
    rx = wanted("allmulti", "nobcast")
    with Namespace(address="192.168.95.1/24", queues=4) as namespace:
        tap = namespace.tap
        tap.set_rx_filter(rx)
        for count in (1, 2, 1, 4, 2, 3, 1, 4):
            tap.set_queues(count)
        with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
            s.bind((tap.name, 0))
            for to in (ALL, MAC):
                for i in range(256):  # spread over the queues by their ports
                    head = struct.pack(">BBHHHBBH8x", 0x45, 0, 28, 0, 0, 9, 17, 0)
                    head += struct.pack(">HHHH", i, i, 8, 0)
                    s.send(to + MAC + b"\x08\0" + head + bytes(30))
        assert wait_for(lambda: tap.link().stats()["tx_dropped"] >= 256)

        def waiting() -> bool:
            return all(select.select([fd.fileno()], [], [], 0)[0] for fd in tap.fds)

        assert wait_for(waiting), "each queue has got frames of ours"
        assert tap.link().stats()["tx_dropped"] == 256


def test_no_program_where_everything_passes() -> None:
    assert frame_filter(wanted("promisc", "nobcast", vlans=set())) == b""
    assert frame_filter(wanted()) == b""
    assert len(frame_filter(wanted(vlans=set()))) == 8 * 11
