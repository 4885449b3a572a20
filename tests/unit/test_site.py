"""The site builds without a warning, its links lead somewhere, and it looks right in a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.cli import COMMANDS
from tests.browser import Browser
from tools.site.build import check, linked
from tools.site.commands import commands, parts
from tools.site.pages import prose

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning as an error and all links checked."""
    output = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "tools.site.build", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return output


def test_every_command_and_option_has_its_place(site: Path) -> None:
    for command in COMMANDS:
        assert (site / f"docs/reference/commands/{command}.html").is_file()
    run = (site / "docs/reference/commands/run.html").read_text()
    assert 'id="cmdoption-pyvmm-run-net"' in run
    python = (site / "docs/reference/python.html").read_text()
    assert 'id="pyvmm.Machine.run"' in python and "Exit status: 133" in python
    assert ":param" not in python and ":raises" not in python


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_site_in_a_browser(site: Path, browser: Browser, width: int, dark: bool) -> None:
    """No page is wider than its window, loads anything from elsewhere or complains."""
    browser.look(width=width, dark=dark)
    for page in ("index", "docs/reference/commands/run", "docs/compare", "docs/glossary"):
        browser.open(site / f"{page}.html")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, page
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    assert browser.console == []
    assert [r for r in browser.requests if not r.startswith(("file:", "data:", "about:"))] == []


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="b.html">x</a><a href="https://kernel.org">x</a>'
    )
    (tmp_path / "b.html").write_text('<p id="there">')
    assert check(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<a href="c.html">x</a><a href="#no">x</a><script src="https://a.b/c.js"></script>'
    )
    (tmp_path / "c.css").write_text("@import 'https://a.b/font.css'")
    assert check(tmp_path) == [
        "a.html: b.html#there: no such anchor",
        "b.html: loads https://a.b/c.js",
        "b.html: c.html: no such file",
        "b.html: #no: no such anchor",
        "c.css: loads from the network",
    ]


def test_links_of_pages() -> None:
    page = ROOT / "docs/explain.md"
    assert linked("[a](examples/kernel-ci/) [b](run.md#x)", page) == (
        "[a](examples/kernel-ci/README.md) [b](run.md#x)"
    )
    assert linked("[`tap.py`](../pyvmm/hostnet/tap.py)", page) == "`tap.py`"
    assert linked("[a](explain) [b](explain/switch.html)", page) == (
        'a <a href="explain/switch.html">b</a>'
    )


def test_help_texts_as_pages() -> None:
    assert [(p.text, p.literal) for p in parts("A.\n\nExamples:\n  pyvmm ps\n  x\n\nB\nC.\n")] == [
        ("A.", False),
        ("Examples:", False),
        ("  pyvmm ps\n  x", True),
        ("B\nC.", False),
    ]
    assert prose("a_b <c> `d_e`, docs/run.md") == (r"a\_b \<c\> `d_e`, [docs/run.md](/docs/run.md)")
    nic = next(c for c in commands() if c.name == "pyvmm nic")
    assert [action.name for action in nic.actions] == [
        f"pyvmm nic {a}" for a in ("add", "remove", "list")
    ]
    headings = [o.heading for _, options in nic.actions[0].groups for o in options]
    assert "--host auto|local|testbed|ssh://[USER@]NAME[:PORT]" in headings and "NAME" in headings
