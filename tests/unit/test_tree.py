"""The tree of the boot tests, made of invented packages (tests/tree.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import HostError
from tests import tree


class Packages:
    """What apt has.

    :ivar files: the only package's files. :ivar unpacked: how often it was unpacked.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.files: tuple[str, ...] = ()
        self.unpacked = 0
        self.broken = False
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(tree, "Apt", lambda progress: self)
        monkeypatch.setattr(tree, "unpack", self.unpack)

    def closure(self, names: object) -> list[str]:
        return []

    def resolve(self, names: list[str]) -> list[str]:
        return names

    def download(self, packages: list[str]) -> list[str]:
        return packages[:1]

    def unpack(self, deb: str, target: Path) -> None:
        for name in self.files:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).touch()
        self.unpacked += 1
        if self.broken:
            raise HostError("no space left")


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Packages:
    return Packages(monkeypatch, tmp_path)


def test_a_tree_of_debian_12(packages: Packages) -> None:
    packages.files = ("bin/busybox", "lib/systemd/systemd", "lib64/ld", "sbin/x", "usr/lib/y")
    root = tree.fetch()
    assert not any((root / name).is_symlink() for name in tree.MERGED)
    assert (root / "bin/sh").readlink() == Path("busybox")


def test_a_tree_of_debian_13(packages: Packages) -> None:
    """All is below /usr; programs name their dynamic linker as /lib64/..."""
    packages.files = ("usr/bin/busybox", "usr/lib/x", "usr/lib64/ld", "usr/sbin/y")
    root = tree.fetch()
    for name, file in (("bin", "busybox"), ("lib", "x"), ("lib64", "ld"), ("sbin", "y")):
        assert (root / name).readlink() == Path(f"usr/{name}") and (root / name / file).exists()
    assert (root / "bin/sh").exists()


def test_it_is_made_once_and_again_when_it_is_to_be_another(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.files = ("usr/bin/busybox",)
    first = tree.fetch()
    assert tree.fetch() == first and packages.unpacked == 1
    monkeypatch.setattr(tree, "LINKS", ("sh",))
    second = tree.fetch()
    assert second != first and packages.unpacked == 2 and not (second / "bin/cat").exists()


def test_nothing_is_left_of_a_failure(packages: Packages, tmp_path: Path) -> None:
    packages.files, packages.broken = ("usr/bin/busybox",), True
    with pytest.raises(HostError):
        tree.fetch()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
