"""The 16550A: accesses to its ports as Linux' 8250 driver makes them to find and use it
(drivers/tty/serial/8250/8250_port.c).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm._ext import lib
from pyvmm.bus import PIO
from pyvmm.devices.console import Console
from tests.driver import PATIENCE, wait_for
from tests.pci_guest import Board

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

BASE = 0x3F8
RX = TX = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

IER_RDI, IER_THRI, IER_RLSI = 1, 2, 4
IIR_NO_INT, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_FIFO = 1, 2, 4, 6, 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1, 2, 4
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 1, 2, 0x20, 0x40
MCR_LOOP = 0x10
EMPTY = LSR_THRE | LSR_TEMT


class Port:
    def __init__(self, board: Any, console: Any) -> None:
        self.board, self.console = board, console

    def get(self, reg: Any) -> Any:
        return self.board.read(PIO, BASE + reg, 1)

    def set(self, reg: Any, value: Any) -> None:
        self.board.write(PIO, BASE + reg, 1, value)

    def iir(self) -> Any:
        return self.get(IIR) & 0x0F

    def type(self, data: Any) -> None:
        assert self.console.feed(data) == len(data)


@pytest.fixture
def port() -> Iterator[Any]:
    with Board() as board:
        console = Console("console", cast("Vm", board.vm), 4)
        console.plug(board.bus, BASE, "serial0")
        yield Port(board, console)
        assert board.exits == 0  # all of it in C
        console.close()


def test_linux_finds_a_16550a(port: Any) -> None:
    """The test makes the accesses of autoconfig() and autoconfig_16550a()."""
    port.set(IER, 0)
    assert port.get(IER) & 0x0F == 0
    port.set(IER, 0x0F)
    assert port.get(IER) & 0x0F == 0x0F
    port.set(IER, 0)
    port.set(MCR, MCR_LOOP | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.set(MCR, 0x08)
    port.set(LCR, 0xBF)  # no EFR
    port.set(FCR, 0)
    port.set(LCR, 0)
    port.set(FCR, FCR_ENABLE)
    assert port.get(IIR) >> 6 == 3
    port.set(FCR, FCR_ENABLE)
    port.set(LCR, 0x80)
    assert port.get(IIR) != 0  # not an ST16650
    port.set(LCR, 0)
    port.set(FCR, 0)
    assert port.get(IIR) >> 6 == 0
    # Scratch register, modem lines of a connected terminal.
    port.set(SCR, 0x5A)
    assert port.get(SCR) == 0x5A
    assert port.get(MSR) == 0xB0


def test_the_divisor_is_behind_dlab(port: Any) -> None:
    port.set(LCR, 0x83)
    port.set(DLL, 0x01)
    port.set(DLM, 0x02)
    assert (port.get(DLL), port.get(DLM)) == (1, 2)
    port.set(LCR, 0x03)
    assert port.get(IER) == 0 and port.get(LCR) == 3
    assert lib.pv_pipe_total(port.console.pipe) == 0  # nothing went to the line


def test_startup_test_finds_no_thre_bug(port: Any) -> None:
    """serial8250_do_startup() expects that enabling THRI with an empty transmitter interrupts, each
    time.
    """
    assert port.get(LSR) & EMPTY == EMPTY
    port.set(IER, IER_THRI)
    first = port.iir()
    port.set(IER, 0)
    port.set(IER, IER_THRI)
    second = port.iir()
    port.set(IER, 0)
    assert (first, second) == (IIR_THRI, IIR_THRI)
    assert port.iir() == IIR_NO_INT


def test_reading_iir_clears_thre_and_writing_brings_it_back(port: Any) -> None:
    port.set(IER, IER_THRI)
    assert port.iir() == IIR_THRI
    assert port.iir() == IIR_NO_INT
    port.set(TX, ord("a"))
    assert port.iir() == IIR_THRI
    assert port.iir() == IIR_NO_INT
    port.set(IER, IER_THRI)  # no new edge while it stays enabled
    assert port.iir() == IIR_NO_INT


def test_reading_iir_does_not_clear_thre_behind_a_higher_interrupt(port: Any) -> None:
    port.set(IER, IER_THRI | IER_RDI)
    port.type(b"x")
    assert port.iir() == IIR_RDI
    assert port.iir() == IIR_RDI  # cleared by reading the data only
    assert port.get(RX) == ord("x")
    assert port.iir() == IIR_THRI


def test_received_bytes_come_in_order_and_interrupt_until_read(port: Any) -> None:
    port.set(IER, IER_RDI)
    port.type(b"hello")
    out = b""
    while port.iir() == IIR_RDI:
        assert port.get(LSR) & LSR_DR
        out += bytes([port.get(RX)])
    assert out == b"hello"
    assert not port.get(LSR) & LSR_DR
    assert port.get(RX) == 0  # nothing there


def test_input_waits_in_a_queue_and_then_at_the_user(port: Any) -> None:
    data = bytes(i & 0xFF for i in range(3000))
    fed = port.console.feed(data)
    assert fed == 1024
    assert port.console.feed(data[fed:]) == 0
    got = bytes(port.get(RX) for _ in range(1000))
    assert port.console.feed(data[fed:]) == 1000
    got += bytes(port.get(RX) for _ in range(1024))
    assert got == data[:2024]
    assert not port.get(LSR) & LSR_OE  # never an overrun: the line waits


def test_send_goes_on_as_long_as_the_guest_reads(port: Any) -> None:
    data = bytes(i & 0xFF for i in range(20000))
    t = threading.Thread(target=port.console.send, args=(data, 120))
    t.start()
    got = bytearray()
    while len(got) < len(data):
        if port.get(LSR) & LSR_DR:
            got.append(port.get(RX))
    t.join()
    assert got == data


def test_send_gives_up_on_a_guest_that_does_not_read(port: Any) -> None:
    with pytest.raises(TimeoutError):
        port.console.send(b"x" * 2000, timeout=0.05)


def test_loop_back(port: Any) -> None:
    port.set(IER, IER_RDI | IER_RLSI)
    port.set(FCR, FCR_ENABLE)
    port.set(MCR, MCR_LOOP)
    for b in b"looped":
        port.set(TX, b)
    assert lib.pv_pipe_total(port.console.pipe) == 0
    assert port.console.feed(b"from outside") == 0  # the receiver is cut off
    assert bytes(port.get(RX) for _ in range(6)) == b"looped"
    for bits, lines in ((1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80), (15, 0xF0)):
        port.set(MCR, MCR_LOOP | bits)
        assert port.get(MSR) == lines
    for i in range(20):  # the FIFO has 16
        port.set(TX, i)
    assert port.iir() == IIR_RLSI
    assert port.get(LSR) & LSR_OE and not port.get(LSR) & LSR_OE
    assert port.iir() == IIR_RDI
    assert bytes(port.get(RX) for _ in range(16)) == bytes(range(16))
    assert not port.get(LSR) & LSR_DR


def test_the_fifo_is_cleared_on_demand_and_when_switched(port: Any) -> None:
    port.set(FCR, FCR_ENABLE)
    port.type(b"abc")
    port.set(FCR, FCR_ENABLE | FCR_CLEAR_TX)
    assert port.get(LSR) & LSR_DR
    port.set(FCR, FCR_ENABLE | FCR_CLEAR_RX)
    assert not port.get(LSR) & LSR_DR
    port.type(b"abc")
    port.set(FCR, 0)
    assert not port.get(LSR) & LSR_DR


def test_reset_gives_the_registers_of_power_on(port: Any) -> None:
    before = [port.get(r) for r in (IER, LCR, MCR, LSR, SCR)]
    port.set(IER, 0x0F)
    port.set(FCR, FCR_ENABLE)
    port.set(MCR, MCR_LOOP)
    port.set(TX, 1)
    port.set(SCR, 9)
    port.set(LCR, 0x1B)
    port.console.reset()
    assert [port.get(r) for r in (IER, LCR, MCR, LSR, SCR)] == before
    assert port.get(IIR) == IIR_NO_INT


def test_wide_accesses_are_byte_accesses(port: Any) -> None:
    port.board.write(PIO, BASE + MCR, 2, 0xFF02)  # MCR, and LSR which is read only
    assert port.get(MCR) == 2
    assert port.board.read(PIO, BASE + LCR, 4) == port.get(LCR) | 2 << 8 | EMPTY << 16 | 0xB0 << 24
    assert port.board.read(PIO, BASE + SCR, 2) == 0xFFFF  # beyond the last register: nobody's


def flood_polling(port: Any, data: Any) -> None:
    """Send data as the kernel's console does: wait_for_xmitr(), then a write."""
    for b in data:
        while not port.get(LSR) & LSR_THRE:
            time.sleep(0)
        port.set(TX, b)


def flood_interrupts(port: Any, data: Any) -> None:
    """Send data as serial8250_tx_chars() does: up to 16 bytes per interrupt, and none without an
    interrupt.
    """
    left = memoryview(data)
    port.set(IER, IER_THRI)
    assert wait_for(lambda: port.get(IIR) & 0x0F == IIR_THRI)
    while left:
        for b in left[:16]:
            port.set(TX, b)
        left = left[16:]
        assert wait_for(lambda: port.get(IIR) & 0x0F == IIR_THRI)
    port.set(IER, 0)


@pytest.mark.parametrize("flood", [flood_polling, flood_interrupts])
def test_a_flood_with_a_slow_reader_loses_nothing(port: Any, flood: Any) -> None:
    data = bytes((i * 31) & 0xFF for i in range(150_000))
    got = []

    def slow(piece: Any) -> None:
        time.sleep(0.002)
        got.append(piece)

    port.console.add_sink(slow)
    port.console.start()
    flood(port, data)
    port.console.finish(20)
    assert b"".join(got) == data
    assert port.console.dropped == 0


def test_a_full_pipe_reads_as_a_busy_transmitter_and_interrupts_when_there_is_room(
    port: Any,
) -> None:
    port.board.access(PIO, BASE + TX, 1, b"x" * 65536, count=65536)  # nobody reads
    assert not port.get(LSR) & LSR_THRE
    port.set(IER, IER_THRI)
    assert port.iir() == IIR_NO_INT
    port.console.start()
    assert wait_for(lambda: port.get(IIR) & 0x0F == IIR_THRI)
    assert port.get(LSR) & EMPTY == EMPTY


def test_a_transmitter_that_is_ready_takes_a_whole_fifo(port: Any) -> None:
    """A driver that has seen THRE writes 16 bytes without looking at LSR again."""
    port.board.access(PIO, BASE + TX, 1, b"x" * (65536 - 16), count=65536 - 16)
    assert port.get(LSR) & EMPTY == EMPTY
    port.set(TX, ord("y"))
    assert not port.get(LSR) & LSR_THRE
    port.board.access(PIO, BASE + TX, 1, b"y" * 15, count=15)
    assert port.console.dropped == 0


def test_who_does_not_look_at_lsr_waits_for_the_reader(port: Any) -> None:
    """A guest that writes without looking at LSR waits for the reader, also in a string
    instruction. Nothing is lost.
    """
    timer = threading.Timer(0.5, port.console.start)
    timer.start()
    port.board.access(PIO, BASE + TX, 1, b"x" * 70000, count=70000)
    timer.join()
    port.console.finish(60)
    assert port.console.text == b"x" * 70000 and port.console.dropped == 0


def test_the_end_of_the_machine_frees_who_waits(port: Any) -> None:
    timer = threading.Timer(0.2, port.console.release)
    timer.start()
    port.board.access(PIO, BASE + TX, 1, b"x" * 70000, count=70000)
    timer.join()
    assert port.console.dropped == 70000 - 65536


def test_a_handler_that_gives_up_hears_of_the_port_again(port: Any) -> None:
    """The interrupt controller sees edges only: a line that stays high when the handler gives up
    would never interrupt again.
    """
    port.console.start()
    port.set(FCR, FCR_ENABLE)
    port.set(IER, IER_THRI)
    before = lib.pv_serial_edges(port.console.serial)
    port.type(b"a")
    port.set(IER, IER_THRI | IER_RDI)  # nobody reads it: pending for good
    start = lib.pv_serial_edges(port.console.serial)
    assert start <= before + 1
    for _ in range(512):
        assert port.iir() != IIR_NO_INT
    assert 2 <= lib.pv_serial_edges(port.console.serial) - start <= 8
    port.get(RX)
    while port.iir() != IIR_NO_INT:
        pass
    quiet = lib.pv_serial_edges(port.console.serial)
    for _ in range(512):
        assert port.iir() == IIR_NO_INT
    assert lib.pv_serial_edges(port.console.serial) == quiet


def test_any_accesses_leave_a_port_that_works(port: Any) -> None:
    rng = random.Random(11)
    port.console.start()
    for _ in range(5000):
        size = rng.choice([1, 1, 1, 2, 4])
        at = BASE + rng.randrange(9 - size)
        if rng.randrange(2):
            port.board.write(PIO, at, size, rng.getrandbits(8 * size))
        else:
            port.board.read(PIO, at, size)
        if not rng.randrange(50):
            port.console.feed(bytes(rng.randrange(100)))
    port.console.reset()
    test_linux_finds_a_16550a(port)
    port.set(FCR, FCR_ENABLE | FCR_CLEAR_RX)
    port.type(b"in")
    assert bytes((port.get(RX), port.get(RX))) == b"in"
    for b in b"<out>":
        port.set(TX, b)
    port.console.expect("<out>", PATIENCE)
    assert port.console.dropped == 0
