"""Finds the QEMUs on this machine: those that ``pyvmm testbed setup`` has unpacked, and the
installed one.
"""

from __future__ import annotations

import os
import re

from pyvmm.errors import HostError
from pyvmm.host.paths import cache_root, check_tree
from pyvmm.programs import which

NAME = "qemu-system-x86_64"
PROGRAM = f"usr/bin/{NAME}"
#: The files and directories of unpacked QEMU packages that are needed to run QEMU. The shared
#: libraries come with the installed QEMU.
PARTS = (PROGRAM, "usr/share/qemu", "usr/share/seabios")


def version(text: str) -> tuple[int, ...]:
    """The numbers in the text of a version, by which versions are ordered: (6, 1, 0, 9) for
    ``6.1.0-9-cloud``.
    """
    return tuple(int(number) for number in re.findall(r"\d+", text))


class Qemu:
    """A qemu-system-x86_64.

    :param root: the directory into which its package was unpacked; empty for the installed QEMU.
    """

    def __init__(self, path: str, version: tuple[int, ...], root: str = "") -> None:
        self.path, self.version, self.root = path, version, root

    @classmethod
    def unpacked(cls, root: str, version: tuple[int, ...]) -> Qemu:
        """The QEMU whose package was unpacked into ``root``."""
        return cls(f"{root}/{PROGRAM}", version, root)

    @property
    def argv(self) -> list[str]:
        """The command that starts this QEMU, with the options by which it finds its firmware.

        :raises HostError: its files may be somebody else's.
        """
        if not self.root:
            return [self.path]
        check_tree(self.root)
        share = f"{self.root}/usr/share"
        where = (f"{share}/qemu", f"{share}/seabios", "/usr/share/qemu")
        return [self.path, *(word for path in where for word in ("-L", path))]

    @property
    def max_cpus(self) -> int:
        """How many vCPUs the testbed's L1 may have under this QEMU. Before 8.1, multi-threaded TCG
        runs stale code after the guest kernel has patched itself.
        """
        return 8 if self.version >= (8, 1) else 1

    def __str__(self) -> str:
        return "QEMU " + ".".join(map(str, self.version))


def unpacked() -> list[Qemu]:
    """The QEMUs in the cache, in any order."""
    base = f"{cache_root()}/testbed/qemu"
    names = os.listdir(base) if os.path.isdir(base) else []
    found = [Qemu.unpacked(f"{base}/{name}", version(name)) for name in names]
    return [qemu for qemu in found if os.access(qemu.path, os.X_OK)]


def qemus() -> list[Qemu]:
    """All QEMUs that are found, the newest first. The installed one is run for its version."""
    found = unpacked()
    system = which(NAME)
    if system:
        import subprocess

        out = subprocess.run([system, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"version (\d+(?:\.\d+)+)", out)
        if match:
            found.append(Qemu(system, version(match[1])))
    return sorted(found, key=lambda q: q.version, reverse=True)


def newest() -> Qemu:
    """The first of ``qemus``.

    :raises HostError: there is no QEMU.
    """
    for qemu in qemus():
        return qemu
    raise HostError("QEMU is not installed here", "install qemu-system-x86")
