"""The cache, whose programs are run: whose it may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.host import paths, qemu
from tests.strangers import BECOME, need_readable_checkout

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def cache(open_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_path))
    monkeypatch.delenv("PYVMM_IN_TESTBED", raising=False)
    made = open_path / "pyvmm"
    made.mkdir(0o755)
    return made


def test_one_s_own(cache: Path) -> None:
    assert paths.cache_root() == str(cache)
    cache.rmdir()
    assert paths.cache_root() == str(cache), "it need not exist"


def test_a_cache_that_others_may_write(cache: Path) -> None:
    cache.chmod(0o775)
    assert paths.cache_root(), "this user's own group"
    cache.chmod(0o777)
    with pytest.raises(HostError, match=r"may be written by others.*chmod -R go-w"):
        paths.cache_root()


def test_no_umask_at_all(cache: Path) -> None:
    """As in many containers: what a command has made is what the next one runs."""
    cache.rmdir()
    code = "import os, sys; os.umask(0); sys.argv = ['pyvmm', 'image', 'list']; "
    code += "from pyvmm.cli import main; from pyvmm.host import paths; "
    code += "from pyvmm.cli import image; image.run = lambda args: print(paths.cache_dir(), "
    code += "paths.cache_dir('x')); main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{cache}/testbed {cache}/testbed/x\n", done
    assert cache.stat().st_mode & 0o7777 == 0o775


@root_only
def test_the_group_of_the_process_may_be_another(cache: Path) -> None:
    """After `newgrp kvm`, the cache still has the user's own group."""
    cache.chmod(0o775)
    code = "import os; os.setegid(65534); from pyvmm.host.paths import cache_root; cache_root()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@root_only
def test_a_group_of_others_may_not(cache: Path) -> None:
    os.chown(cache, 0, NOBODY)
    cache.chmod(0o775)
    with pytest.raises(HostError, match="may be written by others"):
        paths.cache_root()


@root_only
def test_another_user_s(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sudo -E` leaves HOME; no command ends with a traceback."""
    os.chown(cache, NOBODY, NOBODY)
    with pytest.raises(HostError, match=r"belongs to user 65534, and this is user 0.*sudo -H"):
        paths.cache_root()
    for words in (["image", "list"], ["run", "--", "true"], ["testbed", "status"], ["doctor"]):
        argv = [sys.executable, "-m", "pyvmm", *words]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert "belongs to user 65534" in said and "Traceback" not in said, said
        assert done.returncode in ((1,) if words == ["doctor"] else (101,)), done
    monkeypatch.setenv("PYVMM_IN_TESTBED", "1")
    assert paths.cache_root(), "there, root is the user who has started the testbed"


@root_only
def test_root_s_cache_is_good_for_others(cache: Path) -> None:
    need_readable_checkout()
    code = "from pyvmm.host.paths import cache_root; print(cache_root())"
    done = subprocess.run(
        [*BECOME, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{cache}\n", done.stderr


@root_only
def test_root_runs_nothing_of_another_user_s(cache: Path) -> None:
    """A file deep in an unpacked QEMU is enough to refuse all of it."""
    root = cache / "testbed/qemu/10.0"
    for name in (qemu.PROGRAM, "usr/share/seabios/bios.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch(0o755)
    one = qemu.Qemu.unpacked(str(root), (10, 0))
    assert one.argv[0] == str(root / qemu.PROGRAM)
    os.chown(root.parent, NOBODY, 0)
    with pytest.raises(HostError, match=r"testbed/qemu belongs to user 65534"):
        assert not one.argv
    os.chown(root.parent, 0, 0)
    os.chown(root / "usr/share/seabios/bios.bin", NOBODY, NOBODY)
    with pytest.raises(HostError, match=r"bios\.bin belongs to user 65534"):
        assert not one.argv
