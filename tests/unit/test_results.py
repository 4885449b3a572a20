"""Results for programs and for people: ``--json`` of every command, colours, narrow terminals."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.support import tables
from pyvmm.cli.support.settings import actions_of
from tests.commands import parsers
from tests.terminals import on_a_terminal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/json.md").read_text()
#: Commands without --json, and why.
WITHOUT = {
    "trace explain": "its result is a page; the trace that it reads is JSON",
    "demo": "shows to people what the other commands say",
    "backend": "serves until it is ended; --counters prints JSON then",
    "exec": "its output is the command's",
    "shell": "its output is the shell's",
    "capture": "its result is a pcapng file, which has the counts",
    "nic remove": "says nothing",
    "stop": "says nothing",
    "cont": "says nothing",
    "reset": "says nothing",
    "powerdown": "says nothing",
    "quit": "says nothing",
    "qmp": "speaks nothing but JSON",
    "completion": "prints a shell's code",
}


def test_each_command_has_json_or_a_reason() -> None:
    with_json: set[str] = set()
    without: set[str] = set()
    for name, parser in parsers():
        if not actions_of(parser):
            has = "--json" in parser._option_string_actions
            (with_json if has else without).add(name)
    assert without == set(WITHOUT)
    assert len(with_json) > 10


def test_the_option_means_the_same_everywhere() -> None:
    """It has no value if standard output is the result's, else a file."""
    for name, parser in parsers():
        action = parser._option_string_actions.get("--json")
        if action is None:
            continue
        if action.nargs == 0:
            assert re.match(r"print .*, for programs$", str(action.help)), name
        else:
            assert isinstance(action, argparse._StoreAction) and action.metavar, name
            assert "'-'" in str(action.help), f"{name}: does '-' mean standard output?"


def test_the_page_lists_the_commands() -> None:
    """In two tables: those that have results for programs, and those that have none."""
    results, _, without = PAGE.partition("These have no `--json`")
    listed = set(re.findall(r"(?m)^\| `pyvmm ([a-z -]+?)` \|", results))
    have = {name for name, parser in parsers() if "--json" in parser._option_string_actions}
    assert listed == have - {"testbed"} | {"testbed status", "testbed doctor"}
    for name in WITHOUT:
        assert re.search(rf"(?m)^\|.*`(pyvmm )?{name}`.* \|", without), name


def test_only_one_function_prints_json() -> None:
    for path in (ROOT / "pyvmm/cli").rglob("*.py"):
        if path.name != "results.py":
            assert "print(json.dumps" not in re.sub(r"\s", "", path.read_text()), path


# --- colours and screens --------------------------------------------------------------------------


def test_only_what_asks_the_terminal_sends_escapes() -> None:
    for path in (ROOT / "pyvmm/cli").rglob("*.py"):
        text = path.read_text()
        if "\\x1b" in text or "\\033" in text:
            assert path.name == "screen.py" or "support.screen import" in text, path


COLOURED = ("test", "--host", "local", "/dev/null")
COMPARED = ("compare", "--from", "tests/data/compare.json")


@pytest.mark.parametrize("argv", [COLOURED, COMPARED], ids=["test", "compare"])
def test_colours_only_where_they_are_wanted(argv: tuple[str, ...]) -> None:
    assert "\x1b[" in on_a_terminal(*argv)
    assert "\x1b[" not in on_a_terminal(*argv, TERM="dumb")
    plain = on_a_terminal(*argv, NO_COLOR="1")
    assert not re.search(r"\x1b\[(?:[0-9;]*;)?(?:3[0-7]|4[0-7]|9[0-7])m", plain)
    command = [sys.executable, "-m", "pyvmm", *argv]
    env = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | {"TERM": "xterm"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    assert b"\x1b" not in done.stdout + done.stderr


# --- narrow terminals -----------------------------------------------------------------------------

HEADS = ("NAME", "HOST", "CARDS")
ROWS = [("vm0", "local", "net0:emulated net1:vhost-net"), ("machine-2", "testbed", "-")]


def test_a_table_in_columns() -> None:
    text = tables.rows_as_text(ROWS, None, HEADS)
    assert text.splitlines() == [
        "NAME       HOST     CARDS",
        "vm0        local    net0:emulated net1:vhost-net",
        "machine-2  testbed  -",
    ]
    assert tables.rows_as_text(ROWS, 80, HEADS) == text


def test_the_last_column_is_wrapped() -> None:
    text = tables.rows_as_text(ROWS, 45, HEADS)
    assert text.splitlines()[1:3] == [
        "vm0        local    net0:emulated",
        "                    net1:vhost-net",
    ]


def test_a_record_per_row_where_there_is_no_room() -> None:
    text = tables.rows_as_text(ROWS, 40, HEADS)
    assert text.splitlines()[:4] == [
        "NAME   vm0",
        "HOST   local",
        "CARDS  net0:emulated net1:vhost-net",
        "",
    ]
    assert tables.rows_as_text([("a" * 20, "ok", "b " * 30)], 40, ()).splitlines() == [
        f"{'a' * 20}  ok",
        "    " + "b " * 17 + "b",
        "    " + "b " * 11 + "b",
    ]


def test_no_rows() -> None:
    assert tables.rows_as_text([], 10, HEADS) == "NAME  HOST\nCARDS"
    assert tables.rows_as_text([], None, HEADS) == "NAME  HOST  CARDS"


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", ["doctor", "ps"])
def test_a_narrow_terminal(command: str, columns: int) -> None:
    out = on_a_terminal(command, columns=columns)
    for line in out.splitlines():
        indent = len(line) - len(line.lstrip())
        longest = max(map(len, line.split()), default=0)
        assert len(line) <= columns or indent + longest > columns, line


def test_json_goes_past_the_terminal() -> None:
    out = on_a_terminal("doctor", "--json", columns=40)
    assert {"verdict", "where", "findings"} == set(json.loads(out))
