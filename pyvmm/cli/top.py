"""Show live rates of a running machine: exits by cause, packets, interrupts, the CPU time of
workers.

The command reads the counters by the machine's control socket (docs/control.md) once per interval,
and shows rates per second. `q` or Ctrl-C ends it.

Examples:
  pyvmm top vm0
  pyvmm top vm0 --interval 5
  pyvmm top vm0 --once --json

Exit status: 0; or 2 bad usage, 113 no such machine, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import time

from pyvmm.cli.support import remote
from pyvmm.cli.support.options import seconds
from pyvmm.cli.support.results import add_json, print_json
from pyvmm.cli.support.screen import CLEAR, steerable
from pyvmm.errors import MachineMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from pyvmm.control.client import Client

HIDE, SHOW = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
ENDED = ("shutdown", "guest-panicked")
ROWS = 24  # for a terminal that does not tell its height


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    remote.add_arguments(parser)
    parser.add_argument(
        "--interval",
        metavar="S",
        type=seconds(0.1, 3600),
        default=1.0,
        help="seconds between two readings, 0.1 to 3600 (1)",
    )
    parser.add_argument("--once", action="store_true", help="print one interval and leave")
    add_json(parser, "an object per line")


def run(args: argparse.Namespace) -> int:
    """Show rates until the machine ends or the user leaves."""
    return remote.with_client(args, lambda client: _watch(args, client))


def _watch(args: argparse.Namespace, client: Client) -> int:
    live = steerable(sys.stdout) and not args.once and not args.json
    with _Screen(live) as screen:
        before = client.command("x-pyvmm-ledger")
        while True:
            if screen.wait(args.interval):
                return 0
            try:
                after = client.command("x-pyvmm-ledger")
            except MachineMissing:
                if args.once:
                    raise
                return 0  # the machine has ended
            _show(before, after, args, screen)
            if args.once or after["status"] in ENDED:
                return 0
            before = after


def _show(
    before: dict[str, Any], after: dict[str, Any], args: argparse.Namespace, screen: _Screen
) -> None:
    from pyvmm.exits.rates import rates

    now = rates(before, after)
    if args.json:
        print_json(now, line=True)
    elif screen.live:
        columns, rows = screen.size()
        lines = table(now, rows - 1)
        sys.stdout.write(CLEAR + "\n".join(line[:columns] for line in lines))
        sys.stdout.flush()
    else:
        print("\n".join(table(now, ROWS)), end="\n" if args.once else "\n\n", flush=True)


def table(now: dict[str, Any], rows: int) -> list[str]:
    """The rates as at most ``rows`` lines of text; the rarest causes are left out first."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"

    out = [f"{now['name']}  {now['status']}  rates per second over {now['seconds']:.1f} s"]
    out.append("")
    out.append(f"{'':8}{'exits':>10}{'in KVM':>10}{'interrupts':>12}")
    for v in now["vcpus"]:
        text = "".join(
            f"{number(v[key]):>{w}}"
            for key, w in (("exits", 10), ("kvm_exits", 10), ("interrupts", 12))
        )
        out.append(f"{'vcpu' + str(v['index']):8}{text}")
    for net in now["nets"]:
        out.append("")
        out.append(
            f"{net['name']:8}{'packets':>10}{'Mbit/s':>10}{'kicks':>10}{'interrupts':>12}   "
            f"{net['mode']}"
        )
        for way, text in (("rx", "to guest"), ("tx", "from it")):
            mbit = net[f"{way}_bytes"]
            cells = (
                net[f"{way}_packets"],
                None if mbit is None else mbit * 8 / 1e6,
                net[f"{way}_kicks"],
            )
            row = "".join(f"{number(cell):>10}" for cell in cells)
            out.append(f"{text:8}{row}{number(net[f'{way}_calls']):>12}")
        for worker in net["workers"]:
            out.append(f"{number(worker['cpu_percent']):>10} % CPU  {worker['name']}")
    out.append("")
    out.append(f"{number(now['exits']):>10} exits to the VMM")
    causes = [f"{number(rate):>10}   {name}" for name, rate in now["by_name"].items()]
    room = max(rows - len(out), 1)
    if len(causes) > room:
        rest = sum(rate or 0 for rate in list(now["by_name"].values())[room - 1 :])
        causes = [*causes[: room - 1], f"{number(rest):>10}   other causes"]
    return [*out, *causes]


class _Screen:
    """The terminal while ``top`` has it: without line editing, on its alternate screen. If the
    output is not live, this only waits.
    """

    def __init__(self, live: bool) -> None:
        self.live = live
        self._modes: list[Any] | None = None

    def __enter__(self) -> _Screen:
        if self.live:
            import termios

            if sys.stdin.isatty():
                self._modes = termios.tcgetattr(0)
                modes = termios.tcgetattr(0)
                modes[3] &= ~(termios.ICANON | termios.ECHO)
                termios.tcsetattr(0, termios.TCSANOW, modes)
            sys.stdout.write(HIDE)
            sys.stdout.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            sys.stdout.write(SHOW)
            sys.stdout.flush()
        if self._modes is not None:
            import termios

            termios.tcsetattr(0, termios.TCSANOW, self._modes)

    def wait(self, seconds: float) -> bool:
        """Wait; returns True as soon as the user wants to leave."""
        until = time.monotonic() + seconds
        if self._modes is None:
            time.sleep(seconds)
            return False
        import select

        while (left := until - time.monotonic()) > 0:
            if select.select([0], [], [], left)[0]:
                key = os.read(0, 64)
                if not key or b"q" in key:
                    return True
        return False

    @staticmethod
    def size() -> tuple[int, int]:
        """Columns and rows of the terminal now."""
        try:
            size = os.get_terminal_size(1)
        except OSError:
            return 80, ROWS
        return size.columns or 80, size.lines or ROWS
