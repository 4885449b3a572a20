"""`pyvmm vhost-user check`: passes what is right, and catches what is not."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pyvmm.backend.ports import PythonPort, loop_port
from pyvmm.conformance.check import ITEMS, Checker, Failed, negotiation
from pyvmm.errors import VhostUserError
from pyvmm.vhostuser.wire import Listener, connect
from tests.driver import wait_for
from tests.unit.test_vhost_user import EVENT_IDX, MRG, PATIENCE, Running, listening
from tests.vu_fake import Fake

CHECK = [sys.executable, "-m", "pyvmm", "vhost-user", "check"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def run(path: str, timeout: float = PATIENCE) -> Checker:
    """All checks of a back-end that may only be about to listen."""

    def listens() -> bool:
        try:
            connect(path).close()
        except VhostUserError:
            return False
        return True

    assert wait_for(listens, PATIENCE)
    checker = Checker(path, timeout=timeout)
    checker.run()
    return checker


def results(checker: Checker) -> dict[str, str]:
    return {item.name: item.result for item in checker.items}


def test_our_backend_conforms(path: str, tmp_path: Path) -> None:
    junit = tmp_path / "x.xml"
    with Running(path, loop_port(2)):
        done = subprocess.run(
            [*CHECK, "--timeout", "60", "--junit", junit, "--json", path],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["echoes"] and len(report["items"]) == len(ITEMS)
    assert {i["result"] for i in report["items"]} == {"passed"}
    suite = ET.parse(junit).getroot().find("testsuite")
    assert (
        suite is not None and suite.get("tests") == str(len(ITEMS)) and suite.get("failures") == "0"
    )


def test_one_that_sends_nothing_back(path: str) -> None:
    """Receiving is left out, and said to be."""
    with Running(path, PythonPort(lambda packet, pair: None)):
        done = subprocess.run([*CHECK, "--timeout", "60", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "receiving is not checked" in done.stdout and "packets do not come back" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("0 failed, 3 skipped")


def test_features_that_are_not_offered_are_skipped(path: str) -> None:
    with Running(path, features=~(EVENT_IDX | MRG)):
        checker = run(path)
    found = results(checker)
    assert found["features VERSION_1+INDIRECT_DESC"] == "passed"
    assert (
        found["features VERSION_1+EVENT_IDX+INDIRECT_DESC"]
        == found["merged receive buffers"]
        == "skipped"
    )
    assert "failed" not in found.values()


def test_one_that_does_nothing_fails(path: str) -> None:
    """All is acknowledged, no ring is served."""
    listener = Listener(path)
    try:
        with Fake(listener):
            checker = run(path, 0.2)
    finally:
        listener.close()
    assert [(i.name, i.result) for i in checker.items] == [("negotiation", "failed")]
    assert "1 transmits are not returned" in checker.items[0].detail


@pytest.mark.parametrize("how", ["changes", "repeats", "loses"])
def test_one_that_spoils_a_packet(path: str, how: str) -> None:
    count = 0

    def spoil(packet: bytes, pair: int) -> None:
        nonlocal count
        count += 1
        if count == 50 and how == "changes":
            packet = packet[:-1] + bytes([packet[-1] ^ 1])
        if count != 50 or how != "loses":
            port.send(packet, pair)
        if count == 50 and how == "repeats":
            port.send(packet, pair)

    port = PythonPort(spoil)
    with Running(path, port):
        assert wait_for(lambda: listening(path), PATIENCE)
        checker = Checker(path, timeout=PATIENCE)
        negotiation(checker)
        checker.timeout = 2.0 if how == "loses" else PATIENCE
        with checker.card() as card, pytest.raises(Failed, match="come back"):
            card.send(600)
            card.send(40)


def test_nobody_listens(path: str) -> None:
    done = subprocess.run([*CHECK, path], capture_output=True, text=True)
    assert done.returncode == 112 and "start the other side first" in done.stderr


@pytest.mark.parametrize(
    "argv", [["check", "--queues", "0"], ["probe", "--junit", "x"], ["probe", "--timeout", "0"]]
)
def test_usage(path: str, argv: list[str]) -> None:
    done = subprocess.run([*CHECK[:-1], *argv, path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
