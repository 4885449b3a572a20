"""``pyvmm watch``: looks at a machine, who may have them, and the text in a terminal. The machine
has canned answers; tests/host/test_watch.py and tests/boot/test_watch.py watch real ones.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from pyvmm.cli import main
from pyvmm.cli.watch import picture
from pyvmm.control.client import connect
from pyvmm.programs import module
from pyvmm.virtio.ringwords import regions
from pyvmm.watch import look as looks
from pyvmm.watch import server as servers
from pyvmm.watch.look import HISTORY, Watch
from pyvmm.watch.server import Server
from tests.boot.guest import PATIENCE
from tests.descriptors import open_fds
from tests.watched import Box, Home, command, packed, split


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.01)


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr(looks, "STALE", 1e6)  # a busy machine makes pauses of its own
    home = Home(monkeypatch)
    one = Box()
    yield one
    one.close()
    home.close()


@contextmanager
def watching(interval: float = 0.01) -> Iterator[Watch]:
    with connect("box", timeout=PATIENCE) as client:
        yield Watch(client, interval)


@contextmanager
def served(interval: float = 0.01) -> Iterator[Server]:
    with watching(interval) as watch:
        server = Server(watch)
        thread = threading.Thread(target=server.serve)
        thread.start()
        linger, servers.LINGER_S = servers.LINGER_S, 0
        try:
            yield server
        finally:
            watch._end("the test")
            thread.join(PATIENCE)
            servers.LINGER_S = linger
            server.close()
            assert not thread.is_alive()


def ask(
    server: Server, path: str = "", method: str = "GET", token: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPResponse, bytes]:
    """One request, by default one that is in order; status, answer, body."""
    place = urlsplit(server.url)
    link = http.client.HTTPConnection("127.0.0.1", place.port, timeout=PATIENCE)
    link.putrequest(method, f"/{server.token if token is None else token}/{path}", skip_host=True)
    for name, value in {"Host": place.netloc, **headers}.items():
        if value:
            link.putheader(name.replace("_", "-"), value)
    link.endheaders()
    answer = link.getresponse()
    body = answer.read()
    link.close()
    return answer.status, answer, body


# --- looks ----------------------------------------------------------------------------------------


def test_nobody_costs_nothing_and_many_cost_as_much_as_one(box: Box) -> None:
    with served(interval=2.0) as server:
        time.sleep(0.5)
        assert box.asked == {}, "nobody has looked"
        first = server.watch.after(0)["number"]
        assert box.asked == {"ledger": 1, "machine": 1, "net0": 1}
        seen: list[int] = []
        many = [
            threading.Thread(target=lambda: seen.append(server.watch.after(first)["number"]))
            for _ in range(8)
        ]
        for one in many:
            one.start()
        for one in many:
            one.join(PATIENCE)
        assert seen == [2] * 8 and box.asked["ledger"] == 2
        time.sleep(0.5)
        assert box.asked["ledger"] == 2, "nobody looks any more"


def test_it_looks_at_most_once_per_interval(box: Box) -> None:
    with watching(interval=0.3) as watch:
        since = time.monotonic()
        number = 0
        for _ in range(4):
            number = watch.after(number)["number"]
        assert number == 4 and time.monotonic() - since >= 0.9


def test_rates_and_history(box: Box) -> None:
    with watching() as watch:
        first = watch.after(0)
        assert first["rates"] is None and first["history"] == []
        assert first["cards"][0]["queues"][0]["outstanding"] == 6, "rings need no second look"
        for n in range(1, 5):
            now = watch.after(n)
            assert [h["number"] for h in now["history"]] == [n + 1]
        assert now["rates"]["exits"] > 0 and now["rates"]["nets"][0]["rx_packets"] > 0
        assert now["rates"]["nets"][0]["tx_bytes"] is None, "nobody counts it"
        assert "by_name" in now["rates"] and "by_name" not in now["history"][0]
        again = watch.after(0)
        assert [h["number"] for h in again["history"]] == list(range(2, again["number"] + 1))
        for n in range(again["number"], HISTORY + 20):
            watch.after(n)
        assert len(watch.after(0)["history"]) == HISTORY


def test_after_a_pause_a_rate_would_be_an_average_of_the_pause(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watching(interval=0.05) as watch:
        watch.after(0)
        assert watch.after(1)["rates"] is not None
        monkeypatch.setattr(looks, "STALE", 3)
        time.sleep(0.5)
        fresh = watch.after(0)
        assert fresh["number"] == 3 and fresh["rates"] is None
        monkeypatch.setattr(looks, "STALE", 1e6)
        assert watch.after(3)["rates"] is not None


def test_what_changes_is_told_once(box: Box) -> None:
    with watching() as watch:
        watch.after(0)
        box.nets[0]["mode"] = "vhost-net"
        box.server.emit(
            "X_PYVMM_SWITCHED", {"name": "net0", "mode": "vhost-net", "duration-ns": 23_400_000}
        )
        watch.after(1)
        box.nets[0]["link"], box.active = False, False
        watch.after(2)
        box.add("net1", "vhost-user", packed(0, "receive"))
        box.server.emit("STOP")
        box.server.emit("NIC_RX_FILTER_CHANGED", {"name": "net0", "path": "x"})
        box.status = "paused"
        watch.after(3)
        box.nets[0]["mode"] = "emulated"  # fell back without a word
        box.server.emit("RESET", {"guest": True, "reason": "guest-reset"})
        box.reboots = 1
        last = watch.after(4)
        texts = [event["text"] for event in last["events"]]
        assert texts == [
            "net0: emulated -> vhost-net, in 23.4 ms",
            "the guest has reset net0",
            "the cable of net0 is pulled",
            "the machine is paused",
            "net1 is plugged in (vhost-user)",
            "the machine is reset (guest-reset) and starts over",
            "net0: vhost-net -> emulated",
        ]
        assert last["status"] == "paused" and last["reboots"] == 1
        assert last["cards"][0]["note"] == "the guest does not drive the card"
        assert last["rates"]["vcpus"][0]["interrupts"] is None, "KVM's counters have started over"


def test_a_switch_that_a_look_has_seen_first_is_one_event(box: Box) -> None:
    with watching() as watch:
        watch.after(0)
        box.nets[0]["mode"] = "vhost-net"
        assert [e["text"] for e in watch.after(1)["events"]] == ["net0: emulated -> vhost-net"]
        box.server.emit(
            "X_PYVMM_SWITCHED", {"name": "net0", "mode": "vhost-net", "duration-ns": 1_500_000}
        )
        (event,) = watch.after(2)["events"]
        assert event["text"] == "net0: emulated -> vhost-net, in 1.5 ms"


def test_events_are_heard_while_nobody_looks_and_have_limits(box: Box) -> None:
    with served() as server:
        for n in range(300):
            box.server.emit("X_PYVMM_NIC_FAULT", {"name": "net0", "problem": f"{n} " + "x" * 5000})
        wait_for(lambda: server.watch._event_number == 300)
        assert box.asked == {}
        events = server.watch.after(0)["events"]
        assert len(events) == looks.EVENTS
        assert all(len(event["text"]) <= looks.TEXT_MAX for event in events)
        assert events[-1]["text"].startswith("net0 has stopped: 299 x")


def test_causes_are_bounded(box: Box) -> None:
    box.causes = {f"cause {n}": n + 1 for n in range(500)}
    with watching() as watch:
        watch.after(0)
        names = watch.after(1)["rates"]["by_name"]
    assert len(names) == looks.CAUSES and list(names)[-1] == "other causes"
    assert next(iter(names)) == "cause 499"


@pytest.mark.parametrize("how", ["shutdown", "killed", "status"])
def test_the_end(box: Box, how: str) -> None:
    with watching() as watch:
        watch.after(0)
        if how == "status":
            box.status = "shutdown"
            threading.Timer(0.2, lambda: box.server.emit("SHUTDOWN", {"reason": "x"})).start()
        elif how == "shutdown":
            box.server.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
        box.close() if how != "status" else None
        last = watch.after(1)
        assert last["ended"] == {
            "status": "the machine has ended: x",
            "shutdown": "the machine has ended: guest-shutdown",
        }.get(how, last["ended"])
        assert last["ended"] and last["cards"], "the last picture stays"
        assert last["status"] in ("ended", "shutdown")
        assert watch.after(2)["ended"] and watch.after(0)["ended"]


def test_silence_of_a_data_path_is_said(box: Box) -> None:
    box.rings["net0"][0] |= {"taken": None, "in-flight": None}
    box.nets[0]["mode"] = "vhost-net"
    with watching() as watch:
        queues = watch.after(0)["cards"][0]["queues"]
    assert "does not tell" in queues[0]["note"] and queues[1]["note"] == ""
    assert queues[2]["note"] == "not enabled"
    assert queues[0]["regions"] == [("available", 5, 6)]


def test_regions() -> None:
    ring = split(0, "receive", avail=11, used=5, taken=7)
    assert regions(ring) == [("in-flight", 5, 2), ("available", 7, 4)]
    assert regions(split(0, "receive", avail=8, used=0, taken=0)) == [("available", 0, 8)]
    assert regions(split(0, "receive", avail=9, used=9, taken=9)) == []
    assert regions(packed(0, "receive")) == [("in-flight", 5, 1), ("available", 6, 4)]
    full = packed(0, "receive")
    full["driver"] = {**full["driver"], "next": 5, "wrap": 0}
    assert regions(full) == [("in-flight", 5, 1), ("available", 6, 7)]
    full["driver"]["wrap"] = 1
    assert regions({**full, "in-flight": None}) == []


# --- who may look ---------------------------------------------------------------------------------


def test_the_page_and_its_parts(box: Box) -> None:
    with served() as server:
        for path, kind in (
            ("", "text/html"),
            ("page.js", "text/javascript"),
            ("page.css", "text/css"),
            ("look?after=0", "application/json"),
        ):
            status, answer, body = ask(server, path)
            assert status == 200 and answer.headers["Content-Type"].startswith(kind) and body
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in answer.headers
        assert json.loads(ask(server, "look?after=1")[2])["rates"]
        status, answer, body = ask(server, "", method="HEAD")
        assert (status, body) == (200, b"") and int(answer.headers["Content-Length"]) > 100
        name = f"localhost:{urlsplit(server.url).port}"
        assert ask(server, Host=name)[0] == 200
        assert server.socket.getsockname()[0] == "127.0.0.1"


def test_strangers_and_other_sites_are_refused(box: Box) -> None:
    with served() as server:
        port = urlsplit(server.url).port
        for token in ("", "x", server.token[:-1], server.token + "x", server.token.swapcase()):
            for path in ("", "look?after=0", "page.js"):
                assert ask(server, path, token=token)[0] == 403, token
        for host in ("", "evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port}0",
                     f"127.0.0.1.evil.example:{port}"):  # fmt: skip
            assert ask(server, Host=host)[0] == 421, host
            assert ask(server, "look?after=0", Host=host)[0] == 421, host
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "PATCH", "get", "X"):
            status, answer, _ = ask(server, "look?after=0", method=method)
            assert status == 405 and answer.headers["Allow"] == "GET, HEAD", method
        for path in ("x", "look", "look?after=-1", "look?after=x", "look?after=" + "9" * 13,
                     "look?x=1", "../page.js", "page.js/", "%2e%2e/", "page.html"):  # fmt: skip
            assert ask(server, path)[0] == 404, path
        for site in ("cross-site", "same-site"):
            assert ask(server, "look?after=0", Sec_Fetch_Site=site)[0] == 403
            assert ask(server, "page.js", Sec_Fetch_Site=site)[0] == 403
            assert ask(server, Sec_Fetch_Site=site, Sec_Fetch_Dest="iframe")[0] == 403
            assert ask(server, Sec_Fetch_Site=site, Sec_Fetch_Dest="document")[0] == 200
        assert ask(server, "look?after=0", Sec_Fetch_Site="same-origin")[0] == 200
        assert box.asked["ledger"] == 1, "only the last of them has been answered"


def raw(server: Server, data: bytes) -> bytes:
    """What comes back for these bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), PATIENCE) as link:
        got = b""
        try:
            link.sendall(data)
            while part := link.recv(65536):
                got += part
        except ConnectionError:
            pass  # closed with bytes of ours unread
        return got


def test_requests_have_limits(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        line = f"GET /{server.token}/ HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n".encode()
        assert raw(server, line + b"\r\n").startswith(b"HTTP/1.0 200")
        twice = f"Host: {urlsplit(server.url).netloc}\r\n\r\n".encode()
        assert raw(server, line + twice).startswith(b"HTTP/1.0 421"), "two names"
        accents = line.replace(server.token.encode(), "é".encode() * 43)
        assert raw(server, accents + b"\r\n").startswith(b"HTTP/1.0 403")
        monkeypatch.setattr(servers, "REQUEST_S", 0.3)
        for bad in (b"", b"\r\n", b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                    b"\xff\xfe\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x" * 20_000,
                    line + b"X: " + b"x" * 20_000 + b"\r\n\r\n",
                    line + b"X: y\r\n" * 5000 + b"\r\n", b"GET " + b"/" * 20_000):  # fmt: skip
            answer = raw(server, bad)
            assert b" 200 " not in answer.split(b"\r\n")[0], bad[:40]
        since = time.monotonic()
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), PATIENCE) as slow:
            slow.sendall(line)
            try:
                assert b" 200 " not in slow.recv(100)
            except ConnectionError:
                pass
        assert 0.2 < time.monotonic() - since < PATIENCE
        monkeypatch.setattr(servers, "REQUEST_S", 5.0)
        assert ask(server)[0] == 200


def test_clients_have_limits(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "REQUEST_S", 10.0)
    with served(interval=60) as server:
        assert ask(server, "look?after=0")[0] == 200
        place = ("127.0.0.1", urlsplit(server.url).port)
        idle = [socket.create_connection(place, PATIENCE) for _ in range(servers.CLIENTS)]
        wait_for(lambda: server._clients._value == 0)
        assert ask(server)[0] == 200, "strangers that say nothing give way"
        # Its place is free again, the others' are not.
        idle[0].settimeout(PATIENCE)
        assert idle[0].recv(1000) == b""
        wait_for(lambda: server._clients._value == 1)
        for link in idle:
            link.close()
        wait_for(lambda: server._clients._value == servers.CLIENTS)
        statuses: list[int] = []
        many = [
            threading.Thread(target=lambda: statuses.append(ask(server, "look?after=1")[0]))
            for _ in range(servers.LOOKERS)
        ]
        for one in many:
            one.start()
        wait_for(lambda: server.lookers._value == 0)
        assert ask(server, "look?after=1")[0] == 503
        assert ask(server)[0] == 200, "the page itself waits for nothing"
        server.watch._end("the machine has ended")
        for one in many:
            one.join(PATIENCE)
        assert statuses == [200] * servers.LOOKERS, "the end lets all go at once"


def test_a_look_that_takes_too_long_to_read_ends(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "ANSWER_S", 0.2)
    box.causes = {f"{n} {'x' * 290}": 1 for n in range(40)}
    box.rings["net0"] = [
        {**split(n, "receive", avail=11, used=5, taken=7), "size": 8} for n in range(4000)
    ]
    with served() as server:
        place = ("127.0.0.1", urlsplit(server.url).port)
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(place)
            link.sendall(
                f"GET /{server.token}/look?after=0 HTTP/1.1\r\nHost: "
                f"{urlsplit(server.url).netloc}\r\n\r\n".encode()
            )
            wait_for(lambda: box.asked["ledger"] == 1)
            wait_for(lambda: server._clients._value == servers.CLIENTS)


# --- the command ----------------------------------------------------------------------------------


def words(*args: str) -> list[str]:
    return module("pyvmm", "watch", "--host", "local", *args)


def test_bad_usage(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for argv, status, said_of in (
            (["nobody"], 113, "no machine named nobody"),
            (["--once", "box"], 2, "--text or --json"),
            (["--text", "--port", "80", "box"], 2, "--port without a page"),
            (["--interval", "0", "box"], 2, "0.1 to 60"),
            (["--port", str(taken.getsockname()[1]), "box"], 2, "in use"),
        ):
            assert main(["watch", "--host", "local", *argv]) == status, argv
            said = capsys.readouterr()
            assert said_of in said.err and said.err.count("\n") == 1 and said.out == ""


def test_a_page_in_the_testbed_is_refused(
    box: Box, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYVMM_IN_TESTBED", "1")
    assert main(["watch", "--host", "local", "box"]) == 2
    assert "pyvmm watch box" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_left(box: Box, number: int) -> None:
    with command("--host", "local", "box") as child:
        assert child.stdout is not None and child.stderr is not None
        url = child.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}/", url)
        assert "Ctrl-C ends" in child.stderr.readline()
        place = urlsplit(url)
        link = http.client.HTTPConnection("127.0.0.1", place.port, timeout=PATIENCE)
        link.request("GET", place.path + "look?after=0")
        assert link.getresponse().status == 200
        link.close()
        child.send_signal(number)
        out, err = child.communicate(timeout=PATIENCE)
        assert child.returncode == (130 if number == signal.SIGINT else -number)
        assert out == "" and "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", place.port), PATIENCE)
    wait_for(lambda: not box.server._clients)


def test_it_ends_with_the_machine(box: Box) -> None:
    with command("--host", "local", "box") as child:
        assert child.stdout is not None
        child.stdout.readline()
        box.server.emit("SHUTDOWN", {"reason": "guest-shutdown"})
        box.close()
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0 and "box: the machine has ended: guest-shutdown\n" in err


def test_text_and_json(box: Box) -> None:
    done = subprocess.run(
        words("--text", "--once", "--interval", "0.1", "box"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "box  running  rates per second over" in done.stdout
    assert "  0 receive  [###..%%#]" in done.stdout, done.stdout
    assert "6 with the device, 2 in flight" in done.stdout
    assert "net0 queue 1 notify" in done.stdout and "exits to the VMM" in done.stdout
    done = subprocess.run(
        words("--json", "--once", "--interval", "0.1", "box"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    look = json.loads(done.stdout)
    assert look["name"] == "box" and look["rates"]["exits"] > 0 and "history" not in look


def test_text_ends_with_the_machine(box: Box) -> None:
    with command("--host", "local", "--json", "--interval", "0.1", "box") as child:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())["number"] >= 2
        box.close()
        _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0 and "pyvmm: box: " in err


def test_the_picture_fits(box: Box) -> None:
    box.causes = {f"net0 queue {n} notify": 100 - n for n in range(60)}
    box.add("net1", "vhost-user", packed(0, "receive"))
    with watching() as watch:
        watch.after(0)
        box.server.emit("STOP")
        look = watch.after(1)
    history: list[dict[str, Any]] = look["history"] * 60
    for rows in (30, 50, 200):
        lines = picture(look, history, rows)
        assert len(lines) <= rows and all(len(line) <= 100 for line in lines)
        assert any("other causes" in line for line in lines)
    text = "\n".join(lines)
    assert "! something is wrong" in text and "the machine is paused" in text
    assert "[##...%##]" in text and "net1" in text
    assert "measuring" in "\n".join(picture({**look, "rates": None}, [], 50))


def test_the_protocol_itself(box: Box) -> None:
    """`pyvmm qmp --raw` carries a connection, which `watch` uses across kernels."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    with (
        subprocess.Popen(
            module("pyvmm", "qmp", "--raw", "--host", "local", "box"),
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
        ) as child,
        ours,
    ):
        theirs.close()
        from pyvmm.control.client import Client

        with Client("box", timeout=PATIENCE, sock=ours) as client:
            look = Watch(client).after(0)
            assert look["name"] == "box" and look["cards"][0]["active"]
            # More commands than the machine takes at once, and nobody reads the answers yet.
            line = b'{"execute": "x-pyvmm-machine"}\n'
            sender = threading.Thread(target=lambda: ours.sendall(line * 3000))
            sender.start()
            wait_for(lambda: box.asked["machine"] > 20)
            got = 0
            while got < 3000:
                got += client._sock.recv(65536).count(b"\n")
            sender.join(PATIENCE)
        assert child.wait(PATIENCE) == 0
    assert not open_fds() - before
