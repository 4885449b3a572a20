"""The frames between a testbed client, the supervisor on the host and the agent in L1.

A frame is ``HEADER`` and its payload. A channel stands for one command. The supervisor renumbers
channels; apart from that it passes frames on unchanged.

A sender never sends more data than the receiver has room for. Per channel, a sender starts with a
window of credit (``OUT_WINDOW`` towards the client, ``IN_WINDOW`` towards the command). ``DATA``
spends the credit; the receiver returns it by ``CREDIT`` when it has passed the data on. So no
buffer grows without bound, and a client that stops reading stops only its own command.

``OPEN`` and ``CONFIG`` carry a marshalled dict, and only travel towards L1. marshal version 2 is
understood by every Python 3 and needs no import that would be slow under emulation. Frames from L1
carry only text and numbers, because L1 is not trusted.

This file is also copied into L1 and used there alone, so it imports nothing of pyvmm.
"""

from __future__ import annotations

import struct

VERSION = 1
HEADER = struct.Struct("<IHBB")  # payload bytes, channel, type, stream
#: The largest payload of DATA. The whole frame then fits into one write to a virtio-serial port, of
#: which the kernel takes at most 32 KiB.
CHUNK = 32768 - HEADER.size
#: Frames that claim to be larger are refused. On Linux, environment and arguments together take at
#: most 6 MiB.
MAX_PAYLOAD = 8 << 20
OUT_WINDOW = 512 << 10  # bytes
IN_WINDOW = 64 << 10  # bytes

# Towards L1.
OPEN = 1  # start a command
CLOSE = 2  # the client has gone: kill the command
SIGNAL = 3  # payload: a decimal signal number; it is sent to the command's process group
WINDOW = 4  # payload: the terminal's size, "rows columns"
CONFIG = 5  # the supervisor sends it once, after HELLO
STOP = 6  # to the agent: power off; from a client: stop the testbed
PING = 7
STATUS = 8  # from a client, which gets one NOTE as the answer
# Both ways.
DATA = 16
EOF = 17  # stream 0: the command's stdin ends; 1, 2 towards L1: nobody reads that stream any more
CREDIT = 18  # payload: a decimal number of bytes
# From L1 or the supervisor.
HELLO = 32  # the agent runs and wants CONFIG
READY = 33  # payload: notes, one per line
EXIT = 34  # payload: the decimal wait status; the last frame of a channel
NOTE = 35  # payload: progress or an answer, UTF-8
ERROR = 36  # payload: a message, UTF-8; the last frame of a channel
PONG = 37

STDIN, STDOUT, STDERR, TTY = 0, 1, 2, 3


def frame(kind: int, channel: int = 0, payload: bytes = b"", stream: int = 0) -> bytes:
    """A frame as bytes."""
    return HEADER.pack(len(payload), channel, kind, stream) + payload


def number(payload: bytes) -> int:
    """The decimal number of a CREDIT or EXIT.

    :raises ValueError: it is none, or it has more than nine digits.
    """
    if not payload.isdigit() or len(payload) > 9:
        raise ValueError(f"{payload[:20]!r} is no number")
    return int(payload)


class Framer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """The frames that ``data`` completes, each as (type, channel, stream, payload).

        :raises ValueError: a frame claims to be larger than MAX_PAYLOAD.
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
