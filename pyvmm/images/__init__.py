"""Guest images: this module finds them; ``pyvmm image build`` makes them (``pyvmm.images.build``).

An image is a directory of ``vmlinux`` (an ELF, which boots fastest), ``bzImage``, ``initrd`` (a
newc cpio archive) and ``image.json`` (which tells what the image is made of). Every ``pyvmm run``
imports this module, so it imports next to nothing itself.
"""

from __future__ import annotations

import os

from pyvmm.errors import ImageError, did_you_mean
from pyvmm.host.paths import cache_root

#: Kernel parameters for a quick boot. Crypto self-tests take a fifth of the boot of Debian's kernel
#: under emulation.
CMDLINE = "quiet cryptomgr.notests"
FILES = ("vmlinux", "bzImage", "initrd", "image.json")
#: The names of images, with the options of ``pyvmm image build`` that make them. A series of
#: kernels, such as 6.12, is a name, too.
NAMES = {"default": "", "host": " --from-host", "tiny": " --tiny"}


class Image:
    """One built image. All paths are absolute."""

    def __init__(self, name: str, directory: str) -> None:
        self.name = name
        self.directory = directory
        self.kernel = directory + "/vmlinux"
        self.bzimage = directory + "/bzImage"
        self.initrd = directory + "/initrd"

    @property
    def info(self) -> dict[str, object]:
        """The content of ``image.json``.

        :raises ImageError: the file cannot be read, or is no JSON object.
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
        """The kernel's release, as ``uname -r`` shows it in the guest."""
        return str(self.info.get("version", ""))

    def __repr__(self) -> str:
        return f"Image({self.name!r}, {self.directory!r})"


def directory() -> str:
    """The directory of all images: ``$XDG_CACHE_HOME/pyvmm/images`` or ``~/.cache/pyvmm/images``.
    This function does not create it.
    """
    return cache_root() + "/images"


def remedy(name: str) -> str:
    """The hint for a user who lacks image ``name``."""
    options = f" --kernel-version {name}" if is_series(name) else NAMES.get(name, "")
    return f"run: pyvmm image build{options}"


def is_name(name: str) -> bool:
    """Whether ``name`` is one of an image, built or not, and no path of a kernel."""
    return name in NAMES or is_series(name)


def is_series(name: str) -> bool:
    """Whether ``name`` is a series of Linux kernels, such as 6.12."""
    major, dot, minor = name.partition(".")
    return bool(dot) and all(part.isascii() and part.isdecimal() for part in (major, minor))


def find(name: str = "default") -> Image:
    """The built image ``name``, one of ``NAMES`` or a series of kernels.

    :raises ImageError: the name is unknown, or the image is not built.
    """
    if not is_name(name):
        raise ImageError(
            f"there is no image '{name}'",
            f"{did_you_mean(name, NAMES)}use {', '.join(NAMES)} or a series of kernels, such as "
            "6.12",
        )
    # A build replaces an image by moving a link. Resolve the link, so that kernel and initrd come
    # from the same build.
    path = os.path.realpath(f"{directory()}/{name}")
    if not os.access(path + "/image.json", os.R_OK):
        raise ImageError(f"image '{name}' is not built", remedy(name))
    return Image(name, path)


def built() -> list[Image]:
    """All images that are built, in the order of ``NAMES``; then those of chosen series."""
    images = []
    try:
        series = sorted(name for name in os.listdir(directory()) if is_series(name))  # noqa: PTH208
    except OSError:
        series = []
    for name in (*NAMES, *series):
        try:
            images.append(find(name))
        except ImageError:
            pass
    return images
