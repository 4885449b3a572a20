"""A root directory in memory that has nothing but what a jail needs: places of the host, bound
read-only at their own names, and a few devices.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm._ext import ffi, lib
from pyvmm.errors import UsageError
from pyvmm.hostnet import userns
from pyvmm.hostnet.isolate import STAGE, bind, open_found, own_mounts, set_attr
from pyvmm.hostnet.links import walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping

#: The only directory that can be written: its owner's, in memory.
SCRATCH = "/.pyvmm"
#: What is said of a name that leads nowhere.
NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG)
#: What is bound: read-only, without devices and set-user-ID programs.
BOUND = lib.MOUNT_ATTR_RDONLY | lib.MOUNT_ATTR_NOSUID | lib.MOUNT_ATTR_NODEV


class _Plan:
    """What the new root has: names in it, from the shorter to the longer.

    :ivar links: name -> what the link says. :ivar directories: names. :ivar bound: name -> a
        descriptor of what is bound there, and whether that is a directory.
    """

    def __init__(self) -> None:
        self.links: dict[str, str] = {}
        self.directories: dict[str, None] = {}
        self.bound: dict[str, tuple[int, bool]] = {}

    def directory(self, name: str) -> None:
        """Have an empty directory, and those above it."""
        at = ""
        for part in name.split("/")[1:]:
            at += f"/{part}"
            self.directories[at] = None

    def place(self, path: str, *, whole: bool, named: bool) -> None:
        """Bind a place of the host at its own name, with the symbolic links on the way to it;
        nothing if there is none.

        :param whole: it may be a directory. :param named: as for ``links.walk``.
        :raises UsageError: it is neither a regular file nor, with ``whole``, a directory; or as
            ``links.walk``.
        :raises OSError: there are too many links, or one has been changed meanwhile.
        """
        try:
            for here, target, more in walk(path, named=named):
                if here in self.bound:
                    return  # it is inside of something that is there
                if target is not None:
                    self.links[here] = target
                elif more:
                    self.directories[here] = None
                else:
                    self._bind(here, path, whole=whole)
        except OSError as e:
            if e.errno not in NOTHING:
                raise

    def _bind(self, here: str, path: str, *, whole: bool) -> None:
        fd = open_found(here)
        mode = os.fstat(fd).st_mode  # of what is bound, whatever has the name by now
        self.bound[here] = fd, stat.S_ISDIR(mode)
        if not (stat.S_ISREG(mode) or (whole and stat.S_ISDIR(mode))):
            raise UsageError(f"--jail: {path} is no regular file", "name the file that it is about")

    def close(self) -> None:
        for fd, _ in self.bound.values():
            os.close(fd)
        self.bound.clear()


def enter(
    places: Mapping[str, bool],
    devices: Mapping[str, int],
    owner: tuple[int, int],
    *,
    scratch: int,
    here: str,
    named: Container[str] = (),
) -> None:
    """Move this process, which is root's and has one thread, to a mount namespace of its own whose
    root directory is new and cannot be written.

    :param places: absolute paths of files and directories that can be read there, under the same
        names. Those that do not exist are left out.
    :param devices: absolute paths -> numbers of character devices, which only ``owner`` may open.
    :param owner: user and group. :param scratch: bytes of ``SCRATCH``.
    :param here: the working directory, which has the same name and is empty unless it is among
        ``places``.
    :param named: those of ``places`` whose names somebody has given, see ``links.walk``.
    :raises UsageError: as ``links.walk``.
    :raises OSError: the kernel or a sandbox does not allow this; nothing is as before then.
    """
    own_mounts()
    plan = _Plan()
    try:
        for path in sorted(places, key=len):  # what is inside of another place comes later
            plan.place(path, whole=places[path], named=path in named)
        for path in (*map(os.path.dirname, devices), "/proc", SCRATCH):
            plan.directory(path)
        if not any(here == name or here.startswith(f"{name}/") for name in plan.bound):
            plan.directory(here)
        _mount("tmpfs", STAGE, "mode=755,size=1m")
        for name in plan.directories:
            os.mkdir(STAGE + name, 0o755)
        for name, target in plan.links.items():
            os.symlink(target, STAGE + name)
        for name, (fd, is_directory) in sorted(plan.bound.items(), key=lambda item: len(item[0])):
            if os.path.exists(STAGE + name) and name not in plan.directories:
                continue  # it is inside of a place that came later
            if is_directory:
                os.makedirs(STAGE + name, 0o755, exist_ok=True)
            else:
                os.close(os.open(STAGE + name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            bind(f"/proc/self/fd/{fd}", STAGE + name)
            set_attr(STAGE + name, {"attr_set": BOUND}, lib.AT_RECURSIVE)
    finally:
        plan.close()
    for path, number in devices.items():
        os.mknod(STAGE + path, stat.S_IFCHR | 0o600, number)
        os.chown(STAGE + path, *owner)
    quiet = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
    _mount("proc", f"{STAGE}/proc", "", quiet)
    _mount(
        "tmpfs",
        f"{STAGE}{SCRATCH}",
        f"mode=700,uid={owner[0]},gid={owner[1]},size={scratch}",
        quiet,
    )
    set_attr(STAGE, {"attr_set": lib.MOUNT_ATTR_RDONLY}, 0)
    failed = lib.pv_enter_root(STAGE.encode())
    if failed:
        raise OSError(-failed, f"enter {STAGE}: {os.strerror(-failed)}")
    os.chdir(here)


def _mount(kind: str, where: str, options: str, flags: int = 0) -> None:
    name, data = kind.encode(), options.encode() or ffi.NULL
    userns.check(lib.mount(name, where.encode(), name, flags, data), f"mount {kind} at {where}")
