"""Load for a guest's network card: ping and iperf3 on the host's side, and what they report.

``pyvmm compare``, ``pyvmm matrix`` and ``pyvmm demo`` run them in the network namespace at the
other end of the card; the guest has an iperf3 server where one is needed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time

from pyvmm.errors import HostError
from pyvmm.programs import program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.hostnet.netns import Namespace

REMEDY = "install iputils-ping, iperf3 and util-linux"
CANNOT_RUN = (126, 127)  # the status of nsenter if it cannot execute the command
CONNECT_MS = 3000  # for iperf3's client to reach its server
PAUSE = 0.3  # seconds between two attempts to reach a server that does not listen yet


class ToolFailed(HostError):
    """A tool ran and failed, did not end in time, or reported nothing that could be understood."""


def run_tool(space: Namespace, argv: Sequence[str], timeout: float) -> str:
    """Run a command in a namespace; what it printed. It is ended if the caller is interrupted.

    :param timeout: in seconds.
    :raises ToolFailed: its exit status is not 0, or it did not end in time.
    :raises HostError: it cannot be run at all.
    """
    missing = HostError(f"{argv[0]} cannot be run", REMEDY)
    try:
        child = space.popen(
            [program(argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for us
        )
    except FileNotFoundError as e:  # nsenter
        raise missing from e
    with child:
        try:
            text, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as e:
            raise ToolFailed(f"{argv[0]} did not end within {timeout:g} s") from e
        finally:
            terminate(child)
    if child.returncode in CANNOT_RUN:
        raise missing
    if child.returncode:
        raise ToolFailed(f"{argv[0]} failed: {reason(text)}")
    return str(text)


def terminate(child: subprocess.Popen[Any]) -> None:
    """End a child process of ours, if it has not ended yet."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def tcp_mbit(
    space: Namespace, server: str, seconds: float, *options: str, attempts: int, timeout: float
) -> float:
    """Mbit/s of one TCP stream from the namespace to ``server``, as its receiver counted.

    :param options: of iperf3, such as ``-R`` for a stream from the server.
    :param attempts: times to try, because a server in the guest needs a moment until it listens.
    :param timeout: seconds for each attempt.
    :raises HostError: as of ``run_tool``, for the last attempt.
    """
    argv = ["iperf3", "-c", server, "-t", f"{seconds:g}", "--json", *options]
    argv += ["--connect-timeout", str(CONNECT_MS)]
    for left in reversed(range(attempts)):
        try:
            return received_mbit(run_tool(space, argv, timeout))
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
    end = time.monotonic() + timeout
    while True:
        s = space.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            s.settimeout(max(0.1, end - time.monotonic()))
            s.connect(server)
            break
        except OSError as e:
            s.close()
            if time.monotonic() > end:
                raise ToolFailed(f"the guest's echo cannot be reached: {e}") from e
            time.sleep(PAUSE)
    sent, got = os.urandom(count), bytearray()
    with s:
        sender = threading.Thread(target=_send, args=(s, sent), daemon=True)
        sender.start()
        try:
            while len(got) < count:
                s.settimeout(max(0.1, end - time.monotonic()))
                part = s.recv(1 << 16)
                if not part:
                    break
                got += part
        except OSError as e:
            raise ToolFailed(f"{len(got)} of {count} bytes came back: {e}") from e
    if got != sent:
        wrong = next((i for i, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b), None)
        what = f"{len(got)} of {count} bytes" if wrong is None else f"another byte {wrong}"
        raise ToolFailed(f"{what} came back from the guest's echo")


def _send(s: socket.socket, data: bytes) -> None:
    try:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the receiver tells


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
