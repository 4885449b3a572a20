"""The helper: a process of ours that does what a confined VMM cannot do any more (``sandbox``).

Theory of operation. The helper is forked before the VMM has a thread, a file or the guest's memory.
It waits at a socket, and ends with the VMM. Each request names an operation of ``OPERATIONS`` with
its words and descriptors; the answer has words and descriptors, too, or an error. A process that it
starts becomes a child of the VMM (CLONE_PARENT), which waits for it as for any child.

The VMM may be somebody else's by the time it asks. So an operation does what its words say only in
the ways that the code of the operation knows: it starts modules of ours, connects to sockets and
removes files that were permitted before ``seal``, it makes taps in namespaces of their own.

Without a helper, and before ``seal``, the same operations run in this process.
"""

from __future__ import annotations

import _socket  # see ``hostnet.rights``
import gc
import os
import select
import sys
import threading

from pyvmm import errors
from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, PyvmmError, UsageError
from pyvmm.fd import Closing
from pyvmm.hostnet.rights import FDS_MAX, close_all, recv_fds, send_fds
from pyvmm.programs import module

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    #: What an operation returns: a few words, and descriptors that the caller owns.
    Result = tuple[list[str], list[int]]
    Operation = Callable[[list[str]], Result]

    class Child(Protocol):
        """A process that ``start_module`` has started: what is used of ``subprocess.Popen``."""

        pid: int
        returncode: int | None

        def wait(self, timeout: float | None = None) -> int: ...
        def poll(self) -> int | None: ...
        def kill(self) -> None: ...
else:
    import _signal as signal  # without enumerations, which take long to make


#: The size of the longest message, in bytes: a traceback.
MESSAGE_MAX = 1 << 16
#: Bytes in front of a request and its answer: the request's number, and a zero.
NUMBER_MAX = 20
BACKEND, USER_NETWORK = "pyvmm.backend.process", "pyvmm.hostnet.slirp"
VDUSE_KEEPER = "pyvmm.backend.vduse_keeper"
#: The modules that may be started -> what messages call them, and how many of their words are free:
#: the others have to be permitted (``permit_start``).
MODULES = {
    BACKEND: ("a back-end of pyvmm's", None),
    VDUSE_KEEPER: ("a vDPA device of pyvmm's", None),
    USER_NETWORK: ("a user network with this loopback= and hostfwd=", 6),
}
#: Name -> the function that does it: of a module that is imported when it is needed.
OPERATIONS = {
    "namespace": "pyvmm.hostnet.netns:make_inside",
    "macvtap": "pyvmm.hostnet.netns:make_macvtap",
    "steering": "pyvmm.hostnet.steering:load_described",
    "tap": "pyvmm.hostnet.tap:open_named",
    "interface": "pyvmm.hostnet.tap:interface_request",
    "route": "pyvmm.hostnet.rtnetlink:route_sockets",
    "connect": "pyvmm.hostnet.sockets:connect_once",
    "listen": "pyvmm.hostnet.sockets:listen_at",
    "remove": "pyvmm.hostnet.sockets:remove_named",
    "open": "pyvmm.helper:_open_to_read",
    "packets": "pyvmm.hostnet.packets:open_described",
    "vdpa": "pyvmm.datapath.vdpa_device:open_described",
    "vduse": "pyvmm.backend.vduse:remove_described",
    "traffic": "pyvmm.hostnet.traffic:control",
    "tool": "pyvmm.hostnet.tools:operate",
}
#: Operations whose first word has to be permitted; and so has ``start``, see ``MODULES``.
NAMED = ("connect", "listen", "remove", "tap", "macvtap", "open")
#: Operations that need other permissions -> the function that says which, from the words.
NEEDS = {
    "interface": "pyvmm.hostnet.tap:interface_needs",
    "packets": "pyvmm.hostnet.packets:needs",
    "vdpa": "pyvmm.backend.vduse:needs",
    "vduse": "pyvmm.backend.vduse:needs_to_remove",
    "traffic": "pyvmm.hostnet.traffic:needs",
    "tool": "pyvmm.hostnet.tools:needs",
}


def answer(channel: _socket.socket, body: Callable[[], Result], to: Sequence[str] = ()) -> int:
    """Run ``body`` and send its result, or its error, for ``heard``; returns an exit status. The
    descriptors stay open.

    :param to: what the message begins with, before what ``heard`` takes.
    """
    fds: list[int] = []
    status = 0
    try:
        words, fds = body()
        words = ["ok", *words]
    except PyvmmError as e:
        kind = next(k.__name__ for k in type(e).__mro__ if hasattr(errors, k.__name__))
        words = [kind, e.cause, e.hint]
    except OSError as e:
        words = ["os", str(e.errno or 0), e.strerror or str(e)]
    except BaseException:
        import traceback

        words = ["bug", traceback.format_exc()[-MESSAGE_MAX // 4 :]]  # up to 4 bytes each
        status = 1
    send_fds(channel, "\0".join((*to, *words)).encode(errors="surrogateescape"), fds)
    for fd in fds:
        os.close(fd)
    return status


def heard(data: bytes, fds: list[int], what: str) -> Result:
    """The result that ``answer`` has sent.

    :param what: has sent it, for messages.
    :raises PyvmmError, OSError: this was the error. :raises RuntimeError: another one; the text is
        the traceback.
    """
    kind, *words = data.decode(errors="surrogateescape").split("\0")
    if kind == "ok":
        return words, fds
    if kind == "os":
        raise OSError(int(words[0]), words[1])
    if kind == "bug":
        raise RuntimeError(f"in {what}:\n{words[0]}")
    raise getattr(errors, kind)(*words)


def in_child(body: Callable[[], Result], what: str) -> Result:
    """Run ``body`` in a child; the descriptors that it returns come back by SCM_RIGHTS.

    :param what: the child, for messages. It is killed if this thread ends, or stops to wait.
    :raises PyvmmError, OSError: ``body`` raised this error.
    :raises HostError: the child died without an answer.
    :raises RuntimeError: ``body`` raised another exception; the text is the child's traceback.
    """
    ours, theirs = _socket.socketpair(
        _socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC
    )
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if lib.pv_follow_parent(parent):
                os._exit(status)
            status = answer(theirs, body)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # the answer could not be sent
        finally:
            os._exit(status)
    theirs.close()
    status = 0
    try:
        data, fds = recv_fds(ours, MESSAGE_MAX, FDS_MAX)
    except BaseException:
        _kill_child(pid)  # which may never end by itself
        raise
    finally:
        ours.close()
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:
            pass  # the program that uses this library ignores SIGCHLD
    if not data:
        raise HostError(f"{what} died, status {status}")
    return heard(data, fds, what)


def _kill_child(pid: int) -> None:
    """Kill a child of this process, unless it has ended, and nobody has it to wait for."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


class Helper(Closing):
    """The client's side. ``close`` ends the process.

    :ivar pid: of the process.
    """

    def __init__(self, pid: int, channel: _socket.socket) -> None:
        self.pid, self._channel = pid, channel
        self._lock = threading.Lock()
        self._number = 0  # of the latest request
        self.sealed = False
        self._permitted: list[tuple[str, str]] = []

    def ask(self, words: Sequence[str], fds: Sequence[int] = ()) -> Result:
        """Have the helper do something. Any thread; takes as long as the operation.

        :raises HostError: it has ended; or whatever the operation raises.
        """
        with self._lock:
            self._number += 1
            number = b"%d" % self._number
            data = number + "\0".join(("", *words)).encode(errors="surrogateescape")
            if len(data) > MESSAGE_MAX:
                raise HostError(f"{len(data)} bytes are too many for {words[0]}")
            try:
                send_fds(self._channel, data, fds)
                while True:
                    answered, got = recv_fds(self._channel, MESSAGE_MAX, FDS_MAX)
                    to, _, rest = answered.partition(b"\0")
                    if to == number or not answered:
                        break
                    # For an earlier request, whose answer a signal's exception let nobody hear.
                    close_all(got)
            except OSError as e:
                raise HostError(f"pyvmm's helper does not answer: {e.strerror}") from e
        if not answered:
            raise HostError("pyvmm's helper has ended")
        return heard(rest, got, "pyvmm's helper")

    def permit(self, operation: str, name: str) -> None:
        """Allow an operation a name, from ``seal`` on."""
        self._permitted.append((operation, name))

    def seal(self) -> None:
        """Allow nothing more.

        :raises HostError: the helper has ended.
        """
        words = ["seal"]
        room = MESSAGE_MAX - NUMBER_MAX - len(words[0])
        # Together, because each answer costs two changes of process.
        for pair in dict.fromkeys(self._permitted):
            size = sum(len(os.fsencode(word)) + 1 for word in pair)
            if size > room and len(words) > 1:
                self.ask(["permit", *words[1:]])
                del words[1:]
                room = MESSAGE_MAX - NUMBER_MAX - len("permit")
            words += pair
            room -= size
        self.ask(words)
        self.sealed = True

    def owns(self, number: int) -> bool:
        """Whether the descriptor ``number`` is our end of the channel."""
        return self._channel.fileno() == number

    def close(self) -> None:
        """End the process. A second call does nothing."""
        global _current
        if self.pid:
            self._channel.close()
            pid, self.pid = self.pid, 0
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass  # whoever uses this library ignores SIGCHLD
        if _current is self:
            _current = None


class _Nobody(Helper):
    """In the place of a helper: refuses every operation once it is sealed."""

    def __init__(self) -> None:
        self.pid, self.sealed = 0, False
        self._permitted = []

    def owns(self, number: int) -> bool:
        return False

    def ask(self, words: Sequence[str], fds: Sequence[int] = ()) -> Result:
        if words[0] not in ("permit", "seal"):
            raise UsageError(
                f"a process without a helper cannot do {words[0]!r} once it is confined",
                "start the machine with --sandbox off",
            )
        return [], []


_current: Helper | None = None


def do_without() -> None:
    """Have no helper in this process, for good: ``seal`` leaves it nothing that a helper does. For
    a machine that has neither cards nor other devices with back-ends, and never starts over.
    """
    global _current
    _current = _Nobody()


def current() -> Helper | None:
    """The helper of this process; None if there is none."""
    return _current


def is_channel(number: int) -> bool:
    """Whether the descriptor ``number`` is that of the socket to the helper."""
    return _current is not None and _current.owns(number)


def start(without: Sequence[int] = ()) -> Helper:
    """Fork the helper of this process, which has one thread only, and has none yet.

    :param without: descriptors that the helper does not get.
    :raises HostError: there can be no process.
    """
    global _current
    assert _current is None
    _operation("remove")  # both processes need its module; the VMM waits while the helper loads one
    gc.freeze()  # to look at what is here by now would part the pages that the two processes share
    try:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = os.fork()
    except OSError as e:
        raise HostError(f"cannot start pyvmm's helper: {e.strerror}") from e
    if not pid:
        status = 1
        try:
            ours.close()
            close_all(without)
            _serve(theirs)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    theirs.close()
    _current = Helper(pid, ours)
    return _current


def sealed() -> bool:
    """Whether this process has given up what the helper does."""
    return _current is not None and _current.sealed


def do(operation: str, *words: str, fds: Sequence[int] = ()) -> Result:
    """Do an operation of ``OPERATIONS``: in this process, or after ``seal`` in the helper.

    :param fds: descriptors, lent; the operation has their numbers behind ``words``.
    """
    if _current is not None and _current.sealed:
        return _current.ask([operation, *words], fds)
    return _operation(operation)([*words, *map(str, fds)])


def permit(operation: str, *names: str) -> None:
    """Allow an operation of ``NAMED`` these names after ``seal``, or what a function of ``NEEDS``
    calls so. Nothing without a helper.
    """
    if _current is not None and not _current.sealed:
        for name in names:
            _current.permit(operation, name)


def permit_start(module: str, *words: str) -> None:
    """Allow ``start_module`` a module after ``seal``, with these words in the end. Nothing without
    a helper.
    """
    permit("start", " ".join([module, *words]))


def seal() -> None:
    """Have the helper do all operations from now on, those of ``NAMED`` with permitted names
    only.
    """
    if _current is not None:
        _current.seal()


def open_to_read(path: str) -> int:
    """Open a file that may be a pipe by now, and that may have been replaced since the sandbox is
    in force, which knows files and not their names; returns a descriptor.

    :raises OSError: from open(2).
    """
    try:
        return _open_to_read([path])[1][0]
    except PermissionError:
        if not sealed():
            raise
        return do("open", path)[1][0]


def _open_to_read(words: list[str]) -> Result:
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    return [], [os.open(words[0], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)]


# --- children -------------------------------------------------------------------------------------


class Sibling:
    """A child of this process by its id, such as one that the helper has started; implements
    ``Child``.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        with self._lock:
            if self.returncode is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:
                    pid, status = self.pid, 0  # as subprocess does
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def ended(self, timeout: float | None = None) -> int | None:
        """Wait for its end; the exit status, None if it still runs after ``timeout`` seconds."""
        if self.poll() is None:
            fd = os.pidfd_open(self.pid)
            try:
                waiting = select.poll()
                waiting.register(fd, select.POLLIN)
                waiting.poll(None if timeout is None else timeout * 1000)
            finally:
                os.close(fd)
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. :raises subprocess.TimeoutExpired: after ``timeout`` seconds."""
        status = self.ended(timeout)
        if status is None:
            import subprocess

            assert timeout is not None
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return status

    def kill(self) -> None:
        """End it now, unless it has been waited for."""
        if sealed():
            kill(self)
        elif self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # a zombie keeps the number


def start_module(
    name: str, words: Sequence[str], fds: Sequence[int], *, silent: bool = False
) -> Child:
    """Run a module of ours in a child of this process, in a session of its own, without standard
    input and output.

    :param name: one of ``MODULES``. :param words: its arguments. :param fds: descriptors that it
        has under the same numbers.
    :param silent: without standard error, too.
    :raises OSError: it cannot be started.
    """
    if _current is not None and _current.sealed:
        numbers = ",".join(map(str, fds))
        answered, _ = _current.ask(["start", name, str(int(silent)), numbers, *words], fds)
        return Sibling(int(answered[0]))
    import subprocess

    return subprocess.Popen(
        module(name, *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if silent else None,
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C is for us
    )


def kill(child: Child) -> None:
    """Kill a child of this process, unless it has been waited for."""
    if _current is None or not _current.sealed:
        child.kill()
    elif child.poll() is None:
        _current.ask(["kill", str(child.pid)])


# --- the helper itself ----------------------------------------------------------------------------


def _operation(name: str) -> Operation:
    found: Operation = _function(OPERATIONS[name])
    return found


def _function(place: str) -> Any:
    where, _, name = place.partition(":")
    __import__(where)
    return getattr(sys.modules[where], name)


class _Rules:
    """What may be asked for."""

    def __init__(self) -> None:
        self._permitted: set[tuple[str, str]] = set()
        self.sealed = False

    def permit(self, operation: str, name: str) -> None:
        if self.sealed:
            raise HostError("pyvmm's helper has been sealed")
        self._permitted.add((operation, name))

    def check(self, operation: str, name: str, shown: str = "") -> None:
        if (operation, name) not in self._permitted:
            raise UsageError(
                f"{shown or name}: the sandbox has only what the command line names",
                "name it at the start, or start with --sandbox off",
            )


def withdraw(name: bytes) -> None:
    """Be a process behind the one from which this was forked: without the signals that are for the
    user's command, and without standard input and output.

    :param name: for ``ps``; at most 15 bytes.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the command, which ends this process
    os.setsid()
    lib.pv_thread_name(name)
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # then no machine can be made, which the command will say
        null = os.eventfd(0)
    for fd in (0, 1):
        os.dup2(null, fd)  # nobody waits for the end of the output because of this process
    os.close(null)


def _serve(channel: _socket.socket) -> None:
    """The helper's life: do what is asked, until the VMM closes its end."""
    withdraw(b"pyvmm-helper")
    rules, parent = _Rules(), os.getppid()
    while _serve_one(channel, rules, parent):
        pass


def _serve_one(channel: _socket.socket, rules: _Rules, parent: int) -> bool:
    """Answer one request of the VMM; False if it has closed its end."""
    data, fds = recv_fds(channel, MESSAGE_MAX, FDS_MAX)
    try:
        number, *words = data.decode(errors="surrogateescape").split("\0")
        if data:
            answer(channel, lambda: _do(rules, parent, words, fds), [number[:NUMBER_MAX]])
    finally:
        for fd in fds:
            os.close(fd)
    return bool(data)


def _do(rules: _Rules, parent: int, words: list[str], fds: list[int]) -> Result:
    operation, *rest = words
    if operation in OPERATIONS:
        rest += [str(fd) for fd in fds]
        if operation in NAMED:
            rules.check(operation, rest[0])
        if operation in NEEDS:
            for kind, name in _function(NEEDS[operation])(rest):
                words_for = {
                    "setting": f"a change of {rest[0]}",
                    "packets": f"tap {rest[0]}",
                    "tool": f"the tool {rest[0]}",
                    "place": f"{rest[0]} in a namespace of somebody else's",
                    "traffic": f"traffic control of {rest[0]}",
                    "vdpa": f"device={rest[0]}",
                    "vduse": "a vDPA device of pyvmm's",
                }
                rules.check(kind, name, words_for.get(kind, ""))
        return _operation(operation)(rest)
    if operation in ("permit", "seal"):
        for kind, name in zip(rest[::2], rest[1::2], strict=True):
            rules.permit(kind, name)
        rules.sealed = rules.sealed or operation == "seal"
    elif operation == "start":
        name, silent, numbers, *words = rest
        if name not in MODULES:
            raise HostError(f"pyvmm's helper does not start {name}")
        shown, free = MODULES[name]
        bound = words[free:] if free is not None else []
        rules.check("start", " ".join([name, *bound]), shown)
        return [str(_spawn(name, silent == "1", numbers, words, fds))], []
    elif operation == "kill":
        _kill(int(rest[0]), parent)
    else:
        raise HostError(f"pyvmm's helper does not know {operation!r}")
    return [], []


def _spawn(name: str, silent: bool, numbers: str, words: list[str], fds: list[int]) -> int:
    """Start a module of ours as a child of the VMM; its process id."""
    to = [int(number) for number in numbers.split(",") if number]
    if len(to) != len(fds) or min(to, default=3) < 3:
        raise HostError(f"{len(fds)} descriptors for {len(to)} numbers")
    argv = [ffi.new("char[]", os.fsencode(word)) for word in module(name, *words)]
    null = -1
    if silent:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        fds, to = [*fds, null], [*to, 2]
    try:
        pid = lib.pv_spawn_sibling(ffi.new("char *[]", [*argv, ffi.NULL]), fds, to, len(fds))
    finally:
        if null >= 0:
            os.close(null)
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return int(pid)


def _kill(pid: int, parent: int) -> None:
    """Kill a child of the VMM's, which is a child until the VMM has waited for it."""
    fd = os.pidfd_open(pid)
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()
        if int(fields[1]) != parent:
            raise HostError(f"process {pid} is no child of process {parent}")
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)
