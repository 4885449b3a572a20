"""Help texts: short by ``-h``, whole by ``--help``, on terminals of any width."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from pyvmm import cli
from pyvmm.cli.support import helptext, options
from pyvmm.cli.support import parser as parser_module
from pyvmm.cli.support.parser import Brief
from tests.commands import parsers

PARSERS = dict(parsers())


@pytest.fixture
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal of this width, of which the parsers have not heard yet."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setattr(parser_module, "_columns", 0)
    yield request.param
    monkeypatch.setattr(parser_module, "_columns", 0)


def too_wide(text: str, columns: int) -> list[str]:
    """The lines that could have been narrower. A word, with its quotation marks, is never divided,
    nor an option from its value, nor what is in brackets in a usage.
    """
    wide = []
    for line in text.splitlines():
        words = helptext.WORD.findall(line) or [""]
        least = len(line) - len(line.lstrip()) + max(map(len, words))
        option = re.match(r" *([\[(](?!.*[\])] [\[(]).*[\])]|-[^ ]* [^ ]+)$", line)
        if len(line) > columns and not option and least + len(" \\") <= columns:
            wide.append(line)
    return wide


@pytest.mark.parametrize("columns", [40, 80, 132], indirect=True)
@pytest.mark.parametrize("name", PARSERS)
def test_no_line_is_wider_than_the_terminal(name: str, columns: int) -> None:
    assert not too_wide(PARSERS[name].format_help(), columns)
    assert not too_wide(helptext.short(PARSERS[name], Brief), columns)


@pytest.mark.parametrize("columns", [40, 80], indirect=True)
def test_the_list_of_commands(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    for option in options.HELP:
        with pytest.raises(SystemExit):
            cli.main([option])
        out = capsys.readouterr().out
        assert "None" not in out, "a text that argparse could do without"
        for name in cli.COMMANDS:
            assert re.search(rf"(?m)^ +{name}( |$)", out), name
        assert not too_wide(out, columns)


@pytest.mark.parametrize("columns", [40], indirect=True)
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_nothing_is_lost(name: str, columns: int) -> None:
    """Whatever is laid out anew has the same words; commands mean the same to a shell."""
    whole = PARSERS[name].description or ""
    narrow = helptext.fill(whole, columns)
    joined = narrow.replace(" \\\n", " ")
    assert "".join(joined.split()) == "".join(whole.split())
    for line in whole.splitlines():
        if helptext.COMMAND.match(line) and not helptext.ROW.match(line):
            assert any(shlex.split(line) == words for words in _commands(joined)), line


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if helptext.COMMAND.match(line):
            yield shlex.split(line)


@pytest.mark.parametrize("columns", [80], indirect=True)
@pytest.mark.parametrize("name", PARSERS)
def test_short_help_has_each_option_and_is_short(name: str, columns: int) -> None:
    parser = PARSERS[name]
    text, whole = helptext.short(parser, Brief), parser.format_help()
    shown = [a for a in parser._actions if a.option_strings and a.help != argparse.SUPPRESS]
    for action in shown:
        assert re.search(rf"(?m)^  .*(?<!\S){re.escape(action.option_strings[0])}(?![\w-])", text)
    assert len(text.splitlines()) <= 2 * len(shown) + 24 and len(text) <= len(whole)
    assert f"pyvmm {name} --help" in text


def test_h_is_short_and_help_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    out = {}
    for option in options.HELP:
        with pytest.raises(SystemExit) as end:
            cli.main(["run", option])
        assert not end.value.code
        out[option] = capsys.readouterr().out
    assert "Examples:" not in out["-h"] and "Examples:" in out["--help"]
    assert len(out["-h"]) * 3 < len(out["--help"])
    assert out["-h"].startswith("usage: pyvmm run [OPTION...] [COMMAND ...]\n")


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("virtual CPUs, 1 to 255 (1)", "virtual CPUs, 1 to 255 (1)"),
        ("kernels, or names of images; repeatable", "kernels, or names of images"),
        ("what `make modules_install` (docs/add.md)", "what `make modules_install`"),
        ("vCPUs, 1 to 8 (the default: 2; 1 without)", "vCPUs, 1 to 8"),
        ("the CPU (auto: of the host; else)", "the CPU (auto: of the..."),
        ("confine this process, before the guest runs", "confine this process..."),
    ],
)
def test_the_beginning_of_a_text(text: str, short: str) -> None:
    assert helptext.brief(text, 30) == short
