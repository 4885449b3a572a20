"""Kills and revives a vhost-user back-end under traffic; runs in the testbed: `python -m
tests.boot.reviver SOCKET TAP KILLS SEED`.

Each back-end is a process of its own, forked from this one, which has everything imported: starting
Python anew takes seconds under emulation. It is killed at a random moment after it has moved
packets again, 1,000 times if need be. Ends at SIGTERM, with the last one alive until then. Prints
one JSON object: kills, and the seconds from each kill until packets moved again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from pyvmm.backend.net import NetService
from pyvmm.backend.server import Backend
from pyvmm.hostnet.tap import Tap

#: Packets that have to pass between two kills.
PACKETS = 20
#: Give up where no packet passes for this long, in seconds.
PATIENCE = 60.0


def moved(tap: str) -> int:
    """Packets that ``tap`` has taken from back-ends, in this process's network namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == tap:
            return int(counts.split()[1])
    raise OSError(f"there is no {tap}")


def revive(socket: str, tap: str, protocol_features: int) -> int:
    """A new back-end; its process."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        service = NetService(Tap(tap))
        with Backend(service, protocol_features=protocol_features) as backend:
            backend.run(socket)
        status = 0
    finally:
        os._exit(status)


def main() -> int:
    socket, tap, kills, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    protocol_features = int(sys.argv[5]) if len(sys.argv) > 5 else -1
    rng = random.Random(seed)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    pauses = []
    pid = revive(socket, tap, protocol_features)
    done = 0
    problem = ""
    died = 0.0
    while done < kills and not ended and not problem:
        goal = moved(tap) + PACKETS
        until = time.monotonic() + PATIENCE
        first = goal - PACKETS + 1
        while (now := moved(tap)) < goal and not ended:
            if now >= first and died:
                pauses.append(time.monotonic() - died)
                died = 0.0
            time.sleep(0.001)
            if time.monotonic() > until:
                problem = f"no packet passes after kill {done}"
                break
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        died = time.monotonic()
        os.waitpid(pid, 0)
        pid = revive(socket, tap, protocol_features)
        done += 1
    print("done", flush=True)
    while not ended:
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pauses.sort()
    middle = pauses[len(pauses) // 2] if pauses else 0.0
    answer = {
        "kills": done,
        "problem": problem,
        "pause_median_s": middle,
        "pause_max_s": max(pauses, default=0.0),
    }
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
