"""Descriptors over Unix sockets: they arrive close-on-exec, counted, or not at all."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.hostnet.rights import RightsLost, close_all, recv_fds, send_fds
from tests.descriptors import open_fds


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "packets"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, request.param)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "file").open("w+") as f:
        yield f.fileno()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 253])
def test_descriptors_arrive_in_order_and_close_on_exec(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path, count: int
) -> None:
    ours, theirs = pair
    sent = [os.open(tmp_path / str(i), os.O_CREAT | os.O_RDWR) for i in range(count)]
    try:
        assert send_fds(theirs, b"words", sent) == 5
        data, got = recv_fds(ours, 100, 253)
        try:
            assert data == b"words"
            assert [os.fstat(fd).st_ino for fd in got] == [os.fstat(fd).st_ino for fd in sent]
            assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in got)
        finally:
            close_all(got)
    finally:
        close_all(sent)


# An odd limit: its CMSG_SPACE has room for one descriptor more.
@pytest.mark.parametrize(("sent", "most"), [(1, 0), (2, 1), (3, 2), (253, 252), (253, 1)])
def test_more_descriptors_than_allowed_are_all_closed(
    pair: tuple[socket.socket, socket.socket], file: int, sent: int, most: int
) -> None:
    ours, theirs = pair
    send_fds(theirs, b"x", [file] * sent)
    before = open_fds()
    with pytest.raises(RightsLost, match=f"more than {most} descriptors"):
        recv_fds(ours, 1, most)
    assert not open_fds() - before


def test_a_full_descriptor_table_is_told(
    pair: tuple[socket.socket, socket.socket], file: int
) -> None:
    ours, theirs = pair
    send_fds(theirs, b"x", [file] * 3)
    before = open_fds()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(file)  # the lowest free number: room for this one and one more
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(RightsLost, match="ulimit -n"):
            recv_fds(ours, 1, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not open_fds() - before


def test_a_packet_that_is_cut_off_is_told(file: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        send_fds(theirs, b"longer", [file])
        before = open_fds()
        with pytest.raises(RightsLost, match="more than 5 bytes"):
            recv_fds(ours, 5, 1)
        assert not open_fds() - before


def test_the_end_and_nothing_yet(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        recv_fds(ours, 1, 1)
    theirs.close()
    assert recv_fds(ours, 1, 1) == (b"", [])
