"""What ``make fuzz`` says if a target does not run."""

from __future__ import annotations

import zipfile
from typing import NoReturn

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import engine
from tests.fuzz.registry import BY_NAME


def test_no_error_is_taken_for_a_target_without_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> NoReturn:
        raise zipfile.BadZipFile("bad")

    monkeypatch.setattr(engine, "run", broken)
    board = fuzz.Board(2, 1)
    board.run([BY_NAME["qmp"], BY_NAME["agent"], BY_NAME["net"]], 3)
    names = sorted(text.partition(":")[0] for text in board.failed)
    assert names == ["agent", "net", "qmp"] and not board.done
    assert "BadZipFile: bad" in board.failed[0]


def test_a_target_of_which_nothing_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.Board, "_work", lambda board: None)
    board = fuzz.Board(1, 1)
    board.run([BY_NAME["qmp"]], 1)
    assert board.failed == ["qmp: it never came to an end"]
