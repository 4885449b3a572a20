"""The virtio network device (virtio 1.2, 5.1): configuration space, features, queue pairs, link.

It does not know which data path moves its packets.
"""

from __future__ import annotations

import threading
import time

from pyvmm.datapath.base import RxFilter, by_pair
from pyvmm.errors import HostError, PyvmmError, RingFault, UsageError
from pyvmm.spec.virtio import VIRTIO_F_VERSION_1, VIRTIO_ID_NET, VIRTIO_RING_F_EVENT_IDX
from pyvmm.spec.virtio_net import (
    CONFIG_NAMES,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
)
from pyvmm.virtio.device import DRIVER, FEATURES_OK, VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.card.report import SwitchOutcome, SwitchReport
    from pyvmm.card.uplink import Route
    from pyvmm.datapath.base import DataPath, HostSide, PathEvents, Vring
    from pyvmm.memory import GuestMemory
    from pyvmm.virtio.control import Control

PCI_CLASS_NETWORK_ETHERNET = 0x020000
#: Entries a queue, as QEMU's default, and of the control queue.
QUEUE_SIZE = 256
CONTROL_SIZE = 64
MAX_PAIRS = 16
#: A move to another outside: seconds at most for what is under way to the old one; and without a
#: frame there for it to be over, where we can see what waits and where not.
MOVE_S, QUIET_S, UNSEEN_S = 1.0, 0.01, 0.05

#: Features that need nothing of the data path, and those among them that live on the control queue.
OWN = (VIRTIO_F_VERSION_1, VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ)
CONTROLLED = (
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
)
#: What VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET may switch (5.1.6.5.6).
GUEST_OFFLOADS = sum(
    1 << bit
    for bit in (
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_GUEST_UFO,
    )
)


class HeldEvents:
    """Keeps the faults of a data path that has just started until it is known to serve the rings;
    from then on passes everything on.
    """

    def __init__(self, to: PathEvents) -> None:
        self._to = to
        self._lock = threading.Lock()
        self._held: list[tuple[int, str]] | None = []

    def fault(self, queue: int, problem: str) -> None:
        """Kept, or passed on."""
        with self._lock:
            if self._held is not None:
                self._held.append((queue, problem))
                return
        self._to.fault(queue, problem)

    def link(self, up: bool) -> None:
        """Passed on."""
        self._to.link(up)

    def release(self) -> None:
        """Pass on what was kept, and what comes."""
        with self._lock:
            held, self._held = self._held or [], None
        for queue, problem in held:
            self._to.fault(queue, problem)


class NetDevice(VirtioDevice):
    """A network card: ``pairs`` queue pairs (2k receives, 2k + 1 transmits) and the control queue
    behind them.

    :param datapath: moves the packets; owned from here on.
    :param uplink: the host's side of the card, lent.
    :param mac: 6 bytes. :param mtu: bytes, offered to the guest, or None.
    :param pairs: 1 to ``MAX_PAIRS``; more than one is offered as VIRTIO_NET_F_MQ.
    :param offer: mask of the feature bits that every data path which it may be switched to can
        honour.
    :param without: feature bits (a mask) not to offer although the data path could.
    :param link: whether the cable is plugged in at the start.
    :ivar pairs: those in use; the driver chooses.
    :ivar rx: what the driver wants to receive. :ivar commands: taken from the control queue.
    """

    device_id = VIRTIO_ID_NET
    config_names = CONFIG_NAMES

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        datapath: DataPath,
        uplink: HostSide,
        mac: bytes,
        *,
        mtu: int | None = None,
        pairs: int = 1,
        queue_size: int = QUEUE_SIZE,
        offer: int = -1,
        without: int = 0,
        link: bool = True,
    ) -> None:
        super().__init__(name, memory, [queue_size] * (2 * pairs) + [CONTROL_SIZE])
        self.datapath = datapath
        self._uplink = uplink
        self._events: PathEvents = self
        self._own_mac = self.mac = mac
        self.mtu = mtu
        self.max_pairs = pairs
        self.pairs = 1
        self.rx = RxFilter(mac)
        self.commands = 0
        self._plugged = link
        self._path_up = True
        self._held = False
        self._announce = False
        self._control: Control | None = None
        self._rings: dict[int, Vring] = {}
        self._started: list[int] = []
        self._offloads = 0
        self._offered = self._most = self._offer(datapath.features() & offer) & ~without
        #: What was negotiated last, kept over a reset for the report.
        self.negotiated = 0
        #: Called when the driver has changed ``rx`` or the MAC address.
        self.on_rx_change: Callable[[], None] = lambda: None
        if not link:
            uplink.set_carrier(False)

    def _offer(self, path: int) -> int:
        """The device's own features and what the data path can honour."""
        own = sum(1 << bit for bit in (*OWN, *CONTROLLED))
        if self.mtu is not None:
            own |= 1 << VIRTIO_NET_F_MTU
        if self.max_pairs > 1:
            own |= 1 << VIRTIO_NET_F_MQ
        if path & GUEST_OFFLOADS:
            own |= 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
        return own | path

    def offered(self) -> int:
        """Fixed from reset to reset: less than at creation where a data path that can do less has
        taken over.
        """
        return self._offered

    @property
    def rings(self) -> list[Vring]:
        """Those of the queue pairs in use, pair 0 first."""
        return [ring for index, ring in sorted(self._rings.items()) if index < 2 * self.pairs]

    @property
    def in_force(self) -> int:
        """The negotiated features as a data path gets them: of GUEST_* only those that the driver
        has left on.
        """
        return self.driver_features & ~GUEST_OFFLOADS | self._offloads

    def config_space(self) -> bytes:
        """struct virtio_net_config as far as its features go (5.1.4)."""
        status = VIRTIO_NET_S_LINK_UP if self.link_up else 0
        status |= VIRTIO_NET_S_ANNOUNCE if self._announce else 0
        return b"".join(
            (
                self.mac,
                status.to_bytes(2, "little"),
                self.max_pairs.to_bytes(2, "little"),
                (self.mtu or 0).to_bytes(2, "little"),
            )
        )

    # --- link -------------------------------------------------------------------------------------

    @property
    def link_up(self) -> bool:
        """What the guest is told of the link."""
        return self._plugged and self._path_up

    def link(self, up: bool) -> None:
        """The interface behind the data path is gone, or back. Any thread."""
        if up != self._path_up:
            self._path_up = up
            self.config_changed()

    def set_link(self, up: bool) -> None:
        """Plug or pull the cable: while it is pulled the rings are parked, and nothing moves.

        :raises PyvmmError: the data path does not start again; the driver has to reset the device.
        """
        if up == self._plugged:
            return
        self._plugged = up
        if not up:
            self._park()
        self._uplink.set_carrier(up)
        try:
            if up and self.active:
                self._resume()
        except PyvmmError as e:
            self.fault(-1, str(e))
            raise
        self.config_changed()

    def hold(self, on: bool) -> None:
        """The machine is paused: park the rings, so that nothing writes to guest memory; or go on
        from there.

        :raises PyvmmError: as ``set_link``.
        """
        if on == self._held:
            return
        self._held = on
        if on:
            self._park()
        elif self.active:
            try:
                self._resume()
            except PyvmmError as e:
                self.fault(-1, str(e))
                raise

    def announce(self) -> bool:
        """Ask the guest to tell the network where it is (5.1.6.5.4.1); whether its driver can."""
        if not (
            self.active
            and self._control
            and self.driver_features >> VIRTIO_NET_F_GUEST_ANNOUNCE & 1
        ):
            return False
        self._announce = True
        self.config_changed()
        return True

    def announced(self) -> bool:
        """The driver acknowledges; whether it had been asked."""
        asked, self._announce = self._announce, False
        return asked

    # --- queues -----------------------------------------------------------------------------------

    def _control_index(self) -> int:
        """5.1.2: behind the queue pairs that the driver knows of."""
        return 2 * self.max_pairs if self.driver_features >> VIRTIO_NET_F_MQ & 1 else 2

    def queue_role(self, index: int) -> str:
        """``receive``, ``transmit`` or ``control``."""
        if index == self._control_index():
            return "control"
        return "transmit" if index & 1 else "receive"

    def kick_role(self, index: int) -> str:
        """By what was negotiated last. Kicks of the control queue are told apart: they are exits in
        every mode.
        """
        control = 2 * self.max_pairs if self.negotiated >> VIRTIO_NET_F_MQ & 1 else 2
        has = self.negotiated >> VIRTIO_NET_F_CTRL_VQ & 1
        return "control" if has and index == control else "notify"

    def own_queues(self) -> frozenset[int]:
        """The control queue."""
        has = self.driver_features >> VIRTIO_NET_F_CTRL_VQ & 1
        return frozenset([self._control_index()] if has else [])

    def notified(self, index: int) -> None:
        """The control queue has been kicked."""
        if self._control is None:
            return
        try:
            self._control.serve()
        except RingFault as e:
            self._control = None
            self.fault(index, f"control queue: {e}")

    def activate(self, rings: list[Vring]) -> None:
        """Hand the rings of the first pair to the data path; the driver asks for more by command
        (5.1.6.5.5).
        """
        acked = self.negotiated = self.driver_features
        control = self._control_index()
        self._rings = {ring.index: ring for ring in rings if ring.index < control}
        self._offloads = acked & GUEST_OFFLOADS
        self.pairs = 1
        self.rx = RxFilter(self.mac)
        self._uplink.set_rx_filter(self.rx)
        if acked >> VIRTIO_NET_F_CTRL_VQ & 1:
            for ring in rings:
                if ring.index == control:
                    from pyvmm.virtio.control import Control

                    self._control = Control(self, ring, acked)
        self._resume()

    def deactivate(self) -> None:
        """Take them back, and forget what the driver had set."""
        self._park()
        self._control = None
        self._rings = {}
        self._announce = False
        self.mac = self._own_mac

    def _resume(self, patience: float | None = None) -> None:
        """Start the data path on the rings of the pairs in use, from where they are.

        :param patience: seconds that another process may take for it.
        :raises PyvmmError: the host's side or the data path refuses.
        """
        if not self._plugged or self._held:
            return
        rings = self.rings
        begin = time.monotonic_ns()
        self._uplink.set_queues(max(1, len(by_pair(rings))))
        self._uplink.set_offloads(self.in_force)
        self.datapath.start(self.in_force, self.memory, rings, self._events, patience=patience)
        self._started = [ring.index for ring in rings]
        if self.recorder is not None:
            self.recorder.step("start", begin, {"rings": rings})

    def _park(self, *, finish: bool = False, patience: float | None = None) -> None:
        """Stop the data path; the rings remember their positions."""
        started, self._started = self._started, []
        begin = time.monotonic_ns()
        bases = self.datapath.stop(finish=finish, patience=patience)
        if self.recorder is not None and started:
            self.recorder.step("stop", begin, {"bases": bases})
        for index, base in zip(started, bases, strict=False):
            self._rings[index] = self._rings[index].at(base)

    # --- another data path ------------------------------------------------------------------------

    def lacks(self, path: DataPath) -> int:
        """Feature bits that the driver uses, or may yet choose, and ``path`` cannot honour."""
        chosen = self.driver_features if self.status & FEATURES_OK else self._offered
        return chosen & ~self._offer(path.features()) if self.status & DRIVER else 0

    def check(self, path: DataPath) -> None:
        """:raises UsageError: ``path`` lacks features that are in use; it names them."""
        missing = self.lacks(path)
        if missing:
            from pyvmm.virtio.features import names

            raise UsageError(
                f"{self.name} cannot switch to {path.name}, which lacks features that the guest uses: "
                f"{' '.join(names(missing))}",
                f"name it at the start: --net ...,switchable={path.name}, or leave features out: without=",
            )

    def switch(
        self,
        old: Route,
        new: Route,
        report: SwitchReport,
        spare: Callable[[], Route] | None,
        patience: float,
    ) -> Route:
        """Have ``new`` serve the rings from where the present data path left them. The guest sees a
        pause.

        :param new: prepared (``DataPath.prepare``). :param report: gets what happened.
        :param spare: makes a data path that works wherever one can; may raise PyvmmError.
        :param patience: seconds that another process has for each of its parts.
        :return: the route in force: ``new``, or what served before, or what ``spare`` makes. Those
            that are not in force belong to the caller, who closes them. Only if none can start the
            guest has to reset the device.
        :raises UsageError: ``new`` lacks features; nothing was touched.
        """
        self.check(new.path)
        if not self._started:  # not driven yet, or the cable is pulled: the rings are at rest
            self._use(new)
            report.outcome, report.mode = "switched", new.path.name
            return new
        indices, since = list(self._started), time.monotonic_ns()
        uneven = ""
        moves = not new.same_place(old)
        if moves:
            with report.step("move"):
                self._move(old, new, report, patience)
        with report.step("park"):
            try:
                self._park(finish=True, patience=patience)
            except Exception as e:  # the same: the rings are at rest, however it went
                uneven = str(e)
                self._from_used(indices)
            for index in indices:
                uneven = uneven or self._even(index)
                self._normalise(self._rings[index])
        parked = [self._rings[index] for index in indices]
        pending = {ring.index: self._index(ring.avail) - ring.base & 0xFFFF for ring in parked}
        report.parked(parked, since, old.path.times.asked, pending)
        tries: list[tuple[SwitchOutcome, Callable[[], Route]]] = [("rolled-back", lambda: old)]
        if uneven:
            report.reason = uneven
        else:
            tries.insert(0, ("switched", lambda: new))
        if spare is not None:
            tries.append(("fallback", spare))
        outcome: SwitchOutcome | None = None
        used = old
        for kind, make in tries:
            route: Route | None = None
            try:
                route = make()
                with report.step(f"start {route.path.name}"):
                    self._take(route, patience)
                outcome, used = kind, route
                break
            except Exception as e:  # whatever it is: first of all somebody has to serve the rings
                report.reason = f"{report.reason}; {e}" if report.reason else str(e)
                if route is not None and route not in (old, new):
                    route.path.close()
                self._from_used(indices)
        report.outcome = outcome or self._last_resort(old, patience)
        report.mode = self.datapath.name
        for index in indices:
            for event in (self._rings[index].kick, self._rings[index].call):
                event.nudge()
        if moves:  # whoever it is that goes on, also one that cannot say so without rings
            used.announce(self.mac)
            self.announce()
        return used

    def _move(self, old: Route, new: Route, report: SwitchReport, patience: float) -> None:
        """Frames are to enter and leave at another place. The guest's own frames would have the
        network go on sending to the old one, so they wait; then the network is told, and what is
        under way to the old place is received there yet. Best effort: what fails here costs frames
        that have not been accepted.
        """
        try:
            old.path.stop_transmit(patience=patience)
        except PyvmmError:
            return  # it will not stop in order, either
        if new.tap is not None:
            report.stale = new.tap.discard()  # of the time when that was not the card's place
        if not new.announce(self.mac):
            return
        enough = UNSEEN_S if old.tap is None else QUIET_S
        start = quiet = time.monotonic()
        before: list[int] = []
        while (now := time.monotonic()) < start + MOVE_S and now < quiet + enough:
            after = [self._index(self._rings[index].used) for index in self._started[::2]]
            if after != before or (old.tap is not None and old.tap.waiting()):
                before, quiet = after, now
            time.sleep(0.001)

    def _use(self, route: Route) -> None:
        """``route.path`` is the data path from now on; its rings are yet to be started."""
        self.datapath = route.path
        if not self.status & DRIVER:
            self._reoffer()
        self.link(True)  # the path says so if its interface is gone

    def _take(self, route: Route, patience: float) -> None:
        """Start ``route.path`` on the rings. :raises PyvmmError: it does not serve them; it has let
        go of them.
        """
        path = route.path
        self._use(route)
        held = self._events = HeldEvents(self)
        try:
            self._resume(patience)
        finally:
            self._events = self
        problem = path.problem()
        if problem:
            self._started = []
            path.stop()
            raise HostError(f"{path.name}: {problem}")
        held.release()

    def _last_resort(self, old: Route, patience: float) -> SwitchOutcome:
        """Nothing serves the rings. The old path may yet find someone who does; the outcome."""
        self._use(old)
        try:
            self._resume(patience)
        except PyvmmError as e:
            self.fault(-1, str(e))
            return "failed"
        return "rolled-back"

    def _index(self, area: int) -> int:
        """The index of an available or used ring (2.7.6, 2.7.8)."""
        return int.from_bytes(self.memory.read(area + 2, 2), "little")

    def _from_used(self, indices: list[int]) -> None:
        """Take the used indices as positions: what every path leaves behind, also one that
        failed.
        """
        for index in indices:
            ring = self._rings[index]
            self._rings[index] = ring.at(self._index(ring.used))

    def _even(self, index: int) -> str:
        """What is wrong if the old path still had chains in its hands. Of receive chains nothing
        is: they are empty.
        """
        ring = self._rings[index]
        used = self._index(ring.used)
        if ring.base == used:
            return ""
        if index % 2 == 0:
            self._rings[index] = ring.at(used)
            return ""
        return f"queue {index} stopped at {ring.base} with {used} returned"

    def _normalise(self, ring: Vring) -> None:
        """Ask for kicks, however the old path had it (2.7.8, 2.7.10): they gather until the next
        one looks.
        """
        self.memory.write(ring.used, bytes(2))
        if self.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1:
            self.memory.write(ring.used + 4 + 8 * ring.size, ring.base.to_bytes(2, "little"))

    def _reoffer(self) -> None:
        self._offered = self._most & self._offer(self.datapath.features())

    def reset(self) -> None:
        """Back to the state after power-on, offering what the present data path can."""
        super().reset()
        self._reoffer()

    # --- what the driver commands -----------------------------------------------------------------

    def set_pairs(self, pairs: int) -> bool:
        """Use the first ``pairs`` queue pairs; False where there are not as many.

        :raises PyvmmError: the data path does not start again.
        """
        if not VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN <= pairs <= self.max_pairs:
            return False
        if any(2 * k + way not in self._rings for k in range(pairs) for way in (0, 1)):
            return False  # 5.1.6.5.5.1: the driver has not set them up
        if pairs != self.pairs:
            self._park()
            self.pairs = pairs
            self._resume()
        return True

    def set_offloads(self, offloads: int) -> bool:
        """Have the host send what ``offloads`` (GUEST_* bits) allows; False if that was not
        negotiated.

        :raises PyvmmError: the host's side refuses, or the data path does not start again.
        """
        if offloads & ~(self.driver_features & GUEST_OFFLOADS):
            return False
        changed, self._offloads = offloads != self._offloads, offloads
        if not self._started or not self.datapath.restarts_for_offloads:
            self._uplink.set_offloads(self.in_force)
        elif changed:
            self._park()
            self._resume()
        return True

    def rx_changed(self) -> None:
        """``rx`` has been changed by the driver."""
        try:
            self._uplink.set_rx_filter(self.rx)
        except PyvmmError:
            pass  # best effort: without a filter the guest sees more than it asked for
        self.on_rx_change()

    def close(self) -> None:
        """Stop and release the data path, too."""
        super().close()
        self.datapath.close()
