"""The library under virtiofsd of an ordinary user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyvmm.host.shim import open_shim


def test_any_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader takes a space or a colon in LD_PRELOAD for the end of a name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of her:own dir"))
    fd, environment = open_shim()
    with fd:
        done = subprocess.run(
            ["cat", "/proc/self/maps"],
            env={**os.environ, **environment},
            pass_fds=[fd.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "/shim-" in done.stdout and not done.stderr
