"""Which descriptors this process has: what a test leaves open is found by comparing. And its
threads, as the kernel names them.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def open_fds() -> set[tuple[int, str]]:
    """The descriptors and what they refer to.

    Compare by difference, not by number: the garbage collector may at any time close what an
    earlier test has left.
    """
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.add((int(fd.name), str(fd.readlink())))
        except FileNotFoundError:
            pass  # it was that of the directory
    return found


def thread_names() -> list[str]:
    """Of all threads, also those that C has made. Any of an earlier test may be just ending."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found.append((task / "comm").read_text().strip())
    return found
