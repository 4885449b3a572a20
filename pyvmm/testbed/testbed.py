"""The testbed's client: start and stop a testbed, and run commands in it.

``Testbed().run(["pyvmm", "run", ...])`` runs a command in the testbed that is up;
``with Testbed() as t:`` starts a temporary one if none is up. L1 with an AMD processor sees the
host's files: writes to the writable directories reach the host, all other writes go into an overlay
that is thrown away. Into L1 with an Intel processor, or on another machine, files travel when it
starts; what a command writes in the writable directories is fetched when the command has ended
(``travel``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time

from pyvmm.errors import PyvmmError, TestbedError
from pyvmm.fd import is_null
from pyvmm.host.attended import attend
from pyvmm.host.paths import cache_dir, cache_root, runtime_dir
from pyvmm.programs import module
from pyvmm.testbed import protocol as p
from pyvmm.testbed.machines import CPUS, machine
from pyvmm.testbed.session import Result, Session, TestbedTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.testbed.machine import Machine

__all__ = ["Result", "Testbed", "TestbedTimeout"]

#: Set in the environment of every command in L1; to ``REAL`` if L1's processor is not emulated.
INSIDE, REAL = "PYVMM_IN_TESTBED", "ssh"
_numbers = itertools.count()


def inside() -> bool:
    """Whether this process itself runs in a testbed."""
    return INSIDE in os.environ


def emulated() -> bool:
    """Whether this process runs in a testbed whose processor is emulated."""
    return os.environ.get(INSIDE, REAL) != REAL


def default_writable(cwd: str) -> list[str]:
    """The directories that a testbed started from ``cwd`` can write: the git checkout that holds
    ``cwd`` (or else ``cwd`` itself), pyvmm's cache and the directory for temporary files.
    """
    import tempfile

    top = os.path.realpath(cwd)
    at = top
    while at != "/":
        if os.path.exists(f"{at}/.git"):
            top = at
            break
        at = os.path.dirname(at)
    return [top, cache_root(), os.path.realpath(tempfile.gettempdir())]


class Testbed:
    """One testbed, known by its name. As a context manager, it uses the testbed that is up, or
    starts a temporary one and stops it at the end.

    :param name: several testbeds can be up at once under different names. The default is
        $PYVMM_TESTBED or "default".
    :param cpu: the processor, "amd" or "intel". Testbeds of different processors can be up under
        one name.
    :param host: another machine with KVM, ``ssh://[USER@]NAME[:PORT]``, instead of an emulated one.
        Then the options that describe an emulated machine must be left out.
    :param cpus: the number of vCPUs that commands can use; 0 for two if the emulator supports them,
        else one.
    :param memory: L1's memory in bytes; 0 for 4 GiB with an AMD and 1 GiB with an Intel processor.
    :param kernel: a prefix of the version of Debian's cloud kernel, such as "6.1" or "6.12".
    :param kvm: options of L1's KVM module, each as NAME=VALUE.
    :param writable: directories that commands may write besides ``default_writable``. The root
        directory is ignored. If files are not shared, these directories only; they travel.
    :param add: what travels besides, each as FILE, DIR, FILE:/PATH or DIR:/PATH. Nothing needs to
        travel into an emulated machine with an AMD processor.
    :param vdpa_card: L1 has an IOMMU and two network cards that are joined by a cable: one for its
        driver vp_vdpa, and the other one as the peer.
    :param watchdog: seconds without a sign of life after which L1 counts as hung; 0 for 30 with an
        AMD processor, 60 of processor time with an Intel processor, and 60 on another machine.
    :param progress: called with each line of progress.
    :raises TestbedError: the name or the host is not a valid one, there is no such processor, or
        options contradict each other.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        name: str | None = None,
        *,
        cpu: str = "amd",
        host: str = "",
        cpus: int = 0,
        memory: int = 0,
        kernel: str | None = None,
        kvm: Sequence[str] = (),
        writable: Sequence[str] = (),
        add: Sequence[str] = (),
        vdpa_card: bool = False,
        watchdog: float = 0.0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name or os.environ.get("PYVMM_TESTBED") or "default"
        if not self.name.replace("-", "").replace("_", "").isalnum() or len(self.name) > 32:
            raise TestbedError(
                f"testbed name {self.name!r}", "use up to 32 letters, digits, - and _"
            )
        if cpu not in CPUS:
            raise TestbedError(f"no testbed has the processor {cpu!r}", f"use {' or '.join(CPUS)}")
        if host:
            from pyvmm.testbed.ssh import Address

            Address(host)
            if cpus or memory or kernel or kvm or vdpa_card:
                raise TestbedError(
                    f"{host} is what it is: no vCPUs, memory, kernel, option of KVM or card can be"
                    " chosen",
                    "leave these options out",
                )
        self.cpu, self.host = cpu, host
        self.cpus, self.memory, self.kernel, self.watchdog = cpus, memory, kernel, watchdog
        self.kvm, self.writable, self.add = list(kvm), list(writable), list(add)
        self.vdpa_card = vdpa_card
        self.progress = progress or (lambda text: None)
        self._tether = -1
        self._child: subprocess.Popen[bytes] | None = None
        self._entered = 0
        self._shared = ""  # while a temporary testbed is up, the name without its suffix

    @property
    def dir(self) -> str:
        """The directory of the run-time files: socket, lock and log. It is made when the testbed
        starts.
        """
        kind = "" if self.cpu == CPUS[0] else f".{self.cpu}"
        if self.host:
            import hashlib

            kind = f".ssh-{hashlib.sha256(self.host.encode()).hexdigest()[:8]}"
        return f"{runtime_dir()}/testbed-{self.name}{kind}"

    @staticmethod
    def is_set_up(cpu: str = "amd", host: str = "") -> bool:
        """Whether a testbed with that processor, or on that host, can be started from here."""
        return not Testbed.missing(cpu, host)

    @staticmethod
    def missing(cpu: str = "amd", host: str = "") -> str:
        """The things that such a testbed still needs on this machine, each with its remedy, as one
        line; empty if nothing is missing.
        """
        lacks = machine(cpu, host).missing()
        return "; ".join(f"{what} is missing ({remedy})" for what, remedy in lacks)

    @staticmethod
    def setup(
        progress: Callable[[str], None],
        kernel: str | None = None,
        cpu: str = "amd",
        host: str = "",
    ) -> None:
        """Fetch and build all that a testbed needs and that can be had without root. This is quick
        if nothing is missing.

        :param kernel: see ``Testbed``; ``cpu`` and ``host`` likewise.
        :raises TestbedError: a system package is missing, or a download failed.
        """
        machine(cpu, host).setup(progress, kernel)

    @property
    def _kind(self) -> type[Machine]:
        return machine(self.cpu, self.host)

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(f"{self.dir}/socket")
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        return sock

    def is_up(self) -> bool:
        """Whether the testbed runs or is starting."""
        sock = self._connect()
        if sock:
            sock.close()
        return sock is not None

    def status(self) -> dict[str, Any] | None:
        """The supervisor's facts about the testbed (``Supervisor.status``); None if it is down.

        :raises TestbedError: the supervisor does not answer.
        """
        import json

        sock = self._connect()
        if sock is None:
            return None
        with sock:
            sock.settimeout(10)
            framer = p.Framer()
            try:
                sock.sendall(p.frame(p.STATUS))
                while data := sock.recv(65536):
                    for kind, _, _, payload in framer.feed(data):
                        if kind == p.NOTE and payload.startswith(b"{"):
                            answer: dict[str, Any] = json.loads(payload)
                            return answer
            except TimeoutError as e:
                raise TestbedError(
                    "the testbed's supervisor does not answer", f"see {self.dir}/log"
                ) from e
            except ConnectionError:
                pass  # the testbed ends
        return None

    def up(self, *, tethered: bool = False) -> bool:
        """Start the testbed and wait until it is ready; returns False if it was up already.

        :param tethered: stop the testbed when this process ends, for whatever reason.
        :raises TestbedError: the testbed is not set up or did not start.
        """
        sock = self._connect()
        if sock is not None:
            with sock:
                self._await_ready(sock)
            return False
        self._spawn(tethered)
        return True

    def _spawn(self, tethered: bool) -> None:
        import json
        import subprocess

        lacks = self.missing(self.cpu, self.host)
        if lacks:
            raise TestbedError(f"the testbed is not set up: {lacks}")
        directory = self.dir
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        os.makedirs(cache_root(), exist_ok=True)
        writable = []
        shares = self._kind.SHARES
        for path in [*(default_writable(os.getcwd()) if shares else ()), *self.writable]:
            real = os.path.realpath(path)
            if not os.path.isdir(real):
                raise TestbedError(f"{path} is not a directory", "make it first")
            # The root as a whole stays protected.
            if real != "/":
                writable.append(real)
        writable = [
            d
            for d in dict.fromkeys(writable)
            if not any(is_below(d, o) and d != o for o in writable)
        ]
        options: dict[str, Any] = {
            "socket": f"{directory}/socket",
            "lock": f"{directory}/lock",
            "log_later": f"{cache_dir()}/last.log" if self._shared else f"{directory}/log",
            "cpu": self.cpu,
            "host": self.host,
            "cpus": self.cpus,
            "memory": self.memory,
            "kernel": self.kernel,
            "kvm": self.kvm,
            "writable": writable,
            "add": [] if shares else [_absolute(text) for text in self.add],
            "directories": [os.getcwd(), os.path.expanduser("~")],
            "vdpa_card": self.vdpa_card,
            "watchdog": self.watchdog,
            "tether": None,
        }
        # Before the supervisor has a socket: while it makes files, it answers nobody.
        try:
            self._kind.prepare(self.progress, self.kernel)
        except PyvmmError as e:
            raise TestbedError(e.cause, e.hint) from None
        fds: tuple[int, ...] = ()
        if tethered:
            r, self._tether = os.pipe()
            options["tether"] = r
            fds = (r,)
        with open(f"{directory}/log", "wb") as log:
            child = subprocess.Popen(
                module("pyvmm.testbed.supervisor"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
                pass_fds=fds,
                start_new_session=True,
            )
        for fd in fds:
            os.close(fd)
        assert child.stdin
        child.stdin.write(json.dumps(options).encode())
        child.stdin.close()
        self._child = child
        for _ in range(3000):
            sock = self._connect()
            if sock is not None:
                break
            # Status 3 means that another supervisor was faster; that one will listen.
            if child.poll() not in (None, 3):
                raise TestbedError(
                    f"the testbed's supervisor ended: {_last_line(f'{directory}/log')}"
                )
            time.sleep(0.01)
        else:
            raise TestbedError("the testbed's supervisor does not listen", f"see {directory}/log")
        with sock:
            self._await_ready(sock)

    def _await_ready(self, sock: socket.socket) -> None:
        framer = p.Framer()
        while True:
            try:
                data = sock.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                raise TestbedError(
                    f"the testbed ended while it started: {_last_line(f'{self.dir}/log')}"
                )
            for kind, _, _, payload in framer.feed(data):
                if kind == p.NOTE:
                    self.progress(payload.decode(errors="replace"))
                elif kind == p.ERROR:
                    raise TestbedError(payload.decode(errors="replace"))
                elif kind == p.READY:
                    return

    def down(self) -> bool:
        """Stop the testbed with all commands in it; returns False if it was down already.

        :raises TestbedError: it does not stop within 15 seconds.
        """
        sock = self._connect()
        if sock is None:
            return False
        with sock:
            sock.settimeout(15)
            sock.sendall(p.frame(p.STOP))
            try:
                while sock.recv(65536):
                    pass
            except OSError as e:
                raise TestbedError(f"the testbed does not stop: {e}", f"see {self.dir}/log") from e
        self._reap()
        return True

    def _reap(self) -> None:
        """Let the supervisor that this object has started go, and wait for its end."""
        if self._tether >= 0:
            os.close(self._tether)
            self._tether = -1
        if self._child:
            self._child.wait()
            self._child = None

    def __enter__(self) -> Self:
        self._entered += 1
        if self._entered == 1 and not self.is_up():
            # The temporary testbed gets a name of its own, so that no other process comes to use a
            # testbed that ends with this one.
            self._shared, self.name = self.name, f"{self.name[:20]}-{os.getpid()}-{next(_numbers)}"
            try:
                self.up(tethered=True)
            except BaseException:
                self._entered = 0
                self._reap()
                self._forget()
                raise
        return self

    def _forget(self) -> None:
        """Remove the files of a temporary testbed. Its log moves to the cache as last.log."""
        import shutil

        try:
            shutil.move(f"{self.dir}/log", f"{cache_dir()}/last.log")
        except OSError:
            pass  # there is no log
        shutil.rmtree(self.dir, ignore_errors=True)
        self.name, self._shared = self._shared, ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._shared and not self._entered:
            try:
                self.down()
            finally:
                self._forget()

    @property
    def is_temporary(self) -> bool:
        """Whether ``with`` has started the testbed and will stop it."""
        return bool(self._shared)

    def check(self, cwd: str) -> str:
        """Check whether the running testbed has what this object asks for.

        :returns: a warning if the testbed cannot write ``cwd``, else an empty string.
        :raises TestbedError: it differs from an explicit wish: cpus, memory, kernel or writable.
        """
        status = self.status()
        if status is None or not status["ready"]:
            return ""
        hint = f"stop it (pyvmm testbed{self._option} down) or use another --name"
        for what, wanted, has in (
            ("vCPUs", self.cpus, status["cpus"]),
            ("bytes of memory", self.memory, status["memory"]),
        ):
            if wanted and wanted != has:
                raise TestbedError(f"the running testbed has {has} {what}", hint)
        if self.kernel and not f"{status['kernel']}.".startswith(f"{self.kernel}."):
            raise TestbedError(f"the running testbed has Linux {status['kernel']}", hint)
        if self.vdpa_card and not status["vdpa_card"]:
            raise TestbedError("the running testbed has no card for vp_vdpa", hint)
        for option in self.kvm:
            if option not in status["kvm"]:
                raise TestbedError(f"the running testbed has its KVM without {option}", hint)
        if not status["shares"]:
            for text in map(_absolute, self.add):
                if text not in status["add"]:
                    raise TestbedError(f"{text} has not travelled into the testbed", hint)
        shared = status["writable"]
        for path in self.writable:
            if not any(is_below(os.path.realpath(path), d) for d in shared):
                raise TestbedError(f"the running testbed cannot write {path}", hint)
        if not any(is_below(os.path.realpath(cwd), d) for d in shared) and status["shares"]:
            return f"the running testbed cannot write {cwd}: files written there are lost"
        return ""

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a command in the testbed and collect its output.

        :param cwd: the command's working directory; by default that of this process.
        :param env: the command's whole environment; by default that of this process.
        :param input: the command's stdin; by default /dev/null.
        :param timeout: seconds after which the command is killed.
        :raises TestbedTimeout: the command was killed because the time was over.
        :raises TestbedError: the testbed is down, or ended before the command did.
        """
        with self._round_trip():
            return self._collect(
                argv, cwd or os.getcwd(), self._env(env, self.host), input, timeout
            )

    def _collect(
        self,
        argv: Sequence[str],
        cwd: str,
        env: dict[str, str],
        input: bytes | None = None,
        timeout: float | None = None,
    ) -> Result:
        """One command as ``run`` has it, without its files."""
        with self._session() as sock:
            session = Session(sock, argv, cwd=cwd, env=env, stdin=input, stdout=None, stderr=None)
            status = session.wait(timeout, progress=self.progress)
            return Result(status, bytes(session.output[p.STDOUT]), bytes(session.output[p.STDERR]))

    def give(self, paths: Mapping[str, str]) -> None:
        """Let files travel into a testbed that is up on another machine, to the paths that they
        have here. The working directory is made there, too.

        :param paths: of files and directories: for each absolute path, by which it is to be found
            there, the same without links. If there is no such file, its directory is made there.
        :raises PyvmmError: something cannot be read, or does not arrive.
        """
        import tempfile

        from pyvmm.testbed import layers

        with tempfile.TemporaryDirectory() as work:
            real = dict.fromkeys(paths.values())
            have = [path for path in real if os.path.exists(path)]
            directories = [p if os.path.isdir(p) else os.path.dirname(p) for p in (*real, *paths)]
            layers.later(have, [os.getcwd(), *directories], f"{work}/given")
            with open(f"{work}/given", "rb") as f:
                given = f.read()
        done = self._collect(["cpio", "-i", "-d", "-u"], "/", {"PATH": os.defpath}, given)
        if done.status:
            raise TestbedError(f"files do not arrive in the testbed: {done.err.strip()[-200:]}")

    @contextlib.contextmanager
    def _round_trip(self, returns: Sequence[str] = ()) -> Iterator[None]:
        """While a command runs: afterwards, fetch the files that it has written in writable
        directories, unless it has been seen to write them here.

        :param returns: files and directories that are fetched as well.
        """
        status = None if self._kind.SHARES else self.status()
        places = [*returns, *(status["writable"] if status else ())]
        if status is None or not places:
            yield
            return
        from pyvmm.testbed import travel

        def run(argv: Sequence[str]) -> Result:
            return self._collect(argv, "/", {"PATH": os.defpath})

        mark = f"{os.getpid()}-{next(_numbers)}"
        travel.departure(run, mark)
        yield
        for path in travel.arrival(run, mark, places):
            self.progress(f"came back: {path}")

    def run_attached(
        self, argv: Sequence[str], *, timeout: float | None = None, returns: Sequence[str] = ()
    ) -> int:
        """Run a command that uses the stdin, stdout, stderr and terminal of this process and gets
        its signals. Only the main thread may call this.

        It uses the testbed that is up, or a temporary one.

        :param timeout: seconds after which the command is killed.
        :param returns: files and directories, by absolute paths without links, that come back if
            the testbed does not share files.
        :returns: the command's status as in ``Result``.
        :raises TestbedTimeout: the command was killed because the time was over.
        :raises TestbedError: the testbed did not start, or ended before the command did.
        """
        with self:
            if not self.is_temporary:
                warning = self.check(os.getcwd())
                if warning:
                    self.progress(warning)
            with self._round_trip(returns), self._session() as sock:
                session = Session(
                    sock,
                    argv,
                    cwd=os.getcwd(),
                    env=self._env(None, self.host),
                    stdin=0 if _is_open(0) and not is_null(0) else None,
                    stdout=1 if _is_open(1) else None,
                    stderr=2 if _is_open(2) else None,
                    terminal=0 if _is_open(0) and os.isatty(0) else None,
                )
                return attend(session, timeout, self.progress)

    def _session(self) -> socket.socket:
        sock = self._connect()
        if sock is None:
            raise TestbedError("the testbed is down", f"run: pyvmm testbed{self._option} up")
        return sock

    @property
    def _option(self) -> str:
        """What names this kind of testbed on a command line."""
        if self.host:
            return f" --host {self.host}"
        return "" if self.cpu == CPUS[0] else f" --cpu {self.cpu}"

    @staticmethod
    def _env(env: Mapping[str, str] | None, host: str) -> dict[str, str]:
        env = {**(os.environ if env is None else env), INSIDE: REAL if host else "1"}
        path = env.get("PATH", os.defpath)
        # An ordinary user is root in L1 and can use root's programs.
        env["PATH"] = ":".join(
            [path, *(d for d in ("/usr/sbin", "/sbin") if d not in path.split(":"))]
        )
        return env


def _absolute(text: str) -> str:
    """An addition as the supervisor takes it, whose working directory is another one."""
    host, colon, inside = text.rpartition(":/")
    return f"{os.path.abspath(host)}:/{inside}" if colon else os.path.abspath(text)


def is_below(path: str, directory: str) -> bool:
    """Whether ``path`` is ``directory`` or below it. Both are absolute, without symbolic links."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _last_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = [line for line in f if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "it said nothing"
