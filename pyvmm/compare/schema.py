"""Checks a document against the shipped JSON Schema: ``--from`` reads files that anybody may have
edited.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
from jsonschema.exceptions import best_match

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: Characters of the library's message; longer ones quote the value first and then say what is wrong.
MESSAGE_MAX = 120


def schema() -> dict[str, Any]:
    """The JSON Schema of a comparison's results."""
    loaded: dict[str, Any] = json.loads(
        (Path(__file__).parent / "schema.json").read_text(encoding="utf-8")
    )
    return loaded


def check(document: object) -> str:
    """What is wrong with ``document``, in one line that begins with the place; an empty string
    where nothing is.
    """
    error = best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if error is None:
        return ""
    message = error.message
    if len(message) > MESSAGE_MAX:
        message = f"... {message[-MESSAGE_MAX:]}"
    return f"document{path(error.absolute_path)}: {message}"


def path(steps: Iterable[str | int]) -> str:
    """Where in a document: ``.runs[0]['tcp-tx']``; in one line, whatever the names are."""
    return "".join(
        f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]"
        for step in steps
    )
