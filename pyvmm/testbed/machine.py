"""What the supervisor wants of the machine that L1 is. ``amd.Amd`` is QEMU and shares this
machine's files; ``intel.Intel`` is Bochs, into which files travel; ``ssh.Ssh`` is a part of another
machine, into which files travel as well.
"""

from __future__ import annotations

import os
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

    from pyvmm.testbed.assets import Kernel


class Port:
    """The agent's end of its connection, as non-blocking descriptors.

    :ivar source: what L1 sends is read there. :ivar sink: what L1 gets is written there; it may be
        the same descriptor. :ivar busy: something is still to be sent before any frame.
    """

    busy = False

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink

    def prelude(self) -> bool:
        """If it is busy, send some of what comes before the frames; returns whether some of it was
        taken.

        :raises OSError: the machine has ended.
        """
        return False

    def recv(self) -> bytes:
        """What has come; empty if the machine has ended.

        :raises BlockingIOError: nothing has.
        """
        try:
            return os.read(self.source, 1 << 18)
        except BlockingIOError:
            raise
        except OSError:  # what a socket or terminal says whose other end is gone
            return b""

    def send(self, data: bytes | memoryview) -> int:
        """Send some of ``data``; returns the number of bytes.

        :raises BlockingIOError: there is no room.
        :raises OSError: the machine has ended.
        """
        return os.write(self.sink, data)


class Machine:
    """One L1 as a machine. It is made by the supervisor, which ends its processes.

    :param options: as ``Supervisor`` has them.
    :param say: called with each line of progress.
    :ivar processes: what runs for it, by process; the first one is the emulator.
    :ivar port: to the agent. :ivar console: a non-blocking descriptor with L1's console.
    :ivar notes: what the user should know about it, one line each.
    :ivar fresh: for so many seconds L1 may cache a name or an attribute in a writable directory.
    :ivar cpus: vCPUs for commands. :ivar memory: bytes.
    """

    #: Seconds by ``clock`` until the agent must have started. 20 are usual; on a machine with ten
    #: times the work that its processors can do, more than 120 were needed.
    BOOT_TIMEOUT = 300.0
    #: Seconds by ``clock`` without a sign of life after which L1 counts as hung, unless the user
    #: says otherwise.
    WATCHDOG = 30.0
    MEMORY = 4 << 30
    #: Whether L1 sees this machine's files.
    SHARES = True
    #: Whether L1 is to shut down in order, because what it has written might be lost otherwise.
    ORDERLY = True
    #: Whether L1 uses a processor of this machine even if it has nothing to do.
    RESTLESS = False

    port: Port
    console: int
    kernel: Kernel
    #: A non-blocking descriptor with what the emulator prints itself; -1: that is in the log.
    screen = -1

    def __init__(self, options: dict[str, Any], say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.processes: dict[subprocess.Popen[bytes], str] = {}
        self.notes: list[str] = []
        self.fresh = 0.0
        self.cpus = 1
        self.memory = options["memory"] or self.MEMORY

    @staticmethod
    def missing() -> list[tuple[str, str]]:
        """The things that it needs and this machine lacks, each with its remedy."""
        raise NotImplementedError

    @staticmethod
    def setup(progress: Callable[[str], None], version: str | None = None) -> None:
        """Fetch and build what can be had without root.

        :param version: a prefix of the kernel's version, such as "6.1" or "6.12".
        :raises TestbedError: a system package is missing, or a download failed.
        """
        raise NotImplementedError

    @staticmethod
    def prepare(progress: Callable[[str], None], version: str | None) -> None:
        """Make those files in the cache that are missing and take seconds. This is quick if none is
        missing.

        :param version: as for ``setup``.
        :raises PyvmmError: something that they are made of is missing.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Start the processes.

        :raises TestbedError: something that they need is missing.
        """
        raise NotImplementedError

    @property
    def release(self) -> str:
        """The version of L1's kernel."""
        return self.kernel.version

    def intent(self) -> str:
        """What the user reads first."""
        return f"starting Linux {self.release} on {self.cpus} vCPU(s) under {self.emulator()}"

    def started(self, hello: str) -> None:
        """The agent runs.

        :param hello: what it says of L1: protocol, kernel's version, vCPUs, bytes of memory.
        """

    def reason(self, status: int, said: str) -> tuple[str, str] | None:
        """Why the emulator has ended, with a remedy; None if that is nothing special.

        :param status: its exit status. :param said: what it has printed on ``screen``.
        """
        return None

    def emulator(self) -> str:
        """Name and version of the emulator."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """More for the status of the testbed."""
        return {}

    def config(self) -> dict[str, Any]:
        """What the agent is to do first: ``binds``, pairs of directories, the first of which is
        mounted on the second; ``files``, pairs of a path and what is written there; and
        ``silence``, seconds without a frame after which the agent ends, or 0.
        """
        files = [
            ("/proc/sys/kernel/perf_event_paranoid", "-1"),
            # With huge pages for shared memory, a guest boots in a fifth less time.
            ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise"),
        ]
        return {"binds": [], "files": files, "silence": 0}

    def trouble(self, console: bytes | bytearray) -> str:
        """Why L1 cannot go on although the emulator does; empty if it can.

        :param console: the last part of L1's console.
        """
        return ""

    def registers(self) -> str:
        """The registers of L1's vCPUs for the log; empty if they cannot be had."""
        return ""

    def clock(self) -> float:
        """The time in seconds by which L1's silence is measured, since any moment."""
        return time.monotonic()

    def rest(self, on: bool) -> None:
        """Stop the emulator, or let it go on. Only for a RESTLESS machine."""

    def close(self) -> None:
        """Remove the files. The processes have ended."""

    @property
    def vm(self) -> subprocess.Popen[bytes]:
        """The emulator."""
        return next(iter(self.processes))

    def spawn(
        self,
        name: str,
        argv: list[str],
        *,
        fds: list[int] | None = None,
        env: dict[str, str] | None = None,
        stdio: tuple[int, int, int] | None = None,
        cwd: str | None = None,
        before: Callable[[], None] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one.

        :param name: for messages. :param fds: descriptors that it inherits.
        :param env: what its environment has besides ours.
        :param stdio: its stdin, stdout and stderr; None for /dev/null and the supervisor's log.
        :param before: runs in the child, before the program does.
        """
        import subprocess

        from pyvmm.host.tether import tethered

        stdin, stdout, stderr = stdio or (subprocess.DEVNULL, None, None)
        child = subprocess.Popen(
            tethered(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(env or {})},
            pass_fds=fds or (),
            cwd=cwd,
            preexec_fn=before,
        )
        self.processes[child] = name
        return child


def python() -> str:
    """The interpreter for the agent: ours, unless its path has a blank."""
    path = os.path.realpath(sys.executable)
    return "/usr/bin/python3" if any(c.isspace() for c in path) else path


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets: ours, which does not block, and the emulator's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs
