"""Bochs, which emulates an Intel processor with VMX: Debian 13's package and all libraries that it
needs, libc among them, unpacked into the cache. So the same Bochs runs on every Debian, and nothing
is installed.
"""

from __future__ import annotations

import os
import shutil

from pyvmm.host.paths import cache_dir, cache_root, check_tree
from pyvmm.host.qemu import version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Debian 13. Bochs 2.7 of Debian 12 takes half as long again. Under 3.1 of sid, Linux dies in
#: hpet_enable.
RELEASE = "trixie"
#: The package bochs has no display but windows; bochs-term draws on a terminal.
PACKAGES = ("bochs", "bochs-term", "bochsbios", "vgabios")
PROGRAM = "usr/bin/bochs-bin"
LIB = "usr/lib/x86_64-linux-gnu"
PLUGINS = f"{LIB}/bochs/plugins"
DISPLAY = f"{PLUGINS}/libbx_term_gui.so"


class Bochs:
    """An unpacked Bochs.

    :param root: the directory into which it was unpacked; its name is the version.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    @property
    def argv(self) -> list[str]:
        """The command that starts it, without options.

        :raises HostError: its files may be somebody else's.
        """
        check_tree(self.root)
        lib = f"{self.root}/{LIB}"
        return [f"{lib}/ld-linux-x86-64.so.2", "--library-path", lib, f"{self.root}/{PROGRAM}"]

    @property
    def env(self) -> dict[str, str]:
        """What it needs in its environment."""
        return {
            "LTDL_LIBRARY_PATH": f"{self.root}/{PLUGINS}",
            "BXSHARE": f"{self.root}/usr/share/bochs",
            "TERM": "vt100",
        }

    @property
    def bios(self) -> str:
        """The path of the BIOS."""
        return f"{self.root}/usr/share/bochs/BIOS-bochs-latest"

    @property
    def vga_bios(self) -> str:
        """The path of the video BIOS."""
        return f"{self.root}/usr/share/bochs/VGABIOS-lgpl-latest"

    def __str__(self) -> str:
        return f"Bochs {os.path.basename(self.root)}"


def find() -> Bochs | None:
    """The newest Bochs in the cache; None if there is none."""
    base = f"{cache_root()}/testbed/bochs"
    names = os.listdir(base) if os.path.isdir(base) else []
    found = [Bochs(f"{base}/{name}") for name in sorted(names, key=version, reverse=True)]
    return next((one for one in found if os.access(f"{one.root}/{PROGRAM}", os.X_OK)), None)


def fetch(progress: Callable[[str], None]) -> Bochs:
    """Unpack Bochs into the cache, unless it is there.

    :raises PyvmmError: a download failed.
    """
    import tempfile
    from pathlib import Path

    from pyvmm.host.apt import Apt
    from pyvmm.images.packages import gather

    have = find()
    if have is not None:
        return have
    apt = Apt(RELEASE, progress)
    number = apt.resolve(PACKAGES[:1])[0].version.split("+")[0]
    target = Path(cache_dir("bochs"), number)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        fresh = Path(scratch, "root")
        gather(apt, PACKAGES, lambda: [fresh / PROGRAM, fresh / DISPLAY], fresh)
        fresh.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return Bochs(str(target))
