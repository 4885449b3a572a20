"""Unix sockets in the file system: whether a process listens there, and who may remove them."""

from __future__ import annotations

import os
import stat
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

#: The most bytes of a socket's path: sun_path of unix(7) less the final zero.
PATH_MAX = 107
#: Identifies a file: device and inode.
Identity = tuple[int, int]


def is_abandoned(path: str) -> bool:
    """Whether there is a stream socket at ``path`` on which no process listens. Never waits."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass  # EAGAIN: a full backlog; EACCES: not ours; EPROTOTYPE: another kind of socket
    return False


def bind(sock: _socket.socket, path: str) -> Identity:
    """Bind ``sock`` to ``path``; an abandoned socket at ``path`` is replaced.

    :returns: the new file's identity, for ``remove``.
    :raises OSError: from bind(2).
    """
    try:
        sock.bind(path)
    except OSError:
        if not is_abandoned(path):
            raise
        os.unlink(path)
        sock.bind(path)
    info = os.lstat(path)
    return info.st_dev, info.st_ino


def let_in(path: str, identity: Identity) -> None:
    """Let anybody connect to the socket at ``path``, unless somebody has replaced it.

    :raises OSError: that is not possible.
    """
    # A path could lead elsewhere by now.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) == identity:
            os.chmod(f"/proc/self/fd/{fd}", 0o666)
    finally:
        os.close(fd)


def remove(path: str, identity: Identity) -> None:
    """Remove the socket at ``path``, unless somebody has replaced or removed it."""
    try:
        info = os.lstat(path)
        if (info.st_dev, info.st_ino) == identity:
            os.unlink(path)
    except OSError:
        pass  # it is gone, or may not be removed: there is nothing more to do
