"""Commands in a guest: with a guest that does what it should, one that does not, and clients of the
control socket of both kinds. Linux has it in tests/boot/test_exec.py.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.boot import BootState
from pyvmm.bus import PIO
from pyvmm.control import sessions
from pyvmm.control.attach import Attached
from pyvmm.control.commands import COMMANDS
from pyvmm.control.registry import Claim
from pyvmm.control.server import Command, QmpError, Server
from pyvmm.control.sessions import READY_MAX, carry
from pyvmm.devices import guest_agent, guest_channel
from pyvmm.devices.guest_agent import CommandResult, run
from pyvmm.devices.guest_channel import SESSIONS_MAX, Channel, Pages
from pyvmm.devices.guest_frames import (
    CHANNEL_SIZE,
    FRAME,
    FRAME_MAX,
    TWO,
    BadFrame,
    Framer,
    describe,
    frame,
    parse,
    send_description,
)
from pyvmm.errors import CommandFailed, GuestReboot, UsageError
from pyvmm.programs import module
from pyvmm.spec.platform import (
    BELL_CHANNEL,
    CHANNEL_PAGES,
    CHANNEL_WINDOW,
    FRAME_CLOSE,
    FRAME_CREDIT,
    FRAME_ERROR,
    FRAME_EXIT,
    FRAME_FAILED,
    FRAME_INPUT,
    FRAME_LEAVE,
    FRAME_OPEN,
    FRAME_OUTPUT,
    FRAME_SIGNAL,
    FRAME_SIZE,
    FRAME_START,
    GUEST_ANSWERS,
    PORT_GUEST_CHANNEL,
)
from tests.pci_guest import Board

PATIENCE = 60.0
LIST = 0x10  # page frame number of the list; the other pages are in reverse order behind it


class Init:
    """The guest's side, which does what our init does."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.rung = threading.Semaphore(0)
        self.channel = Channel(board.bus, self._ring, Pages(board.memory))
        self.frames = [LIST, *range(LIST + CHANNEL_PAGES, LIST + 1, -1)]
        self.got: list[tuple[int, int, bytes]] = []

    def _ring(self, byte: bytes) -> None:
        assert byte == bytes([BELL_CHANNEL])
        self.rung.release()

    def name(self, count: int = CHANNEL_PAGES, frames: list[int] | None = None) -> bool:
        """Name the pages; returns whether the VMM answers."""
        data = struct.pack(f"<{1 + CHANNEL_PAGES}I", count, *(frames or self.frames))
        self.board.memory.write(LIST << 12, data)
        self.channel.name(LIST)
        word = int.from_bytes(self.board.memory.read(LIST << 12, 4), "little")
        return word == GUEST_ANSWERS

    def pages(self, size: int) -> bytes:
        pieces = [self.board.memory.read(n << 12, 4096) for n in self.frames]
        return b"".join(pieces)[:size]

    def fetch(self) -> None:
        while n := self.board.read(PIO, PORT_GUEST_CHANNEL, 4):
            assert n <= CHANNEL_SIZE
            found = [(s, k, p) for k, s, p in parse(self.pages(n))]
            assert sum(FRAME.size + len(p) for _, _, p in found) == n, "whole frames"
            self.got += found

    def next(self) -> tuple[int, int, bytes]:
        """Session, type and payload of the next frame."""
        while not self.got:
            assert self.rung.acquire(timeout=PATIENCE)
            self.fetch()
        return self.got.pop(0)

    def started(self) -> tuple[int, bytes]:
        """Wait for the start of a command: its session and description."""
        description = b""
        while (found := self.next())[1] != FRAME_START:
            assert found[1] == FRAME_OPEN
            description += found[2]
        return found[0], description

    def give(self, data: bytes) -> None:
        for at, n in zip(range(0, len(data), 4096), self.frames, strict=False):
            self.board.memory.write(n << 12, data[at : at + 4096])
        self.board.write(PIO, PORT_GUEST_CHANNEL, 4, len(data))

    def send(self, session: int, kind: int, payload: bytes = b"") -> None:
        self.give(frame(kind, payload, session))

    def exit(self, session: int, status: int) -> None:
        self.send(session, FRAME_EXIT, struct.pack("<I", status))


@pytest.fixture
def init() -> Iterator[Init]:
    board = Board()
    try:
        yield Init(board)
    finally:
        board.close()


class Running:
    """``run`` in a thread."""

    def __init__(self, init: Init, *args: object, **more: object) -> None:
        self._result: CommandResult | Exception | None = None

        def work() -> None:
            try:
                self._result = run(init.channel, *args, **more)  # type: ignore[arg-type]
            except Exception as e:
                self._result = e

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def result(self) -> CommandResult:
        self._thread.join(PATIENCE)
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result


def test_a_command(init: Init) -> None:
    assert init.name()
    running = Running(init, "echo ä", user="bob", env={"A": "b=c"}, cwd="/tmp", timeout=PATIENCE)
    session, description = init.started()
    assert description == b"ash\0a-c\0aecho \xc3\xa4\0eA=b=c\0ubob\0d/tmp\0"
    init.send(session, FRAME_OUTPUT, b"out")
    init.send(session, FRAME_ERROR, b"oops")
    init.send(session, FRAME_OUTPUT)
    init.exit(session, 7)
    result = running.result()
    assert (result.status, result.out, result.err, result.lost) == (7, "out", "oops", 0)
    assert not result.ok
    assert result.check(7) is result
    with pytest.raises(
        CommandFailed, match=r"'echo ä' ended with status 7, not 0\nstderr: oops\nstdout: out"
    ):
        result.check()


def test_input_and_output_without_bounds(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that keeps to its credit, and gives some, gets and sends everything."""
    monkeypatch.setattr(guest_agent, "OUTPUT_MAX", 1_000_000)
    assert init.name()
    data = random.Random(1).randbytes(3 * CHANNEL_WINDOW + 1)
    running = Running(init, ["cat"], input=data, timeout=PATIENCE)
    session, description = init.started()
    assert description == b"acat\0i\0"
    back, credit, given = bytearray(), CHANNEL_WINDOW, bytearray()
    ended = False
    while not ended or len(given) < len(data):
        kind, payload = init.next()[1:]
        if kind == FRAME_INPUT:
            back += payload
            ended = not payload
            init.send(session, FRAME_CREDIT, TWO.pack(FRAME_INPUT, len(payload)))
        else:
            assert kind == FRAME_CREDIT
            stream, size = TWO.unpack(payload)
            assert stream == FRAME_OUTPUT
            credit += size
        while len(given) < len(back) and credit:
            piece = back[len(given) :][: min(credit, FRAME_MAX)]
            given += piece
            credit -= len(piece)
            init.send(session, FRAME_OUTPUT, bytes(piece))
    init.exit(session, 0)
    result = running.result()
    kept = 3 * CHANNEL_WINDOW + 1
    assert kept < 1_000_000 and result.stdout == data == back and not result.lost


def test_time_out_kills(init: Init) -> None:
    assert init.name()
    running = Running(init, "sleep 100", timeout=0.2)
    session, _ = init.started()
    init.send(session, FRAME_OUTPUT, b"begun")
    kinds = [init.next() for _ in range(2)]
    assert (session, FRAME_SIGNAL, struct.pack("<I", 9)) in kinds
    init.exit(session, 137)
    with pytest.raises(CommandFailed, match=r"'sleep 100' did not end in 0.2 s\nstdout: begun"):
        running.result()


def test_a_guest_without_a_channel(init: Init) -> None:
    with pytest.raises(CommandFailed, match=r"takes no commands after 0\.1 s"):
        run(init.channel, "true", ready_timeout=0.1)
    init.channel.started_without()
    with pytest.raises(CommandFailed, match="build the image again"):
        run(init.channel, "true", ready_timeout=PATIENCE)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda c: c.gone("the guest has ended (panic)", 120), r"the guest has ended \(panic\)"),
        (lambda c: c.reset(), "the guest rebooted"),
        (lambda c: c.name(LIST), "the guest started over"),
    ],
)
def test_the_end_of_the_guest_ends_the_wait(
    init: Init, end: Callable[[Channel], None], why: str
) -> None:
    assert init.name()
    running = Running(init, "true", timeout=PATIENCE)
    init.started()
    end(init.channel)
    with pytest.raises(CommandFailed, match=f"'true' did not end: {why}"):
        running.result()


def test_after_a_restart_commands_run(init: Init) -> None:
    assert init.name()
    init.channel.leave()
    init.channel.reset()
    init.fetch()
    assert not init.got, "nothing is left of before"
    assert init.name()
    running = Running(init, ["true"], timeout=PATIENCE)
    init.exit(init.started()[0], 0)
    assert running.result().ok


def test_several_at_once(init: Init) -> None:
    assert init.name()
    running = [Running(init, [f"echo{i}"], timeout=PATIENCE) for i in range(5)]
    sessions = [init.started() for _ in range(5)]
    for session, description in reversed(sessions):
        init.send(session, FRAME_OUTPUT, description)
    for session, _ in sessions:
        init.exit(session, 0)
    assert [r.result().out for r in running] == [f"aecho{i}\0" for i in range(5)]


def test_there_are_not_too_many(init: Init) -> None:
    opened = [init.channel.open() for _ in range(SESSIONS_MAX)]
    with pytest.raises(CommandFailed, match="64 commands run"):
        init.channel.open()
    opened.pop().close()
    opened.append(init.channel.open())
    for session in opened:
        session.close()


def test_leave(init: Init) -> None:
    init.channel.leave()
    assert not init.rung.acquire(blocking=False), "nobody is there yet"
    assert init.name()
    init.fetch()
    assert init.got == [(0, FRAME_LEAVE, b"")]


def test_a_lost_bell_rings_again(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else waits: the channel rings by itself until the guest comes."""
    monkeypatch.setattr(guest_channel, "REMIND_S", 0.05)
    assert init.name()
    init.channel.leave()
    for _ in range(3):
        assert init.rung.acquire(timeout=PATIENCE)
    init.fetch()
    assert init.got == [(0, FRAME_LEAVE, b"")]
    while any(thread.name == "channel" for thread in threading.enumerate()):
        time.sleep(0.01)
    while init.rung.acquire(blocking=False):
        pass
    init.channel.leave()
    assert init.rung.acquire(timeout=PATIENCE), "and so for the next frame"
    assert init.rung.acquire(timeout=PATIENCE)
    init.channel.gone("the guest has ended (poweroff)")


# --- a hostile guest ------------------------------------------------------------------------------


def test_wild_pages(init: Init) -> None:
    """No list of pages reaches beyond RAM, and none raises."""
    end = init.board.memory.size >> 12
    for count in (0, CHANNEL_PAGES + 1, 0xFFFF_FFFF):
        assert not init.name(count)
    init.channel.name(end)
    init.channel.name(0xFF_FFFF)
    session = init.channel.open()
    send_description(session.send, describe(["x" * 5000]))
    assert init.name(2, [0xFF_FFFF] * CHANNEL_PAGES)
    assert init.board.read(PIO, PORT_GUEST_CHANNEL, 4) == 0
    init.board.write(PIO, PORT_GUEST_CHANNEL, 4, 8192)
    for size in (1, 2):
        assert init.board.read(PIO, PORT_GUEST_CHANNEL, size) == 0
        init.board.write(PIO, PORT_GUEST_CHANNEL, size, 12)
    session.close()


@pytest.mark.parametrize(
    "kind",
    [
        lambda n: [(FRAME_OUTPUT, bytes(FRAME_MAX))] * (CHANNEL_WINDOW // FRAME_MAX + 1),
        lambda n: [(FRAME_ERROR, b""), (FRAME_ERROR, b"x")],
        lambda n: [(FRAME_CREDIT, TWO.pack(FRAME_INPUT, 1))],
        lambda n: [(FRAME_CREDIT, TWO.pack(FRAME_OUTPUT, 1))],
    ],
    ids=["too much", "after the end", "credit for nothing", "credit for output"],
)
def test_who_breaks_the_protocol_loses_the_session(
    init: Init, kind: Callable[[int], list[tuple[int, bytes]]]
) -> None:
    assert init.name()
    running = Running(init, ["true"], timeout=PATIENCE)
    session, _ = init.started()
    with init.channel.lock:  # the reader takes nothing meanwhile
        one = init.channel._sessions[session]
        with pytest.raises(BadFrame):
            for frame_kind, payload in kind(session):
                one.came(frame_kind, payload)
    init.send(session, FRAME_CREDIT, TWO.pack(FRAME_INPUT, 0xFFFF_FFFF))
    with pytest.raises(CommandFailed, match="the guest's init broke the protocol"):
        running.result()
    while init.next()[:2] != (session, FRAME_CLOSE):
        pass


def test_nonsense_is_ignored(init: Init) -> None:
    """Random bytes in the pages: no exception, and sessions of which they know nothing live."""
    assert init.name()
    rng = random.Random(7)
    running = Running(init, ["true"], timeout=PATIENCE)
    session, _ = init.started()
    for _ in range(300):
        kind = rng.choice([0, FRAME_OPEN, FRAME_START, FRAME_SIGNAL, FRAME_CLOSE, 99, 1 << 31])
        size = rng.choice([0, 1, 7, 4096, 0xFFFF_FFFF])
        number = rng.choice([0, session, session + 1, 0xFFFF_FFFF])
        init.give(FRAME.pack(kind, number, size) + rng.randbytes(rng.choice([0, 5, 60])))
    init.send(session, FRAME_EXIT, b"")
    init.send(session, FRAME_EXIT, b"12345")
    init.send(session, FRAME_CREDIT, b"123")
    init.exit(session, 0xFFFF_FF03)
    init.exit(session, 4)
    assert running.result().status == 3


# --- `pyvmm exec` ---------------------------------------------------------------------------------


class Machine:
    """What the command of the control socket sees of a machine."""

    def __init__(self, init: Init | None) -> None:
        self.channel = init.channel if init is not None else None
        self.boot = BootState("real16", "multiboot", 0, {}, 0)


@pytest.fixture
def box(init: Init, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Init]:
    """A machine named box, whose guest is played here."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    server = Server(Claim("box"), lambda: COMMANDS, Machine(init), {})
    assert init.name()
    yield init
    server.close()


def pyvmm(
    *args: str, stdin: int = subprocess.PIPE, before: Callable[[], object] | None = None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*module("pyvmm", "exec", "--host", "local"), *args],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=before,
    )


def test_exec(box: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "C.UTF-8")
    options = ["-u", "bob", "-e", "A=b", "-e", "LANG", "-C", "/tmp"]
    client = pyvmm(*options, "box", "--", "cat", "-n")
    session, description = box.started()
    assert description == b"acat\0a-n\0eA=b\0eLANG=C.UTF-8\0ubob\0d/tmp\0i\0"
    assert client.stdin is not None
    client.stdin.write(b"in")
    client.stdin.close()
    assert [box.next()[1:] for _ in range(2)] == [(FRAME_INPUT, b"in"), (FRAME_INPUT, b"")]
    box.send(session, FRAME_OUTPUT, b"out")
    box.send(session, FRAME_ERROR, b"err")
    box.exit(session, 3)
    client.stdin = None
    assert client.communicate(timeout=PATIENCE) == (b"out", b"err")
    assert client.returncode == 3


def test_exec_without_a_reader(box: Init) -> None:
    """The command is told, and the status is its own."""
    client = pyvmm("box", "--", "yes")
    session, _ = box.started()
    assert client.stdout is not None
    client.stdout.close()
    box.send(session, FRAME_OUTPUT, b"y\n")
    assert box.next() == (session, FRAME_OUTPUT, b"")
    box.exit(session, 141)
    client.stdout = None
    assert client.communicate(timeout=PATIENCE)[1] == b"" and client.returncode == 141


def test_exec_forwards_signals_and_the_second_kills(box: Init) -> None:
    client = pyvmm("box", "--", "sleep")
    session, _ = box.started()
    for comes in (15, 9):
        client.send_signal(15)
        assert box.next() == (session, FRAME_SIGNAL, struct.pack("<I", comes))
    box.exit(session, 137)
    client.communicate(timeout=PATIENCE)
    assert client.returncode == 137


def test_the_end_comes_while_there_is_something_to_send() -> None:
    """The machine has closed the connection behind the status."""
    ours, theirs = socket.socketpair()
    theirs.sendall(frame(FRAME_EXIT, struct.pack("<I", 3)))
    theirs.close()
    with ours:
        attached = Attached(ours, b"", describe(["true"]), stdin=None, terminal=None)
        assert attached.wait(PATIENCE) == 3


def test_exec_lets_go_of_output_when_it_kills(box: Init) -> None:
    """Nobody reads the output, so that the guest cannot report the end behind it."""
    client = pyvmm("box", "--", "yes")
    session, _ = box.started()
    for _ in range(CHANNEL_WINDOW // 4096):
        box.send(session, FRAME_OUTPUT, bytes(4096))
    assert client.stdout is not None
    assert client.stdout.read(1) == b"\0"

    def next() -> tuple[int, bytes]:
        while (found := box.next())[1] == FRAME_CREDIT:
            pass
        return found[1:]

    client.send_signal(15)
    assert next() == (FRAME_SIGNAL, struct.pack("<I", 15))
    client.send_signal(15)
    assert {next(), next()} == {(FRAME_SIGNAL, struct.pack("<I", 9)), (FRAME_OUTPUT, b"")}
    box.exit(session, 137)
    assert client.wait(PATIENCE) == 137


def test_exec_ignores_what_nohup_ignores(box: Init) -> None:
    client = pyvmm("box", "--", "sleep", before=lambda: signal.signal(1, signal.SIG_IGN))
    session, _ = box.started()
    client.send_signal(1)
    for comes in (15, 10):
        client.send_signal(comes)
        assert box.next() == (session, FRAME_SIGNAL, struct.pack("<I", comes))
    box.exit(session, 143)
    client.communicate(timeout=PATIENCE)


def test_exec_when_its_terminal_hangs_up(box: Init) -> None:
    """The command gets SIGHUP, and its status is the client's, without a word of Python's."""
    ours, theirs = os.openpty()

    def heard() -> None:  # also under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    client = pyvmm("-it", "box", "--", "sleep", stdin=theirs, before=heard)
    os.close(theirs)
    session, _ = box.started()
    os.close(ours)
    while box.next() != (session, FRAME_INPUT, b""):
        pass
    client.send_signal(signal.SIGWINCH)
    client.send_signal(signal.SIGHUP)
    assert box.next() == (session, FRAME_SIGNAL, struct.pack("<I", 1))
    box.exit(session, 129)
    assert client.communicate(timeout=PATIENCE)[1] == b"" and client.returncode == 129


def test_exec_when_the_time_is_over(box: Init) -> None:
    client = pyvmm("--timeout", "0.1", "box", "--", "sleep")
    session, _ = box.started()
    assert box.next() == (session, FRAME_SIGNAL, struct.pack("<I", 9))
    box.exit(session, 137)
    assert b"did not end within 0.1 s" in client.communicate(timeout=PATIENCE)[1]
    assert client.returncode == 124


def test_exec_when_the_machine_ends(box: Init) -> None:
    client = pyvmm("box", "--", "sleep")
    session, _ = box.started()
    box.send(session, FRAME_OUTPUT, b"\x1b[2J")
    box.channel.gone("the guest \x1b[2J has ended", 119)
    out, err = client.communicate(timeout=PATIENCE)
    assert out == b"\x1b[2J", "output is the command's own matter"
    assert (err, client.returncode) == (b"pyvmm: the guest ?[2J has ended\n", 119)


def test_a_program_beside_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs behind the words that enter the namespace; a card without one is told."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cards = [
        {"name": "net0", "enter": None},
        {"name": "net1", "enter": ["/usr/bin/env", "WHERE=inside"]},
    ]
    about = Command(lambda machine, given: {"nets": cards}, "about the machine")
    server = Server(Claim("box"), lambda: {"x-pyvmm-machine": about}, Machine(None), {})
    try:
        inside = pyvmm("--net", "box", "--", "sh", "-c", "echo $WHERE; exit 3")
        assert inside.communicate(timeout=PATIENCE) == (b"inside\n", b"")
        assert inside.returncode == 3
        for options, why in (
            (["--net", "--nic", "0"], b"box has no card net0 in a namespace of pyvmm's"),
            (["--net", "-u", "bob"], b"--net with an option for the guest"),
            (["--nic", "0"], b"--nic without --net"),
        ):
            refused = pyvmm(*options, "box", "--", "true")
            assert refused.communicate(timeout=PATIENCE)[1].startswith(b"pyvmm: " + why)
            assert refused.returncode == 2
    finally:
        server.close()


def test_a_guest_that_is_not_linux_takes_no_commands() -> None:
    with pytest.raises(QmpError, match=r"multiboot.*it is not Linux"):
        COMMANDS["x-pyvmm-exec"].run(Machine(None), {})


# --- clients of the control socket ----------------------------------------------------------------


class Client:
    """A connection after ``x-pyvmm-exec``."""

    def __init__(self, init: Init) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE)
        self._framer = Framer()
        self._got: list[tuple[int, bytes]] = []
        self.thread = threading.Thread(target=carry, args=(theirs, init.channel, PATIENCE))
        self.thread.start()

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(frame(kind, payload))

    def next(self) -> tuple[int, bytes]:
        while not self._got:
            data = self.sock.recv(1 << 16)
            assert data, "the connection has ended"
            self._got = self._framer.feed(data)
        return self._got.pop(0)

    def close(self) -> None:
        self.sock.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def client(init: Init) -> Iterator[Client]:
    made = Client(init)
    yield made
    made.close()


def test_the_frames_of_a_client(init: Init, client: Client) -> None:
    assert init.name()
    send_description(client.send, describe(["x" * 70_000], terminal=(80, 24)))
    session, description = init.started()
    assert description == b"a" + b"x" * 70_000 + b"\0t80x24\0"
    sent = {FRAME_SIGNAL: struct.pack("<I", 2), FRAME_SIZE: TWO.pack(132, 50), FRAME_INPUT: b"in"}
    for kind, payload in sent.items():
        client.send(kind, payload)
    client.send(FRAME_ERROR)
    sent[FRAME_ERROR] = b""
    assert {init.next()[1:] for _ in sent} == set(sent.items())
    init.send(session, FRAME_OUTPUT, b"out")
    assert client.next() == (FRAME_OUTPUT, b"out")
    client.send(FRAME_CREDIT, TWO.pack(FRAME_OUTPUT, 3))
    assert init.next()[1:] == (FRAME_CREDIT, TWO.pack(FRAME_OUTPUT, 3))
    init.send(session, FRAME_CREDIT, TWO.pack(FRAME_INPUT, 2))
    assert client.next() == (FRAME_CREDIT, TWO.pack(FRAME_INPUT, 2))
    init.exit(session, 5)
    assert client.next() == (FRAME_EXIT, struct.pack("<I", 5))


def test_a_client_that_goes_ends_its_command(init: Init, client: Client) -> None:
    assert init.name()
    send_description(client.send, describe(["sleep"]))
    session, _ = init.started()
    client.close()
    assert init.next() == (session, FRAME_CLOSE, b"")
    init.send(session, FRAME_OUTPUT, b"late")


def test_a_client_that_reads_nothing_costs_little(init: Init, client: Client) -> None:
    """What the guest may send without credit is bounded, and other sessions go on."""
    assert init.name()
    send_description(client.send, describe(["yes"]))
    session, _ = init.started()
    for at in range(0, CHANNEL_WINDOW, 4096):
        init.send(session, FRAME_OUTPUT, bytes(min(4096, CHANNEL_WINDOW - at)))
    running = Running(init, ["true"], timeout=PATIENCE)
    other, _ = init.started()
    init.exit(other, 0)
    assert running.result().ok
    assert client.next()[0] == FRAME_OUTPUT


def test_the_end_of_the_machine_reaches_the_client(init: Init, client: Client) -> None:
    assert init.name()
    send_description(client.send, describe(["sleep"]))
    session, _ = init.started()
    init.send(session, FRAME_OUTPUT, b"last words")
    init.channel.gone("the guest has ended (poweroff)", 119)
    assert client.next() == (FRAME_OUTPUT, b"last words")
    kind, payload = client.next()
    assert (kind, payload) == (FRAME_FAILED, b"\x77\0\0\0the guest has ended (poweroff)")


def test_a_client_that_waits_learns_how_the_machine_ended(init: Init, client: Client) -> None:
    """The guest has not come as far as to take commands."""
    init.channel.gone("the guest has ended (panic)", 120)
    kind, payload = client.next()
    assert (kind, payload[0]) == (FRAME_FAILED, 120)
    with pytest.raises(CommandFailed) as found:
        init.channel.wait_ready(PATIENCE)
    assert found.value.exit_code == 120


def test_a_client_that_goes_while_it_waits(init: Init, client: Client) -> None:
    client.close()


@pytest.mark.parametrize("timeout", [-1, READY_MAX + 1, 10**12])
def test_a_wait_without_bounds_is_refused(init: Init, timeout: int) -> None:
    with pytest.raises(QmpError, match=f"seconds, at most {READY_MAX}"):
        COMMANDS["x-pyvmm-exec"].run(Machine(init), {"timeout": timeout})


def test_a_client_that_stands_still_gets_all(
    init: Init, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the machine runs; its place is free meanwhile."""
    monkeypatch.setattr(sessions, "LINGER", 0.0)
    monkeypatch.setattr(sessions, "CHECK_MS", 10)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    assert init.name()
    send_description(client.send, describe(["yes"]))
    session, _ = init.started()
    for _ in range(CHANNEL_WINDOW // 4096):
        init.send(session, FRAME_OUTPUT, bytes(4096))
    init.exit(session, 3)
    until = time.monotonic() + PATIENCE
    while init.channel._sessions and time.monotonic() < until:
        time.sleep(0.01)
    client.thread.join(0.2)
    assert client.thread.is_alive()
    size = 0
    while (found := client.next())[0] == FRAME_OUTPUT:
        size += len(found[1])
    assert (size, found) == (CHANNEL_WINDOW, (FRAME_EXIT, struct.pack("<I", 3)))


def test_a_client_that_stands_still_does_not_outlive_the_machine(
    init: Init, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LINGER", 0.0)
    monkeypatch.setattr(sessions, "CHECK_MS", 10)
    assert init.name()
    send_description(client.send, describe(["yes"]))
    session, _ = init.started()
    for _ in range(CHANNEL_WINDOW // 4096):
        init.send(session, FRAME_OUTPUT, bytes(4096))
    init.exit(session, 3)
    init.channel.gone("the guest has ended (poweroff)", 119)
    client.thread.join(PATIENCE)
    assert not client.thread.is_alive()


def test_a_guest_that_reboots_ends_sessions_by_its_code(init: Init, client: Client) -> None:
    assert init.name()
    send_description(client.send, describe(["sleep"]))
    init.started()
    init.channel.reset()
    kind, payload = client.next()
    assert (kind, payload[0]) == (FRAME_FAILED, GuestReboot.exit_code)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FRAME_INPUT, bytes(FRAME_MAX)),
        (FRAME_CREDIT, TWO.pack(FRAME_OUTPUT, 1)),
        (FRAME_CREDIT, TWO.pack(FRAME_EXIT, 0)),
        (FRAME_SIGNAL, struct.pack("<I", 65)),
        (FRAME_SIGNAL, b"1"),
        (FRAME_OUTPUT, b"x"),
        (FRAME_SIZE, b""),
        (FRAME_START, b""),
        (FRAME_OPEN, b"aafter the start\0"),
        (FRAME_EXIT, struct.pack("<I", 0)),
        (FRAME_CLOSE, b""),
        (FRAME_LEAVE, b""),
        (77, b""),
        (FRAME_INPUT, None),
    ],
)
def test_a_bad_client(init: Init, client: Client, kind: int, payload: bytes | None) -> None:
    """It gets a line, and its command ends."""
    assert init.name()
    send_description(client.send, describe(["sleep"]))
    session, _ = init.started()
    if payload is None:
        client.sock.sendall(FRAME.pack(kind, 0, FRAME_MAX + 1))
    else:
        for _ in range(CHANNEL_WINDOW // FRAME_MAX + 1 if len(payload) == FRAME_MAX else 1):
            client.send(kind, payload)
    while (found := client.next())[0] != FRAME_FAILED:
        pass
    assert found[1].startswith(b"\x02\0\0\0the client broke the protocol: ")
    while init.next()[:2] != (session, FRAME_CLOSE):
        pass


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ([], {}),
        (["a\0b"], {}),
        (["x" * (128 << 10)], {}),
        (["x"], {"env": {"": "a"}}),
        (["x"], {"env": {"A=B": "a"}}),
        (["x"], {"env": {"A": "a\0"}}),
        (["x"], {"cwd": "a\0"}),
    ],
)
def test_bad_commands(init: Init, command: list[str], more: dict[str, object]) -> None:
    assert init.name()
    with pytest.raises(UsageError):
        run(init.channel, command, **more)  # type: ignore[arg-type]
    init.fetch()
    assert not init.got


def test_output_arrives_soon(init: Init) -> None:
    """Nobody waits for a reminder."""
    assert init.name()
    begin = time.monotonic()
    for _ in range(20):
        running = Running(init, ["true"], timeout=PATIENCE)
        session, _ = init.started()
        init.exit(session, 0)
        assert running.result().seconds < PATIENCE
    assert time.monotonic() - begin < 20 * guest_channel.REMIND_S
