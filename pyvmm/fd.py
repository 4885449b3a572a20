"""Owned file descriptors: ``Fd``, ``EventFd`` and memfds. And ``Closing``, for any owner.

Each descriptor has one owner. Whoever creates a descriptor closes it; passing it to a C object
lends it. ``close`` releases the descriptor even if it raises, and a second ``close`` does nothing.
"""

from __future__ import annotations

import os
import stat
import sys

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self


def open_standard_descriptors() -> None:
    """Open /dev/null in the place of each standard descriptor (0, 1, 2) that is closed. The first
    thing that a process of ours does: otherwise a file, a socket or a pipe that it opens gets the
    number, and what is printed goes there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one: those below are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the rest of the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def is_null(fd: int) -> bool:
    """Whether a descriptor is /dev/null, from which nothing ever comes."""
    status = os.fstat(fd)
    null = os.stat(os.devnull).st_rdev  # noqa: PTH116 - pathlib takes longer to import
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == null


class Closing:
    """Makes a class with ``close`` a context manager, which closes at the end."""

    def close(self) -> None:
        """Release what the object owns."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Fd(Closing):
    """One owned file descriptor. As a context manager it closes the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, for select() and for C.

        :raises ValueError: it has been closed.
        """
        if self._fd < 0:
            raise ValueError("descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether ``close`` has been called."""
        return self._fd < 0

    def close(self) -> None:
        """Release the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._fd})"


class EventFd(Fd):
    """An eventfd(2), non-blocking and close-on-exec.

    A process that has been sent the descriptor shares its flags, and can make it blocking. So
    ``drain`` and ``nudge`` do not rely on O_NONBLOCK; the others are for eventfds of our own.

    :param initial: the counter's first value.
    :raises HostError: the process has no free descriptor.
    """

    def __init__(self, initial: int = 0) -> None:
        try:
            super().__init__(os.eventfd(initial, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except OSError as e:
            raise HostError(
                f"cannot make an eventfd: {e.strerror}", "raise the limit: ulimit -n"
            ) from e

    def signal(self) -> None:
        """Add 1 to the counter.

        :raises BlockingIOError: the counter is full.
        """
        os.eventfd_write(self.fileno(), 1)

    def nudge(self) -> None:
        """Add 1 to the counter. If it is full, its reader has been woken already, so do nothing.
        Never waits, whatever another process does with the eventfd (cext/event.h).
        """
        nudge(self.fileno())

    def drain(self) -> int:
        """Read and clear the counter; 0 if nobody has signalled. Never waits."""
        value = bytearray(8)
        try:
            os.preadv(self.fileno(), [value], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        return int.from_bytes(value, sys.byteorder)


def nudge(fd: int) -> None:
    """``EventFd.nudge`` of a descriptor."""
    from pyvmm._ext import lib  # here: most commands share no eventfd

    lib.pv_event_nudge(fd)


def close_all_but(keep: Iterable[int]) -> None:
    """Close all descriptors from 3 on but ``keep``, in a process that is about to run a program.

    By close_range(2), which os.closerange() lacks in a Python built for an older C library: that
    one tries as many descriptors as RLIMIT_NOFILE allows.
    """
    from pyvmm._ext import lib  # here: most commands start no program so

    low = 3
    for number in sorted(keep):
        if number > low:
            lib.pv_close_range(low, number - 1)
        low = max(low, number + 1)
    lib.pv_close_range(low, 0xFFFFFFFF)


def eventfds(count: int) -> list[EventFd]:
    """Make ``count`` eventfds.

    :raises HostError: the process has no free descriptor; all that were made are closed again.
    """
    made: list[EventFd] = []
    try:
        for _ in range(count):
            made.append(EventFd())
    except HostError:
        for event in made:
            event.close()
        raise
    return made


def memfd(name: str, size: int, *, seal: bool = True, huge: bool = False) -> Fd:
    """Make a memory file of ``size`` bytes that other processes can map, such as a vhost-user
    back-end.

    :param name: shows in /proc/PID/maps.
    :param seal: forbid growing and shrinking, so that no peer can make our mapping fault.
    :param huge: use huge pages (MFD_HUGETLB).
    :raises OSError: ENOSPC or ENOMEM if the host is short of memory.
    """
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if seal else 0) | (os.MFD_HUGETLB if huge else 0)
    fd = Fd(os.memfd_create(name, flags))
    try:
        os.ftruncate(fd.fileno(), size)
        if seal:
            import fcntl

            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        fd.close()
        raise
    return fd
