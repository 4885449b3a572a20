"""How users describe directories of the host that the guest mounts: ``--share DIR[:PATH][:rw]``, in
Python ``pyvmm.Share("results", writable=True)``.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm.devopt import StartedDevice, real_path
from pyvmm.errors import ShareError, UsageError
from pyvmm.spec.platform import SHARE_OVERLAY
from pyvmm.vhostuser.wire import Closed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import RingServer
    from pyvmm.devopt import User
    from pyvmm.errors import PyvmmError, VhostUserError
    from pyvmm.host.virtiofsd import FsConnector

#: Where the guest has its own file systems, and nothing can be mounted without taking them away.
TAKEN = ("/", "/proc", "/sys", "/dev")
#: Bytes of a path in the guest (PATH_MAX of Linux, with the NUL).
PATH_MAX = 4095
#: Characters of /etc/passwd and /etc/group that are read.
ACCOUNTS_MAX = 16 << 20
#: Where trees have systemd.
SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
#: Links in a path that are followed (path_resolution(7)).
LINKS_MAX = 40


class Share(StartedDevice):
    """A directory of the host, served by a virtiofsd that pyvmm starts, confines and ends.

    :param directory: of the host. :param path: where the guest mounts it; by default at the same
        path, without symbolic links, as on the host.
    :param writable: whether the guest may change what is in it.
    :param jailed: the user of the jail for which root opens the directory (docs/jail.md).
    :ivar directory: its path without symbolic links.
    :raises UsageError: a path that makes no sense.
    :raises ShareError: there is no such directory.
    """

    #: How long the guest takes what it has read for true (``host.virtiofsd.command``).
    cache = "auto"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        path: str | None = None,
        *,
        writable: bool = False,
        jailed: User | None = None,
    ) -> None:
        given = os.fspath(directory)
        if not given or "\0" in given:
            raise UsageError(f"--share {given!r}", "write DIR, DIR:/PATH or DIR:/PATH:rw")
        self.directory, self.writable = given, writable
        self.access = b"rw" if writable else b"ro"
        try:
            self.directory = real_path(given, jailed)  # which fails in a directory that has gone
            good = stat.S_ISDIR(os.stat(self.directory).st_mode)  # noqa: PTH116 - pathlib is slow
            what = "is no directory"
        except OSError as e:
            good, what = False, e.strerror or str(e)
        if not good:
            raise ShareError(f"--share {given}: {what}", "name a directory; a file: --add FILE")
        self.path = os.path.normpath(path if path is not None else self.directory)
        if not self.path.startswith("/") or "\0" in self.path:
            raise UsageError(f"--share: {path!r} is no path in the guest", "begin it with a slash")
        self.path = "/" + self.path.lstrip("/")
        if self.path in TAKEN or len(os.fsencode(self.path)) > PATH_MAX:
            raise UsageError(
                f"--share: the guest cannot mount {self.directory} at {self.path}",
                f"name another place: --share {given}:/mnt",
            )
        super().__init__(id="fs", socket=f"virtiofsd of {self.directory}", tag="share")

    @classmethod
    def parse(cls, text: str, jailed: User | None = None) -> Share:
        """Parse ``DIR[:PATH][:rw|:ro]`` as on the command line. The last ``:/`` is where PATH
        begins.

        :param jailed: as for ``Share``.
        """
        head, colon, access = text.rpartition(":")
        writable = False
        if colon and access in ("rw", "ro"):
            text, writable = head, access == "rw"
        directory, colon, inside = text.rpartition(":/")
        if not colon:
            return cls(text, writable=writable, jailed=jailed)
        return cls(directory, "/" + inside, writable=writable, jailed=jailed)

    def number(self, number: int) -> None:
        """Give the share its number among the machine's."""
        self.tag = f"pyvmm{number}"

    def start_backend(self) -> FsConnector:
        """Start virtiofsd.

        :raises ShareError: there is no virtiofsd, or it cannot be started.
        """
        from pyvmm.host.virtiofsd import FsConnector

        return FsConnector(
            self.directory,
            writable=self.writable,
            cache=self.cache,
            mount=self.mount,
        )

    def open_mount(self, user: User) -> int:
        """Open the directory."""
        from pyvmm.hostnet.isolate import detach

        return detach(self.directory, writable=self.writable)

    def needs(self) -> list[str]:
        """The library that virtiofsd of another user than root needs."""
        from pyvmm.host import shim

        return [shim.place()]

    def substitute(self) -> RingServer:
        """Answers the guest once virtiofsd has gone, whose state nobody has."""
        from pyvmm.virtio.dead_fs import DeadFs

        return DeadFs()

    def failure(self, error: VhostUserError) -> PyvmmError:
        """Says how virtiofsd has ended."""
        assert self._connector is not None
        how = self._connector.end() if isinstance(error, Closed) else error.cause
        return ShareError(
            f"{self.directory} cannot be shared: {how}", "share another directory, or run as root"
        )

    def lament(self, problems: Sequence[str]) -> PyvmmError:
        """Says how virtiofsd has ended."""
        assert self._connector is not None
        how = self._connector.end() or (problems[-1] if problems else "it has gone")
        since = (
            "the guest's init cannot go on without it"
            if self.vital
            else "every access of the guest has failed with EIO since"
        )
        return ShareError(f"the share of {self.directory} has broken off: {how}; {since}")


class Root(Share):
    """A tree of the host that is the guest's root: read-only, below an overlay in the guest's
    memory, which takes what the guest writes and ends with it.

    :param directory: ``/``, or the root of another system's tree.
    :param user: who runs the command: a name of the tree's /etc/passwd. By default root.
    :param init: the tree's program that becomes process 1: ``systemd``, which runs the command as a
        unit, or an absolute path in the tree. By default pyvmm's own.
    :ivar account: what init reads of the user (guest/init.c, USER_FILE); empty for root.
    :ivar init: the path of ``init`` in the tree; empty for pyvmm's own.
    :ivar systemd: whether that is systemd.
    :raises UsageError: the tree has no such user, or no such program.
    """

    #: Overlayfs leaves open what the guest sees of a file that changes. Each program that starts
    #: would have its libraries read anew otherwise.
    cache = "always"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        user: str | None = None,
        init: str | None = None,
        jailed: User | None = None,
    ) -> None:
        super().__init__(directory, "/root", jailed=jailed)
        self.path, self.access = "/", b"root"
        self.account = account(self.directory, user) if user is not None else b""
        self.init, self.systemd = (
            find_init(self.directory, init) if init is not None else ("", False)
        )
        # Even to power off, the tree's init has to read.
        self.vital = bool(self.init)

    @property
    def init_words(self) -> bytes:
        """What our init reads of the tree's (guest/init.c, INIT_FILE)."""
        return os.fsencode(self.init) + (b"\0systemd\0" if self.systemd else b"\0")


def find_init(tree: str, name: str) -> tuple[str, bool]:
    """The path in the tree of the init that the user names, and whether it is systemd.

    :param tree: without symbolic links. :param name: ``systemd``, or an absolute path in the tree.
    :raises UsageError: the tree has no such program. What the guest finds may be another one, if
        somebody changes the tree.
    """
    if name != "systemd" and (not name.startswith("/") or "\0" in name):
        raise UsageError(f"--init {name!r}", "use systemd, or an absolute path in the tree")
    for path in SYSTEMD if name == "systemd" else (name,):
        program = _resolve(tree, path)
        if program is not None:
            return path, program.endswith("/systemd")
    where = tree.rstrip("/") or "/"
    if name == "systemd":
        raise UsageError(
            f"--init systemd: {where} has no {SYSTEMD[0].lstrip('/')}",
            "install systemd in the tree (debootstrap --include=systemd,dbus), or leave --init out",
        )
    raise UsageError(f"--init {name}: {where} has no such program", "name a program of the tree")


def _resolve(tree: str, path: str) -> str | None:
    """The path of a program in the tree, from the tree's root on, without symbolic links, each of
    which is followed as in the guest; None if there is no such program.
    """
    links, todo, done = 0, path.split("/"), ""
    while todo:
        part = todo.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            done = done.rpartition("/")[0]
            continue
        try:
            target = os.readlink(f"{tree}{done}/{part}")  # noqa: PTH115 - pathlib is slow
        except OSError:  # no link, or nothing at all
            done += f"/{part}"
            continue
        links += 1
        if links > LINKS_MAX:
            return None
        done = "" if target.startswith("/") else done
        todo = target.split("/") + todo
    try:
        status = os.lstat(f"{tree}{done}")
    except OSError:
        return None
    return done if stat.S_ISREG(status.st_mode) and status.st_mode & 0o111 else None


def account(tree: str, user: str) -> bytes:
    """A user of a tree, as init reads it: user id, group id, groups, name, home, shell.

    :param tree: without symbolic links. The files of the running system are read as they are.
    :raises UsageError: the tree has no such user.
    """
    entries = [line.split(":") for line in _lines(tree, "etc/passwd")]
    found = next((e for e in entries if len(e) == 7 and e[0] == user), None)
    if found is None or not (_is_id(found[2]) and _is_id(found[3])):
        raise UsageError(
            f"--user {user!r}: {tree.rstrip('/')}/etc/passwd has no such user", "name another"
        )
    groups = [found[3]]
    for line in _lines(tree, "etc/group"):
        entry = line.split(":")
        if len(entry) == 4 and user in entry[3].split(",") and _is_id(entry[2]):
            groups.append(entry[2])
    words = [*found[2:4], ",".join(groups), user, found[5] or "/", found[6] or "/bin/sh"]
    return b"".join(os.fsencode(word) + b"\n" for word in words)


def _is_id(text: str) -> bool:
    """Whether ``text`` is a user or group id; 2**32 - 1 means none."""
    return text.isascii() and text.isdecimal() and len(text) < 11 and int(text) < 2**32 - 1


def _lines(tree: str, name: str) -> list[str]:
    """The lines of a file of the tree: none if it is no plain file, or if links lead out of it."""
    path = os.path.realpath(f"{tree}/{name}")
    if not path.startswith(tree.rstrip("/") + "/"):
        return []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    with open(fd, encoding="utf-8", errors="surrogateescape") as f:
        return f.read(ACCOUNTS_MAX).splitlines() if stat.S_ISREG(os.fstat(fd).st_mode) else []


def words(shares: Sequence[Share]) -> bytes:
    """What init reads of them (guest/init.c, SHARES_FILE)."""
    out = b""
    for share in shares:
        assert share.tag is not None
        line = share.tag.encode(), os.fsencode(share.path), share.access
        out += b"".join(word + b"\0" for word in line)
    return out


def place(shares: Sequence[Share], directory: str) -> bytes:
    """The directory in which the guest's command begins: that of the host, if a share has it; else
    empty, for init's own choice. Of several shares, the innermost counts.

    :param directory: of the host, without symbolic links; empty if there is none.
    """
    if not directory:
        return b""
    for share in sorted(shares, key=lambda share: -len(share.directory)):
        if f"{directory}/".startswith(share.directory.rstrip("/") + "/"):
            inside = os.path.relpath(directory, share.directory)
            return os.fsencode("/" + os.path.normpath(f"{share.path}/{inside}").lstrip("/"))
    return b""


def reason(shares: Sequence[Share], number: int, error: int) -> str:
    """Says why the guest cannot mount a share. :param number, error: as init reports them."""
    what = shares[number].path if number < len(shares) else "the overlay of its root"
    option = (
        "CONFIG_OVERLAY_FS" if number == SHARE_OVERLAY else "CONFIG_VIRTIO_FS and CONFIG_FUSE_FS"
    )
    if error == errno.ENODEV:
        return (
            f"{what}: its kernel has no such file system; it needs {option}, built in or as "
            "modules in the initrd (--modules)"
        )
    if error == errno.EINVAL:
        return f"{what}: {os.strerror(error)}; if its kernel has no driver: CONFIG_VIRTIO_PCI"
    return f"{what}: {os.strerror(error)}; name another path"
