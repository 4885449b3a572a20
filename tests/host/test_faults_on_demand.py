"""Faults on demand of machines that run: by the command, under the sandbox, and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import Machine, Net
from pyvmm.card.nic import Nic
from pyvmm.control.registry import machines
from pyvmm.errors import UsageError
from pyvmm.exits.trace import write
from pyvmm.explain.arrows import Diagram
from pyvmm.explain.mermaid import mermaid
from pyvmm.explain.page import page
from pyvmm.explain.read import load
from tests.driver import wait_for
from tests.host.names import reachable
from tests.unit.test_capture import blocks
from tests.unit.test_explain import arrows_of, check, embedded

Guest = Callable[[str], str]
PATIENCE = 60.0
TIMEOUT = 120.0
EPB = 6  # type of an Enhanced Packet Block
PYVMM = [sys.executable, "-m", "pyvmm"]


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A runtime directory of the test's own."""
    path = Path(f"/tmp/qf{os.getpid()}")
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield
    subprocess.run(["rm", "-rf", str(path)], check=True)


def fault(*words: str, status: int = 0) -> Any:
    """``pyvmm fault vm0 --json WORD...``; the object, or the error's line."""
    json_ = [] if status else ["--json"]
    argv = [*PYVMM, "fault", "--host", "local", *json_, "vm0", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == status, done
    return done.stderr if status else json.loads(done.stdout)


@pytest.mark.parametrize("sandbox", ["on", "off"])
def test_the_faults_of_a_running_machine(guest: Guest, tmp_path: Path, sandbox: str) -> None:
    """With a filter, which the command compiles and the confined machine runs."""
    report = tmp_path / "r.json"
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("pcinet"), "--memory", "4M"]
    argv += ["--net", "emulated,fault=rx+duplicate=1/2,fault-seed=4", "--sandbox", sandbox]
    argv += ["--append", "count=1000000000", "--name", "vm0", "--report", str(report)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as vm:
        try:
            assert wait_for(lambda: reachable("vm0"))
            assert [m.name for m in machines()] == ["vm0"]
            assert wait_for(lambda: fault()["counters"].get("rx_fault_duplicate", 0) > 10)
            told = fault()
            assert told["rules"] == ["rx duplicate=1/2"] and told["seed"] == 4
            told = fault("tx", "delay=1ms", "filter=arp", "rx", "hold-irq=1ms", "--seed", "9")
            assert told["rules"] == ["tx delay=1ms filter='arp'", "rx hold-irq=1ms"]
            assert told["seed"] == 9

            def delayed() -> bool:
                now = fault()["counters"]
                return bool(now["tx_fault_delay"] > 3 and now["rx_fault_hold_irq"] > 3)

            assert wait_for(delayed, PATIENCE)
            assert "did you mean delay?" in fault("dealy=1ms", status=2)
            assert fault("off")["rules"] == []
            text = subprocess.run(
                [*PYVMM, "fault", "--host", "local", "vm0"], capture_output=True, text=True
            ).stdout
            assert text.startswith("net0: no faults\nto the guest: ")
            subprocess.run([*PYVMM, "quit", "--host", "local", "vm0"], check=True, timeout=TIMEOUT)
            _, err = vm.communicate(timeout=PATIENCE)
        finally:
            vm.kill()
    counters = json.loads(report.read_text())["nets"][0]["counters"]
    assert counters["rx_fault_duplicate"] > 10 and counters["tx_fault_delay"] > 3, err


def test_faults_from_python(guest: Guest) -> None:
    """Lost questions are not answered, so the guest, which asks once, waits for ever."""
    net = Net("emulated", fault="tx+loss+after=5", fault_seed=1)
    with Machine(guest("pcinet"), memory="4M", append="count=10", nets=[net]) as vm:
        vm.start()
        card = vm.nets[0]
        assert wait_for(lambda: card.counters().get("tx_fault_loss") == 1)
        # The worker counts what it has done in a turn a moment later.
        assert wait_for(lambda: card.counters()["tx_packets"] == 6)
        with pytest.raises(UsageError, match="unknown word 'los'"):
            card.fault("los")
        assert vm.state == "running"


def test_every_second_answer_comes_late(guest: Guest) -> None:
    with Machine(guest("pcinet"), memory="4M", append="count=40", nets=[Net()]) as vm:
        vm.nets[0].fault("rx delay=2ms chance=1/2", "both corrupt=1/2 filter='ip'")
        vm.start()
        outcome = vm.wait(TIMEOUT)
        assert (outcome.kind, outcome.status) == ("poweroff", 0)
        counters = vm.nets[0].counters()
        assert counters["rx_fault_delay"] >= 20 and counters["rx_fault_corrupt"] == 0


@pytest.mark.parametrize("worker", ["thread", "vcpu"])
def test_answers_are_cut_short_and_used_in_another_order(
    guest: Guest, tmp_path: Path, worker: str
) -> None:
    """Of each answer, the guest gets nothing but the header, and then, in the buffer that was to be
    used before, all. It gives both buffers back. The page has each deed, where it was done.
    """
    trace = tmp_path / "trace"
    net = Net(worker=worker, notify="exit" if worker == "vcpu" else "ioeventfd")
    with Machine(guest("pcinet"), memory="4M", append="count=40", nets=[net], trace=1 << 13) as vm:
        vm.nets[0].fault("rx duplicate truncate keep=0 filter='arp'", "both reorder-used")
        vm.start()
        outcome = vm.wait(TIMEOUT)
        assert (outcome.kind, outcome.status) == ("poweroff", 0), vm.stdout.text
        counters = vm.nets[0].counters()
        with trace.open("wb") as f:
            write(vm, f.write)
    assert counters["rx_fault_truncate"] == 40 and counters["rx_packets"] >= 80
    assert counters["rx_fault_reorder_used"] > 20
    # A question waits for the next one in vain: there is none before its answer.
    assert counters["tx_fault_late_used"] > 20
    read = load(str(trace))
    (data,) = embedded(page([("trace", Diagram(read, read.card(None)))], 10_000))
    check(json.loads(trace.read_text()), data)
    deeds = [a for a in arrows_of(data) if a["k"] == "fault"]
    cut = [a["l"] for a in deeds if "truncate: frame to the guest" in a["l"]]
    assert len(cut) == counters["rx_fault_truncate"], cut
    for way, deed in (("rx", "reorder-used"), ("rx", "late-used"), ("tx", "late-used")):
        mine = [a for a in deeds if a["l"].startswith(f"fault on demand: {deed}: return")]
        mine = [a for a in mine if a["l"].endswith(f"queue {int(way == 'tx')}")]
        name = f"{way}_fault_{deed.replace('-', '_')}"
        assert len(mine) == counters[name] and all(a["r"]["moment"] == "returned" for a in mine)


def test_a_back_end_has_faults(guest: Guest, tmp_path: Path) -> None:
    """Each frame comes back twice: once as its repetition. Confined, with a filter."""
    path, file = tmp_path / "s", tmp_path / "x.pcapng"
    argv = [*PYVMM, "backend", "--socket", str(path), "--loopback", "--counters"]
    argv += ["--pcap", str(file)]
    argv += ["--fault", "tx+duplicate+filter=arp+rx+delay=1ms", "--fault-seed", "3"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as end:
        try:
            assert wait_for(path.exists)
            net = Net("vhost-user", socket=str(path))
            with Machine(guest("pcinet"), memory="4M", append="count=1", nets=[net]) as vm:
                vm.start()
                # The question, and twice what comes back.
                assert wait_for(lambda: [kind for kind, _ in blocks(file)].count(EPB) == 3)
                vm.stop()
            end.terminate()
            out, err = end.communicate(timeout=PATIENCE)
        finally:
            end.kill()
    assert end.returncode == 0, err
    assert "faults on purpose: tx duplicate filter='arp' rx delay=1ms (seed 3)" in err
    counters = json.loads(out)
    assert counters["tx_fault_duplicate"] == 1 and counters["rx_fault_delay"] == 2, err


# --- scenarios ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "append"),
    [
        ("pcinet", "count=60"),
        ("pcinet-bug", "count=60"),
        ("pcinet", "count=64 burst=8"),
        ("pcinet-bug", "count=64 burst=8 bug=turn"),
    ],
)
def test_a_bug_hides_without_a_scenario(guest: Guest, kernel: str, append: str) -> None:
    with Machine(guest(kernel), memory="4M", append=append, nets=[Net()]) as vm:
        vm.start()
        outcome = vm.wait(TIMEOUT)
        assert (outcome.kind, outcome.status) == ("poweroff", 0), vm.stdout.text


def no_buffer_left(vm: Machine) -> bool:
    """Whether all receive buffers that were ever made available have been used: 16 at first."""
    queue = vm.nets[0].device.queues[0]
    if not queue.enabled:
        return False
    used = vm.memory.read(queue.used + 2, 2)  # first: no buffer is used before it is available
    return any(used) and used == vm.memory.read(queue.avail + 2, 2)


def stands_still(card: Nic) -> bool:
    """Whether the guest has asked nothing for half a second."""
    before = card.counters()["tx_packets"]
    time.sleep(0.5)
    return card.counters()["tx_packets"] == before


def test_a_scenario_finds_the_bug(guest: Guest) -> None:
    """Each answer comes twice, and the driver loses the second one's buffer: after some 16
    questions it has none left, so that no answer can come. A driver without the bug goes on.
    """
    # The player begins at a moment of its own: the guest asks for longer than that may take.
    with Machine(guest("pcinet"), memory="4M", append="count=1000000000", nets=[Net()]) as vm:
        player, card = vm.play("duplicates"), vm.nets[0]
        vm.start()
        # Of each buffer some.
        assert wait_for(lambda: card.counters().get("rx_fault_duplicate", 0) > 64, PATIENCE)
        assert wait_for(lambda: player.finished, PATIENCE), player.report()
        assert vm.outcome is None
    append = f"count={1_000_000_000}"
    with Machine(guest("pcinet-bug"), memory="4M", append=append, nets=[Net()]) as vm:
        player, card = vm.play("duplicates"), vm.nets[0]
        vm.start()
        assert wait_for(lambda: no_buffer_left(vm) or vm.outcome is not None, TIMEOUT)
        assert wait_for(lambda: stands_still(card), PATIENCE)
        assert wait_for(lambda: player.finished, PATIENCE), player.report()
        assert vm.outcome is None and card.counters()["tx_packets"] < 1_000_000_000
        assert no_buffer_left(vm), "it has got none meanwhile"


def out_of_order(card: Nic) -> int:
    """How many chains have come back behind those of a later packet."""
    counters = card.counters()
    return sum(counters.get(f"{way}_fault_reorder_used", 0) for way in ("rx", "tx"))


def test_a_scenario_finds_a_driver_that_expects_order(guest: Guest) -> None:
    """Eight questions share a kick, so that several chains of each virtqueue are to be used. The
    driver waits for the one whose turn it is, which has come back behind another one already. A
    driver without the bug goes on.
    """
    append = "count=1000000000 burst=8"
    with Machine(guest("pcinet"), memory="4M", append=append, nets=[Net()]) as vm:
        player, card = vm.play("out-of-order"), vm.nets[0]
        vm.start()
        assert wait_for(lambda: out_of_order(card) > 64, PATIENCE), card.counters()
        assert wait_for(lambda: player.finished, PATIENCE), player.report()
        assert vm.outcome is None
    append += " bug=turn"
    with Machine(guest("pcinet-bug"), memory="4M", append=append, nets=[Net()]) as vm:
        player, card = vm.play("out-of-order"), vm.nets[0]
        vm.start()
        assert wait_for(lambda: out_of_order(card) > 0 and stands_still(card), TIMEOUT)
        assert wait_for(lambda: player.finished, PATIENCE), player.report()
        # The rest of its last questions and answers, and nothing since.
        assert vm.outcome is None and out_of_order(card) <= 2 * 8, card.counters()


@pytest.mark.parametrize("kernel", ["pcinet", "pcinet-bug"])
def test_the_bug_is_to_be_seen(guest: Guest, tmp_path: Path, kernel: str) -> None:
    """The same run as a page and a text: each deed is an arrow of its own. The driver with the bug
    gives its last receive buffer away, and gets no frame after that; the other one goes on. The
    rule is that of the scenario, which begins at a moment of its own: here it is the first frame.
    """
    trace, append = tmp_path / "trace", "count=60 irq=msix"
    with Machine(guest(kernel), memory="4M", append=append, nets=[Net()], trace=1 << 13) as vm:
        vm.nets[0].fault("rx duplicate")
        vm.start()
        if kernel == "pcinet":
            assert vm.wait(TIMEOUT).status == 0
        else:
            assert wait_for(lambda: no_buffer_left(vm), TIMEOUT)
            assert vm.outcome is None
        vm.stop()
        counters = vm.nets[0].counters()
        with trace.open("wb") as f:
            write(vm, f.write)
    read = load(str(trace))
    diagram = Diagram(read, read.card(None))
    (data,) = embedded(page([("trace", diagram)], 10_000))
    check(json.loads(trace.read_text()), data)
    arrows, last = arrows_of(data), ", the last that is available"
    deeds = [arrow["l"] for arrow in arrows if arrow["k"] == "fault"]
    assert len(deeds) == counters["rx_fault_duplicate"] >= 15
    assert all(text.startswith("fault on demand: duplicate: frame to the") for text in deeds)
    asked = [arrow for arrow in arrows if "ARP who has 192.168.100.1?" in arrow["l"]]
    text = mermaid(diagram, 10_000)
    assert "tap--xworker: fault on demand: duplicate: frame to the guest" in text
    if kernel == "pcinet":
        assert len(asked) == 60
        return
    assert 10 < len(asked) < 60
    received = [a["p"] for a in arrows if a["k"] == "frame" and a.get("p", 0) < 0]
    taken = next(a for a in arrows if a.get("p") == received[-1] and a["l"].startswith("take"))
    assert taken["l"].endswith(last)
    assert last in text  # perhaps of another chain that was the last one, too


def test_run_plays_a_scenario(guest: Guest, tmp_path: Path) -> None:
    file, report = tmp_path / "s.toml", tmp_path / "r.json"
    file.write_text(
        "[[step]]\nfaults = \"rx duplicate filter='arp'\"\n[[step]]\nat = '1h'\ndo='kick'"
    )
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("pcinet"), "--memory", "4M"]
    # The player begins at a moment of its own: the guest asks until it is told to end.
    argv += ["--net", "emulated", "--append", "count=1000000000", "--report", str(report)]
    wrong = subprocess.run([*argv, "--scenario", "overlaod"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "did you mean overload?" in wrong.stderr
    file.write_text(file.read_text().replace("1h", "3600s"))
    argv += ["--scenario", str(file)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as vm:
        try:
            assert wait_for(lambda: reachable("vm0"))
            assert wait_for(lambda: fault()["counters"].get("rx_fault_duplicate"))
            subprocess.run([*PYVMM, "quit", "--host", "local", "vm0"], check=True, timeout=TIMEOUT)
            _, err = vm.communicate(timeout=PATIENCE)
        finally:
            vm.kill()
    assert vm.returncode == 0, err
    assert "--scenario s: 1 of 2 steps were played" in err
    told = json.loads(report.read_text())
    assert told["scenario"]["played"] == 1 and told["scenario"]["steps"] == 2
    assert told["nets"][0]["counters"]["rx_fault_duplicate"] > 0
