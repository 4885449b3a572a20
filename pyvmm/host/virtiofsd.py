"""virtiofsd, which serves a directory of the host to a guest, as a child process: started, confined
and ended by us.

Theory of operation. The child (``host.child``) ends when its one connection does: also if this
process is killed. Before it is executed, the child has moved to a mount namespace in which
everything but a writable share is read-only (``hostnet.isolate``). Then virtiofsd confines itself:
as root to namespaces of its own with the directory as their root, as another user to that directory
as its root; and to few system calls.
"""

from __future__ import annotations

import os
import resource

from pyvmm.errors import ShareError
from pyvmm.host.child import ChildConnector
from pyvmm.hostnet import isolate
from pyvmm.programs import install

#: The program in Rust (Debian 13) and the one in C (Debian 12), with the package of each.
RUST, C = "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"
PACKAGES = {RUST: "virtiofsd", C: "qemu-system-common"}


def all_descriptors() -> None:
    """Let this process open as many files as it may. virtiofsd has a descriptor per file that the
    guest knows; for an ordinary user the one in C leaves the limit, mostly 1024, as it is.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def find() -> str:
    """The path of this machine's virtiofsd. :raises ShareError: there is none."""
    for path in (RUST, C):
        if os.access(path, os.X_OK):
            return path
    raise ShareError(
        "a directory can be shared only by virtiofsd, which is missing",
        install("|".join(PACKAGES.values())),
    )


def command(
    program: str, fd: int, directory: str, *, writable: bool, root: bool, cache: str = "auto"
) -> list[str]:
    """How to start it.

    :param fd: the listening socket. :param root: whether it is started by root.
    :param cache: how long the guest takes what it has read for true: ``auto``, which is a second,
        or ``always``.
    """
    # With the root directory itself, virtiofsd's pivot_root(2) fails, and there is nothing outside.
    sandbox = "namespace" if root and directory != "/" else "chroot"
    if program == RUST:
        return [
            program,
            f"--fd={fd}",
            f"--shared-dir={directory}",
            f"--sandbox={sandbox}",
            f"--cache={cache}",
            "--no-announce-submounts",
            "--log-level=error",
            *([] if writable else ["--readonly"]),
        ]
    escaped = directory.replace("\\", "\\\\").replace(",", "\\,")  # fuse_opt_parse()
    return [
        program,
        f"--fd={fd}",
        "-o",
        f"source={escaped},sandbox={sandbox},cache={cache},log_level=err",
    ]


class FsConnector(ChildConnector):
    """Starts a virtiofsd and makes the one connection to it.

    :param directory: to be served, without symbolic links. :param cache: see ``command``.
    :param mount: a mount of the directory (``isolate.detach``), lent, if this process has no
        such directory; else -1.
    :raises ShareError: there is no virtiofsd, or it cannot be started.
    """

    def __init__(
        self, directory: str, *, writable: bool, cache: str = "auto", mount: int = -1
    ) -> None:
        super().__init__("virtiofsd", directory, ShareError)
        program, root = find(), not os.geteuid()
        whole = directory == "/" and mount < 0
        environment, shim = dict(os.environ), None
        if not root:
            from pyvmm.host.shim import open_shim

            shim, more = open_shim()
            environment |= more

        def argv(fd: int) -> list[str]:
            where = directory if whole else isolate.SHARED
            return command(program, fd, where, writable=writable, root=root, cache=cache)

        def confine() -> None:
            all_descriptors()
            if whole:
                isolate.protect(["/"] if writable else [])
            else:
                isolate.stage(directory if mount < 0 else mount, writable=writable)

        try:
            self.start(argv, confine, environment, [shim.fileno()] if shim is not None else [])
        finally:
            if shim is not None:
                shim.close()
