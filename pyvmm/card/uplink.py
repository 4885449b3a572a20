"""The card's host side: the tap, its namespace and our own back-ends. Lent to whichever data path
runs. A vhost-user back-end or a vDPA device of somebody else's is a host side of its own.
"""

from __future__ import annotations

import threading
from _weakrefset import WeakSet  # as threading takes it: the module weakref has much else
from contextlib import ExitStack

from pyvmm.datapath.capture import CapturePoint
from pyvmm.datapath.impair import ImpairPoint
from pyvmm.errors import HostError, UsageError
from pyvmm.netopt import fault_place
from pyvmm.spec.ethernet import ETH_DATA_LEN
from pyvmm.spec.virtio_net import VIRTIO_NET_HDR_V1_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.backend.faults import BackendFaults
    from pyvmm.backend.process import BackendProcess
    from pyvmm.backend.vduse_process import VduseProcess
    from pyvmm.card.traffic import TapFaults
    from pyvmm.datapath.base import DataPath, Frames, RxFilter, Steering
    from pyvmm.hostnet.netns import Namespace
    from pyvmm.hostnet.opensocket import OpenSocket
    from pyvmm.hostnet.slirp import UserStack, WayOut
    from pyvmm.hostnet.tap import Tap
    from pyvmm.kvm.recorder import Scope
    from pyvmm.netopt import Net

#: Frames that may wait in a tap of ours whose data path may be switched: a gap's worth, and what
#: vhost gives back.
SWITCH_TXQUEUELEN = 10000


def make_tap(net: Net, host: str | None, mac: bytes) -> tuple[Tap, Namespace | None]:
    """Open the tap that a card asks for, or make it; and the namespace that was made for the tap.
    The caller owns both.

    :param host: its address with prefix length; None for none. :param mac: of a macvtap.
    :raises NetError: the tap cannot be had.
    """
    from pyvmm.hostnet.tap import TXQUEUELEN, Tap

    frames = SWITCH_TXQUEUELEN if net.switchable else TXQUEUELEN
    if net.bridge is not None:
        from pyvmm.hostnet.bridge import tap_of

        tap = tap_of(net.bridge, net.tap, mtu=net.mtu, queues=net.queues, txqueuelen=frames)
        return tap, None
    if net.tap is not None:
        tap = Tap(net.tap, address=host, mtu=net.mtu, queues=net.queues, txqueuelen=frames)
        return tap, None
    from pyvmm.hostnet.netns import Namespace

    routed = None
    if net.internet:
        from pyvmm.hostnet.slirp import ROUTED

        routed = ROUTED[1], ROUTED[0].partition("/")[0]
    namespace = Namespace(
        address=host,
        mtu=net.mtu,
        queues=net.queues,
        txqueuelen=frames,
        lower=net.macvtap,
        mac=mac,
        way_out=routed,
    )
    return namespace.tap, namespace


class Route:
    """A data path, and the place on the host where its frames enter and leave.

    :ivar path: the data path. :ivar net: describes it.
    :ivar tap: the place, if that is the card's tap, lent; None if it is a back-end's own.
    :param announce: sends from that place the frame from which the network learns where a MAC
        address is; returns whether it went.
    """

    def __init__(
        self, path: DataPath, net: Net, tap: Tap | None, announce: Callable[[bytes], bool]
    ) -> None:
        self.path, self.net, self.tap = path, net, tap
        self.announce = announce

    def same_place(self, other: Route) -> bool:
        """Whether frames enter and leave where ``other`` has them. Two back-ends' own places are
        taken for different.
        """
        return self.tap is not None and self.tap is other.tap


class Uplink:
    """A card's host side, and the maker of data paths on it; implements ``HostSide``
    (datapath.base). Owned by the card.

    A tap keeps what was programmed also while a back-end with a host side of its own serves the
    card, so that coming back to the tap needs nothing.

    :param host, guest: the addresses with prefix length of the tap and of the guest; None for none.
    :param stopped: see ``EmulatedNet``. :param mac: of the card.
    :ivar captures: the captures of the workers of all emulated data paths.
    :ivar faults: the faults on demand, by the place where they are done (``netopt.fault_place``):
        ``worker``, and the others once they are needed.
    :ivar tap: None if frames enter and leave at a vhost-user back-end or a vDPA device only; then
        there is nothing to program.
    :ivar namespace: pyvmm's own network namespace with the tap in it; None if the user gave a tap.
    """

    def __init__(
        self,
        net: Net,
        host: str | None,
        guest: str | None = None,
        recorder: Scope | None = None,
        stopped: Callable[[str], object] | None = None,
        mac: bytes = b"",
    ) -> None:
        self.tap: Tap | None = None
        self.captures = CapturePoint()
        self._impair = ImpairPoint()
        self.faults: dict[str, ImpairPoint | BackendFaults | TapFaults] = {"worker": self._impair}
        self._stopped = stopped
        self._recorder = recorder
        self.namespace: Any = None
        self._backend: BackendProcess | None = None
        self._vduse: VduseProcess | None = None
        #: Where frames go if there is no tap: their headers have 12 bytes.
        self._port: UserStack | OpenSocket | None = None
        self._way_out: WayOut | None = None
        #: The address of a name server of the guest's network, or empty.
        self.name_server = ""
        self._state = threading.Lock()  # held for a moment only; guards:
        self._paths: WeakSet[DataPath] = WeakSet()  # all that may be cut
        self._cut = False
        if net.mode == "user":
            from pyvmm.hostnet.slirp import UserStack, name_server

            assert host is not None and guest is not None
            mtu, loopback, ports = net.mtu or ETH_DATA_LEN, net.loopback, net.forwards
            self._port = UserStack(host, guest, mtu, loopback=loopback, forwards=ports)
            self.name_server = name_server(host)
        if net.has_tap:
            self._open_tap(net, host, guest, mac)
        if net.fault:
            try:
                self.fault_point(net).set(net.fault, net.fault_seed)
            except BaseException:
                self.close()
                raise

    def _open_tap(self, net: Net, host: str | None, guest: str | None, mac: bytes) -> None:
        if net.fds:
            from pyvmm.hostnet.opensocket import OpenSocket, is_socket
            from pyvmm.hostnet.tap import Tap

            if is_socket(net.fds[0]):
                net.check_socket()
                self._port = OpenSocket(net.fds[0], net.mtu, self._stopped)
                return
            self.tap = Tap.inherited(net.fds, mtu=net.mtu)
        else:
            self.tap, self.namespace = make_tap(net, host, mac)
        if net.tap:
            self._forget_faults(net.tap)
        if net.internet:
            self._let_out(net, guest)
        if self.namespace is None:
            self.tap.permit()
        if "rss" in net.with_:
            self.tap.offer_steering()

    def _forget_faults(self, tap: str) -> None:
        """Take away what a machine that was killed has left at a tap of the user's."""
        from pyvmm.hostnet.traffic import Tc

        try:
            Tc(tap, None).set({})
        except BaseException:
            self.close()
            raise

    def _let_out(self, net: Net, guest: str | None) -> None:
        """Start what has the other end of the namespace's way out."""
        from pyvmm.hostnet.slirp import ROUTED, WayOut, name_server

        assert guest is not None and self.tap is not None
        mtu, loopback, ports = self.tap.mtu, net.loopback, net.forwards
        try:
            with self.namespace.way_out as out:  # so that only the child has it
                self._way_out = WayOut(out, guest, mtu, loopback=loopback, forwards=ports)
        except BaseException:
            self.namespace.close()
            raise
        self.name_server = name_server(ROUTED[0])

    def fault_point(self, net: Net) -> ImpairPoint | BackendFaults | TapFaults:
        """Where faults on demand are done while a data path serves the card.

        :param net: describes the path; ``netopt.check_faults`` has found nothing wrong.
        """
        place = fault_place(net)
        if place == "backend":
            return self._backend_faults()
        if place not in self.faults:
            from pyvmm.card.traffic import TapFaults

            self.faults[place] = TapFaults(self._need_tap(net), self.namespace, self._recorder)
        return self.faults[place]

    def fault_points(self) -> list[ImpairPoint | BackendFaults | TapFaults]:
        """All of these places that there are by now. Any thread."""
        return list(self.faults.values())

    def ruled_point(self) -> ImpairPoint | BackendFaults | TapFaults | None:
        """The one of these places that has rules; None if none has. Any thread."""
        return next((point for point in self.fault_points() if point.active), None)

    def _backend_faults(self) -> BackendFaults:
        from pyvmm.backend.faults import BackendFaults

        found = self.faults.setdefault("backend", BackendFaults())
        assert isinstance(found, BackendFaults)
        return found

    # --- what a device programs -------------------------------------------------------------------

    def set_queues(self, count: int) -> None:
        """Spread frames over the first ``count`` queues of the tap.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_queues(count)

    def set_header(self, size: int) -> None:
        """Have the tap put a header of so many bytes before each frame.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_header(size)
        if self._port is not None and size != VIRTIO_NET_HDR_V1_SIZE:
            raise HostError(
                f"{self._port.name}: the guest's driver wants headers of {size} bytes",
                "give a card for this driver a tap",
            )

    def set_steering(self, steering: Steering | None) -> None:
        """Steer frames in the tap.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_steering(steering)

    def set_offloads(self, acked: int) -> None:
        """Program the tap's offloads from the GUEST_* bits of ``acked``.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_offloads(acked)

    def set_rx_filter(self, rx: RxFilter) -> None:
        """Filter in the tap; without one, filtering is the back-end's own business.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_rx_filter(rx)

    def set_carrier(self, up: bool) -> None:
        """Show the cable's state on the tap.

        :raises HostError: the tap refuses.
        """
        if self.tap is not None:
            self.tap.set_carrier(up)

    # --- data paths -------------------------------------------------------------------------------

    def open(self, net: Net, mac: bytes, wait: float = 10.0) -> Route:
        """A data path for ``net.mode``, owned by the caller. The only place where a mode becomes an
        object.

        :param wait: seconds for a vhost-user back-end to be there.
        """
        if self._way_out is not None:
            self._way_out.need()
        if net.mode == "vhost-user":
            return self._open_vhost_user(net, mac, wait)
        if net.mode == "vhost-vdpa":
            return self._open_vdpa(net, mac)
        if self._port is not None and net.mode in ("user", "emulated"):
            self._port.need()
            path = self._emulated(self._port, net, self._port.gone)
            self.register(path)
            return Route(path, net, None, self._port.announce)
        tap = self._need_tap(net)
        path = self._open_on(tap, net)
        self.register(path)
        return Route(path, net, tap, tap.announce)

    def _open_vhost_user(self, net: Net, mac: bytes, wait: float) -> Route:
        from pyvmm.datapath.vhost_user import VhostUserNet
        from pyvmm.vhostuser.connect import Connector, ListeningConnector

        tap = None if net.socket else self._need_tap(net)
        if tap is None:
            kind = ListeningConnector if net.server else Connector
            connector = kind(net.socket, net.peer)
        else:
            if self._backend is not None and self._backend.poll_us != net.poll:
                self._backend.close()  # serves nobody: a card on it is not switched to it
                self._backend = None
            if self._backend is None:
                from pyvmm.backend.process import BackendProcess

                self._backend = BackendProcess(tap, net.poll, self._backend_faults())
            connector = self._backend.connector()
        path = VhostUserNet(
            connector,
            queues=net.queues,
            mtu=net.mtu,
            mac=mac,
            recorder=self._recorder,
            link=tap.link if tap is not None else None,
        )
        self.register(path)
        try:
            path.connect(wait)
        except BaseException:
            path.close()
            raise
        return Route(path, net, tap, tap.announce if tap is not None else path.send_rarp)

    def _open_vdpa(self, net: Net, mac: bytes) -> Route:
        from pyvmm.datapath.vdpa_device import Vdpa
        from pyvmm.datapath.vhost_vdpa import VhostVdpa

        tap = None if net.device else self._need_tap(net)
        if tap is not None and self._vduse is None:
            from pyvmm.backend.vduse_process import VduseProcess

            self._vduse = VduseProcess(tap)
        where = net.device if self._vduse is None or tap is None else self._vduse.device()
        path = VhostVdpa(
            Vdpa(where, self._recorder),
            queues=net.queues,
            mac=mac,
            mtu=net.mtu,
            link=tap.link if tap is not None else None,
            server=self._vduse if tap is not None else None,
        )
        self.register(path)
        return Route(path, net, tap, tap.announce if tap is not None else lambda mac: False)

    def given(self, net: Net) -> tuple[bytes | None, int | None]:
        """The MAC address and the MTU of the card's vDPA device, and the MTU of its bridge or of
        the interface that it shares; None for each that they leave to the card.

        :raises VdpaError: there is no such device, or it cannot be had.
        """
        shared = net.bridge is not None or net.macvtap
        if shared and self.tap is not None and self.tap.mtu != ETH_DATA_LEN:
            return None, self.tap.mtu
        for mode in (net.mode, *net.switchable):
            if mode == "vhost-vdpa" and net.device:
                from pyvmm.datapath.vdpa_device import Vdpa
                from pyvmm.datapath.vhost_vdpa import facts

                with Vdpa(net.device) as device:
                    mac, mtu, _ = facts(device)
                return mac, mtu
        return None, None

    def _open_on(self, tap: Tap, net: Net) -> DataPath:
        if net.mode == "vhost-net":
            from pyvmm.datapath.vhost_device import Vhost
            from pyvmm.datapath.vhost_net import VhostNet

            with ExitStack() as undo:
                devices = []
                for _ in range(net.queues):
                    devices.append(Vhost(recorder=self._recorder))
                    undo.callback(devices[-1].close)
                path = VhostNet(tap, devices, worker_cpu=net.worker_cpu, poll_us=net.poll)
                undo.pop_all()
                return path
        return self._emulated(tap, net)

    def _emulated(self, port: Frames, net: Net, gone: Callable[[], str] | None = None) -> DataPath:
        from pyvmm.datapath.emulated import EmulatedNet

        return EmulatedNet(
            port,
            poll_us=net.poll,
            worker_cpu=net.worker_cpu,
            in_exit=net.worker == "vcpu",
            batch=net.batch,
            recorder=self._recorder,
            stopped=self._stopped,
            gone=gone,
            captures=self.captures,
            impair=self._impair,
        )

    def _need_tap(self, net: Net) -> Tap:
        if self.tap is None:
            raise UsageError(
                f"{net.mode} needs a tap, and this card has none", "start it with switchable="
            )
        return self.tap

    def register(self, path: DataPath) -> None:
        """Have ``cut`` apply to a path of this card, from before its first conversation on."""
        with self._state:
            self._paths.add(path)
            cut = self._cut
        if cut:
            path.cut()

    def cut(self) -> None:
        """End every conversation of the card's data paths, and allow no other. Any thread; takes no
        lock that a conversation holds.
        """
        with self._state:
            self._cut = True
            paths = list(self._paths)
        for port in (self._port, self._way_out):
            if port is not None:
                port.cut()
        for path in paths:
            path.cut()

    def watch(self, ended: Callable[[str], object]) -> None:
        """Have ``ended`` told, in another thread, if the tap loses its way out, and why."""
        if self._way_out is not None:
            self._way_out.watch(ended)

    def report(self) -> dict[str, object]:
        """What is known of the place where frames leave, for JSON: of a socket's, of a way out."""
        port = self._port if self._port is not None else self._way_out
        return port.report() if port is not None else {}

    @property
    def ended(self) -> str:
        """Why the tap has no way out any more, in words; empty else."""
        return self._way_out.ended if self._way_out is not None else ""

    def close(self) -> None:
        """Release tap, namespace and back-end. A second call does nothing."""
        if "tap" in self.faults:
            self.faults["tap"].close()
        for one in (
            *(self._backend, self._vduse, self._port, self._way_out),
            *(self.tap, self.namespace),
        ):
            if one is not None:
                one.close()
        for point in self.fault_points():
            point.close()
