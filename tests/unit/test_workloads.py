"""Ping and iperf3 on the host's side: how they are run, and what becomes of what they report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import helper, workloads
from pyvmm._ext import lib
from pyvmm.errors import HostError, UsageError
from pyvmm.hostnet import netns, tools
from pyvmm.hostnet.netns import Namespace
from pyvmm.matrix.run import combine
from pyvmm.workloads import ToolFailed, check_echo, run_tool, tcp_mbit
from tests.driver import wait_for

PATIENCE = 60.0
NOBODY = 65534


SERVER = "10.0.0.2"
PING = tools.ping(SERVER, 3, 0.2)


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


@pytest.fixture(params=["as it is", "sealed"])
def sealed(request: pytest.FixtureRequest) -> Iterator[bool]:
    """This process with its rights, or with a helper that alone has them."""
    if request.param == "as it is":
        yield False
        return
    with helper.start():
        yield True


def settle(sealed: bool) -> None:
    if sealed:
        tools.permit()
        helper.seal()


def fake(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str, script: str) -> None:
    """A tool of this name that is a program of ours."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_the_tools_themselves(space: Namespace, sealed: bool) -> None:
    """In the namespace, where nothing but its loopback answers."""
    settle(sealed)
    rtt, lost = workloads.read_ping(run_tool(space, tools.ping("127.0.0.1", 3, 0.05), PATIENCE))
    assert rtt > 0 and lost == 0
    with pytest.raises(ToolFailed, match=r"^ping failed: "):
        run_tool(space, PING, PATIENCE)
    with pytest.raises(ToolFailed, match=r"^iperf3 failed: iperf3: error - unable to connect"):
        run_tool(space, tools.iperf3("127.0.0.1", 5201, 1, json=False), PATIENCE)
    with pytest.raises(ToolFailed, match="cannot read its result: unable to connect to server"):
        tcp_mbit(space, "127.0.0.1", 1, attempts=1, timeout=PATIENCE)


@pytest.mark.parametrize("own", [True, False], ids=["helper", "none"])
def test_the_tools_of_an_ordinary_user(own: bool) -> None:
    """Who is root in a user namespace alone: the runner enters it."""
    if os.geteuid() == 0 and netns.why_no_user_namespace():
        pytest.skip(netns.why_no_user_namespace())

    def body() -> tuple[list[str], list[int]]:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            lib.pv_be_seen(True)  # else its files in /proc are root's
        with contextlib.ExitStack() as stack:
            if own:
                stack.enter_context(helper.start())
            space = stack.enter_context(Namespace(address=f"{SERVER}/24"))
            assert space.user is not None
            settle(own)
            run_tool(space, PING, PATIENCE)
            with pytest.raises(ToolFailed, match="unable to connect"):
                run_tool(space, tools.iperf3(SERVER, 5201, 1, json=False), PATIENCE)
            with pytest.raises(ToolFailed, match="echo cannot be reached"):
                check_echo(space, (SERVER, 7), 100, 0.1)
        return ["done"], []

    assert helper.in_child(body, "another user") == (["done"], [])


#: What a tool sees of itself. The shell, which cannot make a process, has it read by its own words.
LOOK = """while read -r name value; do case $name in CapEff:|CapBnd:|NoNewPrivs:|Seccomp:)
echo "$name $value";; esac; done </proc/self/status
while read -r name value; do case $name in *:*) echo "card $name";; esac; done </proc/net/dev
export; echo "$@" >&2; echo /proc/self/fd/*; kill -9 $PPID; (true)
"""


def test_what_a_tool_has(
    space: Namespace, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its namespace, at most the right to make pings, no environment, no descriptor, no processes,
    nobody to send signals to.
    """
    fake(monkeypatch, tmp_path, "ping", LOOK)
    fake(monkeypatch, tmp_path, "iperf3", LOOK)
    monkeypatch.setenv("SECRET", "x")
    settle(sealed)
    for words, rights, argv in (
        (PING, 1 << tools.CAP_NET_RAW, "-q -c 3 -i 0.2 10.0.0.2"),
        (
            tools.iperf3(SERVER, 5203, 2.5, reverse=True, udp=(64, 512000)),
            0,
            "-c 10.0.0.2 -p 5203 -t 2.5 --connect-timeout 3000 --json -u -l 64 -b 512000 -R",
        ),
        (
            tools.iperf3(SERVER, 5201, 1000000, json=False),
            0,
            "-c 10.0.0.2 -p 5201 -t 1000000 --connect-timeout 3000 -f m",
        ),
    ):
        said = tools.run(space, words, PATIENCE).text.splitlines()
        facts = {name: value for name, _, value in (line.partition(" ") for line in said)}
        assert int(facts["CapBnd:"], 16) == rights, said
        assert os.geteuid() or int(facts["CapEff:"], 16) == rights, said
        assert (facts["NoNewPrivs:"], facts["Seccomp:"]) == ("1", "2")
        cards = {line.split()[1].rstrip(":") for line in said if line.startswith("card ")}
        assert cards == {"lo", "tap0"} and argv in said
        assert not any("SECRET" in line for line in said) and any("LC_ALL" in line for line in said)
        (files,) = (line for line in said if line.startswith("/proc/self/fd/"))
        # 10: where the shell has its script; 3: the directory as the shell looks at it.
        assert {int(Path(name).name) for name in files.split()} <= {0, 1, 2, 3, 10}, files
        text = "\n".join(said)
        assert "annot fork" in text and "ermitted" in text, text


def test_a_missing_tool_is_the_host_s_fault(
    space: Namespace, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was missing before, or is gone since, or is no program."""
    path = os.environ["PATH"]
    fake(monkeypatch, tmp_path, "iperf3", "")
    (tmp_path / "iperf3").write_bytes(b"\x7fELF")
    monkeypatch.setenv("PATH", str(tmp_path))
    settle(sealed)
    iperf3 = tools.iperf3(SERVER, 5201, 1)
    for words in (PING, iperf3):
        with pytest.raises(HostError, match=rf"^{words[0]} cannot be run; install ") as e:
            run_tool(space, words, PATIENCE)
        assert not isinstance(e.value, ToolFailed)
    (tmp_path / "iperf3").unlink()
    monkeypatch.setattr(workloads, "PAUSE", 1000)
    begin = time.monotonic()
    with pytest.raises(HostError, match="iperf3 cannot be run"):
        tcp_mbit(space, SERVER, 1, attempts=9, timeout=9)
    assert time.monotonic() - begin < PATIENCE
    if sealed:
        monkeypatch.setenv("PATH", path)
        with pytest.raises(UsageError, match=r"^the tool ping: the sandbox has only what"):
            run_tool(space, PING, PATIENCE)


def test_a_failure_says_why(
    space: Namespace, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, tmp_path, "ping", f". {tmp_path}/do")
    settle(sealed)
    for script, why in (
        ("echo first; echo no route; exit 3", "no route"),
        ('echo \'{"error": "busy"}\' >&2; exit 1', "busy"),
        ("exit 1", "it said nothing"),
        ("kill -9 $$", "it said nothing"),
    ):
        (tmp_path / "do").write_text(script)
        with pytest.raises(ToolFailed, match=rf"^ping failed: {why}$"):
            run_tool(space, PING, PATIENCE)


def test_too_much_and_too_long(
    space: Namespace, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that goes on is killed; so is one whose caller is interrupted."""
    pid = tmp_path / "pid"
    fake(monkeypatch, tmp_path, "ping", f"echo $$ >{pid}; . {tmp_path}/do")
    settle(sealed)
    (tmp_path / "do").write_text("while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done")
    monkeypatch.setattr(tools, "OUTPUT_MAX", 1 << 20)
    if not sealed:  # the helper has the limit that it was made with
        with pytest.raises(ToolFailed, match=r"^ping has printed more than 1 MiB$"):
            run_tool(space, PING, PATIENCE)
        assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    for script in ("exec sleep 600", "exec >&- 2>&-; exec sleep 600"):
        pid.unlink(missing_ok=True)
        (tmp_path / "do").write_text(script)
        with pytest.raises(ToolFailed, match=r"^ping did not end within 1 s$"):
            run_tool(space, PING, 1.0)
        # A busy host may not have run its first line.
        number = pid.read_text().strip() if pid.exists() else ""
        assert not number or not Path(f"/proc/{number}").exists()
    (tmp_path / "do").write_text("exec sleep 600")

    class Interrupted(socket.socket):
        def recv(self, *args: object) -> bytes:
            assert wait_for(lambda: pid.exists() and pid.read_text().strip() != "")
            raise KeyboardInterrupt

    pid.unlink(missing_ok=True)
    pair = socket.socketpair

    def socketpair(family: int, kind: int) -> tuple[socket.socket, socket.socket]:
        ours, theirs = pair(family, kind)
        return Interrupted(fileno=ours.detach()), theirs

    monkeypatch.setattr(socket, "socketpair", socketpair)
    with pytest.raises(KeyboardInterrupt):
        run_tool(space, PING, PATIENCE)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    assert not tools._running


def test_a_runner_ends_when_it_is_told_to(
    space: Namespace, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks may have lent it something that is no socket, and that nobody closes."""
    pid = tmp_path / "pid"
    fake(monkeypatch, tmp_path, "ping", f"echo $$ >{pid}; exec sleep 600")
    lent = os.eventfd(0)
    with space.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        settle(sealed)
        host, port = server.getsockname()
        for name, *about in (PING, tools.echo(host, port, 9)):
            path = "" if name == tools.ECHO else str(tmp_path / "ping")
            words = [name, "start", path, "1000000", "\n".join(about)]
            assert space.net is not None
            (runner,), _ = helper.do("tool", *words, fds=[lent, space.net.fileno()])
            if name == "ping":
                assert wait_for(lambda: pid.exists() and pid.read_text().strip() != "", PATIENCE)
            else:
                server.settimeout(PATIENCE)
                server.accept()[0].close()
            helper.do("tool", name, "end", runner)
            assert not Path(f"/proc/{runner}").exists()
        gone = Path(f"/proc/{pid.read_text().strip()}")
        assert wait_for(lambda: not gone.exists(), PATIENCE)
    os.close(lent)


def test_a_server_may_need_a_moment(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt fails, and the next one is made."""
    monkeypatch.setattr(workloads, "PAUSE", 0.01)
    good = json.dumps({"end": {"sum_received": {"bits_per_second": 5e8}}})
    calls, most = tmp_path / "calls", tmp_path / "most"
    fake(
        monkeypatch,
        tmp_path,
        "iperf3",
        f"""echo "$@" >>{calls}; read -r most <{most}; n=0
while read -r x; do n=$((n + 1)); done <{calls}
if [ $n -gt $most ]; then echo '{good}'; else echo '{{"error": "Connection refused"}}'; exit 1; fi
""",
    )
    most.write_text("2\n")
    got = tcp_mbit(space, SERVER, 1.5, reverse=True, attempts=3, timeout=PATIENCE)
    assert got == 500.0 and len(calls.read_text().splitlines()) == 3
    assert calls.read_text().startswith("-c 10.0.0.2 -p 5201 -t 1.5 ")
    calls.unlink()
    most.write_text("3\n")
    with pytest.raises(ToolFailed, match="Connection refused"):
        tcp_mbit(space, SERVER, 1, attempts=3, timeout=PATIENCE)
    assert len(calls.read_text().splitlines()) == 3


@pytest.mark.parametrize("text", ["", "null", "[]", '{"end": 3}', '{"error": "busy"}', "\ufffd\0"])
@pytest.mark.parametrize("read", [workloads.read_ping, workloads.received_mbit, workloads.read_udp])
def test_nonsense_is_an_error(read: Any, text: str) -> None:
    with pytest.raises(ToolFailed, match="cannot read its result: "):
        read(text)


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("ping", ["8.8.8.8; reboot", "1", "0.2"]),
        ("ping", ["host.example", "1", "0.2"]),
        ("ping", ["::1", "1", "0.2"]),
        ("ping", ["-f", "1", "0.2"]),
        ("ping", ["127.1", "1", "0.2"]),
        ("ping", ["", "1", "0.2"]),
        ("ping", [SERVER, "0", "0.2"]),
        ("ping", [SERVER, "-1", "0.2"]),
        ("ping", [SERVER, "+1", "0.2"]),
        ("ping", [SERVER, "\u0661", "0.2"]),
        ("ping", [SERVER, "1" * 5000, "0.2"]),
        ("ping", [SERVER, "1000001", "0.2"]),
        ("ping", [SERVER, "1", "0"]),
        ("ping", [SERVER, "1", "nan"]),
        ("ping", [SERVER, "1", "-f"]),
        ("ping", [SERVER, "1", "0.2", "-f"]),
        ("ping", [SERVER, "1"]),
        ("iperf3", [SERVER, "0", "1", ""]),
        ("iperf3", [SERVER, "65536", "1", ""]),
        ("iperf3", [SERVER, "5201", "inf", ""]),
        ("iperf3", [SERVER, "5201", "0", ""]),
        ("iperf3", [SERVER, "5201", "1", "--logfile"]),
        ("iperf3", [SERVER, "5201", "1", "json+--logfile"]),
        ("iperf3", [SERVER, "5201", "1", "", "64"]),
        ("iperf3", [SERVER, "5201", "1", "", "0", "0"]),
        ("iperf3", [SERVER, "5201", "1", "", "64", "1M"]),
        ("iperf3", [SERVER, "5201", "1", "", "64", "0", "--logfile"]),
        ("echo", [SERVER, "7001", "0"]),
        ("echo", [SERVER, "7001", str(1 << 40)]),
        ("echo", [SERVER, "7001"]),
        ("sh", ["-c", "reboot"]),
    ],
)
def test_words_that_are_refused(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, about: list[str]
) -> None:
    """Whoever has taken the process over has a tool do nothing else than what it is for."""
    for tool in ("ping", "iperf3", "sh"):
        fake(monkeypatch, tmp_path, tool, f"echo ran >{tmp_path}/ran")
    with helper.start():
        tools.permit()
        helper.permit("tool", f"sh {tmp_path}/sh")
        helper.seal()
        with pytest.raises(
            HostError, match=r"is no number from|no address|words for|no way|no tool"
        ):
            tools.run(space, [name, *about], PATIENCE)
    assert not (tmp_path / "ran").exists()


def test_what_else_is_refused(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program, another namespace, no time, more tools than a few, to wait for others."""
    fake(monkeypatch, tmp_path, "ping", "exec sleep 600")
    about = "\n".join(PING[1:])
    with helper.start():
        helper.seal()
        with pytest.raises(UsageError, match=r"^the tool ping: the sandbox has only what"):
            run_tool(space, PING, PATIENCE)
    net = space.net.fileno()
    with helper.start() as one, contextlib.ExitStack() as stack:
        tools.permit()
        helper.permit("place", str(os.fstat(net).st_ino))
        helper.seal()
        ours, theirs = map(stack.enter_context, socket.socketpair())
        end = theirs.fileno()
        host = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, host)
        with pytest.raises(UsageError, match=r"^the tool ping: the sandbox has only what"):
            one.ask(["tool", "ping", "start", "/bin/sh", "1", about], [end, net])
        path = f"{tmp_path}/ping"
        for place in (host, end):
            with pytest.raises(UsageError, match=r"^ping in a namespace of somebody else's: the"):
                one.ask(["tool", "ping", "start", path, "1", about], [end, place])
        for seconds in ("nan", "-1", "1e9", ""):
            with pytest.raises(HostError, match="is no number from"):
                one.ask(["tool", "ping", "start", path, seconds, about], [end, net])
        for pid in ("1", str(os.getpid()), str(one.pid), "-1", "0"):
            with pytest.raises(HostError, match=r"runs no tool|is no number"):
                one.ask(["tool", "ping", "end", pid])
        ask = ["tool", "ping", "start", path, "600", about]
        runners = [one.ask(ask, [end, net])[0][0] for _ in range(tools.RUNNING_MAX)]
        with pytest.raises(HostError, match="8 tools run already"):
            one.ask(ask, [end, net])
        ours.close()
        theirs.close()
        for runner in runners:
            one.ask(["tool", "ping", "end", runner])


def test_a_tool_ends_with_the_process(
    space: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If somebody kills it, its helper, or the runner."""
    note = tmp_path / "pid"
    fake(monkeypatch, tmp_path, "ping", f"echo $$ >{note}; exec sleep 600")
    for victim in ("process", "helper", "runner"):
        pid = os.fork()
        if not pid:
            helper.start()
            tools.permit()
            helper.permit("place", str(os.fstat(space.net.fileno()).st_ino))
            helper.seal()
            with contextlib.suppress(HostError):
                run_tool(space, PING, PATIENCE)
            os._exit(0)
        assert wait_for(lambda: note.exists() and note.read_text().strip() != "")
        tool = note.read_text().strip()
        status = Path(f"/proc/{tool}/stat").read_text().rpartition(")")[2].split()
        runner = status[1]
        stat = Path(f"/proc/{runner}/stat").read_text()
        assert "(pyvmm-tool)" in stat
        parent = stat.rpartition(")")[2].split()[1]
        killed = {"process": pid, "helper": int(parent), "runner": int(runner)}[victim]
        os.kill(killed, signal.SIGKILL)
        assert wait_for(lambda: not Path(f"/proc/{tool}").exists())  # noqa: B023
        os.waitpid(pid, 0)
        note.unlink()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda data: data, ""),
        (lambda data: data[:-1], "99999 of 100000 bytes came back"),
        (lambda data: data[:777] + bytes([data[777] ^ 1]) + data[778:], "another byte 777"),
        (None, "bytes came back: timed out"),
    ],
)
def test_bytes_there_and_back(space: Namespace, sealed: bool, spoil: Any, problem: str) -> None:
    """Each byte counts, and so does a server that keeps them."""
    with space.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        settle(sealed)
        kept: list[socket.socket] = []

        def serve() -> None:
            s, _ = server.accept()
            kept.append(s)
            data = b""
            while len(data) < 100_000 and (more := s.recv(1 << 16)):
                data += more
            if spoil is not None:
                s.sendall(spoil(data))
                s.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        timeout = PATIENCE if spoil is not None else 5.0
        try:
            check_echo(space, server.getsockname(), 100_000, timeout)
            assert not problem
        except ToolFailed as e:
            assert problem and problem in str(e)
        thread.join()
        for s in kept:
            s.close()


def test_words_for_sets_of_features() -> None:
    """Each data path gets the sets that it can have, none twice."""

    def sets(modes: str, features: str) -> list[str]:
        return [f"{c.mode} {c.features}" for c in combine("tiny", modes, "1", features)]

    each = sets("emulated,vhost-net", "each,packed")
    assert len(set(each)) == len(each)
    assert "emulated packed" in each and "emulated no-uso" in each and "vhost-net rss" in each
    assert (
        "emulated packed+in-order+coalescing+rss+hash-report+device-stats+access-platform" in each
    )
    assert "vhost-net hash-report" not in each
    pairs = sets("vhost-user", "pairs")
    assert len(pairs) == 15 and "vhost-user packed+no-tso" in pairs
    assert len(sets("vhost-net:notify=exit", "pairs")) == 9
