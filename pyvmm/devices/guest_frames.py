"""Frames, in which the streams of commands in the guest travel, and the description of a command
(``guest/pyvmm_port.h``). Both the machine and a client of its control socket need them.
"""

from __future__ import annotations

import os
import struct

from pyvmm.errors import UsageError
from pyvmm.spec.platform import CHANNEL_PAGES, FRAME_OPEN, FRAME_START

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

FRAME = struct.Struct("<III")  # struct pyvmm_frame: type, session, bytes of the payload
TWO = struct.Struct("<II")
PAGE = 4096
CHANNEL_SIZE = CHANNEL_PAGES * PAGE
FRAME_MAX = CHANNEL_SIZE - FRAME.size  # bytes of one payload
#: What execve(2) takes: the bytes of one argument with its NUL (MAX_ARG_STRLEN), and of all of them
#: with their pointers: a quarter of the stack's limit of 8 MiB (ARG_MAX), less the environment's.
ARGUMENT_MAX = 128 << 10
COMMAND_MAX = (2 << 20) - (16 << 10)


class BadFrame(Exception):
    """One end of a session has broken the protocol."""


def frame(kind: int, payload: bytes | bytearray = b"", session: int = 0) -> bytes:
    """The bytes of a frame."""
    return FRAME.pack(kind, session, len(payload)) + payload


def parse(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, session and payload of each frame in what the guest has handed over, up to the first
    one that is not whole.
    """
    at = 0
    while at + FRAME.size <= len(data):
        kind, session, size = FRAME.unpack_from(data, at)
        at += FRAME.size
        if size > len(data) - at:
            return
        yield kind, session, data[at : at + size]
        at += size


class Framer:
    """Cuts frames out of the stream of bytes of a control connection."""

    def __init__(self) -> None:
        self._buf = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Add bytes; returns type and payload of the frames that are complete now.

        :raises BadFrame: a frame is too long.
        """
        self._buf += data
        found = []
        while len(self._buf) >= FRAME.size:
            kind, _, size = FRAME.unpack_from(self._buf)
            if size > FRAME_MAX:
                raise BadFrame(f"a frame of {size} bytes")
            end = FRAME.size + size
            if len(self._buf) < end:
                break
            found.append((kind, bytes(self._buf[FRAME.size : end])))
            del self._buf[:end]
        return found


def command_bytes(command: Sequence[str]) -> bytes:
    """A command as init takes it: a NUL ends each argument.

    :raises UsageError: the guest could not run it with these arguments.
    """
    args = [os.fsencode(arg) for arg in command]
    for arg in args:
        if b"\0" in arg:
            raise UsageError(f"COMMAND has a NUL in its argument {arg[:40]!r}", "leave it out")
        if len(arg) >= ARGUMENT_MAX:
            raise UsageError(
                f"COMMAND has an argument of {len(arg)} bytes, more than {ARGUMENT_MAX - 1}",
                "put it into a file of the initrd",
            )
    raw = b"".join(arg + b"\0" for arg in args)
    if len(raw) + 8 * len(args) > COMMAND_MAX:
        raise UsageError(
            f"COMMAND has {len(args)} arguments with {len(raw)} bytes, more than Linux can start",
            "put them into a file of the initrd",
        )
    return raw


def describe(
    command: Sequence[str],
    *,
    input: bool = False,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    terminal: tuple[int, int] | None = None,
) -> bytes:
    """The description of a session for init.

    :param command: an argv; empty for the user's shell. :param input: whether input will come.
    :param user: ``NAME[:GROUP]``, names or numbers of the guest; root by default.
    :param cwd: the working directory; by default the home of ``user``, or that of the guest's
        own command.
    :param terminal: columns and rows; without it, the streams are pipes.
    :raises UsageError: the guest could not run it so.
    """
    command_bytes(command)
    parts = ["a" + arg for arg in command]
    for name, value in (env or {}).items():
        if not name or "=" in name:
            raise UsageError(f"{name!r} is no name for a variable", "use NAME=VALUE")
        parts.append(f"e{name}={value}")
    parts += [f"u{user}"] if user is not None else []
    parts += [f"d{cwd}"] if cwd is not None else []
    parts += [f"t{terminal[0]}x{terminal[1]}"] if terminal is not None else []
    parts += ["i"] if input else []
    for part in parts:
        if "\0" in part:
            raise UsageError(f"{part[1:41]!r} has a NUL", "leave it out")
    return b"".join(os.fsencode(part) + b"\0" for part in parts)


def send_description(send: Callable[[int, bytes], object], description: bytes) -> None:
    """Send the frames that start a command."""
    for at in range(0, len(description), FRAME_MAX):
        send(FRAME_OPEN, description[at : at + FRAME_MAX])
    send(FRAME_START, b"")
