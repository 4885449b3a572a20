"""`pyvmm compare` without a guest: what is asked for, figures and noise, schema, rendering, and a
run with what can go wrong.
"""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import cli, helper
from pyvmm import sandbox as sandbox_of
from pyvmm.cli.support.signals import Terminated
from pyvmm.compare import boot, counters, facts, html, plan, schema, stats, svg
from pyvmm.compare.pinning import pinned, possible
from pyvmm.compare.run import Comparison
from pyvmm.errors import (
    GuestTimeout,
    HostError,
    ImageError,
    KvmMissing,
    NetForbidden,
    PyvmmError,
    SandboxError,
    ThreadStopped,
    UsageError,
    VhostMissing,
)
from pyvmm.threads import Thread
from tests.driver import wait_for

if TYPE_CHECKING:
    from pyvmm.exits.ledger import Ledger

RECORD = Path(__file__).resolve().parents[1] / "data" / "compare.json"


@pytest.fixture
def record() -> dict[str, Any]:
    """Results of a real run in the testbed."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


# --- what is asked for ----------------------------------------------------------------------------


def test_defaults() -> None:
    p = plan.Plan()
    assert [m.name for m in p.modes] == [
        "emulated:notify=exit",
        "emulated",
        "vhost-net",
        "vhost-user",
    ]
    assert p.modes[0].net == "emulated,notify=exit"
    assert [m.vhost for m in p.modes] == [False, False, True, False]
    assert p.workloads == list(plan.DEFAULT_WORKLOADS) and p.repeat == 3
    assert p.servers() == ["tcp-tx", "tcp-rx", "udp-small"] and p.port("udp-small") == "5203"


def test_peers_are_columns() -> None:
    p = plan.Plan(modes="vhost-user:queues=2", peers="kvmtool,qemu")
    assert [(m.name, m.kind, m.vhost) for m in p.modes] == [
        ("vhost-user:queues=2", "pyvmm", False),
        ("kvmtool", "kvmtool", False),
        ("qemu", "qemu", False),
        ("qemu:vhost", "qemu", True),
    ]
    assert p.modes[0].net == "vhost-user,queues=2"


@pytest.mark.parametrize(
    "options",
    [
        {"modes": "bridge"},
        {"modes": "none"},
        {"modes": ""},
        {"modes": "emulated,emulated"},
        {"modes": "emulated:tap=tap0"},
        {"modes": "vhost-user:socket=/tmp/s"},
        {"modes": "emulated:notify=maybe"},
        {"modes": "vhost-user:worker-cpu=5"},
        {"peers": "xen"},
        {"peers": "qemu,qemu"},
        {"workloads": "ping,sleep"},
        {"workloads": ""},
        {"repeat": 0},
        {"repeat": 1001},
        {"seconds": 0.1},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[Any, Any]) -> None:
    with pytest.raises(UsageError):
        plan.Plan(**options)


# --- figures and noise ----------------------------------------------------------------------------


def test_spread() -> None:
    assert stats.spread([3, 1, 2]) == {"n": 3, "median": 2, "min": 1, "max": 3}


numbers = st.lists(st.integers(0, 1000), min_size=2, max_size=6)


@settings(deadline=None)
@given(numbers, numbers)
def test_noise_is_when_the_ranges_overlap(a: list[int], b: list[int]) -> None:
    overlap = set(range(min(a), max(a) + 1)) & set(range(min(b), max(b) + 1))
    for one, other in ((a, b), (b, a)):
        verdict = stats.verdict(stats.spread(one), stats.spread(other))
        assert verdict == (stats.NOISE if overlap else stats.DIFFERS)


@settings(deadline=None)
@given(st.integers(0, 9), numbers)
def test_one_repeat_says_nothing(a: int, b: list[int]) -> None:
    assert stats.verdict(stats.spread([a]), stats.spread(b)) == stats.UNKNOWN
    assert stats.verdict(stats.spread(b), stats.spread([a])) == stats.UNKNOWN


def test_summary_takes_what_went_well(record: dict[str, Any]) -> None:
    record = copy.deepcopy(record)
    first = record["modes"][0]["name"]
    runs = [r for r in record["runs"] if r["mode"] == first]
    more = copy.deepcopy(runs[0])
    more["workloads"][0]["rtt_ms"] = 1000.0
    record["runs"].append(more)
    entry = stats.Figures({"summary": stats.summarise(record)}).get("ping", first, "rtt_ms")
    assert entry is not None
    assert entry["n"] == len(runs) + 1 and entry["max"] == 1000 and entry["verdict"] is None
    more["workloads"][0]["error"] = "failed"
    entry = stats.Figures({"summary": stats.summarise(record)}).get("ping", first, "rtt_ms")
    assert entry is not None
    assert entry["n"] == len(runs) and entry["max"] < 1000


def test_ratios_are_to_the_first_mode(record: dict[str, Any]) -> None:
    figures = stats.Figures({"summary": stats.summarise(record)})
    modes = [m["name"] for m in record["modes"] if not m["problem"]]
    a, b = (figures.get("ping", name, "kvm.exits") for name in modes[:2])
    assert a is not None and b is not None
    assert a["ratio"] is None and b["ratio"] == pytest.approx(b["median"] / a["median"], rel=1e-3)


def test_numbers_for_people() -> None:
    shown = [stats.number(v) for v in (0, 0.0, 7, 1234567, 0.123456, 12.345, 999.6)]
    assert shown == ["0", "0", "7", "1,234,567", "0.123", "12.3", "1,000"]
    assert stats.cell(None) == "-" and stats.cell(stats.spread([4])) == "4"
    assert stats.cell(stats.spread([1, 5, 2])) == "2 (1..5)"


def test_causes_add_up() -> None:
    lines = [
        SimpleNamespace(reason=reason, role=role, count=2**i, what=f"line {i}")
        for i, (reason, role) in enumerate(
            [
                ("mmio", "notify"),
                ("mmio", "notify"),
                ("mmio", "control"),
                ("io", ""),
                ("hlt", ""),
                ("irq_window_open", ""),
                ("intr", ""),
                ("internal_error", ""),
            ]
        )
    ]
    got = counters.causes(cast("Ledger", SimpleNamespace(lines=lines)))
    assert got == {
        "notify": 3,
        "mmio": 4,
        "pio": 8,
        "halt": 16,
        "irq_window": 32,
        "signal": 64,
        "other": 128,
    }
    assert sum(got.values()) == sum(line.count for line in lines)


def test_figures_are_differences() -> None:
    def at(
        causes: dict[str, int], kvm: dict[str, int], packets: tuple[int, int]
    ) -> dict[str, dict[Any, Any] | dict[str, int]]:
        return {
            "causes": causes,
            "reasons": {},
            "lines": {"a": sum(causes.values()), "b": 3},
            "kvm": kvm,
            "packets": dict(zip(("packets_to_guest", "packets_from_guest"), packets, strict=True)),
            "queues": {},
        }

    got = boot.figures(
        at({"notify": 5, "pio": 1}, {"exits": 100, "irq_injections": 7}, (10, 20)),
        at({"notify": 9, "pio": 1}, {"exits": 150, "irq_injections": 8, "new": 2}, (110, 120)),
        2.0,
    )
    assert (got["user_exits"], got["causes"]) == (4, {"notify": 4, "pio": 0})
    assert got["kvm"] == {"exits": 50, "irq_injections": 1, "new": 2} and got["interrupts"] == 1
    assert got["per_kpacket"] == {"user_exits": 20.0, "kvm_exits": 250.0, "interrupts": 5.0}
    assert got["lines"] == {"a": 4}
    unknown = boot.figures(at({}, {}, (0, 0)), at({}, {}, (0, 0)), 1.0)
    assert unknown["user_exits"] is None and set(unknown["per_kpacket"].values()) == {None}


PING = """PING 192.168.100.2 (192.168.100.2) 56(84) bytes of data.

--- 192.168.100.2 ping statistics ---
20 packets transmitted, 19 received, 5% packet loss, time 981ms
rtt min/avg/max/mdev = 2.556/6.157/14.104/4.225 ms
"""


def test_results_of_the_tools() -> None:
    assert boot.read_result("ping", PING) == {"rtt_ms": 6.157, "loss_percent": 5.0}
    tcp = {"end": {"sum_received": {"bits_per_second": 5e8}}}
    assert boot.read_result("tcp-tx", json.dumps(tcp)) == {"throughput_mbit_s": 500.0}
    udp = {"end": {"sum": {"bits_per_second": 512000, "lost_percent": 50}}}
    assert boot.read_result("udp-small", json.dumps(udp)) == {
        "throughput_mbit_s": 0.256,
        "loss_percent": 50,
    }
    assert boot.read_result("idle", "") == {}


@pytest.mark.parametrize("text", ["", "null", "[]", '{"end": 3}', '{"error": "busy"}', "\ufffd\0"])
@pytest.mark.parametrize("workload", ["ping", "tcp-rx", "udp-small"])
def test_nonsense_of_the_tools_is_an_error(workload: str, text: str) -> None:
    with pytest.raises(HostError, match=workload):
        boot.read_result(workload, text)


def test_names_of_the_processors_reasons() -> None:
    text = (
        'print fmt: "x", (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, '
        '{ 0, "EXCEPTION_NMI" }, { 12, "HLT" }) : '
        '__print_symbolic(REC->exit_reason, { 0x040 + 14, "PF excp" }, { 0x078, "hlt" }, '
        '{ -1, "invalid_guest_state" }), ""'
    )
    assert counters.reason_names(text, intel=True) == {0: "exception_nmi", 12: "hlt"}
    assert counters.reason_names(text, intel=False) == {0x4E: "pf excp", 0x78: "hlt"}


def test_traced_reasons_make_finer_parts(record: dict[str, Any]) -> None:
    workload = copy.deepcopy(record["runs"][0]["workloads"][0])
    workload["kvm"]["exits"] = 100
    workload["causes"] = {**dict.fromkeys(counters.CAUSES, 0), "notify": 10}
    workload["reasons"] = {"npf": 40, "msr": 20, "hlt": 15, "cpuid": 5, "interrupt": 20}
    parts = {part: count for part, count in html.split(workload).items() if count}
    assert parts == {
        "u-notify": 10,
        "k-memory": 30,
        "k-msr": 20,
        "k-halt": 15,
        "k-host": 20,
        "k-rest": 5,
    }


# --- the schema -----------------------------------------------------------------------------------


def test_the_record_is_valid(record: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.schema())
    jsonschema.validate(record, schema.schema())
    assert schema.check(record) == ""
    for one in record["runs"]:
        for workload in one["workloads"]:
            if workload["causes"] is not None:
                assert sum(workload["causes"].values()) == workload["user_exits"]
    assert record["summary"] == stats.summarise(record)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, down to a few items a list."""
    yield at
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*at, name))
    elif isinstance(value, list):
        for index in range(min(len(value), 2)):
            yield from places(value[index], (*at, index))


PLACES = list(places(json.loads(RECORD.read_text())))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.pop("runs"), "document: 'runs' is a required property"),
        (lambda d: d.update(schema="no"), "document.schema: 'pyvmm-compare/1' was expected"),
        (
            lambda d: d["runs"][1]["workloads"][0].update(seconds="a\nb"),
            "document.runs[1].workloads[0].seconds: 'a\\nb' is not of type 'number', 'null'",
        ),
        (
            lambda d: d["runs"][0]["workloads"][0].update(lines={"a\nb": "x"}),
            "document.runs[0].workloads[0].lines['a\\nb']: 'x' is not of type 'integer'",
        ),
    ],
)
def test_what_the_check_says(
    record: dict[str, Any], change: Callable[..., Any], problem: str
) -> None:
    change(record)
    assert schema.check(record) == problem
    record["created"] = [["much"] * 1000]
    assert schema.check(record) != "" and len(schema.check(record)) < 250


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(PLACES), st.sampled_from([None, "text", -1, 1.5, [], {}, True, "gone"]))
def test_the_check_names_the_place_in_one_line(place: tuple[Any, ...], value: Any) -> None:
    document = json.loads(RECORD.read_text())
    if not place:
        document = value
    else:
        inner = document
        for step in place[:-1]:
            inner = inner[step]
        if value == "gone":
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
    problem = schema.check(document)
    if problem:
        assert "\n" not in problem and len(problem) < 250
        # What stands there is wrong, or what it is part of lacks it.
        at = f"document{schema.path(place)}"
        named = problem.partition(": ")[0]
        assert at == named or (value == "gone" and at.startswith(named))
    else:  # then it can be shown, whoever has written it
        html.page(document)
        ET.fromstring(html.figure(document))


# --- rendering ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(0, 1e9, allow_nan=False))
def test_ticks_cover(top: float) -> None:
    steps = svg.ticks(top)
    assert steps[0] == 0 and steps[-1] >= top * 0.999 and 2 <= len(steps) <= 12
    assert steps == sorted(set(steps))


def test_the_page_needs_nothing_else(record: dict[str, Any]) -> None:
    page = html.page(record)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    for mode in record["modes"]:
        assert page.count(mode["name"]) > 5
    for workload in record["settings"]["workloads"]:
        assert f"<h3>{workload['name']}</h3>" in page


def test_the_figure_is_xml(record: dict[str, Any]) -> None:
    root = ET.fromstring(html.figure(record))
    texts = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("exits per 1,000 packets" in t for t in texts) and "cannot run here" in texts


def test_names_are_text_not_markup(record: dict[str, Any]) -> None:
    record = copy.deepcopy(record)
    evil = "<script>alert(1)</script>&\"'"
    old = record["modes"][0]["name"]
    text = json.dumps(record).replace(json.dumps(old), json.dumps(evil))
    document = json.loads(text)
    document["modes"][0]["problem"] = evil
    page, figure = html.page(document), html.figure(document)
    assert "<script" not in page and "<script" not in figure
    ET.fromstring(figure)


def test_parts_add_up_to_kvms_exits(record: dict[str, Any]) -> None:
    for one in record["runs"]:
        for workload in one["workloads"]:
            parts = html.split(workload)
            assert min(parts.values()) >= 0
            assert sum(parts.values()) == max(workload["kvm"]["exits"], workload["user_exits"] or 0)


def test_even_nothing_can_be_shown(record: dict[str, Any]) -> None:
    empty = {**record, "runs": [], "summary": [], "partial": True}
    assert "Partial results" in html.page(empty)
    ET.fromstring(html.figure(empty))
    assert any("PARTIAL" in line for line in stats.remarks(empty))


# --- the command ----------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of ``pyvmm compare ARGV``."""
    status = cli.main(["compare", *argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_from_shows_it_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, record: dict[str, Any]
) -> None:
    files = {o: tmp_path / f"out.{o}" for o in ("json", "html", "svg")}
    options = [word for o, path in files.items() for word in (f"--{o}", str(path))]
    status, out, err = command(capsys, "--from", str(RECORD), *options)
    assert status == 1, "a mode could not run"
    assert err == ""
    assert "kvmtool cannot run here" in out and "to userspace: notify" in out
    assert max(map(len, out.splitlines())) < 200
    assert json.loads(files["json"].read_text()) == record
    assert (
        files["html"].read_text().startswith("<!doctype html>")
        and "<svg" in files["svg"].read_text()
    )


def test_json_to_stdout(capfd: pytest.CaptureFixture[str], record: dict[str, Any]) -> None:
    _, out, _ = command(capfd, "--from", str(RECORD), "--json", "-")
    assert json.loads(out) == record


def test_full_shows_more(capsys: pytest.CaptureFixture[str]) -> None:
    short = command(capsys, "--from", str(RECORD))[1]
    full = command(capsys, "--from", str(RECORD), "--full")[1]
    assert "KVM: host interrupts" in full and "KVM: host interrupts" not in short


@pytest.mark.parametrize(
    "argv",
    [
        ["--from", "/nonexistent"],
        ["--from", "/etc/passwd"],
        ["--from", "/"],
        ["--modes", "bridge"],
        ["--repeat", "0"],
        ["--cpus", "0"],
        ["--memory", "lots"],
        ["--json", "/nonexistent/x", "--from", str(RECORD)],
        ["--html", "/", "--from", str(RECORD)],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = command(capsys, *argv)
    assert (status, out) == (2, "") and err.startswith("pyvmm: ") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, "\n" * 9, '{"a\\nb": 1}', "NaN"])
def test_files_that_are_no_results_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    status, out, err = command(capsys, "--from", str(path))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"pyvmm: {path}: ") and "compare --json has written" in err


def test_no_empty_files_are_left(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("{}")
    argv = ["--from", "/nonexistent", "--json", str(old), "--html", str(tmp_path / "new.html")]
    assert command(capsys, *argv)[0] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"] and old.read_text() == "{}"


# --- a run, with what can go wrong ----------------------------------------------------------------


class Log:
    """What guests do, in whatever process: (mode, step)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, mode: str, what: str) -> None:
        with self._path.open("a") as f:
            f.write(f"{mode} {what}\n")

    @property
    def steps(self) -> list[tuple[str, ...]]:
        return [tuple(line.split()) for line in self._path.read_text().splitlines()]


class FakeGuest:
    """A guest that counts, and does what ``script`` says at each step (mode, what)."""

    space = None
    sandbox = "on"

    def __init__(self, script: Callable[..., Any], mode: str) -> None:
        self._script, self._mode, self._n = script, mode, 0
        self._do("make")

    def _do(self, what: str) -> None:
        self._script(self._mode, what)

    def __enter__(self) -> FakeGuest:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._do("close")

    def boot(self) -> float:
        self._do("boot")
        return 1.0

    def check(self) -> None:
        self._do("check")

    def counts(self) -> dict[str, dict[Any, Any] | dict[str, int]]:
        self._n += 1
        packets = dict.fromkeys(
            (
                "packets_to_guest",
                "packets_from_guest",
                "bytes_to_guest",
                "bytes_from_guest",
                "drops",
            ),
            self._n,
        )
        return {
            "causes": {"notify": self._n},
            "reasons": {},
            "lines": {},
            "kvm": {"exits": 2 * self._n},
            "packets": packets,
            "queues": {},
        }

    def quick(self) -> tuple[int, int]:
        return 0, 0

    def tasks(self) -> dict[tuple[str, int], tuple[int, int, int]]:
        return {("vcpu", threading.get_native_id()): (self._n * 10**9, self._n, 0)}

    def facts(self) -> dict[str, list[str] | str]:
        return {"version": "x", "offered": ["A", "B"], "negotiated": ["A"]}


def quiet(mode: str, what: str) -> None:
    """A guest that just works."""


def ping(self: boot.Boot, guest: FakeGuest, words: list[str]) -> str:
    """In the place of a tool."""
    return PING


Comparing = Callable[..., tuple[Comparison, Log, list[str]]]


@pytest.fixture
def compare_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Comparing]:
    """Makes a run whose guests are fakes: (comparison, log of their steps, progress)."""
    with ExitStack() as stack:

        def make(
            script: Callable[..., Any] = quiet,
            *,
            use: Callable[..., str] = ping,
            progress: Callable[[str], None] | None = None,
            **options: Any,
        ) -> tuple[Comparison, Log, list[str]]:
            log = Log(tmp_path / "log")

            def step(mode: str, what: str) -> None:
                log.add(mode, what)
                script(mode, what)

            def fake(p: plan.Plan, mode: plan.Mode, trace: None, sandbox: str) -> FakeGuest:
                return FakeGuest(step, mode.name)

            # Before the comparison, whose process for jobs has what is here by then.
            monkeypatch.setattr(boot, "open_guest", fake)
            monkeypatch.setattr(boot, "SETTLE", 0)
            monkeypatch.setattr(boot.Boot, "_use", use)
            options = {
                "workloads": "ping,idle",
                "seconds": 0.2,
                "repeat": 2,
                "modes": "emulated,vhost-net",
                **options,
            }
            said: list[str] = []
            made = Comparison(plan.Plan(**options), progress or said.append)
            return stack.enter_context(made), log, said

        yield make


def test_modes_take_turns(compare_with: Comparing) -> None:
    comparison, log, _ = compare_with()
    comparison.run()
    document = comparison.document()
    assert [m for m, what in log.steps if what == "boot"] == ["emulated", "vhost-net"] * 2
    assert log.steps[-1][1] == "close" and not document["partial"]
    assert schema.check(document) == "" and cli_complete(document)
    entry = stats.Figures(document).get("ping", "vhost-net", "user_exits")
    assert entry is not None
    assert (entry["n"], entry["median"], entry["verdict"]) == (2, 1, stats.NOISE)
    assert document["modes"][0]["negotiated"] == ["A"]
    assert [one["sandbox"] for one in document["runs"]] == ["on"] * 4


def cli_complete(document: dict[Any, Any]) -> bool:
    from pyvmm.cli.compare import complete

    return complete(document)


def test_each_boot_has_a_process(compare_with: Comparing, tmp_path: Path) -> None:
    def script(mode: str, what: str) -> None:
        if what == "make":
            (tmp_path / f"{os.getpid()}.pid").write_text(mode)

    comparison, _, _ = compare_with(script)
    comparison.run()
    modes = sorted(path.read_text() for path in tmp_path.glob("*.pid"))
    assert modes == ["emulated", "emulated", "vhost-net", "vhost-net"]
    assert not (tmp_path / f"{os.getpid()}.pid").exists()


def test_other_programs_are_started_from_here(compare_with: Comparing, tmp_path: Path) -> None:
    def script(mode: str, what: str) -> None:
        if what == "make":
            (tmp_path / mode).write_text(str(os.getpid()))

    comparison, _, _ = compare_with(script, modes="emulated", peers="kvmtool", repeat=1)
    comparison.run()
    assert (tmp_path / "kvmtool").read_text() == str(os.getpid())
    assert (tmp_path / "emulated").read_text() != str(os.getpid())


def test_progress_comes_while_the_guest_runs(compare_with: Comparing, tmp_path: Path) -> None:
    """The guest ends after its last workload's line only."""
    seen = tmp_path / "seen"

    def script(mode: str, what: str) -> None:
        if what == "close":
            assert wait_for(seen.exists)

    def progress(line: str) -> None:
        if line.startswith("  idle: "):
            seen.touch()

    comparison, _, _ = compare_with(script, progress=progress, modes="emulated", repeat=1)
    comparison.run()
    assert cli_complete(comparison.document())


def test_what_a_mode_lacks_is_said_once(compare_with: Comparing) -> None:
    def script(mode: str, what: str) -> None:
        if mode == "vhost-net" and what == "make":
            raise VhostMissing("cannot open /dev/vhost-net", "modprobe vhost_net")

    comparison, log, said = compare_with(script)
    comparison.run()
    document = comparison.document()
    assert log.steps.count(("vhost-net", "make")) == 1
    assert log.steps.count(("emulated", "boot")) == 2
    assert document["modes"][1]["problem"] == "cannot open /dev/vhost-net; modprobe vhost_net"
    assert not document["partial"] and not cli_complete(document) and schema.check(document) == ""
    assert any("vhost-net cannot run here: cannot open" in line for line in stats.remarks(document))
    assert any("cannot open" in line for line in said)


def test_what_breaks_a_mode_later_is_said_once(compare_with: Comparing) -> None:
    def script(mode: str, what: str) -> None:
        if (mode, what) == ("vhost-net", "boot"):
            raise NetForbidden("no bridge", "ask for one")

    comparison, log, _ = compare_with(script)
    comparison.run()
    document = comparison.document()
    assert log.steps.count(("vhost-net", "boot")) == 1
    assert document["modes"][1]["problem"] == "no bridge; ask for one"
    assert [r["error"] for r in document["runs"]] == [None, "no bridge; ask for one", None]


@pytest.mark.parametrize(
    "error", [GuestTimeout("the guest was not ready"), OSError(24, "the guest was not")]
)
def test_a_failed_boot_is_no_reason_to_stop(
    compare_with: Comparing, tmp_path: Path, error: Any
) -> None:
    log = Log(tmp_path / "log")

    def script(mode: str, what: str) -> None:
        if (mode, what) == ("emulated", "boot") and log.steps.count((mode, what)) == 1:
            raise error

    comparison, _, _ = compare_with(script)
    comparison.run()
    document = comparison.document()
    assert [r["error"] is None for r in document["runs"]] == [False, True, True, True]
    assert log.steps.count(("emulated", "close")) == 2
    assert document["modes"][0]["problem"] is None
    assert not cli_complete(document) and schema.check(document) == ""
    assert any(
        line.startswith("emulated, repeat 1 failed:") and "the guest was not" in line
        for line in stats.remarks(document)
    )


def test_a_guest_that_ends_early_is_an_error(compare_with: Comparing) -> None:
    def script(mode: str, what: str) -> None:
        if (mode, what) == ("emulated", "check"):
            raise ThreadStopped("a thread asked for execve()")

    comparison, _, _ = compare_with(script, repeat=1)
    comparison.run()
    first, second = comparison.document()["runs"]
    assert first["error"] == "a thread asked for execve()" and len(first["workloads"]) == 2
    assert second["error"] is None


@pytest.mark.parametrize(
    "error",
    [KvmMissing("no /dev/kvm", "x"), ImageError("no image"), SandboxError("no", "--sandbox off")],
    ids=str,
)
def test_what_all_lack_ends_it(compare_with: Comparing, error: PyvmmError) -> None:
    def script(mode: str, what: str) -> None:
        if what == "make":
            raise error

    comparison, log, _ = compare_with(script)
    with pytest.raises(type(error), match=re.escape(str(error))):
        comparison.run()
    assert log.steps == [("emulated", "make")]


def test_broken_off_is_partial(compare_with: Comparing) -> None:
    """In the middle of a boot, whose workloads up to then are kept; and the guest is gone."""
    lines = []

    def progress(line: str) -> None:
        lines.append(line)
        if "vhost-net" in lines[-2:][0] and line.startswith("  ping: "):
            raise Terminated(2)

    def script(mode: str, what: str) -> None:
        if (mode, what) == ("vhost-net", "check"):
            signal.pause()

    comparison, log, _ = compare_with(script, progress=progress)
    with pytest.raises(Terminated):
        comparison.run()
    document = comparison.document()
    assert document["partial"] and schema.check(document) == ""
    assert [len(r["workloads"]) for r in document["runs"]] == [2, 1]
    assert "PARTIAL: broken off" in stats.remarks(document)[0]
    assert "Partial results" in html.page(document)
    comparison.close()
    assert ("vhost-net", "close") not in log.steps


def test_a_failed_workload_counts_for_nothing(compare_with: Comparing) -> None:
    def fail(self: boot.Boot, guest: FakeGuest, words: list[str]) -> str:
        raise HostError("ping failed: no route")

    comparison, _, said = compare_with(use=fail)
    comparison.run()
    document = comparison.document()
    assert {w["error"] for r in document["runs"] for w in r["workloads"]} == {
        "ping failed: no route",
        None,
    }
    assert said[1] == "  warming up: ping failed: no route"
    assert stats.Figures(document).get("ping", "emulated", "user_exits") is None
    assert not cli_complete(document) and schema.check(document) == ""


def test_the_helper_is_where_the_tools_are(
    monkeypatch: pytest.MonkeyPatch, compare_with: Comparing, tmp_path: Path
) -> None:
    """It forks them, so it has no CPU of a vCPU's; nor has this process, which checks figures."""
    if not possible(1):
        pytest.skip("one CPU")
    allowed = os.sched_getaffinity(0)
    child = subprocess.Popen(["sleep", "1000"])

    def look(self: boot.Boot, guest: FakeGuest, words: list[str]) -> str:
        (tmp_path / "cpus").write_text(str(sorted(os.sched_getaffinity(child.pid))))
        return PING

    seen = []
    try:
        monkeypatch.setattr(helper, "current", lambda: SimpleNamespace(pid=child.pid))
        comparison, _, _ = compare_with(
            use=look,
            progress=lambda line: seen.append(os.sched_getaffinity(0)),
            modes="emulated",
            repeat=1,
        )
        comparison.run()
    finally:
        child.kill()
        child.wait()
    rest = allowed - {min(allowed)}
    assert (tmp_path / "cpus").read_text() == str(sorted(rest))
    assert seen == [allowed, rest, rest] and os.sched_getaffinity(0) == allowed


def test_sandbox_on_that_is_impossible(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_of, "_why_no_files", lambda: "no Landlock")
    status, out, err = command(capsys, "--host", "local", "--kernel", "k", "--sandbox", "on")
    line = "pyvmm: --sandbox on: no Landlock; use --sandbox auto, or off\n"
    assert (status, out, err) == (132, "", line)


# --- a guest that has taken the process of its boot over ------------------------------------------


def figures_of(name: str, **changes: Any) -> dict[str, Any]:
    """Figures of a workload as they should be, but for some changes."""
    found: dict[str, Any] = json.loads(RECORD.read_text())["runs"][0]["workloads"][0]
    return {**found, "name": name, **changes}


Send = Callable[[bytes], None]
FACTS = {"boot_s": 1.0, "version": "x", "offered": [], "negotiated": []}
ODD: dict[str, list[int]] = {"t": [], "user_exits": [1], "kvm_exits": []}
BEGIN = [(boot.MADE, "on"), (boot.BOOTED, FACTS)]
PINGED = (boot.WORKLOAD, figures_of("ping"))
IDLE = (boot.WORKLOAD, figures_of("idle"))
#: What a process sends (messages, or bytes) -> what is said of its boot, and how many workloads it
#: has then.
LIES: dict[str, tuple[list[Any], str | None, int]] = {
    "nothing": ([], "less than a boot", 0),
    "only that it is made": ([*BEGIN[:1]], "less than a boot", 0),
    "not all workloads": ([*BEGIN, PINGED], "less than a boot", 1),
    "an end before the end": ([*BEGIN, PINGED, (boot.DONE, None)], "'done' out of turn", 1),
    "another order": ([*BEGIN, IDLE], "'workload' out of turn", 0),
    "one of them twice": ([*BEGIN, PINGED, PINGED], "'workload' out of turn", 1),
    "more than all": ([*BEGIN, PINGED, IDLE, (boot.DONE, None), IDLE], "more than a boot", 2),
    "made twice": ([*BEGIN, BEGIN[0]], "'made' out of turn", 0),
    "a message nobody knows": ([*BEGIN, ("mode", "other")], "an unknown message", 0),
    "no message": ([*BEGIN, b"\0\0\0\2[]"], "a report that is no object", 0),
    "half a message": ([*BEGIN, PINGED, b"\0\0\0\2["], "less than a boot", 1),
    "a large message": ([*BEGIN, b"\x7f\0\0\0{"], "a message of more than 1024 KiB", 0),
    "no JSON": ([b"\0\0\0\x10" * 1024], "a report that is no JSON", 0),
    "a lie about the host": (
        [*BEGIN, PINGED, (facts.FAILED, ["KvmMissing", "no\x1b[2J", ""])],
        "no\N{REPLACEMENT CHARACTER}[2J",
        1,
    ),
    "too many lines": ([*BEGIN, *[(boot.SAID, "x")] * 17], "too many lines", 0),
    "a line too early": ([(boot.SAID, "x")], "too many lines", 0),
    "an unknown field": (
        [*BEGIN, (boot.WORKLOAD, figures_of("ping", verdict="differs"))],
        "'workload' of another shape",
        0,
    ),
    "a tiny figure": (
        [*BEGIN, (boot.WORKLOAD, figures_of("ping", seconds=5e-324))],
        "a figure that is too small",
        0,
    ),
    "an unknown fact": (
        [BEGIN[0], (boot.BOOTED, {**FACTS, "kind": "qemu"})],
        "'booted' of another shape",
        0,
    ),
    "a figure that is none": (
        [*BEGIN, (boot.WORKLOAD, figures_of("ping", rtt_ms="fast"))],
        "'workload' of another shape",
        0,
    ),
    "a large figure": (
        [*BEGIN, (boot.WORKLOAD, figures_of("ping", rtt_ms=10**4000))],
        "a figure that is too large",
        0,
    ),
    "no number": (
        [*BEGIN, (boot.WORKLOAD, figures_of("ping", rtt_ms=float("nan")))],
        "a report that is no JSON",
        0,
    ),
    "a moved cursor": (
        [
            BEGIN[0],
            (boot.BOOTED, {**FACTS, "version": "\x1b[2J"}),
            (boot.WORKLOAD, figures_of("ping", lines={"\x1b[2J\n": 3})),
            (
                boot.WORKLOAD,
                figures_of("idle", samples={"t": [], "user_exits": [1], "kvm_exits": []}),
            ),
            (boot.DONE, None),
        ],
        None,
        2,
    ),
}


def first_boot(
    monkeypatch: pytest.MonkeyPatch, deed: Callable[[Callable[..., None]], None]
) -> None:
    """Have the process of the first mode do something else than to boot."""
    real = Comparison._be_boot

    def other(self: Comparison, number: int, send: Send) -> None:
        if number:
            real(self, number, send)
        else:
            deed(send)

    monkeypatch.setattr(Comparison, "_be_boot", other)


@pytest.mark.parametrize("lie", LIES)
def test_a_hostile_process(
    monkeypatch: pytest.MonkeyPatch, compare_with: Comparing, lie: str
) -> None:
    """Whatever it sends: that is said of its own boot, and the next one runs."""
    messages, why, kept = LIES[lie]

    def deed(send: Send) -> None:
        for one in messages:
            send(one if isinstance(one, bytes) else facts.encode(*one))

    first_boot(monkeypatch, deed)
    comparison, _, said = compare_with(repeat=1)
    comparison.run()
    document = comparison.document()
    mine, other = document["runs"]
    assert (mine["mode"], mine["repeat"], len(mine["workloads"])) == ("emulated", 0, kept)
    assert mine["error"] is None if why is None else why in mine["error"], mine["error"]
    assert other["error"] is None and len(other["workloads"]) == 2
    assert document["modes"][0]["problem"] is None and document["modes"][0]["kind"] == "pyvmm"
    assert schema.check(document) == "" and "\x1b" not in "".join(said)
    assert "\x1b" not in html.page(document)
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        (lambda send: os._exit(3), "has failed, with status 3"),
        (lambda send: os.kill(os.getpid(), signal.SIGKILL), "was killed (SIGKILL)"),
        (lambda send: 1 // 0, "with status 1: ZeroDivisionError"),
        (
            lambda send: [send(facts.encode(boot.SAID, "x" * 1000)) for _ in range(10**4)],
            "has sent more than 4 MiB",
        ),
    ],
    ids=["status", "signal", "error", "flood"],
)
def test_a_process_that_ends_otherwise(
    monkeypatch: pytest.MonkeyPatch,
    compare_with: Comparing,
    deed: Callable[[Send], Any],
    why: str,
) -> None:
    first_boot(monkeypatch, deed)
    comparison, _, _ = compare_with(repeat=1)
    comparison.run()
    document = comparison.document()
    assert why in document["runs"][0]["error"]
    assert document["modes"][0]["problem"] is None and document["runs"][1]["error"] is None


def test_samples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "SAMPLES_MAX", 8)
    count = iter(range(10**6))
    guest = SimpleNamespace(quick=lambda: (n := next(count), 2 * n))
    sampler = boot.Sampler(guest, 1e-4)
    sampler.start()
    while next(count) < 200:
        pass
    got = sampler.stop()
    assert len(got["t"]) < 8 and got["t"] == sorted(got["t"]) and got["user_exits"][0] == 0
    assert [2 * n for n in got["user_exits"]] == got["kvm_exits"]


def test_threads_are_found_by_name_and_counted() -> None:
    end, turn = threading.Event(), threading.Event()

    def busy() -> None:
        until = time.thread_time() + 0.03
        while time.thread_time() < until:
            pass
        turn.set()
        while not end.wait(0.001):
            pass

    threads = [Thread(target=busy, name="busy bee"), Thread(target=end.wait, name="idle")]
    for thread in threads:
        thread.start()
    try:
        turn.wait()
        deadline = time.monotonic() + 60
        wanted = {threads[0].native_id: "busy bee", threads[1].native_id: "idle"}
        # A thread has its name, and waits, a moment after its start.
        while not wanted.items() <= counters.threads_of(os.getpid()).items():
            assert time.monotonic() < deadline
        keys = [("worker", threads[0].native_id or 0), ("vmm", threads[1].native_id or 0)]
        before = counters.snapshot(keys)
        while (now := counters.snapshot(keys))[keys[0]][1] < before[keys[0]][1] + 5 or not (
            now[keys[1]][1]
        ):
            assert time.monotonic() < deadline
        used = counters.by_role({}, counters.snapshot([*keys, ("vmm", 1 << 22)]))
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert used["worker"]["cpu_s"] >= 0.03 > used["vmm"]["cpu_s"]
    assert used["worker"]["voluntary"] >= 5 and used["vmm"]["voluntary"] >= 1
    assert (used["worker"]["threads"], used["vmm"]["threads"]) == (1, 1)
    while counters.snapshot(keys):  # join() returns a moment before the kernel's thread has ended
        assert time.monotonic() < deadline


def test_threads_of_other_processes() -> None:
    child = subprocess.Popen(["sleep", "100"])
    try:
        deadline = time.monotonic() + 30
        while counters.threads_of(child.pid) != {child.pid: "sleep"}:
            assert time.monotonic() < deadline
        assert counters.vhost_threads(child.pid) == []
        # What the kernel's worker is called; here it is a thread of ours that has the name.
        other = subprocess.Popen(
            ["sh", "-c", f"printf vhost-{child.pid} >/proc/$$/comm; echo; read x"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with other:
            assert other.stdout
            other.stdout.readline()
            assert counters.vhost_threads(child.pid) == [other.pid]
    finally:
        child.kill()
        child.wait()
    assert counters.threads_of(child.pid) == {}


def test_pinning() -> None:
    """A vCPU has a CPU to itself, who has chosen keeps its own, and the caller is put back."""
    if not possible(1):
        pytest.skip("one CPU")
    allowed = os.sched_getaffinity(0)
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    vcpu, worker, chosen = (thread.native_id or 0 for thread in threads)
    first = min(allowed)
    try:
        os.sched_setaffinity(chosen, {first})
        gone = subprocess.Popen(["true"])
        gone.wait()
        tasks = [
            ("vcpu", vcpu),
            ("worker", worker),
            ("vhost", chosen),
            ("vmm", gone.pid),
        ]
        with pinned(tasks, 1):
            assert os.sched_getaffinity(vcpu) == {first}
            assert os.sched_getaffinity(worker) == os.sched_getaffinity(0) == allowed - {first}
            assert os.sched_getaffinity(chosen) == {first}
        assert os.sched_getaffinity(0) == allowed
    finally:
        end.set()
