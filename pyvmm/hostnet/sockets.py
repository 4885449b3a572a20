"""Unix sockets in the file system: whether a process listens there, and who may remove them."""

from __future__ import annotations

import os
import stat
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket  # see ``rights``
from contextlib import closing

from pyvmm import helper

#: The most bytes of a socket's path: sun_path of unix(7) less the final zero.
PATH_MAX = 107
#: Identifies a file: device and inode.
Identity = tuple[int, int]


def _stream() -> socket:
    return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)


def is_abandoned(path: str) -> bool:
    """Whether there is a stream socket at ``path`` on which no process listens. Never waits."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with closing(_stream()) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            pass  # EAGAIN: a full backlog; EACCES: not ours; EPROTOTYPE: another kind of socket
    return False


def bind(sock: socket, path: str) -> Identity:
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
    """Remove the file at ``path``, unless somebody has replaced or removed it. Never raises for
    what the file system refuses: there is nothing more to do then.
    """
    helper.do("remove", path, *map(str, identity))


def remove_named(words: list[str]) -> tuple[list[str], list[int]]:
    """``remove``, as an operation of ``helper``.

    :param words: the path, device and inode of the file.
    """
    path, device, inode = words
    try:
        info = os.lstat(path)
        if (info.st_dev, info.st_ino) == (int(device), int(inode)):
            os.unlink(path)
    except OSError:
        pass  # it is gone, or may not be removed
    return [], []


def connect_once(words: list[str]) -> tuple[list[str], list[int]]:
    """A non-blocking stream socket that is connected; an operation of ``helper``.

    :param words: the path of the socket that listens.
    :raises OSError: from connect(2); EAGAIN if that socket's queue is full; EMFILE or ENFILE if
        there is no descriptor.
    """
    with closing(_stream()) as sock:
        sock.connect(words[0])
        return [], [sock.detach()]


def listen_at(words: list[str]) -> tuple[list[str], list[int]]:
    """A non-blocking stream socket that listens; an operation of ``helper``. An abandoned socket at
    the path is replaced. Only our own user may connect, whatever the umask is.

    :param words: the path; a word that is not empty if anybody may connect; how many connections
        may wait.
    :returns: device and inode of the socket's file; the socket.
    :raises OSError: there can be no socket at the path.
    """
    path, anybody, backlog = words
    with closing(_stream()) as sock:
        os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the file this mode
        identity = bind(sock, path)
        if anybody:
            let_in(path, identity)
        sock.listen(int(backlog))
        return [str(number) for number in identity], [sock.detach()]
