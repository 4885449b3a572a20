"""Start virtiofsd so that it can write only where the testbed may: in a mount namespace with
everything else read-only.
"""

from __future__ import annotations

import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/sched.h, linux/mount.h, linux/fcntl.h, linux/prctl.h, asm/unistd_64.h
CLONE_NEWNS = 0x0002_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY = 1
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG = 1
NR_MOUNT_SETATTR = 442


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class _MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = [
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    ]


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that forked it ends; call it right before exec."""
    _check(_libc().prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "prctl")


def protect(writable: Sequence[str]) -> None:
    """Give this process a mount namespace where only ``writable`` and what is below can be written.

    An ordinary user gets it by a user namespace, in which it is root.

    :param writable: absolute directories without symbolic links.
    :raises OSError: the kernel or a sandbox does not allow namespaces; nothing has changed that
        matters.
    """
    libc = _libc()
    uid, gid = os.geteuid(), os.getegid()
    _check(libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        for path, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{path}", "w") as f:
                f.write(text)
    _set_attr(libc, "/", _MountAttr(propagation=MS_PRIVATE), AT_RECURSIVE)
    for path in writable:
        name = os.fsencode(path)
        _check(libc.mount(name, name, None, ctypes.c_ulong(MS_BIND | MS_REC), None), f"bind {path}")
    _set_attr(libc, "/", _MountAttr(set=MOUNT_ATTR_RDONLY), AT_RECURSIVE)
    for path in writable:
        _set_attr(libc, path, _MountAttr(clear=MOUNT_ATTR_RDONLY), 0)


def _set_attr(libc: ctypes.CDLL, path: str, attr: _MountAttr, flags: int) -> None:
    _check(
        libc.syscall(
            ctypes.c_long(NR_MOUNT_SETATTR),
            ctypes.c_int(AT_FDCWD),
            os.fsencode(path),
            ctypes.c_uint(flags),
            ctypes.byref(attr),
            ctypes.c_size_t(ctypes.sizeof(attr)),
        ),
        f"mount_setattr {path}",
    )
