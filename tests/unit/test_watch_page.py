"""The live page of ``pyvmm watch`` in a real browser, used as a reader does: wide, narrow, light,
dark, by keyboard; while the machine switches, resets and ends; and with hostile answers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyvmm.control.client import connect
from tests.boot.guest import PATIENCE
from tests.browser import Browser
from tests.unit.test_compare_page import CONTRAST
from tests.unit.test_explain import EVIL
from tests.unit.test_explain_page import click, press
from tests.unit.test_watch import served
from tests.watched import Box, Home, packed, split

#: Texts of a ring that lie over each other, or outside of the picture; and what is wider than it.
OVER = """
[...document.querySelectorAll("svg.ring")].filter(s => s.style.display !== "none").map(svg => {
  const box = e => e.getBoundingClientRect(), o = box(svg), over = [];
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, box(t)]);
  texts.forEach(([a, r], i) => {
    if (r.left < o.left || r.right > o.right || r.top < o.top || r.bottom > o.bottom)
      over.push(a + " sticks out");
    texts.slice(i + 1).forEach(([b, s]) => {
      if (r.left < s.right && s.left < r.right && r.top < s.bottom - 3 && s.top < r.bottom - 3)
        over.push(a + " | " + b);
    });
  });
  return over;
}).flat()
"""
STATUS = 'document.getElementById("status").textContent'
NOTICE = 'document.getElementById("notice").textContent'
EVENTS = '[...document.querySelectorAll("#events li")].map(li => li.lastChild.textContent)'
MODES = '[...document.querySelectorAll(".pill.mode")].map(e => e.textContent)'
LOOKS = "last"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    home = Home(monkeypatch)
    one = Box()
    one.add(
        "net1", "vhost-net", packed(0, "receive"), split(1, "transmit", avail=9, used=1, taken=None)
    )
    yield one
    one.close()
    home.close()


@pytest.fixture
def page(box: Box, browser: Browser) -> Iterator[Browser]:
    """The page of the box, opened."""
    with served(interval=0.05) as server:
        show(browser, server.url)
        yield browser
        browser.open("about:blank")


def show(browser: Browser, url: str, width: int = 1300, *, dark: bool = False) -> None:
    browser.look(width=width, dark=dark)
    browser.console.clear()
    browser.requests.clear()
    browser.open(url)
    until(browser, f"{LOOKS} > 2")


def until(browser: Browser, expression: str) -> Any:
    """Wait for a true value in the page."""
    end = time.monotonic() + PATIENCE
    while not (value := browser.evaluate(expression)):
        assert time.monotonic() < end, f"{expression} does not come; the page says: " + str(
            browser.evaluate("document.body.innerText")
        )
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1300, 800, 390])
def test_it_looks_right(browser: Browser, box: Box, width: int, dark: bool) -> None:
    with served(interval=0.05) as server:
        show(browser, server.url, width, dark=dark)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVER) == []
        seen = browser.evaluate(CONTRAST)
        assert (seen["paper"] < 0.1) == dark and seen["text"] >= 4.5
        assert all(url.startswith(server.url) or url == "data:," for url in browser.requests)
        assert browser.console == []
        press(browser, "d")
        until(browser, 'document.querySelectorAll("svg.map path").length >= 4')
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        press(browser, "?")
        assert browser.evaluate('document.getElementById("help").open')
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        click(browser, "#close")
        browser.open("about:blank")


def test_numbers_and_rings(page: Browser) -> None:
    for words in ("1 vCPU · 256 MiB", "52:54:00:00:00:01 · slot 1 · tap tap0",
                  "net0 queue 1 notify",
                  "queue 0, receive", "split, 8 entries", "packed, 8 entries", "not enabled",
                  "the kernel's vhost thread serves the ring, and does not tell",
                  "something is wrong", "tap0-0: "):  # fmt: skip
        until(page, f"document.body.innerText.includes({json.dumps(words)})")
    assert page.evaluate(STATUS) == "running" and page.evaluate(MODES) == ["emulated", "vhost-net"]
    arcs = '[...document.querySelectorAll("svg.ring")]'
    arcs += '.map(s => [...s.querySelectorAll(".arc, circle")]'
    arcs += '.map(a => a.getAttribute("class").replace("arc ", "")))'
    assert page.evaluate(arcs)[:2] == [["free", "in-flight", "available"], ["free"]]
    assert page.evaluate(arcs)[4] == ["free", "available"], "a full ring is a whole circle"
    rate = 'Number(document.querySelector("#totals b").textContent.replace(/ k/, "e3"))'
    assert until(page, f"{rate} > 0")
    dash = '[...document.querySelectorAll("[data-card=net0] .tile")][5].innerText'
    assert page.evaluate(dash).split() == ["\u2013", "Mbit", "per", "second"], "nobody counts it"
    until(page, 'document.querySelectorAll("path.curve").length > 5')


def test_what_has_been_returned_is_shown(page: Browser, box: Box) -> None:
    box.rings["net0"][0] = split(0, "receive", avail=12, used=8, taken=8)
    until(page, 'document.querySelector("svg.ring .big").textContent == "4"')
    # Only the look at which the device has moved shows an arc of three entries.
    box.rings["net0"][0] = split(0, "receive", avail=16, used=11, taken=11)
    press(page, " ")
    page.evaluate("halted = false, ask()")
    until(page, 'document.querySelector("svg.ring .big").textContent == "5"')


def test_a_switch_a_reset_and_a_card_that_comes(page: Browser, box: Box) -> None:
    box.nets[0]["mode"] = "vhost-user"
    data = {"name": "net0", "mode": "vhost-user", "duration-ns": 41_000_000}
    box.server.emit("X_PYVMM_SWITCHED", data)
    until(page, f'{MODES}[0] == "vhost-user"')
    assert until(page, EVENTS) == ["net0: emulated -> vhost-user, in 41.0 ms"]
    until(page, 'document.querySelectorAll("[data-card=net0] line.mark").length == 8')
    said = page.evaluate('document.getElementById("live").textContent')
    assert said == "net0: emulated -> vhost-user, in 41.0 ms"
    box.reboots, box.active = 1, False
    box.server.emit("RESET", {"reason": "guest-reset"})
    until(page, f"{EVENTS}.length >= 3")
    assert "the machine is reset (guest-reset) and starts over" in page.evaluate(EVENTS)
    assert "1 reboot" in page.evaluate("document.body.innerText")
    assert "the guest does not drive the card" in page.evaluate("document.body.innerText")
    box.active, box.status = True, "paused"
    until(page, f'{STATUS} == "paused"')
    box.add("net2", "emulated", split(0, "receive", avail=3, used=1, taken=2))
    until(page, f"{MODES}.length == 3")
    del box.nets[1:]
    until(page, f"{MODES}.length == 1")
    assert page.console == []


def test_by_keyboard(page: Browser, box: Box) -> None:
    press(page, " ")
    until(page, "!asking")  # an answer may be on its way
    assert "nothing is asked of the machine" in page.evaluate(NOTICE)
    asked = box.asked["ledger"]
    time.sleep(0.5)
    assert box.asked["ledger"] == asked
    press(page, " ")
    until(page, f"{LOOKS} > {page.evaluate(LOOKS)}")
    press(page, "2")
    assert page.evaluate("document.activeElement.textContent") == "net1"
    press(page, "e")
    assert page.evaluate("document.activeElement.textContent") == "Events"
    press(page, "?")
    click(page, "#close")
    click(page, "#pause")
    assert page.evaluate("halted")
    click(page, "#pause")
    assert not page.evaluate("halted")


def test_a_page_out_of_sight_asks_nothing(page: Browser, box: Box) -> None:
    hide = (
        'Object.defineProperty(document, "hidden", {configurable: true, get: () => HIDDEN});'
        'document.dispatchEvent(new Event("visibilitychange"))'
    )
    page.evaluate(hide.replace("HIDDEN", "true"))
    until(page, "!asking")
    asked = box.asked["ledger"]
    time.sleep(0.5)
    assert box.asked["ledger"] == asked
    page.evaluate(hide.replace("HIDDEN", "false"))
    until(page, f"{LOOKS} > {page.evaluate(LOOKS)}")


def test_what_is_open_stays_open(page: Browser) -> None:
    click(page, "summary")
    chains = 'document.querySelector(".queue details").innerText'
    until(page, f'{chains}.includes("descriptors are the device\'s")')
    looks = page.evaluate(LOOKS)
    until(page, f"{LOOKS} > {looks} + 3")
    assert page.evaluate('document.querySelector(".queue details").open')
    assert "[5] head 5: 5 write 0x1000+1536" in page.evaluate(chains)


def test_the_end_of_the_machine(page: Browser, box: Box) -> None:
    box.server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
    box.close()
    until(page, f'{STATUS} == "ended"')
    assert page.evaluate(NOTICE) == "The machine has ended: guest-shutdown."
    assert page.evaluate(MODES) == ["emulated", "vhost-net"], "the last picture stays"
    assert page.evaluate("!asking && over") and page.console == []


def test_the_end_of_the_command(browser: Browser, box: Box) -> None:
    with served(interval=0.05) as server:
        show(browser, server.url)
        server.watch.close()
    until(browser, f'{STATUS} == "lost" || {STATUS} == "ended"')
    browser.open("about:blank")


def test_the_link_that_cannot_be_guessed(browser: Browser, box: Box) -> None:
    with served() as server:
        browser.open(server.url.replace(server.token, "x" * len(server.token)))
        assert "has a token" in browser.evaluate("document.body.innerText")
        browser.open("about:blank")


def test_hostile_answers(browser: Browser, box: Box) -> None:
    """Names and problems that are attacks: a machine's process may be a guest's by now."""
    box.causes = {EVIL: 5, "rtc" + EVIL: 3}
    box.nets[0] |= {"mode": "emulated" + EVIL, "mac": EVIL, "tap": EVIL, "state": EVIL}
    box.status = "running" + EVIL
    box.rings["net0"][0]["problems"] = [EVIL]
    box.rings["net0"][0]["role"] = EVIL
    with served(interval=0.05) as server:
        show(browser, server.url)
        box.server.emit("X_PYVMM_NIC_FAULT", {"name": EVIL, "problem": EVIL})
        until(browser, f"{EVENTS}.length")
        press(browser, "d")
        assert browser.evaluate("window.pwned") is None
        assert browser.evaluate('document.querySelectorAll("img, script:not([src])").length') == 0
        assert EVIL in browser.evaluate("document.body.innerText")
        assert browser.console == []
        assert all(url.startswith(server.url) or url == "data:," for url in browser.requests)
        # And if it did get in, the policy would stop it.
        browser.evaluate(
            'document.head.append(Object.assign(document.createElement("script"),'
            ' {textContent: "window.pwned = 1"}))'
        )
        assert browser.evaluate("window.pwned") is None
        browser.open("about:blank")


def test_two_pages_cost_as_much_as_one(box: Box) -> None:
    with served(interval=0.2) as server, Browser() as one, Browser() as two:
        for browser in (one, two):
            browser.open(server.url)
        for browser in (one, two):
            until(browser, f"{LOOKS} > 3")
        with connect("box"):
            looks, since = box.asked["ledger"], time.monotonic()
            time.sleep(2)
            assert box.asked["ledger"] - looks <= (time.monotonic() - since) / 0.2 + 1
