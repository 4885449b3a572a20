"""Where the group of a jail is made, beside whatever else a delegated group has: on a tree of
directories with a stand-in for the kernel. tests/boot/test_jail.py has the kernel itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import JailError
from pyvmm.host import cgroup
from pyvmm.host.cgroup import Cgroup

BUSY = OSError(errno.EBUSY, "Device or resource busy")


class Tree:
    """What the kernel does: a group but the topmost one has processes or groups with limits.

    :ivar own: this process's group. :ivar others: groups with other processes.
    :ivar lacks: groups without a controller -> which. :ivar delegated: as systemd does.
    """

    def __init__(self, top: Path, own: str) -> None:
        self.top, self.own = str(top), f"{top}{own}"
        Path(self.own).mkdir(parents=True)
        self.others: set[str] = set()
        self.lacks: dict[str, str] = {}
        self.delegated: set[str] = set()
        self._on: dict[str, set[str]] = {}

    def at(self, *groups: str) -> set[str]:
        return {self.top + group for group in groups}

    def read(self, path: str) -> str:
        group, _, file = path.rpartition("/")
        assert Path(group).is_dir()
        if file == "cgroup.subtree_control":
            return " ".join(self._on.get(group, ()))
        assert file == "cgroup.controllers"
        return "cpu memory pids".replace(self.lacks.get(group, "none"), "")

    def write(self, path: str, text: str) -> None:
        group, _, file = path.rpartition("/")
        assert Path(group).is_dir()
        if file == "cgroup.procs":
            if group in self._on:
                raise BUSY
            self.own = group
        elif file == "cgroup.subtree_control":
            if group in self.others or group == self.own != self.top:
                raise BUSY
            self._on.setdefault(group, set()).add(text.removeprefix("+"))
        else:
            Path(group, "cgroup.procs").touch()  # which the kernel makes with the group

    def xattr(self, path: str, name: str) -> bytes:
        if path not in self.delegated:
            raise OSError(errno.ENODATA, "No data available")
        return b"1"

    def groups(self) -> set[str]:
        return {str(path).removeprefix(self.top) for path in Path(self.top).rglob("pyvmm*")}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    made = Tree(tmp_path, "/slice/scope")
    made.delegated = made.at("/slice/scope")

    def rmdir(path: str, real: Callable[[str], None] = os.rmdir) -> None:
        Path(path, "cgroup.procs").unlink(missing_ok=True)
        real(path)

    monkeypatch.setattr(cgroup, "mount_point", lambda: made.top)
    monkeypatch.setattr(cgroup, "own_group", lambda top: made.own)
    monkeypatch.setattr(cgroup, "_read", made.read)
    monkeypatch.setattr(cgroup, "_write", made.write)
    monkeypatch.setattr(os, "getxattr", made.xattr)
    monkeypatch.setattr(os, "rmdir", rmdir)
    return made


def check(tree: Tree, place: str, own: str) -> None:
    """A jail's group is in ``place``, this process in ``own``, and nothing else is left."""
    with Cgroup(memory=1 << 20, millicpus=500) as made:
        assert Path(made._path).parent == Path(f"{tree.top}{place}/pyvmm")
        assert tree.own == tree.top + own
    assert tree.groups() == ({own} if "pyvmm" in own else set())


def test_alone_in_a_delegated_group(tree: Tree) -> None:
    check(tree, "/slice/scope", f"/slice/scope/pyvmm-{os.getpid()}")


def test_beside_other_processes(tree: Tree) -> None:
    """As in a shell, or below a CI runner: this process stays, and the next group is taken."""
    tree.others = tree.at("/slice/scope")
    check(tree, "", "/slice/scope")
    tree.delegated = tree.at("/slice", "/slice/scope")
    check(tree, "/slice", "/slice/scope")


def test_a_delegated_group_without_a_controller(tree: Tree) -> None:
    tree.lacks = dict.fromkeys(tree.at("/slice/scope"), "cpu")
    check(tree, "", "/slice/scope")


@pytest.mark.parametrize(
    ("lacks", "problem"),
    [
        ("none", r"the memory controller to \S+/slice/scope: Device .* busy; .* alone in a group"),
        ("cpu", r"at \S+/slice/scope has no cpu controller; run alone in a group: systemd-run"),
    ],
)
def test_no_group_is_fit(tree: Tree, lacks: str, problem: str) -> None:
    """As in a container. The nearest one is what somebody can do something about."""
    tree.others = tree.at("", "/slice/scope")
    tree.lacks = dict.fromkeys(tree.at("/slice/scope"), lacks)
    with pytest.raises(JailError, match=problem):
        Cgroup(memory=1 << 20, millicpus=500)
    assert (tree.own, tree.groups()) == (f"{tree.top}/slice/scope", set())


def test_no_controller_at_all(tree: Tree) -> None:
    tree.lacks = dict.fromkeys(tree.at("", "/slice", "/slice/scope"), "memory")
    with pytest.raises(JailError, match="no memory controller; boot with systemd"):
        Cgroup(memory=1 << 20)
    assert tree.groups() == set()


def test_another_user_has_the_topmost_group(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.delegated = set()

    def mkdir(path: str, mode: int = 0o777) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "mkdir", mkdir)
    problem = f"cannot make a cgroup in {tree.top}/pyvmm: Permission denied; run as root"
    with pytest.raises(JailError, match=problem):
        Cgroup(memory=1 << 20)
