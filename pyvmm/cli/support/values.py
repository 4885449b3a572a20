"""Values of options: types for argparse that refuse what makes no sense.

A type raises ``value; remedy``, and ``pyvmm.cli`` puts the option before it, so that the user sees
one line, such as ``--jobs 0; use 1 to 256``.
"""

from __future__ import annotations

from argparse import ArgumentTypeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Bounds from here on are only there so that no arithmetic fails; messages do not name them.
ENDLESS = 1e6


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A type for a time in seconds, ``low`` to ``high``; if ``low`` is 0, it must be more than 0."""
    if high >= ENDLESS:
        remedy = f"use {low:g} seconds or more" if low else "use a positive number of seconds"
    else:
        remedy = f"use {low:g} to {high:g} seconds" if low else f"use up to {high:g} seconds"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ArgumentTypeError(f"invalid float value: {text!r}") from None
        if not low <= value <= high or (not low and not value):  # NaN is not within any bounds
            raise ArgumentTypeError(f"{value:g}; {remedy}")
        return value

    return parse


def count(low: int, high: int) -> Callable[[str], int]:
    """A type for a whole number, ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ArgumentTypeError(f"invalid int value: {text!r}") from None
        if not low <= value <= high:
            raise ArgumentTypeError(f"{value}; use {low} to {high}")
        return value

    return parse


def trouble_kinds(text: str) -> list[str]:
    """A type for ``--fail-on``: what the guest's kernel may report, joined by commas, or ``all``."""
    from pyvmm.testing.console import TROUBLES, parse_kinds

    try:
        return parse_kinds(text)
    except ValueError as e:
        raise ArgumentTypeError(f"{e}; use {', '.join(TROUBLES)} or all") from e
