"""The process of ``pyvmm run`` and of ``pyvmm backend`` once they are confined: what they can still
do, and what happens to a thread that asks for more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm import Net, helper
from pyvmm.card.uplink import Uplink
from pyvmm.errors import UsageError
from pyvmm.hostnet.netns import Namespace
from pyvmm.hostnet.slirp import UserStack
from pyvmm.sandbox import ORDERLY_S
from tests.driver import wait_for
from tests.host.test_confined import status_of, threads
from tests.inject import ACCEPT4, CLONE, EXECVE, OPENAT, PTRACE, SENDMSG, SOCKET, inject

ROOT = Path(__file__).parents[2]
Guest = Callable[[str], str]
PATIENCE = 60.0
PYVMM = [sys.executable, "-m", "pyvmm"]
NAMES = {OPENAT: "openat", SOCKET: "socket", EXECVE: "execve", PTRACE: "ptrace"}
#: Without openat, which the process may ask for: Landlock answers.
VMM_CALLS = {call: name for call, name in NAMES.items() if call != OPENAT}


def filters(pid: int, thread: str) -> int:
    """How many seccomp filters a thread has; 0 if there is none of that name."""
    with contextlib.suppress(OSError, KeyError):
        return int(status_of(threads(pid)[thread], "Seccomp_filters"))
    return 0


@contextlib.contextmanager
def running(
    *args: str, command: str = "run", session: bool = False
) -> Iterator[subprocess.Popen[str]]:
    host = ["--host", "local"] if command == "run" else []
    with subprocess.Popen(
        [*PYVMM, command, *host, *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def busy(guest: Guest, *args: str) -> list[str]:
    """The options of a machine whose guest sends packets without end."""
    return ["--kernel", guest("pcinet"), "--memory", "4M", "--append", "count=1000000000", *args]


def ask(pid: int, thread: str, call: int) -> bool:
    """Have a confined thread ask for a call; whether it did."""
    with contextlib.suppress(OSError):
        tid = threads(pid).get(thread, 0)
        return tid != 0 and status_of(tid, "Seccomp") == "2" and inject(tid, call)
    return False


#: A vCPU's thread has a list of its own, besides that of the process.
VCPU_CALLS = {**NAMES, SENDMSG: "sendmsg", CLONE: "clone", ACCEPT4: "system call 288"}
STOPPED = [
    *(("vcpu0", call, name) for call, name in VCPU_CALLS.items()),
    *((thread, *call) for thread in ("supervisor", "net0") for call in VMM_CALLS.items()),
]


@pytest.mark.parametrize(
    ("thread", "call", "name"), STOPPED, ids=[f"{name}-{thread}" for thread, _, name in STOPPED]
)
def test_a_thread_of_the_vmm_is_stopped(
    guest: Guest, tmp_path: Path, thread: str, call: int, name: str
) -> None:
    """The machine ends with its own status, and says which thread asked for what."""
    report = tmp_path / "r.json"
    with running(*busy(guest, "--sandbox", "on", "--json", str(report))) as vm:
        if thread == "vcpu0":
            assert wait_for(lambda: filters(vm.pid, thread) == 2)
        assert wait_for(lambda: ask(vm.pid, thread, call))
        _, err = vm.communicate(timeout=PATIENCE)
    assert vm.returncode == 128, err
    asked = name if " " in name else f"{name}()"
    assert f"was stopped: {thread} asked for {asked}, which it may not have" in err, err
    # The others are needed for an orderly end; and so is vcpu0 if it had the interpreter's lock.
    if thread == "vcpu0" and report.exists() and (text := report.read_text()):
        told = json.loads(text)
        assert (told["verdict"], told["sandbox"]) == ("thread-stopped", "on"), told


def test_the_main_thread_is_stopped(guest: Guest) -> None:
    """Nobody is left who could end the machine in order: the handler says why, and ends it."""
    with running(*busy(guest, "--sandbox", "on")) as vm:

        def stopped() -> bool:
            with contextlib.suppress(OSError):
                return status_of(vm.pid, "Seccomp") == "2" and inject(vm.pid, EXECVE)
            return False

        assert wait_for(stopped)
        _, err = vm.communicate(timeout=PATIENCE)
    assert vm.returncode == 128, err
    assert "asked for execve(), which it may not have" in err, err


@pytest.mark.parametrize("call", NAMES, ids=NAMES.values())
def test_a_back_end_is_stopped(tmp_path: Path, call: int) -> None:
    """``pyvmm backend`` has no file, socket or program, and says what it was made to ask for."""
    path = tmp_path / "s"
    with running("--socket", str(path), "--loopback", command="backend") as backend:
        assert wait_for(path.exists)
        status = {f: status_of(backend.pid, f) for f in ("Seccomp", "NoNewPrivs", "CapEff")}
        assert status == {"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0" * 16}
        assert wait_for(lambda: inject(backend.pid, call))
        _, err = backend.communicate(timeout=PATIENCE)
    assert backend.returncode == 128, err
    assert f"asked for {NAMES[call]}(), which it may not have" in err, err
    path.unlink(missing_ok=True)  # the main thread, which is stopped, would remove it


def test_a_back_end_goes_on(guest: Guest, tmp_path: Path) -> None:
    """A confined back-end serves one front-end after another, and removes its socket."""
    path = tmp_path / "s"
    card = f"vhost-user,socket={path}"
    with running("--socket", str(path), "--loopback", "-q", command="backend") as backend:
        assert wait_for(path.exists)
        for _ in range(2):
            argv = ["run", "--host", "local", "--kernel", guest("hello"), "--memory", "4M"]
            subprocess.run(
                [*PYVMM, *argv, "--net", card], cwd=ROOT, check=True, capture_output=True
            )
        backend.send_signal(signal.SIGTERM)
        _, err = backend.communicate(timeout=PATIENCE)
    assert (backend.returncode, err) == (0, "")
    assert not path.exists()


REFUSED = """
import ctypes, struct, sys, threading
from pyvmm import helper, sandbox
from pyvmm.errors import SandboxError
libc = ctypes.CDLL(None)
allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7fff0000))
program = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(allow)))
ready, end = threading.Event(), threading.Event()
def thread():
    assert libc.prctl(38, 1, 0, 0, 0) == libc.prctl(22, 2, program) == 0
    ready.set()
    end.wait()
with helper.start():
    other = threading.Thread(target=thread)
    other.start()
    ready.wait()
    try:
        print(sandbox.confine_backend(sys.argv[1], [], print))
    except SandboxError as e:
        print(e.cause)
    end.set()
"""


@pytest.mark.parametrize(
    ("want", "answer"),
    [
        ("auto", "in part: Device or resource busy\n"),
        ("on", "this process cannot be confined: Device or resource busy\n"),
    ],
)
def test_a_kernel_that_refuses_a_back_end(want: str, answer: str) -> None:
    """As it does if a thread has a filter of its own: ``auto`` goes on."""
    argv = [sys.executable, "-c", REFUSED, want]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, answer), run


DEAF = """
import signal, threading, time
from pyvmm import helper, sandbox
ready = threading.Event()
def thread():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(signal.SIGRTMIN, signal.SIGRTMAX))
    ready.set()
    time.sleep(1)
with helper.start():
    threading.Thread(target=thread).start()
    ready.wait()
    print(repr(sandbox.confine_backend("on", [], print)))
"""


def test_a_thread_that_ends_before_it_is_confined() -> None:
    run = subprocess.run([sys.executable, "-c", DEAF], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "''\n"), run


def test_a_confined_machine_is_as_any_other(guest: Guest, tmp_path: Path) -> None:
    """Live switches, a back-end that dies and comes back, a reset with a kernel that has replaced
    the first one: what needs a process, a socket or a file, the helper does.
    """
    kernel, other = tmp_path / "kernel", tmp_path / "other"
    shutil.copy(guest("pcinet"), kernel)
    shutil.copy(guest("pcinet"), other)
    name, report = f"sandbox-{os.getpid()}", tmp_path / "r.json"
    args = busy(guest, "--sandbox", "on", "--name", name, "--report", str(report))
    args[1] = str(kernel)
    args += ["--net", "emulated,switchable=vhost-user"]
    with running(*args) as vm:

        def do(command: str, *words: str) -> None:
            argv = [*PYVMM, command, "--host", "local", name, *words]
            subprocess.run(argv, cwd=ROOT, capture_output=True, check=True)

        assert wait_for(lambda: "sandbox" in threads(vm.pid) and "tap0-0" in threads(vm.pid))
        do("switch", "vhost-user")

        def child() -> int:
            """The process of our own back-end, once it serves; else 0."""
            for children in Path(f"/proc/{vm.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    for pid in map(int, children.read_text().split()):
                        if "tap0-0" in threads(pid):
                            return pid
            return 0

        assert wait_for(child), "its worker has its name a moment after its start"
        first = child()
        os.kill(first, signal.SIGKILL)
        assert wait_for(lambda: child() not in (0, first)), "another one has come"
        do("switch", "emulated")
        other.replace(kernel)
        do("reset")
        assert wait_for(lambda: "tap0-0" in threads(vm.pid))
        do("quit")
        _, err = vm.communicate(timeout=PATIENCE)
    assert vm.returncode == 0, err
    told = json.loads(report.read_text())
    assert (told["sandbox"], told["reboots"]) == ("on", 1), told
    assert [s["outcome"] for s in told["nets"][0]["switches"]] == ["switched"] * 2, told


#: A thread is stopped after the machine has ended: that ends no process that goes on.
WAIT = (
    "import threading, time; threading.Thread(target=socket.socket, daemon=True).start(); "
    f"time.sleep({ORDERLY_S + 3}); vm.close(); time.sleep({ORDERLY_S + 3}); print('waited')"
)
CONFINED = """
import os, resource, socket, sys
from pyvmm import Machine, Net
with Machine(sys.argv[1], memory="4M", sandbox=sys.argv[2]) as vm:
    vm.start()
    assert vm.wait(60).kind == "poweroff"
    print(vm.sandbox, flush=True)
    {}
"""


def confined(guest: Guest, deed: str, sandbox: str = "on") -> subprocess.CompletedProcess[str]:
    """Run a machine to its end in a process, and then a statement in that process."""
    return subprocess.run(
        [sys.executable, "-c", CONFINED.format(deed), guest("hello"), sandbox],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# What a guest writes that has no share and says that it cannot mount one, and how it ends:
# mov eax, 0x0b000000; mov dx, 0x620; out dx, eax; mov al, 0x15; out 0xf4, al; hlt.
NO_SHARE = bytes.fromhex("66b80000000b ba2006 66ef b015 e6f4 f4")
FLAT = """
import sys
from pyvmm import Machine
how = dict(memory="4M", load_address=0x7C00, load_mode="real16", test_devices=True, sandbox="on")
with Machine(sys.argv[1], **how) as vm:
    vm.start()
    outcome = vm.wait(60)
    print(vm.sandbox, outcome.kind, outcome.status, outcome.detail)
"""
FAILED_ENTRY = """
import sys, threading
from types import SimpleNamespace
from pyvmm import Machine, threads, vcpus
from pyvmm._ext import lib
said = []
def body():
    threads.narrow()
    c = SimpleNamespace(reason=lib.KVM_EXIT_FAIL_ENTRY, error=0, detail=0, info=[7], info_count=1)
    vcpu = SimpleNamespace(c=c, index=0, registers=lambda: {"rip": 0})
    said.append(vcpus.abnormal(vcpu, -1))
with Machine(sys.argv[1], memory="4M", sandbox="on") as vm:
    vm.start()
    vm.wait(60)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join(60)
    print(vm.sandbox, said[0].kind, said[0].detail)
"""


def test_a_guest_cannot_have_a_vcpu_s_thread_load_a_module(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(NO_SHARE)
    argv = [sys.executable, "-c", FLAT, str(tmp_path / "flat")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("on debug-exit 43"), run


def test_a_failed_entry_is_explained_by_a_thread_that_may_read(guest: Guest) -> None:
    argv = [sys.executable, "-c", FAILED_ENTRY, guest("hello")]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith("on kvm-error vCPU 0: exit fail_entry"), run


@pytest.mark.parametrize(
    ("deed", "answer"),
    [
        ("open('/etc/hostname')", "PermissionError"),
        ("open('/tmp/x', 'w')", "PermissionError"),
        ("os.listdir('/')", "PermissionError"),
        ("os.unlink(sys.argv[1])", "PermissionError"),
        ("open('/dev/kvm', 'r+b', buffering=0)", "PermissionError"),
        ("open(os.__file__).close(); print('read')", "read"),
        ("import xml.dom.minidom, ssl; print('imported')", "imported"),
        ("open(sys.argv[1], 'rb').close(); print('kernel')", "kernel"),
        ("os.fork()", "killed or asked for clone()"),  # as os.system, with glibc 2.41
        ("os.system('true')", "killed"),  # it blocks signals, SIGSYS among them
        ("os.execv('/bin/true', ['true'])", "asked for execve()"),
        ("os.kill(os.getppid(), 0)", "asked for kill()"),
        ("socket.socket()", "asked for socket()"),
        ("socket.socketpair(type=socket.SOCK_DGRAM)", "asked for socketpair()"),
        ("socket.socketpair(30, socket.SOCK_SEQPACKET)", "asked for socketpair()"),  # TIPC
        ("[*map(socket.socketpair, [1] * 2, [1, 5])]; print('pairs')", "pairs"),
        (WAIT, "waited"),
        ("resource.prlimit(os.getppid(), resource.RLIMIT_CORE)", "asked for system call 302"),
        ("import fcntl; fcntl.ioctl(0, 0x5412, b'x')", "asked for ioctl()"),  # TIOCSTI
    ],
)
def test_what_the_process_may_do(guest: Guest, deed: str, answer: str) -> None:
    run = confined(guest, deed)
    assert run.stdout.startswith("on\n"), run
    if answer == "killed" or (answer.startswith("killed") and run.returncode < 0):
        assert run.returncode == -signal.SIGSYS, run
        return
    answer = answer.removeprefix("killed or ")
    assert answer in run.stdout + run.stderr, run
    if answer.startswith("asked for"):
        assert run.returncode == 128, run


def test_homes_and_directories_stay_closed(guest: Guest, tmp_path: Path) -> None:
    """A script's own directory, the user's home and the current directory are places of modules
    only by accident.
    """
    places = {name: tmp_path / name for name in ("script", "home", "here", "modules")}
    for place in places.values():
        place.mkdir()
        (place / "file").touch()
    script = places["script"] / "run.py"
    script.write_text(
        "def tried(path):\n try: return open(path).close()\n except OSError as e: return e.errno\n"
        + CONFINED.format("print(*map(tried, sys.argv[3:]))")
    )
    path = [ROOT, places["home"], places["here"], places["modules"], tmp_path]
    files = [str(place / "file") for place in places.values()]
    run = subprocess.run(
        [sys.executable, str(script), guest("hello"), "on", *files],
        cwd=places["here"],
        env={**os.environ, "HOME": str(places["home"]), "PYTHONPATH": ":".join(map(str, path))},
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["on", "13", "13", "13", "None"], run


def test_capabilities(guest: Guest) -> None:
    """Of those that root has, one is left, by which the kernel is read again."""
    deed = "print(*(line.split()[1] for line in open('/proc/self/status') if line[:3] == 'Cap'))"
    inheritable, permitted, effective, bounding, ambient = confined(guest, deed).stdout.split()[1:]
    assert int(permitted, 16) == int(effective, 16)
    assert int(permitted, 16) & ~(1 << 2) == 0  # CAP_DAC_READ_SEARCH
    assert int(inheritable, 16) == int(ambient, 16) == 0
    assert os.geteuid() or int(bounding, 16) == 0


def test_one_machine_per_process(guest: Guest) -> None:
    """Of a process that is confined, another machine cannot be made; it says so."""
    again = "vm.close(); Machine(sys.argv[1], memory='4M', sandbox='on')"
    assert "SandboxError: --sandbox on: this process is confined already" in (
        confined(guest, again).stderr
    )


def test_all_threads_are_confined(guest: Guest) -> None:
    """Also those that were there before, and those that come."""
    with running(*busy(guest, "--sandbox", "on", "--timeout", "600")) as vm:
        all_of_them = {"control", "net0", "sandbox", "supervisor", "tap0-0", "vcpu0"}
        assert wait_for(lambda: all_of_them <= set(threads(vm.pid)))
        tids = threads(vm.pid)
        for name, tid in tids.items():
            assert status_of(tid, "Seccomp") == "2", name
            assert status_of(tid, "NoNewPrivs") == "1", name
            assert int(status_of(tid, "CapEff"), 16) & ~(1 << 2) == 0, name


def test_what_is_said(guest: Guest, tmp_path: Path) -> None:
    """The report, the verdict and -v say whether the process was confined; a refusal has a
    status of its own.
    """
    report, verdict = tmp_path / "r.json", tmp_path / "v.json"
    argv = [*PYVMM, "run", "--host", "local", "--kernel", guest("hello"), "--memory", "4M"]
    files = ["--report", str(report), "--json", str(verdict), "--net", "none", "-v"]
    for want, said in (("on", "on"), ("auto", "on"), ("off", "off")):
        run = subprocess.run(
            [*argv, *files, "--sandbox", want], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert f"pyvmm: sandbox: {said}\n" in run.stderr
        assert json.loads(report.read_text())["sandbox"] == said
        assert json.loads(verdict.read_text())["sandbox"] == said
    old = (
        "import sys; from pyvmm import sandbox, cli; sandbox._why_no_files = lambda: 'no Landlock'"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{old}; sys.exit(cli.main())", *argv[3:], "--sandbox", "on"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    line = "pyvmm: --sandbox on: no Landlock; use --sandbox auto, or off\n"
    assert (run.returncode, run.stderr) == (132, line)


def test_nothing_is_left(guest: Guest) -> None:
    """The helper ends with the machine, also if the machine is killed."""
    with running(*busy(guest, "--sandbox", "on")) as vm:
        assert wait_for(lambda: "vcpu0" in threads(vm.pid))
        (pid,) = (
            int(pid)
            for pid in Path(f"/proc/{vm.pid}/task/{vm.pid}/children").read_text().split()
            if "pyvmm-helper" in threads(int(pid))
        )
        vm.kill()
        vm.wait()
        assert wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_what_the_helper_makes() -> None:
    """A tap in a namespace, steering, a user network: as without the helper."""
    with helper.start():
        helper.permit_start(helper.USER_NETWORK, "0")
        helper.seal()
        for device in ("", "card0"):
            card = Net("vhost-vdpa", device=device or None)
            with (
                contextlib.closing(Uplink(card, None)) as uplink,
                pytest.raises(UsageError, match="only what the command line names"),
            ):
                uplink.open(card, bytes(6))
        with pytest.raises(UsageError, match="only what the command line names"):
            Uplink(Net("emulated", tap="lo"), None)
        with Namespace(address="192.168.7.1/24", queues=2) as inside:
            assert len(inside.tap.fds) == 2
            assert inside.tap.link().stats()
        stack = UserStack("10.0.2.2/24", "10.0.2.15/24", 1500, loopback=False)
        try:
            stack.need()
        finally:
            stack.close()
