"""Traces as arrows: every arrow has an event behind it, folds add up, and nothing that a trace says
becomes markup.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.errors import UsageError
from pyvmm.explain import frames, words
from pyvmm.explain.arrows import PER_EVENT, RAISED, SHARED, TAKEN, WORK, Diagram
from pyvmm.explain.fold import Fold, Gap, fold
from pyvmm.explain.mermaid import mermaid
from pyvmm.explain.page import _script_safe, left_out, page
from pyvmm.explain.read import Trace, clean, load, take

TRACES = Path(__file__).parents[1] / "data" / "explain"
NAMES = ("exit", "ioeventfd")
EVIL = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=1>\u202e&lt;\"'`"


def raw(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((TRACES / f"{name}.json").read_text())
    return document


def trace(name: str) -> Trace:
    return load(str(TRACES / f"{name}.json"))


def diagram(name: str) -> Diagram:
    one = trace(name)
    return Diagram(one, one.card(None))


def embedded(html: str) -> list[dict[str, Any]]:
    """The diagrams in a page."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert len(found) == 1
    data = json.loads(found[0])
    traces: list[dict[str, Any]] = data["traces"]
    for arrow in (arrow for one in traces for arrow in arrows_of(one)):
        arrow["l"] = data["texts"][arrow["l"]]
    return traces


def arrows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The arrows that a page has, those in folds as well."""
    out = []
    for row in data["rows"]:
        if "n" in row:
            out += [*row["first"], *(row["more"] or ())]
        elif "i" in row:
            out.append(row)
    return out


def is_later(packet: dict[str, Any]) -> bool:
    """Whether a packet's chains had not been returned when its event was written."""
    return "used_at" not in packet["args"]


def check(document: dict[str, Any], data: dict[str, Any], pid: int = 10) -> None:
    """Count the events of a trace and the arrows of its page, each for itself."""
    events = document["traceEvents"]
    mine = Counter(
        e["cat"]
        for e in events
        if e["ph"] != "M"
        and (e["pid"] == pid or e["cat"] == "kick" or (e["cat"] == "control" and e["pid"] == 3))
    )
    arrows = arrows_of(data)
    wanted = {category: each * mine[category] for category, each in PER_EVENT.items()}
    # Chains that return behind those of another packet: an event of its own, a fault on demand.
    later = {i for i, e in enumerate(events) if e.get("cat") == "packet" and is_later(e)}
    wanted["packet"] -= sum(events[i]["pid"] == pid for i in later)
    assert len(arrows) + data["left"] == sum(wanted.values())
    for category, number in wanted.items():
        assert data["counts"][category] == {"events": mine[category], "arrows": number}
    for arrow in arrows:
        event = events[arrow["i"]]
        assert event["cat"] in PER_EVENT
        begin, end = event["ts"], event["ts"] + event.get("dur", 0)
        assert begin - 0.002 <= arrow["t"] <= end + 0.002
    if not data["left"]:
        drawn = Counter(arrow["i"] for arrow in arrows)
        assert all(
            count == PER_EVENT[events[i]["cat"]] - (i in later) for i, count in drawn.items()
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_arrow_has_an_event_and_every_event_its_arrows(name: str) -> None:
    (data,) = embedded(page([(name, diagram(name))]))
    check(raw(name), data)
    assert data["left"] == 0


@pytest.mark.parametrize("keep", [10, 60, 120])
def test_what_is_left_out_is_counted(keep: int) -> None:
    (data,) = embedded(page([("exit", diagram("exit"))], keep))
    check(raw("exit"), data)
    assert data["left"] > 0 and len(arrows_of(data)) <= 2 * keep + 24


def test_the_count_notices() -> None:
    """An arrow without an event, and an event without its arrow."""
    (data,) = embedded(page([("exit", diagram("exit"))]))
    document = raw("exit")
    check(document, data)
    kick = next(e for e in document["traceEvents"] if e.get("cat") == "kick")
    document["traceEvents"].append(kick)
    with pytest.raises(AssertionError):
        check(document, data)


def test_both_flows_are_there() -> None:
    arrows = diagram("exit").arrows
    labels = [arrow.label for arrow in arrows]
    steps = iter(labels)
    for wanted in (
        "read vendor id: 0x10411af4",
        "write BAR 0: 0xffffffff",
        "read notify-cfg notify_off_multiplier: 0x4",
        "write common driver_feature: VERSION_1",
        "write common queue_msix_vector: vector 0",
        "write common queue_enable: 1",
        "write common device_status: ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK",
        "start data path",
        "kick: write net0 queue 1 notify",
        "kick of queue 1 wakes the worker",
    ):
        assert any(label == wanted for label in steps), wanted
    sent = [arrow for arrow in arrows if arrow.packet == 1]
    assert [(a.src, a.dst) for a in sent] == [
        ("rings", "worker"),
        ("worker", "host"),
        ("worker", "rings"),
    ]
    assert "ARP who has 192.168.100.1?" in sent[1].label and sent[1].via == ("tap",)
    assert sent[0].ring is not None and sent[0].ring["size"] == 16
    clauses = {value for a in arrows for name, value, _ in a.details if name == "clause"}
    assert {"virtio 2.1, 3.1.1", "virtio 4.1.4.3", "PCI 6.8.2", "virtio 2.7.6"} <= clauses
    assert all(any(n == "clause" for n, _, _ in a.details) for a in arrows if a.kind == "kick")


def test_an_ioeventfd_makes_an_arrow_vanish() -> None:
    html = page([(name, diagram(name)) for name in NAMES])
    row = re.search(r"<tr[^>]*><th[^>]*>kick: exit to the VMM</th>.*?</tr>", html)
    assert row and 'class="gone"' in row[0] and "vanishes; saves " in row[0]
    assert len(embedded(html)) == 2


def textbook(**ways: str) -> Diagram:
    """The trace with exits, as if the card had other ways; with its MSI-X vectors or without."""
    document = raw("exit")
    document["otherData"]["nics"][0] |= ways
    one = take(document, "x")
    return Diagram(one, one.card(None))


def test_the_textbook_device_in_its_own_words() -> None:
    """No eventfd wakes anybody: the vCPU's thread sends, and an ioctl is the interrupt."""
    d = textbook(worker="vcpu", interrupt="ioctl")
    sent = [a for a in d.arrows if a.label == "kick of queue 1: the vCPU's thread sends"]
    assert sent and all((a.src, a.dst, a.group) == ("vmm", "worker", TAKEN) for a in sent)
    assert not any("queue 1 wakes" in a.label for a in d.arrows)
    received = next(a for a in d.arrows if a.label == "kick of queue 0 wakes the worker")
    assert received.group in WORK
    whys = {a.label: v for a in d.arrows for n, v, _ in a.details if n == "why"}
    assert "has sent the frames" in whys["kick: write net0 queue 1 notify"]
    assert "1 to the eventfd" in whys["kick: write net0 queue 0 notify"]
    calls = [a for a in d.arrows if a.kind == "irq"]
    assert calls and all(a.label.endswith(": KVM_SIGNAL_MSI") for a in calls)
    assert all(a.group == RAISED and (a.dst, a.via) == ("driver", ("kvm",)) for a in calls)
    text = " ".join(v for a in calls for _, v, _ in a.details)
    assert "eventfd" not in text and "IRQFD" not in text
    assert ("worker", "worker", SHARED) in d.lifelines
    html = page([("a", d), ("b", diagram("exit"))])
    assert "emulated, notify=exit, worker=vcpu, interrupt=ioctl" in html
    row = re.search(r"<tr[^>]*><th[^>]*>interrupt: the data path asks KVM.*?</tr>", html)
    assert row and "vanishes" in row[0]


def test_the_usual_device_has_an_eventfd() -> None:
    d = textbook(worker="thread", interrupt="irqfd")
    assert [(a.label, a.details) for a in d.arrows] == [
        (a.label, a.details) for a in diagram("exit").arrows
    ]
    assert any("call eventfd" in a.label for a in d.arrows)


@pytest.mark.parametrize(
    ("vector", "call"), [("none", "KVM_IRQ_LINE"), ("", "KVM_SIGNAL_MSI or KVM_IRQ_LINE")]
)
def test_which_ioctl(vector: str, call: str) -> None:
    """By the vectors that the driver has chosen; a trace may have lost them."""
    document = raw("exit")
    document["otherData"]["nics"][0]["interrupt"] = "ioctl"
    way = "write common queue_msix_vector: "
    for event in document["traceEvents"]:
        if event["name"].startswith(way):
            event["name"] = way + vector if vector else "write common other: 1"
    one = take(document, "x")
    calls = [a for a in Diagram(one, one.card(None)).arrows if a.kind == "irq"]
    assert calls and all(a.label.endswith(f": {call}") for a in calls)


def test_a_switch_says_who_sends_from_then_on() -> None:
    document = raw("exit")
    document["otherData"]["nics"][0]["worker"] = "vcpu"
    kicks = [e["ts"] for e in document["traceEvents"] if e["name"] == "kick of queue 1"]
    base = {"cat": "control", "ph": "X", "pid": 10, "tid": 3, "dur": 0.001}
    args = {"from": "emulated", "to": "emulated", "worker": "thread"}
    name = "hand-over: emulated to emulated"
    document["traceEvents"].append({**base, "name": name, "ts": kicks[1] + 1, "args": args})
    one = take(document, "x")
    labels = [a.label for a in Diagram(one, one.card(None)).arrows]
    assert labels.count("kick of queue 1: the vCPU's thread sends") == 2
    assert labels.count("kick of queue 1 wakes the worker") == len(kicks) - 2


def test_what_another_does_has_not_vanished() -> None:
    document = raw("ioeventfd")
    document["otherData"]["nics"][0]["paths"] = ["vhost-net"]
    document["traceEvents"] = [e for e in document["traceEvents"] if e.get("cat") != "packet"]
    one = take(document, "x")
    html = page([("a", diagram("ioeventfd")), ("b", Diagram(one, one.card(None)))])
    row = re.search(r"<tr[^>]*><th[^>]*>chain taken from the available ring</th>.*?</tr>", html)
    assert row and "not seen: vhost (a kernel thread) does it" in row[0] and "gone" not in row[0]


def test_a_data_path_elsewhere_has_no_packet_and_says_so() -> None:
    document = raw("ioeventfd")
    document["otherData"]["nics"][0]["paths"] = ["vhost-net"]
    document["traceEvents"] = [
        e
        for e in document["traceEvents"]
        if e.get("cat") not in ("packet", "kick", "batch", "interrupt")
    ]
    one = take(document, "x")
    d = Diagram(one, one.card(None))
    assert "vhost (a kernel thread)" in d.quiet() and d.packets() == {"sent": 0, "received": 0}
    assert "Note over" in mermaid(d) and "->>worker" not in mermaid(d)


def test_steps_go_to_the_data_path_that_they_belong_to() -> None:
    """A hand-over from emulation to vhost-net, with ioctls, messages and a vDPA device."""
    meta = {"name": "process_name", "ph": "M", "ts": 0, "pid": 10, "tid": 0}
    events = [{**meta, "args": {"name": "net0 (emulated, vhost-net, notify=ioeventfd)"}}]

    def step(at: int, name: str, dur: int = 1, **args: object) -> None:
        base = {"cat": "control", "ph": "X", "pid": 10, "tid": 2}
        events.append({**base, "name": name, "ts": at, "dur": dur, "args": args})

    step(1, "start data path", queue="256 entries, base 0")
    step(10, "hand-over: emulated to vhost-net", 90, to="vhost-net")
    step(11, "hand-over: park", 5, step="park")
    step(12, "stop data path", bases="[3]")
    step(20, "hand-over: start vhost-net", 40, step="start vhost-net")
    step(21, "VHOST_SET_VRING_NUM", index=0, num=256, device="vhost-net")
    step(22, "VHOST_SET_VRING_NUM", index=0, num=256, device="vhost-vdpa-0")
    step(23, "VHOST_IOTLB_UPDATE", iova=0)
    step(24, "send SET_VRING_NUM", index=0, num=256)
    step(25, "receive GET_FEATURES", features="MAC")
    step(30, "start data path")
    step(90, "hand-over: close", 5, step="close")
    nics = [{"name": "net0", "paths": ["emulated", "vhost-net", "vhost-vdpa"], "notify": "x"}]
    one = take({"traceEvents": events, "otherData": {"nics": nics}}, "x")
    d = Diagram(one, one.card("net0"))
    assert [(a.src, a.dst) for a in d.arrows] == [
        ("vmm", "worker"),
        ("vmm", "vmm"),
        ("vmm", "worker"),
        ("vmm", "worker"),
        ("vmm", "vhost"),
        ("vmm", "vhost"),
        ("vmm", "vdpa"),
        ("vmm", "vdpa"),
        ("vmm", "backend"),
        ("backend", "vmm"),
        ("vmm", "vhost"),
        ("vmm", "worker"),
    ]
    assert d.hand_overs == [(10.0, 100.0, "hand-over: emulated to vhost-net")]
    (data,) = embedded(page([("x", d)]))
    assert data["bands"] == [[10.0, 100.0]] and len(data["lifelines"]) == 10


# --- folds ----------------------------------------------------------------------------------------


def with_faults(document: dict[str, Any], *faults: dict[str, Any]) -> tuple[int, float]:
    """Have a worker do these things after all that it has done in a trace of one card.

    :param faults: the events' arguments. :returns: the card's process there, and the time of the
        last one.
    """
    pid, tid = next(
        (e["pid"], e["tid"]) for e in document["traceEvents"] if e.get("cat") == "packet"
    )
    last = max(e["ts"] for e in document["traceEvents"] if e["ph"] != "M")
    event = {"ph": "i", "s": "t", "cat": "fault", "name": "fault", "pid": pid, "tid": tid}
    document["traceEvents"] += [
        event | {"ts": last + n, "args": args} for n, args in enumerate(faults)
    ]
    return pid, last + len(faults)


#: A chain that comes back behind another one's, and a frame that is cut short.
REORDERED = {"deeds": ["reorder-used"], "queue": 0, "length": 72, "head": 5, "used_at": 258}
CUT = {"deeds": ["truncate"], "queue": 0, "length": 60}


def test_faults_on_demand_are_arrows_where_they_happened() -> None:
    """Between worker and tap, on the way of a kick or an interrupt; and what a card does once."""
    document = raw("ioeventfd")
    pid, last = with_faults(
        document,
        *(
            {"queue": queue, "deeds": deeds, "length": 60}
            for queue, deeds in (
                (1, ["loss"]),
                (0, ["delay", "corrupt"]),
                (0, ["hold-irq"]),
                (1, ["extra-irq"]),
                (1, ["hold-kick"]),
                (1, EVIL),
            )
        ),
        REORDERED,
        CUT,
    )
    once = {"ph": "i", "s": "t", "cat": "control", "name": "fault", "pid": pid, "tid": 1}
    document["traceEvents"].append(once | {"ts": last, "args": {"fault": "needs-reset"}})
    span = {"ph": "X", "cat": "control", "name": "faults by tc", "pid": pid, "tid": 5, "dur": 2e6}
    for way, counts in (
        ("rx", {"frames": 7, "loss": 4, "cleared": 2}),
        ("tx", {"frames": 1, "full": EVIL}),
    ):
        told = {"way": way, "rules": EVIL, **counts}
        document["traceEvents"].append(span | {"ts": last + 1, "args": told})
    one = take(document, "x")
    drawn = Diagram(one, one.card(None))
    faults = [a for a in drawn.arrows if a.kind == "fault"]
    assert [(a.src, a.dst, a.label) for a in faults] == [
        ("worker", "tap", "fault on demand: loss: frame to the host, 60 bytes"),
        ("tap", "worker", "fault on demand: delay, corrupt: frame to the guest, 60 bytes"),
        ("worker", "kvm", "fault on demand: hold-irq: interrupt for queue 0"),
        ("worker", "kvm", "fault on demand: extra-irq: interrupt for queue 1"),
        ("kvm", "worker", "fault on demand: hold-kick: kick of queue 1"),
        ("worker", "tap", "fault on demand: : frame to the host, 60 bytes"),
        (
            "worker",
            "rings",
            "fault on demand: reorder-used: return chain 5 at [2], queue 0",
        ),
        ("tap", "worker", "fault on demand: truncate: frame to the guest, 60 bytes"),
        ("vmm", "driver", "fault on demand: needs-reset"),
        (
            "host",
            "tap",
            "by tc, within 2 s: of 7 frames to the guest, 4 lost, 2 thrown away as they waited",
        ),
        ("tap", "host", "by tc, within 2 s: of 1 frame to the host, none lost"),
    ]
    assert ("why", "The frame is lost.", False) in faults[0].details
    (data,) = embedded(page([("x", drawn)]))
    check(document, data)
    text = mermaid(drawn, 10_000)
    for arrow in (
        "worker--xtap: fault on demand: loss",
        "worker--xrings: fault on demand: reorder-used: return chain 5",
        "tap--xworker: fault on demand: truncate: frame to the guest",
    ):
        assert arrow in text


def test_folds_add_up() -> None:
    arrows = diagram("ioeventfd").arrows
    rows = fold(arrows)
    flat = [a for row in rows for a in (row.arrows if isinstance(row, Fold | Gap) else [row])]
    assert flat == arrows
    folds = [row for row in rows if isinstance(row, Fold)]
    assert folds and all(row.times >= 3 for row in folds)
    for row in folds:
        assert len({a.key for a in row.arrows}) <= row.period
        assert [a.key for a in row.arrows] == [a.key for a in row.arrows[: row.period]] * row.times


def test_a_hundred_thousand_events_make_a_small_page() -> None:
    document = raw("exit")
    traffic = [e for e in document["traceEvents"] if e.get("tid") in (10, 100)]
    end = max(e["ts"] for e in traffic)
    begin = min(e["ts"] for e in traffic)
    many = [
        {**e, "ts": round(e["ts"] + i * (end - begin + 1), 3)}
        for i in range(1, 100_000 // len(traffic) + 1)
        for e in traffic
    ]
    document["traceEvents"] += many
    assert len(document["traceEvents"]) >= 100_000
    one = take(document, "x")
    d = Diagram(one, one.card(None))
    html = page([("x", d)])
    assert len(html) < 1_500_000
    (data,) = embedded(html)
    assert len(arrows_of(data)) + data["left"] == len(d.arrows) > 100_000
    assert "arrows left out" in data["subtitle"]
    assert left_out(fold(d.arrows)) == data["left"]


# --- hostile traces -------------------------------------------------------------------------------


def poisoned(value: object) -> object:
    """A trace whose every text says more than it should."""
    if isinstance(value, str):
        return value + EVIL
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("ph", "cat") else poisoned(item) for key, item in value.items()
        }
    return value


def test_no_text_of_a_trace_is_markup() -> None:
    document = poisoned(raw("exit"))
    assert isinstance(document, dict)
    for event in document["traceEvents"]:
        if event["pid"] == 10 and event["name"].startswith("process_name"):
            event["name"] = "process_name"
            event["args"]["name"] = "net0" + EVIL
    one = take(document, "evil" + EVIL)
    d = Diagram(one, one.card(None))
    html = page([("evil" + EVIL, d)])
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "<img" not in html and "\u202e" not in html
    (data,) = embedded(html)
    assert any("<img" in a["l"] for a in arrows_of(data)), "the text is there, as text"
    text = mermaid(d)
    assert not re.search(r"[<>;\"`&](?<!#\d\d;)", re.sub(r"#\d+;|-?->>", "", text))


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "null",
        '{"traceEvents": []}',
        '{"traceEvents": {}, "otherData": {"nics": []}}',
        "[" * 100_000,
        "\x00\xff",
    ],
    ids=range(7),
)
def test_no_trace(tmp_path: Path, document: str) -> None:
    path = tmp_path / "bad"
    path.write_text(document)
    with pytest.raises(UsageError, match="no trace of pyvmm's"):
        load(str(path))


def test_malformed_events_are_counted() -> None:
    document = raw("exit")
    good = len(trace("exit").events)
    nan, huge = float("nan"), 1e300
    event = {"name": "x", "ph": "X", "cat": "exit", "ts": 1, "dur": 1, "pid": 10, "tid": 1}
    bad: list[object] = [
        1,
        None,
        {},
        *({**event, "ts": ts} for ts in (nan, huge, -1, "1", None, True, [1])),
        {**event, "name": 3},
        {**event, "args": []},
        {**event, "pid": "x"},
        {**event, "ph": "Z"},
    ]
    document["traceEvents"] += bad
    one = take(document, "x")
    assert one.malformed == len(bad) and len(one.events) == good
    (data,) = embedded(page([("x", Diagram(one, one.card(None)))]))
    assert f"{len(bad)} malformed events left out" in data["subtitle"]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name}, which no browser reads")


def test_numbers_that_are_none() -> None:
    """Python reads and writes NaN and Infinity as JSON, and no browser does."""
    document = raw("ioeventfd")
    values = (float("nan"), float("inf"), -float("inf"), "nan", 1.5, 7)
    batches = [e for e in document["traceEvents"] if e.get("cat") == "batch"]
    assert len(batches) >= len(values)
    for event, value in zip(batches, values, strict=False):
        event["args"] = dict.fromkeys(event["args"], value) | {"used_event": value}
    one = take(json.loads(json.dumps(document)), "x")
    html = page([("x", Diagram(one, one.card(None)))])
    found = re.search(r'id="data">(.*?)</script>', html, re.S)
    assert found
    json.loads(found[1], parse_constant=no_constant)
    rings = [a["r"] for a in arrows_of(embedded(html)[0]) if a["k"] == "publish"]
    assert {ring["used_event"] for ring in rings} <= {None, 0, 7}


def test_the_page_has_no_number_that_is_none() -> None:
    with pytest.raises(UsageError, match="what no page can have"):
        _script_safe({"x": float("nan")})


@pytest.mark.parametrize("value", [1 << 80, -1, "x", None, [], {}, 1.5, True, "9" * 5000])
def test_arguments_of_any_type(value: object) -> None:
    document = raw("exit")
    for event in document["traceEvents"]:
        if event["ph"] != "M":
            event["args"] = dict.fromkeys(event.get("args", {}), value)
    one = take(document, "x")
    html = page([("x", Diagram(one, one.card(None)))])
    check(document, embedded(html)[0])
    assert len(html) < 1_000_000


def test_text_has_only_characters_that_print() -> None:
    assert clean("a\u202eb\x00\n") == "a\\u202eb\\u0000\\u000a"
    assert clean("äµ") == "äµ" and len(clean("x" * 5000)) == 400


# --- words ----------------------------------------------------------------------------------------


def frame(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "frame"),
        ("00" * 12 + "ff" * 6 + "02" * 6 + "88cc", "Ethernet type 0x88cc frame"),
        ("00" * 12 + "ff" * 6 + "02" * 6 + "0800", "IPv4 frame"),
        (
            "00" * 12
            + "ff" * 6
            + "02" * 6
            + "0800 45000054 00004000 40010000 c0a86402 c0a86401 0800 0000 0007 0003",
            "ICMP echo request 3 192.168.100.2 to 192.168.100.1",
        ),
        (
            "00" * 12
            + "ff" * 6
            + "02" * 6
            + "0800 4500003c 00004000 40060000 c0a86402 c0a86401 9c40 1451"
            + "00000000 00000000 a012",
            "TCP SYN ACK 192.168.100.2 to 192.168.100.1",
        ),
    ],
)
def test_frames_in_words(data: str, said: str) -> None:
    whole = frame(data)
    assert frames.explain(whole, 12)[0] == said
    for cut in range(len(whole)):
        frames.explain(whole[:cut], 12)
        frames.explain(whole[:cut], 0)


def test_registers_have_clauses() -> None:
    for name in ("vendor id", "BAR 3", "MSI-X table offset", "common queue_desc low", "config mac"):
        meaning = words.register(name)
        assert meaning.clause and meaning.text and meaning.topic != words.OTHER, name
    assert words.register("something else").clause == ""


# --- the command ----------------------------------------------------------------------------------


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["trace", "explain", *argv])
    out = capfd.readouterr()
    return status, out.out, out.err


def test_the_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    one.write_bytes((TRACES / "exit.json").read_bytes())
    status, out, err = run(capfd, str(one))
    assert (status, out) == (0, "") and err.startswith(f"pyvmm: {tmp_path}/one.html: ")
    assert "<!doctype html>" in (tmp_path / "one.html").read_text()
    status, out, err = run(capfd, str(one), "--text")
    assert (status, err) == (0, "") and out.startswith("sequenceDiagram\n")
    both = str(tmp_path / "two.html")
    status, out, err = run(capfd, str(one), str(TRACES / "ioeventfd.json"), "-o", both)
    assert status == 0 and "Which arrows vanish" in Path(both).read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("/nonexistent/t",), "cannot read /nonexistent/t: No such file"),
        (("/dev/null",), "/dev/null: no file"),
        (("{}", "{}", "{}"), "3 traces; give one, or two"),
        (("{}", "{}", "--text"), "--text with two traces"),
        (("{}", "--card", "net7"), "--card net7: no such card; the trace has net0"),
        (("{}", "-o", "{}"), "is the trace itself"),
        (("{}", "-o", "/nonexistent/page"), "--output /nonexistent/page: No such file"),
        (("{}", "--arrows", "3"), "--arrows 3; use 10 to 100000"),
    ],
)
def test_bad_use(capfd: pytest.CaptureFixture[str], argv: tuple[str, ...], said: str) -> None:
    path = str(TRACES / "exit.json")
    status, out, err = run(capfd, *(a.replace("{}", path) for a in argv))
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert (TRACES / "exit.json").stat().st_size > 1000


def test_a_full_disk(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capfd, str(TRACES / "exit.json"), "-o", "/dev/full")
    assert status == 101 and err == "pyvmm: --output /dev/full is lost: No space left on device\n"
