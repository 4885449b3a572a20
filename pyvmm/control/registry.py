"""Where running machines are found: one locked file per machine, and its control socket.

Theory of operation: machine NAME holds an exclusive flock(2) on ``DIRECTORY/NAME.machine`` for as
long as it lives. The file says which process it is and where its socket is. The kernel releases the
lock however the process ends. So a file that can be locked belongs to a machine that was killed,
even if another process has its process number by now. Whoever finds such a file removes it and the
socket. No connection and no time-out is necessary to know.

``pyvmm run`` needs this module before the guest runs, so it imports next to nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_NONBLOCK, SOCK_STREAM, socket  # see ``rights``
from fcntl import LOCK_EX, LOCK_NB, flock

from pyvmm.errors import HostError, MachineMissing, UsageError, did_you_mean
from pyvmm.host.paths import private, runtime_dir
from pyvmm.hostnet import sockets
from pyvmm.hostnet.sockets import PATH_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAME_MAX = 40
BACKLOG = 16
AUTO = 10_000  # how many numbers are tried for a machine without a name
SUFFIX = ".machine"
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def directory() -> str:
    """The directory of this user's machines on this kernel, mode 0700. It is made if necessary.

    The testbed shares /tmp with its host, but neither sockets nor locks. Machines in the testbed
    therefore use a directory of L1's own.

    :raises HostError: no directory is private.
    """
    if "PYVMM_IN_TESTBED" not in os.environ:
        return private(runtime_dir() + "/machines")
    base = next((d for d in ("/run", "/dev/shm") if os.access(d, os.W_OK | os.X_OK)), None)
    if base is None:
        raise HostError(
            "the testbed has no directory for control sockets", "use --qmp PATH or --qmp none"
        )
    return private(f"{base}/pyvmm-machines-{os.getuid()}")


def check_name(name: str) -> str:
    """``name`` if a machine may have it: letters, digits, ``. _ -``, up to ``NAME_MAX``
    characters; the first may be neither ``-`` nor ``.``.

    :raises UsageError: a machine may not have this name.
    """
    if not 0 < len(name) <= NAME_MAX or not set(name) <= LETTERS or name[0] in ".-":
        raise UsageError(
            f"{name!r} is no name for a machine",
            f"use 1 to {NAME_MAX} letters, digits, '.', '_', '-'",
        )
    return name


class Entry:
    """A running machine, as other processes see it. :ivar path: of its control socket.
    :ivar since: seconds since the epoch.
    """

    __slots__ = ("name", "path", "pid", "since")

    def __init__(self, name: str, pid: int, path: str, since: float) -> None:
        self.name, self.pid, self.path, self.since = name, pid, path, since


class Claim:
    """A name that this process holds, and a socket that listens. ``close`` removes both; a second
    call does nothing.

    :param name: None for the first free of ``vm0``, ``vm1``, ...
    :param path: of the socket; None for a socket beside the machine's file.
    :param listen: False if ``listen`` will be called later. Until then other processes do not find
        the machine, but its name is taken.
    :raises UsageError: the name is taken or bad, or the path is in use.
    :raises HostError: there is no private directory, or the socket cannot be made.
    """

    def __init__(
        self, name: str | None = None, path: str | None = None, *, listen: bool = True
    ) -> None:
        where = directory()
        self._fd = -1
        self._made: sockets.Identity | None = None
        self.listener: socket | None = None
        self.name = self._take(where, name)
        self._file = f"{where}/{self.name}{SUFFIX}"
        self.path = os.path.abspath(path) if path is not None else f"{where}/{self.name}.qmp"
        self._own = path is None
        if listen:
            self.listen()

    def listen(self) -> None:
        """Make the socket. From now on other processes find the machine. A second call does
        nothing.

        :raises UsageError: the path is in use, or no socket can be made there.
        """
        if self.listener is not None:
            return
        try:
            text = f"{os.getpid()}\n{time.time():.3f}\n{self.path}".encode(errors="surrogateescape")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text, 0)
            self._listen(own=self._own)
        except BaseException:
            self.close()
            raise

    def _take(self, where: str, name: str | None) -> str:
        """Lock a name."""
        if name is not None:
            check_name(name)
            # Whoever finds the file of a dead machine locks it for a moment, too.
            until = time.monotonic() + 1
            while not self._lock(f"{where}/{name}{SUFFIX}"):
                if time.monotonic() > until:
                    pid = next((e.pid for e in machines() if e.name == name), 0)
                    who = f", process {pid}" if pid else ""  # 0: it starts just now
                    raise UsageError(
                        f"a machine named {name} is running{who}", "use another --name"
                    )
                time.sleep(0.01)
            return name
        for n in range(AUTO):
            if self._lock(f"{where}/vm{n}{SUFFIX}"):
                return f"vm{n}"
        raise UsageError(f"{AUTO} machines are running", "use --name")

    def _lock(self, path: str) -> bool:
        fd = _locked(path, os.O_CREAT)
        if fd is not None:
            self._fd = fd
        return fd is not None

    def _listen(self, *, own: bool) -> None:
        if len(os.fsencode(self.path)) > PATH_MAX or "\n" in self.path:
            raise UsageError(
                f"--qmp {self.path!r}", f"a socket's path has at most {PATH_MAX} bytes, in one line"
            )
        if own:
            _unlink(self.path)  # we hold the name, so the socket's owner is dead
        listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
        self.listener = listener
        os.fchmod(listener.fileno(), 0o600)  # bind(2) uses this mode, whatever the umask is
        try:
            self._made = sockets.bind(listener, self.path)
            listener.listen(BACKLOG)
        except OSError as e:
            raise UsageError(
                f"--qmp {self.path}: {e.strerror}", "name a path where a socket can be made"
            ) from e

    def close(self) -> None:
        """Remove the socket, unless somebody has replaced it, and release the name."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        if self._made is not None:
            sockets.remove(self.path, self._made)
            self._made = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Before the lock is released: afterwards the file may be another machine's.
            mine = os.fstat(fd)
            sockets.remove(self._file, (mine.st_dev, mine.st_ino))
            os.close(fd)

    def filenos(self) -> list[int]:
        """The descriptor of the socket, which stays the claim's. The lock's is for no other
        process: whoever can write the file sends root's commands to another socket.
        """
        return [self.listener.fileno()] if self.listener is not None else []

    def leave_name(self) -> None:
        """Have ``close`` remove nothing and release no lock: the process from which this one was
        forked does so, and has the lock.
        """
        self._fd = -1
        self._made = None

    def files(self) -> list[str]:
        """The paths that ``close`` removes."""
        return [self.path, self._file]


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _locked(path: str, flags: int = 0) -> int | None:
    """Open and lock ``path``; None if another process holds the lock, or if there is no file.

    :raises HostError: the file cannot be opened.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        except FileNotFoundError:
            return None
        except OSError as e:
            rooms = {errno.EROFS, errno.ENOSPC, errno.EDQUOT}
            remedy = "set XDG_RUNTIME_DIR to a directory of your own that can be written"
            hint = remedy if e.errno in rooms else "remove it"
            raise HostError(f"cannot open {path}: {e.strerror}", hint) from e
        try:
            flock(fd, LOCK_EX | LOCK_NB)
            there = os.stat(path)
            mine = os.fstat(fd)
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass
        os.close(fd)  # its owner has removed it meanwhile: look again


def machines() -> list[Entry]:
    """This user's running machines, by name. Files and sockets of killed machines are removed.

    :raises HostError: there is no private directory.
    """
    return sorted(_entries(directory()), key=lambda e: (len(e.name), e.name))


def _is_own(path: str) -> bool:
    """Whether a machine of this user may have its socket at ``path``: an absolute path, and no file
    that is of another kind or of another user.
    """
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return path.startswith("/")
    return path.startswith("/") and stat.S_ISSOCK(info.st_mode) and info.st_uid == os.geteuid()


def _entries(where: str) -> Iterator[Entry]:
    for file in os.listdir(where):
        if not file.endswith(SUFFIX):
            continue
        path = f"{where}/{file}"
        name = file.removesuffix(SUFFIX)
        fd = _locked(path)
        try:
            with open(path, "rb") as f:
                pid, since, socket_path = f.read(4096).split(b"\n", 2)
            told = Entry(name, int(pid), os.fsdecode(socket_path), float(since))
            entry = told if _is_own(told.path) else None
        except (OSError, ValueError):  # the file is gone meanwhile, or not written yet
            entry = None
        if fd is None:
            if entry is not None:
                yield entry
            continue
        if entry is not None and sockets.is_abandoned(entry.path):
            _unlink(entry.path)
        _unlink(path)
        os.close(fd)


def find(name: str) -> Entry:
    """The running machine ``name``.

    :raises MachineMissing: there is no such machine.
    """
    names = []
    for entry in machines():
        if entry.name == name:
            return entry
        names.append(entry.name)
    meant = did_you_mean(name, names)
    raise MachineMissing(f"no machine named {name} is running here", f"{meant}see: pyvmm ps")
