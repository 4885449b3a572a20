"""Switch the data path of a running Linux guest again and again under traffic, and count what is
lost: ``make soak SWITCHES=1000``.

Numbered datagrams and a checksummed TCP stream go both ways meanwhile (``flow.c``). Runs where KVM
runs Linux, else in the testbed. The last line is the verdict, and so is the exit status: 0 if every
datagram that was sent arrived once, both checksums match, the guest saw no reset, and every switch
ended as it had to.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyvmm
from pyvmm._ext import lib
from pyvmm.card.handover import HandOver
from pyvmm.datapath.vhost_device import Vhost
from pyvmm.errors import HostError, PyvmmError
from pyvmm.images import find
from pyvmm.images.cpio import Archive

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.card.nic import Nic
    from pyvmm.card.report import SwitchReport
    from pyvmm.card.uplink import Route

ROOT = Path(__file__).resolve().parents[2]
#: UDP and TCP ports: to the guest, from the guest.
UDP, TCP = (9001, 9002), (9003, 9004)
FAULTS = ("kill", "silent", "descriptors", "ioctl")


def build(directory: str) -> str:
    """The flow program."""
    out = f"{directory}/flow"
    flags = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-static"]
    subprocess.run(["gcc", *flags, "-o", out, str(Path(__file__).with_name("flow.c"))], check=True)
    return out


def sh(script: str) -> None:
    """A shell script, which must succeed."""
    subprocess.run(["sh", "-ec", script], check=True)


def interface(name: str) -> bool:
    """Whether there is one of that name in this network namespace (/sys may show another's)."""
    return any(name == n for _, n in socket.if_nameindex())


def kill(pid: int) -> None:
    """Unless it is dead already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Injector:
    """Makes the next switch go wrong, each time in another way; the hand-over itself, not what is
    before it.
    """

    def __init__(self, nic: Nic) -> None:
        self.nic = nic
        self.armed = ""
        self.after: list[Callable[[], None]] = []
        self._run = HandOver.run
        self._set_backend = Vhost.set_backend
        injector = self

        def run(self: HandOver) -> Route:
            injector._strike()
            return injector._run(self)

        def set_backend(self: Vhost, ring: int, fd: int) -> None:
            if injector.armed == "ioctl" and fd >= 0 and ring == 1:
                raise HostError("VHOST_NET_SET_BACKEND failed: injected")
            injector._set_backend(self, ring, fd)

        HandOver.run = run  # type: ignore[method-assign]
        Vhost.set_backend = set_backend  # type: ignore[method-assign]

    def arm(self, fault: str) -> str:
        """The mode to switch to so that ``fault`` can strike."""
        self.armed = fault
        return {"ioctl": "vhost-net"}.get(fault, "vhost-user")

    def _strike(self) -> None:
        """The new path is prepared, the old one runs yet."""
        child = self.nic._uplink._backend
        pid = child.pid if child is not None else None
        if self.armed in ("kill", "silent") and pid is not None:
            os.kill(pid, signal.SIGKILL if self.armed == "kill" else signal.SIGSTOP)
            self.after.append(lambda: kill(pid))
        elif self.armed == "descriptors":
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = {int(p.name) for p in Path("/proc/self/fd").iterdir()}
            free = [fd for fd in range(4096) if fd not in used]
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[0], limits[1]))
            self.after.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))

    def calm(self) -> None:
        """Undo it."""
        self.armed = ""
        for undo in self.after:
            undo()
        self.after.clear()


class Elsewhere:
    """A vhost-user back-end with a tap of its own, on one bridge with the card's: where frames
    enter moves with each switch.

    All of it in a network namespace that this process enters.
    """

    ADDRESS = "192.168.100.1/24"

    def __init__(self, kind: str, directory: str) -> None:
        if lib.unshare(lib.CLONE_NEWNET):
            raise HostError("cannot make a network namespace")
        self.socket = f"{directory}/backend"
        sh("ip link set lo up; ip link add br0 type bridge forward_delay 0; ip link set br0 up")
        sh(f"ip addr add {self.ADDRESS} dev br0")
        if kind == "own":
            argv = [
                sys.executable,
                "-m",
                "pyvmm",
                "backend",
                "-q",
                "--socket",
                self.socket,
                "--tap",
                "tap1",
            ]
        elif shutil.which("dpdk-testpmd") is None:
            raise HostError("there is no dpdk-testpmd", "as root: apt-get install dpdk-dev")
        else:
            command = (
                "dpdk-testpmd --no-huge -m 256 --no-shconf --no-pci --lcores 0@0,1@0 "
                f"--vdev net_vhost0,iface={self.socket},queues=1 --vdev net_tap0,iface=tap1 "
                "-- --total-num-mbufs=4096 --forward-mode=io --no-mlockall"
            )
            argv = command.split()
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        atexit.register(self.close)
        until = time.monotonic() + 60
        while not (Path(self.socket).exists() and interface("tap1")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise HostError(f"{argv[0]} does not start")
            time.sleep(0.1)
        self.join("tap1")

    @staticmethod
    def join(name: str) -> None:
        """Put an interface on the bridge."""
        sh(f"ip link set {name} txqueuelen 10000 master br0 up")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def waiting(port: int, process: int) -> int | None:
    """Bytes that a UDP socket in the network namespace of a process has yet to read; None where
    there is no such socket.
    """
    for line in Path(f"/proc/{process}/net/udp").read_text().splitlines()[1:]:
        words = line.split()
        if words[1].endswith(f":{port:04X}"):
            return int(words[4].partition(":")[2], 16)
    return None


class Soak:
    """One run."""

    def __init__(self, args: argparse.Namespace, flow: str, directory: str) -> None:
        self.args, self.flow = args, flow
        self.random = random.Random(args.seed)
        image = find("default")
        extra = Archive()
        extra.file("/bin/flow", Path(flow).read_bytes(), 0o755)
        initrd = Path(directory, "initrd")
        initrd.write_bytes(Path(image.initrd).read_bytes() + extra.pack())
        self.elsewhere = Elsewhere(args.backend, directory) if args.backend else None
        keys: dict[str, Any] = {"switchable": "+".join(args.modes), "queues": args.queues}
        if args.packed:
            keys["with_"] = "packed"
        if self.elsewhere is not None:
            args.modes = [
                f"{m},socket={self.elsewhere.socket}" if m == "vhost-user" else m
                for m in args.modes
            ]
            keys |= {"socket": self.elsewhere.socket, "tap": "tap0", "guest": "192.168.100.2/24"}
        self.vm = pyvmm.Machine(
            image.kernel,
            initrd=str(initrd),
            append="quiet",
            cpus=args.cpus,
            nets=[pyvmm.Net("emulated", **keys)],
        )
        if self.elsewhere is not None:
            self.elsewhere.join("tap0")
        self.reports: list[SwitchReport] = []
        self.refused = self.asked = 0
        self.problems: list[str] = []

    # --- the guest's console ----------------------------------------------------------------------

    def sh(self, command: str, timeout: float = 120.0) -> str:
        """A command in the guest; its output."""
        self.asked += 1
        n = self.asked  # expect() looks at all that there is
        self.vm.console.send(f"echo @{n}[; {{ {command}\n}} 2>&1 </dev/null; echo ]{n}@$?@\n")
        match = self.vm.console.expect(rb"(?s)@%d\[\n(.*?)\]%d@(\d+)@\n" % (n, n), timeout)
        assert match[2] == b"0", (command, match[0])
        return match[1].decode(errors="replace")

    def log_in(self) -> None:
        self.vm.start()
        console = self.vm.console
        console.expect(r"~ # ", timeout=120)
        console.send("stty -echo -onlcr; dmesg -n 1; exec sh /dev/ttyS0\n")
        console.send("echo ready-$((6 * 7))\n")
        console.expect(r"ready-42\n", timeout=60)

    # --- traffic ----------------------------------------------------------------------------------

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        """A flow on the host's side."""
        popen = subprocess.Popen if self.elsewhere is not None else self.nic.namespace.popen
        return popen([self.flow, *argv], stdout=subprocess.PIPE, text=True)

    def stats(self) -> dict[str, int]:
        """The tap's counters."""
        tap = self.nic._uplink.tap
        assert tap is not None
        stats: dict[str, int] = tap.link().stats()
        return stats

    def start_traffic(self) -> None:
        a, here, there = self.args, "192.168.100.1", "192.168.100.2"
        # Both ends resolve addresses now: while that goes on, datagrams wait in a queue of the
        # sender's, which keeps neither all of them nor their order.
        self.sh(f"ping -c 1 -W 60 {here}")
        self.sh(
            f"flow udp-receive {UDP[0]} >/tmp/ur & echo $! >/tmp/ur.pid\n"
            f"flow tcp-receive {TCP[0]} >/tmp/tr &\n"
            f"until grep -q ':{UDP[0]:04X} ' /proc/net/udp; do sleep 0.1; done"
        )
        self.receiver, self.tcp_receiver = (
            self.popen("udp-receive", str(UDP[1])),
            self.popen("tcp-receive", str(TCP[1])),
        )
        while waiting(UDP[1], self.receiver.pid) is None:
            assert self.receiver.poll() is None, "the receiver has ended"
            time.sleep(0.1)
        self.sender = self.popen("udp-send", there, str(UDP[0]), str(a.rate), str(a.size))
        self.tcp_sender = self.popen("tcp-send", there, str(TCP[0]), str(a.tcp_kbytes))
        self.sh(
            f"flow udp-send {here} {UDP[1]} {a.rate} {a.size} >/tmp/us & echo $! >/tmp/us.pid\n"
            f"flow tcp-send {here} {TCP[1]} {a.tcp_kbytes} >/tmp/ts & echo $! >/tmp/ts.pid"
        )

    def stop_traffic(self) -> dict[str, dict[str, str]]:
        """End the senders, wait for what is under way, end the receivers; what each says."""

        def words(text: str) -> dict[str, str]:
            return dict(re.findall(r"([\w-]+)=(\w+)", text))

        self.sender.terminate()
        self.tcp_sender.terminate()
        self.sh("kill $(cat /tmp/us.pid) $(cat /tmp/ts.pid)")
        out = {"sent to guest": words(self.sender.communicate(timeout=120)[0])}
        out["TCP sent to guest"] = words(self.tcp_sender.communicate(timeout=120)[0])
        self.sh("until [ -s /tmp/us ] && [ -s /tmp/ts ] && [ -s /tmp/tr ]; do sleep 0.2; done")
        out["TCP from guest"] = words(self.tcp_receiver.communicate(timeout=120)[0])
        self.sh("ping -c 1 -W 60 192.168.100.1")  # comes after all that is in the same queue
        before = None
        while before != (before := self.stats()):
            time.sleep(1)
        while waiting(UDP[1], self.receiver.pid):
            time.sleep(0.1)
        self.receiver.terminate()
        out["from guest"] = words(self.receiver.communicate(timeout=120)[0])
        self.sh(
            f"until grep ':{UDP[0]:04X} ' /proc/net/udp | grep -q ' 00000000:00000000 '; do "
            "sleep 0.1; done"
        )
        self.sh("kill $(cat /tmp/ur.pid); until [ -s /tmp/ur ]; do sleep 0.2; done")
        for name, file in (
            ("to guest", "ur"),
            ("sent from guest", "us"),
            ("TCP sent from guest", "ts"),
            ("TCP to guest", "tr"),
        ):
            out[name] = words(self.sh(f"cat /tmp/{file}"))
        return out

    # --- switching --------------------------------------------------------------------------------

    def one(self, injector: Injector | None, number: int) -> None:
        choices = [m for m in self.args.modes if m.partition(",")[0] != self.nic.mode]
        target, fault = self.random.choice(choices), ""
        if injector is not None and number % 2:
            fault = self.random.choice(self.args.faults)
            wanted = injector.arm(fault)
            if self.nic.mode == wanted:  # it strikes on the way there
                injector.armed = ""
                self.nic.switch("emulated")
                injector.armed = fault
            target = wanted
        try:
            report = self.nic.switch(target)
        except PyvmmError as e:
            self.refused += 1
            if not fault:
                self.problems.append(f"switch {number} to {target}: {e}")
            return
        finally:
            if injector is not None:
                injector.calm()
        self.reports.append(report)
        good = ("switched", "rolled-back", "fallback") if fault else ("switched",)
        if report.outcome not in good:
            self.problems.append(f"switch {number}: {report!r}")
        if self.args.verbose:
            print(fault, report, report.as_dict(), flush=True)

    def switch_all(self) -> None:
        injector = Injector(self.nic) if self.args.faults else None
        began = time.monotonic()
        for number in range(1, self.args.switches + 1):
            self.one(injector, number)
            if number % 50 == 0:
                rate = number / (time.monotonic() - began)
                print(
                    f"{number} switches, {rate:.1f} a second, {len(self.problems)} problems",
                    flush=True,
                )
            time.sleep(self.random.random() * self.args.pause)

    def run(self) -> bool:
        with self.vm:
            self.nic = self.vm.nets[0]
            self.log_in()
            self.start_traffic()
            drops = self.stats()["tx_dropped"]
            self.switch_all()
            told = self.stop_traffic()
            drops = self.stats()["tx_dropped"] - drops
            device = self.nic.device
            if device.faults or device.resets:
                self.problems.append(f"faults {device.faults}, resets {device.resets}")
            report: dict[str, Any] = self.nic.report()
        for name, words in told.items():
            print(f"{name:20}", " ".join(f"{k}={v}" for k, v in words.items()))
        lost = self.judge(told, drops)
        self.print_gaps()
        for mode, stretch in report["modes"].items():
            exits = stretch["exits"]["kvm_run_returns"]
            print(
                f"{mode}: in force {stretch['times']} times, {stretch['seconds']:.1f} s, "
                f"{exits} exits to the VMM"
            )
        for problem in self.problems[:20]:
            print("problem:", problem)
        good = not self.problems
        outcomes = {
            o: sum(r.outcome == o for r in self.reports) for o in {r.outcome for r in self.reports}
        }
        said = ", ".join(f"{n} {o}" for o, n in sorted(outcomes.items()))
        print(
            f"{'PASS' if good else 'FAIL'}: {self.args.switches} switches "
            f"({said}, {self.refused} refused): {lost}, "
            f"gap p50 {self.percentile(50):.1f} ms, p99 {self.percentile(99):.1f} ms, "
            f"max {self.percentile(100):.1f} ms"
        )
        return good

    def judge(self, told: dict[str, dict[str, str]], drops: int) -> str:
        """Compare what was sent with what arrived."""
        lost = repeated = total = 0
        for way in ("to", "from"):
            sent, got = told[f"sent {way} guest"], told[f"{way} guest"]
            missing = int(sent["sent"]) - (int(got["received"]) - int(got["repeated"]))
            if int(got["overflows"]) or int(got["bad"]):
                self.problems.append(
                    f"{way} guest: the receiver was too slow, or got rubbish: {got}"
                )
            if way == "to" and self.args.backend == "dpdk":
                stale = sum(r.stale for r in self.reports)
                print(
                    f"{missing} datagrams came where no data path was "
                    f"(of them {stale} found later): not accepted"
                )
                missing = 0
            lost, repeated = lost + missing, repeated + int(got["repeated"])
            total += int(sent["sent"])
            # With several queues, or places, each has an order of its own.
            if int(got["disordered"]) and self.args.queues == 1 and not self.args.backend:
                self.problems.append(
                    f"{way} guest: {got['disordered']} datagrams out of order, "
                    f"the first of them {got['first-disordered']}"
                )
            mine, theirs = told[f"TCP sent {way} guest"], told[f"TCP {way} guest"]
            if mine != theirs or int(mine["bytes"]) == 0:
                self.problems.append(f"TCP {way} guest: {mine} sent, {theirs} received")
        if drops:  # multicast that the guest has not asked for, in most cases
            print(
                f"{drops} frames were dropped before the device, by its filter or for a full queue"
            )
        if lost or repeated:
            self.problems.append(f"{lost} datagrams lost, {repeated} repeated")
        if self.args.rate and total == 0:
            self.problems.append("nothing was sent")
        return f"{total} datagrams, {lost} lost, {repeated} repeated"

    def percentile(self, p: int, target: str = "") -> float:
        gaps = sorted(g for r in self.reports if target in ("", r.mode) for g in r.gap_ns.values())
        return gaps[min(len(gaps) - 1, len(gaps) * p // 100)] / 1e6 if gaps else 0.0

    def print_gaps(self) -> None:
        for mode in sorted({r.mode for r in self.reports}):
            p50, p99, worst = (self.percentile(p, mode) for p in (50, 99, 100))
            print(f"gap to {mode}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {worst:.1f} ms")
        for way in ("rx", "tx"):
            gaps = sorted(r.gap_ns[way] for r in self.reports if way in r.gap_ns)
            if gaps:
                print(
                    f"gap {way}: p50 {gaps[len(gaps) // 2] / 1e6:.1f} ms, "
                    f"p99 {gaps[len(gaps) * 99 // 100] / 1e6:.1f} ms"
                )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--switches", type=int, default=1000)
    add("--modes", help="modes to go round, joined by + (all; with --packed, not vhost-net)")
    add("--packed", action="store_true", help="with packed virtqueues")
    add(
        "--faults",
        nargs="?",
        const="+".join(FAULTS),
        default="",
        help="every other switch fails: kinds, joined by +",
    )
    add("--rate", type=int, default=500, help="datagrams a second each way")
    add("--size", type=int, default=400, help="bytes of each")
    add("--tcp-kbytes", type=int, default=400, help="a second each way")
    add("--pause", type=float, default=0.1, help="seconds between two switches at most")
    add("--queues", type=int, default=1)
    add("--cpus", type=int, default=1)
    add(
        "--backend",
        choices=("own", "dpdk"),
        help="for vhost-user, one with a tap of its own, bridged with the card's",
    )
    add("--seed", type=int, default=1)
    add("--verbose", action="store_true")
    add("--flow", help=argparse.SUPPRESS)  # built already
    args = parser.parse_args()
    if args.modes is None:
        args.modes = "emulated+vhost-user" if args.packed else "emulated+vhost-net+vhost-user"
    args.modes, args.faults = args.modes.split("+"), [f for f in args.faults.split("+") if f]
    return args


def main() -> int:
    from pyvmm.doctor import can_run_linux_locally
    from pyvmm.testbed.testbed import Testbed, inside

    args = parse()
    with tempfile.TemporaryDirectory(prefix="pyvmm-soak-") as directory:
        flow = args.flow or build(directory)
        if not inside() and not args.flow:
            good, reason = can_run_linux_locally()
            if not good or not os.access("/dev/vhost-net", os.R_OK | os.W_OK):
                print(f"{reason}; running in the testbed", file=sys.stderr)
                argv = [sys.executable, "-m", "tests.perf.soak", "--flow", flow, *sys.argv[1:]]
                return Testbed().run_attached(argv)
        threading.current_thread().name = "soak"
        return 0 if Soak(args, flow, directory).run() else 1


if __name__ == "__main__":
    sys.exit(main())
