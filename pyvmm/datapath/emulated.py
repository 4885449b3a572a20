"""The emulated data path: one worker thread per queue pair, in C, between a tap and the rings.

Python starts the workers, stops them and hears of what happens to them: one supervisor thread per
data path waits for their events. It is in no packet's way and sleeps while nothing happens.
"""

from __future__ import annotations

import os
import select
import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import HandOverTimes, OnUplink, bug, by_pair, header_size
from pyvmm.datapath.cable import CableEnd
from pyvmm.errors import HostError, RingFault
from pyvmm.fd import EventFd
from pyvmm.hostnet.rtnetlink import Reopener
from pyvmm.kvm.inject import Injection
from pyvmm.spec.virtio import (
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_RING_PACKED,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
)
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_DEVICE_STATS,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_NOTF_COAL,
    VIRTIO_NET_F_VQ_NOTF_COAL,
)
from pyvmm.threads import Thread, report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from pyvmm.datapath.base import Frames, PathEvents, Vring
    from pyvmm.datapath.capture import CapturePoint
    from pyvmm.datapath.impair import ImpairPoint
    from pyvmm.kvm.recorder import Scope
    from pyvmm.memory import GuestMemory

RING_FEATURES = (
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_IN_ORDER,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_NOTF_COAL,
    VIRTIO_NET_F_VQ_NOTF_COAL,
    VIRTIO_NET_F_DEVICE_STATS,
)
#: With one of these, a frame for the guest may be as long as ``GSO_MAX``.
GSO = sum(
    1 << bit
    for bit in (
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_UFO,
        VIRTIO_NET_F_GUEST_USO4,
        VIRTIO_NET_F_GUEST_USO6,
    )
)
#: With one of these, the driver may read in a frame's header what is to be known of its checksum:
#: with CTRL_GUEST_OFFLOADS, it may switch the feature on at any time.
CSUM = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
#: Ethernet header and a VLAN tag, on top of the MTU or of the 64 KiB of a GSO packet.
FRAME_EXTRA = 14 + 4
GSO_MAX = 65535
#: Milliseconds that a worker has to say that it transmits no more.
ANSWER_MS = 1000


class _Pair:
    """One queue pair.

    :ivar worker: ``struct pv_net_worker *``, owned.
    :ivar tid: the worker's thread; 0 until it serves the rings.
    :ivar held: it transmits no more.
    """

    def __init__(self, worker: Any, number: int, name: str) -> None:
        self.worker = worker
        self.number = number
        self.name = name
        self.tid = 0
        self.held = False
        self.link_up = True


def _no_thread(why: str) -> HostError:
    return HostError(f"cannot start a network thread: {why}", "raise the limit of processes")


class EmulatedNet(OnUplink):
    """Implements ``DataPath`` (datapath.base). ``start``, ``stop`` and ``close`` are called by one
    thread at a time.

    :param port: the tap, lent; the caller programs its queues and offloads before ``start``.
    :param poll_us: a worker looks for work this long, in microseconds, before it sleeps.
    :param worker_cpu: pin worker k to CPU worker_cpu + k.
    :param in_exit: frames of the guest are sent in the thread of the vCPU that kicks, if its kick
        is an exit; the worker receives. Not together with ``poll_us`` or in-flight regions.
    :param batch: without it, one frame at a time, each with a kick and an interrupt of its own.
    :param recorder: for traces, or None.
    :param hold_ms: a frame that was read from the tap waits this long, in milliseconds, for the
        guest to add buffers, and as long from a ``stop(finish=True)`` on; then it is dropped.
    :param stopped: told, in words, if a worker makes a system call that it may not make. From then
        on the worker does nothing, and its rings are lost. Without it, that is a fault.
    :param captures: of the card, lent; None if there never are any.
    :param impair: the card's faults on demand, lent; None if there never are any.
    :param gone: asked why the port's descriptors have come to their end, which is a fault then;
        empty if they may come back.
    """

    name = "emulated"
    restarts_for_offloads = False

    def __init__(
        self,
        port: Frames,
        *,
        poll_us: int = 0,
        worker_cpu: int | None = None,
        in_exit: bool = False,
        batch: bool = True,
        recorder: Scope | None = None,
        hold_ms: int = lib.PV_NET_HOLD_MS,
        stopped: Callable[[str], object] | None = None,
        gone: Callable[[], str] | None = None,
        captures: CapturePoint | None = None,
        impair: ImpairPoint | None = None,
    ) -> None:
        self.times = HandOverTimes()
        self._port = port
        self._events: PathEvents | None = None
        self._stopped, self._gone = stopped, gone
        self._captures, self._impair = captures, impair
        self._recorder = recorder
        self._poll_us = poll_us
        self._worker_cpu = worker_cpu
        self._in_exit, self._batch = in_exit, batch
        self._hold_ms = hold_ms
        self._pairs: list[_Pair] = []
        self._queues: list[int] = []
        # The workers add 1 when they have something to tell the supervisor, which lives from the
        # first ``prepare`` or ``start`` until ``close``.
        self._told = EventFd()
        self._supervisor: threading.Thread | None = None
        self._closing = False
        # Guards the workers' events: one thread at a time takes them.
        self._telling = threading.Lock()
        interface = port.interface
        self._reopener = Reopener(
            port.name,
            interface.reopen if interface is not None else None,
            self._link_back,
            self._failed,
        )
        # Guards workers against being freed while their counters are read.
        self._lock = threading.Lock()
        self._fields = [(n, f.type.kind) for n, f in ffi.typeof("struct pv_net_counters").fields]
        self._totals: dict[str, int] = {"worker_cpu_ns": 0}
        self._totals |= {name: 0 for name, kind in self._fields if kind != "array"}
        self._by_ring: dict[int, dict[str, int]] = {}  # of the workers of the latest start

    def features(self) -> int:
        """What the rings and the tap can honour."""
        return self._port.features() | sum(1 << bit for bit in RING_FEATURES)

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Nothing to agree on; makes the supervisor, so that ``start`` only has workers to make.

        :raises HostError: no threads.
        """
        self._need_supervisor()

    def problem(self) -> str:
        """None that ``start`` would not have raised."""
        return ""

    def start(
        self,
        acked: int,
        memory: GuestMemory,
        rings: Sequence[Vring],
        events: PathEvents,
        *,
        patience: float | None = None,
    ) -> None:
        """Take over the rings.

        :raises RingFault: a ring's size or addresses are wrong. :raises HostError: no descriptors,
            memory or threads.
        """
        assert not self._pairs
        pairs = by_pair(rings)
        if max(pairs, default=0) >= len(self._port.fds):
            raise HostError(f"queue pair {max(pairs)} has no queue of {self._port.name}")
        self._events = events
        self._reopener.rearm()
        self.times.began = {}
        try:
            self._begin(acked, memory, pairs)
        except BaseException:
            self._end()
            raise
        self._queues = [ring.index for ring in rings]

    def _begin(self, acked: int, memory: GuestMemory, pairs: dict[int, list[Vring]]) -> None:
        """Make all workers and threads; only then let the workers touch the rings."""
        self._by_ring = {}
        for number, own in pairs.items():
            worker = self._new_worker(acked, memory, number, own)
            with self._lock:
                self._pairs.append(_Pair(worker, number, f"{self._port.name}-{number}"))
            if self._captures is not None:
                self._captures.enter(number, worker)
            if self._impair is not None:
                self._impair.enter(number, worker, (header_size(acked), acked & (GSO | CSUM)))
        for pair in self._pairs:
            error = lib.pv_net_worker_start(pair.worker)
            if error:
                raise _no_thread(os.strerror(-error))
        self._need_supervisor()
        for pair in self._pairs:
            lib.pv_net_worker_go(pair.worker)
        thread = ffi.new("struct pv_net_thread *")
        for pair in self._pairs:
            lib.pv_net_worker_await(pair.worker, thread)
            pair.tid = thread.tid
            self.times.began |= dict.fromkeys((2 * pair.number, 2 * pair.number + 1), thread.began)

    def _end(self) -> dict[int, int]:
        """Wait for the workers, which have been told to stop or have not begun; returns the
        position of each queue.
        """
        bases = {}
        for pair in self._pairs:
            lib.pv_net_worker_join(pair.worker)
            for queue in (0, 1):
                bases[2 * pair.number + queue] = int(lib.pv_net_worker_base(pair.worker, queue))
        self._pass_on()
        for pair in self._pairs:
            if self._captures is not None:
                self._captures.leave(pair.number)
            if self._impair is not None:
                self._impair.leave(pair.number)
        with self._telling, self._lock:
            pairs, self._pairs = self._pairs, []
            for pair in pairs:
                self._count(pair, self._totals)
                self._by_ring |= self._count_by_ring(pair)
                lib.pv_net_worker_free(pair.worker)
        return bases

    def _new_worker(self, acked: int, memory: GuestMemory, number: int, rings: list[Vring]) -> Any:
        config = ffi.new("struct pv_net_config *")
        config.log_call = -1
        for ring in rings:
            c = config.ring[ring.index % 2]
            c.size, c.base, c.desc, c.avail, c.used = (
                ring.size,
                ring.base,
                ring.desc,
                ring.avail,
                ring.used,
            )
            c.kick, c.call = ring.kick.fileno(), ring.call.fileno()
            c.inject = ring.call.inject if isinstance(ring.call, Injection) else ffi.NULL
            c.inflight = ring.inflight or ffi.NULL
            c.coalesce_packets, c.coalesce_us = ring.coalesce
            if ring.log is not None:
                config.log, config.log_size = ring.log.bits, ring.log.size
                c.log_used, c.log_addr = ring.log.used is not None, ring.log.used or 0
                if ring.log.call is not None:
                    config.log_call = ring.log.call.fileno()
            if ring.hashing is not None:
                types, key = ring.hashing.types, ring.hashing.key
                lib.pv_flow_hash_init(ffi.addressof(config, "hash"), types, key, len(key))
        fd = self._port.fds[number]
        config.fd = fd.fileno()
        config.cable = fd.c if isinstance(fd, CableEnd) else ffi.NULL
        config.hdr_len, config.first_queue = header_size(acked), 2 * number
        payload = GSO_MAX if acked & GSO else self._port.mtu
        config.max_frame = config.hdr_len + payload + FRAME_EXTRA
        config.poll_us, config.hold_ms = self._poll_us, self._hold_ms
        config.in_exit, config.unbatched = self._in_exit, not self._batch
        config.taken = self._taken(rings)
        config.guest_csum = bool(acked & CSUM)
        config.mrg_rxbuf = bool(acked >> VIRTIO_NET_F_MRG_RXBUF & 1)
        config.in_order = bool(acked >> VIRTIO_F_IN_ORDER & 1)
        config.format.packed = bool(acked >> VIRTIO_F_RING_PACKED & 1)
        config.format.indirect = bool(acked >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        config.format.event_idx = bool(acked >> VIRTIO_RING_F_EVENT_IDX & 1)
        config.event_fd = self._told.fileno()
        config.cpu = -1 if self._worker_cpu is None else self._worker_cpu + number
        config.name = f"{self._port.name[:11]}-{number}".encode()[:15]
        if self._recorder is not None:
            config.trace = self._recorder.ring(f"worker {number}")
        why = ffi.new("struct pv_net_event *")
        worker = lib.pv_net_worker_new(config, memory.c, why)
        if not worker:
            if why.kind == lib.PV_NET_RING_FAULT:
                text = ffi.string(lib.pv_fault_text(why.fault)).decode()
                raise RingFault(f"queue {2 * number + why.queue}: {text}")
            raise HostError(f"cannot start the emulated data path: {os.strerror(why.error)}")
        return worker

    def _taken(self, rings: Sequence[Vring]) -> int:
        """How many frames the tap has taken, for in-flight notes; PV_INFLIGHT_UNCOUNTED if nobody
        needs the number or others send to the tap, too.
        """
        interface = self._port.interface
        if interface is None or len(self._port.fds) != 1 or not any(r.inflight for r in rings):
            return int(lib.PV_INFLIGHT_UNCOUNTED)
        return int(interface.link().stats().get("rx_packets", lib.PV_INFLIGHT_UNCOUNTED))

    def _need_supervisor(self) -> None:
        if self._supervisor is not None:
            return
        name = f"{self._port.name}-events"
        supervisor = Thread(target=self._supervise, name=name, daemon=True)
        try:
            supervisor.start()
        except RuntimeError as e:
            raise _no_thread(str(e)) from e
        self._supervisor = supervisor

    def _supervise(self) -> None:
        """The supervisor's thread: pass on what the workers tell."""
        poll = select.poll()
        poll.register(self._told.fileno(), select.POLLIN)
        while not self._closing:
            poll.poll()
            self._told.drain()
            try:
                self._pass_on()
            except Exception as e:  # nobody else would tell of later events
                report_bug(e)
                self._failed(e)

    def _pass_on(self) -> None:
        """Take all events that are there, and tell whoever has started the data path."""
        event = ffi.new("struct pv_net_event *")
        with self._telling:
            for pair in self._pairs:
                while lib.pv_net_worker_event(pair.worker, event):
                    self._tell(pair, event)

    def _tell(self, pair: _Pair, event: Any) -> None:
        if event.kind == lib.PV_NET_RING_FAULT:
            queue = 2 * pair.number + event.queue
            fault = ffi.string(lib.pv_fault_text(event.fault)).decode()
            self._report(queue, f"queue {queue}: {fault}")
        elif event.kind == lib.PV_NET_LINK_DOWN:
            self._link_lost(pair)
        elif event.kind == lib.PV_NET_LINK_UP:
            if self._events is not None:
                self._events.link(True)
        elif event.kind == lib.PV_NET_NOT_PINNED:
            cpu = (self._worker_cpu or 0) + pair.number
            self._report(-1, f"worker-cpu={cpu}: {os.strerror(event.error)}")
        elif event.kind == lib.PV_NET_STOPPED:
            name = lib.pv_call_name(event.error)
            call = f"{ffi.string(name).decode()}()" if name else f"system call {event.error}"
            problem = f"worker {pair.name} asked for {call}, which it may not have"
            if self._stopped is not None:
                self._stopped(problem)
            else:
                self._report(-1, problem)
        else:
            self._report(-1, f"emulated data path: {os.strerror(event.error)}")

    def _link_lost(self, pair: _Pair) -> None:
        if self._events is not None:
            self._events.link(False)
        with self._lock:
            pair.link_up = False
            if any(p.link_up for p in self._pairs):
                return
        why = self._gone() if self._gone is not None else ""
        if why:
            self._report(-1, why)
        else:
            self._reopener.start()

    def _link_back(self) -> None:
        """The tap has been opened again: give it to the workers."""
        with self._lock:
            for pair in self._pairs:
                pair.link_up = True
                lib.pv_net_worker_attach(pair.worker, self._port.fds[pair.number].fileno())

    def _failed(self, error: Exception) -> None:
        self._report(-1, bug(self.name, error))

    def _report(self, queue: int, problem: str) -> None:
        if self._events is not None:
            self._events.fault(queue, problem)

    def takers(self) -> dict[int, Any]:
        """See ``DataPath``: of the transmit queues, if the vCPUs' threads are to send."""
        if not self._in_exit:
            return {}
        return {2 * p.number + 1: lib.pv_net_worker_taker(p.worker) for p in self._pairs}

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Stop the workers; returns each ring's position, in the order of ``start``."""
        self._reopener.stop()
        for pair in self._pairs:
            now = time.monotonic_ns()
            self.times.asked[2 * pair.number] = now
            if not pair.held:
                self.times.asked[2 * pair.number + 1] = now
            lib.pv_net_worker_stop(pair.worker, finish)
        bases = self._end()
        queues, self._queues = self._queues, []
        return [bases[q] for q in queues]

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Tell the workers, and wait until none has a transmit chain in its hands.

        :raises HostError: a worker does not answer.
        """
        for pair in self._pairs:
            self.times.asked[2 * pair.number + 1] = time.monotonic_ns()
            error = lib.pv_net_worker_hold(pair.worker, ANSWER_MS)
            if error:
                raise HostError(
                    f"the worker of queue pair {pair.number} does not stop transmitting: "
                    f"{os.strerror(-error)}"
                )
            pair.held = True

    def _count(self, pair: _Pair, into: dict[str, int]) -> None:
        """Add the counters of a pair's worker."""
        c = ffi.new("struct pv_net_counters *")
        lib.pv_net_worker_counters(pair.worker, c)
        for name, kind in self._fields:
            value = getattr(c, name)
            if kind == "array":
                for i, n in enumerate(value):
                    key = f"{name}_{1 << i}"
                    into[key] = into.get(key, 0) + n
            else:
                into[name] = into.get(name, 0) + value
        into["worker_cpu_ns"] += self._cpu_ns(pair)

    def _count_by_ring(self, pair: _Pair) -> dict[int, dict[str, int]]:
        """The counters of a pair's worker that belong to one of its rings."""
        c = ffi.new("struct pv_net_counters *")
        lib.pv_net_worker_counters(pair.worker, c)
        return {
            2 * pair.number + way: {
                name[3:]: int(getattr(c, name))
                for name, kind in self._fields
                if name.startswith(prefix) and kind != "array"
            }
            for way, prefix in enumerate(("rx_", "tx_"))
        }

    def _cpu_ns(self, pair: _Pair) -> int:
        """CPU time that a pair's worker has used."""
        return int(lib.pv_net_worker_cpu_ns(pair.worker)) if pair.tid else 0

    def counters(self) -> dict[str, int]:
        """All counters of ``struct pv_net_counters`` (cext/net_worker.h), summed over queue pairs
        and starts.

        ``rx_batch_size_8`` counts batches of 8 to 15 packets. Any thread.
        """
        with self._lock:
            out = dict(self._totals)
            for pair in self._pairs:
                self._count(pair, out)
        return out

    def ring_counters(self) -> dict[int, dict[str, int]]:
        """See ``DataPath``. Any thread."""
        with self._lock:
            out = dict(self._by_ring)
            for pair in self._pairs:
                out |= self._count_by_ring(pair)
        return out

    def positions(self) -> dict[int, int]:
        """See ``DataPath``. Any thread."""
        with self._lock:
            return {
                2 * pair.number + way: int(lib.pv_net_worker_position(pair.worker, way))
                for pair in self._pairs
                for way in (0, 1)
                if pair.tid
            }

    def workers(self) -> list[dict[str, object]]:
        """The threads of the queue pairs in use."""
        with self._lock:
            return [
                {"name": p.name, "tid": p.tid, "cpu_s": self._cpu_ns(p) / 1e9}
                for p in self._pairs
                if p.tid
            ]

    def report(self) -> dict[str, object]:
        """Nothing: there is no other process."""
        return {}

    def cut(self) -> None:
        """Nothing to cut: no other process is asked."""

    def close(self) -> None:
        """Stop, and end the supervisor; all else is lent. A second call does nothing."""
        self.stop()
        self._closing = True
        if self._supervisor is not None:
            self._told.nudge()
            self._supervisor.join()
            self._supervisor = None
        self._told.close()
