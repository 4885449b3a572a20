"""Makes numbers and choices of a fuzzer's bytes, from the front on; all are 0 once the bytes are
used up. So a change of one byte changes one choice, and the same bytes are the same run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

#: Values at which code decides.
INTERESTING = (
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x1000,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x100000,
    0x1000000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 32,
    1 << 47,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 4096,
    (1 << 64) - 1,
)


class Data:
    """The bytes of one input."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, most: int) -> bytes:
        """At most so many bytes."""
        found = self._data[self._at : self._at + most]
        self._at += len(found)
        return found

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def number(self, size: int) -> int:
        """A number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def below(self, limit: int) -> int:
        """A number less than ``limit``, which is at least 1."""
        return self.number(1 if limit <= 256 else 2 if limit <= 65536 else 4) % limit

    def one_in(self, count: int) -> bool:
        """Whether a rare case is asked for; never once the bytes are used up."""
        return self.below(count) == count - 1

    def of(self, choices: Sequence[T]) -> T:
        """One of these."""
        return choices[self.below(len(choices))]

    def some(self, most: int) -> bytes:
        """Up to ``most`` bytes, whose number the input says, too."""
        return self.take(self.below(most + 1))

    def value(self, size: int) -> int:
        """A number of so many bytes, often one at which code decides."""
        which = self.below(len(INTERESTING) + 8)
        value = INTERESTING[which] if which < len(INTERESTING) else self.number(size)
        return value & ((1 << 8 * size) - 1)
