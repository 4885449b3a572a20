"""Events of a trace become arrows between lifelines. Each arrow has one event behind it; an event
has one arrow, but for a packet, which has three (``PER_EVENT``).
"""

from __future__ import annotations

import re
import statistics
from collections import Counter

from pyvmm.explain import frames, words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pyvmm.explain.read import Card, Event, Trace

#: Arrows per event of a category. An event of another category has none.
PER_EVENT = {
    "set-up": 1,
    "control": 1,
    "kick": 1,
    "batch": 1,
    "interrupt": 1,
    "packet": 3,
    "fault": 1,
    "kernel": 1,
}
#: Data path -> its lifeline: id, name, and where it is.
PATHS = {
    "emulated": ("worker", "worker", "a thread of pyvmm"),
    "user": ("worker", "worker", "a thread of pyvmm"),
    "vhost-net": ("vhost", "vhost", "a kernel thread"),
    "vhost-user": ("backend", "back-end", "another process"),
    "vhost-vdpa": ("vdpa", "vDPA", "a device"),
}
#: Where a worker is that receives, while the vCPUs' threads send.
SHARED = "its own and the vCPU's thread"
UNKNOWN = ("path", "path", "the data path")
DRIVER, RINGS, KVM, VMM, TAP, HOST = "driver", "rings", "kvm", "vmm", "tap", "host"
FIXED = {
    DRIVER: ("driver", "in the guest"),
    RINGS: ("rings", "guest memory"),
    KVM: ("KVM", "host kernel"),
    VMM: ("VMM", "vCPU, card threads"),
    TAP: ("tap", "network device"),
    HOST: ("host", "network stack"),
}
#: What an arrow shows; the page has a filter for each.
SETUP, PACKETS, CONTROL = "set-up", "packets", "control"
#: Groups of arrows: what a data path does for a packet, and pyvmm sees only of its own worker.
WAKE, TAKE, WRITE, READ, RETURN, PUBLISH, CALL = WORK = (
    "kick: the eventfd wakes the data path",
    "chain taken from the available ring",
    "frame to the tap (writev)",
    "frame from the tap (readv)",
    "chain returned to the used ring",
    "used index published",
    "interrupt: the data path signals the call eventfd",
)
#: The same of a card without worker or without irqfd: seen where they are done.
TAKEN = "kick: the vCPU's thread sends the frames"
RAISED = "interrupt: the data path asks KVM by an ioctl"
#: Faults on demand: those that are done to notifications, and what each deed means.
OF_KICKS, OF_INTERRUPTS = ("hold-kick",), ("hold-irq", "extra-irq")
DEEDS = {
    "loss": "The frame is lost.",
    "duplicate": "The frame comes twice.",
    "reorder": "The frame goes behind the next one.",
    "corrupt": "One bit of the frame is turned over.",
    "delay": "The frame waits.",
    "rate": "The frame waits for tokens of the rate.",
    "full": "The frame is lost: too many wait already.",
    "truncate": "The frame is cut short.",
    "reorder-used": "The chain is returned behind that of a packet that came later.",
    "late-used": "The chain has waited for another packet's in vain, and is returned in order.",
    "hold-irq": "The interrupt of what was used waits.",
    "extra-irq": "The driver gets an interrupt although it has asked for none.",
    "hold-kick": "The kick has woken the worker, which overlooks it for now.",
}
#: What tc counts of a tap, between two looks.
BY_TC = {
    "loss": "lost",
    "full": "lost as too many waited",
    "loss_or_full": "lost, or too many waited",
    "rate": "times no tokens",
    "cleared": "thrown away as they waited",
}
SENDS = (
    "The thread of the vCPU that kicked sends the frames itself, in its exit. Only if it does not "
    "get the worker's lock in time, the worker does."
)
KICKED = re.compile(r"queue (\d{1,4})(?: notify)?$")
DIGITS = re.compile(r"0x[0-9a-f]+|\d+")
SIZE = re.compile(r"(\d+) entries")
Details = list[tuple[str, str, bool]]


class Arrow:
    """One arrow.

    :ivar event: number of the event behind it. :ivar at, dur: microseconds.
    :ivar via: lifelines that it passes. :ivar kind: its colour. :ivar group: its row in the sums.
    :ivar packet: the packet's number, from 1 on per direction, negative for one to the guest; or 0.
    :ivar same: finds the same packet in another trace: direction, length without Ethernet header,
        and how many such packets there were.
    :ivar details: name, value, and whether the value has changed here.
    :ivar ring: of the rings at that moment, for arrows at a virtqueue; or None.
    """

    __slots__ = (
        "at",
        "begins",
        "details",
        "dst",
        "dur",
        "event",
        "flow",
        "group",
        "key",
        "kind",
        "label",
        "packet",
        "ring",
        "same",
        "src",
        "topic",
        "via",
    )

    def __init__(
        self,
        event: Event,
        src: str,
        dst: str,
        label: str,
        *,
        kind: str,
        flow: str,
        group: str,
        via: tuple[str, ...] = (),
        at: float | None = None,
        dur: float = 0.0,
        topic: str = "",
        packet: int = 0,
        same: str = "",
        details: Details | None = None,
        ring: dict[str, Any] | None = None,
    ) -> None:
        self.event, self.src, self.dst, self.via = event.number, src, dst, via
        self.label, self.kind, self.flow, self.group = label, kind, flow, group
        self.at = event.at if at is None else round(at, 3)
        self.dur, self.topic, self.packet, self.same = dur, topic, packet, same
        self.details = details if details is not None else told(event.args)
        self.ring = ring
        #: Whether something new begins: the driver kicks.
        self.begins = kind == "kick" and src == DRIVER
        #: Arrows with the same key are the same but for numbers.
        self.key = (src, dst, kind, topic, DIGITS.sub("#", label.partition(": ")[0]))


class Diagram:
    """The arrows of one card, in the order of time.

    :ivar lifelines: (id, name, where it is), from left to right.
    :ivar headers: (microseconds, text): where a topic or a phase of the run begins.
    :ivar hand_overs: (begin, end, text), microseconds.
    :ivar others: exits that belong to other devices, and are not drawn.
    """

    def __init__(self, trace: Trace, card: Card) -> None:
        self.trace, self.card = trace, card
        self.arrows: list[Arrow] = []
        self.headers: list[tuple[float, str]] = []
        self.hand_overs: list[tuple[float, float, str]] = []
        self.others = 0
        _Maker(self).run()
        used = {arrow.src for arrow in self.arrows} | {arrow.dst for arrow in self.arrows}
        own = [PATHS.get(path, UNKNOWN) for path in card.paths]
        own += [line for line in PATHS.values() if line[0] in used and line not in own]
        if card.worker == "vcpu":
            own = [(*line[:2], SHARED) if line[0] == "worker" else line for line in own]
        mine = list(dict.fromkeys(own))
        self.lifelines = [(id_, *FIXED[id_]) for id_ in (DRIVER, RINGS, KVM, VMM)]
        self.lifelines += mine
        self.lifelines += [(id_, *FIXED[id_]) for id_ in (TAP, HOST)]
        self.seen = used | {via for arrow in self.arrows for via in arrow.via}

    def sums(self) -> list[dict[str, Any]]:
        """Per group of arrows: how many, per packet, and their durations in microseconds."""
        groups: dict[str, list[float]] = {}
        for arrow in self.arrows:
            groups.setdefault(arrow.group, []).append(arrow.dur)
        return [
            {
                "group": group,
                "count": len(durs),
                "median": round(statistics.median(durs), 3),
                "least": min(durs),
                "most": max(durs),
                "total": round(sum(durs), 3),
            }
            for group, durs in groups.items()
        ]

    def packets(self) -> dict[str, int]:
        """Packets per direction."""
        events = {a.event: a.packet for a in self.arrows if a.packet and a.kind == "frame"}
        sent = sum(number > 0 for number in events.values())
        return {"sent": sent, "received": len(events) - sent}

    def elsewhere(self) -> str:
        """Whatever moves packets and is no part of pyvmm; empty if pyvmm moves all of them."""
        path = next((p for p in self.card.paths if p not in ("emulated", "user")), "")
        _, name, where = PATHS.get(path, UNKNOWN)
        return f"{name} ({where})" if path else ""

    def quiet(self) -> str:
        """Says why there is no packet, if there is none; empty if there are some."""
        if any(self.packets().values()):
            return ""
        who = self.elsewhere()
        if not who:
            return "The trace has no packet of this card."
        return (
            f"No event of pyvmm for any packet: the kick's eventfd wakes {who}, which reads "
            "the rings, uses the tap and signals the call eventfd; KVM's irqfd interrupts the "
            "guest. The VMM does nothing, so there is nothing to draw. pyvmm run --trace-kernel "
            "adds what the kernel sees."
        )


def told(args: dict[str, Any]) -> Details:
    """Arguments of an event as details."""
    return [
        (name, ", ".join(value) if isinstance(value, list) else _text(value), False)
        for name, value in args.items()
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _number(args: dict[str, Any], name: str) -> int:
    value = args.get(name, 0)
    return value if isinstance(value, int) else 0


class _Maker:
    """Makes the arrows of one diagram."""

    def __init__(self, diagram: Diagram) -> None:
        self._diagram, self._card = diagram, diagram.card
        self._queues: dict[int, tuple[int, bool]] = {}  # queue -> entries, packed
        self._before: dict[str, str] = {}
        self._select = ""
        self._sent = self._received = 0
        self._used: dict[int, int] = {}
        self._topics: set[str] = set()
        self._modes: list[tuple[float, str]] = [(-1.0, self._card.paths[0])]
        self._workers: list[tuple[float, str]] = [(-1.0, self._card.worker)]
        self._msix: bool | None = None  # None: the trace does not say
        self._exits: dict[float, Event] = {}
        self._irqfd = self._kernel_kicks = self._kernel_calls = False
        self._lengths: Counter[str] = Counter()

    def run(self) -> None:
        events, mine = self._diagram.trace.events, self._card
        own = [e for e in events if e.pid == mine.pid]
        for event in own:
            if event.name.startswith("hand-over: start "):
                self._modes.append((event.at, event.name.removeprefix("hand-over: start ")))
            elif event.name.startswith("hand-over: ") and "worker" in event.args:
                self._workers.append((event.at, str(event.args["worker"])))
        # Whether the kernel has seen the kicks; else the worker's wake-up stands for them.
        self._kernel_kicks = any(e.category == "kernel" and e.name[:5] == "kick:" for e in own)
        self._kernel_calls = any(e.category == "kernel" and e.name[:9] == "interrupt" for e in own)
        others = 0
        for event in events:
            if event.category == "exit":
                self._exits[event.at] = event
                others += 1
        make: dict[str, Callable[[Event], Iterator[Arrow]]] = {
            "set-up": self._access,
            "control": self._control,
            "kick": self._kick,
            "batch": self._batch,
            "interrupt": self._interrupt,
            "packet": self._packet,
            "fault": self._fault,
            "kernel": self._kernel,
        }
        out: list[Arrow] = []
        for event in events:
            if event.category == "phase" and not event.dur:
                self._diagram.headers.append((event.at, f"phase: {event.name.replace('_', ' ')}"))
            elif event.category in make and self._belongs(event):
                if event.category == "set-up" and event.at in self._exits:
                    others -= 1
                out.extend(make[event.category](event))
        out.sort(key=lambda arrow: (arrow.at, arrow.event))
        self._diagram.arrows, self._diagram.others = out, max(others, 0)
        self._diagram.headers.sort(key=lambda header: header[0])

    def _belongs(self, event: Event) -> bool:
        """Whether an event is of this card: on its tracks, or on one of KVM's or of the vCPUs."""
        if event.pid == self._card.pid:
            return True
        cards = self._diagram.trace.cards
        if any(event.pid == card.pid for card in cards):
            return False
        text = f"{event.name} {event.args.get('eventfd', '')} "
        if f"{self._card.name} " in text:
            return True
        return event.category == "control" and not any(f"{c.name} " in text for c in cards)

    def _path(self, at: float) -> str:
        """The lifeline of the data path in force."""
        mode = next(mode for since, mode in reversed(self._modes) if since <= at or since < 0)
        return PATHS.get(mode, UNKNOWN)[0]

    def _vcpu_sends(self, event: Event) -> bool:
        """Whether a kick has the vCPU's thread send: one of a transmit queue, with worker=vcpu."""
        sender = next(w for since, w in reversed(self._workers) if since <= event.at or since < 0)
        found = KICKED.search(event.name)
        queue = int(found[1]) if found else 0
        return sender == "vcpu" and self._path(event.at) == "worker" and queue % 2 == 1

    # --- the control plane ------------------------------------------------------------------------

    def _access(self, event: Event) -> Iterator[Arrow]:
        """The driver reads or writes a register: an exit."""
        way, _, rest = event.name.partition(" ")
        name, _, value = rest.partition(": ")
        meaning = words.register(name)
        topic = meaning.topic
        if topic == words.STATUS and "DRIVER_OK" in value and way == "write":
            topic = words.GO
        if "device_status" in name and way == "write" and value == "0":
            self._msix = None
            self._topics -= {words.STATUS, words.QUEUES, words.GO, words.MSIX, words.CONFIG}
        if topic not in self._topics:
            self._topics.add(topic)
            self._diagram.headers.append((event.at, topic))
        if "queue_select" in name and way == "write":
            self._select = f" of queue {value}"
        if "queue_msix_vector" in name and way == "write":
            self._msix = self._msix or value != "none"  # a virtqueue may do without a vector
        exit_ = self._exits.get(event.at)
        full = f"{name}{self._select}" if "queue_" in name and "select" not in name else name
        before = self._before.get(full)
        details: Details = [("register", full, False), (way, value, before not in (None, value))]
        if before is not None and before != value:
            details.append(("before", before, False))
        if event.args.get("value", value) != value:
            details.append(("value", str(event.args["value"]), False))
        if meaning.clause:
            details.append(("clause", meaning.clause, False))
        if meaning.text:
            details.append(("why", meaning.text, False))
        if exit_ is not None:
            details += [
                (k, _text(exit_.args[k]), False)
                for k in ("address", "size", "reason")
                if k in exit_.args
            ]
        self._before[full] = value
        writes = way == "write"
        yield Arrow(
            event,
            DRIVER if writes else VMM,
            VMM if writes else DRIVER,
            event.name,
            kind="setup" if writes else "read",
            flow=SETUP,
            group=f"register {way} (exit to the VMM)",
            via=(KVM,),
            dur=exit_.dur if exit_ is not None else 0.0,
            topic=topic,
            details=details,
        )

    def _control(self, event: Event) -> Iterator[Arrow]:
        """A step of the control plane."""
        name, path = event.name, self._path(event.at)
        details = told(event.args)
        why = words.step(name)
        if why:
            details.append(("why", why, False))
        src, dst, kind, group, label = VMM, path, "control", "data path started or stopped", name
        at = event.at
        if name.startswith("hand-over"):
            self._hand_over(event)
            src, dst, kind, group = VMM, self._handed(event), "hand-over", "hand-over"
        elif name.startswith("KVM_"):
            self._irqfd = self._irqfd or name == "KVM_IRQFD"
            dst, group = KVM, "ioctl of KVM"
            label = f"{name}: {event.args.get('eventfd') or event.args.get('address') or ''}"
        elif name.startswith("VHOST_"):
            vdpa = name.startswith(("VHOST_VDPA", "VHOST_IOTLB")) or "vdpa" in str(
                event.args.get("device", "")
            )
            only = {PATHS.get(p, UNKNOWN)[0] for p in self._card.paths} & {"vhost", "vdpa"}
            dst = "vdpa" if vdpa or only == {"vdpa"} else "vhost"
            group = "ioctl or message of vhost-vdpa" if dst == "vdpa" else "ioctl of vhost-net"
            label = f"{name}: {_summary(event.args)}"
        elif name.startswith(("send ", "receive ")):
            kind, group = "message", "message of vhost-user"
            src, dst = (VMM, "backend") if name.startswith("send ") else ("backend", VMM)
            label = f"{name.partition(' ')[2]}: {_summary(event.args)}"
        elif name in ("start data path", "stop data path"):
            self._note_queues(event)
        elif "answer" in event.args:
            src, dst, group = DRIVER, VMM, "command of the control queue"
            label = f"control queue: {name}: {event.args['answer']}"
            details.append(("clause", "virtio 5.1.6.5", False))
        elif name == "fault":
            src, dst, kind, group = VMM, DRIVER, "fault", "fault on demand, once"
            label = f"fault on demand: {event.args.get('fault', '')}"
        elif name == "faults by tc":
            src, dst, label = self._by_tc(event)
            kind, group, at = "fault", "faults on demand, by tc", event.at + event.dur
        elif name == "driver's mistake":
            src, dst, kind, group = DRIVER, VMM, "mistake", name
            label = f"mistake: {event.args.get('mistake', '')}"
        yield Arrow(
            event,
            src,
            dst,
            label.removesuffix(": "),
            kind=kind,
            flow=CONTROL,
            group=group,
            at=at,
            dur=event.dur,
            details=details,
        )

    @staticmethod
    def _by_tc(event: Event) -> tuple[str, str, str]:
        """Where tc has done something, between two looks at its counters, and what."""
        args, out = event.args, event.args.get("way") == "tx"
        deeds = ", ".join(
            f"{number} {words}" for name, words in BY_TC.items() if (number := _number(args, name))
        )
        frames = f"{_plural(_number(args, 'frames'), 'frame')} to the {'host' if out else 'guest'}"
        text = f"by tc, within {event.dur / 1e6:.3g} s: of {frames}, {deeds or 'none lost'}"
        return (TAP, HOST, text) if out else (HOST, TAP, text)

    def _hand_over(self, event: Event) -> None:
        if " to " in event.name:
            self._diagram.hand_overs.append((event.at, event.at + event.dur, event.name))

    def _handed(self, event: Event) -> str:
        """The lifeline to which a step of a hand-over belongs."""
        step = event.name.removeprefix("hand-over: ")
        if step.startswith("start "):
            return PATHS.get(step.removeprefix("start "), UNKNOWN)[0]
        if step in ("park", "move"):
            return self._path(event.at)
        if step == "close":
            return PATHS.get(self._modes[max(self._mode_at(event.at) - 1, 0)][1], UNKNOWN)[0]
        if step in ("open", "prepare"):
            later = min(self._mode_at(event.at) + 1, len(self._modes) - 1)
            return PATHS.get(self._modes[later][1], UNKNOWN)[0]
        return VMM

    def _mode_at(self, at: float) -> int:
        return sum(since <= at for since, _ in self._modes) - 1

    def _note_queues(self, event: Event) -> None:
        for name, text in event.args.items():
            match = SIZE.match(str(text))
            number = name.removeprefix("queue ")
            if match and number.isdecimal() and len(number) < 5:
                self._queues[int(number)] = (int(match[1][:6]), "wrap" in str(text))

    def _same(self, out: bool, length: int) -> str:
        """``Arrow.same`` of a packet whose IP packet, or the like, has ``length`` bytes."""
        key = f"{'out' if out else 'in'} {length}"
        self._lengths[key] += 1
        return f"{key} {self._lengths[key]}"

    # --- packets ----------------------------------------------------------------------------------

    def _kick(self, event: Event) -> Iterator[Arrow]:
        """The guest kicks: an exit to the VMM, or a worker that its eventfd wakes. Or the vCPU's
        thread does the worker's part.
        """
        sends = self._vcpu_sends(event)
        if event.pid != self._card.pid:
            control = event.name.endswith("(control)")
            yield Arrow(
                event,
                DRIVER,
                VMM,
                f"kick: {event.name}",
                kind="kick",
                flow=CONTROL if control else PACKETS,
                group=f"kick{' of the control queue' if control else ''}: exit to the VMM",
                via=(KVM,),
                dur=event.dur,
                details=[
                    *told(event.args),
                    ("clause", "virtio 4.1.5.2", False),
                    (
                        "why",
                        "The vCPU stands still until "
                        + (
                            "its thread has sent the frames, in this exit."
                            if sends
                            else "the VMM has added 1 to the eventfd."
                        ),
                        False,
                    ),
                ],
            )
            return
        if sends:
            yield Arrow(
                event,
                VMM,
                self._path(event.at),
                f"{event.name}: the vCPU's thread sends",
                kind="kick",
                flow=PACKETS,
                group=TAKEN,
                details=[
                    *told(event.args),
                    ("why", SENDS, False),
                    ("clause", "virtio 4.1.5.2", False),
                ],
            )
            return
        direct = self._card.notify == "exit"
        why = "KVM" if not direct else "The VMM's vCPU thread"
        src = VMM if direct else KVM if self._kernel_kicks else DRIVER
        yield Arrow(
            event,
            src,
            self._path(event.at),
            f"{event.name} wakes the worker",
            kind="kick",
            flow=PACKETS,
            group=WAKE,
            via=(KVM,) if src == DRIVER else (),
            details=[
                *told(event.args),
                ("why", f"{why} added 1 to the kick eventfd of the queue.", False),
                ("clause", f"virtio 4.1.5.2{'' if direct else '; KVM_IOEVENTFD'}", False),
            ],
        )

    def _packet(self, event: Event) -> Iterator[Arrow]:
        """A packet: a chain is taken, a frame is written or read, the chain returns."""
        args, path = event.args, self._path(event.at)
        queue, length = _number(args, "queue"), _number(args, "length")
        out = queue % 2 == 1
        if out:
            self._sent += 1
        else:
            self._received += 1
        packet = self._sent if out else -self._received
        size, packed = self._queues.get(queue, (0, False))
        head, descriptors = _number(args, "head"), _number(args, "descriptors")
        avail, used = _number(args, "avail_at"), _number(args, "used_at")
        ring: dict[str, Any] = {
            "queue": queue,
            "size": size,
            "packed": packed,
            "avail_at": avail,
            "avail_idx": _number(args, "avail_idx"),
            "used_at": used,
            "head": head,
            "len": 0 if out else length,
            "writes": not out,
            "segments": _list(args, "segments"),
            "descriptors": descriptors,
        }
        data, header = _bytes(args), min(_number(args, "header"), 24)
        same = self._same(out, length - header - 14)
        said, fields = frames.explain(data, header)
        way = "to the host" if out else "to the guest"
        common: Details = [("packet", f"{abs(packet)} {way}, queue {queue}", False)]
        place = _place(avail, size, packed)
        label = f"take {_what(packed)} {head} at {place}: {_plural(descriptors, 'descriptor')}"
        taken, topic = list(common), ""
        if not packed:  # a packed ring has no index of the driver's
            left = (ring["avail_idx"] - avail - 1) & 0xFFFF
            taken.append(("left", f"{_plural(left, 'chain')} available behind this one", not left))
            if not (left or out):
                label += ", the last that is available"
                topic = "last"  # not folded with others, which would hide it
        yield Arrow(
            event,
            RINGS,
            path,
            label,
            kind="ring",
            flow=PACKETS,
            group=TAKE,
            topic=topic,
            packet=packet,
            same=same,
            details=[*taken, ("clause", "virtio 2.8.6" if packed else "virtio 2.7.6", False)],
            ring=ring | {"moment": "taken"},
        )
        frame: Details = [
            *common,
            ("length", f"{length} bytes, {header} of them virtio_net_hdr", False),
            *((name, text, False) for name, text in fields),
        ]
        if args.get("dropped"):
            frame.append(("dropped", "the tap did not take it", True))
        if data:
            frame.append(("bytes", data.hex(), False))
        yield Arrow(
            event,
            path if out else HOST,
            HOST if out else path,
            f"{'writev' if out else 'readv'}: {said}, {length} bytes",
            kind="frame",
            flow=PACKETS,
            group=WRITE if out else READ,
            via=(TAP,),
            dur=event.dur,
            packet=packet,
            same=same,
            details=frame,
        )
        if "used_at" not in args:  # the chain returns later: an event of its own
            return
        yield Arrow(
            event,
            path,
            RINGS,
            f"return {_what(packed)} {head} at {_place(used, size, packed)}: "
            f"{0 if out else length} bytes written",
            kind="ring",
            flow=PACKETS,
            group=RETURN,
            at=event.at + event.dur,
            packet=packet,
            same=same,
            details=[*common, ("clause", "virtio 2.8.7" if packed else "virtio 2.7.8", False)],
            ring=ring | {"moment": "returned"},
        )

    def _fault(self, event: Event) -> Iterator[Arrow]:
        """What the worker does wrong on purpose, where that happens: between worker and tap, or on
        the way of a kick or an interrupt.
        """
        queue, path = _number(event.args, "queue"), self._path(event.at)
        deeds = [text for text in _list(event.args, "deeds") if isinstance(text, str)]
        length = _number(event.args, "length")
        ring: dict[str, Any] | None = None
        if "used_at" in event.args:
            size, packed = self._queues.get(queue, (0, False))
            head, used = _number(event.args, "head"), _number(event.args, "used_at")
            src, dst = path, RINGS
            what = f"return {_what(packed)} {head} at {_place(used, size, packed)}, queue {queue}"
            ring = {
                "moment": "returned",
                "queue": queue,
                "size": size,
                "packed": packed,
                "used_at": used,
                "head": head,
                "len": 0 if queue % 2 else length,
            }
        elif set(deeds) & {*OF_INTERRUPTS}:
            src, dst, what = path, KVM, f"interrupt for queue {queue}"
        elif set(deeds) & {*OF_KICKS}:
            src, dst, what = KVM, path, f"kick of queue {queue}"
        else:
            out = queue % 2 == 1
            src, dst = (path, TAP) if out else (TAP, path)
            what = f"frame {'to the host' if out else 'to the guest'}"
            what += f", {length} bytes" if length else ""
        yield Arrow(
            event,
            src,
            dst,
            f"fault on demand: {', '.join(deeds)}: {what}",
            kind="fault",
            flow=PACKETS,
            group=f"fault on demand: {', '.join(deeds)}"[:100],
            # One deed is not folded with another one.
            topic=", ".join(deeds),
            details=[
                *told(event.args),
                *(("why", DEEDS[deed], False) for deed in deeds if deed in DEEDS),
            ],
            ring=ring,
        )

    def _kernel(self, event: Event) -> Iterator[Arrow]:
        """What the kernel's tracepoints have seen: a kick, a frame at the tap, an interrupt."""
        what, _, rest = event.name.partition(": ")
        path, thread = self._path(event.at), str(event.args.get("thread", ""))
        details, packet, same = told(event.args), 0, ""
        via: tuple[str, ...] = ()
        if what == "kick":
            src, dst, kind, group = DRIVER, KVM, "kick", "kick: KVM signals the ioeventfd"
            label = f"kick of {rest}: KVM finds an ioeventfd"
            why = "KVM adds 1 to the eventfd and goes on with the guest: no exit to the VMM."
            details += [("why", why, False), ("clause", "virtio 4.1.5.2; KVM_IOEVENTFD", False)]
        elif what == "interrupt":
            src, dst, kind, group = KVM, DRIVER, "irq", "interrupt: KVM sends the MSI-X message"
            label = f"interrupt for {rest}: irqfd, MSI-X"
            details.append(("clause", "virtio 4.1.5.3; KVM_IRQFD", False))
        else:
            out = what == "send"
            kind, src, dst = "frame", HOST, TAP
            if out:  # the worker's own arrow ends at the tap's other side already
                src, dst, via = (TAP, HOST, ()) if path == "worker" else (path, HOST, (TAP,))
            group = "frame from the tap to the host" if out else "frame from the host to the tap"
            label = f"{what}: {rest}, by {thread}"
            if path != "worker":  # whose packets are events of their own
                self._sent, self._received = self._sent + out, self._received + (not out)
                packet = self._sent if out else -self._received
                # A frame that the host has received has lost its Ethernet header by then.
                same = self._same(out, _number(event.args, "length") - (0 if out else 14))
        yield Arrow(
            event,
            src,
            dst,
            label,
            kind=kind,
            flow=PACKETS,
            group=group,
            via=via,
            packet=packet,
            same=same,
            details=details,
        )

    def _batch(self, event: Event) -> Iterator[Arrow]:
        """A batch is published: the driver can see its chains."""
        args = event.args
        queue, index = _number(args, "queue"), _number(args, "used_idx")
        chains = _number(args, "chains")
        size, packed = self._queues.get(queue, (0, False))
        details = told(args)
        wants = "the driver wants an interrupt" if args.get("interrupt") else "no interrupt wanted"
        details.append(("decision", wants, False))
        details.append(("clause", "virtio 2.8.21" if packed else "virtio 2.7.8.2, 2.7.7", False))
        before = self._used.get(queue)
        self._used[queue] = index
        yield Arrow(
            event,
            self._path(event.at),
            RINGS,
            f"publish {_plural(chains, 'chain')} of queue {queue}: "
            f"used index {index & 0x7FFF if packed else index}, {wants}",
            kind="publish",
            flow=PACKETS,
            group=PUBLISH,
            at=event.at + event.dur,
            dur=event.dur,
            details=details,
            ring={
                "moment": "published",
                "queue": queue,
                "size": size,
                "packed": packed,
                "used_idx": index,
                "used_before": before,
                "used_event": _number(args, "used_event") if "used_event" in args else None,
            },
        )

    def _interrupt(self, event: Event) -> Iterator[Arrow]:
        """The call eventfd is signalled, or KVM asked by an ioctl."""
        if self._card.interrupt == "ioctl":
            yield self._raised(event)
            return
        how = "irqfd: MSI-X" if self._irqfd else "a thread raises the interrupt line"
        apart = self._irqfd and self._kernel_calls  # KVM's part is an event of its own
        yield Arrow(
            event,
            self._path(event.at),
            KVM if apart else DRIVER,
            f"{event.name}: call eventfd" + ("" if apart else f", {how}"),
            kind="irq",
            flow=PACKETS,
            group=CALL,
            via=() if apart else (KVM,),
            details=[
                *told(event.args),
                ("clause", "virtio 4.1.5.3; KVM_IRQFD", False),
                ("why", "The data path adds 1 to the eventfd; KVM sends the message.", False),
            ],
        )

    def _raised(self, event: Event) -> Arrow:
        """An interrupt by an ioctl of the thread that has moved the frame."""
        msi, line = "KVM_SIGNAL_MSI", "KVM_IRQ_LINE"
        call = f"{msi} or {line}" if self._msix is None else msi if self._msix else line
        clause = "virtio 4.1.5.3" if self._msix else "virtio 4.1.5"
        return Arrow(
            event,
            self._path(event.at),
            DRIVER,
            f"{event.name}: {call}",
            kind="irq",
            flow=PACKETS,
            group=RAISED,
            via=(KVM,),
            details=[
                *told(event.args),
                ("clause", f"{clause}; {call}", False),
                ("why", "The thread that has moved the frame calls KVM for it.", False),
            ],
        )


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _what(packed: bool) -> str:
    return "buffer" if packed else "chain"


def _place(position: int, size: int, packed: bool) -> str:
    """Where in a ring: the entry, for a split ring with the index that counts on and on."""
    if packed:
        return f"[{position & 0x7FFF}]"
    return f"[{position % size}]" if size else f"index {position}"


def _summary(args: dict[str, Any]) -> str:
    """The arguments that fit on an arrow."""
    parts = []
    for name, value in args.items():
        if name in ("returns", "device", "value") and len(args) > 1 and "features" in args:
            continue
        if name in ("returns", "device"):
            continue
        text = ", ".join(value) if isinstance(value, list) else _text(value)
        if name == "descriptors" and isinstance(value, int):
            parts.append(_plural(value, "file descriptor"))
        else:
            parts.append(text if name in ("features", "status") else f"{name} {text}")
    return ", ".join(parts)[:200]


def _list(args: dict[str, Any], name: str) -> list[str]:
    value = args.get(name)
    return value if isinstance(value, list) else []


def _bytes(args: dict[str, Any]) -> bytes:
    text = args.get("bytes", "")
    try:
        return bytes.fromhex(text if isinstance(text, str) else "")[:256]
    except ValueError:
        return b""
