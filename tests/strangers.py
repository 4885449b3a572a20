"""Tests that become an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Runs a command as nobody.
BECOME = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@cache
def _may_read() -> bool:
    if os.geteuid():
        return True
    test = ["test", "-r", str(ROOT / "pyvmm" / "__init__.py"), "-a", "-x", sys.executable]
    return not subprocess.run([*BECOME, *test], check=False).returncode


def need_readable_checkout() -> None:
    """Skip the test if an ordinary user may not read pyvmm, as in root's home directory."""
    if not _may_read():
        pytest.skip(f"an ordinary user may not read {ROOT}")


@contextmanager
def open_directory() -> Iterator[Path]:
    """A directory that anybody may enter, meanwhile. Those of pytest are closed whenever another
    pytest of this user starts.
    """
    with tempfile.TemporaryDirectory(prefix="pyvmm-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
