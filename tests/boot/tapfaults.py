"""Faults on demand at taps by tc(8), without a guest: this program has the taps' other ends, and
their host answers its ARP questions. Prints one JSON object. Runs in the testbed, as root.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from typing import Any

from pyvmm.card.traffic import TapFaults
from pyvmm.errors import UsageError
from pyvmm.faultopt import of_text
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.tap import Tap

MAC = bytes.fromhex("525400000001")
QUESTION = (
    bytes(12)
    + b"\xff" * 6
    + MAC
    + bytes.fromhex("08060001080006040001")
    + MAC
    + bytes([192, 168, 100, 2, *bytes(6), 192, 168, 100, 1])
)
ARP = QUESTION[24:26]
#: Seconds in which an answer comes, and in which one that is lost does not.
PATIENCE, SILENCE = 60.0, 2.0


def ask(tap: Tap, count: int, wanted: int) -> tuple[int, float]:
    """Ask so often; how many answers come, and after how many seconds the last one of ``wanted``
    came. If none is wanted, or all have come, those that come meanwhile count, too.
    """
    fd = tap.fds[0].fileno()
    begin = time.monotonic()
    for _ in range(count):
        os.write(fd, QUESTION)
    answers, last = 0, 0.0
    end = begin + (PATIENCE if wanted else SILENCE)
    while (left := end - time.monotonic()) > 0:
        if not select.select([fd], [], [], left)[0]:
            break
        if os.read(fd, 2048)[24:26] == ARP:
            answers += 1
            if answers <= wanted:
                last = time.monotonic() - begin
            if answers == wanted:
                end = time.monotonic() + SILENCE / 4
    return answers, last


def words(*argv: str) -> str:
    """The output of a program."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def own_namespace() -> dict[str, Any]:
    """What each kind of rule does to ten questions, and what is counted."""
    out: dict[str, Any] = {}
    with Namespace(address="192.168.100.1/24") as namespace:
        tap = namespace.tap
        # Else its host asks for routers from time to time, and these frames count, too.
        namespace.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/tap0/disable_ipv6"], check=True)
        faults = TapFaults(tap, namespace)
        for name, rules, wanted in (
            ("none", [], 10),
            ("rx loss", ["rx loss filter='arp'"], 0),
            ("tx loss", ["tx loss filter='arp'"], 0),
            ("others", ["both loss filter='ip'"], 10),
            ("delay", ["rx delay=300ms", "tx delay=200ms jitter=1ms"], 10),
            ("duplicate", ["rx duplicate"], 20),
            ("reorder", ["both reorder=50%"], 10),
            ("rate", ["tx rate=10kbit"], 10),
            ("burst", ["tx rate=10kbit burst=1600"], 10),
            ("queue", ["tx delay=5s queue=3"], 3),
            ("after", [], 10),
        ):
            before = faults.counters()
            faults.set(of_text(rules))
            answers, seconds = ask(tap, 10, wanted)
            faults.look()
            after = faults.counters()
            counts = {key: n - before.get(key, 0) for key, n in after.items()}
            out[name] = {"answers": answers, "seconds": seconds, "counts": counts}
        faults.set(of_text(["tx delay=60s"]))
        ask(tap, 4, 0)
        faults.look()
        out["waiting"] = faults.report()["waiting"]
        faults.close()
        out["cleared"] = faults.counters()["tx_fault_cleared"]
        tap_is = namespace.run(["tc", "qdisc", "show", "dev", "tap0"], capture_output=True)
        links = namespace.run(["ip", "-o", "link"], capture_output=True)
        out["left"] = b"ingress" in tap_is.stdout or b"ifb" in links.stdout
        out["left"] = out["left"] or b"netem" in tap_is.stdout
    return out


def named(name: str) -> dict[str, Any]:
    """On a tap of the user's, which has a qdisc of the user's at first."""
    out: dict[str, Any] = {}
    state = "tc qdisc show dev NAME; ip -o link | grep -c pvifb || true".replace("NAME", name)
    words("ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr")
    try:
        tap = Tap(name)
        before = words("sh", "-c", state)
        words("tc", "qdisc", "add", "dev", name, "root", "handle", "1:", "prio")
        faults = TapFaults(tap, None)
        try:
            faults.set(of_text(["rx loss"]))
        except UsageError as e:
            out["refused"] = str(e)
        out["active"] = faults.active
        words("tc", "qdisc", "del", "dev", name, "root")
        faults.set(of_text(["both loss"]))
        out["changed"] = words("sh", "-c", state) != before
        # As after SIGKILL: whoever comes next replaces what is there.
        again = TapFaults(tap, None)
        again.set(of_text(["both delay=1ms"]))
        again.close()
        out["as_before"] = words("sh", "-c", state) == before
        tap.close()
    finally:
        words("ip", "link", "del", name)
    return out


if __name__ == "__main__":
    print(json.dumps({"own": own_namespace(), "named": named(f"ours{os.getpid() % 10000}")}))
