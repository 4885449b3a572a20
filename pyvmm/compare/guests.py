"""A guest on one data path of pyvmm, or in another program: booted, ready for workloads, and
countable. All guests have the same interface for the code that runs workloads on them.
"""

from __future__ import annotations

import base64
import os
import re
import select
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from pyvmm import __version__
from pyvmm.assembly import BASE_CMDLINE
from pyvmm.compare import counters, plan
from pyvmm.errors import GuestEnded, GuestTimeout, HostError
from pyvmm.host import peers
from pyvmm.host.qemu import newest
from pyvmm.host.tether import tethered
from pyvmm.hostnet import tools
from pyvmm.hostnet.netns import Namespace
from pyvmm.kvm.stats import Stats
from pyvmm.machine import Machine
from pyvmm.memory import parse_size
from pyvmm.netopt import Net
from pyvmm.virtio.features import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Self

    from pyvmm.compare.counters import Histograms, Tasks
    from pyvmm.compare.plan import Mode, Plan
    from pyvmm.hostnet.netns import Namespace

    class Guest(Protocol):
        """A context manager that leaves nothing behind; ``open_guest`` makes it."""

        space: Namespace
        sandbox: str | None  #: how its VMM is confined; None for another program

        def __enter__(self) -> Self: ...
        def __exit__(self, *exc: object) -> None: ...
        def boot(self) -> float:
            """Let the guest run until its servers listen; returns the seconds that this took."""

        def check(self) -> None:
            """:raises PyvmmError: why the guest has ended, if it is known."""

        def counts(self) -> dict[str, dict[str, int]]:
            """Groups of sums that only grow: ``causes`` and ``lines`` of the ledger, ``kvm``, the
            processor's ``reasons``, ``packets``, ``queues``. A group is empty if it is not known.
            """

        def quick(self) -> tuple[int, int]:
            """(exits to userspace, exits in KVM) up to now; this is quick."""

        def tasks(self) -> Tasks:
            """CPU time and context switches of the guest's threads now."""

        def facts(self) -> dict[str, Any]:
            """Facts that do not change: ``offered``, ``negotiated``, ``version``. ``notes`` say
            what is not known.
            """


READY, FEATURES = "pyvmm-compare: ready", "pyvmm-compare: features"
TAP = "tap0"
#: Seconds from the start to READY; seconds of a tool beyond the time that it is told to run.
BOOT_LIMIT, TOOL_LIMIT = 180.0, 60.0


def guest_command(p: Plan) -> list[str]:
    """The guest's command: an iperf3 server for each workload that needs one."""
    servers = p.servers()
    ports = " ".join(p.port(w) for w in servers)
    script = (
        f"for p in {ports}; do iperf3 -s -p $p >/dev/null 2>&1 & done\n"
        "until [ \"$(cat /proc/net/tcp* | grep -c ' 0A ')\" "
        f"= {len(servers)} ]; do sleep 0.1; done\n"
        f'echo "{FEATURES} $(cat /sys/bus/virtio/devices/virtio0/features)"\n'
        f"echo '{READY}'\nwhile :; do sleep 1000; done"
    )
    return ["sh", "-c", script]


def open_guest(p: Plan, mode: Mode, trace: Histograms | None, sandbox: str) -> Guest:
    """The guest of a mode. It is made when the context is entered.

    :param sandbox: how this process is confined then, if the guest is pyvmm's.
    """
    if mode.kind == "pyvmm":
        return OwnGuest(p, mode, trace, sandbox)
    return PeerGuest(p, mode, trace)


class OwnGuest:
    """A guest of pyvmm, in this process, which is confined for good once the guest is made. For
    vhost-user its card starts a back-end process.
    """

    def __init__(self, p: Plan, mode: Mode, trace: Histograms | None, sandbox: str) -> None:
        self._plan, self._mode, self._trace, self._want = p, mode, trace, sandbox
        self.sandbox: str | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        p, stack = self._plan, self._stack
        self._others = set(threading.enumerate())
        self._vm = stack.enter_context(
            Machine(
                p.kernel,
                initrd=p.initrd,
                append=f"{p.append} {self._mode.append}".rstrip(),
                cpus=p.cpus,
                memory=p.memory,
                huge=self._mode.huge,
                nets=[Net.parse(f"{self._mode.net},mac={plan.MAC}")],
                command=guest_command(p),
                sandbox=self._want,
            )
        )
        self._nic = self._vm.nets[0]
        self.space = self._nic.namespace
        self._tap = counters.TapCounters(self.space, TAP)
        stack.callback(self._tap.close)
        tools.permit()
        self._vm.confine()
        self.sandbox = self._vm.sandbox

    def boot(self) -> float:
        """See Guest."""
        start = time.monotonic()
        self._vm.start()
        self._stats = []
        if self._vm.kvm.extension("KVM_CAP_BINARY_STATS_FD"):
            for vcpu in self._vm.vcpus:
                self._stats.append(self._stack.enter_context(Stats(vcpu.fileno())))
        while True:
            try:
                self._vm.stdout.expect(READY, 1)
                break
            except TimeoutError:
                outcome = self._vm.outcome
                if outcome is not None:
                    raise outcome.error() or GuestEnded(
                        "the guest ended before it was ready"
                    ) from None
                if time.monotonic() - start > BOOT_LIMIT:
                    raise GuestTimeout(f"the guest was not ready within {BOOT_LIMIT:g} s") from None
        return time.monotonic() - start

    def check(self) -> None:
        """See Guest."""
        error = self._vm.outcome.error() if self._vm.outcome is not None else None
        if error is not None:
            raise error

    def counts(self) -> dict[str, dict[str, int]]:
        """See Guest."""
        queues = {
            name: value
            for name, value in self._nic.counters().items()
            if name.endswith(("_kicks", "_calls", "_calls_suppressed"))
        }
        ledger = self._vm.ledger()
        vcpus = {t.native_id or 0 for t in threading.enumerate() if t.name.startswith("vcpu")}
        return {
            "reasons": self._trace.reasons(vcpus) if self._trace else {},
            "causes": counters.causes(ledger),
            "lines": counters.lines(ledger),
            "kvm": counters.kvm_counts(self._stats),
            "packets": self._tap.read(),
            "queues": queues,
        }

    def quick(self) -> tuple[int, int]:
        """See Guest."""
        exits = 0
        for stats in self._stats:
            value = stats.read().get("exits", 0)
            exits += value if isinstance(value, int) else 0
        return sum(vcpu.runs for vcpu in self._vm.vcpus), exits

    def tasks(self) -> Tasks:
        """See Guest. Threads that ran in this process before the guest are not counted."""
        kind = "vhost" if self._nic.net.mode == "vhost-net" else "worker"
        keys = []
        moving = set()
        for worker in self._nic.device.datapath.workers():
            tid = int(str(worker["tid"]))
            moving.add(tid)
            keys.append((kind, tid))
        for thread in threading.enumerate():
            tid = thread.native_id or 0
            if thread in self._others or tid in moving or thread.name.startswith("compare"):
                continue
            keys.append(("vcpu" if thread.name.startswith("vcpu") else "vmm", tid))
        for pid in counters.backends_of(os.getpid()):
            keys += [("backend", tid) for tid in counters.threads_of(pid)]
        return counters.snapshot(keys)

    def facts(self) -> dict[str, Any]:
        """See Guest."""
        device = self._nic.device
        return {
            "version": f"pyvmm {__version__}",
            "offered": names(device.offered()),
            "negotiated": names(device.negotiated),
        }


class PeerGuest:
    """The same guest on QEMU or kvmtool, counted from outside."""

    sandbox: str | None = None

    def __init__(self, p: Plan, mode: Mode, trace: Histograms | None) -> None:
        self._plan, self._mode, self._trace = p, mode, trace
        self._stack = ExitStack()
        self._said = b""
        self._kvm: Path | None = None
        self._notes: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _make(self) -> None:
        self._argv = self._command()
        self.space = self._stack.enter_context(Namespace(name="unused"))
        self.space.tap.close()
        script = (
            f"ip tuntap add dev {TAP} mode tap vnet_hdr && "
            f"ip addr add {plan.HOST}/{plan.PREFIX} dev {TAP} && ip link set {TAP} up"
        )
        done = self.space.run(
            ["sh", "-c", script], capture_output=True, text=True, timeout=TOOL_LIMIT
        )
        if done.returncode:
            raise HostError(f"cannot make a tap: {(done.stdout + done.stderr).strip()[-200:]}")
        self._tap = counters.TapCounters(self.space, TAP)
        self._stack.callback(self._tap.close)

    def _command(self) -> list[str]:
        p = self._plan
        raw = b"".join(arg.encode() + b"\0" for arg in guest_command(p))
        cmdline = (
            f"{BASE_CMDLINE} pyvmm.port=0 pyvmm.net={plan.MAC},{plan.GUEST}/{plan.PREFIX} "
            f"pyvmm.cmd={base64.urlsafe_b64encode(raw).decode().rstrip('=')} {p.append}"
        ).rstrip()
        if self._mode.kind == "kvmtool":
            kernel = p.kernel
            beside = Path(kernel).with_name("bzImage")
            if Path(kernel).name == "vmlinux" and beside.exists():
                kernel = str(beside)  # the same kernel; kvmtool loads no ELF
            program = peers.kvmtool()
            return peers.kvmtool_guest(
                program,
                kernel=kernel,
                initrd=p.initrd,
                cmdline=cmdline,
                cpus=p.cpus,
                memory_mib=parse_size(p.memory) >> 20,
                tap=TAP,
                mac=plan.MAC,
            )
        program = newest().argv
        if self._mode.vhost and not os.access("/dev/vhost-net", os.R_OK | os.W_OK):
            raise HostError(
                "/dev/vhost-net is missing or forbidden", "modprobe vhost_net; or --host testbed"
            )
        argv = peers.qemu_guest(
            program,
            kernel=p.kernel,
            initrd=p.initrd,
            cmdline=cmdline,
            cpus=p.cpus,
            memory=f"{parse_size(p.memory) >> 20}M",
        )
        return [*argv, *peers.qemu_card(TAP, plan.MAC, vhost=self._mode.vhost)]

    def boot(self) -> float:
        """See Guest."""
        start = time.monotonic()
        child = self.space.popen(
            tethered(self._argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._child = child
        assert child.stdout
        self._stack.callback(child.stdout.close)
        self._stack.callback(_terminate, child)
        fd = child.stdout.fileno()
        while READY.encode() not in self._said:
            left = BOOT_LIMIT - (time.monotonic() - start)
            if left <= 0:
                raise GuestTimeout(f"the guest was not ready within {BOOT_LIMIT:g} s")
            piece = os.read(fd, 65536) if select.select([fd], [], [], left)[0] else b""
            if not piece and child.poll() is not None:
                last = self._said.decode(errors="replace").strip().splitlines()[-1:] or [
                    "it said nothing"
                ]
                raise GuestEnded(
                    f"{self._mode.kind} ended before the guest was ready: {last[0][:200]}"
                )
            self._said = (self._said + piece)[-65536:]
        drain = threading.Thread(target=self._drain, args=(fd,), name="compare-drain", daemon=True)
        drain.start()
        self._stack.callback(drain.join, 5)  # after the child has ended, before its pipe is closed
        self._stack.callback(_terminate, child)
        try:
            self._kvm = counters.debugfs_dir(child.pid)
        except HostError as e:
            self._notes.append(str(e))
        return time.monotonic() - start

    def check(self) -> None:
        """See Guest. The workloads tell."""

    @staticmethod
    def _drain(fd: int) -> None:
        """Read the guest's later output, because a full pipe would stop the guest."""
        try:
            while os.read(fd, 65536):
                pass
        except OSError:
            pass

    def counts(self) -> dict[str, dict[str, int]]:
        """See Guest."""
        causes: dict[str, int] = {}
        reasons: dict[str, int] = {}
        if self._trace is not None:
            tids = set(counters.threads_of(self._child.pid))
            causes, reasons = self._trace.counts(tids), self._trace.reasons(tids)
        kvm = counters.debugfs_counts(self._kvm) if self._kvm else {}
        return {
            "reasons": reasons,
            "causes": causes,
            "lines": {},
            "kvm": kvm,
            "packets": self._tap.read(),
            "queues": {},
        }

    def quick(self) -> tuple[int, int]:
        """See Guest."""
        user = 0
        if self._trace is not None:
            user = sum(self._trace.counts(set(counters.threads_of(self._child.pid))).values())
        return user, int((self._kvm / "exits").read_text()) if self._kvm else 0

    def tasks(self) -> Tasks:
        """See Guest."""
        pid = self._child.pid
        keys = []
        for tid, name in counters.threads_of(pid).items():
            role = "vcpu" if name.startswith(("CPU ", "kvm-vcpu")) else "vmm"
            keys.append(("vhost" if name.startswith("vhost-") else role, tid))
        keys += [("vhost", tid) for tid in counters.vhost_threads(pid)]
        return counters.snapshot(keys)

    def facts(self) -> dict[str, Any]:
        """See Guest. The guest's kernel reports the negotiated features, one digit per bit. Nothing
        reports the offered ones.
        """
        version = subprocess.run(
            [self._argv[0], "version" if self._mode.kind == "kvmtool" else "--version"],
            capture_output=True,
            text=True,
            timeout=TOOL_LIMIT,
        ).stdout.splitlines()
        match = re.search(rf"{FEATURES} ([01]+)".encode(), self._said)
        bits = int(match[1][::-1], 2) if match else 0
        return {
            "version": version[0] if version else self._mode.kind,
            "offered": [],
            "negotiated": names(bits),
            "notes": self._notes,
        }


def _terminate(child: subprocess.Popen[Any]) -> None:
    """End a child process of ours, if it has not ended yet."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
