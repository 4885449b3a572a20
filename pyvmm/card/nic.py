"""A network card of a machine: its device, its transport, its host side, and the switch between
data paths.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm.card.capture import CardCaptures
from pyvmm.card.card import Card
from pyvmm.card.handover import HandOver
from pyvmm.card.report import ModeTotals, SwitchReport
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.kvm.inject import Injection
from pyvmm.macs import mac_text
from pyvmm.netopt import Net, check_faults, fault_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.capture.session import Capture, Member
    from pyvmm.card.thread import CardThread
    from pyvmm.card.uplink import Route, Uplink
    from pyvmm.datapath.base import DataPath
    from pyvmm.exits.ledger import Ledger
    from pyvmm.faultopt import FaultRule
    from pyvmm.virtio.mmio import VirtioMmio
    from pyvmm.virtio.net import NetDevice
    from pyvmm.virtio.pci.transport import VirtioPci

KEPT_SWITCHES = 64
#: Seconds that a vhost-user back-end has to be there when it is switched to.
SWITCH_WAIT_S = 2.0
#: Seconds that another process has for each of its parts of a hand-over: the guest's pause.
HANDOVER_S = 2.0


class Nic(Card):
    """A network card of the machine: its device, its transport, its host side, and the hand-over
    between data paths.

    :param uplink: the host side, lent. :param route: the data path to begin with, which ``device``
        owns. :param thread: runs the transitions of ``device``; owned from here on.
    :param lock: the machine's I/O lock. :param ledger: gives the exits so far.
    :param emit: sends an event to the machine's observers; see ``Machine.emit``.
    :ivar name: ``net0``, ``net1``, ...
    :ivar tap_created: whether the tap was made for this card.
    :ivar namespace: pyvmm's own network namespace with the tap in it; None if the user gave a tap.
    :ivar host, guest: IPv4 addresses with prefix length; None if pyvmm did not choose any.
    :ivar net: the card as it was described at the start; see ``mode`` for the mode in force.
    :ivar switches: reports of the latest switches, ``KEPT_SWITCHES`` at most; ``switch_count``
        counts all.
    """

    device: NetDevice

    def __init__(
        self,
        index: int,
        net: Net,
        device: NetDevice,
        transport: VirtioPci | VirtioMmio,
        uplink: Uplink,
        route: Route,
        thread: CardThread,
        lock: threading.RLock,
        ledger: Callable[[], Ledger],
        emit: Callable[..., None],
    ) -> None:
        super().__init__(index, device, transport, thread, lock)
        self.net = net
        self._uplink = uplink
        self._route = route
        self._emit = emit
        #: Whether NIC_RX_FILTER_CHANGED has been sent since the filter was last asked for.
        self.rx_told = False
        self._ledger = ledger
        self.namespace = uplink.namespace
        self.tap = uplink.tap.name if uplink.tap is not None else ""
        self.tap_created = uplink.tap is not None and uplink.tap.created
        self.host: str | None = None
        self.guest: str | None = None
        self.switches: list[SwitchReport] = []
        self.switch_count = 0
        self._switching = threading.Lock()
        self._captures = CardCaptures(device.name, uplink, route)
        self._books = threading.Lock()  # what follows; nothing is waited for under it
        self._modes: dict[str, ModeTotals] = {}
        self._acts: dict[str, int] = {}  # fault_needs_reset and others: how often
        self._serving: DataPath = route.path  # whose counters are not in ``_modes`` yet
        self._since: tuple[int, Ledger | None] = time.monotonic_ns(), None
        device.observe(self)
        uplink.watch(self._no_way_out)

    @property
    def notify(self) -> str:
        """How kicks come: ``ioeventfd`` or ``exit``."""
        return self.net.notify

    @property
    def interrupt(self) -> str:
        """How interrupts are raised: ``irqfd`` or ``ioctl``."""
        return self.net.interrupt

    @property
    def worker(self) -> str:
        """Who sends at the start: ``thread``, or ``vcpu``, the thread of the vCPU that kicks."""
        return self.net.worker

    # --- transitions, in the card's thread --------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug or pull the cable. Any thread but a vCPU's, without the I/O lock.

        :raises PyvmmError: the data path does not start again, or the machine ends.
        """
        self._thread.call(lambda: self.device.set_link(up))

    def announce(self) -> bool:
        """Have the guest announce itself to the network (VIRTIO_NET_F_GUEST_ANNOUNCE); whether its
        driver can. Threads as with ``set_link``.
        """
        return self._thread.call(self.device.announce)

    def cut(self) -> None:
        """The machine ends: no conversation with another process goes on, and none begins. Any
        thread; takes no lock that a conversation holds.
        """
        self._uplink.cut()
        super().cut()

    def close(self) -> None:
        """Wait for a switch that is going on, refuse all others, and end the card's thread. A
        second call does nothing.

        :raises HostError: as ``Card.close``.
        """
        self._over = True
        with self._switching:
            pass
        try:
            super().close()
        finally:
            self._captures.close()

    def stop(self) -> None:
        """As ``Card.stop``; captures have all packets then, and go on without the card."""
        try:
            super().stop()
        finally:
            self._captures.close()

    # --- captures (Captured, of capture.session) --------------------------------------------------

    def facts(self) -> tuple[str, bytes]:
        """The data path and the place of a capture, in words; the MAC address."""
        return self._captures.where(), self.device.mac

    def attach(self, member: Member) -> None:
        """Give a capture packets, from now on. Any thread.

        :raises PyvmmError: the card's data path cannot be captured here.
        """
        self._captures.attach(member)

    def detach(self, member: Member) -> None:
        """End that. Any thread; a second call does nothing."""
        self._captures.detach(member)

    def capture(
        self,
        file: str | int,
        *,
        snaplen: int | None = None,
        filter: str = "",
        queue: int | None = None,
        limit: int | None = None,
    ) -> Capture:
        """Capture the card's packets into a pcapng file, until the object is closed
        (docs/capture.md). Any thread.

        :param file: a path, which is made or emptied; or a descriptor, which the capture owns.
        :param snaplen: bytes to keep of each packet (all). :param filter: an expression of
            pcap-filter(7); it needs libpcap. :param queue: the index of the only virtqueue whose
            packets are wanted (all); not at a tap, where nobody knows it.
        :param limit: bytes to write at most, 2 MiB at least (1 GiB in a regular file, else no
            limit); packets beyond are lost.
        :raises PyvmmError: the card cannot be captured, or the filter is wrong.
        :raises OSError: the file cannot be opened.
        """
        from pyvmm.capture.files import open_private
        from pyvmm.capture.session import SNAPLEN, Capture

        code, snaplen = b"", SNAPLEN if snaplen is None else snaplen
        if filter:
            from pyvmm.capture.bpf import compile_filter

            code = compile_filter(filter, snaplen)
        fd = open_private(file)[0] if isinstance(file, str) else file
        return Capture(
            [self],
            fd,
            snaplen=snaplen,
            code=code,
            expression=filter,
            queue=queue,
            limit=limit,
        )

    @property
    def name_server(self) -> str:
        """The address of a name server in the guest's network; empty if there is none."""
        return self._uplink.name_server

    @property
    def without_internet(self) -> str:
        """Why ``internet=on`` is over, in words; empty else."""
        return self._uplink.ended

    def _no_way_out(self, problem: str) -> None:
        """Tell that the guest's packets go no further than the tap."""
        self._emit("X_PYVMM_INTERNET_LOST", name=self.name, problem=problem)

    # --- faults on demand -------------------------------------------------------------------------

    def fault(self, *rules: str | FaultRule, seed: int | None = None) -> dict[str, object]:
        """Do wrong on purpose what these rules say, and nothing else of that kind, from now on
        (docs/fault-injection.md). Without rules, nothing is done wrong any more.

        Waits for a switch of this card. Any thread but a vCPU's, without the I/O lock.

        :param rules: such as ``"rx loss=10%"``. :param seed: of the random numbers, 0 to 2^64 - 1:
            the same seed and the same frames have the same deeds; None for a random one, or where
            there is none (``seeded``).
        :return: as ``faults``.
        :raises UsageError: they are no rules, or the data path cannot do what they say; nothing has
            changed. :raises HostError: there is no memory, or no libpcap for a filter, or no tc
            for a tap.
        """
        from pyvmm.faultopt import check, of_text, seed_of

        given: list[FaultRule] = []
        for rule in rules:
            given += of_text([rule]) if isinstance(rule, str) else [rule]
        check(given)
        number = seed_of(seed)
        with self._switching:
            if self._over:
                raise HostError(f"{self.name} is being removed")
            net, place = self._route.net, None
            if given:
                check_faults(self.name, net, given, seed)
                place = self._uplink.fault_point(net)
                place.set(given, number)
            for point in self._uplink.fault_points():
                if point is not place:
                    point.set([], 0)
        self._emit("X_PYVMM_FAULTS", name=self.name, rules=[str(rule) for rule in given])
        return self.faults()

    def faults(self) -> dict[str, object]:
        """The rules in force, the seed, how many frames wait, and what was done so far
        (``counters``); for JSON. Any thread but a vCPU's.
        """
        points = self._uplink.fault_points()
        place = self._uplink.ruled_point() or points[0]
        total = ModeTotals()
        for point in points:
            point.look()
            total.count(point.counters())
        return {**place.report(), "counters": {**total.counters, **self._acts}}

    @property
    def seeded(self) -> bool:
        """Whether the same seed and the same frames have the same deeds, on this data path."""
        return fault_place(self._route.net) != "tap"

    @property
    def ready(self) -> bool:
        """Whether a driver has set the card up."""
        return self.device.active

    def act(self, word: str) -> None:
        """Do something once that a driver has to cope with, on any data path. Threads as with
        ``set_link``.

        :param word: one of ``faultopt.ACTS``, such as ``"needs-reset"``.
        :raises UsageError: there is no such word, or no driver that could notice.
        :raises PyvmmError: as ``set_link``.
        """
        from pyvmm.faultopt import check_acts

        check_acts([word])
        if word.startswith("link-"):
            self.set_link(word == "link-up")
        elif not self.ready:
            raise UsageError(f"fault: {word}: no driver has set up {self.name}", "boot a guest")
        elif word == "needs-reset":
            self._thread.call(lambda: self.device.fault(-1, "DEVICE_NEEDS_RESET, on demand"))
        elif word == "config-interrupt":
            self.device.interrupt_in_vain()
        else:
            for q in self.device.queues:
                if q.enabled:
                    (q.kick if word == "kick" else q.call).nudge()
        key = f"fault_{word.replace('-', '_')}"
        with self._books:
            self._acts[key] = self._acts.get(key, 0) + 1
        if self.device.recorder is not None:
            self.device.recorder.step("fault", time.monotonic_ns(), {"fault": word})

    # --- what the device tells (Observer) ---------------------------------------------------------

    def problem_found(self, problem: str) -> None:
        """Tell of a problem that only a reset cures."""
        self._emit("X_PYVMM_NIC_FAULT", name=self.name, problem=problem)

    def rx_changed(self) -> None:
        """Tell that a driver has changed its receive filter: once until somebody looks at it, since
        a driver may change it as often as it likes.
        """
        if not self.rx_told:
            self.rx_told = True
            self._emit("NIC_RX_FILTER_CHANGED", name=self.name, path=f"/machine/{self.name}")

    def driver_gone(self) -> None:
        """Frames that wait on purpose were for that driver, or from it."""
        for point in self._uplink.fault_points():
            point.clear()

    # --- switching --------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """Of the data path in force."""
        return self.device.datapath.name

    def switch(self, to: str | Net) -> SwitchReport:
        """Have another data path move the packets, from where the present one stops; the guest sees
        a pause.

        Waits for another switch of this card. Threads as with ``set_link``.

        :param to: ``MODE[,key=value...]``, with the keys of ``netopt.PATH_KEYS`` as with ``--net``;
            or a ``Net``.
        :return: what happened; also where the new path failed when it was to take over and the old
            one or emulation goes on.
        :raises PyvmmError: nothing has changed: no such mode, it cannot be had, or it lacks
            features that are in use.
        """
        net = self.net.switched(to)
        with self._switching:
            if self._over:
                raise HostError(
                    f"{self.name} is being removed" if self.leaving else "the machine is ending"
                )
            report = SwitchReport(self.name, self.mode, net.mode)
            try:
                self._switch(net, report)
            except PyvmmError as e:
                report.reason = str(e)
                raise
            except OSError as e:  # a back-end's module cannot be loaded without a descriptor
                report.reason = e.strerror or str(e)
                raise HostError(f"cannot switch {self.name}: {report.reason}") from e
            finally:
                self.switch_count += 1
                self.switches = [*self.switches[1 - KEPT_SWITCHES :], report]
                self._record(report, net)
            return report

    def _record(self, report: SwitchReport, net: Net) -> None:
        """Put a switch and its steps into the trace, if there is one."""
        recorder = self.device.recorder
        if recorder is None:
            return
        for step in report.steps:
            name = {"step": step.name}
            recorder.step("hand-over step", step.at_ns, name, end=step.at_ns + step.ns)
        told = report.as_dict()
        keys = ("from", "to", "mode", "outcome", "reason", "gap_ns", "pending", "stale", "exits")
        args = {key: told[key] for key in keys}
        if report.outcome == "switched":
            args["worker"] = net.worker
        recorder.step("hand-over", report.at_ns, args)

    def _switch(self, net: Net, report: SwitchReport) -> None:
        device, mac, old = self.device, self.device.mac, self._route
        if net.mode == "vhost-user" == old.net.mode and net.socket == old.net.socket:
            raise UsageError(
                f"{self.name} is on that vhost-user back-end", "switch to another mode, or socket="
            )
        if net.mode == "vhost-vdpa" == old.net.mode and net.device == old.net.device:
            raise UsageError(f"{self.name} is on that vDPA device", "switch to another mode")
        bound = old.path.bound()
        if bound:
            raise UsageError(
                f"{self.name} cannot leave {old.path.name}: {bound}", "reset the device first"
            )
        active = self._uplink.ruled_point()
        if active is not None:
            check_faults(self.name, net, ())
            if self._uplink.fault_point(net) is not active:
                raise UsageError(
                    f"{self.name} has faults on demand, which {net.mode} has elsewhere",
                    "end them before: pyvmm fault NAME off",
                )
        spare = self._spare if self._uplink.tap is not None else None
        with ExitStack() as undo:
            with report.step("open"):
                new = self._uplink.open(net, mac, SWITCH_WAIT_S)
            undo.callback(new.path.close)
            device.check(new.path)
            with report.step("prepare"):
                rings, acked = self._thread.call(lambda: (device.rings, device.in_force))
                if rings:
                    new.path.prepare(acked, device.memory, rings)
            self._captures.prepare(new)
            undo.callback(self._captures.settle)
            before = self._ledger()
            taking = self._captures.moved
            hand_over = HandOver(device, old, new, spare, report, HANDOVER_S, taking)
            waiting = report.step("wait").begin()

            def job() -> Route:
                waiting.end()
                return hand_over.run()

            self._route = self._thread.call(job)
            self._captures.settle()
            if self._route is new:
                undo.pop_all()
                if fault_place(net) != "worker":
                    self._uplink.faults["worker"].clear()
        after = self._ledger()
        report.exits = {"before": before.total, "after": after.total}
        report.wait_served(self._route.path.times, HANDOVER_S)
        if self._route is not old:
            self._account(after)
            with report.step("close"):
                old.path.close()

    def _spare(self) -> Route:
        return self._uplink.open(Net("emulated", queues=self.net.queues), self.device.mac)

    def _account(self, now: Ledger) -> None:
        """What served is done: what it counted, and the exits meanwhile, belong to its mode."""
        with self._books:
            old, self._serving = self._serving, self.device.datapath
            totals = self._modes.setdefault(old.name, ModeTotals())
            start, ledger = self._since
            totals.add(time.monotonic_ns() - start, ledger, now)
            totals.count(old.counters())
            self._since = time.monotonic_ns(), now

    def by_mode(self) -> dict[str, ModeTotals]:
        """What each mode has done so far; exits are those of the whole machine meanwhile. Any
        thread.
        """
        with self._books:
            out = {name: totals.copy() for name, totals in self._modes.items()}
            now = out.setdefault(self._serving.name, ModeTotals())
            start, before = self._since
            now.add(time.monotonic_ns() - start, before, self._ledger())
            now.count(self._serving.counters())
            return out

    def counters(self) -> dict[str, int]:
        """Of all data paths so far, summed. Any thread. What was done on purpose elsewhere than in
        this process is as ``faults`` has told it last.
        """
        total = ModeTotals()
        with self._books:
            for totals in self._modes.values():
                total.count(totals.counters)
            total.count(self._serving.counters())
        for point in self._uplink.fault_points():
            total.count(point.counters())
        total.count(dict(self._acts))
        return total.counters

    def report(self) -> dict[str, object]:
        """For JSON. Threads as with ``faults``."""
        from pyvmm.virtio.features import names

        for point in self._uplink.fault_points():
            point.look()

        rx = self.device.rx
        modes = self.by_mode()

        return {
            "name": self.name,
            "mode": self.mode,
            "transport": self.net.transport,
            "notify": self.net.notify,
            "interrupt": self.net.interrupt,
            "interrupt_calls": sum(
                q.call.raised for q in self.device.queues if isinstance(q.call, Injection)
            ),
            "mac": mac_text(self.device.mac),
            "tap": self.tap,
            **self._uplink.report(),
            "host": self.host,
            "guest": self.guest,
            "interface": self.device.interface,
            "offered": names(self.device.offered()),
            "negotiated": names(self.device.negotiated),
            "queue_pairs": {"max": self.device.max_pairs, "used": self.device.pairs},
            "rx_filter": {
                "mac": mac_text(self.device.mac),
                "flags": sorted(rx.flags),
                "unicast": [mac_text(a) for a in rx.unicast],
                "multicast": [mac_text(a) for a in rx.multicast],
                "vlans": sorted(rx.vlans),
            },
            "control_commands": self.device.commands,
            "resets": self.device.resets,
            "refused_writes": self.device.refused,
            "driver_mistakes": list(self.device.mistakes),
            "kvm_refusals": self.transport.errors,
            "faults": list(self.device.faults),
            "faults_total": self.device.faults_total,
            "tracebacks": list(self.device.tracebacks),
            "counters": self.counters(),
            **({"fault_rules": faults.report()} if (faults := self._uplink.ruled_point()) else {}),
            "modes": {name: totals.as_dict() for name, totals in modes.items()},
            "switch_count": self.switch_count,
            "switches": [report.as_dict() for report in self.switches],
            "workers": self.device.datapath.workers(),
            **(
                {self.mode.replace("-", "_"): peer}
                if (peer := self.device.datapath.report())
                else {}
            ),
        }
