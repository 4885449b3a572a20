"""The commands about running machines, against a server with canned answers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.card.report import SwitchReport
from pyvmm.cli import main, qmp
from pyvmm.cli.support import remote
from pyvmm.cli.support.screen import CLEAR
from pyvmm.control.registry import Claim
from pyvmm.control.server import Command, QmpError, Server
from pyvmm.errors import UsageError
from pyvmm.memory import GuestMemory
from pyvmm.programs import module
from tests.terminals import on_a_terminal
from tests.unit.test_rings import Guest, ram  # noqa: F401 - a fixture


class Fake:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[Any, Any]]] = []
        self.rings: dict[str, Any] = {}
        self.server = Server(Claim("box"), lambda: COMMANDS, self, {})


def note(name: str, event: str = "") -> Callable[..., Any]:
    def run(machine: Fake, given: dict[Any, Any]) -> dict[Any, Any]:
        machine.calls.append((name, given))
        if event:
            machine.server.emit(event)
        return {}

    return run


def switch(machine: Fake, given: dict[str, Any]) -> Any:
    """Refused, rolled back or done, by the mode."""
    if given["mode"] == "vhost-net":
        raise QmpError("nothing to switch to")
    report = SwitchReport("net0", "emulated", given["mode"])
    report.outcome, report.reason = (
        ("switched", "") if given["mode"] == "emulated" else ("rolled-back", "silent")
    )
    report.gap_ns, report.pending = {"rx": 1500000, "tx": 9}, {0: 200, 1: 3}
    return report.as_dict()


STATS = [
    {"name": "exits", "type": "cumulative", "exponent": 0},
    {"name": "idle", "type": "cumulative", "exponent": 0},
]
STATS += [
    {"name": "wait", "type": "peak", "exponent": -9, "base": 10, "unit": "seconds"},
    {"name": "hist", "type": "log2-histogram", "exponent": 0},
]
VALUES = {"exits": 7, "idle": 0, "wait": 5, "hist": [1, 2]}

COMMANDS = {
    "stop": Command(note("stop"), ""),
    "cont": Command(note("cont"), ""),
    "system_reset": Command(note("system_reset", "RESET"), ""),
    "system_powerdown": Command(note("system_powerdown"), ""),
    "quit": Command(note("quit", "SHUTDOWN"), ""),
    "echo": Command(lambda machine, given: given, "", a="int?", b="str?"),
    "x-pyvmm-switch": Command(switch, "", nic="int", mode="str"),
    "x-pyvmm-rings": Command(
        lambda machine, given: machine.rings, "", nic="int?", queue="int?", chains="int?"
    ),
    "x-pyvmm-machine": Command(
        lambda machine, given: {
            "status": "running",
            "cpus": 2,
            "memory": 64 << 20,
            "nets": [{"name": "net0", "mode": "vhost-net"}],
        },
        "",
    ),
    "query-stats-schemas": Command(
        lambda machine, given: [
            {"provider": "kvm", "target": t, "stats": STATS} for t in ("vm", "vcpu")
        ],
        "",
    ),
    "query-stats": Command(
        lambda machine, given: (
            [{"provider": "kvm", "stats": [{"name": n, "value": v} for n, v in VALUES.items()]}]
            * (1 if given["target"] == "vm" else 2)
        ),
        "",
        target="str",
    ),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    """A machine called box; no testbed is looked for."""
    base = Path(f"/tmp/qc{os.getpid()}")
    base.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("PYVMM_TESTBED", f"none-{os.getpid()}")
    monkeypatch.delenv("PYVMM_IN_TESTBED", raising=False)
    f = Fake()
    yield f
    f.server.close()
    subprocess.run(["rm", "-rf", str(base)], check=True)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    out = capsys.readouterr()
    return status, out.out, out.err


def test_run_control(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, command in (
        (["stop", "box"], "stop"),
        (["cont", "box"], "cont"),
        (["reset", "box"], "system_reset"),
        (["powerdown", "box"], "system_powerdown"),
        (["quit", "--host", "local", "box"], "quit"),
        (["stop", fake.server.path], "stop"),
    ):
        assert run(capsys, *argv) == (0, "", "")
        assert fake.calls.pop() == (command, {})


def test_errors_have_their_status(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "stop", "nobody")
    assert (
        status == 113 and err == "pyvmm: no machine named nobody is running here; see: pyvmm ps\n"
    )
    status, _, err = run(capsys, "switch", "box", "vhost-net")
    assert status == 114 and "nothing to switch to" in err
    status, _, err = run(capsys, "switch", "box", "vhost-user")
    assert status == 114 and "net0 is rolled-back to emulated: silent" in err
    status, _, err = run(capsys, "powerdown", "--wait", "0.1", "box")
    assert status == 124 and "no SHUTDOWN within 0.1 s" in err
    for argv in (
        ["powerdown", "--wait", "-1", "box"],
        ["rings", "--watch", "0", "box"],
        ["qmp", "box", "echo", "a"],
        ["stop"],
        ["switch", "box"],
    ):
        status, _, err = run(capsys, *argv)
        assert status == 2 and err.count("\n") == 1, argv


def test_the_button_is_pressed_until_the_guest_reacts(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest that still boots takes no notice of it."""
    monkeypatch.setattr("pyvmm.cli.powerdown.AGAIN_S", 0.01)

    def press(machine: Fake, given: object) -> object:
        machine.calls.append(("press", {}))
        if len(machine.calls) == 3:
            machine.server.emit("SHUTDOWN", {})
        return {}

    monkeypatch.setitem(COMMANDS, "system_powerdown", Command(press, ""))
    assert run(capsys, "powerdown", "--wait", "60", "box") == (0, "", "")
    assert fake.calls == [("press", {})] * 3


def test_ps(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "ps")
    head, line = out.splitlines()
    assert (status, err, head.split()[:4]) == (0, "", ["NAME", "HOST", "PID", "STATUS"])
    assert line.split()[:4] == ["box", "local", str(os.getpid()), "running"] and line.endswith(
        "64 MiB  net0:vhost-net"
    )
    status, out, _ = run(capsys, "ps", "--json")
    (row,) = json.loads(out)
    assert row["name"] == "box" and row["qmp"] == fake.server.path and row["cpus"] == 2
    assert json.loads(run(capsys, "ps", "--json", "--brief")[1])[0].keys() == {
        "name",
        "host",
        "pid",
        "qmp",
        "since",
    }
    fake.server.close()
    assert run(capsys, "ps")[1].count("\n") == 1


def test_stats(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "stats", "box")
    lines = [line.split() for line in out.splitlines()]
    assert lines == [
        ["vm"],
        ["exits", "7"],
        ["wait", "5", "10^-9", "seconds"],
        ["vcpu", "0", "to", "1"],
        ["exits", "7", "7"],
        ["wait", "5", "5", "10^-9", "seconds"],
    ]
    _, out, _ = run(capsys, "stats", "--all", "--target", "vm", "box")
    assert "idle" in out and "[1, 2]" in out and "vcpu" not in out
    assert json.loads(run(capsys, "stats", "--json", "box")[1]) == {
        "vm": [VALUES],
        "vcpu": [VALUES] * 2,
    }


def test_qmp(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, "qmp", "box", "echo", "a=3", "b=x=y")
    assert status == 0 and json.loads(out) == {"a": 3, "b": "x=y"}
    monkeypatch.setattr(
        sys,
        "stdin",
        io.StringIO('echo a=1\n\n{"execute": "none"}\n{"execute":"echo","arguments":{"b":"2"}}\n'),
    )
    status, out, _ = run(capsys, "qmp", "box")
    assert status == 114
    assert [json.loads(line) for line in out.splitlines()] == [
        {"return": {"a": 1}},
        {"error": {"class": "CommandNotFound", "desc": "The command none has not been found"}},
        {"return": {"b": "2"}},
    ]


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"execute":"x","arguments":3}', "x 'y", "x y", "x =y"]
)
def test_bad_lines(line: str) -> None:
    with pytest.raises(UsageError):
        qmp._line(line)


@pytest.fixture
def drawn(fake: Fake, ram: GuestMemory) -> Fake:  # noqa: F811
    """The machine, with a card that has two queues."""
    g = Guest(ram)
    g.avail(1, [0])
    registers = {
        "index": 0,
        "role": "receive",
        "enabled": True,
        "vector": 0xFFFF,
        "desc-addr": 0,
        "avail-addr": 0,
    }
    registers["used-addr"] = 0
    fake.rings = {"name": "net0", "mode": "emulated", "active": True, "machine": "paused"}
    fake.rings["queues"] = [
        {**registers, **g.look().as_dict()},
        {**registers, "index": 1, "enabled": False, "size": 8},
    ]
    return fake


def test_rings(drawn: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "rings", "box")
    assert status == 0 and "machine paused" in out and "no vector" in out and "not enabled" in out
    assert json.loads(run(capsys, "rings", "--json", "box")[1]) == drawn.rings


def test_raw_qmp_from_a_pipe_has_all_answers(fake: Fake) -> None:
    """The input ends before the answers have come."""
    words: list[dict[str, object]] = [{"execute": "qmp_capabilities"}]
    words += [{"execute": "echo", "arguments": {"a": n}} for n in range(50)]
    asked = "".join(json.dumps(word) + "\n" for word in words).encode()
    argv = module("pyvmm", "qmp", "--raw", "box")
    done = subprocess.run(argv, input=asked, capture_output=True, timeout=120)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["return"].get("a") for a in answers[1:]] == [None, *range(50)], done


def test_rings_on_a_terminal(drawn: Fake) -> None:
    """Drawn again and again on a cleared screen, if the terminal has one."""
    argv = ("rings", "box", "--watch", "0.05")
    assert CLEAR in on_a_terminal(*argv, until="not enabled")
    assert "\x1b" not in on_a_terminal(*argv, until="not enabled", TERM="dumb")


@pytest.mark.parametrize("columns", [40, 100])
def test_machines_and_statistics_on_a_narrow_terminal(fake: Fake, columns: int) -> None:
    out = on_a_terminal("ps", columns=columns)
    assert "box" in out and "net0:vhost-net" in out and "64 MiB" in out
    assert ("\nHOST    local\n" in out) == (columns == 40)
    out += on_a_terminal("stats", "--all", "box", columns=columns)
    assert "exits" in out
    assert all(len(line) <= columns for line in out.splitlines()), out


def test_names_complete(fake: Fake) -> None:
    assert remote.complete("b") == ["box"] and remote.complete("c") == []
    env = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "COMP_LINE": "pyvmm stop ",
        "COMP_POINT": "11",
        "_ARGCOMPLETE_STDOUT_FILENAME": f"/tmp/qc{os.getpid()}/out",
        "_ARGCOMPLETE_IFS": "\n",
    }
    code = "import sys; from pyvmm.cli import main; sys.exit(main([]))"
    subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=60)
    assert "box" in Path(f"/tmp/qc{os.getpid()}/out").read_text().split()


def test_what_is_only_in_the_testbed_is_asked_there(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command itself is run there, and ps shows both places."""
    seen = []

    class Bed:
        def __init__(self, host: str = "auto") -> None:
            self.host = ""

        def run_attached(self, argv: list[str]) -> int:
            seen.append(argv)
            return 7

        def run(self, argv: list[str], timeout: float | None = None) -> type[Any]:
            class Result:
                status, err = 0, ""
                out = json.dumps(
                    [
                        {
                            "name": "far",
                            "host": "testbed",
                            "pid": 1,
                            "qmp": "/x",
                            "since": 0,
                            "status": "paused",
                        }
                    ]
                )

            return Result

    monkeypatch.setattr(remote, "testbed_up", Bed)
    assert run(capsys, "stop", "far")[0] == 7
    assert seen == [module("pyvmm", "stop", "--host", "local", "far")]
    assert run(capsys, "stop", "box")[0] == 0 and len(seen) == 1
    assert run(capsys, "stop", "--host", "testbed", "box")[0] == 7
    assert [r["name"] for r in json.loads(run(capsys, "ps", "--json")[1])] == ["box", "far"]
    assert [r["name"] for r in json.loads(run(capsys, "ps", "--json", "--host", "testbed")[1])] == [
        "far"
    ]
    assert remote.complete("f") == ["far"]


def test_switch(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "switch", "box", "emulated")
    assert (status, err) == (0, "")
    assert out == "net0: emulated -> emulated, gap 1.50 ms, 203 chains handed over\n"
    status, out, _ = run(capsys, "switch", "--json", "box", "emulated")
    assert status == 0 and json.loads(out)["outcome"] == "switched"
