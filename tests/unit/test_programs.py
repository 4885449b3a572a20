"""The current directory belongs to an enemy: nothing in it is run or imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import programs
from pyvmm.host.paths import cache_root, runtime_dir

ROOT = Path(__file__).resolve().parents[2]
TRAP = """
import os, sys
with open(os.path.join({directory!r}, "sprung"), "a") as f:
    print(__file__, sys.orig_argv, file=f)
os._exit(99)
"""
NAMES = ("nsenter", "setpriv", "unshare", "gcc", "apt-get", "qemu-system-x86_64", "busybox", "sh")


@pytest.fixture
def enemys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a trap in place of each module that pyvmm, or Python, might import, and of
    programs. It is the current directory, and relative entries of all lists lead there.
    """
    names = {m.partition(".")[0] for m in sys.stdlib_module_names} | {"cffi", "_cffi_backend"}
    for name in names | {"sitecustomize", "usercustomize", "pyvmm"}:
        (tmp_path / f"{name}.py").write_text(TRAP.format(directory=str(tmp_path)))
    for name in NAMES:
        (tmp_path / name).write_text(f"#!/bin/sh\necho $0 >>{tmp_path}/sprung\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sprung(directory: Path) -> str:
    trap = directory / "sprung"
    return trap.read_text() if trap.exists() else ""


@pytest.mark.parametrize("name", ["pyvmm", "pyvmm.backend.process", "pyvmm.testbed.supervisor"])
def test_a_module_of_ours_starts_anywhere(enemys: Path, name: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = programs.module(name, *(["--version"] if name == "pyvmm" else []))
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert not sprung(enemys)
    if name == "pyvmm":
        assert done.stdout.startswith("pyvmm "), done
    else:  # it has been imported from this checkout, and misses its arguments
        assert str(ROOT) in done.stderr or "supervisor" in done.stderr, done


def test_the_command_itself(enemys: Path) -> None:
    """As the installed script starts it."""
    script = "import sys; from pyvmm.cli import main; sys.exit(main())"
    (enemys / "bin").mkdir()
    (enemys / "bin" / "pyvmm").write_text(script)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f":.:{os.environ['PATH']}:"}
    done = subprocess.run(
        [sys.executable, str(enemys / "bin" / "pyvmm"), "doctor"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not sprung(enemys)
    assert "kvm" in done.stdout.lower(), done


def test_our_own_back_end(enemys: Path) -> None:
    """The process that `--net vhost-user` starts."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pyvmm.netopt import Net\n"
        "import subprocess\n"
        "from pyvmm.programs import distrust_current_directory, module\n"
        "distrust_current_directory()\n"
        "sys.exit(subprocess.run(module('pyvmm.backend.process')).returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(ROOT)], capture_output=True, text=True, timeout=60
    )
    assert not sprung(enemys)
    assert "IndexError" in done.stderr, "it misses its arguments, so it has been imported"


def test_relative_entries_are_dropped(enemys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in programs.LISTS:
        monkeypatch.setenv(name, f":/usr/bin:.:relative:{'/bin' if name == 'PATH' else ''}:")
    monkeypatch.setattr(sys, "path", [str(enemys), str(enemys / "relative"), *sys.path])
    before = len(sys.path)
    programs.distrust_current_directory()
    assert os.environ["PATH"] == "/usr/bin:/bin"
    assert os.environ["LD_LIBRARY_PATH"] == os.environ["PYTHONPATH"] == "/usr/bin"
    assert len(sys.path) == before - 2
    monkeypatch.setenv("LD_LIBRARY_PATH", ":")
    programs.distrust_current_directory()
    assert "LD_LIBRARY_PATH" not in os.environ


def test_programs_are_found_in_absolute_directories_only(
    enemys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    for name in ("sh", "true"):
        found = programs.which(name)
        assert found is not None and found.startswith("/") and not found.startswith(str(enemys))
    assert programs.which("no-such-program") is None
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        programs.program("no-such-program")
    assert programs.program("/a/b") == "/a/b"


def test_directories_of_ours_are_absolute(enemys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative one is ignored, as the XDG Base Directory Specification demands."""
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("XDG_RUNTIME_DIR", ".")
    assert not cache_root().startswith(str(enemys))
    assert not runtime_dir().startswith(str(enemys)) and runtime_dir().startswith("/")


def test_how_packages_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what apt knows; without apt, only the user knows their names."""
    cache = tmp_path / "apt-cache"
    cache.write_text('#!/bin/sh\n[ "$2" = new ] || [ "$2" = old ]\n')
    cache.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = "run as root: apt-get install --no-install-recommends"
    assert programs.install("gcc", "make") == f"{command} gcc make"
    assert programs.install("newer|old") == f"{command} old"
    assert programs.install("new|old", "x") == f"{command} new x"
    assert programs.install("none|nothing") == f"{command} none or nothing"
    monkeypatch.setattr(programs, "which", lambda name, more="": None)
    assert programs.install("gcc", "new|old") == "install what Debian has in gcc, new or old"
