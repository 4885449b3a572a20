"""The tests that SECURITY.md and docs/faults.md name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(\w+/test_\w+)::(test_\w+)`")


def missing(text: str) -> list[str]:
    out = []
    for file, name in NAMED.findall(text):
        source = ROOT / "tests" / f"{file}.py"
        if not source.exists() or f"def {name}(" not in source.read_text():
            out.append(f"{file}::{name}")
    return out


@pytest.mark.parametrize(("page", "count"), [("SECURITY.md", 15), ("docs/faults.md", 45)])
def test_named_tests_exist(page: str, count: int) -> None:
    text = (ROOT / page).read_text()
    assert len(NAMED.findall(text)) >= count
    assert missing(text) == []


def test_every_fault_has_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)", (ROOT / "docs/faults.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1)) and len(rows) > 20
    assert all(NAMED.search(row) for _, row in rows)


def test_a_missing_one_is_found() -> None:
    assert missing("`unit/test_switch::test_no_such` `unit/test_none::test_x`") == [
        "unit/test_switch::test_no_such",
        "unit/test_none::test_x",
    ]
