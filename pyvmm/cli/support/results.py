"""Results for programs: ``--json`` of the commands that print a result (docs/json.md).

Standard output then has the document and nothing else. Commands whose standard output belongs to
somebody else, such as the guest's command, have ``--json FILE`` instead (``outputs``).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """The option ``--json``. :param what: is printed then, such as "an array of objects"."""
    parser.add_argument("--json", action="store_true", help=f"print {what}, for programs")


def print_json(value: object, *, line: bool = False) -> None:
    """Print a document in ASCII: what is in no encoding of the terminal's is escaped.

    :param line: on one line, because others follow.
    """
    import json

    print(json.dumps(value, indent=None if line else 2), flush=True)
