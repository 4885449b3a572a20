"""A release: the same commit gives the same bytes, and the lock files pin what pyproject.toml asks
for.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import release

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(name: str) -> dict[str, str]:
    """Package -> version of a lock file, each of which has a hash."""
    text = (ROOT / f"tools/requirements/{name}.txt").read_text()
    found = re.findall(r"(?m)^([a-z0-9-]+)==(\S+)(?: ;[^\\\n]*)? \\\n    --hash=sha256:", text)
    assert len(found) == len(re.findall(r"(?m)^\w", text))
    return dict(found)


def test_the_same_commit_gives_the_same_bytes(tmp_path: Path) -> None:
    """Built twice, side by side: in other places, with another umask, language and time zone."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(asked, capture_output=True, text=True).stdout == "true\n":
        pytest.skip("a shallow clone has no version")
    other = {"LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}
    builds = []
    for name, env in (("a", {}), ("b c", other)):
        place = tmp_path / name
        place.mkdir()
        builds.append(
            subprocess.Popen(
                [sys.executable, ROOT / "tools/release.py", "--output", place / "out"],
                cwd=place,
                env={**os.environ, **env, "TMPDIR": str(place)},
                umask=0o077 if env else 0o022,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [build.communicate()[1] for build in builds]
    newer = tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 37)  # strtol has got a version
    if newer and all("or later, and the wheel's name says" in err for err in errors):
        pytest.skip(errors[0].strip())
    for build, err in zip(builds, errors, strict=True):
        assert build.returncode == 0, err
    first, second = tmp_path / "a/out", tmp_path / "b c/out"
    names = sorted(path.name for path in first.iterdir())
    assert [re.sub(r"^pyvmm-[^-]+?(?=-|\.tar|\.cdx)", "", name) for name in names] == [
        "SHA256SUMS",
        "-cp311-abi3-manylinux_2_34_x86_64.whl",
        ".cdx.json",
        ".tar.gz",
    ]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    lines = (first / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in map(str.split, lines)}
    assert sums == {
        name: hashlib.sha256((first / name).read_bytes()).hexdigest() for name in names[1:]
    }
    wheel, document, sdist = (first / name for name in names[1:])
    with zipfile.ZipFile(wheel) as archive:
        init = archive.read("pyvmm/__init__.py").decode()
    assert f'__version__ = "{wheel.name.split("-")[1]}"' in init
    with tarfile.open(sdist) as source:
        members = source.getmembers()
    assert {(m.uid, m.gid, m.uname, m.mode & ~0o111) for m in members} == {(0, 0, "", 0o644)}
    material = json.loads(document.read_text())
    parts = {part["name"]: part["version"] for part in material["components"]}
    assert material["bomFormat"] == "CycloneDX" and parts == pinned("wheel")
    assert material["metadata"]["component"]["name"] == "pyvmm"


@pytest.mark.parametrize(
    ("library", "version", "problem"),
    [
        ("libc.so.6", "GLIBC_2.2.5", ""),
        ("libc.so.6", "GLIBC_2.34", ""),
        ("ld-linux-x86-64.so.2", "GLIBC_2.3", ""),
        ("libc.so.6", "", ""),
        ("libc.so.6", "GLIBC_2.34.1", r"needs glibc 2\.34\.1 or later, .* says 2\.34; build"),
        ("libc.so.6", "GLIBC_2.38", r"needs glibc 2\.38 or later, .* says 2\.34; build"),
        ("libc.so.6", "GLIBC_PRIVATE", "needs GLIBC_PRIVATE of the C library; do without"),
        ("libc.so.6", "GLIBC_ABI_DT_RELR", "needs GLIBC_ABI_DT_RELR of the C library"),
        ("libm.so.6", "GLIBC_2.34", r"needs libm\.so\.6; do without it"),
        ("libother.so", "", r"needs libother\.so; do without it"),
    ],
)
def test_what_a_wheel_needs_of_a_system(
    tmp_path: Path, library: str, version: str, problem: str
) -> None:
    """Whatever C library this machine has: that of the test has one symbol."""
    (tmp_path / "map").write_text(f"{version} {{ global: needed; }};")
    (tmp_path / "library.c").write_text("int needed(void) { return 0; }")
    (tmp_path / "_ext.c").write_text("int needed(void); int f(void) { return needed(); }")
    link = ["gcc", "-shared", "-fPIC", "-nostdlib", "-o"]
    stub = [f"-Wl,-soname,{library}", "-Wl,--version-script=map"]
    subprocess.run([*link, "library", "library.c", *stub], cwd=tmp_path, check=True)
    subprocess.run([*link, "_ext.so", "_ext.c", "./library"], cwd=tmp_path, check=True)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "_ext.so", "pyvmm/_ext.abi3.so")
    if problem:
        with pytest.raises(SystemExit, match=rf"^release: pyvmm/_ext\.abi3\.so {problem}"):
            release.portable(wheel)
    else:
        release.portable(wheel)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit."""
    monkeypatch.setattr(release, "ROOT", tmp_path)
    release.git("init", "-q")
    who = ("-c", "user.name=x", "-c", "user.email=x@y")
    release.git(*who, "commit", "-q", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_version_comes_from_git(repository: Path) -> None:
    source = 'x = 1\n__version__ = "1.2.3"\n'
    assert re.fullmatch(r"1\.2\.3\.dev1\+g[0-9a-f]{12}", release.version(source))
    release.git("tag", "v1.2.3")
    assert release.version(source) == "1.2.3"
    with pytest.raises(SystemExit, match=r"tag is v1\.2\.3 and .* says 1\.2\.4"):
        release.version(source.replace("2.3", "2.4"))
    with pytest.raises(SystemExit, match="has no version"):
        release.version("__version__ = None")


def test_a_shallow_clone_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has neither all commits nor all tags, so its version would be another one."""
    who = ("-c", "user.name=x", "-c", "user.email=x@y")
    release.git(*who, "commit", "-q", "--allow-empty", "-m", "second")
    clone = tmp_path / "clone"
    release.git("clone", "-q", "--depth", "1", repository.as_uri(), str(clone))
    monkeypatch.setattr(release, "ROOT", clone)
    source = '__version__ = "1.2.3"\n'
    with pytest.raises(SystemExit, match=r"shallow.*; run: git fetch --unshallow --tags$"):
        release.version(source)
    release.git("fetch", "-q", "--unshallow", "--tags")
    assert ".dev2+g" in release.version(source)


def test_a_release_is_in_the_changelog() -> None:
    release.changes("## Unreleased\n", "1.2.3.dev1+gabc")
    release.changes("## Unreleased\n\n## 1.2.3 - 2027-01-01\n", "1.2.3")
    with pytest.raises(SystemExit, match="no section"):
        release.changes("## Unreleased\n", "1.2.3")


def test_the_lock_files_fit() -> None:
    """A changed requirement needs `make lock`."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    lasting = {name: requirements for name, requirements in extras.items() if name != "fuzz"}
    build = PROJECT["build-system"]["requires"]
    for name, wanted in {
        "wheel": project["dependencies"],
        "run": [*project["dependencies"], *extras["pytest"], *build],
        "dev": [*project["dependencies"], *build, *(r for e in lasting.values() for r in e)],
        "fuzz": extras["fuzz"],
    }.items():
        versions = pinned(name)
        for text in wanted:
            need = Requirement(text)
            key = re.sub(r"[._]", "-", need.name.lower())
            assert versions[key] in need.specifier, f"{text} in {name}.txt: make lock"
    assert pinned("wheel").items() <= pinned("run").items() <= pinned("dev").items()
    assert pinned("dev").items() <= pinned("fuzz").items()
