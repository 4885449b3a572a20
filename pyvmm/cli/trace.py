"""Explain the trace of a run: what driver, KVM, VMM and data path did, as a sequence diagram.

Examples:
  pyvmm trace explain trace.json                           writes trace.html
  pyvmm trace explain trace.json --text                    prints a Mermaid diagram
  pyvmm trace explain exit.json ioeventfd.json -o two.html two data paths side by side
  pyvmm trace explain trace.json --card net1 -o net1.html

`pyvmm run --trace trace.json` writes a trace, `pyvmm run --explain FILE.html` the page itself. The
page loads nothing, so that it opens from a file and can be sent. See docs/explain.md.

Exit status: 0, 2 no such file or no trace, 101 the page could not be written.
"""

from __future__ import annotations

import sys

from pyvmm.cli.support.options import count
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's actions and their options."""
    sub = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    explain = sub.add_parser(
        "explain", help="make a page with sequence diagrams", allow_abbrev=False
    )
    add = explain.add_argument
    add("traces", metavar="TRACE", nargs="+", help="of pyvmm run --trace; two are compared")
    add(
        "-o",
        "--output",
        metavar="FILE",
        help="the page, or the text ('-': stdout; default: TRACE with .html, stdout with --text)",
    )
    add("--text", action="store_true", help="a Mermaid sequence diagram instead, for a README")
    add("--card", metavar="NAME", help="the card, such as net1 (the first)")
    add(
        "--arrows",
        metavar="N",
        type=count(10, 100_000),
        help="about how many arrows to keep; the rest is counted (2000, with --text 120)",
    )


def run(args: argparse.Namespace) -> int:
    """Read the traces, write the page."""
    from pyvmm.cli.support.outputs import Outputs
    from pyvmm.explain.arrows import Diagram
    from pyvmm.explain.mermaid import mermaid
    from pyvmm.explain.page import page
    from pyvmm.explain.read import load

    if len(args.traces) > 2:
        raise UsageError(f"{len(args.traces)} traces", "give one, or two to be compared")
    if args.text and len(args.traces) > 1:
        raise UsageError("--text with two traces", "give one")
    target = args.output or ("-" if args.text else _beside(args.traces[0]))
    if target in args.traces:
        raise UsageError(f"--output {target} is the trace itself", "name another file")
    diagrams = []
    for path in args.traces:
        trace = load(path)
        diagrams.append((path, Diagram(trace, trace.card(args.card))))
    keep = {"keep": args.arrows} if args.arrows else {}
    outputs = Outputs({"--output": target})
    try:
        if args.text:
            text = mermaid(diagrams[0][1], *([args.arrows] if args.arrows else []))
        else:
            text = page(diagrams, **keep)
        outputs.write("--output", text)
    finally:
        outputs.close()
    status = outputs.status(0)
    if not status and target != "-":
        print(f"pyvmm: {target}: {sum(len(d.arrows) for _, d in diagrams)} arrows", file=sys.stderr)
    return status


def _beside(path: str) -> str:
    return f"{path.removesuffix('.json')}.html"
