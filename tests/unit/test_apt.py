"""apt downloads as its own user, and what it leaves is checked again."""

from __future__ import annotations

import hashlib
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import HostError
from pyvmm.host import apt
from pyvmm.host.apt import Apt, Package, apts_directory
from pyvmm.images import sources
from pyvmm.testbed import assets

DATA = b"a package"
PACKAGE = Package("p", "1", len(DATA), hashlib.sha256(DATA).hexdigest(), "p_1_all.deb")


def fake(monkeypatch: pytest.MonkeyPatch, left: dict[str, bytes], error: str = "") -> list[Any]:
    """apt that leaves files in its directory, and perhaps fails; the calls."""
    calls = []

    def run(command: list[str], cwd: str | None = None) -> str:
        where = cwd or next(
            (w.partition("=")[2] for w in command if w.startswith("Dir::State::Lists=")), ""
        )
        calls.append((command, where, Path(where).stat().st_uid if where else None))
        for name, data in left.items():
            Path(where, name).write_bytes(data)
        if error:
            raise HostError(error)
        return ""

    monkeypatch.setattr(apt, "_run", run)
    return calls


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_apt_can_write_as_its_own_user(tmp_path: Path) -> None:
    user = pwd.getpwnam("_apt")
    with apts_directory(tmp_path) as directory:
        for where in (directory, f"{directory}/partial"):
            assert Path(where).stat().st_uid == user.pw_uid
        for parent in Path(directory).parents:
            assert parent.stat().st_mode & 0o001, f"{parent} cannot be entered"
        child = os.fork()
        if not child:
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            Path(directory, "partial", "x").touch()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not Path(directory).exists()


def test_apt_is_not_told_to_work_as_root(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    calls = fake(monkeypatch, {PACKAGE.filename: DATA})
    own = Apt()
    own._private = False
    assert own.download([PACKAGE]) == [cache / "debs" / PACKAGE.filename]
    ((command, where, owner),) = calls
    assert not any("Sandbox" in word for word in command)
    if os.geteuid() == 0:
        assert not where.startswith(str(cache)) and owner == pwd.getpwnam("_apt").pw_uid


@pytest.mark.parametrize("left", [{}, {PACKAGE.filename: b"another"}])
def test_what_apt_leaves_is_checked(
    monkeypatch: pytest.MonkeyPatch, cache: Path, left: dict[str, bytes]
) -> None:
    fake(monkeypatch, left)
    own = Apt()
    own._private = False
    with pytest.raises(HostError, match="wrong hash"):
        own.download([PACKAGE])
    assert not list((cache / "debs").iterdir())


def test_lists_are_taken_over(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    own = Apt()
    own._private = True
    calls = fake(monkeypatch, {"a_Packages": b"1", "b_Packages": b"1"})
    own._update(force=True)
    lists = cache / "apt" / "base" / "lists"
    assert {p.name for p in lists.iterdir()} == {"a_Packages", "b_Packages"}
    assert not any("Sandbox" in word for command, *_ in calls for word in command)
    own._updated = False
    fake(monkeypatch, {"a_Packages": b"2"}, error="one source of two")
    own._update(force=True)
    assert {p.name: p.read_bytes() for p in lists.iterdir()} == {
        "a_Packages": b"2",
        "b_Packages": b"1",
    }
    own._updated = False
    fake(monkeypatch, {"b_Packages": b"3"})
    own._update(force=True)
    assert {p.name for p in lists.iterdir()} == {"b_Packages"}


def test_the_newest_whole_kernel_is_found(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As Debian's archive is: a release keeps kernels whose parts have gone; newer kernels are in
    several packages.
    """
    meta = "linux-image-cloud-amd64"
    new, old = "7.1.13+deb13-cloud-amd64", "7.1.8+deb13-cloud-amd64"
    archive = {
        "": {meta: ["linux-image-6.1.0-56-cloud-amd64"], "linux-image-6.1.0-56-cloud-amd64": []},
        "next": {
            meta: ["linux-image-7.3.4-cloud-amd64"],
            "linux-image-7.3.4-cloud-amd64": [],
            f"linux-image-{new}": [f"linux-modules-{new}", "kmod"],
            f"linux-image-{old}": [f"linux-base-{old}", f"linux-binary-{old}", "kmod"],
            "linux-image-7.1.8+deb13-amd64": [],
            f"linux-binary-{old}": [],
        },
    }

    def depends(self: Apt, name: str) -> list[str]:
        return archive[self._release][name]

    def names(self: Apt, prefix: str) -> set[str]:
        return {name for name in archive[self._release] if name.startswith(prefix)}

    monkeypatch.setattr(Apt, "depends", depends)
    monkeypatch.setattr(Apt, "names", names)

    places = {"packages": sources.recipe()["kernel"]["packages"], "releases": ["", "next"]}

    def found(series: str | None) -> list[str]:
        return apt.find_kernel_package(places, series, lambda _: None)[1]

    assert found(None) == found("6.1") == ["linux-image-6.1.0-56-cloud-amd64"]
    assert found("7.3") == ["linux-image-7.3.4-cloud-amd64"]
    assert found("7.1") == [f"linux-image-{old}", f"linux-binary-{old}"]
    with pytest.raises(HostError, match=r"no kernel 7\.2 for virtual"):
        found("7.2")


def test_kernels_are_known_by_the_ends_of_their_names() -> None:
    ends = sources.recipe()["kernel"]["packages"].values()
    assert tuple(f"-{end}" for end in ends) == assets.FLAVOURS
