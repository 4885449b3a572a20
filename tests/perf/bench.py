"""pyvmm beside QEMU in one run: boot, throughput, round trip, exits, memory. Runs where KVM is:
`make bench` uses the testbed.

Every round runs every contestant once, in turn, with the same kernel, initramfs, command line and
tap, so that whatever disturbs the machine disturbs all. Programs and images are copied to memory
first: the speed of the testbed's shared file system is nobody's merit. Figures are medians with
(lowest..highest) of the rounds; bare times mean nothing on an emulated processor, ratios do.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

import pyvmm
from pyvmm.compare import counters
from pyvmm.compare.pinning import pinned, possible
from pyvmm.datapath.vdpa_device import find as find_vdpa
from pyvmm.errors import HostError, VdpaError
from pyvmm.host import peers, qemu
from pyvmm.images import find
from pyvmm.workloads import read_ping, read_udp

TAP, HOST, GUEST, MAC = "pvbench0", "192.168.150.1", "192.168.150.2", "52:54:00:00:00:50"
MARK = b"pyvmm-init: start"
KVM = Path("/sys/kernel/debug/kvm")
BOOT_LIMIT = 180.0  # seconds, which only a guest that does not boot takes
PAGE = 4096
MEMORY_MIB = 256  # of each guest
#: Payload of the datagrams whose number per second is measured, as in `pyvmm compare`.
DATAGRAM = 64
#: Request-response pairs: the 99th percentile is the tenth slowest.
REQUESTS = 1000
COUNTS = ("exits", "irq_injections")
STAGE = Path("/dev/shm/pyvmm-bench")
SOCKET = "/run/pyvmm-bench.sock"
#: The vDPA device that both use, and what stands for its path in a command until there is one.
CARD, NODE = "pvbench0", "@vhost-vdpa@"


def sh(*argv: str, check: bool = True) -> str:
    return subprocess.run(argv, check=check, capture_output=True, text=True).stdout


def stage_files(image: Any) -> tuple[str, str, list[str], list[str]]:
    """Copy what runs to memory; kernel, initrd, and the commands for pyvmm and for QEMU (empty
    where there is none).
    """
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir()
    kernel, initrd = (str(shutil.copy(path, STAGE)) for path in (image.kernel, image.initrd))
    spare_last_page(Path(initrd))
    mine = stage_pyvmm(Path(pyvmm.__file__).parent, STAGE)
    try:
        best = qemu.newest()
    except HostError:
        return kernel, initrd, mine, []
    if best.root:
        staged = STAGE / "qemu"
        for part in qemu.PARTS:
            source = Path(best.root, part)
            (staged / part).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, staged / part)
            else:
                shutil.copy(source, staged / part)
        best = qemu.Qemu.unpacked(str(staged), best.version)
    return kernel, initrd, mine, best.argv


def spare_last_page(initrd: Path) -> None:
    """Lengthen an initrd by zeroes, which end a cpio archive, to whole pages and 4 bytes.

    QEMU's microvm puts the initrd at the end of memory, at a page's start, and its firmware the
    ACPI tables into the last bytes of the same page. An initrd that fills this page overlaps them,
    and the kernel hangs without a message.
    """
    with initrd.open("ab") as file:
        file.write(bytes(-file.tell() % PAGE + 4))


def stage_pyvmm(package: Path, to: Path) -> list[str]:
    """Copy a built package to memory; the command that runs it."""
    to.mkdir(exist_ok=True)
    shutil.copytree(package, to / "pyvmm")
    backend = importlib.util.find_spec("_cffi_backend")
    assert backend and backend.origin
    shutil.copy(backend.origin, to)
    script = to / "run.py"
    script.write_text("import sys\nfrom pyvmm.cli import main\nsys.exit(main())\n")
    return [sys.executable, str(script)]  # Python finds what lies beside the script first


class Contestant:
    """One way to run the guest.

    :param backend: a back-end, which listens at SOCKET or serves CARD, and is started first; or
        nothing.
    """

    def __init__(
        self, name: str, argv: list[str], *, net: bool = True, backend: list[str] | None = None
    ) -> None:
        self.name = name
        self.argv = argv
        self.net = net
        self.backend = backend


def contestants(args: argparse.Namespace, image: Any) -> list[Contestant]:
    command = base64.urlsafe_b64encode(b"iperf3\0-s\0").decode().rstrip("=")
    line = f"quiet pyvmm.verbose pyvmm.net={MAC},{GUEST}/24 pyvmm.cmd={command}"
    base = f"console=ttyS0 panic=-1 pyvmm.port=0 {line}"
    cpus, memory = str(args.cpus), f"{MEMORY_MIB}M"
    kernel, initrd, mine, q = stage_files(image)
    guest = ["--host", "local", "-v", "--cpus", cpus, "--memory", memory]
    guest += ["--kernel", kernel, "--initrd", initrd, "--append", line]
    card = f"emulated,tap={TAP},mac={MAC}"
    cards = {
        "": card,
        " notify=exit": f"{card},notify=exit",
        " vhost-net": card.replace("emulated", "vhost-net"),
        " vhost-user": f"vhost-user,socket={SOCKET},mac={MAC}",
    }
    if args.vdpa:
        cards[" vhost-vdpa"] = f"vhost-vdpa,device={CARD},mac={MAC}"
    ours = {"pyvmm": mine}
    if args.beside:
        ours["other"] = stage_pyvmm(Path(args.beside, "pyvmm"), STAGE / "other")
    out: list[Contestant] = []
    served = {
        " vhost-user": ["backend", "--quiet", "--socket", SOCKET, "--tap", TAP],
        " vhost-vdpa": ["backend", "--quiet", "--vduse", CARD, "--tap", TAP],
    }
    for kind, net in cards.items():
        for name, start in ours.items():
            backend = [*start, *served[kind]] if kind in served else None
            out.append(
                Contestant(name + kind, [*start, "run", "--net", net, *guest], backend=backend)
            )
    if q:
        common = peers.qemu_guest(
            q, kernel=kernel, initrd=initrd, cmdline=base, cpus=args.cpus, memory=memory
        )
        # microvm has virtio-mmio only, for which Debian's cloud kernel has no driver: it stands for
        # boot alone.
        out.append(
            Contestant(
                "qemu microvm", [*common, "-M", "microvm,memory-backend=ram,rtc=on"], net=False
            )
        )
        for name, vhost in (("qemu q35", False), ("qemu q35 vhost", True)):
            out.append(Contestant(name, [*common, *peers.qemu_card(TAP, MAC, vhost=vhost)]))
        q35 = [
            "-M",
            "q35,memory-backend=ram",
            "-device",
            f"virtio-net-pci,netdev=n,mac={MAC},romfile=",
        ]
        user = ["-chardev", f"socket,id=c,path={SOCKET}", "-netdev", "vhost-user,id=n,chardev=c"]
        netdevs = {" vhost-user": user}
        if args.vdpa:
            netdevs[" vhost-vdpa"] = ["-netdev", f"vhost-vdpa,id=n,vhostdev={NODE}"]
        for kind, netdev in netdevs.items():
            backend = [*mine, *served[kind]]
            out.append(Contestant(f"qemu q35{kind}", [*common, *netdev, *q35], backend=backend))
    with suppress(HostError):
        out.append(
            Contestant(
                "kvmtool",
                peers.kvmtool_guest(
                    peers.kvmtool(),
                    kernel=str(shutil.copy(Path(image.kernel).with_name("bzImage"), STAGE)),
                    initrd=initrd,
                    cmdline=base,
                    cpus=args.cpus,
                    memory_mib=MEMORY_MIB,
                    tap=TAP,
                    mac=MAC,
                ),
            )
        )
    return [c for c in out if not args.only or c.name in args.only.split(",")]


def node() -> str:
    """The path of CARD; empty if there is none."""
    try:
        return find_vdpa(CARD)[0]
    except VdpaError:
        return ""


@contextmanager
def serving(argv: list[str] | None) -> Iterator[int | None]:
    """The back-end, ready, where there is to be one; yields its process id."""
    if argv is None:
        yield None
        return
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + BOOT_LIMIT
        while not (node() if "--vduse" in argv else Path(SOCKET).exists()):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the back-end is not ready")
            time.sleep(0.05)
        yield child.pid
    finally:
        child.terminate()
        child.wait()


@contextmanager
def running(contestant: Contestant, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The guest with its iperf3 server up; yields the process and the seconds from exec to init."""
    with log.open("wb") as sink:
        start = time.monotonic()
        child = subprocess.Popen(
            [word.replace(NODE, node()) for word in contestant.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert child.stdout
        fd = child.stdout.fileno()
        seen, booted = b"", 0.0
        try:
            while not booted:
                left = BOOT_LIMIT - (time.monotonic() - start)
                ready = left > 0 and select.select([fd], [], [], left)[0]
                piece = os.read(fd, 4096) if ready else b""
                if not piece:
                    raise RuntimeError(f"{contestant.name} did not boot, see {log}")
                sink.write(piece)
                seen = (seen + piece)[-8192:]
                if MARK in seen:
                    booted = time.monotonic() - start
            deadline = time.monotonic() + 30
            while contestant.net:
                try:
                    socket.create_connection((GUEST, 5201), 1).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            time.sleep(0.5)
            yield child, booted
        finally:
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def tasks(vmm: int, backend: int | None) -> list[tuple[str, int]]:
    """(role, tid) of the threads that take part."""
    out = [
        ("vcpu" if name.startswith(("vcpu", "CPU ")) else "vmm", tid)
        for tid, name in counters.threads_of(vmm).items()
    ]
    out += [("vhost", tid) for tid in counters.vhost_threads(vmm)]
    return out + [("backend", tid) for tid in counters.threads_of(backend)] if backend else out


def counts() -> dict[str, int]:
    return {name: int((KVM / name).read_text()) for name in COUNTS if (KVM / name).exists()}


def rss_mb(pid: int) -> float:
    """Resident memory beyond the guest's, which is a memfd."""
    maps = psutil.Process(pid).memory_maps()
    return sum(m.rss for m in maps if "memfd:" not in m.path) / (1 << 20)


def offloads(on: bool) -> None:
    """Offloads of the tap; the guest's side follows its negotiated features and what the tap
    accepts.
    """
    state = "on" if on else "off"
    sh(
        "ethtool",
        "-K",
        TAP,
        "tx",
        state,
        "tso",
        state,
        "gso",
        state,
        "sg",
        state,
        "gro",
        state,
        check=False,
    )


def iperf(seconds: float, *extra: str) -> tuple[float, int]:
    """Mbit/s at the receiver and packets' worth of bytes."""
    text = sh("iperf3", "-c", GUEST, "-J", "-t", str(seconds), *extra)
    end = json.loads(text)["end"]
    return end["sum_received"]["bits_per_second"] / 1e6, end["sum_received"]["bytes"]


def datagrams(seconds: float, *extra: str) -> float:
    """Datagrams per second that the receiver got from a sender that sends as many as it can."""
    text = sh(
        *("iperf3", "-c", GUEST, "-J", "-t", str(seconds), "-u", "-b", "0", "-l", str(DATAGRAM)),
        *extra,
    )
    mbit, _ = read_udp(text)
    return mbit * 1e6 / 8 / DATAGRAM


def answers() -> list[float]:
    """Milliseconds from request to answer, sorted; each request follows the answer before."""
    text = sh("ping", "-A", "-c", str(REQUESTS), GUEST)
    times = sorted(float(t) for t in re.findall(r"time=([\d.]+) ms", text))
    if len(times) < REQUESTS:
        raise RuntimeError(f"{len(times)} of {REQUESTS} pings were answered")
    return times


def measure(contestant: Contestant, args: argparse.Namespace, log: Path) -> dict[str, float]:
    """The figures of one boot. Threads are left to the scheduler first, then pinned."""
    out: dict[str, float] = {}
    with serving(contestant.backend) as backend, running(contestant, log) as (child, booted):
        out["boot s"] = booted
        out["rss MB"] = rss_mb(child.pid)
        if args.boot_only or not contestant.net:
            return out
        if args.pin != "yes":
            transfer(args, out, "free: ")
        if args.pin != "no":
            with pinned(tasks(child.pid, backend), args.cpus):
                transfer(args, out, "pinned: ")
    return out


def transfer(args: argparse.Namespace, out: dict[str, float], place: str) -> None:
    """Pings, datagrams and streams, to and from the guest that runs.

    :param place: how threads are placed: what the names of the figures begin with.
    """
    ping = sh("ping", "-q", "-c", "20", "-i", "0.05", GUEST)
    out[f"{place}rtt ms"] = read_ping(ping)[0]
    times = answers()
    for percent in (50, 99):
        out[f"{place}request-response p{percent} ms"] = times[len(times) * percent // 100]
    ways: tuple[tuple[str, tuple[str, ...]], ...] = (("to guest", ()), ("from guest", ("-R",)))
    for way, extra in ways:
        out[f"{place}{way}, {DATAGRAM} bytes, packets/s"] = datagrams(args.seconds, *extra)
    for label, on in (("on", True), ("off", False)):
        offloads(on)
        for way, extra in ways:
            before = counts()
            mbit, size = iperf(args.seconds, *extra)
            after = counts()
            key = f"{place}{way}, tap offloads {label}"
            out[f"{key} Mbit/s"] = mbit
            for name in ("exits", "irq_injections"):
                if name in before:
                    out[f"{key} {name}/MB"] = (after[name] - before[name]) / (size / 1e6)
    offloads(True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each transfer")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--boot-only", action="store_true")
    placement = parser.add_mutually_exclusive_group()
    placement.add_argument(
        "--pin",
        action="store_const",
        const="yes",
        default="both",
        help="transfers only with a CPU for each vCPU; default: once so, once free",
    )
    placement.add_argument(
        "--no-pin",
        dest="pin",
        action="store_const",
        const="no",
        help="transfers only with the threads left to the scheduler",
    )
    parser.add_argument(
        "--beside", metavar="DIR", help="a built checkout that takes part, too, as 'other'"
    )
    parser.add_argument(
        "--vdpa",
        action="store_true",
        help="vhost-vdpa, too, with a VDUSE device of pyvmm's: needs Linux 6.12",
    )
    parser.add_argument("--only", help="contestants by name, joined by commas")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--log-dir", default="/tmp", help="consoles of the guests")
    args = parser.parse_args()
    if args.pin != "no" and not possible(args.cpus):
        parser.error(f"no CPU is left beside {args.cpus} vCPUs: --no-pin")
    if args.vdpa and not Path("/dev/vduse/control").exists():
        parser.error("--vdpa: there is no /dev/vduse/control; as root: modprobe vduse vhost_vdpa")
    Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    image = find("default")
    runners = contestants(args, image)
    sh("ip", "link", "del", TAP, check=False)
    sh("ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr")
    results: dict[str, list[dict[str, float]]] = {c.name: [] for c in runners}
    try:
        sh("ip", "addr", "add", f"{HOST}/24", "dev", TAP)
        sh("ip", "link", "set", TAP, "up")
        for number in range(args.rounds):
            for c in runners:
                log = Path(args.log_dir) / f"bench-{c.name.replace(' ', '-')}-{number}.log"
                print(f"round {number + 1}/{args.rounds}: {c.name}", file=sys.stderr, flush=True)
                try:
                    results[c.name].append(measure(c, args, log))
                except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
                    print(f"  failed: {e}", file=sys.stderr, flush=True)
    finally:
        sh("ip", "link", "del", TAP, check=False)
        shutil.rmtree(STAGE, ignore_errors=True)
    show(results)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"argv": {c.name: c.argv for c in runners}, "rounds": results}, indent=1)
        )
    return 0 if all(results.values()) else 1


def show(results: dict[str, list[dict[str, float]]]) -> None:
    names = [n for n, rows in results.items() if rows]
    keys = list(dict.fromkeys(k for rows in results.values() for row in rows for k in row))
    # Ratios are to the first pyvmm: each data path is best compared in a run of its own, with
    # --only.
    first = results[names[0]] if names else []
    table = [["median (lowest..highest)", *names]]
    for key in keys:
        cells = []
        ours = [r[key] for r in first if key in r]
        mine = statistics.median(ours) if ours else 0.0
        for name in names:
            values = [r[key] for r in results[name] if key in r]
            if not values:
                cells.append("-")
                continue
            middle = statistics.median(values)
            ratio = f" x{middle / mine:.2f}" if name != names[0] and mine else ""
            cells.append(f"{middle:.4g} ({min(values):.4g}..{max(values):.4g}){ratio}")
        table.append([key, *cells])
    widths = [max(len(row[i]) for row in table) for i in range(len(names) + 1)]
    for row in table:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *rest)))


if __name__ == "__main__":
    sys.exit(main())
