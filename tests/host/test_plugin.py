"""The pytest plugin, by pytest sessions of its own over real guests (bare-metal ones; tests/boot
has Linux).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 180.0  # seconds


class Session:
    """A pytest session in ``directory`` with ``text`` as its tests."""

    def __init__(self, directory: Path, text: str, *args: str, ini: str = "") -> None:
        (directory / "test_it.py").write_text("import pytest\n" + text)
        (directory / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        self.junit = directory / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--junitxml={self.junit}",
            "-v",
            *args,
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            command,
            cwd=directory,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        self.status, self.out = done.returncode, done.stdout + done.stderr

    def outcomes(self) -> dict[str, str]:
        """Test -> ``passed``, ``failure``, ``error`` or ``skipped``, from JUnit."""
        cases = ET.parse(self.junit).getroot().iter("testcase")
        return {
            str(c.get("name")): next(
                (e.tag for e in c if e.tag in ("failure", "error", "skipped")), "passed"
            )
            for c in cases
        }


def test_guest_by_marker(guest: Guest, tmp_path: Path) -> None:
    """The marker says what `vm` is; the nearest one wins, key by key."""
    text = f"""
pytestmark = pytest.mark.pyvmm(kernel={guest("smp")!r}, cpus=3, memory="16M")

def test_three(vm):
    assert vm.wait(60).status == 0
    assert b"smp: 3 cpus" in vm.stdout.text

@pytest.mark.pyvmm(cpus=2, append="cpus=2")
def test_two(vm):
    assert vm.wait(60).status == 0
    assert b"smp: 2 cpus" in vm.stdout.text and "cpus=2" in vm.cmdline()

def test_more(machine_factory):
    vms = [machine_factory(kernel={guest("hello")!r}, append=f"status={{i}}") for i in range(3)]
    assert [vm.wait(60).status for vm in vms] == [0, 1, 2]
"""
    session = Session(tmp_path, text)
    assert session.status == 0, session.out
    assert session.outcomes() == {
        "test_three": "passed",
        "test_two": "passed",
        "test_more": "passed",
    }


def test_failing_test_has_console_and_exits(guest: Guest, tmp_path: Path) -> None:
    text = f"""
@pytest.mark.pyvmm(kernel={guest("hello")!r})
def test_it(vm):
    assert vm.wait(60).status == 1

@pytest.mark.pyvmm(kernel={guest("hello")!r})
def test_good(vm):
    assert vm.wait(60).status == 0
"""
    session = Session(tmp_path, text)
    assert session.status == 1
    assert session.outcomes() == {"test_it": "failure", "test_good": "passed"}
    assert session.out.count("pyvmm console of vm (poweroff)") == 1, session.out
    assert "hello, console" in session.out
    exits = session.out.partition("pyvmm exits of vm")[2]
    assert re.search(r"\d+ exits to the VMM\n +\d+  pio write 0x[0-9a-f]+/\d \S.*\n", exits), exits


def test_exits_within(guest: Guest, tmp_path: Path) -> None:
    """`exits` makes a known number of each kind (guest/README.md), 110 of them to memory."""
    text = f"""
@pytest.mark.pyvmm(kernel={guest("exits")!r}, start=False)
@pytest.mark.parametrize(("limits", "good"), [
    (dict(user_exits=400, pio=300, mmio=110), True),
    (dict(mmio=110), True), (dict(mmio=109), False),
    (dict(user_exits=100), False), (dict(notify=0), True),
    ({{"exits[guest-control]": 2}}, True), ({{"exits[guest-control]": 1}}, False),
])
def test_it(vm, limits, good):
    vm.start()
    assert vm.wait(60).status == 0
    if good:
        vm.exits.assert_within(**limits)
        return
    said = "it is .*\\nmost frequent:\\n +64  pio write 0x1234/1 nobody"
    with pytest.raises(AssertionError, match=said):
        vm.exits.assert_within(**limits)

@pytest.mark.pyvmm(
    kernel={guest("pcinet")!r}, net="emulated,notify=exit", append="count=100 irq=msix", start=False
)
def test_per_packet(vm):
    vm.start()
    assert vm.wait(60).status == 0
    counts = vm.exits.counts()
    assert counts["packets"] >= 200 and counts["notify"] >= 100 and counts["interrupts"] > 0
    vm.exits.assert_within("packets>=200", f"exits[net0 queue 1 notify]<={{counts['notify']}}")
    from pyvmm.errors import UsageError
    with pytest.raises(UsageError, match="nothing is called 'exists'"):
        vm.exits.assert_within(exists=3)
    vm.exits.assert_within(notify_per_kpacket=1100)
    with pytest.raises(AssertionError, match="notify_per_kpacket<=100: it is"):
        vm.exits.assert_within(notify_per_kpacket=100)
    with vm.exits:
        vm.exits.assert_within(user_exits=0)
        with pytest.raises(AssertionError, match="there were no packets"):
            vm.exits.assert_within(notify_per_kpacket=0)
"""
    session = Session(tmp_path, text)
    assert session.status == 0, session.out


def test_a_kernel_that_reports_trouble_fails(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(
        "[    0.5] x\nWARNING: CPU: 0 PID: 1 at kernel/foo.c:12 foo+0x10/0x20\n bar+0x1\n"
    )
    text = f"""
@pytest.mark.pyvmm(kernel={guest("talk")!r}, initrd={str(tmp_path / "text")!r}, fail_on="warning")
def test_it(vm):
    vm.wait(60)
"""
    session = Session(tmp_path, text)
    assert session.status == 1
    assert (
        "pyvmm: the guest kernel reported warning:\nWARNING: CPU: 0 PID: 1 at kernel/foo.c:12"
        in session.out
    )


def test_hang_is_named(guest: Guest, tmp_path: Path) -> None:
    text = f"""
@pytest.mark.pyvmm(kernel={guest("reset")!r}, append="how=halt", hang_timeout=0.5)
def test_it(vm):
    assert vm.wait(60).kind == "poweroff"
"""
    session = Session(tmp_path, text)
    assert session.status == 1
    assert "pyvmm exits of vm" in session.out and "'hang' == 'poweroff'" in session.out


def test_list_of_kernels_under_xdist(guest: Guest, tmp_path: Path) -> None:
    """Each test once a kernel, but for those whose marker names one."""
    text = f"""
def test_kernel(vm):
    assert vm.wait(60).status == 0

@pytest.mark.pyvmm(kernel={guest("timer")!r})
def test_own(vm):
    assert vm.wait(60).status == 0 and b"timer:" in vm.stdout.text

def test_none():
    pass
"""
    kernels = ("--pyvmm-kernel", guest("hello"), "--pyvmm-kernel", guest("smp"))
    session = Session(tmp_path, text, *kernels, "-n", "2")
    assert session.status == 0, session.out
    assert set(session.outcomes()) == {
        "test_kernel[hello.elf]",
        "test_kernel[smp.elf]",
        "test_own",
        "test_none",
    }


def test_scope(guest: Guest, tmp_path: Path) -> None:
    """A `vm` of a module is one for all its tests, also in the reports of those that fail."""
    text = f"""
pytestmark = pytest.mark.pyvmm(kernel={guest("serial")!r}, append="echo=1")

def test_one(vm):
    vm.stdout.expect("ready", 60)
    vm.console.send("one")
    vm.console.expect("one", 60)

def test_two(vm):
    vm.console.send("two")
    vm.console.expect("onetwo", 60)
    assert False

def test_three(vm):
    vm.console.send("q")
    assert vm.wait(60).kind == "poweroff"
"""
    session = Session(tmp_path, text, ini="pyvmm_scope = module")
    assert session.outcomes() == {
        "test_one": "passed",
        "test_two": "failure",
        "test_three": "passed",
    }, session.out
    assert "pyvmm console of vm (running)" in session.out and "onetwo" in session.out


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('kernel="no-such-image/x"', "no-such-image/x' cannot be opened"),
        ('memory="lots"', "write 256M, 4G or 1T"),
        ("speed=3", "pyvmm(speed=...): it takes add, append, command, cpu"),
        ('add=["nothing:/x"]', "nothing': No such file"),
        ('modules="nothing"', "nothing' cannot be read"),
        ('net="bridge"', "unknown mode 'bridge'"),
        ('fail_on="ooops"', "ooops"),
    ],
)
def test_bad_markers(guest: Guest, tmp_path: Path, mark: str, said: str) -> None:
    text = f"""
pytestmark = pytest.mark.pyvmm(kernel={guest("hello")!r})

@pytest.mark.pyvmm({mark})
def test_it(vm):
    pass
"""
    session = Session(tmp_path, text)
    assert session.outcomes() == {"test_it": "error"}
    assert said in session.out and "Traceback" not in session.out


def test_linux_where_there_is_none(tmp_path: Path) -> None:
    """On a host whose KVM runs no Linux the way out is told; nothing hangs, nothing is skipped in
    silence.
    """
    from pyvmm.doctor import can_run_linux_locally

    if can_run_linux_locally()[0]:
        pytest.skip("this host's KVM runs Linux")
    session = Session(tmp_path, "def test_it(vm): pass")
    assert session.outcomes() == {"test_it": "error"}
    assert "pytest --pyvmm-host testbed" in session.out


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    """Neither pyvmm's parts nor the C extension are loaded."""
    text = """
import sys

def test_it():
    loaded = {m for m in sys.modules if m.startswith("pyvmm.")}
    assert loaded == {"pyvmm.testing", "pyvmm.testing.plugin"}
"""
    assert Session(tmp_path, text).status == 0


def test_bad_configuration(tmp_path: Path) -> None:
    session = Session(tmp_path, "def test_it(): pass", ini="pyvmm_scope = forever")
    assert (
        session.status == 4 and "pyvmm_scope = forever: use one of function, class" in session.out
    )


def test_a_session_that_is_confined(guest: Guest, tmp_path: Path) -> None:
    """It can still report, but write no file."""
    (tmp_path / "test_it.py").write_text(f"""
import pytest

@pytest.mark.pyvmm(kernel={guest("hello")!r}, sandbox="on")
def test_it(vm):
    assert vm.wait(60).kind == "poweroff"
    assert vm.sandbox == "on"
    with pytest.raises(PermissionError):
        open("file", "w")
""")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done
