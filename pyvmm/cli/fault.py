"""Lose, delay, repeat, reorder, damage, cut or slow down a running machine's packets on purpose,
complete them out of order, and hold kicks and interrupts.

Examples:
  pyvmm fault vm0 rx loss=10%
  pyvmm fault vm0 tx delay=20ms jitter=5ms filter='tcp port 80'
  pyvmm fault vm0 rx corrupt=1/100 tx rate=10mbit queue=50
  pyvmm fault vm0 --seed 7 both duplicate=5% reorder=5% until=10s
  pyvmm fault vm0 rx hold-irq=3ms chance=1%
  pyvmm fault vm0 both reorder-used=10% rx truncate=1/100 keep=20
  pyvmm fault vm0                     what is in force, and what was done
  pyvmm fault vm0 off
  pyvmm fault vm0 needs-reset         set DEVICE_NEEDS_RESET, on any data path
  pyvmm fault vm0 config-interrupt    the configuration interrupt, in vain

A rule begins with rx (to the guest), tx (from the guest) or both. New rules replace the old ones.
The same seed and the same packets have the same deeds; each deed is counted. All words are in
docs/fault-injection.md. Rules are for emulated, user and pyvmm's own vhost-user back-end; tc does
them at the tap of vhost-net and of pyvmm's own vDPA device, without seeds and notifications.

Acts are done once, on any data path, and change no rules: needs-reset, config-interrupt, interrupt
(of each virtqueue, in vain), kick (the same), link-down, link-up.

Exit status: 0; 2 bad usage; 101 there is no libpcap for filter=; 113 no such machine; 114 refused,
such as for a back-end of somebody else's.
"""

from __future__ import annotations

from pyvmm.cli.support import remote
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    words = parser.add_argument(
        "words",
        metavar="WORD",
        nargs="*",
        help="rules; or off; or acts; none: show what is in force",
    )
    words.completer = complete  # type: ignore[attr-defined]
    parser.add_argument(
        "--nic", metavar="N", type=int, default=0, help="the card, counted from 0 (0)"
    )
    parser.add_argument("--seed", metavar="S", type=int, help="of the random numbers (random)")
    add_json(parser, "an object")


def complete(prefix: str, **kwargs: Any) -> list[str]:
    """Words of rules that begin with ``prefix``."""
    from pyvmm.faultopt import ACTS, CHANCES, WAYS, WORDS

    words = ["off", *ACTS, *WAYS, *CHANCES, *(f"{word}=" for word in WORDS)]
    return [word for word in words if word.startswith(prefix)]


def run(args: argparse.Namespace) -> int:
    """Change the rules, if there are words; print what is in force."""

    def body(client: Client) -> int:
        wish: dict[str, object] = {"nic": args.nic}
        if args.words:
            from pyvmm.faultopt import ACTS, of_words, seed_of

            if args.words[0] in ACTS:
                if args.seed is not None:
                    raise UsageError("--seed with what is done once", "leave out --seed")
                wish["acts"] = args.words
                result = client.command("x-pyvmm-fault", **wish)
                return _show(result, args.json)
            rules = of_words(args.words) if args.words != ["off"] else []
            wish["rules"] = [rule.wire() for rule in rules]
            if args.seed is not None:
                wish["seed"] = seed_of(args.seed)
        elif args.seed is not None:
            raise UsageError("--seed without rules", "name rules, such as rx loss=10%")
        result = client.command("x-pyvmm-fault", **wish)
        return _show(result, args.json)

    return remote.with_client(args, body, timeout=120)


def _show(result: dict[str, Any], as_json: bool) -> int:
    if as_json:
        print_json(result)
    else:
        print("\n".join(_lines(result)))
    return 0


def _lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    name = result["name"]
    lines = [f"{name}: {rule}" for rule in result["rules"]] or [f"{name}: no faults"]
    if result["rules"] and result["seed"] is not None:
        lines[-1] += f"   (seed {result['seed']})"
    for way, words in (("rx", "to the guest"), ("tx", "from the guest")):
        counts = {
            key.removeprefix(f"{way}_fault_"): n
            for key, n in result["counters"].items()
            if key.startswith(f"{way}_fault_") and n
        }
        waiting = result["waiting"][way]
        if waiting:
            counts["waiting"] = waiting
        if counts:
            lines.append(f"{words}: " + ", ".join(f"{n} {key}" for key, n in counts.items()))
    acts = {key[6:]: n for key, n in result["counters"].items() if key.startswith("fault_")}
    if acts:
        lines.append("once: " + ", ".join(f"{n} {key}" for key, n in acts.items()))
    return lines
