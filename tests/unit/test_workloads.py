"""Ping and iperf3 on the host's side: how they are run, and what becomes of what they report."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from pyvmm import workloads
from pyvmm.errors import HostError
from pyvmm.hostnet.netns import Namespace
from pyvmm.matrix.run import combine
from pyvmm.workloads import ToolFailed, check_echo, run_tool, tcp_mbit

PATIENCE = 60.0


@pytest.fixture
def space() -> Iterator[Namespace]:
    with Namespace() as made:
        yield made


def test_what_it_printed(space: Namespace) -> None:
    text = run_tool(space, ["sh", "-c", "ip -o link show; echo error >&2"], PATIENCE)
    assert "tap0" in text and "error" in text


def test_a_missing_tool_is_the_host_s_fault(space: Namespace) -> None:
    with pytest.raises(HostError) as e:
        run_tool(space, ["no-such-tool", "-x"], PATIENCE)
    assert not isinstance(e.value, ToolFailed)
    assert str(e.value).startswith("no-such-tool cannot be run; install ")


def test_a_failure_says_why(space: Namespace) -> None:
    with pytest.raises(ToolFailed, match=r"^sh failed: no route$"):
        run_tool(space, ["sh", "-c", "echo first; echo no route; exit 3"], PATIENCE)
    with pytest.raises(ToolFailed, match=r"^sh failed: busy$"):
        run_tool(space, ["sh", "-c", 'echo \'{"error": "busy"}\'; exit 1'], PATIENCE)
    with pytest.raises(ToolFailed, match=r"^false failed: it said nothing$"):
        run_tool(space, ["false"], PATIENCE)


def left(mark: str) -> str:
    return subprocess.run(["pgrep", "-f", f"^sleep {mark}$"], capture_output=True, text=True).stdout


def test_one_that_does_not_end_is_ended(space: Namespace) -> None:
    with pytest.raises(ToolFailed, match=r"^sleep did not end within 0.3 s$"):
        run_tool(space, ["sleep", "98.76543"], 0.3)
    assert not left("98.76543")


def test_it_ends_with_an_interrupted_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Space:
        def popen(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
            child = subprocess.Popen(argv, **options)

            def communicate(**_: object) -> None:
                raise KeyboardInterrupt

            monkeypatch.setattr(child, "communicate", communicate)
            return child

    with pytest.raises(KeyboardInterrupt):
        run_tool(cast("Namespace", Space()), ["sleep", "87.65432"], PATIENCE)
    assert not left("87.65432")


class FakeIperf3:
    """A namespace in which iperf3 fails ``failures`` times and then measures."""

    def __init__(self, path: Path, failures: int) -> None:
        self.path, self.failures = path, failures
        self.calls: list[list[str]] = []

    def popen(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        self.calls.append(argv)
        good = len(self.calls) > self.failures
        end = {"end": {"sum_received": {"bits_per_second": 5e8}}}
        self.path.write_text(json.dumps(end if good else {"error": "Connection refused"}))
        return subprocess.Popen(["sh", "-c", f"cat {self.path}; exit {int(not good)}"], **options)


def test_a_server_may_need_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "PAUSE", 0.01)
    space = FakeIperf3(tmp_path / "out", 2)
    got = tcp_mbit(cast("Namespace", space), "10.0.0.2", 1.5, "-R", attempts=3, timeout=PATIENCE)
    assert got == 500.0 and len(space.calls) == 3
    words = " ".join(space.calls[0])
    assert words.startswith(f"{shutil.which('iperf3')} -c 10.0.0.2 -t 1.5 --json -R ")
    space = FakeIperf3(tmp_path / "out", 3)
    with pytest.raises(ToolFailed, match="Connection refused"):
        tcp_mbit(cast("Namespace", space), "10.0.0.2", 1, attempts=3, timeout=PATIENCE)
    assert len(space.calls) == 3


def test_a_missing_tool_is_not_tried_again(
    space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "CANNOT_RUN", (0,))
    monkeypatch.setattr(workloads, "PAUSE", 1000)
    begin = time.monotonic()
    with pytest.raises(HostError, match="iperf3 cannot be run"):
        tcp_mbit(cast("Namespace", FakeIperf3(Path("/dev/null"), 0)), "x", 1, attempts=9, timeout=9)
    assert time.monotonic() - begin < PATIENCE


@pytest.mark.parametrize("text", ["", "null", "[]", '{"end": 3}', '{"error": "busy"}', "\ufffd\0"])
@pytest.mark.parametrize("read", [workloads.read_ping, workloads.received_mbit, workloads.read_udp])
def test_nonsense_is_an_error(read: Any, text: str) -> None:
    with pytest.raises(ToolFailed, match="cannot read its result: "):
        read(text)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda data: data, ""),
        (lambda data: data[:-1], "99999 of 100000 bytes came back"),
        (lambda data: data[:777] + bytes([data[777] ^ 1]) + data[778:], "another byte 777"),
        (None, "bytes came back: timed out"),
    ],
)
def test_bytes_there_and_back(space: Namespace, spoil: Any, problem: str) -> None:
    """Each byte counts, and so does a server that keeps them."""
    with space.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        kept: list[socket.socket] = []

        def serve() -> None:
            s, _ = server.accept()
            kept.append(s)
            data = b""
            while len(data) < 100_000:
                data += s.recv(1 << 16)
            if spoil is not None:
                s.sendall(spoil(data))
                s.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        timeout = PATIENCE if spoil is not None else 1.0
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
