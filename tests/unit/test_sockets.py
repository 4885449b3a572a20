"""Unix sockets in the file system: an abandoned one is replaced, and nothing else."""

import os
import socket
from pathlib import Path

import pytest

from pyvmm.hostnet.sockets import bind, is_abandoned, remove


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def listening(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    s = socket.socket(socket.AF_UNIX, kind)
    s.bind(path)
    if kind != socket.SOCK_DGRAM:
        s.listen(0)
    return s


def test_only_a_socket_without_a_listener_is_abandoned(path: str, tmp_path: Path) -> None:
    assert not is_abandoned(path)
    with listening(path):
        assert not is_abandoned(path)
        assert not is_abandoned(path)  # the first probe waits in the backlog, which is full
    assert is_abandoned(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert not is_abandoned(str(link))
    Path(path).unlink()
    with listening(path, socket.SOCK_DGRAM):
        assert not is_abandoned(path)
    (tmp_path / "file").write_text("precious")
    assert not is_abandoned(str(tmp_path / "file"))


def test_bind_replaces_an_abandoned_socket_and_nothing_else(path: str, tmp_path: Path) -> None:
    listening(path).close()
    with socket.socket(socket.AF_UNIX) as s:
        info = bind(s, path), os.lstat(path)
        assert info[0] == (info[1].st_dev, info[1].st_ino)
        s.listen()
        with socket.socket(socket.AF_UNIX) as other, pytest.raises(OSError, match="in use"):
            bind(other, path)
    file = tmp_path / "file"
    file.write_text("precious")
    with socket.socket(socket.AF_UNIX) as s, pytest.raises(OSError, match="in use"):
        bind(s, str(file))
    assert file.read_text() == "precious"


def test_remove_leaves_what_somebody_has_put_there(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        ours = bind(s, path)
        Path(path).rename(path + ".old")  # whose inode number is then not used again
        with socket.socket(socket.AF_UNIX) as other:
            theirs = bind(other, path)
            remove(path, ours)
            assert Path(path).exists()
            remove(path, theirs)
            assert not Path(path).exists()
            remove(path, theirs)
