"""What the kernel does for a machine's cards: kicks, frames and interrupts, by its tracepoints.

With vhost-net, vhost-user and vhost-vdpa no packet wakes pyvmm, so its own trace has none. KVM and
the network stack have tracepoints. They are read from a tracing instance of our own, whose clock is
that of the trace (CLOCK_MONOTONIC), so they cost nobody else anything.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.fd import Closing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import Any

TRACEFS = Path("/sys/kernel/tracing")
#: Kilobytes per CPU; an event takes about 60 bytes.
BUFFER_KB = 8192
KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")
#: Event -> its filter; a write of 2 bytes is all that a driver does at a legacy card's kick port.
#: An ioeventfd for writes of any length is on KVM's fast bus, where Intel's EPT and TDX look first
#: (handle_ept_misconfig()), and then tell ``kvm_fast_mmio`` alone.
KICK_EVENTS = {"kvm_mmio": "", "kvm_fast_mmio": "", "kvm_pio": "rw == 1 && size == 2"}
#: An irqfd sends most messages on a fast path without ``kvm_msi_set_irq``; all reach a local APIC.
KVM_EVENTS = {**KICK_EVENTS, "kvm_apic_accept_irq": ""}
#: In kernels since 4.15 only.
OPTIONAL = ("kvm_fast_mmio",)
NET_EVENTS = ("netif_receive_skb", "net_dev_start_xmit")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PID_NAMESPACE_INIT = 0xEFFFFFFC  # PROC_PID_INIT_INO, linux/proc_ns.h
#: A machine of KVM's, in its debugfs: process and descriptor.
MACHINE = re.compile(r"\d+-\d+")
#: A line of the file ``trace``: thread, CPU, flags, seconds, event, fields.
LINE = re.compile(r"\s*(.+)-(\d+)\s+\[\d+\]\s+\S+\s+(\d+)\.(\d{6}): (\w+): (.*)")
WRITTEN = re.compile(r"entries-in-buffer/entries-written: (\d+)/(\d+)")
KICKS = {
    "kvm_mmio": re.compile(r"mmio write len \d+ gpa (0x[0-9a-f]+) val (0x[0-9a-f]+)"),
    "kvm_fast_mmio": re.compile(r"fast mmio at gpa (0x[0-9a-f]+)()"),
    "kvm_pio": re.compile(r"pio_write at (0x[0-9a-f]+) size \d+ count \d+ val (0x[0-9a-f]+)"),
}
ACCEPT = re.compile(r"apicid ([0-9a-f]+) vec (\d+) ")
FRAME = re.compile(r"dev=(\S+) .*\blen=(\d+)")


class KernelEvent:
    """One event of the kernel.

    :ivar at: CLOCK_MONOTONIC in ns, exact to a microsecond. :ivar thread: its name and number;
        ``tid``: the number. :ivar event: the tracepoint.
    :ivar key: of a kick the address; of ``kvm_apic_accept_irq`` the APIC and the vector; of a frame
        the interface. :ivar length: of a frame, in bytes. :ivar value: of a kick; None: unknown.
    """

    __slots__ = ("at", "event", "key", "length", "thread", "tid", "value")

    def __init__(
        self,
        at: int,
        thread: str,
        event: str,
        key: object,
        length: int = 0,
        *,
        tid: int = 0,
        value: int | None = None,
    ) -> None:
        self.at, self.thread, self.event, self.key, self.length = at, thread, event, key, length
        self.tid, self.value = tid, value

    def args(self) -> dict[str, object]:
        """For the trace."""
        if self.event in KICK_EVENTS:
            return {"address": hex(self.key) if isinstance(self.key, int) else ""}
        if self.event in NET_EVENTS:
            return {"tap": str(self.key), "length": self.length}
        return {}


def parse(text: str) -> tuple[list[KernelEvent], int]:
    """The events of a ``trace`` file in its order, and the number of older ones that were lost."""
    out = []
    found = WRITTEN.search(text)
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        name, pid, seconds, us, event, fields = match.groups()
        at = int(seconds) * 1_000_000_000 + int(us) * 1000
        thread = f"{name} ({pid})"
        if event in KICKS:
            if kick := KICKS[event].match(fields):
                value = int(kick[2], 16) if kick[2] else None
                key, tid = int(kick[1], 16), int(pid)
                out.append(KernelEvent(at, thread, event, key, tid=tid, value=value))
        elif event == "kvm_apic_accept_irq":
            if found_irq := ACCEPT.match(fields):
                irq = int(found_irq[1], 16), int(found_irq[2])
                out.append(KernelEvent(at, thread, event, irq))
        elif event in NET_EVENTS and (frame := FRAME.match(fields)):
            out.append(KernelEvent(at, thread, event, frame[1], int(frame[2])))
    return out, max(int(found[2]) - int(found[1]), 0) if found else 0


class Owners:
    """Says to whom an event of the kernel belongs, by the ioeventfds, routes and irqfds of that
    time. Interrupts and frames may be those of another machine (docs/explain.md).

    :param eventfds: what each eventfd is for, such as ``net0 queue 1 kick``.
    :param taps: interface -> card.
    :param threads: of the vCPUs: kicks of others are another machine's. None: of all threads.
    """

    def __init__(
        self,
        eventfds: Mapping[int, str],
        taps: Mapping[str, str],
        threads: Collection[int] | None = None,
    ) -> None:
        self._eventfds, self._taps, self._threads = eventfds, taps, threads
        #: Address, and value if it matters -> whose eventfd.
        self._kicks: dict[tuple[object, int | None], str] = {}
        self._routes: dict[int, tuple[int, int]] = {}  # GSI -> message address and vector
        self._calls: dict[int, str] = {}  # GSI -> whose eventfd

    def note(self, step: str, args: Mapping[str, Any]) -> None:
        """A step of KVM's set-up, as the recorder has it."""
        whose = self._eventfds.get(args.get("eventfd", -1), "")
        if step == "KVM_IOEVENTFD" and args["assign"]:
            self._kicks[args["address"], args.get("value")] = whose
        elif step == "KVM_SET_GSI_ROUTING" and "data" in args:
            self._routes[args["gsi"]] = (args["address"], args["data"] & 0xFF)
        elif step == "KVM_IRQFD":
            self._calls[args["gsi"]] = whose if args["assign"] else ""

    def of(self, event: KernelEvent) -> tuple[str, str]:
        """The card, or nothing, and the event in words."""
        if event.event in NET_EVENTS:
            way = "send" if event.event == NET_EVENTS[0] else "receive"
            return self._taps.get(str(event.key), ""), f"{way}: {event.length} bytes"
        if event.event in KICK_EVENTS:
            whose, what = self._kick(event), "kick"
        else:
            whose, what = self._interrupt(event.key), "interrupt"
        card, _, rest = whose.partition(" ")
        return card, f"{what}: {rest.removesuffix(' kick').removesuffix(' call')}"

    def _kick(self, event: KernelEvent) -> str:
        """Whose ioeventfd a vCPU has written to."""
        if self._threads is not None and event.tid not in self._threads:
            return ""
        return self._kicks.get((event.key, None)) or self._kicks.get((event.key, event.value), "")

    def _interrupt(self, key: object) -> str:
        """Whose message an APIC has got. Vectors are those of a CPU: with several, the destination
        in the message's address decides (Intel SDM 3A, 11.11.1).
        """
        apic, vector = key if isinstance(key, tuple) else (0, 0)
        found = [
            (address, self._calls[gsi])
            for gsi, (address, wanted) in self._routes.items()
            if wanted == vector and self._calls.get(gsi)
        ]
        for address, whose in found:
            destination, logical = address >> 12 & 0xFF, address >> 2 & 1
            if len(found) == 1 or destination == (1 << apic if logical else apic):
                return whose
        return ""


class KernelTrace(Closing):
    """Traces from now on until ``stop``. Owns its tracing instance.

    :param taps: names of the interfaces whose frames are traced.
    :raises HostError: no tracefs, or no permission.
    """

    def __init__(self, taps: Sequence[str]) -> None:
        self._dir = TRACEFS / "instances" / f"{_prefix()}{os.getpid()}"
        names = [name for name in taps if name and '"' not in name]
        _remove_orphans()
        try:
            self._dir.mkdir()
            (self._dir / "trace_clock").write_text("mono")
            (self._dir / "buffer_size_kb").write_text(str(BUFFER_KB))
            for event, wanted in KVM_EVENTS.items():
                place = self._dir / "events/kvm" / event
                if event in OPTIONAL and not place.exists():
                    continue
                if wanted:
                    (place / "filter").write_text(wanted)
                (place / "enable").write_text("1")
            for event in NET_EVENTS if names else ():
                place = self._dir / "events/net" / event
                wanted = " || ".join(f'name == "{name}"' for name in names)
                (place / "filter").write_text(wanted)
                (place / "enable").write_text("1")
        except OSError as e:
            self.close()
            raise HostError(
                f"--trace-kernel: no tracepoints: {e.strerror}", "be root, with tracefs mounted"
            ) from e

    def stop(self) -> tuple[list[KernelEvent], int]:
        """End; returns the events in the order of time, and how many older ones were lost.

        :raises HostError: they cannot be read.
        """
        try:
            (self._dir / "tracing_on").write_text("0")
            events, lost = parse((self._dir / "trace").read_text(errors="replace"))
        except OSError as e:
            raise HostError(f"--trace-kernel: cannot read the trace: {e.strerror}") from e
        finally:
            self.close()
        return sorted(events, key=lambda e: e.at), lost

    def close(self) -> None:
        """Remove the instance. A second call does nothing."""
        _remove(self._dir)


def _remove(instance: Path) -> None:
    try:
        (instance / "events/enable").write_text("0")
        instance.rmdir()
    except OSError:
        pass


def _prefix() -> str:
    """What the names of our instances begin with: a process number is one of a PID namespace."""
    return f"pyvmm-{PID_NAMESPACE.stat().st_ino}-"


def _remove_orphans() -> None:
    """Remove the instances of runs that were killed: nothing else ends these. Those of other PID
    namespaces stay, as their processes cannot be seen.
    """
    for instance in TRACEFS.glob(f"instances/{_prefix()}[0-9]*"):
        if not Path("/proc", instance.name.removeprefix(_prefix())).exists():
            _remove(instance)


def sees_threads() -> bool:
    """Whether the kernel's numbers of threads are those that we see."""
    return PID_NAMESPACE.stat().st_ino == PID_NAMESPACE_INIT


def other_machines() -> int:
    """How many virtual machines KVM has but for this process's; 0 if that cannot be known."""
    try:
        machines = [place.name for place in KVM_DEBUGFS.iterdir() if MACHINE.match(place.name)]
    except OSError:
        return 0
    return sum(not name.startswith(f"{os.getpid()}-") for name in machines)
