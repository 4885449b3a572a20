"""What a device remembers of its back-ends."""

from __future__ import annotations

from pyvmm.vhostuser.history import PROBLEMS_MAX, BackendHistory


def test_two_problems_in_turn_push_no_other_out() -> None:
    """A back-end that does not fit comes every second, refused with the one or the other text."""
    history = BackendHistory()
    history.note("lacks features")
    for _ in range(PROBLEMS_MAX):
        history.note("has closed the connection")
        history.note("not resumed", "no answer in time")
    assert history.problems == [
        "lacks features",
        "has closed the connection",
        "not resumed",
        "no answer in time",
    ]


def test_the_latest_problem_is_the_last_and_their_number_has_a_limit() -> None:
    history = BackendHistory()
    for number in range(3 * PROBLEMS_MAX):
        history.note(f"problem {number}")
    assert len(history.problems) == PROBLEMS_MAX
    assert history.problems[-1] == f"problem {3 * PROBLEMS_MAX - 1}"
    history.note(f"problem {2 * PROBLEMS_MAX}")
    assert history.problems[-1] == f"problem {2 * PROBLEMS_MAX}"
    assert len(history.problems) == PROBLEMS_MAX
