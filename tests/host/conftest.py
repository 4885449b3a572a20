"""Host tests run small bare-metal guests on this machine's own /dev/kvm."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.kvm import Kvm
from pyvmm.kvm.vm import Vm
from pyvmm.memory import GuestMemory
from tests.descriptors import open_fds
from tests.driver import wait_for
from tests.host.taps import of_another

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def kvm() -> None:
    """Skip, saying why, where KVM cannot be had."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        pytest.skip(f"/dev/kvm: {e.strerror}")


@pytest.fixture(scope="session")
def guest() -> Callable[[str], str]:
    """The path of a bare-metal guest by its name, built once."""
    # In a testbed without make, they have travelled (tests/intel).
    if "PYVMM_IN_TESTBED" not in os.environ or shutil.which("make"):
        subprocess.run(["flock", ROOT / "guest", "make", "-s", "-C", ROOT / "guest"], check=True)
    return lambda name: str(ROOT / "guest" / "build" / f"{name}.elf")


@pytest.fixture
def vm() -> Iterator[Vm]:
    """A VM with 16 MiB of memory and no vCPU."""
    memory = GuestMemory(16 << 20)
    with Kvm() as kvm:
        made = Vm(kvm, memory)
        yield made
        made.close()
    memory.close()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No descriptor, child process or tap may outlive a test, and no test may confine pytest."""

    def state() -> tuple[str, list[str], list[str]]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        status = Path("/proc/self/status").read_text().splitlines()
        confined = [line for line in status if line.startswith(("NoNewPrivs:", "Seccomp:"))]
        taps = [p.name for p in Path("/sys/class/net").iterdir()]
        return children, sorted(name for name in taps if not of_another(name)), confined

    before, fds = state(), open_fds()
    yield
    # What has been told to end may do so a moment later: a thread with what it has open, a tap.
    wait_for(lambda: state() == before and not open_fds() - fds)
    assert state() == before and not open_fds() - fds
