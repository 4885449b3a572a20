"""What the process of a boot says (``boot.Boot``), as bytes, and how the command checks it: the
guest may have taken that process over.
"""

from __future__ import annotations

import json
from collections import deque

import jsonschema

from pyvmm.compare import schema
from pyvmm.compare.boot import BOOTED, DONE, MADE, SAID, WORKLOAD
from pyvmm.errors import (
    HostError,
    ImageError,
    KvmForbidden,
    KvmMissing,
    KvmUnsuitable,
    MemoryShort,
    NetError,
    PyvmmError,
    SandboxError,
    UsageError,
    VhostMissing,
    VhostUserError,
)
from pyvmm.testing import answer
from pyvmm.testing.answer import BadAnswer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

#: Errors that every other mode would meet, too.
FOR_ALL = (
    *(KvmMissing, KvmForbidden, KvmUnsuitable),
    *(ImageError, MemoryShort, UsageError, SandboxError),
)
#: Errors that the next repeat of the same mode would meet, too.
FOR_MODE = (VhostMissing, NetError, VhostUserError)
KINDS: dict[str, type[PyvmmError]] = {kind.__name__: kind for kind in (*FOR_ALL, *FOR_MODE)}
#: The boot has failed; in the place of ``DONE``.
FAILED = "failed"
#: Each message has its length before it, in bytes; the most bytes of one; the most lines of
#: progress.
LENGTH, MESSAGE_MAX, SAID_MAX = 4, answer.REPORT_MAX, 16


def encode(kind: str, value: object) -> bytes:
    """A message for ``Reader``."""
    data = json.dumps({kind: value}).encode()
    return len(data).to_bytes(LENGTH, "big") + data


def encode_error(error: BaseException) -> bytes:
    """The message that the boot has failed."""
    names = (kind.__name__ for kind in type(error).__mro__)
    name = next((name for name in names if name in KINDS), HostError.__name__)
    texts = (str(error), "")
    if isinstance(error, PyvmmError):
        texts = (error.cause, error.hint)
    return encode(FAILED, [name, *map(answer.line, texts)])


class Reader:
    """Takes the messages of one boot from the bytes, as they come.

    :param workloads: of the boot, in their order.
    :param take: called with each message but ``FAILED``, once it is checked: one of each kind, in
        the order of ``boot``, in lines without control characters.
    :ivar made: whether the guest has been made. :ivar done: whether ``DONE`` has come.
    :ivar error: the error of ``FAILED``; one of ``FOR_ALL`` only if the guest has not been made.
    :ivar bad: why what has come is none of that; nothing is taken any more.
    """

    def __init__(self, workloads: Sequence[str], take: Callable[[str, Any], None]) -> None:
        self._take = take
        self._turns = deque([MADE, BOOTED, *(f"{WORKLOAD} {name}" for name in workloads), DONE])
        self._data = bytearray()
        self._said = 0
        self.error: PyvmmError | None = None
        self.bad: BadAnswer | None = None

    @property
    def made(self) -> bool:
        """See above."""
        return self.done or self._turns[0] != MADE

    @property
    def done(self) -> bool:
        """See above."""
        return not self._turns

    def feed(self, data: bytes) -> None:
        """Take the next bytes; raises nothing of its own."""
        if self.bad is not None:
            return
        self._data += data
        try:
            while len(self._data) >= LENGTH:
                end = LENGTH + int.from_bytes(self._data[:LENGTH], "big")
                if end > LENGTH + MESSAGE_MAX:
                    raise BadAnswer(f"a message of more than {MESSAGE_MAX >> 10} KiB")
                if len(self._data) < end:
                    return
                message = bytes(self._data[LENGTH:end])
                del self._data[:end]
                self._read(message)
        except BadAnswer as e:
            self.bad = e

    def _read(self, message: bytes) -> None:
        found = answer.parsed(message)
        if len(found) != 1:
            raise BadAnswer("a message that is none")
        ((kind, value),) = found.items()
        if self.done or self.error is not None:
            raise BadAnswer("more than a boot")
        if kind == FAILED:
            self.error = self._error(value)
            return
        value = _checked(kind, value)
        if kind == SAID:
            self._said += 1
            if self._said > SAID_MAX or not self.made:
                raise BadAnswer("too many lines")
        else:
            turn = f"{WORKLOAD} {value['name']}" if kind == WORKLOAD else kind
            if turn != self._turns[0]:
                raise BadAnswer(f"{kind!r} out of turn")
            self._turns.popleft()
        self._take(kind, value)

    def _error(self, value: object) -> PyvmmError:
        texts = _checked(FAILED, value)
        kind = KINDS.get(texts[0], HostError)
        if self.made and issubclass(kind, FOR_ALL):
            kind = HostError  # it cannot be about this host any more
        return kind(*texts[1:])


def _checked(kind: str, value: object) -> Any:
    """The value of a message, of its shape, in lines, and with figures that can be computed with.

    :raises BadAnswer: it has another shape.
    """
    if kind not in SHAPES:
        raise BadAnswer("an unknown message")
    value = _plain(value)
    if not SHAPES[kind].is_valid(value):
        raise BadAnswer(f"{kind!r} of another shape")
    return value


def _plain(value: object) -> object:
    if isinstance(value, str):
        return answer.line(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return answer.figure(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    assert isinstance(value, dict)
    return {answer.line(name): _plain(one) for name, one in value.items()}


def _shapes() -> dict[str, jsonschema.Draft202012Validator]:
    """Message -> what its value is: as in the document, and nothing besides."""
    whole = schema.schema()
    run, mode = (whole["properties"][name]["items"]["properties"] for name in ("runs", "modes"))
    booted = {
        "boot_s": {**run["boot_s"], "type": "number"},
        **{name: mode[name] for name in ("version", "offered", "negotiated")},
    }
    text = {"type": "string"}
    shapes = {
        MADE: text,
        BOOTED: {"type": "object", "required": list(booted), "properties": booted},
        SAID: text,
        WORKLOAD: whole["$defs"]["workload"],
        DONE: {"type": "null"},
        FAILED: {"type": "array", "minItems": 3, "maxItems": 3, "items": text},
    }
    return {kind: jsonschema.Draft202012Validator(_closed(s)) for kind, s in shapes.items()}


def _closed(part: Any) -> Any:
    """A part of a schema, without fields that it does not name."""
    if isinstance(part, list):
        return [_closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    out = {name: _closed(one) for name, one in part.items()}
    if isinstance(part.get("properties"), dict) and part.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


SHAPES = _shapes()
