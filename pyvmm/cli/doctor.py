"""Show what this machine can do for pyvmm, and how to get what is missing.

Exit status: 0 Linux guests run on this machine's own KVM; 3 they run in the testbed; 1 they cannot
run.
"""

from __future__ import annotations

from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import columns
from pyvmm.cli.support.tables import rows_as_text, wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_json(parser, "an object with verdict, where and findings")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is the verdict."""
    from pyvmm import doctor

    findings = doctor.examine()
    status, text = doctor.verdict()
    if args.json:
        fields = ("name", "state", "detail", "remedy")
        print_json(
            {
                "verdict": text,
                "where": {0: "local", 3: "testbed"}.get(status),
                "findings": [{k: getattr(f, k) for k in fields} for f in findings],
            }
        )
        return status
    rows = [
        (f.name, f.state, f"{f.detail} ({f.remedy})" if f.remedy else f.detail) for f in findings
    ]
    width = columns()
    print(rows_as_text(rows, width, ()))
    print("\n".join(wrapped(text, width)) if width else text)
    return status
