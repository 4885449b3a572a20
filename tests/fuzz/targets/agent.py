"""The guest port and the channel of commands in the guest: a guest that writes anything to its
registers and pages, while openers of sessions send and take. What waits stays bounded.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from pyvmm.bus import PIO
from pyvmm.devices.guest_channel import DESCRIPTION_MAX, Channel, Pages, Session
from pyvmm.devices.guest_frames import FRAME_MAX, BadFrame, Framer, frame, parse
from pyvmm.devices.guest_port import GuestPage, GuestPort
from pyvmm.errors import CommandFailed
from pyvmm.spec import platform as pf
from tests.fuzz.data import Data
from tests.pci_guest import Board

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.devices.console import Stream

KINDS = (
    pf.FRAME_OPEN,
    pf.FRAME_START,
    pf.FRAME_INPUT,
    pf.FRAME_OUTPUT,
    pf.FRAME_ERROR,
    pf.FRAME_CREDIT,
    pf.FRAME_SIGNAL,
    pf.FRAME_SIZE,
    pf.FRAME_EXIT,
    pf.FRAME_FAILED,
    pf.FRAME_CLOSE,
    99,
)
OPCODES = tuple(
    getattr(pf, name)
    for name in sorted(vars(pf))
    if name.startswith("GUEST_") and name != "GUEST_ANSWERS"
)
LIST = 0x10


class Sink:
    """A stream that takes everything."""

    reader_gone = False

    def put(self, data: bytes) -> None:
        assert len(data) <= 4096


def payload(d: Data, kind: int) -> bytes:
    if d.one_in(3):
        return d.some(60)
    if kind in (pf.FRAME_CREDIT, pf.FRAME_SIZE):
        return struct.pack("<II", d.of(KINDS), d.value(4))
    if kind in (pf.FRAME_SIGNAL, pf.FRAME_EXIT):
        return d.number(4).to_bytes(4, "little")
    return bytes(d.below(FRAME_MAX + 1)) if d.one_in(4) else d.some(20)


def check(session: Session) -> None:
    """What is kept is no more than there was credit for."""
    assert all(len(got) <= pf.CHANNEL_WINDOW for got in session._got.values())
    assert len(session._input) <= pf.CHANNEL_WINDOW
    assert len(session._description) <= DESCRIPTION_MAX


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input, on a new board each time."""

    def one(data: bytes) -> None:
        d = Data(data)
        with Board(memory=1 << 20) as board:
            pages = Pages(board.memory)
            channel = Channel(board.bus, lambda byte: None, pages)
            sink = cast("Stream", Sink())
            port = GuestPort(
                board.bus,
                GuestPage(board.memory),
                sink,
                sink,
                reached=lambda name: None,
                ended=lambda status: None,
                no_share=lambda share, error: None,
                channel=channel,
            )
            opened: list[Session] = []
            try:
                while d.left:
                    step(d, board, channel, port, opened)
            finally:
                for session in opened:
                    session.close()
                channel.gone("the end")
        framer = Framer()
        try:
            got = framer.feed(data[: len(data) // 2]) + framer.feed(data[len(data) // 2 :])
        except BadFrame:
            return
        assert sum(12 + len(p) for _, p in got) <= len(data)

    return one


def name_pages(d: Data, board: Board) -> None:
    numbers = [LIST, *range(LIST + pf.CHANNEL_PAGES, LIST + 1, -1)]
    if d.one_in(4):
        numbers[d.below(len(numbers))] = d.value(4)
    count = pf.CHANNEL_PAGES if not d.one_in(4) else d.value(4)
    board.memory.write(LIST << 12, struct.pack(f"<{1 + len(numbers)}I", count, *numbers))
    control(board, pf.GUEST_CHANNEL, LIST if not d.one_in(4) else d.number(3))


def control(board: Board, opcode: int, value: int) -> None:
    board.write(PIO, pf.PORT_GUEST_CONTROL, 4, opcode << 24 | value & 0xFFFFFF)


def step(d: Data, board: Board, channel: Channel, port: GuestPort, opened: list[Session]) -> None:
    kind = d.below(8)
    if kind == 0:
        name_pages(d, board)
    elif kind == 1:
        control(board, d.of(OPCODES), d.number(3))
        port.flush()
    elif kind == 2:  # the guest hands frames over
        sent = b"".join(
            frame(k, payload(d, k), 1 + d.below(4)) for k in (d.of(KINDS), d.of(KINDS))
        )[: pf.CHANNEL_PAGES * 4096]
        addresses = channel._pages._addresses
        for at, address in zip(range(0, len(sent), 4096), addresses, strict=False):
            try:
                board.memory.write(address, sent[at : at + 4096])
            except IndexError:
                pass
        size = len(sent) if not d.one_in(4) else d.value(4)
        board.write(PIO, pf.PORT_GUEST_CHANNEL, 4, size)
        list(parse(sent))
    elif kind == 3:
        size = board.read(PIO, pf.PORT_GUEST_CHANNEL, d.of((4, 4, 4, 1, 2)))
        assert size <= pf.CHANNEL_PAGES * 4096 or size >= 0xCC
    elif kind == 4:
        if len(opened) < 4 or d.one_in(4):
            try:
                session = channel.open()
            except CommandFailed:
                return
            opened.append(session)
            session.send(pf.FRAME_OPEN, b"atrue\0")
            session.send(pf.FRAME_START)
    elif kind == 5 and opened:
        session, which = d.of(opened), d.of(KINDS)
        try:
            session.send(which, payload(d, which))
        except BadFrame:
            pass
    elif kind == 6 and opened:
        session = d.of(opened)
        session.take()
        check(session)
        if d.one_in(4):
            opened.remove(session)
            session.close()
    elif kind == 7:
        if d.one_in(4):
            channel.reset()
        elif d.one_in(4):
            channel.leave()
