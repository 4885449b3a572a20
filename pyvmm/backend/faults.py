"""Faults on demand of our own vhost-user back-end, which is another process (``backend.process``).

Over a stream socket of their own, because the child's control socket waits while a session lasts. A
request is a line: its number, and, for new rules, ``SEED`` and the rules, all divided by tabs; a
rule has its words, ``|`` and the instructions of its filter in hexadecimal. The answer is a line as
well: the request's number; ``ok`` and what was counted, as ``name=number``, with ``waiting_rx`` and
``waiting_tx``; or ``no`` and why. By the number an answer that comes too late is known as such.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from pyvmm.errors import HostError
from pyvmm.faultopt import FaultRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.impair import ImpairPoint

#: Seconds that the child has for an answer. It is a thread of its own that answers. Then those of a
#: child that is about to end, which is asked once more for what it has counted.
PATIENCE_S, LAST_S = 60.0, 10.0
#: Bytes of an answer, and of the rules: 16 filters of 4096 instructions, in hexadecimal.
ANSWER_MAX, REQUEST_MAX = 1 << 14, 2 << 20
WAYS = ("rx", "tx")


class BackendFaults:
    """Has the members of ``datapath.impair.ImpairPoint`` that a card uses; lent to the process that
    has the child. Any thread.

    One thread at a time talks to the child. What it finds out is published whole, so that others
    read it without a wait.
    """

    seeded = True

    def __init__(self) -> None:
        self._talking = threading.Lock()
        self._rules: tuple[Sequence[FaultRule], int] = ((), 0)  # and the seed
        #: What children that have gone have counted, and the present one, as it has told last.
        self._told: tuple[dict[str, int], dict[str, int]] = ({}, {})
        # For the thread that talks.
        self._ever = False
        self._child = False  # whether there is one
        self._socket: socket.socket | None = None  # None: or nobody can talk to it any more
        self._asked = 0  # the number of the last request
        self._heard = b""  # what has come of the next answer

    @property
    def active(self) -> bool:
        """Whether there are rules."""
        return bool(self._rules[0])

    def set(self, rules: Sequence[FaultRule], seed: int) -> None:
        """Have these rules, and no others, from now on, also in a child that comes later.

        :raises HostError: the child cannot, or does not answer. If it answers later, it has them.
        """
        with self._talking:
            self._rules = (list(rules), seed)
            self._ever = self._ever or bool(rules)
            if self._child and self._ever:
                self._tell()

    def counters(self) -> dict[str, int]:
        """What had been done at the last ``look``: ``rx_fault_loss`` and others; empty if there
        never was a rule. Never waits, not even for a thread that waits for the child.
        """
        return _sum(*self._told)

    def look(self) -> None:
        """Ask the child, if there ever was a rule. If it does not answer, what it has told last
        stays. No vCPU's thread.
        """
        with self._talking:
            self._look(PATIENCE_S)

    def report(self) -> dict[str, object]:
        """The rules in force, the seed, and how many frames waited at the last ``look``; for
        JSON. Never waits.
        """
        (rules, seed), (_, now) = self._rules, self._told
        return {
            "rules": [str(rule) for rule in rules],
            "seed": seed if rules else None,
            "waiting": {way: now.get(f"waiting_{way}", 0) for way in WAYS},
        }

    def clear(self) -> None:
        """Nothing: the child clears what waits when its driver goes."""

    def close(self) -> None:
        """The card ends. What was counted stays, if ``detach`` has come before. A second call does
        nothing.
        """
        self.detach()
        self._rules = ((), 0)

    # --- for the process that has the child -------------------------------------------------------

    def attach(self, sock: socket.socket) -> None:
        """There is a child, at this socket, which is owned from here on; it gets the rules.

        :raises HostError: it cannot do what they say, or does not answer.
        """
        self.detach()
        with self._talking:
            self._child, self._socket = True, sock
            if self._rules[0]:
                self._tell()

    def detach(self) -> None:
        """The child is about to end, or has ended. A second call does nothing."""
        with self._talking:
            self._look(LAST_S)
            self._hang_up()
            self._child = False
            self._told = (_sum(*self._told), {})

    # --- for the thread that talks ----------------------------------------------------------------

    def _tell(self) -> None:
        rules, seed = self._rules
        words = (f"{' '.join(rule.words)}|{rule.code.hex()}" for rule in rules)
        self._ask("\t".join(["", str(seed), *words]), PATIENCE_S)

    def _look(self, seconds: float) -> None:
        if self._ever and self._socket is not None:
            with suppress(HostError):  # then it stays as it has told last
                self._ask("", seconds)

    def _hang_up(self) -> None:
        """Talk no more to this child, which ends its faults when it notices."""
        sock, self._socket, self._heard = self._socket, None, b""
        if sock is not None:
            sock.close()

    def _ask(self, text: str, seconds: float) -> None:
        """Ask, and publish what the child has counted. If the answer comes after this time, the
        next request finds it and goes on.

        :raises HostError: the child refuses, has not answered in time, or cannot be talked to.
        """
        if self._socket is None:
            raise HostError(
                "our own back-end takes no faults any more: it has broken off",
                "start the machine again",
            )
        self._asked += 1
        until = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(f"{self._asked}{text}\n".encode())
        except OSError as e:  # of the line, a part may have gone
            self._hang_up()
            raise HostError(f"our own back-end does not take faults: {e}") from e
        try:
            verdict, rest = self._answer(until)
            now = _numbers(rest) if verdict == "ok" else {}
        except TimeoutError as e:
            raise HostError(f"our own back-end does not take faults: {e}", "try again") from e
        except (OSError, ValueError) as e:
            self._hang_up()
            raise HostError(f"our own back-end takes no faults: {e}") from e
        if verdict != "ok":
            raise HostError(f"our own back-end takes no faults: {rest}")
        self._told = (self._told[0], now)

    def _answer(self, until: float) -> tuple[str, str]:
        """The answer to the last request: verdict, and the rest.

        :raises TimeoutError: it has not come by then. :raises OSError, ValueError: it will not.
        """
        assert self._socket is not None
        while True:
            while b"\n" not in self._heard:
                if len(self._heard) > ANSWER_MAX:
                    raise OSError(f"a line of more than {ANSWER_MAX} bytes")
                left = until - time.monotonic()
                if left <= 0:
                    raise TimeoutError("timed out")
                self._socket.settimeout(left)
                more = self._socket.recv(1 << 16)
                if not more:
                    raise OSError("it has ended")
                self._heard += more
            line, _, self._heard = self._heard.partition(b"\n")
            number, verdict, *rest = line.decode(errors="replace").split(" ", 2)
            if int(number) == self._asked:
                return verdict, "".join(rest)


def _sum(past: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """All that was counted; what waits is no count."""
    total = dict(past)
    for key, n in now.items():
        if not key.startswith("waiting"):
            total[key] = total.get(key, 0) + n
    return total


def _numbers(text: str) -> dict[str, int]:
    """:raises ValueError: it does not say ``name=number``."""
    return {key: int(number) for key, _, number in (word.partition("=") for word in text.split())}


def answer(sock: socket.socket, impair: ImpairPoint) -> None:
    """The child's side: do what is asked, until the other end goes; then nothing more is done wrong
    on purpose, as nobody could end that. Owns the socket.
    """
    with sock, suppress(OSError):  # it may go in the middle
        try:
            _serve(sock, impair)
        finally:
            with suppress(HostError):
                impair.set([], 0)


def _serve(sock: socket.socket, impair: ImpairPoint) -> None:
    """:raises OSError: the other end has gone, and has not waited for an answer."""
    came = b""
    while True:
        # Several lines come at once if the other end has not waited for the answer to the first.
        while b"\n" not in came:
            more = sock.recv(1 << 16)
            if not more or len(came) > REQUEST_MAX:
                return
            came += more
        line, _, came = came.partition(b"\n")
        number, *text = line.decode().split("\t")
        try:
            if text:
                seed, *rules = text
                impair.set([_rule(rule) for rule in rules], int(seed))
            said = "ok " + " ".join(_counted(impair))
        except HostError as e:
            said = f"no {e}"
        sock.sendall(f"{number} {said}\n".encode())


def _rule(text: str) -> FaultRule:
    words, _, code = text.partition("|")
    return FaultRule(words.split(" "), bytes.fromhex(code))


def _counted(impair: ImpairPoint) -> list[str]:
    waiting = impair.report()["waiting"]
    assert isinstance(waiting, dict)
    counts = impair.counters() | {f"waiting_{way}": n for way, n in waiting.items()}
    return [f"{name}={n}" for name, n in counts.items() if n]
