"""How users describe faults on demand (docs/fault-injection.md): rules of words, such as
``rx loss=10%`` or ``tx delay=20ms jitter=5ms filter='tcp port 80'``.
"""

from __future__ import annotations

import os

from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

#: PV_IMPAIR_RULES and PV_IMPAIR_BLOCKS of cext/impair.h.
RULES_MAX, FRAMES_MAX = 16, 4096
SEED_MAX = 2**64 - 1
#: A word that begins a rule -> the ways that the rule is for: bit 0 receive, bit 1 transmit.
WAYS = {"rx": 1, "tx": 2, "both": 3}
#: Words that may have a chance, P% or 1/N; without one, the thing always happens.
CHANCES = ("loss", "duplicate", "reorder", "corrupt", "truncate", "reorder-used", "extra-irq",
           "chance")  # fmt: skip
#: Seconds, and the most that each word takes.
TIMES = {
    "delay": 60.0,
    "jitter": 60.0,
    "hold-irq": 60.0,
    "hold-kick": 60.0,
    "from": 1e6,
    "until": 1e6,
}
#: Lowest and highest number.
NUMBERS = {
    "after": (1, 2**63 - 1),
    "count": (1, 2**63 - 1),
    "queue": (1, FRAMES_MAX),
    "burst": (1, 16 << 20),
    "keep": (0, 65535),
}
#: Words that only say how another one of the rule is meant.
OF_OTHERS = {"burst": "rate", "keep": "truncate"}
#: What is done to frames; to kicks and interrupts, and, as it is no frame either, to used entries.
OF_FRAMES = ("loss", "duplicate", "reorder", "corrupt", "truncate", "delay", "jitter", "rate")
OF_NOTIFICATIONS = ("hold-irq", "hold-kick", "extra-irq", "reorder-used")
WORDS = (*OF_FRAMES, *OF_OTHERS, "queue", *OF_NOTIFICATIONS, "chance", "after", "count", "from",
         "until", "filter")  # fmt: skip
#: What a card can do once, on any data path: word -> what it is.
ACTS = {
    "needs-reset": "set DEVICE_NEEDS_RESET, and raise the configuration interrupt",
    "config-interrupt": "raise the configuration interrupt although nothing has changed",
    "interrupt": "raise the interrupt of each virtqueue although nothing was used",
    "kick": "have the device look at each virtqueue although nobody has kicked",
    "link-down": "pull the cable",
    "link-up": "plug the cable in",
}
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
#: Bits per second.
RATES = {"gbit": 10**9, "mbit": 10**6, "kbit": 10**3, "bit": 1}
RATE_MIN, RATE_MAX = 1000, 10**12
SEE = "see docs/fault-injection.md"


class Chance:
    """Whether something happens. :ivar odds: of 2^32, looked at if ``every`` is 0.
    :ivar every: each nth time.
    """

    __slots__ = ("every", "odds")

    def __init__(self, odds: int = 0, every: int = 0) -> None:
        self.odds, self.every = odds, every

    @property
    def share(self) -> float:
        """How often it happens, 0 to 1."""
        return 1 / self.every if self.every else self.odds / 2**32


ALWAYS, NEVER = Chance(every=1), Chance()


class FaultRule:
    """One rule; immutable by convention.

    :ivar words: the rule as it is written, without its filter.
    :ivar ways: bit 0 receive, bit 1 transmit, as the guest sees them.
    :ivar chances: by the word; ``chance`` is that of the rule. :ivar times: by the word, in
        nanoseconds. :ivar numbers: by the word.
    :ivar rate: bits per second; 0: no limit.
    :ivar code: instructions of ``capture.bpf``; empty: all frames. :ivar expression: their text.
    """

    __slots__ = ("chances", "code", "expression", "numbers", "rate", "times", "ways", "words")

    def __init__(self, words: Sequence[str], code: bytes | None = None) -> None:
        """:param code: in the place of a filter that is to be compiled.
        :raises UsageError: the words are no rule. :raises HostError: there is no libpcap.
        """
        self.words = [word for word in words if not word.startswith("filter=")]
        self.ways, self.rate = 3, 0
        self.chances: dict[str, Chance] = {}
        self.times: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        self.code, self.expression = b"", ""
        seen = set()
        for at, word in enumerate(words):
            key, equals, value = word.partition("=")
            if at == 0 and key in WAYS and not equals:
                self.ways = WAYS[key]
                continue
            if key not in WORDS:
                raise UsageError(
                    f"fault: unknown word {word!r}",
                    f"{did_you_mean(key, WORDS)}words: {', '.join((*WAYS, *WORDS))}",
                )
            if key in seen:
                raise UsageError(f"fault: {key} is given twice in a rule", "begin a rule by rx, tx")
            seen.add(key)
            if not value and (equals or key not in CHANCES):
                raise UsageError(f"fault: {word}", f"give it a value, as {key}={_example(key)}")
            self._take(key, value)
        if code is not None:
            self.code = code
        self._check(seen)

    def _take(self, key: str, value: str) -> None:
        if key in CHANCES:
            self.chances[key] = _chance(key, value) if value else ALWAYS
        elif key in TIMES:
            self.times[key] = time_of(key, value, TIMES[key])
        elif key in NUMBERS:
            self.numbers[key] = _number(key, value)
        elif key == "rate":
            self.rate = _rate(value)
        else:
            from pyvmm.capture.bpf import compile_filter

            self.code, self.expression = compile_filter(value, 1 << 18, "fault"), value

    def _check(self, seen: set[str]) -> None:
        frames, notifications = seen & set(OF_FRAMES), seen & set(OF_NOTIFICATIONS)
        text = " ".join(self.words)
        if not frames and not notifications:
            raise UsageError(
                f"fault: the rule {text!r} does nothing",
                f"add one of {', '.join((*OF_FRAMES, *OF_NOTIFICATIONS))}",
            )
        if frames and notifications:
            raise UsageError(
                f"fault: {sorted(frames)[0]} and {sorted(notifications)[0]} in one rule",
                "write two rules, each with rx, tx or both in front",
            )
        if notifications and (self.code or seen & {"filter", "queue", *OF_OTHERS}):
            raise UsageError(
                f"fault: {text!r}: filter=, queue=, burst= and keep= are for frames",
                "leave them out",
            )
        for word, other in OF_OTHERS.items():
            if word in seen and other not in seen:
                raise UsageError(
                    f"fault: {text!r}: {word}= without {other}",
                    f"give it too, as {other}={_example(other)}",
                )
        if 0 < self.times.get("until", 0) <= self.times.get("from", 0):
            raise UsageError(f"fault: {text!r}: it ends before it begins", "give a later until=")

    @property
    def frames(self) -> bool:
        """Whether it is about frames; else about kicks, interrupts and used entries."""
        return not any(word.partition("=")[0] in OF_NOTIFICATIONS for word in self.words)

    def chance(self, word: str) -> Chance:
        """Whether something is to happen; that of the rule itself is ``chance``."""
        return self.chances.get(word, ALWAYS if word == "chance" else NEVER)

    def __str__(self) -> str:
        own = [f"filter='{self.expression}'"] if self.expression else []
        return " ".join([*self.words, *own])

    def wire(self) -> dict[str, object]:
        """The rule for JSON (``of_wire``): with instructions in the place of its expression."""
        from pyvmm.capture.bpf import rows

        out: dict[str, object] = {"words": self.words}
        if self.code:
            out |= {"filter": rows(self.code), "expression": self.expression}
        return out


def _example(key: str) -> str:
    if key in CHANCES:
        return "10%"
    if key in TIMES:
        return "20ms"
    return {"rate": "10mbit", "filter": "arp"}.get(key, "100")


def _decimal(text: str) -> float | None:
    """A number without sign and exponent; None if it is none."""
    whole, _, rest = text.partition(".")
    digits = whole + rest
    if not (whole and text.isascii() and digits.isdecimal() and len(text) <= 20):
        return None
    return float(text)


def _chance(key: str, value: str) -> Chance:
    if value.endswith("%"):
        share = _decimal(value[:-1])
        if share is not None and 0 < share <= 100:
            return ALWAYS if share == 100 else Chance(odds=max(1, int(share / 100 * 2**32)))
    one, slash, every = value.partition("/")
    good = every.isascii() and every.isdecimal() and len(every) <= 9
    if slash and one == "1" and good and int(every):
        return Chance(every=int(every))
    raise UsageError(f"fault: {key}={value}", f"write {key}=10% or {key}=1/100 (each 100th)")


def time_of(key: str, value: str, limit: float) -> int:
    """Nanoseconds of a time such as ``20ms``.

    :param limit: the most, in seconds. :raises UsageError: it is no time, or more.
    """
    digits = value[:40].rstrip("munsec")
    number, unit = _decimal(digits), UNITS.get(value[len(digits) :])
    if number is None or unit is None or not 0 < number * unit <= limit:
        raise UsageError(
            f"fault: {key}={value[:40]}", f"write a time up to {limit:g}s, as 1.5s, 20ms or 300us"
        )
    return max(1, round(number * unit * 1e9))


def _number(key: str, value: str) -> int:
    low, high = NUMBERS[key]
    good = value.isascii() and value.isdecimal() and len(value) <= 19
    if not good or not low <= int(value) <= high:
        raise UsageError(f"fault: {key}={value}", f"use {low} to {high}")
    return int(value)


def _rate(value: str) -> int:
    for unit, bits in RATES.items():
        if value.endswith(unit):
            number = _decimal(value[: -len(unit)])
            if number is not None and RATE_MIN <= number * bits <= RATE_MAX:
                return int(number * bits)
            break
    raise UsageError(f"fault: rate={value}", "write 1kbit to 1000gbit, as rate=10mbit")


def of_words(words: Iterable[str]) -> list[FaultRule]:
    """The rules of words in order; ``rx``, ``tx`` and ``both`` begin a new rule.

    :raises UsageError: they are none, or too many.
    """
    rules: list[list[str]] = []
    for word in words:
        if word in WAYS or not rules:
            rules.append([])
        rules[-1].append(word)
    return check([FaultRule(rule) for rule in rules])


def check_acts(words: Sequence[str]) -> None:
    """:raises UsageError: one of the words is none of ``ACTS``."""
    for word in words:
        if word not in ACTS:
            raise UsageError(
                f"fault: {word[:40]!r} is nothing that a card does",
                f"{did_you_mean(word[:40], ACTS)}one of {', '.join(ACTS)}",
            )


def check(rules: list[FaultRule]) -> list[FaultRule]:
    """The rules. :raises UsageError: they are too many."""
    if len(rules) > RULES_MAX:
        raise UsageError(f"fault: {len(rules)} rules", f"use at most {RULES_MAX}")
    return rules


def of_option(text: str) -> list[FaultRule]:
    """The rules of ``--net ...,fault=``: words joined by "+"."""
    return of_words(filter(None, text.split("+")))


def of_text(texts: Iterable[str]) -> list[FaultRule]:
    """The rules of texts, which have words as a shell has them.

    :raises UsageError: they are none, or too many.
    """
    import shlex

    words: list[str] = []
    for text in texts:
        try:
            found = shlex.split(text)
        except ValueError as e:
            raise UsageError(f"fault: {text!r}: {e}", SEE) from None
        if found and found[0] not in WAYS:
            words.append("both")
        words += found
    return of_words(words)


def of_wire(given: Sequence[Any]) -> list[FaultRule]:
    """The rules of ``FaultRule.wire``. A filter is never compiled here.

    :raises UsageError: they are none.
    """
    from pyvmm.capture.bpf import check_expression, of_rows

    rules = []
    for item in given:
        words = item.get("words") if isinstance(item, dict) else None
        if (
            not isinstance(words, list)
            or not all(isinstance(w, str) and len(w) < 100 for w in words)
            or any(w.startswith("filter") or (w in WAYS and at) for at, w in enumerate(words))
        ):
            raise UsageError(f"fault: {str(item)[:100]} is no rule", SEE)
        code = None
        if "filter" in item:
            if not isinstance(item["filter"], list):
                raise UsageError("fault: a filter is a list of rows", SEE)
            code = of_rows(item["filter"])
        rule = FaultRule(words, code)
        expression = item.get("expression", "")
        if not isinstance(expression, str):
            raise UsageError("fault: an expression is a text", SEE)
        rule.expression = check_expression(expression) if code else ""
        rules.append(rule)
    return check(rules)


def seed_of(given: int | str | None) -> int:
    """A seed, or a random one for None. :raises UsageError: it is none."""
    if given is None:
        return int.from_bytes(os.urandom(4), "little")
    text = str(given)
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= SEED_MAX):
        raise UsageError(f"fault: seed {given}", f"use 0 to {SEED_MAX}")
    return int(text)


def total(counters: Mapping[str, int], deed: str) -> int:
    """How often something was done, both ways: of ``counters`` with ``rx_fault_*``."""
    return sum(counters.get(f"{way}_fault_{deed}", 0) for way in ("rx", "tx"))
