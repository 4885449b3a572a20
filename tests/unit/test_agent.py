"""The channel for commands in a guest, with a guest that does what it should, and one that does
not. Linux has it in tests/boot.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import pytest

from pyvmm.bus import PIO
from pyvmm.devices import guest_agent
from pyvmm.devices.guest_agent import Agent
from pyvmm.errors import CommandFailed, UsageError
from pyvmm.spec.platform import PORT_GUEST_REQUEST, REQUEST_KILL, REQUEST_LEAVE, REQUEST_RUN
from tests.pci_guest import Board

if TYPE_CHECKING:
    from pyvmm.kvm.vm import Vm

PATIENCE = 60.0


class Init:
    """The guest's side: fetches requests as our init does."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.page = bytearray()
        self.has_page = True
        self.agent = Agent(board.bus, cast("Vm", board.vm), self._store)
        self.agent.bell.start()
        self._got = bytearray()

    def _store(self, data: bytes) -> bool:
        self.page[:] = data
        return self.has_page

    def pull(self) -> None:
        while n := self.board.read(PIO, PORT_GUEST_REQUEST, 4):
            assert n == len(self.page) <= 4096
            self._got += self.page
            if n < 4096:
                break

    def next(self) -> tuple[int, int, list[bytes], bytes] | None:
        """Type, id, argv and input of the next request, if it is there."""
        self.pull()
        if len(self._got) < 16:
            return None
        kind, number, argv, data = struct.unpack_from("<IIII", self._got)
        raw = bytes(self._got[16 : 16 + argv])
        rest = bytes(self._got[16 + argv : 16 + argv + data])
        del self._got[: 16 + argv + data]
        return kind, number, raw.split(b"\0")[:-1], rest

    def wait(self) -> tuple[int, int, list[bytes], bytes]:
        """The next request."""
        until = time.monotonic() + PATIENCE
        while (found := self.next()) is None:
            assert time.monotonic() < until
            time.sleep(0.001)
        return found

    def serve(self, answer: Callable[[int, list[bytes], bytes], None]) -> threading.Thread:
        """Answer one request in a thread."""

        def work() -> None:
            answer(*self.wait()[1:])

        thread = threading.Thread(target=work)
        thread.start()
        return thread


@pytest.fixture
def init() -> Iterator[Init]:
    with Board() as board:
        made = Init(board)
        yield made
        made.agent.bell.close()


def test_a_command(init: Init) -> None:
    agent = init.agent
    agent.became_ready()
    data = bytes(range(256)) * 40

    def answer(number: int, argv: list[bytes], given: bytes) -> None:
        assert argv == [b"sh", b"-c", b"echo \xc3\xa4"]
        agent.output(given, error=False)
        agent.output(b"oops", error=True)
        agent.ended(number << 8 | 7)

    thread = init.serve(answer)
    result = agent.run("echo ä", input=data, timeout=PATIENCE)
    thread.join()
    assert (result.status, bytes(result.stdout), result.err, result.lost) == (7, data, "oops", 0)
    assert not result.ok
    assert result.check(7) is result
    with pytest.raises(
        CommandFailed, match=r"'echo ä' ended with status 7, not 0\nstderr: oops\nstdout: "
    ):
        result.check()


def test_what_nobody_waits_for_is_dropped(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and results out of the blue, of another request, and more than is kept."""
    monkeypatch.setattr(guest_agent, "OUTPUT_MAX", 10)
    agent = init.agent
    agent.became_ready()
    agent.output(b"x", error=False)
    agent.ended(1 << 8)

    def answer(number: int, argv: list[bytes], given: bytes) -> None:
        agent.ended((number + 1) << 8 | 1)
        agent.output(b"123456789", error=False)
        agent.output(b"123456789", error=False)
        agent.ended(number << 8)
        agent.ended(number << 8 | 3)

    thread = init.serve(answer)
    result = agent.run(["true"], timeout=PATIENCE)
    thread.join()
    assert (result.status, result.out, result.lost) == (0, "1234567891", 8)


def test_time_out_kills(init: Init) -> None:
    agent = init.agent
    agent.became_ready()
    seen: list[int] = []

    def answer(number: int, argv: list[bytes], given: bytes) -> None:
        agent.output(b"begun", error=False)
        kind, other, _, _ = init.wait()
        seen.extend([kind, other - number])
        agent.ended(number << 8 | 137)

    thread = init.serve(answer)
    with pytest.raises(CommandFailed, match=r"'sleep 100' did not end in 0.2 s\nstdout: begun"):
        agent.run("sleep 100", timeout=0.2)
    thread.join()
    assert seen == [REQUEST_KILL, 0]


def test_a_guest_that_does_not_answer(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once; from then on nobody waits for it."""
    monkeypatch.setattr(guest_agent, "KILL_GRACE", 0.1)
    with pytest.raises(CommandFailed, match=r"takes no commands after 0\.1 s"):
        init.agent.run("true", ready_timeout=0.1)
    init.agent.became_ready()
    with pytest.raises(CommandFailed, match=r"did not end in 0\.1 s"):
        init.agent.run("true", timeout=0.1)
    with pytest.raises(CommandFailed, match="it did not answer before"):
        init.agent.run("true", timeout=PATIENCE)


def test_the_end_of_the_guest_ends_the_wait(init: Init) -> None:
    agent = init.agent
    agent.became_ready()
    thread = init.serve(lambda number, argv, given: agent.gone("the guest has ended (panic)"))
    with pytest.raises(CommandFailed, match=r"'true' did not end: the guest has ended \(panic\)"):
        agent.run("true", timeout=PATIENCE)
    thread.join()


def test_a_restart(init: Init) -> None:
    agent = init.agent
    agent.became_ready()
    thread = init.serve(lambda number, argv, given: agent.reset())
    with pytest.raises(CommandFailed, match="the guest started over"):
        agent.run("true", timeout=PATIENCE)
    thread.join()
    assert init.next() is None, "nothing is left of before"
    agent.became_ready()
    thread = init.serve(lambda number, argv, given: agent.ended(number << 8))
    assert agent.run("true", timeout=PATIENCE).ok
    thread.join()


def test_one_at_a_time(init: Init) -> None:
    agent = init.agent
    agent.became_ready()
    results: list[str] = []
    threads = [
        threading.Thread(
            target=lambda i=i: results.append(agent.run(f"echo {i}", timeout=PATIENCE).out)
        )
        for i in range(5)
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        kind, number, argv, _ = init.wait()
        assert kind == REQUEST_RUN and init.next() is None
        agent.output(argv[2], error=False)
        agent.ended(number << 8)
    for thread in threads:
        thread.join()
    assert sorted(results) == [f"echo {i}" for i in range(5)]


def test_a_guest_without_a_page_gets_nothing(init: Init) -> None:
    init.has_page = False
    init.agent.leave()
    assert init.board.read(PIO, PORT_GUEST_REQUEST, 4) == 0
    init.has_page = True
    found = init.next()
    assert found is not None and found[0] == REQUEST_LEAVE, "it is not lost"
    for size in (1, 2):
        assert init.board.read(PIO, PORT_GUEST_REQUEST, size) == 0
    init.board.write(PIO, PORT_GUEST_REQUEST, 4, 1)


@pytest.mark.parametrize("command", [[], ["a\0b"], ["x" * 70000]])
def test_bad_commands(init: Init, command: list[str]) -> None:
    with pytest.raises(UsageError):
        init.agent.run(command)
    with pytest.raises(UsageError):
        init.agent.run("cat", input=bytes((1 << 20) + 1))
