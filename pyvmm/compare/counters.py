"""Everything that can be counted about a running guest, inside its VMM and from outside, as flat
sums that only grow.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import psutil

from pyvmm.datapath.base import cpu_ns
from pyvmm.errors import HostError
from pyvmm.exits.kernel_trace import TRACEFS
from pyvmm.fd import Closing, Fd
from pyvmm.hostnet.rtnetlink import Link
from pyvmm.hostnet.tap import index_of
from pyvmm.kvm.vcpu import reasons

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable
    from typing import Any

    from pyvmm.exits.ledger import Ledger
    from pyvmm.kvm.stats import Stats

#: Causes of exits to userspace, in the order of tables and pictures.
CAUSES = {
    "notify": "a kick of a queue of packets: the guest wrote its notification address",
    "pio": "another port access",
    "mmio": "another memory access",
    "halt": "the guest halted",
    "irq_window": "KVM reported that the guest takes interrupts again",
    "signal": "a signal broke KVM_RUN off",
    "other": "anything else",
}
BY_REASON = {
    "io": "pio",
    "mmio": "mmio",
    "hlt": "halt",
    "irq_window_open": "irq_window",
    "intr": "signal",
}
#: The owners of CPU time. ``vhost``: the kernel's worker. ``backend``: the vhost-user back-end's
#: process. ``vmm``: all other threads of the VMM.
ROLES = ("vcpu", "worker", "vhost", "backend", "vmm")
KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")
#: The modules that the processes of our own back-ends run, for vhost-user and for vhost-vdpa.
BACKENDS = {"pyvmm.backend.process", "pyvmm.backend.vduse_keeper"}
#: KVM's statistics that are levels or peaks, and so do not only grow.
NO_COUNTS = (
    "max_mmu_rmap_size",
    "max_mmu_page_hash_collisions",
    "guest_mode",
    "blocking",
    "nx_lpage_splits",
)


def causes(ledger: Ledger) -> dict[str, int]:
    """The exits of a ledger by cause. They add up to the ledger's total."""
    out = dict.fromkeys(CAUSES, 0)
    for line in ledger.lines:
        cause = BY_REASON.get(line.reason, "other")
        if line.role == "notify":
            cause = "notify"
        out[cause] += line.count
    return out


def lines(ledger: Ledger) -> dict[str, int]:
    """The exits of a ledger by its lines, in words."""
    out: dict[str, int] = {}
    for line in ledger.lines:
        out[line.what] = out.get(line.what, 0) + line.count
    return out


def kvm_counts(stats: Iterable[Stats]) -> dict[str, int]:
    """KVM's binary statistics, summed over ``stats``; without histograms, levels and peaks."""
    out: dict[str, int] = {}
    for one in stats:
        for name, value in one.read().items():
            if isinstance(value, int) and name not in NO_COUNTS and not name.startswith("pages_"):
                out[name] = out.get(name, 0) + value
    return out


def debugfs_dir(pid: int) -> Path:
    """KVM's debugfs directory of the one VM of process ``pid``.

    :raises HostError: there is no such directory: no debugfs, no permission, or no VM.
    """
    try:
        found = sorted(path for path in KVM_DEBUGFS.iterdir() if path.name.startswith(f"{pid}-"))
    except OSError:
        found = []
    if not found:
        raise HostError(f"its counters are not in {KVM_DEBUGFS}", "be root, with debugfs mounted")
    return found[0]


def debugfs_counts(directory: Path) -> dict[str, int]:
    """The counts of ``kvm_counts``, for the VM of another process."""
    out: dict[str, int] = {}
    for file in directory.iterdir():
        try:
            value = int(file.read_text()) if file.is_file() else None
        except (OSError, ValueError):
            continue
        if value is not None and file.name not in NO_COUNTS and not file.name.startswith("pages_"):
            out[file.name] = value
    return out


def trace_directory(pid: int) -> Path:
    """Where process ``pid`` has the tracing instance of its ``ExitTrace``."""
    return TRACEFS / "instances" / f"pyvmm-compare-{pid}"


#: The most bytes that are read of a histogram.
HISTOGRAM_MAX = 1 << 20


class Histograms(Closing):
    """Reads how often vCPUs have exited, by thread and reason, of the tracing instance that
    somebody's ``ExitTrace`` has made. All files are opened here, so that this process can be
    confined afterwards.

    :param directory: of the instance. :param reasons: whether exits in KVM are traced, too.
    :raises HostError: there is no instance, or no permission.
    """

    def __init__(self, directory: Path, *, reasons: bool) -> None:
        self._dir = directory
        self._keys = {
            "kvm_userspace_exit": "reason",
            **({"kvm_exit": "exit_reason"} if reasons else {}),
        }
        self._names: dict[int, str] = {}
        self._files: dict[str, Fd] = {}
        try:
            self._open()
            if reasons:
                text = self._event("kvm_exit", "format").read_text()
                self._names = reason_names(text, intel=Path("/sys/module/kvm_intel").is_dir())
        except OSError as e:
            self.close()
            raise HostError(
                f"exits cannot be counted by tracepoints: {e.strerror}",
                "be root, with tracefs mounted and a kernel with CONFIG_HIST_TRIGGERS",
            ) from e

    def _open(self) -> None:
        for event in self._keys:
            path = self._event(event, "hist")
            self._files[event] = Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def _event(self, event: str, file: str) -> Path:
        return self._dir / "events/kvm" / event / file

    def _read(self, event: str, tids: Container[int]) -> list[tuple[int, int]]:
        """(key, count) for the threads ``tids``."""
        fd, data = self._files[event].fileno(), bytearray()
        # Read from its beginning, the file is made anew.
        while len(data) < HISTOGRAM_MAX and (piece := os.pread(fd, 1 << 16, len(data))):
            data += piece
        rows = re.findall(
            rf"common_pid:\s*(\d+), {self._keys[event]}:\s*(\d+) \}} hitcount:\s*(\d+)",
            data.decode(),
        )
        return [(int(key), int(count)) for pid, key, count in rows if int(pid) in tids]

    def counts(self, tids: Container[int]) -> dict[str, int]:
        """Exits to userspace of the threads ``tids``, by cause. No exit counts as ``notify``,
        because the notification addresses of QEMU's guest are not known.
        """
        out = dict.fromkeys(CAUSES, 0)
        for reason, count in self._read("kvm_userspace_exit", tids):
            out[BY_REASON.get(reasons().get(reason, ""), "other")] += count
        return out

    def reasons(self, tids: Container[int]) -> dict[str, int]:
        """Exits in KVM by the processor's reason, in the words of the kernel's tracepoint; empty if
        they are not traced.
        """
        out: dict[str, int] = {}
        if "kvm_exit" in self._keys:
            for reason, count in self._read("kvm_exit", tids):
                name = self._names.get(reason, f"reason-{reason:#x}")
                out[name] = out.get(name, 0) + count
        return out

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        while self._files:
            self._files.popitem()[1].close()


class ExitTrace(Histograms):
    """Counts exits of the vCPUs of any process, by thread and reason: histograms on KVM's
    tracepoints, in a tracing instance of its own.

    :param directory: of the instance, which does not exist yet (``trace_directory``).
    :param reasons: also count exits in KVM, by the processor's reason; this slows down each exit.
    :raises HostError: no tracefs, no permission, or a kernel without CONFIG_HIST_TRIGGERS.
    """

    def __init__(self, directory: Path | None = None, *, reasons: bool = False) -> None:
        super().__init__(directory or trace_directory(os.getpid()), reasons=reasons)

    def _open(self) -> None:
        self._dir.mkdir()
        for event, key in self._keys.items():
            self._event(event, "trigger").write_text(f"hist:keys=common_pid,{key}")
        super()._open()

    def close(self) -> None:
        """Remove the instance. A second call does nothing."""
        super().close()
        for event, key in self._keys.items():
            try:
                self._event(event, "trigger").write_text(f"!hist:keys=common_pid,{key}")
            except OSError:
                pass
        try:
            self._dir.rmdir()
        except OSError:
            pass


def reason_names(text: str, *, intel: bool) -> dict[int, str]:
    """The processor's exit reasons by number, from the format of the tracepoint kvm_exit, in which
    VMX's reasons come before SVM's.
    """
    vmx, _, svm = text.partition(") : __print_symbolic(")
    out = {}
    for base, more, name in re.findall(
        r'\{ (0x[0-9a-f]+|\d+)(?: \+ (\d+))?, "([^"]+)" \}', vmx if intel else svm
    ):
        out[int(base, 0) + int(more or 0)] = name.lower()
    return out


# --- threads --------------------------------------------------------------------------------------


def task(tid: int) -> tuple[int, int, int] | None:
    """(nanoseconds of CPU time, voluntary, involuntary context switches) of a thread of any
    process; None if it has ended.
    """
    # Not psutil's CPU times: they come in hundredths of a second, and a worker that a ping wakes
    # needs less than one of those per workload.
    ran = cpu_ns(tid)
    try:
        switches = psutil.Process(tid).num_ctx_switches()
    except psutil.NoSuchProcess:
        return None
    return ran, switches.voluntary, switches.involuntary


def threads_of(pid: int) -> dict[int, str]:
    """The threads of a process by number, with their names."""
    try:
        tids = [thread.id for thread in psutil.Process(pid).threads()]
    except psutil.NoSuchProcess:
        return {}
    out = {}
    for tid in tids:
        try:
            out[tid] = psutil.Process(tid).name()
        except psutil.NoSuchProcess:
            continue  # the thread has ended meanwhile
    return out


def vhost_threads(pid: int) -> list[int]:
    """The threads of vhost in the kernel that work for process ``pid``. From Linux 6.4 on there are
    none, because they are threads of the process itself.
    """
    return [p.pid for p in psutil.process_iter(["name"]) if p.info["name"] == f"vhost-{pid}"]


def backends_of(pid: int) -> list[int]:
    """The processes that are back-ends of pyvmm's own, started by process ``pid``."""
    out = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if BACKENDS.intersection(child.cmdline()):
                out.append(child.pid)
        except psutil.Error:
            continue  # the process has ended, or has not called exec() yet
    return out


#: A snapshot of threads: (role, tid) -> (CPU nanoseconds, voluntary, involuntary switches).
if TYPE_CHECKING:
    Tasks = dict[tuple[str, int], tuple[int, int, int]]


def snapshot(tasks: Iterable[tuple[str, int]]) -> Tasks:
    """CPU time and context switches of the threads (role, tid) now."""
    return {(role, tid): got for role, tid in tasks if (got := task(tid)) is not None}


def by_role(before: Tasks, after: Tasks) -> dict[str, dict[str, Any]]:
    """What each role has used between two snapshots. A role without a thread is left out; threads
    that have ended meanwhile are not counted.
    """
    out: dict[str, dict[str, Any]] = {}
    for key, now in after.items():
        then = before.get(key, (0, 0, 0))
        one = out.setdefault(key[0], {"cpu_s": 0.0, "voluntary": 0, "involuntary": 0, "threads": 0})
        one["cpu_s"] = round(one["cpu_s"] + (now[0] - then[0]) / 1e9, 6)
        one["voluntary"] += now[1] - then[1]
        one["involuntary"] += now[2] - then[2]
        one["threads"] += 1
    return out


# --- the tap --------------------------------------------------------------------------------------


class TapCounters:
    """Packets and bytes that pass the tap ``name`` of a namespace, whatever the mode. A segmented
    packet counts once.

    :param space: pyvmm.hostnet.netns.Namespace, lent.
    """

    def __init__(self, space: Any, name: str) -> None:
        with space.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            index = index_of(name, s)
        sockets = [
            Fd(space.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach()) for _ in range(2)
        ]
        self._link = Link(index, *sockets)

    def read(self) -> dict[str, int]:
        """``packets_to_guest``, ``packets_from_guest``, ``bytes_to_guest``, ``bytes_from_guest``,
        ``drops``.
        """
        now = self._link.stats()
        return {
            "packets_to_guest": now.get("tx_packets", 0),
            "packets_from_guest": now.get("rx_packets", 0),
            "bytes_to_guest": now.get("tx_bytes", 0),
            "bytes_from_guest": now.get("rx_bytes", 0),
            "drops": now.get("tx_dropped", 0) + now.get("rx_dropped", 0),
        }

    def close(self) -> None:
        """Release the sockets."""
        self._link.close()
