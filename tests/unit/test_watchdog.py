"""The last resort of a run that has a time-out."""

from __future__ import annotations

import subprocess
import sys

import pytest

PATIENCE = 60.0
PROGRAM = """
import threading
from pyvmm.cli.support import watchdog
watchdog.{constant} = 0.2
dog = watchdog.Watchdog({seconds})
{then}
threading.Event().wait(50)
"""


@pytest.mark.parametrize(
    ("constant", "seconds", "then", "said"),
    [
        (
            "JUDGING_SECONDS",
            500,
            "dog.judging()",
            "the guest has ended, and its verdict took more than 0.2 s",
        ),
        ("ORDERLY_SECONDS", 0.1, "", "0.1 s are over, and it could not be ended in order"),
    ],
)
def test_it_says_what_took_too_long(constant: str, seconds: float, then: str, said: str) -> None:
    program = PROGRAM.format(constant=constant, seconds=seconds, then=then)
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (124, "")
    assert done.stderr == f"pyvmm: the run did not end in time: {said}\n"


def test_a_verdict_gets_much_more_time_than_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that has succeeded must not fail because the host is busy."""
    from pyvmm import sandbox
    from pyvmm.cli.support import watchdog
    from pyvmm.cli.support.lastwords import ORDERLY_SECONDS

    started: list[float] = []
    monkeypatch.setattr(watchdog.Watchdog, "_start", lambda self, seconds: started.append(seconds))
    dog = watchdog.Watchdog(7)
    monkeypatch.setattr(dog, "close", lambda: None)
    dog.judging()
    assert started == [7 + ORDERLY_SECONDS, watchdog.JUDGING_SECONDS]
    assert watchdog.JUDGING_SECONDS >= 60
    assert sandbox.longest(7) == 7 + 2 * ORDERLY_SECONDS + watchdog.JUDGING_SECONDS
