"""Captures of a real guest on every data path, across live switches, read by tshark."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.programs import program
from tests.boot.guest import PYVMM, Guest
from tests.boot.guest import pings as ask

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Data path -> bytes of its pings, by which they are told apart.
SIZES = {"emulated": 101, "vhost-net": 102, "vhost-user": 103}
COUNT = 3
HEADERS = 14 + 20 + 8
OUT, IN = "0x00000002", "0x00000001"


def tshark(file: Path, wanted: str, *fields: str) -> list[list[str]]:
    """The fields of each packet that a display filter wants."""
    words = [word for name in fields for word in ("-e", name)]
    command = [program("tshark"), "-n", "-r", str(file), "-Y", wanted, "-T", "fields", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [line.split("\t") for line in done.stdout.splitlines()]


def pings(file: Path) -> Counter[tuple[int, str]]:
    """Bytes of data and direction of the ICMP packets."""
    rows = tshark(file, "icmp", "frame.len", "frame.packet_flags_direction")
    return Counter((int(length) - HEADERS, direction) for length, direction in rows)


def test_a_capture_goes_on_across_switches(host: Host, tmp_path: Path) -> None:
    """From the first packet on, by a confined machine; and a part of it by `pyvmm capture`."""
    whole, part = tmp_path / "whole.pcapng", tmp_path / "part.pcapng"
    net = "emulated,switchable=vhost-net+vhost-user"
    words = ["--name", "captured", "--pcap", str(whole), "--sandbox", "on", "--net", net]
    with Guest(host, *words) as guest:
        capture: subprocess.Popen[str] | None = None
        for mode, size in SIZES.items():
            if mode != "emulated":
                result = host.run(*PYVMM, "switch", "--host", "local", "captured", mode)
                assert result.status == 0, result
            if mode == "vhost-net":
                capture = subprocess.Popen(
                    [
                        *(*PYVMM, "testbed", "-q", "--name", host.testbed.name, "--"),
                        *(*PYVMM, "capture", "--host", "local", "captured", str(part)),
                        *("--filter", "icmp", "--snaplen", "60"),
                    ],
                    stderr=subprocess.PIPE,
                    text=True,
                )
                assert capture.stderr is not None
                assert "capturing to" in capture.stderr.readline()
            guest.do(ask("192.168.100.1", COUNT, f"-s {size}"))
        assert capture is not None
        capture.send_signal(signal.SIGINT)
        _, said = capture.communicate(timeout=60)
        assert (capture.returncode, said.strip()) == (0, "pyvmm: 12 packets captured")
        guest.leave()
        assert "lost" not in guest.err
    want = {(size, way): COUNT for size in SIZES.values() for way in (OUT, IN)}
    assert pings(whole) == want
    assert pings(part) == {key: n for key, n in want.items() if key[0] != SIZES["emulated"]}
    (tap,) = {nic["tap"] for nic in guest.report["nets"]}
    notes = [note for (note,) in tshark(whole, 'frame.comment contains "is now"', "frame.comment")]
    for note, mode in zip(notes, ("vhost-net", "vhost-user"), strict=True):
        assert f"pyvmm: net0 is now on {mode}, captured at tap {tap}" in note
    assert whole.stat().st_mode & 0o777 == 0o600
