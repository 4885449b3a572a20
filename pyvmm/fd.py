"""Owned file descriptors: ``Fd``, ``EventFd`` and memfds.

Ownership is single: whoever creates one closes it; passing one to a C object lends it. ``close``
releases even when it fails, and closing twice is silent.
"""

from __future__ import annotations

import os

from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Fd:
    """One owned file descriptor; a context manager."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, for select() and for C; raises ValueError once closed."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._fd})"


class EventFd(Fd):
    """An eventfd(2), non-blocking and close-on-exec.

    :raises HostError: no descriptor to be had.
    """

    def __init__(self, initial: int = 0) -> None:
        try:
            super().__init__(os.eventfd(initial, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except OSError as e:
            raise HostError(
                f"cannot make an eventfd: {e.strerror}", "raise the limit: ulimit -n"
            ) from e

    def signal(self) -> None:
        """Add 1."""
        os.eventfd_write(self.fileno(), 1)

    def nudge(self) -> None:
        """Add 1, unless the counter is full: then whoever reads it has been told."""
        try:
            self.signal()
        except BlockingIOError:
            pass

    def drain(self) -> int:
        """Read and clear the counter; 0 where nothing was signalled."""
        try:
            return os.eventfd_read(self.fileno())
        except BlockingIOError:
            return 0


def eventfds(count: int) -> list[EventFd]:
    """``count`` of them, or none: HostError leaves nothing open."""
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
    """A memory file of ``size`` bytes, shareable with a vhost-user backend.

    :param seal: forbid growing and shrinking, so that no peer can make our mapping fault.
    :param huge: back it by huge pages (MFD_HUGETLB).
    :raises OSError: ENOSPC or ENOMEM where the host is short of memory.
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
