"""What an installation gets of pyvmm: a wheel, built and used outside of the checkout."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def files(root: Path) -> set[str]:
    """The files of the package but for compiled ones."""
    return {
        str(path.relative_to(root))
        for path in (root / "pyvmm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("_ext.")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(directory)]
    command += ["build", "--build-base", str(directory / "build")]
    command += ["bdist_wheel", "--dist-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = directory.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    directory = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def pyvmm(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import pyvmm\n"
        "assert pyvmm.__file__.startswith(sys.path[0]), pyvmm.__file__\n"
        "from pyvmm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(installed), *argv],
        cwd=installed.parent,
        capture_output=True,
        text=True,
    )


def test_one_wheel_for_every_python(wheel: Path) -> None:
    """The extension's stable ABI and the wheel's name must say the same."""
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("pyvmm", "cp311", "abi3") and "linux" in platform, version
    with zipfile.ZipFile(wheel) as archive:
        assert "pyvmm/_ext.abi3.so" in archive.namelist()


def test_every_file_is_installed(installed: Path) -> None:
    assert files(installed) == files(ROOT)


def test_an_installed_pyvmm_runs_outside_of_the_checkout(installed: Path) -> None:
    done = pyvmm(installed, "--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("pyvmm ")
    done = pyvmm(installed, "doctor", "--json")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert {"extension": "ok"}.items() <= {
        f["name"]: f["state"] for f in report["findings"]
    }.items()
