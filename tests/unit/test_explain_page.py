"""The page of `pyvmm trace explain` in a real browser, used as a reader does: steps, packets,
search, folds, clicks, filters; wide, narrow, light, dark, on paper; and with a hostile trace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.explain.arrows import Diagram
from pyvmm.explain.mermaid import mermaid
from pyvmm.explain.page import page
from pyvmm.explain.read import take
from tests.browser import Browser
from tests.driver import wait_for
from tests.unit.test_compare_page import CONTRAST
from tests.unit.test_explain import CUT, EVIL, NAMES, REORDERED, poisoned, raw, with_faults

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "docs" / "explain").glob("*.html"))
KEYS = {"Enter": "\r", " ": " "}
#: What sticks out of its diagram, and labels that lie over each other.
OVER = """
[...document.querySelectorAll(".diagram")].map(d => {
  const box = e => e.getBoundingClientRect(), outer = box(d.querySelector(".body"));
  const texts = [...d.querySelectorAll(".row .label, .row .time")]
    .map(t => [t.textContent, box(t)]);
  const over = [];
  texts.forEach(([a, r], i) => {
    if (r.left < outer.left - 1 || r.right > outer.right + 1) over.push(a + " sticks out");
    texts.slice(i + 1).forEach(([b, s]) => {
      if (r.left < s.right && s.left < r.right && r.top < s.bottom - 3 && s.top < r.bottom - 3)
        over.push(a + " | " + b);
    });
  });
  const head = [...d.querySelectorAll(".head text")].map(box);
  head.forEach((r, i) => head.slice(i + 1).forEach(s => {
    if (r.left < s.right && s.left < r.right && r.top < s.bottom - 2 && s.top < r.bottom - 2)
      over.push("lifelines");
  }));
  return over;
}).flat()
"""
CHOSEN = 'document.querySelector("#details h3").textContent'
DETAILS = 'document.querySelector("#details").innerText'
PLACE = "active.selected"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


def made(path: Path, *documents: Any) -> Path:
    diagrams = []
    for number, document in enumerate(documents):
        trace = take(document, "x")
        diagrams.append((f"{number}.json", Diagram(trace, trace.card(None))))
    path.write_text(page(diagrams), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("explain") / "one.html", raw("exit"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("explain") / "two.html", *map(raw, NAMES))


def opened(browser: Browser, path: Path, width: int = 1300, *, dark: bool = False) -> Browser:
    browser.look(width=width, dark=dark)
    browser.console.clear()
    browser.requests.clear()
    browser.open(path)
    return browser


def press(browser: Browser, *keys: str) -> None:
    for key in keys:
        text = KEYS.get(key, key if len(key) == 1 else "")
        down: dict[str, Any] = {
            "type": "keyDown" if text else "rawKeyDown",
            "key": key,
            "text": text,
        }
        if key == "Enter":
            down |= {"code": "Enter", "windowsVirtualKeyCode": 13}
        browser.call("Input.dispatchKeyEvent", **down)
        browser.call("Input.dispatchKeyEvent", type="keyUp", key=key)


#: Where an element is, once it is at one place for two frames: the page draws its rows anew when
#: it has been scrolled or laid out.
STEADY = """(async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  document.querySelector(%s).scrollIntoView({block: "center"});
  for (let before = "";;) {
    await frame();
    const e = document.querySelector(%s), r = e && e.getBoundingClientRect();
    const now = r && [r.x + r.width / 2, r.y + r.height / 2];
    if (now && String(now) === before) return now;
    before = String(now);
  }
})()"""


def click(browser: Browser, selector: str) -> None:
    x, y = browser.evaluate(STEADY % (json.dumps(selector), json.dumps(selector)))
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_stored_pages(browser: Browser, path: Path) -> None:
    """Those of docs/explain.md: the flows on each data path, opened and used."""
    opened(browser, path)
    assert browser.requests == [path.as_uri()] and browser.console == []
    press(browser, "/", *"features_ok")
    assert "FEATURES_OK" in browser.evaluate(CHOSEN)
    press(browser, "Escape", "3")
    assert browser.evaluate("active.flow") == "packets"
    press(browser, "Home", "n", "n")
    assert browser.evaluate("active.rows[active.selected].p")
    press(browser, "1", "u")
    assert browser.evaluate(OVER) == []
    browser.evaluate("paper(true)")
    for number in range(browser.evaluate("diagrams.length")):
        one = f"diagrams[{number}]"
        drawn = browser.evaluate(
            f'[...{one}.body.querySelectorAll("[data-event]")].map(e => e.dataset.event)'
        )
        data = browser.evaluate(f"DATA.traces[{number}]")
        total = sum(c["arrows"] for c in data["counts"].values())
        assert len(drawn) + data["left"] == total > 200
        events = sum(c["events"] for c in data["counts"].values())
        assert data["left"] or len(set(drawn)) == events, "each arrow has an event behind it"


def test_there_are_stored_pages() -> None:
    names = {path.stem for path in STORED}
    assert names >= {
        "emulated",
        "vhost-net",
        "vhost-user",
        "exit-and-ioeventfd",
        "switch",
        "driver-bug",
        "vhost-vdpa",
    }
    assert all(path.stat().st_size < 350_000 for path in STORED)


def test_faults_on_demand_are_dashed_and_red(browser: Browser, tmp_path: Path) -> None:
    """And no other arrow is both."""
    document = raw("ioeventfd")
    with_faults(document, REORDERED, CUT)
    opened(browser, made(tmp_path / "faults.html", document))
    press(browser, "u")
    browser.evaluate("paper(true)")
    looks = browser.evaluate(
        """[...document.querySelectorAll(".row")].filter(r => r.querySelector(".line")).map(r => {
          const s = getComputedStyle(r.querySelector(".line"));
          return [r.querySelector(".label").textContent, s.stroke, s.strokeDasharray];
        })"""
    )
    red = browser.evaluate(
        """(() => {
          const e = document.body.appendChild(document.createElement("p"));
          e.style.color = "var(--mistake)";
          return getComputedStyle(e).color;
        })()"""
    )
    found = [label for label, stroke, dashes in looks if stroke == red and dashes != "none"]
    assert [label.partition(": ")[2].partition(":")[0] for label in found] == [
        "reorder-used",
        "truncate",
    ]
    assert len(looks) > 100


MERMAID = os.environ.get("PYVMM_MERMAID", "")
#: Asks Mermaid for a drawing, and has its size, or what is wrong, in ``window.told``.
DRAW = """
window.told = ""; (async () => {
  try { window.told = String((await mermaid.render("x" + Date.now(), %s)).svg.length); }
  catch (e) { window.told = "error: " + e.message; }
})(); 0
"""


@pytest.mark.skipif(not MERMAID, reason="PYVMM_MERMAID names no mermaid.min.js (npm pack mermaid)")
def test_mermaid_draws_the_text(browser: Browser, tmp_path: Path) -> None:
    """All of it, names that are an attack as well; and Mermaid notices what is no diagram."""
    path = tmp_path / "x.html"
    path.write_text(f'<!doctype html><body><script src="{Path(MERMAID).as_uri()}"></script>')
    browser.open(path)
    evil = raw("exit")
    for event in evil["traceEvents"]:
        if event["ph"] != "M":
            event["name"] += f" {EVIL}"
    texts = []
    for document in (*map(raw, NAMES), evil):
        trace = take(document, "x")
        texts += [mermaid(Diagram(trace, trace.card(None)), rows) for rows in (20, 300)]

    def drawn(text: str) -> str:
        browser.evaluate(DRAW % json.dumps(text))
        assert wait_for(lambda: browser.evaluate("window.told"), 60)
        return str(browser.evaluate("window.told"))

    for text in texts:
        told = drawn(text)
        assert told.isdecimal() and int(told) > 10_000, (told, text)
    assert drawn("sequenceDiagram\n  a->>>>b").startswith("error: Parse error on line 2")
    assert browser.evaluate("window.pwned") is None


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1300, 800, 390])
@pytest.mark.parametrize("which", ["one", "two"])
def test_it_looks_right(
    browser: Browser, request: pytest.FixtureRequest, which: str, width: int, dark: bool
) -> None:
    path = request.getfixturevalue(which)
    opened(browser, path, width, dark=dark)
    assert browser.requests == [path.as_uri()] and browser.console == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for flow in ("all", "packets", "control", "set-up"):
        click(browser, f'[data-flow="{flow}"]')
        assert browser.evaluate("document.querySelectorAll('[data-event]').length") > 3
        assert browser.evaluate(OVER) == [], flow
    tallest = browser.evaluate(
        'document.querySelectorAll("details.part").forEach(d => { d.open = true; });'
        '[...document.querySelectorAll("tr")].reduce((most, row) =>'
        " Math.max(most, row.getBoundingClientRect().height), 0)"
    )
    assert tallest < 130, "a column of a table is squeezed"
    seen = browser.evaluate(CONTRAST)
    assert (seen["paper"] < 0.1) == dark and seen["text"] >= 4.5


def test_step_by_step(browser: Browser, one: Path) -> None:
    opened(browser, one)
    assert browser.evaluate(CHOSEN) == "read vendor id: 0x10411af4"
    assert "virtio 4.1.2" in browser.evaluate(DETAILS)
    press(browser, "ArrowDown")
    assert browser.evaluate(CHOSEN) == "write BAR 0: 0xffffffff"
    press(browser, "j", "j", "k")
    assert browser.evaluate(CHOSEN) == "read BAR 0: 0xffff8000"
    assert "before" in browser.evaluate(DETAILS), "the value has changed, and the old one is told"
    click(browser, "#back")
    assert browser.evaluate(CHOSEN) == "write BAR 0: 0xffffffff"
    said = browser.evaluate('document.getElementById("live").textContent')
    assert "write BAR 0" in said and "driver → KVM → VMM" in said
    press(browser, "End")
    assert browser.evaluate(PLACE) == browser.evaluate("active.rows.length - 1")
    press(browser, "Home")
    assert browser.evaluate(PLACE) == 0


def test_packet_by_packet(browser: Browser, one: Path) -> None:
    opened(browser, one)
    seen = []
    for key in ("n", "n", "ArrowRight"):
        press(browser, key)
        seen.append(browser.evaluate("active.rows[active.selected].p"))
    assert len(set(seen)) == 3
    press(browser, "p")
    assert browser.evaluate("active.rows[active.selected].p") == seen[1]
    assert "take chain" in browser.evaluate(CHOSEN)
    details = browser.evaluate(DETAILS)
    assert "Available ring" in details and "next entry of the device" in details
    changed = browser.evaluate('document.querySelectorAll("#details tr.changed").length')
    assert changed == 2 and browser.evaluate('document.querySelectorAll("svg.ring .fresh").length')
    press(browser, "j")
    assert browser.evaluate('document.querySelectorAll("#details .bytes .ether").length') == 14
    press(browser, "j")
    assert "Used ring" in browser.evaluate(DETAILS)
    colour = browser.evaluate(
        'getComputedStyle(document.querySelector("tr.changed td")).backgroundColor'
    )
    assert colour not in ("rgba(0, 0, 0, 0)", "transparent")


def test_a_click_chooses_an_arrow(browser: Browser, one: Path) -> None:
    opened(browser, one)
    event = browser.evaluate('document.querySelectorAll("[data-event]")[4].dataset.event')
    click(browser, f'[data-event="{event}"] .label')
    assert f"number {event} of the trace" in browser.evaluate(DETAILS)
    assert browser.evaluate('document.querySelectorAll(".body .chosen").length') == 1


def test_search(browser: Browser, one: Path) -> None:
    opened(browser, one)
    press(browser, "/", *"driver_ok")
    found = 'document.getElementById("found").textContent'
    assert browser.evaluate(found).startswith("1 of ")
    assert "DRIVER_OK" in browser.evaluate(CHOSEN)
    press(browser, "Enter")
    assert browser.evaluate(found).startswith("2 of ")
    assert browser.evaluate('document.querySelectorAll(".row.hit").length') > 0
    browser.evaluate('search.value = ""')
    press(browser, *"zebra")
    assert browser.evaluate(found) == "nothing found"
    press(browser, "Escape")
    assert browser.evaluate(found) == "" and browser.evaluate("search.value") == ""
    press(browser, "/", *"192.168.100.1")
    assert browser.evaluate(found).startswith("1 of "), "what a packet says is found, too"


def test_folds_open_and_close(browser: Browser, one: Path) -> None:
    opened(browser, one)
    rows = browser.evaluate("active.rows.length")
    at = browser.evaluate("active.rows.findIndex(r => r.n && r.more)")
    browser.evaluate(f"active.select({at})")
    assert "times" in browser.evaluate(CHOSEN) and "median" in browser.evaluate(DETAILS)
    press(browser, "Enter")
    opened_rows = browser.evaluate("active.rows.length")
    assert opened_rows > rows
    press(browser, "Enter")
    assert browser.evaluate("active.rows.length") == rows
    click(browser, ".row.folded .label")
    assert browser.evaluate("active.rows.length") > rows
    press(browser, "u", "u")
    assert browser.evaluate("active.rows.length") == rows


def test_every_arrow_can_be_reached(browser: Browser, one: Path) -> None:
    """Unfolded, the rows are all arrows of the trace; each has its event's number in the page."""
    opened(browser, one)
    press(browser, "u")
    total = browser.evaluate(
        "DATA.traces[0].left + active.rows.filter(r => r.i !== undefined).length"
    )
    counts = browser.evaluate("DATA.traces[0].counts")
    assert total == sum(c["arrows"] for c in counts.values())
    browser.evaluate("paper(true)")
    drawn = browser.evaluate(
        '[...document.querySelectorAll("[data-event]")].map(e => Number(e.dataset.event))'
    )
    known = len(raw("exit")["traceEvents"])
    assert len(drawn) == total and all(0 <= event < known for event in drawn)


def test_zoom_and_help(browser: Browser, one: Path) -> None:
    opened(browser, one)
    before = browser.evaluate("active.row")
    press(browser, "+", "+")
    assert browser.evaluate("active.row") > before and browser.evaluate(OVER) == []
    press(browser, "-", "-", "-", "-")
    assert browser.evaluate("active.row") < before
    press(browser, "0", "?")
    assert browser.evaluate("active.row") == before and browser.evaluate("help.open")
    click(browser, "#close")
    assert not browser.evaluate("help.open")


def test_on_paper(browser: Browser, one: Path) -> None:
    opened(browser, one)
    browser.evaluate('window.dispatchEvent(new Event("beforeprint"))')
    drawn = browser.evaluate('document.querySelectorAll(".row").length')
    assert drawn == browser.evaluate("active.rows.length")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate('getComputedStyle(document.querySelector(".bar")).display') == "none"
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.evaluate('window.dispatchEvent(new Event("afterprint"))')
    assert browser.evaluate('document.querySelectorAll(".row").length') < drawn


def test_the_same_packet_on_two_data_paths(browser: Browser, two: Path) -> None:
    opened(browser, two)
    click(browser, '[data-flow="packets"]')
    for _ in range(3):
        press(browser, "n")
        chosen = browser.evaluate("diagrams.map(d => (d.rows[d.selected] || {}).m)")
        assert chosen[0] and chosen[0] == chosen[1]
    gone = browser.evaluate('document.querySelector("#difference tr.gone").innerText')
    assert "kick: exit to the VMM" in gone and "vanishes; saves" in gone


def test_a_hostile_trace_is_only_text(browser: Browser, tmp_path: Path) -> None:
    document = poisoned(raw("exit"))
    assert isinstance(document, dict)
    for event in document["traceEvents"]:
        if event["pid"] == 10 and event["name"].startswith("process_name"):
            event["name"] = "process_name"
            event["args"]["name"] = "net0" + EVIL
    path = made(tmp_path / "evil.html", document)
    opened(browser, path)
    press(browser, "u", "j", "n", "j", "j")
    browser.evaluate("active.rows.forEach((_, i) => active.select(i))")
    browser.evaluate("paper(true)")
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert browser.evaluate('document.querySelectorAll("img, iframe, object").length') == 0
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate(
        '[...document.querySelectorAll(".label")].some(e => e.textContent.includes("<script>"))'
    )
    assert browser.requests == [path.as_uri()] and browser.console == []


def test_no_other_script_can_run(browser: Browser, one: Path) -> None:
    """Even if markup came into the page: the policy refuses it."""
    opened(browser, one)
    browser.evaluate(
        '(() => { const s = document.createElement("script"); s.textContent = "window.pwned = 1";'
        " document.body.append(s); const i = document.createElement('img');"
        " i.setAttribute('onerror', 'window.pwned = 1'); i.src = 'data:,x';"
        " document.body.append(i); })()"
    )
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in line for line in browser.console)


def test_the_look_notices(browser: Browser, one: Path) -> None:
    opened(browser, one)
    over = browser.evaluate(  # at once: the page may draw its rows again at any time
        '(() => { document.querySelectorAll(".row .label")[3].setAttribute("x", active.width - 10);'
        f" const over = {OVER}; return over; }})()"
    )
    assert any("sticks out" in line for line in over)
