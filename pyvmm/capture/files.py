"""Opens the file of a capture, which has what others should not read."""

from __future__ import annotations

import errno
import os
import stat


def open_private(path: str, *, keep: bool = False) -> tuple[int, bool]:
    """Open a file to write a capture: a new one for this user alone (mode 0600), or one that is
    there, which is emptied. To open a pipe means to wait for its reader.

    :param keep: a file that is there is not emptied yet.
    :returns: the descriptor, and whether the file is new.
    :raises OSError: it cannot be opened; EPERM also for a file, or a symbolic link to one, that
        another user could have put there to get the packets.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True
    except FileExistsError:
        pass
    try:
        fd = os.open(path, flags)
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        if os.lstat(path).st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, "the symbolic link belongs to another user") from e
        fd = os.open(path, flags & ~os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            if status.st_uid != os.geteuid():
                raise OSError(errno.EPERM, "the file belongs to another user")
            if not keep:
                os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd, False
