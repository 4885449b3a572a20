"""Namespaces of the calling thread, and how to be root in a user namespace of our own."""

from __future__ import annotations

import os
from contextlib import contextmanager

from pyvmm._ext import ffi, lib
from pyvmm.hostnet import ALLOW_USER_NAMESPACES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Ubuntu's kernel lets anybody make a user namespace, but AppArmor then forbids what makes the
#: namespace useful.
RESTRICTED = "kernel.apparmor_restrict_unprivileged_userns"


def check(result: int, what: str) -> None:
    """:raises OSError: ``result``, the return value of a system call, reports a failure."""
    if result:
        number = ffi.errno
        raise OSError(number, f"{what}: {os.strerror(number)}")


@contextmanager
def acting_as(user: tuple[int, int]) -> Iterator[None]:
    """Have the calling process, a child of root's with one thread, the rights of another user and
    group meanwhile, and no other group. To become root again is still possible: so code of somebody
    else's must not run. The process is not dumpable afterwards.
    """
    groups, parent = os.getgroups(), os.getppid()
    os.setgroups([])
    try:
        os.setegid(user[1])
        os.seteuid(user[0])
        lib.pv_follow_parent(parent)  # which a change of user has taken back
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        lib.pv_follow_parent(parent)


def unshare(flags: int) -> None:
    """Leave the namespaces of the kinds ``flags`` (CLONE_NEW*) for new ones.

    :raises OSError: from unshare(2); EINVAL for CLONE_NEWUSER in a process with threads.
    """
    check(lib.unshare(flags), "unshare")


#: Debian's kernels have had a switch of their own.
SWITCHED_OFF = "kernel.unprivileged_userns_clone"
LIMIT = "user.max_user_namespaces"


def remedy() -> str:
    """How user namespaces are allowed on this machine, as far as it says what forbids them."""
    if _setting(RESTRICTED) not in ("", "0"):
        return f"run as root: sysctl {RESTRICTED}=0"
    if _setting(LIMIT) == "0":
        return f"run as root: sysctl {LIMIT}=10000"
    if _setting(SWITCHED_OFF) == "0":
        return f"run as root: sysctl {SWITCHED_OFF}=1"
    if _filtered():
        return "start the container with --security-opt seccomp=unconfined, or --privileged"
    return f"run as root: {ALLOW_USER_NAMESPACES}"


def _setting(name: str) -> str:
    """The value of a sysctl; empty if there is none."""
    try:
        with open(f"/proc/sys/{name.replace('.', '/')}") as f:
            return f.read().strip()
    except OSError:
        return ""


def _filtered() -> bool:
    """Whether this process has a filter of system calls, as in a container."""
    with open("/proc/self/status") as f:
        return any(line.split() == ["Seccomp:", "2"] for line in f)


def become_root() -> None:
    """Enter a new user namespace and be root in it. Outside of it, the process keeps its user.

    :raises OSError: the kernel or a sandbox does not allow this.
    """
    uid, gid = os.geteuid(), os.getegid()
    unshare(lib.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
