"""Draw the virtqueues of a running machine's network card as they are now.

Examples:
  pyvmm rings vm0
  pyvmm rings vm0 --queue 1 --chains 4
  pyvmm rings vm0 --watch                 draws again every second
  pyvmm rings vm0 --json | jq '.queues[0].outstanding'

The picture of a queue shows: the two indices that move (the driver publishes chains in the
available ring, the device returns them in the used ring); which notifications each side asks for;
who owns each descriptor (D the device, . the driver); the next chains of the device; and the last
chains that it has returned. The rings are read while both sides work, so a chain that is shown may
have been returned meanwhile. Pause the machine with `pyvmm stop` for a picture that stands still.

Exit status: 0, 113 no such machine, 114 no such card or queue.
"""

from __future__ import annotations

import sys
import time

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import CLEAR, steerable
from pyvmm.spec.virtio_pci import VIRTIO_MSI_NO_VECTOR
from pyvmm.virtio.ringwords import asks, chain_words

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client

WIDTH = 64  # descriptors per line
MAP_MAX = 1024  # the most descriptors that are drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    add = parser.add_argument
    add("--nic", metavar="N", type=int, default=0, help="the card, counted from 0 (0)")
    add(
        "--queue",
        metavar="N",
        type=int,
        help="only this queue: 0 receives, 1 transmits, ... (all)",
    )
    add(
        "--chains",
        metavar="N",
        type=int,
        default=3,
        help="chains shown for either side, 0 to 256 (3)",
    )
    add(
        "--watch",
        metavar="S",
        nargs="?",
        type=seconds(0.05, 3600),
        const=1.0,
        help="draw again every S seconds (1), until Ctrl-C",
    )
    add_json(parser, "an object (docs/control.md, x-pyvmm-rings); with --watch one per line")


def run(args: argparse.Namespace) -> int:
    """Ask for a snapshot and draw it, once or repeatedly."""

    def body(client: Client) -> int:
        wanted = {"nic": args.nic, "chains": args.chains}
        if args.queue is not None:
            wanted["queue"] = args.queue
        while True:
            snapshot = client.execute("x-pyvmm-rings", wanted)
            if args.json:
                print_json(snapshot, line=args.watch is not None)
            else:
                if args.watch is not None and steerable(sys.stdout):
                    print(CLEAR, end="")
                print("\n".join(draw(snapshot)), flush=True)
            if args.watch is None:
                return 0
            time.sleep(args.watch)

    return remote.with_client(args, body)


def draw(snapshot: dict[str, Any]) -> list[str]:
    """The lines of the picture."""
    state = "" if snapshot["active"] else ", not driven by the guest"
    lines = [f"{snapshot['name']}: {snapshot['mode']}, machine {snapshot['machine']}{state}"]
    for queue in snapshot["queues"]:
        lines += ["", *_queue(queue)]
    return lines


def _queue(q: dict[str, Any]) -> list[str]:
    vector = "no vector" if q["vector"] == VIRTIO_MSI_NO_VECTOR else f"vector {q['vector']}"
    head = f"queue {q['index']}  {q['role']}  {q['size']} entries  {vector}"
    if "format" not in q:
        return [
            head + ("  not enabled" if not q["enabled"] else ""),
            *(f"  ! {p}" for p in q.get("problems", ())),
        ]
    if q["format"] == "packed":
        return _packed(head, q)
    avail, used = q["avail"], q["used"]
    bar = _bar(q["outstanding"], q["size"])
    lines = [
        head,
        (
            f"  descriptors {q['desc-addr']:#x}   available ring {q['avail-addr']:#x}   "
            f"used ring {q['used-addr']:#x}"
        ),
        f"  driver  available idx {avail['idx']:5}  [{bar}] {q['outstanding']} with the device",
        f"  device  used idx      {used['idx']:5}   {asks(q)}",
    ]
    owned = set(q["device-owned"])
    lines.append(
        f"  descriptors: {len(owned)} the device's (D), {q['size'] - len(owned)} the driver's (.)"
    )
    lines += _map("".join("D" if i in owned else "." for i in range(q["size"])))
    return lines + _chains(q, "head")


def _packed(head: str, q: dict[str, Any]) -> list[str]:
    driver, device, states = q["driver"], q["device"], q["map"]
    own = sum(states.upper().count(letter) for letter in "U.")
    return [
        f"{head}  packed",
        (
            f"  descriptor ring {q['desc-addr']:#x}   event suppression: driver"
            f" {q['avail-addr']:#x}, device {q['used-addr']:#x}"
        ),
        (
            f"  driver  next {driver['next']:5}, wrap counter {driver['wrap']}"
            f"  [{_bar(q['outstanding'], q['size'])}] {q['outstanding']} chains with the device"
        ),
        f"  device  next {device['next']:5}, wrap counter {device['wrap']}  {asks(q)}",
        (
            f"  descriptors: {q['size'] - own} the device's (D), {own} the driver's (U used, ."
            " behind it in its chain); small letters: written with wrap counter 0"
        ),
        *_map(states),
        *_chains(q, "buffer"),
    ]


def _bar(filled: int, size: int) -> str:
    part = min(filled, size) * 40 // size
    return "#" * part + "." * (40 - part)


def _map(states: str) -> list[str]:
    """One letter per descriptor, in rows."""
    shown = states[:MAP_MAX]
    lines = [f"    {at:5}  {shown[at : at + WIDTH]}" for at in range(0, len(shown), WIDTH)]
    if len(shown) < len(states):
        lines.append(f"    ...    {len(states) - len(shown)} more")
    return lines


def _chains(q: dict[str, Any], what: str) -> list[str]:
    """The chains that the device has, and those that it has returned. :param what: names them."""
    lines = []
    if q["available"]:
        lines.append("  the device has, next first:")
    for chain in q["available"]:
        ident = chain["id" if what == "buffer" else what]
        lines.append(f"    [{chain['at']:5}] {what} {ident}: {chain_words(chain)}")
    if q["outstanding"] > len(q["available"]):
        lines.append(f"    ... {q['outstanding'] - len(q['available'])} more")
    if q["returned"]:
        lines.append("  returned last:")
    for entry in q["returned"]:
        lines.append(f"    [{entry['at']:5}] {what} {entry['id']}, {entry['len']} bytes written")
    return lines + [f"  ! {problem}" for problem in q["problems"]]
