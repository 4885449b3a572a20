"""The jail of ``--jail``: a world of its own for a whole command (docs/jail.md).

Theory of operation. The command's own process, root's, stays outside. It opens what the command
needs of the host: result files, taps, the control socket. Then it forks the jail's first process,
which is process 1 of a new PID namespace. That process leaves the host: it enters its cgroup, its
namespaces and a root directory in memory (``emptyroot``), takes limits and another user, drops all
capabilities, forks the process that goes on with the command, and waits. The command knows nothing
of all this: it is an ordinary user's, on a host that has little.

The kernel ends every process of a PID namespace with process 1, and process 1 with the process
outside. Taps go with their last descriptor, mounts and networks with their namespaces. Only the
cgroup has a name, see ``host.cgroup``.
"""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import select
import signal
import socket
import stat
import sys
import termios
import time
from contextlib import ExitStack, suppress

from pyvmm import helper, sandbox
from pyvmm._ext import ffi, lib
from pyvmm.errors import HostError, JailError, KvmMissing, UsageError
from pyvmm.fd import Closing, close_all_but
from pyvmm.hostnet import emptyroot, userns
from pyvmm.hostnet.rights import FDS_MAX, close_all, recv_fds, send_fds
from pyvmm.programs import interpreter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, NoReturn

    from pyvmm.host.cgroup import Cgroup
    from pyvmm.jailopt import Jail

#: Devices that a jail has if the host has them; others make no sense there.
DEVICES = ("/dev/kvm", "/dev/net/tun", "/dev/vhost-net", "/dev/null")
#: What a guest of Linux is asked about beforehand (``doctor.flavour``).
FLAVOURS = ("/sys/module/kvm_pvm", "/sys/module/kvm_intel", "/sys/module/kvm_amd")
#: Bytes of the jail's own directory for run-time files.
SCRATCH_SIZE = 16 << 20
HOSTNAME = "pyvmm"
#: What of root's environment the command has, besides LC_*, PYTHON* and PYVMM*.
ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "LANG", "TERM", "COLUMNS", "NO_COLOR", "TZ", "XDG_CACHE_HOME"),
    "GITHUB_ACTIONS",  # "true", for ``cli.support.verdicts``
)
#: Descriptors for the set-up, besides one for each place; and how many places may have one.
SPARE_FDS, FILES_MAX = 128, 1 << 20
NAMESPACES = lib.CLONE_NEWIPC | lib.CLONE_NEWUTS | lib.CLONE_NEWNET | lib.CLONE_NEWCGROUP
#: Signals that are passed on to the command.
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: What process 1 says at the end.
STATUS = re.compile(rb"-?[0-9]{1,3}")
#: poll(2) takes an int.
DAY_MS = 86_400_000.0
#: Seconds that the command has to end by itself after a second signal, which ends it at once.
LATE = 2.0
#: Two signals within this many seconds may be one request (``cli.support.signals``).
TWICE_SECONDS = 0.25


def need_root() -> None:
    """:raises JailError: this process may not make jails."""
    if os.geteuid():
        raise JailError("--jail needs root, to leave the host behind", "run it with sudo")


class Cell(Closing):
    """A jail for one command. ``close`` leaves nothing of it behind.

    :param want: its description.
    :raises JailError: this process may not make jails, or this host has no cgroups for its limits.
    """

    def __init__(self, want: Jail) -> None:
        need_root()
        if not os.path.exists("/dev/kvm"):
            raise KvmMissing("there is no /dev/kvm", "use a machine with KVM")
        self._want = want
        self._stack = ExitStack()
        self._cgroup: Cgroup | None = None
        self._named: set[str] = set()

    def run(
        self,
        body: Callable[[], int],
        *,
        files: Iterable[str],
        keep: Iterable[int],
        directories: Iterable[str] = (),
        mounts: Iterable[int] = (),
        timeout: float | None = None,
    ) -> int:
        """Run ``body`` in the jail, in a process of its own; returns its status, or minus the
        number of the signal that has ended the process. Signals are passed on to it.

        :param body: returns an exit status, and raises nothing.
        :param files: regular files that can be read there, under the same names.
        :param keep: descriptors that the process has there, besides standard input, output and
            error; it has no others.
        :param directories: as ``files``; each may be a directory, with all that is in it.
        :param mounts: more descriptors that the process has there: of mounts that are attached
            nowhere (``isolate.detach``).
        :param timeout: seconds after which it ends by itself, unless somebody has taken it over; it
            is killed some time later.
        :raises UsageError: a link on the way to a file or directory is not root's (``links.walk``).
        :raises JailError: the kernel or a sandbox does not allow jails, or ``want.memory`` was too
            little.
        """
        if self._want.limited:
            from pyvmm.host.cgroup import Cgroup

            limits = self._want
            self._cgroup = Cgroup(
                memory=limits.memory, millicpus=limits.millicpus, pids=limits.pids
            )
            self._stack.callback(self._cgroup.close)
        own = [
            *(p for p in sandbox.SYSTEM if p != "/proc"),
            *sandbox.own_places(),
            *FLAVOURS,
            *interpreter(),
        ]
        named = [*((p, False) for p in files), *((p, True) for p in directories)]
        places: dict[str, bool] = {}  # path -> whether it may be a directory
        for path, whole in [*((p, True) for p in own), *named]:
            path = os.path.abspath(path) if path else ""
            if path and path not in DEVICES and not path.startswith("/proc/"):
                places[path] = places.get(path, False) or whole
        self._named = {os.path.abspath(path) for path, _ in named if path}
        kept = {0, 1, 2, *keep}
        for fd in kept:
            if stat.S_ISDIR(os.fstat(fd).st_mode):  # by which a process gets out
                raise UsageError(
                    f"--jail: descriptor {fd} is a directory of the host", "give a file or none"
                )
        return self._attend(body, places, kept | {*mounts}, timeout)

    def _attend(
        self,
        body: Callable[[], int],
        places: Mapping[str, bool],
        kept: set[int],
        timeout: float | None,
    ) -> int:
        """Start process 1, pass signals on, and wait for the end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.callback(ours.close)
        modes = _terminal_modes()
        with _Signals() as signals:
            here = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            # No signal comes to the command before it is ready for one, and none to process 1.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
            try:
                userns.unshare(lib.CLONE_NEWPID)
                first = os.fork()
                if not first:
                    signals.close()
                    self._be_first(theirs, body, places, kept, mask)
                userns.check(lib.setns(here, lib.CLONE_NEWPID), "setns")
            except OSError as e:
                raise _refused(e) from e
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                os.close(here)
            theirs.close()
            patience = _Patience(timeout)
            status = self._listen(ours, signals, first, patience)
        if status >= 0:
            return status
        if modes is not None:
            # In the background, the kernel would stop this process for it.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
            with suppress(termios.error):  # the terminal has gone
                termios.tcsetattr(0, termios.TCSANOW, modes)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self._cgroup is not None and self._cgroup.killed_for_memory():
            raise JailError(
                f"the jail's memory ran out, {self._want.memory >> 20}M, and the kernel has ended "
                "the machine",
                "give it more: --jail ...,memory=SIZE; or the guest less: --memory",
            )
        return status

    def _listen(
        self, channel: socket.socket, signals: _Signals, first: int, patience: _Patience
    ) -> int:
        """Attend the jail until it has ended; the command's exit status, or minus the number of the
        signal that has ended it.
        """
        status: int | None = None
        target = -1  # a pidfd of the command, once it runs
        came: list[int] = []
        poll = select.poll()
        for fd in (channel.fileno(), signals.fileno()):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                ready = [fd for fd, _ in poll.poll(patience.milliseconds())]
                over = patience.is_over()  # what has come by now counts
                for number in signals.read() if signals.fileno() in ready else ():
                    came.append(number)
                    patience.signalled()
                if channel.fileno() in ready:
                    data, fds = recv_fds(channel, helper.MESSAGE_MAX, FDS_MAX)
                    if not data:
                        break
                    if target >= 0:
                        close_all(fds)
                        if not STATUS.fullmatch(data):
                            break  # not of our process 1
                        status = int(data)
                    else:
                        try:
                            (target,) = helper.heard(data, fds, "the jail's first process")[1]
                        except OSError as e:
                            raise _refused(e) from e
                        if self._cgroup is not None:
                            self._cgroup.joined()
                while came and target >= 0:
                    try:
                        signal.pidfd_send_signal(target, came.pop(0))
                    except ProcessLookupError:
                        patience.at_most(LATE)  # process 1 is about to say so
                if over:
                    break
        finally:
            if target >= 0:
                os.close(target)
            # Not yet waited for, so the number is still its own.
            with suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)  # nothing, unless this process gives up
            with suppress(ChildProcessError):
                os.waitpid(first, 0)
        return -signal.SIGKILL if status is None else status

    # --- process 1 --------------------------------------------------------------------------------

    def _be_first(
        self,
        channel: socket.socket,
        body: Callable[[], int],
        places: Mapping[str, bool],
        kept: set[int],
        mask: set[int | signal.Signals],
    ) -> NoReturn:
        """Leave the host, start the command, and wait for its end; the kernel then ends all that it
        has left.
        """
        children: list[int] = []

        def leave() -> tuple[list[str], list[int]]:
            umask = self._leave(channel, places, kept)
            child = os.fork()
            if not child:
                channel.close()
                os.umask(umask)
                _be_command(body, mask)
            children.append(child)
            return [], [os.pidfd_open(child)]

        try:
            helper.answer(channel, leave)
            close_all_but({0, 1, 2, channel.fileno()})  # the rest is the command's
            while children:
                pid, status = os.wait()
                if pid in children:
                    send_fds(channel, str(os.waitstatus_to_exitcode(status)).encode())
                    break
        finally:
            os._exit(0)

    def _leave(self, channel: socket.socket, places: Mapping[str, bool], kept: set[int]) -> int:
        """Leave the host behind, and root; returns the umask."""
        want = self._want
        _forget_environment()
        if self._cgroup is not None:
            self._cgroup.join()
        # Whoever has a terminal as its own could type into it (TIOCSTI).
        os.setsid()
        umask = os.umask(0o022)
        try:
            here = os.getcwd()
        except OSError:
            here = "/"
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (*kept, channel.fileno()):
                with suppress(OSError):
                    os.close(int(name))
        files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = min(len(places) + SPARE_FDS, FILES_MAX)  # the set-up has each place open
        if need > files:
            with suppress(ValueError, OSError):  # to raise the hard limit takes a capability
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(need, most), most))
                resource.setrlimit(resource.RLIMIT_NOFILE, (need, max(need, most)))
        devices = {}
        for path in DEVICES:
            with suppress(FileNotFoundError):
                devices[path] = os.stat(path).st_rdev
        userns.unshare(NAMESPACES)
        socket.sethostname(HOSTNAME)
        owner = (want.uid, want.gid)
        emptyroot.enter(places, devices, owner, scratch=SCRATCH_SIZE, here=here, named=self._named)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))  # virtiofsd takes all of it
        here = os.path.dirname(os.path.abspath(__file__))
        # Whoever outside has ended before the second call is found by the socket.
        for error in (lib.pv_become_user(want.uid, want.gid), lib.pv_follow_parent(0)):
            if error:
                raise OSError(-error, f"become user {want.uid}: {os.strerror(-error)}")
        for path in (*interpreter()[:1], here, os.path.abspath(__file__)):
            # Its files have one mode, so one stands for all.
            if not os.access(path, os.R_OK if path.endswith(".py") else os.X_OK):
                raise JailError(
                    f"user {want.uid} may not use {path}, which the jail needs",
                    "install pyvmm and Python where every user may read them",
                )
        poll = select.poll()
        poll.register(channel.fileno(), 0)
        if poll.poll(0):
            os._exit(1)
        return umask

    def close(self) -> None:
        """Remove the cgroup; the rest has gone with its processes. A second call does nothing."""
        self._stack.close()


class _Patience:
    """How long the process outside waits for the command to end by itself: for ever, unless it was
    told to end.

    :param timeout: seconds after which it should end; None: it need not.
    """

    def __init__(self, timeout: float | None) -> None:
        self._until = math.inf
        self._signalled = math.inf  # when the first signal came
        if timeout is not None:
            self.at_most(sandbox.longest(timeout))

    def at_most(self, seconds: float) -> None:
        self._until = min(self._until, time.monotonic() + seconds)

    def signalled(self) -> None:
        """A signal came: the first asks for an orderly end (``cli.support.signals``)."""
        now = time.monotonic()
        self._signalled = min(self._signalled, now)
        again = now - self._signalled >= TWICE_SECONDS
        self.at_most(LATE if again else 2 * sandbox.ORDERLY_S)

    def milliseconds(self) -> float | None:
        """For poll(2)."""
        if self._until == math.inf:
            return None
        return min(max(self._until - time.monotonic(), 0) * 1000 + 1, DAY_MS)

    def is_over(self) -> bool:
        return time.monotonic() >= self._until


class _Signals(Closing):
    """The signals of ``PASSED`` as bytes to be read, until ``close``. Those that are ignored, as
    after nohup(1), stay so.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._handlers = {
            number: signal.signal(number, _nothing)
            for number in PASSED
            if signal.getsignal(number) != signal.SIG_IGN
        }
        self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._read

    def read(self) -> list[int]:
        """Those that have come."""
        return [number for number in os.read(self._read, 64) if number in PASSED]

    def close(self) -> None:
        """Handle signals as before. A second call does nothing."""
        if self._read < 0:
            return
        signal.set_wakeup_fd(self._fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for fd in (self._read, self._write):
            os.close(fd)
        self._read = self._write = -1


def _nothing(number: int, frame: object) -> None:
    pass


def _be_command(body: Callable[[], int], mask: set[int | signal.Signals]) -> NoReturn:
    status = HostError.exit_code
    try:
        lib.pv_be_seen(True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.environ["XDG_RUNTIME_DIR"] = os.environ["TMPDIR"] = emptyroot.SCRATCH
        status = body()
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _forget_environment() -> None:
    """Keep of the environment only what a command there needs: it may have secrets of root's. Its
    first copy, which /proc/PID/environ shows, is overwritten.
    """
    kept = {name: text for name, text in os.environ.items() if _is_kept(name)}
    if "XDG_CACHE_HOME" not in kept and os.path.isabs(home := os.path.expanduser("~")):
        kept["XDG_CACHE_HOME"] = f"{home}/.cache"  # it has the image
    os.environ.clear()
    with open("/proc/self/stat", "rb") as f:
        begin, end = map(int, f.read().rpartition(b")")[2].split()[47:49])  # env_start, env_end
    if 0 < begin < end:
        ffi.memmove(ffi.cast("char *", begin), bytes(end - begin), end - begin)
    os.environ.update(kept, HOME="/")


def _is_kept(name: str) -> bool:
    return name in ENVIRONMENT or name.startswith(("LC_", "PYTHON", "PYVMM"))


def _refused(e: OSError) -> JailError:
    if e.errno in (errno.EMFILE, errno.ENFILE):
        return JailError(
            f"cannot make a jail: {e.strerror}", "raise the limit: ulimit -n; or name fewer files"
        )
    return JailError(
        f"cannot make a jail: {e.strerror}",
        "it takes root of the host, or of a container that may mount and make devices",
    )


def _terminal_modes() -> list[Any] | None:
    """Those of standard input, if this is a terminal."""
    try:
        return termios.tcgetattr(0)
    except termios.error:
        return None
