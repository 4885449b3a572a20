"""The generated pages of the site: the commands, from argparse, and the names of the package, whose
texts autodoc takes from docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.site.commands import Command, Part

#: Names of the Python reference, by heading.
NAMES = {
    "Machines": [
        "pyvmm.Machine",
        "pyvmm.Outcome",
        "pyvmm.Net",
        "pyvmm.Device",
        "pyvmm.Disk",
        "pyvmm.Share",
        "pyvmm.Root",
        "pyvmm.SwitchReport",
    ],
    "What a machine has": [
        "pyvmm.card.nic.Nic",
        "pyvmm.devices.guest_agent.CommandResult",
        "pyvmm.exits.ledger.Ledger",
        "pyvmm.exits.phases.Phase",
        "pyvmm.exits.budget.Result",
    ],
    "Images and running machines": ["pyvmm.images.find", "pyvmm.control.client.connect"],
    "Back-ends": [
        "pyvmm.backend.server.Backend",
        "pyvmm.backend.net.NetService",
        "pyvmm.backend.ports.PythonPort",
    ],
}


def prose(text: str) -> str:
    """A paragraph of a help text as Markdown: no mark-up but code, and links to pages."""
    pieces = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\*_<>\[\]$#|~])", r"\\\1", pieces[i])
        pieces[i] = re.sub(r"^([-+]|\d+\.)(?= )", r"\\\1", pieces[i], flags=re.MULTILINE)
        pieces[i] = re.sub(r"\bdocs/([\w-]+)\.md", r"[docs/\1.md](/docs/\1.md)", pieces[i])
    return "".join(pieces)


def _part(part: Part) -> str:
    return f"```text\n{part.text}\n```\n" if part.literal else f"{prose(part.text)}\n"


def _body(command: Command, level: int) -> Iterator[str]:
    yield f"```text\n{command.usage}\n```\n"
    yield from map(_part, command.parts)
    for title, options in command.groups:
        yield f"{'#' * level} {title[:1].upper()}{title[1:]} of {command.name}\n"
        yield f"```{{program}} {command.name}\n```\n"
        for option in options:
            yield f"````{{option}} {option.heading}\n{prose(option.help)}\n````\n"
    for action in command.actions:
        yield f"{'#' * level} {action.name}\n"
        if action.summary:
            yield f"{prose(action.summary)}.\n"
        yield from _body(action, level + 1)


def command_page(command: Command) -> str:
    """The page of a command."""
    return "\n".join([f"# {command.name}\n", f"*{prose(command.summary)}*\n", *_body(command, 2)])


def commands_page(commands: list[Command]) -> str:
    """The page that lists all commands."""
    words = [command.name.removeprefix("pyvmm ") for command in commands]
    rows = [
        f"| [{command.name}](commands/{word}.md) | {prose(command.summary)} |"
        for word, command in zip(words, commands, strict=True)
    ]
    tree = [
        "```{toctree}",
        ":hidden:",
        ":titlesonly:",
        *(f"commands/{word}" for word in words),
        "```",
    ]
    return "\n".join(
        [
            "# Commands\n",
            "`pyvmm COMMAND --help` prints the same. See [exit statuses](/docs/exit-codes.md).\n",
            "| command | what it does |\n|---|---|",
            *rows,
            "",
            *tree,
            "",
        ]
    )


def python_page() -> str:
    """The reference of the package, as reStructuredText for autodoc."""
    lines = ["Python interface", "================", ""]
    lines += ["The examples are in :doc:`/docs/python`.", ""]
    for title, names in NAMES.items():
        lines += [title, "-" * len(title), ""]
        for name in names:
            kind = "class" if name.rpartition(".")[2][0].isupper() else "function"
            lines += [f".. auto{kind}:: {name}", *["   :members:"] * (kind == "class"), ""]
    lines += ["Errors", "------", ""]
    lines += [".. automodule:: pyvmm.errors", "   :members:", "   :show-inheritance:", ""]
    return "\n".join(lines)
