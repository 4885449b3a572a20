"""The lists of system calls in docs/sandbox.md are those in force."""

from __future__ import annotations

import pytest

from tools.sandbox_lists import in_page, lists


@pytest.mark.parametrize("mark", lists())
def test_the_page_has_the_list_in_force(mark: str) -> None:
    assert lists()[mark], "there is such a list"
    assert in_page(mark) == lists()[mark], "run: python3 tools/sandbox_lists.py"
