"""The helper: what it does for a process that has sealed it, and what it refuses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import helper, sandbox
from pyvmm._ext import lib
from pyvmm.backend import vduse
from pyvmm.errors import HostError, UsageError, VdpaError, VhostUserError
from pyvmm.hostnet import netns, userns
from pyvmm.hostnet.bridge import tap_of
from pyvmm.hostnet.packets import open_packets
from pyvmm.hostnet.slirp import Forward, UserStack
from pyvmm.hostnet.tap import Tap
from pyvmm.hostnet.traffic import Tc
from pyvmm.netopt import Net
from pyvmm.vhostuser.wire import Listener, connect
from tests.driver import wait_for


@pytest.fixture
def made() -> Iterator[helper.Helper]:
    with helper.start() as one:
        yield one


def test_it_ends_with_its_client(made: helper.Helper) -> None:
    pid = made.pid
    assert helper.current() is made
    made.close()
    made.close()
    assert helper.current() is None
    assert not Path(f"/proc/{pid}").exists()


def test_sockets_by_permission(made: helper.Helper, tmp_path: Path) -> None:
    """A listener is made, connected to and removed by the helper, if its name was permitted."""
    path, other = str(tmp_path / "s"), str(tmp_path / "t")
    for operation in ("listen", "connect", "remove"):
        helper.permit(operation, path)
    helper.seal()
    with pytest.raises(UsageError, match="only what the command line names"):
        Listener(other)
    listener = Listener(path)
    channel = connect(path)
    with pytest.raises(VhostUserError, match="only what the command"):
        connect(other)
    channel.close()
    accepted = listener.accept()
    assert accepted is not None
    accepted.close()
    assert os.path.exists(path)  # noqa: PTH110
    listener.close()
    assert not os.path.exists(path)  # noqa: PTH110
    with pytest.raises(VhostUserError, match="No such file"):
        connect(path)
    with pytest.raises(HostError, match="sealed"):
        made.ask(["permit", "remove", "/etc/passwd"])


def test_it_hears_taps_of_the_machine_only(made: helper.Helper) -> None:
    """Those of its namespaces, from before and after the seal, and none of the host's."""
    with contextlib.closing(netns.Namespace()) as before:
        helper.seal()
        with contextlib.closing(netns.Namespace()) as after:
            for ours in (before, after):
                open_packets("tap0", ours).close()
        with pytest.raises(UsageError, match="lo: the sandbox has only what"):
            open_packets("lo", None)
        host = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with pytest.raises(UsageError, match="tap lo: the sandbox has only what"):
                helper.do("packets", "lo", fds=[host])
        finally:
            os.close(host)


def test_only_known_operations_and_modules(made: helper.Helper) -> None:
    with pytest.raises(HostError, match="does not know"):
        made.ask(["execve", "/bin/sh"])
    with pytest.raises(HostError, match="does not start os"):
        made.ask(["start", "os", "0", ""])
    with pytest.raises(UsageError, match="a back-end of pyvmm's: the sandbox has only what"):
        made.ask(["start", helper.BACKEND, "0", ""])
    helper.permit_start(helper.BACKEND)
    helper.seal()
    with pytest.raises(HostError, match="descriptors for"):
        made.ask(["start", helper.BACKEND, "0", "2"])


def test_the_user_network_that_was_permitted(made: helper.Helper) -> None:
    """No other ports of the host, and not its loopback."""
    forward = Forward("8080-80")
    helper.permit_start(helper.USER_NETWORK, "0", str(forward))
    helper.seal()
    for loopback, forwards in (
        (True, [forward]),
        (False, []),
        (False, [forward, forward]),
        (False, [Forward("0.0.0.0:8080-80")]),
    ):
        with pytest.raises(UsageError, match="a user network with this loopback= and hostfwd="):
            UserStack("10.0.2.2/24", "10.0.2.15/24", 1500, loopback=loopback, forwards=forwards)
    UserStack("10.0.2.2/24", "10.0.2.15/24", 1500, loopback=False, forwards=[forward]).close()


def test_vdpa_devices_that_were_permitted(made: helper.Helper) -> None:
    """Those of the command line are opened. This process's own are opened and removed; of others,
    nothing is removed, whatever their names begin with. What begins like a name of this process's
    may be a path, through a directory of somebody else's.
    """
    helper.permit("vdpa", "/dev/no-such")
    helper.permit("vduse", "")
    helper.seal()
    own, init = vduse.own_name(7, os.getpid()), vduse.own_name(7, 1)
    with pytest.raises(VdpaError, match="there is no vDPA device /dev/no-such"):
        helper.do("vdpa", "/dev/no-such")
    with pytest.raises(VdpaError, match=f"there is no vDPA device {own}"):
        helper.do("vdpa", own)
    assert helper.do("vduse", own) == helper.do("vduse", "") == ([], [])
    paths = (f"{own}/x", f"{own}/../{own}", f"../{own}", f"/dev/{own}")
    numbers = ("", "x", "07", "-7", "+7", " 7", "7\n", "\u0667", "\xb2", "7" * 5000 + "x")
    for name in ("card0", "/dev/null", init, *paths, *(own[:-1] + number for number in numbers)):
        with pytest.raises(UsageError, match="the sandbox has only what"):
            helper.do("vdpa", name)
        with pytest.raises(UsageError, match="a vDPA device of pyvmm's: the sandbox has only"):
            helper.do("vduse", name)
    with pytest.raises(UsageError, match="a vDPA device of pyvmm's: the sandbox has only"):
        helper.do("vduse", "/dev/no-such")
    with pytest.raises(UsageError, match="device=: the sandbox has only"):
        helper.do("vdpa", "")
    with pytest.raises(UsageError, match="a vDPA device of pyvmm's: the sandbox has only"):
        helper.start_module(helper.VDUSE_KEEPER, ["0", "3", "tap0", "1500", "0"], [])


def test_the_sandbox_permits_traffic_control_of_a_named_tap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    permitted: set[tuple[str, str]] = set()

    def permit(operation: str, *names: str) -> None:
        permitted.update((operation, name) for name in names)

    class Sealed(Exception):
        """In the place of the seal, so that this process stays what it is."""

    def seal() -> None:
        raise Sealed

    monkeypatch.setattr(sandbox, "_confined", False)
    monkeypatch.setattr(helper, "permit", permit)
    monkeypatch.setattr(helper, "seal", seal)
    box = sandbox.Sandbox("off", [Net.parse("vhost-net,bridge=br0,tap=t0")], [])
    box.wanted = True
    with pytest.raises(Sealed):
        box.enter([], [], lambda thread, why: None)
    assert {("traffic", "t0"), ("packets", "tap t0")} <= permitted
    assert not {name for operation, name in permitted if operation != "interface"} & {"br0"}


SIOCBRADDBR, IFF_UP, IFF_PROMISC = 0x89A0, 0x1, 0x100


def test_what_may_be_done_to_an_interface() -> None:
    """Of the interfaces of the command line: nothing that this process has not done, or found,
    before; no flag but IFF_UP; no other ports of the bridge. Of others: nothing. The interfaces
    are in a network namespace of their own.
    """

    def body() -> tuple[list[str], list[int]]:
        if os.geteuid():
            userns.become_root()
        userns.unshare(lib.CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            fcntl.ioctl(s, SIOCBRADDBR, b"br0".ljust(16, b"\0"))
        with helper.start() as one, contextlib.closing(Tap("o0")):
            tap = Tap("t0", mtu=1400, address="192.168.9.1/24")
            tap.join("br0")
            tap.permit()
            unnamed = tap_of("br0", None, mtu=None, queues=1, txqueuelen=1000)
            for operation, name in (("tap", "t0"), ("interface", "t0"), ("interface", "br0")):
                helper.permit(operation, name)
            helper.seal()

            Tc(unnamed.name, None).set({})
            with pytest.raises(UsageError, match="traffic control of o0: the sandbox has only"):
                Tc("o0", None).set({})
            open_packets(unnamed.name, None).close()
            for other in ("o0", "br0", "lo"):
                with pytest.raises(UsageError, match=f"tap {other}: the sandbox has only"):
                    open_packets(other, None)

            def ask(name: str, request: int, data: bytes) -> bytes:
                (out,), _ = one.ask(["interface", name, str(request), data.hex()])
                return bytes.fromhex(out)

            def number(value: int) -> bytes:
                return struct.pack("=i", value)

            address = struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton("192.168.9.1"))
            theirs, port = socket.if_nametoindex("o0"), socket.if_nametoindex("t0")
            for name, request, data in (
                ("br0", lib.SIOCSIFADDR, address),
                ("br0", lib.SIOCSIFFLAGS, struct.pack("=H", IFF_UP)),
                ("br0", lib.SIOCSIFMTU, number(1400)),
                ("br0", lib.SIOCBRADDIF, number(theirs)),
                ("br0", lib.SIOCBRADDIF, number(1)),
                ("o0", lib.SIOCBRADDIF, number(port)),
                ("t0", lib.SIOCSIFADDR, address[:4] + bytes([8, 8, 8, 8])),
                ("t0", lib.SIOCSIFNETMASK, bytes(24)),
                ("t0", lib.SIOCSIFMTU, number(9000)),
                ("o0", lib.SIOCGIFMTU, b""),
                ("o0", lib.SIOCSIFFLAGS, bytes(2)),
            ):
                with pytest.raises(UsageError, match="only what the command line names"):
                    ask(name, request, data)
            with pytest.raises(OSError, match="No such device"):
                ask("br0", lib.SIOCBRADDIF, number(9999))
            ask("br0", lib.SIOCBRDELIF, number(port))
            ask("br0", lib.SIOCBRADDIF, number(port))
            ask("t0", lib.SIOCSIFADDR, address)
            ask("t0", lib.SIOCSIFFLAGS, struct.pack("=H", IFF_PROMISC))
            (flags,) = struct.unpack_from("=H", ask("t0", lib.SIOCGIFFLAGS, b""))
            assert not flags & (IFF_UP | IFF_PROMISC)
            tap._interface.restore()
            assert tap._interface.mtu == 1500
            tap._interface.set_mtu(1400)
            with pytest.raises(UsageError, match="a change of t0: the sandbox has only"):
                tap._interface.set_mtu(1401)
            with pytest.raises(UsageError, match="a confined machine makes no new port"):
                tap_of("br0", None, mtu=None, queues=1, txqueuelen=1000)
            assert unnamed.link().master() == socket.if_nametoindex("br0")
            unnamed.close()
            tap.close()
        return ["done"], []

    assert netns._in_child(body) == (["done"], [])


def test_a_child_is_ours(made: helper.Helper) -> None:
    """A module that the helper starts is a child of this process, has the descriptors under their
    numbers, and can be killed.
    """
    helper.permit_start(helper.BACKEND)
    helper.seal()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = [str(theirs.fileno()), "-1", "tap0", "1500", "0", "0"]
        child = helper.start_module(helper.BACKEND, words, [theirs.fileno()])
        theirs.close()  # so that a child that ends is heard
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        assert str(child.pid) in children
        assert ours.recv(100) == b"\0", "it is ready"
        assert child.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.01)
        child.kill()
        assert child.wait() == -signal.SIGKILL
        child.kill()


def test_it_kills_no_others(made: helper.Helper) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as own:
        with pytest.raises(HostError, match="is no child"):
            made.ask(["kill", "1"])
        made.ask(["kill", str(own.pid)])
        assert own.wait() == -signal.SIGKILL


def test_a_helper_that_died_is_told(made: helper.Helper) -> None:
    os.kill(made.pid, signal.SIGKILL)
    assert wait_for(lambda: _zombie(made.pid))
    with pytest.raises(HostError, match="helper"):
        made.ask(["seal"])


def _zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_bugs_are_told(made: helper.Helper) -> None:
    """An error that nobody expects comes with its traceback, and the helper goes on."""
    with pytest.raises(RuntimeError, match="ValueError"):
        made.ask(["steering", "no number"])
    made.ask(["seal"])


def test_an_answer_that_nobody_heard(made: helper.Helper, tmp_path: Path) -> None:
    """A signal's exception ends the wait for an answer, which is not that of the next request."""

    class Signalled(Exception):
        pass

    def on_signal(number: int, frame: object) -> None:
        raise Signalled

    path = tmp_path / "file"
    path.write_text("x")
    for name in (path, tmp_path / "another"):
        made.permit("open", str(name))
    made.seal()
    files = Path("/proc/self/fd")
    open_files = len(list(files.iterdir()))
    before = signal.signal(signal.SIGUSR1, on_signal)
    try:
        os.kill(made.pid, signal.SIGSTOP)
        main = threading.main_thread().ident
        assert main is not None
        unread = bytearray(4)

        def interrupt() -> None:
            while not any(unread):
                fcntl.ioctl(made._channel.fileno(), termios.TIOCOUTQ, unread)
            signal.pthread_kill(main, signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Signalled):
            made.ask(["open", str(path)])
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
        os.kill(made.pid, signal.SIGCONT)
    with pytest.raises(FileNotFoundError):
        made.ask(["open", str(tmp_path / "another")])
    assert len(list(files.iterdir())) == open_files, "the descriptor that came is closed"


def test_a_process_without_a_helper(tmp_path: Path) -> None:
    """It does everything itself at first, and refuses everything once it is sealed."""
    path = tmp_path / "file"
    path.write_text("x")

    def body() -> tuple[list[str], list[int]]:
        helper.do_without()
        assert helper.current() is not None and not helper.sealed()
        assert not any(helper.is_channel(number) for number in range(20))
        os.close(helper.do("open", str(path))[1][0])
        helper.permit("open", str(path))
        helper.permit_start(helper.BACKEND)
        helper.seal()
        assert helper.sealed()
        with pytest.raises(UsageError, match="without a helper cannot do 'open' once it is conf"):
            helper.do("open", str(path))
        with pytest.raises(UsageError, match="cannot do 'start'"):
            helper.start_module(helper.BACKEND, [], [])
        os.close(helper.open_to_read(str(path)))
        return ["done"], []

    assert netns._in_child(body) == (["done"], [])
