"""Where pyvmm finds the programs and modules that it runs: never by the current directory.

Whoever owns the current directory may have put files there. An entry of PATH, LD_LIBRARY_PATH or
PYTHONPATH that is empty or relative means that directory, often by accident (``$PYTHONPATH:/dir``
with an empty variable), and so does ``python -m``.
"""

from __future__ import annotations

import errno
import os
import sys

#: Environment variables that are lists of directories in which code is looked for.
LISTS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
LAUNCHER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")


def absolute_only(directories: str) -> str:
    """The absolute ones of a list of directories, joined by colons as in PATH."""
    return ":".join(d for d in directories.split(":") if d.startswith("/"))


def distrust_current_directory() -> None:
    """Take relative directories out of the environment, for this process and its children."""
    for name in LISTS:
        old = os.environ.get(name)
        if old is None:
            continue
        new = absolute_only(old)
        if name == "PYTHONPATH":
            for entry in old.split(":"):
                # The interpreter has made it absolute.
                if not entry.startswith("/") and os.path.abspath(entry) in sys.path:
                    sys.path.remove(os.path.abspath(entry))
        if new:
            os.environ[name] = new
        else:
            del os.environ[name]


def which(name: str, more: str = "") -> str | None:
    """The path of a program in PATH, or in the directories of ``more`` after it; None if there is
    none.
    """
    for directory in absolute_only(f"{os.environ.get('PATH', os.defpath)}:{more}").split(":"):
        path = f"{directory}/{name}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def install(*packages: str) -> str:
    """How the user installs packages of Debian. Where there is no apt, only the user knows what
    they are called.

    :param packages: each a name, or ``NAME|OTHER``: the first of these that apt knows.
    """
    cache = which("apt-cache", "/usr/bin")
    names = [_known(cache, package.split("|")) for package in packages]
    if cache is None:
        return f"install what Debian has in {', '.join(names)}"
    return f"run as root: apt-get install --no-install-recommends {' '.join(names)}"


def _known(cache: str | None, names: list[str]) -> str:
    """The first of ``names`` that apt knows, if there is a choice; all of them if apt knows none,
    as without package lists.
    """
    if cache is None or len(names) == 1:
        return " or ".join(names)
    import subprocess

    for name in names:
        asked = subprocess.run([cache, "show", name], capture_output=True, stdin=subprocess.DEVNULL)
        if not asked.returncode:
            return name
    return " or ".join(names)


def program(name: str) -> str:
    """The path by which to run a program: ``name`` if it is absolute, else as in ``which``.

    :raises FileNotFoundError: there is no such program, as if it had been run.
    """
    path = name if name.startswith("/") else which(name)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return path


def module(name: str, *args: str) -> list[str]:
    """The command that runs ``python -m NAME ARGS`` with this pyvmm and its interpreter, wherever
    it is started (``launch``).
    """
    return [sys.executable, "-P", LAUNCHER, name, *args]


def interpreter() -> list[str]:
    """The files by which ``module`` finds the interpreter and its modules."""
    return [sys.executable, f"{sys.prefix}/pyvenv.cfg"]
