"""The emulated data path: a C worker thread a queue pair between a tap and the rings."""

from __future__ import annotations

import os
import threading
import time

from pyvmm._ext import ffi, lib
from pyvmm.datapath.base import HandOverTimes, by_pair, cpu_ns
from pyvmm.errors import HostError, RingFault
from pyvmm.hostnet.rtnetlink import Reopener
from pyvmm.spec.virtio import VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from pyvmm.spec.virtio_net import (
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_HDR_V1_SIZE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.datapath.base import Frames, PathEvents, Vring
    from pyvmm.kvm.recorder import Scope
    from pyvmm.memory import GuestMemory

RING_FEATURES = (VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_NET_F_MRG_RXBUF)
GSO = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6 | 1 << VIRTIO_NET_F_GUEST_UFO
#: Ethernet header and a VLAN tag, on top of the MTU or of the 64 KiB of a GSO packet.
FRAME_EXTRA = 14 + 4
GSO_MAX = 65535
HOLD_S = 1.0


class _Pair:
    """One queue pair: its worker and the thread that runs it."""

    def __init__(self, worker: Any, number: int) -> None:
        self.worker = worker
        self.number = number
        self.thread: threading.Thread | None = None
        self.link_up = True


class EmulatedNet:
    """Implements ``DataPath`` (datapath.base). ``start``, ``stop`` and ``close`` are called by one
    thread at a time.

    :param port: the tap, lent; the caller programs its queues and offloads before ``start``.
    :param poll_us: a worker looks for work this long, in microseconds, before it sleeps.
    :param worker_cpu: pin worker k to CPU worker_cpu + k.
    :param recorder: for traces, or None.
    :param hold_ms: a frame that was read from the tap waits this long, in milliseconds, for the
        guest to add buffers, and as long from a ``stop(finish=True)`` on; then it is dropped.
    """

    name = "emulated"
    restarts_for_offloads = False

    def __init__(
        self,
        port: Frames,
        *,
        poll_us: int = 0,
        worker_cpu: int | None = None,
        recorder: Scope | None = None,
        hold_ms: int = lib.PV_NET_HOLD_MS,
    ) -> None:
        self.times = HandOverTimes()
        self._port = port
        self._events: PathEvents | None = None
        self._recorder = recorder
        self._poll_us = poll_us
        self._worker_cpu = worker_cpu
        self._hold_ms = hold_ms
        self._pairs: list[_Pair] = []
        self._queues: list[int] = []
        interface = port.interface
        self._reopener = Reopener(
            port.name, interface.reopen if interface is not None else None, self._link_back
        )
        # Guards workers against being freed while their counters are read.
        self._lock = threading.Lock()
        self._fields = [(n, f.type.kind) for n, f in ffi.typeof("struct pv_net_counters").fields]
        self._totals: dict[str, int] = {"link_losses": 0, "ring_faults": 0, "worker_cpu_ns": 0}
        self._totals |= {name: 0 for name, kind in self._fields if kind != "array"}

    def features(self) -> int:
        """What the rings and the tap can honour."""
        return self._port.features() | sum(1 << bit for bit in RING_FEATURES)

    def prepare(self, acked: int, memory: GuestMemory, rings: Sequence[Vring]) -> None:
        """Nothing to agree on."""

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
        started: list[_Pair] = []
        try:
            for number, own in pairs.items():
                started.append(_Pair(self._new_worker(acked, memory, number, own), number))
            with self._lock:
                self._pairs = started
            for pair in started:
                pair.thread = threading.Thread(  # which names itself, in C
                    target=self._run,
                    args=(pair,),
                    name=f"{self._port.name}-{pair.number}",
                    daemon=True,
                )
                pair.thread.start()
        except BaseException as e:
            self._pairs = started
            self.stop()
            if isinstance(e, RuntimeError):
                raise HostError(
                    f"cannot start a network thread: {e}", "raise the limit of processes"
                ) from e
            raise
        self._queues = [ring.index for ring in rings]

    def _new_worker(self, acked: int, memory: GuestMemory, number: int, rings: list[Vring]) -> Any:
        config = ffi.new("struct pv_net_config *")
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
            c.inflight = ring.inflight or ffi.NULL
        config.fd = self._port.fds[number].fileno()
        config.hdr_len = VIRTIO_NET_HDR_V1_SIZE
        payload = GSO_MAX if acked & GSO else self._port.mtu
        config.max_frame = VIRTIO_NET_HDR_V1_SIZE + payload + FRAME_EXTRA
        config.poll_us, config.hold_ms = self._poll_us, self._hold_ms
        config.taken = self._taken(rings)
        config.mrg_rxbuf = bool(acked >> VIRTIO_NET_F_MRG_RXBUF & 1)
        config.indirect = bool(acked >> VIRTIO_RING_F_INDIRECT_DESC & 1)
        config.event_idx = bool(acked >> VIRTIO_RING_F_EVENT_IDX & 1)
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
        """Frames that the tap has counted as taken, for who has in-flight notes to keep and is its
        only sender.
        """
        interface = self._port.interface
        if interface is None or len(self._port.fds) != 1 or not any(r.inflight for r in rings):
            return int(lib.PV_INFLIGHT_UNCOUNTED)
        return int(interface.link().stats().get("rx_packets", lib.PV_INFLIGHT_UNCOUNTED))

    def _run(self, pair: _Pair) -> None:
        if self._worker_cpu is not None:
            try:
                os.sched_setaffinity(0, {self._worker_cpu + pair.number})
            except OSError as e:
                self._report(-1, f"worker-cpu={self._worker_cpu + pair.number}: {e.strerror}")
        now = time.monotonic_ns()
        self.times.began |= {2 * pair.number: now, 2 * pair.number + 1: now}
        try:
            self._serve(pair)
        finally:
            with self._lock:
                self._totals["worker_cpu_ns"] += time.thread_time_ns()

    def _serve(self, pair: _Pair) -> None:
        event = ffi.new("struct pv_net_event *")
        while True:
            lib.pv_net_worker_run(pair.worker, event)
            if event.kind == lib.PV_NET_STOPPED:
                return
            if event.kind == lib.PV_NET_RING_FAULT:
                with self._lock:
                    self._totals["ring_faults"] += 1
                queue = 2 * pair.number + event.queue
                self._report(
                    queue, f"queue {queue}: {ffi.string(lib.pv_fault_text(event.fault)).decode()}"
                )
            elif event.kind == lib.PV_NET_LINK_DOWN:
                self._link_lost(pair)
            elif event.kind == lib.PV_NET_LINK_UP:
                if self._events is not None:
                    self._events.link(True)
            else:
                self._report(-1, f"emulated data path: {os.strerror(event.error)}")
                return

    def _link_lost(self, pair: _Pair) -> None:
        if self._events is not None:
            self._events.link(False)
        with self._lock:
            self._totals["link_losses"] += 1
            pair.link_up = False
            if any(p.link_up for p in self._pairs):
                return
        self._reopener.start()

    def _link_back(self) -> None:
        """The tap has been opened again: give it to the workers."""
        with self._lock:
            for pair in self._pairs:
                pair.link_up = True
                lib.pv_net_worker_attach(pair.worker, self._port.fds[pair.number].fileno())

    def _report(self, queue: int, problem: str) -> None:
        if self._events is not None:
            self._events.fault(queue, problem)

    def _halt(self, finish: bool) -> None:
        pairs = self._pairs
        end = lib.pv_net_worker_finish if finish else lib.pv_net_worker_stop
        for pair in pairs:
            now = time.monotonic_ns()
            self.times.asked[2 * pair.number] = now
            if not lib.pv_net_worker_hold(pair.worker):  # else it has been asked before
                self.times.asked[2 * pair.number + 1] = now
            end(pair.worker)
        for pair in pairs:
            if pair.thread is not None and pair.thread.ident is not None:
                pair.thread.join()

    def stop(self, *, finish: bool = False, patience: float | None = None) -> list[int]:
        """Stop the workers; returns each ring's next available index, in the order of ``start``."""
        self._reopener.stop()
        self._halt(finish)
        bases = {
            2 * pair.number + queue: int(lib.pv_net_worker_base(pair.worker, queue))
            for pair in self._pairs
            for queue in (0, 1)
        }
        with self._lock:
            for pair in self._pairs:
                self._count(pair, self._totals)
                lib.pv_net_worker_free(pair.worker)
            self._pairs = []
        queues, self._queues = self._queues, []
        return [bases[q] for q in queues]

    def stop_transmit(self, *, patience: float | None = None) -> None:
        """Tell the workers, and wait until none has a transmit chain in its hands.

        :raises HostError: one does not answer.
        """
        for pair in self._pairs:
            self.times.asked[2 * pair.number + 1] = time.monotonic_ns()
            until = time.monotonic() + HOLD_S
            while not lib.pv_net_worker_hold(pair.worker):
                if time.monotonic() > until:
                    raise HostError(f"the worker of queue pair {pair.number} does not answer")
                time.sleep(0.0002)

    def _count(self, pair: _Pair, into: dict[str, int]) -> None:
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

    def counters(self) -> dict[str, int]:
        """All counters of ``struct pv_net_counters`` (cext/net_worker.h), summed over queue pairs
        and starts.

        ``rx_batch_size_8`` counts batches of 8 to 15 packets. Any thread.
        """
        with self._lock:
            out = dict(self._totals)
            for pair in self._pairs:
                self._count(pair, out)
                if pair.thread is not None:
                    out["worker_cpu_ns"] += cpu_ns(pair.thread.native_id)
        return out

    def workers(self) -> list[dict[str, object]]:
        """The threads of the queue pairs in use."""
        with self._lock:
            return [
                {
                    "name": p.thread.name,
                    "tid": p.thread.native_id,
                    "cpu_s": cpu_ns(p.thread.native_id) / 1e9,
                }
                for p in self._pairs
                if p.thread is not None
            ]

    def report(self) -> dict[str, object]:
        """Nothing: there is no other process."""
        return {}

    def cut(self) -> None:
        """Nothing to cut: no other process is asked."""

    def close(self) -> None:
        """Stop; all else is lent."""
        self.stop()
