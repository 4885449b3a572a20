"""A small tree with systemd for guests (docs/root.md), unpacked from Debian's packages into the
cache: ``python -m tests.tree`` (part of ``make setup``). It has no udev and no D-Bus, as a tree of
debootstrap with systemd alone. Of systemd's own units, it starts those of basic.target.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pyvmm.errors import PyvmmError
from pyvmm.host.apt import Apt, unpack
from pyvmm.testbed import assets

PACKAGES = ("systemd", "busybox-static")
DIRECTORIES = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "root",
    "var/log",
    "var/tmp",
    "etc/systemd/system",
)
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/hostname": "tree\n",
    # A disk that is not there: systemd would wait for it.
    "etc/fstab": "/dev/sda1 /data ext4 defaults 0 2\n",
    "etc/systemd/system/default.target": (
        "[Unit]\nRequires=basic.target\nAfter=basic.target\nWants=mine.service\n"
    ),
    "etc/systemd/system/mine.service": (
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/echo mine has begun\n"
        "ExecStop=/bin/sh -c 'echo stopped >/out/stopped'\n"
        "[Unit]\nRequiresMountsFor=/out\n"
    ),
}
#: Applets of busybox.
LINKS = ("sh", "cat", "echo", "sleep", "test", "id", "head", "grep", "mount", "umount", "sulogin")


#: Directories of a merged /usr. Packages of Debian 12 have some of them at the root as well; those
#: of Debian 13 have none.
MERGED = ("bin", "sbin", "lib", "lib64")


def fetch() -> Path:
    """Unpack it into the cache, unless it is there; returns its root. It is removed when no test
    has used it for some time.

    :raises PyvmmError: apt fails.
    """
    inputs = [PACKAGES, DIRECTORIES, FILES, LINKS, MERGED]
    kept = assets.kept("tree", inputs, lambda into: _make(Path(into, "root")), _say)
    return Path(kept, "root")


def _say(line: str) -> None:
    print(f"tree: {line}", file=sys.stderr)


def _make(fresh: Path) -> None:
    apt = Apt(progress=_say)
    # All libraries, because those that lie in a directory of systemd's need others.
    libraries = [name for name in apt.closure(PACKAGES) if name.startswith(("lib", "zlib"))]
    for deb in apt.download(apt.resolve([*PACKAGES, *libraries])):
        unpack(deb, fresh)
    for name in DIRECTORIES:
        (fresh / name).mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        path = fresh / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    busybox = next(p for p in (fresh / "bin/busybox", fresh / "usr/bin/busybox") if p.exists())
    for name in LINKS:
        link = busybox.with_name(name)
        if not link.exists():
            link.symlink_to("busybox")
    for name in MERGED:
        if not (fresh / name).exists() and (fresh / "usr" / name).is_dir():
            (fresh / name).symlink_to(f"usr/{name}")


if __name__ == "__main__":
    try:
        fetch()
    except PyvmmError as e:
        print(f"tree: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
