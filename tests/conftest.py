"""For all tests: a summary that says what ran where, so that nothing is left out without a word."""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from pathlib import Path

import pytest

#: First part of a test's path below tests/ -> the words for where it runs; other conftest files
#: fill in theirs.
PLACES: dict[str, str] = {
    "lint": "tools",
    "unit": "this machine, no KVM",
    "fuzz": "this machine, no KVM",
    "install": "trees of Debian in namespaces",
    "docs": "testbed",
    "intel": "testbed with an Intel processor (Bochs)",
}
INTEL = Path(__file__).parent / "intel"
_outcomes: dict[str, Counter[str]] = defaultdict(Counter)

# Else an assertion in a module that tests share says nothing but its type.
pytest.register_assert_rewrite(
    *(f"tests.{path.stem}" for path in INTEL.parent.iterdir() if path.stem != "conftest")
)


def pytest_configure(config: pytest.Config) -> None:
    """Find out where host tests run.

    A shell starts what runs in the background with SIGINT ignored; the programs that tests start
    and interrupt would inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYVMM_CONFIG"] = ""  # the developer's own settings change no test
    from pyvmm.doctor import can_run_linux_locally, flavour

    if Path("/dev/kvm").exists():
        PLACES["host"] = f"this machine's /dev/kvm ({flavour() or 'unknown'})"
    else:
        PLACES["host"] = can_run_linux_locally()[1]
    PLACES.setdefault("boot", "testbed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of tests/intel can be left out by their marker."""
    for item in items:
        if item.path.is_relative_to(INTEL):
            item.add_marker(pytest.mark.intel)


@pytest.fixture(scope="session")
def places() -> dict[str, str]:
    """Where tests run, for fixtures that know better once they have started something."""
    return PLACES


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count each test once: by its call, or by the phase that kept it from being called."""
    if report.when == "call" or report.outcome != "passed":
        kind = report.nodeid.split("/")[1] if "/" in report.nodeid else ""
        _outcomes[kind][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table."""
    if len(_outcomes) < 2:
        return
    terminalreporter.section("what ran where")
    for kind, counts in _outcomes.items():
        done = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        terminalreporter.write_line(f"{kind:6} {done:28} {PLACES.get(kind, '')}")
