"""Traffic control of taps: whose qdiscs and ifb are taken away, what is left after a failure, what
is counted. The kernel is one of our own here, because few have netem and ifb;
tests/boot/test_faults_on_demand.py has a real one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, if_nametoindex, socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from pyvmm._ext import lib
from pyvmm.card.traffic import APART_NS, TapFaults
from pyvmm.card.uplink import Uplink
from pyvmm.errors import HostError, UsageError
from pyvmm.faultopt import of_text
from pyvmm.hostnet import netns, traffic, userns
from pyvmm.hostnet.rtnetlink import has_root_qdisc
from pyvmm.hostnet.tap import Tap
from pyvmm.hostnet.traffic import ROOT, Shape, Tc, control
from pyvmm.kvm.recorder import Recorder
from pyvmm.netopt import Net

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds for a thread, on a busy host.
PATIENCE = 60
LOSS = Shape({"loss": 1 << 31, "queue": 10}).word()
A, B = "vnet-machine-01", "vnet-machine-02"


class Kernel:
    """Interfaces with their qdiscs, as tc and ip show and change them.

    :ivar broken: words; the first command with one of them is refused, and all behind it.
    :ivar ran: the programs that were run.
    """

    def __init__(self) -> None:
        self.qdiscs: dict[str, list[dict[str, Any]]] = {}
        self.numbers: dict[str, int] = {}
        self.broken: tuple[str, ...] = ()
        self.ran: list[str] = []

    def add(self, name: str, number: int | None = None) -> None:
        self.numbers[name] = number or 100 + len(self.numbers)
        self.qdiscs[name] = []

    def index(self, name: str) -> int:
        if name not in self.numbers:
            raise OSError(19, "No such device")
        return self.numbers[name]

    def has_root_qdisc(self, index: int, major: int) -> bool:
        name = next(name for name, number in self.numbers.items() if number == index)
        return any(q.get("root") and q["handle"] == f"{major:x}:" for q in self.qdiscs[name])

    def qdisc(self, interface: str, *words: str) -> None:
        """``root handle H: KIND ...``, ``parent ...`` or ``ingress``."""
        if words[0] == "ingress":
            entry: dict[str, Any] = {"kind": "ingress", "handle": "ffff:"}
        else:
            at = words.index("handle")
            entry = {"kind": words[at + 2], "handle": words[at + 1], "root": words[0] == "root"}
        zeros = dict.fromkeys(("packets", "drops", "qlen", "overlimits"), 0)
        self.qdiscs[interface].append({**zeros, **entry})

    def run(self, name: str, *argv: str, lines: str = "") -> str:
        self.ran.append(name)
        if argv[-2] == "dev" and "show" in argv:
            return json.dumps(self.qdiscs[argv[-1]])
        for line in lines.splitlines() or [" ".join(argv)]:
            if any(word in line for word in self.broken):
                raise HostError(f"{name}: refused: {line}")
            match line.split():
                case ["link", "add", ifb, "type", "ifb"]:
                    self.add(ifb)
                case ["link", "del", ifb]:
                    del self.qdiscs[ifb], self.numbers[ifb]
                case ["qdisc", "add", "dev", interface, *words]:
                    self.qdisc(interface, *words)
                case ["qdisc", "del", "dev", interface, "root"]:
                    kept = [q for q in self.qdiscs[interface] if q["kind"] == "ingress"]
                    self.qdiscs[interface] = kept
                case ["qdisc", "del", "dev", interface, "ingress"]:
                    kept = [q for q in self.qdiscs[interface] if q["kind"] != "ingress"]
                    self.qdiscs[interface] = kept
                case ["link", "set", *_] | ["filter", *_]:
                    pass
                case other:
                    raise AssertionError(other)
        return ""

    def state(self) -> dict[str, list[str]]:
        return {name: [q["kind"] for q in all_] for name, all_ in self.qdiscs.items()}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(traffic, "_run", made.run)
    monkeypatch.setattr(traffic, "if_nametoindex", made.index)
    monkeypatch.setattr(traffic, "has_root_qdisc", made.has_root_qdisc)
    return made


def test_taps_with_long_names_have_an_ifb_each(kernel: Kernel) -> None:
    for tap in (A, B):
        kernel.add(tap)
        control([tap, "set", f"{LOSS}\n{LOSS}"])
    both = kernel.state()
    assert both == {
        A: ["ingress", "netem"],
        "pvifb100": ["netem"],
        B: ["ingress", "netem"],
        "pvifb102": ["netem"],
    }
    control([B, "set", "\n"])
    assert kernel.state() == {name: both[name] if name != B else [] for name in (A, "pvifb100", B)}
    kernel.add("t" * 15, 0x7FFFFFFF)
    control(["t" * 15, "set", f"\n{LOSS}"])
    assert max(map(len, kernel.numbers)) == 15, "IFNAMSIZ - 1"


def test_an_ifb_of_the_users_stays_with_its_ingress(kernel: Kernel) -> None:
    """Whatever its name."""
    kernel.add("tap0")
    for ifb in ("ifb-tap0", "pvifb100"):
        kernel.add(ifb)
        kernel.qdiscs["tap0"].clear()
        kernel.qdisc("tap0", "ingress")
        before = kernel.state()
        with pytest.raises(UsageError, match="of somebody else's"):
            control(["tap0", "set", f"{LOSS}\n{LOSS}"])
        assert kernel.state() == before


@pytest.mark.parametrize("broken", ["netem", "ingress", "mirred", "handle 7076: netem", " up"])
def test_a_failure_leaves_nothing(kernel: Kernel, broken: str) -> None:
    kernel.add("tap0")
    kernel.broken = (broken,)
    with pytest.raises(HostError, match="refused"):
        control(["tap0", "set", f"{LOSS}\n{LOSS}"])
    assert kernel.state() == {"tap0": []}


def test_a_program_that_does_not_end_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "tc"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(traffic, "program", lambda name: str(slow))
    monkeypatch.setattr(traffic, "PATIENCE_S", 0.2)
    with pytest.raises(HostError, match=r"^tc has not ended after 0\.2 s: -s -j qdisc show; "):
        control(["lo", "look", ""])


@pytest.mark.parametrize("left", [f"{LOSS}\n", f"\n{LOSS}", f"{LOSS}\n{LOSS}"])
def test_what_a_killed_machine_left_is_taken_away(kernel: Kernel, left: str) -> None:
    """And if nothing is there, no program is run."""
    kernel.add("tap0")
    control(["tap0", "set", left])
    control(["tap0", "set", "\n"])
    assert kernel.state() == {"tap0": []}
    kernel.qdisc("tap0", "root", "handle", "1:", "prio")
    kernel.ran.clear()
    control(["tap0", "set", "\n"])
    assert kernel.state() == {"tap0": ["prio"]} and not kernel.ran


#: What tbf does, which more kernels have than netem.
BUCKET = {"rate": 1_000_000, "burst": 3000, "queue": 10}


def on_this_kernel(body: Callable[[], list[str]], *more: str) -> list[str]:
    """Run ``body`` as root in a network namespace with the tap ``t0``, up; skip without tc or tbf.

    :param more: words for ``ip tuntap add``.
    """

    def inside() -> tuple[list[str], list[int]]:
        if os.geteuid():
            userns.become_root()
        userns.unshare(lib.CLONE_NEWNET)
        try:
            shown("ip", "tuntap", "add", "t0", "mode", "tap", "vnet_hdr", *more)
            shown("ip", "link", "set", "t0", "up")
            Tc("t0", None).set({"rx": Shape(BUCKET)})
            Tc("t0", None).set({})
        except (OSError, HostError, subprocess.CalledProcessError) as e:
            return [f"no tc or no tbf: {e}"], []
        return ["", *body()], []

    (why, *words), _ = netns._in_child(inside)
    if why:
        pytest.skip(why)
    return words


def shown(*argv: str) -> str:
    """The output of a program."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def test_a_card_takes_its_tap_without_old_faults() -> None:
    def body() -> list[str]:
        index = if_nametoindex("t0")
        assert not has_root_qdisc(index, ROOT)
        Tc("t0", None).set({"rx": Shape(BUCKET)})
        assert has_root_qdisc(index, ROOT) and not has_root_qdisc(index, ROOT + 1)
        Uplink(Net.parse("emulated,tap=t0"), None).close()
        assert not has_root_qdisc(index, ROOT)
        return []

    on_this_kernel(body)


def test_a_tap_with_several_queues() -> None:
    """Its own root is mq, by the kernel's choice, and comes back. One that the user has chosen is
    the user's, and stays.
    """

    def body() -> list[str]:
        tap = Tap("t0", queues=2)
        before = shown("tc", "qdisc", "show", "dev", "t0")
        Tc("t0", None).set({"rx": Shape(BUCKET)})
        during = shown("tc", "qdisc", "show", "dev", "t0")
        Tc("t0", None).set({})
        after = shown("tc", "qdisc", "show", "dev", "t0")
        shown("tc", "qdisc", "add", "dev", "t0", "root", "handle", "1:", "mq")
        mine = shown("tc", "qdisc", "show", "dev", "t0")
        try:
            Tc("t0", None).set({"rx": Shape(BUCKET)})
            refused = ""
        except UsageError as e:
            refused = str(e)
        assert shown("tc", "qdisc", "show", "dev", "t0") == mine
        tap.close()
        return [before, during, after, refused]

    before, during, after, refused = on_this_kernel(body, "multi_queue")
    assert "qdisc mq 0: root" in before and before.count("parent :") > 1
    assert f"qdisc tbf {ROOT:x}: root" in during and "mq" not in during
    assert after == before
    assert refused == "t0 has a qdisc of somebody else's: mq; as root: tc qdisc del dev t0 root"


def test_fewer_queues_throw_away_what_waits() -> None:
    """The kernel does so, and tells nobody: seen by a look before and one after."""

    def body() -> list[str]:
        tap = Tap("t0", queues=2, address="10.0.0.1/24")
        shown("ip", "neigh", "add", "10.0.0.2", "lladdr", "52:54:00:00:00:01", "dev", "t0")
        faults = TapFaults(tap, None)
        faults.set(of_text(["rx rate=1kbit burst=3000"]))
        with socket(AF_INET, SOCK_DGRAM) as s:
            for _ in range(10):
                s.sendto(bytes(1000), ("10.0.0.2", 9))
        told = []
        for _ in range(2):
            faults.look()
            told.append(json.dumps([faults.counters(), faults.report()["waiting"]]))
            tap.set_queues(1)
        faults.close()
        tap.close()
        return told

    before, after = (json.loads(word) for word in on_this_kernel(body, "multi_queue"))
    seen = before[0]["rx_fault_frames"]
    assert before[1]["rx"] > 0 and seen >= 10 and "rx_fault_cleared" not in before[0]
    assert after[0]["rx_fault_cleared"] > 0 and after[0]["rx_fault_frames"] >= seen


#: Prints what a user hears who runs machines with faults for each way, and one without.
ASK = """
from pyvmm.card.uplink import Uplink
from pyvmm.errors import NetForbidden
from pyvmm.netopt import Net
for fault in (",fault=rx+rate=1mbit+burst=3000", ",fault=tx+rate=1mbit+burst=3000", ""):
    try:
        Uplink(Net.parse(f"vhost-net,tap=t0{fault}"), None).close()
    except NetForbidden as e:
        print(e)
"""


def test_an_ordinary_user_is_told_who_may() -> None:
    """At a tap that root has made for the user."""

    def body() -> list[str]:
        argv = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", ASK]
        clean = shown(*argv)
        Tc("t0", None).set({"rx": Shape(BUCKET)})
        left = shown(*argv)
        assert has_root_qdisc(if_nametoindex("t0"), ROOT)
        return [clean, left]

    clean, left = on_this_kernel(body, "user", "0")
    need = (
        "faults on demand at tap t0 need root: {}: Operation not permitted; run as root; "
        "or use --net emulated; or leave out tap="
    )
    assert clean.splitlines() == [need.format("tc"), need.format("ip")]
    still = (
        "tap t0 still has faults on demand, and you may not take them away: tc: Operation not "
        "permitted; as root: tc qdisc del dev t0 root"
    )
    assert left.splitlines() == [still] * 3


class FakeTap:
    name, mtu = "tap0", 1500


@pytest.fixture
def faults(kernel: Kernel) -> TapFaults:
    kernel.add("tap0")
    return TapFaults(cast("Tap", FakeTap()), None)


def test_a_failure_before_the_kernel_changed_is_made_good(
    kernel: Kernel, faults: TapFaults
) -> None:
    """By ``off``, and by the end."""
    ends: list[Callable[[], None]] = [lambda: faults.set([]), faults.close]
    for end in ends:
        faults.set(of_text(["both loss=50%"]))
        kernel.broken = ("qdisc del",)
        with pytest.raises(HostError, match="refused"):
            faults.set(of_text(["rx loss"]))
        assert not faults.active and kernel.state()["tap0"]
        kernel.broken = ()
        end()
        assert kernel.state() == {"tap0": []}


def test_a_refused_change_counts_nothing_twice(kernel: Kernel, faults: TapFaults) -> None:
    faults.set(of_text(["rx loss=50%"]))
    kernel.qdiscs["tap0"][0].update(packets=3, drops=4, qlen=2)
    faults.look()
    before, report = faults.counters(), faults.report()
    assert before == {"rx_fault_frames": 9, "rx_fault_loss": 4}
    kernel.qdisc("tap0", "ingress")
    for _ in range(2):
        with pytest.raises(UsageError, match="somebody else's"):
            faults.set(of_text(["rx loss"]))
        faults.look()
        assert (faults.counters(), faults.report()) == (before, report) and faults.active
    kernel.qdiscs["tap0"].pop()
    faults.close()
    assert faults.counters() == {**before, "rx_fault_cleared": 2}


def test_what_the_kernel_throws_away_was_seen(kernel: Kernel, faults: TapFaults) -> None:
    """When the guest uses fewer queue pairs: no counter goes back."""
    faults.set(of_text(["rx delay=1s"]))
    queue = kernel.qdiscs["tap0"][0]
    queue.update(packets=2, qlen=8)
    faults.look()
    assert faults.counters() == {"rx_fault_frames": 10, "rx_fault_full": 0}
    queue.update(packets=3, qlen=0)
    for _ in range(2):
        faults.look()
        told = {"rx_fault_frames": 10, "rx_fault_full": 0, "rx_fault_cleared": 7}
        assert faults.counters() == told
    queue.update(packets=3, qlen=2)
    faults.close()
    assert faults.counters() == told | {"rx_fault_frames": 12, "rx_fault_cleared": 9}


def test_the_trace_has_what_was_counted_between_two_looks(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not more: tc knows no moment. Looks in quick succession share a step. What a change throws
    away is in the step of the rules before.
    """
    now = [APART_NS]
    clock = SimpleNamespace(monotonic_ns=lambda: now[0])
    monkeypatch.setattr("pyvmm.card.traffic.time", clock)
    kernel.add("tap0")
    recorder = Recorder(1)
    faults = TapFaults(cast("Tap", FakeTap()), None, recorder.scope("net0"))
    faults.set(of_text(["both loss=50%"]))

    def look(after: int) -> None:
        now[0] += after
        faults.look()

    look(APART_NS)  # when nothing has come
    kernel.qdiscs["tap0"][1].update(packets=1)
    look(APART_NS - 1)
    assert not recorder.steps()[0] and faults.counters()["rx_fault_frames"] == 1
    kernel.qdiscs["tap0"][1].update(packets=3, drops=4)
    look(1)
    look(APART_NS)
    kernel.qdiscs["tap0"][1].update(packets=5, drops=4)
    kernel.qdiscs["pvifb100"][0].update(packets=1, qlen=2)
    now[0] += 1
    faults.set(of_text(["rx delay=1ms"]))
    kernel.qdiscs["tap0"][-1].update(qlen=3)
    now[0] += 1
    faults.close()
    steps, _ = recorder.steps()
    recorder.close()
    assert [step[:2] for step in steps] == [("net0", "faults by tc")] * 4
    words = {"rules": "both loss=50%"}
    assert [step[4] for step in steps] == [
        {"way": "rx", "frames": 7, "loss": 4, **words},
        {"way": "rx", "frames": 2, **words},
        {"way": "tx", "frames": 3, "cleared": 2, **words},
        {"way": "rx", "frames": 3, "cleared": 3, "rules": "rx delay=1ms"},
    ]
    second = APART_NS
    assert [step[2:4] for step in steps] == [
        (2 * second, 3 * second),
        *[(4 * second, 4 * second + 1)] * 2,
        (4 * second + 1, 4 * second + 2),
    ]


def test_counters_do_not_wait_for_tc(
    kernel: Kernel, faults: TapFaults, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.set(of_text(["rx loss=50%"]))
    inside, go_on = threading.Event(), threading.Event()

    def run(*argv: str, lines: str = "") -> str:
        inside.set()
        assert go_on.wait(PATIENCE)
        return kernel.run(*argv, lines=lines)

    monkeypatch.setattr(traffic, "_run", run)
    asks = [threading.Thread(target=faults.look, daemon=True)]
    asks[0].start()
    try:
        assert inside.wait(PATIENCE)
        reader = threading.Thread(
            target=lambda: (faults.counters(), faults.report(), faults.active), daemon=True
        )
        asks.append(reader)
        reader.start()
        reader.join(PATIENCE)
        assert not reader.is_alive() and asks[0].is_alive()
    finally:
        go_on.set()
        for thread in asks:
            thread.join(PATIENCE)
