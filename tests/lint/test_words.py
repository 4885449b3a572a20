"""The rules for words of CONTRIBUTING.md, as far as a machine can hold them: short lines and no
idiom that readers stumble over, in pages and in the comments and docstrings of code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Pages that keep the rules: files, and directories with all pages below.
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs",
    "guest/README.md",
)
#: Code that keeps them, with all Python and C files below.
CODE = ("cext", "docs", "guest", "pyvmm", "tests")

COLUMNS = 100
NOUNS = (
    "worker|row|line|thread|chain|file|event|eventfd|vector|ring|exit|message|frame|boot|run|"
    "kick|interrupt|packet|byte|rate|datagram|wake-up|descriptor|bit|case|counter|object|figure|"
    "branch|publication|process|span"
)
UNITS = (
    "queue|cell|packet|mode|kick|card|test|machine|vCPU|second|round|command|device|region|pair|"
    "boot|batch|interval|object|register|repeat|line"
)
#: What to write instead -> the expression that finds the phrase.
IDIOMS = {
    "whoever": r"\b(?:for|of|by|from|to|with) who\b",
    "per": rf"\b(?:{NOUNS})s? an? (?:queue )?(?:{UNITS})\b",
    "once per": rf"\b(?:once|twice|times) an? (?:{UNITS})(?= *[.,;:)]| *$)",
    "there are none": r"\bthere is none such\b",
}
#: A verb and its object.
INNOCENT = (
    r"(?:run|boot)s? an? (?:command|test|machine|card|device|mode|queue|batch|round)|"
    r"(?:kick|interrupt|exit|ring|line)s? an? (?:queue|card|device|machine|vCPU|test)"
)

#: A line of prose: its number in the file and its text.
Lines = list[tuple[int, str]]


def found(lines: Lines) -> Iterator[tuple[int, str]]:
    """The idioms in some lines that belong together: line number, and what is wrong with what."""
    text, starts = "", []
    for number, line in lines:
        starts.append((len(text), number))
        text += line.strip() + " "
    for instead, expression in IDIOMS.items():
        for match in re.finditer(expression, text, re.IGNORECASE):
            if not re.fullmatch(INNOCENT, match.group(), re.IGNORECASE):
                number = [number for start, number in starts if start <= match.start()][-1]
                yield number, f"{match.group()!r}: write {instead!r}"


# --- pages ----------------------------------------------------------------------------------------


def files(places: tuple[str, ...], *endings: str) -> list[str]:
    """The files at ``places``, relative to the root."""
    paths = [path for place in places for path in sorted((ROOT / place).rglob("*"))]
    paths += [ROOT / place for place in places if (ROOT / place).is_file()]
    return sorted({str(p.relative_to(ROOT)) for p in paths if p.suffix in endings})


def long_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines of a page beyond ``COLUMNS``. Tables may be longer, and so may what a program printed:
    all of a block ``text``, and in a block ``console`` all but the commands.
    """
    block = command = ""
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            block = "" if block else line.strip().removeprefix("```") or "unnamed"
            continue
        command = line if line.startswith("$ ") or command.endswith("\\") else ""
        free = block == "text" or (block == "console" and not command)
        if len(line) > COLUMNS and not free and not line.startswith("|"):
            yield number, f"{len(line)} columns"


def unnamed_blocks(text: str) -> Iterator[tuple[int, str]]:
    """Blocks that do not say what they are: ``sh``, ``console``, ``text``, ``python``, ..."""
    inside = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
            if inside and line.strip() == "```":
                yield number, "a code block without a language"


def paragraphs(text: str) -> Iterator[Lines]:
    """The prose of a page: paragraphs, items and table rows, without code and without examples of
    how not to write.
    """
    part: Lines = []
    inside = False
    text = re.sub(r"(?s)- Bad: .*?Good:", lambda m: re.sub(r"[^\n]", " ", m.group()), text)
    for number, line in enumerate(text.split("\n"), 1):
        fence = line.lstrip().startswith("```")
        inside ^= fence
        if fence or inside or not line.strip() or line.startswith("|"):
            if part:
                yield part
            part = [(number, line)] if line.startswith("|") and not inside else []
        else:
            part.append((number, re.sub(r"`[^`]*`", "`code`", line)))
    if part:
        yield part


@pytest.mark.parametrize("page", files(PAGES, ".md"))
def test_pages(page: str) -> None:
    text = (ROOT / page).read_text()
    wrong = [*long_lines(text), *unnamed_blocks(text)]
    wrong += [problem for lines in paragraphs(text) for problem in found(lines)]
    assert not wrong, "\n".join(f"{page}:{number}: {what}" for number, what in sorted(wrong))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*files(PAGES, ".md"), "ARCHITECTURE.md"])
def test_links(page: str) -> None:
    """Links lead to files and headings that are there."""
    wrong = []
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            wrong.append(f"{page}: {target}")
    assert not wrong, "\n".join(wrong)


# --- code -----------------------------------------------------------------------------------------


def python_prose(source: str) -> Iterator[Lines]:
    """The comments and docstrings of a Python file."""
    block: Lines = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            number = token.start[0]
            if block and block[-1][0] != number - 1:
                yield block
                block = []
            block.append((number, token.string.lstrip("#:")))
    yield block
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""
            first = node.body[0].lineno if text else 0
            yield list(enumerate(text.split("\n"), first))


def c_prose(source: str) -> Iterator[Lines]:
    """The comments of a C file; those of one line that follow each other belong together."""
    block: Lines = []
    for match in re.finditer(r"(?s)/\*.*?\*/|//[^\n]*", source):
        number = source.count("\n", 0, match.start()) + 1
        if block and block[-1][0] != number - 1:
            yield block
            block = []
        lines = match.group().split("\n")
        block += [(number + i, line.strip(" \t/*")) for i, line in enumerate(lines)]
    yield block


@pytest.mark.parametrize("path", files(CODE, ".py", ".c", ".h"))
def test_code(path: str) -> None:
    source = (ROOT / path).read_text()
    parts = python_prose(source) if path.endswith(".py") else c_prose(source)
    wrong = sorted(problem for lines in parts for problem in found(lines))
    assert not wrong, "\n".join(f"{path}:{number}: {what}" for number, what in wrong)


# --- the checks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "lent to whichever runs, for who measures a switch",
        "closed by\nwho made it",
        "a worker a queue pair",
        "kicks and interrupts a second",
        "a test\ncase a cell",
        "once a card",
        "there is none such",
    ],
)
def test_the_check_finds(text: str) -> None:
    assert list(found(list(enumerate(text.split("\n"), 1))))


@pytest.mark.parametrize(
    "text",
    [
        "for whoever measures a switch",
        "one worker per queue pair",
        "it runs a command, boots a machine and exits a test",
        "once a machine is up",
        "a program interrupts a vCPU",
    ],
)
def test_the_check_lets_pass(text: str) -> None:
    assert not list(found(list(enumerate(text.split("\n"), 1))))


def test_prose_of_code_is_found() -> None:
    """Comments and docstrings count, with their lines; other text does not."""
    python = 'x = "for who"\n# closed by\n# who made it\ndef f():\n    """A row a cell."""\n'
    wrong = sorted(problem for lines in python_prose(python) for problem in found(lines))
    assert [number for number, _ in wrong] == [2, 5]
    c = 'char *s = "for who";\n/* a\n * worker a\n * queue */\n// for\n// who\n'
    wrong = sorted(problem for lines in c_prose(c) for problem in found(lines))
    assert [number for number, _ in wrong] == [3, 5]


def test_lines_of_pages() -> None:
    wide = "x " * 60
    assert [n for n, _ in long_lines(f"{wide}\n\n| {wide} |\n")] == [1]
    assert [n for n, _ in long_lines(f"```text\n{wide}\n```\n{wide}")] == [4]
    assert [n for n, _ in long_lines(f"```console\n$ {wide}\n{wide}\n```\n")] == [2]
    assert [n for n, _ in long_lines(f"```console\n$ x \\\n{wide}\n{wide}\n```\n")] == [3]
    assert [n for n, _ in long_lines(f"```python\n{wide}\n```\n")] == [2]
