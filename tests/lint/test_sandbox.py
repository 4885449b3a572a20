"""The lists of system calls in docs/sandbox.md are those in force."""

from __future__ import annotations

import pytest

from tools.sandbox_lists import in_page, lists


@pytest.mark.parametrize("mark", lists())
def test_the_page_has_the_list_in_force(mark: str) -> None:
    assert lists()[mark], "there is such a list"
    assert in_page(mark) == lists()[mark], "run: python3 tools/sandbox_lists.py"


def test_a_worker_has_ten_calls_at_most() -> None:
    """Of whichever kind: a cable with two ends has no interrupts by ioctl."""
    found = lists()
    for more in ("worker-ioctl", "worker-cable"):
        assert len(found["worker"] | found[more]) <= 10, more
    assert len(found["socket"]) <= 10
