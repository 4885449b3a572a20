"""`make check` shares its tests among two workers file by file.

Groups by name (``--dist loadgroup`` of pytest-xdist 3.8) do nothing under pytest 9.2, without a
word; so this looks at what is done.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
TEST = """
import time

import pytest


@pytest.mark.parametrize("number", range(8))
def test_some(number):
    time.sleep(0.05)
"""


def test_what_the_tests_of_a_file_share_is_made_once(tmp_path: Path) -> None:
    """A file's tests all go to one worker, and files come in the order of the command line."""
    options = re.search(r"PYTEST\) (-n 2 .*?) -m ", (CHECKOUT / "Makefile").read_text())
    assert options
    places = ("unit", "host", "boot", "intel")
    for place in places:
        path = tmp_path / "tests" / place / "test_it.py"
        path.parent.mkdir(parents=True)
        path.write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options[1].split()]
    text = subprocess.run(
        [*argv, *(f"tests/{place}" for place in places)],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    ran = re.findall(r"^\[(gw\d)\].* PASSED tests/(\w+)/", text, re.M)
    assert len(ran) == 8 * len(places), text
    for worker in ("gw0", "gw1"):
        mine = [place for name, place in ran if name == worker]
        assert mine and mine == sorted(mine, key=places.index), text
        assert all(mine.count(place) == 8 for place in mine), text
