"""Namespaces of the calling thread, and how to be root in a user namespace of our own."""

from __future__ import annotations

import os

from pyvmm._ext import ffi, lib
from pyvmm.hostnet import ALLOW_USER_NAMESPACES

#: Ubuntu's kernel lets anybody make a user namespace, but AppArmor then forbids what makes the
#: namespace useful.
RESTRICTED = "kernel.apparmor_restrict_unprivileged_userns"


def check(result: int, what: str) -> None:
    """:raises OSError: ``result``, the return value of a system call, reports a failure."""
    if result:
        number = ffi.errno
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces of the kinds ``flags`` (CLONE_NEW*) for new ones.

    :raises OSError: from unshare(2); EINVAL for CLONE_NEWUSER in a process with threads.
    """
    check(lib.unshare(flags), "unshare")


def remedy() -> str:
    """The command by which root allows user namespaces on this machine."""
    try:
        with open(f"/proc/sys/{RESTRICTED.replace('.', '/')}") as f:
            restricted = f.read().strip() != "0"
    except OSError:
        restricted = False
    return f"sysctl {RESTRICTED}=0" if restricted else ALLOW_USER_NAMESPACES


def become_root() -> None:
    """Enter a new user namespace and be root in it. Outside of it, the process keeps its user.

    :raises OSError: the kernel or a sandbox does not allow this.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(lib.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
