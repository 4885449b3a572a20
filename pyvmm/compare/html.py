"""The page of a comparison: one file that needs no network, light and dark; and its main plots as
one SVG.
"""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path

from pyvmm.compare import svg
from pyvmm.compare.counters import CAUSES, ROLES
from pyvmm.compare.ladder import COLUMNS, step_text
from pyvmm.compare.stats import (
    BY_KEY,
    DIFFERS,
    NOISE,
    ROLE_WORDS,
    Figures,
    cell,
    noise_sign,
    number,
    remarks,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Parts of the stacked plot: class -> words. Exits to userspace come first.
PARTS = {
    **{f"u-{name}": f"to userspace: {name.replace('_', ' ')}" for name in CAUSES},
    "k-halt": "in KVM: halt",
    "k-window": "in KVM: interrupt window",
    "k-host": "in KVM: host interrupt",
    "k-memory": "in KVM: memory (kicks by ioeventfd, APIC, page faults)",
    "k-msr": "in KVM: MSRs (APIC, timer)",
    "k-io": "in KVM: ports",
    "k-rest": "in KVM: the rest",
}
#: The processor's reasons of each part, SVM's and VMX's, and the causes of those exits to userspace
#: that begin with one of these reasons.
REASONS = {
    "k-halt": (("hlt",), ("halt",)),
    "k-window": (("vintr", "interrupt_window"), ("irq_window",)),
    "k-host": (("interrupt", "external_interrupt"), ()),
    "k-memory": (("npf", "ept_violation", "ept_misconfig", "apic_access"), ("notify", "mmio")),
    "k-msr": (("msr", "msr_read", "msr_write", "apic_write"), ()),
    "k-io": (("io", "io_instruction"), ("pio",)),
}
STATS = {"k-halt": "halt_exits", "k-window": "irq_window_exits", "k-host": "irq_exits"}
#: Colours and dashes of modes, in turn.
LINES = 8
SPEEDS = {"ping": "rtt_ms"}
DATA = Path(__file__).parent


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def _good(document: dict[str, Any], mode: str, workload: str) -> list[dict[str, Any]]:
    """The runs of a workload in a mode that have not failed."""
    return [
        w
        for run in document["runs"]
        if run["mode"] == mode
        for w in run["workloads"]
        if w["name"] == workload and w["error"] is None
    ]


def split(workload: dict[str, Any]) -> dict[str, int]:
    """The exits of one run by PARTS. KVM's counts include the exits to userspace, which are
    subtracted here. Without a trace of the processor's reasons, KVM's statistics give three parts,
    and the rest is a fourth.
    """
    causes, kvm = workload["causes"] or {}, workload["kvm"]
    out = {f"u-{name}": max(causes.get(name, 0), 0) for name in CAUSES}
    user = sum(out.values())
    inside = max(kvm.get("exits", user) - user, 0)
    traced = workload.get("reasons")
    for part, (reasons, begun) in REASONS.items():
        count = (
            kvm.get(STATS.get(part, ""), 0)
            if not traced
            else sum(traced.get(r, 0) for r in reasons)
        )
        out[part] = min(max(count - sum(causes.get(cause, 0) for cause in begun), 0), inside)
        inside -= out[part]
    out["k-rest"] = inside
    return out


def _missing(mode: dict[str, Any]) -> str:
    return "cannot run here" if mode["problem"] else "not measured"


def exits_plot(document: dict[str, Any], workload: str) -> str:
    """Stacked exits by cause, one bar per mode: per 1,000 packets, or per second if the workload
    sends none.
    """
    idle = workload == "idle"
    unit = "exits per second" if idle else "exits per 1,000 packets"
    rows = []
    for mode in document["modes"]:
        runs = _good(document, mode["name"], workload)
        stacks = []
        for run in runs:
            packets = run["packets"]["packets_to_guest"] + run["packets"]["packets_from_guest"]
            base = (run["seconds"] or 0) if idle else packets / 1000
            if base > 0:
                stacks.append({part: count / base for part, count in split(run).items()})
        if not stacks:
            rows.append(svg.Bar(mode["name"], [], "", missing=_missing(mode)))
            continue
        parts = [(part, _median([s[part] for s in stacks]), words) for part, words in PARTS.items()]
        sums = [sum(s.values()) for s in stacks]
        user = sum(value for part, value, _ in parts if part.startswith("u-"))
        known = any(run["causes"] for run in runs)
        shown = [
            (part, value, f"{words}: {number(value)}") for part, value, words in parts if value > 0
        ]
        text = f"{number(_median(sums))} ({number(user) if known else 'unknown'} to userspace)"
        rows.append(svg.Bar(mode["name"], shown, text, (min(sums), max(sums))))
    return svg.bars(f"Exits by cause, {workload}", unit, rows)


def measure_plot(
    document: dict[str, Any], workload: str, key: str, kind: str, width: int = svg.NARROW
) -> str:
    """One measure of each mode, with its range."""
    figures, measure = Figures(document), BY_KEY[key]
    gained = {(s["rung"], s["workload"], s["measure"]): s for s in document.get("ladder", ())}
    rows = []
    for mode in document["modes"]:
        entry = figures.get(workload, mode["name"], key)
        if entry is None:
            rows.append(svg.Bar(mode["name"], [], "", missing=_missing(mode)))
            continue
        # Of a ladder the step from one rung to the next counts, not that from the first.
        step = gained.get((mode["name"], workload, key))
        sign = f"  {step_text(step)}" if gained else noise_sign(entry)
        text = number(entry["median"]) + sign
        parts = [(kind, entry["median"], f"{cell(entry)} {measure.unit}")]
        rows.append(svg.Bar(mode["name"], parts, text, (entry["min"], entry["max"])))
    return svg.bars(f"{measure.title}, {workload}", measure.unit, rows, width)


def cpu_plot(document: dict[str, Any], workload: str) -> str:
    """CPU time by role, one bar per mode, in milliseconds per second."""
    rows = []
    for mode in document["modes"]:
        runs = [run for run in _good(document, mode["name"], workload) if run["seconds"]]
        if not runs:
            rows.append(svg.Bar(mode["name"], [], "", missing=_missing(mode)))
            continue
        parts = []
        for role in ROLES:
            used = _median(
                [1000 * r["threads"].get(role, {"cpu_s": 0})["cpu_s"] / r["seconds"] for r in runs]
            )
            if used > 0:
                parts.append((f"r-{role}", used, f"{ROLE_WORDS[role]}: {number(used)} ms/s"))
        rows.append(
            svg.Bar(mode["name"], parts, number(round(sum(value for _, value, _ in parts), 1)))
        )
    return svg.bars(f"CPU time, {workload}", "ms per second", rows)


def time_plot(document: dict[str, Any], workload: str, key: str) -> str:
    """Exits per second over the time of a workload, in each mode's first repeat that has not
    failed.
    """
    series = []
    for index, mode in enumerate(document["modes"]):
        points = []
        for run in _good(document, mode["name"], workload)[:1]:
            t, n = run["samples"]["t"], run["samples"][key]
            for i in range(1, min(len(t), len(n))):
                if t[i] > t[i - 1]:
                    points.append(
                        ((t[i] + t[i - 1]) / 2, max(n[i] - n[i - 1], 0) / (t[i] - t[i - 1]))
                    )
        series.append((mode["name"], f"m{index % LINES}", points))
    title = "Exits in KVM" if key == "kvm_exits" else "Exits to userspace"
    return svg.lines(f"{title}, {workload}", "per second", series)


def legend(document: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that occur in any bar: (class, words)."""
    seen: set[str] = set()
    for run in document["runs"]:
        for workload in run["workloads"]:
            seen |= {part for part, count in split(workload).items() if count}
    return [(part, words) for part, words in PARTS.items() if part in seen]


def speed(document: dict[str, Any], workload: str) -> str | None:
    """The measure of a workload's speed; None if it has no speed."""
    key = SPEEDS.get(workload, "throughput_mbit_s")
    figures = Figures(document)
    return key if any(figures.get(workload, m["name"], key) for m in document["modes"]) else None


def style() -> str:
    """The style sheet of page and plots."""
    return (DATA / "style.css").read_text(encoding="utf-8")


def page(document: dict[str, Any]) -> str:
    """The whole page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((DATA / "page.html.j2").read_text(encoding="utf-8"))
    figures = Figures(document)
    modes = document["modes"]
    names = [mode["name"] for mode in modes]
    cards, tables = [], []
    for workload in document["settings"]["workloads"]:
        name = workload["name"]
        fast = speed(document, name)
        cards.append(
            {
                "name": name,
                "what": workload["what"],
                "idle": name == "idle",
                "exits": Markup(exits_plot(document, name)),
                "cpu": Markup(cpu_plot(document, name)),
                "over_time": Markup(time_plot(document, name, "kvm_exits")),
                "user_over_time": Markup(time_plot(document, name, "user_exits")),
                "speed_title": f"{BY_KEY[fast].title}, {BY_KEY[fast].unit}" if fast else "",
                "speed": Markup(measure_plot(document, name, fast, "speed")) if fast else "",
                "beside": Markup(measure_plot(document, name, "user_exits_per_kpacket", "user"))
                if fast
                else "",
            }
        )
        rows, zero = figures.rows(name, names)
        lines = []
        for measure in rows:
            cells = []
            for mode_name in names:
                entry = figures.get(name, mode_name, measure.key)
                verdict = entry["verdict"] if entry else None
                kind = {NOISE: "noise", DIFFERS: "differs"}.get(verdict or "", "")
                cells.append((cell(entry), kind))
            lines.append((f"{measure.title}{', ' if measure.unit else ''}{measure.unit}", cells))
        tables.append({"name": name, "what": workload["what"], "rows": lines, "zero": zero})
    known = [m for m in modes if m["negotiated"] or m["offered"]]
    features = sorted({f for m in known for f in (*m["negotiated"], *m["offered"])})
    return template.render(
        d=document,
        modes=modes,
        cards=cards,
        tables=tables,
        legend=legend(document),
        roles=[
            (f"r-{role}", ROLE_WORDS[role])
            for role in ROLES
            if any(role in w["threads"] for run in document["runs"] for w in run["workloads"])
        ],
        mode_classes=[
            (f"m{i % LINES}", m["name"])
            for i, m in enumerate(modes)
            if any(run["mode"] == m["name"] and run["workloads"] for run in document["runs"])
        ],
        features=[
            (
                f,
                [
                    "yes" if f in m["negotiated"] else "offered" if f in m["offered"] else "no"
                    for m in known
                ],
            )
            for f in features
        ],
        known=known,
        remarks=remarks(document),
        style=Markup(style()),
        memory=f"{document['guest']['memory_bytes'] >> 20} MiB",
    )


def figure(document: dict[str, Any]) -> str:
    """The stacked plots of all workloads, and their speeds, as one SVG file."""
    plots = []
    for workload in document["settings"]["workloads"]:
        name = workload["name"]
        unit = "exits per second" if name == "idle" else "exits per 1,000 packets"
        plots.append((f"{name}: {unit}", exits_plot(document, name)))
    for workload in document["settings"]["workloads"]:
        fast = speed(document, workload["name"])
        if fast:
            title = f"{workload['name']}: {BY_KEY[fast].title}, {BY_KEY[fast].unit}"
            plots.append(
                (title, measure_plot(document, workload["name"], fast, "speed", svg.WIDTH))
            )
    return _sheet(document, "What each data path costs", plots)


def ladder_figure(document: dict[str, Any]) -> str:
    """The ladder as one SVG file: speeds, exits by cause and CPU time, one bar per rung."""
    plots = []
    ran = {workload["name"] for workload in document["settings"]["workloads"]}
    for workload, key, more, _ in COLUMNS:
        if workload not in ran or key in ("kvm_exits_per_kpacket", "interrupts_per_kpacket"):
            continue
        if key == "user_exits_per_kpacket":
            plots.append((f"{workload}: exits per 1,000 packets", exits_plot(document, workload)))
            continue
        measure = BY_KEY[key]
        unit = f", {measure.unit}" if measure.unit else ""
        title = f"{workload}: {measure.title}{unit} ({'more' if more else 'less'} is better)"
        kind = "speed" if more or key == "rtt_ms" else "r-worker"
        plots.append((title, measure_plot(document, workload, key, kind, svg.WIDTH)))
    return _sheet(document, "From the textbook device to the offloaded one", plots)


def _sheet(document: dict[str, Any], head: str, plots: list[tuple[str, str]]) -> str:
    """Plots with their titles in columns, below a heading and the legend of exits, as one SVG."""
    gap, pad = 36, 24
    columns = min(3, len(plots))
    width = 2 * pad + columns * svg.WIDTH + (columns - 1) * gap
    body = [f'<text class="h1" x="{pad}" y="{pad + 16}">{escape(head)}</text>']
    y = pad + 44.0
    items = [(part, words.partition(" (")[0]) for part, words in legend(document)]
    column = 196
    across = max((width - pad) // column, 1)
    for index, (part, words) in enumerate(items):
        x, line = pad + index % across * column, y + index // across * 20
        body.append(f'<rect class="{part}" x="{x}" y="{line - 10:g}" width="12" height="12"/>')
        body.append(f'<text class="name" x="{x + 18}" y="{line:g}">{escape(words)}</text>')
    y += (len(items) + across - 1) // across * 20 + 14
    for start in range(0, len(plots), columns):
        row = plots[start : start + columns]
        for column, (title, plot) in enumerate(row):
            x = pad + column * (svg.WIDTH + gap)
            body.append(f'<text class="h2" x="{x}" y="{y:g}">{escape(title)}</text>')
            body.append(plot.replace("<svg ", f'<svg x="{x}" y="{y + 8:g}" ', 1))
        y += 8 + max(svg.height_of(plot) for _, plot in row) + gap
    height = y - gap + pad
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" '
        f'height="{height:g}" role="img"><title>{escape(head)}</title>'
        f"<style>{style()}</style>"
        f'<rect class="paper" width="100%" height="100%"/>{"".join(body)}</svg>\n'
    )
