"""Scenarios: files that say which faults on demand a card has at which time, and a thread that
plays them (docs/scenarios.md).

A scenario is TOML::

    about = "The link flaps while packets are lost."
    seed = 7

    [[step]]
    at = "1s"
    faults = ["rx loss=10%"]

    [[step]]
    packets = 100
    do = ["needs-reset"]

Its times count from the moment when the driver of the step's card is ready.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from pyvmm.errors import HostError, PyvmmError, UsageError, did_you_mean
from pyvmm.faultopt import ACTS, FaultRule, of_text, seed_of, time_of
from pyvmm.threads import Thread, report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    class Faulty(Protocol):
        """A card, as a scenario sees it (``card.nic.Nic``)."""

        index: int

        @property
        def ready(self) -> bool:
            """Whether its driver has set it up."""

        @property
        def seeded(self) -> bool:
            """Whether a seed means anything on its data path."""

        def fault(self, *rules: str | FaultRule, seed: int | None = None) -> object:
            """Have these rules and no others."""

        def act(self, word: str) -> None:
            """Do something once."""

        def counters(self) -> dict[str, int]:
            """What it has done so far."""


LIBRARY = Path(__file__).parent / "scenarios"
FILE_MAX = 64 << 10
STEPS_MAX = 1000
FLAPS_MAX = 100
PACKETS_MAX = 2**63 - 1
DAY = 86400.0
KEYS = ("about", "seed", "step")
STEP_KEYS = ("at", "packets", "nic", "faults", "do", "flap")
FLAP_KEYS = ("times", "down", "up")
#: Seconds between two looks at a card that a step waits for.
LOOK_S = 0.01


class Step:
    """What is done at one moment.

    :ivar at: nanoseconds from the begin; None for a step that waits for packets.
    :ivar packets: as many have gone both ways since the begin.
    :ivar then: nanoseconds after the step before; for the moments of a flapping link.
    :ivar rules: in force from then on; None leaves those that are. :ivar acts: words of ``ACTS``.
    """

    __slots__ = ("acts", "at", "nic", "packets", "rules", "then", "where")

    def __init__(
        self,
        where: str,
        nic: int,
        *,
        at: int | None = None,
        packets: int | None = None,
        then: int | None = None,
        rules: list[FaultRule] | None = None,
        acts: Sequence[str] = (),
    ) -> None:
        self.where, self.nic = where, nic
        self.at, self.packets, self.then = at, packets, then
        self.rules, self.acts = rules, list(acts)


class Scenario:
    """A scenario; immutable by convention.

    :ivar name: of its file or in the library. :ivar about: in words. :ivar seed: of all its rules.
    :ivar steps: in order.
    """

    def __init__(self, name: str, about: str, seed: int, steps: list[Step]) -> None:
        self.name, self.about, self.seed, self.steps = name, about, seed, steps

    def check(self, cards: Sequence[Faulty]) -> None:
        """:raises UsageError: a step is about a card that there is not."""
        for step in self.steps:
            if step.nic not in [card.index for card in cards]:
                raise UsageError(
                    f"{step.where}: nic={step.nic}: the machine has {len(cards)} cards",
                    "cards are counted from 0",
                )


def library() -> dict[str, str]:
    """The scenarios that pyvmm brings: name -> file."""
    return {path.stem: str(path) for path in sorted(LIBRARY.glob("*.toml"))}


def load(name: str) -> Scenario:
    """The scenario of a file, or of the library if there is neither ``/`` nor ``.`` in the name.

    :raises UsageError: there is none, or it is malformed; the step is named.
    :raises HostError: there is no libpcap for a filter.
    """
    path = name
    if "/" not in name and "." not in name:
        known = library()
        if name not in known:
            raise UsageError(
                f"no scenario {name!r}",
                f"{did_you_mean(name, known)}a file, or one of {', '.join(known)}",
            )
        path = known[name]
    try:
        with open(path, "rb") as f:
            data = f.read(FILE_MAX + 1)
    except OSError as e:
        raise UsageError(f"--scenario {name}: {e.strerror}", "name a file that can be read") from e
    if len(data) > FILE_MAX:
        raise UsageError(f"--scenario {name}: more than {FILE_MAX >> 10} KiB", "shorten it")
    return parse(data, name)


def parse(data: bytes, name: str = "scenario") -> Scenario:
    """The scenario that a file's bytes describe.

    :param name: of the file, for messages.
    :raises UsageError: they describe none. :raises HostError: there is no libpcap for a filter.
    """
    import tomllib

    try:
        top = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as e:  # also a number of thousands of digits
        raise UsageError(f"{name}: {_line(e)}", "write TOML, see docs/scenarios.md") from None
    _keys(name, top, KEYS)
    about = top.get("about", "")
    if not isinstance(about, str):
        raise UsageError(f"{name}: about is no text", "put it in quotes")
    seed = top.get("seed", 1)
    if type(seed) is not int:
        raise UsageError(f"{name}: seed is no number", "use a number from 0 on")
    given = top.get("step", [])
    if not isinstance(given, list) or not given or not all(isinstance(s, dict) for s in given):
        raise UsageError(f"{name}: no steps", "write [[step]] before each")
    steps: list[Step] = []
    for number, table in enumerate(given, 1):
        where = f"{name}, step {number}"
        try:
            steps += _step(where, table)
        except UsageError as e:
            if str(e).startswith(where):
                raise
            raise UsageError(f"{where}: {e.cause}", e.hint) from None
        if len(steps) > STEPS_MAX:
            raise UsageError(f"{name}: too many steps", f"use at most {STEPS_MAX}")
    return Scenario(Path(name).stem, about, seed_of(seed), steps)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _keys(where: str, table: dict[str, Any], known: Sequence[str]) -> None:
    for key in table:
        if key not in known:
            raise UsageError(
                f"{where}: unknown key {key[:40]!r}",
                f"{did_you_mean(key[:40], known)}keys: {', '.join(known)}",
            )


def _texts(where: str, key: str, value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise UsageError(
            f"{where}: {key} is neither a text nor a list of texts", "see the examples"
        )
    return texts


def _whole(where: str, key: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        said = f"{value:#x}" if type(value) is int and abs(value) >> 64 else str(value)
        raise UsageError(f"{where}: {key} = {said[:40]}", f"use {low} to {high}")
    return value


def _duration(where: str, key: str, value: object) -> int:
    if not isinstance(value, str):
        raise UsageError(f"{where}: {key} is no time", f'write {key} = "200ms"')
    return 0 if value in ("0", "0s") else time_of(key, value, DAY)


def _step(where: str, table: dict[str, Any]) -> list[Step]:
    """A table's step, and those that a flapping link makes of it."""
    _keys(where, table, STEP_KEYS)
    if "at" in table and "packets" in table:
        raise UsageError(f"{where}: at and packets", "leave one of them out")
    if not {"faults", "do", "flap"} & set(table):
        raise UsageError(f"{where}: it does nothing", "give it faults, do or flap")
    nic = _whole(where, "nic", table.get("nic", 0), 0, 30)
    at: int | None = None
    packets: int | None = None
    if "packets" in table:
        packets = _whole(where, "packets", table["packets"], 1, PACKETS_MAX)
    else:
        at = _duration(where, "at", table.get("at", "0s"))
    rules = of_text(_texts(where, "faults", table["faults"])) if "faults" in table else None
    acts = _texts(where, "do", table.get("do", []))
    for act in acts:
        if act not in ACTS:
            raise UsageError(
                f"{where}: do = {act[:40]!r}",
                f"{did_you_mean(act[:40], ACTS)}one of {', '.join(ACTS)}",
            )
    steps = [Step(where, nic, at=at, packets=packets, rules=rules, acts=acts)]
    if "flap" in table:
        flap = table["flap"]
        if not isinstance(flap, dict):
            raise UsageError(
                f"{where}: flap is no table", 'write flap = { times = 3, down = "1s" }'
            )
        _keys(where, flap, FLAP_KEYS)
        times = _whole(where, "times", flap.get("times", 1), 1, FLAPS_MAX)
        down = _duration(where, "down", flap.get("down", "200ms"))
        up = _duration(where, "up", flap.get("up", "200ms"))
        for n in range(times):
            steps.append(Step(where, nic, then=up if n else 0, acts=["link-down"]))
            steps.append(Step(where, nic, then=down, acts=["link-up"]))
    return steps


class Player:
    """Plays a scenario, once, in a thread of its own, from the moment when the driver of its first
    step's card is ready.

    :param cards: gives the machine's cards.
    :ivar done: how many steps have been played. :ivar problem: why it has ended before the last of
        them; empty else.
    """

    def __init__(self, scenario: Scenario, cards: Callable[[], Sequence[Faulty]]) -> None:
        scenario.check(cards())
        self.scenario, self._cards = scenario, cards
        self.done, self.problem = 0, ""
        self._stop = threading.Event()
        self.over = threading.Event()
        self._thread = Thread(target=self._run, name="scenario", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as e:
            raise HostError(f"cannot play a scenario: {e}", "raise the limit of processes") from e

    @property
    def finished(self) -> bool:
        """Whether all steps have been played."""
        return self.done == len(self.scenario.steps)

    def halt(self) -> None:
        """No further step is to be played. Never waits."""
        self._stop.set()

    def close(self) -> None:
        """End it, played or not. A second call does nothing."""
        self.halt()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def report(self) -> dict[str, object]:
        """For JSON."""
        return {
            "name": self.scenario.name,
            "seed": self.scenario.seed,
            "steps": len(self.scenario.steps),
            "played": self.done,
            "problem": self.problem,
        }

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._play()
        except PyvmmError as e:
            self.problem = str(e)
        except Exception as e:
            self.problem = f"{type(e).__name__}: {e}"
            report_bug(e)
        finally:
            self.over.set()

    def _card(self, step: Step) -> Faulty:
        for card in self._cards():
            if card.index == step.nic:
                return card
        raise UsageError(f"{step.where}: there is no card {step.nic} any more")

    def _wait(self, seconds: float) -> bool:
        """Whether the scenario is to go on."""
        return not self._stop.wait(max(0.0, seconds))

    def _play(self) -> None:
        first = self.scenario.steps[0]
        while not self._card(first).ready:
            if not self._wait(LOOK_S):
                return
        begin = last = time.monotonic_ns()
        packets = {card.index: _packets(card) for card in self._cards()}
        for step in self.scenario.steps:
            if step.packets is not None:
                while _packets(self._card(step)) - packets.get(step.nic, 0) < step.packets:
                    if not self._wait(LOOK_S):
                        return
            else:
                due = begin + step.at if step.at is not None else last + (step.then or 0)
                if not self._wait((due - time.monotonic_ns()) / 1e9):
                    return
            card = self._card(step)
            if step.rules is not None:
                card.fault(*step.rules, seed=self.scenario.seed if card.seeded else None)
            for act in step.acts:
                card.act(act)
            self.done += 1
            last = time.monotonic_ns()


def _packets(card: Faulty) -> int:
    counters = card.counters()
    return counters.get("rx_packets", 0) + counters.get("tx_packets", 0)
