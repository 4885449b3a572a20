"""Checks a document against the shipped JSON Schema, without a library: ``--from`` reads files that
anybody may have edited.

Knows the keywords that schema.json uses: type, const, enum, required, properties,
additionalProperties, items, minimum, $ref.
"""

from __future__ import annotations

import json
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


def schema() -> dict[str, Any]:
    """The JSON Schema of a comparison's results."""
    loaded: dict[str, Any] = json.loads(
        (Path(__file__).parent / "schema.json").read_text(encoding="utf-8")
    )
    return loaded


def check(document: object) -> str:
    """What is wrong with ``document``, in one line; an empty string where nothing is."""
    root = schema()
    return _check(document, root, root, "document")


def _is(value: object, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _check(value: object, rule: dict[str, Any], root: dict[str, Any], at: str) -> str:
    if "$ref" in rule:
        return _check(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root, at)
    if "const" in rule and value != rule["const"]:
        return f"{at} is not {rule['const']!r}"
    if "enum" in rule and value not in rule["enum"]:
        return f"{at} is none of {rule['enum']}"
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{at} is not of type {' or '.join(kinds)}"
    if "minimum" in rule and isinstance(value, (int, float)) and value < rule["minimum"]:
        return f"{at} is less than {rule['minimum']}"
    if isinstance(value, dict):
        for name in rule.get("required", ()):
            if name not in value:
                return f"{at} has no {name}"
        for name, inner in value.items():
            one = rule.get("properties", {}).get(name, rule.get("additionalProperties"))
            if isinstance(one, dict) and (problem := _check(inner, one, root, f"{at}.{name}")):
                return problem
    if isinstance(value, list) and "items" in rule:
        for index, inner in enumerate(value):
            if problem := _check(inner, rule["items"], root, f"{at}[{index}]"):
                return problem
    return ""
