"""Trace rings are bounded, keep the latest events and count the lost ones; and the trace's writer
shows messages.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.exits.trace import bits_of, control_name, vhost_user_args
from pyvmm.kvm.recorder import STEPS, Recorder
from pyvmm.spec import vhost_user as vu


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    r = Recorder(16)
    yield r
    r.close()
    r.close()


def fill(ring: Any, count: int, start: int = 0) -> None:
    for i in range(start, start + count):
        ring.event[ring.next & ring.mask].ts = i
        ring.next += 1


def test_sizes() -> None:
    for size in (0, 3, 12):
        assert lib.pv_trace_new(size) == ffi.NULL
    lib.pv_trace_free(ffi.NULL)
    for asked, got in ((1, 2), (16, 16), (17, 32)):
        r = Recorder(asked)
        assert r.ring("a", "b").mask + 1 == got
        r.close()


@pytest.mark.parametrize(("count", "first"), [(0, 0), (1, 0), (16, 0), (17, 1), (1000, 984)])
def test_the_latest_are_kept(recorder: Recorder, count: int, first: int) -> None:
    fill(recorder.ring("g", "n"), count)
    events, lost = recorder.events("g", "n")
    assert [e.ts for e in events] == list(range(first, count))
    assert lost == first


def test_a_track_has_one_ring(recorder: Recorder) -> None:
    assert recorder.ring("g", "n") == recorder.ring("g", "n") != recorder.ring("g", "m")
    assert recorder.scope("g").ring("n") == recorder.ring("g", "n")
    assert recorder.tracks() == [("g", "n"), ("g", "m")]


def test_reading_while_it_is_written(recorder: Recorder) -> None:
    """The reader gets whole events in order, even if the writer overtakes it."""
    ring = recorder.ring("g", "n")
    stop = threading.Event()

    def writer() -> None:
        i = 0
        while not stop.is_set():
            fill(ring, 50, i)
            i += 50

    thread = threading.Thread(target=writer)
    thread.start()
    try:
        for _ in range(200):
            events, lost = recorder.events("g", "n")
            times = [e.ts for e in events]
            assert times == sorted(times) and len(set(times)) == len(times)
            assert not times or times[0] == lost
    finally:
        stop.set()
        thread.join()


def test_steps_are_bounded(recorder: Recorder) -> None:
    scope = recorder.scope("net0")
    for i in range(STEPS + 5):
        scope.step("x", i, {"i": i})
    steps, lost = recorder.steps()
    assert len(steps) == STEPS and lost == 5
    group, name, begin, end, args = steps[0]
    assert (group, name, begin, args) == ("net0", "x", 5, {"i": 5}) and end > begin


@pytest.mark.parametrize(
    ("request_", "payload", "said"),
    [
        (vu.VHOST_USER_GET_FEATURES, b"", {}),
        (
            vu.VHOST_USER_SET_FEATURES,
            struct.pack("<Q", 1 << 32 | 1 << 30 | 1),
            {"features": "CSUM VERSION_1 PROTOCOL_FEATURES"},
        ),
        (
            vu.VHOST_USER_SET_PROTOCOL_FEATURES,
            struct.pack("<Q", 1 << 3 | 1),
            {"protocol_features": "MQ REPLY_ACK"},
        ),
        (vu.VHOST_USER_SET_VRING_NUM, struct.pack("<II", 1, 256), {"index": 1, "num": 256}),
        (vu.VHOST_USER_SET_VRING_KICK, struct.pack("<Q", 1), {"index": 1}),
        (
            vu.VHOST_USER_SET_VRING_ADDR,
            struct.pack("<IIQQQQ", 1, 0, 16, 32, 48, 0),
            {"index": 1, "flags": 0, "desc": "0x10", "used": "0x20", "avail": "0x30", "log": "0x0"},
        ),
        (
            vu.VHOST_USER_SET_MEM_TABLE,
            struct.pack("<IIQQQQ", 1, 0, 0, 4096, 8192, 0),
            {
                "regions": [
                    {"guest": "0x0", "size": "0x1000", "user": "0x2000", "mmap_offset": "0x0"}
                ]
            },
        ),
        (
            vu.VHOST_USER_SET_STATUS,
            struct.pack("<Q", 15),
            {"status": "ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK"},
        ),
        (vu.VHOST_USER_GET_QUEUE_NUM, struct.pack("<Q", 8), {"value": 8}),
        (vu.VHOST_USER_SET_VRING_NUM, b"odd", {"payload": "6f6464"}),
        (99, b"\x01", {"payload": "01"}),
    ],
)
def test_vhost_user_messages_are_decoded(
    request_: int, payload: bytes, said: dict[Any, Any]
) -> None:
    assert vhost_user_args(request_, payload) == said


def test_words() -> None:
    assert bits_of(0, {1: "A"}) == "0"
    assert bits_of(7, {1: "A", 4: "C"}) == "A C 0x2"
    assert control_name(bytes([4, 0, 2, 0])) == "MQ VQ_PAIRS_SET"
    assert control_name(bytes([0, 1])) == "RX ALLMULTI"
    assert control_name(bytes([8, 1])) == "STATS GET"
    assert control_name(bytes([200, 1])) == "class 200 command 1"
    assert control_name(bytes([1, 77])) == "MAC command 77"
    assert control_name(b"") == "cut off"
