"""The byte pipe from guest to reader, the streams that use it, and slow or broken sinks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm._ext import ffi, lib
from pyvmm.devices.console import KEEP, Console, FdSink, Stream
from tests.driver import PATIENCE, wait_for
from tests.pci_guest import FakeVm

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm


class Pipe:
    def __init__(self, size: Any = 64) -> None:
        self.c = lib.pv_pipe_new(size)
        self.buf = ffi.new("uint8_t[]", 1 << 16)

    def write(self, data: Any, wait_ms: Any = 0) -> Any:
        return lib.pv_pipe_write(self.c, data, len(data), wait_ms)

    def read(self, n: Any = 1 << 16, timeout_ms: Any = 0) -> Any:
        got = lib.pv_pipe_read(self.c, self.buf, n, timeout_ms)
        return None if got < 0 else bytes(ffi.buffer(self.buf, got))

    def in_thread(self, data: Any, wait_ms: Any) -> Any:
        result = []
        t = threading.Thread(
            target=lambda: result.append((self.write(data, wait_ms), time.monotonic()))
        )
        t.start()
        return t, result


@pytest.fixture
def pipe() -> Iterator[Any]:
    p = Pipe()
    yield p
    lib.pv_pipe_free(p.c)


@pytest.mark.parametrize("size", [0, 3, 100])
def test_the_size_is_a_power_of_two(size: Any) -> None:
    assert lib.pv_pipe_new(size) == ffi.NULL


def test_bytes_come_out_in_order_and_the_indices_wrap(pipe: Any) -> None:
    sent = got = b""
    for i in range(50):
        data = bytes((i * 7 + k) & 0xFF for k in range(i % 60 + 1))
        assert pipe.write(data) == len(data)
        sent += data
        got += pipe.read()
    assert got == sent
    assert (lib.pv_pipe_total(pipe.c), lib.pv_pipe_dropped(pipe.c)) == (len(sent), 0)
    assert pipe.read() == b""


def test_a_full_pipe_drops_and_counts(pipe: Any) -> None:
    assert pipe.write(b"x" * 100) == 64
    assert pipe.write(b"y") == 0
    assert lib.pv_pipe_dropped(pipe.c) == 37
    assert pipe.read(10) == b"x" * 10
    assert pipe.write(b"y" * 20) == 10


def test_a_writer_waits_for_room(pipe: Any) -> None:
    """The writer writes more than fits. The reader may have slept since before; then the writer
    must wake it first.
    """
    t, result = pipe.in_thread(b"a" * 200, 5000)
    got = b""
    while len(got) < 200:
        got += pipe.read(timeout_ms=5000)
    t.join()
    assert got == b"a" * 200 and result[0][0] == 200 and lib.pv_pipe_dropped(pipe.c) == 0


def test_a_sleeping_reader_is_woken_by_a_writer_that_fills_the_pipe(pipe: Any) -> None:
    got = []

    def reader() -> None:
        while (data := pipe.read(timeout_ms=-1)) is not None:
            got.append(data)

    r = threading.Thread(target=reader)
    r.start()
    time.sleep(0.05)  # asleep
    start = time.monotonic()
    assert pipe.write(b"b" * 500, 120000) == 500
    assert time.monotonic() - start < PATIENCE
    lib.pv_pipe_close(pipe.c)
    r.join()
    assert b"".join(got) == b"b" * 500


def test_a_wait_may_be_bounded(pipe: Any) -> None:
    pipe.write(b"x" * 60)
    start = time.monotonic()
    assert pipe.write(b"0123456789", 100) == 4
    assert time.monotonic() - start > 0.09
    assert lib.pv_pipe_dropped(pipe.c) == 6


def test_a_writer_waits_as_long_as_it_takes(pipe: Any) -> None:
    """A reader that comes late and takes little at a time gets all bytes."""
    t, result = pipe.in_thread(bytes(range(200)), -1)
    assert wait_for(lambda: lib.pv_pipe_total(pipe.c) == 200)
    time.sleep(1.2)
    assert not result
    got = b""
    while len(got) < 200:
        got += pipe.read(7, timeout_ms=60000)
    t.join()
    assert got == bytes(range(200)) and result[0][0] == 200 and lib.pv_pipe_dropped(pipe.c) == 0


def test_hurry_frees_who_waits_and_stores_what_fits(pipe: Any) -> None:
    pipe.write(b"x" * 60)
    t, result = pipe.in_thread(b"0123456789", 60000)
    assert wait_for(lambda: lib.pv_pipe_total(pipe.c) == 70)
    time.sleep(0.02)
    lib.pv_pipe_hurry(pipe.c, True)
    t.join()
    assert result[0][0] == 4
    assert pipe.write(b"z", -1) == 0
    assert pipe.read() == b"x" * 60 + b"0123"
    assert pipe.write(b"z" * 65, -1) == 64
    lib.pv_pipe_hurry(pipe.c, False)
    t, result = pipe.in_thread(b"again", -1)
    assert wait_for(lambda: lib.pv_pipe_total(pipe.c) == 70 + 1 + 65 + 5)
    assert pipe.read() == b"z" * 64
    t.join()
    assert result[0][0] == 5


def test_a_closed_pipe_gives_what_it_has_then_ends(pipe: Any) -> None:
    pipe.write(b"last")
    lib.pv_pipe_close(pipe.c)
    assert pipe.write(b"late", 60000) == 0
    assert pipe.read() == b"last"
    assert pipe.read(timeout_ms=-1) is None


def test_a_closed_pipe_frees_who_waits(pipe: Any) -> None:
    pipe.write(b"x" * 64)
    t, result = pipe.in_thread(b"y", 60000)
    time.sleep(0.02)
    lib.pv_pipe_close(pipe.c)
    t.join(PATIENCE)
    assert result[0][0] == 0


def test_many_writers_one_reader() -> None:
    p = Pipe(256)
    writers = [p.in_thread(bytes([n]) * 5000, 120_000) for n in range(4)]
    got = b""
    while len(got) < 20000:
        got += p.read(timeout_ms=60_000)
    for t, result in writers:
        t.join()
        assert result[0][0] == 5000
    assert [got.count(n) for n in range(4)] == [5000] * 4
    lib.pv_pipe_free(p.c)


# --- streams --------------------------------------------------------------------------------------


@pytest.fixture
def stream() -> Iterator[Any]:
    s = Stream("test")
    s.start()
    yield s
    s.close()


def put(stream: Any, data: Any) -> None:
    assert lib.pv_pipe_write(stream.pipe, data, len(data), 60_000) == len(data)


def test_a_stream_reaches_all_sinks_and_expect(stream: Any) -> None:
    a: list[bytes] = []
    b: list[bytes] = []
    stream.add_sink(a.append)
    stream.add_sink(b.append)
    put(stream, b"hello ")
    put(stream, b"world\nlogin: ")
    assert stream.expect(r"^log(in): ").group(1) == b"in"
    assert b"".join(a) == b"".join(b) == b"hello world\nlogin: "
    with pytest.raises(TimeoutError, match="login"):
        stream.expect("never", timeout=0.05)


def test_expect_ends_with_the_stream(stream: Any) -> None:
    t = threading.Timer(0.05, lambda: stream.finish())
    t.start()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        stream.expect("never", timeout=2 * PATIENCE)
    assert time.monotonic() - start < PATIENCE
    t.join()


@pytest.mark.parametrize("error", [OSError(5, "gone"), ValueError("I/O operation on closed file")])
def test_a_sink_that_fails_is_dropped_and_the_others_go_on(stream: Any, error: Any) -> None:
    good: list[bytes] = []

    def bad(data: Any) -> None:
        raise error

    stream.add_sink(bad)
    stream.add_sink(good.append)
    put(stream, b"one")
    assert wait_for(lambda: good == [b"one"])
    put(stream, b"two")
    assert wait_for(lambda: b"".join(good) == b"onetwo")
    assert stream.lost_sinks == [error]


def test_the_text_kept_is_bounded(stream: Any) -> None:
    for _ in range(3):
        put(stream, b"x" * KEEP)
    put(stream, b"end")
    stream.expect("end")
    assert len(stream.text) <= KEEP * 5 // 4 + (1 << 14)
    assert stream.dropped_text + len(stream.text) == 3 * KEEP + 3


def test_close_with_a_reader_stuck_in_a_sink_neither_hangs_nor_crashes() -> None:
    s = Console("stuck", cast("Vm", FakeVm()), 4)
    free, inside = threading.Event(), threading.Event()

    def stuck(data: Any) -> None:
        inside.set()
        free.wait(2 * PATIENCE)

    s.add_sink(stuck)
    s.start()
    put(s, b"x")
    assert inside.wait(PATIENCE)
    start = time.monotonic()
    s.finish(0.05)
    s.close()
    s.close()
    s.finish()
    assert time.monotonic() - start < PATIENCE
    assert s.dropped == 0 and s.feed(b"x") in (0, 1)
    free.set()
    s._thread.join(PATIENCE)
    assert not s._thread.is_alive()


def test_a_stream_that_was_never_started_closes() -> None:
    s = Stream("idle")
    s.close()
    s.close()
    assert s.dropped == 0


def test_dropped_outlives_close(stream: Any) -> None:
    lib.pv_pipe_close(stream.pipe)
    lib.pv_pipe_write(stream.pipe, b"late", 4, 0)
    stream.close()
    assert stream.dropped == 4


# --- sinks ----------------------------------------------------------------------------------------


def os_pipe() -> Any:
    r, w = os.pipe()
    os.set_blocking(r, False)
    return r, w


def drain(fd: Any) -> Any:
    out = b""
    while True:
        try:
            part = os.read(fd, 1 << 16)
        except BlockingIOError:
            return out
        if not part:
            return out
        out += part


def test_a_slow_reader_loses_nothing() -> None:
    r, w = os_pipe()
    sink = FdSink(w, patience=PATIENCE)
    got: list[bytes] = []
    data = bytes(i & 0xFF for i in range(1 << 18))
    t = threading.Thread(target=sink, args=(data,))
    t.start()
    while sum(map(len, got)) < len(data):
        got.append(drain(r))
        time.sleep(0.001)
    t.join()
    assert b"".join(got) == data and sink.dropped == 0
    os.close(r)
    os.close(w)


def test_a_stuck_reader_costs_patience_once_then_bytes_are_dropped_and_counted() -> None:
    r, w = os_pipe()
    sink = FdSink(w, patience=1)
    start = time.monotonic()
    sink(b"x" * (1 << 20))
    assert 0.9 < time.monotonic() - start < PATIENCE
    first = sink.dropped
    assert 0 < first < 1 << 20
    start = time.monotonic()
    for _ in range(100):
        sink(b"y" * 100)
    assert time.monotonic() - start < 50
    assert sink.dropped == first + 10000
    assert len(drain(r)) == (1 << 20) - first
    sink(b"again")
    assert drain(r) == b"again" and sink.dropped == first + 10000
    os.close(r)
    os.close(w)


def test_a_stream_waits_for_a_slow_sink_during_and_after_the_run() -> None:
    """Nothing is lost although the sink takes nothing for longer than any of our own time-outs, and
    then takes little at a time.
    """
    r, w = os_pipe()
    s = Stream("slow")
    sink = FdSink(w)
    assert sink.patience >= 60
    s.add_sink(sink)
    s.start()
    data = bytes(i & 0xFF for i in range(5 << 16))
    t = threading.Thread(target=s.put, args=(data,))
    t.start()
    time.sleep(1.5)
    assert t.is_alive()
    got = bytearray()
    while len(got) < 2 << 16:
        got += drain(r)
        time.sleep(0.001)
    while t.is_alive():
        got += drain(r)
    s.finish(0.01)
    t = threading.Thread(target=s.drain)
    t.start()
    while len(got) < len(data):
        got += drain(r)
        time.sleep(0.001)
    t.join()
    assert got == data and sink.dropped == s.dropped == 0
    s.close()
    os.close(r)
    os.close(w)


def test_drain_may_be_bounded() -> None:
    r, w = os_pipe()
    s = Stream("bounded")
    sink = FdSink(w)
    s.add_sink(sink)
    s.start()
    s.put(b"x" * (1 << 17))
    s.finish(0.01)
    s.drain(0.05)
    s._thread.join()
    assert sink.dropped + len(drain(r)) == 1 << 17
    s.close()
    os.close(r)
    os.close(w)


def test_patience_can_be_taken_away() -> None:
    r, w = os_pipe()
    s = Stream("hurried")
    sink = FdSink(w, patience=4 * PATIENCE)
    s.add_sink(sink)
    s.start()
    for _ in range(2):
        put(s, b"x" * (1 << 16))
    time.sleep(0.1)  # stuck: the descriptor takes 64 KiB
    s.hurry()
    start = time.monotonic()
    s.finish(2 * PATIENCE)
    assert time.monotonic() - start < PATIENCE and not s._thread.is_alive()
    assert sink.dropped + len(drain(r)) == 2 << 16
    s.close()
    os.close(r)
    os.close(w)


def test_a_reader_that_is_gone_ends_the_sink() -> None:
    r, w = os_pipe()
    s = Stream("gone")
    sink = FdSink(w)
    s.add_sink(sink)
    s.start()
    os.close(r)
    put(s, b"lost")
    assert wait_for(lambda: s.lost_sinks)
    assert isinstance(s.lost_sinks[0], BrokenPipeError) and sink.dropped == 4
    put(s, b"more")
    s.expect("lostmore")
    s.close()
    os.close(w)


def test_a_full_disk_is_an_error_of_the_sink_only() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    sink = FdSink(fd)
    with pytest.raises(OSError, match="No space"):
        sink(b"data")
    assert sink.dropped == 4
    os.close(fd)


def test_a_file_has_a_largest_size() -> None:
    r, w = os_pipe()
    sink = FdSink(w, limit=10)
    for piece in (b"1234", b"5678", b"9abcd", b"e"):
        sink(piece)
    assert (sink.dropped, sink.beyond) == (4, 4)
    os.close(w)
    assert os.read(r, 100) == b"123456789a"
    os.close(r)


def test_a_non_blocking_descriptor_will_do() -> None:
    r, w = os_pipe()
    os.set_blocking(w, False)
    sink = FdSink(w, patience=0.05)
    sink(b"x" * (1 << 20))
    assert len(drain(r)) + sink.dropped == 1 << 20
    os.close(r)
    os.close(w)
