"""How users describe directories of the host that the guest mounts: ``--share DIR[:PATH][:rw]``, in
Python ``pyvmm.Share("results", writable=True)``.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm.devopt import Device
from pyvmm.errors import ShareError, UsageError
from pyvmm.spec.platform import SHARE_OVERLAY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.datapath.base import RingServer
    from pyvmm.host.virtiofsd import FsConnector
    from pyvmm.vhostuser.connect import Connector

#: Where the guest has its own file systems, and nothing can be mounted without taking them away.
TAKEN = ("/", "/proc", "/sys", "/dev")
#: Bytes of a path in the guest (PATH_MAX of Linux, with the NUL).
PATH_MAX = 4095


class Share(Device):
    """A directory of the host, served by a virtiofsd that pyvmm starts, confines and ends.

    :param directory: of the host. :param path: where the guest mounts it; by default at the same
        path, without symbolic links, as on the host.
    :param writable: whether the guest may change what is in it.
    :ivar directory: its path without symbolic links.
    :raises UsageError: a path that makes no sense.
    :raises ShareError: there is no such directory.
    """

    def __init__(
        self, directory: str | os.PathLike[str], path: str | None = None, *, writable: bool = False
    ) -> None:
        given = os.fspath(directory)
        if not given or "\0" in given:
            raise UsageError(f"--share {given!r}", "write DIR, DIR:/PATH or DIR:/PATH:rw")
        self.directory, self.writable = os.path.realpath(given), writable
        try:
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
        self._connector: FsConnector | None = None

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parse ``DIR[:PATH][:rw|:ro]`` as on the command line. The last ``:/`` is where PATH
        begins.
        """
        head, colon, access = text.rpartition(":")
        writable = False
        if colon and access in ("rw", "ro"):
            text, writable = head, access == "rw"
        directory, colon, inside = text.rpartition(":/")
        if not colon:
            return cls(text, writable=writable)
        return cls(directory, "/" + inside, writable=writable)

    def number(self, number: int) -> None:
        """Give the share its number among the machine's."""
        self.tag = f"pyvmm{number}"

    def connector(self) -> Connector:
        """Starts virtiofsd, and connects to it once.

        :raises ShareError: there is no virtiofsd, or it cannot be started.
        """
        from pyvmm.host.virtiofsd import FsConnector

        self._connector = FsConnector(self.directory, writable=self.writable)
        return self._connector

    def substitute(self) -> RingServer:
        """Answers the guest once virtiofsd has gone, whose state nobody has."""
        from pyvmm.virtio.dead_fs import DeadFs

        return DeadFs()

    def lament(self, problems: Sequence[str]) -> str:
        """Says how virtiofsd has ended."""
        assert self._connector is not None
        how = self._connector.end() or (problems[-1] if problems else "it has gone")
        return (
            f"the share of {self.directory} has broken off: {how}; every access of the guest has"
            " failed with EIO since"
        )


def words(shares: Sequence[Share]) -> bytes:
    """What init reads of them (guest/init.c, SHARES_FILE)."""
    out = b""
    for share in shares:
        assert share.tag is not None
        access = b"rw" if share.writable else b"ro"
        out += b"".join(w + b"\0" for w in (share.tag.encode(), os.fsencode(share.path), access))
    return out


def place(shares: Sequence[Share], directory: str) -> bytes:
    """The directory in which the guest's command begins: that of the host, if a share has it; else
    empty, for init's own choice.

    :param directory: of the host, without symbolic links.
    """
    for share in shares:
        if directory == share.directory or directory.startswith(share.directory.rstrip("/") + "/"):
            inside = os.path.relpath(directory, share.directory)
            return os.fsencode(os.path.normpath(f"{share.path}/{inside}"))
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
