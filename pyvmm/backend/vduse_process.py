"""Our own vDPA device: a child process that serves a VDUSE network card on a tap of ours, for
``vhost-vdpa`` without ``device=``.

As with our own vhost-user back-end (``backend.process``), the child has the tap's descriptors, so
that frames enter and leave at the same place whichever data path runs. The child
(``backend.vduse_keeper``) removes the device when its control socket ends, also if this process is
killed.

The control socket carries words from the keeper: first the path of the device, or an error; later
how the server ended, if it does so by itself.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import threading
from contextlib import suppress

from pyvmm import helper
from pyvmm.backend.vduse import own_name
from pyvmm.errors import PyvmmError, VdpaError
from pyvmm.vhostuser.wire import readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.helper import Child
    from pyvmm.hostnet.tap import Tap

#: Seconds for the child to make the device, and to remove it.
START_S, END_S = 30.0, 20.0
LINE_MAX = 1024
_numbers = itertools.count()


class VduseProcess:
    """The child. It is made when it is first needed, and again after the server's death.

    :param tap: lent to the child; offloads, filters and queues are set on this side.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._number = next(_numbers)
        self._name = own_name(self._number, os.getpid())
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._control: socket.socket | None = None
        self._obituary = ""

    def fileno(self) -> int:
        """Readable when the device has lost its server; -1 while there is none."""
        return self._control.fileno() if self._control is not None else -1

    def obituary(self) -> str:
        """How the device lost its server, in words; empty if it has one. Any thread."""
        with self._lock:
            if not self._obituary and self.fileno() in readable([self.fileno()], 0):
                assert self._control is not None
                said = self._control.recv(LINE_MAX)
                self._obituary = said.decode(errors="replace") or "its keeper has ended"
            return self._obituary

    def device(self) -> str:
        """The name of the device for vhost-vdpa; another device has it if the first has lost its
        server.

        :raises VdpaError: the child does not start, or cannot make the device.
        """
        self.obituary()
        with self._lock:
            if self._obituary:
                self._end()
            if self._child is None:
                self._start()
            return self._name

    def _start(self) -> None:
        helper.do("vduse", "")
        self._obituary = ""
        tap = self._tap
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lent = [theirs.fileno(), *(fd.fileno() for fd in tap.fds)]
        words = [str(self._number), str(lent[0]), tap.name, str(tap.mtu), str(tap.features())]
        try:
            words += map(str, lent[1:])
            self._child = helper.start_module(helper.VDUSE_KEEPER, words, lent)
        except BaseException as e:
            ours.close()
            if isinstance(e, OSError):
                raise VdpaError(f"cannot start our own vDPA device: {e.strerror}") from e
            raise
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

    def _end(self) -> None:
        """Have the child remove the device and end; do so in its place if it does not."""
        child, self._child = self._child, None
        control, self._control = self._control, None
        if control is not None:
            control.close()
        if child is not None:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                helper.kill(child)
                child.wait()
            with suppress(PyvmmError):  # without the helper, the next run removes it
                helper.do("vduse", self._name)

    def close(self) -> None:
        """End the child; the data path has closed the device. A second call does nothing."""
        with self._lock:
            self._end()
