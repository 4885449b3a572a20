"""Show a running machine as a live page: virtqueues, rates, exits by cause, interrupts, switches.

Examples:
  pyvmm watch vm0                    prints the page's address; Ctrl-C ends it
  pyvmm watch vm0 --port 8080        for a browser on your desk: ssh -L 8080:127.0.0.1:8080 HOST
  pyvmm watch --text vm0             the same in this terminal; q ends it
  pyvmm watch --text --once vm0
  pyvmm watch --json vm0 | jq -c '.cards[0].queues[1].outstanding'

The page is served on 127.0.0.1 only, and to nobody who does not know its address, which has a token
in it. It is there to be read: nothing can be changed by it. The machine is asked for its counters
and rings while somebody looks, once per interval whatever the number of lookers, and not at all
while nobody does. Everything ends with the machine.

If the machine runs in the testbed, the page is served here all the same.

Exit status: 0 the machine has ended; 2 bad usage, or the port is taken; 113 no such machine;
130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import count, seconds
from pyvmm.cli.support.rates import cause_lines, net_lines, vcpu_lines
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import ROWS, Screen, steerable
from pyvmm.errors import UsageError
from pyvmm.virtio.ringwords import regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.control.client import Client

BAR = 40  # columns of a ring
SPARKS = "▁▂▃▄▅▆▇█"
#: In a card's queue, the letter of each region of its ring.
LETTERS = {"free": ".", "available": "#", "in-flight": "%"}
EVENTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    add = parser.add_argument
    add("--text", action="store_true", help="in this terminal, without a page")
    add_json(parser, "an object per line")
    add("--once", action="store_true", help="with --text or --json: print one interval and leave")
    add(
        "--interval",
        metavar="S",
        type=seconds(0.1, 60),
        default=1.0,
        help="seconds between two looks, 0.1 to 60 (1)",
    )
    add("--port", metavar="N", type=count(1, 65535), help="port of the page (any that is free)")


def run(args: argparse.Namespace) -> int:
    """Serve the page, or print, until the machine ends or the user leaves."""
    page = not args.text and not args.json
    if page and args.once:
        raise UsageError("--once with a page", "use --text or --json")
    if not page and args.port:
        raise UsageError("--port without a page", "leave out --text and --json")
    if page and "PYVMM_IN_TESTBED" in os.environ:
        raise UsageError(
            "no browser of yours reaches a page in the testbed",
            f"run it outside: pyvmm watch {args.name}",
        )
    with remote.reach(args) as client:
        return (_page if page else _print)(args, client)


def _page(args: argparse.Namespace, client: Client) -> int:
    from pyvmm.watch.look import Watch
    from pyvmm.watch.server import Server

    server = Server(Watch(client, args.interval), args.port or 0)
    try:
        print(server.url, flush=True)
        print(
            f"pyvmm: {args.name} is to be seen at this address, by whoever knows it; Ctrl-C ends",
            file=sys.stderr,
            flush=True,
        )
        why = server.serve()
    finally:
        server.close()
    print(f"pyvmm: {args.name}: {why}", file=sys.stderr)
    return 0


def _print(args: argparse.Namespace, client: Client) -> int:
    from pyvmm.watch.look import HISTORY, Watch

    live = steerable(sys.stdout) and not args.once and not args.json
    watch = Watch(client, args.interval)
    history: list[dict[str, Any]] = []
    number = 0
    with Screen(live) as screen:
        while True:
            look = watch.after(number)
            new, number = look["number"] > number, look["number"]
            history = [*history, *look.pop("history")][-HISTORY:]
            if new and (live or look["rates"] is not None):  # the first look has no rates
                if args.json:
                    print_json(look, line=True)
                elif live:
                    screen.draw(picture(look, history, screen.size()[1] - 1))
                else:
                    end = "\n" if args.once else "\n\n"
                    print("\n".join(picture(look, history, ROWS)), end=end, flush=True)
                if args.once:
                    return 0
            if look["ended"]:
                break
            if screen.wait(args.interval):
                return 0
    print(f"pyvmm: {args.name}: {watch.ended}", file=sys.stderr)
    return 0


def picture(look: dict[str, Any], history: Sequence[dict[str, Any]], rows: int) -> list[str]:
    """A look as about ``rows`` lines of text: the table of ``pyvmm top``, with the virtqueues and a
    short history under each card, and the latest events. If there is too little room, the rarest
    causes of exits are summed first.

    :param history: the rates of earlier looks, oldest first.
    """
    now = look["rates"]
    over = f"rates per second over {now['seconds']:.1f} s" if now is not None else "measuring ..."
    out = [f"{look['name']}  {look['status']}  {over}"]
    if now is not None:
        out += ["", *vcpu_lines(now)]
    rates = {net["name"]: net for net in now["nets"]} if now is not None else {}
    for card in look["cards"]:
        out.append("")
        if card["name"] in rates:
            past = _past(history, card["name"])
            lines = net_lines(rates[card["name"]])
            lines[1:3] = [f"{a}   {_spark(b)}" for a, b in zip(lines[1:3], past, strict=True)]
            out += lines
        else:
            out.append(f"{card['name']:8}{card['mode']}")
        if card["note"]:
            out.append(f"  {card['note']}")
        for q in card["queues"]:
            out += _queue(q)
        silent = {q["note"] for q in card["queues"] if q["role"] != "control" and q["note"]}
        out += [f"  {note}" for note in sorted(silent)]
    events = [f"  {event['text']}" for event in look["events"][-EVENTS:]]
    if events:
        events = ["", "events", *events]
    if now is not None:
        out += ["", *cause_lines(now, rows - len(out) - len(events) - 2)]
    return out + events


def _queue(q: dict[str, Any]) -> list[str]:
    """One line: the ring's regions in their places, and how much each holds."""
    head = f"  {q['index']:2} {q['role']:9}"
    if "format" not in q:
        return [f"{head}{'; '.join(q.get('problems', ())) or q['note']}"]
    most, order = min(q["size"], BAR), list(LETTERS)
    bar = ["free"] * most
    for kind, start, length in regions(q):
        for n in range(length):
            at = (start + n) % q["size"] * most // q["size"]
            bar[at] = max(bar[at], kind, key=order.index)
    text = "".join(LETTERS[kind] for kind in bar)
    flight = f", {q['in-flight']} in flight" if q["in-flight"] is not None else ""
    line = f"{head}[{text}] {q['outstanding']} with the device{flight}"
    return [line, *(f"     ! {problem}" for problem in q["problems"])]


def _past(history: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """The packets per second of a card, to the guest and from it."""
    out: list[list[float]] = [[], []]
    for then in history[-BAR:]:
        for net in then["nets"]:
            if net["name"] == name:
                for way, key in zip(out, ("rx_packets", "tx_packets"), strict=True):
                    way.append(net[key] or 0)
    return out


def _spark(values: list[float]) -> str:
    """Small bars, the highest for the largest value; nothing where a terminal cannot show them."""
    try:
        SPARKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return ""
    top = max(values, default=0)
    return "".join(SPARKS[int(v * (len(SPARKS) - 1) / top) if top else 0] for v in values)
