"""Cuts JSON objects out of a stream of bytes, whatever lies between them and however they arrive.

QMP has no framing but JSON's own: a client may send several objects in one line, or one object in
many lines. The framer looks at brackets and strings only, at each byte once. It limits size and
depth before any parser sees the text.
"""

from __future__ import annotations

import re

INPUT_MAX = 256 << 10  # bytes of one command
NESTING_MAX = 64

_OUTSIDE = re.compile(rb'["\[\]{}]')
_INSIDE = re.compile(rb'["\\]')
_BLANK = b" \t\r\n"


class TooMuch(Exception):
    """A command is too long or too deep, so the framer cannot wait for its end."""


class Framer:
    """Cuts a stream into the texts of JSON values; ``garbage`` counts lines that cannot begin a
    value.
    """

    def __init__(self) -> None:
        self._buf = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._at = 0  # the bytes before have been looked at
        self._depth = 0
        self._string = False
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """Add bytes. The values that are complete now; None for each run of bytes that cannot begin
        a value.

        A byte 0xFF, which no text contains, drops an incomplete value, as in QEMU's parser.

        :raises TooMuch: the framer cannot be used any more.
        """
        out: list[bytes | None] = []
        for i, part in enumerate(data.split(b"\xff")):
            if i and (self._buf or self._skipping):
                self._buf.clear()
                self._reset()
                out.append(None)
            self._buf += part
            self._cut(out)
        return out

    def _cut(self, out: list[bytes | None]) -> None:
        buf = self._buf
        while True:
            if not self._depth:
                if self._skipping or not self._begin(out):
                    end = buf.find(b"\n")
                    self._skipping = end < 0
                    del buf[: end + 1 if end >= 0 else len(buf)]
                    if end >= 0:
                        continue
                    return
                if not buf:
                    return
            if not self._walk():
                if len(buf) > INPUT_MAX:
                    raise TooMuch(f"a command of more than {INPUT_MAX} bytes")
                return
            if self._at > INPUT_MAX:
                raise TooMuch(f"a command of more than {INPUT_MAX} bytes")
            out.append(bytes(buf[: self._at]))
            del buf[: self._at]
            self._at = 0

    def _begin(self, out: list[bytes | None]) -> bool:
        """Drop blanks; False if no object or array comes next (garbage is noted in ``out``)."""
        buf = self._buf
        at = 0
        while at < len(buf) and buf[at] in _BLANK:
            at += 1
        del buf[:at]
        if buf and buf[0] not in b"{[":
            out.append(None)
            return False
        return True

    def _walk(self) -> bool:
        """Go on to the end of the value; whether the end has arrived."""
        buf = self._buf
        while self._at < len(buf):
            found = (_INSIDE if self._string else _OUTSIDE).search(buf, self._at)
            if found is None:
                self._at = len(buf)
                return False
            byte = found[0]
            self._at = found.end()
            if byte == b"\\":
                if self._at == len(buf):
                    self._at -= 1  # the character after the backslash has not arrived yet
                    return False
                self._at += 1
            elif byte == b'"':
                self._string = not self._string
            elif byte in b"[{":
                self._depth += 1
                if self._depth > NESTING_MAX:
                    raise TooMuch(f"a command nested more than {NESTING_MAX} deep")
            else:
                self._depth -= 1
                if not self._depth:
                    return True
        return False
