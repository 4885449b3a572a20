"""Directories of pyvmm on the host: caches, which survive a reboot, and run-time state, which does
not.
"""

from __future__ import annotations

import os
import stat

from pyvmm.errors import HostError


def cache_dir(*parts: str) -> str:
    """The directory ``testbed/PARTS`` in pyvmm's cache. It is created if necessary."""
    path = os.path.join(cache_root(), "testbed", *parts)
    os.makedirs(path, exist_ok=True)
    return path


def cache_root() -> str:
    """pyvmm's cache: ``$XDG_CACHE_HOME/pyvmm`` or ``~/.cache/pyvmm``, with symbolic links resolved.
    It need not exist. pyvmm runs programs that are there: so it belongs to this user or to root.

    :raises HostError: the home directory is not known, or not absolute; or others may have put
        something into the cache.
    """
    path = _cache_path()
    check_owner(path)
    return path


def check_owner(path: str) -> None:
    """Refuse a file or directory of the cache that another user may have written. One that does
    not exist is good.

    :raises HostError: it belongs to another user than this one and root, or others may write it.
    """
    if "PYVMM_IN_TESTBED" in os.environ:
        return  # there, root is the user who has started the testbed
    try:
        info = os.lstat(path)
    except OSError:
        return
    user = os.geteuid()
    if info.st_uid not in (user, 0):
        raise HostError(
            f"{path} belongs to user {info.st_uid}, and this is user {user}, who would run what is "
            "in it",
            "set XDG_CACHE_HOME to a directory of your own, or HOME, as sudo -H does",
        )
    # Many users have a group of their own, which may write all of their files. That of the process
    # may be another one, as after `newgrp kvm`.
    shared = info.st_mode & stat.S_IWGRP and info.st_gid not in (_own_group(user), 0)
    if not stat.S_ISLNK(info.st_mode) and (info.st_mode & stat.S_IWOTH or shared):
        raise HostError(
            f"{path} may be written by others, and this user would run what is in it",
            f"remove it, or: chmod -R go-w {path}",
        )


def _own_group(user: int) -> int:
    """The user's group by the system's list, or else that of the process."""
    import pwd

    try:
        return pwd.getpwuid(user).pw_gid
    except KeyError:
        return os.getegid()


def check_tree(path: str) -> None:
    """As ``check_owner``, for a file or all that is in a directory of the cache, and for all
    directories above within the cache, if root is about to run it: as root, a file of somebody
    else's would be the way to all others.

    :raises HostError: see there.
    """
    if os.geteuid():
        return
    above, root = path, _cache_path()
    while above.startswith(f"{root}/"):
        check_owner(above)
        above = os.path.dirname(above)
    for directory, _, files in os.walk(path):
        check_owner(directory)
        for name in files:
            check_owner(f"{directory}/{name}")


def cache_name() -> str:
    """The path of pyvmm's cache as HOME or XDG_CACHE_HOME name it, which may go through links.

    :raises HostError: the home directory is not known, or not absolute.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):  # the XDG specification: a relative path is to be ignored
        base = os.path.expanduser("~/.cache")
    if not base.startswith("/"):
        raise HostError(f"{base} is no absolute path", "set HOME")
    return os.path.join(base, "pyvmm")


def _cache_path() -> str:
    return os.path.realpath(cache_name())


def cache_trouble(e: OSError) -> str:
    """The one line for an error about a file or a directory of the cache; empty if the error is
    about something else.
    """
    name, root = e.filename, _cache_path()
    if not isinstance(name, str) or not (name.startswith(root) or root.startswith(f"{name}/")):
        return ""
    return f"{name}: {e.strerror}; set XDG_CACHE_HOME to a directory of your own that has room"


def runtime_dir() -> str:
    """The user's own directory for sockets, mode 0700, below $XDG_RUNTIME_DIR, /run/user/UID or
    /tmp. It is created if necessary.

    A base directory with a long name is skipped: the path of a socket has at most 108 bytes
    (unix(7)).

    :raises HostError: the directory belongs to somebody else, others may enter it, or it cannot be
        made.
    """
    uid = os.getuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if (
            base
            and base.startswith("/")
            and len(os.fsencode(base)) < 48
            and os.access(base, os.W_OK | os.X_OK)
            and os.stat(base).st_uid == uid
        ):
            path = f"{base}/pyvmm"
            break
    else:
        path = f"/tmp/pyvmm-{uid}"
    return private(path)


def private(path: str) -> str:
    """Make sure that ``path`` is a directory of this user that nobody else may enter. It is created
    if necessary; its parent must exist.

    :returns: ``path``.
    :raises HostError: the directory belongs to somebody else, others may enter it, or it cannot be
        made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as e:
        raise HostError(
            f"cannot make {path}: {e.strerror}", "set XDG_RUNTIME_DIR to a directory of yours"
        ) from e
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise HostError(f"{path} is not a private directory of this user", "remove it")
    return path
