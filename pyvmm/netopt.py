"""How users describe a network card: ``--net MODE[,key=value...]``, in Python
``pyvmm.Net("emulated", mtu=9000)``.
"""

from __future__ import annotations

import os
from _socket import AF_INET  # see ``hostnet.rights``

from pyvmm.errors import NetError, UsageError, did_you_mean
from pyvmm.hostnet.addresses import parse_address
from pyvmm.spec.ethernet import ETH_MIN_MTU, TAP_MAX_MTU

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from pyvmm.faultopt import FaultRule
    from pyvmm.hostnet.slirp import Forward

#: Keys of a way out of the guest by libslirp.
OUT = ("loopback", "hostfwd")
#: Mode -> the keys of this mode, in addition to COMMON_KEYS.
MODES: dict[str, tuple[str, ...]] = {
    "none": (),
    "emulated": (
        *("notify", "interrupt", "worker", "batch", "poll", "worker-cpu", "fd", "macvtap"),
        *("internet", *OUT),
    ),
    "vhost-net": ("notify", "poll", "worker-cpu", "fd", "macvtap", "internet", *OUT),
    "vhost-user": ("notify", "poll", "socket", "server", "peer", "internet", *OUT),
    "vhost-vdpa": ("notify", "device", "internet", *OUT),
    "user": ("notify", "poll", "worker-cpu", *OUT),
}
#: Name -> the mode that it stands for, and its keys, as far as the user gives no others.
PRESETS: dict[str, tuple[str, dict[str, str]]] = {
    # The device as the first VMMs had it (docs/ladder.md).
    "classic": (
        "emulated",
        {
            "worker": "vcpu",
            "notify": "exit",
            "interrupt": "ioctl",
            "batch": "off",
            "without": "event-idx+indirect+offloads",
        },
    ),
}
COMMON_KEYS = (
    "tap",
    "bridge",
    "mac",
    "mtu",
    "host",
    "guest",
    "queues",
    "queue-size",
    "link",
    "transport",
    "legacy",
    "speed",
    "without",
    "with",
    "switchable",
    "fault",
    "fault-seed",
)
#: Keys of a data path, which a switch may change; all other keys belong to the card.
PATH_KEYS = ("poll", "worker-cpu", "worker", "batch", "socket", "server", "peer", "device")
#: Of a key that has few values: these values, of the first four keys the usual one first.
CHOICES = {
    "notify": ("ioeventfd", "exit"),
    "interrupt": ("irqfd", "ioctl"),
    "worker": ("thread", "vcpu"),
    "batch": ("on", "off"),
    "link": ("on", "off"),
    "transport": ("pci", "mmio"),
    "legacy": ("on", "off"),
    "server": ("on", "off"),
    "internet": ("on", "off"),
    "loopback": ("on", "off"),
}
#: Names for ``without=`` and ``with=``, joined by "+": feature groups that the card does not offer,
#: or that it offers although they are in ``ON_REQUEST``.
GROUPS = {
    "offloads": "CSUM GUEST_CSUM GUEST_TSO4 GUEST_TSO6 GUEST_ECN GUEST_UFO HOST_TSO4 HOST_TSO6 "
    "HOST_ECN HOST_UFO GUEST_USO4 GUEST_USO6 HOST_USO GUEST_UDP_TUNNEL_GSO "
    "GUEST_UDP_TUNNEL_GSO_CSUM HOST_UDP_TUNNEL_GSO HOST_UDP_TUNNEL_GSO_CSUM",
    "tso": "GUEST_TSO4 GUEST_TSO6 GUEST_ECN GUEST_UFO HOST_TSO4 HOST_TSO6 HOST_ECN HOST_UFO "
    "GUEST_UDP_TUNNEL_GSO GUEST_UDP_TUNNEL_GSO_CSUM HOST_UDP_TUNNEL_GSO HOST_UDP_TUNNEL_GSO_CSUM",
    "uso": "GUEST_USO4 GUEST_USO6 HOST_USO",
    "mrg-rxbuf": "MRG_RXBUF",
    "indirect": "INDIRECT_DESC",
    "event-idx": "EVENT_IDX",
    "ctrl-vq": "CTRL_VQ CTRL_RX CTRL_RX_EXTRA CTRL_VLAN CTRL_MAC_ADDR CTRL_GUEST_OFFLOADS "
    "GUEST_ANNOUNCE MQ NOTF_COAL VQ_NOTF_COAL RSS HASH_REPORT DEVICE_STATS",
    "coalescing": "NOTF_COAL VQ_NOTF_COAL",
    "ring-reset": "RING_RESET",
    "in-order": "IN_ORDER",
    "notification-data": "NOTIFICATION_DATA",
    "speed": "SPEED_DUPLEX",
    "hdrlen": "GUEST_HDRLEN",
    "packed": "RING_PACKED",
    "rss": "RSS",
    "hash-report": "HASH_REPORT",
    "device-stats": "DEVICE_STATS",
    "tunnel-gso": "GUEST_UDP_TUNNEL_GSO GUEST_UDP_TUNNEL_GSO_CSUM HOST_UDP_TUNNEL_GSO "
    "HOST_UDP_TUNNEL_GSO_CSUM",
    "access-platform": "ACCESS_PLATFORM",
}
#: Groups that the card offers only if ``with=`` names them. Not every data path can honour them,
#: and a guest that uses them could not be switched to the others; ACCESS_PLATFORM costs the guest
#: time for each buffer.
ON_REQUEST = (
    "packed",
    "in-order",
    "coalescing",
    "rss",
    "hash-report",
    "device-stats",
    "tunnel-gso",
    "access-platform",
)
#: Those of them that are the card's own affair, whatever its data path.
OF_THE_CARD = ("access-platform",)
#: Those of them that need a newer kernel than pyvmm itself: Linux 6.17.
OF_NEW_HOSTS = ("tunnel-gso",)
#: Those of them that each mode can honour on a tap of pyvmm's own with any kernel, if the user may
#: load eBPF programs.
HONOURED: dict[str, tuple[str, ...]] = {
    "none": (),
    "emulated": tuple(group for group in ON_REQUEST if group not in OF_NEW_HOSTS),
    "vhost-net": ("rss", "access-platform"),
    "vhost-user": ("packed", "in-order", "rss", "access-platform"),
    "vhost-vdpa": ("packed", "access-platform"),
    "user": ("packed", "in-order", "coalescing", "hash-report", "access-platform"),
}
#: Data paths where nothing of ours can do wrong on purpose: why, and what to do.
NO_FAULTS = {
    "vhost-net": (
        "the tap is no tap that pyvmm has opened by its name",
        "use emulated, or tc qdisc where the tap is",
    ),
    "vhost-user": ("the back-end moves its packets", "use emulated, or pyvmm backend --fault"),
    "vhost-vdpa": ("the device moves its packets", "use emulated, or leave out device="),
}
#: Mbit/s: the largest number in struct virtio_net_config.
SPEED_MAX = 0x7FFFFFFF
#: The most queue pairs of a card, and what stops it: KVM_MAX_IRQ_ROUTES is 4096, and 31 cards with
#: 2 * 64 + 2 vectors each need 4030 of them (PV_QUEUES in cext/bus.h).
MAX_QUEUES = 64
WHY_QUEUES = "KVM routes 4096 interrupts, hardly more than 31 such cards have"
#: The largest user id (2^32 - 1 means none).
UID_MAX = 2**32 - 2
#: As many descriptors as a process may have at most (fs.nr_open).
FD_MAX = (1 << 20) - 1
HEX = frozenset("0123456789abcdefABCDEF")


class Net:
    """One network card.

    :param mode: data path: ``emulated``, ``vhost-net``, ``vhost-user`` or ``vhost-vdpa``; ``user``
        for emulation without a tap; ``none`` for no card at all; or a name of ``PRESETS``.
    :param tap: an existing tap, or the name of a tap to make, if the user may. Without it pyvmm
        makes a tap in a network namespace of its own, sets the addresses of both ends, and removes
        the tap at the end.
    :param bridge: an existing bridge, which the tap becomes a port of: the tap ``tap``, or one that
        pyvmm makes for it. That needs root.
    :param fd: of emulated and vhost-net: the number of an open tap that this process has got, which
        is used in the place of ``tap``; for several queue pairs several numbers, joined by "+". Or,
        of emulated alone, the number of a connected socket. The descriptors are lent.
    :param macvtap: of emulated and vhost-net: an interface of the host's, which a macvtap shares
        (bridge mode); pyvmm makes it, which needs root.
    :param mac: as ``52:54:00:xx:xx:xx``; the default follows from the machine's name
        (``MacAddresses``).
    :param mtu: 68 to 65521 bytes (a tap's limit), offered to the guest and set on the tap.
    :param host, guest: addresses with prefix length of the tap and of the guest's interface (IPv4);
        default 192.168.(100 + n).1/24 and .2/24 unless ``tap``, ``bridge``, ``fd`` or ``macvtap``
        is given.
    :param queue_size: entries per queue, a power of two, 2 to 32768. :param without: feature groups
        that the card does not offer. :param with_: feature groups that it offers on request only
        (``with=`` in an option).
    :param queues: queue pairs, 1 to 64. :param link: ``on`` or ``off``: whether the cable is
        plugged in at the start.
    :param transport: ``pci``, or ``mmio`` for a card that a guest without PCI finds (docs/mmio.md).
    :param legacy: ``on`` for a transitional card, which drivers from before virtio 1.0 can use, too
        (docs/legacy.md), else ``off``.
    :param speed: of the cable in Mbit/s, as the guest is told.
    :param notify: ``ioeventfd``, or ``exit``: each kick is an exit of the vCPU.
    :param interrupt: ``irqfd``, or ``ioctl``: each interrupt is a call of the thread that has moved
        the frame.
    :param worker: ``thread``, or ``vcpu``: the vCPU that kicks sends the guest's frames itself.
    :param batch: ``on``, or ``off``: one frame at a time, with an interrupt for each.
    :param poll: microseconds for which the worker looks for more work before it sleeps, 0 to 1000;
        not with ``socket``.
    :param worker_cpu: CPU for the worker of the first queue pair; the worker of the next pair gets
        the next CPU, and so on.
    :param socket: of the vhost-user back-end; without it pyvmm starts a back-end of its own on the
        card's tap.
    :param server: ``on`` if the back-end connects and pyvmm listens, else ``off``.
    :param peer: user id of the back-end at ``socket``. Without it, a back-end must be root's or
        of pyvmm's own user.
    :param device: the vDPA device of vhost-vdpa: its path, such as /dev/vhost-vdpa-0, or its name
        as ``vdpa dev show`` has it; without it pyvmm makes one on the card's tap (VDUSE).
    :param internet: ``on`` for a card in a namespace of pyvmm's that has a way out, as mode
        ``user`` has, whatever the data path; else ``off``.
    :param loopback: of a way out: ``on`` if the gateway's address stands for the host's 127.0.0.1,
        too, else ``off``.
    :param hostfwd: of a way out: ports of the host that lead into the guest, joined by "+":
        ``[tcp:|udp:][ADDR:]PORT-[ADDR:]PORT`` (docs/user-network.md).
    :param switchable: modes to which the data path may be switched later, joined by "+"
        (docs/switch.md). The device offers what all of them can honour.
    :param fault: what to do wrong on purpose: words of rules, joined by "+", or the rules
        (docs/fault-injection.md). :param fault_seed: of the random numbers, 0 to
        2^64 - 1; a random one if it is not given.
    :raises UsageError: a value is not allowed, or two do not go together.
    """

    __slots__ = (
        "batch",
        "bridge",
        "device",
        "fault",
        "fault_seed",
        "fds",
        "forwards",
        "guest",
        "host",
        "internet",
        "interrupt",
        "legacy",
        "link",
        "loopback",
        "mac",
        "macvtap",
        "mode",
        "mtu",
        "notify",
        "peer",
        "poll",
        "queue_size",
        "queues",
        "server",
        "socket",
        "speed",
        "switchable",
        "tap",
        "transport",
        "with_",
        "without",
        "worker",
        "worker_cpu",
    )

    def __init__(
        self,
        mode: str = "emulated",
        *,
        tap: str | None = None,
        bridge: str | None = None,
        fd: int | str | None = None,
        macvtap: str | None = None,
        mac: str | bytes | None = None,
        mtu: int | str | None = None,
        host: str | None = None,
        guest: str | None = None,
        queues: int | str = 1,
        queue_size: int | str = 256,
        link: str = "on",
        transport: str = "pci",
        legacy: str = "off",
        speed: int | str = 10_000,
        without: str | None = None,
        with_: str = "",
        notify: str | None = None,
        interrupt: str | None = None,
        worker: str | None = None,
        batch: str | None = None,
        poll: int | str = 0,
        worker_cpu: int | str | None = None,
        socket: str | None = None,
        server: str = "off",
        peer: int | str | None = None,
        device: str | None = None,
        internet: str = "off",
        loopback: str = "on",
        hostfwd: str = "",
        switchable: str = "",
        fault: str | Sequence[FaultRule] = "",
        fault_seed: int | str | None = None,
    ) -> None:
        mode, preset = PRESETS.get(mode, (mode, {}))
        if mode not in MODES:
            raise unknown_mode(mode)

        def choice(key: str, value: str | None) -> str:
            value = preset.get(key, CHOICES[key][0]) if value is None else value
            if value not in CHOICES[key]:
                raise UsageError(
                    f"--net: {key}={value}", f"use {key}={f' or {key}='.join(CHOICES[key])}"
                )
            return value

        if without is None:
            without = preset.get("without", "")
        self.notify, self.worker = choice("notify", notify), choice("worker", worker)
        self.interrupt, self.batch = choice("interrupt", interrupt), choice("batch", batch) == "on"
        for key, value in (("link", link), ("transport", transport), ("legacy", legacy)):
            choice(key, value)
        if legacy == "on" and "vhost-vdpa" in (mode, *switchable.split("+")):
            raise UsageError(
                "--net: legacy=on and vhost-vdpa", "vDPA devices are modern: leave one of them out"
            )
        if legacy == "on" and transport == "mmio":
            raise UsageError(
                "--net: legacy=on and transport=mmio",
                "a window has either interface, and this one is modern: leave one of them out",
            )
        choice("server", server)
        self.switchable = [m for m in switchable.split("+") if m and m != mode]
        for other in self.switchable:
            if other not in MODES or "none" in (mode, other):
                raise UsageError(
                    f"--net {mode}: switchable={switchable}",
                    f"modes, joined by +: {', '.join(list(MODES)[1:])}",
                )
        modes = {mode, *self.switchable}
        if "user" in modes and modes != {"user"}:
            raise UsageError(
                f"--net {mode}: switchable={switchable}",
                "mode user has no tap: leave one of them out",
            )
        choice("internet", internet)
        choice("loopback", loopback)
        self.internet, self.loopback = internet == "on", loopback == "on"
        self.forwards = forwards(hostfwd)
        if socket == "" or (socket and "vhost-user" not in modes):
            raise UsageError(
                f"--net {mode}: socket={socket}", "vhost-user needs a path there, others none"
            )
        if server == "on" and not socket:
            raise UsageError(
                f"--net {mode}: server=on without socket=", "name the socket to listen on"
            )
        if peer is not None and not socket:
            raise UsageError(f"--net {mode}: peer= without socket=", "our own back-end is ours")
        if device == "" or (device and "vhost-vdpa" not in modes):
            raise UsageError(
                f"--net {mode}: device={device}",
                "vhost-vdpa needs a vDPA device there (see: vdpa dev show), others none",
            )
        if device and tap is not None and modes == {"vhost-vdpa"}:
            raise UsageError(
                f"--net vhost-vdpa: device={device} and tap={tap}", "frames leave at the device"
            )
        if socket and tap is not None and modes == {"vhost-user"}:
            raise UsageError(
                f"--net vhost-user: socket= and tap={tap}",
                "the tap is the back-end's: pyvmm backend --tap",
            )
        interface_name("tap", tap)
        interface_name("bridge", bridge)
        interface_name("macvtap", macvtap)
        self.mode, self.tap, self.bridge, self.macvtap = mode, tap, bridge, macvtap or ""
        self.fds = descriptors(fd) if fd is not None else []
        self.device = device or ""
        self.mac = parse_mac(mac) if mac is not None else None
        self.mtu = number("mtu", mtu, ETH_MIN_MTU, TAP_MAX_MTU) if mtu is not None else None
        self.queues = number("queues", queues, 1, MAX_QUEUES, WHY_QUEUES)
        if self.fds and self.queues == 1:
            self.queues = len(self.fds)
        self.link, self.legacy, self.transport = link == "on", legacy == "on", transport
        self.speed = number("speed", speed, 1, SPEED_MAX)
        self.socket, self.server = socket or "", server == "on"
        self.peer = number("peer", peer, 0, UID_MAX) if peer is not None else None
        self.worker_cpu = (
            number("worker-cpu", worker_cpu, 0, 8191) if worker_cpu is not None else None
        )
        self.queue_size = number("queue-size", queue_size, 2, 32768)
        if self.queue_size & (self.queue_size - 1):
            raise UsageError(f"--net: queue-size={queue_size}", "use a power of two")
        self.poll = number("poll", poll, 0, 1000)
        self._check_poll()
        self._check_steps()
        self.host = ipv4("host", host) if host else None
        self.guest = ipv4("guest", guest) if guest else None
        if mode == "user":
            self._check_user()
        self._check_tap()
        self._check_way_out()
        self.without = groups("without", without, GROUPS)
        self.with_ = groups("with", with_, ON_REQUEST)
        self._take_faults(fault, fault_seed)
        both = set(self.without) & set(self.with_)
        if both:
            raise UsageError(f"--net: with={with_},without={without}", "leave one of them away")

    def _take_faults(self, fault: str | Sequence[FaultRule], seed: int | str | None) -> None:
        self.fault: Sequence[FaultRule] = ()
        self.fault_seed = 0
        if not fault:
            if seed is not None:
                raise UsageError("--net: fault-seed= without fault=", "leave it out")
            return
        from pyvmm.faultopt import of_option, seed_of

        self.fault = of_option(fault) if isinstance(fault, str) else list(fault)
        self.fault_seed = seed_of(seed)
        if self.mode != "none":
            check_faults("--net", self, self.fault, seed)

    def _check_tap(self) -> None:
        """:raises UsageError: the tap that is asked for makes no sense."""
        if self.bridge is not None and (self.mode == "none" or not self.has_tap):
            raise UsageError(
                f"--net {self.mode}: bridge={self.bridge} for a card without a tap",
                "leave it out: frames leave elsewhere",
            )
        if self.bridge is not None and self.host is not None:
            raise UsageError(
                f"--net {self.mode}: bridge={self.bridge} and host={self.host}",
                f"give the address to the bridge: ip addr add {self.host} dev {self.bridge}",
            )
        if not self.fds and not self.macvtap:
            return
        given = f"fd={'+'.join(map(str, self.fds))}" if self.fds else f"macvtap={self.macvtap}"
        what = f"--net {self.mode}: {given}"
        others = {self.mode, *self.switchable} - {"emulated", "vhost-net"}
        if others:
            kind = "an open tap" if self.fds else "a macvtap"
            raise UsageError(f"{what} and {others.pop()}", f"{kind} is for emulated and vhost-net")
        made = "whoever has made the tap does so" if self.fds else "it is no tap of the host's own"
        for key, value in (
            ("tap", self.tap),
            ("bridge", self.bridge),
            ("host", self.host),
            ("macvtap", self.macvtap if self.fds else None),
        ):
            if value:
                raise UsageError(f"{what} and {key}={value}", f"leave out {key}=: {made}")
        if not self.fds:
            return
        if len(self.fds) != self.queues:
            raise UsageError(
                f"{what} and queues={self.queues}", "give one descriptor per queue pair"
            )

    def check_open(self, *, inherited: bool = False) -> None:
        """Refuse numbers of ``fd=`` that this process would itself give to what it opens. Called
        before it opens anything: afterwards such a number may be a descriptor of pyvmm's own.

        :param inherited: this process is pyvmm's own, so that each descriptor that may be named
            has come by execve(2): only those have no FD_CLOEXEC.
        :raises NetError: one is not open, or not inherited.
        """
        for fd in self.fds:
            try:
                good = os.get_inheritable(fd) or not inherited
            except OSError:
                good = False
            if not good:
                raise NetError(
                    f"fd={fd} is not open", "open it in the program that starts pyvmm, inheritable"
                )

    def check_socket(self) -> None:
        """:raises UsageError: ``fd`` is a socket, and the card asks for a tap."""
        what = f"--net {self.mode}: fd={'+'.join(map(str, self.fds))} is a socket"
        others = {self.mode, *self.switchable} - {"emulated"}
        if others:
            raise UsageError(f"{what}, and {others.pop()} needs a tap", "use emulated alone")
        if len(self.fds) > 1:
            raise UsageError(f"{what}", "a card on a socket has one queue pair: give one number")

    def _check_poll(self) -> None:
        """:raises UsageError: whoever looks for work is not ours."""
        if self.poll and self.mode == "vhost-user" and self.socket:
            raise UsageError(
                f"--net vhost-user: poll={self.poll} and socket=",
                "that is for the back-end there to decide, as pyvmm backend --poll does",
            )

    def _check_steps(self) -> None:
        """:raises UsageError: two steps from the textbook device on do not go together."""
        if self.worker == "vcpu" and self.notify != "exit":
            raise UsageError(
                f"--net: worker=vcpu and notify={self.notify}",
                "a vCPU's thread sees a kick only if it is an exit: notify=exit, or worker=thread",
            )
        if self.worker == "vcpu" and self.poll:
            raise UsageError(
                f"--net: worker=vcpu and poll={self.poll}",
                "there is no thread that could look for work: leave one of them out",
            )
        others = [m for m in (self.mode, *self.switchable) if m != "emulated"]
        if self.interrupt == "ioctl" and others:
            raise UsageError(
                f"--net: interrupt=ioctl and {others[0]}",
                "the interrupts of other data paths than emulated come by irqfd: leave one out",
            )

    def _check_user(self) -> None:
        """:raises UsageError: mode ``user`` cannot have what is asked for."""
        if self.tap is not None:
            raise UsageError(f"--net user: tap={self.tap}", "with a tap, use --net emulated,tap=")
        if self.queues != 1:
            raise UsageError(f"--net user: queues={self.queues}", "mode user has one queue pair")
        if bool(self.host) != bool(self.guest):
            raise UsageError("--net user: host= or guest= alone", "give both, of one network")
        if self.host and self.guest:
            from pyvmm.hostnet.slirp import fits

            if not fits(self.host, self.guest):
                raise UsageError(
                    f"--net user: host={self.host} and guest={self.guest}",
                    "give two addresses of one network; the one after the host's serves names",
                )

    def _check_way_out(self) -> None:
        """:raises UsageError: a card without a way out has keys of one, or cannot have one."""
        for key, said in (("loopback", not self.loopback), ("hostfwd", bool(self.forwards))):
            if said and not self.way_out:
                raise UsageError(
                    f"--net {self.mode}: {key}= without a way out", "add internet=on, or use user"
                )
        if not self.internet:
            return
        what = f"--net {self.mode}: internet=on"
        if self.mode in ("user", "none") or not self.has_tap:
            raise UsageError(
                f"{what} for a card without a tap of pyvmm's",
                "leave it out: frames leave elsewhere",
            )
        if not self.own_network:
            given = {"tap": self.tap, "bridge": self.bridge, "fd": self.fds}
            key = next((key for key, value in given.items() if value), "macvtap")
            raise UsageError(
                f"{what} and {key}=", f"leave out {key}=: internet=on is for a namespace of pyvmm's"
            )
        from pyvmm.hostnet.slirp import ROUTED, meets

        for key, address in (("host", self.host), ("guest", self.guest)):
            if address and meets(address, ROUTED[0]):
                raise UsageError(
                    f"{what} and {key}={address}", "choose another network: the way out is in it"
                )

    @classmethod
    def parse(cls, text: str) -> Net:
        """Parse ``MODE[,key=value...]`` as on the command line."""
        mode, _, rest = text.partition(",")
        plain = PRESETS[mode][0] if mode in PRESETS else mode
        if plain not in MODES:
            raise unknown_mode(mode)
        own = MODES[plain]
        if "switchable=" in rest:  # then keys of the other modes are allowed, too
            own = tuple({key: 0 for keys in MODES.values() for key in keys})
        keys = (*COMMON_KEYS, *own) if mode != "none" else ()
        return cls(mode, **cls._pairs(mode, rest, keys))

    @staticmethod
    def _pairs(mode: str, rest: str, keys: Sequence[str]) -> dict[str, str]:
        """The key=value pairs of ``rest``, as arguments of ``Net``."""
        given: dict[str, str] = {}
        for item in filter(None, rest.split(",")):
            key, equals, value = item.partition("=")
            if key not in keys or not equals:
                raise UsageError(
                    f"--net {mode}: unknown key {key!r}",
                    f"{did_you_mean(key, keys)}keys: {', '.join(keys) or 'none'}",
                )
            name = "with_" if key == "with" else key.replace("-", "_")
            if name in given:
                raise UsageError(f"--net {mode}: {key} is given twice", "give it once")
            given[name] = value
        return given

    @property
    def has_tap(self) -> bool:
        """Whether the card has a tap of ours. A vhost-user back-end with a socket has its own port,
        and so has a vDPA device of somebody else's.
        """
        own = {"vhost-user": self.socket, "vhost-vdpa": self.device, "user": "libslirp"}
        return any(not own.get(mode) for mode in (self.mode, *self.switchable))

    @property
    def way_out(self) -> bool:
        """Whether the guest reaches what the user can reach, by libslirp."""
        return self.mode == "user" or self.internet

    @property
    def own_network(self) -> bool:
        """Whether pyvmm makes the network behind the card, and chooses addresses for both ends."""
        return self.tap is None and self.bridge is None and not self.fds and not self.macvtap

    @property
    def may_offload(self) -> bool:
        """Whether a vDPA device of somebody else's may serve the card, which may have pages for
        kicks.
        """
        return bool(self.device) and "vhost-vdpa" in (self.mode, *self.switchable)

    def switched(self, to: str | Net) -> Net:
        """This card with another data path.

        :param to: ``MODE[,key=value...]`` with keys of ``PATH_KEYS``, or a ``Net`` of which only
            these keys count. A text without ``socket`` keeps the card's own back-end.
        :raises UsageError: the mode is unknown, or has no such key.
        """
        if isinstance(to, Net):
            mode = to.mode
            given: dict[str, Any] = {"poll": to.poll, "worker_cpu": to.worker_cpu}
            given |= {"worker": to.worker, "batch": "on" if to.batch else "off"}
            given |= {"socket": to.socket or None, "server": "on" if to.server else "off"}
            given |= {"peer": to.peer, "device": to.device or None}
        else:
            mode, _, rest = to.partition(",")
            if mode in PRESETS:
                raise UsageError(
                    f"{mode} is chosen at the start: features and notify= belong to the card",
                    "switch to emulated,worker=vcpu,batch=off",
                )
            if mode not in MODES or mode == "none":
                raise UsageError(f"unknown mode {mode!r}", f"modes: {', '.join(list(MODES)[1:])}")
            given = dict(self._pairs(mode, rest, [k for k in MODES[mode] if k in PATH_KEYS]))
            if mode == "vhost-user" and "socket" not in given and self.socket:
                given |= {"socket": self.socket, "server": "on" if self.server else "off"}
                given.setdefault("peer", self.peer)
            if mode == "vhost-vdpa" and "device" not in given and self.device:
                given["device"] = self.device
        if mode == "none" or self.mode == "none":
            raise UsageError("a card cannot be switched to none", "pull the cable: set_link(False)")
        if (mode == "user") != (self.mode == "user"):
            raise UsageError(
                f"a card of mode {self.mode} cannot be switched to {mode}", "mode user has no tap"
            )
        return Net(
            mode,
            mac=self.mac,
            mtu=self.mtu,
            queues=self.queues,
            queue_size=self.queue_size,
            notify=self.notify,
            interrupt=self.interrupt,
            **given,
        )

    def excluded(self) -> int:
        """The feature bits that the card does not offer, whatever its data paths can honour, as a
        mask. A kick has no room for data over MMIO, where KVM tells the virtqueues apart by the
        whole value that is written, nor if it may go to a device that has not agreed to data.
        """
        plain = ["notification-data"] if self.transport == "mmio" or self.may_offload else []
        return mask([*self.without, *plain]) | mask(set(ON_REQUEST) - set(self.with_))

    def check_offer(self, mode: str, features: int) -> None:
        """Check that the data path ``mode``, which has ``features``, honours all of ``with_``.

        :raises UsageError: it cannot.
        """
        for group in self.with_:
            if mask([group]) & ~features and group not in OF_THE_CARD:
                new = group in OF_NEW_HOSTS
                raise UsageError(
                    f"--net: with={group}: the data path {mode} cannot honour it here",
                    f"leave out with={group}, "
                    + ("which emulated has on Linux 6.17 or later" if new else f"or {mode}"),
                )


def fault_place(net: Net) -> str:
    """Where faults on demand are done on a card's data path: ``worker``, of this process;
    ``backend``, our own; ``tap``, by tc(8). Empty if nothing of ours can do them.
    """
    if net.mode in ("emulated", "user"):
        return "worker"
    if net.mode == "vhost-user":
        return "" if net.socket else "backend"
    if net.mode == "vhost-vdpa" and net.device:
        return ""
    return "" if net.fds or net.macvtap or net.mode == "none" else "tap"


def check_faults(
    name: str, net: Net, rules: Sequence[FaultRule], seed: int | str | None = None
) -> None:
    """Check that faults on demand are possible on a card's data path.

    :param name: what the message begins with. :param seed: as it was given.
    :raises UsageError: they are not; the message says why.
    """
    place = fault_place(net)
    if not place:
        why, remedy = NO_FAULTS[net.mode]
        raise UsageError(f"{name}: no faults on demand on {net.mode}: {why}", remedy)
    if place == "tap":
        from pyvmm.faulttc import shapes

        shapes(rules, f"{name}: no such fault on {net.mode}")
        if seed is not None:
            raise UsageError(
                f"{name}: no seed on {net.mode}: tc takes none",
                "leave it out, or use --net emulated",
            )


def interface_name(key: str, name: str | None) -> None:
    """:raises UsageError: ``name`` is not None, and no interface can have that name."""
    if name is not None and (
        not 0 < len(name) < 16
        or not name.isascii()
        or not name.isprintable()
        or set(name) & set(" /:%")
    ):
        raise UsageError(
            f"--net: {key}={name!r} is no interface name", "use 1 to 15 letters and digits"
        )


def descriptors(text: int | str) -> list[int]:
    """The descriptors that ``fd=`` names."""
    found = [number("fd", part, 3, FD_MAX) for part in str(text).split("+")]
    if len(set(found)) < len(found):
        raise UsageError(f"--net: fd={text}", "give one descriptor per queue pair")
    return found


def unknown_mode(mode: str) -> UsageError:
    """The error for a mode that does not exist."""
    return UsageError(
        f"--net: unknown mode {mode!r}",
        f"{did_you_mean(mode, [*MODES, *PRESETS])}modes: {', '.join([*MODES, *PRESETS])}",
    )


def number(
    key: str, value: int | str, low: int, high: int, why: str = "", *, option: str = "--net"
) -> int:
    """Parse ``value`` as an integer in [low, high]. :raises UsageError: it is not.

    :param why: what the limit comes from. :param option: the option that has the key.
    """
    text = str(value)
    # int() alone would take "1_0", " 7" and other scripts' digits.
    good = text.isascii() and text.isdecimal() and len(text) <= 10
    if not good or not low <= int(text) <= high:
        reason = f": {why}" if why else ""
        raise UsageError(f"{option}: {key}={value}", f"use {low} to {high}{reason}")
    return int(text)


def groups(key: str, text: str, known: Sequence[str] | Mapping[str, str]) -> list[str]:
    """The names in ``text``, joined by "+". :raises UsageError: one is not among ``known``."""
    names = [name for name in text.split("+") if name]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--net: {key}={name}",
                f"{did_you_mean(name, list(known))}groups, joined by +: {', '.join(known)}",
            )
    return names


def mask(names: Iterable[str]) -> int:
    """The feature bits of groups."""
    from pyvmm.spec import virtio, virtio_net

    out = 0
    for group in names:
        for name in GROUPS[group].split():
            places = (virtio_net, "VIRTIO_NET_F"), (virtio, "VIRTIO_RING_F"), (virtio, "VIRTIO_F")
            (bit,) = (
                vars(module)[f"{prefix}_{name}"]
                for module, prefix in places
                if f"{prefix}_{name}" in vars(module)
            )
            out |= 1 << bit
    return out


def parse_mac(text: str | bytes) -> bytes:
    """The six bytes of a unicast MAC address such as ``52:54:00:12:34:56``."""
    if isinstance(text, bytes):
        raw = text
    else:
        parts = text.split(":")
        good = all(len(p) in (1, 2) and set(p) <= HEX for p in parts)
        raw = bytes(int(p, 16) for p in parts) if good else b""
    if len(raw) != 6 or raw[0] & 1 or not any(raw):
        raise UsageError(
            f"--net: mac={text!r} is no unicast MAC address", "write it as 52:54:00:12:34:56"
        )
    return raw


def forwards(text: str) -> list[Forward]:
    """The ports of the host that ``hostfwd=`` names."""
    if not text:
        return []
    from pyvmm.hostnet.slirp import Forward

    found = []
    for part in text.split("+"):
        try:
            found.append(Forward(part))
        except ValueError:
            raise UsageError(
                f"--net user: hostfwd={part}", "write it as [tcp:|udp:][ADDR:]PORT-[ADDR:]PORT"
            ) from None
    return found


def ipv4(key: str, text: str) -> str:
    """Check an IPv4 address with its prefix length, and return it."""
    try:
        family, _, prefix = parse_address(text)
    except UsageError:
        family = prefix = 0
    if family != AF_INET or "/" not in text or not prefix:
        raise UsageError(f"--net: {key}={text}", "write it as 192.168.100.1/24")
    return text
