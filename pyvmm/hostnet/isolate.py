"""Confines back-ends to the files that they serve. In the mount namespace of virtiofsd, everything
but the directories that it may write is read-only. That of qemu-storage-daemon, which does not
confine itself any further, has little else than its images.

util-linux' mount(8) can do this from 2.39 on (``mount -o bind,ro=recursive``), but Debian 12 has
2.38.
"""

from __future__ import annotations

import os
from stat import S_ISLNK

from pyvmm._ext import ffi, lib
from pyvmm.hostnet import userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence


#: Where a directory to be shared is in the new namespace: on a file system of its own, in the place
#: of one that virtiofsd does not need.
STAGE, SHARED = "/sys", "/sys/share"


#: What a program of the system needs of the root directory, to begin: links stay links.
SYSTEM = ("usr", "lib", "lib64", "etc/ld.so.cache", "dev/null")


def enclose(
    files: Mapping[str, tuple[str, bool]],
    made: Mapping[str, tuple[str, bytes]],
    *,
    owned: bool,
    collected: int = -1,
) -> None:
    """Move this process, which executes another program next, to namespaces of its own. Its root
    directory is in memory, and has the system's programs and libraries, read-only, and ``files``.
    There is no other file and no network. The program makes no process, and reaches none
    (``pv_confine_program``). Of root's capabilities, it gets at most the one to open others' files.

    :param files: by their names in the new root: a file, by its path without symbolic links, and
        whether it may be written.
    :param made: by their names in the new root: a directory in which a file is made that ends with
        the process, and what is in the file at first.
    :param owned: all files belong to this user, so that no capability is needed.
    :param collected: the mount of ``collect`` that has the files, if this process has no such
        paths; lent.
    :raises OSError: a file has been replaced by a link; or as ``protect``.
    """
    own_mounts()
    if collected < 0:
        _furnish({name: open_found(path) for name, (path, _) in files.items()}, made)
    else:
        attach(collected, STAGE)
    for name in SYSTEM:
        source, target = f"/{name}", f"{STAGE}/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif os.path.isdir(source):
            os.mkdir(target)
            bind(source, target)
        elif os.path.exists(source):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
            bind(source, target)
    writable = [name for name, (_, may) in files.items() if may] + list(made)
    _write_protect(but=[f"{STAGE}/{name}" for name in writable], root=STAGE)
    userns.unshare(lib.CLONE_NEWNET | lib.CLONE_NEWIPC)
    for failed in (
        lib.pv_enter_root(STAGE.encode()),
        lib.pv_confine_program(0 if owned else 1 << lib.CAP_DAC_OVERRIDE),
    ):
        if failed:
            raise OSError(-failed, f"enter {STAGE}: {os.strerror(-failed)}")


def _furnish(
    files: Mapping[str, int],
    made: Mapping[str, tuple[str, bytes]],
    owner: tuple[int, int] | None = None,
) -> None:
    """Mount a directory in memory at ``STAGE``, with files as for ``enclose``.

    :param files: by their names there, descriptors, which are closed.
    :param owner: user and group to whom the directory and ``made`` belong; None: this process's.
    """
    userns.check(lib.mount(b"none", STAGE.encode(), b"tmpfs", 0, b"mode=755"), f"mount {STAGE}")
    for name, fd in files.items():
        _show(fd, f"{STAGE}/{name}")
    for name, (directory, data) in made.items():
        # A file that has no name any more cannot be bound, nor one of O_TMPFILE: mount(2) and
        # move_mount(2) say ENOENT.
        path = f"{directory}/pyvmm-{os.urandom(8).hex()}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if owner is not None:
                os.fchown(fd, *owner)
            _show(fd, f"{STAGE}/{name}")
        finally:
            os.unlink(path)
    if owner is not None:
        os.chown(STAGE, *owner)


def collect(
    files: Mapping[str, tuple[int, bool]],
    made: Mapping[str, tuple[str, bytes]],
    *,
    owner: tuple[int, int],
    devices: Container[str] = (),
) -> int:
    """What a process of another user, which has none of the host's files, needs for ``enclose``: as
    ``detach``, of a directory in memory that has nothing but the files. To be called by a child of
    root's that ends then, after ``own_mounts``.

    :param files: by their names in the directory: descriptors of ``open_found``, or the like, of
        this mount namespace, which are closed; and whether the file may be written.
    :param made: as for ``enclose``. :param owner: user and group of the other process.
    :param devices: names of devices among the files, which may be opened as such.
    :returns: the caller's descriptor.
    :raises OSError: as ``enclose``.
    """
    _furnish({name: fd for name, (fd, _) in files.items()}, made, owner)
    for name in (*files, *made):
        attributes = lib.MOUNT_ATTR_NOSUID
        attributes |= 0 if name in devices else lib.MOUNT_ATTR_NODEV
        attributes |= 0 if name in made or files[name][1] else lib.MOUNT_ATTR_RDONLY
        set_attr(f"{STAGE}/{name}", {"attr_set": attributes}, 0)
    return _clone(lib.AT_FDCWD, STAGE, lib.AT_RECURSIVE)


def _clone(directory: int, path: str, flags: int) -> int:
    """A copy of a mount, attached nowhere. :raises OSError: from open_tree(2)."""
    flags |= lib.OPEN_TREE_CLONE | lib.OPEN_TREE_CLOEXEC
    fd: int = lib.pv_open_tree(directory, os.fsencode(path), flags)
    userns.check(min(fd, 0), f"open_tree {path}")
    return fd


def open_found(path: str) -> int:
    """A descriptor that names the file at ``path``, through no symbolic link.

    :raises OSError: there is a link, or no file.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if S_ISLNK(os.fstat(fd).st_mode) or os.readlink(f"/proc/self/fd/{fd}") != path:
        os.close(fd)
        raise OSError(f"{path!r} has been replaced")  # the name may be an image's
    return fd


def _show(fd: int, target: str) -> None:
    """Bind an open file to a new name, and close it."""
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    bind(f"/proc/self/fd/{fd}", target)
    os.close(fd)


def bind(source: str, target: str) -> None:
    """Show ``source``, with what is mounted below it, at ``target``, too.

    :raises OSError: from mount(2).
    """
    flags = lib.MS_BIND | lib.MS_REC
    result = lib.mount(os.fsencode(source), os.fsencode(target), ffi.NULL, flags, ffi.NULL)
    userns.check(result, f"bind {source}")


def detach(path: str, *, writable: bool) -> int:
    """A mount of its own of a file or directory, without what is mounted below, without devices
    and set-user-ID programs. It is attached nowhere: whoever has the descriptor may ``attach``
    it, in whichever mount namespace, and finds no way from it to what is outside of it.

    :param path: without symbolic links. :returns: the caller's descriptor.
    :raises OSError: as ``open_found``; or the kernel or a sandbox does not allow this.
    """
    place = open_found(path)
    try:
        fd = _clone(place, "", lib.AT_EMPTY_PATH)
    finally:
        os.close(place)
    attributes = lib.MOUNT_ATTR_NOSUID | lib.MOUNT_ATTR_NODEV
    attributes |= 0 if writable else lib.MOUNT_ATTR_RDONLY
    try:
        made = {"attr_set": attributes, "propagation": lib.MS_PRIVATE}
        set_attr("", made, lib.AT_EMPTY_PATH, at=fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attach(fd: int, target: str) -> None:
    """Mount what ``detach`` has made, once, at ``target``. :raises OSError: from the kernel."""
    flags = lib.MOVE_MOUNT_F_EMPTY_PATH
    userns.check(lib.pv_move_mount(fd, os.fsencode(target), flags), f"move_mount {target}")


def stage(directory: str | int, *, writable: bool) -> None:
    """As ``protect``, with one directory, which is at ``SHARED`` then. Whoever owns a directory
    above could put another one in its place, or a link, between a look at its name and its use:
    the name is resolved once, and what has been found is what is shared. If this process is not
    root's, it cannot take the write protection back either.

    :param directory: an absolute path without symbolic links; or a descriptor of ``detach``.
    :raises OSError: it has changed meanwhile; or as ``protect``.
    """
    ordinary = os.geteuid() != 0
    own_mounts()
    found = open_found(directory) if isinstance(directory, str) else -1
    userns.check(lib.mount(b"none", STAGE.encode(), b"tmpfs", 0, b"mode=755"), f"mount {STAGE}")
    os.mkdir(SHARED)
    if isinstance(directory, str):
        bind(f"/proc/self/fd/{found}", SHARED)
        os.close(found)
    else:
        attach(directory, SHARED)
    if not writable:
        set_attr(SHARED, {"attr_set": lib.MOUNT_ATTR_RDONLY}, lib.AT_RECURSIVE)
    if ordinary:
        # Mounts that come from another user's namespace stay where they are, with their flags.
        userns.become_root()
        userns.unshare(lib.CLONE_NEWNS)
    _write_protect(but=[SHARED] if writable else [])


def protect(writable: Sequence[str]) -> None:
    """Move this process to a new mount namespace in which only ``writable`` and the directories
    below can be written. For an ordinary user, the process also moves to a new user namespace, in
    which it is root.

    :param writable: absolute paths of directories, without symbolic links.
    :raises OSError: the kernel or a sandbox does not allow this. The caller must assume that
        nothing is write-protected.
    """
    own_mounts()
    for path in writable:
        bind(path, path)
    _write_protect(but=writable)


def own_mounts() -> None:
    """Move this process to a mount namespace of its own, from which nothing propagates.

    :raises OSError: as ``protect``.
    """
    if os.geteuid():
        userns.become_root()
    userns.unshare(lib.CLONE_NEWNS)
    set_attr("/", {"propagation": lib.MS_PRIVATE}, lib.AT_RECURSIVE)


def _write_protect(*, but: Sequence[str], root: str = "/") -> None:
    set_attr(root, {"attr_set": lib.MOUNT_ATTR_RDONLY}, lib.AT_RECURSIVE)
    for path in but:
        set_attr(path, {"attr_clr": lib.MOUNT_ATTR_RDONLY}, 0)


def set_attr(path: str, attr: dict[str, int], flags: int, *, at: int = lib.AT_FDCWD) -> None:
    """Call mount_setattr(2). :raises OSError: from it."""
    made = ffi.new("struct mount_attr *", attr)
    name, size = os.fsencode(path), ffi.sizeof("struct mount_attr")
    result = lib.pv_mount_setattr(at, name, flags, made, size)
    userns.check(result, f"mount_setattr {path}")
