"""The ladder: from the textbook device to the offloaded one, one step per rung (docs/ladder.md)."""

from __future__ import annotations

from pyvmm.compare.plan import Mode
from pyvmm.compare.stats import DIFFERS, Figures, cell, verdict
from pyvmm.errors import UsageError, did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What each rung is measured by; see ``plan.WORKLOADS``.
WORKLOADS = ("ping", "tcp-tx", "tcp-rx", "pps-tx", "pps-rx")
#: The columns of the table, and the plots of the picture: workload and measure, whether more is
#: better, and the column's head.
COLUMNS = (
    ("ping", "rtt_ms", False, "round trip\nms"),
    ("tcp-tx", "throughput_mbit_s", True, "TCP from guest\nMbit/s"),
    ("tcp-rx", "throughput_mbit_s", True, "TCP to guest\nMbit/s"),
    ("pps-tx", "packets_per_s", True, "from guest\npackets/s"),
    ("pps-rx", "packets_per_s", True, "to guest\npackets/s"),
    ("tcp-tx", "user_exits_per_kpacket", False, "to userspace\nexits/1000"),
    ("tcp-tx", "kvm_exits_per_kpacket", False, "in KVM\nexits/1000"),
    ("tcp-tx", "interrupts_per_kpacket", False, "interrupts\n/1000"),
    ("pps-tx", "cpu_us_per_packet", False, "CPU time\nus/packet"),
    ("tcp-tx", "cpu_ns_per_byte", False, "CPU time\nns/byte"),
)


class Rung(Mode):
    """One step of the ladder.

    :ivar what: the step, in words.
    """

    __slots__ = ("what",)

    def __init__(
        self, name: str, what: str, net: str, *, append: str = "", huge: bool = False
    ) -> None:
        super().__init__(name, net=net, vhost=net.startswith("vhost-net"), append=append, huge=huge)
        self.what = what


def _rungs() -> tuple[Rung, ...]:
    """All rungs, lowest first. Each has what those below it have."""
    thread = "classic,worker=thread"
    ioeventfd = f"{thread},notify=ioeventfd"
    irqfd = f"{ioeventfd},interrupt=irqfd"
    return (
        Rung(
            "pio",
            "the textbook device, kicked by OUT to a port",
            "classic,legacy=on",
            append="virtio_pci.force_legacy=1",
        ),
        Rung("mmio", "the same, kicked by a write to memory", "classic"),
        Rung("thread", "a thread sends, not the vCPU", thread),
        Rung("ioeventfd", "kicks stay in the kernel", ioeventfd),
        Rung("irqfd", "interrupts stay in the kernel", irqfd),
        Rung("event-idx", "either side says when to tell it", f"{irqfd},without=indirect+offloads"),
        Rung("indirect", "one ring entry per packet", f"{irqfd},without=offloads"),
        Rung("offloads", "checksums and segments are left to others", f"{irqfd},without="),
        Rung("batch", "many frames per publication, and lingering for more", "emulated"),
        Rung("huge", "guest memory in huge pages", "emulated", huge=True),
        Rung("vhost-net", "the kernel moves the frames", "vhost-net"),
        Rung("vhost-user", "another process moves them, and polls", "vhost-user,poll=1000"),
        Rung("vhost-vdpa", "a vDPA device moves them", "vhost-vdpa"),
    )


RUNGS = _rungs()


def choose(text: str) -> list[Rung]:
    """The rungs with these names, joined by commas, in the ladder's order; all if there are none.

    :raises UsageError: a name is unknown or given twice.
    """
    known = {rung.name: rung for rung in RUNGS}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--rungs: unknown {name!r}", f"{did_you_mean(name, known)}use {', '.join(known)}"
            )
    if len(set(names)) < len(names):
        raise UsageError(f"--rungs {text}", "name each once, joined by commas")
    return [rung for rung in RUNGS if not names or rung.name in names]


def steps(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rung gained over the one below it that could be measured, per column: ``ratio`` of
    the medians, ``verdict`` as ``stats.verdict``; both None if one of them is not known.
    """
    figures = Figures(document)
    out: list[dict[str, Any]] = []
    for workload, key, more, _ in COLUMNS:
        before: tuple[str, dict[str, Any]] | None = None
        for mode in document["modes"]:
            entry = figures.get(workload, mode["name"], key)
            if entry is None:
                continue
            if before is not None:
                below, old = before
                ratio = round(entry["median"] / old["median"], 4) if old["median"] else None
                out.append(
                    {
                        "rung": mode["name"],
                        "below": below,
                        "workload": workload,
                        "measure": key,
                        "more_is_better": more,
                        "ratio": ratio,
                        "verdict": verdict(old, entry),
                    }
                )
            before = mode["name"], entry
    return out


def step_text(step: dict[str, Any] | None) -> str:
    """A step for people: ``x1.30``, with the sign ≈ unless it is known to be more than noise."""
    if step is None or step["ratio"] is None:
        return ""
    return f"x{step['ratio']:.2f}" + ("" if step["verdict"] == DIFFERS else " ≈")


def cells(document: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The table: per rung its name, and per column the figure and the step that led to it."""
    figures = Figures(document)
    by_place = {(s["rung"], s["workload"], s["measure"]): s for s in steps(document)}
    rows = []
    for mode in document["modes"]:
        row = []
        for workload, key, *_ in COLUMNS:
            entry = figures.get(workload, mode["name"], key)
            # The summary's sign compares with the first rung; here the one below counts.
            plain = cell({**entry, "verdict": None}) if entry else "-"
            row.append((plain, step_text(by_place.get((mode["name"], workload, key)))))
        rows.append((mode["name"], row))
    return rows


def remark(document: dict[str, Any]) -> str:
    """What the signs of the table mean."""
    rounds = int(document["settings"]["repeat"])
    if rounds < 2:
        return "x: the ratio to the rung below. ≈: how much is noise is not known of one round."
    return (
        "x: the ratio to the rung below. ≈: within the noise, because the ranges of the "
        f"{rounds} rounds overlap."
    )
