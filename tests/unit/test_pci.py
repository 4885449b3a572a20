"""PCI: configuration space through both windows, BARs that the guest sizes, moves and puts on top
of each other, and hostile accesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.bus import MMIO, PIO
from pyvmm.errors import UsageError
from pyvmm.pci import BAR_IO_MIN, Bar, PciFunction, gsi_of, line_of
from pyvmm.spec import pci
from pyvmm.spec.platform import PCI_ECAM_BASE, PCI_MMIO_BASE, PCI_MMIO_SIZE
from tests.pci_guest import Board

SIZE = 0x4000
MEMORY, IO = pci.PCI_COMMAND_MEMORY, pci.PCI_COMMAND_IO


class Echo:
    def __init__(self, mark: Any) -> None:
        self.mark = mark

    def read(self, offset: Any, size: Any) -> Any:
        return self.mark << 8 | offset & 0xFF

    def write(self, offset: Any, size: Any, value: Any) -> None:
        pass


class Card(PciFunction):
    """A card with two regions in a memory BAR, and an I/O BAR. It notes the moves of its BARs."""

    def __init__(self, board: Any, mark: Any) -> None:
        super().__init__(f"card{mark}", 0x1234, 0x5678 + mark, 0x028000, subsystem=mark, pin=1)
        self.moves: list[int | None] = []
        self.commands: list[int] = []
        self.written: list[tuple[int, int]] = []
        bar = Bar(SIZE)
        bar.parts = [
            (0x0000, board.bus.region(MMIO, 0x100, f"a{mark}", Echo(mark))),
            (0x2000, board.bus.region(MMIO, 0x100, f"b{mark}", Echo(mark + 0x80))),
        ]
        bar.on_move = self.moves.append
        self.add_bar(0, bar)
        ports = Bar(0x20, io=True)
        ports.parts = [(0, board.bus.region(PIO, 0x20, f"io{mark}", Echo(mark)))]
        self.add_bar(1, ports)
        self.cap = self.add_capability(pci.PCI_CAP_ID_VNDR, bytes([7, 1, 2, 3, 4]))
        self.cap2 = self.add_capability(pci.PCI_CAP_ID_VNDR, bytes([4, 9]))
        self.allow(self.cap + 4, 0xFFFF, 2)

    def command_written(self, command: Any) -> None:
        self.commands.append(command)

    def config_written(self, at: Any, size: Any) -> None:
        self.written.append((at, size))

    def close(self) -> None:
        pass


@pytest.fixture
def board() -> Iterator[Any]:
    with Board() as b:
        yield b


@pytest.fixture
def cards(board: Any) -> Any:
    return [board.add(Card(board, n)) for n in (1, 2)]


def test_what_a_driver_finds(board: Any, cards: Any) -> None:
    assert [board.config_read(slot, 0) for slot in range(4)] == [
        0x00081B36,
        0x56791234,
        0x567A1234,
        0xFFFFFFFF,
    ]
    assert board.config_read(1, 0x08) == 0x02800001  # class, revision
    assert board.config_read(1, pci.PCI_HEADER_TYPE, 1) == 0
    assert board.config_read(1, pci.PCI_SUBSYSTEM_VENDOR_ID) == 0x00011234
    assert board.config_read(1, pci.PCI_INTERRUPT_PIN, 1) == 1
    assert board.config_read(1, pci.PCI_INTERRUPT_LINE, 1) == line_of(1) < 16
    assert board.capabilities(1) == [(9, 0x40), (9, 0x48)]
    assert board.config_read(1, 0x40) == 0x01074809
    assert board.config_read(0, pci.PCI_STATUS, 2) == 0  # the host bridge has none
    assert board.capabilities(0) == []


def test_the_memory_window_shows_the_same(board: Any, cards: Any) -> None:
    for at in range(0, 256, 4):
        assert board.read(MMIO, board.ecam(1, at), 4) == board.config_read(1, at)
    assert (
        board.read(MMIO, board.ecam(1, 0), 8)
        == board.config_read(1, 0) | board.config_read(1, 4) << 32
    )
    assert board.read(MMIO, board.ecam(1, 0x100), 4) == 0  # no extended capability
    assert board.read(MMIO, board.ecam(1, 0xFFC), 8) == 0
    assert board.read(MMIO, board.ecam(1, 0xFE), 4) == 0
    assert board.read(MMIO, board.ecam(5, 0), 4) == 0xFFFFFFFF
    assert board.read(MMIO, board.ecam(1, 0) | 1 << 12, 4) == 0xFFFFFFFF  # function 1
    board.write(MMIO, board.ecam(1, pci.PCI_INTERRUPT_LINE), 1, 0x55)
    assert board.config_read(1, pci.PCI_INTERRUPT_LINE, 1) == 0x55


def test_read_only_registers_stay(board: Any, cards: Any) -> None:
    before = bytes(cards[0].config)
    for at in range(0, 256, 4):
        if at not in (pci.PCI_COMMAND, 0x10, 0x14, pci.PCI_INTERRUPT_LINE, cards[0].cap + 4):
            board.config_write(1, at, 4, 0xFFFFFFFF)
            board.config_write(1, at, 4, 0)
    assert bytes(cards[0].config) == before


def test_bars_are_given_a_place_and_sized_like_any(board: Any, cards: Any) -> None:
    for slot in (1, 2):
        assert board.bar_size(slot, 0) == SIZE
        assert board.bar_size(slot, 2) == 0
    board.config_write(1, 0x14, 4, 0xFFFFFFFF)
    assert board.config_read(1, 0x14) == 0xFFE1  # I/O, 32 bytes
    bases = [board.config_read(slot, 0x10) for slot in (1, 2)]
    assert bases == [PCI_MMIO_BASE, PCI_MMIO_BASE + SIZE]


def test_decoding_follows_the_command_register(board: Any, cards: Any) -> None:
    base = board.config_read(1, 0x10)
    assert board.read(MMIO, base, 2) == 0xFFFF
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    assert board.read(MMIO, base, 2) == 0x100
    assert board.read(MMIO, base + 0x2004, 2) == 0x8104
    assert board.read(MMIO, base + 0x1000, 2) == 0xFFFF  # in the BAR, between the regions
    port = board.config_read(1, 0x14) & ~3
    assert board.read(PIO, port + 2, 2) == 0xFFFF
    board.config_write(1, pci.PCI_COMMAND, 2, IO)
    assert board.read(PIO, port + 2, 2) == 0x102 and board.read(MMIO, base, 2) == 0xFFFF
    board.config_write(1, pci.PCI_COMMAND, 2, 0)
    assert board.read(PIO, port, 2) == 0xFFFF
    assert cards[0].moves == [base, None]
    assert cards[0].commands == [MEMORY, IO, 0]


def test_a_bar_moves_under_the_guest(board: Any, cards: Any) -> None:
    old, new = board.config_read(1, 0x10), PCI_MMIO_BASE + 0x100000
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    board.config_write(1, 0x10, 4, new)
    assert board.read(MMIO, old, 2) == 0xFFFF and board.read(MMIO, new, 2) == 0x100
    # Sizing a BAR with decoding on: it decodes nothing meanwhile, then at its old address again.
    assert board.bar_size(1, 0) == SIZE
    assert board.read(MMIO, new, 2) == 0x100
    assert cards[0].moves == [old, new, None, new]
    # A guest may write a BAR byte by byte, although no driver does.
    for i, b in enumerate((PCI_MMIO_BASE + 0x200000).to_bytes(4, "little")):
        board.config_write(1, 0x10 + i, 1, b)
    assert board.read(MMIO, PCI_MMIO_BASE + 0x200000, 2) == 0x100


@pytest.mark.parametrize(
    "base",
    [
        0,
        0x100000,
        PCI_MMIO_BASE - SIZE,
        PCI_MMIO_BASE + PCI_MMIO_SIZE,
        PCI_ECAM_BASE,
        0xFEC00000,
        0xFEE00000,
        0xFFFFC000,
    ],
)
def test_a_bar_outside_the_window_decodes_nothing(board: Any, cards: Any, base: Any) -> None:
    """A BAR must not hide RAM, ECAM or the interrupt controllers."""
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    board.config_write(1, 0x10, 4, base)
    assert board.config_read(1, 0x10) == base
    assert cards[0].bars[0].base is None and cards[0].moves[-1] is None
    board.config_write(1, 0x10, 4, PCI_MMIO_BASE + PCI_MMIO_SIZE - SIZE)  # the last place
    assert board.read(MMIO, PCI_MMIO_BASE + PCI_MMIO_SIZE - SIZE, 2) == 0x100


@pytest.mark.parametrize("base", [0, 0x3E0, 0xCE0, BAR_IO_MIN - 0x20])
def test_an_io_bar_stays_off_the_board_s_ports(board: Any, cards: Any, base: Any) -> None:
    board.config_write(1, pci.PCI_COMMAND, 2, IO)
    board.config_write(1, 0x14, 4, base)
    assert cards[0].bars[1].base is None
    board.config_write(1, 0x14, 4, 0xFFE0)
    assert board.read(PIO, 0xFFE0, 2) == 0x100


def test_a_bar_on_top_of_another_device_waits_until_that_has_gone(board: Any, cards: Any) -> None:
    a, b = (board.config_read(slot, 0x10) for slot in (1, 2))
    for slot in (1, 2):
        board.config_write(slot, pci.PCI_COMMAND, 2, MEMORY)
    board.config_write(2, 0x10, 4, a)
    assert board.read(MMIO, a, 2) == 0x100  # who was there first
    assert board.read(MMIO, a + 0x2000, 2) == 0x8100
    assert board.read(MMIO, b, 2) == 0xFFFF
    board.config_write(1, 0x10, 4, b)
    assert board.read(MMIO, a, 2) == 0x200 and board.read(MMIO, b, 2) == 0x100
    board.config_write(1, 0x10, 4, a)
    assert cards[0].bars[0].base is None
    board.config_write(2, pci.PCI_COMMAND, 2, 0)
    assert board.read(MMIO, a, 2) == 0x100


def test_a_bar_whose_second_half_is_taken_answers_nowhere(board: Any, cards: Any) -> None:
    base = PCI_MMIO_BASE + 0x100000
    board.bus.add(MMIO, base + 0x2010, 4, "rock", Echo(0x55))
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    board.config_write(1, 0x10, 4, base)
    assert board.read(MMIO, base, 2) == 0xFFFF
    assert board.read(MMIO, base + 0x2010, 2) == 0x5500
    board.config_write(1, 0x10, 4, base + SIZE)
    assert board.read(MMIO, base + SIZE, 2) == 0x100


def test_a_write_across_registers_has_the_effects_of_all(board: Any, cards: Any) -> None:
    """Only accesses through ECAM can cross registers: 8 bytes wide, or unaligned."""
    base = PCI_MMIO_BASE + 0x300000
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    board.write(MMIO, board.ecam(1, 0x0C), 8, base << 32)
    assert board.read(MMIO, base, 2) == 0x100
    board.write(MMIO, board.ecam(1, 0x0E), 8, (base + 0x10000) << 16)
    assert board.read(MMIO, base + 0x10000, 2) == 0x100
    board.write(MMIO, board.ecam(1, 0x02), 4, IO << 16)
    assert board.read(MMIO, base + 0x10000, 2) == 0xFFFF
    assert cards[0].commands[-1] == IO
    cards[0].written.clear()
    board.write(MMIO, board.ecam(1, 0x3E), 8, 0)
    assert cards[0].written == [(0x3E, 2), (0x40, 4), (0x44, 2)]
    board.write(MMIO, board.ecam(1, 0xFE), 8, 0)  # over the end
    assert cards[0].written[3:] == [(0xFE, 2)]


def test_reset_goes_back_to_power_on(board: Any, cards: Any) -> None:
    before = bytes(cards[0].config)
    base = board.config_read(1, 0x10)
    board.config_write(1, 0x10, 4, PCI_MMIO_BASE + 0x400000)
    board.config_write(1, pci.PCI_COMMAND, 2, 0xFFFF)
    board.config_write(1, pci.PCI_INTERRUPT_LINE, 1, 99)
    board.pci.reset()
    assert bytes(cards[0].config) == before
    assert board.read(MMIO, PCI_MMIO_BASE + 0x400000, 2) == 0xFFFF
    assert board.read(PIO, 0xCF8, 4) == 0 and cards[0].commands[-1] == 0
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    assert board.read(MMIO, base, 2) == 0x100


def test_31_functions(board: Any) -> None:
    cards = [board.add(Card(board, n)) for n in range(31)]
    assert [card.slot for card in cards] == list(range(1, 32))
    assert len({card.bars[0].start for card in cards}) == 31
    assert {gsi_of(card.slot) for card in cards} == set(range(16, 24))
    with pytest.raises(UsageError, match="at most 31"):
        board.pci.add(PciFunction("one more", 1, 2, 3))


def test_a_function_is_unplugged_and_another_takes_its_place(board: Any, cards: Any) -> None:
    """Nothing answers any more. A BAR that the guest has moved is not in the way."""
    first, second = cards[0], cards[1]
    base = board.config_read(1, 0x10)
    board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
    board.config_write(2, 0x10, 4, PCI_MMIO_BASE + 0x400000)
    board.config_write(2, pci.PCI_COMMAND, 2, MEMORY)
    assert board.read(MMIO, base, 2) == 0x100
    registers = bytes(first.config)
    board.pci.remove(1)
    assert board.config_read(1, 0) == 0xFFFFFFFF and board.read(MMIO, base, 2) == 0xFFFF
    assert board.read(MMIO, board.ecam(1, 0), 4) == 0xFFFFFFFF
    assert bytes(first.config) == registers and first.bars[0].base is None
    board.write(PIO, 0xCF8, 4, 1 << 31 | 1 << 11)
    board.write(PIO, 0xCFC, 4, 0)
    other = Card(board, 9)
    board.pci.add(other, 1)
    places = {second.bars[0].start, PCI_MMIO_BASE + 0x400000}
    assert board.config_read(1, 0) != 0xFFFFFFFF
    assert other.bars[0].start not in places and bytes(first.config) == registers
    board.pci.remove(1)
    board.pci.add(first)
    assert first.slot == 1


# --- hostile --------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 4, 8])
VALUE = st.one_of(
    st.sampled_from(
        [0, 1, 6, 0xFFFFFFFF, PCI_MMIO_BASE, PCI_MMIO_BASE + SIZE, PCI_MMIO_BASE << 16]
    ),
    st.integers(0, (1 << 64) - 1),
)
STEP = st.one_of(
    st.tuples(st.just("port"), st.integers(0, 7), st.sampled_from([1, 2, 4]), VALUE, st.booleans()),
    st.tuples(st.just("select"), st.integers(0, 3), st.integers(0, 255), VALUE, st.booleans()),
    st.tuples(st.just("ecam"), st.integers(0, 0x18010), SIZES, VALUE, st.booleans()),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEP, max_size=60))
def test_no_access_raises_or_breaks_the_invariants(steps: Any) -> None:
    with Board() as board:
        cards = [board.add(Card(board, n)) for n in (1, 2)]
        for kind, at, size, value, write in steps:
            if kind == "select":
                board.write(PIO, 0xCF8, 4, 1 << 31 | at << 11 | size & 0xFC)
                continue
            space, addr = (PIO, 0xCF8 + at) if kind == "port" else (MMIO, PCI_ECAM_BASE + at)
            if write:
                board.write(space, addr, size, value)
            else:
                board.read(space, addr, size)
        for card in cards:
            assert card.get(0, 4) == 0x56781234 + (int(card.name[-1]) << 16)
            for index, bar in card.bars.items():
                enabled = card.get(pci.PCI_COMMAND, 2) & (IO if bar.io else MEMORY)
                register = card.get(0x10 + 4 * index, 4) & ~(bar.size - 1)
                assert bar.base is None or (enabled and bar.base == register)
                for offset, region in bar.parts:
                    assert region.base == (None if bar.base is None else bar.base + offset)
        # Afterwards everything still works.
        for slot in (1, 2):
            board.config_write(slot, pci.PCI_COMMAND, 2, 0)
        board.config_write(1, 0x10, 4, PCI_MMIO_BASE + 0x800000)
        board.config_write(1, pci.PCI_COMMAND, 2, MEMORY)
        assert board.read(MMIO, PCI_MMIO_BASE + 0x800000, 2) == 0x100
