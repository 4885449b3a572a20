"""Writes the lists of system calls in docs/sandbox.md anew, from the source in force.

``tests/lint/test_sandbox.py`` compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/sandbox.md"
WIDTH = 100


def in_source(file: str, name: str) -> set[str]:
    """The system calls of an array in a file of ``cext``."""
    text = (ROOT / "cext" / file).read_text(encoding="utf-8")
    block = text.split(f"static const uint16_t {name}[] = {{", 1)[1].split("};", 1)[0]
    return set(re.findall(r"SYS_(\w+)", block))


def in_requests(file: str, name: str) -> set[str]:
    """The requests (ioctl) of an array in a file of ``cext``."""
    text = (ROOT / "cext" / file).read_text(encoding="utf-8")
    block = text.split(f"static const uint32_t {name}[] = {{", 1)[1].split("};", 1)[0]
    return set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", re.sub(r"/\*.*?\*/", "", block, flags=re.S)))


def requests() -> set[str]:
    """The requests of a vDPA device."""
    source = (ROOT / "pyvmm/backend/vduse.py").read_text(encoding="utf-8")
    block = source.split("REQUESTS = (", 1)[1].split("\n)", 1)[0]
    return set(re.findall(r"lib\.(VDUSE_\w+)", block))


def lists() -> dict[str, set[str]]:
    """Mark in the page -> the list in force."""
    thread = in_source("confine.c", "thread_calls")
    return {
        "machine": in_source("confine.c", "machine_calls"),
        "machine-refused": in_source("confine.c", "machine_refused"),
        "vcpu": in_source("confine.c", "vcpu_calls"),
        "vcpu-requests": in_requests("confine.c", "vcpu_ioctls"),
        "vcpu-refused": in_source("confine.c", "vcpu_refused"),
        "worker": in_source("net_worker.c", "calls") | thread,
        "worker-refused": in_source("confine.c", "thread_refused"),
        "worker-ioctl": in_source("net_worker.c", "inject_calls"),
        "socket": in_source("socket_port.c", "calls") | thread,
        "worker-cable": in_source("net_worker.c", "cable_calls"),
        "process": in_source("confine.c", "process_calls"),
        "backend": in_source("confine.c", "backend_calls"),
        "vduse": requests(),
        "network": in_source("confine.c", "network_calls"),
    }


def in_page(mark: str) -> set[str]:
    """The list behind a mark in the page."""
    block = PAGE.read_text(encoding="utf-8").split(f"<!-- {mark} -->\n", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"`(\w+)`", block))


def _wrapped(names: set[str]) -> str:
    lines = [""]
    for name in sorted(names):
        word = f"`{name}`"
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    for mark, names in lists().items():
        head, rest = text.split(f"<!-- {mark} -->\n", 1)
        rest = rest.lstrip("\n") if rest.startswith("\n") else rest.split("\n\n", 1)[1]
        text = f"{head}<!-- {mark} -->\n{_wrapped(names)}\n\n{rest}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
