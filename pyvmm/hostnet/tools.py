"""ping, iperf3 and a check of an echo, at the other end of a card: in a network namespace that
this process has made.

Theory of operation. A process, the runner, enters the namespaces. It runs the tool, or the check,
as its child and takes what that prints, within a limit of bytes and of seconds. Then it sends how
the tool ended, and the output, by a socket. If the other end of the socket is closed, it kills the
tool and ends. It is forked by the helper if this process is confined, else by this process.

Whoever asks for a tool may be somebody else's by then, and so may the guest that answers the tool.
So whoever asks has no words of a command line, but numbers and an address, each within its range;
and a tool has no right that it does not need, no process of its own, and no environment.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

from pyvmm import helper
from pyvmm._ext import lib
from pyvmm.errors import HostError
from pyvmm.fd import close_all_but
from pyvmm.hostnet import userns
from pyvmm.hostnet.netns import ours
from pyvmm.hostnet.rights import close_all
from pyvmm.programs import which

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from pyvmm.hostnet.netns import Namespace

PING, IPERF3, ECHO = "ping", "iperf3", "echo"
#: Bytes of what a tool prints: iperf3 reports each second, up to some hours.
OUTPUT_MAX = 8 << 20
#: Tools of one process at a time.
RUNNING_MAX = 8
#: Bytes of a check; twice as many are in memory.
ECHO_MAX = 4 << 20
PIECE = 1 << 16
TIMEOUT_MAX = 2e6  # seconds
CONNECT_MS = 3000  # for iperf3's client to reach its server
GRACE = 5.0  # seconds for a runner whose channel is closed
PAUSE = 0.3  # seconds between two attempts to reach a server that does not listen yet
CAP_NET_RAW = 13
#: All that a tool finds in its environment.
ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}
CANNOT_RUN = 127  # the status of a program that cannot be executed
#: The words of ``ways`` that iperf3 has.
REVERSE, JSON = "reverse", "json"
#: How a tool ended, besides ``ENDED``: not in time, with too much output, not at all.
ENDED, LATE, FLOOD, FAILED = "ended", "late", "flood", "failed"


class End:
    """The end of a tool.

    :ivar how: of ``ENDED``, ``LATE``, ``FLOOD``, ``FAILED``.
    :ivar status: its exit status, or minus the number of the signal that has ended it.
    :ivar output: what it has printed on both its streams, at most OUTPUT_MAX bytes; of a check that
        has failed, why.
    """

    __slots__ = ("how", "output", "status")

    def __init__(self, how: str, status: int, output: bytes) -> None:
        self.how, self.status, self.output = how, status, output

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


# --- whoever asks ---------------------------------------------------------------------------------


def permit() -> None:
    """Allow this process the tools once it is confined, by the paths that they have now."""
    helper.permit("tool", ECHO)
    for name in (PING, IPERF3):
        path = which(name)
        if path is not None:
            helper.permit("tool", f"{name} {path}")


def ping(address: str, count: int, interval: float) -> list[str]:
    """The words of a ping, for ``run``. :param interval: seconds."""
    return [PING, address, str(count), f"{interval:g}"]


def iperf3(
    server: str,
    port: int,
    seconds: float,
    *,
    reverse: bool = False,
    json: bool = True,
    udp: tuple[int, int] | None = None,
) -> list[str]:
    """The words of an iperf3 client, for ``run``.

    :param reverse: a stream from the server. :param udp: bytes of a datagram, and bits per second,
        0 for as many as can be had.
    """
    ways = "+".join(word for word, on in ((REVERSE, reverse), (JSON, json)) if on)
    return [IPERF3, server, str(port), f"{seconds:.12g}", ways, *map(str, udp or ())]


def echo(server: str, port: int, count: int) -> list[str]:
    """The words of a check, for ``run``: random bytes go by TCP to a server that returns them.

    :param count: of bytes.
    """
    return [ECHO, server, str(port), str(count)]


def run(space: Namespace, words: Sequence[str], timeout: float) -> End:
    """Run a tool in a namespace, to its end. It ends if the caller is interrupted, too.

    :param words: of ``ping``, ``iperf3`` or ``echo``. :param timeout: in seconds.
    :raises FileNotFoundError: there is no such tool here.
    :raises HostError: it cannot be run.
    """
    name, *about = words
    path = "" if name == ECHO else which(name)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    places = [fd.fileno() for fd in (space.net, space.user) if fd is not None]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    data = bytearray()
    with ours:
        with theirs:
            asked = (name, "start", path, f"{timeout:.12g}", "\n".join(about))
            said, _ = helper.do("tool", *asked, fds=[theirs.fileno(), *places])
        try:
            while piece := ours.recv(PIECE):
                data += piece
        finally:
            ours.close()
            helper.do("tool", name, "end", said[0])
    head, _, output = bytes(data).partition(b"\n")
    if not head:
        raise HostError(f"the process that runs {name} has died")
    how, status = head.decode().split()
    return End(how, int(status), output)


# --- what the helper does -------------------------------------------------------------------------


def needs(words: list[str]) -> list[tuple[str, str]]:
    """The permissions of the helper that ``operate`` with these words needs: that of ``permit``,
    and that the namespace is ours.
    """
    name, job, *rest = words
    if job == "end":
        return []
    path, _timeout, _about, _channel, net, *_user = rest
    wanted = [("tool", ECHO if name == ECHO else f"{name} {path}")]
    return wanted if ours(int(net)) else [*wanted, ("place", str(os.fstat(int(net)).st_ino))]


#: The runners of this process that nobody has waited for -> a descriptor of each process.
_running: dict[int, int] = {}


def operate(words: list[str]) -> tuple[list[str], list[int]]:
    """Start a tool, or end its runner, and with that the tool; an operation of ``helper``.

    :param words: the tool; ``start``, its path, seconds, what the tool is told in lines; then the
        numbers of the socket, of the network namespace, and perhaps of its user namespace. Or
        ``end`` and the runner.
    :returns: the runner's number. :raises HostError: a word is out of its range.
    """
    name, job, *rest = words
    if job == "end":
        pid = _whole(rest[0], 1, 1 << 31)
        if pid not in _running:
            raise HostError(f"process {pid} runs no tool")
        # Its channel is closed by now, unless its caller has lent something else.
        poll = select.poll()
        poll.register(_running[pid], select.POLLIN)
        if not poll.poll(GRACE * 1000):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(_running[pid], signal.SIGKILL)
        with suppress(ChildProcessError):  # whoever uses this library ignores SIGCHLD
            os.waitpid(pid, 0)
        os.close(_running.pop(pid))
        return [], []
    path, seconds, about, channel, *places = rest
    if job != "start" or name not in TOOLS or len(places) not in (1, 2):
        raise HostError(f"pyvmm runs no tool {name!r}")
    if len(_running) >= RUNNING_MAX:
        raise HostError(f"{RUNNING_MAX} tools run already", "wait until one of them has ended")
    timeout = _number(seconds, 0, TIMEOUT_MAX)
    what = TOOLS[name](about.split("\n"))
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        _be_runner(parent, what, path, timeout, int(channel), [int(fd) for fd in places])
    _running[pid] = os.pidfd_open(pid)
    return [str(pid)], []


def _whole(text: str, least: int, most: int) -> int:
    """A whole number in decimal digits. :raises HostError: it is none, or out of the range."""
    if text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise HostError(f"{text[:40]!r} is no number from {least} to {most}")


def _number(text: str, least: float, most: float) -> float:
    """:raises HostError: it is no number, or out of the range."""
    try:
        value = float(text)
        if least <= value <= most:  # and no NaN
            return value
    except ValueError:
        pass
    raise HostError(f"{text[:40]!r} is no number from {least:g} to {most:g}")


def _address(text: str) -> str:
    """:raises HostError: no address of IPv4, in four numbers."""
    try:
        if socket.inet_ntoa(socket.inet_pton(socket.AF_INET, text)) == text:
            return text
    except (OSError, ValueError):
        pass
    raise HostError(f"{text[:40]!r} is no address of IPv4")


class _Program:
    """A program of the host. :ivar argv: with its name, and numbers. :ivar keep: a mask of CAP_*"""

    def __init__(self, argv: list[str], keep: int) -> None:
        self.argv, self.keep = argv, keep


class _Echo:
    def __init__(self, server: tuple[str, int], count: int) -> None:
        self.server, self.count = server, count


def _ping(about: list[str]) -> _Program:
    address, count, interval = _exactly(about, 3)
    number, every = _whole(count, 1, 10**6), _number(interval, 0.01, 60)
    argv = [PING, "-q", "-c", str(number), "-i", f"{every:g}", _address(address)]
    return _Program(argv, 1 << CAP_NET_RAW)


def _iperf3(about: list[str]) -> _Program:
    address, port, seconds, ways, *udp = _exactly(about, 4, 6)
    words = ways.split("+") if ways else []
    if set(words) - {REVERSE, JSON}:
        raise HostError(f"iperf3 has no way {ways[:40]!r}")
    argv = [IPERF3, "-c", _address(address), "-p", str(_whole(port, 1, 65535))]
    argv += ["-t", f"{_number(seconds, 0.1, 1e6):.12g}", "--connect-timeout", str(CONNECT_MS)]
    argv += ["--json"] if JSON in words else ["-f", "m"]
    if udp:
        size, rate = _whole(udp[0], 16, 65507), _whole(udp[1], 0, 10**12)
        argv += ["-u", "-l", str(size), "-b", str(rate)]
    return _Program([*argv, *(["-R"] if REVERSE in words else [])], 0)


def _echo(about: list[str]) -> _Echo:
    address, port, count = _exactly(about, 3)
    return _Echo((_address(address), _whole(port, 1, 65535)), _whole(count, 1, ECHO_MAX))


def _exactly(words: list[str], *counts: int) -> list[str]:
    if len(words) not in counts:
        raise HostError(f"{len(words)} words for a tool")
    return words


#: Name -> a function that checks the words.
TOOLS: dict[str, Callable[[list[str]], _Program | _Echo]] = {
    PING: _ping,
    IPERF3: _iperf3,
    ECHO: _echo,
}


# --- the runner -----------------------------------------------------------------------------------


def _be_runner(
    parent: int,
    what: _Program | _Echo,
    path: str,
    timeout: float,
    channel: int,
    places: list[int],
) -> NoReturn:
    status = 1
    try:
        if lib.pv_follow_parent(parent):
            os._exit(status)
        helper.withdraw(b"pyvmm-tool")
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it has no statuses
        close_all_but((channel, *places))
        until = time.monotonic() + timeout
        net, *user = places
        if user:
            userns.check(lib.setns(user[0], lib.CLONE_NEWUSER), "setns")
        userns.check(lib.setns(net, lib.CLONE_NEWNET), "setns")
        close_all(places)
        if lib.pv_follow_parent(parent):  # which another user namespace takes back
            os._exit(status)
        end = _attend(what, path, channel, until)
        view = memoryview(f"{end.how} {end.status}\n".encode() + end.output)
        while view:
            view = view[os.write(channel, view) :]
        status = 0
    except BrokenPipeError:
        pass  # nobody wants to hear it
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _attend(what: _Program | _Echo, path: str, channel: int, until: float) -> End:
    """Run a tool, until it has ended and nobody writes its output any more, or its time is over, or
    nobody wants to hear of it.
    """
    said, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        _be_tool(what, path, theirs, until)
    os.close(theirs)
    if isinstance(what, _Echo):
        until += GRACE  # a check keeps its time, and says how far it came
    output, how = bytearray(), ENDED
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(said, select.POLLIN)
    poll.register(channel, 0)  # for POLLHUP
    try:
        while True:
            left = until - time.monotonic()
            ready = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not ready or channel in ready:
                how = LATE
                break
            if process in ready:
                break
            piece = os.read(said, PIECE)
            if not piece:  # the program need not have ended
                poll.unregister(said)
                poll.register(process, select.POLLIN)
            output += piece
            if len(output) > OUTPUT_MAX:
                how = FLOOD
                del output[OUTPUT_MAX:]
                break
    finally:
        if how != ENDED:
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the number is its own
        _, status = os.waitpid(pid, 0)
    if isinstance(what, _Echo) and how == ENDED and status:
        how = FAILED
    return End(how, os.waitstatus_to_exitcode(status), bytes(output))


def _be_tool(what: _Program | _Echo, path: str, out: int, until: float) -> NoReturn:
    status, runner = CANNOT_RUN, os.getppid()
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        if lib.pv_follow_parent(runner):  # the kernel kills it with the runner
            pass
        elif isinstance(what, _Echo):
            problem = _check(what, until).encode()
            os.write(1, problem)
            status = 1 if problem else 0
        elif not lib.pv_confine_program(what.keep):
            os.execve(path, what.argv, ENVIRONMENT)
    finally:
        os._exit(status)


def _check(what: _Echo, until: float) -> str:
    """Check an echo, with no right but to sockets of IPv4; what is wrong, or nothing."""
    done = lib.pv_confine_network(b"/dev/null")
    if done < 0:
        return f"the check cannot be confined: {os.strerror(-done)}"
    poll = select.poll()
    while True:
        s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            s.settimeout(max(0.1, until - time.monotonic()))
            s.connect(what.server)
            break
        except OSError as e:
            s.close()
            if time.monotonic() > until:
                return f"the guest's echo cannot be reached: {e}"
            poll.poll(PAUSE * 1000)
    sent, got = os.urandom(what.count), bytearray()
    problem = _exchange(s, sent, got, until)
    s.close()
    if not problem and got != sent:
        wrong = next((i for i, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b), None)
        problem = f"another byte {wrong} came back from the guest's echo"
        if wrong is None:
            problem = f"{len(got)} of {what.count} bytes came back from the guest's echo"
    return problem


def _exchange(s: socket.socket, sent: bytes, got: bytearray, until: float) -> str:
    """Send bytes and receive as many, at the same time; why not all came back, if that is known."""
    s.setblocking(False)
    poll = select.poll()
    poll.register(s, select.POLLIN | select.POLLOUT)
    left = memoryview(sent)
    count = len(sent)
    try:
        while len(got) < count:
            ready = poll.poll(max(until - time.monotonic(), 0) * 1000)
            if not ready:
                return f"{len(got)} of {count} bytes came back: timed out"
            if ready[0][1] & select.POLLOUT and left:
                left = left[s.send(left[:PIECE]) :]
                if not left:
                    s.shutdown(socket.SHUT_WR)
                    poll.modify(s, select.POLLIN)
            if ready[0][1] & ~select.POLLOUT:
                piece = s.recv(PIECE)
                if not piece:
                    break
                got += piece
    except OSError as e:
        return f"{len(got)} of {count} bytes came back: {e}"
    return ""
