"""A machine ends soon whatever others do: back-ends that say nothing, and ends that hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm import Machine, Net
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Listener
from tests.vu_fake import Fake

Guest = Callable[[str], str]
PATIENCE = 60.0
FOR_EVER = "count=4000000000"


def until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not good():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    listener = Listener(str(tmp_path / "vu"))
    with Fake(listener) as made:
        yield made
    listener.close()


@pytest.fixture
def vm(guest: Guest, fake: Fake) -> Iterator[Machine]:
    """A guest that kicks a card for ever, whose back-end is a fake one."""
    net = Net("vhost-user", socket=fake.listener.path)
    with Machine(guest("kicks"), memory="4M", append=FOR_EVER, nets=[net]) as machine:
        machine.start()
        until(lambda: fake.seen.count(spec.VHOST_USER_SET_VRING_ENABLE) == 2)
        yield machine


@pytest.mark.parametrize("how", ["stop", "time-out"])
def test_a_silent_back_end_holds_no_end_up(vm: Machine, fake: Fake, how: str) -> None:
    fake.mute = True
    begin = time.monotonic()
    if how == "stop":
        vm.stop()
    else:
        begin += 0.2
        vm.wait(0.2)
    vm.close()
    assert time.monotonic() - begin < 1.0


def test_a_back_end_that_answers_is_left_in_order(vm: Machine, fake: Fake) -> None:
    fake.seen.clear()
    vm.stop()
    assert fake.seen.count(spec.VHOST_USER_GET_VRING_BASE) == 2
    (net,) = vm.report()["nets"]  # type: ignore[misc]
    assert net["vhost_user"]["problems"] == [] and net["counters"]["disconnections"] == 0
