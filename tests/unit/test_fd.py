"""Descriptors have one owner and are closed once."""

import os
import resource
from pathlib import Path

import pytest

from pyvmm.errors import HostError
from pyvmm.fd import EventFd, Fd, eventfds, is_null, memfd


def open_fds() -> set[str]:
    return {p.name for p in Path("/proc/self/fd").iterdir()}


def test_close_once_and_silently_twice() -> None:
    fd = Fd(os.open("/dev/null", os.O_RDONLY))
    number = fd.fileno()
    assert not fd.closed and str(number) in repr(fd)
    fd.close()
    other = os.open("/dev/null", os.O_RDONLY)  # likely to get the same number
    fd.close()
    os.fstat(other)
    os.close(other)
    assert fd.closed
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


def test_close_releases_even_when_it_fails() -> None:
    fd = Fd(os.open("/dev/null", os.O_RDONLY))
    os.close(fd.fileno())
    with pytest.raises(OSError):
        fd.close()
    assert fd.closed
    fd.close()


def test_context_manager() -> None:
    with EventFd() as e:
        assert not e.closed
    assert e.closed


def test_eventfd_counts_and_never_blocks() -> None:
    with EventFd() as e:
        assert e.drain() == 0
        e.signal()
        e.signal()
        assert e.drain() == 2 and e.drain() == 0
        assert not os.get_inheritable(e.fileno()) and not os.get_blocking(e.fileno())
    with EventFd(5) as e:
        assert e.drain() == 5


def test_a_shared_eventfd_that_was_made_blocking() -> None:
    """A back-end has the same open file description, so it can change the flags and fill the
    counter.
    """
    with EventFd() as e:
        os.set_blocking(e.fileno(), True)
        assert e.drain() == 0
        e.nudge()
        assert e.drain() == 1
        os.eventfd_write(e.fileno(), 2**64 - 2)
        e.nudge()
        assert e.drain() == 2**64 - 2


def test_all_eventfds_or_none() -> None:
    events = eventfds(3)
    assert len({e.fileno() for e in events}) == 3
    for e in events:
        e.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 3, hard))
    try:
        with pytest.raises(HostError, match="ulimit -n"):
            eventfds(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_memfd_is_sealed_on_demand() -> None:
    with memfd("test", 8192) as sealed, memfd("test", 8192, seal=False) as open_:
        assert os.fstat(sealed.fileno()).st_size == 8192
        with pytest.raises(PermissionError):
            os.ftruncate(sealed.fileno(), 4096)
        os.ftruncate(open_.fileno(), 4096)
        assert not os.get_inheritable(sealed.fileno())


def test_a_memfd_that_fails_leaves_nothing() -> None:
    before = open_fds()
    with pytest.raises((OSError, OverflowError)):
        memfd("test", -1)
    assert open_fds() == before


def test_what_is_null(tmp_path: Path) -> None:
    """No other device, file or pipe."""
    (tmp_path / "file").touch()
    for path, null in (("/dev/null", True), ("/dev/zero", False), (tmp_path / "file", False)):
        with Fd(os.open(path, os.O_RDONLY)) as fd:
            assert is_null(fd.fileno()) == null
    with EventFd() as event:
        assert not is_null(event.fileno())
