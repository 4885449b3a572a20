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


def protect(writable: Sequence[str]) -> None:
    """Move this process to a new mount namespace in which only ``writable`` and the directories
    below can be written. For an ordinary user, the process also moves to a new user namespace, in
    which it is root.

    :param writable: absolute paths of directories, without symbolic links.
    :raises OSError: the kernel or a sandbox does not allow this. The caller must assume that
        nothing is write-protected.
    """
    if os.geteuid():
        userns.become_root()
    userns.unshare(lib.CLONE_NEWNS)
    _set_attr("/", {"propagation": lib.MS_PRIVATE}, lib.AT_RECURSIVE)
    for path in writable:
        name = os.fsencode(path)
        flags = lib.MS_BIND | lib.MS_REC
        userns.check(lib.mount(name, name, ffi.NULL, flags, ffi.NULL), f"bind {path}")
    _set_attr("/", {"attr_set": lib.MOUNT_ATTR_RDONLY}, lib.AT_RECURSIVE)
    for path in writable:
        _set_attr(path, {"attr_clr": lib.MOUNT_ATTR_RDONLY}, 0)


def _set_attr(path: str, attr: dict[str, int], flags: int) -> None:
    """Call mount_setattr(2)."""
    made = ffi.new("struct mount_attr *", attr)
    name, size = os.fsencode(path), ffi.sizeof("struct mount_attr")
    result = lib.mount_setattr(lib.AT_FDCWD, name, flags, made, size)
    userns.check(result, f"mount_setattr {path}")
