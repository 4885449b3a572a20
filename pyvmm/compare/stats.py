"""Makes figures of runs: median and range of each measure, and which differences are more than
noise.

The rule: a measure of a mode differs from the first mode's if their ranges, from the lowest to the
highest value of the repeats, do not overlap. Otherwise the difference may be noise. With one repeat
there is no range, and whether a difference is noise is not known.
"""

from __future__ import annotations

import statistics

from pyvmm.compare.counters import CAUSES, ROLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final, Literal

    Difference = Literal["noise", "differs", "unknown"]

#: The verdicts on a difference from the first mode.
NOISE: Final = "noise"
DIFFERS: Final = "differs"
UNKNOWN: Final = "unknown"
#: KVM's statistics that are measures: name -> words.
KVM = {
    "exits": "exits in KVM",
    "io_exits": "KVM: port accesses",
    "mmio_exits": "KVM: memory accesses to userspace",
    "halt_exits": "KVM: halts",
    "irq_window_exits": "KVM: interrupt window",
    "irq_exits": "KVM: host interrupts",
    "insn_emulation": "KVM: instructions emulated",
    "request_irq_exits": "KVM: interrupt requests to userspace",
    "signal_exits": "KVM: signals",
    "halt_wakeup": "KVM: wake-ups from halt",
}
ROLE_WORDS = {
    "vcpu": "vCPU threads",
    "worker": "worker",
    "vhost": "vhost thread",
    "backend": "backend process",
    "vmm": "other VMM threads",
}


def _per(count: float | None, base: float | None, scale: float) -> float | None:
    return scale * count / base if count is not None and base else None


def _moved(workload: dict[str, Any], what: str) -> int:
    return int(workload["packets"][f"{what}_to_guest"] + workload["packets"][f"{what}_from_guest"])


def _cpu(workload: dict[str, Any]) -> float | None:
    """Seconds of CPU time of all threads that have to do with the guest, its vCPUs included."""
    used = [role["cpu_s"] for role in workload["threads"].values()]
    return sum(used) if used else None


#: Measures that are made of others.
DERIVED: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "packets_per_s": lambda w: _per(_moved(w, "packets"), w["seconds"], 1),
    "cpu_us_per_packet": lambda w: _per(_cpu(w), _moved(w, "packets"), 1e6),
    "cpu_ns_per_byte": lambda w: _per(_cpu(w), _moved(w, "bytes"), 1e9),
}


class Measure:
    """One row of the table: its path in a workload's figures, its words, its unit."""

    __slots__ = ("key", "path", "title", "unit")

    def __init__(self, key: str, title: str, unit: str, *path: str) -> None:
        self.key, self.title, self.unit, self.path = key, title, unit, path

    def of(self, workload: dict[str, Any]) -> float | None:
        """The value in one run, None if it is not known."""
        if self.key == "kicks":
            found = [n for name, n in workload["queues"].items() if name.endswith("_kicks")]
            return sum(found) if found else None
        if self.key == "vmm_wakeups":
            found = [
                workload["threads"][r]["voluntary"]
                for r in ("worker", "vmm")
                if r in workload["threads"]
            ]
            return sum(found) if found else None
        if self.key in DERIVED:
            return DERIVED[self.key](workload)
        value: Any = workload
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, (int, float)) else None


MEASURES = [
    Measure("throughput_mbit_s", "throughput", "Mbit/s", "throughput_mbit_s"),
    Measure("rtt_ms", "round trip", "ms", "rtt_ms"),
    Measure("loss_percent", "loss", "%", "loss_percent"),
    Measure("packets_to_guest", "packets to the guest", "", "packets", "packets_to_guest"),
    Measure("packets_from_guest", "packets from the guest", "", "packets", "packets_from_guest"),
    Measure("kicks", "kicks that the worker took", ""),
    Measure("user_exits", "exits to userspace", "", "user_exits"),
    *(
        Measure(f"user_exits.{c}", f"to userspace: {c.replace('_', ' ')}", "", "causes", c)
        for c in CAUSES
    ),
    Measure(
        "user_exits_per_kpacket",
        "exits to userspace per 1,000 packets",
        "",
        "per_kpacket",
        "user_exits",
    ),
    *(Measure(f"kvm.{name}", words, "", "kvm", name) for name, words in KVM.items()),
    Measure(
        "kvm_exits_per_kpacket", "exits in KVM per 1,000 packets", "", "per_kpacket", "kvm_exits"
    ),
    Measure("interrupts", "interrupts injected", "", "interrupts"),
    Measure(
        "interrupts_per_kpacket", "interrupts per 1,000 packets", "", "per_kpacket", "interrupts"
    ),
    Measure("vmm_wakeups", "wake-ups of VMM threads but the vCPUs", ""),
    *(
        Measure(f"cpu_s.{r}", f"CPU time: {w}", "s", "threads", r, "cpu_s")
        for r, w in ROLE_WORDS.items()
    ),
    Measure("packets_per_s", "packets per second", ""),
    Measure("cpu_us_per_packet", "CPU time per packet", "us"),
    Measure("cpu_ns_per_byte", "CPU time per byte", "ns"),
    *(
        Measure(f"switches.{r}.{k}", f"{k} switches: {w}", "", "threads", r, k)
        for r, w in ROLE_WORDS.items()
        for k in ("voluntary", "involuntary")
    ),
]
#: Details, which the short table leaves out.
DETAILS = (
    *(f"kvm.{name}" for name in KVM if name not in ("exits", "halt_exits", "irq_window_exits")),
    *(f"switches.{role}.involuntary" for role in ROLE_WORDS),
    "switches.vmm.voluntary",
    "interrupts_per_kpacket",
    *DERIVED,
)
#: Measures that are shown even if all values are zero, because zero is a result.
ALWAYS = ("user_exits", "vmm_wakeups")
BRIEF = {measure.key for measure in MEASURES} - set(DETAILS)
BY_KEY = {measure.key: measure for measure in MEASURES}
assert tuple(ROLE_WORDS) == ROLES


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median and range of at least one value."""
    return {
        "n": len(values),
        "median": round(statistics.median(values), 6),
        "min": min(values),
        "max": max(values),
    }


def verdict(first: dict[str, Any], other: dict[str, Any]) -> Difference:
    """Whether ``other`` differs from ``first`` by more than noise; both are of ``spread``."""
    if first["n"] < 2 or other["n"] < 2:
        return UNKNOWN
    return NOISE if first["min"] <= other["max"] and other["min"] <= first["max"] else DIFFERS


def summarise(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per workload, mode and measure that was taken at least once. Workloads that failed
    do not count.
    """
    out: list[dict[str, Any]] = []
    for workload in document["settings"]["workloads"]:
        name = workload["name"]
        firsts: dict[str, dict[str, Any]] = {}
        for index, mode in enumerate(document["modes"]):
            runs = [
                w
                for run in document["runs"]
                if run["mode"] == mode["name"]
                for w in run["workloads"]
                if w["name"] == name and w["error"] is None
            ]
            for measure in MEASURES:
                values = [v for v in map(measure.of, runs) if v is not None]
                if not values:
                    continue
                entry = {
                    "workload": name,
                    "mode": mode["name"],
                    "measure": measure.key,
                    **spread(values),
                }
                entry["ratio"] = entry["verdict"] = None
                if index == 0:
                    firsts[measure.key] = entry
                elif measure.key in firsts:
                    first = firsts[measure.key]
                    entry["verdict"] = verdict(first, entry)
                    if first["median"]:
                        entry["ratio"] = round(entry["median"] / first["median"], 4)
                out.append(entry)
    return out


class Figures:
    """Look-up in a summary."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._entries = {(e["workload"], e["mode"], e["measure"]): e for e in document["summary"]}

    def get(self, workload: str, mode: str, measure: str) -> dict[str, Any] | None:
        """The entry; None if there is none."""
        return self._entries.get((workload, mode, measure))

    def rows(
        self, workload: str, modes: list[str], *, full: bool = True
    ) -> tuple[list[Measure], int]:
        """The measures that are not zero in every mode, and how many are zero. Without ``full``
        only the most telling measures are taken.
        """
        shown, zero = [], 0
        for measure in MEASURES:
            if not full and measure.key not in BRIEF:
                continue
            found = [e for m in modes if (e := self.get(workload, m, measure.key)) is not None]
            if any(e["max"] for e in found) or (found and measure.key in ALWAYS):
                shown.append(measure)
            elif found:
                zero += 1
        return shown, zero


def number(value: float) -> str:
    """A figure for people: three significant digits, thousands set apart."""
    if value == 0:
        return "0"
    if abs(value) >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cell(entry: dict[str, Any] | None) -> str:
    """``median (lowest..highest)``, with the sign ≈ if the difference from the first mode may be
    noise; ``-`` if nothing was measured.
    """
    if entry is None:
        return "-"
    text = number(entry["median"])
    if entry["min"] != entry["max"]:
        text += f" ({number(entry['min'])}..{number(entry['max'])})"
    return text + noise_sign(entry)


def noise_sign(entry: dict[str, Any]) -> str:
    """`` ≈`` if the difference from the first mode may be noise, else an empty string."""
    return " ≈" if entry.get("verdict") == NOISE and entry["ratio"] != 1 and entry["max"] else ""


def remarks(document: dict[str, Any]) -> list[str]:
    """Remarks beside the figures: what could not be measured and why, and what the signs mean."""
    out = []
    if document["partial"]:
        done = len(document["runs"])
        out.append(f"PARTIAL: broken off after {done} of {expected_runs(document)} boots.")
    for mode in document["modes"]:
        if mode["problem"]:
            out.append(f"{mode['name']} cannot run here: {mode['problem']}")
        out += [f"{mode['name']}: {note}" for note in mode["notes"]]
    for run in document["runs"]:
        at = f"{run['mode']}, repeat {run['repeat'] + 1}"
        if run["error"]:
            out.append(f"{at} failed: {run['error']}")
        out += [f"{at}, {w['name']} failed: {w['error']}" for w in run["workloads"] if w["error"]]
    if "ladder" in document:
        pass  # whose steps have signs of their own
    elif document["settings"]["repeat"] < 2:
        out.append("One repeat: how much of a difference is noise is not known.")
    else:
        out.append(
            "≈ within the noise: the range over the repeats overlaps with that of "
            f"{document['modes'][0]['name']}."
        )
    out.append(
        "A packet is what passes the tap, up to 64 KiB with segmentation offload. "
        "Rows of zeroes are left out."
    )
    if document["settings"].get("reasons"):
        out.append("The processor's reasons for exits were traced, which slows each exit down.")
    if document["settings"].get("pinned"):
        out.append("Each vCPU had a CPU to itself.")
    if document["host"]["testbed"]:
        out.append(
            "Measured in the testbed, on an emulated processor: "
            "only counts and ratios mean anything."
        )
    return out


def expected_runs(document: dict[str, Any]) -> int:
    """How many boots the user asked for."""
    return int(document["settings"]["repeat"]) * len(document["modes"])
