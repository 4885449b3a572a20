"""The generic vhost-user front-end: a device that is no network card, sessions, and who waits for
whom.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.backend.server import Backend
from pyvmm.datapath.base import HandOverTimes
from pyvmm.errors import VhostUserError
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.connect import Connector, ListeningConnector
from pyvmm.vhostuser.device import VhostUserDevice
from pyvmm.vhostuser.session import PROTOCOL_FEATURES, Refused, Session
from pyvmm.vhostuser.wire import Channel, Listener, Stopped, TimedOut, connect
from tests.driver import Events, Ring, bits, wait_for
from tests.unit.test_vu_wire import fill
from tests.vu_fake import REPLY_ACK, Fake, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pyvmm.backend.frontend import Handler

PATIENCE = 60.0
#: Seconds within which something must be over that waits for nobody. A time-out would be PATIENCE.
SOON = 10.0
VERSION_1 = bits("VIRTIO_F_VERSION_1")


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def listener(path: str) -> Iterator[Listener]:
    one = Listener(path)
    yield one
    one.close()


class Disk:
    """One ring of a device that is no network card, over our front-end."""

    def __init__(self, path: str, *, timeout: float = PATIENCE) -> None:
        self.memory = GuestMemory(1 << 20)
        self.ring = Ring(self.memory, 64, 0x10000)
        self.events = Events()
        self.device = VhostUserDevice(Connector(path), 1, HandOverTimes(), timeout=timeout)

    def start(self) -> None:
        self.device.start(VERSION_1 | 1 << 5, self.memory, [self.ring.vring()], self.events)

    def connected(self, times: int) -> bool:
        def there() -> bool:
            return self.device.counters()["connections"] >= times and self.device.connected

        return wait_for(there, PATIENCE)

    def __enter__(self) -> Disk:
        self.device.connect(PATIENCE)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.device.close()
        self.ring.close()
        self.memory.close()


class Service:
    """A back-end's part for such a device. It takes a chain at each start and returns it."""

    name, rings, queue_num, in_order, protocol_features = "disk", 1, 1, True, 0

    def __init__(self) -> None:
        self.requests: Mapping[int, Handler] = {}
        self.started: list[Any] = []
        self.position = 0

    def features(self) -> int:
        return VERSION_1 | 1 << 5

    def check_features(self, acked: int) -> None:
        pass

    def start(self, acked: int, memory: Any, rings: Any, events: Any) -> None:
        self.started.append((acked, rings[0].base, events))
        self.position = rings[0].base

    def stop(self) -> list[int]:
        return [self.position]

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


@contextmanager
def served(path: str, service: Service) -> Iterator[Backend]:
    backend = Backend(service)
    thread = threading.Thread(target=backend.run, args=(path,))
    thread.start()
    try:
        yield backend
    finally:
        backend.stop()
        thread.join(PATIENCE)
        backend.close()


@contextmanager
def in_thread(function: Callable[[], object]) -> Iterator[list[Any]]:
    """Run it beside; the list has its result, or what it raised, once it is over."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(function())
        except BaseException as e:
            out.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield out
    finally:
        thread.join(SOON)
        assert not thread.is_alive(), "it waits for the back-end"


# --- another kind of device -----------------------------------------------------------------------


def test_a_device_that_is_no_network_card(path: str) -> None:
    """Nothing about network cards is asked for or said; its rings go from back-end to back-end."""
    with ExitStack() as stack:
        service = Service()
        first = stack.enter_context(ExitStack())
        backend = first.enter_context(served(path, service))
        disk = stack.enter_context(Disk(path))
        assert disk.device.features() & (1 << 5)
        disk.start()
        assert wait_for(lambda: service.started, PATIENCE)
        assert service.started[0][:2] == (VERSION_1 | 1 << 5 | 1 << 30, 0)
        frontend = backend.frontend
        assert frontend is not None and frontend.protocol == PROTOCOL_FEATURES & ~(
            1 << spec.VHOST_USER_PROTOCOL_F_BACKEND_REQ
        )
        service.started[0][2].fault(0, "malformed")
        assert wait_for(lambda: disk.events.faults, PATIENCE)
        assert disk.device.stop() == [0]
        disk.start()
        disk.ring.add([(0x40000, 16, True)])
        disk.ring.publish()
        first.close()
        assert wait_for(lambda: not disk.device.connected, PATIENCE)
        assert disk.device.problem()
        successor = Service()
        with served(path, successor):
            assert disk.connected(2)
            assert successor.started and not disk.device.problem()
            assert disk.device.stop() == [0]


def test_an_exception_while_the_rings_stop(path: str) -> None:
    """Ctrl-C, for instance: the service is stopped again before the memory is unmapped."""

    class Interrupted(Service):
        def __init__(self) -> None:
            super().__init__()
            self.mapped: list[int] = []

        def start(self, acked: int, memory: Any, rings: Any, events: Any) -> None:
            super().start(acked, memory, rings, events)
            self.memory = memory

        def stop(self) -> list[int]:
            self.mapped.append(len(self.memory.regions))
            if len(self.mapped) == 1:
                raise KeyboardInterrupt
            return []

    service = Interrupted()
    listener = Listener(path)

    def accept() -> bool:
        channel = listener.accept()
        if channel is not None:
            channels.append(channel)
        return channel is not None

    def serve() -> None:
        with Backend(service) as backend:
            assert wait_for(accept, PATIENCE)
            backend.serve(channels[0])

    channels: list[Channel] = []
    with in_thread(serve) as result:
        disk = Disk(path)
        disk.device.connect(PATIENCE)
        disk.start()
        listener.close()
        disk.device.stop()
    disk.close()
    assert isinstance(result[0], KeyboardInterrupt) and service.mapped == [1, 1]


def test_repeats_are_counted_without_an_inflight_file(path: str, listener: Listener) -> None:
    with Fake(listener) as fake, Disk(path) as disk:
        disk.start()
        disk.ring.add([(0x40000, 16, True)])
        disk.ring.publish()
        fake.drop()
        assert disk.connected(2)
        assert disk.device.counters()["possible_repeats"] == 1


def test_what_became_required_since_the_session_was_made(path: str, listener: Listener) -> None:
    """Nothing is required while no driver runs; a start asks for more than the new back-end has."""
    with Fake(listener) as fake:
        fake.FEATURES |= 1 << 5
        with Disk(path) as disk:
            fake.FEATURES &= ~(1 << 5)
            fake.drop()
            assert disk.connected(2)
            disk.start()
            assert disk.device.problem().startswith("the back-end at " + path)
            assert "lacks features that the guest uses: 0x20" in disk.device.problem()
            assert disk.device.stop() == [0]


# --- sessions -------------------------------------------------------------------------------------


def test_a_refusal_leaves_the_session_and_any_other_failure_ends_it(
    path: str, listener: Listener
) -> None:
    no = raw(spec.VHOST_USER_SET_OWNER, b"\x01" + bytes(7))
    with Fake(listener) as fake:
        s = Session(connect(path), path)
        with s.conversation(PATIENCE):
            s.negotiate(REPLY_ACK)
        fake.answers[spec.VHOST_USER_SET_OWNER] = no
        with pytest.raises(Refused, match="refuses that"), s.conversation(PATIENCE):
            s.order(spec.VHOST_USER_SET_OWNER, "that")
        with s.conversation(PATIENCE):
            s.settle()
        fake.mute = True
        with pytest.raises(TimedOut), s.conversation(0.05):
            s.settle()
        fake.mute = False
        with pytest.raises(Stopped), s.conversation(PATIENCE):
            s.settle()
        s.close()


def test_the_time_of_a_conversation_is_for_all_of_it(path: str, listener: Listener) -> None:
    """Each answer comes in time, but all together do not."""

    def slow(sock: Any, m: Any) -> None:
        time.sleep(0.05)
        sock.send(raw(m.request, bytes(8)))

    with Fake(listener, answers={spec.VHOST_USER_GET_FEATURES: slow}):
        s = Session(connect(path), path)
        start = time.monotonic()
        with pytest.raises(TimedOut), s.conversation(0.3):
            while time.monotonic() < start + PATIENCE:
                s.settle()
        assert time.monotonic() - start < SOON
        s.close()


# --- who waits for whom ---------------------------------------------------------------------------


def test_a_first_connection_that_nobody_accepts(path: str, listener: Listener) -> None:
    waiting = fill(path)
    disk = Disk(path)
    with pytest.raises(TimedOut, match="nobody accepts connections"):
        disk.device.connect(0.1)
    disk.close()
    for one in waiting:
        one.close()


def test_closing_while_nobody_accepts_the_next_connection(path: str, listener: Listener) -> None:
    with Fake(listener) as fake:
        disk = Disk(path)
        disk.device.connect(PATIENCE)
        fake.deaf = True
        waiting = fill(path)
        fake.drop()
        assert wait_for(lambda: not disk.device.connected, PATIENCE)
        with in_thread(disk.close):
            pass
    for one in waiting:
        one.close()


def test_cut_while_a_back_end_is_waited_for(path: str) -> None:
    device = VhostUserDevice(ListeningConnector(path), 1, HandOverTimes())
    with in_thread(lambda: device.connect(PATIENCE)) as result:
        time.sleep(0.05)
        device.cut()
    assert isinstance(result[0], Stopped)
    device.close()


def silent(path: str, fake: Fake, request: int) -> Callable[[], bool]:
    """Have the fake say nothing to a request; whether it has been asked."""
    fake.answers[request] = lambda sock, m: None
    before = fake.seen.count(request)
    return lambda: fake.seen.count(request) > before


def start_and_stop_rings(disk: Disk) -> None:
    disk.start()
    disk.device.stop_rings([0])


def start_and_stop(disk: Disk) -> list[int]:
    disk.start()
    return disk.device.stop()


STEPS: dict[str, tuple[int, Callable[[Disk], object]]] = {
    "prepare": (
        spec.VHOST_USER_SET_MEM_TABLE,
        lambda disk: disk.device.prepare(VERSION_1, disk.memory, [disk.ring.vring()]),
    ),
    "start": (spec.VHOST_USER_SET_VRING_ENABLE, lambda disk: disk.start()),
    "stop_rings": (
        spec.VHOST_USER_GET_VRING_BASE,
        start_and_stop_rings,
    ),
    "stop": (
        spec.VHOST_USER_GET_VRING_BASE,
        start_and_stop,
    ),
    "converse": (
        spec.VHOST_USER_SEND_RARP,
        lambda disk: disk.device.converse(lambda s: s.order(spec.VHOST_USER_SEND_RARP, "it")),
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_cut_ends_any_conversation(path: str, listener: Listener, step: str) -> None:
    """And whoever asks for counters or a report does not wait for it, either."""
    request, do = STEPS[step]
    with Fake(listener) as fake, Disk(path) as disk:
        asked = silent(path, fake, request)
        with in_thread(lambda: do(disk)) as result:
            assert wait_for(asked, PATIENCE)
            with in_thread(lambda: (disk.device.counters(), disk.device.report())):
                assert not result
            disk.device.problem()
            disk.device.cut()
        assert result
        if step == "stop":
            assert result == [[0]]  # the used index
        with in_thread(lambda: start_and_stop(disk)) as result:
            pass
        assert result == [[0]]
        assert not disk.device.connected and disk.device.problems == []


@pytest.mark.parametrize("how", ["cut", "close"])
@pytest.mark.parametrize("request_", [spec.VHOST_USER_GET_FEATURES, spec.VHOST_USER_SET_VRING_NUM])
def test_the_watcher_is_talking(path: str, listener: Listener, request_: int, how: str) -> None:
    """While it negotiates nobody waits for it; ``stop`` ends its conversation about rings."""
    with Fake(listener) as fake, Disk(path) as disk:
        disk.start()
        # The answer that does not come is the acknowledgement of what is told before.
        asked = silent(path, fake, spec.VHOST_USER_SET_VRING_ENABLE)
        if request_ == spec.VHOST_USER_GET_FEATURES:
            asked = silent(path, fake, request_)
        fake.drop()
        assert wait_for(asked, PATIENCE)
        with in_thread(disk.device.stop) as result:
            pass
        assert result == [[0]]
        if request_ == spec.VHOST_USER_GET_FEATURES:
            with in_thread(lambda: start_and_stop(disk)):
                pass
        if how == "cut":
            disk.device.cut()
        with in_thread(disk.device.close):
            pass
        assert disk.device.counters()["refusals"] == 0


def test_drop(path: str, listener: Listener) -> None:
    with Fake(listener), Disk(path) as disk:
        disk.start()
        disk.device.drop()
        assert disk.connected(2)
        assert disk.device.stop() == [0] and not disk.device.problems


def test_errors_of_the_system_leave_nothing_open(path: str, listener: Listener) -> None:
    """No descriptors for the back-end's own channel: this back-end cannot be had."""
    import resource

    protocol = REPLY_ACK | 1 << spec.VHOST_USER_PROTOCOL_F_BACKEND_REQ
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Fake(listener, protocol) as fake:
        disk = Disk(path)

        def limit(sock: Any, m: Any) -> None:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            sock.send(raw(m.request, protocol.to_bytes(8, "little")))

        fake.answers[spec.VHOST_USER_GET_PROTOCOL_FEATURES] = limit
        try:
            with pytest.raises(VhostUserError, match="no channel for"):
                disk.device.connect(PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        disk.close()
