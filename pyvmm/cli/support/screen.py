"""What the terminal can do to which a command prints its result.

NO_COLOR (https://no-color.org) forbids colours, and TERM=dumb all escape sequences. A file or a
pipe gets neither, and lines of any length. A live view, such as ``pyvmm top``, has the whole
terminal.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TextIO

#: CLEAR clears the screen and moves to its first line; HIDE shows the alternate screen without a
#: cursor.
CLEAR, HIDE, SHOW = "\x1b[H\x1b[2J", "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
ROWS = 24  # for a terminal that does not tell its height


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


class Screen:
    """The terminal while a live view has it: without line editing, on its alternate screen. If the
    output is not live, this only waits.
    """

    def __init__(self, live: bool) -> None:
        self.live = live
        self._modes: list[Any] | None = None

    def __enter__(self) -> Screen:
        if self.live:
            import termios

            if sys.stdin.isatty():
                self._modes = termios.tcgetattr(0)
                modes = termios.tcgetattr(0)
                modes[3] &= ~(termios.ICANON | termios.ECHO)
                termios.tcsetattr(0, termios.TCSANOW, modes)
            sys.stdout.write(HIDE)
            sys.stdout.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            sys.stdout.write(SHOW)
            sys.stdout.flush()
        if self._modes is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self._modes)

    def wait(self, seconds: float) -> bool:
        """Wait; returns True as soon as the user wants to leave."""
        until = time.monotonic() + seconds
        if self._modes is None:
            time.sleep(seconds)
            return False
        import select

        while (left := until - time.monotonic()) > 0:
            if select.select([0], [], [], left)[0]:
                key = os.read(0, 64)
                if not key or b"q" in key:
                    return True
        return False

    def draw(self, lines: list[str]) -> None:
        """Show these lines in the place of those before, cut at the terminal's right edge."""
        columns = self.size()[0]
        sys.stdout.write(CLEAR + "\n".join(line[:columns] for line in lines))
        sys.stdout.flush()

    @staticmethod
    def size() -> tuple[int, int]:
        """Columns and rows of the terminal now."""
        try:
            size = os.get_terminal_size(1)
        except OSError:
            return 80, ROWS
        return size.columns or 80, size.lines or ROWS
