"""What an installation gets of pyvmm: a wheel, built and used outside of the checkout."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pyvmm.images import sources

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
    share = {f"pyvmm/share/{name}" for name in ("images", "images/tiny", "guest", "testbed")}
    shared = {path for path in files(installed) if path.startswith("pyvmm/share/")}
    assert files(installed) - shared == files(ROOT)
    assert {path.rpartition("/")[0] for path in shared} == share


def test_man_pages_and_completions_are_installed(wheel: Path) -> None:
    """They are where man and the shells look for them, below the prefix of the installation."""
    with zipfile.ZipFile(wheel) as archive:
        (data,) = {name.split("/")[0] for name in archive.namelist() if ".data/data/" in name}
        names = {n.partition("/data/")[2] for n in archive.namelist() if n.startswith(data)}
        page = archive.read(f"{data}/data/share/man/man1/pyvmm-run.1").decode()
    assert {"share/man/man1/pyvmm.1", "share/man/man1/pyvmm-nic.1"} <= names
    assert "share/bash-completion/completions/pyvmm" in names
    assert "share/zsh/site-functions/_pyvmm" in names
    assert "share/fish/vendor_completions.d/pyvmm.fish" in names
    assert page.startswith('.TH "PYVMM\\-RUN" 1')


def test_an_installed_pyvmm_needs_no_compiler_for_its_images(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init is a static program in the package: the bytes that a checkout would compile."""
    compiled = sources.init(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = pyvmm(installed, "image", "build", "--tiny")
    assert done.returncode == 111 and "gcc" in done.stderr, done
    code = (
        "import hashlib; from pathlib import Path; from pyvmm.images import sources\n"
        "print(sources.RECIPE, sources.init_identity())\n"
        "print(hashlib.sha256(sources.init(Path('/nonexistent'))).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True
    ).stdout.split()
    digest = hashlib.sha256(compiled).hexdigest()
    assert out == [str(installed / "pyvmm/share/images/default.toml"), "init", digest, digest]


def test_a_source_distribution_is_whole(tmp_path: Path) -> None:
    """A wheel can be made of it."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (made,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(made, tmp_path)
    root = tmp_path / made.name.removesuffix(".tar.gz")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    assert list((tmp_path / "build").glob("lib*/pyvmm/share/guest/init"))
    assert list((tmp_path / "build").glob("lib*/pyvmm/_ext.abi3.so"))


def test_an_installed_pyvmm_runs_outside_of_the_checkout(installed: Path) -> None:
    done = pyvmm(installed, "--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("pyvmm ")
    done = pyvmm(installed, "doctor", "--json")
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert {"extension": "ok"}.items() <= {
        f["name"]: f["state"] for f in report["findings"]
    }.items()
