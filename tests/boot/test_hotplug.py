"""Cards that come and go while Linux runs; nothing is left behind."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
ROUNDS = 6  # two with each data path


def test_cards_come_and_go(host: Host) -> None:
    """Under traffic of the first card, which loses nothing; and with a guest that does not react at
    first. The checks are in the program.
    """
    result = host.run(sys.executable, "-m", "tests.boot.plugger", str(ROUNDS), timeout=400)
    assert result.status == 0, f"{result.out}\n{result.err[-3000:]}"
    found = json.loads(result.out)
    assert found["end"] == "poweroff" and found["sent"] > 100, found
    assert found["sent"] - found["received"] <= 1, found  # the latest echo may be on its way
