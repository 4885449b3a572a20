"""What to compare (modes, peers, workloads), how often, and the names that the results use."""

from __future__ import annotations

from pyvmm.errors import UsageError
from pyvmm.netopt import MODES, PRESETS, Net

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal, TypeVar

    Word = TypeVar("Word", bound=str)
    Kind = Literal["pyvmm", "qemu", "kvmtool"]

DEFAULT_MODES = "emulated:notify=exit,emulated,vhost-net,vhost-user"
#: Keys of --net that the comparison itself sets, or that would change the workload.
FORBIDDEN = (
    *("tap", "bridge", "macvtap", "fd", "mac", "host", "guest", "socket", "device", "server"),
    "link",
)
#: The addresses on every network: the host's end and the guest's.
HOST, GUEST, PREFIX, MAC = "192.168.100.1", "192.168.100.2", 24, "52:54:00:12:34:56"
#: Datagrams of ``udp-small``: payload bytes, and bits per second (1000 datagrams).
UDP_BYTES, UDP_RATE = 64, 512_000
#: Workloads of datagrams, and their bits per second; 0: as many as can be had.
UDP = {"udp-small": UDP_RATE, "pps-tx": 0, "pps-rx": 0}
PING_INTERVAL = 0.05  # seconds
MAX_REPEAT, MAX_SECONDS = 1000, 3600

#: Name -> description. The host's side drives all workloads, so that they need no console.
WORKLOADS = {
    "ping": "pings from the host, 50 ms apart",
    "tcp-tx": "one TCP stream from the guest (iperf3 -R)",
    "tcp-rx": "one TCP stream to the guest (iperf3)",
    "udp-small": "64-byte UDP from the guest, 1,000 per second (iperf3 -u)",
    "pps-tx": "64-byte UDP from the guest, as much as it can (iperf3 -u -b 0 -R)",
    "pps-rx": "64-byte UDP to the guest, as much as the host can (iperf3 -u -b 0)",
    "idle": "nothing",
}
#: What a comparison runs if it is not told.
DEFAULT_WORKLOADS = ("ping", "tcp-tx", "tcp-rx", "udp-small", "idle")
PEERS: tuple[Kind, ...] = ("qemu", "kvmtool")


class Mode:
    """One column of the table: a data path of pyvmm, or another program.

    :ivar name: as the user wrote it.
    :ivar kind: ``pyvmm``, ``qemu`` or ``kvmtool``.
    :ivar net: the card's ``MODE[,key=value...]``; empty for other programs.
    :ivar vhost: the mode needs /dev/vhost-net.
    :ivar append: more kernel command line. :ivar huge: guest memory in huge pages.
    """

    __slots__ = ("append", "huge", "kind", "name", "net", "vhost")

    def __init__(
        self,
        name: str,
        kind: Kind = "pyvmm",
        net: str = "",
        *,
        vhost: bool = False,
        append: str = "",
        huge: bool = False,
    ) -> None:
        self.name, self.kind, self.net, self.vhost = name, kind, net, vhost
        self.append, self.huge = append, huge


def parse_mode(text: str) -> Mode:
    """A mode of --net, its keys joined by colons: ``emulated:notify=exit``.

    :raises UsageError: an unknown mode or key, or a key that the comparison itself sets.
    """
    mode, *keys = text.split(":")
    if mode not in (*MODES, *PRESETS) or mode == "none":
        known = ", ".join(m for m in (*MODES, *PRESETS) if m != "none")
        raise UsageError(
            f"--modes: unknown mode {mode!r}", f"modes: {known}; keys follow after colons"
        )
    for key in keys:
        if key.partition("=")[0] in FORBIDDEN:
            raise UsageError(
                f"--modes {text}: {key.partition('=')[0]}= is the comparison's own", "leave it out"
            )
    net = ",".join((mode, *keys))
    Net.parse(net)  # raises an error that says what is wrong
    return Mode(text, net=net, vhost=mode == "vhost-net")


def parse_list(option: str, text: str, known: tuple[Word, ...]) -> list[Word]:
    """Parse names joined by commas, each of ``known`` at most once.

    :raises UsageError: a name is unknown or given twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    words: dict[str, Word] = {word: word for word in known}
    for name in names:
        if name not in words:
            raise UsageError(f"{option}: unknown {name!r}", f"use {', '.join(known)}")
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{option} {text!r}", "name each once, joined by commas")
    return [words[name] for name in names]


class Plan:
    """A whole comparison.

    :param rungs: these modes in place of ``modes`` and ``peers``: a ladder, lowest first.
    :param repeat: boots of each mode, 1 to 1000.
    :param seconds: of each workload, 0.2 to 3600.
    :param kernel, initrd: files of the guest.
    :param image: the name of kernel and initrd in the results.
    :param append: kernel command line beside what pyvmm adds.
    :param samples: seconds between two samples of the counters.
    :param reasons: trace the processor's reasons of exits in KVM, too.
    :param pin: give each vCPU a CPU of its own, if there is one more for everything else.
    :raises UsageError: a value makes no sense.
    """

    def __init__(
        self,
        *,
        modes: str = DEFAULT_MODES,
        peers: str = "",
        rungs: Sequence[Mode] = (),
        workloads: str = ",".join(DEFAULT_WORKLOADS),
        repeat: int = 3,
        seconds: float = 3.0,
        cpus: int = 1,
        memory: str = "256M",
        kernel: str = "",
        initrd: str | None = None,
        image: str = "",
        append: str = "",
        samples: float = 0.1,
        reasons: bool = False,
        pin: bool = True,
    ) -> None:
        self.ladder = bool(rungs)
        self.modes = list(rungs) or [
            parse_mode(text.strip()) for text in modes.split(",") if text.strip()
        ]
        if peers:
            for peer in parse_list("--peers", peers, PEERS):
                self.modes.append(Mode(peer, peer))
                if peer == "qemu":
                    self.modes.append(Mode("qemu:vhost", peer, vhost=True))
        names = [mode.name for mode in self.modes]
        if not names or len(set(names)) < len(names):
            raise UsageError(f"--modes {modes!r}", "name each once, joined by commas")
        self.workloads = parse_list("--workload", workloads, tuple(WORKLOADS))
        if not 1 <= repeat <= MAX_REPEAT:
            raise UsageError(f"--repeat {repeat}", f"use 1 to {MAX_REPEAT}")
        if not 0.2 <= seconds <= MAX_SECONDS:
            raise UsageError(f"--seconds {seconds:g}", f"use 0.2 to {MAX_SECONDS}")
        self.repeat, self.seconds, self.samples = repeat, seconds, samples
        self.reasons, self.pin = reasons, pin
        self.cpus, self.memory = cpus, memory
        self.kernel, self.initrd, self.image, self.append = kernel, initrd, image, append

    def servers(self) -> list[str]:
        """Workloads that need an iperf3 server in the guest, in the order of their ports, which
        begin with 5201.
        """
        return [w for w in self.workloads if w not in ("ping", "idle")]

    def port(self, workload: str) -> str:
        """The port of a workload's server. Each workload has its own port, because a server that
        has just served is busy for a moment.
        """
        return str(5201 + self.servers().index(workload))
