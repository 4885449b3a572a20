"""Kernel options that take clocks and interrupt controllers away: Linux boots with each, and its
card works (docs/kernel-options.md has the table).

A few rows boot in each run; all with PYVMM_KERNEL_OPTIONS=all, as `make soak-options` does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import nic_address, run_all

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: These boot in each run: each takes away what another row has.
ALWAYS = ("no-kvmclock", "nolapic", "noapic", "acpi=off")
PAGE = Path(__file__).parents[2] / "docs" / "kernel-options.md"


def table() -> dict[str, tuple[str, str]]:
    """The page's rows: options -> processors and the card's interrupt."""
    rows = re.findall(r"^\| `([^`]+)` \| (\d) \| (\S+) \|", PAGE.read_text(), re.MULTILINE)
    return {options: (cpus, interrupt) for options, cpus, interrupt in rows}


def test_linux_boots_and_its_card_works(host: Host) -> None:
    rows = table()
    assert set(ALWAYS) <= set(rows)
    chosen = rows if os.environ.get("PYVMM_KERNEL_OPTIONS") == "all" else ALWAYS
    script = (
        f"ping -q -c 1 -W 60 {nic_address(0, 'host')} >/dev/null && grep virtio /proc/interrupts"
    )
    runs = run_all(
        host,
        {row: ["--append", row, "--", "sh", "-c", f"nproc; {script}"] for row in chosen},
        "--cpus",
        "2",
        "--net",
        "emulated",
    )
    for row, run in runs.items():
        cpus, interrupt = rows[row]
        assert run.status == 0, (row, run)
        lines = run.out.splitlines()
        assert lines[0] == cpus and interrupt in lines[1], (row, run.out)
