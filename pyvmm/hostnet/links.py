"""Symbolic links on the way to a file that root opens for another user: whoever can make such a
link would choose what root opens.
"""

from __future__ import annotations

import errno
import os
import stat

from pyvmm.errors import UsageError
from pyvmm.hostnet.isolate import open_found

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

#: Symbolic links on the way to one place, as in the kernel (MAXSYMLINKS).
LINKS_MAX = 40
#: User and group of files whose owner has no number in a user namespace (user_namespaces(7)).
NOBODY = 65534


def walk(path: str, *, named: bool) -> Generator[tuple[str, str | None, bool], None, str]:
    """Go to a place step by step, and follow symbolic links. Each step yields the path so far, of
    which only the last part may be a link; the link's target, or None if that part is no link; and
    whether more parts follow. Returns the place's path without symbolic links, which is empty for
    the root directory.

    :param path: absolute.
    :param named: somebody names the place, so that links on the way to it have to be root's alone.
    :raises UsageError: a link is not.
    :raises OSError: there is nothing, or too many links, or somebody is changing names.
    """
    at, links, todo = "", 0, path.split("/")
    while todo:
        part = todo.pop(0)
        if part in ("", "."):
            continue
        if part == "..":
            at = os.path.dirname(at).rstrip("/")
            continue
        here = f"{at}/{part}"
        target = _target(at, part, path if named else "")
        yield here, target, any(todo)
        if target is None:
            at = here
            continue
        links += 1
        if links > LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        at = "" if target.startswith("/") else at
        todo = [*target.split("/"), *todo]
    return at


def follow(path: str) -> str:
    """As ``os.path.realpath``, for a name of somebody's: see ``walk``."""
    steps = walk(os.path.join(os.getcwd(), path), named=True)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value or "/"


def _target(at: str, part: str, path: str) -> str | None:
    """What the link ``part`` of the directory ``at`` says; None if it is none.

    :param path: if the link has to be root's alone, the name on whose way it is.
    """
    here = f"{at}/{part}"
    if not stat.S_ISLNK(os.lstat(here).st_mode):
        return None
    if not path:
        return os.readlink(here)
    # Looked at and read by descriptors: by its name, the link could be another one each time.
    directory = open_found(at or "/")
    try:
        link = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not _is_roots(os.fstat(directory), os.fstat(link)):
                raise UsageError(
                    f"--jail: {path!r}: others than root may have put the link {here!r} there",
                    "name what it leads to, or have root own the link and its directory",
                )
            return os.readlink("", dir_fd=link)
        finally:
            os.close(link)
    finally:
        os.close(directory)


def _is_roots(directory: os.stat_result, link: os.stat_result) -> bool:
    """Whether root has made a link, and nobody else can move a link of root's to its place."""
    roots = {0}
    if "PYVMM_IN_TESTBED" in os.environ:
        roots.add(NOBODY)  # root of the host, if an ordinary user has started the testbed
    group = 0 if directory.st_gid in roots else stat.S_IWGRP
    shared = directory.st_mode & (stat.S_IWOTH | group) and not directory.st_mode & stat.S_ISVTX
    return {link.st_uid, directory.st_uid} <= roots and not shared
