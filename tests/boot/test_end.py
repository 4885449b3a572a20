"""How guests end, orderly and not: exit statuses, output, and what is said."""

from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest

from pyvmm.images import find
from tests.boot.guest import Guest, check_traffic, run_all

if TYPE_CHECKING:
    from pathlib import Path

    from tests.boot.guest import Host, Run

pytestmark = pytest.mark.usefixtures("nothing_left")

#: All 256 bytes, without a fork.
ALL_BYTES = (
    'i=0; while [ $i -lt 256 ]; do printf "\\\\$((i/64))$((i/8%8))$((i%8))"; i=$((i+1)); done'
)
CODE = 0x10_0000


def bare_metal(path: Path, code: str) -> str:
    """An ELF kernel whose 64-bit entry is the machine code ``code`` (hexadecimal), at ``CODE``."""
    text = bytes.fromhex(code)
    offset = 64 + 56
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, CODE, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, offset, CODE, CODE, len(text), len(text), 1)
    path.write_bytes(header + segment + text)
    return str(path)


def test_status_and_output_of_commands(host: Host) -> None:
    """The command's status is ours; its stdout and stderr come apart and unchanged."""
    runs = run_all(
        host,
        {
            "output": [
                "--",
                "sh",
                "-c",
                f"{ALL_BYTES}; ({ALL_BYTES}; echo error) >&2; seq 20000; exit 5",
            ],
            "missing": ["--", "/no/such/command"],
            "killed": ["--", "sh", "-c", "kill -9 $$"],
            "poweroff": ["--", "sh", "-c", "poweroff -f; sleep 100"],
        },
        "--net",
        "none",
    )
    output = runs["output"]
    assert output.status == 5
    numbers = "".join(f"{i}\n" for i in range(1, 20001)).encode()
    assert bytes(output.stdout) == bytes(range(256)) + numbers
    assert bytes(output.stderr) == bytes(range(256)) + b"error\n"
    assert output.report["outcome"] == {"kind": "poweroff", "status": 5, "detail": ""}
    assert runs["missing"].status == 127
    assert "cannot run '/no/such/command': No such file" in runs["missing"].err
    assert runs["killed"].status == 128 + 9
    assert runs["killed"].err == ""
    assert runs["poweroff"].status == 119
    assert "the guest powered off before the command ended" in runs["poweroff"].err


def with_junit(runs: dict[str, list[str]], directory: Path) -> dict[str, list[str]]:
    """The same, each with a JUnit file of its name."""
    return {name: ["--junit", str(directory / f"{name}.xml"), *args] for name, args in runs.items()}


def check_junit(directory: Path, name: str, kind: str, text: str) -> None:
    """One error of that kind, whose message and output are those of the run."""
    root = ET.parse(directory / f"{name}.xml").getroot()
    error = root.find("testsuite/testcase/error")
    assert error is not None and error.get("type") == kind
    assert text in error.get("message", "")
    assert root.get("errors") == "1"


def test_reboot_panic_and_triple_fault(host: Host, tmp_path: Path) -> None:
    """Each has its status and is named; a panic's message is shown."""
    image = find("default")
    wanted = {
        "reboot": ["--", "reboot", "-f"],
        "no root": ["--kernel", image.kernel, "--append", "quiet"],
        "init": ["--append", "pyvmm.panic=init"],
        "sysrq": ["--", "sh", "-c", "echo c >/proc/sysrq-trigger"],
        "triple": ["--append", "reboot=t", "--", "reboot", "-f"],
    }
    runs = run_all(
        host,
        with_junit(wanted, tmp_path),
        "--net",
        "none",
    )
    last = {name: run.err.splitlines()[-1] for name, run in runs.items()}
    assert runs["reboot"].status == 121
    assert "the guest rebooted" in last["reboot"]
    for name, text in (
        ("no root", "VFS: Unable to mount root fs"),
        ("init", "Attempted to kill init!"),
        ("sysrq", "sysrq triggered crash"),
    ):
        assert runs[name].status == 120, runs[name]
        assert "the guest kernel panicked" in last[name]
        assert text in last[name]
        assert runs[name].report["outcome"]["kind"] == "panic"
        check_junit(tmp_path, name, "panic", text)
    check_junit(tmp_path, "reboot", "reboot", "rebooted")
    check_junit(tmp_path, "triple", "triple-fault", "triple-faulted")
    assert runs["triple"].status == 122
    assert "triple-faulted" in last["triple"]
    check_registers(runs["triple"])


def check_registers(run: Run) -> None:
    """They are shown, unless they are those after reset: the testbed has an AMD processor."""
    known = bool(re.search(r"rip [0-9a-f]{16}", run.err))
    assert known != ("whose registers KVM has reset" in run.err), run
    assert "000000000000fff0" not in run.err


def test_ends_without_linux(host: Host, tmp_path: Path) -> None:
    """A hang with interrupts off, a halt for good, a triple fault, an instruction that KVM cannot
    run: all end, with registers.
    """
    kernels = {
        # cli; jmp .
        "spin": ("fa ebfe", "4"),
        # cli; hlt; jmp .
        "halt": ("fa f4 ebfe", "4"),
        # lidt [empty]; ud2
        "triple": ("0f011d02000000 0f0b 00000000000000000000", "120"),
        # mov eax, 0xd0000000; jmp rax: into the PCI window, where nothing is
        "nowhere": ("b8000000d0 ffe0", "120"),
    }
    runs = run_all(
        host,
        {
            name: ["--kernel", bare_metal(tmp_path / name, code), "--timeout", limit]
            for name, (code, limit) in kernels.items()
        },
        "--net",
        "none",
    )
    assert {name: run.status for name, run in runs.items()} == {
        "spin": 124,
        "halt": 124,
        "triple": 122,
        "nowhere": 123,
    }
    for run in runs.values():
        check_registers(run)
        assert len(run.err.splitlines()[-1]) < 200
    assert f"rip {CODE + 1:016x}" in runs["spin"].err
    assert "the guest did not end in time: 4 s are over" in runs["spin"].err
    assert f"rip {0xD0000000:016x}" in runs["nowhere"].err
    assert "internal_error" in runs["nowhere"].err


def test_timeout_while_linux_boots_and_hangs(host: Host) -> None:
    """--timeout ends the kernel's boot, and a command that takes too long."""
    runs = run_all(
        host,
        {
            "boot": ["--timeout", "1", "--", "true"],
            "command": ["--timeout", "60", "--", "sh", "-c", "echo started; sleep 1000"],
        },
    )
    for run in runs.values():
        assert run.status == 124
        assert "did not end in time" in run.err
        assert run.report["outcome"]["kind"] == "timeout"
    assert runs["boot"].out == ""
    assert runs["command"].out == "started\n"


def test_panics_early_and_without_a_console(host: Host, tmp_path: Path) -> None:
    """Before the console driver there is the early console; without any console there is pvpanic;
    without init there is neither a hang nor silence."""
    crash = "echo c >/proc/sysrq-trigger"
    wanted = {
        # The memory that the kernel may use does not hold its initrd.
        "early": ["--append", "mem=20M", "--", "true"],
        "pvpanic": ["--", "sh", "-c", f"echo N >/sys/class/tty/ttyS0/console; {crash}"],
        "no init": ["--append", "rdinit=/no/such/init", "--", "true"],
    }
    runs = run_all(host, with_junit(wanted, tmp_path), *("--net", "none", "--timeout", "120"))
    for name, text in (
        ("early", "panicked: Kernel panic - not syncing: "),
        ("pvpanic", "panicked: reported by pvpanic"),
        ("no init", "VFS: Unable to mount root fs"),
    ):
        assert runs[name].status == 120, runs[name]
        assert text in runs[name].err.splitlines()[-1], runs[name]
        check_junit(tmp_path, name, "panic", text)
    assert "init" not in runs["early"].report["phases_s"]
    assert "command" in runs["pvpanic"].report["phases_s"]


def test_linux_hangs_or_only_sleeps(host: Host) -> None:
    """`halt -f` leaves all processors halted with interrupts off; a sleeping guest, and one that
    computes, are well.
    """
    runs = run_all(
        host,
        {
            "halt": ["--hang-timeout", "3", "--", "halt", "-f"],
            "sleep": ["--hang-timeout", "3", "--", "sleep", "8"],
            "compute": [
                "--hang-timeout",
                "3",
                "--",
                "sh",
                "-c",
                "timeout 8 sh -c 'while :; do :; done'; exit 5",
            ],
        },
        *("--cpus", "2", "--net", "none", "--timeout", "120"),
    )
    assert runs["halt"].status == 116, runs["halt"]
    assert (
        "vCPU 0 halted with interrupts off; vCPU 1 halted with interrupts off, "
        "while the command ran" in runs["halt"].err
    )
    assert runs["sleep"].status == 0, runs["sleep"]
    assert runs["compute"].status == 5, runs["compute"]


@pytest.mark.parametrize("options", [[], ["--append", "pci=nomsi"]], ids=["msix", "intx"])
def test_restart(host: Host, options: list[str]) -> None:
    """With --on-reboot restart the guest comes up again, with a working network, several times."""
    with Guest(host, "--on-reboot", "restart", "--cpus", "2", *options) as guest:
        for _ in range(2):
            check_traffic(guest)
            start = len(guest.stdout)
            guest.type("reboot -f\n")
            guest.log_in(start)
        assert guest.do("nproc").strip() == "2"
        check_traffic(guest)
        guest.leave(7)
        report = guest.report
    assert report["reboots"] == len(report["kvm_before_reboots"]) == 2
    assert report["outcome"]["status"] == 7


def test_restart_then_panic(host: Host) -> None:
    """A panic is no reboot: it ends the run, also after a restart."""
    with Guest(host, "--on-reboot", "restart") as guest:
        start = len(guest.stdout)
        guest.type("reboot -f\n")
        guest.log_in(start)
        guest.type("echo c >/proc/sysrq-trigger\n")
        assert guest.wait() == 120
        assert "sysrq triggered crash" in guest.err
