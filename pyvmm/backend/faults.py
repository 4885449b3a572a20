"""Faults on demand of our own vhost-user back-end, which is another process (``backend.process``).

Over a stream socket of their own, because the child's control socket waits while a session lasts. A
request is a line: empty, or ``SEED`` and the rules, divided by tabs; a rule has its words, ``|``
and the instructions of its filter in hexadecimal. The answer is a line as well: ``ok`` and what was
counted, as ``name=number``, with ``waiting_rx`` and ``waiting_tx``; or ``no`` and why.
"""

from __future__ import annotations

import socket
import threading

from pyvmm.errors import HostError
from pyvmm.faultopt import FaultRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.impair import ImpairPoint

#: Seconds that the child has for an answer. It is a thread of its own that answers.
PATIENCE_S = 10.0
#: Bytes of an answer, and of the rules: 16 filters of 4096 instructions, in hexadecimal.
ANSWER_MAX, REQUEST_MAX = 1 << 14, 2 << 20
WAYS = ("rx", "tx")


class BackendFaults:
    """Has the members of ``datapath.impair.ImpairPoint`` that a card uses; lent to the process that
    has the child. Any thread.
    """

    seeded = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._rules: Sequence[FaultRule] = ()
        self._seed = 0
        self._ever = False
        self._past: dict[str, int] = {}  # of children that have gone
        self._now: dict[str, int] = {}  # of the present one, as it has told last

    @property
    def active(self) -> bool:
        """Whether there are rules."""
        return bool(self._rules)

    def set(self, rules: Sequence[FaultRule], seed: int) -> None:
        """Have these rules, and no others, from now on, also in a child that comes later.

        :raises HostError: the child cannot, or does not answer.
        """
        with self._lock:
            self._rules, self._seed = list(rules), seed
            self._ever = self._ever or bool(rules)
            if self._socket is not None and self._ever:
                self._tell()

    def counters(self) -> dict[str, int]:
        """What had been done at the last ``look``: ``rx_fault_loss`` and others; empty if there
        never was a rule. Never waits for the child.
        """
        with self._lock:
            total = dict(self._past)
            for key, n in self._now.items():
                if not key.startswith("waiting"):
                    total[key] = total.get(key, 0) + n
            return total

    def look(self) -> None:
        """Ask the child, if there ever was a rule. If it does not answer, what it has told last
        stays. No vCPU's thread.
        """
        with self._lock:
            self._look()

    def report(self) -> dict[str, object]:
        """The rules in force, the seed, and how many frames waited at the last ``look``; for
        JSON.
        """
        with self._lock:
            return {
                "rules": [str(rule) for rule in self._rules],
                "seed": self._seed if self._rules else None,
                "waiting": {way: self._now.get(f"waiting_{way}", 0) for way in WAYS},
            }

    def clear(self) -> None:
        """Nothing: the child clears what waits when its driver goes."""

    def close(self) -> None:
        """The card ends. What was counted stays, if ``detach`` has come before. A second call does
        nothing.
        """
        self.detach()
        self._rules = ()

    # --- for the process that has the child -------------------------------------------------------

    def attach(self, sock: socket.socket) -> None:
        """There is a child, at this socket, which is owned from here on; it gets the rules.

        :raises HostError: it cannot do what they say, or does not answer.
        """
        self.detach()
        with self._lock:
            sock.settimeout(PATIENCE_S)
            self._socket = sock
            if self._rules:
                self._tell()

    def detach(self) -> None:
        """The child is about to end, or has ended. A second call does nothing."""
        with self._lock:
            self._look()
            self._drop()

    # --- under the lock ---------------------------------------------------------------------------

    def _tell(self) -> None:
        rules = (f"{' '.join(rule.words)}|{rule.code.hex()}" for rule in self._rules)
        self._ask("\t".join([str(self._seed), *rules]))

    def _look(self) -> None:
        if self._ever and self._socket is not None:
            try:
                self._ask("")
            except HostError:
                pass  # as it has told last

    def _drop(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        for key, n in self._now.items():
            if not key.startswith("waiting"):
                self._past[key] = self._past.get(key, 0) + n
        self._now = {}

    def _ask(self, line: str) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(line.encode() + b"\n")
            answer = read_line(self._socket, ANSWER_MAX)
        except OSError as e:
            self._drop()  # what it says later would be taken for the next answer
            raise HostError(f"our own back-end does not take faults: {e}") from e
        verdict, _, rest = answer.decode(errors="replace").partition(" ")
        if verdict != "ok":
            if not answer:
                self._drop()
            raise HostError(f"our own back-end takes no faults: {rest or 'it has ended'}")
        self._now = {
            key: int(number) for key, _, number in (word.partition("=") for word in rest.split())
        }


def read_line(sock: socket.socket, most: int) -> bytes:
    """A line without its end; empty if the other end has gone.

    :raises OSError: from recv(2), or the line has more than ``most`` bytes.
    """
    line = b""
    while not line.endswith(b"\n"):
        more = sock.recv(1 << 16)
        if not more:
            return b""
        line += more
        if len(line) > most:
            raise OSError(f"a line of more than {most} bytes")
    return line[:-1]


def answer(sock: socket.socket, impair: ImpairPoint) -> None:
    """The child's side: do what is asked, until the other end goes. Owns the socket."""
    with sock:
        while True:
            request = b""
            while not request.endswith(b"\n"):
                more = sock.recv(1 << 16)
                if not more or len(request) > REQUEST_MAX:
                    return
                request += more
            text = request[:-1].decode()
            try:
                if text:
                    seed, *rules = text.split("\t")
                    impair.set([_rule(rule) for rule in rules], int(seed))
                said = "ok " + " ".join(_counted(impair))
            except HostError as e:
                said = f"no {e}"
            sock.sendall(said.encode() + b"\n")


def _rule(text: str) -> FaultRule:
    words, _, code = text.partition("|")
    return FaultRule(words.split(" "), bytes.fromhex(code))


def _counted(impair: ImpairPoint) -> list[str]:
    waiting = impair.report()["waiting"]
    assert isinstance(waiting, dict)
    counts = impair.counters() | {f"waiting_{way}": n for way, n in waiting.items()}
    return [f"{name}={n}" for name, n in counts.items() if n]
