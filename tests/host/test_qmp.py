"""Machines under control of their socket: bare-metal guests stopped, continued, reset and ended;
nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm import Machine, Net
from pyvmm.control.client import Client, connect
from pyvmm.control.registry import machines
from pyvmm.datapath.base import cpu_ns
from pyvmm.errors import ControlError, HostError, MachineMissing, UsageError
from tests.host.names import reachable

Guest = Callable[[str], str]
PATIENCE = 60.0
BUSY = "how=hang"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own; empty at the end."""
    path = Path(f"/tmp/qh{os.getpid()}")
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    where = path / "pyvmm" / "machines"
    left = list(where.iterdir()) if where.exists() else []
    subprocess.run(["rm", "-rf", str(path)], check=True)
    assert not left


@pytest.fixture
def vm(guest: Guest) -> Iterator[Machine]:
    """Two vCPUs, one of which computes for ever."""
    with Machine(
        guest("reset"), memory="4M", cpus=2, append=BUSY, qmp="auto", name="busy"
    ) as machine:
        machine.start()
        machine.stdout.expect("reset: by hang", PATIENCE)
        yield machine


@pytest.fixture
def client(vm: Machine) -> Iterator[Client]:
    with connect("busy", timeout=PATIENCE) as c:
        yield c


def busy_ns(vm: Machine) -> int:
    """CPU time of the thread that runs the computing vCPU."""
    return cpu_ns(vm.vcpus[0].thread_id)


def rests(tid: int) -> bool:
    """Whether a thread has come to rest (it says that it will a few instructions earlier). One that
    waits for the interpreter's lock sleeps as well, but goes on as soon as this thread does.
    """
    before = cpu_ns(tid)
    time.sleep(0.05)
    state = Path(f"/proc/self/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S" and cpu_ns(tid) == before


def until(good: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not good():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_stop_and_cont(vm: Machine, client: Client) -> None:
    for _ in range(3):
        assert client.command("query-status") == {
            "status": "running",
            "running": True,
            "singlestep": False,
        }
        before = busy_ns(vm)
        until(lambda before=before: busy_ns(vm) > before)  # type: ignore[misc]
        client.command("stop")
        assert [e["event"] for e in client.events] == ["STOP"]
        assert client.command("query-status") == {
            "status": "paused",
            "running": False,
            "singlestep": False,
        }
        until(lambda: rests(vm.vcpus[0].thread_id))
        before, exits, rip = busy_ns(vm), vm.ledger().total, vm.vcpus[0].registers()["rip"]
        time.sleep(0.2)
        assert busy_ns(vm) == before
        assert vm.ledger().total == exits
        assert vm.vcpus[0].registers()["rip"] == rip
        client.command("stop")  # once more does nothing
        client.command("cont")
        client.command("cont")
        assert client.command("query-name") == {"name": "busy"}
        assert [e["event"] for e in client.events] == ["STOP", "RESUME"]
        client.events.clear()
    assert not vm.resume()


def test_time_spent_paused_is_no_exits(vm: Machine) -> None:
    assert vm.pause()
    begin = sum(line.time for line in vm.ledger().lines)
    time.sleep(0.5)
    vm.resume()
    before = busy_ns(vm)
    until(lambda: busy_ns(vm) > before)
    vm.pause()
    assert sum(line.time for line in vm.ledger().lines) - begin < 400_000_000


def test_statistics_of_a_vcpu_that_never_exits(vm: Machine, client: Client) -> None:
    """KVM_GET_STATS_FD waits for KVM_RUN to return: asked for too late, this would wait for
    ever.
    """
    schemas = {s["target"]: s for s in client.command("query-stats-schemas")}
    assert set(schemas) == {"vm", "vcpu"}
    kinds = {"cumulative", "instant", "peak", "linear-histogram", "log2-histogram"}
    for target, schema in schemas.items():
        assert schema["provider"] == "kvm"
        rows = client.command("query-stats", target=target)
        assert len(rows) == (2 if target == "vcpu" else 1)
        for row in rows:
            assert ("qom-path" in row) == (target == "vcpu")
            values = {s["name"]: s["value"] for s in row["stats"]}
            assert list(values) == [s["name"] for s in schema["stats"]]
            for s in schema["stats"]:
                assert s["type"] in kinds and isinstance(s["exponent"], int)
                assert ("base" in s) == bool(s["exponent"])
                assert isinstance(values[s["name"]], list) == s["type"].endswith("histogram")
    cpus = client.command("query-cpus-fast")
    assert [c["cpu-index"] for c in cpus] == [0, 1] and cpus[0]["thread-id"] == vm.vcpus[
        0
    ].thread_id
    (row,) = client.execute(
        "query-stats",
        {
            "target": "vcpu",
            "vcpus": [cpus[1]["qom-path"]],
            "providers": [{"provider": "kvm", "names": ["exits", "none such"]}],
        },
    )
    assert row["qom-path"] == cpus[1]["qom-path"] and [s["name"] for s in row["stats"]] == ["exits"]
    for bad in (
        {"target": "cryptodev"},
        {"target": "vm", "vcpus": []},
        {"target": "vm", "providers": [1]},
        {"target": "vm", "providers": [{"provider": "kvm", "names": 1}]},
        {"target": "vm", "providers": [{"provider": "cryptodev"}]},
    ):
        with pytest.raises(ControlError):
            client.execute("query-stats", bad)


def test_reset_although_a_reboot_would_end_it(vm: Machine, client: Client) -> None:
    for n in range(1, 4):
        client.command("system_reset")
        assert client.wait_event("RESET")["data"] == {
            "guest": False,
            "reason": "host-qmp-system-reset",
        }
        vm.stdout.expect(rf"(reset: by hang\n){{{n + 1}}}", PATIENCE)
    assert vm.reboots == 3 and vm.outcome is None


def test_reset_of_a_paused_machine_stays_paused(vm: Machine, client: Client) -> None:
    client.command("stop")
    client.command("system_reset")
    client.wait_event("RESET")
    assert client.command("query-status")["status"] == "paused"
    until(lambda: vm.vcpu_threads.parked == 2)
    assert vm.stdout.text.count(b"reset: by hang") == 1
    client.command("cont")
    vm.stdout.expect(r"(reset: by hang\n){2}", PATIENCE)


def test_quit_tells_before_it_goes(vm: Machine, client: Client) -> None:
    client.command("quit")
    data = client.wait_event("SHUTDOWN")["data"]
    assert data == {"guest": False, "reason": "host-qmp-quit", "x-pyvmm-outcome": "stopped"}
    outcome = vm.wait(PATIENCE)
    assert (outcome.kind, outcome.asked) == ("stopped", True)
    assert client.command("query-status")["status"] == "shutdown"
    for command in ("stop", "cont", "system_reset", "system_powerdown", "system_wakeup"):
        with pytest.raises(ControlError, match="has ended"):
            client.command(command)
    assert client.command("x-pyvmm-report")["outcome"]["kind"] == "stopped"
    client.command("quit")
    vm.close()
    with pytest.raises(MachineMissing):
        client.command("query-status")


@contextmanager
def lock_held(vm: Machine) -> Iterator[None]:
    """Another thread holds the I/O lock meanwhile, as a device would that waits for somebody."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with vm.io_lock:
            held.set()
            release.wait(2 * PATIENCE)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(PATIENCE)
    try:
        yield
    finally:
        release.set()
        holder.join()


@pytest.mark.parametrize("how", ["stop", "quit", "time-out", "control socket"])
def test_no_end_waits_for_the_io_lock(vm: Machine, client: Client, how: str) -> None:
    with lock_held(vm):
        begin = time.monotonic()
        if how == "stop":
            vm.stop()
        elif how == "quit":
            vm.quit()
        elif how == "time-out":
            vm.wait(0.1)
        else:
            client.command("quit")
        outcome = vm.wait(PATIENCE)
        assert time.monotonic() - begin < PATIENCE / 2
    assert outcome.kind == ("timeout" if how == "time-out" else "stopped")


def test_resets_that_come_thick_and_fast(vm: Machine, client: Client) -> None:
    """A reset while the machine starts over is the same reset, and no end."""
    begin = time.monotonic()
    while (seconds := time.monotonic() - begin) < 3 or vm.reboots < 2:
        assert seconds < PATIENCE
        vm.reset()
    client.command("query-status")
    assert vm.reboots > 1 and vm.outcome is None


@pytest.mark.parametrize("paused", [False, True])
def test_time_outs_hold_for_a_paused_machine(vm: Machine, paused: bool) -> None:
    if paused:
        vm.pause()
    outcome = vm.wait(0.2)
    assert outcome.kind == "timeout" and len(outcome.rips) == 2


def test_stop_waits_for_no_reader(guest: Guest) -> None:
    """A vCPU that waits for room in a full pipe is not in the guest: pausing works, and goes on
    where it was.
    """
    gate = threading.Event()
    with Machine(
        guest("reset"), memory="4M", append="how=acpi", on_reboot="restart", qmp="auto"
    ) as vm:

        def wait(data: bytes) -> None:
            gate.wait(PATIENCE)

        vm.stdout.add_sink(wait)
        vm.start()
        until(lambda: vm.reboots > 3)
        vm.pause()
        assert vm.state == "paused"
        gate.set()
        before = vm.reboots
        vm.resume()
        until(lambda: vm.reboots > before + 3)


def test_stop_cont_and_reset_race_reboots_and_each_other(guest: Guest) -> None:
    with Machine(
        guest("reset"),
        memory="4M",
        cpus=2,
        append="how=acpi",
        on_reboot="restart",
        qmp="auto",
        name="r",
    ) as vm:
        vm.start()
        errors: list[BaseException] = []

        def nag(*commands: str) -> None:
            try:
                with connect("r", timeout=PATIENCE) as c:
                    for _ in range(15):
                        for command in commands:
                            c.command(command)
            except BaseException as e:
                errors.append(e)

        threads = [
            threading.Thread(target=nag, args=commands)
            for commands in (
                ("stop", "cont"),
                ("system_reset",),
                ("x-pyvmm-ledger", "x-pyvmm-report"),
                ("cont", "stop"),
            )
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors
        vm.resume()
        before = vm.reboots
        until(lambda: vm.reboots > before)
        vm.pause()
        assert vm.wait(0.1).kind == "timeout"


def test_the_end_meets_commands(guest: Guest) -> None:
    """Clients are in the middle of commands while the machine goes."""
    for how in ("poweroff", "acpi", "triple"):
        with Machine(
            guest("reset"), memory="4M", cpus=2, append=f"how={how}", qmp="auto", name="e"
        ) as vm:
            threads = []
            errors: list[BaseException] = []

            def ask(errors: list[BaseException] = errors) -> None:
                try:
                    with connect("e", timeout=PATIENCE) as c:
                        while True:
                            for command in (
                                "stop",
                                "x-pyvmm-ledger",
                                "query-stats-schemas",
                                "cont",
                                "x-pyvmm-report",
                            ):
                                try:
                                    c.command(command)
                                except ControlError as e:
                                    assert "has ended" in str(e)
                except MachineMissing:
                    pass
                except BaseException as e:
                    errors.append(e)

            for _ in range(4):
                threads.append(threading.Thread(target=ask))
                threads[-1].start()
            vm.start()
            assert vm.wait(PATIENCE).kind in ("poweroff", "reboot", "triple-fault")
        for t in threads:
            t.join(PATIENCE)
            assert not t.is_alive()
        assert not errors


def test_before_the_start(guest: Guest) -> None:
    with (
        Machine(
            guest("hello"), memory="2M", cpus=2, append="status=3", qmp="auto", name="new"
        ) as vm,
        connect("new") as c,
    ):
        assert c.command("query-status")["status"] == "prelaunch"
        assert len(c.command("query-cpus-fast")) == 2
        with pytest.raises(ControlError, match="not been started"):
            c.command("system_reset")
        vm.pause()
        vm.start()
        until(lambda: vm.vcpu_threads.parked == 2)
        assert not vm.stdout.text
        c.command("cont")
        outcome = vm.wait(PATIENCE)
        assert (outcome.kind, outcome.status) == ("poweroff", 3)
        event = c.wait_event("SHUTDOWN")
        assert event["data"] == {
            "guest": True,
            "reason": "guest-shutdown",
            "x-pyvmm-outcome": "poweroff",
        }


def test_names(guest: Guest, vm: Machine) -> None:
    assert [e.name for e in machines()] == ["busy"]
    with pytest.raises(UsageError, match="busy is running"):
        Machine(guest("hello"), memory="2M", qmp="auto", name="busy")
    with Machine(guest("hello"), memory="2M") as silent:
        assert silent.name is None and silent.qmp is None
        assert not silent.pause() or silent.resume()


def test_net_commands(guest: Guest) -> None:
    """Cards of a machine whose guest does not drive them."""
    nets = [Net("emulated", mac="52:54:00:12:34:56"), Net("emulated", link="off")]
    with (
        Machine(guest("reset"), memory="4M", append=BUSY, nets=nets, qmp="auto", name="n") as vm,
        connect("n") as c,
    ):
        vm.start()
        first, second = c.command("query-rx-filter")
        assert (
            first["name"] == "net0"
            and first["main-mac"] == "52:54:00:12:34:56"
            and first["promiscuous"]
        )
        assert set(first) >= {
            "multicast",
            "unicast",
            "vlan",
            "broadcast-allowed",
            "vlan-table",
            "unicast-table",
        }
        assert c.command("query-rx-filter", name="net1") == [second]
        c.command("set_link", name="net0", up=False)
        c.command("set_link", name="net1", up=True)
        assert [n["link"] for n in c.command("x-pyvmm-ledger")["nets"]] == [False, True]
        for command in ("query-rx-filter", "set_link"):
            with pytest.raises(ControlError) as raised:
                c.command(command, name="net7", **({"up": True} if command == "set_link" else {}))
            assert raised.value.kind == "DeviceNotFound"
        rings = c.command("x-pyvmm-rings", nic=1)
        assert not rings["active"] and [q["role"] for q in rings["queues"]] == [
            "receive",
            "transmit",
            "control",
        ]
        for bad in (
            {"nic": 2},
            {"nic": -1},
            {"queue": 3},
            {"queue": -1},
            {"chains": 1000},
            {"chains": -1},
        ):
            with pytest.raises(ControlError):
                c.command("x-pyvmm-rings", **bad)
        with pytest.raises(ControlError):
            c.command("x-pyvmm-switch", mode="nonsense")


RUN = [sys.executable, "-m", "pyvmm", "run", "--host", "local", "--memory", "4M", "--net", "none"]


def spawn(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_signals_end_a_paused_run(guest: Guest) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with spawn("--kernel", guest("reset"), "--append", BUSY, "--name", "p") as run:
            until(lambda: reachable("p"))
            with connect("p") as c:
                until(lambda: c.command("query-status")["running"])
                c.command("stop")
                begin = time.monotonic()
                run.send_signal(number)
                assert c.wait_event("SHUTDOWN")["data"]["reason"] == "host-signal"
            assert run.wait(PATIENCE) == 128 + number
            assert time.monotonic() - begin < PATIENCE / 2  # a tenth of a second
        assert not machines()


def test_run_quits_and_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with spawn("--kernel", guest("reset"), "--append", BUSY, "--qmp", path) as run:
        until(lambda: reachable(path))
        with connect(path) as c:
            until(lambda: c.command("query-status")["running"])
            assert [(e.name, e.pid, e.path) for e in machines()] == [("vm0", run.pid, path)]
            c.command("quit")
        assert run.wait(PATIENCE) == 0
    assert not machines() and not os.access(path, os.F_OK)


def test_run_without_a_socket(guest: Guest, runtime: Path) -> None:
    done = subprocess.run(
        [*RUN, "--kernel", guest("hello"), "--qmp", "none"], capture_output=True, check=True
    )
    assert done.returncode == 0 and not (runtime / "pyvmm").exists()
    bad = subprocess.run(
        [*RUN, "--kernel", guest("hello"), "--qmp", "none", "--name", "x"], capture_output=True
    )
    assert bad.returncode == 2 and b"has no name" in bad.stderr


def test_a_killed_run_is_noticed(guest: Guest) -> None:
    with spawn("--kernel", guest("reset"), "--append", BUSY, "--name", "k") as run:
        until(lambda: bool(machines()))
        run.kill()
    assert not machines()
    with pytest.raises(MachineMissing):
        connect("k")


def test_qmp_shell(vm: Machine) -> None:
    """The shell of the PyPI library, unchanged."""
    shell = str(Path(sys.executable).parent / "qmp-shell")
    script = (
        "query-status\nstop\nquery-status\nquery-stats target=vcpu\nnone-such\n"
        "set_link name=net0 up=true\nquit\n"
    )
    done = subprocess.run(
        [shell, str(vm.qmp)], input=script, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done
    assert "Connected to QEMU" in done.stdout and '"status": "paused"' in done.stdout
    assert (
        '"class": "CommandNotFound"' in done.stdout and '"class": "DeviceNotFound"' in done.stdout
    )
    assert vm.wait(PATIENCE).kind == "stopped"


LIBRARY = """
import asyncio, sys
from qemu.qmp import ExecuteError, QMPClient

async def main():
    qmp = QMPClient("test")
    await qmp.connect(sys.argv[1])
    with qmp.listener(("STOP", "RESUME")) as listener:
        assert (await qmp.execute("query-status"))["running"]
        await qmp.execute("stop")
        assert (await listener.get())["event"] == "STOP"
        try:
            await qmp.execute("none-such")
        except ExecuteError as e:
            assert e.error_class == "CommandNotFound"
        asked = (qmp.execute("query-stats", {"target": "vm"}) for _ in range(20))
        results = await asyncio.gather(*asked)
        assert len(results) == 20
        await qmp.execute("cont")
        assert (await listener.get())["event"] == "RESUME"
    await qmp.disconnect()

asyncio.run(main())
"""


def test_the_library_of_qemu(vm: Machine) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(vm.qmp)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


def test_pausing_an_ended_machine(guest: Guest) -> None:
    with Machine(guest("hello"), memory="2M") as vm:
        vm.start()
        vm.wait(PATIENCE)
        for method in (vm.pause, vm.resume, vm.reset, vm.powerdown):
            with pytest.raises(HostError, match="has ended"):
                method()
