"""The standard input of the guest's command, with a guest that fetches as init does, and one that
does not. Linux has it in tests/boot.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import pytest

from pyvmm.bus import PIO
from pyvmm.devices import guest_input
from pyvmm.devices.console import Console
from pyvmm.devices.guest_input import AHEAD, GuestInput
from pyvmm.spec.platform import BELL_INPUT, INPUT_ENDS, IRQ_COM2, PORT_COM2, PORT_GUEST_INPUT
from tests.pci_guest import Board

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

PATIENCE = 60.0
LSR, DATA_READY = PORT_COM2 + 5, 1


class Init:
    """The guest's side, and the writer's end of the host's pipe."""

    def __init__(self, board: Board, source: int) -> None:
        self.board, self.page, self.has_page = board, bytearray(), True
        self.bell = Console("bell", cast("Vm", board.vm), IRQ_COM2)
        self.bell.plug(board.bus, PORT_COM2, "serial1")
        self.bell.start()
        self.input = GuestInput(board.bus, self.bell.feed, self._store, source)

    def close(self) -> None:
        self.input.close()
        self.bell.close()

    def _store(self, data: bytes) -> bool:
        self.page[:] = data
        return self.has_page

    def fetch(self) -> int:
        return self.board.read(PIO, PORT_GUEST_INPUT, 4)

    def await_bell(self) -> None:
        until = time.monotonic() + PATIENCE
        while not self.board.read(PIO, LSR, 1) & DATA_READY:
            assert time.monotonic() < until
            time.sleep(0.001)
        assert self.board.read(PIO, PORT_COM2, 1) == BELL_INPUT

    def all(self) -> bytes:
        """What comes until the end of the input."""
        got = bytearray()
        while (n := self.fetch()) != INPUT_ENDS:
            if n:
                assert n == len(self.page) <= 4096
                got += self.page
            else:
                self.await_bell()
        return bytes(got)


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    """The two ends; a test that closes one replaces it by -1."""
    ends = list(os.pipe())
    yield ends
    for fd in ends:
        if fd >= 0:
            os.close(fd)


@pytest.fixture
def init(board: Board, pipe: list[int]) -> Iterator[Init]:
    made = Init(board, pipe[0])
    yield made
    made.close()


def close(pipe: list[int], end: int) -> None:
    os.close(pipe[end])
    pipe[end] = -1


def test_the_bell_rings_when_there_is_something(init: Init, pipe: list[int]) -> None:
    assert not init.input.asked
    assert init.fetch() == 0 and init.input.asked
    os.write(pipe[1], b"\x10\x04\x00")
    init.await_bell()
    assert init.fetch() == 3 and init.page == b"\x10\x04\x00"
    assert init.fetch() == 0
    close(pipe, 1)
    init.await_bell()
    assert init.fetch() == INPUT_ENDS == init.fetch()


def test_every_byte_arrives_and_little_is_read_ahead(board: Board) -> None:
    data = random.Random(1).randbytes(1_000_003)
    fd = os.memfd_create("input")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    init = Init(board, fd)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0  # nobody has asked
    assert init.fetch() == 0
    init.await_bell()
    assert init.fetch() == 4096
    got = bytes(init.page)
    assert os.lseek(fd, 0, os.SEEK_CUR) <= AHEAD + 4096
    assert got + init.all() == data
    init.close()
    os.close(fd)


def test_input_that_cannot_be_read_ends(board: Board, tmp_path: os.PathLike[str]) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)  # EISDIR
    init = Init(board, fd)
    assert init.all() == b""
    assert init.input.error is not None and "directory" in str(init.input.error.strerror)
    init.close()
    os.close(fd)


def test_guests_that_do_what_they_should_not(init: Init, pipe: list[int]) -> None:
    os.write(pipe[1], b"abc")
    board = init.board
    board.write(PIO, PORT_GUEST_INPUT, 4, 1)
    assert board.read(PIO, PORT_GUEST_INPUT, 1) == 0
    assert init.fetch() == 0
    init.await_bell()
    init.has_page = False
    assert init.fetch() == INPUT_ENDS  # into no page
    init.has_page = True
    assert init.fetch() == 3


def test_it_ends_while_it_waits(init: Init) -> None:
    assert init.fetch() == 0
    init.close()
    init.close()


def test_the_bell_rings_again(init: Init, pipe: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep of the machine empties the port; the guest learns of its input all the same."""
    monkeypatch.setattr(guest_input, "RING_MS", 10)
    assert init.fetch() == 0
    os.write(pipe[1], b"one")
    init.await_bell()
    init.bell.reset()
    init.await_bell()
    assert init.fetch() == 3 and init.fetch() == 0
    close(pipe, 1)  # the end counts, too
    init.await_bell()
    init.bell.reset()
    init.await_bell()
    assert init.fetch() == INPUT_ENDS
