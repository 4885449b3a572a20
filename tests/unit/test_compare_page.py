"""The page of `pyvmm compare` in a real browser: light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.compare import html
from tests.browser import Browser
from tests.unit.test_compare import RECORD

#: For each plot: what is drawn, and pairs of texts that lie over each other or stick out.
PLOTS = """
[...document.querySelectorAll("svg.plot")].map(svg => {
  const box = e => e.getBoundingClientRect(), outer = box(svg);
  const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent)
    .map(t => [t.textContent, box(t)]);
  const over = [];
  texts.forEach(([a, r], i) => {
    if (r.left < outer.left - 1 || r.right > outer.right + 1 ||
        r.top < outer.top - 1 || r.bottom > outer.bottom + 1)
      over.push(a + " sticks out");
    texts.slice(i + 1).forEach(([b, s]) => {
      if (r.left < s.right && s.left < r.right && r.top < s.bottom - 2 && s.top < r.bottom - 2)
        over.push(a + " | " + b);
    });
  });
  const drawn = [...svg.querySelectorAll("rect, path.line")]
    .filter(e => box(e).width > 0 || box(e).height > 0).length;
  return {label: svg.getAttribute("aria-label"), width: outer.width, height: outer.height,
          texts: texts.length, size: Math.min(...texts.map(([, r]) => r.height)), over, drawn};
})
"""
#: WCAG contrast of body text, and of each colour in a legend, with what lies behind it.
CONTRAST = """
(() => {
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => rgb(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) =>
    (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const paper = getComputedStyle(document.body).backgroundColor;
  const text = [...document.querySelectorAll("p, li, h1, h2, summary, dt, td.noise, th")]
    .map(e => ratio(getComputedStyle(e).color, paper));
  const plot = [...document.querySelectorAll("svg.plot text")]
    .map(e => ratio(getComputedStyle(e).fill, paper));
  return {paper: light(paper), text: Math.min(...text), plot: Math.min(...plot)};
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("page") / "compare.html"
    path.write_text(html.page(json.loads(RECORD.read_text())), encoding="utf-8")
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.look(width=width, dark=dark)
    browser.console.clear()
    browser.requests.clear()
    browser.open(page)
    plots = browser.evaluate(PLOTS)
    shot = browser.screenshot()
    assert browser.console == []
    assert browser.requests == [page.as_uri()]
    assert len(plots) >= 8 and len(shot) > 50_000
    for plot in plots:
        assert plot["over"] == [], plot
        assert plot["width"] > 200 and plot["texts"] >= 4, plot
        assert plot["size"] >= 11, f"unreadably small: {plot}"
        if "to userspace" not in plot["label"]:  # of those there may really be none
            assert plot["drawn"] > 0, plot
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, (
        "the page scrolls sideways"
    )
    seen = browser.evaluate(CONTRAST)
    assert (seen["paper"] < 0.1) == dark
    assert seen["text"] >= 4.5 and seen["plot"] >= 4.5, seen


def test_the_figure(browser: Browser, tmp_path: Path) -> None:
    import json

    path = tmp_path / "compare.svg"
    path.write_text(html.figure(json.loads(RECORD.read_text())), encoding="utf-8")
    browser.look(width=1300, dark=False)
    browser.console.clear()
    browser.open(path)
    assert browser.console == [] and len(browser.screenshot()) > 20_000
    plots = browser.evaluate(PLOTS)
    assert plots and all(p["over"] == [] for p in plots), plots


def test_the_checks_notice(browser: Browser, tmp_path: Path) -> None:
    """A page that has all that they look for."""
    path = tmp_path / "bad.html"
    path.write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>'
        '<svg class="plot" width="300" height="99">'
        '<text x="5" y="50">one</text><text x="9" y="50">two</text>'
        '<text x="290" y="20">three</text></svg>'
    )
    browser.console.clear()
    browser.requests.clear()
    browser.open(path)
    (plot,) = browser.evaluate(PLOTS)
    assert plot["over"] == ["one | two", "three sticks out"] and plot["drawn"] == 0
    assert any("no" in line for line in browser.console)
    assert "http://127.0.0.1:9/x.png" in browser.requests
