"""The exit ledger on real exits: registers by name, phases, KVM's own counters beside it,
budgets.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import termios
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.errors import UsageError
from pyvmm.exits.phases import Phase
from tests.driver import wait_for
from tests.terminals import on_a_terminal

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
TIMEOUT = 120.0
KICKS, CONTROL, HALTS = 70, 9, 15


def ended(vm: Machine) -> dict[str, Phase]:
    """Run to the end; the phases by name."""
    vm.start()
    outcome = vm.wait(TIMEOUT)
    assert (outcome.kind, outcome.status) == ("poweroff", 0), vm.stdout.text
    phases = {phase.name: phase for phase in vm.phase_exits()}
    assert sum(phase.ledger.total for phase in phases.values()) == vm.ledger().total
    return phases


@pytest.mark.parametrize("notify", ["exit", "ioeventfd"])
def test_kicks_by_mode(guest: Guest, notify: str) -> None:
    """notify=exit: one exit to userspace per kick; ioeventfd: none. Kicks of the control queue are
    exits in both;
    halts in none.
    """
    append = f"count={KICKS} control={CONTROL} halts={HALTS}"
    with Machine(
        guest("kicks"), memory="4M", append=append, nets=[Net("emulated", notify=notify)]
    ) as vm:
        phases = ended(vm)
        command = phases["command"]
        kicks = KICKS if notify == "exit" else 0
        expect = {"net0 queue 2 notify (control)": CONTROL, "guest-control": 1}
        names = command.ledger.by_name()
        names.pop("intr", None)
        assert names == expect | ({"net0 queue 1 notify": kicks} if kicks else {})
        metrics = command.metrics()
        assert (metrics["notify"], metrics["control"], metrics["halt"]) == (kicks, CONTROL, HALTS)
        assert command.kvm is not None
        vcpu = command.kvm["vcpu0"]
        assert (vcpu["mmio_exits"], vcpu["halt_exits"]) == (metrics["mmio"], HALTS)
        injections = metrics["irq_injections"]
        assert injections is not None and vcpu["irq_injections"] == injections >= HALTS
        assert vm.check_budget(f"notify=={kicks}").held
        assert vm.check_budget(f"command.exits[net0 queue 2]=={CONTROL}").held
        assert not vm.check_budget(f"boot.control>={1}").held
        # The driver polls the status until its reset is done, however long that takes.
        shutdown = phases["shutdown"].ledger.by_name()
        assert shutdown.pop("net0 common device_status") >= 2
        shutdown.pop("intr", None)
        assert sum(shutdown.values()) == 2, shutdown


def test_exits_are_in_their_phase(guest: Guest) -> None:
    """All but the first mark and the power-off are in the command phase of the exits guest."""
    with Machine(guest("exits"), memory="4M") as vm:
        phases = ended(vm)
        assert {
            name: phase.ledger.by_device().get("guest-control", 0) for name, phase in phases.items()
        } == {
            "boot": 1,
            "command": 1,
            "shutdown": 0,
        }
        assert phases["command"].ledger.by_device()["nobody"] == vm.ledger().by_device()["nobody"]
        whole = vm.ledger()
        for attribute in ("count", "time", "units"):
            parts = sum(
                getattr(line, attribute) for phase in phases.values() for line in phase.ledger.lines
            )
            assert parts == sum(getattr(line, attribute) for line in whole.lines), attribute


def test_registers_have_names(guest: Guest) -> None:
    """What the driver of pcinet touches, in the words of the specifications."""
    with Machine(guest("pcinet"), memory="4M", append="irq=msix", nets=[Net("emulated")]) as vm:
        ended(vm)
        lines = vm.ledger().lines
        names = {line.name for line in lines}
        assert {
            "net0 common device_status",
            "net0 common driver_feature",
            "net0 common queue_desc low",
            "net0 common queue_desc high",
            "net0 config mac",
            "net0 config mac+5",
            "net0 msix-table entry 1 vector control",
            "pci-config address",
            "pci-config net0 command",
            "pci-config net0 BAR 0",
            "pci-config net0 vendor id",
            "pci-config net0 notify-cfg notify_off_multiplier",
            "pci-config net0 MSI-X table offset",
            "pci-config host-bridge vendor id",
        } <= names
        nameless = {
            line.what for line in lines if line.is_access and line.device and not line.register
        }
        assert {what.split()[-1] for what in nameless} <= {"guest-control", "guest-stdout"}
        (status,) = {line.register for line in lines if line.name == "net0 common device_status"}
        assert status == "device_status"


def test_serial_registers(guest: Guest) -> None:
    with Machine(guest("serial"), memory="4M", append="flood=1000") as vm:
        ended(vm)
        names = vm.ledger().by_name()
        assert names["serial0 THR"] == 1000
        assert names["serial0 IIR"] > 0 and names["serial0 IER"] > 0
        assert not any("RBR" in name for name in names)


def test_reboots_do_not_blur_the_statistics(guest: Guest) -> None:
    """KVM's counters start over with each VM; the phases' do not."""
    with Machine(guest("reset"), memory="4M", append="how=acpi", on_reboot="restart") as vm:
        vm.start()
        vm.stdout.expect(r"(reset: by acpi\n){3}", TIMEOUT)
        vm.stop()
        (phase,) = vm.phase_exits()
        assert phase.kvm is not None
        stats = vm.kvm_stats()
        assert stats is not None
        last, old = stats["vcpus"][0]["exits"], [s["vcpus"][0]["exits"] for s in vm.old_stats]
        assert phase.kvm["vcpu0"]["exits"] == last + sum(old)
        assert phase.ledger.total == vm.ledger().total


def test_while_it_runs(guest: Guest) -> None:
    with Machine(guest("reset"), memory="4M", append="how=hang") as vm:
        vm.start()
        vm.stdout.expect("reset: by hang\n", TIMEOUT)  # 15 bytes, and an exit for each
        assert vm.check_budget("user_exits>10").held
        with pytest.raises(UsageError, match="no phase"):
            vm.check_budget("tea.user_exits>10")


# --- pyvmm run --budget ---------------------------------------------------------------------------


def run(guest: Guest, tmp_path: Path, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pyvmm",
        "run",
        "--host",
        "local",
        "--kernel",
        guest(name),
        "--memory",
        "4M",
    ]
    files = ["--report", str(tmp_path / "report"), "--junit", str(tmp_path / "junit")]
    return subprocess.run(
        [*command, *files, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        stdin=subprocess.DEVNULL,
    )


def test_budget_on_the_command_line(guest: Guest, tmp_path: Path) -> None:
    none = ("--net", "none")
    done = run(
        guest, tmp_path, "exits", *none, "--budget", "user_exits<=400", "--budget", "boot.pio==1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "report").read_text())
    assert [b["held"] for b in report["verdict"]["budgets"]] == [True, True]

    done = run(
        guest, tmp_path, "exits", *none, "--budget", "user_exits<=100", "--budget", "mmio<=1000"
    )
    assert done.returncode == 117
    assert (
        done.stderr == "pyvmm: budget user_exits<=100: 356 in command, 256 (256%) over (broken)\n"
    )
    report = json.loads((tmp_path / "report").read_text())
    assert (report["verdict"]["kind"], report["verdict"]["code"]) == ("budget", 117)
    assert [b["held"] for b in report["verdict"]["budgets"]] == [False, True]
    failure = ET.parse(tmp_path / "junit").getroot().find("testsuite/testcase/failure")
    assert failure is not None and failure.get("type") == "budget"

    done = run(
        guest,
        tmp_path,
        "exits",
        *none,
        "--budget",
        "pio<1",
        "--budget",
        "mmio<1",
        "--budget",
        "halt<1",
    )
    assert done.returncode == 117
    assert len(done.stderr.splitlines()) == 3 and done.stderr.endswith(
        "pyvmm: 2 of 3 budgets are broken\n"
    )


def test_a_guest_that_fails_fails_for_that(guest: Guest, tmp_path: Path) -> None:
    done = run(
        guest,
        tmp_path,
        "hello",
        "--net",
        "none",
        "--append",
        "status=5",
        "--budget",
        "user_exits<1",
        "x",
    )
    assert done.returncode == 5
    verdict = json.loads((tmp_path / "report").read_text())["verdict"]
    assert verdict["kind"] == "failed" and not verdict["budgets"][0]["held"]


@pytest.mark.parametrize(
    ("net", "budget", "said"),
    [
        ("none", "cows<=1", "nothing is called"),
        ("none", "exits[serial7]<=1", "no device or reason 'serial7'"),
        ("none", "packets<=1", "without a network card"),
        ("none", "user_exits_per_mb<=1", "without a network card"),
        ("emulated", "exits[net1]<=1", "no device or reason"),
    ],
)
def test_nonsense_is_told_before_the_guest_runs(
    guest: Guest, tmp_path: Path, net: str, budget: str, said: str
) -> None:
    done = run(guest, tmp_path, "hello", "--net", net, "--budget", budget)
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert "hello" not in done.stdout


# --- pyvmm top ------------------------------------------------------------------------------------


#: What the guest does for ever, as the ledger calls it.
KICKED = "net0 queue 1 notify"


@pytest.fixture
def busy(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with a control socket whose guest kicks a card for ever, in a runtime directory of
    the test's own.
    """
    with tempfile.TemporaryDirectory(prefix="pvtop") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        with Machine(
            guest("kicks"),
            memory="4M",
            append="count=4000000000",
            nets=[Net("emulated", notify="exit")],
            name="busy",
            qmp="auto",
        ) as vm:
            vm.start()
            assert wait_for(lambda: KICKED in vm.ledger().by_name(), TIMEOUT)
            yield vm


def top(*args: str) -> list[str]:
    return [sys.executable, "-m", "pyvmm", "top", "--host", "local", *args]


def once(*args: str) -> str:
    done = subprocess.run(
        top("busy", "--once", *args), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_top_once(busy: Machine) -> None:
    looks: list[dict[str, Any]] = []

    def kicked() -> bool:
        """Whether the guest has had a processor in most of the interval."""
        looks.append(json.loads(once("--json", "--interval", "0.3")))
        return bool(looks[-1]["by_name"].get(KICKED, 0) > 100)

    assert wait_for(kicked, TIMEOUT), looks
    now = looks[-1]
    assert (now["name"], now["status"]) == ("busy", "running")
    assert now["seconds"] >= 0.3
    assert now["vcpus"][0]["kvm_exits"] > 100 and now["exits"] > 100
    (net,) = now["nets"]
    assert net["tx_kicks"] > 0 and net["tx_packets"] == 0
    assert net["workers"][0]["cpu_percent"] is not None
    assert wait_for(lambda: KICKED in once("--interval", "0.2"), TIMEOUT)


def test_top_on_a_screen_or_none(busy: Machine) -> None:
    """A screen that is drawn anew, if the terminal has one."""
    argv = ("top", "--host", "local", "busy", "--interval", "0.1")
    assert "\x1b[?1049h" in on_a_terminal(*argv, until="exits to the VMM", columns=40)
    assert "\x1b" not in on_a_terminal(*argv, until="exits to the VMM", TERM="dumb")


def test_top_ends_with_the_machine_and_says_who_is_missing(busy: Machine) -> None:
    with subprocess.Popen(
        top("busy", "--json", "--interval", "0.1"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["name"] == "busy"
        busy.stop()
        child.stdout.read()
        assert child.wait(TIMEOUT) == 0
    for args, status in ((("nobody",), 113), (("busy", "--interval", "0"), 2)):
        done = subprocess.run(top(*args), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
        assert done.returncode == status and done.stderr.count("\n") == 1, done


def test_top_on_a_terminal(busy: Machine) -> None:
    """It draws as much as the window holds, and q leaves the terminal as it was."""
    main, child_side = os.openpty()
    try:
        termios.tcsetwinsize(main, (20, 60))
        modes = termios.tcgetattr(child_side)
        with subprocess.Popen(
            top("busy", "--interval", "0.1"),
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm"},
            stdin=child_side,
            stdout=child_side,
            stderr=child_side,
        ) as child:
            seen, screen = b"", ""
            while KICKED not in screen:  # in none of an interval in which the guest stood still
                seen += os.read(main, 65536)
                if seen.count(b"\x1b[2J") >= 3:
                    screen = seen.split(b"\x1b[2J")[-2].split(b"\x1b[")[0].decode()
            os.write(main, b"q")
            while child.poll() is None:
                if select.select([main], [], [], 0.1)[0]:
                    seen += os.read(main, 65536)
        assert child.returncode == 0
        lines = screen.replace("\r", "").split("\n")
        assert len(lines) <= 20 and max(map(len, lines)) <= 60
        assert termios.tcgetattr(child_side) == modes
    finally:
        os.close(main)
        os.close(child_side)
