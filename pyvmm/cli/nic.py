"""Add and remove network cards of a running machine, and list them.

  pyvmm nic add NAME [MODE[,K=V...]]    plug in a card; its options are those of pyvmm run --net
  pyvmm nic remove NAME CARD            have the guest let go of a card, and give everything back
  pyvmm nic list NAME                   the cards that are there

Examples:
  pyvmm nic add vm0
  pyvmm nic add vm0 vhost-net,queues=2,mtu=9000 --id net3
  pyvmm nic remove vm0 net3 --wait 10
  pyvmm nic list vm0 --json

The guest has to be Linux with ACPI. A new card's interface appears in the guest, and somebody there
gives it an address. A card that the guest does not let go of stays, and so does the request: the
card goes when the guest lets go of it later, or at the machine's next reset. docs/hotplug.md tells
more.

Exit status: 0; 2 the card's options are wrong; 113 no such machine; 114 refused, with the cause;
124 the guest has not let go of the card within --wait.
"""

from __future__ import annotations

import sys
import time

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import columns
from pyvmm.cli.support.tables import rows_as_text
from pyvmm.errors import ControlError, MachineMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client

HEADS = ("CARD", "MODE", "SLOT", "STATE", "LINK", "MAC", "TAP", "GUEST")
#: Seconds between two requests to a guest that does not react, such as one that is still booting.
AGAIN_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="plug in a card")
    remote.add_arguments(add)
    add.add_argument(
        "net",
        metavar="MODE[,K=V...]",
        nargs="?",
        default="emulated",
        help="the card, as with pyvmm run --net (emulated)",
    )
    add.add_argument(
        "--id", metavar="CARD", help="its name, net0 to net30 (default: the first that is free)"
    )
    remove = actions.add_parser("remove", help="remove a card")
    remote.add_arguments(remove)
    remove.add_argument("card", metavar="CARD", help="the card's name, such as net1")
    remove.add_argument(
        "--wait",
        metavar="S",
        type=seconds(0, 1e6),
        default=30.0,
        help="wait up to S seconds until the guest has let go of the card (30)",
    )
    listing = actions.add_parser("list", help="list the cards")
    remote.add_arguments(listing)
    add_json(add, "the new card as an object")
    add_json(listing, "an array of objects")


def run(args: argparse.Namespace) -> int:
    """Do the action; returns the exit status."""
    if args.action == "add":
        from pyvmm.netopt import Net

        Net.parse(args.net)
    bodies = {"add": _add, "remove": _remove, "list": _list}
    return remote.with_client(args, lambda client: bodies[args.action](client, args), timeout=120)


def _cards(client: Client) -> list[dict[str, Any]]:
    nets: list[dict[str, Any]] = client.command("x-pyvmm-machine")["nets"]
    return nets


def _add(client: Client, args: argparse.Namespace) -> int:
    wish = {"driver": "virtio-net-pci", "net": args.net} | ({"id": args.id} if args.id else {})
    name = client.execute("device_add", wish)["id"]
    card = next((card for card in _cards(client) if card["name"] == name), None)
    if card is None:
        raise ControlError(f"{name} has been removed again")
    if args.json:
        print_json(card)
    else:
        ends = f", host {card['host']}, guest {card['guest']}" if card["guest"] else ""
        print(f"{name}: {card['mode']}, slot {card['slot']}, mac {card['mac']}{ends}")
    return 0


def _remove(client: Client, args: argparse.Namespace) -> int:
    until = time.monotonic() + args.wait
    client.command("device_del", id=args.card)
    while True:
        left = until - time.monotonic()
        try:
            event = client.wait_event("DEVICE_DELETED", max(0, min(AGAIN_S, left)))
        except TimeoutError:
            if left <= AGAIN_S:
                break
            try:
                client.command("device_del", id=args.card)
            except ControlError as e:
                if e.kind != "DeviceNotFound":  # else it has let go, and its event is on the way
                    raise
        except MachineMissing as e:
            raise MachineMissing(f"the machine ended before {args.card} had gone: {e.cause}") from e
        else:
            if event["data"]["device"] == args.card:
                return 0
    print(
        f"pyvmm: the guest has not let go of {args.card} within {args.wait:g} s; the request "
        "stands: repeat it, or reset the machine",
        file=sys.stderr,
    )
    return 124


def _list(client: Client, args: argparse.Namespace) -> int:
    cards = _cards(client)
    if args.json:
        print_json(cards)
        return 0
    table = []
    for card in cards:
        link = "up" if card["link"] else "down"
        slot = "-" if card["slot"] is None else str(card["slot"])
        row = [card["name"], card["mode"], slot, card["state"], link, card["mac"]]
        table.append([*row, card["tap"] or "-", card["guest"] or "-"])
    print(rows_as_text(table, columns(), HEADS))
    return 0
