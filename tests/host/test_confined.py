"""Threads and processes that somebody else controls: what they may not do does not happen, and is
told.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.driver import wait_for
from tests.inject import EXECVE, OPENAT, PTRACE, SENDMSG, SOCKET, inject

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 60.0
PYVMM = [sys.executable, "-m", "pyvmm"]
PPOLL = 271
NAMES = {OPENAT: "openat", SOCKET: "socket", EXECVE: "execve", PTRACE: "ptrace"}


def threads(pid: int) -> dict[str, int]:
    """By their names. A new thread has its maker's name at first: then neither is there."""
    found: dict[str, list[int]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            found.setdefault((task / "comm").read_text().strip(), []).append(int(task.name))
    return {name: tids[0] for name, tids in found.items() if len(tids) == 1}


def status_of(tid: int, field: str) -> str:
    text = Path(f"/proc/{tid}/status").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:"))


def call_of(tid: int) -> int:
    """The system call that a thread waits in; -1 if it runs."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{tid}/syscall").read_text().split()[0])
    return -1


def confined_worker(pid: int, filters: int, end: str = "-0") -> int:
    """The thread that moves the packets, once it has so many filters; else 0: workers come and go,
    and each has its own a moment after its start. :param end: of the thread's name.
    """
    with contextlib.suppress(OSError):
        for name, tid in threads(pid).items():
            if name.endswith(end) and status_of(tid, "Seccomp_filters") == str(filters):
                return tid
    return 0


def ask(pid: int, filters: int, call: int) -> bool:
    """Have the worker ask for a call; whether it did."""
    tid = confined_worker(pid, filters)
    with contextlib.suppress(OSError):
        return tid != 0 and inject(tid, call)
    return False


@pytest.mark.parametrize("sandbox", ["on", "off"])
@pytest.mark.parametrize("call", NAMES, ids=NAMES.values())
def test_a_worker_is_stopped(guest: Guest, tmp_path: Path, call: int, sandbox: str) -> None:
    """The machine ends in order, with its own status, and says which thread asked for what.
    Without a sandbox, the other threads of the process are not confined.
    """
    report = tmp_path / "r.json"
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("pcinet")]
    argv += [
        "--memory",
        "4M",
        "--net",
        "emulated",
        "--append",
        "count=1000000000",
        "--json",
        str(report),
        "--sandbox",
        sandbox,
    ]
    process = int(sandbox == "on")
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as vm:
        try:
            assert wait_for(lambda: ask(vm.pid, process + 1, call))
            assert status_of(vm.pid, "Seccomp_filters") == str(process)
            assert status_of(vm.pid, "NoNewPrivs") == str(process)
            _, err = vm.communicate(timeout=PATIENCE)
        finally:
            vm.kill()
    assert vm.returncode == 128, err
    assert f"worker tap0-0 asked for {NAMES[call]}(), which it may not have" in err, err
    told = json.loads(report.read_text())
    assert told["verdict"] == "thread-stopped", told


@pytest.mark.parametrize("more", ["", ",interrupt=ioctl", ",fd="])
def test_a_worker_survives_stops_of_its_process(guest: Guest, tmp_path: Path, more: str) -> None:
    """SIGSTOP interrupts whichever call the worker is in, and SIGCONT has it go on. The worker may
    not ask for restart_syscall, by which the kernel goes on with some calls. Nor may the thread of
    a socket that was open: it waits in a call for which that matters.
    """
    report, name = tmp_path / "r.json", f"stops-{os.getpid()}"
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("pcinet"), "--memory", "4M"]
    argv += ["--append", "count=1000000000", "--report", str(report), "--name", name]
    peer, given = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pass_fds = [given.fileno()] if more == ",fd=" else []
    argv += ["--net", f"emulated{more}{given.fileno() if pass_fds else ''}"]
    with (
        peer,
        given,
        subprocess.Popen(
            argv,
            cwd=ROOT,
            pass_fds=pass_fds,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as vm,
    ):

        def waits() -> bool:
            """The worker is there, and the socket's thread, if there is one, waits for a frame."""
            if pass_fds:
                port = confined_worker(vm.pid, 2, "-port")
                if not port or call_of(port) != PPOLL:
                    return False
            return confined_worker(vm.pid, 2) != 0

        try:
            for _ in range(25):
                assert wait_for(waits), "it has been parked"
                vm.send_signal(signal.SIGSTOP)
                assert wait_for(lambda: status_of(vm.pid, "State") == "T"), vm.poll()
                vm.send_signal(signal.SIGCONT)
                assert wait_for(lambda: status_of(vm.pid, "State") != "T"), vm.poll()
            assert wait_for(waits), "it has been parked"
            subprocess.run([*PYVMM, "quit", "--host", "local", name], cwd=ROOT, check=True)
            _, err = vm.communicate(timeout=PATIENCE)
        finally:
            vm.kill()
    assert vm.returncode == 0 and "was stopped" not in err and "asked for" not in err, err
    (nic,) = json.loads(report.read_text())["nets"]
    assert nic["mode"] == "emulated", nic


def test_our_own_backend_is_confined(guest: Guest, tmp_path: Path) -> None:
    """It has no capability, no path and few system calls, and serves all the same. What it may not
    do kills it; the machine gets another one, and says why.
    """
    report = tmp_path / "r.json"
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("pcinet")]
    argv += ["--memory", "4M", "--net", "vhost-user", "--append", "count=1000000000"]
    name = f"confined-{os.getpid()}"
    argv += ["--report", str(report), "--name", name]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as vm:
        try:

            def backend() -> int:
                """The child's id, once its worker runs; else 0."""
                for children in Path(f"/proc/{vm.pid}/task").glob("*/children"):
                    with contextlib.suppress(OSError):
                        for pid in map(int, children.read_text().split()):
                            if any(name.endswith("-0") for name in threads(pid)):
                                return pid
                return 0

            seen: list[int] = []

            def another() -> bool:
                """Whether there is a child that has not been seen, which serves."""
                pid = backend()
                if pid in (0, *seen) or not confined_worker(pid, 2):
                    return False
                seen.append(pid)
                return True

            assert wait_for(another)
            first = seen[0]
            assert status_of(first, "Seccomp_filters") == "1"
            assert status_of(first, "NoNewPrivs") == "1"
            assert int(status_of(first, "CapEff"), 16) == int(status_of(first, "CapBnd"), 16) == 0
            assert wait_for(lambda: inject(first, SOCKET))
            assert wait_for(another), "another one serves"
            # The process may, the worker may not.
            assert wait_for(lambda: ask(seen[1], 2, SENDMSG))
            assert wait_for(another)
            subprocess.run([*PYVMM, "quit", "--host", "local", name], cwd=ROOT, check=True)
            vm.communicate(timeout=PATIENCE)
        finally:
            vm.kill()
    (nic,) = json.loads(report.read_text())["nets"]
    log = json.dumps(nic["vhost_user"])
    assert "killed (SIGSYS)" in log and "asked for sendmsg(), which it may not have" in log, nic


BEGIN = """
import ctypes, os, resource, sys, threading
from pyvmm.backend.process import confine
lines = []
libc, parent, here = ctypes.CDLL(None), os.getppid(), os.getpid()
confine(lines.append)
"""


@pytest.mark.parametrize(
    ("deed", "how"),
    [
        ("os.fork()", "killed"),
        ("libc.syscall(56, 0x10000000, 0, 0, 0, 0)", "killed"),  # clone: a user namespace
        ("libc.syscall(435, 0, 0)", ""),  # clone3: not there
        ("libc.syscall(234, parent, parent, 0)", "killed"),  # tgkill
        ("os.sched_setaffinity(parent, {0})", "killed"),
        ("os.kill(parent, 0)", "killed"),
        ("open('/etc/hostname')", "killed"),
        ("resource.prlimit(parent, resource.RLIMIT_NOFILE)", "PermissionError"),
        ("os.stat('/')", "PermissionError"),
        ("libc.prctl(1, 0)", "killed"),  # not to end with the parent (PR_SET_PDEATHSIG)
        ("libc.prctl(15, b'name')", ""),
        ("os.sched_setaffinity(0, {0})", ""),
        ("libc.syscall(234, here, threading.get_native_id(), 0)", ""),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_a_confined_process_may_do(deed: str, how: str) -> None:
    """In a thread, whose exceptions are told without a look at the sources."""
    code = f"def deed():\n    {deed}\nthread = threading.Thread(target=deed)\nthread.start()\n"
    code += "thread.join()\nos.write(1, '\\n'.join(lines).encode())\nos._exit(0)"
    run = subprocess.run(
        [sys.executable, "-c", BEGIN + code], cwd=ROOT, capture_output=True, text=True
    )
    if how == "killed":
        assert run.returncode == -signal.SIGSYS, run
        return
    assert run.returncode == 0, run
    assert run.stdout.startswith(how) if how else not run.stdout, run
    assert not how or ", deed" in run.stdout, run
