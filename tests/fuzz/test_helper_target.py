"""What the target of the helper takes for permitted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm import helper
from pyvmm.backend.vduse import own_name
from pyvmm.hostnet import netns
from tests.fuzz.targets.helper import FREE, PERMITTED, allowed


def test_each_operation_is_judged() -> None:
    named = {order for order, _ in PERMITTED} | {"traffic"}
    assert set(helper.OPERATIONS) <= named | set(FREE)


def test_traffic_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tap that was permitted, or in a namespace that the helper has made."""
    assert allowed("traffic", ["tap7", "set", "x"])
    assert not allowed("traffic", ["tap8", "set", "x"])
    with Path("/proc/self/ns/net").open("rb") as place:
        words = ["tap8", "set", "x", str(place.fileno())]
        assert not allowed("traffic", words)
        monkeypatch.setattr(netns, "_made", {os.fstat(place.fileno()).st_ino})
        assert allowed("traffic", words)


def test_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was permitted, in a namespace that the helper has made."""
    with Path("/proc/self/ns/net").open("rb") as place:
        words = ["ping", "start", "/bin/ping", "9", "x", "0", str(place.fileno())]
        assert not allowed("tool", words)
        monkeypatch.setattr(netns, "_made", {os.fstat(place.fileno()).st_ino})
        assert allowed("tool", words)
        assert not allowed("tool", ["ping", "start", "/tmp/ping", *words[3:]])
        assert not allowed("tool", ["iperf3", *words[1:]])


@pytest.mark.parametrize("order", ["vdpa", "vduse"])
def test_own_devices(order: str) -> None:
    for number in (0, 3, 10):
        assert allowed(order, [own_name(number, os.getppid())])
    first = own_name(0, os.getppid())
    for wrong in (first[:-1], f"{first}1", f"{first}/../x", f"{first[:-1]}\u0663", f"{first}\n"):
        assert not allowed(order, [wrong]), wrong
    assert not allowed(order, [own_name(0, os.getpid())])
