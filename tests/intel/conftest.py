"""Testbeds with an Intel processor, in which pyvmm and its tests run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ImageError
from pyvmm.images import find
from pyvmm.testbed.session import Result
from pyvmm.testbed.testbed import Testbed, inside

ROOT = Path(__file__).resolve().parents[2]
#: What the tests in L1 need besides pyvmm: sources, and the guests, which are built here.
TRAVELS = ("tests", "guest", "docs", "pyproject.toml")
#: Seconds for a command in L1: on a busy machine, Bochs gets a tenth of a processor. The watchdog
#: finds out much sooner if L1 hangs. CI runs the quick part alone, and a guest that hangs in L1
#: must not use up its hour.
PATIENCE = 900.0 if "CI" in os.environ else 7200.0


class L1:
    """A testbed with an Intel processor. A guest that hangs takes all of it along (see
    ``pyvmm/testbed/intel.py``); the next test then gets a new one.
    """

    def __init__(self, name: str, **options: object) -> None:
        self.bed = Testbed(
            f"check-{name}",
            cpu="intel",
            add=[str(ROOT / name) for name in TRAVELS],
            progress=lambda line: print(line, file=sys.stderr, flush=True),
            **options,  # type: ignore[arg-type]
        )

        self._started = False

    def up(self) -> L1:
        """Start it, unless it is up."""
        if not self._started or not self.bed.is_up():
            self.down()
            self.bed.__enter__()
            self._started = True
        return self

    def down(self) -> None:
        """Stop it."""
        if self._started:
            self._started = False
            self.bed.__exit__(None, None, None)

    def run(self, *argv: str, timeout: float = PATIENCE) -> Result:
        """A command."""
        return self.bed.run(argv, cwd=str(ROOT), timeout=timeout)

    def sh(self, script: str, timeout: float = PATIENCE) -> str:
        """A shell script, which must succeed; its stdout."""
        result = self.run("sh", "-ec", script, timeout=timeout)
        assert result.status == 0, f"{script}\n{result.status}\n{result.out}\n{result.err}"
        return result.out

    def pytest(self, *args: str, timeout: float = PATIENCE) -> str:
        """Tests of this project in there, all of which must pass; the last line."""
        command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        result = self.run(*command, *args, timeout=timeout)
        assert result.status == 0, f"{result.out[-8000:]}\n{result.err[-2000:]}"
        last = result.out.strip().splitlines()[-1]
        print(last)
        return last


@pytest.fixture(scope="session")
def built() -> None:
    """The guests and the image that travel."""
    assert not inside(), "these tests start their testbeds themselves: run them outside"
    subprocess.run(["make", "-s", "-C", str(ROOT / "guest")], check=True)
    try:
        find("default")
    except ImageError as e:
        pytest.fail(f"a guest image is needed: {e}", pytrace=False)


@pytest.fixture(scope="session")
def l1_of(built: None) -> Iterator[Callable[..., L1]]:
    """Returns the L1 with some options of ``Testbed``, which is up. One is up at a time."""
    made: dict[str, L1] = {}

    def get(name: str = "plain", **options: object) -> L1:
        for other, l1 in made.items():
            if other != name:
                l1.down()
        if name not in made:
            made[name] = L1(re.sub(r"\W|_", "-", name), **options)
        return made[name].up()

    yield get
    for l1 in made.values():
        l1.down()


@pytest.fixture
def l1(l1_of: Callable[..., L1]) -> L1:
    """Linux 6.1 if there is one, or else the newest, with KVM as it is."""
    return l1_of()
