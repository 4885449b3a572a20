"""One boot of a mode: its workloads, one after another, each counted from its start to its end.

Counters are read right before and right after a workload, so that neither the boot nor the other
workloads are in its figures.
"""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext

from pyvmm import helper
from pyvmm.compare import counters, plan
from pyvmm.compare.guests import BOOT_LIMIT, TOOL_LIMIT, open_guest
from pyvmm.compare.pinning import pinned
from pyvmm.errors import HostError
from pyvmm.hostnet import tools
from pyvmm.workloads import ToolFailed, read_ping, read_udp, received_mbit, run_tool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.compare.counters import Histograms
    from pyvmm.compare.guests import Guest
    from pyvmm.compare.plan import Mode, Plan

SAMPLES_MAX = 600  # samples that are kept per workload
FEW_PACKETS = 10  # with fewer packets there are no figures per 1,000 packets
LINES_MAX = 40  # lines of the ledger that are kept per workload, the most frequent ones
SETTLE = 0.5  # seconds between workloads, so that no workload counts the last one's packets
#: What a boot tells, in this order: the guest is made, and how its VMM is confined, None if that is
#: another program; its servers listen, with ``boot_s`` and facts of ``Guest``; a line of progress;
#: the figures of a workload; that all is done.
MADE, BOOTED, SAID, WORKLOAD, DONE = "made", "booted", "said", "workload", "done"


class Boot:
    """One boot.

    :param pin: whether each vCPU gets a CPU of its own.
    :param tell: called with each of ``MADE`` to ``DONE`` and what it says, as soon as it is so.
    """

    def __init__(self, p: Plan, *, pin: bool, tell: Callable[[str, Any], None]) -> None:
        self._plan, self._pin, self._tell = p, pin, tell

    def run(self, mode: Mode, trace: Histograms | None, sandbox: str) -> None:
        """Boot a mode, run all workloads, and end the guest.

        :param trace: of exits, lent; None if exits are not traced.
        :param sandbox: ``auto``, ``on`` or ``off``: whether this process is confined, if it has the
            guest.
        :raises PyvmmError, OSError, SubprocessError: the boot has failed.
        """
        with open_guest(self._plan, mode, trace, sandbox) as guest:
            self._tell(MADE, guest.sandbox)
            seconds = guest.boot()
            self._tell(BOOTED, {"boot_s": round(seconds, 3), **guest.facts()})
            with pinned(_tasks(guest), self._plan.cpus) if self._pin else nullcontext():
                self._warm_up(guest)
                for workload in self._plan.workloads:
                    time.sleep(SETTLE)
                    self._tell(WORKLOAD, self._workload(guest, workload))
            guest.check()
        self._tell(DONE, None)

    def _warm_up(self, guest: Guest) -> None:
        """Send pings that are not counted: both ends learn addresses, and Linux moves the first
        interrupts of a new card to their CPU.
        """
        try:
            self._use(guest, tools.ping(plan.GUEST, 10, 0.05))
        except HostError as e:
            self._tell(SAID, f"warming up: {e}")  # the workloads will report it, too

    def _workload(self, guest: Guest, name: str) -> dict[str, Any]:
        """Run a workload, and return what it counted."""
        out: dict[str, Any] = {"name": name, "error": None, "seconds": None}
        sampler = Sampler(guest, self._plan.samples)
        before, tasks = guest.counts(), guest.tasks()
        sampler.start()
        start = time.monotonic()
        result: dict[str, float | None] = {}
        try:
            try:
                text = self._drive(guest, name)
            finally:
                seconds = time.monotonic() - start
                samples = sampler.stop()
                tasks_after, after = guest.tasks(), guest.counts()
            result = read_result(name, text)
        except HostError as e:
            out["error"] = str(e)
        out |= figures(before, after, seconds)
        out["threads"] = counters.by_role(tasks, tasks_after)
        out |= {"throughput_mbit_s": None, "rtt_ms": None, "loss_percent": None, **result}
        out["samples"] = samples
        return out

    def _drive(self, guest: Guest, name: str) -> str:
        """Run the workload itself; returns the output of its tool.

        :raises HostError: the tool failed.
        """
        p = self._plan
        if name == "idle":
            time.sleep(p.seconds)
            return ""
        if name == "ping":
            count = max(1, round(p.seconds / plan.PING_INTERVAL))
            return self._use(guest, tools.ping(plan.GUEST, count, plan.PING_INTERVAL))
        words = tools.iperf3(
            plan.GUEST,
            int(p.port(name)),
            p.seconds,
            reverse=not name.endswith("-rx"),
            udp=(plan.UDP_BYTES, plan.UDP[name]) if name in plan.UDP else None,
        )
        return self._use(guest, words)

    def _use(self, guest: Guest, words: list[str]) -> str:
        return run_tool(guest.space, words, self._plan.seconds + TOOL_LIMIT)


def limit(p: Plan) -> float:
    """Seconds that a boot may take, with its end."""
    return BOOT_LIMIT + (1 + len(p.workloads)) * (p.seconds + TOOL_LIMIT + SETTLE)


def _tasks(guest: Guest) -> list[tuple[str, int]]:
    """The threads to pin: the guest's, and the helper, which starts the tools."""
    ours = helper.current()
    return [*guest.tasks(), *([("helper", ours.pid)] if ours is not None else [])]


class Sampler:
    """Takes samples of a guest's exits, in a thread of its own that ends with ``stop``.

    Their number is bounded: if there are too many samples, every second one is dropped and the
    interval is doubled.
    """

    def __init__(self, guest: Guest, interval: float) -> None:
        self._guest, self._interval = guest, interval
        self._quit = threading.Event()
        self._rows: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._run, name="compare-sampler", daemon=True)
        self._begin = 0.0

    def start(self) -> None:
        """Begin to take samples."""
        self._begin = time.monotonic()
        self._thread.start()

    def _look(self) -> None:
        user, exits = self._guest.quick()
        self._rows.append((round(time.monotonic() - self._begin, 3), user, exits))

    def _run(self) -> None:
        try:
            self._look()
            while not self._quit.wait(self._interval):
                self._look()
                if len(self._rows) >= SAMPLES_MAX:
                    self._rows = self._rows[::2]
                    self._interval *= 2
        except (OSError, HostError):
            pass  # the guest is gone, and the workload reports it

    def stop(self) -> dict[str, list[float]]:
        """Stop; returns the time of each sample in seconds, and the counts since the first."""
        self._quit.set()
        self._thread.join()
        rows = self._rows
        return {
            "t": [row[0] for row in rows],
            "user_exits": [row[1] - rows[0][1] for row in rows],
            "kvm_exits": [row[2] - rows[0][2] for row in rows],
        }


def figures(
    before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], seconds: float
) -> dict[str, Any]:
    """What was counted between two readings. None: this mode does not count it."""

    def delta(group: str) -> dict[str, int]:
        return {name: value - before[group].get(name, 0) for name, value in after[group].items()}

    lines = {name: count for name, count in delta("lines").items() if count}
    causes, kvm, packets = delta("causes"), delta("kvm"), delta("packets")
    moved = packets["packets_to_guest"] + packets["packets_from_guest"]
    user = sum(causes.values()) if causes else None
    exits = kvm.get("exits")

    def per(count: int | None) -> float | None:
        return (
            round(1000 * count / moved, 3) if moved >= FEW_PACKETS and count is not None else None
        )

    return {
        "seconds": max(round(seconds, 4), 1e-4),
        "user_exits": user,
        "causes": causes or None,
        "reasons": delta("reasons") or None,
        "lines": dict(sorted(lines.items(), key=lambda item: -item[1])[:LINES_MAX]),
        "kvm": kvm,
        "interrupts": kvm.get("irq_injections"),
        "packets": packets,
        "queues": delta("queues"),
        "per_kpacket": {
            "user_exits": per(user),
            "kvm_exits": per(exits),
            "interrupts": per(kvm.get("irq_injections")),
        },
    }


def read_result(name: str, text: str) -> dict[str, float | None]:
    """The figures of a workload, from what its tool printed.

    :raises HostError: the tool's output cannot be parsed.
    """
    try:
        if name == "idle":
            return {}
        if name == "ping":
            rtt, loss = read_ping(text)
            return {"rtt_ms": rtt, "loss_percent": loss}
        if name in plan.UDP:
            rate, loss = read_udp(text)
            return {"throughput_mbit_s": round(rate, 3), "loss_percent": round(loss, 2)}
        return {"throughput_mbit_s": round(received_mbit(text), 3)}
    except ToolFailed as e:
        raise HostError(f"{name}: {e}") from e
