"""A vhost-user back-end of somebody else's as a child process: started, confined and ended by us.

The child gets a listening socket on which our connection waits already. The socket has no name any
more by then, so nobody else can connect.
"""

from __future__ import annotations

# A guest with a root or shares waits for what is imported here: the modules socket, subprocess,
# signal and tempfile would take longer than all of ours.
import _socket
import os
import threading
from contextlib import closing

from pyvmm import helper
from pyvmm.errors import PyvmmError, VhostUserError
from pyvmm.fd import close_all_but
from pyvmm.helper import Sibling
from pyvmm.hostnet.sockets import PATH_MAX
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.wire import Channel, Stopped, readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn
else:
    import _signal  # signal without its enumerations, which take long to make

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
        self._client: _socket.socket | None = None
        self._child: Sibling

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
        with closing(listener):
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
        argv = command(fd)
        words, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # a full pipe loses words: no matter
        try:
            self._child = _spawn(argv, environment, [fd, *keep], write, confine)
        except OSError as e:
            os.close(words)
            raise self._error(
                f"{self._program} for {self._served} cannot be confined: {e.strerror or e}",
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
        with self._lock:
            self.hang_up()
            status = self._child.ended(self.end_s)
            if status is None:
                helper.kill(self._child)
                self._child.wait()
            self._hear()
        said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        if status is None:
            return said and f"{self._program}: {said}"
        said = f": {said}" if said else ""
        if status < 0:
            from signal import Signals

            return f"{self._program} was killed by {Signals(-status).name}{said}"
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


def _pair() -> tuple[_socket.socket, _socket.socket]:
    """A listening socket, and the first connection to it; nobody else can make one."""
    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC
    listener, client = (_socket.socket(_socket.AF_UNIX, kind) for _ in range(2))
    try:
        directory = _own_directory()  # an abstract address would be anybody's
        try:
            listener.bind(f"{directory}/s")
            try:
                listener.listen(1)
                client.connect(f"{directory}/s")
            finally:
                os.unlink(f"{directory}/s")
        finally:
            os.rmdir(directory)
    except BaseException:
        listener.close()
        client.close()
        raise
    return listener, client


def _own_directory() -> str:
    """Make a directory that nobody else may enter, where programs have their temporary files.

    :raises OSError: there is no place for it.
    """
    given = os.environ.get("TMPDIR", "")
    name = f"pyvmm-{os.urandom(8).hex()}"
    # The name of the socket in it has to fit (sun_path of unix(7)).
    if given.startswith("/") and len(os.fsencode(f"{given}/{name}/s")) <= PATH_MAX:
        try:
            os.mkdir(f"{given}/{name}", 0o700)
            return f"{given}/{name}"
        except OSError:
            pass  # as for other programs, it may be a directory that is not there
    os.mkdir(f"/tmp/{name}", 0o700)
    return f"/tmp/{name}"


def _spawn(
    argv: list[str],
    environment: Mapping[str, str],
    keep: Sequence[int],
    output: int,
    prepare: Callable[[], None],
) -> Sibling:
    """Run a program in a child of this process, in a session of its own, without standard input.

    :param keep: the descriptors that it has besides, under the same numbers.
    :param output: is its standard output and its standard error; lent.
    :param prepare: called in the child, which executes the program next.
    :raises OSError: there can be no process; or from ``prepare``, or from execve(2): the text says
        which.
    """
    told, tell = os.pipe2(os.O_CLOEXEC)
    try:
        # A signal must not make the child leave this function, to do what is ours.
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
        try:
            pid = os.fork()
            if not pid:
                _become(argv, environment, keep, output, prepare, tell, mask)
        finally:
            os.close(tell)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        child = Sibling(pid)
        try:
            problem = b""
            while piece := os.read(told, WORDS_MAX):  # until it runs the program, or has ended
                problem += piece
        except BaseException:
            child.kill()
            child.wait()
            raise
    finally:
        os.close(told)
    if problem:
        child.wait()
        raise OSError(problem.decode(errors="replace"))
    return child


def _become(
    argv: list[str],
    environment: Mapping[str, str],
    keep: Sequence[int],
    output: int,
    prepare: Callable[[], None],
    tell: int,
    mask: set[int],
) -> NoReturn:
    """In the child: become the program, or write to ``tell`` why not."""
    try:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
        os.setsid()  # Ctrl-C is for us
        for ignored in (_signal.SIGPIPE, _signal.SIGXFSZ):  # which Python ignores
            _signal.signal(ignored, _signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for number, source in enumerate((null, output, output)):
            os.dup2(source, number)
        for number in keep:
            os.set_inheritable(number, True)
        prepare()
        close_all_but({*keep, tell})
        os.execve(argv[0], argv, environment)
    except BaseException as e:
        text = (isinstance(e, OSError) and e.strerror) or str(e) or type(e).__name__
        os.write(tell, text.encode(errors="replace"))
    finally:
        os._exit(127)
