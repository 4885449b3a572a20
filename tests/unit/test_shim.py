"""The library under virtiofsd of an ordinary user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyvmm.host import shim
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes jails")
def test_the_user_of_a_jail_may_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever root's umask is, and also where an older version has compiled it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shim, "BUILT", str(tmp_path / "none"))
    umask = os.umask(0o077)
    try:
        library = Path(shim.place())
        assert library.stat().st_mode & 0o777 == 0o755
        library.chmod(0o700)
        assert Path(shim.place()) == library and library.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(umask)
