"""Looks at a running machine on behalf of all who watch it.

Theory of operation: nothing here has a clock of its own. A looker asks for what comes after the
look that it knows already (``Watch.after``). If the latest look is newer, the looker gets that.
Otherwise the looker's own thread waits until the interval is over, asks the machine by its control
socket, and keeps the answer for the other lookers, who wait for the same lock meanwhile. So several
lookers cost the machine as much as one, and nobody costs nothing: then the machine is asked for
nothing, and only tells events, which are rare.

What is told of a machine is text and numbers that a guest can choose. Everything has a limit.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from pyvmm.errors import ControlError, MachineMissing
from pyvmm.exits.rates import rates
from pyvmm.virtio.ringwords import asks, chain_words, regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.client import Client

HISTORY = 120  # looks that are kept, with their rates only
EVENTS = 100
CAUSES = 40  # of exits; the rarest are summed
MAP_MAX = 1024  # the most descriptors that are drawn
CHAINS = 2  # shown for either side of a ring
TEXT_MAX = 300
STALE = 3  # intervals after which two looks make no rate
LAST_WORD = 1.0  # seconds for the event of the machine's end
#: A machine's status after which no other comes.
ENDED = ("shutdown", "guest-panicked")
#: Why a virtqueue that is served by others has no in-flight chains to show: by mode.
SILENT = {
    "vhost-net": "the kernel's vhost thread serves the ring, and does not tell while it runs",
    "vhost-user": "another process serves the ring, and does not tell while it runs",
    "vhost-vdpa": "a device serves the ring, and does not tell while it runs",
}
#: Event of the control socket -> what it says, as ``str.format`` of the event's data.
WORDS = {
    "STOP": "the machine is paused",
    "RESUME": "the machine goes on",
    "RESET": "the machine is reset ({reason}) and starts over",
    "POWERDOWN": "the power button is pressed",
    "SUSPEND": "the guest is suspended to memory",
    "WAKEUP": "the guest wakes up",
    "SHUTDOWN": "the machine has ended: {reason}",
    "GUEST_PANICKED": "the guest kernel has panicked",
    "DEVICE_DELETED": "{device} is unplugged",
    "X_PYVMM_NIC_FAULT": "{name} has stopped: {problem}",
    "X_PYVMM_EVENTS_LOST": "{count} events are lost",
}


class Watch:
    """The looks at one machine. All methods may be called by any thread.

    :param client: connected to the machine, lent. :param interval: seconds between two looks, at
        least.
    :ivar ended: why no other look comes, in words; empty while the machine runs.
    """

    def __init__(self, client: Client, interval: float = 1.0) -> None:
        self._client, self._interval = client, interval
        #: A looker holds the turn while it waits for the interval's end; whoever talks with the
        #: machine, or changes what is kept, holds the lock.
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._over = threading.Event()  # the machine has ended, or the watch
        self._due = 0.0
        self._number = 0
        self._ledger: dict[str, Any] | None = None
        self._now: dict[str, Any] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._event_number = 0
        self._cards: dict[str, dict[str, Any]] | None = None
        self.ended = ""

    def after(self, number: int) -> dict[str, Any]:
        """The first look after look ``number``, for JSON (docs/watch.md); waits for it. At the end
        of the machine, or of the watch, it is the last one again, with ``ended``.

        :param number: 0 for the latest look, with the history.
        """
        with self._turn:
            if number >= self._number:
                self._over.wait(max(self._due - time.monotonic(), 0))
            with self._lock:
                over = time.monotonic() >= self._due  # also for a looker who comes after a pause
                if over and not self._over.is_set():
                    self._look()
                return {
                    **self._now,
                    "number": self._number,
                    "interval": self._interval,
                    "ended": self.ended,
                    "history": [h for h in self._history if h["number"] > number],
                    "events": [dict(event) for event in self._events],
                }

    def hear(self) -> None:
        """Take the events that the machine has told meanwhile. Does nothing while somebody looks,
        because that takes them, too.
        """
        if self.ended or not self._lock.acquire(blocking=False):
            return
        try:
            while not self.ended:
                self._client.events.append(self._client.next_event(0))
                self._take_events()
        except TimeoutError:
            pass
        except MachineMissing as e:
            self._end(str(e))
        finally:
            self._lock.release()

    def close(self) -> None:
        """Let nobody wait any longer. The client is the caller's to close."""
        self._over.set()

    # --- with the lock ----------------------------------------------------------------------------

    def _look(self) -> None:
        if time.monotonic() - self._due > STALE * self._interval:
            self._ledger = None  # nobody has looked for a while, and an average of that says little
        try:
            ledger = self._client.command("x-pyvmm-ledger")
            machine = self._client.command("x-pyvmm-machine")
            cards = [self._card(net, ledger) for net in machine["nets"]]
        except MachineMissing as e:
            self._last_events(str(e))
            return
        self._due = time.monotonic() + self._interval
        self._take_events()
        self._compare(cards)
        self._number += 1
        before, self._ledger = self._ledger, ledger
        now = rates(before, ledger) if before is not None else None
        if now is not None:
            now["by_name"] = _most(now["by_name"])
            slim = {key: value for key, value in now.items() if key != "by_name"}
            self._history.append({"number": self._number, "time": time.time(), **slim})
        self._now = {
            "time": time.time(),
            "name": ledger["name"],
            "status": ledger["status"],
            "reboots": ledger["reboots"],
            "cpus": machine["cpus"],
            "memory": machine["memory"],
            "rates": now,
            "cards": cards,
        }
        if ledger["status"] in ENDED:
            self._last_events("the machine has ended")

    def _last_events(self, why: str) -> None:
        """The machine has ended, or is gone. Its last events may say how; else ``why`` does."""
        try:
            while True:
                self._take_events()
                if self.ended:
                    return
                self._client.events.append(self._client.next_event(LAST_WORD))
        except (TimeoutError, MachineMissing):
            self._end(why)

    def _card(self, net: dict[str, Any], ledger: dict[str, Any]) -> dict[str, Any]:
        """One card: what it is, and its virtqueues."""
        wanted = ("name", "mode", "tap", "link", "transport", "slot", "mac", "host", "guest")
        card = {key: net[key] for key in (*wanted, "state")}
        counted = next((n for n in ledger["nets"] if n["name"] == net["name"]), None)
        card["notify"] = counted["notify"] if counted is not None else ""
        number = int(net["name"].removeprefix("net"))
        try:
            rings = self._client.execute("x-pyvmm-rings", {"nic": number, "chains": CHAINS})
        except ControlError as e:  # unplugged meanwhile, or the machine has ended
            return {**card, "active": False, "queues": [], "note": str(e)[:TEXT_MAX]}
        # The mode is that of the rings: a switch may have come in between.
        card |= {"mode": rings["mode"], "active": rings["active"]}
        card["queues"] = [_queue(q, rings["mode"]) for q in rings["queues"]]
        card["note"] = "" if rings["active"] else "the guest does not drive the card"
        return card

    def _compare(self, cards: list[dict[str, Any]]) -> None:
        """Report what has changed of the cards since the look before."""
        then, self._cards = self._cards, {card["name"]: card for card in cards}
        if then is None:
            return
        for name, card in self._cards.items():
            old = then.get(name)
            if old is None:
                self._event("card", f"{name} is plugged in ({card['mode']})", card=name)
                continue
            if card["mode"] != old["mode"]:
                self._event("switch", f"{name}: {old['mode']} -> {card['mode']}", card=name)
            if card["active"] != old["active"]:
                does = "drives" if card["active"] else "has reset"
                self._event("driver", f"the guest {does} {name}", card=name)
            if card["link"] != old["link"]:
                word = "plugged" if card["link"] else "pulled"
                self._event("link", f"the cable of {name} is {word}", card=name)

    def _take_events(self) -> None:
        """Put what the machine has told into words."""
        while self._client.events:
            event = self._client.events.popleft()
            name, data = str(event.get("event")), event.get("data") or {}
            stamp = event.get("timestamp", {})
            try:
                at = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
                self._take_event(name, data, float(at))
            except (AttributeError, TypeError, ValueError, OverflowError):
                self._event("strange", f"an event that nobody understands: {name}")

    def _take_event(self, name: str, data: dict[str, Any], at: float) -> None:
        if name == "X_PYVMM_SWITCHED":
            card, mode = str(data.get("name")), str(data.get("mode"))
            took = f", in {data.get('duration-ns', 0) / 1e6:.1f} ms"
            self._switched(card, mode, took, at)
        elif name in WORDS:
            words = WORDS[name].format_map(_Data(data))
            self._event(name.lower(), words, at, str(data.get("name", "")))
            if name == "SHUTDOWN":
                self._end(words)

    def _switched(self, card: str, mode: str, took: str, at: float) -> None:
        """The machine says that a card has been switched; a look may have seen the switch before,
        and then its event only gets the time that the switch took.
        """
        old = (self._cards or {}).get(card)
        if old is not None and old["mode"] == mode:
            for event in reversed(self._events):
                if event["kind"] == "switch" and event["card"] == card:
                    if not event["text"].endswith(" ms"):
                        event["text"] = (event["text"] + took)[:TEXT_MAX]
                    return
        was = f"{old['mode']} -> " if old is not None else "now "
        self._event("switch", f"{card}: {was}{mode}{took}", at, card)
        if old is not None:
            old["mode"] = mode

    def _event(self, kind: str, text: str, at: float | None = None, card: str = "") -> None:
        self._event_number += 1
        self._events.append(
            {
                "id": self._event_number,
                "number": self._number,
                "time": at if at is not None else time.time(),
                "kind": kind,
                "card": _plain(card),
                "text": _plain(text),
            }
        )

    def _end(self, why: str) -> None:
        if not self.ended:
            self.ended = _plain(why)
            self._over.set()
            if self._now and self._now["status"] not in ENDED:
                self._now["status"] = "ended"


def _plain(text: str) -> str:
    """The text, with nothing in it that moves a terminal's cursor, and of limited length."""
    return "".join(c if c.isprintable() else "?" for c in text[:TEXT_MAX])


class _Data(dict[str, object]):
    """The data of an event, in which nothing is missing."""

    def __missing__(self, key: str) -> str:
        return "?"


def _most(names: dict[str, float | None]) -> dict[str, float | None]:
    """The most frequent causes of exits, in order, and the sum of the others."""
    if len(names) <= CAUSES:
        return names
    items = list(names.items())
    rest = sum(rate or 0 for _, rate in items[CAUSES - 1 :])
    return {**dict(items[: CAUSES - 1]), "other causes": round(rest, 1)}


def _queue(q: dict[str, Any], mode: str) -> dict[str, Any]:
    """A virtqueue for people: with words, and a letter per descriptor in the place of a list."""
    if "format" not in q:
        return {**q, "note": "" if q["enabled"] else "not enabled"}
    q = {"taken": None, "in-flight": None, **q}  # a machine of an older version does not say
    out = {key: value for key, value in q.items() if key not in ("device-owned", "available")}
    out["asks"], out["regions"] = asks(q), regions(q)
    out["next"] = [
        {"at": c["at"], "head": c.get("head", c.get("id")), "words": chain_words(c)}
        for c in q["available"]
    ]
    out["note"] = ""
    if q["taken"] is None:
        own = "pyvmm answers each command at once"
        out["note"] = own if q["role"] == "control" else SILENT.get(mode, "")
    size = q["size"]
    if q["format"] == "split":
        letters = bytearray(b"." * min(size, MAP_MAX))
        for at in q["device-owned"]:
            if at < len(letters):
                letters[at] = ord("D")
        out["map"] = letters.decode()
    else:
        out["map"] = q["map"][:MAP_MAX]
    out["owned"] = len(q["device-owned"])
    return out
