"""A machine ends soon whatever others do: back-ends that say nothing, and ends that hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.datapath.vhost_user import VhostUserNet
from pyvmm.errors import PyvmmError
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Listener
from tests.vu_fake import Fake

Guest = Callable[[str], str]
PATIENCE = 60.0
FOR_EVER = "count=4000000000"
#: Seconds that a back-end is given here: whoever waited for one that is silent would be found out,
#: however busy this machine is.
AGES = 10 * PATIENCE
AGES_FOR_BACKENDS = f"""
import sys
from pyvmm.cli import main
from pyvmm.datapath.vhost_user import VhostUserNet

VhostUserNet.__init__.__kwdefaults__["timeout"] = {AGES}
sys.exit(main(sys.argv[1:]))
"""


def until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not good():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A back-end that is told what to say, and has ages for that."""
    defaults = VhostUserNet.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "timeout", AGES)
    monkeypatch.setattr("pyvmm.card.nic.HANDOVER_S", AGES)
    listener = Listener(str(tmp_path / "vu"))
    with Fake(listener) as made:
        yield made
    listener.close()


@contextmanager
def kicking(guest: Guest, fake: Fake) -> Iterator[Machine]:
    """A guest that kicks a card for ever, whose back-end is a fake one."""
    net = Net("vhost-user", socket=fake.listener.path)
    with Machine(guest("kicks"), memory="4M", append=FOR_EVER, nets=[net]) as machine:
        machine.start()
        until(lambda: fake.seen.count(spec.VHOST_USER_SET_VRING_ENABLE) == 2)
        yield machine


@pytest.fixture
def vm(guest: Guest, fake: Fake) -> Iterator[Machine]:
    with kicking(guest, fake) as machine:
        yield machine


@pytest.mark.parametrize("how", ["stop", "time-out"])
def test_a_silent_back_end_holds_no_end_up(vm: Machine, fake: Fake, how: str) -> None:
    fake.mute = True
    begin = time.monotonic()
    if how == "stop":
        vm.stop()
    else:
        vm.wait(0.2)
    vm.close()
    assert time.monotonic() - begin < PATIENCE


def test_a_back_end_that_answers_is_left_in_order(
    guest: Guest, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its answers take on a busy machine."""
    monkeypatch.setattr("pyvmm.machine.PARTING_S", AGES)
    with kicking(guest, fake) as vm:
        until(lambda: "command" in vm.phases)  # the start is over, with its last answer
        fake.seen.clear()
        vm.stop()
        assert fake.seen.count(spec.VHOST_USER_GET_VRING_BASE) == 2
        report: dict[str, Any] = vm.report()
    (net,) = report["nets"]
    assert net["vhost_user"]["problems"] == [] and net["counters"]["disconnections"] == 0


RUN = """
import sys, time
from pyvmm.cli import main
from pyvmm.cli.support import signals

signals.TWICE_SECONDS = 0

def hang(*args, **more):
    word = "hangs"
    while True:
        try:
            print(word, flush=True)
            time.sleep(60)
        except BaseException:
            word = "refuses"

from pyvmm import {module}
{module}.{name} = hang
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("machine", "Machine.__init__", ["hangs", "refuses"]),  # before there is a machine
        ("assembly", "Parts._load", ["hangs", "refuses"]),  # while it is being made
        ("machine", "Machine._shut_down", ["reset: by hang", "hangs"]),
        ("machine", "Machine.close", ["reset: by hang", "hangs"]),
    ],
)
def test_a_second_signal_ends_a_run_that_hangs(
    guest: Guest, module: str, name: str, said: list[str], number: signal.Signals
) -> None:
    argv = ["run", "--host", "local", "--qmp", "none", "--memory", "4M", "--net", "none"]
    argv += ["--kernel", guest("reset"), "--append", "how=hang", "--", "nothing"]
    text = RUN.format(module=module, name=name)
    with subprocess.Popen(
        [sys.executable, "-c", text, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        for line in said:
            assert run.stdout.readline() == f"{line}\n".encode()
            if line is said[0]:
                run.send_signal(number)
        run.send_signal(number)
        _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + number
    assert err == b"pyvmm: ended by a second signal, without cleaning up\n"


def test_a_verdict_that_takes_its_time_is_told(guest: Guest, tmp_path: Path) -> None:
    """On a busy host, say: the guest has ended in time, and that is what the watchdog watches."""
    slow = """
import sys, time
from pyvmm.cli import main, run
from pyvmm.cli.support import watchdog

watchdog.ORDERLY_SECONDS = 60.0
judge = run._Run._verdict
run._Run._verdict = lambda *args: time.sleep(6) or judge(*args)
sys.exit(main(sys.argv[1:]))
"""
    argv = ["run", "--host", "local", "--qmp", "none", "--memory", "4M", "--net", "none"]
    argv += ["--kernel", guest("reset"), "--append", "how=hang", "--timeout", "0.5"]
    done = subprocess.run(
        [sys.executable, "-c", slow, *argv, "--json", str(tmp_path / "json"), "--", "nothing"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 124 and "in order" not in done.stderr
    assert json.loads((tmp_path / "json").read_text())["verdict"] == "timeout"


def held_up(fake: Fake, request: int) -> None:
    """From this request on the back-end says nothing."""

    def silence(*_: object) -> None:
        fake.mute = True

    fake.answers[request] = silence


def ends(machine: Machine) -> None:
    """The machine ends without waiting for the back-end. (Half a second, on a machine at rest.)"""
    begin = time.monotonic()
    machine.stop()
    machine.close()
    assert time.monotonic() - begin < PATIENCE


class Meanwhile:
    """A call in a thread of its own, which may fail."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: PyvmmError | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except PyvmmError as e:
            self.error = e

    def done(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(
    ("request_", "append"),
    [
        (spec.VHOST_USER_SET_FEATURES, FOR_EVER),
        (spec.VHOST_USER_SET_VRING_ENABLE, FOR_EVER),
        (spec.VHOST_USER_GET_VRING_BASE, "count=1 control=1 halts=1"),
    ],
    ids=["start", "end of start", "reset"],
)
def test_a_driver_whose_back_end_falls_silent(
    guest: Guest, fake: Fake, request_: int, append: str
) -> None:
    """In DRIVER_OK, or in a reset: the guest goes on, and so does whoever looks at the machine."""
    held_up(fake, request_)
    net = Net("vhost-user", socket=fake.listener.path)
    with Machine(guest("kicks"), memory="4M", append=append, nets=[net]) as machine:
        machine.start()
        until(lambda: fake.mute)
        begin = time.monotonic()
        with machine.io_lock:  # as QMP does
            assert machine.report()["nets"]
        if request_ != spec.VHOST_USER_GET_VRING_BASE:
            until(lambda: "command" in machine.phases)  # kicks, and nobody holds it up
        assert time.monotonic() - begin < PATIENCE
        ends(machine)


def test_a_paused_machine_whose_back_end_is_silent(vm: Machine, fake: Fake) -> None:
    held_up(fake, spec.VHOST_USER_GET_VRING_BASE)
    pause = Meanwhile(vm.pause)
    until(lambda: fake.mute)
    ends(vm)
    pause.done()


def test_a_machine_that_starts_over_with_a_silent_back_end(vm: Machine, fake: Fake) -> None:
    held_up(fake, spec.VHOST_USER_GET_VRING_BASE)
    vm.reset()
    until(lambda: fake.mute)
    ends(vm)


def test_a_switch_away_from_a_silent_back_end(guest: Guest, fake: Fake) -> None:
    net = Net("vhost-user", socket=fake.listener.path, switchable="emulated")
    with Machine(guest("kicks"), memory="4M", append=FOR_EVER, nets=[net]) as machine:
        machine.start()
        until(lambda: fake.seen.count(spec.VHOST_USER_SET_VRING_ENABLE) == 2)
        held_up(fake, spec.VHOST_USER_GET_VRING_BASE)
        switch = Meanwhile(lambda: machine.nets[0].switch("emulated"))
        until(lambda: fake.mute)
        ends(machine)
        switch.done()


@pytest.mark.parametrize(
    "request_",
    [
        spec.VHOST_USER_GET_FEATURES,
        spec.VHOST_USER_SET_FEATURES,
        spec.VHOST_USER_SET_VRING_ENABLE,
    ],
    ids=["open", "prepare", "start"],
)
def test_a_switch_to_a_silent_back_end(guest: Guest, fake: Fake, request_: int) -> None:
    with Machine(
        guest("kicks"), memory="4M", append=FOR_EVER, nets=[Net("emulated", without="offloads")]
    ) as machine:
        machine.start()
        until(lambda: "command" in machine.phases)
        held_up(fake, request_)
        path = fake.listener.path
        switch = Meanwhile(lambda: machine.nets[0].switch(f"vhost-user,socket={path}"))
        until(lambda: fake.mute)
        ends(machine)
        switch.done()
        report = machine.nets[0].switches[-1]
        assert report.outcome in ("refused", "rolled-back"), report


@pytest.mark.parametrize("request_", [spec.VHOST_USER_GET_FEATURES, spec.VHOST_USER_GET_VRING_BASE])
def test_sigterm(guest: Guest, fake: Fake, request_: int) -> None:
    """The command: also while it still connects."""
    held_up(fake, request_)
    net = f"vhost-user,socket={fake.listener.path}"
    command = [sys.executable, "-c", AGES_FOR_BACKENDS, "run", "--host", "local", "--net", net]
    command += ["--kernel", guest("kicks"), "--append", "count=1 control=1 halts=1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as run:
        try:
            until(lambda: fake.mute)
            run.send_signal(signal.SIGTERM)
            assert run.wait(PATIENCE) == 128 + signal.SIGTERM
        finally:
            run.kill()
