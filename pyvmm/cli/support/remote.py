"""Commands about a running machine: its name as an argument, and the connection to it.

A Unix socket does not reach from one kernel into another. If the machine runs in the testbed, the
command itself is therefore run there, as `pyvmm run` is. Names are looked up on this machine first.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import contextmanager

from pyvmm.cli.support import options
from pyvmm.errors import MachineMissing, TestbedError
from pyvmm.programs import module

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from subprocess import Popen
    from typing import Any

    from pyvmm.control.client import Client
    from pyvmm.testbed.testbed import Testbed

COMPLETE_TIMEOUT = 5.0  # seconds that completion waits for the testbed
TIMEOUT = 30.0  # seconds for one answer
FAR_S = 120.0  # the same, if the answer comes from another kernel, where Python has to start first
CARRIER_S = 10.0  # seconds that ``pyvmm qmp --raw`` has to end once its input has ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments NAME, which a shell can complete, and ``--host``."""
    name = parser.add_argument(
        "name", metavar="NAME", help="the machine's name, or the path of its control socket"
    )
    name.completer = complete  # type: ignore[attr-defined]
    add_host(parser)


def add_host(parser: argparse.ArgumentParser) -> None:
    """The argument ``--host``."""
    options.add_host(
        parser,
        "where the machine runs: here, in the testbed, in the testbed on another machine, or"
        " wherever it is found here (auto)",
    )


def complete(prefix: str, **kwargs: Any) -> list[str]:
    """The names of running machines, here and in the testbed, that begin with ``prefix``."""
    try:
        return [
            row["name"]
            for row in listing(timeout=COMPLETE_TIMEOUT)
            if row["name"].startswith(prefix)
        ]
    except Exception:  # completion has nowhere to report an error
        return []


def testbed_up(host: str = "auto") -> Testbed | None:
    """The testbed, if it is up and this process is outside of it; else None.

    :param host: as ``--host`` gives it.
    :raises TestbedError: no testbed is up on another machine.
    """
    if "PYVMM_IN_TESTBED" in os.environ:
        return None
    from pyvmm.testbed.testbed import Testbed

    elsewhere = host if host.startswith(options.SSH) else ""
    bed = Testbed(host=elsewhere)
    if bed.is_up():
        return bed
    if elsewhere:
        raise TestbedError(
            f"no testbed is up on {host}", f"start it: pyvmm testbed --host {host} up"
        )
    return None


def listing(host: str = "auto", *, timeout: float | None = None) -> list[dict[str, Any]]:
    """Running machines: ``name``, ``host``, ``pid``, ``qmp``, ``since``. If the testbed is up, its
    machines are among them.

    :param timeout: the most seconds to wait for the testbed.
    """
    from pyvmm.control.registry import machines

    rows: list[dict[str, Any]] = []
    if host in ("auto", "local"):
        where = "testbed" if "PYVMM_IN_TESTBED" in os.environ else "local"
        rows += [
            {"name": e.name, "host": where, "pid": e.pid, "qmp": e.path, "since": e.since}
            for e in machines()
        ]
    bed = testbed_up(host) if host != "local" else None
    if bed is not None:
        import json

        result = bed.run(
            module(
                "pyvmm",
                "ps",
                "--host",
                "local",
                "--json",
                *([] if timeout is None else ["--brief"]),
            ),
            timeout=timeout,
        )
        if result.status == 0:
            rows += [{**row, "host": bed.host or row["host"]} for row in json.loads(result.out)]
        else:
            print(
                f"pyvmm: the testbed does not say what runs in it: {result.err.strip()[-200:]}",
                file=sys.stderr,
            )
    return rows


def place(args: argparse.Namespace) -> Testbed | None:
    """The testbed, if the machine that ``args`` names is not here and the testbed is up; else None:
    the attempt to connect here then says what is wrong.
    """
    if args.host == "local" or "/" in args.name:
        return None
    from pyvmm.control.registry import find

    if args.host == "auto":
        try:
            find(args.name)
            return None
        except MachineMissing:
            pass
    return testbed_up(args.host)


def there(args: argparse.Namespace) -> int | None:
    """Run this same command in the testbed, if the machine is there.

    :returns: its exit status, or None to go on here.
    """
    bed = place(args)
    if bed is None:
        return None
    words = [args.command, *([args.action] if "action" in args else [])]
    at = args.argv.index(words[-1], args.argv.index(args.command)) + 1
    return bed.run_attached(module("pyvmm", *words, "--host", "local", *args.argv[at:]))


def with_client(
    args: argparse.Namespace, body: Callable[[Client], int], timeout: float = TIMEOUT
) -> int:
    """Run ``body`` with a connection to the machine that ``args`` names, wherever it runs. Returns
    the exit status.
    """
    status = there(args)
    if status is not None:
        return status
    from pyvmm.control.client import connect

    with connect(args.name, timeout=timeout) as client:
        return body(client)


@contextmanager
def reach(args: argparse.Namespace, timeout: float = TIMEOUT) -> Iterator[Client]:
    """A connection to the machine that ``args`` names, wherever it runs, for a command that has to
    stay on this machine. ``pyvmm qmp --raw`` carries the connection to another kernel.

    :raises MachineMissing: there is no such machine, or it does not answer.
    """
    from pyvmm.control.client import Client, connect

    if place(args) is None:
        with connect(args.name, timeout=timeout) as client:
            yield client
        return
    import subprocess
    from socket import socketpair

    ours, theirs = socketpair()
    # A session of its own, so that Ctrl-C ends this command, and this command the carrier.
    with theirs:
        carrier = subprocess.Popen(
            module("pyvmm", "qmp", "--raw", "--host", args.host, args.name),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    try:
        try:
            client = Client(args.name, timeout=max(timeout, FAR_S), sock=ours)
        except MachineMissing as e:
            ours.close()
            said = carrier.communicate()[1].decode(errors="replace").strip().splitlines()
            raise MachineMissing(said[-1].removeprefix("pyvmm: ") if said else str(e)) from e
        with client:
            yield client
    finally:
        ours.close()
        _end(carrier)


def _end(carrier: Popen[bytes]) -> None:
    """Wait for a carrier, whose input has ended."""
    import subprocess

    try:
        carrier.communicate(timeout=CARRIER_S)
    except subprocess.TimeoutExpired:
        carrier.kill()
        carrier.communicate()


def tell(
    args: argparse.Namespace,
    command: str,
    event: str = "",
    timeout: float = TIMEOUT,
    *,
    again: float = math.inf,
) -> int:
    """Send one command; then wait for ``event``, unless that is empty.

    :param timeout: seconds for the event. :param again: send the command again after so many
        seconds without the event.
    :returns: 0, or 124 if the event did not come.
    """

    def body(client: Client) -> int:
        client.command(command)
        until = time.monotonic() + timeout
        while event:
            try:
                client.wait_event(event, max(0, min(again, until - time.monotonic())))
            except TimeoutError:
                if time.monotonic() >= until:
                    print(f"pyvmm: {args.name}: no {event} within {timeout:g} s", file=sys.stderr)
                    return 124
                client.command(command)
            else:
                break
        return 0

    return with_client(args, body)
