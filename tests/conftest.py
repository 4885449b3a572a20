"""For all tests: a summary that says what ran where, so that nothing is left out without a word,
and what a run says that does not live to print its summary.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
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
_running: dict[str, float] = {}  # test -> when it began, by the clock of time.monotonic()
_config: list[pytest.Config] = []

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
    _config.append(config)
    _heed_sigterm(worker=hasattr(config, "workerinput"))
    from pyvmm.doctor import can_run_linux_locally, flavour

    if Path("/dev/kvm").exists():
        PLACES["host"] = f"this machine's /dev/kvm ({flavour() or 'unknown'})"
    else:
        PLACES["host"] = can_run_linux_locally()[1]
    PLACES.setdefault("boot", "testbed")


def _heed_sigterm(*, worker: bool) -> None:
    """A CI job's time-out ends as Ctrl-C does: with the summary, and the tests that were running.

    A worker of xdist shows where it stands, and dies: what runs it has the summary.
    """

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt("SIGTERM")

    if not worker:
        signal.signal(signal.SIGTERM, interrupt)
    else:  # before anything is captured, so that the stacks go to the terminal
        faulthandler.register(signal.SIGTERM, file=os.dup(2), all_threads=True, chain=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of tests/intel can be left out by their marker."""
    for item in items:
        if item.path.is_relative_to(INTEL):
            item.add_marker(pytest.mark.intel)


@pytest.fixture(scope="session")
def places() -> dict[str, str]:
    """Where tests run, for fixtures that know better once they have started something."""
    return PLACES


@pytest.hookimpl(tryfirst=True)  # before the terminal has the name
def pytest_runtest_logstart(nodeid: str) -> None:
    """Remember what is running."""
    _running[nodeid] = time.monotonic()


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Forget what is not running any more."""
    _running.pop(nodeid, None)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """As ``tmp_path``, but others may enter it, whatever other pytest starts meanwhile."""
    from tests.strangers import open_directory

    with open_directory() as directory:
        yield directory


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count each test once: by its call, or by the phase that kept it from being called.

    A failure is told at once, too: the summary may be an hour away, or never come.
    """
    if report.failed and not hasattr(_config[0], "workerinput"):
        reporter = _config[0].pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        crash = getattr(report.longrepr, "reprcrash", None)
        reporter.ensure_newline()
        reporter.write_line(f"{report.nodeid} ({report.when}): {crash or report.longreprtext}")
    if report.when == "call" or report.outcome != "passed":
        kind = report.nodeid.split("/")[1] if "/" in report.nodeid else ""
        _outcomes[kind][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, and what an interrupted run was at."""
    for nodeid, since in _running.items():
        terminalreporter.write_line(f"still running, {time.monotonic() - since:.0f} s: {nodeid}")
    if len(_outcomes) < 2:
        return
    terminalreporter.section("what ran where")
    for kind, counts in _outcomes.items():
        done = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        terminalreporter.write_line(f"{kind:6} {done:28} {PLACES.get(kind, '')}")
