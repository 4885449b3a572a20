"""A network card of a machine: its device, its transport, what of it belongs to no data path, and
the switch between them.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.netopt import Net, mac_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backend.process import BackendProcess
    from pyvmm.card.report import SwitchReport
    from pyvmm.datapath.base import DataPath
    from pyvmm.exits.ledger import Ledger
    from pyvmm.hostnet.tap import Tap
    from pyvmm.kvm.recorder import Scope
    from pyvmm.virtio.net import NetDevice
    from pyvmm.virtio.pci import VirtioPci

OWN_BACKEND = "pyvmm's own back-end"  # in place of a socket's path
KEPT_SWITCHES = 64
#: Seconds that a vhost-user back-end has to be there when it is switched to.
SWITCH_WAIT_S = 2.0
#: Seconds that another process has for its part of a hand-over, under the I/O lock.
HANDOVER_S = 2.0
#: Frames that may wait in a tap of ours whose data path may be switched: a gap's worth, and what
#: vhost gives back.
SWITCH_TXQUEUELEN = 10000


class Outside:
    """What of a card belongs to no data path but is lent to whichever runs: the tap, and a
    vhost-user back-end of our own on it.

    :ivar tap: None where only a vhost-user back-end has one.
    :ivar namespace: pyvmm's own network namespace with the tap in it; None where the user gave a
        tap.
    """

    def __init__(self, net: Net, host: str | None, recorder: Scope | None = None) -> None:
        self.tap: Tap | None = None
        self._recorder = recorder
        self.namespace: Any = None
        self._backend: BackendProcess | None = None
        if not net.has_tap:
            return
        from pyvmm.hostnet.tap import TXQUEUELEN, Tap

        frames = SWITCH_TXQUEUELEN if net.switchable else TXQUEUELEN
        if net.tap is None:
            from pyvmm.hostnet.netns import Namespace

            self.namespace = Namespace(
                address=host, mtu=net.mtu, queues=net.queues, txqueuelen=frames
            )
            self.tap = self.namespace.tap
        else:
            self.tap = Tap(net.tap, address=host, mtu=net.mtu, queues=net.queues, txqueuelen=frames)

    def open(self, net: Net, mac: bytes, wait: float = 10.0) -> DataPath:
        """A data path for ``net.mode``. The only place where a mode becomes an object.

        :param wait: seconds for a vhost-user back-end to be there.
        """
        if net.mode == "vhost-user":
            from pyvmm.datapath.vhost_user import VhostUserNet

            common: dict[str, Any] = {
                "queues": net.queues,
                "mtu": net.mtu,
                "mac": mac,
                "recorder": self._recorder,
            }
            if net.socket:
                return VhostUserNet(net.socket, server=net.server, wait=wait, **common)
            tap = self._need_tap(net)
            if self._backend is None:
                from pyvmm.backend.process import BackendProcess

                self._backend = BackendProcess(tap)
            dial = self._backend.dial
            return VhostUserNet(OWN_BACKEND, port=tap, dial=dial, **common)
        tap = self._need_tap(net)
        if net.mode == "vhost-net":
            from pyvmm.datapath.vhost_device import Vhost
            from pyvmm.datapath.vhost_net import VhostNet

            with ExitStack() as undo:
                devices = []
                for _ in range(net.queues):
                    devices.append(Vhost(recorder=self._recorder))
                    undo.callback(devices[-1].close)
                path = VhostNet(tap, devices, worker_cpu=net.worker_cpu)
                undo.pop_all()
                return path
        from pyvmm.datapath.emulated import EmulatedNet

        emulated = EmulatedNet(tap, poll_us=net.poll, worker_cpu=net.worker_cpu)
        emulated.recorder = self._recorder
        return emulated

    def _need_tap(self, net: Net) -> Tap:
        if self.tap is None:
            raise UsageError(
                f"{net.mode} needs a tap, and this card has none", "start it with switchable="
            )
        return self.tap

    def close(self) -> None:
        """Release them. A second call does nothing."""
        for one in (self._backend, self.tap, self.namespace):
            if one is not None:
                one.close()


class Stretch:
    """What one mode has done for a card so far, over all the times that it was in force."""

    def __init__(self) -> None:
        self.times = 0
        self.ns = 0
        self.exits = 0
        self.by_device: dict[str, int] = {}
        self.counters: dict[str, int] = {}

    def add(self, ns: int, before: Ledger | None, after: Ledger) -> None:
        """One time more, between two looks at the ledger (None: since the start)."""
        self.times += 1
        self.ns += ns
        self.exits += after.total - (before.total if before is not None else 0)
        old = before.by_device() if before is not None else {}
        for device, count in after.by_device().items():
            if count > old.get(device, 0):
                self.by_device[device] = self.by_device.get(device, 0) + count - old.get(device, 0)

    def count(self, counters: dict[str, int]) -> None:
        """Add the counters of a data path that is done."""
        for name, value in counters.items():
            self.counters[name] = self.counters.get(name, 0) + value

    def copy(self) -> Stretch:
        """For adding to it what is not over yet."""
        other = Stretch()
        other.times, other.ns, other.exits = self.times, self.ns, self.exits
        other.by_device, other.counters = dict(self.by_device), dict(self.counters)
        return other

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "times": self.times,
            "seconds": round(self.ns / 1e9, 6),
            "exits": {"kvm_run_returns": self.exits, "by_device": self.by_device},
            "counters": self.counters,
        }


class Nic:
    """A network card of the machine: its device, its transport, its outside and what the host side
    is called.

    :ivar namespace: pyvmm's own network namespace with the tap in it; None where the user gave a
        tap.
    :ivar host, guest: IPv4 addresses with prefix length; None where pyvmm did not choose any.
    :ivar net: as it was described; ``mode`` is the data path's now.
    :ivar switches: reports of the latest switches, ``KEPT_SWITCHES`` at most; ``switch_count``
        counts all.
    """

    def __init__(
        self,
        index: int,
        net: Net,
        device: NetDevice,
        transport: VirtioPci,
        outside: Outside,
        lock: threading.RLock,
        ledger: Callable[[], Ledger],
    ) -> None:
        self.index, self.net, self.device, self.transport = index, net, device, transport
        self._outside = outside
        self._lock = lock  # the machine's: device code runs under it
        #: Whether NIC_RX_FILTER_CHANGED has been sent since the filter was last asked for.
        self.rx_told = False
        self._ledger = ledger
        self.namespace = outside.namespace
        self.tap = outside.tap.name if outside.tap is not None else ""
        self.host: str | None = None
        self.guest: str | None = None
        self.switches: list[SwitchReport] = []
        self.switch_count = 0
        self._switching = threading.Lock()
        self._over = False
        self._books = threading.Lock()  # what follows; nothing is waited for under it
        self._modes: dict[str, Stretch] = {}
        self._serving: DataPath = device.datapath  # whose counters are not in ``_modes`` yet
        self._since: tuple[int, Ledger | None] = time.monotonic_ns(), None

    @property
    def name(self) -> str:
        """``net0``, ``net1``, ..."""
        return self.device.name

    def set_link(self, up: bool) -> None:
        """Plug or pull the cable. Any thread but a vCPU's.

        :raises PyvmmError: the data path does not start again.
        """
        with self._lock:
            self.device.set_link(up)

    def announce(self) -> bool:
        """Have the guest announce itself to the network (VIRTIO_NET_F_GUEST_ANNOUNCE); whether its
        driver can.
        """
        with self._lock:
            return self.device.announce()

    @property
    def mode(self) -> str:
        """Of the data path in force."""
        return self.device.datapath.name

    def switch(self, to: str | Net) -> SwitchReport:
        """Have another data path move the packets, from where the present one stops; the guest sees
        a pause.

        Waits for another switch of this card. Any thread but a vCPU's.

        :param to: ``MODE[,key=value...]``, keys ``poll``, ``worker-cpu``, ``socket``, ``server`` as
            with ``--net``; or a ``Net``.
        :return: what happened; also where the new path failed when it was to take over and the old
            one or emulation goes on.
        :raises PyvmmError: nothing has changed: no such mode, it cannot be had, or it lacks
            features that are in use.
        """
        from pyvmm.card.report import SwitchReport

        net = self.net.switched(to)
        with self._switching:
            if self._over:
                raise HostError("the machine is ending")
            report = SwitchReport(self.name, self.mode, net.mode)
            try:
                self._switch(net, report)
            except PyvmmError as e:
                report.reason = str(e)
                raise
            except OSError as e:  # not even a module can be loaded without a descriptor
                report.reason = e.strerror or str(e)
                raise HostError(f"cannot switch {self.name}: {report.reason}") from e
            finally:
                self.switch_count += 1
                self.switches = [*self.switches[1 - KEPT_SWITCHES :], report]
            return report

    def _switch(self, net: Net, report: SwitchReport) -> None:
        device, mac = self.device, self.device.mac
        old, spare = device.datapath, self._spare if self._outside.tap is not None else None
        if net.mode == "vhost-user" and (net.socket or OWN_BACKEND) == getattr(old, "path", None):
            raise UsageError(
                f"{self.name} is on that vhost-user back-end", "switch to another mode, or socket="
            )
        with ExitStack() as undo:
            with report.step("open"):
                new = self._outside.open(net, mac, SWITCH_WAIT_S)
            undo.callback(new.close)
            device.check(new)
            with report.step("prepare"):
                rings = device.rings
                if rings:
                    new.prepare(device.in_force, device.memory, rings)
            before = self._ledger()
            patience = {path: path.timeout for path in (old, new)}
            for path in patience:
                path.timeout = min(path.timeout, HANDOVER_S)
            with report.step("lock"):
                self._lock.acquire()
            try:
                device.switch(new, report, spare)
            finally:
                self._lock.release()
                for path, seconds in patience.items():
                    path.timeout = seconds
                if device.datapath is not new:
                    undo.close()
                undo.pop_all()
        after = self._ledger()
        report.exits = {"before": before.total, "after": after.total}
        used = device.datapath
        until = time.monotonic() + HANDOVER_S
        while not set(report.rings) <= set(used.marks.began) and time.monotonic() < until:
            time.sleep(0.0005)  # a worker's thread is yet to run
        report.served(used.marks.began)
        if used is not old:
            self._account(after)
            with report.step("close"):
                old.close()

    def _spare(self) -> DataPath:
        return self._outside.open(Net("emulated", queues=self.net.queues), self.device.mac)

    def _account(self, now: Ledger) -> None:
        """What served is done: what it counted, and the exits meanwhile, belong to its mode."""
        with self._books:
            old, self._serving = self._serving, self.device.datapath
            counters = old.counters()
            counters.pop("connected", None)  # a state, no count
            stretch = self._modes.setdefault(old.name, Stretch())
            start, ledger = self._since
            stretch.add(time.monotonic_ns() - start, ledger, now)
            stretch.count(counters)
            self._since = time.monotonic_ns(), now

    def by_mode(self) -> dict[str, Stretch]:
        """What each mode has done so far; exits are those of the whole machine meanwhile. Any
        thread.
        """
        with self._books:
            out = {name: stretch.copy() for name, stretch in self._modes.items()}
            now = out.setdefault(self._serving.name, Stretch())
            start, before = self._since
            now.add(time.monotonic_ns() - start, before, self._ledger())
            now.count(self._serving.counters())
            return out

    def counters(self) -> dict[str, int]:
        """Of all data paths so far, summed. Any thread."""
        total = Stretch()
        with self._books:
            for stretch in self._modes.values():
                total.count(stretch.counters)
            total.count(self._serving.counters())
        return total.counters

    def end_switching(self) -> None:
        """Wait for a switch that is going on, and refuse all others."""
        with self._switching:
            self._over = True

    def report(self) -> dict[str, object]:
        """For JSON."""
        from pyvmm.virtio.features import names

        rx = self.device.rx
        modes = self.by_mode()

        return {
            "name": self.name,
            "mode": self.mode,
            "notify": self.net.notify,
            "mac": mac_text(self.device.mac),
            "tap": self.tap,
            "host": self.host,
            "guest": self.guest,
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
            "kvm_refusals": self.transport.errors,
            "faults": list(self.device.faults),
            "counters": self.counters(),
            "modes": {name: stretch.as_dict() for name, stretch in modes.items()},
            "switch_count": self.switch_count,
            "switches": [report.as_dict() for report in self.switches],
            "workers": self.device.datapath.workers(),
            # Of another process that moves the packets, what is known of it.
            **(
                {"vhost_user": peer()}
                if (peer := getattr(self.device.datapath, "report", None))
                else {}
            ),
        }
