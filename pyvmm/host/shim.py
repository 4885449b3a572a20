"""The library that lets an ordinary user run virtiofsd (``testbed/shim.c``)."""

from __future__ import annotations

import os
import stat

from pyvmm.errors import HostError
from pyvmm.fd import Fd
from pyvmm.host.paths import cache_dir, check_tree
from pyvmm.programs import program

_HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.join(os.path.dirname(_HERE), "testbed", "shim.c")
#: Compiled when the package was built (``images.sources.fill``).
BUILT = os.path.join(os.path.dirname(_HERE), "share", "testbed", "shim.so")
#: Whatever root's umask is, the user of a jail opens the library.
MODE = 0o755


def open_shim() -> tuple[Fd, dict[str, str]]:
    """The library as a descriptor that a child process must inherit, and what the child's
    environment must say. A path would not do: the loader ends a name at a space or a colon, which
    the user's directory may have in its name.

    :raises HostError: it is not compiled yet, and there is no compiler.
    """
    fd = Fd(os.open(place(), os.O_RDONLY | os.O_CLOEXEC))
    return fd, {"LD_PRELOAD": f"/proc/self/fd/{fd.fileno()}"}


def place() -> str:
    """The path of the library, which is compiled if need be. :raises HostError: it cannot be."""
    return BUILT if os.path.isfile(BUILT) else _compiled()


def _compiled() -> str:
    import hashlib

    with open(SOURCE, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    target = f"{cache_dir()}/shim-{digest[:12]}.so"
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        work = f"{target}.{os.getpid()}"
        compile_shim(SOURCE, work)
        os.chmod(work, MODE)
        os.rename(work, target)
        mode = MODE
    check_tree(target)
    if mode & MODE != MODE and not os.geteuid():  # the file is root's, as the check has found
        os.chmod(target, MODE)
    return target


def compile_shim(source: str, to: str) -> None:
    """Compile the library.

    :raises HostError: there is no compiler, or it refuses.
    """
    import subprocess

    try:
        command = [program("gcc"), "-D_GNU_SOURCE", "-O2", "-shared", "-fPIC", "-o", to, source]
    except FileNotFoundError as e:
        raise HostError("gcc is missing", "install gcc and libc6-dev") from e
    if subprocess.run(command, capture_output=True).returncode:
        raise HostError(f"gcc cannot compile {source}", "install gcc and libc6-dev")
