"""The control socket's protocol against well-behaved, malformed, slow and vanishing clients; the
machine is a fake one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pyvmm import control
from pyvmm.control import Door, framer, registry, server
from pyvmm.control.client import Client, connect
from pyvmm.control.framer import Framer, TooMuch
from pyvmm.control.registry import Claim
from pyvmm.control.server import Command, QmpError, Server, TakingCommand, WaitingCommand
from pyvmm.errors import ControlError, HostError, MachineMissing, PyvmmError, UsageError
from pyvmm.outcome import Outcome
from tests.descriptors import open_fds

if TYPE_CHECKING:
    from pyvmm.control.commands import Controlled

PATIENCE = 30.0
HELLO = b'{"execute":"qmp_capabilities"}'


class Fake:
    """Stands for the machine: notes what is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.entered, self.leave = threading.Event(), threading.Event()


def echo(machine: Fake, given: dict[Any, Any]) -> dict[Any, Any]:
    machine.calls.append(given)
    return given


def fail(machine: Fake, given: dict[str, str]) -> None:
    raise {
        "host": HostError("no luck", "try"),
        "bug": ZeroDivisionError("oh"),
        "qmp": QmpError("no", "DeviceNotFound"),
    }[given["how"]]


def wait(machine: Fake, given: dict[Any, Any]) -> dict[Any, Any]:
    machine.entered.set()
    machine.leave.wait(PATIENCE)
    return {}


def hold(sock: socket.socket) -> None:
    """Take a connection over until its client goes."""
    with sock:
        sock.setblocking(True)
        assert not sock.recv(1)


COMMANDS = {
    "echo": Command(echo, "", text="str?", n="int?", flag="bool?", rows="list?", big_thing="dict?"),
    "need": Command(echo, "", text="str"),
    "fail": Command(fail, "", how="str"),
    "wait": Command(wait, ""),
    "apart": WaitingCommand(wait, ""),
    "apart-fail": WaitingCommand(fail, "", how="str"),
    "take": TakingCommand(lambda machine, given: hold, ""),
    "large": Command(lambda machine, given: "x" * given["size"], "", size="int"),
}


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, with a short path."""
    path = f"/tmp/q{os.getpid()}-{tmp_path.name[-8:]}"
    os.mkdir(path, 0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", path)
    monkeypatch.delenv("PYVMM_IN_TESTBED", raising=False)
    yield Path(path, "pyvmm", "machines")
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def srv(runtime: Path, fake: Fake) -> Iterator[Server]:
    before = open_fds()
    s = Server(Claim(), lambda: COMMANDS, fake, {"version": {}, "capabilities": []})
    yield s
    fake.leave.set()
    s.close()
    s.close()
    assert not os.listdir(runtime)
    assert not any(t.name == "control" for t in threading.enumerate())
    assert not open_fds() - before


class Raw:
    """A client that sends what it likes."""

    def __init__(self, srv: Server, negotiate: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(srv.path)
        self.lines: deque[bytes] = deque()
        self.rest = b""
        self.greeting = self.get()
        if negotiate:
            assert self.ask(HELLO) == {"return": {}}

    def get(self) -> Any:
        """The next message; None at the end of the connection."""
        while not self.lines:
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            *whole, self.rest = (self.rest + data).split(b"\r\n")
            self.lines.extend(whole)
        return json.loads(self.lines.popleft())

    def ask(self, data: bytes) -> Any:
        self.sock.sendall(data)
        return self.get()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.sock.close()


def error(answer: dict[str, dict[str, str]]) -> tuple[str, str]:
    return answer["error"]["class"], answer["error"]["desc"]


def alive(srv: Server) -> bool:
    """Whether the server still serves another."""
    with Raw(srv) as other:
        return bool(other.ask(b'{"execute":"echo"}') == {"return": {}})


# --- protocol -------------------------------------------------------------------------------------


def test_greeting_and_negotiation(srv: Server) -> None:
    with Raw(srv, negotiate=False) as c:
        assert c.greeting == {"QMP": {"version": {}, "capabilities": []}}
        kind, text = error(c.ask(b'{"execute":"echo"}'))
        assert kind == "CommandNotFound" and "qmp_capabilities" in text
        assert (
            error(c.ask(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'))[0]
            == "GenericError"
        )
        assert c.ask(b'{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":1}') == {
            "return": {},
            "id": 1,
        }
        assert error(c.ask(HELLO))[0] == "CommandNotFound"
        assert c.ask(b'{"execute":"echo"}') == {"return": {}}


@pytest.mark.parametrize("ident", ["7", '"a"', "null", '{"a":[1]}', "[]", "1.5", '"\\ud800"'])
def test_id_comes_back(srv: Server, ident: str) -> None:
    with Raw(srv) as c:
        assert c.ask(f'{{"execute":"echo","id":{ident}}}'.encode()) == {
            "return": {},
            "id": json.loads(ident),
        }
        assert c.ask(f'{{"execute":"none","id":{ident}}}'.encode())["id"] == json.loads(ident)


BAD = {
    b"[1, 2]": "must be a JSON object",
    b"{}": "lacks member 'execute'",
    b'{"execute":"echo","x":1}': "member 'x' is unexpected",
    b'{"exec-oob":"echo"}': "member 'exec-oob' is unexpected",
    b'{"execute":1}': "must be a string",
    b'{"execute":"echo","arguments":[]}': "must be an object",
    b'{"execute":"echo","arguments":{"y":1}}': "Parameter 'y' is unexpected",
    b'{"execute":"need"}': "Parameter 'text' is missing",
    b'{"execute":"need","arguments":{"text":1}}': (
        "Invalid parameter type for 'text', expected: string"
    ),
    b'{"execute":"echo","arguments":{"n":true}}': "expected: integer",
    b'{"execute":"echo","arguments":{"n":1.0}}': "expected: integer",
    b'{"execute":"echo","arguments":{"flag":0}}': "expected: boolean",
    b'{"execute":"echo","arguments":{"big-thing":0}}': "expected: object",
    b"nonsense\n": "JSON parse error",
    b"]\n": "JSON parse error",
    b'"execute"\n': "JSON parse error",
    b"{'execute': 'echo'}": "JSON parse error",
    b'{"execute": }': "JSON parse error",
    b"{]": "JSON parse error",
    b'{"execute":"echo","id":NaN}': "JSON parse error",
    b'{"execute":"echo","id":1e999}': "JSON parse error",
    b'{"execute":"echo","id":' + b"9" * 10000 + b"}": "JSON parse error",
    b'{"execute":"\xc0\x80"}': "JSON parse error",
    b'{"execute":"ec\xff': "JSON parse error",
}


@pytest.mark.parametrize("text", BAD, ids=lambda t: ascii(t)[:30])
def test_malformed_input_is_answered_and_survived(srv: Server, fake: Fake, text: bytes) -> None:
    with Raw(srv) as c:
        kind, desc = error(c.ask(text))
        assert kind == "GenericError" and BAD[text] in desc
        assert c.ask(b'{"execute":"echo","arguments":{"n":3},"id":9}') == {
            "return": {"n": 3},
            "id": 9,
        }
    assert fake.calls == [{"n": 3}]


def test_errors_of_commands(srv: Server) -> None:
    with Raw(srv) as c:
        assert error(c.ask(b'{"execute":"nope"}')) == (
            "CommandNotFound",
            "The command nope has not been found",
        )
        ask = '{{"execute":"fail","arguments":{{"how":"{}"}}}}'
        assert error(c.ask(ask.format("host").encode())) == ("GenericError", "no luck; try")
        assert error(c.ask(ask.format("qmp").encode())) == ("DeviceNotFound", "no")
        assert c.ask(b'{"execute":"echo"}') == {"return": {}}


def test_a_bug_in_a_command_is_answered_and_its_traceback_is_told(
    srv: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with Raw(srv) as c:
        assert error(c.ask(b'{"execute":"fail","arguments":{"how":"bug"}}')) == (
            "GenericError",
            "pyvmm failed: ZeroDivisionError: oh",
        )
        assert c.ask(b'{"execute":"echo"}') == {"return": {}}
    assert [hook.exc_type for hook in told] == [ZeroDivisionError]
    frames = traceback.extract_tb(told[0].exc_traceback)
    thread = told[0].thread
    assert frames[-1].filename == __file__ and thread is not None and thread.name == "control"


def test_any_cut_of_the_stream_is_the_same_stream(srv: Server) -> None:
    text = b'\n {"execute":"echo","id":1,"arguments":{"text":"a\\"}{[\\\\"}}'
    text += b'{"execute":"echo",\r\n"id":2}\n\n{"execute":"echo","id":3}'
    with Raw(srv) as c:
        for size in (1, 2, 3, 7, len(text)):
            for at in range(0, len(text), size):
                c.sock.sendall(text[at : at + size])
            assert [c.get()["id"] for _ in range(3)] == [1, 2, 3]


@given(
    st.lists(
        st.recursive(
            st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
        )
    ),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_framer_gives_back_what_was_put_in(values: list[Any], data: Any) -> None:
    texts = [json.dumps({"v": v}, ensure_ascii=False).encode(errors="replace") for v in values]
    stream = b" \n".join(texts)
    f, out = Framer(), []
    while stream:
        n = data.draw(st.integers(1, len(stream)))
        out += f.feed(stream[:n])
        stream = stream[n:]
    assert out == texts


@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from([b'{"', b"}", b'"', b"\\", b"[", b"]", b"\n", b"\xff"]),
        max_size=60,
    )
)
@settings(max_examples=300, deadline=None)
def test_framer_takes_anything_and_recovers(pieces: list[bytes]) -> None:
    f = Framer()
    with contextlib.suppress(TooMuch):
        for piece in pieces:
            f.feed(piece)
        assert f.feed(b'\xff{"a": 1}')[-1] == b'{"a": 1}'


@given(
    st.lists(
        st.sampled_from([b'{"a":', b"1}", b'"', b"[", b"]", b"\n", b" ", b"\xff", b"x", b"\xf2"]),
        max_size=30,
    ),
    st.lists(st.integers(0, 5)),
)
@example([b"\xf2", b"\xff"], [1])
@example([b"x", b'{"a":', b"1}"], [1, 0, 1])
@settings(max_examples=300, deadline=None)
def test_framer_does_not_care_how_bytes_arrive(tokens: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(tokens)
    whole = Framer().feed(stream)
    f, at = Framer(), 0
    out: list[bytes | None] = []
    for cut in cuts:
        out += f.feed(stream[at : at + cut])
        at += cut
    out += f.feed(stream[at:])
    assert out == whole


TOKENS = st.sampled_from(
    [
        b'{"execute":',
        b'"echo"',
        b"}",
        b',"id":',
        b"1",
        b',"arguments":{',
        b'"n":',
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\n",
        b"\xff",
    ]
)


@given(st.lists(st.lists(TOKENS | st.binary(max_size=8), max_size=30), max_size=4))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_whatever_clients_send_the_server_goes_on(srv: Server, streams: list[list[bytes]]) -> None:
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(Raw(srv)).sock.sendall(b"".join(stream))
        assert alive(srv)


def test_too_long_and_too_deep_end_the_connection(srv: Server) -> None:
    for flood in (b'{"execute":"' + b"x" * framer.INPUT_MAX, b"[" * (framer.NESTING_MAX + 1)):
        with Raw(srv) as c:
            c.sock.sendall(flood)
            assert "JSON parse error, a command" in error(c.get())[1]
            assert c.get() is None
        assert alive(srv)
    with Raw(srv) as c:  # the longest that is taken
        text = "x" * (framer.INPUT_MAX - 100)
        assert (
            c.ask(json.dumps({"execute": "need", "arguments": {"text": text}}).encode())["return"][
                "text"
            ]
            == text
        )


def test_garbage_without_end_is_one_error_and_no_memory(srv: Server) -> None:
    with Raw(srv) as c:
        for _ in range(64):
            c.sock.sendall(b"x" * 65536)
        assert "expecting value" in error(c.get())[1]
        assert c.ask(b'\n{"execute":"echo","id":4}') == {"return": {}, "id": 4}


# --- clients that are slow, or go -----------------------------------------------------------------


def test_half_messages_hold_up_nobody(srv: Server) -> None:
    with Raw(srv) as half, Raw(srv) as other:
        half.sock.sendall(b'{"execute":"echo","id"')
        assert other.ask(b'{"execute":"echo"}') == {"return": {}}
        assert half.ask(b":1}") == {"return": {}, "id": 1}


def test_vanishing_clients(srv: Server) -> None:
    for data in (b"", b'{"exe', b'{"execute":"large","arguments":{"size":1000000}}' * 20):
        for _ in range(20):
            with Raw(srv) as c:
                c.sock.sendall(data)
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(srv.path)
    assert alive(srv)


def test_who_ends_its_side_gets_its_answers_first(srv: Server) -> None:
    with Raw(srv) as c:
        c.sock.sendall(b'{"execute":"echo","id":1}' * 50 + b'{"execute":"ec')
        c.sock.shutdown(socket.SHUT_WR)
        assert [c.get() for _ in range(50)] == [{"return": {}, "id": 1}] * 50
        assert c.get() is None


def test_who_does_not_read_waits_and_is_dropped_for_events(srv: Server, fake: Fake) -> None:
    with Raw(srv) as deaf:
        deaf.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:  # its commands wait behind its answers: the socket fills up
                deaf.sock.sendall(b'{"execute":"large","arguments":{"size":100000}}\n' * 100)
        assert alive(srv)
        with Raw(srv) as other:
            text = "e" * 100_000
            count = server.OUTPUT_MAX // len(text) + 50
            for n in range(count):
                srv.emit("BIG", {"n": n, "text": text})
                assert other.get()["data"]["n"] == n
        deaf.sock.settimeout(PATIENCE)
        size = 0
        with contextlib.suppress(ConnectionResetError):
            while data := deaf.sock.recv(1 << 20):
                size += len(data)
        assert size < server.OUTPUT_MAX
    assert alive(srv)


def test_a_command_that_waits_holds_nobody_else_up(srv: Server, fake: Fake) -> None:
    """Its own client gets its answers in order, after the events of the command."""
    with Raw(srv) as one, Raw(srv) as other:
        one.sock.sendall(b'{"execute":"apart","id":1}{"execute":"echo","id":2}')
        assert fake.entered.wait(PATIENCE)
        for n in range(3):
            assert other.ask(b'{"execute":"echo","id":%d}' % n)["id"] == n
        assert len(fake.calls) == 3
        srv.emit("DONE")
        fake.leave.set()
        assert other.get()["event"] == one.get()["event"] == "DONE"
        assert [one.get()["id"], one.get()["id"]] == [1, 2]
        for how, kind in (("host", "GenericError"), ("qmp", "DeviceNotFound")):
            answer = one.ask(b'{"execute":"apart-fail","arguments":{"how":"%s"}}' % how.encode())
            assert answer["error"]["class"] == kind


def test_whoever_leaves_while_its_command_waits(srv: Server, fake: Fake) -> None:
    with Raw(srv) as one:
        one.sock.sendall(b'{"execute":"apart","id":1}')
        assert fake.entered.wait(PATIENCE)
        one.sock.shutdown(socket.SHUT_WR)
        assert alive(srv)
        fake.leave.set()
        assert one.get()["id"] == 1 and one.get() is None
    fake.entered.clear()
    fake.leave.clear()
    with Raw(srv) as one:
        one.sock.sendall(b'{"execute":"apart"}')
        assert fake.entered.wait(PATIENCE)
    fake.leave.set()
    assert alive(srv)


def test_a_flood_of_commands_does_not_starve_others(srv: Server) -> None:
    with Raw(srv) as flood, Raw(srv) as other:
        stop = threading.Event()

        def drain() -> None:
            while not stop.is_set() and flood.get() is not None:
                pass

        def pour() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    flood.sock.sendall(b'{"execute":"echo"}' * 1000)

        threads = [threading.Thread(target=t) for t in (drain, pour)]
        for t in threads:
            t.start()
        for n in range(20):
            assert other.ask(b'{"execute":"echo","id":%d}' % n)["id"] == n
        stop.set()
        flood.sock.shutdown(socket.SHUT_RDWR)
        for t in threads:
            t.join()


def test_many_clients_and_one_too_many(srv: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(srv)) for _ in range(server.CLIENTS)]
        for n, c in enumerate(clients):
            assert c.ask(b'{"execute":"echo","id":%d}' % n)["id"] == n
        with Raw(srv, negotiate=False) as extra:
            assert error(extra.greeting) == (
                "GenericError",
                f"{server.CLIENTS} clients are connected already",
            )
            assert extra.get() is None
        with pytest.raises(ControlError, match="connected already"):
            Client(srv.path)
        srv.emit("E")
        assert all(c.get()["event"] == "E" for c in clients)
        clients[0].sock.close()
        until = time.monotonic() + PATIENCE
        while True:
            with Raw(srv, negotiate=False) as c:
                if "QMP" in c.greeting:
                    break
            assert time.monotonic() < until


def test_connections_taken_over_are_bounded(srv: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And do not take the place of clients."""
    monkeypatch.setattr(server, "TAKEN_MAX", 2)
    monkeypatch.setattr(server, "CLIENTS", 1)
    taken = [connect(srv.path).take_over("take")[0] for _ in range(2)]
    with connect(srv.path) as client:
        with pytest.raises(ControlError, match="2 connections are taken over by commands already"):
            client.take_over("take")
        assert client.command("echo") == {}
        for sock in taken:
            sock.close()
        until = time.monotonic() + PATIENCE
        while True:
            try:
                client.take_over("take")[0].close()
                break
            except ControlError:
                assert time.monotonic() < until


def test_no_descriptors_left(srv: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "NO_DESCRIPTORS", 0.05)
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(PATIENCE)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(n) for n in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        fill = []
        gc.collect()  # what earlier tests have left closes descriptors when it goes
        try:
            with contextlib.suppress(OSError):
                while True:
                    fill.append(os.dup(0))
            begin = time.process_time()
            s.connect(srv.path)
            s.settimeout(0.3)
            with pytest.raises(TimeoutError):
                s.recv(1)
            assert time.process_time() - begin < 0.2  # it does not spin
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fill:
                os.close(fd)
        s.settimeout(PATIENCE)
        assert s.recv(100).startswith(b'{"QMP"')


# --- events ---------------------------------------------------------------------------------------


def test_events_go_to_those_who_negotiated_with_time_stamps(srv: Server) -> None:
    with Raw(srv) as c, Raw(srv, negotiate=False) as shy:
        before = time.time()
        srv.emit("STOP")
        srv.emit("RESET", {"guest": True})
        first, second = c.get(), c.get()
        assert set(first) == {"event", "timestamp"} and second["data"] == {"guest": True}
        at = first["timestamp"]["seconds"] + first["timestamp"]["microseconds"] / 1e6
        assert before - 0.001 <= at <= time.time()
        assert shy.ask(HELLO) == {"return": {}}


def test_emitting_never_waits_and_is_bounded(srv: Server, fake: Fake) -> None:
    with Raw(srv) as c:
        c.sock.sendall(b'{"execute":"wait"}')
        assert fake.entered.wait(PATIENCE)
        for n in range(5 * server.EVENTS_MAX):
            srv.emit("E", {"n": n})
        fake.leave.set()
        lost = c.get()
        assert lost["event"] == "X_PYVMM_EVENTS_LOST"
        assert lost["data"] == {"count": 4 * server.EVENTS_MAX}
        numbers = [c.get()["data"]["n"] for _ in range(server.EVENTS_MAX)]
        assert numbers == list(range(4 * server.EVENTS_MAX, 5 * server.EVENTS_MAX))
        assert c.get() == {"return": {}}


def test_the_last_events_arrive_before_the_end(runtime: Path, fake: Fake) -> None:
    s = Server(Claim(), lambda: COMMANDS, fake, {})
    with Raw(s) as c, Raw(s) as deaf:
        deaf.sock.sendall(b'{"execute":"large","arguments":{"size":3000000}}')
        s.emit("SHUTDOWN", {"guest": False})
        s.close()
        s.emit("LATE")
        assert c.get()["event"] == "SHUTDOWN"
        assert c.get() is None


# --- the door -------------------------------------------------------------------------------------


@pytest.fixture
def door(runtime: Path, fake: Fake) -> Iterator[Door]:
    before = open_fds()
    d = Door(cast("Controlled", fake), Claim())
    yield d
    d.close()
    d.close()
    assert not os.listdir(runtime)
    assert not any(t.name == "control" for t in threading.enumerate())
    assert not open_fds() - before


def test_a_door_without_a_client(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no server, and nobody to tell."""
    monkeypatch.setattr(server, "Server", None)
    door.emit("E")
    door.ended(Outcome("poweroff"))
    assert door.files() == [door.path, f"{os.path.dirname(door.path)}/{door.name}.machine"]


def test_a_door_opens_for_the_first_client(door: Door) -> None:
    """All clients are served, and told of events and of the end."""
    with connect(door.name) as c, connect(door.path) as other:
        assert c.command("query-version")["package"].startswith("pyvmm-")
        door.emit("E", {"n": 1})
        assert c.wait_event("E")["data"] == other.wait_event("E")["data"] == {"n": 1}
        door.ended(Outcome("panic"))
        door.close()
        assert c.wait_event("GUEST_PANICKED")["data"] == {"action": "shutdown"}
        data = {"guest": True, "reason": "guest-panic", "x-pyvmm-outcome": "panic"}
        assert c.wait_event("SHUTDOWN")["data"] == data


@pytest.mark.parametrize("lack", [OSError(24, "none left"), RuntimeError(), HostError("none left")])
def test_a_door_tries_again(door: Door, monkeypatch: pytest.MonkeyPatch, lack: Exception) -> None:
    """Also a process that has no descriptor or no thread left serves the client later."""
    tried = []

    def make(*args: Any) -> Server:
        tried.append(args)
        if len(tried) < 3:
            raise lack
        return Server(*args)

    monkeypatch.setattr(server, "Server", make)
    monkeypatch.setattr(control, "AGAIN_S", 0.001)
    with connect(door.name) as c:
        assert c.command("query-version") and len(tried) == 3


# --- the client -----------------------------------------------------------------------------------


def test_client(srv: Server, runtime: Path) -> None:
    with connect("vm0") as c, connect(srv.path) as other:
        assert c.greeting == {"QMP": {"version": {}, "capabilities": []}}
        srv.emit("ONE")
        srv.emit("TWO", {"n": 2})
        assert c.command("echo", big_thing={"a": 1}) == {"big-thing": {"a": 1}}
        assert c.wait_event("TWO")["data"] == {"n": 2}
        with pytest.raises(TimeoutError):
            c.wait_event("ONE", timeout=0.01)
        with pytest.raises(ControlError, match="fail: no luck; try") as raised:
            other.command("fail", how="host")
        assert raised.value.kind == "GenericError" and raised.value.exit_code == 114
    with pytest.raises(MachineMissing, match="no machine named other"):
        connect("other")
    with pytest.raises(MachineMissing, match="cannot connect"):
        connect(f"{runtime}/none")


def test_client_of_something_else(tmp_path: Path) -> None:
    for reply in (b"hello\n", b"", b"[]\n"):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(tmp_path / f"s{len(reply)}"))
            s.listen()
            result: list[Any] = []
            path = s.getsockname()

            def dial(path: str = path, result: list[Any] = result) -> None:
                try:
                    Client(path, timeout=PATIENCE)
                except PyvmmError as e:
                    result.append(e)

            t = threading.Thread(target=dial)
            t.start()
            peer, _ = s.accept()
            with peer:
                peer.sendall(reply)
            t.join()
            assert isinstance(result[0], MachineMissing)


# --- names and places -----------------------------------------------------------------------------


def test_names_are_unique_and_private(runtime: Path) -> None:
    old = os.umask(0)
    try:
        claims = [Claim(), Claim(), Claim("web-1")]
    finally:
        os.umask(old)
    assert [c.name for c in claims] == ["vm0", "vm1", "web-1"]
    assert [(e.name, e.pid) for e in registry.machines()] == [(c.name, os.getpid()) for c in claims]
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    for c in claims:
        assert stat.S_IMODE(os.stat(c.path).st_mode) == 0o600
    with pytest.raises(UsageError, match=f"web-1 is running, process {os.getpid()}"):
        Claim("web-1")
    claims[0].close()
    claims[0].close()
    again = Claim()
    assert again.name == "vm0"
    for c in (*claims, again):
        c.close()
    assert not os.listdir(runtime) and registry.machines() == []


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "x" * 41, "\u00e4", "a\n"])
def test_bad_names(runtime: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name for a machine"):
        Claim(name)
    assert not os.listdir(runtime)


CHILD = """
import sys, time
from pyvmm.control.registry import Claim
c = Claim(*sys.argv[1:])
print(c.path, flush=True)
time.sleep(600)
"""


def test_killed_machines_are_recognised(runtime: Path, tmp_path: Path) -> None:
    paths = []
    for args in (["gone"], ["elsewhere", str(tmp_path / "s")], ["again"]):
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, *args], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout
            paths.append(child.stdout.readline().strip())
            assert [e.name for e in registry.machines()] == args[:1]
            with pytest.raises(UsageError, match=f"running, process {child.pid}"):
                Claim(args[0])
            child.send_signal(signal.SIGKILL)
        assert os.path.exists(paths[-1])
        if args[0] != "again":
            assert (
                registry.machines() == []
                and not os.path.exists(paths[-1])
                and not os.listdir(runtime)
            )
    with Closing(Claim("again")) as c:  # takes the place of a dead one
        assert c.path == paths[-1]
        assert [e.name for e in registry.machines()] == ["again"]
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(c.path)
    assert not os.listdir(runtime)


class Closing:
    def __init__(self, claim: Claim) -> None:
        self.claim = claim

    def __enter__(self) -> Claim:
        return self.claim

    def __exit__(self, *exc: Any) -> None:
        self.claim.close()


def test_a_path_of_the_users(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Closing(Claim(None, str(path))) as c:
        assert c.path == str(path)
        with pytest.raises(UsageError, match="Address already in use"):
            Claim(None, str(path))  # somebody listens there
        assert registry.machines()[0].path == str(path)
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="Address already in use"):
        Claim(None, str(path))
    assert path.read_text() == "precious"
    for bad in (str(tmp_path / "no" / "s"), "/tmp/" + "x" * 110, str(tmp_path / "a\nb")):
        with pytest.raises(UsageError, match="--qmp"):
            Claim(None, bad)
    c = Claim(None, str(tmp_path / "t"))
    os.unlink(c.path)
    Path(c.path).write_text("somebody else's now")
    c.close()
    assert Path(c.path).exists()
    assert not os.listdir(runtime)


def test_claims_race(runtime: Path) -> None:
    """Machines that start and end at the same time, and who lists them, never meet half of one."""
    names, errors, stop = [], [], threading.Event()

    def work() -> None:
        try:
            for _ in range(30):
                with Closing(Claim()) as c:
                    names.append(c.name)
                    assert os.path.exists(c.path)
                    found = registry.find(c.name)
                    assert found.path == c.path
        except BaseException as e:
            errors.append(e)

    def look() -> None:
        while not stop.is_set():
            try:
                registry.machines()
            except BaseException as e:
                errors.append(e)

    looker = threading.Thread(target=look)
    looker.start()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stop.set()
    looker.join()
    assert not errors
    assert len(names) == 180 and not os.listdir(runtime)


def test_the_directory_must_be_private(runtime: Path) -> None:
    runtime.parent.mkdir(mode=0o700)
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    with pytest.raises(HostError, match="not a private directory"):
        Claim()


def test_in_the_testbed_nothing_goes_where_its_host_sees_it(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_IN_TESTBED", "1")
    with Closing(Claim(f"t{os.getpid()}")) as c:
        assert c.path.startswith(("/run/pyvmm-machines-", "/dev/shm/pyvmm-machines-"))
