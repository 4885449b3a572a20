"""Scenario files, rules of faults on demand from the command line and from JSON, and what becomes
of a rule in the words of tc, which is run as root.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pyvmm.errors import PyvmmError, UsageError
from pyvmm.faultopt import ACTS, RULES_MAX, WAYS, WORDS, FaultRule, of_text, of_wire
from pyvmm.faulttc import shapes
from pyvmm.hostnet.traffic import Shape
from pyvmm.scenario import STEPS_MAX, library, parse
from tests.fuzz.data import Data

if TYPE_CHECKING:
    from collections.abc import Callable

VALUES = (
    *("", "10%", "100%", "0.000001%", "1/1", "1/999999999", "1/0", "20ms", "60s", "3us", "0s"),
    *("1e9s", "10mbit", "1gbit", "1600", "4096", "99999999999999999999", "arp", "'a b'", "\u0663"),
)
PIECES = (
    *("[[step]]\n", 'at = "1s"\n', 'at = "20ms"\n', "packets = 3\n", "nic = 1\n", "seed = 7\n"),
    *("flap = { times = 2 }\n", 'flap = { down = "1s", up = 3 }\n', 'do = "kick"\n', "step = 1\n"),
    *('about = "x"\n', "faults = []\n", "flap = 1\n", "at = 1\n", "nic = -1\n", "do = [3]\n"),
    *("seed = 99999999999999999999999\n", "packets = 0x7fffffffffffffff\n", "[step]\n"),
)
QDISC = re.compile(r"[a-z]+( [a-z0-9.%]+)+")


def rule_text(d: Data) -> str:
    words = [d.of(tuple(WAYS))] if d.one_in(2) else []
    for _ in range(1 + d.below(4)):
        word, value = d.of(WORDS), d.of(VALUES)
        words.append(f"{word}={value}" if value or d.one_in(8) else word)
    return " ".join(words)


def file(d: Data) -> bytes:
    """What looks like a scenario, or one of the library with something else in the middle."""
    if d.one_in(3):
        names = sorted(library().values())
        with open(d.of(tuple(names)), "rb") as f:
            text = f.read()
        at = d.below(len(text) + 1)
        return text[:at] + d.some(40) + text[at + d.below(8) :]
    lines: list[str] = []
    while d.left and len(lines) < 60:
        kind = d.below(4)
        if kind == 0:
            lines.append(f"faults = {json.dumps([rule_text(d) for _ in range(1 + d.below(3))])}\n")
        elif kind == 1:
            lines.append(f"do = {json.dumps(d.of(tuple(ACTS)))}\n")
        else:
            lines.append(d.of(PIECES))
    return "".join(lines).encode()


def look(rules: list[FaultRule]) -> None:
    """What holds of all rules, wherever they come from."""
    assert 0 <= len(rules) <= RULES_MAX
    for rule in rules:
        assert rule.ways in (1, 2, 3) and "\n" not in " ".join(rule.words)
    back = of_wire(json.loads(json.dumps([rule.wire() for rule in rules])))
    assert [str(rule) for rule in back] == [str(rule) for rule in rules]
    try:
        found = shapes(rules, "x", 1500)
    except UsageError as e:
        assert "\n" not in str(e)
        return
    for shape in found.values():
        assert QDISC.fullmatch(" ".join(shape.qdisc())), shape.qdisc()
        again = Shape.of_word(shape.word())
        assert (again.numbers, again.code) == (shape.numbers, shape.code)
        assert all(n >= 0 for n in shape.numbers.values())


def make(argument: str) -> Callable[[bytes], None]:
    """What runs one input."""

    def one(data: bytes) -> None:
        d = Data(data)
        kind = d.below(4)
        try:
            if kind == 0:
                look(of_text([rule_text(d) for _ in range(1 + d.below(3))]))
            elif kind == 1:
                text = d.rest().decode(errors="replace")
                look(of_text([text]))
            else:
                scenario = parse(d.rest() if kind == 2 else file(d), "x")
                assert 0 < len(scenario.steps) <= STEPS_MAX
                for step in scenario.steps:
                    assert 0 <= step.nic <= 30
                    look(list(step.rules or ()))
        except PyvmmError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000, str(e)

    return one
