"""Checks a document against the shipped JSON Schema, because ``--from`` reads files that users may
have edited.
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

#: The most characters of the library's message that are shown. A long message quotes the value
#: first and then says what is wrong.
MESSAGE_MAX = 120


def schema() -> dict[str, Any]:
    """The JSON Schema of a comparison's results."""
    loaded: dict[str, Any] = json.loads(
        (Path(__file__).parent / "schema.json").read_text(encoding="utf-8")
    )
    return loaded


def check(document: object) -> str:
    """Check ``document``. Returns the first fault in one line that begins with its place; an empty
    string if there is no fault.
    """
    error = best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if error is None:
        return ""
    message = error.message
    if len(message) > MESSAGE_MAX:
        message = f"... {message[-MESSAGE_MAX:]}"
    return f"document{path(error.absolute_path)}: {message}"


def path(steps: Iterable[str | int]) -> str:
    """A place in a document: ``.runs[0]['tcp-tx']``; one line, whatever the names contain."""
    return "".join(
        f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{step!r}]"
        for step in steps
    )
