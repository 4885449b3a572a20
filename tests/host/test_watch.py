"""``pyvmm watch`` of a machine whose guest kicks for ever: what is shown, and what it costs."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.machine import Machine
from pyvmm.netopt import Net
from pyvmm.programs import module
from tests.boot.guest import PATIENCE
from tests.driver import wait_for
from tests.watched import command, look

Guest = Callable[[str], str]
#: What the guest does for ever, as the ledger calls it.
KICKS = "net0 queue 1 notify"


@pytest.fixture
def busy(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="pvwatch") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        with Machine(
            guest("kicks"),
            memory="4M",
            append="count=4000000000",
            nets=[Net("emulated", notify="exit"), Net("vhost-user")],
            name="busy",
            qmp="auto",
        ) as vm:
            vm.start()
            assert wait_for(lambda: KICKS in vm.ledger().by_name(), PATIENCE)
            yield vm


def control_runs() -> int:
    """How often the control thread has been given a CPU."""
    for thread in threading.enumerate():
        if thread.name == "control" and thread.native_id:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            return int(text.split()[2])
    raise AssertionError("there is no control thread")


def rests() -> int:
    """``control_runs`` when the control thread rests: the connection's last words are over."""
    until = time.monotonic() + PATIENCE
    runs = -1
    while (now := control_runs()) != runs:
        assert time.monotonic() < until, "the control thread does not come to rest"
        runs = now
        time.sleep(1)
    return runs


def test_a_machine_is_watched_and_costs_nothing_unwatched(busy: Machine) -> None:
    with command("--host", "local", "--interval", "0.2", "busy") as child:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        runs = rests()
        time.sleep(2)
        assert control_runs() == runs, "nobody looks, and the control thread has run"
        first = look(url, 0)
        assert control_runs() > runs
        second = look(url, first["number"])
        until = time.monotonic() + PATIENCE
        # Nobody has looked for longer than a rate may be of; or the guest has had no processor.
        while second["rates"] is None or not second["rates"]["by_name"].get(KICKS):
            assert time.monotonic() < until, second["rates"]
            second = look(url, second["number"])
        net, other = second["cards"]
        assert net["mode"] == "emulated" and net["notify"] == "exit" and net["active"]
        assert net["queues"][1]["taken"] == 0 == net["queues"][1]["in-flight"]
        assert other["mode"] == "vhost-user" and not other["active"] and other["note"]
        assert second["rates"]["nets"][0]["tx_kicks"] > 0
        runs = rests()
        time.sleep(2)
        assert control_runs() == runs
        assert busy.pause()
        assert busy.resume()
        last = look(url, 0)
        assert [event["text"] for event in last["events"]] == [
            "the machine is paused",
            "the machine goes on",
        ]
        busy.stop()
        _, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0 and "busy: the machine has ended: " in err, err


def test_text_of_a_real_machine(busy: Machine) -> None:
    argv = module(
        "pyvmm", "watch", "--host", "local", "--text", "--once", "--interval", "0.3", "busy"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}

    def kicked() -> bool:
        """Whether the guest has had a processor in the interval."""
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, env=env)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert "   1 transmit [" in done.stdout
        return KICKS in done.stdout

    assert wait_for(kicked, PATIENCE)
