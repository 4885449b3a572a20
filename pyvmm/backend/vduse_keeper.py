"""The child of ``backend.vduse_process``, which is two processes.

The keeper may do what root may, and touches nothing of the guest's: it has the device made, gives
it to the kernel's framework, and removes it when the control socket ends. The server, which it
forks, answers the kernel and moves the packets, and is confined.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import LentTap
from pyvmm.backend.process import READY, confine, end_of, follow
from pyvmm.backend.vduse import (
    REQUESTS,
    VduseBackend,
    offer,
    own_name,
    remove,
    set_timeout,
    take_back,
)
from pyvmm.backend.vduse_process import LINE_MAX, START_S
from pyvmm.errors import PyvmmError, ThreadStopped
from pyvmm.fd import Fd
from pyvmm.threads import Thread
from pyvmm.vhostuser.wire import readable

#: Seconds for the server to end by itself. The parent of the keeper waits longer (``END_S``).
SERVER_END_S = 2.0


class Server:
    """The confined process, forked from the keeper: it alone touches the guest's memory.

    It tells its keeper READY when the device is made and it is confined, before that why there is
    no device, and after that one line about its end. It ends with its keeper, whatever it does.
    """

    def __init__(self, name: str, control: socket.socket, port: LentTap) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keeper = os.getpid()
        self.pid = os.fork()  # this process has no other thread
        if not self.pid:
            if not follow(keeper):
                os._exit(1)
            self._link.close()
            control.close()
            _serve(name, port, theirs)
            os._exit(1)
        theirs.close()
        port.close()

    def fileno(self) -> int:
        """Readable when it has said something, or has ended."""
        return self._link.fileno()

    def hear(self, seconds: float | None) -> bytes:
        """Its next word; empty if it has ended, or none comes in time."""
        if self.fileno() not in readable([self.fileno()], seconds):
            return b""
        return self._link.recv(LINE_MAX)

    def end(self) -> str:
        """End it, if it has not ended; how it ended, in words. A server that a guest has taken over
        need not end because it is asked to.
        """
        word = self.hear(0)
        self._link.close()
        with Fd(os.pidfd_open(self.pid)) as process:
            if not readable([process.fileno()], SERVER_END_S):
                os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return word.decode(errors="replace") or end_of(status)


def _serve(name: str, port: LentTap, link: socket.socket) -> None:
    def tell(what: str) -> None:
        with suppress(OSError):  # the keeper has gone
            link.send(what.encode()[:LINE_MAX] or b"?")

    def log(line: str) -> None:
        """What happens while it serves is in the counters of the card."""

    def stopped(problem: str) -> None:
        tell(problem)
        os._exit(ThreadStopped.exit_code)  # at once: who knows what else is not ours any more

    def wait() -> None:
        readable([link.fileno()], None)
        os._exit(0)  # the kernel takes back all that is ours; the keeper removes the device

    try:
        service = NetService(port, stopped=stopped)
        backend = VduseBackend(name, service, mtu=port.mtu, log=log)
        Thread(target=wait, name="keeper", daemon=True).start()
        confine(tell, REQUESTS)
        link.send(READY)
        backend.serve()
        tell("the kernel has given the device up, as an answer came too late")
    except PyvmmError as e:
        tell(str(e))
    except BaseException as e:  # nobody else would tell of it
        tell(f"it dies of {type(e).__name__}: {e}")


def keep(name: str, control: socket.socket, port: LentTap) -> None:
    """The child's main function: have the device served and offered until the control socket is
    closed; then remove it.
    """

    def tell(what: str) -> None:
        with suppress(OSError):  # the parent has gone, which the wait below sees
            control.send(what.encode()[:LINE_MAX])

    server = Server(name, control, port)
    word = server.hear(START_S)
    if word != READY:
        ended = server.end()
        tell(word.decode(errors="replace") or ended)
        remove(name)
        return
    try:
        tell(offer(name))
        if control.fileno() not in readable([control.fileno(), server.fileno()], None):
            set_timeout(name, 1)  # nobody answers the VMM, which has the device open
            tell(server.end())
            readable([control.fileno()], None)
        else:
            with suppress(PyvmmError):
                take_back(name)  # with a server that answers
            server.end()
    except PyvmmError as e:
        tell(str(e))
        server.end()
    remove(name)


if __name__ == "__main__":
    number = [int(word) for word in sys.argv[4:]]
    keep(
        # The parent may be somebody else's, and says which of its own devices this is.
        own_name(int(sys.argv[1]), os.getppid()),
        socket.socket(fileno=int(sys.argv[2])),
        LentTap(sys.argv[3], [Fd(fd) for fd in number[2:]], number[0], number[1]),
    )
