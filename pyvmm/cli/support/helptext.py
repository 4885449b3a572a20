"""The layout of help texts: of ``-h``, which is short, and of ``--help`` on narrow terminals.

A docstring is laid out by hand for 100 columns. Pieces of it that are wider than the terminal are
laid out anew: paragraphs; rows of a term and its description; and commands, which go on behind a
backslash, so that they can still be copied.
"""

from __future__ import annotations

import re
from argparse import SUPPRESS, _SubParsersAction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Action, ArgumentParser, HelpFormatter
    from collections.abc import Callable, Iterator

#: The columns for which docstrings are laid out.
LAID_OUT = 100
#: The least columns for a description beside its term.
BESIDE_MIN = 24
#: A row of a table: its indent with the term, the gap, the description.
ROW = re.compile(r"( +\S(?:.*?\S)?)( {2,})(\S.*)$")
#: An example.
COMMAND = re.compile(r"  (?:\S.*[|&] )?pyvmm ")
#: A word of a shell: blanks within quotation marks belong to it.
WORD = re.compile(r"(?:'[^']*'|\"[^\"]*\"|\S)+")


def fill(text: str, width: int) -> str:
    """``text`` with no line wider than ``width``, but for words that are longer."""
    return "\n".join(line for piece in _pieces(text) for line in _fitted(piece, width))


def _pieces(text: str) -> Iterator[list[str]]:
    """Lines that belong together: a paragraph, a row of a table with the lines of its description,
    or a command.
    """
    piece: list[str] = []
    for line in text.split("\n"):
        if piece and not _goes_on(piece, line):
            yield piece
            piece = []
        piece.append(line)
    yield piece


def _goes_on(piece: list[str], line: str) -> bool:
    """Whether ``line`` belongs to the piece."""
    if not piece[0] or not line:
        return False
    row, indent = ROW.match(piece[0]), _indent(line)
    if row:
        return indent == len(row[1] + row[2])
    if indent != _indent(piece[0]):
        return False
    # An indented paragraph: the line above is full.
    full = len(piece[-1]) + 1 + len(line.split()[0]) > LAID_OUT
    return not indent or (full and not COMMAND.match(piece[0]) and not ROW.match(line))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _fitted(piece: list[str], width: int) -> list[str]:
    """The lines of a piece, laid out anew if one of them is too wide."""
    if all(len(line) <= width for line in piece):
        return piece
    first, indent = piece[0], _indent(piece[0])
    if not indent:
        return list(_wrap(" ".join(piece).split(), width))
    row = ROW.match(first)
    if COMMAND.match(first) and len(piece) == 1:
        return list(_command(first, width))
    if row:
        column = len(row[1] + row[2])
        words = " ".join([row[3], *piece[1:]]).split()
        if width - column >= BESIDE_MIN:
            return list(_wrap(words, width, row[1] + row[2], " " * column))
        more = " " * (indent + 4)
        return [*_wrap(row[1].split(), width, " " * indent, more), *_wrap(words, width, more, more)]
    begin = " " * indent
    return list(_wrap(" ".join(piece).split(), width, begin, begin))


def _command(line: str, width: int) -> Iterator[str]:
    """A command on lines that end with a backslash, and the words behind it on one of their own."""
    indent = " " * _indent(line)
    row = ROW.match(line)
    remark = row[3] if row and not row[3].startswith(("|", "&", "\\")) else ""
    command = row[1] if row and remark else line
    lines = [*_lines(WORD.findall(command), width - 2, indent, f"{indent}    ")]
    yield from (f"{one} \\" for one in lines[:-1])
    yield lines[-1]
    if remark:
        yield from _wrap(remark.split(), width, f"{indent}      ", f"{indent}      ")


def lines(text: str, width: int) -> list[str]:
    """A paragraph as lines."""
    return list(_wrap(text.split(), width))


def _wrap(words: list[str], width: int, first: str = "", more: str = "") -> Iterator[str]:
    """Lines of words: the first begins with ``first``, all others with ``more``. A word that has no
    room on a line is divided where it has commas and the like.
    """
    room = width - len(more)
    return _lines([part for word in words for part in _parts(word, room)], width, first, more)


def _parts(word: str, room: int) -> Iterator[str]:
    part = ""
    for piece in re.findall(r"[^,+|]*[,+|]?", word) if len(word) > room else [word]:
        if part and len(part + piece) > room:
            yield part
            part = ""
        part += piece
    yield part


def _lines(words: list[str], width: int, first: str, more: str) -> Iterator[str]:
    """As ``_wrap``, with whole words."""
    line, begun = first, False
    for word in words:
        if begun and len(line) + 1 + len(word) > width:
            yield line
            line, begun = more, False
        line += f" {word}" if begun else word
        begun = True
    yield line


def brief(text: str, width: int) -> str:
    """The beginning of ``text`` that is at most ``width`` long: if possible one of its clauses."""
    if len(text) <= width:
        return text
    clauses = (text[: m.start()] for m in re.finditer(r"[;.]? \(|[;.] ", text))
    whole = [c for c in clauses if len(c) <= width and c.count("(") == c.count(")")]
    if whole and len(whole[-1]) >= width // 3:
        return whole[-1]
    cut = text[: width - 3].rpartition(" ")[0] or text[: width - 3]
    return f"{cut.rstrip(',;:')}..."


def short(parser: ArgumentParser, make: Callable[[str], HelpFormatter]) -> str:
    """The text of ``-h``: what the command does, and its options, a line each.

    :param make: makes a formatter for a program's name, whose lines of help are ``brief``.
    """
    formatter = make(parser.prog)
    width = formatter._width
    words = ["usage:", *parser.prog.split()]
    options = [a for a in parser._actions if a.option_strings and a.help != SUPPRESS]
    others = parser._get_positional_actions()
    words += ["[OPTION...]"] if options else []
    metavar = formatter._get_default_metavar_for_positional
    words += [formatter._format_args(a, metavar(a)) for a in others]
    lines = [*_wrap(words, width, "", "       "), ""]
    first = (parser.description or "").strip().partition("\n\n")[0]
    lines += [*_wrap(first.split(), width), ""] if first else []
    for title, actions in (("", others), ("options:", options)):
        shown = [a for a in actions if a.help != SUPPRESS]
        if shown:
            lines += [*_list(title, shown, make(parser.prog)), ""]
    more = f"{parser.prog} --help tells all."
    if parser.prog == "pyvmm":
        more = "pyvmm COMMAND -h shows a command's options, pyvmm COMMAND --help tells all."
    lines += _wrap(more.split(), width)
    return "\n".join(lines) + "\n"


def _list(title: str, actions: list[Action], formatter: HelpFormatter) -> list[str]:
    """A list of options or arguments, or of a command's actions."""
    for one in actions:
        if isinstance(one, _SubParsersAction):
            title = "commands:" if formatter._prog == "pyvmm" else "actions:"
            actions = [*one._get_subactions()]
    formatter.start_section(None)
    formatter.add_arguments(actions)
    formatter.end_section()
    text = formatter.format_help().strip("\n")
    return [*([title] if title else []), *text.split("\n")]
