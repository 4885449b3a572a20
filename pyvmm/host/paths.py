"""Where pyvmm keeps things on the host: caches that survive, and run-time state that does not."""

from __future__ import annotations

import os
import stat

from pyvmm.errors import HostError


def cache_dir(*parts: str) -> str:
    """A directory of the testbed's cache, made if need be:
    ${XDG_CACHE_HOME:-~/.cache}/pyvmm/testbed/PARTS.
    """
    path = os.path.join(cache_root(), "testbed", *parts)
    os.makedirs(path, exist_ok=True)
    return path


def cache_root() -> str:
    """pyvmm's cache, without symbolic links; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.realpath(os.path.join(base, "pyvmm"))


def runtime_dir() -> str:
    """The user's own directory for sockets, mode 0700: under $XDG_RUNTIME_DIR, /run/user/UID or
    /tmp.

    One whose name leaves no room for that of a socket (108 bytes in all, unix(7)) is passed over.

    :raises HostError: it belongs to somebody else or others may enter.
    """
    uid = os.getuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{uid}"):
        if (
            base
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
    """``path``, a directory of this user that nobody else may enter; made if need be, its parent is
    there.

    :raises HostError: it belongs to somebody else, others may enter, or it cannot be made.
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
