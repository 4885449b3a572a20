"""The guest port without a machine: what init tells, its output, and a guest that names wild
pages.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from pyvmm.bus import PIO
from pyvmm.devices.console import FdSink, Stream
from pyvmm.devices.guest_port import MAGIC, PHASES, GuestPage, GuestPort
from pyvmm.spec.platform import (
    GONE_STDERR,
    GONE_STDOUT,
    GUEST_AGENT,
    GUEST_ANSWERS,
    GUEST_CHANNEL,
    GUEST_COMMAND,
    GUEST_INIT,
    GUEST_PAGE,
    GUEST_STATUS,
    GUEST_WRITE,
    PORT_GUEST_CONTROL,
)
from tests.pci_guest import Board

PATIENCE = 30.0
STDERR = 1 << 16


class Channel:
    """Notes what the port passes on."""

    def __init__(self) -> None:
        self.without = 0
        self.lists: list[int] = []

    def started_without(self) -> None:
        self.without += 1

    def name(self, number: int) -> None:
        self.lists.append(number)


class Rig:
    """A guest at the port."""

    def __init__(self, board: Board, channel: Channel | None) -> None:
        self.board = board
        self.page = GuestPage(board.memory)
        self.streams = Stream("stdout"), Stream("stderr")
        for stream in self.streams:
            stream.start()
        self.reached: list[str] = []
        self.ended: list[int] = []
        self.no_shares: list[tuple[int, int]] = []
        self.port = GuestPort(
            board.bus,
            self.page,
            *self.streams,
            reached=self.reached.append,
            ended=self.ended.append,
            no_share=lambda number, error: self.no_shares.append((number, error)),
            channel=channel,  # type: ignore[arg-type]
        )

    def tell(self, opcode: int, value: int = 0) -> None:
        self.board.write(PIO, PORT_GUEST_CONTROL, 4, opcode << 24 | value)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
def rig(channel: Channel) -> Iterator[Rig]:
    with Board() as board:
        made = Rig(board, channel)
        yield made
        made.close()


def test_init_tells_how_far_it_is(rig: Rig, channel: Channel) -> None:
    assert rig.board.read(PIO, PORT_GUEST_CONTROL, 4) == MAGIC
    for opcode in PHASES:
        rig.tell(opcode, 0x107)
    rig.tell(GUEST_INIT)  # a reboot: init runs again
    rig.tell(77, 5)
    rig.board.write(PIO, PORT_GUEST_CONTROL, 2, GUEST_COMMAND << 8)  # not the register's width
    assert rig.reached == [*PHASES.values(), "init"]
    assert rig.ended == [7], "an exit status has 8 bits"
    assert channel.without == 2, "at the command, or instead of it"
    rig.tell(GUEST_CHANNEL, 0x123456)
    assert channel.lists == [0x123456]


def test_output_of_a_page_goes_to_its_stream_once_the_lock_is_released(rig: Rig) -> None:
    rig.tell(GUEST_PAGE, 5)
    for error, stream in enumerate(rig.streams):
        rig.board.memory.write(0x5000, b"hello, world\n")
        rig.tell(GUEST_WRITE, 13 | STDERR * error)
        other = threading.Thread(target=rig.port.flush)  # another vCPU's thread has written nothing
        other.start()
        other.join()
        assert not stream.text
        rig.port.flush()
        stream.expect("hello, world\n", PATIENCE)
        rig.port.flush()
        assert stream.text.count(b"hello") == 1


def test_init_is_told_whose_reader_has_gone(rig: Rig) -> None:
    def word() -> int:
        return int.from_bytes(rig.board.memory.read(0x5000, 4), "little")

    def write(bit: int) -> int:
        rig.board.memory.write(0x5000, b"hello\n")
        rig.tell(GUEST_WRITE, 6 | bit)
        rig.port.flush()
        return word()

    assert not rig.port.answers
    rig.tell(GUEST_PAGE, 5)
    assert rig.port.answers and word() == GUEST_ANSWERS
    assert write(0) == 0
    gone = threading.Event()
    for stream, mask in zip(rig.streams, (GONE_STDOUT, GONE_STDOUT | GONE_STDERR), strict=True):
        read, end = os.pipe()
        os.close(read)
        stream.add_sink(FdSink(end, gone=gone.set))
        write(STDERR if mask & GONE_STDERR else 0)
        assert gone.wait(PATIENCE)
        gone.clear()
        until = time.monotonic() + PATIENCE
        while write(STDERR) != mask:  # the reader's thread notes it right after it has called us
            assert time.monotonic() < until
        os.close(end)


def test_a_page_outside_of_ram_gives_and_takes_nothing(rig: Rig) -> None:
    assert not rig.page.store(b"x"), "none has been named"
    frames = rig.board.memory.size >> 12
    for frame in (frames, 0xFFFFFF):
        rig.tell(GUEST_PAGE, frame)
        rig.tell(GUEST_WRITE, 0xFFFF)
        rig.port.flush()
        assert not rig.page.store(b"x")
    rig.tell(GUEST_PAGE, frames - 1)
    rig.tell(GUEST_WRITE, 0xFFFF)
    rig.port.flush()
    rig.streams[0].expect(rb"\APANS\0{4092}\Z", PATIENCE)
    assert rig.page.store(b"y" * 4096)
    rig.page.name(0)
    assert not rig.page.store(b"x"), "the guest has started over"


def test_without_a_channel() -> None:
    with Board() as board:
        rig = Rig(board, None)
        rig.tell(GUEST_PAGE, 1)
        for opcode in (GUEST_AGENT, GUEST_CHANNEL, GUEST_WRITE, GUEST_STATUS):
            rig.tell(opcode, 3)
        assert rig.reached == ["agent", "command_end"] and rig.ended == [3]
        rig.close()
