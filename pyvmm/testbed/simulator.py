"""The kernel's vDPA simulator (vdpa_sim_net) and its driver for PCI cards (vp_vdpa), which Debian
does not ship: built from Debian's source for a 6.12 kernel in our cache, where modprobe finds them
in L1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from pyvmm.errors import TestbedError
from pyvmm.host.apt import find_kernel_package, unpack
from pyvmm.host.paths import cache_dir
from pyvmm.images.sources import recipe
from pyvmm.programs import install, program, which
from pyvmm.testbed import assets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.host.apt import Apt

#: The series whose cloud kernel has vDPA, vhost_vdpa and VDUSE.
SERIES = "6.12"
#: The modules; each comes after those that it needs: the simulator needs vringh, which Debian's
#: configuration leaves out.
MODULES = ("vringh", "vdpa_sim", "vdpa_sim_net", "vp_vdpa")
SOURCES = {
    "drivers/vhost": ("vringh.c",),
    "drivers/vdpa/vdpa_sim": ("vdpa_sim.c", "vdpa_sim.h", "vdpa_sim_net.c"),
    "drivers/vdpa/virtio_pci": ("vp_vdpa.c",),
}


def setup(progress: Callable[[str], None]) -> str:
    """Fetch the newest kernel of ``SERIES``, and build the simulator for it; quick if both are
    there. Returns the kernel's version.

    :raises PyvmmError: a tool is missing, a download failed, or the source does not compile.
    """
    have = [k for k in assets.kernels() if k.version.startswith(f"{SERIES}.") and _built(k.root)]
    if have:
        return have[0].version
    assets.fetch_kernel(SERIES, progress)
    apt, names = find_kernel_package(recipe()["kernel"], SERIES, progress)
    version = names[0].removeprefix("linux-image-")
    root = f"{cache_dir('kernel')}/{version}"
    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        headers = _headers(apt, version, Path(scratch))
        work = _source(apt, Path(scratch))
        progress("building the vDPA simulator")
        _run(["make", "-C", str(headers), f"M={work}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"])
        extra = f"{root}/lib/modules/{version}/extra"
        os.makedirs(extra, exist_ok=True)
        for module in MODULES:
            shutil.copyfile(f"{work}/{module}.ko", f"{extra}/{module}.ko")
    _run([which("depmod", "/usr/sbin:/sbin") or "/sbin/depmod", "-b", root, version])
    return version


def _built(root: str) -> bool:
    """Whether depmod, which comes last, has found the modules."""
    found = Path(root).glob("lib/modules/*/modules.dep") if root else []
    return any(f"extra/{MODULES[-1]}.ko:" in path.read_text() for path in found)


def _headers(apt: Apt, version: str, into: Path) -> Path:
    """The directory in which modules for a kernel are built."""
    name = f"linux-headers-{version}"
    needs = [n for n in apt.depends(name) if n.startswith(("linux-headers-", "linux-kbuild-"))]
    for deb in apt.download(apt.resolve([name, *dict.fromkeys(needs)])):
        unpack(deb, into)
    directory = into / "usr" / "src" / name
    makefile = directory / "Makefile"  # it names the place where root would install the rest
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{into}/usr/src/"))
    return directory


def _source(apt: Apt, into: Path) -> Path:
    """The directory with the modules' sources."""
    name = f"linux-source-{SERIES}"
    (deb,) = apt.download(apt.resolve([name]))
    unpack(deb, into)
    work = into / "simulator"
    work.mkdir()
    members = [f"{name}/{place}/{file}" for place, files in SOURCES.items() for file in files]
    archive = str(into / "usr" / "src" / f"{name}.tar.xz")
    _run(["tar", "-xJf", archive, "-C", str(work), "--strip-components=3", *members])
    for nested in work.glob("*/*.[ch]"):
        nested.rename(work / nested.name)
    objects = " ".join(f"{module}.o" for module in MODULES)
    (work / "Makefile").write_text(f"obj-m := {objects}\n")
    return work


def _run(command: list[str]) -> None:
    """:raises TestbedError: it is missing or fails."""
    try:
        done = subprocess.run(
            [program(command[0]), *command[1:]], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as e:
        raise TestbedError(
            f"{command[0]} is missing", install("make", "gcc", "kmod", "xz-utils")
        ) from e
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror" in line] or ["no reason given"]
        raise TestbedError(f"cannot build the vDPA simulator: {said[0]}", "see docs/vhost-vdpa.md")
