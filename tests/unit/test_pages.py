"""What pages say of the program is so: the options in their examples, the files and Python names
that they mention.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm
from pyvmm import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "guest/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The code of a page in these languages."""
    for language, code in re.findall(r"(?ms)^ *```(\w+)\n(.*?)^ *```", page.read_text()):
        if language in languages:
            yield code


def spans(page: Path) -> Iterator[str]:
    """The code in a page's tables."""
    for row in re.findall(r"(?m)^\|.*\|$", page.read_text()):
        yield from re.findall(r"`([^`]+)`", row)


def commands(page: Path) -> Iterator[list[str]]:
    """The calls of pyvmm in a page's examples, as argv from the subcommand on."""
    for code in (*blocks(page, "sh", "console"), *spans(page)):
        for line in code.replace("\\\n", " ").split("\n"):
            for call in re.findall(r"\bpyvmm ((?!up\b)[a-z][^;&|#<>]*)", line.replace('"', " ")):
                try:
                    yield shlex.split(call)
                except ValueError:  # the quotation goes on: what is inside is found as well
                    yield call.split()


@functools.cache
def known_options(*names: str) -> set[str]:
    """The long options of a command, with those of its subcommands, from its help."""
    texts = []
    parser = argparse.ArgumentParser
    original = parser.print_help
    parser.print_help = lambda self, file=None: texts.append(self.format_help())  # type: ignore[method-assign]
    try:
        for argv in ([*names, "--help"], [*names[:1], "--help"]):
            with pytest.raises(SystemExit):
                cli.main(argv)
    finally:
        parser.print_help = original  # type: ignore[method-assign]
    return set(re.findall(r"--[a-z][a-z-]*", "\n".join(texts)))


SUBCOMMANDS = {
    "image": ("build", "list"),
    "testbed": ("up", "down", "status", "setup"),
    "trace": ("explain",),
    "vhost-user": ("check", "probe"),
}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_in_examples_exist(page: Path) -> None:
    for argv in commands(page):
        if argv[0] not in cli.COMMANDS:
            continue
        names = argv[:1]
        if len(argv) > 1 and argv[1] in SUBCOMMANDS.get(argv[0], ()):
            names = argv[:2]
        own = argv[: argv.index("--")] if "--" in argv else argv
        for word in own:
            if word.startswith("--"):
                assert word.partition("=")[0] in known_options(*names), " ".join(argv)


def test_examples_are_found() -> None:
    """The test above looks at something."""
    found = [argv for page in PAGES for argv in commands(page)]
    assert len(found) > 80
    assert any(argv[0] == "switch" for argv in found)
    assert any("--hang-timeout" in argv for argv in found)
    assert "--budget" in known_options("run") and "--junk" not in known_options("run")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    """Files of this repository by their path from its root."""
    text = page.read_text()
    for name in re.findall(
        r"(?<![\w/.~$-])((?:pyvmm|cext|guest|tests|images|docs|tools)/[\w./-]+\.(?:py|c|h|json|toml|md))\b",
        text,
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_of_modules_resolve(page: Path) -> None:
    """Dotted names that begin with ``pyvmm.`` and imports in examples."""
    text = page.read_text()
    names = set(re.findall(r"`pyvmm((?:\.[a-z_]+)+(?:\.[A-Z]\w+)?)", text))
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyvmm"):
                module = (node.module or "").removeprefix("pyvmm")
                names |= {f"{module}.{alias.name}" for alias in node.names}
    for name in names:
        if re.match(r"\.(cmd|net|stdin|hostname|term|tty|port|verbose|agent|panic)\b", name):
            continue  # kernel parameters
        parts = name.lstrip(".").split(".")
        thing: object = pyvmm
        for i, part in enumerate(parts):
            if not hasattr(thing, part):
                importlib.import_module(".".join(["pyvmm", *parts[: i + 1]]))
            thing = getattr(thing, part)
