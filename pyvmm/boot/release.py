"""The release of a Linux kernel, as ``uname -r`` shows it."""

from __future__ import annotations

import os
import re

from pyvmm.spec import linux_boot as lb

HDR_KERNEL_VERSION = 0x20E  # setup header: offset of the version's text, less 0x200
BANNER = re.compile(rb"Linux version (\d[^ \0]{0,64}) ")  # init/version.c


def release(kernel: str) -> str:
    """The release of the kernel in a file, a bzImage or an ELF; empty if the file does not tell."""
    import mmap

    if not os.path.isfile(kernel):  # noqa: PTH113 - a pipe can be read once
        return ""
    try:
        with open(kernel, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[lb.HDR_MAGIC : lb.HDR_MAGIC + 4] == lb.SETUP_MAGIC:
                at = int.from_bytes(data[HDR_KERNEL_VERSION : HDR_KERNEL_VERSION + 2], "little")
                text = data[at + 0x200 : at + 0x260].split(b"\0")[0].split(b" ")[0]
                return text.decode("ascii", "replace") if at else ""
            found = BANNER.search(data)
            return found[1].decode("ascii", "replace") if found else ""
    except (OSError, ValueError):
        return ""  # the loader will complain
