"""Show what this machine can do for pyvmm, and how to get what is missing.

Exit status: 0 Linux guests run on this machine's own KVM; 3 they run in the testbed; 1 they cannot
run.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--json", action="store_true", help="print an object with verdict, where and findings"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is the verdict."""
    from pyvmm import doctor

    findings = doctor.examine()
    status, text = doctor.verdict()
    if args.json:
        import json

        print(
            json.dumps(
                {
                    "verdict": text,
                    "where": {0: "local", 3: "testbed"}.get(status),
                    "findings": [
                        {"name": f.name, "state": f.state, "detail": f.detail, "remedy": f.remedy}
                        for f in findings
                    ],
                },
                indent=2,
            )
        )
        return status
    width = max(len(f.name) for f in findings)
    for f in findings:
        remedy = f" ({f.remedy})" if f.remedy else ""
        print(f"{f.name:{width}}  {f.state:7}  {f.detail}{remedy}")
    print(text)
    return status
