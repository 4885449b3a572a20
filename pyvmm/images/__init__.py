"""Guest images: a kernel and an initramfs, built by ``pyvmm image build``, found here.

This module is on the path of every ``pyvmm run`` and imports next to nothing;
``pyvmm.images.build`` makes images. An image is a directory of ``vmlinux`` (ELF, boots fastest),
``bzImage``, ``initrd`` (newc cpio) and ``image.json`` (what it is made of).
"""

from __future__ import annotations

import os

from pyvmm.errors import ImageError
from pyvmm.host.paths import cache_root

#: Kernel parameters for a quick boot: crypto self-tests are a fifth of the time that Debian's
#: kernel takes under emulation.
CMDLINE = "quiet cryptomgr.notests"
FILES = ("vmlinux", "bzImage", "initrd", "image.json")
#: image name -> the options of ``pyvmm image build`` that make it.
NAMES = {"default": "", "6.12": " --kernel-version 6.12", "host": " --from-host", "tiny": " --tiny"}


class Image:
    """One built image; paths are absolute."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self.directory = directory
        self.kernel = directory + "/vmlinux"
        self.bzimage = directory + "/bzImage"
        self.initrd = directory + "/initrd"

    @property
    def info(self) -> dict[str, object]:
        """What ``image.json`` says.

        :raises ImageError: where it cannot be read.
        """
        import json

        try:
            with open(self.directory + "/image.json") as f:
                info = json.load(f)
        except (OSError, ValueError) as e:
            raise ImageError(f"image {self.name} is damaged: {e}", remedy(self.name)) from None
        if not isinstance(info, dict):
            raise ImageError(
                f"image {self.name} is damaged: image.json is no object", remedy(self.name)
            )
        return info

    @property
    def version(self) -> str:
        """The kernel's release, as ``uname -r`` says in the guest."""
        return str(self.info.get("version", ""))

    def __repr__(self) -> str:
        return f"Image({self.name!r}, {self.directory!r})"


def directory() -> str:
    """Where images are kept: ``$XDG_CACHE_HOME/pyvmm/images`` or ``~/.cache/pyvmm/images``; not
    created.
    """
    return cache_root() + "/images"


def remedy(name: str) -> str:
    """The hint for a user who lacks image ``name``."""
    return f"build it with: pyvmm image build{NAMES.get(name, '')}"


def find(name: str = "default") -> Image:
    """The built image ``name`` (one of ``NAMES``).

    :raises ImageError: where there is none.
    """
    if name not in NAMES:
        raise ImageError(f"there is no image '{name}'", f"known are: {', '.join(NAMES)}")
    # Images are replaced by moving a link: resolve it, so that kernel and initrd are of the same
    # build.
    path = os.path.realpath(f"{directory()}/{name}")
    if not os.access(path + "/image.json", os.R_OK):
        raise ImageError(f"image '{name}' is not built", remedy(name))
    return Image(name, path)


def built() -> list[Image]:
    """All images there are, in the order of ``NAMES``."""
    images = []
    for name in NAMES:
        try:
            images.append(find(name))
        except ImageError:
            pass
    return images
