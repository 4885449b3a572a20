"""Cards that come and go while Linux runs, and as many as there can be; nothing is left behind."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PYVMM

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
ROUNDS = 6  # two with each data path


def test_cards_come_and_go(host: Host) -> None:
    """Under traffic of the first card, which loses nothing; and with a guest that does not react at
    first. The checks are in the program.
    """
    result = host.run(sys.executable, "-m", "tests.boot.plugger", str(ROUNDS), timeout=400)
    assert result.status == 0, f"{result.out}\n{result.err[-3000:]}"
    found = json.loads(result.out)
    assert found["end"] == "poweroff" and found["sent"] > 100, found
    assert found["received"] == found["sent"], found


PING_ALL = """
for n in $(seq 100 130); do
  ping -q -c 1 -W 60 192.168.$n.1 >/dev/null && echo 192.168.$n.1
done
ls /sys/class/net | grep -c eth
grep -c 'IO-APIC.*, virtio' /proc/interrupts
"""


def test_31_cards(host: Host) -> None:
    """Without MSI, so that they share the eight lines, and one of them has 129 virtqueues on its
    line.
    """
    nets = ["--net", "emulated,queues=64", *(["--net", "emulated"] * 30)]
    options = ("--memory", "512M", "--append", "quiet pci=nomsi", *nets)
    result = host.run(*PYVMM, "run", *options, "--", "sh", "-c", PING_ALL, timeout=300)
    *pinged, cards, lines = result.out.split()
    assert pinged == [f"192.168.{n}.1" for n in range(100, 131)], result
    assert (cards, lines) == ("31", "8"), result
