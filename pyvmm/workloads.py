"""Load for a guest's network card: ping, iperf3 and a check of an echo on the host's side, and what
they report.

``pyvmm compare``, ``pyvmm matrix`` and ``pyvmm demo`` run them in the network namespace at the
other end of the card (``hostnet.tools``); the guest has a server where one is needed.
"""

from __future__ import annotations

import json
import re
import time

from pyvmm.errors import HostError
from pyvmm.hostnet import tools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.hostnet.netns import Namespace

REMEDY = "install iputils-ping and iperf3"
PAUSE = 0.3  # seconds between two attempts to reach a server that does not listen yet


class ToolFailed(HostError):
    """A tool ran and failed, did not end in time, or reported nothing that could be understood."""


def run_tool(space: Namespace, words: Sequence[str], timeout: float) -> str:
    """Run a tool in a namespace; what it printed. It is ended if the caller is interrupted.

    :param words: of ``tools.ping`` or ``tools.iperf3``. :param timeout: in seconds.
    :raises ToolFailed: its exit status is not 0, it did not end in time, or it printed too much.
    :raises HostError: it cannot be run at all.
    """
    name = words[0]
    try:
        end = tools.run(space, words, timeout)
    except FileNotFoundError as e:
        raise HostError(f"{name} cannot be run", REMEDY) from e
    if end.how == tools.LATE:
        raise ToolFailed(f"{name} did not end within {timeout:g} s")
    if end.how == tools.FLOOD:
        raise ToolFailed(f"{name} has printed more than {tools.OUTPUT_MAX >> 20} MiB")
    if end.status == tools.CANNOT_RUN:
        raise HostError(f"{name} cannot be run", REMEDY)
    if end.status:
        raise ToolFailed(f"{name} failed: {reason(end.text)}")
    return end.text


def tcp_mbit(
    space: Namespace,
    server: str,
    seconds: float,
    *,
    port: int = 5201,
    reverse: bool = False,
    attempts: int,
    timeout: float,
) -> float:
    """Mbit/s of one TCP stream from the namespace to ``server``, as its receiver counted.

    :param reverse: a stream from the server.
    :param attempts: times to try, because a server in the guest needs a moment until it listens.
    :param timeout: seconds for each attempt.
    :raises HostError: as of ``run_tool``, for the last attempt.
    """
    words = tools.iperf3(server, port, seconds, reverse=reverse)
    for left in reversed(range(attempts)):
        try:
            return received_mbit(run_tool(space, words, timeout))
        except ToolFailed:
            if not left:
                raise
            time.sleep(PAUSE)
    raise ValueError(f"{attempts} attempts")


def check_echo(space: Namespace, server: tuple[str, int], count: int, timeout: float) -> None:
    """Send random bytes by TCP from the namespace to a server that returns them, and compare each.

    :param count: of bytes. :param timeout: seconds in all, also for a server that does not listen
        yet.
    :raises ToolFailed: another byte came back, or not all of them in time.
    """
    end = tools.run(space, tools.echo(*server, count), timeout)
    if end.how != tools.ENDED:
        raise ToolFailed(end.text or f"the guest's echo did not end within {timeout:g} s")


def reason(text: str) -> str:
    """Why a tool failed, in one line of what it printed."""
    try:
        return str(json.loads(text)["error"]).strip()[:200]
    except (ValueError, KeyError, TypeError):
        lines = text.strip().splitlines()
        return lines[-1][:200] if lines else "it said nothing"


# --- what they report -----------------------------------------------------------------------------


def read_ping(text: str) -> tuple[float, float]:
    """(mean round trip in milliseconds, lost packets in percent), as ``ping`` reports them.

    :raises ToolFailed: it reports something else; so do the other readers.
    """
    times = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+)", text)
    loss = re.search(r"([\d.]+)% packet loss", text)
    try:
        if times and loss:
            return float(times[2]), float(loss[1])
    except ValueError:
        pass
    raise _unreadable(text)


def received_mbit(text: str) -> float:
    """Mbit/s that the receiver of a TCP stream counted, from ``iperf3 --json``."""
    try:
        return float(json.loads(text)["end"]["sum_received"]["bits_per_second"]) / 1e6
    except (KeyError, ValueError, TypeError) as e:
        raise _unreadable(text) from e


def read_udp(text: str) -> tuple[float, float]:
    """(Mbit/s that arrived, lost datagrams in percent), from ``iperf3 --json``."""
    try:
        end = json.loads(text)["end"]["sum"]
        lost = float(end["lost_percent"])
        return float(end["bits_per_second"]) * (1 - lost / 100) / 1e6, lost
    except (KeyError, ValueError, TypeError) as e:
        raise _unreadable(text) from e


def _unreadable(text: str) -> ToolFailed:
    return ToolFailed(f"cannot read its result: {reason(text)}")
