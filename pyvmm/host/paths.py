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
    It need not exist.

    :raises HostError: the home directory is not known, or not absolute.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base.startswith("/"):  # the XDG specification: a relative path is to be ignored
        base = os.path.expanduser("~/.cache")
    if not base.startswith("/"):
        raise HostError(f"{base} is no absolute path", "set HOME")
    return os.path.realpath(os.path.join(base, "pyvmm"))


def cache_trouble(e: OSError) -> str:
    """The one line for an error about a file or a directory of the cache; empty if the error is
    about something else.
    """
    name, root = e.filename, cache_root()
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
