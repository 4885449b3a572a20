"""A vhost-user back-end of somebody else's as a child process: started, confined and ended by us.

The child gets a listening socket on which our connection waits already. The socket has no name any
more by then, so nobody else can connect.
"""

from __future__ import annotations

import os
import signal
import socket
import threading

from pyvmm import helper
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Channel, Stopped, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

#: Bytes that are kept of a child's last words.
WORDS_MAX = 400
#: Looks for words when a child has ended: whoever else has the pipe could go on without end.
READS_MAX = 32


class ChildConnector(Connector):
    """Starts a back-end and makes the one connection to it. A subclass calls ``start`` in its
    constructor.

    :param program: what messages call the child. :param name: what it serves.
    :param error: the class of errors to raise.
    """

    waits = True
    #: Seconds for a child whose connection has ended to end itself.
    end_s = 2.0

    def __init__(self, program: str, name: str, error: type[PyvmmError]) -> None:
        super().__init__(f"{program} of {name}")
        self._program, self._served, self._error = program, name, error
        self._lock = threading.Lock()
        self._said = b""
        self._words = -1
        self._client: socket.socket | None = None
        self._child: subprocess.Popen[bytes]

    def start(
        self,
        command: Callable[[int], list[str]],
        confine: Callable[[], None],
        environment: dict[str, str],
        keep: Sequence[int] = (),
    ) -> None:
        """Start the child.

        :param command: makes its command from the descriptor of the listening socket.
        :param confine: called in the child, before it becomes the back-end; may raise OSError.
        :param keep: descriptors that the child gets besides.
        :raises PyvmmError: it cannot be started or confined.
        """
        try:
            listener, self._client = _pair()
        except OSError as e:
            raise self._error(f"no socket for {self.name}: {e.strerror}", "ulimit -n") from e
        with listener:
            try:
                self._start(listener.fileno(), command, confine, environment, keep)
            except BaseException:
                self._client.close()
                raise

    def _start(
        self,
        fd: int,
        command: Callable[[int], list[str]],
        confine: Callable[[], None],
        environment: dict[str, str],
        keep: Sequence[int],
    ) -> None:
        import subprocess

        argv = command(fd)
        words, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a full pipe loses words: no matter

        def confined() -> None:
            try:
                confine()
            except OSError as e:
                os.write(write, str(e).encode())
                raise

        try:
            self._child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                pass_fds=[fd, *keep],
                env=environment,
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=confined,
            )
        except (OSError, subprocess.SubprocessError) as e:
            said = os.read(words, WORDS_MAX).decode(errors="replace") if readable([words], 0) else e
            os.close(words)
            raise self._error(
                f"{self._program} for {self._served} cannot be confined: {said}",
                "run as root, or allow user namespaces: sysctl kernel.unprivileged_userns_clone=1",
            ) from e
        finally:
            os.close(write)
        self._words = words

    def connect(self, seconds: float | None, end: int) -> Channel:
        """The one connection. Afterwards there is none: wait for ``end``."""
        client, self._client = self._client, None
        if client is not None:
            return Channel(client)
        if seconds is not None:
            raise VhostUserError(f"{self.name} has ended")
        readable([end], None)
        raise Stopped(f"{self.name}: stopped")

    def hang_up(self) -> None:
        """Tell the child to end, if the end of the connection does not. Called more than once."""

    def end(self) -> str:
        """Wait a moment for a child that has hung up, and end it if need be; returns how it ended,
        in words. They are empty if it had to be ended and has said nothing.
        """
        import subprocess

        with self._lock:
            self.hang_up()
            status: int | None = None
            try:
                status = self._child.wait(self.end_s)
            except subprocess.TimeoutExpired:
                helper.kill(self._child)
                self._child.wait()
            self._hear()
        said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        if status is None:
            return said and f"{self._program}: {said}"
        said = f": {said}" if said else ""
        if status < 0:
            return f"{self._program} was killed by {signal.Signals(-status).name}{said}"
        return f"{self._program} has ended{f' with status {status}' if status else ''}{said}"

    def _hear(self) -> None:
        if self._words >= 0:
            for _ in range(READS_MAX):
                if not readable([self._words], 0):
                    break
                piece = os.read(self._words, 1 << 16)
                if not piece:
                    break
                self._said = (self._said + piece)[-WORDS_MAX:]

    def close(self) -> None:
        """End the child. A second call does nothing."""
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
