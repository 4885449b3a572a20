"""The man pages: ``python -m tools.site.man DIR`` writes pyvmm.1 and one page per command.

The texts are those of ``--help``, in the macros of man(7). Setup builds them into the wheel.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pyvmm import __version__
from tools.site.commands import Command, Option, Part, commands

#: Of pyvmm(1) itself.
ABOUT = """\
pyvmm is a small virtual machine monitor for Linux KVM, built around one device, the virtio-net
network card. It boots a guest, runs a command in it and returns the exit status of that command;
its packets are moved by pyvmm, by the kernel, by another process or by a device, and every VM exit
is counted."""
ENVIRONMENT = {
    "PYVMM_CONFIG": "The configuration file, by its absolute path; empty: none.",
    "PYVMM_TESTBED": "The name of the testbed to use, instead of default.",
    "NO_COLOR": "Text gets no colours.",
    "COLUMNS": "The width of the terminal.",
    "XDG_CACHE_HOME": "Guest images and the testbed are in its directory pyvmm (~/.cache).",
    "XDG_RUNTIME_DIR": "Control sockets of running machines are in its directory pyvmm.",
}
CONFIG = "Defaults for the options of each command; see `pyvmm config --help`."
STATUSES = """\
Each command's page has its exit statuses. pyvmm's own are 2, for bad usage, and 101 to 143, so that
they stay clear of those that tests use. Each comes with one line, which says the cause and the
remedy."""


def text(words: str) -> str:
    """Text that roff prints as it is: its escapes, quotation marks and minus signs."""
    words = words.replace("\\", "\\e").replace("-", "\\-")
    for mark, escape in {"'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}.items():
        words = words.replace(mark, escape)
    return re.sub(r"(?m)^\.", "\\&.", words)


def bold(words: str) -> str:
    """Text in bold, for what is typed."""
    return f"\\fB{text(words)}\\fR"


def prose(words: str) -> str:
    """A paragraph, in which code is bold."""
    pieces = re.split(r"`([^`]*)`", words)
    return "".join(bold(p) if i % 2 else text(p) for i, p in enumerate(pieces))


def _part(part: Part) -> str:
    return f".nf\n{text(part.text)}\n.fi" if part.literal else prose(part.text)


def _option(option: Option) -> str:
    value = f" \\fI{text(option.value)}\\fR" if option.value else ""
    names = ", ".join(map(bold, option.names))
    return f".TP\n{names}{value}\n{prose(option.help) or text('See above.')}"


def _sections(command: Command) -> Iterator[str]:
    yield ".SH SYNOPSIS\n.nf"
    for one in command.actions or (command,):
        yield text(one.usage)
    yield ".fi\n.SH DESCRIPTION"
    last = [part for part in command.parts if part.text.startswith("Exit status:")]
    yield "\n.PP\n".join(_part(part) for part in command.parts if part not in last)
    for one in (command, *command.actions):
        for title, options in one.groups:
            of = f" of {one.name}" if one is not command else ""
            yield f'.SH "{text((title + of).upper())}"'
            yield from map(_option, options)
    if last:
        yield '.SH "EXIT STATUS"'
        for part in last:
            words = part.text.removeprefix("Exit status:").strip()
            yield prose(words[0].upper() + words[1:])


def date() -> str:
    """The day of SOURCE_DATE_EPOCH, so that a build can be repeated, else today."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))


def _page(name: str, summary: str, body: list[str], also: list[str]) -> str:
    title = name.upper().replace(" ", "-")
    refer = ",\n".join(f".BR {other.replace('-', chr(92) + '-')} (1)" for other in also)
    lines = [
        f'.TH "{text(title)}" 1 "{date()}" "pyvmm {__version__}" "pyvmm"',
        ".ad l",
        f".SH NAME\n{text(name.replace(' ', '-'))} \\- {text(summary)}",
        *body,
        f'.SH "SEE ALSO"\n{refer.replace("(1),", "(1) ,")}',
    ]
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name -> content, of all pages."""
    found = commands()
    files = [command.name.replace(" ", "-") for command in found]
    made = {}
    for name, command in zip(files, found, strict=True):
        made[f"{name}.1"] = _page(command.name, command.summary, [*_sections(command)], ["pyvmm"])
    body = [
        ".SH SYNOPSIS\n.B pyvmm\n[\\fB\\-\\-config\\fR \\fIFILE\\fR]",
        "\\fICOMMAND\\fR\n[\\fIOPTION\\fR]...\n.br",
        ".B pyvmm \\-\\-version",
    ]
    body += [".SH DESCRIPTION", prose(ABOUT), ".SH COMMANDS"]
    for command in found:
        body.append(f".TP\n{bold(command.name)}\n{prose(command.summary)}")
    body += [".SH FILES", f".TP\n.I {text('~/.config/pyvmm/config.toml')}", prose(CONFIG)]
    body += ['.SH "EXIT STATUS"', prose(STATUSES), ".SH ENVIRONMENT"]
    body += [f".TP\n.B {name}\n{prose(words)}" for name, words in ENVIRONMENT.items()]
    summary = "run guests on KVM, and measure and test their virtio network cards"
    made["pyvmm.1"] = _page("pyvmm", summary, body, files)
    return made


def write(directory: Path) -> list[Path]:
    """Write all pages; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for name, content in sorted(pages().items()):
        made.append(directory / name)
        made[-1].write_text(content)
    return made


if __name__ == "__main__":
    print(f"{len(write(Path(sys.argv[1])))} pages in {sys.argv[1]}: man -l {sys.argv[1]}/pyvmm.1")
