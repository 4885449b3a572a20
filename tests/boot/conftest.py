"""The session's testbed: the running one if there is one, else one for this session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ImageError
from pyvmm.images import find
from pyvmm.testbed.testbed import Testbed, inside
from tests.boot.guest import Host


@pytest.fixture(scope="session")
def testbed(places: dict[str, str]) -> Iterator[Testbed]:
    """A testbed that is up; this checkout, pyvmm's cache and the temporary directory are writable
    in it.
    """
    assert not inside(), "boot tests start the testbed themselves: run them outside"
    with Testbed() as bed:
        warning = bed.check(str(Path.cwd()))
        if warning:
            pytest.fail(f"{warning}; stop it: pyvmm testbed down")
        status = bed.status()
        assert status
        places["boot"] = (
            f"testbed: Linux {status['kernel']}, {status['cpus']} vCPU(s), {status['qemu']}"
        )
        yield bed


@pytest.fixture(scope="session")
def host(testbed: Testbed) -> Host:
    """The testbed as the machine that pyvmm runs on, with a guest image built."""
    try:
        find("default")
    except ImageError as e:
        pytest.fail(f"boot tests need the guest image: {e}", pytrace=False)
    return Host(testbed)


@pytest.fixture
def nothing_left(host: Host) -> Iterator[None]:
    """Fail a test that leaves a process, a tap, a network namespace or a KVM VM behind in the
    testbed.
    """
    before = host.leftovers()
    yield
    host.wait_until(
        lambda: not host.left_behind(before), lambda: f"left behind: {host.left_behind(before)}"
    )
