"""Confines virtiofsd to the directories that it may write: in its mount namespace, everything else
is read-only.

util-linux' mount(8) can do this from 2.39 on (``mount -o bind,ro=recursive``), but Debian 12 has
2.38.
"""

from __future__ import annotations

import os

from pyvmm._ext import ffi, lib
from pyvmm.hostnet import userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


#: Where a directory to be shared is in the new namespace: on a file system of its own, in the place
#: of one that virtiofsd does not need.
STAGE, SHARED = "/sys", "/sys/share"


def stage(directory: str, *, writable: bool) -> None:
    """As ``protect``, with one directory, which is at ``SHARED`` then. Whoever owns a directory
    above could put another one in its place, or a link, between a look at its name and its use:
    the name is resolved once, and what has been found is what is shared.

    :param directory: an absolute path without symbolic links.
    :raises OSError: it has changed meanwhile; or as ``protect``.
    """
    _enter()
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.readlink(f"/proc/self/fd/{fd}") != directory:
        raise OSError(f"{directory} has been replaced")
    userns.check(lib.mount(b"none", STAGE.encode(), b"tmpfs", 0, b"mode=755"), f"mount {STAGE}")
    os.mkdir(SHARED)
    found, flags = f"/proc/self/fd/{fd}".encode(), lib.MS_BIND | lib.MS_REC
    userns.check(lib.mount(found, SHARED.encode(), ffi.NULL, flags, ffi.NULL), f"bind {directory}")
    os.close(fd)
    _write_protect(but=[SHARED] if writable else [])


def protect(writable: Sequence[str]) -> None:
    """Move this process to a new mount namespace in which only ``writable`` and the directories
    below can be written. For an ordinary user, the process also moves to a new user namespace, in
    which it is root.

    :param writable: absolute paths of directories, without symbolic links.
    :raises OSError: the kernel or a sandbox does not allow this. The caller must assume that
        nothing is write-protected.
    """
    _enter()
    for path in writable:
        name = os.fsencode(path)
        flags = lib.MS_BIND | lib.MS_REC
        userns.check(lib.mount(name, name, ffi.NULL, flags, ffi.NULL), f"bind {path}")
    _write_protect(but=writable)


def _enter() -> None:
    """A mount namespace of our own, from which nothing propagates."""
    if os.geteuid():
        userns.become_root()
    userns.unshare(lib.CLONE_NEWNS)
    _set_attr("/", {"propagation": lib.MS_PRIVATE}, lib.AT_RECURSIVE)


def _write_protect(*, but: Sequence[str]) -> None:
    _set_attr("/", {"attr_set": lib.MOUNT_ATTR_RDONLY}, lib.AT_RECURSIVE)
    for path in but:
        _set_attr(path, {"attr_clr": lib.MOUNT_ATTR_RDONLY}, 0)


def _set_attr(path: str, attr: dict[str, int], flags: int) -> None:
    """Call mount_setattr(2)."""
    made = ffi.new("struct mount_attr *", attr)
    name, size = os.fsencode(path), ffi.sizeof("struct mount_attr")
    result = lib.mount_setattr(lib.AT_FDCWD, name, flags, made, size)
    userns.check(result, f"mount_setattr {path}")
