"""What the process of a cell says of its guest, besides the verdict, and how the command checks it:
the guest may have taken that process over.
"""

from __future__ import annotations

import re

from pyvmm.testing import answer
from pyvmm.testing.answer import BadAnswer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Figures of a cell, from the moment at which its guest is ready (docs/budgets.md).
COUNTED = (
    "user_exits",
    "notify",
    "kvm_exits",
    "irq_injections",
    "packets",
    "bytes",
    "kicks",
    "interrupts",
)
OUTPUT_MAX = 4000  # characters of a command's output that are kept
CONSOLE_LINES = 30  # lines of the console that are kept of a cell that did not pass
#: The most names of features, phases and notes.
NAMES_MAX = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a cell in what its process has sent, in lines without control characters.

    :raises BadAnswer: there is another field, or a field has another shape.
    """
    for name in found:
        if name not in FIELDS:
            raise BadAnswer("an unknown field")
    return {name: FIELDS[name](value) for name, value in found.items()}


def _figure(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswer("a figure that is none")
    return answer.figure(value)


def _count(value: object) -> float | None:
    return None if value is None else _figure(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise BadAnswer("a text that is none")
    return value[:OUTPUT_MAX]


def _line(value: object) -> str:
    return answer.line(_text(value))


def _list(value: object, most: int) -> list[object]:
    if not isinstance(value, list) or len(value) > most:
        raise BadAnswer("a list that is none, or too long")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise BadAnswer("a name that is none")
    return value


def _names(value: object) -> list[str]:
    return [_name(one) for one in _list(value, NAMES_MAX)]


def _notes(value: object) -> list[str]:
    return [_line(one) for one in _list(value, NAMES_MAX)]


def _console(value: object) -> list[str]:
    return [_line(one) for one in _list(value, CONSOLE_LINES)]


def _phases(value: object) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > NAMES_MAX:
        raise BadAnswer("phases that are none")
    return {_name(name): _figure(at) for name, at in value.items()}


def _command(value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != {"status", "stdout", "stderr"}:
        raise BadAnswer("a command that is none")
    output = {name: _text(value[name]) for name in ("stdout", "stderr")}
    return {"status": _figure(value["status"]), **output}


#: Field of a cell (docs/matrix.md) -> a function that checks and returns it.
FIELDS: dict[str, Callable[[object], Any]] = {
    "sandbox": _line,
    "to_guest_mbit": _figure,
    "from_guest_mbit": _figure,
    **dict.fromkeys(COUNTED, _count),
    "command": _command,
    "phases_s": _phases,
    "notes": _notes,
    "negotiated": _names,
    "offered": _names,
    "console": _console,
}
