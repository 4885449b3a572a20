"""Faults on demand as traffic control of a tap does them (docs/fault-injection.md): what becomes of
a rule there, and what is refused.
"""

from __future__ import annotations

from pyvmm.errors import UsageError
from pyvmm.faultopt import FRAMES_MAX, OF_NOTIFICATIONS
from pyvmm.hostnet.traffic import WAYS, Shape, microseconds, percent_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.faultopt import FaultRule

#: How long netem has a frame wait that is to go behind others: as long as a worker of ours does at
#: most.
REORDER_NS = 10_000_000
#: netem draws jitter in 32 bits, twice as much as this.
JITTER_MAX_NS = 2_000_000_000
#: Bytes of a frame besides the MTU: the Ethernet header and two VLAN tags.
BESIDES_MTU = 22
REFUSED = {
    **dict.fromkeys(
        OF_NOTIFICATIONS,
        ("kicks and interrupts do not come past pyvmm there", "use --net emulated"),
    ),
    "reorder-used": ("the virtqueues are the kernel's there", "use --net emulated"),
    **dict.fromkeys(("truncate", "keep"), ("tc cuts no frames", "use --net emulated")),
    **dict.fromkeys(
        ("after", "count"),
        ("tc counts no frames", "use --net emulated, or a step of a scenario with packets="),
    ),
    **dict.fromkeys(
        ("from", "until"),
        ("tc has no times", "use --net emulated, or a step of a scenario with at="),
    ),
    "chance": ("tc has no chance for a whole rule", "give the word a chance, such as loss=10%"),
}


def shapes(rules: Sequence[FaultRule], name: str, mtu: int | None = None) -> dict[str, Shape]:
    """What the rules do, by way (``hostnet.traffic.WAYS``).

    :param name: what messages begin with. :param mtu: the tap's, if it is known.
    :raises UsageError: tc cannot do that; the message says why.
    """
    out: dict[str, Shape] = {}
    for rule in rules:
        shape = _shape(rule, name, mtu)
        for bit, way in enumerate(WAYS):
            if rule.ways >> bit & 1:
                if way in out:
                    raise UsageError(
                        f"{name}: two rules for {way}: a tap has one queueing discipline per way",
                        f"write one rule for {way}, or use --net emulated",
                    )
                out[way] = shape
    return out


def _shape(rule: FaultRule, name: str, mtu: int | None) -> Shape:
    words = {word.partition("=")[0]: word for word in rule.words}

    def refuse(word: str, why: str, remedy: str) -> UsageError:
        return UsageError(f"{name}: {words[word]}: {why}", remedy)

    for word in words:
        if word in REFUSED:
            raise refuse(word, *REFUSED[word])
    numbers = {"queue": rule.numbers.get("queue", FRAMES_MAX), "rate": rule.rate}
    for word in ("loss", "duplicate", "reorder", "corrupt"):
        chance = rule.chance(word)
        if chance.every > 1:
            percent = f"{word}={100 / chance.every:.3g}%"
            raise refuse(word, "tc draws lots, and counts no frames", f"write {percent}")
        numbers[word] = (1 << 32) - 1 if chance.every else chance.odds
        if numbers[word] and not float(percent_text(numbers[word])):
            raise refuse(word, "tc takes 0.0000001% at least", "write more, or leave it out")
    for word in ("delay", "jitter"):
        numbers[word] = rule.times.get(word, 0)
        if numbers[word] and not microseconds(numbers[word]):
            raise refuse(word, "tc counts microseconds", "write 1us or more, or leave it out")
    if numbers["jitter"] > JITTER_MAX_NS:
        raise refuse("jitter", "tc takes 2s at most", "write less, or use --net emulated")
    if "reorder" in words:
        other = next((w for w in ("delay", "jitter", "rate") if w in words), "")
        if other:
            raise refuse(
                "reorder", f"tc reorders by a delay, and there is {other}=", "leave one of them out"
            )
        numbers["delay"] = REORDER_NS
        numbers["overtake"] = (1 << 32) - numbers["reorder"]
        if numbers["overtake"] == 1:
            raise refuse("reorder", "all of them would keep their order", "write less than 100%")
    if "burst" in words:
        numbers["burst"] = rule.numbers["burst"]
        other = next(
            (
                w
                for w in ("delay", "jitter", "loss", "duplicate", "reorder", "corrupt")
                if w in words
            ),
            "",
        )
        if other:
            raise refuse(
                "burst", f"tc's token bucket does nothing else, and there is {other}",
                "leave out burst=, or use --net emulated",
            )  # fmt: skip
        if mtu is not None and numbers["burst"] < mtu + BESIDES_MTU:
            raise refuse(
                "burst",
                "tc's token bucket loses each frame that is larger",
                f"write burst={mtu + BESIDES_MTU} or more, or leave it out",
            )
    return Shape({k: n for k, n in numbers.items() if k != "reorder"}, rule.code)
