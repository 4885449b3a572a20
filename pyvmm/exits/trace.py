"""The trace of a run as a file: Trace Event JSON, which ui.perfetto.dev and chrome://tracing read
(docs/trace.md).

The recorder keeps numbers only. This module looks up the names and meanings of registers, features
and messages when the file is written.
"""

from __future__ import annotations

import json
import struct
from collections import deque

from pyvmm import __version__
from pyvmm.bus import PCI_DATA
from pyvmm.datapath.impair import deeds
from pyvmm.exits.phases import phases_of
from pyvmm.kvm.recorder import BATCH, BYTES, EXIT, FAULT, KICK, LATER, PACKET, SEGMENT
from pyvmm.kvm.vcpu import reasons
from pyvmm.spec import pci, virtio
from pyvmm.spec import vhost_user as vu
from pyvmm.spec import virtio_net as vn
from pyvmm.spec import virtio_pci as vp
from pyvmm.spec.virtio_mmio import MMIO_COMMON
from pyvmm.vhostuser.wire import OWN_FEATURES, protocol_names, request_name, unpack_regions
from pyvmm.virtio.features import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any, Protocol

    from pyvmm.card.nic import Nic
    from pyvmm.card.peripheral import Peripheral
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.exits.kernel_trace import KernelEvent
    from pyvmm.kvm.recorder import Event, Recorder

    Args = dict[str, object]
    Kernel = tuple[list[KernelEvent], int]

    class Traced(Protocol):
        """A machine, as a trace sees it: its accounts and its recorder."""

        @property
        def accounts(self) -> MachineAccounts:
            """What the machine has counted."""

        @property
        def recorder(self) -> Recorder | None:
            """The machine's recorder; None without ``trace=``."""

        @property
        def nets(self) -> Sequence[Nic]:
            """The machine's network cards."""

        @property
        def devices(self) -> Sequence[Peripheral]:
            """The machine's other devices."""

        def cmdline(self) -> str:
            """The guest's kernel command line."""


GUEST, VCPUS, KVM, NETS = 1, 2, 3, 10  # process numbers of the tracks; card n is NETS + n
#: Threads of a card; worker k is WORKERS + k, and its packets are on a track of their own.
SETUP, PATH, SWITCHES, KERNEL, BY_TC, WORKERS, PACKETS = 1, 2, 3, 4, 5, 10, 100

STATUS_BITS = {
    virtio.VIRTIO_CONFIG_S_ACKNOWLEDGE: "ACKNOWLEDGE",
    virtio.VIRTIO_CONFIG_S_DRIVER: "DRIVER",
    virtio.VIRTIO_CONFIG_S_FEATURES_OK: "FEATURES_OK",
    virtio.VIRTIO_CONFIG_S_DRIVER_OK: "DRIVER_OK",
    virtio.VIRTIO_CONFIG_S_NEEDS_RESET: "NEEDS_RESET",
    virtio.VIRTIO_CONFIG_S_FAILED: "FAILED",
}
COMMAND_BITS = {
    pci.PCI_COMMAND_IO: "IO",
    pci.PCI_COMMAND_MEMORY: "MEMORY",
    pci.PCI_COMMAND_MASTER: "MASTER",
    pci.PCI_COMMAND_INTX_DISABLE: "INTX_DISABLE",
}
#: Classes of control commands.
CONTROL_CLASSES = ("RX", "MAC", "VLAN", "ANNOUNCE", "MQ", "GUEST_OFFLOADS", "NOTF_COAL", "STATS")
#: Steps of the control plane that are on the track of hand-overs.
HAND_OVER = ("hand-over", "hand-over step")
#: Steps of a card that overlap others, and their tracks.
TRACKS = {**dict.fromkeys(HAND_OVER, SWITCHES), "faults by tc": BY_TC}
#: vhost-user requests by the meaning of their 64-bit value.
VU_FEATURES = (vu.VHOST_USER_GET_FEATURES, vu.VHOST_USER_SET_FEATURES)
VU_PROTOCOL = (vu.VHOST_USER_GET_PROTOCOL_FEATURES, vu.VHOST_USER_SET_PROTOCOL_FEATURES)
VU_FILES = (vu.VHOST_USER_SET_VRING_KICK, vu.VHOST_USER_SET_VRING_CALL, vu.VHOST_USER_SET_VRING_ERR)
#: Request -> (layout of the payload, names of its fields).
VU_LAYOUTS: dict[int, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        (
            vu.VHOST_USER_SET_VRING_NUM,
            vu.VHOST_USER_SET_VRING_BASE,
            vu.VHOST_USER_GET_VRING_BASE,
            vu.VHOST_USER_SET_VRING_ENABLE,
        ),
        (vu.VRING_STATE, ("index", "num")),
    ),
    vu.VHOST_USER_SET_VRING_ADDR: (
        vu.VRING_ADDR,
        ("index", "flags", "desc", "used", "avail", "log"),
    ),
    vu.VHOST_USER_ADD_MEM_REG: (vu.MEM_SINGLE, ("", "guest", "size", "user", "mmap_offset")),
    **dict.fromkeys(
        (vu.VHOST_USER_GET_INFLIGHT_FD, vu.VHOST_USER_SET_INFLIGHT_FD),
        (vu.INFLIGHT, ("mmap_size", "mmap_offset", "queues", "queue_size")),
    ),
}
ADDRESSES = {
    "desc",
    "used",
    "avail",
    "log",
    "guest",
    "user",
    "mmap_offset",
    "address",
    "size",
    "mmap_size",
}


def write(machine: Traced, put: Callable[[bytes], object], kernel: Kernel | None = None) -> None:
    """Write the trace of ``machine``, which was made with ``trace=`` and is not closed yet.

    :param put: called with each piece of the file. Its errors are raised unchanged.
    :param kernel: what ``KernelTrace.stop`` has returned.
    """
    assert machine.recorder is not None
    trace = _Trace(machine, machine.recorder, kernel)
    put(b'{"displayTimeUnit": "ns",\n"traceEvents": [\n')
    separator = ""
    for events in trace.tracks():
        for at in range(0, len(events), 512):
            lines = ",\n".join(json.dumps(event) for event in events[at : at + 512])
            put(f"{separator}{lines}".encode())
            separator = ",\n"
    put(f'\n],\n"otherData": {json.dumps(trace.about())}}}\n'.encode())


def document(machine: Traced, kernel: Kernel | None = None) -> dict[str, Any]:
    """The content of the trace's file, for code that reads it at once. See ``write``."""
    assert machine.recorder is not None
    trace = _Trace(machine, machine.recorder, kernel)
    events = [event for track in trace.tracks() for event in track]
    return {"displayTimeUnit": "ns", "traceEvents": events, "otherData": trace.about()}


def bits_of(value: int, names: dict[int, str]) -> str:
    """The names of the bits in ``value``: ``ACKNOWLEDGE DRIVER``; bits without a name in hex."""
    out = [name for bit, name in names.items() if value & bit]
    rest = value & ~sum(bit for bit in names if value & bit)
    return " ".join([*out, *([hex(rest)] if rest else [])]) or "0"


def feature_text(bits: int) -> str:
    """Feature bits by name."""
    return " ".join(names(bits)) or "none"


def vhost_user_args(request: int, payload: bytes) -> Args:
    """The decoded payload of a vhost-user message."""
    layout = VU_LAYOUTS.get(request)
    if layout is not None and len(payload) == struct.calcsize(layout[0]):
        values = zip(layout[1], struct.unpack(layout[0], payload), strict=True)
        return {name: hex(v) if name in ADDRESSES else v for name, v in values if name}
    if request == vu.VHOST_USER_SET_MEM_TABLE and payload:
        return {
            "regions": [
                {
                    "guest": hex(r.gpa),
                    "size": hex(r.size),
                    "user": hex(r.user),
                    "mmap_offset": hex(r.offset),
                }
                for r in unpack_regions(payload)
            ]
        }
    if len(payload) != 8:
        return {"payload": payload.hex()} if payload else {}
    (value,) = struct.unpack("<Q", payload)
    if request in VU_FEATURES:
        own = sum(1 << bit for bit in OWN_FEATURES)
        words = [name for bit, name in OWN_FEATURES.items() if value >> bit & 1]
        return {"features": " ".join([feature_text(value & ~own), *words])}
    if request in VU_PROTOCOL:
        return {"protocol_features": " ".join(protocol_names(value))}
    if request in VU_FILES:
        return {"index": value & vu.VHOST_USER_VRING_IDX_MASK}
    if request == vu.VHOST_USER_SET_STATUS:
        return {"status": bits_of(value, STATUS_BITS)}
    return {"value": value}


def control_name(request: bytes) -> str:
    """Class and command of a control command, by the kernel's names."""
    if len(request) < 2:
        return "cut off"
    group = next(
        (name for name in CONTROL_CLASSES if getattr(vn, f"VIRTIO_NET_CTRL_{name}") == request[0]),
        None,
    )
    if group is None:
        return f"class {request[0]} command {request[1]}"
    prefix = f"VIRTIO_NET_CTRL_{group}_"
    for name, value in vars(vn).items():
        if name.startswith(prefix) and value == request[1]:
            return f"{group} {name.removeprefix(prefix)}"
    return f"{group} command {request[1]}"


def _how(nic: Nic | Peripheral) -> str:
    """The data paths that a card has had, and the way of its kicks."""
    return f"{', '.join(nic.by_mode())}, notify={nic.notify}"


class _Trace:
    """Makes trace events from the recorded numbers: one list per track, in the order of time."""

    def __init__(self, machine: Traced, recorder: Recorder, kernel: Kernel | None) -> None:
        self._accounts, self._recorder = machine.accounts, recorder
        self._kernel = kernel
        self._all: tuple[Nic | Peripheral, ...] = (*machine.nets, *machine.devices)
        self._cmdline = machine.cmdline()
        self._bus = self._accounts.bus
        self._zero = self._accounts.phases["vmm"]
        self._dropped: dict[str, int] = {}
        #: Bus region -> card, and PCI slot -> card.
        self._parts: dict[int, int] = {}
        self._slots: dict[int, int] = {}
        self._eventfds: dict[int, str] = {}
        for index, nic in enumerate(self._all):
            for region in nic.transport.regions():
                self._parts[region.id] = index
            if nic.slot is not None:
                self._slots[nic.slot] = index
            self._eventfds.update(nic.transport.eventfds())
        self._selects: dict[tuple[int, str], int] = {}  # (region, select register) -> value
        self._cards: list[list[Args]] = [[] for _ in self._all]

    def about(self) -> Args:
        """What a reader has to know about the whole file."""
        return {
            "pyvmm": __version__,
            "clock": "CLOCK_MONOTONIC, from the start of the VMM",
            "cmdline": self._cmdline,
            "cards": [f"{nic.name}: {_how(nic)}" for nic in self._all],
            "nics": [
                {
                    "name": nic.name,
                    "paths": list(nic.by_mode()),
                    "notify": nic.notify,
                    "interrupt": nic.interrupt,
                    "worker": nic.worker,
                }
                for nic in self._all
            ],
            "dropped": self._dropped,
        }

    def tracks(self) -> Iterator[list[Args]]:
        """All events; the metadata comes first."""
        yield self._metadata()
        yield self._phases()
        exits: list[tuple[int, Event]] = []
        for index, vcpu in enumerate(self._accounts.vcpus):
            recorded = self._ring("vcpus", f"vcpu{vcpu.index}")
            exits += [(event.ts, event) for event in recorded]
            yield [self._exit(event, index + 1) for event in recorded]
        exits.sort(key=lambda item: item[0])
        for _, event in exits:
            self._set_up(event)
        for index, events in enumerate(self._cards):
            yield events
            yield from self._workers(index)
        yield from self._steps()
        yield from self._by_kernel()

    def _ring(self, group: str, name: str) -> list[Event]:
        events, dropped = self._recorder.events(group, name)
        if dropped:
            self._dropped[name if group == "vcpus" else f"{group} {name}"] = dropped
        return events

    # --- making events ----------------------------------------------------------------------------

    def _us(self, ns: int) -> float:
        return round((ns - self._zero) / 1000, 3)

    def _span(
        self,
        name: str,
        category: str,
        begin: int,
        dur: int,
        pid: int,
        tid: int,
        args: Args | None = None,
    ) -> Args:
        """A complete event. The end is rounded, not the duration, so that neighbours do not
        overlap.
        """
        ts = self._us(begin)
        dur_us = round(self._us(begin + dur) - ts, 3)
        event: Args = {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": ts,
            "dur": dur_us,
            "pid": pid,
            "tid": tid,
        }
        return event | ({"args": args} if args else {})

    def _moment(
        self, name: str, category: str, at: int, pid: int, tid: int, args: Args | None = None
    ) -> Args:
        event: Args = {
            "name": name,
            "cat": category,
            "ph": "i",
            "s": "t",
            "ts": self._us(at),
            "pid": pid,
            "tid": tid,
        }
        return event | ({"args": args} if args else {})

    def _metadata(self) -> list[Args]:
        processes = {GUEST: "guest", VCPUS: "vCPUs", KVM: "KVM set-up"}
        threads = {(GUEST, 1): "phases", (KVM, 1): "ioeventfds, irqfds, routes"}
        threads |= {
            (VCPUS, i + 1): f"vcpu{v.index}: time in the VMM"
            for i, v in enumerate(self._accounts.vcpus)
        }
        for index, nic in enumerate(self._all):
            pid = NETS + index
            processes[pid] = f"{nic.name} ({_how(nic)})"
            threads[pid, SETUP] = "driver's set-up"
            threads[pid, PATH] = "data path control"
            threads[pid, SWITCHES] = "hand-overs"
            threads[pid, KERNEL] = "kernel: kicks, frames, interrupts"
            threads[pid, BY_TC] = "faults on demand, by tc"
        for group, name in self._recorder.tracks():
            where = self._worker_track(group, name)
            if where:
                threads[where] = f"{name}: batches, kicks, interrupts"
                threads[where[0], where[1] - WORKERS + PACKETS] = f"{name}: packets"
        out: list[Args] = []
        for pid, name in processes.items():
            out.append(
                {
                    "name": "process_name",
                    "ph": "M",
                    "ts": 0,
                    "pid": pid,
                    "tid": 0,
                    "args": {"name": name},
                }
            )
            out.append(
                {
                    "name": "process_sort_index",
                    "ph": "M",
                    "ts": 0,
                    "pid": pid,
                    "tid": 0,
                    "args": {"sort_index": pid},
                }
            )
        for (pid, tid), name in threads.items():
            out.append(
                {
                    "name": "thread_name",
                    "ph": "M",
                    "ts": 0,
                    "pid": pid,
                    "tid": tid,
                    "args": {"name": name},
                }
            )
        return out

    def _worker_track(self, group: str, name: str) -> tuple[int, int] | None:
        for index, nic in enumerate(self._all):
            if group == nic.name:
                return NETS + index, WORKERS + int(name.rpartition(" ")[2])
        return None

    def _phases(self) -> list[Args]:
        events = [
            self._span(p.name, "phase", p.begin, p.end - p.begin, GUEST, 1, dict(p.metrics()))
            for p in phases_of(self._accounts)
        ]
        events += [
            self._moment(name, "phase", at, GUEST, 1) for name, at in self._accounts.phases.items()
        ]
        return sorted(events, key=_order)

    def _exit(self, event: Event, tid: int) -> Args:
        reason = reasons().get(event.reason, f"reason-{event.reason}")
        args: Args = {"reason": reason}
        name = reason
        if event.kind == EXIT and reason in ("io", "mmio"):
            _, _, name = self._bus.describe(event.region, event.reg, event.write)
            name = f"{'write' if event.write else 'read'} {name or 'nobody'}"
            args |= {"address": hex(event.addr), "size": event.size, "value": hex(event.value)}
            if event.count > 1:
                args["elements"] = event.count
        elif event.addr:
            args["detail"] = event.addr
        role = self._bus.role(event.region, event.reg) if event.region else ""
        return self._span(name, "kick" if role else "exit", event.ts, event.dur, VCPUS, tid, args)

    # --- what the driver does ---------------------------------------------------------------------

    def _set_up(self, event: Event) -> None:
        """Put an access to a card's registers on the card's own track, with its meaning."""
        _, register, name = self._bus.describe(event.region, event.reg, event.write)
        if event.region in self._parts:
            card = self._parts[event.region]
            if self._bus.role(event.region, event.reg) == "notify":
                return  # a kick belongs to the traffic
            text = self._meaning(register, event)
        elif event.reg & PCI_DATA and event.reg >> 11 & 31 in self._slots:
            card, text = self._slots[event.reg >> 11 & 31], self._config(event)
        else:
            return
        name = name.removeprefix("pci-config ").removeprefix(f"{self._all[card].name} ")
        args: Args = {"register": register, "value": hex(event.value)}
        if text:
            args["meaning"] = text
        way = "write" if event.write else "read"
        value = text or hex(event.value)
        self._cards[card].append(
            self._moment(f"{way} {name}: {value}", "set-up", event.ts, NETS + card, SETUP, args)
        )

    def _meaning(self, register: str, event: Event) -> str:
        """Of a value in a virtio register: of the common configuration, of a window over MMIO, or
        of the legacy interface, which has no selectors of features.
        """
        register = MMIO_COMMON.get(register, register)
        value, select = event.value, (event.region, f"{register}_select")
        if event.write and register in ("device_feature_select", "driver_feature_select"):
            self._selects[event.region, register] = value
        if register == "device_status":
            return bits_of(value, STATUS_BITS)
        if register in ("device_feature", "driver_feature"):
            return feature_text(value << 32 * min(self._selects.get(select, 0), 4))
        if register in ("queue_msix_vector", "config_msix_vector"):
            return "none" if value == vp.VIRTIO_MSI_NO_VECTOR else f"vector {value}"
        if register in ("queue_size", "num_queues", "queue_select", "queue_enable"):
            return str(value)
        return ""

    def _config(self, event: Event) -> str:
        return (
            bits_of(event.value & 0xFFFF, COMMAND_BITS)
            if event.reg & 0xFF == pci.PCI_COMMAND
            else ""
        )

    # --- the data paths ---------------------------------------------------------------------------

    def _workers(self, index: int) -> Iterator[list[Args]]:
        nic = self._all[index]
        for group, name in self._recorder.tracks():
            where = self._worker_track(group, name) if group == nic.name else None
            if where is None:
                continue
            pair = where[1] - WORKERS
            out: list[Args] = []
            packets: list[Args] = []
            faults: list[Args] = []
            for e in self._ring(group, name):
                queue = 2 * pair + e.reg
                if e.kind == PACKET:
                    packets.append(self._packet(e, queue, where[0], PACKETS + pair))
                elif e.kind in (SEGMENT, BYTES):
                    if packets:  # else the packet's own event has been overwritten
                        _more(packets[-1], e)
                elif e.kind == FAULT:
                    faults.append(self._fault(e, queue, where[0], PACKETS + pair))
                elif e.kind == KICK:
                    out.append(self._moment(f"kick of queue {queue}", "kick", e.ts, *where))
                elif e.kind == BATCH:
                    way = "transmit" if e.reg else "receive"
                    chains = f"{e.count} chain{'s' if e.count > 1 else ''}"
                    args: Args = {
                        "queue": queue,
                        "chains": e.count,
                        "interrupt": bool(e.write),
                        "used_idx": e.value,
                    }
                    if e.reason:
                        args["used_event"] = e.addr
                    out.append(self._span(f"{way} {chains}", "batch", e.ts, e.dur, *where, args))
                    if e.write:
                        out.append(
                            self._moment(
                                f"interrupt for queue {queue}", "interrupt", e.ts + e.dur, *where
                            )
                        )
            yield out
            packets += faults
            yield sorted(packets, key=_order)  # a held frame was read before others were sent

    def _packet(self, e: Event, queue: int, pid: int, tid: int) -> Args:
        """A packet that the worker moved; ``_more`` adds its segments and first bytes."""
        args: Args = {
            "queue": queue,
            "length": e.value,
            "head": e.size,
            "avail_at": e.reason,
            "avail_idx": e.addr,
            "used_at": e.region,
            "descriptors": e.count,
            "segments": [],
            "bytes": "",
        }
        if e.region == LATER:
            del args["used_at"]
        if not e.write:
            args["dropped"] = True
        way = "send" if e.reg else "receive"
        name = f"{way} {e.value} bytes"
        return self._span(name, "packet", e.ts, e.dur, pid, tid, args)

    def _fault(self, e: Event, queue: int, pid: int, tid: int) -> Args:
        """What the worker did wrong on purpose."""
        words = deeds(e.count)
        args: Args = {"queue": queue, "deeds": words}
        if e.value:
            args["length"] = e.value
        if e.write:
            args |= {"head": e.size, "used_at": e.region}
        return self._moment(f"fault: {', '.join(words)}", "fault", e.ts, pid, tid, args)

    def _steps(self) -> Iterator[list[Args]]:
        steps, lost = self._recorder.steps()
        if lost:
            self._dropped["control-plane steps"] = lost
        tracks: dict[tuple[int, int], list[Args]] = {}
        for group, name, begin, end, args in steps:
            pid, tid = KVM, 1
            for index, nic in enumerate(self._all):
                if group == nic.name:
                    pid, tid = NETS + index, TRACKS.get(name, PATH)
            shown, details = self._step(name, args)
            event = self._span(shown, "control", begin, end - begin, pid, tid, details)
            tracks.setdefault((pid, tid), []).append(event)
        for events in tracks.values():
            yield sorted(events, key=_order)

    def _by_kernel(self) -> Iterator[list[Args]]:
        """The kernel's events that belong to a card."""
        if self._kernel is None:
            return
        from pyvmm.exits.kernel_trace import Owners, sees_threads

        events, lost = self._kernel
        if lost:
            self._dropped["kernel"] = lost
        steps = deque(step for step in self._recorder.steps()[0] if step[0] == "kvm")
        taps = {tap: nic.name for nic in self._all if (tap := getattr(nic, "tap", ""))}
        threads = {tid for vcpu in self._accounts.vcpus for tid in vcpu.threads}
        owners = Owners(self._eventfds, taps, threads if sees_threads() else None)
        numbers = {nic.name: index for index, nic in enumerate(self._all)}
        tracks: dict[int, list[Args]] = {}
        for e in events:
            while steps and steps[0][2] <= e.at:
                step = steps.popleft()
                owners.note(step[1], step[4])
            card, text = owners.of(e)
            if card not in numbers:
                continue
            args: Args = {"thread": e.thread, "tracepoint": e.event, **e.args()}
            pid = NETS + numbers[card]
            moment = self._moment(text, "kernel", e.at, pid, KERNEL, args)
            tracks.setdefault(pid, []).append(moment)
        yield from tracks.values()

    def _step(self, name: str, args: dict[str, Any]) -> tuple[str, Args]:
        """Name and arguments of a step, decoded."""
        if name.startswith("vhost-user "):
            said = vhost_user_args(args["request"], args["payload"])
            more = {"descriptors": args["descriptors"]} if args["descriptors"] else {}
            return (
                f"{name.removeprefix('vhost-user ')} {request_name(args['request'])}",
                said | more,
            )
        if name == "control command":
            request = args["request"]
            data = request[2:34].hex()
            return control_name(request), {"data": data, "answer": "OK" if args["good"] else "ERR"}
        if name == "hand-over step":
            return f"hand-over: {args['step']}", args
        if name == "hand-over":
            return f"hand-over: {args['from']} to {args['to']}", args
        if name == "start":
            rings: Args = {
                f"queue {r.index}": (
                    f"{r.size} entries, desc {r.desc:#x} avail {r.avail:#x} used {r.used:#x}, "
                    f"base {r.format.words(r.base)}"
                )
                for r in args["rings"]
            }
            return "start data path", rings
        if name == "stop":
            return "stop data path", {"bases": str(args["bases"])}
        if name.endswith("_STATUS"):
            return name, {**args, "status": bits_of(args["value"], STATUS_BITS)}
        if name.endswith("_BACKEND_FEATURES"):
            return name, {**args, "value": hex(args["value"])}
        if name.endswith("_FEATURES"):
            return name, {
                **args,
                "value": hex(args["value"]),
                "features": feature_text(args["value"]),
            }
        out: Args = {}
        for key, value in args.items():
            if key in ("eventfd", "fd") and value in self._eventfds:
                out[key] = f"{value} ({self._eventfds[value]})"
            elif (
                isinstance(value, int)
                and not isinstance(value, bool)
                and (key == "data" or "addr" in key)
            ):
                out[key] = hex(value)
            else:
                out[key] = str(value) if isinstance(value, list) else value
        return name, out


def _more(packet: dict[str, Any], e: Event) -> None:
    """Add a segment, or bytes, to the arguments of their packet."""
    args = packet["args"]
    if e.kind == SEGMENT:
        args["segments"].append(f"{e.addr:#x}+{e.value}")
    else:
        args["bytes"] = f"{args['bytes']}{e.bytes.hex()}"
        args["header"] = e.header


def _order(event: dict[str, Any]) -> tuple[float, float]:
    """The sort key: by time; if two events begin together, the outer one comes first."""
    return event["ts"], -event.get("dur", 0)
