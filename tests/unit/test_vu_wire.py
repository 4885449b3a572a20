"""vhost-user messages: constants against the specification, framing against hostile peers."""

from __future__ import annotations

import html
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import VhostUserError
from pyvmm.hostnet.rights import close_all
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import (
    FDS_MAX,
    PAYLOAD_MAX,
    Channel,
    Closed,
    Listener,
    Message,
    ProtocolError,
    Region,
    Stopped,
    TimedOut,
    connect,
    pack_regions,
    protocol_names,
    request_name,
    unpack_regions,
)
from tests.descriptors import open_fds

PATIENCE = 60.0


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    before = open_fds()
    yield
    assert not open_fds() - before


def raw(
    request: int = 1,
    flags: int = 1,
    payload: bytes = b"",
    size: int | None = None,
) -> bytes:
    return (
        struct.pack(spec.HEADER, request, flags, len(payload) if size is None else size) + payload
    )


# --- the specification ----------------------------------------------------------------------------


def specification() -> str:
    """QEMU's vhost-user.html without its tags, from the host's or the testbed's QEMU package."""
    name = "usr/share/doc/qemu-system-common/interop/vhost-user.html"
    homes = [Path("/") / name, *Path.home().glob(f".cache/pyvmm/testbed/qemu/*/{name}")]
    found = [path for path in homes if path.exists()]
    if not found:
        pytest.skip(
            "the vhost-user specification (in the package qemu-system-common) is not installed here"
        )
    return html.unescape(re.sub(r"<[^>]+>", "", found[-1].read_text()))


def test_constants_match_the_specification() -> None:
    text = specification()
    features = dict(re.findall(r"#define (VHOST_USER_PROTOCOL_F_\w+)\s+(\d+)", text))
    assert len(features) > 15
    kinds = r"(VHOST_USER_(?:BACKEND_|SLAVE_)?\w+)(?: \(previous name \w+\))?¶?\s*id:\s*(\d+)"
    messages = [(n.replace("_SLAVE_", "_BACKEND_"), v) for n, v in re.findall(kinds, text)]
    assert len(messages) > 40
    known = {n: v for n, v in vars(spec).items() if n.startswith("VHOST_USER_")}
    wrong = {n: v for n, v in [*features.items(), *messages] if n in known and known[n] != int(v)}
    assert not wrong
    missing = {n for n, _ in [*features.items(), *messages]} - set(known)
    # Where the package is older than the names that we use.
    assert missing <= {"VHOST_USER_PROTOCOL_F_SLAVE_REQ", "VHOST_USER_PROTOCOL_F_SLAVE_SEND_FD"} | {
        n for n in missing if "SLAVE" in n
    }
    assert f"VHOST_USER_F_PROTOCOL_FEATURES {spec.VHOST_USER_F_PROTOCOL_FEATURES}" in text


def test_layouts_match_the_kernel_headers(tmp_path: Path) -> None:
    """vhost-user took these structs from the kernel's vhost."""
    layouts = {
        "struct vhost_vring_state": spec.VRING_STATE,
        "struct vhost_vring_addr": spec.VRING_ADDR,
        "struct vhost_memory_region": spec.MEM_REGION,
        "struct vhost_memory": spec.MEM_HEADER,
    }
    lines = ["#include <stdio.h>", "#include <linux/vhost.h>", "int main(void) {"]
    lines += [f'printf("%zu\\n", sizeof({name}));' for name in layouts]
    (tmp_path / "l.c").write_text("\n".join([*lines, "return 0; }"]))
    subprocess.run(["gcc", "-o", tmp_path / "l", tmp_path / "l.c"], check=True)
    out = subprocess.run([tmp_path / "l"], check=True, capture_output=True, text=True).stdout
    assert [struct.calcsize(layout) for layout in layouts.values()] == [int(n) for n in out.split()]
    assert struct.calcsize(spec.INFLIGHT_REGION) == struct.calcsize(spec.INFLIGHT_DESC) == 16


def test_names() -> None:
    assert request_name(spec.VHOST_USER_SET_MEM_TABLE) == "SET_MEM_TABLE"
    assert request_name(spec.VHOST_USER_GET_FEATURES) == "GET_FEATURES"
    assert request_name(4, backend=True) == "VRING_CALL" and request_name(4) == "RESET_OWNER"
    assert request_name(999) == "request 999"
    assert len({request_name(i) for i in range(1, 44)}) == 43
    assert protocol_names(1 << 3 | 1 << 40) == ["REPLY_ACK", "bit-40"]


# --- what passes ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    request=st.integers(0, 2**32 - 1),
    flags=st.sampled_from([1, 5, 9, 13]),
    payload=st.binary(max_size=PAYLOAD_MAX),
    fds=st.integers(0, FDS_MAX),
    cuts=st.lists(st.integers(1, 40), max_size=5),
)
def test_messages_pass_whole_however_they_are_cut(
    request: int, flags: int, payload: bytes, fds: int, cuts: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    given_fds = [os.eventfd(i) for i in range(fds)]
    try:
        data = raw(request, flags, payload)
        first = True
        while data:
            n = cuts.pop() if cuts else len(data)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{fds}i", *given_fds))]
            theirs.sendmsg([data[:n]], rights if first and fds else [])
            data, first = data[n:], False
        message = channel.receive(PATIENCE)
        assert (message.request, message.flags, message.payload) == (request, flags, payload)
        assert message.need_reply == bool(flags & 8)
        got = message.take_fds(fds, fds)
        assert [os.eventfd_read(fd) if i else i for i, fd in enumerate(got)] == list(range(fds))
        assert not any(os.get_inheritable(fd) for fd in got)
        close_all(got)
    finally:
        close_all(given_fds)
        channel.close()
        theirs.close()


def test_ask_and_reply(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    peer = Channel(socket.socket(fileno=theirs.detach()))

    def answer() -> None:
        message = peer.receive(PATIENCE)
        assert message.request == spec.VHOST_USER_GET_FEATURES and not message.need_reply
        peer.reply(message, struct.pack("<Q", 1 << 63 | 5))

    thread = threading.Thread(target=answer)
    thread.start()
    assert channel.ask(spec.VHOST_USER_GET_FEATURES, timeout=PATIENCE).u64 == 1 << 63 | 5
    thread.join()
    peer.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 4), min_size=1, max_size=8), st.integers(0, 3)
)
def test_memory_tables(rows: list[tuple[int, int, int, int]], padding: int) -> None:
    payload = pack_regions([Region(*row) for row in rows]) + bytes(32 * padding)
    assert [(r.gpa, r.size, r.user, r.offset) for r in unpack_regions(payload)] == rows


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_memory_tables_of_garbage(payload: bytes) -> None:
    try:
        regions = unpack_regions(payload)
    except ProtocolError:
        return
    assert 1 <= len(regions) <= 8 and len(payload) >= 8 + 32 * len(regions)


# --- hostile peers --------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_garbage_ends_the_connection_and_nothing_else(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours)
        try:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            while True:
                channel.receive(PATIENCE).close()
        except (Closed, ProtocolError):
            pass
        finally:
            channel.close()


@pytest.mark.parametrize(
    "data",
    [
        raw(flags=0),
        raw(flags=2),
        raw(flags=0x11),
        raw(size=PAYLOAD_MAX + 1),
        raw(size=0xFFFFFFFF),
        raw()[:5],
        raw(payload=bytes(8))[:15],
    ],
    ids=[
        "no version",
        "version 2",
        "unknown flag",
        "long",
        "huge",
        "short header",
        "short payload",
    ],
)
def test_malformed(pair: tuple[Channel, socket.socket], data: bytes) -> None:
    channel, theirs = pair
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError):
        channel.receive(PATIENCE)


@pytest.mark.parametrize("count", [FDS_MAX + 1, 253])
def test_too_many_descriptors_are_closed(pair: tuple[Channel, socket.socket], count: int) -> None:
    channel, theirs = pair
    fd = os.eventfd(0)
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{count}i", *[fd] * count))]
        theirs.sendmsg([raw()], rights)
        before = open_fds()
        with pytest.raises(ProtocolError, match="descriptors"):
            channel.receive(PATIENCE)
        assert not open_fds() - before
    finally:
        os.close(fd)


def test_descriptors_in_a_payload_and_in_a_broken_message_are_closed(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = pair
    fd = os.eventfd(0)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
    try:
        before = open_fds()
        theirs.send(raw(size=8))
        theirs.sendmsg([bytes(8)], rights)
        with pytest.raises(ProtocolError, match="payload"):
            channel.receive(PATIENCE)
        theirs.sendmsg([raw(flags=0)], rights)
        with pytest.raises(ProtocolError, match="flags"):
            channel.receive(PATIENCE)
        theirs.sendmsg([raw()], rights)
        message = channel.receive(PATIENCE)
        with pytest.raises(ProtocolError, match="1 descriptors"):
            message.take_fds(0, 0)
        message.close()
        message.close()
        assert not open_fds() - before
    finally:
        os.close(fd)


def test_a_byte_now_and_then_does_not_prolong_the_deadline(
    pair: tuple[Channel, socket.socket],
) -> None:
    channel, theirs = pair
    data, stop = raw(payload=bytes(200)), threading.Event()

    def drip() -> None:
        for byte in data:
            if stop.wait(0.05):
                return
            theirs.send(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    start = time.monotonic()
    with pytest.raises(TimedOut):
        channel.receive(0.3)
    assert time.monotonic() - start >= 0.3
    stop.set()
    thread.join()


def test_silence_and_a_full_socket_time_out(pair: tuple[Channel, socket.socket]) -> None:
    channel, _theirs = pair
    with pytest.raises(TimedOut):
        channel.receive(0.05)
    with pytest.raises(TimedOut):
        for _ in range(100000):
            channel.send(1, bytes(PAYLOAD_MAX), timeout=0.05)


def test_the_wrong_answer(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    for answer in (raw(request=2, flags=5), raw(request=1, flags=1)):
        theirs.send(answer)
        with pytest.raises(ProtocolError, match="GET_FEATURES was answered by"):
            channel.ask(1, timeout=PATIENCE)


def test_a_wrong_payload(pair: tuple[Channel, socket.socket]) -> None:
    with pytest.raises(ProtocolError, match="GET_FEATURES with 4 bytes, not 8"):
        _ = Message(1, 5, bytes(4)).u64


def test_a_peer_that_leaves(pair: tuple[Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.close()
    with pytest.raises(Closed):
        channel.receive(PATIENCE)
    with pytest.raises(Closed):
        for _ in range(2):
            channel.send(1, timeout=PATIENCE)


def test_stop_from_another_thread(pair: tuple[Channel, socket.socket]) -> None:
    channel, _theirs = pair
    result = []

    def wait() -> None:
        try:
            channel.receive()
        except VhostUserError as e:
            result.append(type(e))

    thread = threading.Thread(target=wait)
    thread.start()
    channel.stop()
    thread.join(PATIENCE)
    assert result == [Stopped]


# --- sockets in the file system -------------------------------------------------------------------


def test_listen_and_connect(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(VhostUserError, match="cannot connect") as e:
        connect(path)
    assert e.value.exit_code == 112 and e.value.hint
    listener = Listener(path)
    assert listener.accept() is None
    client = connect(path)
    server = listener.accept()
    assert server is not None
    client.send(7, b"abc", timeout=PATIENCE)
    assert server.receive(PATIENCE).payload == b"abc"
    with pytest.raises(VhostUserError, match="cannot listen"):
        Listener(path)
    for one in (client, server, listener):
        one.close()
        one.close()
    assert not Path(path).exists()


def fill(path: str) -> list[socket.socket]:
    """Connections to a listening socket until no other may wait there."""
    made = []
    while True:
        s = socket.socket(socket.AF_UNIX)
        s.setblocking(False)
        made.append(s)
        try:
            s.connect(path)
        except BlockingIOError:
            return made


def test_connecting_to_somebody_who_accepts_nothing(tmp_path: Path) -> None:
    """A blocking connect(2) would wait for ever."""
    path = str(tmp_path / "s")
    listener = Listener(path)
    waiting = fill(path)
    with pytest.raises(TimedOut, match="nobody accepts connections"):
        connect(path, 0.05)
    end = os.eventfd(1)
    with pytest.raises(Stopped):
        connect(path, PATIENCE, end)
    os.close(end)

    def accept() -> None:
        accepted = listener.accept()
        assert accepted is not None
        accepted.close()

    room = threading.Timer(0.05, accept)
    room.start()
    connect(path, PATIENCE).close()
    room.join()
    listener.close()
    for one in waiting:
        one.close()


def test_a_stale_socket_is_replaced_but_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
    Listener(str(path)).close()
    path.write_text("precious")
    with pytest.raises(VhostUserError, match="cannot listen"):
        Listener(str(path))
    assert path.read_text() == "precious"
    for bad in ("", "x" * 108, "a\0b"):
        with pytest.raises(VhostUserError, match="no path"):
            Listener(bad)
        with pytest.raises(VhostUserError, match="no path"):
            connect(bad)
