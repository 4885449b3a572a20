"""How much memory the control groups of this process leave it: in a container, or below a limit of
systemd, the kernel kills a process that takes more.
"""

from __future__ import annotations

import os

CGROUPS = "/sys/fs/cgroup"
#: Below this, a limit is one. Without a limit, cgroup v1 has a number near 2^63.
UNLIMITED = 1 << 60


def memory_limit(root: str = CGROUPS, groups: str = "/proc/self/cgroup") -> tuple[int, str] | None:
    """The smallest limit of memory among this process's control groups, in bytes, and the file that
    has it; None if there is no limit.
    """
    found: list[tuple[int, str]] = []
    for line in (_read(groups) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = f"{root}/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container, the group's path may be one of the host's, and its files are at the top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            file = "/".join([base, *parts[:depth], name])
            text = (_read(file) or "").strip()
            if text.isdecimal() and int(text) < UNLIMITED:
                found.append((int(text), file))
    return min(found, default=None)


def memory_note(size: int) -> str:
    """What the user should know of a guest with so many bytes of memory; empty if it has room."""
    limit = memory_limit()
    if limit is None or size < limit[0]:
        return ""
    return (
        f"the guest's {size >> 20} MiB are more than the control group allows, "
        f"{limit[0] >> 20} MiB: the kernel kills the machine if it uses them; lower --memory, or "
        f"raise {limit[1]} (docker run --memory)"
    )


def _read(path: str) -> str | None:
    try:
        with open(path, "rb", buffering=0) as f:  # without what a text file takes to be set up
            return f.readall().decode(errors="replace")
    except OSError:
        return None


def why_not_writable(directory: str) -> str:
    """Why this process cannot make files in ``directory``, or in the first of its parents that
    exists; empty if it can: it has made one.
    """
    import tempfile

    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    try:
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as e:
        return f"{directory}: {e.strerror}"
