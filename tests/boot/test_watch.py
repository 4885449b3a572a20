"""``pyvmm watch`` outside of the testbed: Linux with a card on each data path, in a browser."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.boot.guest import PATIENCE, PYVMM, Guest, check_ping
from tests.browser import Browser
from tests.unit.test_watch_page import EVENTS, MODES, OVER, STATUS, until
from tests.watched import command, look

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
NAME = f"watch-{os.getpid()}"
NETS = (
    *("--net", "emulated,switchable=vhost-net+vhost-user"),
    *("--net", "vhost-net"),
    *("--net", "vhost-user"),
    *("--net", "emulated,with=packed"),
)


def check_look(now: dict[str, Any]) -> None:
    """What each data path shows of its rings."""
    modes = [card["mode"] for card in now["cards"]]
    assert modes == ["emulated", "vhost-net", "vhost-user", "emulated"]
    for card in now["cards"]:
        receive, transmit, _ = card["queues"]
        silent = card["mode"] != "emulated"
        for q in (receive, transmit):
            assert q["format"] == ("packed" if card["name"] == "net3" else "split")
            assert (q["taken"] is None) == silent == ("does not tell" in q["note"])
            assert sum(many for _, _, many in q["regions"]) == (
                q["owned"] if q["format"] == "packed" else q["outstanding"]
            )
        assert receive["outstanding"] > 100
        if not silent:
            assert 0 <= receive["in-flight"] <= receive["outstanding"]


def test_linux_on_each_data_path(host: Host) -> None:
    env = {**os.environ, "PYVMM_TESTBED": host.testbed.name}
    with Guest(host, *NETS, "--name", NAME, "--on-reboot", "exit") as guest:
        for nic in range(4):
            check_ping(guest, nic)
        with (
            command("--interval", "0.5", NAME, env=env) as child,
            Browser() as browser,
        ):
            assert child.stdout is not None and child.stderr is not None
            url = child.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:"), child.stderr.read()
            check_look(look(url, look(url, 0)["number"]))
            browser.look(width=1300, dark=False)
            browser.open(url)
            until(browser, f"last > 2 && {MODES}.length == 4")
            assert browser.evaluate(OVER) == [] and browser.console == []
            check_ping(guest, 0)
            subprocess.run(
                [*PYVMM, "switch", NAME, "vhost-net"], env=env, check=True, timeout=PATIENCE
            )
            until(browser, f'{MODES}[0] == "vhost-net"')
            # A look may see the switch before the machine tells how long the switch took.
            until(browser, f'{EVENTS}.join().includes("net0: emulated -> vhost-net, in ")')
            check_ping(guest, 0)
            start = len(guest.stdout)
            subprocess.run([*PYVMM, "reset", NAME], env=env, check=True, timeout=PATIENCE)
            until(browser, f'{EVENTS}.join().includes("starts over")')
            guest.log_in(start)
            until(browser, f'{EVENTS}.join().includes("the guest drives net0")')
            subprocess.run([*PYVMM, "quit", NAME], env=env, check=True, timeout=PATIENCE)
            until(browser, f'{STATUS} == "ended"')
            _, err = child.communicate(timeout=PATIENCE)
            assert child.returncode == 0 and "the machine has ended: host-qmp-quit" in err


def test_ctrl_c_ends_the_carrier_too(host: Host) -> None:
    env = {**os.environ, "PYVMM_TESTBED": host.testbed.name}
    with Guest(host, "--net", "none", "--name", NAME) as guest:
        with command(NAME, env=env) as child:
            assert child.stdout is not None
            child.stdout.readline()
            child.send_signal(signal.SIGINT)
            child.communicate(timeout=PATIENCE)
            assert child.returncode == 130
        host.wait_until(
            lambda: "qmp --raw" not in host.run("ps", "ax", "-o", "args").out, "the carrier to end"
        )
        guest.leave()
