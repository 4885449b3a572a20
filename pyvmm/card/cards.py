"""The machine's cards: which are there now."""

from __future__ import annotations

from collections.abc import Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TypeVar

    from pyvmm.card.card import Card

    T = TypeVar("T", bound=Card)


class Cards(Sequence["T"]):
    """The cards in the order of their numbers. Any thread may look while a card comes or goes: an
    iteration goes over the cards that were there when it began.
    """

    def __init__(self) -> None:
        self._now: tuple[T, ...] = ()

    def add(self, card: T) -> None:
        """A card has come. The caller holds the I/O lock."""
        self._now = tuple(sorted((*self._now, card), key=lambda n: n.index))

    def remove(self, card: T) -> None:
        """A card has gone. The caller holds the I/O lock."""
        self._now = tuple(n for n in self._now if n is not card)

    def __iter__(self) -> Iterator[T]:
        return iter(self._now)

    def __len__(self) -> int:
        return len(self._now)

    def __getitem__(self, at: Any) -> Any:
        return self._now[at]
