"""virtiofsd, which serves a directory of the host to a guest, as a child process: started, confined
and ended by us.

Theory of operation. The child gets a listening socket on which our connection waits already, so
that it has one peer only, and nobody else can connect. It ends when that connection does: also if
this process is killed. Before it is executed, the child has moved to a mount namespace in which
everything but a writable share is read-only (``hostnet.isolate``). Then virtiofsd confines itself:
as root to namespaces of its own with the directory as their root, as another user to that directory
as its root; and to few system calls.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

from pyvmm.errors import PyvmmError, ShareError, VhostUserError
from pyvmm.hostnet import isolate
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Channel, Stopped, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

#: The program in Rust (Debian 13) and the one in C (Debian 12), with the package of each.
RUST, C = "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"
PACKAGES = {RUST: "virtiofsd", C: "qemu-system-common"}
#: Seconds for a virtiofsd whose connection has ended to end itself.
END_S = 2.0
#: Bytes that are kept of its last words.
WORDS_MAX = 400


def find() -> str:
    """The path of this machine's virtiofsd. :raises ShareError: there is none."""
    for path in (RUST, C):
        if os.access(path, os.X_OK):
            return path
    raise ShareError(
        "a directory can be shared only by virtiofsd, which is missing",
        f"as root: apt-get install --no-install-recommends {PACKAGES[C]}, or {PACKAGES[RUST]} where"
        " there is such a package",
    )


def command(program: str, fd: int, directory: str, *, writable: bool, root: bool) -> list[str]:
    """How to start it.

    :param fd: the listening socket. :param root: whether it is started by root.
    """
    # With the root directory itself, virtiofsd's pivot_root(2) fails, and there is nothing outside.
    sandbox = "namespace" if root and directory != "/" else "chroot"
    if program == RUST:
        return [
            program,
            f"--fd={fd}",
            f"--shared-dir={directory}",
            f"--sandbox={sandbox}",
            "--cache=auto",
            "--no-announce-submounts",
            "--log-level=error",
            *([] if writable else ["--readonly"]),
        ]
    escaped = directory.replace("\\", "\\\\").replace(",", "\\,")  # fuse_opt_parse()
    return [
        program,
        f"--fd={fd}",
        "-o",
        f"source={escaped},sandbox={sandbox},cache=auto,log_level=err",
    ]


def _pair() -> tuple[socket.socket, socket.socket]:
    """A listening socket, and the first connection to it; nobody else can make one."""
    import shutil
    import tempfile

    directory = tempfile.mkdtemp(prefix="pyvmm-")  # nobody else's; an abstract address would be
    kind = socket.SOCK_STREAM | socket.SOCK_CLOEXEC
    listener, client = socket.socket(socket.AF_UNIX, kind), socket.socket(socket.AF_UNIX, kind)
    try:
        listener.bind(f"{directory}/s")
        listener.listen(1)
        client.connect(f"{directory}/s")
    except BaseException:
        listener.close()
        client.close()
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return listener, client


class FsConnector(Connector):
    """Starts a virtiofsd and makes the one connection to it.

    :param directory: to be served, without symbolic links.
    :raises ShareError: there is no virtiofsd, or it cannot be started.
    """

    waits = True

    def __init__(self, directory: str, *, writable: bool) -> None:
        super().__init__(f"virtiofsd of {directory}")
        self._directory = directory
        self._lock = threading.Lock()
        self._said = b""
        self._client: socket.socket | None
        try:
            listener, self._client = _pair()
        except OSError as e:
            raise ShareError(f"no socket for {self.name}: {e.strerror}", "ulimit -n") from e
        with listener:
            try:
                self._child, self._words = self._start(listener.fileno(), writable=writable)
            except BaseException:
                self._client.close()
                raise

    def _start(self, fd: int, *, writable: bool) -> tuple[subprocess.Popen[bytes], int]:
        import subprocess

        root = not os.geteuid()
        where = self._directory if self._directory == "/" else isolate.SHARED
        argv = command(find(), fd, where, writable=writable, root=root)
        environment, lent, shim = dict(os.environ), [fd], None
        if not root:
            from pyvmm.host.shim import open_shim

            shim, more = open_shim()
            environment |= more
            lent.append(shim.fileno())
        words, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a full pipe loses words: no matter

        def confine() -> None:
            """In the child, before it becomes virtiofsd."""
            try:
                if self._directory == "/":
                    isolate.protect(["/"] if writable else [])
                else:
                    isolate.stage(self._directory, writable=writable)
            except OSError as e:
                os.write(write, str(e).encode())
                raise

        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                pass_fds=lent,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=confine,
            )
        except (OSError, subprocess.SubprocessError) as e:
            said = os.read(words, WORDS_MAX).decode(errors="replace") if readable([words], 0) else e
            os.close(words)
            raise ShareError(
                f"virtiofsd for {self._directory} cannot be confined: {said}",
                "run as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1",
            ) from e
        finally:
            os.close(write)
            if shim is not None:
                shim.close()
        return child, words

    def connect(self, seconds: float | None, end: int) -> Channel:
        """The one connection. Afterwards there is none: wait for ``end``."""
        client, self._client = self._client, None
        if client is not None:
            return Channel(client)
        if seconds is not None:
            raise VhostUserError(f"{self.name} has ended")
        readable([end], None)
        raise Stopped(f"{self.name}: stopped")

    def end(self) -> str:
        """Wait a moment for a virtiofsd that has hung up, and end it if need be; returns how it
        ended, in words.
        """
        import subprocess

        with self._lock:
            try:
                status = self._child.wait(END_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
                status = 0
            self._hear()
        said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        said = f": {said}" if said else ""
        if status < 0:
            return f"virtiofsd was killed by {signal.Signals(-status).name}{said}"
        return f"virtiofsd has ended with status {status}{said}" if status else f"virtiofsd{said}"

    def _hear(self) -> None:
        if self._words >= 0:
            while readable([self._words], 0):
                piece = os.read(self._words, 1 << 16)
                if not piece:
                    break
                self._said = (self._said + piece)[-WORDS_MAX:]

    def close(self) -> None:
        """End virtiofsd. A second call does nothing."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        with self._lock:
            if self._words < 0:
                return
        try:
            self.end()
        except PyvmmError:
            pass
        with self._lock:
            os.close(self._words)
            self._words = -1
