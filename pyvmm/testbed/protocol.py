"""The frames between a testbed client, the supervisor on the host and the agent in L1.

A frame is ``HEADER`` and its payload. A channel is one command; the supervisor renumbers channels
and otherwise passes frames on. Nothing is ever sent that the receiver has not room for: a sender
starts with a window of credit a channel (``OUT_WINDOW`` towards the client, ``IN_WINDOW`` towards
the command) and spends it by ``DATA``; the receiver returns what it has disposed of by ``CREDIT``.
So no buffer grows without bound and a client that stops reading stops only its own command.

``OPEN`` and ``CONFIG`` carry a marshalled dict (marshal version 2: understood by every Python 3,
and neither needs an import that takes long under emulation); they only travel towards L1. What
comes back from L1 is plain text and numbers.

This file also runs in L1, alone: it imports nothing of pyvmm.
"""

from __future__ import annotations

import struct

VERSION = 1
HEADER = struct.Struct("<IHBB")  # payload bytes, channel, type, stream
#: Largest DATA payload: a frame then fits one write to a virtio-serial port (the kernel takes 32
#: KiB a call).
CHUNK = 32768 - HEADER.size
#: Refuse what claims to be larger: environment and arguments together are at most 6 MiB on Linux.
MAX_PAYLOAD = 8 << 20
OUT_WINDOW = 512 << 10
IN_WINDOW = 64 << 10

# Towards L1.
OPEN = 1  # start a command
CLOSE = 2  # the client has gone: kill the command
SIGNAL = 3  # payload: decimal signal number, to the command's process group
WINDOW = 4  # payload: "rows columns"
CONFIG = 5  # from the supervisor, once, after HELLO
STOP = 6  # to the agent: power off; from a client: stop the testbed
PING = 7
STATUS = 8  # from a client: answer with one NOTE
# Both ways.
DATA = 16
EOF = 17  # stream 0: the command's stdin ends; 1, 2 towards L1: nobody reads that stream any more
CREDIT = 18  # payload: decimal bytes
# From L1 or the supervisor.
HELLO = 32  # the agent runs; wants CONFIG
READY = 33  # payload: notes, one a line
EXIT = 34  # payload: decimal wait status; the last frame of a channel
NOTE = 35  # progress or an answer, UTF-8
ERROR = 36  # UTF-8; the last frame
PONG = 37

STDIN, STDOUT, STDERR, TTY = 0, 1, 2, 3


def frame(kind: int, channel: int = 0, payload: bytes = b"", stream: int = 0) -> bytes:
    """One frame as bytes."""
    return HEADER.pack(len(payload), channel, kind, stream) + payload


class Framer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """The frames completed by ``data``: (type, channel, stream, payload). Raises ValueError on
        a silly length.
        """
        buffer = self._buffer
        buffer += data
        out = []
        at, have = 0, len(buffer)
        while have - at >= 8:
            size, channel, kind, stream = HEADER.unpack_from(buffer, at)
            if size > MAX_PAYLOAD:
                raise ValueError(f"frame of {size} bytes")
            if have - at - 8 < size:
                break
            out.append((kind, channel, stream, bytes(buffer[at + 8 : at + 8 + size])))
            at += 8 + size
        del buffer[:at]
        return out
