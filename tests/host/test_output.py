"""What a guest writes reaches its reader, or the run says that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm import Machine, Net
from pyvmm.errors import UsageError

Guest = Callable[[str], str]

ROOT = Path(__file__).parents[2]
PATIENCE = 60
RUN = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--net", "none", "--memory", "8M"]


@pytest.mark.parametrize("closed", [">&-", "<&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", [["--", "x"], []], ids=["command", "console"])
def test_a_run_ends_whose_descriptors_are_closed(
    guest: Guest, closed: str, command: list[str]
) -> None:
    """As in a daemon or a cron job. Their numbers are not taken by descriptors of pyvmm's own."""
    argv = [*RUN, "--kernel", guest("hello"), "--append", "status=4", *command]
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *argv],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 4, done
    heard = "" if ">&-" in closed.replace("2>&-", "") else "hello, stdout\n"
    assert heard in done.stdout
    assert done.stderr == "", done


def test_a_guest_without_our_init_gets_no_input(guest: Guest) -> None:
    argv = [*RUN, "--kernel", guest("hello"), "--", "x"]
    done = subprocess.run(argv, cwd=ROOT, input=b"y", capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"hello, stdout\n"), done
    assert done.stderr.startswith(b"pyvmm: the command got no standard input"), done


@pytest.mark.parametrize("args", [["ps"], ["doctor"], ["--help"], ["--version"], ["stop", "vm99"]])
def test_every_command_minds_its_descriptors(args: list[str]) -> None:
    argv = [sys.executable, "-m", "pyvmm", *args]
    want = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=PATIENCE).returncode
    for closed in ("<&- >&-", "<&- >&- 2>&-"):
        shell = ["sh", "-c", f'"$@" {closed}', "sh", *argv]
        done = subprocess.run(shell, cwd=ROOT, capture_output=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (want, b""), done


@pytest.mark.parametrize("args", [["ps", "--json"], ["doctor"], ["--help"], ["--version"]])
def test_every_command_says_that_its_output_is_lost(args: list[str]) -> None:
    argv = [sys.executable, "-m", "pyvmm", *args]
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closed below
    with full:
        done = subprocess.run(
            argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
    assert done.returncode != 0
    assert "pyvmm: cannot write all of the output: No space left on device\n" in done.stderr


@pytest.mark.parametrize("command", [["--", "x"], []], ids=["command", "console"])
def test_an_endless_guest_ends_when_its_reader_has_gone(guest: Guest, command: list[str]) -> None:
    """It cannot be told, as a command of our init is. Its status is that of a shell's pipeline."""
    argv = [*RUN, "--kernel", guest("hello"), "--append", "times=1000000000", *command]
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        os.read(run.stdout.fileno(), 1)
        run.stdout.close()
        assert run.wait(PATIENCE) == 141
        assert run.stderr.read() == b""


def test_default_addresses_follow_from_the_name(guest: Guest) -> None:
    def macs(count: int = 1, **more: str) -> list[bytes]:
        nets = [Net() for _ in range(count)]
        with Machine(guest("hello"), nets=nets, **more) as machine:  # type: ignore[arg-type]
            return [nic.device.mac for nic in machine.nets]

    one = macs(3, name="one", qmp="auto")
    assert one == macs(3, name="one", qmp="auto"), "stable for a name"
    assert one[0] == macs(name="one", qmp="auto")[0]
    two = macs(3, name="two", qmp="auto")
    nameless = [mac for _ in range(3) for mac in macs()]
    assert len({*one, *two, *nameless}) == 9
    assert all(mac.startswith(b"\x52\x54\x00") for mac in one)


def test_two_cards_with_one_address_are_refused(guest: Guest) -> None:
    net = Net(mac="52:54:00:00:00:07")
    with pytest.raises(UsageError, match="cards 0 and 2"):
        Machine(guest("hello"), nets=[net, Net(), net])


def test_a_default_address_avoids_those_that_are_given(guest: Guest) -> None:
    with Machine(guest("hello"), nets=[Net()], name="one", qmp="auto") as machine:
        first = machine.nets[0].device.mac
    nets = [Net(), Net(mac=first)]
    with Machine(guest("hello"), nets=nets, name="one", qmp="auto") as machine:
        assert [nic.device.mac for nic in machine.nets][1] == first
        assert machine.nets[0].device.mac != first


def test_a_tap_that_did_not_exist_is_told(guest: Guest) -> None:
    """It may be a misspelt name; what is made has no address and nobody at its other end."""
    argv = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--net", "emulated,tap=typo0"]
    command = [*argv, "--kernel", guest("hello"), "--", "x"]
    done = subprocess.run(
        ["unshare", "--net", *command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done
    assert done.stderr == (
        "pyvmm: net0: there was no tap typo0; it has been made, and goes with the machine\n"
    )
