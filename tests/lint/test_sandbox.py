"""The lists of system calls in docs/sandbox.md are those in force."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_source(file: str, name: str) -> set[str]:
    text = (ROOT / "cext" / file).read_text()
    block = text.split(f"static const uint16_t {name}[] = {{", 1)[1].split("};", 1)[0]
    return set(re.findall(r"SYS_(\w+)", block))


def in_page(mark: str) -> set[str]:
    text = (ROOT / "docs/sandbox.md").read_text()
    block = text.split(f"<!-- {mark} -->\n", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"`(\w+)`", block))


def test_the_worker_s_calls() -> None:
    source = (ROOT / "cext/confine.c").read_text()
    thread = source.split("int pv_confine_thread(", 1)[1].split("\n}", 1)[0]
    added = set(re.findall(r"SYS_(\w+)", thread))
    assert in_page("worker") == in_source("net_worker.c", "calls") | added


def test_the_back_end_s_calls() -> None:
    assert in_page("process") == in_source("confine.c", "process_calls")


def test_the_user_network_s_calls() -> None:
    assert in_page("network") == in_source("confine.c", "network_calls")


def test_the_requests_of_a_vdpa_device() -> None:
    source = (ROOT / "pyvmm/backend/vduse.py").read_text()
    block = source.split("REQUESTS = (", 1)[1].split("\n)", 1)[0]
    assert in_page("vduse") == set(re.findall(r"lib\.(VDUSE_\w+)", block))
