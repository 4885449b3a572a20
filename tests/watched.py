"""A machine to be watched that is none: a control socket with answers of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyvmm.control.registry import Claim
from pyvmm.control.server import Command, QmpError, Server
from pyvmm.programs import module
from tests.boot.guest import PATIENCE

GONE = "Device not found"


def split(index: int, role: str, *, avail: int, used: int, taken: int | None) -> dict[str, Any]:
    """A split virtqueue of 8 entries, in which descriptor n is that of entry n."""
    many = avail - used
    return {
        **registers(index, role, 8),
        "format": "split",
        "event-idx": True,
        "avail": {"flags": 0, "idx": avail, "used-event": used},
        "used": {"flags": 0, "idx": used, "avail-event": avail},
        "outstanding": many,
        "device-owned": sorted((used + n) % 8 for n in range(many)),
        "available": [
            {
                "at": used,
                "head": used % 8,
                "descriptors": [{"index": used % 8, "addr": 4096, "len": 1536, "flags": ["write"]}],
            }
        ][:many],
        "returned": [{"at": used - 1, "id": (used - 1) % 8, "len": 60}],
        "problems": [],
        "taken": taken,
        "in-flight": None if taken is None else taken - used,
    }


def packed(index: int, role: str) -> dict[str, Any]:
    """A packed virtqueue of 8: the driver is a lap ahead, at 2; the device at 5, one in flight."""
    event = {"flags": "desc", "offset": 3, "wrap": 0}
    return {
        **registers(index, role, 8),
        "format": "packed",
        "event-idx": True,
        "driver": {"next": 2, "wrap": 0, "event": event},
        "device": {"next": 5, "wrap": 1, "event": {**event, "flags": "enable"}},
        "outstanding": 5,
        "device-owned": [0, 1, 5, 6, 7],
        "map": "ddUUUDDD",
        "available": [],
        "returned": [],
        "problems": ["something is wrong"],
        "taken": {"next": 6, "wrap": 1},
        "in-flight": 1,
    }


def registers(index: int, role: str, size: int) -> dict[str, Any]:
    return {
        "index": index,
        "role": role,
        "enabled": True,
        "size": size,
        "vector": index + 1,
        "desc-addr": 0x1000,
        "avail-addr": 0x2000,
        "used-addr": 0x3000,
    }


class Box:
    """A machine called box. Its members are what it answers; ``asked`` counts the commands.

    :ivar rings: of each card. :ivar step: how much each counter grows per look.
    """

    def __init__(self, name: str = "box") -> None:
        self.asked: Counter[str] = Counter()
        self.status, self.reboots, self.step = "running", 0, 10
        self.causes = {"net0 queue 1 notify": 3, "rtc index": 1}
        self.nets = [
            {
                "name": "net0",
                "mode": "emulated",
                "tap": "tap0",
                "link": True,
                "transport": "pci",
                "slot": 1,
                "mac": "52:54:00:00:00:01",
                "host": "192.168.100.1/24",
                "guest": "192.168.100.2/24",
                "state": "present",
            }
        ]
        self.rings: dict[str, list[dict[str, Any]]] = {
            "net0": [
                split(0, "receive", avail=11, used=5, taken=7),
                split(1, "transmit", avail=40, used=40, taken=40),
                {**registers(2, "control", 8), "enabled": False},
            ]
        }
        self.active = True
        self._looks = 0
        self.machine = name
        self.server = Server(Claim(name), lambda: COMMANDS, self, {})

    def add(self, name: str, mode: str, *queues: dict[str, Any]) -> None:
        """Plug in a card."""
        self.nets.append({**self.nets[0], "name": name, "mode": mode})
        self.rings[name] = list(queues)

    def close(self) -> None:
        """The machine's process ends."""
        self.server.close()


def _ledger(box: Box, given: dict[str, Any]) -> object:
    box.asked["ledger"] += 1
    box._looks += 1
    n = box._looks * box.step
    counters = {f"{way}_{what}": n for way in ("rx", "tx") for what in ("packets", "calls")}
    return {
        "time-ns": time.monotonic_ns(),
        "name": box.machine,
        "status": box.status,
        "reboots": box.reboots,
        "exits": {
            "kvm_run_returns": 4 * n,
            "by_name": {name: weight * n for name, weight in box.causes.items()},
        },
        "vcpus": [{"index": 0, "kvm-run-returns": 4 * n, "interrupts": n, "exits-in-kvm": 9 * n}],
        "nets": [
            {
                "name": net["name"],
                "mode": net["mode"],
                "notify": "ioeventfd",
                "counters": {**counters, "rx_bytes": 100 * n},
                "workers": [{"name": "tap0-0", "tid": 7, "cpu_s": n / 1000}],
            }
            for net in box.nets
        ],
    }


def _machine(box: Box, given: dict[str, Any]) -> object:
    box.asked["machine"] += 1
    return {"status": box.status, "cpus": 1, "memory": 256 << 20, "nets": box.nets}


def _rings(box: Box, given: dict[str, Any]) -> object:
    name = f"net{given['nic']}"
    box.asked[name] += 1
    net = next((net for net in box.nets if net["name"] == name), None)
    if net is None or name not in box.rings:
        raise QmpError(GONE)
    return {
        "name": name,
        "mode": net["mode"],
        "active": box.active,
        "machine": box.status,
        "queues": box.rings[name],
    }


COMMANDS = {
    "x-pyvmm-ledger": Command(_ledger, ""),
    "x-pyvmm-machine": Command(_machine, ""),
    "x-pyvmm-rings": Command(_rings, "", nic="int?", queue="int?", chains="int?"),
}


@contextmanager
def command(*args: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """``pyvmm watch ARGS``, killed if a test leaves it running.

    :param options: of Popen.
    """
    with subprocess.Popen(
        module("pyvmm", "watch", *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def look(url: str, after: int) -> dict[str, Any]:
    """The look after look ``after``, as the page asks for it."""
    with urllib.request.urlopen(f"{url}look?after={after}", timeout=PATIENCE) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


class Home:
    """A runtime directory of a test's own, where no testbed is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="pvw")
        monkeypatch.setenv("XDG_RUNTIME_DIR", self._dir.name)
        monkeypatch.setenv("PYVMM_TESTBED", f"none-{os.getpid()}")
        monkeypatch.delenv("PYVMM_IN_TESTBED", raising=False)

    def close(self) -> None:
        """Remove it."""
        self._dir.cleanup()
