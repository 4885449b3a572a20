"""What the terminal can do to which a command prints its result.

NO_COLOR (https://no-color.org) forbids colours, and TERM=dumb all escape sequences. A file or a
pipe gets neither, and lines of any length.
"""

from __future__ import annotations

import os
import sys

#: Clears the screen, and moves to its first line.
CLEAR = "\x1b[H\x1b[2J"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO


def steerable(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that takes escape sequences."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def colours(stream: TextIO) -> bool:
    """Whether text on ``stream`` may have colours."""
    return steerable(stream) and not os.environ.get("NO_COLOR")


def columns(stream: TextIO | None = None) -> int | None:
    """The width of the terminal, or of COLUMNS if that is set; None if ``stream`` (stdout) is no
    terminal: lines may be of any length.
    """
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    try:
        return int(os.environ.get("COLUMNS", "")) or None
    except ValueError:
        pass
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None
