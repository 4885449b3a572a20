"""`pyvmm vhost-user check`: passes what is right, and catches what is not."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path

import pytest

from pyvmm.backend.ports import PythonPort, loop_port
from pyvmm.conformance.check import ITEMS, Checker, Failed, negotiation, queue_pairs
from pyvmm.conformance.driver import Ring
from pyvmm.errors import VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.vhostuser.wire import Listener, connect
from tests.driver import wait_for
from tests.unit.test_vhost_user import ALL, EVENT_IDX, MRG, PATIENCE, Guest, Running, listening
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
    assert done.stdout.splitlines()[-1].endswith("0 failed, 1 skipped, 2 unchecked")


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


# --- back-ends that are no servers for ever -------------------------------------------------------

#: Argument: the socket. Serves one front-end and ends; dies where it finds a ring malformed.
ONE_SESSION = """
import os, sys
from pyvmm.backend.net import NetService
from pyvmm.backend.ports import loop_port
from pyvmm.backend.server import Backend
from pyvmm.vhostuser.wire import Listener
def log(line):
    if line.startswith("fault"):
        os.abort()
listener = Listener(sys.argv[1])
channel = None
while channel is None:
    channel = listener.accept()
with Backend(NetService(loop_port(1)), log=log) as backend:
    backend.serve(channel)
listener.close()
"""


@pytest.fixture
def one_session(tmp_path: Path, path: str) -> list[str]:
    script = tmp_path / "one.py"
    script.write_text(ONE_SESSION)
    return [sys.executable, str(script), path]


def test_one_that_ends_with_its_session(path: str, one_session: list[str]) -> None:
    """It is no fault of the back-end's, and what to do is said."""
    with subprocess.Popen(one_session):
        assert wait_for(lambda: listening(path), PATIENCE)
        argv = [*CHECK, "--timeout", "2", "--json", path]
        done = subprocess.run(argv, capture_output=True, text=True)
    items = json.loads(done.stdout)["items"]
    assert [i["result"] for i in items] == ["passed"] + ["unchecked"] * (len(ITEMS) - 1)
    assert all("--respawn" in i["detail"] for i in items[1:])
    assert done.returncode == 1
    assert sum(i["seconds"] for i in items[1:]) < PATIENCE  # it has looked once


def test_one_that_is_started_again(path: str, one_session: list[str]) -> None:
    """And dies of one item: that item fails, with the reason, and the others are checked."""
    argv = [*CHECK, "--timeout", "60", "--json", "--respawn", shlex.join(one_session), path]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    items = {i["name"]: i for i in json.loads(done.stdout)["items"]}
    results = {name: i["result"] for name, i in items.items()}
    assert results.pop("malformed ring") == "failed"
    assert "signal 6" in items["malformed ring"]["detail"]
    assert "next head 65535: no chain of ours" in items["malformed ring"]["rings"][1]
    assert results.pop("queue pairs") == "skipped"
    assert set(results.values()) == {"passed"}, items


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_back_end_too(path: str, tmp_path: Path, number: int) -> None:
    seen = tmp_path / "seen"
    command = f"echo $$ >{seen}; exec sleep {PATIENCE}"
    argv = [*CHECK, "--timeout", str(PATIENCE), "--respawn", command, path]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as check:
        assert wait_for(lambda: seen.exists() and seen.read_text().endswith("\n"), PATIENCE)
        check.send_signal(number)
        out, err = check.communicate(timeout=PATIENCE)
    assert (check.returncode, out, err) == (128 + number, b"", b"")
    with pytest.raises(ProcessLookupError):
        os.kill(int(seen.read_text()), 0)


def test_one_that_connects(path: str) -> None:
    backend = [*CHECK[:3], "backend", "--socket", path, "--client", "--loopback", "--quiet"]
    with subprocess.Popen(backend) as process:
        try:
            argv = [*CHECK, "--server", "--timeout", "60", "--json", path]
            done = subprocess.run(argv, capture_output=True, text=True)
        finally:
            process.terminate()
    assert done.returncode == 0, done.stdout
    assert "failed" not in {i["result"] for i in json.loads(done.stdout)["items"]}


def test_packets_may_come_back_on_another_pair(path: str) -> None:
    """Nothing says on which pair they must: a host may spread them as it likes."""

    def swap(packet: bytes, pair: int) -> None:
        port.send(packet, 1 - pair)

    port = PythonPort(swap, 2)
    with Running(path, port):
        assert wait_for(lambda: listening(path), PATIENCE)
        checker = Checker(path, timeout=PATIENCE)
        negotiation(checker)
        checker.echoes = True  # with one pair in use, nothing comes back on the other
        assert queue_pairs(checker) == "2 of 2"


def test_what_is_said_of_a_failure(path: str) -> None:
    """The clause, and what was in the rings."""
    port = PythonPort(lambda packet, pair: None)
    with Running(path, port), Guest(path, acked=ALL) as guest:
        ring = guest.driver.tx
        assert ring.describe().endswith("available 0, used 0, avail_event 0, used_event 0, 0 kicks")
        guest.driver.queue(bytes(60), split=[12, 14])
        ring.publish(kick=False)
        assert "available 1, used 0" in ring.describe()
        assert ring.describe().endswith("next head 0: indirect 12r+14r+46r"), ring.describe()
    listener = Listener(path)
    try:
        with Fake(listener):
            checker = Checker(path, timeout=0.2)
            checker.run()
    finally:
        listener.close()
    (item,) = checker.items
    assert "virtio 1.2" in item.clause
    assert "available 1, used 0" in item.rings[1] and "72r" in item.rings[1]


def test_a_ring_that_starts_in_the_middle_asks_for_kicks_there() -> None:
    """A back-end that writes avail_event only after the first kick must get that kick."""
    with closing(GuestMemory(1 << 20)) as memory:
        ring = Ring(memory, 16, 0x1000, start=0xFF80, event_idx=True)
        memory.write(0x8000, bytes(60))
        ring.add([(0x8000, 60, False)])
        assert ring.publish()
        ring.close()
