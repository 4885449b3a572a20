"""The card's thread: vCPUs and the control side go on whatever a data path waits for, and a driver
sees what it has to see (virtio 1.2, 4.1.4.3.2).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import pytest

from pyvmm.card import thread
from pyvmm.card.nic import Nic
from pyvmm.card.thread import CardThread
from pyvmm.datapath.base import Frames, PathEvents, Vring
from pyvmm.datapath.emulated import EmulatedNet
from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.spec.virtio import VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET
from pyvmm.spec.virtio_net import VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_OK
from tests.driver import wait_for
from tests.pci_guest import ACK, DRIVER, FEATURES_OK, frame
from tests.unit.test_switch import Rig

T = TypeVar("T")

RUNNING = ACK | DRIVER | FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK
#: Seconds that whoever is not to wait may take on a busy machine.
PROMPT = 30.0


class Slow(EmulatedNet):
    """Waits at a gate in ``start`` and ``stop``, as for another process that says nothing.

    :ivar gate: open unless a test closes it. :ivar waiting: somebody is at the gate.
    :ivar obeys: ``cut`` opens the gate. :ivar running: between start and the end of stop.
    """

    def __init__(self, port: Frames) -> None:
        super().__init__(port)
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.obeys = True
        self.running = False
        self.error: Exception | None = None

    def _pass(self) -> None:
        if not self.gate.is_set():
            self.waiting.set()
            self.gate.wait(60)
            self.waiting.clear()

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        self._pass()
        if self.error is not None:
            raise self.error
        super().start(acked, memory, rings, events)
        self.running = True

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        if self.running:
            self._pass()
        bases = super().stop(finish=finish)
        self.running = False
        return bases

    def cut(self) -> None:
        if self.obeys:
            self.gate.set()


class SlowRig(Rig):
    """A card whose data path can be held up."""

    def __init__(self, *, drive: bool = True) -> None:
        super().__init__(script={"emulated": [Slow]}, drive=drive)
        assert isinstance(self.device.datapath, Slow)
        self.path = self.device.datapath

    def __exit__(self, *args: Any) -> None:
        self.path.gate.set()
        super().__exit__(*args)


@pytest.fixture
def rig() -> Iterator[SlowRig]:
    with SlowRig() as r:
        yield r


class Meanwhile(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self.results: list[T] = []
        self._call = call
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.results.append(self._call())
        except BaseException as e:
            self.error = e

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def done(self) -> T:
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.results[0]


def prompt(call: Callable[[], T]) -> T:
    """The result of a call that must not wait."""
    begin = time.monotonic()
    result = call()
    assert time.monotonic() - begin < PROMPT
    return result


def look(nic: Nic, lock: threading.RLock) -> str:
    """What QMP does for a report."""
    with lock:
        return json.dumps(nic.report())


def test_a_reset_waits_for_the_data_path_and_nobody_else_does(rig: SlowRig) -> None:
    rig.exchange()
    pci, path = rig.guest.pci, rig.path
    path.gate.clear()
    prompt(lambda: pci.set("device_status", 0))
    assert path.waiting.wait(PROMPT)
    assert prompt(lambda: pci.status) == RUNNING  # reads as before
    refused = rig.device.refused
    for value in (ACK, RUNNING, RUNNING | 0x80):
        prompt(partial(pci.set, "device_status", value))
    assert pci.status == RUNNING and rig.device.refused == refused + 3
    prompt(lambda: pci.set("device_status", 0))  # again: nothing more to do
    assert prompt(lambda: pci.get("num_queues")) == 3
    prompt(lambda: pci.notify(0))
    prompt(lambda: pci.notify(2))  # the control queue
    assert "emulated" in prompt(lambda: look(rig.nic, rig.lock))
    waiting = Meanwhile(lambda: rig.nic.set_link(False))
    assert pci.status == RUNNING and path.running
    path.gate.set()
    assert wait_for(lambda: pci.status == 0)
    assert not path.running and rig.device.resets == 1
    waiting.done()
    rig.nic.set_link(True)
    rig.guest.close()
    rig.drive()
    rig.exchange()


def test_no_access_to_guest_memory_after_status_0(rig: SlowRig) -> None:
    """Frames come all the time while the card is reset: none is written to memory that is the
    driver's own again.
    """
    enough = threading.Event()

    def send() -> None:
        while not enough.is_set():
            try:
                rig.cable.far.send(bytes(12) + frame(1))
            except BlockingIOError:
                time.sleep(0.001)

    sender = Meanwhile(send)
    try:
        for _ in range(20):
            wait_for(rig.guest.net.poll, PROMPT)
            rig.guest.pci.reset()
            before = rig.board.memory.read(0x10000, 0x200000)
            time.sleep(0.01)
            assert rig.board.memory.read(0x10000, 0x200000) == before
            rig.guest.close()
            rig.drive()
    finally:
        enough.set()
        sender.done()


def test_driver_ok_reads_back_before_the_data_path_has_started() -> None:
    with SlowRig(drive=False) as rig:
        rig.path.gate.clear()
        rig.drive()
        assert rig.path.waiting.wait(PROMPT) and rig.guest.pci.status == RUNNING
        rig.guest.net.send(frame(1))  # the kick waits in the eventfd
        assert not rig.path.running
        rig.path.gate.set()
        assert rig.cable.receive()[12:] == frame(1)
        # A reset that is asked for in the middle of a start comes after it.
        rig.guest.pci.reset()
        rig.guest.close()
        rig.path.gate.clear()
        rig.drive()
        assert rig.path.waiting.wait(PROMPT)
        prompt(lambda: rig.guest.pci.set("device_status", 0))
        assert rig.guest.pci.status == RUNNING
        rig.path.gate.set()
        assert wait_for(lambda: rig.guest.pci.status == 0) and not rig.path.running
        assert rig.healthy


@pytest.mark.parametrize(
    ("error", "words", "bug"),
    [(HostError("no tap"), "no tap", False), (IndexError("oh"), "start: IndexError: oh", True)],
)
def test_a_start_that_fails_is_a_fault_and_the_thread_lives(
    error: Any, words: str, bug: bool
) -> None:
    with SlowRig(drive=False) as rig:
        rig.path.error = error
        rig.drive()
        assert wait_for(lambda: rig.guest.pci.status & VIRTIO_CONFIG_S_NEEDS_RESET)
        assert rig.device.faults == [words] and rig.events == ["X_PYVMM_NIC_FAULT"]
        told = rig.report()
        assert told["faults"] == [words]
        assert bool(told["tracebacks"]) == bug and (not bug or "in _pass" not in told["tracebacks"])
        rig.path.error = None
        rig.guest.pci.reset()
        rig.guest.close()
        rig.drive()
        rig.exchange()


def test_a_stop_that_fails_is_told_and_the_driver_gets_its_reset(
    rig: SlowRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(**options: bool | None) -> list[int]:
        EmulatedNet.stop(rig.path)
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(rig.path, "stop", stop)
    rig.guest.pci.reset()
    assert rig.device.faults == ["reset: ZeroDivisionError: oh"] and len(rig.device.tracebacks) == 1
    monkeypatch.undo()
    rig.guest.close()
    rig.drive()
    rig.exchange()


def test_kicks_of_the_control_queue_are_one_job(rig: SlowRig) -> None:
    """However often the driver kicks while the thread is busy."""
    rig.exchange()
    rig.path.gate.clear()
    link = Meanwhile(lambda: rig.nic.set_link(False))
    assert rig.path.waiting.wait(PROMPT)
    for _ in range(1000):
        rig.guest.pci.notify(2)
    assert len(rig.nic._thread._jobs) == 1
    rig.path.gate.set()
    link.done()
    command = rig.guest.command(VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC, b"\0")
    assert command == VIRTIO_NET_OK


def test_a_hand_over_holds_no_vcpu_up(rig: SlowRig) -> None:
    rig.exchange()
    rig.path.gate.clear()
    switch = Meanwhile(lambda: rig.nic.switch("vhost-user"))
    assert rig.path.waiting.wait(30)
    assert prompt(lambda: rig.guest.pci.status) == RUNNING
    prompt(lambda: rig.guest.net.send(frame(1)))
    prompt(lambda: look(rig.nic, rig.lock))
    rig.path.gate.set()
    assert switch.done().outcome == "switched"
    assert rig.cable.receive()[12:] == frame(1)
    steps = [step["name"] for step in rig.report()["switches"][0]["steps"]]
    assert steps == ["open", "prepare", "wait", "park", "start vhost-user", "close"]


def test_reports_of_a_path_that_has_stopped_are_of_no_interest(rig: SlowRig) -> None:
    rig.exchange()
    # Frames may pass before the start of the path has returned in the card's thread.
    assert wait_for(lambda: rig.device._listener is not None)
    listener = rig.device._listener
    assert listener is not None
    listener.fault(0, "now")
    assert rig.device.faults == ["now"]
    rig.guest.pci.reset()
    listener.fault(0, "late")
    listener.link(False)
    assert rig.device.faults == ["now"] and rig.guest.pci.status == 0 and rig.device.link_up


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["reset", "pause", "link", "stop", "start", "machine reset"])
def test_a_cut_ends_whatever_waits(where: str) -> None:
    with SlowRig(drive=where != "start") as rig:
        if where != "start":
            rig.exchange()
        rig.path.gate.clear()
        waits: Meanwhile[object] | None = None
        if where == "reset":
            rig.guest.pci.set("device_status", 0)
        elif where == "start":
            rig.drive()
        else:
            calls: dict[str, Callable[[], object]] = {
                "pause": lambda: rig.nic.set_paused(True),
                "link": lambda: rig.nic.set_link(False),
                "stop": rig.nic.stop,
                "machine reset": rig.nic.reset,
            }
            waits = Meanwhile(calls[where])
        assert rig.path.waiting.wait(PROMPT)
        prompt(rig.nic.cut)
        if waits is not None:
            waits.done()
        prompt(rig.nic.close)
        assert rig.path.workers() == [] or where == "start"


def test_a_path_that_does_not_let_go_is_given_up(
    rig: SlowRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that it uses is taken from it, and nobody waits for it."""
    monkeypatch.setattr(thread, "AFTER_CUT_S", 2.0)
    path = rig.path
    rig.exchange()
    path.gate.clear()
    path.obeys = False
    pause = Meanwhile(lambda: rig.nic.set_paused(True))
    assert path.waiting.wait(PROMPT)
    begin = time.monotonic()
    rig.nic.cut()
    with pytest.raises(HostError, match="does not let go"):
        pause.done()
    with pytest.raises(HostError, match="does not let go"):
        rig.nic.close()
    assert 2 <= time.monotonic() - begin < 2 + PROMPT
    rig.device.shut_down()  # as the transport does
    assert path.running and rig.device.active
    rig.nic.close()  # a second call does nothing
    path.gate.set()
    rig.nic._thread._thread.join(30)
    rig.device._abandoned = False


def test_after_the_end_there_are_no_transitions(rig: SlowRig) -> None:
    rig.nic.close()
    with pytest.raises(HostError, match="at its end"):
        rig.nic.set_link(False)
    with pytest.raises(HostError, match="the machine is ending"):
        rig.nic.switch("vhost-user")


def test_jobs_run_one_after_another() -> None:
    thread = CardThread("net9")
    seen: list[int] = []
    for i in range(100):
        thread.post(partial(seen.append, i))
    assert thread.call(lambda: list(seen)) == list(range(100))
    nothing: dict[int, int] = {}
    with pytest.raises(KeyError):
        thread.call(lambda: nothing[0])
    assert thread.call(threading.current_thread).name == "net9"
    assert thread.end() and thread.end()
    thread.post(lambda: seen.append(-1))
    assert seen[-1] == 99
