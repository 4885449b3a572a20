"""The status machine, feature negotiation and queue registers (virtio 1.2, 2.1, 2.2, 3.1),
exhaustively where that is possible.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.datapath.base import Vring
from pyvmm.errors import HostError
from pyvmm.memory import GuestMemory
from pyvmm.spec.platform import RAM_LOW_MAX
from pyvmm.virtio.device import (
    ACK,
    CONFIGURING,
    DRIVER,
    DRIVER_OK,
    FAILED,
    NEEDS_RESET,
    Queue,
    VirtioDevice,
)

VERSION_1 = 1 << 32
OFFERED = VERSION_1 | 1 << 5 | 1 << 28


class Device(VirtioDevice):
    """Notes what happens; ``trouble`` is what activate raises."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__("dev", memory, [256, 128])
        self.log: list[str] = []
        self.trouble: HostError | None = None
        self.status_at_stop: int | None = None
        self.plug(self)

    def interrupt_config(self) -> None:
        self.log.append("interrupt")

    def set_active(self, active: bool) -> None:
        self.log.append(f"active {active}")

    def device_reset(self) -> None:
        pass

    def set_doorbells(self, pages: dict[int, int]) -> None:
        pass

    def set_takers(self, takers: dict[int, Any]) -> None:
        pass

    def queue_reset(self, q: Queue) -> None:
        self.log.append(f"queue {q.index} reset")

    def offered(self) -> int:
        return OFFERED

    def activate(self, rings: list[Vring]) -> None:
        self.rings = rings
        if self.trouble:
            raise self.trouble
        self.log.append("start")

    def deactivate(self) -> None:
        self.status_at_stop = self.status
        self.log.append("stop")


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory(1 << 20)
    yield m
    m.close()


@pytest.fixture
def device(memory: GuestMemory) -> Iterator[Device]:
    d = Device(memory)
    yield d
    d.close()


STEPS = [0, ACK, ACK | DRIVER, CONFIGURING, CONFIGURING | DRIVER_OK]


def bring(device: Device, status: int) -> None:
    """By the book to one of STEPS."""
    device.set_status(0)
    for step in STEPS[1 : STEPS.index(status) + 1]:
        if step == CONFIGURING:
            device.set_features(32, VERSION_1 >> 32)
        device.set_status(step)
    assert device.status == status


@pytest.mark.parametrize("now", STEPS)
def test_every_write_in_every_status(device: Device, now: int) -> None:
    """From each status, steps forward in their order, FAILED and 0 do something, whatever else is
    written. Each refused write is told.
    """
    for value in range(256):
        bring(device, now)
        if now == ACK | DRIVER:
            device.set_features(32, 1)
        device.refused, device.mistakes = 0, []
        device.set_status(value)
        plain = value & ~NEEDS_RESET  # the driver cannot set it
        forward = STEPS[STEPS.index(now) :]
        if now < ACK | DRIVER:  # nobody has accepted VERSION_1, so FEATURES_OK does not come
            if plain in forward[3 - STEPS.index(now) :]:
                assert device.status == ACK | DRIVER
                assert "VIRTIO_F_VERSION_1 (6.1)" in device.mistakes[0] and device.refused == 1
                continue
            forward = STEPS[STEPS.index(now) : 3]
        if value == 0:
            assert device.status == 0
        elif plain in (now | FAILED, *forward):
            assert device.status == plain
        else:
            assert device.status == now
            assert device.refused == len(device.mistakes) == 1
            assert f"device_status = {value:#x}" in device.mistakes[0]
            continue
        assert not device.refused and not device.mistakes


def test_steps_in_one_write_as_drivers_take_them(device: Device) -> None:
    """rcore-os/virtio-drivers and SeaBIOS begin with ACKNOWLEDGE and DRIVER in one write."""
    device.set_status(ACK | DRIVER)
    device.set_features(32, 1)
    device.set_status(CONFIGURING | DRIVER_OK)
    assert device.status == CONFIGURING | DRIVER_OK and not device.mistakes
    assert device.log[-1] == "start"


@pytest.mark.parametrize("steps", [(1, 2, 8, 4), (3, 8, 4), (1, 2)])
def test_a_driver_that_never_ors_its_bits_is_told(device: Device, steps: tuple[int, ...]) -> None:
    """2.1.1: the driver must not clear a bit."""
    for value in steps:
        device.set_status(value)
    assert device.status in (ACK, ACK | DRIVER) and device.refused == len(steps) - 1
    assert all("which clears bits of" in text and "(2.1.1)" in text for text in device.mistakes)


def test_mistakes_are_bounded(device: Device) -> None:
    for _ in range(1000):
        device.set_queue(0, "size", 64)
    assert device.refused == 1000 and len(device.mistakes) == 16
    assert device.mistakes[0] == "driver wrote queue_size = 0x40 before FEATURES_OK (3.1.1)"


def test_only_a_reset_leads_out_of_failed(device: Device) -> None:
    bring(device, CONFIGURING)
    device.set_status(CONFIGURING | FAILED)
    for value in range(1, 256):
        device.set_status(value)
        assert device.status == CONFIGURING | FAILED
    device.set_status(0)
    assert device.status == 0


@pytest.mark.parametrize(
    ("acked", "good"),
    [
        (VERSION_1, True),
        (OFFERED, True),
        (0, False),
        (OFFERED & ~VERSION_1, False),
        (VERSION_1 | 1, False),
        (OFFERED | 1 << 34, False),
        (OFFERED | 1 << 63, False),
        ((1 << 64) - 1, False),
    ],
)
def test_features_ok_needs_version_1_and_nothing_that_was_not_offered(
    device: Device, acked: int, good: bool
) -> None:
    bring(device, ACK | DRIVER)
    device.set_features(0, acked & 0xFFFFFFFF)
    device.set_features(32, acked >> 32)
    device.set_status(CONFIGURING)
    assert device.status == (CONFIGURING if good else ACK | DRIVER)
    if not good:  # and there is no way around it
        device.set_status(CONFIGURING | DRIVER_OK)
        assert device.status == ACK | DRIVER and "start" not in device.log
        device.set_features(0, 0)
        device.set_features(32, 1)
        device.set_status(CONFIGURING)
        assert device.status == CONFIGURING


@pytest.mark.parametrize("status", STEPS)
def test_features_may_be_written_between_driver_and_features_ok_only(
    device: Device, status: int
) -> None:
    bring(device, status)
    before, refused = device.driver_features, device.refused
    device.set_features(0, 0x20)
    if status == ACK | DRIVER:
        assert device.driver_features == before | 0x20
    else:
        assert device.driver_features == before and device.refused == refused + 1


@pytest.mark.parametrize("status", STEPS)
@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 64), ("desc", 0x1000), ("avail", 0x2000), ("used", 0x3000), ("enabled", 1)],
)
def test_queue_registers_may_be_written_while_configuring_only(
    device: Device, status: int, field: str, value: int
) -> None:
    bring(device, status)
    q, refused = device.queues[0], device.refused
    before = getattr(q, field)
    device.set_queue(0, field, value)
    if status == CONFIGURING:
        assert getattr(q, field) == value
    else:
        assert getattr(q, field) == before and device.refused == refused + 1


def test_an_enabled_queue_is_settled(device: Device) -> None:
    bring(device, CONFIGURING)
    device.set_queue(0, "desc", 0x1000)
    device.set_queue(0, "enabled", 1)
    for field, value in (("desc", 0x5000), ("size", 2), ("enabled", 0)):
        device.set_queue(0, field, value)
    q = device.queues[0]
    assert (q.desc, q.size, q.enabled, device.refused) == (0x1000, 256, True, 3)


@pytest.mark.parametrize("size", [0, 3, 255, 512, 0x8000, 0xFFFF])
def test_bad_queue_sizes_are_refused(device: Device, size: int) -> None:
    bring(device, CONFIGURING)
    device.set_queue(0, "size", size)
    assert device.queues[0].size == 256 and device.refused == 1


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_queue_enable_takes_1_only(device: Device, value: int) -> None:
    bring(device, CONFIGURING)
    device.set_queue(0, "enabled", value)
    assert not device.queues[0].enabled and device.refused == 1


def test_queues_that_do_not_exist(device: Device) -> None:
    bring(device, CONFIGURING)
    for index in (2, 3, 0xFFFF):
        device.set_queue(index, "size", 64)
    assert device.refused == 3


def set_up(
    device: Device, size: int = 256, desc: int = 0x1000, avail: int = 0x3000, used: int = 0x4000
) -> None:
    bring(device, CONFIGURING)
    device.log.clear()
    for field, value in (
        ("size", size),
        ("desc", desc),
        ("avail", avail),
        ("used", used),
        ("enabled", 1),
    ):
        device.set_queue(0, field, value)


def test_driver_ok_hands_over_the_enabled_rings(device: Device) -> None:
    set_up(device)
    device.set_status(CONFIGURING | DRIVER_OK)
    assert device.log == ["active True", "start"]
    [ring] = device.rings
    assert (ring.index, ring.size, ring.desc, ring.avail, ring.used, ring.base) == (
        0,
        256,
        0x1000,
        0x3000,
        0x4000,
        0,
    )
    assert ring.kick is device.queues[0].kick and ring.call is device.queues[0].call


MIB = 1 << 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("desc", 0x1008),  # aligned to 8, not 16
        ("avail", 0x3001),
        ("used", 0x4002),
        ("desc", MIB),
        ("desc", MIB - 16 * 256 + 16),  # the last entry sticks out
        ("avail", MIB - 516),
        ("used", MIB - 2052),
        ("desc", RAM_LOW_MAX),
        ("desc", (1 << 64) - 16),  # wraps
        ("used", (1 << 64) - 4),
        ("avail", (1 << 64) - 2),
    ],
)
def test_garbage_addresses_mean_needs_reset(device: Device, field: str, value: int) -> None:
    set_up(device, **{field: value})
    assert not device.status & NEEDS_RESET  # nobody is interested before DRIVER_OK
    device.set_status(CONFIGURING | DRIVER_OK)
    assert device.status == CONFIGURING | DRIVER_OK | NEEDS_RESET
    assert "start" not in device.log and device.log[-1] == "interrupt"
    assert len(device.faults) == 1 and "queue 0" in device.faults[0]
    device.set_status(0)
    assert device.status == 0
    set_up(device)
    device.set_status(CONFIGURING | DRIVER_OK)
    assert device.log[-1] == "start" and not device.status & NEEDS_RESET


@pytest.mark.parametrize(
    ("field", "value"), [("desc", MIB - 4096), ("avail", MIB - 518), ("used", MIB - 2056)]
)
def test_rings_may_reach_to_the_end_of_memory(device: Device, field: str, value: int) -> None:
    set_up(device, **{field: value})
    device.set_status(CONFIGURING | DRIVER_OK)
    expected = field != "avail" or value % 2 == 0
    assert (device.log[-1] == "start") == expected


def test_a_backend_that_does_not_start_means_needs_reset(device: Device) -> None:
    set_up(device)
    device.trouble = HostError("no tap")
    generation = device.generation
    device.set_status(CONFIGURING | DRIVER_OK)
    assert device.status & NEEDS_RESET and device.faults == ["no tap"]
    assert device.log[-1] == "interrupt" and device.generation != generation


def test_reset_stops_the_backend_before_the_status_reads_0(device: Device) -> None:
    set_up(device)
    device.set_status(CONFIGURING | DRIVER_OK)
    device.queues[0].kick.signal()
    device.queues[0].call.signal()
    device.log.clear()
    device.set_status(0)
    assert device.log == ["stop", "active False"]
    assert device.status_at_stop == CONFIGURING | DRIVER_OK
    q = device.queues[0]
    assert (q.size, q.desc, q.avail, q.used, q.enabled) == (256, 0, 0, 0, False)
    assert device.driver_features == 0
    assert q.kick.drain() == q.call.drain() == 0
    assert device.resets == 1
    device.set_status(0)  # again: nothing to stop
    assert device.log == ["stop", "active False"] and device.resets == 1


def test_faults_are_bounded_and_keep_the_status(device: Device) -> None:
    set_up(device)
    device.set_status(CONFIGURING | DRIVER_OK)
    for i in range(1000):
        device.fault(0, f"queue 0: {i}")
    assert len(device.faults) <= 16 and device.faults[0] == "queue 0: 0"
    assert device.status == CONFIGURING | DRIVER_OK | NEEDS_RESET
    device.set_status(CONFIGURING | DRIVER_OK)  # the driver cannot clear it
    assert device.status & NEEDS_RESET


def test_the_generation_counts_every_change_from_any_thread(device: Device) -> None:
    bring(device, CONFIGURING)
    device.log.clear()

    def change() -> None:
        for _ in range(100):
            device.config_changed()

    threads = [threading.Thread(target=change) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert device.generation == 500 & 0xFF
    assert device.log == []  # no interrupt before DRIVER_OK
