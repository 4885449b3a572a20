"""The figures in the docs are those of the measurement that is in the repository beside them."""

from __future__ import annotations

import json
from pathlib import Path

from pyvmm.compare.ladder import COLUMNS
from pyvmm.compare.stats import Figures, number, summarise
from tests.perf.bench_native import table, ways_table

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def rows(page: str, head: str) -> dict[str, list[str]]:
    """The cells of the table whose first line begins with ``head``, by those of its first
    column.
    """
    lines = (DOCS / page).read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(head))
    out = {}
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        out[first.strip("`")] = cells
    return out


def test_the_ladder() -> None:
    document = json.loads((DOCS / "figures/ladder-testbed.json").read_text())
    document["summary"] = summarise(document)
    figures = Figures(document)
    wanted = {}
    for mode in document["modes"]:
        entries = [figures.get(load, mode["name"], key) for load, key, _, _ in COLUMNS]
        wanted[mode["name"]] = [number(e["median"]) if e else "-" for e in entries]
    assert rows("ladder.md", "| rung | ms |") == wanted


def test_the_native_figures_are_those_of_one_run() -> None:
    """docs/performance.md has the table of docs/figures/native.json, whole."""
    result = json.loads((DOCS / "figures/native.json").read_text())
    lines = "\n".join(table(result))
    assert lines.count("\n") > 4
    page = (DOCS / "performance.md").read_text()
    assert lines in page, "run: python -m tests.perf.bench_native --table docs/figures/native.json"


def test_the_figures_of_a_tap_are_those_of_one_run() -> None:
    """docs/performance.md has the table of docs/figures/native-tap.json, whole."""
    lines = ways_table(json.loads((DOCS / "figures/native-tap.json").read_text())["ways"])
    assert len(lines) > 4
    hint = "run: python -m tests.perf.bench_native --table docs/figures/native-tap.json"
    assert "\n".join(lines) in (DOCS / "performance.md").read_text(), hint
