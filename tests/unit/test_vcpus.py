"""The vCPUs' threads with vCPUs that are none: run, halt, kick, pause, and what goes wrong."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm._ext import lib
from pyvmm.kvm.entry import INTEL, entry_failure
from pyvmm.kvm.vcpu import EXIT_SHUTDOWN, STOP_ASKED, STOP_ERROR, STOP_MMIO, STOP_OTHER, STOP_PIO
from pyvmm.outcome import Outcome
from pyvmm.vcpus import EHWPOISON, VcpuThreads, abnormal

PATIENCE = 30.0


AT_5000 = "(the host cannot give the page of guest memory at 0x5000)"
SEVEN = "VM-instruction error 7: VM entry with invalid control fields"
POISONED = os.strerror(EHWPOISON)


class FakeVcpu:
    """Stays in the guest until it is kicked, or returns what ``stops`` says first."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.thread_id = 0
        self.threads: set[int] = set()
        self.c = SimpleNamespace(reason=0, error=0, detail=0, info=[], info_count=0)
        self.stops: list[int] = []
        self.entries = 0
        self.inside = False
        self.settled = self.rests = self.kicks = 0
        self._kicked = threading.Event()

    def run(self) -> int:
        self.entries += 1
        if self.stops:
            return self.stops.pop(0)
        self.inside = True
        assert self._kicked.wait(PATIENCE)
        self.inside = False
        self._kicked.clear()
        return int(STOP_ASKED)

    def kick(self) -> None:
        self.kicks += 1
        self._kicked.set()

    def rested(self) -> None:
        self.rests += 1

    def settle(self) -> None:
        self.settled += 1

    def registers(self) -> dict[str, int]:
        return {"rip": 0x1000 + self.index}

    def reset_by_kvm(self) -> bool:
        return False


def until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not good():
        assert time.monotonic() < end
        time.sleep(0.001)


class Rig:
    """Two vCPUs and their threads; ``start`` runs them beside the test."""

    def __init__(self) -> None:
        self.vcpus = [FakeVcpu(0), FakeVcpu(1)]
        self.lock = threading.RLock()
        self.served: list[Any] = []
        self.flushes: list[bool] = []  # whether somebody else could have had the lock
        self.held: threading.Event | None = None  # what a device wants a vCPU to wait for
        self.ends: list[Outcome] = []
        bus = SimpleNamespace(dispatch=self._serve)
        self.threads = VcpuThreads(
            self.vcpus,  # type: ignore[arg-type]
            bus,  # type: ignore[arg-type]
            self.lock,
            flush=self._flush,
            over=self._over,
        )
        self._runner = threading.Thread()

    def _free(self) -> bool:
        """Whether another thread can take the lock now."""
        got: list[bool] = []

        def take() -> None:
            got.append(self.lock.acquire(blocking=False))
            if got[0]:
                self.lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return got[0]

    def _serve(self, c: Any) -> threading.Event | None:
        assert not self._free()
        self.served.append(c)
        return self.held

    def _flush(self) -> None:
        self.flushes.append(self._free())

    def _over(self, outcome: Outcome) -> None:
        self.ends.append(outcome)
        self.threads.halt()

    def start(self) -> None:
        self._runner = threading.Thread(target=self.threads.run)
        self._runner.start()

    def join(self) -> None:
        self._runner.join(PATIENCE)
        assert not self._runner.is_alive()

    def in_guest(self) -> bool:
        return all(vcpu.inside for vcpu in self.vcpus)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.threads.halt()
    if made._runner.ident is not None:
        made.join()


def test_a_device_holds_a_vcpu(rig: Rig) -> None:
    """The vCPU enters the guest when the device lets it, the other vCPU goes on, and the lock is
    free; an end does not wait for the device.
    """
    rig.held = threading.Event()
    rig.vcpus[0].stops = [STOP_PIO]
    rig.start()
    until(lambda: rig.flushes == [True] and rig.vcpus[1].inside)
    assert rig._free() and rig.vcpus[0].entries == 1
    rig.held.set()
    until(rig.in_guest)
    rig.held = threading.Event()  # which nobody sets
    rig.vcpus[0].stops = [STOP_PIO]
    rig.vcpus[0].kick()
    until(lambda: len(rig.served) == 2)
    rig.threads.halt()
    rig.join()


def test_run_until_halted(rig: Rig) -> None:
    rig.start()
    until(rig.in_guest)
    assert all(vcpu.thread_id in vcpu.threads for vcpu in rig.vcpus)
    rig.threads.halt()
    rig.join()
    assert [vcpu.settled for vcpu in rig.vcpus] == [1, 1]
    rig.start()
    rig.join()
    assert [vcpu.entries for vcpu in rig.vcpus] == [1, 1], "halted for good"
    rig.threads.rearm()
    rig.start()
    until(rig.in_guest)


def test_halt_needs_no_io_lock(rig: Rig) -> None:
    rig.start()
    until(rig.in_guest)
    with rig.lock:  # held by somebody who waits for another process, say
        halting = threading.Thread(target=rig.threads.halt)
        halting.start()
        halting.join(PATIENCE)
        assert not halting.is_alive()
        rig.join()


def test_python_answers_under_the_lock_and_output_goes_out_without_it(rig: Rig) -> None:
    rig.vcpus[1].stops = [STOP_PIO, STOP_MMIO]
    rig.start()
    until(rig.in_guest)
    assert rig.served == [rig.vcpus[1].c] * 2
    assert rig.flushes == [True, True]


def test_a_kick_is_told_to_whoever_asks(rig: Rig) -> None:
    rig.start()
    until(rig.in_guest)
    rig.threads.kick()  # nobody asks
    told: list[Any] = []
    rig.threads.kicked = told.append
    until(lambda: rig.in_guest() and rig.vcpus[0].entries == 2 == rig.vcpus[1].entries)
    rig.threads.kick()
    until(lambda: len(told) == 2)
    assert {vcpu.index for vcpu in told} == {0, 1}


def test_nobody_is_kicked_when_no_thread_runs(rig: Rig) -> None:
    rig.threads.kick()
    rig.start()
    until(rig.in_guest)
    rig.threads.halt()
    rig.join()
    kicks = [vcpu.kicks for vcpu in rig.vcpus]
    rig.threads.halt()
    rig.threads.kick()
    assert [vcpu.kicks for vcpu in rig.vcpus] == kicks == [1, 1]


def test_pause_and_resume(rig: Rig) -> None:
    rig.start()
    until(rig.in_guest)
    for n in range(1, 4):
        rig.threads.pause(PATIENCE)
        assert rig.threads.paused and rig.threads.parked == 2 and not rig.in_guest()
        entries = [vcpu.entries for vcpu in rig.vcpus]
        rig.threads.kick()
        time.sleep(0.05)
        assert [vcpu.entries for vcpu in rig.vcpus] == entries
        rig.threads.resume()
        until(rig.in_guest)
        assert not rig.threads.paused
        assert [vcpu.rests for vcpu in rig.vcpus] == [n, n]


def test_paused_before_the_start(rig: Rig) -> None:
    rig.threads.pause(PATIENCE)  # there is nobody to wait for
    rig.start()
    until(lambda: rig.threads.parked == 2)
    assert [vcpu.entries for vcpu in rig.vcpus] == [0, 0]
    rig.threads.halt()
    rig.join()
    rig.threads.rearm()
    rig.start()
    until(lambda: rig.threads.parked == 2)
    assert [vcpu.entries for vcpu in rig.vcpus] == [0, 0], "it stays paused when it starts over"
    rig.threads.resume()
    until(rig.in_guest)


def test_pause_waits_with_patience_for_a_thread_that_is_held_up(rig: Rig) -> None:
    rig.vcpus[0].stops = [STOP_PIO]
    with rig.lock:
        rig.start()
        until(lambda: rig.vcpus[0].entries > 0 and rig.vcpus[1].inside)
        begin = time.monotonic()
        rig.threads.pause(0.1)
        assert 0.1 <= time.monotonic() - begin < PATIENCE
        assert rig.threads.parked == 1
    until(lambda: rig.threads.parked == 2)


def test_pause_waits_for_a_vcpu_that_leaves_the_guest_late(rig: Rig) -> None:
    """However long a busy host gives its thread no time."""
    rig.start()
    until(rig.in_guest)
    vcpu = rig.vcpus[0]
    vcpu.kick = lambda: None  # type: ignore[method-assign]
    pausing = threading.Thread(target=rig.threads.pause, args=(0.1,))
    pausing.start()
    until(lambda: rig.threads.parked == 1)
    pausing.join(0.5)
    assert pausing.is_alive() and vcpu.inside
    vcpu._kicked.set()
    pausing.join(PATIENCE)
    assert not pausing.is_alive() and not rig.in_guest()


def test_pause_of_a_machine_that_has_ended_does_not_wait(rig: Rig) -> None:
    rig.start()
    until(rig.in_guest)
    rig.threads.halt()
    rig.join()
    pausing = threading.Thread(target=rig.threads.pause, args=(2 * PATIENCE,))
    pausing.start()
    rig.threads.end()
    pausing.join(PATIENCE)
    assert not pausing.is_alive()


def test_an_end_in_one_vcpu_is_the_end_of_all(rig: Rig) -> None:
    rig.vcpus[1].stops = [STOP_ERROR]
    rig.vcpus[1].c.error = errno.EFAULT
    rig.start()
    rig.join()
    (end,) = rig.ends
    unknown = "(the host cannot give a page of guest memory; KVM does not say which)"
    assert (end.kind, end.detail) == ("kvm-error", f"vCPU 1: Bad address {unknown}, rip 0x1001")
    assert end.registers == {"rip": 0x1001} and rig.threads.failure is None


def test_a_fault_of_ours_ends_all_and_is_kept(rig: Rig) -> None:
    rig.threads._bus = SimpleNamespace(dispatch=lambda c: 1 // 0)  # type: ignore[assignment]
    rig.vcpus[0].stops = [STOP_PIO]
    rig.start()
    rig.join()
    assert isinstance(rig.threads.failure, ZeroDivisionError)
    assert [end.kind for end in rig.ends] == ["stopped"]


@pytest.mark.parametrize(
    ("stop", "state", "kind", "detail"),
    [
        (STOP_OTHER, {"reason": EXIT_SHUTDOWN}, "triple-fault", "vCPU 0"),
        (
            STOP_OTHER,
            {"reason": lib.KVM_EXIT_INTERNAL_ERROR, "detail": 1, "info": [2, 255], "info_count": 2},
            "kvm-error",
            "vCPU 0: exit internal_error, detail 1 0x2 0xff, rip 0x1000",
        ),
        (
            STOP_OTHER,
            {"reason": lib.KVM_EXIT_FAIL_ENTRY, "info": [7], "info_count": 1},
            "kvm-error",
            f"vCPU 0: exit fail_entry, detail 0 0x7: {SEVEN} ({INTEL}), rip 0x1000",
        ),
        (STOP_OTHER, {"reason": 999}, "kvm-error", "vCPU 0: exit 999, detail 0, rip 0x1000"),
        (
            STOP_ERROR,
            {"error": EHWPOISON, "info": [0, 0x5000, 4096], "info_count": 3},
            "kvm-error",
            f"vCPU 0: {POISONED} {AT_5000}, rip 0x1000",
        ),
    ],
)
def test_abnormal_ends(stop: int, state: dict[str, Any], kind: str, detail: str) -> None:
    vcpu = FakeVcpu(0)
    vars(vcpu.c).update(state)
    outcome = abnormal(vcpu, stop)  # type: ignore[arg-type]
    assert (outcome.kind, outcome.detail) == (kind, detail)


@pytest.mark.parametrize(
    ("reason", "words", "module"),
    [
        (8, "error 8: VM entry with invalid host-state fields", "kvm_intel"),
        (0x80000021, "invalid guest state", "kvm_intel"),
        (0x80000022, "machine-specific register", "kvm_intel"),
        (0x80000099, "the manual does not have", "kvm_intel"),
        (0xFFFFFFFF, "VMRUN with an invalid control block", "kvm_amd"),
        (0xFFFFFFFF_FFFFFFFF, "VMRUN with an invalid control block", "kvm_amd"),
        (14, "no manual has", "dmesg"),
    ],
)
def test_a_failed_entry_in_words(reason: int, words: str, module: str) -> None:
    said = entry_failure(reason)
    assert words in said and module in said
