"""The parts of the testbed that can be tested without a virtual machine: frames, sessions, the
supervisor's tables, boot files and options.
"""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import BuildError, HostError, TestbedError, UsageError
from pyvmm.host import paths, qemu
from pyvmm.host.qemu import Qemu
from pyvmm.host.tether import tethered
from pyvmm.testbed import assets, layers, session, supervisor, testbed
from pyvmm.testbed import protocol as p
from pyvmm.testbed.machine import Machine
from pyvmm.testbed.machines import machine
from pyvmm.testbed.session import Session, TestbedTimeout
from pyvmm.testbed.supervisor import REST_AFTER, Client, Supervisor
from pyvmm.testbed.testbed import Testbed
from tests.strangers import BECOME, need_readable_checkout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories of the test's own for caches and run-time state. Their names are short enough for
    sockets.
    """
    with tempfile.TemporaryDirectory(prefix="pyvmm-", dir="/tmp") as work:
        path = Path(work)
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        (path / "run").mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path / "run"))
        monkeypatch.delenv("PYVMM_TESTBED", raising=False)
        yield path


# --- frames ---------------------------------------------------------------------------------------

frames = st.lists(
    st.tuples(
        st.integers(1, 255), st.integers(0, 65535), st.integers(0, 3), st.binary(max_size=200)
    ),
    max_size=20,
)


@given(frames, st.lists(st.integers(1, 64), min_size=1))
def test_framer_does_not_care_how_the_stream_is_cut(
    sent: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(
        p.frame(kind, channel, payload, which) for kind, channel, which, payload in sent
    )
    framer, got, at, turn = p.Framer(), [], 0, 0
    while at < len(stream):
        n = cuts[turn % len(cuts)]
        got += framer.feed(stream[at : at + n])
        at, turn = at + n, turn + 1
    assert got == sent


def test_framer_refuses_silly_lengths() -> None:
    with pytest.raises(ValueError, match="4294967295"):
        p.Framer().feed(b"\xff\xff\xff\xff" + bytes(4))


def test_a_data_frame_fits_one_write_to_the_port() -> None:
    assert len(p.frame(p.DATA, 1, bytes(p.CHUNK))) == 32768


# --- the client's side, against an agent played here ----------------------------------------------


class Agent:
    """The test's end of a session: it plays the agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.framer = p.Framer()
        self.ready: list[tuple[int, int, int, bytes]] = []
        self.spec: dict[str, object] = marshal.loads(self.next(p.OPEN)[1])

    def next(self, kind: int) -> tuple[int, bytes]:
        """Receive the next frame, which must be of ``kind``; returns (stream, payload)."""
        self.sock.settimeout(60)
        while not self.ready:
            self.ready += self.framer.feed(self.sock.recv(65536))
        got, _channel, stream, payload = self.ready.pop(0)
        assert got == kind
        return stream, payload

    def send(self, kind: int, payload: bytes = b"", stream: int = 0) -> None:
        self.sock.sendall(p.frame(kind, 0, payload, stream))


class Running:
    """A session that runs in a thread, and its agent."""

    def __init__(self, timeout: float | None = None, **kwargs: object) -> None:
        ours, theirs = socket.socketpair()
        options: dict[str, object] = {
            "cwd": "/",
            "env": {},
            "stdin": None,
            "stdout": None,
            "stderr": None,
            **kwargs,
        }
        self.session = Session(ours, ["cmd", "\udcff"], **options)  # type: ignore[arg-type]
        self.result: int | BaseException = -1
        self.notes: list[str] = []

        def run() -> None:
            try:
                self.result = self.session.wait(timeout, progress=self.notes.append)
            except BaseException as e:
                self.result = e

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        self.agent = Agent(theirs)

    def end(self) -> int | BaseException:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.result


def test_session_carries_arguments_output_and_status() -> None:
    r = Running(env={"A": "b", "C": "\udce9"}, cwd="/some where")
    assert r.agent.spec["argv"] == [b"cmd", b"\xff"]
    assert r.agent.spec["env"] == {b"A": b"b", b"C": b"\xe9"}
    assert (r.agent.spec["cwd"], r.agent.spec["stdin"], r.agent.spec["tty"]) == (
        b"/some where",
        False,
        [],
    )
    r.agent.send(p.NOTE, b"starting")
    r.agent.send(p.DATA, b"out", p.STDOUT)
    r.agent.send(p.DATA, b"err", p.STDERR)
    r.agent.send(p.EXIT, b"%d" % (3 << 8))
    assert r.end() == 3
    out, err = (bytes(r.session.output[stream]) for stream in (p.STDOUT, p.STDERR))
    assert (out, err, r.notes) == (b"out", b"err", ["starting"])


def test_session_status_of_a_signal() -> None:
    r = Running()
    r.agent.send(p.EXIT, b"9")
    assert r.end() == 137


def test_session_input_respects_the_window() -> None:
    data = os.urandom(3 * p.IN_WINDOW)
    r = Running(stdin=data)
    got = b""
    while len(got) < p.IN_WINDOW:
        got += r.agent.next(p.DATA)[1]
    assert len(got) == p.IN_WINDOW
    r.agent.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        r.agent.sock.recv(1)  # not a byte beyond the window
    while len(got) < len(data):
        r.agent.send(p.CREDIT, b"%d" % (len(got) % p.IN_WINDOW or p.IN_WINDOW))
        want = min(len(data), len(got) + (len(got) % p.IN_WINDOW or p.IN_WINDOW))
        while len(got) < want:
            got += r.agent.next(p.DATA)[1]
    assert got == data
    assert r.agent.next(p.EOF) == (p.STDIN, b"")
    r.agent.send(p.EXIT, b"0")
    assert r.end() == 0


def test_session_returns_credit_only_for_what_was_written() -> None:
    """If the reader of the output stops, at most one window of data is buffered."""
    out, inn = os.pipe()
    fcntl.fcntl(inn, fcntl.F_SETPIPE_SZ, 4096)
    r = Running(stdout=inn)
    for _ in range(p.OUT_WINDOW // 32768):
        r.agent.send(p.DATA, bytes(32768), p.STDOUT)
    r.agent.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        r.agent.sock.recv(1)  # one page is written, too little to be worth a frame
    total = 0
    while total < p.OUT_WINDOW:
        total += len(os.read(out, 1 << 20))
    credit = 0
    while credit < p.OUT_WINDOW - p.OUT_WINDOW // 8:
        credit += int(r.agent.next(p.CREDIT)[1])
    assert credit <= total
    r.agent.send(p.EXIT, b"0")
    assert r.end() == 0
    os.close(out)
    os.close(inn)


def test_session_tells_that_the_reader_has_gone() -> None:
    out, inn = os.pipe()
    os.close(out)
    r = Running(stdout=inn)
    r.agent.send(p.DATA, b"x", p.STDOUT)
    assert r.agent.next(p.EOF) == (p.STDOUT, b"")
    r.agent.send(p.EXIT, b"13")
    assert r.end() == 128 + 13
    os.close(inn)


def test_a_session_collects_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "OUTPUT_MAX", 1 << 20)
    r = Running()
    for _ in range(3):
        r.agent.send(p.DATA, b"x" * (500 << 10), p.STDOUT)
    error = r.end()
    assert isinstance(error, TestbedError) and "more than 1 MiB" in str(error)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (p.EXIT, b"x"),
        (p.EXIT, b""),
        (p.EXIT, b"-1"),
        (p.EXIT, b"9" * 5000),
        (p.CREDIT, b"\xff"),
        (p.CREDIT, b"1e9"),
    ],
)
def test_a_testbed_that_breaks_the_protocol(kind: int, payload: bytes) -> None:
    r = Running()
    r.agent.send(kind, payload)
    error = r.end()
    assert isinstance(error, TestbedError) and "the testbed broke the protocol" in str(error)


def test_a_testbed_that_sends_more_than_its_credit() -> None:
    """To a reader that reads nothing: what waits for it has a limit."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        r = Running(stdout=writer)
        for _ in range(p.OUT_WINDOW // p.CHUNK + 5):  # the pipe takes two
            r.agent.send(p.DATA, bytes(p.CHUNK), p.STDOUT)
        error = r.end()
        assert isinstance(error, TestbedError) and "more output than it has credit" in str(error)
    finally:
        os.close(reader)
        os.close(writer)


def test_session_timeout() -> None:
    r = Running(timeout=0.2)
    assert isinstance(r.end(), TestbedTimeout)


@pytest.mark.parametrize("how", ["error", "close"])
def test_session_when_the_testbed_ends(how: str) -> None:
    r = Running()
    if how == "error":
        r.agent.send(p.ERROR, b"L1 hung")
    r.agent.sock.close()
    error = r.end()
    assert isinstance(error, TestbedError)
    assert str(error) == ("L1 hung" if how == "error" else "the testbed ended")


# --- the supervisor's tables ----------------------------------------------------------------------


class Clients(Supervisor):
    """A supervisor whose L1 only remembers the frames that it is sent."""

    def __init__(self) -> None:
        super().__init__({"tether": None, "log_later": "log"})
        self.sent: list[tuple[int, int, int, bytes]] = []
        self.ready = True

    def to_port(self, data: bytes) -> None:
        self.sent += p.Framer().feed(data)

    def join(self) -> tuple[Client, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        client = Client(ours)
        self.clients[ours.fileno()] = client
        self.selector.register(ours, 1, lambda: self.from_client(client))
        return client, theirs


@pytest.fixture
def clients() -> Iterator[Clients]:
    s = Clients()
    yield s
    s.selector.close()


def test_what_follows_open_waits_with_it(clients: Clients) -> None:
    client, far = clients.join()
    far.sendall(p.frame(p.OPEN, 7, b"spec") + p.frame(p.DATA, 7, b"in") + p.frame(p.EOF, 7))
    clients.from_client(client)
    assert clients.sent == []
    clients.open_due(client.due - 0.01)
    assert clients.sent == []
    clients.open_due(client.due)
    channel = client.channel
    assert clients.sent == [
        (p.OPEN, channel, 0, b"spec"),
        (p.DATA, channel, 0, b"in"),
        (p.EOF, channel, 0, b""),
    ]


def test_a_second_open_ends_the_connection(clients: Clients) -> None:
    client, far = clients.join()
    far.sendall(p.frame(p.OPEN) + p.frame(p.OPEN))
    clients.from_client(client)
    assert far.recv(1) == b""


def test_a_vanished_client_has_its_command_killed_and_its_channel_kept_until_then(
    clients: Clients,
) -> None:
    client, far = clients.join()
    far.sendall(p.frame(p.OPEN))
    clients.from_client(client)
    clients.open_due(client.due)
    channel = client.channel
    far.close()
    clients.from_client(client)
    assert clients.sent[-1] == (p.CLOSE, channel, 0, b"")
    clients.next_channel = channel
    other, far = clients.join()
    far.sendall(p.frame(p.OPEN))
    clients.from_client(other)
    clients.open_due(other.due)
    assert other.channel != channel


def test_a_client_gone_before_its_turn_is_forgotten(clients: Clients) -> None:
    client, far = clients.join()
    far.sendall(p.frame(p.OPEN))
    clients.from_client(client)
    far.close()
    clients.from_client(client)
    clients.open_due(client.due + 1)
    assert clients.sent == []
    assert clients.waiting == []


class Mouth:
    """L1's port, on which L1 says ``said`` and reads nothing."""

    source = sink = -1
    busy = False

    def __init__(self, said: bytes) -> None:
        self.said = said

    def recv(self) -> bytes:
        said, self.said = self.said[:65536], self.said[65536:]
        return said

    def send(self, data: object) -> int:
        raise BlockingIOError


class Hostile(Clients):
    """A supervisor whose L1 says what it likes."""

    def hear(self, said: bytes) -> None:
        port: Any = Mouth(said)
        self.machine = SimpleNamespace(  # type: ignore[assignment]
            port=port, clock=lambda: 0.0, started=lambda kernel: None, config=dict
        )
        self.selector.close()
        self.selector = SimpleNamespace(  # type: ignore[assignment]
            modify=lambda *a: None, unregister=lambda *a: None, close=lambda: None
        )
        while port.said:
            self.from_port()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"\xff" * 8, "frame of 4294967295 bytes"),
        (p.frame(p.HELLO) * 2, "started twice"),
        (p.frame(p.READY), "started twice"),
    ],
)
def test_an_l1_that_breaks_the_protocol_ends_the_testbed_with_a_line(
    said: bytes, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of these frames is a line of the log: without this, L1 could fill a disk."""
    s = Hostile()
    with pytest.raises(TestbedError, match=f"L1 broke the protocol: .*{why}"):
        s.hear(said)
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_an_l1_that_sends_more_than_its_credit_loses_the_client() -> None:
    s = Hostile()
    client, far = s.join()
    client.channel, s.channels[5] = 5, client
    s.hear(p.frame(p.DATA, 5, bytes(p.CHUNK), p.STDOUT) * (supervisor.OUT_MAX // p.CHUNK + 20))
    assert client not in s.clients.values() and len(client.out) <= supervisor.OUT_MAX + p.CHUNK + 8
    far.close()


def test_notes_of_an_l1_have_a_limit() -> None:
    s = Hostile()
    s.ready = False
    s.hear(p.frame(p.READY, 0, b"a" * 1000 + b"\nx" * 100000))
    assert len(s.notes) == supervisor.NOTES_MAX and len(s.notes[0]) == supervisor.NOTE_MAX


def test_an_l1_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PORT_MAX", 1 << 20)
    s = Hostile()
    s.hear(b"")
    with pytest.raises(TestbedError, match="L1 takes no more: 1 MiB"):
        for _ in range(40):
            Supervisor.to_port(s, bytes(p.CHUNK))


def test_garbage_ends_the_connection(clients: Clients) -> None:
    client, far = clients.join()
    far.sendall(b"\xff" * 64)
    clients.from_client(client)
    assert far.recv(1) == b""


class Sleeper(Machine):
    """A machine that uses a processor even if it has nothing to do."""

    RESTLESS = True

    def __init__(self) -> None:
        super().__init__({"memory": 0}, print)
        self.told: list[bool] = []
        self.time = 100.0

    def clock(self) -> float:
        return self.time

    def rest(self, on: bool) -> None:
        self.told.append(on)


@pytest.fixture
def watched(clients: Clients) -> Clients:
    """A supervisor with a machine that is to rest, at the time 100."""
    clients.machine = Sleeper()
    clients.watchdog = 30.0
    clients.last_life = clients.busy_until = 100.0
    return clients


def test_a_restless_machine_rests_between_commands(watched: Clients) -> None:
    machine = watched.machine
    assert isinstance(machine, Sleeper)
    watched.channels[1] = None  # a command runs
    watched.watch(101.0)
    assert (machine.told, watched.sent) == ([], [(p.PING, 0, 0, b"")])
    del watched.channels[1]
    watched.watch(101.0 + REST_AFTER)
    assert machine.told == [], "not at once"
    watched.watch(101.1 + REST_AFTER)
    watched.watch(900.0)
    assert machine.told == [True], "its silence is no hang, and it is not asked"
    assert len(watched.sent) == 1
    watched.channels[2] = None
    watched.watch(time.monotonic())
    assert machine.told == [True, False]


def test_silence_is_a_hang(watched: Clients) -> None:
    machine = watched.machine
    assert isinstance(machine, Sleeper)
    watched.channels[1] = None
    watched.watch(101.0)
    machine.time = 130.0
    watched.watch(1000.0)
    assert len(watched.sent) == 1, "it is asked again only when it has answered"
    machine.time = 130.1
    with pytest.raises(TestbedError, match="L1 hung: no sign of life for 30 s"):
        watched.watch(1000.0)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def kernel() -> assets.Kernel:
    """The kernel that the testbed would boot. A test must ask for this fixture before ``home``, so
    that the kernel is found in the user's own cache.
    """
    try:
        return assets.find_kernel(None)
    except TestbedError as e:
        pytest.skip(str(e))


def test_boot_files_are_built_once_and_for_their_inputs(kernel: assets.Kernel, home: Path) -> None:
    base = Path(paths.cache_dir("boot"))
    for name, age in (("unused", 0), ("used", None)):
        (base / name).mkdir()
        os.utime(base / name, None if age is None else (age, age))
    said: list[str] = []
    first = assets.boot_files(kernel, said.append)
    assert len(said) == 1
    assert Path(first[0]).read_bytes()[:4] == b"\x7fELF"
    initrd = Path(first[1]).read_bytes()
    for part in (b"init", b"busybox", b"agent.pyc", b"m/virtiofs.ko", b"m/kvm_amd.ko"):
        assert b"00000000" + part + b"\0" in initrd, part  # the header's last field, then the name
    assert assets.boot_files(kernel, said.append) == first
    assert len(said) == 1, "the second time it is there"
    assert not (base / "unused").exists()
    assert (base / "used").exists()


def test_kernel_by_version(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have = [
        assets.Kernel(v, "", "")
        for v in ("6.12.9-cloud-amd64", "6.1.0-50-cloud-amd64", "6.1.0-9-cloud-amd64")
    ]
    monkeypatch.setattr(assets, "kernels", lambda: have)
    assert assets.find_kernel(None).version == "6.1.0-50-cloud-amd64"
    assert assets.find_kernel("6.12").version == "6.12.9-cloud-amd64"
    assert assets.find_kernel("6.1.0-9-cloud-amd64").version == "6.1.0-9-cloud-amd64"
    for version in ("6", "5.10", "6.1.0-9"):
        if version == "6":
            assert assets.find_kernel(version).version == "6.12.9-cloud-amd64"
            continue
        with pytest.raises(TestbedError, match="setup --kernel-version"):
            assets.find_kernel(version)


def test_qemu_limits_its_vcpus() -> None:
    assert Qemu("", (7, 2, 22)).max_cpus == 1
    assert Qemu("", (8, 0, 5)).max_cpus == 1
    assert Qemu("", (8, 1)).max_cpus > 1
    assert Qemu("", (10, 0, 2)).max_cpus > 1


def program(path: Path, says: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def test_the_newest_qemu_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{home}/bin")
    with pytest.raises(HostError, match="install qemu-system-x86"):
        qemu.newest()
    program(home / "bin" / qemu.NAME, "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)")
    assert str(qemu.newest()) == "QEMU 7.2.22"
    assert qemu.newest().argv == [f"{home}/bin/{qemu.NAME}"]
    cache = Path(paths.cache_root(), "testbed/qemu")
    for number in ("9.2.1", "10.0.2", "8.1"):
        program(cache / number / qemu.PROGRAM, "")
    (cache / "11.0.broken").mkdir()
    assert [str(q)[5:] for q in qemu.qemus()] == ["10.0.2", "9.2.1", "8.1", "7.2.22"]
    assert qemu.newest().argv[0] == f"{cache}/10.0.2/{qemu.PROGRAM}"
    firmware = ("usr/share/qemu", "usr/share/seabios")
    assert all(f"{cache}/10.0.2/{part}" in qemu.newest().argv for part in firmware)
    assert set(firmware) < set(qemu.PARTS)


def test_versions_are_ordered_by_their_numbers() -> None:
    names = ["6.12.9-cloud-amd64", "6.1.0-9-cloud-amd64", "6.1.0-50-cloud-amd64"]
    assert sorted(names, key=qemu.version) == [names[1], names[2], names[0]]
    assert qemu.version("none") == () < qemu.version("0")


def test_what_is_missing_is_named_with_its_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "VIRTIOFSDS", ())
    monkeypatch.setattr(assets, "kernels", list)
    monkeypatch.setenv("PATH", "/nowhere")
    lacks = dict(assets.missing())
    assert "virtiofsd" in lacks
    assert "qemu-system-x86" in lacks["qemu-system-x86_64"]
    assert not Testbed.is_set_up()
    with pytest.raises(TestbedError, match="not set up"):
        Testbed().up()
    monkeypatch.setattr(assets, "_depmod", lambda: None)
    monkeypatch.delattr(assets, "_fetch")  # all is named before anything is downloaded
    with pytest.raises(TestbedError) as e:
        assets.setup(print)
    for what in ("qemu-system-x86_64", "virtiofsd", "depmod"):
        assert f"{what} is missing (run as root: apt-get install --no" in str(e.value)


def test_a_bug_in_the_agents_child_is_told() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import agent\n"
        "agent.Agent.child(None, {}, ['no descriptor'], '', -1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "pyvmm/testbed")], capture_output=True, text=True
    )
    assert done.returncode == 126
    assert "in child" in done.stderr and "TypeError" in done.stderr


def test_agent_needs_nothing_of_pyvmm() -> None:
    """The agent runs in L1 with -I -S, where it cannot import pyvmm. It imports nothing slow
    either.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); import agent; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT / "pyvmm/testbed")],
        capture_output=True,
        text=True,
    )
    loaded = set(done.stdout.split())
    assert "protocol" in loaded, done.stderr
    assert not {m for m in loaded if m.startswith("pyvmm")}
    assert not loaded & {"re", "json", "typing", "subprocess", "ctypes", "socket"}


def test_runtime_directory_must_be_private(home: Path) -> None:
    path = Path(paths.runtime_dir())
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)
    with pytest.raises(HostError, match="private"):
        paths.runtime_dir()
    path.rmdir()
    path.symlink_to(home)
    with pytest.raises(HostError, match="private"):
        paths.runtime_dir()


def test_runtime_directory_leaves_room_for_a_socket(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = home / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    path = f"{paths.runtime_dir()}/testbed-{'x' * 32}/socket.root"
    assert not path.startswith(str(deep))
    assert len(path) < 108


@pytest.mark.parametrize(("cpu", "slow"), [("amd", "boot_files"), ("intel", "lower")])
def test_what_takes_long_is_made_before_anybody_can_connect(
    home: Path, monkeypatch: pytest.MonkeyPatch, cpu: str, slow: str
) -> None:
    bed = Testbed("slow", cpu=cpu)
    up = []

    def make(*args: object) -> None:
        up.append(bed.is_up())
        raise BuildError("the kernel has no vmlinux", "use another one")

    kernel = assets.Kernel("6.1.0-9-cloud-amd64", "", "")
    monkeypatch.setattr(machine(cpu), "missing", staticmethod(list))
    monkeypatch.setattr(assets, "find_kernel", lambda *args: kernel)
    monkeypatch.setattr(assets if cpu == "amd" else layers, slow, make)
    with pytest.raises(TestbedError, match="no vmlinux; use another one"):
        bed.up()
    assert up == [False] and not bed.is_up()


def test_nested_use_ends_with_the_outer_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Testbed, "is_up", lambda self: "up" in calls)
    monkeypatch.setattr(Testbed, "up", lambda self, tethered: calls.append("up"))
    monkeypatch.setattr(Testbed, "down", lambda self: calls.append("down"))
    bed = Testbed("nest")
    with bed:
        assert bed.name.startswith("nest-")
        with bed:
            pass
        assert calls == ["up"]
    assert calls == ["up", "down"]
    assert bed.name == "nest"


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """A directory that another user may enter."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.mark.parametrize("user", ["ours", "nobody"])
def test_protect_leaves_only_the_given_directories_writable(
    shared_directory: Path, user: str
) -> None:
    directories = [shared_directory / "open", shared_directory / "shut"]
    for directory in directories:
        directory.mkdir()
    become = []
    if user == "nobody" and os.geteuid() == 0:
        need_readable_checkout()
        become = BECOME
        for directory in directories:
            os.chown(directory, 65534, 65534)
    code = (
        "import sys\nfrom pyvmm.hostnet import isolate\n"
        "isolate.protect([sys.argv[1]])\nopen(sys.argv[1] + '/x', 'w').close()\n"
        "try: open(sys.argv[2] + '/x', 'w')\nexcept OSError as e: print(e.strerror)"
    )
    done = subprocess.run(
        [*become, sys.executable, "-B", "-c", code, *directories],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if "OSError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip(f"not allowed here: {done.stderr.splitlines()[-1]}")
    assert done.stdout == "Read-only file system\n", done.stderr
    assert (directories[0] / "x").exists()


def test_a_tethered_child_dies_with_whoever_started_it() -> None:
    code = (
        "import subprocess, sys, time; from pyvmm.host.tether import tethered\n"
        "print(subprocess.Popen(tethered(['sleep', '1000'])).pid, flush=True); time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while psutil.Process(pid).name() != "sleep":
            assert time.monotonic() < deadline
        parent.kill()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_host_without_setpriv_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="install util-linux"):
        tethered(["true"])


# --- names, directories, options ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 33, "a b"])
def test_names(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not name:
        assert Testbed().name == "default"
        monkeypatch.setenv("PYVMM_TESTBED", "mine")
        assert Testbed().name == "mine"
        return
    with pytest.raises(TestbedError, match="testbed name"):
        Testbed(name)


def test_default_writable_is_the_checkout(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "a/b").mkdir(parents=True)
    assert testbed.default_writable(str(tmp_path / "a/b"))[0] == str(tmp_path)
    assert testbed.default_writable("/")[0] == "/"


def test_is_below() -> None:
    assert testbed.is_below("/a/b", "/a")
    assert testbed.is_below("/a", "/a")
    assert not testbed.is_below("/ab", "/a")
    assert testbed.is_below("/a", "/")


def test_check_compares_with_what_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = {
        "ready": True,
        "cpus": 2,
        "memory": 4 << 30,
        "kernel": "6.1.0-9-cloud-amd64",
        "writable": ["/srv/x"],
        "shares": True,
        "kvm": ["npt=0"],
        "add": [],
    }
    monkeypatch.setattr(Testbed, "status", lambda self: status)
    assert Testbed(cpus=2, kernel="6.1", writable=["/srv/x/y"]).check("/srv/x") == ""
    assert "lost" in Testbed().check("/srv")
    assert Testbed(kvm=["npt=0"], add=["/srv/y"]).check("/srv/x") == ""
    for wanted in (
        {"cpus": 1},
        {"memory": 1 << 30},
        {"kernel": "6.12"},
        {"writable": ["/srv"]},
        {"kvm": ["npt=1"]},
    ):
        with pytest.raises(TestbedError, match="running testbed"):
            Testbed(**wanted).check("/srv/x")
    status |= {"shares": False, "add": ["/srv/y"]}
    assert Testbed(cpu="intel", add=["/srv/x/../y"]).check("/") == ""
    with pytest.raises(TestbedError, match="has not travelled"):
        Testbed(cpu="intel", add=["/srv/z"]).check("/")


def command_line(*argv: str) -> int:
    from pyvmm.cli import testbed as cli
    from pyvmm.cli.support.parser import Parser

    parser = Parser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(argv))


def test_status_when_down(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line("status") == 1
    assert capsys.readouterr().out.startswith("down")
    assert command_line("status", "--json") == 1
    assert json.loads(capsys.readouterr().out)["up"] is False
    assert command_line("down") == 0
    assert not list((home / "run").rglob("testbed-*")), "asking leaves nothing behind"


@pytest.mark.parametrize(
    "argv",
    [
        ("sideways",),
        ("ls", "-l"),
        ("--cpus", "9", "--", "true"),
        ("--memory", "1", "--", "true"),
        ("--memory", "4X", "up"),
        ("--cpu", "via", "up"),
        ("--kvm", "ept", "up"),
        ("--kvm", "ept=0 x=1", "up"),
    ],
)
def test_bad_usage(argv: tuple[str, ...], home: Path) -> None:
    with pytest.raises(UsageError):
        command_line(*argv)


def test_a_command_inside_the_testbed_runs_right_there(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "testbed", "--", "sh", "-c", "echo here; exit 4"],
        env={**os.environ, testbed.INSIDE: "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (4, "here\n")
