"""Our own vDPA device: a child process that serves a VDUSE network card on a tap of ours, for
``vhost-vdpa`` without ``device=``.

As with our own vhost-user back-end (``backend.process``), the child has the tap's descriptors, so
that frames enter and leave at the same place whichever data path runs. It ends when its control
socket does, also if this process is killed, and takes the device with it.

The control socket carries one word, from the child: the path of the device, or an error.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
from contextlib import suppress

from pyvmm.errors import PyvmmError, ThreadStopped, VdpaError
from pyvmm.fd import Fd
from pyvmm.programs import module
from pyvmm.vhostuser.wire import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

    from pyvmm.hostnet.tap import Tap

#: Seconds for the child to make the device, and to remove it.
START_S, END_S = 30.0, 20.0
LINE_MAX = 1024
_numbers = itertools.count()


class VduseProcess:
    """The child. It is made when it is first needed.

    :param tap: lent to the child; offloads, filters and queues are set on this side.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._name = f"pyvmm-{os.getpid()}-{next(_numbers)}"
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._path = ""

    def device(self) -> str:
        """The path of the device for vhost-vdpa.

        :raises VdpaError: the child does not start, or cannot make the device.
        """
        with self._lock:
            if self._child is not None and self._child.poll() is not None:
                self._end()
            if self._child is None:
                self._start()
            return self._path

    def _start(self) -> None:
        import subprocess

        tap = self._tap
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lent = [theirs.fileno(), *(fd.fileno() for fd in tap.fds)]
        words = [self._name, str(lent[0]), tap.name, str(tap.mtu), str(tap.features())]
        try:
            self._child = subprocess.Popen(
                module("pyvmm.backend.vduse_process", *words, *map(str, lent[1:])),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=lent,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as e:
            ours.close()
            raise VdpaError(f"cannot start our own vDPA device: {e.strerror}") from e
        finally:
            theirs.close()
        self._control = ours
        said = b""
        if ours.fileno() in readable([ours.fileno()], START_S):
            said = ours.recv(LINE_MAX)
        if not said.startswith(b"/"):
            self._end()
            raise VdpaError(
                said.decode(errors="replace") or "our own vDPA device does not start",
                "" if said else "as root: modprobe vduse vhost_vdpa",
            )
        self._path = said.decode()

    def _end(self) -> None:
        """Have the child remove the device and end; do so in its place if it does not."""
        import subprocess

        child, self._child = self._child, None
        control, self._control = self._control, None
        if control is not None:
            control.close()
        if child is not None:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if os.path.exists(f"/dev/vduse/{self._name}"):
                from pyvmm.backend.vduse import remove

                remove(self._name)

    def close(self) -> None:
        """End the child; the data path has closed the device. A second call does nothing."""
        with self._lock:
            self._end()


def serve(name: str, control_fd: int, tap: str, mtu: int, features: int, fds: list[int]) -> None:
    """The child's main function: serve the device until the control socket is closed. The parent
    is told if the device cannot be made, and sees if it is not removed.
    """
    from pyvmm.backend.net import NetService
    from pyvmm.backend.ports import LentTap
    from pyvmm.backend.vduse import VduseBackend
    from pyvmm.threads import Thread

    control = socket.socket(fileno=control_fd)
    path = ""

    def log(line: str) -> None:
        nonlocal path
        if line.startswith("ready: "):
            said = line.removeprefix("ready: ")
            path = said if said.startswith("/") else ""
            tell(said)

    def tell(what: str) -> None:
        with suppress(OSError):  # the parent has gone: ``wait`` sees that
            control.send(what.encode()[:LINE_MAX])

    def stopped(problem: str) -> None:
        os._exit(ThreadStopped.exit_code)  # at once: who knows what else is not ours any more

    try:
        port = LentTap(tap, [Fd(fd) for fd in fds], mtu, features)
        service = NetService(port, stopped=stopped)
        with VduseBackend(name, service, mtu=mtu, log=log) as backend:

            def wait() -> None:
                readable([control.fileno()], None)
                backend.stop()

            Thread(target=wait, name="parent", daemon=True).start()
            backend.run()
    except PyvmmError as e:
        if not path:
            tell(str(e))


if __name__ == "__main__":
    number = [int(word) for word in sys.argv[4:]]
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], number[0], number[1], number[2:])
